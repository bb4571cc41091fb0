"""What depth costs without the locks: a deep chain of equal blocks, one after the other or as one stack."""

import itertools
import shutil
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.bench.step import machine
from lockfree.bench.timing import interleaved, ratio
from lockfree.convert import OptimizerFactory, convert
from lockfree.rules import SyntheticGradients

_BLOCKS, _CLASSES = 32, 10
_UNITS = {64: 32, 128: 32}
_UNITS_ON_CUDA = {512: 128}
_AT_A_TIME = 20


def depth(rounds: int = 20, repeats: int = 3, device: str = "cpu") -> dict[str, Any]:
    """Times training steps of 32 blocks, Linear and ReLU, under linear synthesisers, and of backpropagation.

    Blocks are stepped by SGD on both sides, synthesisers by SGD (``sgd``) or the rule's own Adam (``adam``). Everything is timed in
    turn, 20 steps each, in one process with PyTorch's present number of threads; where that is above one, plain backpropagation is
    timed with one as well, which is often faster. Backpropagation does 3 products a block and batch, synthetic gradients 5.

    Args:
        rounds: Turns in a repeat.
        repeats: How often everything is measured; the medians over the repeats are returned.
        device: Where to train.

    Returns:
        How many times the samples a second of plain backpropagation (as it is, in one thread, and compiled where a compiler is) and
        of the sequential executor the stacked one reaches, by width and the synthesisers' optimizer; milliseconds a step; the machine.
    """
    widths = _UNITS if device == "cpu" else _UNITS_ON_CUDA
    found: dict[str, list[float]] = {}
    for _, (units, batch), optimizer in itertools.product(range(repeats), widths.items(), ("sgd", "adam")):
        seconds = _measured(units, batch, optimizer, rounds, device)
        name = f"{_BLOCKS}x{units}_{optimizer}"
        for other in seconds.keys() - {"stacked"}:
            found.setdefault(f"{name}_stacked_over_{other}", []).append(ratio(seconds, other, "stacked"))
        for one, values in seconds.items():
            found.setdefault(f"{name}_{one}_milliseconds", []).append(1e3 * statistics.median(values) / _AT_A_TIME)
    return {
        **{name: statistics.median(values) for name, values in found.items()},
        **{f"{name}_range": [min(values), max(values)] for name, values in found.items() if "over" in name},
        "rounds": rounds,
        "repeats": repeats,
        **machine(device),
    }


def _measured(units: int, batch: int, optimizer: str, rounds: int, device: str) -> dict[str, list[float]]:
    feed = _batches(units, batch, device)
    things = {"plain": _plain(_network(units, device), feed)}
    if torch.get_num_threads() > 1 and device == "cpu":
        things["plain_in_one_thread"] = _in_one_thread(_plain(_network(units, device), feed))
    if device == "cpu" and (shutil.which("g++") or shutil.which("clang++")):
        compiled = _network(units, device)
        compiled.compile()
        things["compiled"] = _plain(compiled, feed)
    for executor in ("sequential", "stacked"):
        things[executor] = _learner(executor, units, optimizer, feed, device)
    # Until the pipeline is full nothing is stacked.
    return interleaved(things, rounds=rounds, warm_up=2 + 2 * _BLOCKS // _AT_A_TIME)


def _network(units: int, device: str) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(units, units), nn.ReLU()) for _ in range(_BLOCKS))
    return nn.Sequential(*blocks, nn.Linear(units, _CLASSES)).to(device)


def _batches(units: int, batch: int, device: str) -> Callable[[], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, batch, units, generator=generator).to(device)
    targets = torch.randint(0, _CLASSES, (50, batch), generator=generator).to(device)
    turns = itertools.cycle(zip(inputs, targets, strict=True))
    return lambda: next(turns)


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def _plain(network: nn.Module, feed: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], object]:
    optimizer = _sgd(list(network.parameters()))

    def run() -> None:
        for _ in range(_AT_A_TIME):
            x, y = feed()
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return run


def _in_one_thread(run: Callable[[], object]) -> Callable[[], object]:
    threads = torch.get_num_threads()

    def alone() -> None:
        torch.set_num_threads(1)
        try:
            run()
        finally:
            torch.set_num_threads(threads)

    return alone


_SYNTHESISERS: dict[str, OptimizerFactory | None] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "adam": None,
}


def _learner(
    executor: str, units: int, optimizer: str, feed: Callable[[], tuple[Tensor, Tensor]], device: str
) -> Callable[[], object]:
    learner = convert(
        _network(units, device),
        SyntheticGradients(learning_rate=1e-3),  # at the default of 0.03 such a chain without normalisation soon diverges
        loss=F.cross_entropy,
        optimizer=_sgd,
        auxiliary_optimizer=_SYNTHESISERS[optimizer],
        example_input=feed()[0][:2],
        schedule="pipelined",
        executor=executor,
    )

    def run() -> None:
        for _ in range(_AT_A_TIME):
            _ = learner.step(*feed()).loss

    return run
