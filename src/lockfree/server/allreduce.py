"""All workers step together, each with the weights to itself: the alternative to a server where nobody is late anyway."""

import contextlib
import dataclasses
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import cloudpickle
import torch

from lockfree.launch import loopback, loopback_store
from lockfree.processes import ProcessLost
from lockfree.rng import get_rng
from lockfree.server.child import STOP, Setting
from lockfree.server.core import trained
from lockfree.server.job import Engine, Job, Outcome
from lockfree.server.trace import Recorder
from lockfree.staleness import NoCorrection
from lockfree.trace import Line

_PATIENCE = 5.0  # seconds for the others to say what they know once something has gone wrong
_LOOK = 0.2  # seconds between two questions whether to stop
_CHILD = "import sys; from lockfree.server.child import main; main(int(sys.argv[1]))"


@dataclass(frozen=True, kw_only=True)
class AllReduce(Engine):
    """Workers as processes on this machine that average their gradients, with no server in between.

    Each has the weights and the optimizer to itself. In a round each takes the batch that a server with `BSP` would give it; the mean of
    the gradients is made by all together, in the order of the workers, and each makes the same step. So weights, losses and
    checkpoints are bit for bit those of a server with `BSP`, and every trace is replayed like one of its. From each worker go
    2 (M-1)/M times as many bytes as a gradient has, however many workers there are, where all of a server's go to one place.

    On the CPU they are connected by gloo. A model on an accelerator has as many of them as there are workers, connected by NCCL, if so
    many are visible; else workers share them, and are connected by way of the CPU.

    Model, data, loss, optimizer and schedule are sent to each process, which has a copy of its own of all of them; what is defined in
    a script or notebook, lambdas too, comes along. They must be made of what cloudpickle takes.

    Buffers, as those of batch normalisation, are those of the server with `BSP`: after each round means of the workers' numbers, and
    the largest of their counts.

    Attributes:
        threads: Of PyTorch, in each process, 1 or more. A replay needs as many.
        timeout: Seconds after which a process that says nothing counts as gone, above 0: more than any batch takes.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> AllReduce(threads=2).about()
        {'engine': 'AllReduce', 'threads': 2}
    """

    threads: int = 1
    timeout: float | int = 1800.0

    def __post_init__(self) -> None:
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 1:
            raise ValueError(f"AllReduce: threads={self.threads!r}, give a whole number, 1 or more")
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, Real) or not self.timeout > 0:
            raise ValueError(f"AllReduce: timeout={self.timeout!r}, give seconds, above 0")

    def about(self) -> Line:
        """Returns what the header of a trace says of this engine."""
        return {**super().about(), "threads": self.threads}

    def run(self, job: Job, recorder: Recorder) -> Outcome:
        """Trains.

        Args:
            job: What to train.
            recorder: Takes down what happens.

        Raises:
            ValueError: If workers were to be late, or a late gradient repaired; if the job cannot be sent to other processes.
            Diverged: If values were not finite too often.
            DriftedApart: If the processes have come to different weights.
            ProcessLost: If a process has died. What it was that a worker failed with is raised as it is.
            KeyboardInterrupt: If the job was asked to stop, after the round and with a checkpoint.
        """
        if not job.consistency.barrier:
            raise ValueError(
                f"AllReduce: consistency={job.consistency!r}, but all workers step together: give BSP() or SSP(0), or another engine"
            )
        if type(job.correction) is not NoCorrection:
            raise ValueError(
                f"AllReduce: correction={job.correction!r}, but no gradient is late: leave it out, or give another engine"
            )
        places = {tensor.device for tensor in (*trained(job.model), *job.model.buffers())}
        if len(places) > 1 or next(iter(places)).type not in ("cpu", "cuda"):
            raise ValueError(f"AllReduce: the model is on {', '.join(sorted(map(str, places)))}: move it to the CPU or one GPU")
        if not torch.distributed.is_available():
            raise ValueError("AllReduce: this PyTorch comes without torch.distributed: give another engine")
        # Model and optimizer are made of the job in each process; folders may be told relative to where this one is.
        job = dataclasses.replace(job, folder=None if job.folder is None else job.folder.absolute())
        with _crew(self, job, places.pop(), recorder) as crew:
            return crew.run()


@runtime_checkable
class Process(Protocol):
    """What there is to do with a process: that of `subprocess.Popen`."""

    def kill(self) -> None:
        """Ends it."""

    def wait(self, timeout: float | None = None) -> int:
        """Returns its exit code, or the negative number of the signal that has ended it."""
        ...


@dataclass(slots=True, eq=False)
class _Child:
    """A process.

    Attributes:
        rank: Its number.
        process: The process.
        way: The way to it.
        farewell: What it has said last: ``done``, ``stopped``, ``failed`` or ``parted`` from the others.
        value: What belongs to that.
        ended: Whether nothing more will come.
    """

    rank: int
    process: Process
    way: Connection
    farewell: str = ""
    value: Any = None
    ended: bool = False

    @property
    def lost(self) -> bool:
        """Whether it has ended without a word."""
        return self.ended and not self.farewell

    def send(self, parcel: bytes) -> None:
        """Sends something; that it is gone will be noticed when nothing comes back."""
        with contextlib.suppress(OSError):
            self.way.send_bytes(parcel)

    def receive(self) -> tuple[str, Any] | None:
        """Returns the next message; ``None``: there will be none."""
        try:
            return pickle.loads(self.way.recv_bytes())
        except (EOFError, OSError):
            self.ended = True
            return None

    def fate(self) -> str:
        """Returns what became of a process that has ended."""
        try:
            code = self.process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            return "has closed its connection"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class _Crew:
    """All processes of a run, and what this one does meanwhile: takes down the trace, and ends them all when one fails."""

    def __init__(self, children: list[_Child], job: Job, recorder: Recorder) -> None:
        self._children, self._job, self._recorder = children, job, recorder
        self._asked = False

    def run(self) -> Outcome:
        """Listens until all are done.

        Raises:
            ProcessLost: If one has died.
            KeyboardInterrupt: If they have stopped when asked to.
        """
        end = None
        while not self._over() and (end is None or time.monotonic() < end):
            ways: dict[Any, _Child] = {child.way: child for child in self._children if not child.ended}
            for way in wait(list(ways), timeout=_LOOK if end is None else max(0.0, end - time.monotonic())):
                self._hear(ways[way])
            if end is None and self._trouble():
                end = time.monotonic() + _PATIENCE
            if not self._asked and self._job.stop():
                self._asked = True
                self._children[0].send(STOP)
        if self._trouble():
            raise self._reason()
        if self._children[0].farewell == "stopped":
            raise KeyboardInterrupt
        return self._children[0].value

    def _hear(self, child: _Child) -> None:
        match child.receive():
            case "lines", lines:
                for line in lines:
                    self._recorder.note(line)
            case "confirm", _:
                self._recorder.keep()
                child.send(b"")
            case "log", record:
                log = logging.getLogger(record.name)
                if log.isEnabledFor(record.levelno):
                    log.handle(record)
            case "watch", seen:
                assert self._job.watch is not None
                self._job.watch(*seen)
            case "done" | "stopped" | "failed" | "parted" as farewell, value:
                child.farewell, child.value = farewell, value

    def _trouble(self) -> bool:
        return any(child.farewell in ("failed", "parted") or child.lost for child in self._children)

    def _over(self) -> bool:
        """Whether all are done; or it is known why they are not, and the first one, which tells the trace, has ended."""
        if not self._trouble():
            return all(child.farewell for child in self._children)
        known = any(child.farewell == "failed" or child.lost for child in self._children)
        return all(child.ended for child in self._children) or (known and self._children[0].ended)

    def _reason(self) -> BaseException:
        """Returns why training has ended: rather an error than a death, and rather a death than that others noticed."""
        for child in self._children:
            if child.farewell == "failed":
                error, error.__cause__ = child.value
                return error
        lost = [(child, child.fate()) for child in self._children if child.lost]
        silent = [(child, "does not answer") for child in self._children if not child.farewell]
        parted = [
            (child, f"has lost the others ({' '.join(child.value.split())})")
            for child in self._children
            if child.farewell == "parted"
        ]
        child, how = [*lost, *silent, *parted][0]
        return ProcessLost(child.rank, len(self._children), what="worker", how=how)


@contextlib.contextmanager
def _crew(engine: AllReduce, job: Job, device: torch.device, recorder: Recorder) -> Iterator[_Crew]:
    """Starts the processes; afterwards they are gone, whatever happens."""
    parcel = _sent(dataclasses.replace(job, watch=None, stop=_never))
    store = loopback_store()
    visible = _visible() if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        children = []
        for rank in range(job.workers):
            environment = {"OMP_NUM_THREADS": str(engine.threads)}
            if visible:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(_swapped(visible, device.index or 0, rank))
            children.append(stack.enter_context(_started(rank, environment)))
        for child in children:
            setting = Setting(
                rank=child.rank,
                size=job.workers,
                port=store.port,
                threads=engine.threads,
                timeout=float(engine.timeout),
                together=len(visible) >= job.workers,
                watched=job.watch is not None,
                time=max((line["time"] for line in recorder.lines), default=0.0),
                generators=get_rng(),
            )
            child.send(pickle.dumps(setting))
            child.send(parcel)
        yield _Crew(children, job, recorder)


@contextlib.contextmanager
def _started(rank: int, environment: dict[str, str]) -> Iterator[_Child]:
    """Starts one process; afterwards it is gone."""
    ours, theirs = Pipe()
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    interfaces = {"GLOO_SOCKET_IFNAME": loopback(), "NCCL_SOCKET_IFNAME": loopback()}
    with ours:
        with theirs:
            # In a session of its own, so that Ctrl-C on the terminal reaches this process alone; what a user prints is seen once.
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD, str(theirs.fileno())],
                env={**os.environ, **interfaces, **environment, "PYTHONPATH": paths},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else subprocess.DEVNULL,
            )
        try:
            yield _Child(rank, process, ours)
        finally:
            process.kill()
            process.wait()


def _sent(job: Job) -> bytes:
    """Returns a job as bytes.

    Raises:
        ValueError: If it cannot be sent, with what is to blame.
    """
    try:
        return cloudpickle.dumps(job)
    except Exception as error:  # whatever an object of the user's may raise
        what = next(
            (name for name in ("model", "data", "loss", "optimizer", "schedule") if not _fits(getattr(job, name))), "job"
        )
        raise ValueError(
            f"AllReduce: the {what} cannot be sent to other processes ({' '.join(str(error).split())}): make it of what can be pickled, "
            "without open files, locks or generators"
        ) from error


def _never() -> bool:
    return False


def _fits(thing: Any) -> bool:
    try:
        cloudpickle.dumps(thing)
    except Exception:  # as above
        return False
    return True


def _visible() -> list[str]:
    """Returns the names of the GPUs that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def _swapped(visible: list[str], index: int, rank: int) -> list[str]:
    """Returns the names of the GPUs so that what lies on this process's GPU ``index`` comes to lie on a worker's own.

    Example:
        >>> [_swapped(["0", "1", "2"], index=1, rank=rank) for rank in range(3)]
        [['0', '1', '2'], ['0', '2', '1'], ['1', '0', '2']]
    """
    mine = (index + rank) % len(visible)
    names = list(visible)
    names[index], names[mine] = names[mine], names[index]
    return names
