"""What a process of `AllReduce` does from its start to its end."""

import contextlib
import logging
import logging.handlers
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from torch import Tensor

from lockfree.rng import set_rng
from lockfree.server.job import Job, Outcome
from lockfree.server.reduction import Exchange
from lockfree.server.replica import Replica
from lockfree.trace import Line

STOP = b"stop"
"""Asks the first process to stop."""


class InWorker(Exception):  # noqa: N818
    """Where an error was that came from another process; it stands as the error's cause."""


class Parted(Exception):  # noqa: N818  (it is what happened)
    """Another process does not answer."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a process is told before its job.

    Attributes:
        rank: Its number.
        size: How many there are.
        port: Where on the loopback they find each other.
        threads: Of PyTorch.
        timeout: Seconds after which a process that says nothing counts as gone.
        together: Whether each has an accelerator of its own, so that they are connected by NCCL.
        time: Seconds that the run has taken so far.
        watched: Whether somebody wants to see the weights along training.
        generators: State of the global random generators.
    """

    rank: int
    size: int
    port: int
    threads: int
    timeout: float
    together: bool
    time: float
    watched: bool
    generators: dict[str, Tensor]


class Home:
    """The way to the process that has started this one, which ends with it.

    Args:
        connection: The way.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._confirmed = threading.Semaphore(0)
        self._stop = threading.Event()

    @property
    def wants_stop(self) -> bool:
        """Whether the other end has asked to stop."""
        return self._stop.is_set()

    def receive(self) -> bytes:
        """Returns what was sent; not after `follow`."""
        return self._connection.recv_bytes()

    def follow(self) -> None:
        """Ends this process as soon as nobody is at the other end."""

        def look() -> None:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    if self._connection.recv_bytes() == STOP:
                        self._stop.set()
                    else:
                        self._confirmed.release()
            os._exit(0)

        threading.Thread(target=look, daemon=True).start()

    def tell(self, kind: str, value: Any = None) -> None:
        """Sends a message: its kind, and what belongs to it."""
        parcel = cloudpickle.dumps((kind, value))
        with self._lock, contextlib.suppress(OSError):  # with nobody there this process ends by itself
            self._connection.send_bytes(parcel)

    def confirm(self) -> None:
        """Waits until all that was told has been heard."""
        self.tell("confirm")
        self._confirmed.acquire()


class Passed(logging.handlers.QueueHandler):
    """Hands what is logged here to the process that has started this one."""

    def __init__(self, home: Home) -> None:
        super().__init__(None)  # pyrefly: ignore[bad-argument-type]
        self._home = home

    def enqueue(self, record: logging.LogRecord) -> None:
        """Hands on a record, which is plain by now."""
        self._home.tell("log", record)


class Distributed(Exchange):
    """The processes of `torch.distributed`.

    Args:
        staged: Whether what lies on an accelerator goes by way of the CPU.
    """

    def __init__(self, *, staged: bool) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._staged = staged

    def to_each(self, whole: Tensor, parts: Tensor) -> None:
        """Gives each worker its part."""
        with self._here(whole, parts) as (source, target):
            dist.all_to_all_single(target, source)

    def from_each(self, mine: Tensor, whole: Tensor) -> None:
        """Collects from each worker."""
        with self._here(mine, whole) as (source, target):
            dist.all_gather(list(target.chunk(self.size)), source)

    @contextlib.contextmanager
    def _here(self, source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Lends memory that messages may come from and go to.

        Raises:
            Parted: If they do not.
        """
        away = self._staged and target.device.type != "cpu"
        near = (source.cpu(), torch.empty_like(target, device="cpu")) if away else (source, target)
        try:
            yield near
        except RuntimeError as error:
            raise Parted(str(error)) from error
        if away:
            target.copy_(near[1])


class Lines:
    """Sends the lines of a trace away, those of a round at a time.

    Args:
        send: Sends some lines.
        confirm: Waits until all that was sent has been taken down.
        start: The time of the first line, in seconds.
    """

    def __init__(self, send: Callable[[list[Line]], None], confirm: Callable[[], None], start: float) -> None:
        self._send, self._confirm = send, confirm
        self._zero = time.monotonic() - start
        self._kept: list[Line] = []

    def note(self, line: Line) -> None:
        """Takes a line."""
        if line["kind"] == "pull" and self._kept and self._kept[-1]["kind"] != "pull":
            self.flush()
        self._kept.append({**line, "time": round(time.monotonic() - self._zero, 9)})
        if line["kind"] == "snapshot":  # a checkpoint must not be there before the lines that lead to it
            self.flush()
            self._confirm()

    def flush(self) -> None:
        """Sends what is left."""
        if self._kept:
            self._send(self._kept)
        self._kept = []


def main(descriptor: int) -> None:
    """Does what the process that has started this one says.

    Args:
        descriptor: Of the way there.
    """
    home = Home(Connection(descriptor))
    setting: Setting = pickle.loads(home.receive())
    parcel = home.receive()
    home.follow()
    torch.set_num_threads(setting.threads)
    try:
        home.tell(*_trained(pickle.loads(parcel), setting, home))
        threading.Event().wait()  # until all are done: whoever ends earlier seems to have died
    except Parted as error:
        home.tell("parted", str(error))
    except BaseException as error:
        where = InWorker(f"in worker {setting.rank} of {setting.size}:\n{traceback.format_exc()}")
        home.tell("failed", (_portable(error), where))
    sys.stdout.flush()
    os._exit(1)  # connections are closed at once, so that nobody waits for this process


def _trained(job: Job, setting: Setting, home: Home) -> tuple[str, Outcome | None]:
    """Trains, and returns the last word: ``done`` or ``stopped``, with what has been trained where the trace is told."""
    set_rng(setting.generators)
    _join(setting)
    exchange = Distributed(staged=not setting.together)
    if setting.rank:
        return "done" if Replica(job, exchange, lambda line: None).run() else "stopped", None
    logging.getLogger("lockfree").addHandler(Passed(home))
    lines = Lines(lambda found: home.tell("lines", found), home.confirm, setting.time)

    def watch(version: int, weights: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        lines.flush()  # what has led to these weights is known first
        home.tell("watch", (version, [weight.cpu() for weight in weights], [buffer.cpu() for buffer in buffers]))

    job = replace(job, watch=watch if setting.watched else None, stop=lambda: home.wants_stop)
    replica = Replica(job, exchange, lines.note)
    try:
        finished = replica.run()
    finally:
        lines.flush()
    server = replica.server
    outcome = Outcome([weight.cpu() for weight in server.weights], [buffer.cpu() for buffer in server.buffers])
    return "done" if finished else "stopped", outcome


def _join(setting: Setting) -> None:
    """Meets the other processes."""
    patience = timedelta(seconds=setting.timeout)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if setting.together else "gloo",
            store=dist.TCPStore("127.0.0.1", setting.port, is_master=False, timeout=patience),
            rank=setting.rank,
            world_size=setting.size,
            timeout=patience,
        )
    except RuntimeError as error:
        raise Parted(str(error)) from error


def _portable(error: BaseException) -> BaseException:
    """Returns an error that can be sent."""
    try:
        found = pickle.loads(cloudpickle.dumps(error))
        assert isinstance(found, BaseException)
    except Exception:  # whatever an error of the user's needs to be made
        return RuntimeError(f"{type(error).__name__}: {error}")
    return found
