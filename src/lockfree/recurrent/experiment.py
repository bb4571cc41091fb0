"""One training run on a recurrent task, from settings to result: what the command line does, as a function."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from lockfree.choose import choose
from lockfree.experiment import DECAYS, OPTIMIZERS, Decay, check_device
from lockfree.fields import build
from lockfree.objective import Diverged
from lockfree.recurrent.alternation import Alternating, WarmRestarts
from lockfree.recurrent.bootstrap import Bootstrap, NoBootstrap
from lockfree.recurrent.convert import BOOTSTRAPS, convert
from lockfree.recurrent.cores import Encoded, OneHot
from lockfree.recurrent.learner import RecurrentLearner
from lockfree.recurrent.tasks import TASKS, Task
from lockfree.recurrent.trainer import TaskTrainer
from lockfree.rule import LOCKS
from lockfree.run import Run
from lockfree.trainer import Sink

CORES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "lstm": lambda features, units, layers: nn.LSTM(features, units, layers),
    "gru": lambda features, units, layers: nn.GRU(features, units, layers),
    "rnn": lambda features, units, layers: nn.RNN(features, units, layers),
}
"""Recurrent cores by command-line name, made of features, units and layers."""

RESTARTS = "restarts"
"""The decay that begins anew, again and again; the others go down once."""

TOLD = ("batch", "seed", "root")
"""Fields of a task that are not set one by one: settings of the run, and the data folder."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What a training run on a recurrent task is told.

    Attributes:
        task: What is to be learnt: copy, repeat-copy, char-lm, word-lm, sequential-images or counting.
        core: Recurrent network: lstm, gru or rnn.
        units: Width of its state, 1 or more.
        layers: Cores one upon the other, 1 or more.
        embedding: Width of the vectors that symbols are embedded in, 0 or more; 0: one-hot.
        horizon: Steps in a chunk, through which is differentiated, 1 or more.
        bootstrap: What stands for the gradient from beyond the horizon: none, dni, dni-solved, oracle, ...
        auxiliary: Whether the core also learns to foretell the synthetic gradient at the end of the next chunk.
        epochs: So many stretches each, 0 or more.
        stretches: In an epoch, 1 or more.
        batch: Sequences side by side, 1 or more.
        optimizer: adam, or sgd (with momentum 0.9).
        learning_rate: Of the network's optimizer, above 0.
        decay: How it goes: cosine (half a cosine down to 0 at the end of the last epoch), constant, or restarts (half a cosine again
            and again).
        restart: Chunks that are learnt before the first restart, 1 or more; the next ones come after 2, 4, 8, ... times as many.
            Alternation changes sides at them.
        clip_norm: Longest gradient of the network's parameters, above 0; any if left out.
        seed: Decides initial weights and what the task draws.
        device: Where to train: cpu, cuda, cuda:1, ...
    """

    task: str = "char-lm"
    core: str = "lstm"
    units: int = 256
    layers: int = 1
    embedding: int = 0
    horizon: int = 8
    bootstrap: str = "none"
    auxiliary: bool = False
    epochs: int = 5
    stretches: int = 200
    batch: int = 32
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    decay: str = "cosine"
    restart: int = 1000
    clip_norm: float | None = None
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class TaskExperiment(TaskSettings):
    """One training run on a recurrent task; equal settings give equal numbers.

    Attributes:
        bootstrap_fields: Hyperparameters of the bootstrap that differ from its defaults.
        task_fields: Those of the task, but for batch and seed.

    Raises:
        ValueError: If a name is misspelt or a number out of range.

    Example:
        >>> small = TaskExperiment(task="copy", units=8, horizon=2, bootstrap="dni", epochs=1, stretches=3, batch=4)
        >>> result = small.run()
        >>> result["rule"], result["locks"], result["length_solved"]
        ('dni', ['forward'], 0.0)
    """

    bootstrap_fields: dict[str, Any] = field(default_factory=dict)
    task_fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {"units": 1, "layers": 1, "embedding": 0, "horizon": 1, "epochs": 0, "stretches": 1, "batch": 1, "restart": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)}: give {smallest} or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: give a number above 0")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm}: give a number above 0")
        for table, name, what in (
            (CORES, self.core, "core"),
            (OPTIMIZERS, self.optimizer, "optimizer"),
            (DECAYS | {RESTARTS: None}, self.decay, "decay"),
        ):
            choose(table, name, what)
        check_device(self.device)
        self.make_task()
        if self.auxiliary and isinstance(self.make_bootstrap(), NoBootstrap):
            raise ValueError(
                "auxiliary=True foretells synthetic gradients, of which there are none: give a bootstrap, such as dni"
            )

    @property
    def data(self) -> str:
        """What the task takes its sequences from: a text, a data set, or itself."""
        known = dataclasses.fields(choose(TASKS, self.task, "task"))
        settings: dict[str, Any] = {one.name: one.default for one in known} | self.task_fields
        return next((settings[name] for name in ("text", "data") if name in settings), self.task)

    @property
    def title(self) -> str:
        """What the run is, in a few words."""
        return f"{self.bootstrap} on {self.task}"

    @property
    def means(self) -> str:
        """What learns, in a few words."""
        auxiliary = " + auxiliary" if self.auxiliary else ""
        return f"{self.core}, horizon {self.horizon}, bootstrap {self.bootstrap}{auxiliary}"

    def make_task(self) -> Task:
        """Makes the task, at its beginning."""
        told = {"batch": self.batch, "seed": self.seed}
        if both := sorted(set(told) & set(self.task_fields)):
            raise ValueError(f"task_fields has {', '.join(both)}: give it as the setting of the same name")
        return build(choose(TASKS, self.task, "task"), {**self.task_fields, **told})

    def make_bootstrap(self) -> Bootstrap:
        """Makes the bootstrap with its hyperparameters."""
        kind, fields = choose(BOOTSTRAPS, self.bootstrap, "bootstrap"), self.bootstrap_fields
        if kind is Alternating:
            fields = fields | {"restarts": {"first": self.restart} | fields.get("restarts", {})}
        return build(kind, fields)

    def make_learner(self, task: Task) -> RecurrentLearner:
        """Makes network and learner; initial weights come from the seed."""
        torch.manual_seed(self.seed)
        core = self._core(task).to(self.device)
        readout = nn.Linear(self.units, task.classes).to(self.device)
        make = OPTIMIZERS[self.optimizer]
        return convert(
            core,
            readout,
            horizon=self.horizon,
            bootstrap=self.make_bootstrap(),
            loss=task.loss,
            optimizer=lambda parameters: make(parameters, lr=self.learning_rate),
            auxiliary=self.auxiliary,
            clip_norm=self.clip_norm,
        )

    def _core(self, task: Task) -> nn.Module:
        make = CORES[self.core]
        if task.symbols is None:
            if self.embedding:
                raise ValueError(f"embedding={self.embedding}: {self.task} shows features, not symbols: leave it out")
            return Encoded(nn.Flatten(), make(task.features, self.units, self.layers))
        if self.embedding:
            return Encoded(nn.Embedding(task.symbols, self.embedding), make(self.embedding, self.units, self.layers))
        return Encoded(OneHot(task.symbols), make(task.symbols, self.units, self.layers))

    def run(self, folder: Path | None = None, *, resume: bool = False, sinks: Sequence[Sink] = ()) -> dict[str, Any]:
        """Trains, evaluates, and returns the result that ``--json`` prints.

        Args:
            folder: Run folder, made here; nothing is written without one.
            resume: Go on with the run in the folder.
            sinks: Also told of every stretch and epoch.

        Raises:
            ValueError: If something is misspelt or does not fit; nothing has been written then.
        """
        if folder is not None and not resume:
            Run.refuse_taken(folder)
        task = self.make_task()
        learner = self.make_learner(task)
        task.stretch(0)  # refuses what the task cannot give before anything is written
        run = None
        if folder is not None:
            run = Run.open(folder) if resume else Run.create(folder, self.config())
        result = self._train(learner, task, run, resume=resume, sinks=sinks)
        if run is not None:
            run.finish(result)
        return result

    def train(
        self, run: Run | None, *, resume: bool = False, sinks: Sequence[Sink] = (), tolerant: bool = False
    ) -> dict[str, Any]:
        """Trains into a run that is there, evaluates, and returns the result without writing it.

        Args:
            run: Where checkpoints and metrics go.
            resume: Whether it was stopped.
            sinks: Also told of every stretch and epoch.
            tolerant: Whether a loss that is not finite ends the training as other ends do, with the weights that it broke at.

        Returns:
            What `run` returns, and if tolerant ``diverged``: what broke, or ``None``.
        """
        task = self.make_task()
        return self._train(self.make_learner(task), task, run, resume=resume, sinks=sinks, tolerant=tolerant)

    def _train(
        self,
        learner: RecurrentLearner,
        task: Task,
        run: Run | None,
        *,
        resume: bool,
        sinks: Sequence[Sink],
        tolerant: bool = False,
    ) -> dict[str, Any]:
        trainer = TaskTrainer(
            learner,
            task,
            run=run,
            resume=resume,
            sinks=sinks,
            scheduler=self._decay(learner),
            stretch_scheduler=self._restarts(learner),
        )
        diverged = None
        try:
            trainer.fit(self.epochs, self.stretches)
        except Diverged as error:
            if not tolerant:
                raise
            diverged = str(error)
        summary, figures = trainer.summary(), trainer.figures()
        result = {
            "rule": self.bootstrap,
            "task": self.task,
            "data": self.data,
            "core": self.core,
            "horizon": self.horizon,
            "bootstrap": self.bootstrap,
            "auxiliary": self.auxiliary,
            "seed": self.seed,
            "epochs": summary.epochs,
            "stretches": summary.steps,
            "measure": task.measure,
            **figures,
            **_on_the_test_part(task, figures),
            "seconds": summary.seconds,
            "samples_per_second": summary.samples_per_second,
            "peak_activation_bytes": summary.peak_activation_bytes,
            "locks": sorted(learner.locks, key=LOCKS.index),
            "parameters": sum(p.numel() for module in (learner.core, learner.readout) for p in module.parameters()),
        }
        return result | ({"diverged": diverged} if tolerant else {})

    def _decay(self, learner: RecurrentLearner) -> LRScheduler | None:
        """Returns what changes the rate after every epoch, if anything does."""
        if self.decay == RESTARTS:
            return None
        decay = DECAYS[self.decay]
        return Decay(learner.optimizer, lambda epoch: decay(min(epoch / max(self.epochs, 1), 1.0)))

    def _restarts(self, learner: RecurrentLearner) -> LRScheduler | None:
        """Returns what changes the rate after every stretch, if anything does: by the chunks learnt until then, as alternation goes."""
        if self.decay != RESTARTS:
            return None
        bootstrap = learner.bootstrap
        restarts = bootstrap.restarts if isinstance(bootstrap, Alternating) else WarmRestarts(first=self.restart)
        return Decay(learner.optimizer, lambda _: restarts.share(learner.updates))

    def config(self) -> dict[str, Any]:
        """Returns the settings as plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TaskExperiment":
        """Makes settings from plain data; what a run folder adds is left out."""
        names = {entry.name for entry in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in names})


def key_of(measure: str) -> str:
    """Returns the name by which figures have a task's measure.

    Example:
        >>> key_of("length solved")
        'length_solved'
    """
    return measure.replace(" ", "_")


def _on_the_test_part(task: Task, figures: dict[str, float]) -> dict[str, float]:
    """Names what all commands that train have in common: ``test_loss``, here in bits, and ``test_accuracy``, where there is one."""
    bits = next(name for name in (f"test_{key_of(task.measure)}", "bits") if name in figures)
    return {"test_loss": figures[bits]} | ({"test_accuracy": figures["accuracy"]} if "accuracy" in figures else {})
