"""Training of one model by many workers, in one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lockfree.server.batches import Data
from lockfree.server.core import trained
from lockfree.server.descent import OptimizerFactory
from lockfree.server.history import Entry
from lockfree.server.job import Engine, Job
from lockfree.server.milestones import load
from lockfree.server.simulate import Simulator
from lockfree.server.trace import Recorder
from lockfree.staleness import ASP, Consistency, Correction, NoCorrection
from lockfree.trace import Line


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What training has come to.

    Attributes:
        model: The user's model, trained in place.
        trace: What happened, line by line; `replay` repeats it.
        history: What became of each push, in order.
    """

    model: nn.Module
    trace: Sequence[Line]
    history: Sequence[Entry]


def train(
    model: nn.Module,
    dataset: Data,
    *,
    loss: Callable[[Any, Any], Tensor],
    optimizer: OptimizerFactory,
    workers: int,
    batch_size: int | None,
    updates: int,
    consistency: Consistency = ASP(),  # noqa: B008  (frozen)
    correction: Correction = NoCorrection(),  # noqa: B008
    engine: Engine = Simulator(),  # noqa: B008
    seed: int = 0,
    clip: float | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    loss_scale: float = 1.0,
    memory_per_worker: bool = False,
    patience: int = 20,
    every: int = 10,
    refusals: int = 10,
    fingerprints: int = 100,
    trace: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoints: int = 100,
    resume: bool = False,
    progress: Callable[[Entry], None] | None = None,
) -> Trained:
    r"""Trains one model by many workers that need not wait for each other.

    A worker pulls weights $w_{t-\tau}$ and the number of a batch, and pushes the gradient of that batch. By the time it is taken the
    weights are $w_t$: it is late by $\tau$ updates, which ``consistency`` bounds and ``correction`` repairs.

    Args:
        model: The model. Its trained parameters and its buffers are changed when all is done; if training fails, they are as before.
        dataset: A torch Dataset of pairs (x, y) with a length, or a tuple of tensors (x, y).
        loss: Maps the model's output and y to the mean loss of the batch.
        optimizer: Makes an optimizer of a list of parameters. It runs on the server.
        workers: M, how many workers, 1 or more.
        batch_size: Samples of a worker's batch, 1 or more; ``None``: all of them.
        updates: After how many updates of the weights to stop, 1 or more. `BSP` makes one of M batches, the others one of each.
        consistency: When a worker may go on: `BSP`, `SSP` or `ASP`.
        correction: Repairs gradients that come late.
        engine: Where workers run. `Simulator` plays them in this process.
        seed: Decides the order of the samples and whatever is drawn at random.
        clip: Norm that gradients are shortened to before they are corrected, above 0; ``None``: none.
        schedule: Makes a learning-rate schedule of the optimizer, which is stepped after each update.
        loss_scale: What workers multiply the loss by before it is differentiated, and gradients divided by.
        memory_per_worker: Whether the correction remembers each worker apart.
        patience: For how many gradients in a row a correction may be out of hand before it is given up.
        every: Gap and size of the repair are measured at every so many-th push, 1 or more.
        refusals: How often in a row, or of one batch, values may not be finite, 1 or more, before training ends.
        fingerprints: After every so many updates a fingerprint of the weights goes into the trace.
        trace: A file (``*.jsonl``) or folder to write the trace to as it comes; by default the folder of the checkpoints.
        checkpoint: A folder to write the server's state to.
        checkpoints: After every so many updates, 1 or more, and at the end.
        resume: Whether to go on from the checkpoint. Workers begin with new batches, those that were on their way first; the trace goes on
            too, so that all of it can be replayed. Behind a barrier the weights are bit for bit those of a run without a break.
        progress: Is told of each push.

    Returns:
        The model, the trace and the history.

    Raises:
        ValueError: If an argument is out of range, in one line that says which.
        TypeError: If the dataset is none.
        Diverged: If values were not finite too often.

    Example:
        >>> x = torch.linspace(-1, 1, 16).unsqueeze(1)
        >>> result = train(
        ...     nn.Linear(1, 1), (x, 3 * x), loss=nn.functional.mse_loss, workers=4, batch_size=4, updates=200,
        ...     optimizer=lambda weights: torch.optim.SGD(weights, lr=0.1),
        ... )
        >>> round(result.model.weight.item(), 3), result.history[-1].delay
        (3.0, 3)
    """
    if not isinstance(engine, Engine):
        raise ValueError(f"engine={engine!r}: give an engine of lockfree.server, such as Simulator()")
    folder = None if checkpoint is None else Path(checkpoint)
    if resume and folder is None:
        raise ValueError("resume=True without a checkpoint: give the folder that the run wrote to as `checkpoint`")
    job = Job(
        model=model,
        data=dataset,
        loss=loss,
        optimizer=optimizer,
        schedule=schedule,
        consistency=consistency,
        correction=correction,
        workers=workers,
        updates=updates,
        batch_size=batch_size,
        seed=seed,
        clip=clip,
        loss_scale=loss_scale,
        memory_per_worker=memory_per_worker,
        patience=patience,
        every=every,
        refusals=refusals,
        fingerprints=fingerprints,
        folder=folder,
        checkpoints=checkpoints,
        state=load(folder) if resume and folder is not None else None,
    )
    header = {**job.header(), **engine.about()}
    recorder = Recorder(folder if trace is None else trace, progress=progress, resume=resume)
    try:
        if resume:
            _check_same(recorder.lines[0], header)
        else:
            recorder.note(header)
        outcome = engine.run(job, recorder)
    finally:
        recorder.close()
    with torch.no_grad():
        torch._foreach_copy_(list[Tensor](trained(model)), list(outcome.weights))
        for buffer, value in zip(model.buffers(), outcome.buffers, strict=True):
            buffer.copy_(value)
    return Trained(model=model, trace=recorder.lines, history=recorder.history)


def _check_same(before: Line, now: Line) -> None:
    """Refuses to go on with another run; more updates, other fingerprints or another engine are the same run."""
    for name in before.keys() - {"kind", "time", "updates", "fingerprints", "engine", "threads", "torch"}:
        if before[name] != now.get(name):
            raise ValueError(
                f"the run had {name}={before[name]!r}, given is {now.get(name)!r}: resume it with its own arguments"
            )
