"""The engine on Ray: a server and workers in processes of their own, on this machine or on many."""

import contextlib
import dataclasses
import json
import logging
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockfree.server.cluster.actors import GONE, Post, ServerActor, Setting, ask, last_line, one_line, work
from lockfree.server.cluster.faults import Schedule
from lockfree.server.cluster.parcel import unpack
from lockfree.server.cluster.session import find_ray, session
from lockfree.server.core import trained
from lockfree.server.job import Engine, Job, Outcome
from lockfree.server.messages import Gone
from lockfree.server.trace import Recorder
from lockfree.trace import Line

log = logging.getLogger(__name__)

_NAMESPACE = "lockfree"
_LEAVE = 10.0  # seconds for workers to end by themselves


@dataclass(frozen=True)
class Ray(Engine):
    """Workers as processes, on this machine or on a cluster of Ray's.

    A worker that dies is taken out at once, so that nobody waits for it, and started again; the batch that it worked on goes out again. A
    server that dies is started again and goes on where it was: a gradient that it has acknowledged is never lost, and none counts
    twice. The trace of a run replays in one process bit for bit, whoever died.

    The server keeps its state in ``server`` in the folder that is given to `train` as ``checkpoint``, on a cluster one that all machines
    share; else in a temporary one on this machine, where it then stays. A folder that vanishes is made again; one that cannot be
    written to ends the run.

    Attributes:
        address: A cluster to join, as in 10.0.0.1:6379, or auto. ``None``: Ray is started for this run, on this machine, reachable
            from it alone and with a token; or, if this process has called ``ray.init``, what it has joined then.
        threads: Of PyTorch, in each process, 1 or more. A replay needs as many.
        cpus: Processors that Ray sets aside for each process, 0 or more; ``None``: 1, or less if the cluster has not so many.
        restarts: How often in a row a worker may die without a gradient in between before training goes on without it, 0 or more.
        patience: Seconds for a worker to start and for a server to come back, above 0.
        snapshots: After how many calls at the latest the server writes a snapshot, 1 or more. In between it takes down each gradient.
        sync: Whether a gradient is flushed to the disk before it is acknowledged. If not, acknowledged gradients outlive any process,
            but if the server's machine itself breaks down those since the last snapshot may be lost.
        detached: Whether the server outlives this process; the next run with the same arguments goes on with it.
        name: Its name on the cluster.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> Ray(threads=2).address is None
        True
    """

    address: str | None = None
    _: KW_ONLY
    threads: int = 1
    cpus: float | int | None = None
    restarts: int = 5
    patience: float | int = 180.0
    snapshots: int = 1000
    sync: bool = False
    detached: bool = False
    name: str = "server"
    _faults: Schedule | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("restarts", 0), ("snapshots", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Ray: {name}={value!r}, give a whole number, {least} or more")
        if isinstance(self.patience, bool) or not isinstance(self.patience, Real) or not self.patience > 0:
            raise ValueError(f"Ray: patience={self.patience!r}, give seconds, above 0")
        if self.cpus is not None and (isinstance(self.cpus, bool) or not isinstance(self.cpus, Real) or not self.cpus >= 0):
            raise ValueError(f"Ray: cpus={self.cpus!r}, give a number of processors, 0 or more, or None")

    def about(self) -> Line:
        """Returns what the header of a trace says of this engine."""
        return {**super().about(), "threads": self.threads}

    def run(self, job: Job, recorder: Recorder) -> Outcome:
        """Trains.

        Args:
            job: What to train.
            recorder: Takes down what happens.

        Raises:
            ImportError: If Ray is not installed.
            ConnectionError: If the cluster does not answer, or the server does not come back.
            RuntimeError: If no worker is left.
            ValueError: If the model is not on the CPU, the job cannot be sent to other processes, or the folder holds another run.
            OSError: If the server cannot write to its folder.
            KeyboardInterrupt: If the job was asked to stop, after a checkpoint.
        """
        ray = find_ray()
        places = {str(tensor.device) for tensor in (*trained(job.model), *job.model.buffers())}
        if places != {"cpu"}:
            raise ValueError(f"the model is on {', '.join(sorted(places))}: the engine Ray trains on the CPU, move it there")
        if self.detached and self.address is None and not ray.is_initialized():
            raise ValueError("Ray: a detached server needs a cluster that outlives this process, give its address=")
        header = {**job.header(), **self.about()}
        if self.detached and job.folder is None:
            raise ValueError("Ray: a detached server needs a folder that outlives this process, give one as checkpoint=")
        with self._folder(job) as folder, session(self.address, job.workers + 1):
            crew = _Crew(self, job, header, folder, recorder)
            try:
                return crew.run()
            except Foreign:
                raise  # and it may go on
            except Exception:
                crew.keep_server = False  # nobody could go on with it
                raise
            finally:
                crew.dismiss()

    @contextlib.contextmanager
    def _folder(self, job: Job) -> Iterator[Path]:
        """Makes the folder that the server keeps its state in."""
        if job.folder is None:
            with tempfile.TemporaryDirectory(prefix="lockfree-server-") as folder:
                yield Path(folder)
            return
        folder = job.folder.absolute() / "server"
        if not self.detached:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


class Foreign(ValueError):  # noqa: N818  (it is what was found)
    """A server of this name belongs to another run."""


@dataclass(slots=True)
class _Seat:
    """A worker's place.

    Attributes:
        number: Its number.
        working: Comes to a result when its process has nothing more to do.
        deadline: When the process must have come; ``None``: it has.
        deaths: How often in a row it has died without a gradient in between.
    """

    number: int
    working: Any
    deadline: float | None
    deaths: int = 0


class _Crew:
    """All processes of a run, and what this one does meanwhile: starts them again, and takes the trace down.

    Attributes:
        keep_server: Whether the server is to go on without this process.
    """

    def __init__(self, engine: Ray, job: Job, header: Line, folder: Path, recorder: Recorder) -> None:
        self._ray = find_ray()
        self._engine, self._recorder = engine, recorder
        self._header, self._folder, self._number_of_workers = header, folder, job.workers
        self._patience = float(engine.patience)
        self._read = 0  # bytes of the trace
        self._seats: dict[int, _Seat] = {}
        self._left_out: set[int] = set()
        self._snapshot = 0  # number of the last one in the trace
        self._stop, self._watch, self._updates = job.stop, job.watch, job.updates
        self._shown = -1  # version that was looked at last
        self._version, self._views = (
            0,
            dict[int, tuple[Any, Any]](),
        )  # what pushes have led to so far, and what is yet to be looked at
        self.keep_server = engine.detached  # whatever becomes of this process
        job = dataclasses.replace(job, folder=None if job.folder is None else job.folder.absolute(), stop=_never, watch=None)
        self._job = self._sent(dataclasses.replace(job, state=None))
        self._share = self._cpus()
        # The server needs no data, and its own copy of the job, which is there as long as it is.
        self._server = self._make_server(dataclasses.replace(job, data=(torch.zeros(1), torch.zeros(1))))

    def run(self) -> Outcome:
        """Trains."""
        self._check_server()
        for number in range(self._number_of_workers):
            self._seats[number] = self._seat(number)
        news = self._server.trace.remote(self._read)
        while True:
            ready, _ = self._ray.wait([news, *self._working], num_returns=1, timeout=1.0)
            if news in ready:
                if self._take_down(news):
                    break
                self._show()
                news = self._server.trace.remote(self._read)
            for seat in list(self._seats.values()):
                self._look_after(seat, done=seat.working in ready)
            if self._stop():
                self._write_checkpoint()
                raise KeyboardInterrupt
        weights, buffers = self._ask("outcome")
        self._show()
        if self._watch is not None and self._shown < self._updates:
            self._watch(self._updates, _tensors(weights), _tensors(buffers))
        self._ray.wait(self._working, num_returns=len(self._seats), timeout=1.0)  # they have been told
        self.keep_server = False
        return Outcome(_tensors(weights), _tensors(buffers))

    def dismiss(self) -> None:
        """Ends all processes of the run.

        Workers end by themselves when the server is gone, or knows them no more. Only who does not is ended by force, since Ray 2.60
        ends the process that cancels a task in the moment in which that task is sent to a worker.
        """
        if not self.keep_server:
            self._ray.kill(self._server)
        else:
            for number in self._seats:
                with contextlib.suppress(Exception):  # whatever has gone wrong, it has been raised already
                    self._ask("evict", number)
        self._end(self._working)

    def _end(self, working: Sequence[Any]) -> None:
        """Waits for workers that are to end, and ends those by force that do not."""
        if not working:
            return
        ended, rest = self._ray.wait(list(working), num_returns=len(working), timeout=_LEAVE)
        for one in rest:
            self._ray.cancel(one, force=True)
        for one in ended:
            with contextlib.suppress(Exception):  # looked at, so that Ray does not report it
                self._ray.get(one)

    @property
    def _working(self) -> list[Any]:
        return [seat.working for seat in self._seats.values()]

    # ---- processes -------------------------------------------------------------------------------------------------------------

    def _sent(self, job: Job) -> Any:
        try:
            return self._ray.put(job)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise ValueError(f"model, data, loss or optimizer cannot be sent to another process: {one_line(error)}") from error

    def _cpus(self) -> float:
        """Returns how many processors each process is promised: not so many that some would wait for others to end."""
        if self._engine.cpus is not None:
            return float(self._engine.cpus)
        there = self._ray.cluster_resources().get("CPU", 0.0)
        return min(1.0, int(1000 * there / (self._number_of_workers + 1)) / 1000)

    def _make_server(self, job: Job) -> Any:
        engine = self._engine
        setting = Setting(
            folder=self._folder,
            header=self._header,
            start=max((line["time"] for line in self._recorder.lines), default=0.0),
            snapshots=engine.snapshots,
            sync=engine.sync,
            threads=engine.threads,
            watched=self._watch is not None,
            faults=None if engine._faults is None else engine._faults.of_server(),
        )
        options: dict[str, Any] = {"max_restarts": -1, "max_concurrency": 1000, "num_cpus": self._share}
        if job.folder is None:  # nobody else can read the one that is used
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            here = self._ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id=here, soft=False)
        if engine.detached:
            options |= {"name": engine.name, "namespace": _NAMESPACE, "lifetime": "detached", "get_if_exists": True}
            return self._ray.remote(ServerActor).options(**options).remote(job, setting)  # what this process holds ends with it
        self._server_job = self._ray.put(job)  # held for as long as the server may have to start again
        return self._ray.remote(ServerActor).options(**options).remote([self._server_job], setting)

    def _check_server(self) -> None:
        theirs = self._ask("header")
        if json.dumps(theirs) != json.dumps(self._header):
            raise Foreign(
                f"the server {self._engine.name!r} trains something else: give the arguments of its run, or another name"
            )

    def _seat(self, number: int, deaths: int = 0) -> _Seat:
        engine = self._engine
        faults = None if engine._faults is None else engine._faults.of_worker(number)
        post = Post(number=number, threads=engine.threads, patience=self._patience, faults=faults)
        # A task, not an actor: Ray lets the next task of this driver have the process, with all that it has imported.
        task = self._ray.remote(work).options(num_cpus=self._share, max_retries=0)
        return _Seat(number, task.remote(self._job, self._server, post), time.monotonic() + self._patience, deaths)

    def _look_after(self, seat: _Seat, *, done: bool) -> None:
        """Sees whether a process has come, and has come to an end."""
        from ray.exceptions import RayError, RayTaskError

        if not done:
            if seat.deadline is not None and time.monotonic() > seat.deadline:
                if self._ask("knows", seat.number):
                    seat.deadline = None
                else:
                    self._leave_out(seat, f"has not started within {self._patience:g} s")
            return
        try:
            what = self._ray.get(seat.working)
        except RayTaskError as error:
            raise _cause(error, seat.number) from None
        except RayError as error:
            with contextlib.suppress(Gone):
                self._ask("evict", seat.number)
            if seat.deaths >= self._engine.restarts:
                self._leave_out(seat, f"has died {seat.deaths + 1} times in a row without a gradient ({one_line(error)})")
            else:
                log.warning("worker %d has died: starting it again", seat.number)
                self._seats[seat.number] = self._seat(seat.number, seat.deaths + 1)
            return
        if what == GONE:
            self._seats[seat.number] = self._seat(seat.number, seat.deaths)
        else:
            del self._seats[seat.number]

    def _leave_out(self, seat: _Seat, why: str) -> None:
        del self._seats[seat.number]
        self._ray.cancel(seat.working, force=True)  # it has never come, or has ended
        if not self._seats:
            raise RuntimeError(f"no worker is left: worker {seat.number} {why}")
        log.warning("worker %d %s: training goes on without it", seat.number, why)
        self._left_out.add(seat.number)
        self._give_up()

    def _give_up(self) -> None:
        """Tells the server for whom it need not wait."""
        for number in self._left_out:
            with contextlib.suppress(Gone):
                self._ask("give_up", number)

    # ---- the server --------------------------------------------------------------------------------------------------------------

    def _ask(self, method: str, *arguments: Any) -> Any:
        from ray.exceptions import RayTaskError

        try:
            return ask(getattr(self._server, method), *arguments, patience=self._patience)
        except RayTaskError as error:
            raise _cause(error, None) from None

    def _take_down(self, news: Any) -> bool:
        """Takes down what is new in the trace, and returns whether that was all."""
        from ray.exceptions import RayError, RayTaskError

        try:
            text, over = self._ray.get(news)
        except RayTaskError as error:
            raise _cause(error, None) from None
        except RayError:  # it is on its way back, and has forgotten what is not in its folder
            self._give_up()
            return False
        lines = [json.loads(line) for line in text.splitlines()]
        for line in lines[0 if self._read else 1 :]:  # there is a header already
            self._recorder.note(line)
            if line["kind"] == "snapshot":
                self._snapshot = line["number"]
                self._recorder.keep()
            seat = self._seats.get(line.get("worker", -1))
            if seat is not None and line["kind"] == "push":
                seat.deaths = 0
            if line.get("outcome") == "applied":
                self._version = max(self._version, line["version"])
        self._read += len(text)
        return over

    def _show(self) -> None:
        """Lets somebody look at the weights, once the pushes that led to them are known."""
        if self._watch is None:
            return
        self._views |= {version: (weights, buffers) for version, weights, buffers in self._ask("views")}
        for version in sorted(version for version in self._views if version <= self._version):
            weights, buffers = self._views.pop(version)
            self._shown = version
            self._watch(version, _tensors(weights), _tensors(buffers))

    def _write_checkpoint(self) -> None:
        """Has a checkpoint written, and takes down what has led to it."""
        number = self._ask("checkpoint")
        while self._snapshot < number:
            self._take_down(self._server.trace.remote(self._read))


def _tensors(parcels: Any) -> list[Tensor]:
    """Returns tensors in memory of their own."""
    return [tensor for tensor in unpack(parcels, own=True) if tensor is not None]


def _never() -> bool:
    return False


def _cause(error: Any, worker: int | None) -> Exception:
    """Returns what was raised in another process, as it was there."""
    from ray.exceptions import RayTaskError

    cause: Any = error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception):
        cause = cause.cause
    if isinstance(cause, RayTaskError):
        cause = RuntimeError(last_line(cause))
    if worker is not None:
        cause.add_note(f"(in worker {worker})")
    return cause
