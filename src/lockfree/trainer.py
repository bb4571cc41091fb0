"""Epochs, evaluation, checkpoints: the loop around a learner."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lockfree.interrupt import deferred_interrupt
from lockfree.learner import Learner, StepResult
from lockfree.memory import ActivationMeter
from lockfree.probes import Probe, View
from lockfree.rng import get_rng, set_rng, undisturbed
from lockfree.run import Run
from lockfree.schedulers import Schedulers
from lockfree.values import Values, batch_size

Sink = Callable[[str, dict[str, Any]], None]
"""Receives what training brings to light: the kind of a record ("step", "epoch") and its values."""


@runtime_checkable
class Stateful(Protocol):
    """A loader that knows where it is in an epoch, such as `lockfree.data.TensorLoader` and torchdata's loaders."""

    def state_dict(self) -> dict[str, Any]:
        """Returns where the loader is."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Goes there."""
        ...


@dataclass(slots=True)
class _Progress:
    """Where training is; with the learner's and the loader's state all that a resume needs."""

    epoch: int = 0
    batch: int = 0  # batches taken in the current epoch
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0
    samples: int = 0
    peak_activation_bytes: int | None = None
    traced: int = 0  # lines of the trace


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How good a model is on a set.

    Attributes:
        loss: Mean loss of a sample.
        accuracy: Share of samples whose highest score is their class, 0 to 1; ``None`` if targets are not class numbers.
    """

    loss: float
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a fit did.

    Attributes:
        epochs: Epochs trained, earlier ones of a resumed run included.
        steps: Batches learnt.
        seconds: Time spent training, without evaluation.
        samples_per_second: Samples learnt in a second of it.
        peak_activation_bytes: Most bytes of saved activations alive in one step; ``None`` if nothing was trained.
    """

    epochs: int
    steps: int
    seconds: float
    samples_per_second: float
    peak_activation_bytes: int | None


class Trainer:
    """Trains a learner over data, writes what happens into a run folder, and goes on where it was stopped.

    On Ctrl-C (or SIGTERM turned into it) the step in progress is finished, a checkpoint is written, and `KeyboardInterrupt` is
    raised; with ``resume=True`` training goes on bit-identically.

    Where several processes train one learner together, each makes a trainer with the same arguments; the first one writes and tells.

    Args:
        learner: What `lockfree.convert` made.
        run: Folder to write to (made here; it must not hold another run), a `Run`, or ``None`` to write nothing.
        resume: Go on from the newest whole checkpoint in the folder instead.
        sinks: Also told of every step and epoch.
        log_every: Steps between two lines in ``metrics.jsonl``, 1 or more.
        checkpoint_every: Steps between two checkpoints, beside the one after every epoch; ``None`` for these alone.
        probes: Look at the learner along training, and change nothing; what they see is logged and drawn in the report.
        probe_data: The (inputs, targets) that they look at, a few hundred samples.
        scheduler: A learning-rate scheduler made over ``learner.optimizer``, or several, such as one over
            ``learner.auxiliary_optimizer`` as well; stepped after every epoch.

    Raises:
        ValueError: If the folder holds another run, or one of another model or rule.

    Example:
        >>> import torch, lockfree as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        >>> learner = lf.convert(model, "backprop", loss=torch.nn.functional.cross_entropy,
        ...                      optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        >>> batches = [(torch.randn(16, 4), torch.randint(0, 3, (16,))) for _ in range(5)]
        >>> lf.Trainer(learner).fit(batches, epochs=2).steps
        10
    """

    def __init__(
        self,
        learner: Learner,
        *,
        run: str | Path | Run | None = None,
        resume: bool = False,
        sinks: Sequence[Sink] = (),
        log_every: int = 20,
        checkpoint_every: int | None = None,
        probes: Sequence[Probe] = (),
        probe_data: tuple[Values, Any] | None = None,
        scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
    ) -> None:
        self.learner = learner
        self._sinks, self._log_every, self._checkpoint_every = list(sinks), log_every, checkpoint_every
        self._schedulers = Schedulers(scheduler)
        self._probes, self._probe_data = list(probes), probe_data
        self._resume, self._saves = resume, run is not None
        self._untold: tuple[StepResult, int] | None = None
        self._progress = _Progress()
        for name, every in (("log_every", log_every), ("checkpoint_every", checkpoint_every)):
            if every is not None and every < 1:
                raise ValueError(f"{name}={every}: give a number of steps, 1 or more")
        if probes and probe_data is None:
            raise ValueError("probes need samples to look at: pass probe_data=(inputs, targets), a few hundred of them")
        for probe in probes:
            probe.check(learner)
        if resume and run is None:
            raise ValueError("resume=True needs the folder of the run to go on with: pass run=")
        self.run = self._open(run)

    def _open(self, run: str | Path | Run | None) -> Run | None:
        if run is None or isinstance(run, Run):
            return run
        if self._resume:
            return Run.open(run)
        if not self.learner.leads:
            return None
        return Run.create(run, {"rule": str(self.learner.rule), "model": repr(self.learner.chain)})

    # ---- the loop ------------------------------------------------------------------------------------------------------------

    def fit(self, train_loader: Iterable, val_loader: Iterable | None = None, *, epochs: int = 1) -> Summary:
        """Trains until ``epochs`` epochs are done in all.

        Args:
            train_loader: Gives (inputs, targets) batches; a new pass for each epoch.
            val_loader: Likewise; evaluated after every epoch.
            epochs: 0 or more.

        Raises:
            ValueError: If the loader gives no batch, or a batch does not fit.
            Diverged: If a loss is not finite; the last checkpoint is kept.
            KeyboardInterrupt: After a checkpoint, if interrupted.
        """
        if epochs < 0:
            raise ValueError(f"epochs={epochs}: give 0 or more")
        self.learner.model.train()
        resumed = self._load(train_loader) if self._resume else None
        if resumed is None:
            self._look(end_of_epoch=True)
            self._save(train_loader, get_rng())
        with deferred_interrupt(heeded=self.learner.leads) as interrupted:
            while self._progress.epoch < epochs:
                self._epoch(train_loader, resumed, interrupted)
                resumed = None
                self._end_epoch(val_loader)
                self._save(train_loader, get_rng())
                if self.learner.agrees(interrupted()):
                    raise KeyboardInterrupt
        return self._summary()

    def _epoch(self, loader: Iterable, resumed: dict[str, Tensor] | None, interrupted: Callable[[], bool]) -> None:
        """Trains for what is left of one epoch."""
        progress = self._progress
        start_of_epoch = resumed or get_rng()
        batches = self._batches(loader, resumed)
        clock = time.perf_counter()
        for x, y in batches:
            self._step(x, y)
            progress.batch += 1
            progress.samples += batch_size(x)
            now = time.perf_counter()
            progress.seconds, clock = progress.seconds + now - clock, now
            steps = self.learner.steps
            if self._look():
                clock = time.perf_counter()
            stop = self.learner.stops(interrupted())
            if stop or (self._checkpoint_every and steps % self._checkpoint_every == 0):
                self._save(loader, start_of_epoch)
                if stop:
                    raise KeyboardInterrupt
                clock = time.perf_counter()
        if not progress.batch:
            raise ValueError(
                "the training loader gave no batch: check that the data set is not empty and drop_last leaves some"
            )

    def _batches(self, loader: Iterable, resumed: dict[str, Tensor] | None) -> Iterator[tuple[Values, Any]]:
        """Returns the batches of this epoch that have not been learnt; a loader without a state is replayed up to there."""
        if resumed is None or isinstance(loader, Stateful):
            return iter(loader)
        at_checkpoint = get_rng()
        set_rng(resumed)
        batches = iter(loader)
        if not self._progress.batch:
            return batches
        skipped = sum(1 for _ in itertools.islice(batches, self._progress.batch))
        if skipped < self._progress.batch:
            raise ValueError(
                f"the training loader has {skipped} batches an epoch, but the run was stopped after {self._progress.batch}: "
                "resume with the data and batch size of the run"
            )
        set_rng(at_checkpoint)
        return batches

    def _step(self, x: Values, y: Any) -> None:
        # The second step of a process is watched: by then everything that is made once (optimizer state) is there.
        watched = self._progress.peak_activation_bytes is None and self._progress.batch == 1
        meter = ActivationMeter(self.learner.model, *self.learner.auxiliaries)
        with meter.watch() if watched else contextlib.nullcontext():
            result = self.learner.step(x, y)
        if watched:
            self._progress.peak_activation_bytes = meter.peak
        self._tell_last_step()
        self._untold = result, self.learner.steps
        if not result.awaited:
            self._tell_last_step()

    def _tell_last_step(self) -> None:
        """Tells what the last step brought to light, if nobody has been told.

        Looking at a loss that arises in another process means waiting for it, which is better done a step later.
        """
        if self._untold is None or not self.learner.leads:
            return
        (result, step), self._untold = self._untold, None
        loss, progress = result.loss, self._progress
        if not math.isnan(loss):  # a pipeline that fills has none yet
            progress.loss_sum, progress.loss_count = progress.loss_sum + loss, progress.loss_count + 1
        values: dict[str, Any] = {"step": step, "epoch": progress.epoch + 1, "loss": loss}
        logged = step % self._log_every == 0
        if logged and result.auxiliary:
            learning = [cell.place.index for cell in self.learner.cells if cell.auxiliary_needs is not None]
            found = [result.auxiliary.get(index) for index in learning]  # None: it had nothing to learn from this batch
            values["auxiliary_loss"] = [None if loss is None else loss.item() for loss in found]
        if logged and result.inputs:
            values["input_loss"] = [result.inputs[index].item() for index in sorted(result.inputs)]
        self._tell("step", values, write=logged)

    def _end_epoch(self, val_loader: Iterable | None) -> None:
        progress = self._progress
        clock = time.perf_counter()
        self.learner.drain()
        self._tell_last_step()
        progress.seconds += time.perf_counter() - clock
        progress.epoch += 1
        values: dict[str, Any] = {"epoch": progress.epoch, "step": self.learner.steps}
        values["train_loss"] = progress.loss_sum / progress.loss_count if progress.loss_count else None
        if val_loader is not None:
            found = evaluate(self.learner, val_loader)
            values |= {"val_loss": found.loss, "val_accuracy": found.accuracy}
        self._tell("epoch", values | {"seconds": progress.seconds}, write=True)
        self._look(end_of_epoch=True)
        self._schedulers.step()
        progress.batch, progress.loss_sum, progress.loss_count = 0, 0.0, 0

    def _look(self, *, end_of_epoch: bool = False) -> bool:
        """Lets the probes look whose time it is; returns whether any has."""
        due = [probe for probe in self._probes if probe.due(self.learner.steps, end_of_epoch=end_of_epoch)]
        if not due:
            return False
        assert self._probe_data is not None
        view = View(self.learner, *self._probe_data)
        for probe in due:
            clock = time.perf_counter()
            with undisturbed(self.learner.model):
                seen = probe.look(view)
            about: dict[str, Any] = {"probe": probe.name, "step": self.learner.steps, "epoch": self._progress.epoch}
            about["seconds"] = time.perf_counter() - clock
            self._tell("probe", about | seen, write=True)
        return True

    def _tell(self, kind: str, values: dict[str, Any], *, write: bool) -> None:
        if not self.learner.leads:
            return
        if write and self.run is not None:
            self.run.log(kind, **values)
        for sink in self._sinks:
            sink(kind, values)

    def _summary(self) -> Summary:
        progress = self._progress
        return Summary(
            epochs=progress.epoch,
            steps=self.learner.steps,
            seconds=progress.seconds,
            samples_per_second=progress.samples / progress.seconds if progress.seconds else 0.0,
            peak_activation_bytes=progress.peak_activation_bytes,
        )

    # ---- checkpoints ---------------------------------------------------------------------------------------------------------

    def _save(self, loader: Iterable, start_of_epoch: dict[str, Tensor]) -> None:
        if not self._saves:
            return
        self._tell_last_step()
        lines = self.learner.trace()
        if self.run is not None and self.learner.leads:
            self.run.append_trace(lines)
            self._progress.traced += len(lines)
        progress = {name: getattr(self._progress, name) for name in _Progress.__slots__}
        state = {
            "learner": self.learner.state_dict(),
            "progress": progress,
            "loader": loader.state_dict() if isinstance(loader, Stateful) else None,
            "start_of_epoch": start_of_epoch,
            "schedulers": self._schedulers.states(),
        }
        if self.run is not None and self.learner.leads:
            self.run.save_checkpoint(self.learner.steps, state)

    def _load(self, loader: Iterable) -> dict[str, Tensor] | None:
        """Loads the newest whole checkpoint, if any; returns the random state at the start of its epoch."""
        assert self.run is not None
        found = self.run.load_checkpoint()
        if found is None:
            return None
        step, state = found
        self._progress = _Progress(**state["progress"])
        if isinstance(loader, Stateful) and state["loader"] is not None:
            loader.load_state_dict(state["loader"])
        self.learner.load_state_dict(state["learner"])  # after the loader's: it sets the random generators
        self._schedulers.load(state["schedulers"])
        self.learner.trace()  # what is done from here on is told with the next checkpoint
        if self.learner.leads:
            self.run.rewind(step)
            self.run.cut_trace(self._progress.traced)
        return state["start_of_epoch"]


def evaluate(learner: Learner, loader: Iterable) -> Evaluation:
    """Evaluates a learner's predictions on a set; nothing is changed.

    Args:
        learner: What `lockfree.convert` made.
        loader: Gives (inputs, targets) batches.

    Raises:
        ValueError: If the loader gives no batch.
    """
    samples, loss_sum, correct, classes = 0, 0.0, 0, True
    for x, y in loader:
        scores = learner.predict(x)
        size = batch_size(x)
        samples += size
        loss_sum += learner.loss(scores, y).item() * size
        classes = classes and _are_classes(scores, y)
        correct += int((scores.argmax(1) == y).sum()) if classes else 0
    if not samples:
        raise ValueError("the evaluation loader gave no batch: pass a set with at least one sample")
    return Evaluation(loss=loss_sum / samples, accuracy=correct / samples if classes else None)


def _are_classes(scores: Any, y: Any) -> bool:
    tensors = isinstance(scores, Tensor) and isinstance(y, Tensor)
    return tensors and scores.dim() == 2 and y.dtype == torch.int64 and y.shape == scores.shape[:1]
