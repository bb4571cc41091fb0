"""What a step of the HSIC bottleneck costs, and whether its estimator is as fast as its own arithmetic."""

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lockfree import models
from lockfree.bench.hsic_as_published import published_step
from lockfree.bench.step import batches, machine
from lockfree.bench.timing import interleaved, ratio
from lockfree.convert import convert
from lockfree.hsic import Gaussian, NormalisedHSIC
from lockfree.memory import ActivationMeter
from lockfree.precision import exact_products
from lockfree.rules import HSICBottleneck

_CLASSES, _UNITS, _BLOCKS = 10, 1024, 5


def hsic(rounds: int = 20, repeats: int = 3, device: str = "cpu") -> dict[str, Any]:
    r"""Times steps of 5 blocks of 1024 units (Linear, BatchNorm, ReLU) on batches of 256 random 28 x 28 images, by plain descent.

    Three steps in turn: all blocks by HSIC, the same as published (`lockfree.bench.hsic_as_published`), and backpropagation of the same
    blocks with a linear classifier on them.

    The estimator alone, the gradient of one block's nHSIC with m samples of 1024 features, is held against the time that its arithmetic
    takes at the rate of this machine's products of m x m matrices, timed in turn with it:
    $2m^2d$ for distances, $\tfrac13m^3 + \tfrac23m^3$ for factor and inverse, $4m^3$ for $S^{-1}MS^{-1}$, $2m^2d$ for the gradient.

    Args:
        rounds: Steps of each thing in a repeat.
        repeats: How often everything is measured; the medians over the repeats are returned.
        device: Where to train.

    Returns:
        Ratios by name, the range of each, the peak of saved activations by number of blocks, and what the machine was.
    """
    found: dict[str, list[float]] = {}
    milliseconds: list[float] = []
    for _ in range(repeats):
        seconds = interleaved(_steps(device), rounds=rounds, warm_up=3)
        found.setdefault("published_over_ours", []).append(ratio(seconds, "published", "ours"))
        found.setdefault("ours_over_backprop", []).append(ratio(seconds, "ours", "backprop"))
        found.setdefault("published_over_backprop", []).append(ratio(seconds, "published", "backprop"))
        milliseconds.append(1e3 * statistics.median(seconds["ours"]))
    for _, samples in itertools.product(range(repeats), (256, 512, 1024)):
        seconds = interleaved(_estimator(samples, device), rounds=rounds, warm_up=3)
        share = _operations(samples, _UNITS) / (2 * samples**3)
        value = ratio(seconds, "estimator", "product") / share
        found.setdefault(f"estimator_{samples}_over_its_arithmetic", []).append(value)
    return {
        **{name: statistics.median(values) for name, values in found.items()},
        **{f"{name}_range": [min(values), max(values)] for name, values in found.items()},
        "ours_milliseconds": statistics.median(milliseconds),
        **{f"peak_activation_bytes_{blocks}_blocks": _peak(blocks, device) for blocks in (5, 10)},
        "rounds": rounds,
        "repeats": repeats,
        **machine(device),
    }


def _network(device: str, blocks: int = _BLOCKS, *, classifier: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = (_UNITS,) * blocks
    network = models.normalised_mlp((1, 28, 28), _CLASSES, hidden=hidden).to(device)
    return network if classifier else nn.Sequential(*list(network)[:-1])


def _steps(device: str) -> dict[str, Callable[[], object]]:
    def descent(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-4)

    batch = batches(device)
    by_hsic = convert(
        _network(device), HSICBottleneck(readout="one-hot", classes=_CLASSES), loss=F.cross_entropy, optimizer=descent,
        example_input=batch()[0][:2],
    )  # fmt: skip
    by_backprop = convert(_network(device, classifier=True), "backprop", loss=F.cross_entropy, optimizer=descent)
    published = published_step(_network(device), classes=_CLASSES, learning_rate=1e-4)
    return {
        "ours": lambda: by_hsic.step(*batch()).loss,
        "published": lambda: published(*batch()),
        "backprop": lambda: by_backprop.step(*batch()).loss,
    }


def _estimator(samples: int, device: str) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(samples, _UNITS, generator=generator).to(device) for _ in range(2))
    labels = F.one_hot(torch.arange(samples, device=device) % _CLASSES).float()
    objective, kernel = NormalisedHSIC(balance=500.0), Gaussian(5.0)
    constants = objective.constants(kernel.contrast(x), kernel.contrast(labels))
    a, b = (torch.randn(samples, samples, generator=generator).to(device) for _ in range(2))

    def gradient() -> object:
        with exact_products(x.device.type):
            return objective.gradient(kernel, z, constants)

    return {"estimator": gradient, "product": lambda: a @ b}


def _operations(m: int, d: int) -> float:
    return 4 * m**2 * d + m**3 / 3 + 2 * m**3 / 3 + 4 * m**3


def _peak(blocks: int, device: str) -> int | None:
    """Returns the most bytes of saved activations that a step of so many blocks has alive."""
    batch = batches(device)
    learner = convert(
        _network(device, blocks), HSICBottleneck(readout="one-hot", classes=_CLASSES), loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-4), example_input=batch()[0][:2],
    )  # fmt: skip
    learner.step(*batch())
    meter = ActivationMeter(learner.model)
    with meter.watch():
        learner.step(*batch())
    return meter.peak
