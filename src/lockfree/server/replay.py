"""Whether one process, doing what a trace says, comes to the same weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lockfree.objective import Diverged
from lockfree.server.batches import Data
from lockfree.server.core import Server
from lockfree.server.descent import OptimizerFactory
from lockfree.server.job import Job, described
from lockfree.server.messages import NotFinite, Pulled, Refused
from lockfree.server.worker import Worker
from lockfree.staleness import ASP, Consistency, Correction, NoCorrection
from lockfree.trace import Line, Replayed

_COMPARED = ("kind", "worker", "incarnation", "sequence", "version", "read", "ticket", "clock", "replaced", "outcome", "delay")


class Parted(Exception):  # noqa: N818  (it is what happened, and never leaves this file)
    """Numbers differ so much that what follows cannot be repeated."""


def replay(
    lines: Sequence[Line],
    model: nn.Module,
    dataset: Data,
    *,
    loss: Callable[[Any, Any], Tensor],
    optimizer: OptimizerFactory,
    consistency: Consistency | None = None,
    correction: Correction | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> Replayed:
    """Repeats a run of any engine in one process, event by event, and compares weights.

    Args:
        lines: The trace, as `train` returns it or `read` reads it. It may end anywhere, but nothing may be missing before.
        model: The model as it was at the start; it is not changed. PyTorch must use as many threads as each process of the run did.
        dataset: The data of the run.
        loss: The loss of the run.
        optimizer: The optimizer of the run.
        consistency: The consistency of the run, by default `ASP`.
        correction: The correction of the run, by default `NoCorrection`.
        schedule: The learning-rate schedule of the run.

    Returns:
        Whether and where weights differ; the model as a whole counts as cell 0. A loss that differs counts as weights that do.

    Raises:
        ValueError: If the trace is not of such a run, or lines are missing.
    """
    if not lines or lines[0].get("what") != "server":
        raise ValueError("the trace does not begin with the header of a server's: give the lines of a whole trace")
    job = _job(lines[0], model, dataset, loss, optimizer, consistency or ASP(), correction or NoCorrection(), schedule)
    return _Replay(job, lines).run()


def _job(
    header: Line,
    model: nn.Module,
    dataset: Data,
    loss: Callable[[Any, Any], Tensor],
    optimizer: OptimizerFactory,
    consistency: Consistency,
    correction: Correction,
    schedule: Callable[[torch.optim.Optimizer], Any] | None,
) -> Job:
    names = ("workers", "updates", "batch_size", "seed", "clip", "loss_scale", "memory_per_worker")
    more = ("patience", "every", "refusals", "fingerprints")
    job = Job(
        model=model,
        data=dataset,
        loss=loss,
        optimizer=optimizer,
        schedule=schedule,
        consistency=consistency,
        correction=correction,
        **{name: header[name] for name in (*names, *more)},
    )
    for name, thing in (("consistency", consistency), ("correction", correction)):
        if described(thing) != header[name]:
            raise ValueError(f"the run's {name} was {header[name]}, given is {described(thing)}: replay with that of the run")
    samples = job.header()["samples"]
    if samples != header["samples"]:
        raise ValueError(
            f"the run's data were {header['samples']} samples, given are {samples}: replay with the data of the run"
        )
    return job


class _Replay:
    def __init__(self, job: Job, lines: Sequence[Line]) -> None:
        self._job, self._lines = job, lines
        self._told: list[Line] = []
        self._server: Server = job.server(self._told.append)
        self._worker: Worker = job.worker()
        self._pulled: dict[int, Pulled] = {}
        self._snapshots: dict[int, tuple[dict[str, Any], dict[int, Pulled]]] = {}
        self._wanted = {line["of"] for line in lines if line["kind"] == "restore"}
        self._compared: list[int] = []
        self._differing: dict[int, int] = {}
        self._fallbacks: set[int] = set()

    def run(self) -> Replayed:
        """Repeats line after line."""
        for number, line in enumerate(self._lines[1:], start=2):
            try:
                self._repeat(line)
            except Parted:
                self._differ()
                break
            except Refused as refusal:
                raise ValueError(
                    f"line {number} of the trace cannot be repeated: {refusal}; lines before it are missing"
                ) from None
            self._check(number, line)
        if self._fallbacks:
            self._differ(min(self._fallbacks))
        return Replayed(
            steps=self._server.version,
            processes=self._job.workers,
            compared=tuple(self._compared),
            differing=self._differing,
        )

    def _repeat(self, line: Line) -> None:
        match line["kind"]:
            case "join":
                self._pulled.pop(line["worker"], None)
                self._server.join(line["worker"])
            case "evict":
                self._pulled.pop(line["worker"], None)
                self._server.evict(line["worker"])
            case "pull":
                pulled = self._server.pull(line["worker"], line["incarnation"])
                if pulled is None:
                    raise Refused(f"worker {line['worker']} would have had to wait")
                self._pulled[line["worker"]] = pulled
            case "push":
                self._push(line)
            case "fallback":
                self._fallbacks ^= {line["version"]}
            case "weights":
                self._compare(line)
            case "snapshot":
                state = self._server.snapshot()
                if line["number"] in self._wanted:
                    self._snapshots[line["number"]] = state, dict(self._pulled)
            case "restore":
                if line["of"] not in self._snapshots:
                    raise Refused(f"snapshot {line['of']} is not in the trace")
                state, pulled = self._snapshots[line["of"]]
                self._server.restore(state)
                again = [self._server.pull(one.worker, one.incarnation) for one in pulled.values()]
                self._pulled = {one.worker: one for one in again if one is not None}  # the same as then
            case kind:
                raise Refused(f"there is a second {kind}")

    def _push(self, line: Line) -> None:
        if line["outcome"] in ("duplicate", "refused"):
            return  # these changed nothing
        pulled = self._pulled.pop(line["worker"], None)
        if pulled is None:
            raise Refused(f"worker {line['worker']} has pulled nothing")
        push = self._worker.answer(pulled)
        if line["outcome"] == "not finite":
            try:
                # What was not finite need not be so again: a machine may have failed. What follows does not depend on the values.
                self._server.push(replace(push, loss=float("nan")))
            except (NotFinite, Diverged):
                return
        if push.loss != line["loss"]:
            self._differ()
        try:
            self._server.push(push)
        except (NotFinite, Diverged):
            raise Parted from None

    def _compare(self, line: Line) -> None:
        if line["version"] != self._server.version:
            raise Refused(f"it is of version {line['version']}, the server is at {self._server.version}")
        self._compared.append(line["version"])
        if self._server.fingerprint() != line["sha256"]:
            self._differ()

    def _differ(self, version: int | None = None) -> None:
        self._differing.setdefault(0, self._server.version if version is None else version)

    def _check(self, number: int, line: Line) -> None:
        """Compares what the server did with what the line says."""
        self._fallbacks ^= {told["version"] for told in self._told if told["kind"] == "fallback"}
        done = [told for told in self._told if told["kind"] != "fallback"]
        self._told.clear()
        if not done:
            return
        (did,) = done
        for name in _COMPARED:
            if did.get(name) != line.get(name):
                raise ValueError(
                    f"line {number} of the trace says {name}={line.get(name)!r}, the server did {name}={did.get(name)!r}: lines before "
                    "it are missing, or it is of another run"
                )
