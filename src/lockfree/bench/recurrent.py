"""What a bootstrap costs beside truncated backpropagation through time, and what a learner holds however long sequences are."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.bench.step import STEP_OPTIMIZERS, machine
from lockfree.bench.timing import interleaved, ratio
from lockfree.memory import ActivationMeter
from lockfree.recurrent import (
    Bootstrap,
    Encoded,
    LeastSquaresGradient,
    NoBootstrap,
    OneHot,
    RecurrentLearner,
    SyntheticGradient,
    convert,
)
from lockfree.recurrent.stretch import Stretch
from lockfree.recurrent.tasks import CharacterModel
from lockfree.values import tensors

HORIZONS = (2, 4, 8, 20)
LENGTHS = (80, 800)

_LENGTH, _STRETCHES = 40, 20  # steps of a timed stretch, and how many different ones there are
_VARIANTS: dict[str, tuple[Bootstrap, bool]] = {
    "dni": (SyntheticGradient(), False),
    "dni_linear": (SyntheticGradient(hidden_layers=0), False),
    "dni_solved": (LeastSquaresGradient(), False),
    "dni_auxiliary": (SyntheticGradient(), True),
    "dni_gamma": (SyntheticGradient(gamma=0.9), False),
}
_OPTIMIZER = STEP_OPTIMIZERS["fused"]


@dataclass(frozen=True)
class Size:
    """How large the character model is.

    Attributes:
        units: Of the LSTM.
        batch: Sequences side by side.
    """

    units: int = 256
    batch: int = 32


def recurrent(
    rounds: int = 10,
    repeats: int = 3,
    device: str = "cpu",
    horizons: Sequence[int] = HORIZONS,
    lengths: tuple[int, int] = LENGTHS,
    size: Size = Size(),
) -> dict[str, Any]:
    """Times a character model of realistic size: an LSTM of 256 units on one-hot characters, 32 rows, stretches of 40 characters.

    The text is the Shakespeare sample inside this package; the optimizer is the command line's own (fused Adam). Each bootstrap is
    timed in turn with truncated backpropagation at the same horizon T, under the same engine: the ratios are of the time of a
    character. ``dni`` is one hidden layer as wide as the LSTM, ``dni_linear`` none; ``dni_gamma`` is the first with a γ other than its
    scale, which takes half a backward pass more. ``engine`` is truncated backpropagation over the plain loop that one would write by
    hand.

    What autograd keeps is metered at T = 8 over one stretch of 80 and of 800 steps, its inputs left out.

    Args:
        rounds: Stretches of each thing in a repeat.
        repeats: How often everything is measured; the medians over the repeats are returned.
        device: Where to train.
        horizons: T, each a divisor of 40.
        lengths: Steps of the shorter and of the longer stretch that memory is metered over.
        size: Of the model.

    Returns:
        Ratios by name, the range of each, microseconds of a character of truncated backpropagation, bytes, and what the machine was.
    """
    found: dict[str, list[float]] = {}
    seconds_of_none: dict[int, list[float]] = {horizon: [] for horizon in horizons}
    for _, horizon in itertools.product(range(repeats), horizons):
        things = {"plain": _plain(horizon, size, device), "none": _learning(NoBootstrap(), False, horizon, size, device)}
        things |= {name: _learning(*variant, horizon, size, device) for name, variant in _VARIANTS.items()}
        seconds = interleaved(things, rounds=rounds, warm_up=2)
        found.setdefault(f"engine_over_plain_T{horizon}", []).append(ratio(seconds, "none", "plain"))
        for name in _VARIANTS:
            found.setdefault(f"{name}_over_truncated_T{horizon}", []).append(ratio(seconds, name, "none"))
        seconds_of_none[horizon].append(statistics.median(seconds["none"]))
    characters = _LENGTH * size.batch
    return {
        **{name: statistics.median(values) for name, values in found.items()},
        **{f"{name}_range": [min(values), max(values)] for name, values in found.items()},
        **{
            f"truncated_T{horizon}_microseconds_a_character": 1e6 * statistics.median(values) / characters
            for horizon, values in seconds_of_none.items()
        },
        **_held(lengths, size, device),
        "rounds": rounds,
        "repeats": repeats,
        **machine(device),
    }


def _held(lengths: tuple[int, int], size: Size, device: str) -> dict[str, Any]:
    """Bytes that autograd keeps at most, by what stands for the time beyond the horizon and by the length of the stretch."""
    found: dict[str, Any] = {}
    for name, (bootstrap, auxiliary) in {"truncated": (NoBootstrap(), False), **_VARIANTS}.items():
        for length in lengths:
            found[f"{name}_saved_bytes_{length}_steps"] = saved(bootstrap, auxiliary, length, size, device)
        shorter, longer = (found[f"{name}_saved_bytes_{length}_steps"] for length in lengths)
        found[f"{name}_saved_{lengths[1]}_over_{lengths[0]}"] = longer / shorter
    return found


def saved(
    bootstrap: Bootstrap, auxiliary: bool, length: int, size: Size = Size(), device: str = "cpu", horizon: int = 8
) -> int:
    """Meters the second of two stretches.

    Args:
        bootstrap: What stands for the gradient from beyond the horizon.
        auxiliary: Whether the core also learns the auxiliary task.
        length: Steps of a stretch.
        size: Of the model.
        device: Where to train.
        horizon: T.

    Returns:
        Most bytes that autograd held at once, those of parameters and of the stretch itself left out.
    """
    task = _task(size, length)
    learner = _learner(task, bootstrap, auxiliary, horizon, size, device)
    first, second = (task.stretch(number).to(device) for number in range(2))
    learner.step(*first)
    meter = ActivationMeter(learner.core, learner.readout, *learner.auxiliaries)
    with meter.watch(tensors(tuple(second))):
        learner.step(*second)
    return meter.peak


def _task(size: Size, length: int = _LENGTH) -> CharacterModel:
    return CharacterModel(text="shakespeare-sample", batch=size.batch, length=length)


def _modules(task: CharacterModel, size: Size, device: str) -> tuple[nn.LSTM, nn.Linear]:
    torch.manual_seed(0)
    return nn.LSTM(task.symbols, size.units).to(device), nn.Linear(size.units, task.classes).to(device)


def _learner(
    task: CharacterModel, bootstrap: Bootstrap, auxiliary: bool, horizon: int, size: Size, device: str
) -> RecurrentLearner:
    lstm, readout = _modules(task, size, device)
    core = Encoded(OneHot(task.symbols), lstm)
    return convert(
        core, readout, horizon=horizon, bootstrap=bootstrap, auxiliary=auxiliary, loss=F.cross_entropy, optimizer=_OPTIMIZER
    )


def _stretches(task: CharacterModel, device: str) -> Callable[[], Stretch]:
    """Many of them, one after the other and from the beginning again."""
    turns = itertools.cycle([task.stretch(number).to(device) for number in range(_STRETCHES)])
    return lambda: next(turns)


def _learning(bootstrap: Bootstrap, auxiliary: bool, horizon: int, size: Size, device: str) -> Callable[[], object]:
    """Returns a function that learns the next stretch."""
    task = _task(size)
    learner, following = _learner(task, bootstrap, auxiliary, horizon, size, device), _stretches(task, device)
    return lambda: learner.step(*following()).loss


def _plain(horizon: int, size: Size, device: str) -> Callable[[], object]:
    """Returns a function that does the same by a plain loop: no `done` to heed, since a row of text does not end in a stretch."""
    task = _task(size)
    (lstm, readout), following = _modules(task, size, device), _stretches(task, device)
    optimizer = _OPTIMIZER([*lstm.parameters(), *readout.parameters()])
    state: tuple[Tensor, Tensor] | None = None

    def run() -> float:
        nonlocal state
        inputs, targets, _ = following()
        losses = []
        for shown, asked in zip(inputs.split(horizon), targets.split(horizon), strict=True):
            outputs, state = lstm(F.one_hot(shown, task.symbols).float(), state)
            loss = F.cross_entropy(readout(outputs).flatten(0, 1), asked.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = (state[0].detach(), state[1].detach())
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()

    return run
