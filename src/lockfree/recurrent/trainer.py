"""Stretches, evaluation, checkpoints: the loop around a recurrent learner and its task."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lockfree.interrupt import deferred_interrupt
from lockfree.memory import ActivationMeter
from lockfree.recurrent.learner import Learnt, RecurrentLearner
from lockfree.recurrent.state import State
from lockfree.recurrent.stretch import Stretch
from lockfree.recurrent.tasks import Task
from lockfree.run import Run
from lockfree.schedulers import Schedulers
from lockfree.trainer import Sink, Summary
from lockfree.values import Values, tensors


@dataclass(slots=True)
class _Mean:
    """The mean of what was told."""

    total: float = 0.0
    count: int = 0

    def hear(self, value: float | None) -> None:
        """Takes a number down; none, or not a number, tells nothing."""
        if value is not None and not math.isnan(value):
            self.total, self.count = self.total + value, self.count + 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(slots=True)
class _Progress:
    """Where training is; with the learner's and the task's state all that a resume needs."""

    stretches: int = 0  # learnt in all: the number of the next one
    epoch: int = 0
    place: int = 0  # stretches learnt in the current epoch
    seconds: float = 0.0
    samples: int = 0
    metered: int = 0  # steps of the longest stretch whose memory was metered
    peak_activation_bytes: int | None = None
    figures: dict[str, float] | None = None  # of the weights as they are


class TaskTrainer:
    """Trains a recurrent learner on a task, writes what happens into a run folder, and goes on where it was stopped.

    On Ctrl-C (or SIGTERM turned into it) the stretch in progress is finished, a checkpoint is written, and `KeyboardInterrupt` is
    raised; with ``resume=True`` training goes on bit-identically, the task's progress included.

    Losses are in bits per position asked, each before its stretch was learnt; see `Task.bits`.

    Args:
        learner: What `lockfree.recurrent.convert` made, with ``task.loss`` as its loss.
        task: Hands out the stretches, is told how each went, and evaluates.
        run: Folder to write to (made here; it must not hold another run), a `Run`, or ``None`` to write nothing.
        resume: Go on from the newest whole checkpoint in the folder instead.
        sinks: Also told of every stretch ("step") and epoch.
        checkpoint_every: Stretches between two checkpoints, beside the one after every epoch; ``None`` for these alone.
        scheduler: A learning-rate scheduler made over ``learner.optimizer``, or several; stepped after every epoch.
        stretch_scheduler: Likewise; stepped after every stretch.

    Raises:
        ValueError: If the folder holds another run, or a number is out of range.

    Example:
        >>> import torch, lockfree as lf
        >>> from lockfree.recurrent.tasks import Copy
        >>> task, core = Copy(batch=4), lf.recurrent.Encoded(lf.recurrent.OneHot(4), torch.nn.LSTM(4, 8))
        >>> learner = lf.recurrent.convert(core, torch.nn.Linear(8, task.classes), horizon=2, bootstrap="dni", loss=task.loss,
        ...                                optimizer=lambda params: torch.optim.Adam(params, lr=1e-3))
        >>> trainer = TaskTrainer(learner, task)
        >>> trainer.fit(epochs=2, stretches=3).steps, trainer.figures()["length_solved"]
        (6, 0.0)
    """

    def __init__(
        self,
        learner: RecurrentLearner,
        task: Task,
        *,
        run: str | Path | Run | None = None,
        resume: bool = False,
        sinks: Sequence[Sink] = (),
        checkpoint_every: int | None = None,
        scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
        stretch_scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
    ) -> None:
        if checkpoint_every is not None and checkpoint_every < 1:
            raise ValueError(f"checkpoint_every={checkpoint_every}: give a number of stretches, 1 or more")
        if resume and run is None:
            raise ValueError("resume=True needs the folder of the run to go on with: pass run=")
        self.learner, self.task = learner, task
        self._sinks, self._checkpoint_every, self._resume = list(sinks), checkpoint_every, resume
        self._schedulers, self._stretch_schedulers = Schedulers(scheduler), Schedulers(stretch_scheduler)
        self._progress = _Progress()
        self._means = {name: _Mean() for name in ("train_loss", "synthetic_loss", "auxiliary_loss")}
        self._device = learner.optimizer.param_groups[0]["params"][0].device
        self.run = self._open(run)

    def _open(self, run: str | Path | Run | None) -> Run | None:
        if run is None or isinstance(run, Run):
            return run
        return Run.open(run) if self._resume else Run.create(run, {"task": repr(self.task), "learner": repr(self.learner)})

    # ---- the loop ------------------------------------------------------------------------------------------------------------

    def fit(self, epochs: int, stretches: int) -> Summary:
        """Trains until so many epochs are done in all.

        Args:
            epochs: 0 or more.
            stretches: In an epoch, 1 or more.

        Returns:
            What `summary` returns.

        Raises:
            ValueError: If a number is out of range, or the task cannot give a stretch.
            Diverged: If a loss is not finite; the last checkpoint is kept.
            KeyboardInterrupt: After a checkpoint, if interrupted.
        """
        for name, value, least in (("epochs", epochs, 0), ("stretches", stretches, 1)):
            if value < least:
                raise ValueError(f"{name}={value}: give {least} or more")
        for module in (self.learner.core, self.learner.readout):
            module.train()
        if not (self._resume and self._load()):
            self._save()
        progress = self._progress
        with deferred_interrupt() as interrupted:
            while progress.epoch < epochs:
                self._epoch(stretches, interrupted)
                self._end_epoch()
                self._save()
                if interrupted():
                    raise KeyboardInterrupt
        return self.summary()

    def summary(self) -> Summary:
        """Returns what has been done so far; ``steps`` are stretches, and a sample is one step of one sequence."""
        progress = self._progress
        return Summary(
            epochs=progress.epoch,
            steps=progress.stretches,
            seconds=progress.seconds,
            samples_per_second=progress.samples / progress.seconds if progress.seconds else 0.0,
            peak_activation_bytes=progress.peak_activation_bytes,
        )

    def figures(self) -> dict[str, float]:
        """Returns what the task says of the learner as it is."""
        if self._progress.figures is None:
            self._progress.figures = self.task.evaluate(_Placed(self.learner, self._device))
        return self._progress.figures

    def _epoch(self, stretches: int, interrupted: Callable[[], bool]) -> None:
        """Trains for what is left of one epoch."""
        progress, every = self._progress, self._checkpoint_every
        while progress.place < stretches:
            clock = time.perf_counter()
            self._step()
            progress.seconds += time.perf_counter() - clock
            # The checkpoint at the end of an epoch is taken when that has been evaluated.
            if progress.place < stretches and (interrupted() or (every and progress.stretches % every == 0)):
                self._save()
                if interrupted():
                    raise KeyboardInterrupt

    def _step(self) -> None:
        progress = self._progress
        given = self.task.stretch(progress.stretches)
        learnt = self._learn(given.to(self._device))
        self._stretch_schedulers.step()
        bits = self.task.bits(learnt.loss, given.targets)
        self.task.learnt(bits)
        for name, value in (("train_loss", bits), ("synthetic_loss", learnt.synthetic), ("auxiliary_loss", learnt.auxiliary)):
            self._means[name].hear(value)
        progress.stretches, progress.place, progress.figures = progress.stretches + 1, progress.place + 1, None
        progress.samples += given.targets.numel()
        self._tell("step", {"step": progress.stretches, "epoch": progress.epoch + 1, "loss": bits})

    def _learn(self, stretch: Stretch) -> Learnt:
        # The second stretch is watched: by then everything that is made once (optimizer state, estimator) is there. So is a longer
        # one, as a curriculum gives them, until there are two whole chunks.
        progress = self._progress
        steps = min(len(stretch.inputs), 2 * self.learner.horizon)
        if not progress.stretches or steps <= progress.metered:
            return self.learner.step(*stretch)
        meter = ActivationMeter(self.learner.core, self.learner.readout, *self.learner.auxiliaries)
        with meter.watch(tensors(tuple(stretch))):
            learnt = self.learner.step(*stretch)
        progress.metered, progress.peak_activation_bytes = steps, max(meter.peak, progress.peak_activation_bytes or 0)
        return learnt

    def _end_epoch(self) -> None:
        progress = self._progress
        progress.epoch, progress.place = progress.epoch + 1, 0
        values: dict[str, Any] = {"epoch": progress.epoch, "step": progress.stretches}
        values |= {name: mean.value for name, mean in self._means.items()}
        values |= {**self.figures(), "seconds": progress.seconds}
        self._tell("epoch", values, write=True)
        self._schedulers.step()
        for mean in self._means.values():
            mean.total, mean.count = 0.0, 0

    def _tell(self, kind: str, values: dict[str, Any], *, write: bool = False) -> None:
        if write and self.run is not None:
            self.run.log(kind, **values)
        for sink in self._sinks:
            sink(kind, values)

    # ---- checkpoints ---------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.run is None:
            return
        state = {
            "learner": self.learner.state_dict(),
            "task": self.task.state_dict(),
            "progress": asdict(self._progress),
            "means": {name: asdict(mean) for name, mean in self._means.items()},
            "schedulers": self._schedulers.states(),
            "stretch_schedulers": self._stretch_schedulers.states(),
        }
        self.run.save_checkpoint(self._progress.stretches, state)

    def _load(self) -> bool:
        """Loads the newest whole checkpoint; returns whether there is one."""
        assert self.run is not None
        found = self.run.load_checkpoint()
        if found is None:
            return False
        step, state = found
        self.learner.load_state_dict(state["learner"])
        self.task.load_state_dict(state["task"])
        self._progress = _Progress(**state["progress"])
        self._means = {name: _Mean(**mean) for name, mean in state["means"].items()}
        self._schedulers.load(state["schedulers"])
        self._stretch_schedulers.load(state["stretch_schedulers"])
        self.run.rewind(step)
        return True


class _Placed:
    """A learner that is asked with tensors of any device."""

    def __init__(self, learner: RecurrentLearner, device: torch.device) -> None:
        self._learner, self._device = learner, device

    def predict(self, inputs: Tensor, *, done: Tensor | None = None, state: State = None) -> tuple[Values, State]:
        """Returns scores on the learner's own device, and the state after the last step."""
        placed = None if done is None else done.to(self._device)
        return self._learner.predict(inputs.to(self._device), done=placed, state=state)
