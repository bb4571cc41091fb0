"""One training run of a recipe."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lockfree import models, rules
from lockfree.data import Dataset, Split, TensorLoader
from lockfree.experiment import OPTIMIZERS, load_once
from lockfree.learner import Learner, convert
from lockfree.run import Run
from lockfree.trainer import Trainer, evaluate

FROZEN = "frozen"
"""The method that trains the last block alone, by backpropagation: "no backprop" in the literature."""

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "fcn": lambda shape, classes, layers, units: models.mlp(shape, classes, hidden=(units,) * (layers - 1)),
    "cnn": lambda shape, classes, layers, units: models.pooled_cnn(shape, classes, channels=(units,) * (layers - 1)),
}
"""Networks of any depth by name: so many layers, the classifier among them, the others ``units`` wide."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one run trains on, by what, and for how long; equal trials give equal numbers.

    Attributes:
        panel: Part of the recipe's table and plot that it belongs to.
        series: Method, as the table calls it.
        x: Place on the horizontal axis: a depth, a probability, ...
        seed: Decides initial weights, the order of the data, and what the rule draws.
        data: Data set.
        samples: Training images to use, from the first; ``None`` for all.
        network: "fcn" or "cnn".
        layers: Blocks, the classifier among them, 2 or more.
        units: Width of all but the classifier.
        rule: Command-line name of the rule, or "frozen".
        fields: Its hyperparameters.
        steps: Batches to learn from, 1 or more; rounded up to whole epochs.
        batch_size: Samples in a batch.
        learning_rate: Of the blocks' Adam.
        drops: Parts of the training, 0 to 1, after which the learning rates are divided by ten.
    """

    panel: str
    series: str
    x: float | int
    seed: int
    data: str
    samples: int | None = None
    network: str = "fcn"
    layers: int
    units: int
    rule: str
    fields: dict[str, Any] = field(default_factory=dict)
    steps: int
    batch_size: int = 256
    learning_rate: float = 1e-3
    drops: tuple[float, ...] = (0.6, 0.8)

    @property
    def name(self) -> str:
        """A name that no other trial of the recipe has and that a folder may have."""
        words = f"{self.panel} {self.series} {self.x:g} seed {self.seed}".lower()
        return "".join(c if c.isalnum() or c in ".-" else "-" for c in words)

    def learner(self, dataset: Dataset) -> Learner:
        """Makes network and learner."""
        torch.manual_seed(self.seed)
        network = NETWORKS[self.network](dataset.input_shape, len(dataset.classes), self.layers, self.units)
        network.to(dataset.train.inputs.device)
        frozen = self.rule == FROZEN
        for block in list(network.children())[:-1] if frozen else ():
            block.requires_grad_(False)
        return convert(
            network,
            rules.get("backprop" if frozen else self.rule, **self.fields),
            loss=F.cross_entropy,
            optimizer=lambda parameters: OPTIMIZERS["adam"](parameters, lr=self.learning_rate),
            example_input=dataset.train.inputs[:2],
        )

    def run(self, folder: Path, device: str = "cpu") -> dict[str, Any]:
        """Trains, or goes on from the last checkpoint in the folder, and returns errors in per cent and seconds.

        Args:
            folder: Run folder of the trial.
            device: Where to train.

        Raises:
            ValueError: If the folder holds a trial with other settings.
        """
        settings = json.loads(json.dumps(asdict(self)))
        resume = (folder / "config.json").exists()
        run = Run.open(folder) if resume else Run.create(folder, settings)
        for name, value in settings.items():
            if run.config.get(name) != value:
                raise ValueError(
                    f"{folder} holds a trial with {name}={run.config.get(name)}, not {value}: choose another --out, or delete it"
                )
        if run.result is not None:
            return run.result
        dataset = load_once(self.data, device)
        train = Split(*(part[: self.samples] for part in dataset.train))
        loader = TensorLoader(*train, batch_size=self.batch_size, seed=self.seed)
        epochs = max(1, math.ceil(self.steps / len(loader)))
        learner = self.learner(dataset)
        optimizers = [one for one in (learner.optimizer, learner.auxiliary_optimizer) if one is not None]
        milestones = [round(part * epochs) for part in self.drops]
        schedulers = [torch.optim.lr_scheduler.MultiStepLR(one, milestones, gamma=0.1) for one in optimizers]
        trainer = Trainer(learner, run=run, resume=resume, scheduler=schedulers, log_every=100)
        summary = trainer.fit(loader, epochs=epochs)
        errors = {
            f"{name}_error": 100 * (1 - (evaluate(learner, TensorLoader(*part, batch_size=1000, shuffle=False)).accuracy or 0))
            for name, part in (("test", dataset.test), ("train", Split(*(part[:10_000] for part in train))))
        }
        result = {**errors, "steps": summary.steps, "seconds": summary.seconds, "locks": sorted(learner.locks)}
        run.finish(result)
        return result
