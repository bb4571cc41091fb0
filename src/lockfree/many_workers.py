"""A training run on a named data set by many workers: what `lockfree train --workers` does, as a function."""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree import server
from lockfree.choose import choose
from lockfree.data import TensorLoader
from lockfree.interrupt import deferred_interrupt
from lockfree.memory import ActivationMeter
from lockfree.rng import undisturbed
from lockfree.rule import LOCKS
from lockfree.run import Run
from lockfree.server import AllReduce, Engine, Entry, Gamma, Ray, Simulator, Trained
from lockfree.server.milestones import load
from lockfree.staleness import consistency_from, correction_from
from lockfree.trace import Line, Replayed
from lockfree.trainer import Evaluation, Sink, evaluate

if TYPE_CHECKING:
    from lockfree.experiment import Experiment

_CHECKPOINTS = "checkpoints"
_LOG_EVERY = 20  # updates
_SHOWN = 80  # pushes in the picture of who waits for whom

_ALONE = {
    "rule": "backprop",
    "schedule": "lockstep",
    "delay": 0,
    "stash": True,
    "executor": "sequential",
    "processes": 1,
    "blocks": None,
    "accumulate": 1,
    "probe": "",
}
"""Settings of training by one process that mean nothing to workers."""

_TOGETHER = {"consistency": "asp", "address": None, "speeds": "1"}
"""Settings that mean something to workers alone."""


def _simulator(experiment: "Experiment") -> Engine:
    return Simulator(speeds=speeds_from(experiment.speeds))


def _allreduce(experiment: "Experiment") -> Engine:
    return AllReduce()


def _ray(experiment: "Experiment") -> Engine:
    return Ray(experiment.address)


ENGINES: dict[str, Callable[["Experiment"], Engine]] = {"ray": _ray, "simulate": _simulator, "allreduce": _allreduce}
"""Engines by command-line name."""


def speeds_from(text: str) -> Any:
    """Reads speeds of simulated workers: ``"2"``, ``"1,1,0.2"``, ``"gamma"`` or ``"gamma:4"`` with the shape.

    Raises:
        ValueError: If it is none of them.

    Example:
        >>> speeds_from("1,0.5"), speeds_from("gamma:4")
        ([1.0, 0.5], Gamma(shape=4.0, mean=1.0))
    """
    name, _, shape = text.partition(":")
    try:
        if name == "gamma":
            return Gamma(shape=float(shape)) if shape else Gamma()
        each = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"speeds={text!r}: give batches a second, as in 1 or 1,1,0.2, or gamma:16") from None
    return each[0] if len(each) == 1 else each


def check(experiment: "Experiment") -> None:
    """Refuses settings that do not go together.

    Raises:
        ValueError: In one line that says which.
    """
    if not experiment.by_workers:
        for name, default in _TOGETHER.items():
            if getattr(experiment, name) != default:
                raise ValueError(f"{name}={getattr(experiment, name)} is about several workers: give workers=2 or more, too")
        return
    for name, default in _ALONE.items():
        if getattr(experiment, name) != default:
            raise ValueError(
                f"{name}={getattr(experiment, name)}: workers take plain gradients of the whole network, leave {name} out or give "
                "workers=1"
            )
    consistency_from(experiment.consistency)
    speeds_from(experiment.speeds)
    name = engine_name(experiment)
    choose(ENGINES, name, "engine")
    if experiment.address is not None and name != "ray":
        raise ValueError(f"address={experiment.address} is of a Ray cluster: leave it out with engine={name}")


def engine_name(experiment: "Experiment") -> str:
    """Returns where workers run."""
    return experiment.engine or "ray"


class _Told:
    """Tells run folder and sinks what comes to light, an epoch at a time.

    Args:
        experiment: The settings.
        per_epoch: Updates in an epoch.
        run: Where to write, if anywhere.
        sinks: Also told.
        evaluate: Evaluates weights and buffers.
    """

    def __init__(
        self,
        experiment: "Experiment",
        per_epoch: int,
        run: Run | None,
        sinks: Sequence[Sink],
        evaluate: Callable[[Sequence[Tensor], Sequence[Tensor]], Evaluation],
    ) -> None:
        self._experiment, self._per_epoch, self._run, self._sinks = experiment, per_epoch, run, list(sinks)
        self._evaluate = evaluate
        self._epochs: dict[int, list[Entry]] = {}
        self._logged = 0

    def recall(self, entries: Sequence[Entry], version: int) -> None:
        """Takes up what a run that goes on has told."""
        for entry in entries:
            if entry.update <= version:
                self._epochs.setdefault(self._epoch(entry), []).append(entry)
        self._logged = version

    def push(self, entry: Entry) -> None:
        """Is told of a push."""
        self._epochs.setdefault(self._epoch(entry), []).append(entry)
        if entry.update <= self._logged:
            return  # behind a barrier an update has several
        self._logged = entry.update
        values: dict[str, Any] = {"step": entry.update, "epoch": self._epoch(entry), "loss": entry.loss}
        values |= {"delay": entry.delay, "worker": entry.worker}
        self._tell("step", values, write=entry.update % _LOG_EVERY == 0)

    def _epoch(self, entry: Entry) -> int:
        return -(-max(entry.update, 1) // self._per_epoch)

    def version(self, version: int, weights: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        """Is shown the weights after each epoch."""
        epoch, rest = divmod(version, self._per_epoch)
        if not epoch or rest:
            return
        entries = self._epochs.pop(epoch, [])
        found = self._evaluate(weights, buffers)
        values = {"epoch": epoch, "step": version, "train_loss": fmean(e.loss for e in entries) if entries else None}
        values |= {"val_loss": found.loss, "val_accuracy": found.accuracy}
        self._tell("epoch", values | {"seconds": max((entry.time for entry in entries), default=0.0)}, write=True)
        if entries:
            self._tell("staleness", {"epoch": epoch, "step": version, **_staleness(entries)}, write=True)

    def _tell(self, kind: str, values: dict[str, Any], *, write: bool) -> None:
        if write and self._run is not None:
            self._run.log(kind, **values)
        for sink in self._sinks:
            if kind != "staleness":
                sink(kind, values)


def _staleness(entries: Sequence[Entry]) -> dict[str, Any]:
    """Sums up how late gradients were, and how far they had to be repaired."""
    gaps, ratios = ([getattr(e, name) for e in entries if getattr(e, name) is not None] for name in ("gap", "ratio"))
    return {
        "delays": {str(delay): count for delay, count in server.delays(entries).items()},
        "gap": fmean(gaps) if gaps else None,
        "ratio": fmean(ratios) if ratios else None,
        "pushes": {str(worker): count for worker, count in sorted(Counter(e.worker for e in entries).items())},
        "dropped": sum(not entry.applied for entry in entries),
    }


def run(experiment: "Experiment", folder: Path | None, *, resume: bool, sinks: Sequence[Sink]) -> dict[str, Any]:
    """Trains, evaluates on the test set, and returns the result that ``--json`` prints.

    Args:
        experiment: The settings.
        folder: Run folder, made here; nothing is written without one.
        resume: Go on with the run in the folder.
        sinks: Also told of every update and epoch.

    Raises:
        ValueError: If something does not fit; nothing has been written then.
    """
    from lockfree.experiment import load_once

    dataset = load_once(experiment.data, experiment.device)
    learner = experiment.make_learner(dataset)  # shows weights on their way
    test = TensorLoader(*dataset.test, batch_size=1000, shuffle=False)
    model = copy.deepcopy(learner.model)
    peak = _peak(model, *(part[: experiment.batch_size] for part in dataset.train))
    checkpoint = None if folder is None else folder / _CHECKPOINTS
    run = None if folder is None else Run.open(folder) if resume else Run.create(folder, experiment.config())

    def evaluate_at(weights: Sequence[Tensor], buffers: Sequence[Tensor]) -> Evaluation:
        with torch.no_grad():
            _fill(learner.model, weights, buffers)
            return evaluate(learner, test)

    job = _Shape.of(experiment, len(dataset.train.inputs))
    told = _Told(experiment, job.per_epoch, run, sinks, evaluate_at)
    if run is not None and resume and checkpoint is not None:
        version = load(checkpoint)[0]["versions"]["now"]
        run.rewind(version)
        told.recall([e for e in map(server.entry_of, server.read(run.folder)) if e is not None], version)
    started = time.perf_counter()
    trained: Trained | None = None
    if job.updates:
        with deferred_interrupt() as interrupted:
            trained = server.train(
                model,
                dataset.train,
                **_described(experiment, job),
                workers=experiment.workers,
                updates=job.updates,
                batch_size=experiment.batch_size,
                engine=choose(ENGINES, engine_name(experiment), "engine")(experiment),
                seed=experiment.seed,
                clip=experiment.clip_norm,
                trace=folder,
                checkpoint=checkpoint,
                checkpoints=job.per_epoch,
                resume=resume,
                progress=told.push,
                watch=told.version,
                watch_every=job.per_epoch,
                stop=interrupted,
            )
    seconds = time.perf_counter() - started
    found = evaluate_at([p for p in model.parameters() if p.requires_grad], list(model.buffers()))
    history = trained.history if trained else ()
    if run is not None and trained is not None:
        run.log("workers", spans=_spans(trained.trace))
    consistency = consistency_from(experiment.consistency)
    samples = experiment.epochs * len(dataset.train.inputs)
    result = {
        "rule": experiment.rule,
        "data": experiment.data,
        "model": experiment.model,
        "seed": experiment.seed,
        "epochs": experiment.epochs,
        "test_accuracy": found.accuracy,
        "test_loss": found.loss,
        "seconds": seconds,
        "samples_per_second": samples / seconds if seconds else 0.0,
        "peak_activation_bytes": peak,
        "locks": [*sorted(learner.locks, key=LOCKS.index), *(["barrier"] if consistency.barrier else [])],
        "data_source": dataset.source,
        "parameters": sum(p.numel() for p in model.parameters()),
        "workers": experiment.workers,
        "consistency": experiment.consistency,
        "correction": experiment.correction,
        "engine": engine_name(experiment),
        "updates": job.updates,
        "mean_delay": fmean(entry.delay for entry in history) if history else 0.0,
    }
    if run is not None:
        run.finish(result)
    return result


def replayed(experiment: "Experiment", lines: Sequence[Line]) -> Replayed:
    """Repeats a run of many workers in this process.

    Args:
        experiment: The settings of the run.
        lines: Its trace.

    Raises:
        ValueError: If the trace is not of these settings.
    """
    from lockfree.experiment import load_once

    dataset = load_once(experiment.data, experiment.device)
    model = experiment.make_learner(dataset).model
    job = _Shape.of(experiment, len(dataset.train.inputs))
    return server.replay(lines, model, dataset.train, **_described(experiment, job))


class _Shape:
    """How many updates there are.

    Attributes:
        per_epoch: Updates in which all samples are seen once.
        updates: Of the whole run.
    """

    def __init__(self, per_epoch: int, epochs: int) -> None:
        self.per_epoch, self.updates = per_epoch, per_epoch * epochs

    @staticmethod
    def of(experiment: "Experiment", samples: int) -> "_Shape":
        """Works them out: behind a barrier an update takes a batch of each worker."""
        together = experiment.workers if consistency_from(experiment.consistency).barrier else 1
        return _Shape(math.ceil(math.ceil(samples / experiment.batch_size) / together), experiment.epochs)


@dataclass(frozen=True)
class _Optimizing:
    """Makes optimizer and schedule; unlike a function within a function it can be sent to other processes by name."""

    experiment: "Experiment"
    per_epoch: int

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Makes the optimizer."""
        from lockfree.experiment import OPTIMIZERS

        return OPTIMIZERS[self.experiment.optimizer](parameters, lr=self.experiment.learning_rate)

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Makes the schedule, by global updates."""
        from lockfree.experiment import Decay

        return Decay(optimizer, self._share)

    def _share(self, update: int) -> float:
        return self.experiment.share_of_the_rate(update // self.per_epoch)


def _described(experiment: "Experiment", job: _Shape) -> dict[str, Any]:
    """Returns what training and its replay are told alike."""
    optimizing = _Optimizing(experiment, job.per_epoch)
    return {
        "loss": F.cross_entropy,
        "optimizer": optimizing.optimizer,
        "schedule": optimizing.schedule,
        "consistency": consistency_from(experiment.consistency),
        "correction": correction_from(experiment.correction),
    }


def _fill(model: nn.Module, weights: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for place, value in zip([*trained, *model.buffers()], [*weights, *buffers], strict=True):
        place.copy_(value)


def _peak(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Returns the most bytes of activations that a worker holds for a batch."""
    copied = copy.deepcopy(model).train()
    meter = ActivationMeter(copied)
    with undisturbed(copied), meter.watch():
        F.cross_entropy(copied(x.clone()), y).backward()  # of a slice the whole storage would count
    return meter.peak


def _spans(lines: Sequence[Line]) -> list[tuple[int, float, float]]:
    """Returns (worker, pulled at, pushed at) of the first pushes."""
    pulled: dict[int, float] = {}
    spans: list[tuple[int, float, float]] = []
    for line in lines:
        if line["kind"] == "pull":
            pulled[line["worker"]] = line["time"]
        elif line["kind"] == "push" and line["worker"] in pulled:
            spans.append((line["worker"], pulled.pop(line["worker"]), line["time"]))
            if len(spans) == _SHOWN:
                break
    return spans
