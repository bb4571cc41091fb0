"""Recurrent cores with an explicit state: PyTorch's own, the user's, and what is put together of them.

A core is any module that maps (inputs, state) to (outputs, state). Inputs are a stretch of time (steps, m, ...), or a single step
(m, ...); which of the two, `understand` finds out by trying.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lockfree.objective import describe
from lockfree.recurrent.state import Layout, State, layout_of
from lockfree.rng import undisturbed

M = TypeVar("M", bound=nn.Module)


class Core(ABC, Generic[M]):
    """How a module is run over a stretch of time, whatever its own conventions are.

    Args:
        module: The user's own.
    """

    def __init__(self, module: M) -> None:
        self.module = module

    @abstractmethod
    def run(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Runs over (steps, m, ...) and returns outputs (steps, m, ...) and the state after the last step."""

    @abstractmethod
    def initial(self, inputs: Tensor) -> State:
        """Returns the state in which sequences begin, for as many samples as there are in inputs (steps, m, ...)."""


class _Sequence(Core[nn.RNNBase]):
    """PyTorch's RNN, GRU and LSTM: they take stretches."""

    def run(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        if not self.module.batch_first:
            return self.module(inputs, state)
        outputs, state = self.module(inputs.transpose(0, 1), state)
        return outputs.transpose(0, 1), state

    def initial(self, inputs: Tensor) -> State:
        module, like = self.module, next(self.module.parameters())
        h = like.new_zeros(module.num_layers, inputs.shape[1], module.proj_size or module.hidden_size)
        return (h, like.new_zeros(module.num_layers, inputs.shape[1], module.hidden_size)) if module.mode == "LSTM" else h


class _Cell(Core[nn.RNNCellBase]):
    """PyTorch's cells: they take a step, and the first tensor of their state is their output."""

    def run(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        outputs = []
        for step in inputs.unbind():
            state = self.module(step, state)
            outputs.append(pytree.tree_leaves(state)[0])
        return torch.stack(outputs), state

    def initial(self, inputs: Tensor) -> State:
        zeros = [next(self.module.parameters()).new_zeros(inputs.shape[1], self.module.hidden_size) for _ in range(2)]
        return tuple(zeros) if isinstance(self.module, nn.LSTMCell) else zeros[0]


class _Own(Core[nn.Module]):
    """A user's module; without an ``initial_state(samples)`` of its own, sequences begin at zero, which it must take ``None`` for.

    Args:
        module: It.
        zeros: Makes zeros for so many samples, if they are known.
    """

    def __init__(self, module: nn.Module, zeros: Callable[[int], State] | None) -> None:
        super().__init__(module)
        self._zeros = zeros

    def run(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        return self.module(inputs, state)

    def initial(self, inputs: Tensor) -> State:
        make = getattr(self.module, "initial_state", None) or self._zeros
        return None if make is None else make(inputs.shape[1])


class _OwnSteps(_Own):
    """A user's module that takes one step at a time."""

    def run(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        outputs = []
        for step in inputs.unbind():
            output, state = self.module(step, state)
            outputs.append(output)
        return torch.stack(outputs), state


KNOWN: dict[type[nn.Module], type[Core]] = {
    nn.RNN: _Sequence,
    nn.GRU: _Sequence,
    nn.LSTM: _Sequence,
    nn.RNNCell: _Cell,
    nn.GRUCell: _Cell,
    nn.LSTMCell: _Cell,
}
"""How PyTorch's own modules are run."""


def understand(module: nn.Module, inputs: Tensor) -> tuple[Core, Layout]:
    """Finds out how a module is run, and how its state is built, by running it on two and on three samples.

    A user's module takes stretches if two steps at once are the same as one after the other, and single steps else.

    Args:
        module: A core.
        inputs: An example, (steps, m, ...); only its shape after these two, its dtype and its device matter.

    Raises:
        ValueError: If it is not a core, with how to make one of it.
    """
    if getattr(module, "bidirectional", False):
        raise ValueError(
            f"{type(module).__name__} is bidirectional: it reads the end of a sequence first, so it has no horizon"
        )
    with undisturbed(module), torch.no_grad():
        module.eval()
        make = KNOWN.get(type(module))
        core = _own(module, inputs) if make is None else make(module)
        two, three = (core.run(_probe(inputs, samples), core.initial(_probe(inputs, samples)))[1] for samples in (2, 3))
        return core, layout_of(two, three)


def _probe(inputs: Tensor, samples: int, steps: int = 2) -> Tensor:
    """Makes inputs that any core takes: of small numbers, or the symbol 0."""
    shape = (steps, samples, *inputs.shape[2:])
    if not inputs.is_floating_point():
        return inputs.new_zeros(shape)
    count = torch.Size(shape).numel()
    return torch.linspace(-0.5, 0.5, count, dtype=inputs.dtype, device=inputs.device).view(shape)


def _own(module: nn.Module, inputs: Tensor) -> Core:
    found, tried = None, []
    for kind in (_Own, _OwnSteps):
        try:
            core = kind(module, None)
            reason = _consistent(core, _probe(inputs, 2))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if reason is None:
            found = kind
            break
        tried.append(reason)
    if found is None:
        raise ValueError(
            f"{type(module).__name__} is not a recurrent core: on inputs (steps, samples, ...) {tried[0]}; on one step (samples, ...) "
            f"{tried[1]}. A core maps (inputs, state) to (outputs, state), with None or its own initial_state(samples) to begin with"
        )
    core = found(module, None)
    if getattr(module, "initial_state", None) is not None:
        return core
    return found(module, _zeros(core, inputs))


def _consistent(core: Core, inputs: Tensor) -> str | None:
    """Says why running two steps at once is not running them one by one; ``None`` if it is."""
    made = core.run(inputs, core.initial(inputs))
    if not isinstance(made, tuple) or len(made) != 2:
        return f"it returns {describe(made)}, not a pair (outputs, state)"
    outputs, state = made
    if not isinstance(outputs, Tensor) or outputs.shape[:2] != inputs.shape[:2]:
        return f"it gives outputs {describe(outputs)} for inputs {tuple(inputs.shape)}"
    first, between = core.run(inputs[:1], core.initial(inputs))
    second, after = core.run(inputs[1:], between)
    one, other = pytree.tree_leaves((outputs, state)), pytree.tree_leaves((torch.cat([first, second]), after))
    if len(one) != len(other) or any(a.shape != b.shape for a, b in zip(one, other, strict=True)):
        return "its state depends in shape on the number of steps"
    if [leaf.shape for leaf in pytree.tree_leaves(between)] != [leaf.shape for leaf in pytree.tree_leaves(after)]:
        return "its state grows with the steps"
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(one, other, strict=True)):
        return "two steps at once are not the same as one after the other"
    return None


def _zeros(core: Core, inputs: Tensor) -> Callable[[int], State]:
    """Returns what makes zeros for so many samples.

    Raises:
        ValueError: If the module does not begin there when it is given no state.
    """
    two, three = (core.run(_probe(inputs, samples), None)[1] for samples in (2, 3))
    zeros = layout_of(two, three).zeros
    inputs = _probe(inputs, 2)
    from_none, from_zeros = (core.run(inputs, state)[0] for state in (None, zeros(2)))
    if not torch.allclose(from_none, from_zeros, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{type(core.module).__name__} does not begin at zero when it is given no state: give it a method initial_state(samples)"
        )
    return zeros


class Stacked(nn.Module):
    """Cores one upon the other; its state is the tuple of theirs.

    Args:
        *cores: Bottom to top, one or more; each is given the outputs of the one below.

    Raises:
        ValueError: If there is none.

    Example:
        >>> core = Stacked(nn.LSTM(3, 4), nn.GRUCell(4, 5))
        >>> outputs, state = core(torch.zeros(7, 2, 3), core.initial_state(2))
        >>> outputs.shape
        torch.Size([7, 2, 5])
    """

    def __init__(self, *cores: nn.Module) -> None:
        super().__init__()
        if not cores:
            raise ValueError("a stack needs one core or more")
        self.cores = nn.ModuleList(cores)
        self._understood: list[Core] = []

    def forward(self, inputs: Tensor, state: tuple[State, ...] | None = None) -> tuple[Tensor, tuple[State, ...]]:
        """Runs over inputs (steps, m, ...)."""
        states = list(state) if state is not None else [None] * len(self.cores)
        for index, core in enumerate(self._adapters(inputs)):
            before = states[index] if states[index] is not None else core.initial(inputs)
            inputs, states[index] = core.run(inputs, before)
        return inputs, tuple(states)

    def initial_state(self, samples: int) -> tuple[State, ...] | None:
        """Returns the states in which the cores begin; ``None`` before anything has been run, which stands for them."""
        if not self._understood:
            return None
        return tuple(core.initial(torch.empty(1, samples)) for core in self._understood)

    def _adapters(self, inputs: Tensor) -> list[Core]:
        if not self._understood:
            found = []
            for module in self.cores:
                core, _ = understand(module, inputs)
                found.append(core)
                with undisturbed(module), torch.no_grad():
                    inputs = core.run(inputs, core.initial(inputs))[0]
            self._understood = found
        return self._understood


class Encoded(nn.Module):
    """A core behind something that works on each step alone, such as an embedding of symbols.

    Args:
        encoder: Maps (n, ...) to (n, features).
        core: What it feeds.

    Example:
        >>> core = Encoded(nn.Embedding(10, 3), nn.GRU(3, 4))
        >>> core(torch.zeros(5, 2, dtype=torch.int64), core.initial_state(2))[0].shape
        torch.Size([5, 2, 4])
    """

    def __init__(self, encoder: nn.Module, core: nn.Module) -> None:
        super().__init__()
        self.encoder, self.core = encoder, core
        self._understood: Core | None = None

    def forward(self, inputs: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Runs over inputs (steps, m, ...)."""
        steps, samples = inputs.shape[:2]
        encoded = self.encoder(inputs.flatten(0, 1)).unflatten(0, (steps, samples))
        if self._understood is None:
            self._understood, _ = understand(self.core, encoded)
        return self._understood.run(encoded, self._understood.initial(encoded) if state is None else state)

    def initial_state(self, samples: int) -> State:
        """Returns the state in which the core begins; ``None`` before anything has been run, which stands for it."""
        return None if self._understood is None else self._understood.initial(torch.empty(1, samples))


class OneHot(nn.Module):
    """Symbols as one-hot vectors.

    Args:
        symbols: How many there are.
        dtype: Of the vectors.
    """

    def __init__(self, symbols: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.symbols, self.dtype = symbols, dtype

    def forward(self, inputs: Int64[Tensor, " n"]) -> Tensor:
        """Maps (n,) to (n, symbols)."""
        return F.one_hot(inputs, self.symbols).to(self.dtype or torch.get_default_dtype())
