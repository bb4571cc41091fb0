"""A trial whose network is trained by a rule, block by block."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree import models, rules
from lockfree.convert import convert
from lockfree.data import Dataset, Split, TensorLoader
from lockfree.experiment import load_once
from lockfree.learner import Learner
from lockfree.objective import Diverged
from lockfree.probes import Probe
from lockfree.readouts import order_on_evaluated
from lockfree.recipes.trial import Point, Trial, as_pixels
from lockfree.rng import undisturbed
from lockfree.run import Run
from lockfree.trainer import Trainer, evaluate

FROZEN = "frozen"
"""The method that trains the last block alone, by backpropagation: "no backprop" in the literature."""

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "fcn": lambda shape, classes, layers, units: models.mlp(shape, classes, hidden=(units,) * (layers - 1)),
    "cnn": lambda shape, classes, layers, units: models.pooled_cnn(shape, classes, channels=(units,) * (layers - 1)),
    "normalised": lambda shape, classes, layers, units, last=None, **more: models.normalised_mlp(
        shape, classes, hidden=_widths(layers, units, last), **more
    ),
    "residual": lambda shape, classes, layers, units, **more: models.single_resnet(
        shape, classes, channels=units, depth=layers - 3, **more
    ),
    "side-by-side": lambda shape, classes, layers, units, last=None, **more: models.side_by_side(
        shape, classes, hidden=_widths(layers, units, last), **more
    ),
}
"""Networks of any depth by name: so many layers, the classifier among them, the others ``units`` wide."""


def _widths(layers: int, units: int, last: int | None) -> tuple[int, ...]:
    """Returns the widths of all layers but the classifier; the last of them may differ."""
    return (*(units,) * (layers - 2), units if last is None else last)


def one_vs_all(scores: Tensor, target: Tensor) -> Tensor:
    """Logistic losses, one for each class, summed; unlike those of a softmax, the errors of a sample do not sum to zero."""
    wanted = F.one_hot(target, scores.shape[1]).to(scores.dtype)
    return F.binary_cross_entropy_with_logits(scores, wanted, reduction="none").sum(1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross-entropy": F.cross_entropy, "one-vs-all": one_vs_all}
"""Losses of class scores by name."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda groups, **options: torch.optim.Adam(groups, fused=True, **options),
    "sgd": torch.optim.SGD,
}
"""Optimizers by name; sgd is without momentum, unless told."""

LOOKED_AT = 500
"""Test samples, from the first, that probes look at."""


@dataclass(frozen=True, kw_only=True)
class RuleTrial(Trial):
    """What one run trains on, by what, and for how long; equal trials give equal numbers.

    Attributes:
        x: ``None``: a test error after each epoch, against epochs.
        network: One of `NETWORKS`.
        network_fields: What it is told besides.
        layers: Blocks, the classifier among them, 2 or more.
        units: Width of all but the classifier.
        rule: Command-line name of the rule, or "frozen".
        fields: Its hyperparameters.
        loss: One of `LOSSES`.
        steps: Batches to learn from; rounded up to whole epochs.
        epochs: Passes over the training images, in place of steps.
        hidden_epochs: How many of them come before the first that is shown.
        batch_size: Samples in a batch.
        shuffle: Whether each epoch has an order of its own.
        pixels: Whether images are taken as they are, 0 to 1, not standardised.
        optimizer: One of `OPTIMIZERS`.
        learning_rate: Of the optimizer.
        weight_decay: Of the optimizer.
        top: Options of the optimizer, such as lr, that differ for the last block.
        order_on_evaluated: Read classes out in the HSIC paper's way: on the evaluated images themselves, with their labels.
        drops: Parts of the training, 0 to 1, after which the learning rates are divided by ten.
    """

    network: str = "fcn"
    network_fields: dict[str, Any] = field(default_factory=dict)
    layers: int
    units: int
    rule: str
    fields: dict[str, Any] = field(default_factory=dict)
    loss: str = "cross-entropy"
    steps: int = 0
    epochs: int = 0
    hidden_epochs: int = 0
    batch_size: int = 256
    shuffle: bool = True
    pixels: bool = False
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    top: dict[str, Any] = field(default_factory=dict)
    order_on_evaluated: bool = False
    drops: tuple[float, ...] = (0.6, 0.8)

    @property
    def points(self) -> list[Point]:
        """A depth, a probability, ..., or all epochs that are shown."""
        shown = range(1, self.epochs - self.hidden_epochs + 1) if self.x is None else [self.x]
        return [Point(self.panel, x) for x in shown]

    def reading(self, result: Mapping[str, Any], point: Point) -> float | None:
        """Returns the test error at the end, or after an epoch."""
        return result["test_error"] if self.x is not None else result["curve"][int(point.x) - 1]

    def learner(self, dataset: Dataset) -> Learner:
        """Makes network and learner."""
        torch.manual_seed(self.seed)
        shape, classes = dataset.input_shape, len(dataset.classes)
        network = NETWORKS[self.network](shape, classes, self.layers, self.units, **self.network_fields)
        network.to(dataset.train.inputs.device)
        frozen = self.rule == FROZEN
        *below, top = network.children()
        for block in below if frozen else ():
            block.requires_grad_(False)
        return convert(
            network,
            rules.get("backprop" if frozen else self.rule, **self.fields),
            loss=LOSSES[self.loss],
            optimizer=lambda parameters: self._optimizer(parameters, list(top.parameters())),
            example_input=dataset.train.inputs[:2],
        )

    @property
    def probes(self) -> list[Probe]:
        """What looks at the network along training."""
        return []

    def _optimizer(self, parameters: list[nn.Parameter], top: list[nn.Parameter]) -> torch.optim.Optimizer:
        above = {id(parameter) for parameter in top} if self.top else set()
        groups = [
            {"params": [parameter for parameter in parameters if (id(parameter) in above) == last], **options}
            for last, options in ((False, {}), (True, self.top))
        ]
        groups = [group for group in groups if group["params"]]
        return OPTIMIZERS[self.optimizer](groups, lr=self.learning_rate, weight_decay=self.weight_decay)

    def train(self, run: Run, device: str, *, resume: bool) -> dict[str, Any]:
        """Trains, or goes on from the last checkpoint, and returns errors in per cent and seconds.

        Training that breaks with a value that is not finite counts with the weights that it broke at.
        """
        whole = load_once(self.data, device)
        dataset = self.part(as_pixels(whole) if self.pixels else whole)
        loader = TensorLoader(*dataset.train, batch_size=self.batch_size, shuffle=self.shuffle, seed=self.seed)
        epochs = self.epochs or max(1, math.ceil(self.steps / len(loader)))
        learner = self.learner(dataset)
        optimizers = [one for one in (learner.optimizer, learner.auxiliary_optimizer) if one is not None]
        milestones = [round(part * epochs) for part in self.drops]
        schedulers = [torch.optim.lr_scheduler.MultiStepLR(one, milestones, gamma=0.1) for one in optimizers]

        def read(kind: str, values: dict[str, Any]) -> None:
            if kind == "epoch":
                run.log("reading", epoch=values["epoch"], step=values["step"], test_error=self._error(learner, dataset.test))

        sinks = [read] if self.x is None else []
        trainer = Trainer(
            learner,
            run=run,
            resume=resume,
            scheduler=schedulers,
            log_every=100,
            sinks=sinks,
            probes=self.probes,
            probe_data=(dataset.test.inputs[:LOOKED_AT], dataset.test.targets[:LOOKED_AT]),
        )
        started, diverged = time.perf_counter(), None
        try:
            seconds = trainer.fit(loader, epochs=epochs).seconds
        except Diverged as error:  # a result like others: this method does not train this network at this rate
            seconds, diverged = time.perf_counter() - started, str(error)
        seen = Split(*(part[:10_000] for part in dataset.train))
        errors: dict[str, Any] = {"test_error": self._error(learner, dataset.test), "train_error": self._error(learner, seen)}
        if self.x is None:
            readings = [line["test_error"] for line in run.metrics() if line["kind"] == "reading"]
            readings += [errors["test_error"]] * (epochs - len(readings))
            errors["curve"] = readings[self.hidden_epochs :]
        return {**errors, "steps": learner.steps, "seconds": seconds, "locks": sorted(learner.locks), "diverged": diverged}

    def _error(self, learner: Learner, split: Split) -> float:
        """Returns the error in per cent."""
        if not self.order_on_evaluated:
            accuracy = evaluate(learner, TensorLoader(*split, batch_size=1000, shuffle=False)).accuracy
            return 100 * (1 - (accuracy or 0))
        with undisturbed(learner.model), torch.no_grad():  # in training mode, as theirs
            outputs = torch.cat([learner.model(x) for x in split.inputs.split(self.batch_size)]).flatten(1)
        order = order_on_evaluated(outputs, split.targets, int(split.targets.max()) + 1)
        return 100 * (1 - (outputs[:, order].argmax(1) == split.targets).double().mean().item())
