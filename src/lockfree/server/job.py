"""What is to be trained, and what an engine is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lockfree.server.batches import Batches, Data
from lockfree.server.core import Server, trained
from lockfree.server.descent import OptimizerFactory
from lockfree.server.milestones import Milestones
from lockfree.server.trace import Recorder
from lockfree.server.worker import Worker
from lockfree.staleness import Consistency, Correction
from lockfree.trace import Line


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, as `lockfree.server.train` describes it: an engine makes its server and its workers of it.

    Attributes:
        model: The user's model, as it is at the start.
        data: The dataset.
        loss: Maps the model's output and the targets to the mean loss.
        optimizer: Makes the optimizer.
        schedule: Makes the learning-rate schedule, if there is one.
        consistency: When a worker may go on.
        correction: Repairs gradients that come late.
        workers: How many workers, 1 or more.
        updates: How many updates, 1 or more.
        batch_size: Samples of a worker's batch; ``None``: all of them.
        seed: Decides the order of samples and what is drawn at random.
        clip: Norm that gradients are shortened to.
        loss_scale: What workers multiply the loss by before it is differentiated.
        memory_per_worker: Whether the correction remembers each worker apart.
        patience: For how many gradients in a row the correction may be out of hand.
        every: At every so many-th push gap and size of the repair are measured.
        refusals: How often values may not be finite.
        fingerprints: After every so many updates a fingerprint of the weights goes into the trace.
        folder: Where checkpoints go, if anywhere.
        checkpoints: After every so many updates there is one.
        state: The snapshot to go on from, if this is not the start.
    """

    model: nn.Module
    data: Data
    loss: Callable[[Any, Any], Tensor]
    optimizer: OptimizerFactory
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    consistency: Consistency
    correction: Correction
    workers: int
    updates: int
    batch_size: int | None
    seed: int = 0
    clip: float | None = None
    loss_scale: float = 1.0
    memory_per_worker: bool = False
    patience: int = 20
    every: int = 10
    refusals: int = 10
    fingerprints: int = 100
    folder: Path | None = None
    checkpoints: int = 100
    state: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "updates", "patience", "every", "refusals", "fingerprints", "checkpoints"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number, 1 or more")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r}: give a whole number")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip!r}: give a norm above 0, or None")
        if not self.loss_scale > 0:
            raise ValueError(f"loss_scale={self.loss_scale!r}: give a number above 0")
        for name, kind, example in (("consistency", Consistency, "ASP()"), ("correction", Correction, "NoCorrection()")):
            given = getattr(self, name)
            if not isinstance(given, kind):
                raise ValueError(f"{name}={given!r}: give an object of lockfree.staleness, such as {example}")
        for name in ("loss", "optimizer"):
            if not callable(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r}: give a function")
        trained(self.model)

    def server(self, note: Callable[[Line], None] | None = None) -> Server:
        """Makes the server, and puts it where the run is to go on. All workers have to join, or join anew.

        Args:
            note: Is told what happens.
        """
        server = Server(
            self.model,
            optimizer=self.optimizer,
            consistency=self.consistency,
            correction=self.correction,
            clip=self.clip,
            schedule=self.schedule,
            memory_per_worker=self.memory_per_worker,
            patience=self.patience,
            every=self.every,
            refusals=self.refusals,
            note=note,
        )
        if self.state is not None:
            server.restore(self.state)
        return server

    def worker(self) -> Worker:
        """Makes a worker."""
        batches = Batches(self.data, batch_size=self.batch_size, seed=self.seed)
        return Worker(self.model, batches, loss=self.loss, loss_scale=self.loss_scale)

    def milestones(self) -> Milestones:
        """Makes what an engine asks after each push, and at the end."""
        return Milestones(fingerprints=self.fingerprints, folder=self.folder, checkpoints=self.checkpoints)

    def header(self) -> Line:
        """Returns the first line of the trace: what a replay needs to know, or must find again."""
        plain = ("workers", "updates", "batch_size", "seed", "clip", "loss_scale", "memory_per_worker")
        more = ("patience", "every", "refusals", "fingerprints")
        return {
            "kind": "header",
            "what": "server",
            **{name: getattr(self, name) for name in (*plain, *more)},
            "samples": Batches(self.data, batch_size=self.batch_size, seed=self.seed).tickets.length,
            "consistency": described(self.consistency),
            "correction": described(self.correction),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a run has come to.

    Attributes:
        weights: The trained weights, in the model's order.
        buffers: The buffers, likewise.
    """

    weights: Sequence[Tensor]
    buffers: Sequence[Tensor]


class Engine(ABC):
    """Carries messages between a server and its workers until all updates are made."""

    def about(self) -> Line:
        """Returns what the header of a trace says of this engine."""
        return {"engine": type(self).__name__}

    @abstractmethod
    def run(self, job: Job, recorder: Recorder) -> Outcome:
        """Trains.

        Args:
            job: What to train; its model is not written to.
            recorder: Takes down what happens. Its header is there already.

        Raises:
            Diverged: If values were not finite too often.
        """


def described(thing: Consistency | Correction) -> dict[str, Any]:
    """Returns the name of a consistency or correction, and its fields that are numbers.

    Example:
        >>> from lockfree.staleness import SSP
        >>> described(SSP(3))
        {'name': 'SSP', 'bound': 3}
    """
    values = {field.name: getattr(thing, field.name) for field in fields(thing)}
    plain = {name: value for name, value in values.items() if value is None or isinstance(value, Real | str)}
    return {"name": type(thing).__name__, **plain}
