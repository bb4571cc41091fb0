"""What stacking buys by kind of block: a training step of 16 equal blocks as one stack, one by one, and by backpropagation.

Local prediction losses with a head a block; the layers of all blocks as one operation each, and by `torch.func.vmap`.
"""

import itertools
import json
import statistics
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree.bench.step import machine
from lockfree.bench.timing import interleaved, ratio
from lockfree.layerwise import Layerwise
from lockfree.models.residual import ResidualBlock

BLOCKS, BATCH, AT_A_TIME, ROUNDS, REPEATS = 16, 32, 5, 12, 3

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear_64": (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU()), (64,)),
    "normalised_64": (lambda: nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()), (64,)),
    "residual_64": (lambda: _Residual(64), (64,)),
    "convolution_8x8x8": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), (8, 8, 8)),
    "residual_convolutions_8x8x8": (lambda: ResidualBlock(8, 8), (8, 8, 8)),
}


class _Residual(nn.Module):
    """x + relu(W x + b), normalised."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(units, units), nn.LayerNorm(units)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.norm(self.linear(x)))


def network(kind: str) -> nn.Sequential:
    """Makes the chain."""
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    top = nn.Sequential(nn.Flatten(), nn.Linear(int(torch.Size(shape).numel()), 10))
    return nn.Sequential(*(make() for _ in range(BLOCKS)), top)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Makes the optimizer."""
    return torch.optim.SGD(parameters, lr=0.01)


def steps(kind: str, executor: str, *, layerwise: bool = True) -> Callable[[], None]:
    """Returns what takes a few steps."""
    shape = KINDS[kind][1]
    generator = torch.Generator().manual_seed(0)
    batches = itertools.cycle(
        [(torch.randn(BATCH, *shape, generator=generator), torch.randint(10, (BATCH,), generator=generator)) for _ in range(20)]
    )
    if executor == "backprop":
        model = network(kind)
        optimizer = sgd(list(model.parameters()))

        def plain() -> None:
            for x, y in itertools.islice(batches, AT_A_TIME):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()

        return plain
    of = Layerwise.of
    if not layerwise:
        Layerwise.of = staticmethod(lambda network: None)
    try:
        learner = lf.convert(
            network(kind),
            "pred",
            loss=F.cross_entropy,
            optimizer=sgd,
            auxiliary_optimizer=sgd,
            example_input=torch.zeros(2, *shape),
            schedule="pipelined",
            executor=executor,
        )
        for x, y in itertools.islice(batches, BLOCKS + 2):  # the pipeline fills, and what is stacked is stacked
            learner.step(x, y)
    finally:
        Layerwise.of = staticmethod(of)

    def run() -> None:
        for x, y in itertools.islice(batches, AT_A_TIME):
            _ = learner.step(x, y).loss

    return run


def main() -> None:
    """Prints ratios as JSON."""
    found: dict[str, list[float]] = {}
    for _, kind in itertools.product(range(REPEATS), KINDS):
        things = {
            "backprop": steps(kind, "backprop"),
            "sequential": steps(kind, "sequential"),
            "vmap": steps(kind, "stacked", layerwise=False),
            "stacked": steps(kind, "stacked"),
        }
        seconds = interleaved(things, rounds=ROUNDS, warm_up=3)
        for other in ("backprop", "sequential", "vmap"):
            found.setdefault(f"{kind}_stacked_over_{other}", []).append(ratio(seconds, other, "stacked"))
        found.setdefault(f"{kind}_stacked_milliseconds", []).append(1e3 * statistics.median(seconds["stacked"]) / AT_A_TIME)
    figures = {name: round(statistics.median(values), 3) for name, values in found.items()}
    ranges = {
        f"{name}_range": [round(min(values), 3), round(max(values), 3)] for name, values in found.items() if "over" in name
    }
    json.dump(
        {"command": "python benchmarks/stacked_layers.py", "repeats": REPEATS, **figures, **ranges, **machine("cpu")},
        sys.stdout,
        indent=1,
    )


if __name__ == "__main__":
    main()
