"""What looking costs: a look of each probe over the training between two looks."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from lockfree import models
from lockfree.bench.step import STEP_OPTIMIZERS, machine
from lockfree.bench.timing import interleaved
from lockfree.convert import convert
from lockfree.probes import PROBES, View


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """A network in training.

    Attributes:
        model: Its name.
        shape: Of a sample.
        rule: Command-line name.
        probes: What looks at it.
        samples: Training samples of the data set that has such samples.
        steps: Steps that are timed at once.
    """

    model: str
    shape: tuple[int, int, int]
    rule: str
    probes: tuple[str, ...]
    samples: int
    steps: int


_SIGHTS = ("gradient-quality", "alignment", "representation")
_SETTINGS: dict[str, _Setting] = {
    f"{name}_{rule}": _Setting(
        model=model,
        shape=shape,
        rule=rule,
        probes=_SIGHTS if rule == "backprop" else (*_SIGHTS, "implied-loss"),
        samples=samples,
        steps=steps,
    )
    for name, (model, shape, samples, steps) in {
        "mlp": ("mlp", (1, 28, 28), 60_000, 100),
        "resnet20": ("resnet20", (3, 32, 32), 50_000, 2),
        "digits": ("mlp", (1, 8, 8), 1_437, 100),
    }.items()
    for rule in ("backprop", "cdni")
}
_BATCH, _LOOKED_AT = 256, 512


def probes(rounds: int = 3, device: str = "cpu") -> dict[str, Any]:
    """Times looks of probes at their default schedule, at the start and after each of five epochs, in turn with training steps.

    The MLP 784-256-256-256-10 on MNIST's 60,000 images, ResNet-20 on CIFAR-10's 50,000 and the MLP on digits' 1,437, batches of 256,
    fused Adam, 512 samples to look at (128 of digits); an epoch's time is that of its steps. Arithmetic takes the same time on
    the random images that stand for them.

    Args:
        rounds: Looks of each probe.
        device: Where to train.

    Returns:
        Looking over training, by network, rule and probe, and what the machine was.
    """
    found: dict[str, float] = {}
    for name, setting in _SETTINGS.items():
        looked_at = min(_LOOKED_AT, max(_LOOKED_AT // 4, setting.samples // 100))
        seconds = interleaved(_things(setting, looked_at, device), rounds=rounds, warm_up=1)
        epoch = statistics.median(seconds.pop("steps")) / setting.steps * setting.samples / _BATCH
        for probe, looks in seconds.items():
            found[f"{name}_{probe}"] = 6 * statistics.median(looks) / (5 * epoch)
    return {**found, "rounds": rounds, **machine(device)}


def _things(setting: _Setting, looked_at: int, device: str) -> Mapping[str, Callable[[], object]]:
    torch.manual_seed(0)
    model = models.build(setting.model, input_shape=setting.shape, classes=10).to(device)
    inputs = torch.randn(4, _BATCH, *setting.shape, device=device)
    targets = torch.randint(0, 10, (4, _BATCH), device=device)
    learner = convert(
        model, setting.rule, loss=F.cross_entropy, optimizer=STEP_OPTIMIZERS["fused"], example_input=inputs[0, :2]
    )

    def steps() -> None:
        for turn in range(setting.steps):
            learner.step(inputs[turn % 4], targets[turn % 4])

    seen = torch.randn(looked_at, *setting.shape, device=device), torch.randint(0, 10, (looked_at,), device=device)
    looks = {name: partial(_look, name, learner, seen) for name in setting.probes}
    return {"steps": steps, **looks}


def _look(name: str, learner: Any, seen: tuple[torch.Tensor, torch.Tensor]) -> None:
    PROBES[name]().look(View(learner, *seen))
