"""What runs in the processes of a cluster: the server, and the workers, which talk to it and to nobody else."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lockfree.objective import Diverged
from lockfree.server.cluster.faults import Faults, Place
from lockfree.server.cluster.keeper import Keeper
from lockfree.server.cluster.parcel import Letter, Parcel, pack, pack_pulled, pack_push, unpack_pulled, unpack_push
from lockfree.server.job import Job
from lockfree.server.messages import Answer, Applied, Gone, NotFinite, Push, Refused
from lockfree.trace import Line

OVER = "over"
"""What a worker is told when all updates are made."""

GONE = "gone"
"""What a worker says that has to begin anew."""

_REFUSALS = 3  # in a row, after which a worker begins anew
_BREATH = 0.05  # seconds between two looks at what does not answer, and between two deliveries of the trace


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a server needs to know besides the job.

    Attributes:
        folder: Where it keeps its state.
        header: First line of the trace.
        start: When the run begins, or goes on, in seconds.
        snapshots: After how many calls at the latest a snapshot is taken.
        sync: Whether gradients are flushed to the disk.
        threads: Of PyTorch.
        watched: Whether somebody wants to see the weights along training.
        faults: Where to die.
    """

    folder: Path
    header: Line
    start: float
    snapshots: int
    sync: bool
    threads: int
    watched: bool = False
    faults: Faults | None = None


class ServerActor:
    """A `Keeper` that many talk to at a time; whoever has to wait costs nothing meanwhile.

    What it refuses it returns, for the caller to raise: what it raised would come with a page of text.

    Args:
        job: What is trained; its data are not used. Or a list with a reference to it, of which Ray does not complain when it is large.
        setting: What else it needs to know.
    """

    def __init__(self, job: Job | list[Any], setting: Setting) -> None:
        torch.set_num_threads(setting.threads)
        if isinstance(job, list):
            import ray

            job = ray.get(job[0])
        self._job, self._setting = job, setting
        self._gate, self._news = asyncio.Event(), asyncio.Event()
        self._seen: tuple[int, bool] | None = None
        self._missing, self._arrived = set(range(job.workers)), set[int]()
        self._met = asyncio.Event()
        self._incarnations: dict[int, int] = {}

    @cached_property
    def _keeper(self) -> Keeper:
        # Made at the first call: what goes wrong here is told to who calls, not to who starts the process again and again.
        setting = self._setting
        return Keeper(
            self._job,
            setting.folder,
            header=setting.header,
            start=setting.start,
            snapshots=setting.snapshots,
            sync=setting.sync,
            watched=setting.watched,
            faults=setting.faults,
        )

    async def header(self) -> Line:
        """Returns the first line of the trace."""
        assert self._keeper is not None
        return self._setting.header

    async def join(self, worker: int) -> int | Exception:
        """Takes a worker in; the first ones as soon as they are all there, in order, so that none has pulled before."""
        if not self._begun and not self._met.is_set():
            self._missing.discard(worker)
            self._arrived.add(worker)
            self._begin_if_complete()
            await self._met.wait()
            if worker in self._incarnations:
                return self._incarnations.pop(worker)
        return self._call(lambda: self._keeper.join(worker))

    async def knows(self, worker: int) -> bool:
        """Whether a worker has come, and has not gone."""
        return worker in self._keeper.server.clocks if self._begun else worker not in self._missing

    async def give_up(self, worker: int) -> Exception | None:
        """Takes a worker out that will not come again."""
        if not self._begun:
            self._missing.discard(worker)
            self._arrived.discard(worker)
            self._begin_if_complete()
            return None
        return self._call(lambda: self._keeper.evict(worker))

    async def evict(self, worker: int) -> Exception | None:
        """Takes a worker out."""
        return self._call(lambda: self._keeper.evict(worker))

    async def pull(self, worker: int, incarnation: int) -> Letter | str | Exception:
        """Hands out weights and a batch as soon as the worker may have them, or says that all is over."""
        while not self._keeper.finished:
            gate = self._gate
            pulled = self._call(lambda: self._keeper.pull(worker, incarnation))
            if pulled is not None:
                return pulled if isinstance(pulled, Exception) else pack_pulled(pulled)
            await gate.wait()
        return OVER

    async def push(self, letter: Letter) -> Answer | str | Exception:
        """Takes a gradient. What it has answered is not lost any more."""
        if self._keeper.finished:
            return OVER
        push = unpack_push(letter)
        return self._call(lambda: self._keeper.push(push))

    async def trace(self, start: int) -> tuple[bytes, bool]:
        """Returns what the trace holds from a place on, when there is something, and whether all is over and that was the end."""
        while self._keeper.shown <= start and not self._keeper.finished:
            await self._news.wait()
        await asyncio.sleep(_BREATH)  # more will have come
        text = self._keeper.trace(start)
        return text, self._keeper.finished and start + len(text) == self._keeper.shown

    async def views(self) -> list[tuple[int, list[Parcel | None], list[Parcel | None]]]:
        """Returns the weights and buffers that somebody wanted to see, once."""
        taken, self._keeper.views = self._keeper.views, {}
        return [(version, pack(weights), pack(buffers)) for version, (weights, buffers) in sorted(taken.items())]

    async def checkpoint(self) -> int | Exception:
        """Writes a checkpoint, and returns its number."""
        return self._call(self._keeper.checkpoint)

    async def outcome(self) -> tuple[list[Parcel | None], list[Parcel | None]]:
        """Returns the weights and buffers."""
        return pack(self._keeper.server.weights), pack(self._keeper.server.buffers)

    @property
    def _begun(self) -> bool:
        """Whether workers have joined, perhaps in the life of an earlier process."""
        return bool(self._keeper.server.clocks) or self._keeper.server.version > 0

    def _begin_if_complete(self) -> None:
        if not self._missing:
            for worker in sorted(self._arrived):
                self._incarnations[worker] = self._keeper.join(worker)
            self._met.set()

    def _call(self, action: Callable[[], Any]) -> Any:
        """Returns what comes of a call, and wakes those who may have waited for it."""
        try:
            return action()
        except (Refused, Diverged) as refusal:
            return refusal
        finally:
            self._news.set()
            self._news = asyncio.Event()
            if (now := (self._keeper.server.slowest, self._keeper.finished)) != self._seen:
                self._seen = now
                self._gate.set()
                self._gate = asyncio.Event()


def ask(method: Any, *arguments: Any, patience: float, sent: Callable[[], None] = lambda: None) -> Any:
    """Asks the server, and again if it dies meanwhile: it knows what it has been asked twice.

    Args:
        method: A method of its handle.
        *arguments: What the method takes.
        patience: For how many seconds it may be away.
        sent: Is called each time that it has been asked and has not yet answered.

    Raises:
        ConnectionError: If it does not come back.
        Refused: If it refuses.
        Diverged: If training has broken.
    """
    import ray
    from ray.exceptions import ActorDiedError, RayError, RayTaskError

    end = time.monotonic() + patience
    while True:
        try:
            asked = method.remote(*arguments)
            sent()
            answer = ray.get(asked)
        except RayTaskError:
            raise
        except ActorDiedError as error:
            raise ConnectionError(f"the server has died for good: {last_line(error)}") from None
        except RayError as error:
            if time.monotonic() > end:
                raise ConnectionError(f"the server has not come back within {patience:g} s ({one_line(error)})") from None
            time.sleep(_BREATH)
            continue
        if isinstance(answer, Exception):
            raise answer
        return answer


def one_line(error: BaseException) -> str:
    """Returns the first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def last_line(error: BaseException) -> str:
    """Returns the last line of what an error says, which is the reason where it shows another process's traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


@dataclass(frozen=True, kw_only=True)
class Post:
    """What a worker needs to know besides the job.

    Attributes:
        number: Its number.
        threads: Of PyTorch.
        patience: For how many seconds the server may be away.
        faults: Where to die.
    """

    number: int
    threads: int
    patience: float
    faults: Faults | None = None

    def reach(self, place: Place) -> None:
        """Comes to a place where it may have to die."""
        if self.faults is not None:
            self.faults.reach(place, wait=_BREATH if place is Place.AFTER_PUSH else 0.0)  # for the push to have left

    def acknowledged(self, push: Push, answer: Answer) -> None:
        """Takes down what the server has acknowledged."""
        if self.faults is not None:
            which = (push.incarnation, push.sequence, push.ticket, int(isinstance(answer, Applied)), answer.version)
            self.faults.note(" ".join(map(str, which)))


def work(job: Job, server: Any, post: Post) -> str:
    """Pulls, works and pushes until all updates are made, or the server knows this worker no more.

    Args:
        job: What is trained.
        server: The server's handle.
        post: What else there is to know.

    Returns:
        Which of the two it was: `OVER` or `GONE`.

    Raises:
        ConnectionError: If the server does not come back.
        Diverged: If training has broken.
    """
    torch.set_num_threads(post.threads)
    worker = job.worker()
    incarnation = ask(server.join, post.number, patience=post.patience)
    refused = 0
    while refused < _REFUSALS:
        post.reach(Place.BEFORE_PULL)
        try:
            letter = ask(server.pull, post.number, incarnation, patience=post.patience)
            if letter == OVER:
                return OVER
            post.reach(Place.AFTER_PULL)
            push = worker.answer(unpack_pulled(letter))
            post.reach(Place.BEFORE_PUSH)
            answer = ask(server.push, pack_push(push), patience=post.patience, sent=lambda: post.reach(Place.AFTER_PUSH))
        except Gone:
            return GONE
        except NotFinite:
            continue
        except Refused:  # the server's machine has broken down, and what it has is older than this pull
            refused += 1
            continue
        if answer == OVER:
            return OVER
        post.acknowledged(push, answer)
        refused = 0
    return GONE
