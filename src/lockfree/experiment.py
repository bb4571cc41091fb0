"""One training run on a named data set and model, from settings to result: what the command line does, as a function."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lockfree import many_workers, models, rules
from lockfree.choose import choose
from lockfree.convert import convert
from lockfree.data import Dataset, TensorLoader, data_root, load
from lockfree.learner import Learner
from lockfree.link import Link
from lockfree.probes import PROBES, Probe
from lockfree.processes import first
from lockfree.report import Entry, write
from lockfree.rule import LOCKS, Rule
from lockfree.run import Run
from lockfree.staleness import NoCorrection, correction_from
from lockfree.timeline import play
from lockfree.trace import Line, Replayed, replay
from lockfree.trainer import Sink, Trainer, evaluate

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, fused=True),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}
"""Optimizers by command-line name; sgd has momentum 0.9."""


DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
    "constant": lambda part: 1.0,
}
"""How the learning rate goes by command-line name: its share of the first one after a part, 0 to 1, of the epochs."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What any training run on a named data set is told, whatever the rule.

    Attributes:
        data: Data set; `lockfree data list` lists them.
        model: Network: mlp, cnn, lenet, vgg8b, resnet20 or vit.
        epochs: Passes over the training set, 0 or more.
        batch_size: Samples in a batch, 1 or more.
        optimizer: adam, or sgd (with momentum 0.9).
        learning_rate: Of the blocks' optimizer, above 0.
        decay: How it goes from epoch to epoch: cosine (half a cosine down to 0 at the end of the last one) or constant.
        accumulate: Batches whose mean gradient makes one step of the optimizer, 1 or more.
        clip_norm: Longest gradient of the network's parameters, above 0; any if left out.
        seed: Decides initial weights, the order of the data and dropout.
        device: Where to train: cpu, cuda, cuda:1, ...
        probe: What looks on along training, with commas: information, activations, alignment, gradient-quality,
            implied-loss, representation.
    """

    data: str = "fashion-mnist"
    model: str = "mlp"
    epochs: int = 5
    batch_size: int = 256
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    decay: str = "cosine"
    accumulate: int = 1
    clip_norm: float | None = None
    seed: int = 0
    device: str = "cpu"
    probe: str = ""


@dataclass(frozen=True, kw_only=True)
class RuleSettings(Settings):
    """What a training run by one rule is told besides.

    Attributes:
        rule: How blocks get their credit; `lockfree rules` lists them.
        schedule: lockstep or pipelined.
        delay: Delay of every link between blocks, in ticks.
        stash: Whether late gradients are taken at the weights of their own forward pass, which are kept for it.
        correction: What repairs late gradients: none, scale, adadelay, dc-constant, dc-adaptive, gap-aware or drop, with a number
            as in dc-adaptive:4.
        executor: sequential; stacked: blocks of equal structure as one batched operation, which needs --schedule pipelined; or
            pipeline: a group of blocks in each process.
        processes: Processes that train together, each a group of blocks; above 1 the executor is pipeline.
        workers: Workers that train the whole network, each on batches of its own, on a parameter server.
        consistency: When a worker may go on: bsp (with all others), ssp:3 (at most 3 gradients ahead) or asp (at once).
        engine: Where workers run: ray (a process each, on this machine or a cluster), simulate (all in this process, in simulated
            time) or allreduce (processes without a server). With more than one worker it is ray if left out.
        address: Address of a running Ray cluster; Ray is started on this machine if left out.
        speeds: Batches a second of simulated workers: a number for all or one for each, with commas; gamma or gamma:16 draws them.
        blocks: Number of blocks; one for each child of the network if left out.
    """

    rule: str = "backprop"
    schedule: str = "lockstep"
    delay: int = 0
    stash: bool = True
    correction: str = "none"
    executor: str = "sequential"
    processes: int = 1
    workers: int = 1
    consistency: str = "asp"
    engine: str | None = None
    address: str | None = None
    speeds: str = "1"
    blocks: int | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment(RuleSettings):
    """One training run; equal settings give equal numbers.

    Attributes:
        fields: Hyperparameters of the rule that differ from its defaults.

    Raises:
        ValueError: If a name is misspelt or a number out of range.
    """

    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_size", 1), ("accumulate", 1), ("processes", 1), ("workers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give {least} or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: give a number above 0")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm}: give a number above 0")
        choose(OPTIMIZERS, self.optimizer, "optimizer")
        choose(DECAYS, self.decay, "decay")
        models.check(self.model)
        check_device(self.device)
        correction_from(self.correction)
        if self.processes > 1 and self.executor == "sequential":
            object.__setattr__(self, "executor", "pipeline")
        if self.processes > 1 and self.executor != "pipeline":
            raise ValueError(
                f"executor={self.executor} trains in one process: leave processes={self.processes} out, or give pipeline"
            )
        self.make_probes()
        self.make_rule()
        many_workers.check(self)

    @property
    def title(self) -> str:
        """What the run is, in a few words."""
        words = f"{self.rule} on {self.data}"
        if self.by_workers:
            words += f", {self.workers} workers, {self.consistency}, correction {self.correction}"
        return words

    @property
    def by_workers(self) -> bool:
        """Whether a parameter server, or what takes its place, trains the network."""
        return self.workers > 1 or self.engine is not None

    def make_rule(self) -> Rule:
        """Makes the rule with its hyperparameters."""
        return rules.get(self.rule, **self.fields)

    def make_probes(self) -> list[Probe]:
        """Makes the probes that are named."""
        return [choose(PROBES, name.strip(), "probe")() for name in self.probe.split(",") if name.strip()]

    def check_probes(self) -> None:
        """Refuses probes that have nothing to see in what the rule trains.

        Raises:
            ValueError: With what to do instead.
        """
        if self.probe and not self.by_workers:
            self._check_probes(self.make_learner(load_once(self.data, self.device)))

    def _check_probes(self, learner: Learner) -> None:
        for probe in self.make_probes():
            probe.check(learner)

    def make_link(self) -> Link:
        """Makes what joins two blocks."""
        correction = correction_from(self.correction)
        return Link(delay=self.delay, stash=self.stash, correction=None if isinstance(correction, NoCorrection) else correction)

    def make_learner(self, dataset: Dataset) -> Learner:
        """Makes model and learner; initial weights come from the seed."""
        torch.manual_seed(self.seed)
        model = models.build(self.model, input_shape=dataset.input_shape, classes=len(dataset.classes)).to(self.device)
        make = OPTIMIZERS[self.optimizer]
        return convert(
            model,
            self.make_rule(),
            loss=F.cross_entropy,
            optimizer=lambda parameters: make(parameters, lr=self.learning_rate),
            blocks=self.blocks,
            example_input=dataset.train.inputs[:2],
            schedule=self.schedule,
            executor=self.executor,
            links=self.make_link(),
            accumulate=self.accumulate,
            clip_norm=self.clip_norm,
        )

    def run(self, folder: Path | None = None, *, resume: bool = False, sinks: Sequence[Sink] = ()) -> dict[str, Any]:
        """Trains, evaluates on the test set, and returns the result that ``--json`` prints.

        The curve of ``val_accuracy`` is taken on the test set, epoch by epoch; nothing is chosen by it.

        Args:
            folder: Run folder, made here; nothing is written without one.
            resume: Go on with the run in the folder.
            sinks: Also told of every step and epoch.

        Raises:
            ValueError: If something is misspelt or does not fit; nothing has been written then.
        """
        if folder is not None and not resume and first():
            Run.refuse_taken(folder)
        if self.by_workers:
            return many_workers.run(self, folder, resume=resume, sinks=sinks)
        dataset = load_once(self.data, self.device)
        learner = self.make_learner(dataset)
        self._check_probes(learner)
        loader = TensorLoader(*dataset.train, batch_size=self.batch_size, seed=self.seed)
        test = TensorLoader(*dataset.test, batch_size=1000, shuffle=False)
        run = None
        if folder is not None and (resume or learner.leads):
            run = Run.open(folder) if resume else Run.create(folder, self.config())
        scheduler = Decay(learner.optimizer, self.share_of_the_rate)
        trainer = Trainer(
            learner,
            run=run if run is not None else folder,
            resume=resume,
            sinks=sinks,
            scheduler=scheduler,
            probes=self.make_probes(),
            probe_data=probed(dataset),
        )
        summary = trainer.fit(loader, test, epochs=self.epochs)
        found = evaluate(learner, test)
        result = {
            "rule": self.rule,
            "data": self.data,
            "model": self.model,
            "seed": self.seed,
            "epochs": summary.epochs,
            "test_accuracy": found.accuracy,
            "test_loss": found.loss,
            "seconds": summary.seconds,
            "samples_per_second": summary.samples_per_second,
            "peak_activation_bytes": summary.peak_activation_bytes,
            "locks": sorted(learner.locks, key=LOCKS.index),
            "data_source": dataset.source,
            "parameters": sum(p.numel() for p in learner.model.parameters()),
        }
        if run is not None and learner.leads:
            run.finish(result)
        return result

    def replay(self, lines: Sequence[Line]) -> Replayed:
        """Repeats a run of several processes or workers in this one.

        Args:
            lines: Its trace.

        Raises:
            ValueError: If the trace is not of these settings.
        """
        if self.by_workers:
            return many_workers.replayed(self, lines)
        dataset = load_once(self.data, self.device)
        learner = self.make_learner(dataset)
        loader = TensorLoader(*dataset.train, batch_size=self.batch_size, seed=self.seed)
        decay = Decay(learner.optimizer, self.share_of_the_rate)

        def batches() -> Iterator[tuple[Any, Any]]:
            for _ in range(self.epochs):
                yield from loader
                decay.step()  # asked for the next batch, the epoch before has been drained

        learner.model.train()
        return replay(lines, learner, batches())

    def share_of_the_rate(self, epoch: int) -> float:
        """Returns what part of the learning rate an epoch has, by its number from 0.

        Args:
            epoch: Epochs before it.
        """
        return DECAYS[self.decay](min(epoch / max(self.epochs, 1), 1.0))

    def config(self) -> dict[str, Any]:
        """Returns the settings as plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Experiment":
        """Makes settings from plain data; what a run folder adds is left out."""
        names = {entry.name for entry in dataclasses.fields(cls)}
        settings = {name: value for name, value in config.items() if name in names}
        settings["fields"] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in settings.get("fields", {}).items()
        }
        return cls(**settings)


class Decay(torch.optim.lr_scheduler.LambdaLR):
    """A learning rate by epoch; a run that is resumed for more epochs goes on with the rate that these have at its epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what changes, without functions."""
        return {name: value for name, value in super().state_dict().items() if name != "lr_lambdas"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there, with the rate that the present functions give."""
        super().load_state_dict({**state_dict, "lr_lambdas": [None] * len(self.lr_lambdas)})
        for group, base, share in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * share(self.last_epoch)


def count_probed(training: int) -> int:
    """Returns how many test images probes look at: few beside a small training set, so that a look takes no longer than it must.

    Args:
        training: Images of the training set.
    """
    return min(512, max(128, training // 50))


def probed(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the test images that probes look at, and their classes: as many of each class as there are, in random order."""
    inputs, targets = dataset.test
    # A sample's turn is the number of samples of its class before it: the first turns hold every class, whatever the order.
    turn = F.one_hot(targets).cumsum(0).gather(1, targets[:, None]).squeeze(1)
    chosen = torch.argsort(turn, stable=True)[: count_probed(len(dataset.train.targets))]
    # Probes split what they look at into parts, each of which has to be like the whole.
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0)).to(chosen.device)
    return inputs[chosen[order]], targets[chosen[order]]


def load_once(name: str, device: str) -> Dataset:
    """Loads a data set onto a device; the last one stays, since a comparison trains on it again and again."""
    return _load_once(name, device, data_root())


@functools.lru_cache(maxsize=1)
def _load_once(name: str, device: str, root: Path) -> Dataset:
    return load(name, root=root).to(device)


def check_device(name: str) -> None:
    """Refuses a device that this machine does not have.

    Raises:
        ValueError: With what to give instead.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: give cpu, cuda or cuda:0") from None
    here = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= here:
        raise ValueError(f"no device {name!r} on this machine: give cpu" + (" or cuda" if torch.cuda.is_available() else ""))


def entry(experiment: Experiment, result: dict[str, Any], run: Run | None) -> Entry:
    """Collects what the report shows of one run."""
    rule = experiment.make_rule()
    learner = experiment.make_learner(load_once(experiment.data, experiment.device))
    return Entry(
        rule=experiment.rule,
        title=rule.title,
        result=result,
        history=run.metrics() if run else (),
        timeline=() if experiment.by_workers else play(learner.schedule, batches=4),
        citation=rule.card.reference,
    )


def write_report(path: Path, title: str, entries: Sequence[Entry], command: str) -> None:
    """Writes the HTML report of one or more runs."""
    sources = {str(one.result.get("data_source", "")) for one in entries}
    notes = [f"Data: {source}." for source in sorted(sources) if source]
    notes.append("Accuracy curves are taken on the test set after every epoch; nothing was chosen by them.")
    write(path, title, entries, command=command, notes=notes)
