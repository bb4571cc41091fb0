"""Recurrent cores for the tests, each with a plain way to run one step of it, and backpropagation through time as a loop.

Up to the learners at the end nothing here knows of the package but the modules that it offers: it is what the package is compared with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lockfree.recurrent import Encoded, LeastSquaresGradient, Stacked, SyntheticGradient, convert

FEATURES, HIDDEN, SYMBOLS, CLASSES = 3, 4, 7, 5
F64 = torch.float64
TIGHT = {"rtol": 0.0, "atol": 1e-12}
State = Any


class Carrying(nn.Module):
    """Takes stretches; its state is a tree of two levels, one of whose leaves is one number a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(FEATURES + 1, HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, inputs, state=None):
        steps, samples = inputs.shape[:2]
        if state is None:
            zeros = self.mix.weight.new_zeros
            state = (zeros(1, samples, HIDDEN), {"slow": [zeros(samples, HIDDEN)], "level": zeros(samples)})
        h, rest = state
        slow, level, outputs = rest["slow"][0], rest["level"], []
        for t in range(steps):
            made, h = self.gru(torch.cat([inputs[t], level.unsqueeze(1)], dim=1).unsqueeze(0), h)
            slow = 0.7 * slow + 0.3 * self.mix(made[0]).tanh()
            level = 0.5 * level + slow.mean(1)
            outputs.append(made[0] + slow)
        return torch.stack(outputs), (h, {"slow": [slow], "level": level})


class Counting(nn.Module):
    """Takes single steps; its state is a dict with a counter of steps, which the dynamics depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.over = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, state=None):
        if state is None:
            state = {"count": torch.zeros(len(x), dtype=torch.int64), "h": x.new_zeros(len(x), HIDDEN)}
        clock = state["count"].to(x.dtype).unsqueeze(1)
        h = torch.tanh(self.into(x) + torch.cos(clock) * self.over(state["h"]))
        return h, {"count": state["count"] + 1, "h": h}


class Starting(nn.Module):
    """Takes single steps, and begins in a state that it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(FEATURES, HIDDEN)
        self.start = nn.Parameter(torch.linspace(-1, 1, HIDDEN))

    def initial_state(self, samples: int):
        return torch.tanh(self.start).repeat(samples, 1)

    def forward(self, x, h):
        h = self.cell(x, h)
        return h, h


class Columns(nn.Module):
    """Takes stretches; the samples of its state lie along the last dimension, and it begins at one."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.over = nn.Linear(FEATURES, HIDDEN), nn.Parameter(0.6 * torch.randn(HIDDEN, HIDDEN))

    def initial_state(self, samples: int):
        return self.over.new_ones(HIDDEN, samples)

    def forward(self, inputs, state):
        outputs = []
        for x in inputs:
            state = torch.tanh(self.into(x).t() + self.over @ state)
            outputs.append(state.t())
        return torch.stack(outputs), state


class Summing(nn.Module):
    """Takes single steps; one number a sample is all its state, and all its output."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.keep = nn.Linear(FEATURES, 1), nn.Parameter(torch.tensor(0.8))

    def forward(self, x, level=None):
        level = torch.tanh(self.into(x).squeeze(1) + (0 if level is None else self.keep * level))
        return level.unsqueeze(1), level


class Echo(nn.Module):
    """Takes single steps; what it feeds back through is fixed, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(FEATURES, HIDDEN)
        self.register_buffer("over", 0.6 * torch.randn(HIDDEN, HIDDEN))

    def forward(self, x, h=None):
        h = self.into(x).tanh() if h is None else torch.tanh(self.into(x) + h @ self.over)
        return h, h


@dataclass(frozen=True, kw_only=True)
class Case:
    """A core, and how to run it without the package.

    Attributes:
        make: Makes it.
        begin: Makes the state in which sequences begin, from the core and a number of samples.
        step: Runs one step, (core, x (m, ...), state) to (output (m, features), state).
        dims: Where the samples lie in each tensor of the state, in tree order.
        outputs: Features of an output.
        symbols: Whether inputs are whole numbers instead of vectors.
    """

    make: Callable[[], nn.Module]
    begin: Callable[[Any, int], State]
    step: Callable[[Any, Tensor, State], tuple[Tensor, State]]
    dims: tuple[int, ...]
    outputs: int = HIDDEN
    symbols: bool = False


def _zeros(*sizes: int) -> Callable[[Any, int], State]:
    """Zeros of shape (layers, m, size) for each pair of numbers, or (m, size) where layers is 0."""
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))

    def begin(core, samples):
        made = [torch.zeros(*([layers] if layers else []), samples, size, dtype=F64) for layers, size in pairs]
        return made[0] if len(made) == 1 else tuple(made)

    return begin


def _by_stretch(core, x, state):
    outputs, state = core(x.unsqueeze(0), state)
    return outputs[0], state


def _by_row(core, x, state):
    outputs, state = core(x.unsqueeze(1), state)
    return outputs[:, 0], state


def _by_cell(core, x, state):
    state = core(x, state)
    return (state[0] if isinstance(state, tuple) else state), state


def _stack(core, x, state):
    lstm, cell = core.cores
    outputs, below = lstm(x.unsqueeze(0), state[0])
    above = cell(outputs[0], state[1])
    return above, (below, above)


def _embedded(core, x, state):
    outputs, state = core.core(core.encoder(x).unsqueeze(0), state)
    return outputs[0], state


def _begin_carrying(core, samples):
    zeros = core.mix.weight.new_zeros
    return zeros(1, samples, HIDDEN), {"slow": [zeros(samples, HIDDEN)], "level": zeros(samples)}


CASES: dict[str, Case] = {
    "rnn": Case(make=lambda: nn.RNN(FEATURES, HIDDEN), begin=_zeros(1, HIDDEN), step=_by_stretch, dims=(1,)),
    "rnn-relu": Case(
        make=lambda: nn.RNN(FEATURES, HIDDEN, 2, nonlinearity="relu"), begin=_zeros(2, HIDDEN), step=_by_stretch, dims=(1,)
    ),
    "gru": Case(make=lambda: nn.GRU(FEATURES, HIDDEN, 2), begin=_zeros(2, HIDDEN), step=_by_stretch, dims=(1,)),
    "lstm": Case(
        make=lambda: nn.LSTM(FEATURES, HIDDEN, 2, batch_first=True),
        begin=_zeros(2, HIDDEN, 2, HIDDEN),
        step=_by_row,
        dims=(1, 1),
    ),
    "lstm-proj": Case(
        make=lambda: nn.LSTM(FEATURES, 6, proj_size=HIDDEN), begin=_zeros(1, HIDDEN, 1, 6), step=_by_stretch, dims=(1, 1)
    ),
    "rnn-cell": Case(make=lambda: nn.RNNCell(FEATURES, HIDDEN), begin=_zeros(0, HIDDEN), step=_by_cell, dims=(0,)),
    "gru-cell": Case(make=lambda: nn.GRUCell(FEATURES, HIDDEN), begin=_zeros(0, HIDDEN), step=_by_cell, dims=(0,)),
    "lstm-cell": Case(
        make=lambda: nn.LSTMCell(FEATURES, HIDDEN), begin=_zeros(0, HIDDEN, 0, HIDDEN), step=_by_cell, dims=(0, 0)
    ),
    "stacked": Case(
        make=lambda: Stacked(nn.LSTM(FEATURES, 6), nn.GRUCell(6, HIDDEN)),
        begin=lambda core, samples: (_zeros(1, 6, 1, 6)(core, samples), _zeros(0, HIDDEN)(core, samples)),
        step=_stack,
        dims=(1, 1, 0),
    ),
    "encoded": Case(
        make=lambda: Encoded(nn.Embedding(SYMBOLS, FEATURES), nn.GRU(FEATURES, HIDDEN)),
        begin=_zeros(1, HIDDEN),
        step=_embedded,
        dims=(1,),
        symbols=True,
    ),
    "carrying": Case(make=Carrying, begin=_begin_carrying, step=_by_stretch, dims=(1, 0, 0)),
    "counting": Case(
        make=Counting,
        begin=lambda core, m: {"count": torch.zeros(m, dtype=torch.int64), "h": torch.zeros(m, HIDDEN, dtype=F64)},
        step=lambda core, x, state: core(x, state),
        dims=(0, 0),
    ),
    "starting": Case(
        make=Starting,
        begin=lambda core, samples: core.initial_state(samples),
        step=lambda core, x, state: core(x, state),
        dims=(0,),
    ),
    "columns": Case(make=Columns, begin=lambda core, m: torch.ones(HIDDEN, m, dtype=F64), step=_by_stretch, dims=(1,)),
    "echo": Case(make=Echo, begin=_zeros(0, HIDDEN), step=lambda core, x, state: core(x, state), dims=(0,)),
    "summing": Case(
        make=Summing,
        begin=lambda core, samples: torch.zeros(samples, dtype=F64),
        step=lambda core, x, state: core(x, state),
        dims=(0,),
        outputs=1,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A stretch of sequences that end here and there."""

    inputs: Tensor
    targets: Tensor
    done: Tensor

    def __getitem__(self, steps: slice) -> "Batch":
        return Batch(inputs=self.inputs[steps], targets=self.targets[steps], done=self.done[steps])

    def __iter__(self):
        yield from (self.inputs, self.targets, self.done)


def batch_for(case: Case, steps: int = 11, samples: int = 6, *, seed: int = 3, ends: float = 0.2) -> Batch:
    """Draws a batch in which each sample ends at each step with some probability; the first never does."""
    generator = torch.Generator().manual_seed(seed)
    if case.symbols:
        inputs = torch.randint(0, SYMBOLS, (steps, samples), generator=generator)
    else:
        inputs = torch.randn(steps, samples, FEATURES, generator=generator, dtype=F64)
    targets = torch.randint(0, CLASSES, (steps, samples), generator=generator)
    done = torch.rand(steps, samples, generator=generator) < ends
    done[:, 0] = False
    return Batch(inputs=inputs, targets=targets, done=done)


def network_for(case: Case, seed: int = 1) -> tuple[Any, nn.Linear]:
    """Makes a core and a readout in float64."""
    torch.manual_seed(seed)
    core, readout = case.make().to(F64), nn.Linear(case.outputs, CLASSES, dtype=F64)
    return core, readout


def mixed(chosen: Tensor, one: State, other: State, dims: tuple[int, ...]) -> State:
    """Takes each sample from one of two states."""
    leaves, tree = pytree.tree_flatten(one)
    pairs = zip(leaves, pytree.tree_leaves(other), dims, strict=True)
    shaped = [(chosen.reshape([-1 if i == dim else 1 for i in range(a.dim())]), a, b) for a, b, dim in pairs]
    return pytree.tree_unflatten([torch.where(*three) for three in shaped], tree)


def rows_of(state: State, dims: tuple[int, ...]) -> Tensor:
    """Writes a state as a matrix with a row for each sample."""
    pairs = zip(pytree.tree_leaves(state), dims, strict=True)
    return torch.cat([a.movedim(dim, 0).reshape(a.shape[dim], -1) for a, dim in pairs if a.is_floating_point()], dim=1)


def detached(state: State) -> State:
    """Cuts a state off, and lets gradients be taken with respect to it."""
    return pytree.tree_map(lambda a: a.detach().requires_grad_(a.is_floating_point()), state)


def loop(case: Case, core: Any, readout: Any, batch: Batch, state: State = None) -> tuple[Tensor, State, Tensor]:
    """Runs step by step; returns the loss of each step, the state after the last (not yet begun anew), and the last output."""
    samples, losses, output = batch.inputs.shape[1], [], torch.empty(0)
    state = case.begin(core, samples) if state is None else state
    for t in range(len(batch.inputs)):
        if t:
            state = mixed(batch.done[t - 1], case.begin(core, samples), state, case.dims)
        output, state = case.step(core, batch.inputs[t], state)
        losses.append(F.cross_entropy(readout(output), batch.targets[t]))
    return torch.stack(losses), state, output


def named(core: nn.Module, readout: nn.Module) -> dict[str, Tensor]:
    """The parameters as the learner names them."""
    parts = {"core": core, "readout": readout}
    return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}


def gradients(parameters: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """The gradient of a loss with respect to each parameter; zero where there is no path."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(p) if one is None else one for (name, p), one in pairs}


def full(case: Case, core: Any, readout: Any, batch: Batch, counted: int) -> dict[str, Tensor]:
    """Backpropagation through all of a stretch, of the sum of its steps' losses over as many as count for a mean."""
    return gradients(named(core, readout), loop(case, core, readout, batch)[0].sum() / counted)


def truncated(case: Case, core: Any, readout: Any, batch: Batch, horizon: int) -> dict[str, Tensor]:
    """The same, but no gradient passes the ends of chunks."""
    parameters, state, total = named(core, readout), None, {}
    counted = min(horizon, len(batch.inputs))
    for start in range(0, len(batch.inputs), horizon):
        chunk = batch[start : start + horizon]
        losses, after, _ = loop(case, core, readout, chunk, state)
        found = gradients(parameters, losses.sum() / counted)
        total = {name: total.get(name, 0) + one for name, one in found.items()}
        # Only what begins a sequence is still in a graph: a state that is learnt learns from its first chunk.
        state = mixed(chunk.done[-1], case.begin(core, chunk.inputs.shape[1]), detached(after), case.dims)
    return total


def borders(case: Case, core: Any, readout: Any, batch: Batch, horizon: int) -> list[Any]:
    """Runs chunk by chunk at fixed weights; returns what each begins with (leaves), its losses, its end and its last output."""
    chunks, start = [], None
    samples = batch.inputs.shape[1]
    for first in range(0, len(batch.inputs), horizon):
        chunk = batch[first : first + horizon]
        # What begins a sequence stays in the graph of a state that is learnt, and what goes on is a leaf.
        leaf = detached(case.begin(core, samples) if start is None else start)
        fresh = torch.ones(samples, dtype=torch.bool) if start is None else batch.done[first - 1]
        state = mixed(fresh, case.begin(core, samples), leaf, case.dims)
        losses, after, output = loop(case, core, readout, chunk, state)
        chunks.append((leaf, losses, after, output))
        start = after
    return chunks


def gradient_rows(case: Case, loss: Tensor, leaf: State) -> Tensor:
    """The gradient of a loss with respect to a state, as a matrix with a row for each sample."""
    leaves, tree = pytree.tree_flatten(leaf)
    wanted = [one for one in leaves if one.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True))
    made = []
    for one in leaves:
        gradient = next(found) if one.requires_grad else one
        made.append(torch.zeros_like(one) if gradient is None else gradient)
    return rows_of(pytree.tree_unflatten(made, tree), case.dims)


# ---- learners ---------------------------------------------------------------------------------------------------------------

EVERY = {
    "none": "none",
    "dni": SyntheticGradient(scale=0.5, gamma=0.9),
    "dni-6": SyntheticGradient(steps=6, reads="output"),
    "dni-solved": LeastSquaresGradient(every=2),
}


def descent(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def learner_for(core, readout, bootstrap, *, horizon=3, optimizer=momentum, loss=F.cross_entropy, **more):
    return convert(core, readout, horizon=horizon, bootstrap=bootstrap, loss=loss, optimizer=optimizer, **more)


def everything(learner):
    """All that a learner knows but the random generators, as tensors and plain data by path."""
    state = {name: one for name, one in learner.state_dict().items() if name != "rng"}
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_leaves_with_path(state)}


def assert_same(one, other, atol=0.0):
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        if isinstance(leaf, torch.Tensor):
            torch.testing.assert_close(leaf, other[path], rtol=0.0, atol=atol, msg=lambda text, path=path: f"{path}: {text}")
        else:
            assert leaf == other[path], path
