"""What looking costs: a look of each probe over the training between two looks."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from lockfree import models
from lockfree.bench.step import STEP_OPTIMIZERS, machine
from lockfree.bench.timing import interleaved
from lockfree.convert import convert
from lockfree.experiment import count_probed
from lockfree.learner import Learner
from lockfree.probes import PROBES, View


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A network in training.

    Attributes:
        model: Its name.
        shape: Of a sample.
        rule: Command-line name.
        samples: Training samples of the data set that has such samples.
        steps: Steps that are timed at once.
        rounds: Looks of each probe.
    """

    model: str
    shape: tuple[int, int, int]
    rule: str
    samples: int
    steps: int
    rounds: int


_MNIST: dict[str, Any] = {"model": "mlp", "shape": (1, 28, 28), "samples": 60_000, "steps": 20, "rounds": 9}
SETTINGS: dict[str, Setting] = {
    "mlp_cdni": Setting(rule="cdni", **_MNIST),
    "mlp_backprop": Setting(rule="backprop", **_MNIST),
    "digits_cdni": Setting(rule="cdni", **_MNIST | {"shape": (1, 8, 8), "samples": 1_437}),
    "resnet20_cdni": Setting(model="resnet20", shape=(3, 32, 32), rule="cdni", samples=50_000, steps=1, rounds=3),
}
"""The MLP 784-256-256-256-10 on MNIST and on digits, ResNet-20 on CIFAR-10."""

EPOCHS, BATCHES = 5, (128, 256)
_SIGHTS = ("gradient-quality", "alignment", "representation")


def probes(settings: Mapping[str, Setting] = SETTINGS, device: str = "cpu") -> dict[str, Any]:
    """Times looks of probes at their default schedule, at the start and after each of five epochs, in turn with training steps.

    Fused Adam, batches of 128 and of 256, as many samples to look at as the command line takes. An epoch is not trained: its time is
    that of a step times their number. Random images stand for the data sets', since arithmetic takes the same time on them.

    Args:
        settings: Networks in training, by name.
        device: Where to train.

    Returns:
        By network and rule the seconds of a step and of a look, and by batch size looking over training; for each probe with a view of
        its own, and for all that share one; and what the machine was. Seconds are medians.
    """
    found: dict[str, float] = {}
    for name, setting in settings.items():
        seconds = interleaved(_things(setting, device), rounds=setting.rounds, warm_up=0)
        median = {thing: statistics.median(times) for thing, times in seconds.items()}
        step = {batch: median.pop(f"steps of {batch}") / setting.steps for batch in BATCHES}
        found |= {f"{name}_step_of_{batch}_seconds": value for batch, value in step.items()}
        for probe, look in median.items():
            found[f"{name}_{probe}_seconds"] = look
            for batch, value in step.items():
                epoch = value * setting.samples / batch
                found[f"{name}_{probe}_over_training_in_batches_of_{batch}"] = (EPOCHS + 1) * look / (EPOCHS * epoch)
    return {**found, "rounds": {name: setting.rounds for name, setting in settings.items()}, **machine(device)}


def _things(setting: Setting, device: str) -> Mapping[str, Callable[[], object]]:
    torch.manual_seed(0)
    model = models.build(setting.model, input_shape=setting.shape, classes=10).to(device)
    # Many batches, so that none is learnt by heart: vanishing gradients are slow numbers on some processors.
    turns = {batch: itertools.cycle([_batch(setting, batch, device) for _ in range(10)]) for batch in BATCHES}
    learner = convert(
        model,
        setting.rule,
        loss=F.cross_entropy,
        optimizer=STEP_OPTIMIZERS["fused"],
        example_input=_batch(setting, 2, device)[0],
    )
    seen = _batch(setting, count_probed(setting.samples), device)
    names = _SIGHTS if setting.rule == "backprop" else (*_SIGHTS, "implied-loss")
    steps = {f"steps of {batch}": partial(_steps, learner, turn, setting.steps) for batch, turn in turns.items()}
    for run in steps.values():
        run()  # what is made once is not timed
    looks = {name: partial(_look, [name], learner, seen) for name in names}
    return {**steps, **looks, "all": partial(_look, names, learner, seen)}


def _batch(setting: Setting, samples: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(samples, *setting.shape, device=device), torch.randint(0, 10, (samples,), device=device)


def _steps(learner: Learner, turn: Iterator[tuple[torch.Tensor, torch.Tensor]], count: int) -> None:
    for batch in itertools.islice(turn, count):
        learner.step(*batch)


def _look(names: Sequence[str], learner: Learner, seen: tuple[torch.Tensor, torch.Tensor]) -> None:
    view = View(learner, *seen)
    for name in names:
        PROBES[name]().look(view)
