"""A server that outlives its process: whatever it has acknowledged is in its folder."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockfree.objective import Diverged
from lockfree.server.cluster.faults import Faults, Place
from lockfree.server.cluster.journal import Journal, read
from lockfree.server.cluster.parcel import Letter, pack, unpack_push
from lockfree.server.core import Server
from lockfree.server.job import Job
from lockfree.server.messages import Answer, Pulled, Push, Refused
from lockfree.server.milestones import FILE
from lockfree.trace import Line

log = logging.getLogger(__name__)

_TIMES_A_SNAPSHOT = 4  # how large a journal may grow before another snapshot is taken, and so how little of the time that is
_AT_LEAST = 64 * 2**20  # bytes of journal that are worth no snapshot


class Keeper:
    r"""Drives a `Server`, and keeps in a folder what another one needs to go on as if nothing had happened.

    A call is made, then taken down in the journal with the gradient that it brought, then answered. So a process that dies may forget
    a call that nobody has an answer to, which is made again; never one that was answered. What the server does depends on its calls
    alone: a successor restores the last snapshot, repeats the calls since, and is bit for bit where the other one was. The lines of
    the trace follow from the calls, too. Those of a call that was lost are cut off, the others come out as they were, and nobody is
    shown a line before its call is in the journal.

    The folder holds ``snapshot-N.pt``, ``journal-N`` with the calls since, and ``trace.jsonl``. A snapshot is written beside the last
    one, flushed to the disk and put in its place in one step. If the job wants checkpoints they are snapshots, too.

    Args:
        job: What is trained; its data are not used.
        folder: The folder. If it holds a snapshot, the run goes on from there.
        header: First line of the trace.
        start: The time at which the run begins, or goes on, in seconds.
        snapshots: After how many calls at the latest another snapshot is taken, 1 or more.
        sync: Whether each gradient is flushed to the disk before it is acknowledged, so that it outlives the machine, too.
        watched: Whether somebody wants to see the weights after every ``job.watch_every`` updates.
        faults: Where to die.

    Attributes:
        server: The server.
        views: Copies of (weights, buffers), by version, that nobody has taken yet.
        finished: Whether all updates are made. From then on workers get no more weights, and no gradient is taken.

    Raises:
        OSError: Here and later, if the folder cannot be written to.
        ValueError: If what the folder holds is of another run, or damaged.
    """

    def __init__(
        self,
        job: Job,
        folder: Path,
        *,
        header: Line,
        start: float = 0.0,
        snapshots: int = 1000,
        sync: bool = False,
        watched: bool = False,
        faults: Faults | None = None,
    ) -> None:
        self._watched = watched
        self.views: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._job, self._folder, self._header = job, folder, header
        self._every, self._sync = snapshots, sync
        self._faults: Faults | None = None  # not before all is as it was
        self._lines: list[Line] = []
        self._muted = False
        self._broken: OSError | None = None
        self._marked = self._saved = self._viewed = -1  # the last versions that a fingerprint and a checkpoint were made of
        self._calls = self._shown = self._snapshot_size = 0
        self._journal: Journal | None = None
        self._files: list[Path] = []
        self._now, self._began = start, time.time() - start
        self.server: Server = job.server(self._note)
        self.finished = self.server.version >= job.updates
        self._number = max((number for number, _ in _snapshots(folder)), default=0)
        self._make_folder()
        self._trace = os.open(self._folder / "trace.jsonl", os.O_RDWR | os.O_CREAT, 0o600)
        if self._number:
            self._recover()
        else:
            self._begin()
        self._faults = faults

    # ---- what is asked of it -----------------------------------------------------------------------------------------------------

    def join(self, worker: int) -> int:
        """Takes a worker in, as `Server.join` does."""
        return self._call({"call": "join", "worker": worker}, lambda: self.server.join(worker))

    def evict(self, worker: int) -> None:
        """Takes a worker out, as `Server.evict` does."""
        self._call({"call": "evict", "worker": worker}, lambda: self.server.evict(worker))

    def pull(self, worker: int, incarnation: int) -> Pulled | None:
        """Hands out weights and a batch, as `Server.pull` does; ``None``: wait."""
        record = {"call": "pull", "worker": worker, "incarnation": incarnation}
        return self._call(record, lambda: self.server.pull(worker, incarnation))

    def push(self, push: Push) -> Answer:
        """Takes a gradient, as `Server.push` does. Once it has returned, the gradient is safe."""
        return self._call({"call": "push"}, lambda: self.server.push(push), push)

    def checkpoint(self) -> int:
        """Writes a snapshot now, and returns its number."""
        self._take_snapshot()
        return self._number

    def trace(self, start: int, most: int = 2**20) -> bytes:
        """Returns the trace from a place on, as whole lines of JSON.

        Args:
            start: Bytes to leave out.
            most: About how many bytes to return.
        """
        found = os.pread(self._trace, min(most, self._shown - start), start)
        return found[: found.rfind(b"\n") + 1] if start + len(found) < self._shown else found

    @property
    def shown(self) -> int:
        """Bytes of the trace so far."""
        return self._shown

    def close(self) -> None:
        """Closes all files."""
        if self._journal is not None:
            self._journal.close()
        os.close(self._trace)

    # ---- a call ----------------------------------------------------------------------------------------------------------------

    def _call(self, record: dict[str, Any], action: Callable[[], Any], push: Push | None = None) -> Any:
        """Makes a call and takes it down, unless it has changed nothing."""
        try:
            if self._broken:  # what is taken down after half a record will not be read
                raise self._broken
            if not all(file.exists() for file in self._files):
                self._make_anew()
            self._now = max(self._now, round(time.time() - self._began, 6))
            self._reach(Place.BEFORE_APPLYING, push)
            outcome = self._made(action)
            if self._lines:
                self._reach(Place.AFTER_APPLYING, push)
                self._take_down({**record, "time": self._now}, push)
                self._reach(Place.AFTER_LOGGING, push)
        except OSError as error:
            self._broken = error
            raise OSError(
                f"the server cannot write to {self._folder}: {error.strerror or error}; make room or give another folder"
            ) from error
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _made(self, action: Callable[[], Any]) -> Any:
        """Makes a call, and looks at what has come of it; what it raises is returned."""
        try:
            outcome = action()
        except (Refused, Diverged) as refusal:
            outcome = refusal
        self._mark()
        return outcome

    def _mark(self) -> None:
        """Adds a fingerprint to the trace when one is due."""
        version = self.server.version
        self.finished = version >= self._job.updates
        if version != self._marked and (self.finished or version % self._job.fingerprints == 0):
            self._marked = version
            self.server.fingerprint()
        if self._watched and version % self._job.watch_every == 0 and version > self._viewed:
            self._viewed = version
            self.views[version] = [w.clone() for w in self.server.weights], [b.clone() for b in self.server.buffers]

    def _take_down(self, record: dict[str, Any], push: Push | None) -> None:
        assert self._journal is not None
        if push is None:
            self._journal.append(record)
        elif any(line.get("outcome") in ("applied", "dropped", "not finite") for line in self._lines):
            numbers = {name: getattr(push, name) for name in _NUMBERS}
            self._journal.append({**record, "push": numbers}, [pack(push.gradients), pack(push.buffers)])
        else:  # it has changed nothing, and only the trace knows
            self._journal.append({"call": "lines", "lines": self._lines})
        self._show()
        self._calls += 1
        large = self._journal.size > max(_AT_LEAST, _TIMES_A_SNAPSHOT * self._snapshot_size)
        if large or self._calls >= self._every or self._checkpoint_due:
            self._take_snapshot()

    @property
    def _checkpoint_due(self) -> bool:
        version = self.server.version
        if self._job.folder is None or version == self._saved:
            return False
        return self.finished or version % self._job.checkpoints == 0

    def _note(self, line: Line) -> None:
        if not self._muted:
            self._lines.append({**line, "time": self._now})

    def _show(self) -> None:
        """Adds the lines that have come to the trace."""
        self._shown += self._written()

    def _written(self) -> int:
        text = "".join(json.dumps(line) + "\n" for line in self._lines).encode()
        self._lines.clear()
        done = 0
        while done < len(text):
            done += os.pwrite(self._trace, text[done:], self._shown + done)
        return len(text)

    def _reach(self, place: Place, push: Push | None) -> None:
        if self._faults is not None and push is not None:
            self._faults.reach(place)

    # ---- the folder ------------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        os.ftruncate(self._trace, 0)
        self._lines.insert(0, {**self._header, "time": self._now})
        self._mark()
        self._take_snapshot()

    def _recover(self) -> None:
        """Goes on where an earlier process was."""
        path = self._folder / f"snapshot-{self._number}.pt"
        state = torch.load(path, weights_only=True)
        if state["header"] != json.dumps(self._header):
            raise ValueError(f"{self._folder} is of another run: give an empty folder, or the run's own model and settings")
        self._shown, self._marked = state["trace"], state["marked"]
        self._began, self._now = state["began"], state["now"]
        if os.fstat(self._trace).st_size < self._shown:
            raise ValueError(f"{self._folder}: trace.jsonl is shorter than it was: put it back, or give an empty folder")
        os.ftruncate(self._trace, self._shown)
        with self._mute():
            self.server.restore(state["server"])
        self.finished = self.server.version >= self._job.updates
        repeated = 0
        for head, parts in read(self._folder / f"journal-{self._number}"):
            self._repeat(head, parts)
            self._show()
            repeated += 1
        log.warning("the server has come back at version %d, from a snapshot and %d calls since", self.server.version, repeated)
        self._now = max(self._now, round(time.time() - self._began, 6))
        self._take_snapshot()
        assert self._journal is not None
        # It says so in the trace: what it comes back to is where it is.
        self._lines.append({"kind": "restore", "version": self.server.version, "of": self._number, "time": self._now})
        self._journal.append({"call": "lines", "lines": self._lines})
        self._show()

    def _repeat(self, head: dict[str, Any], parts: list[list[Any]]) -> None:
        self._now = head.get("time", self._now)
        match head["call"]:
            case "lines":
                self._lines.extend(head["lines"])
            case "join":
                self._made(lambda: self.server.join(head["worker"]))
            case "evict":
                self._made(lambda: self.server.evict(head["worker"]))
            case "pull":
                self._made(lambda: self.server.pull(head["worker"], head["incarnation"]))
            case "push":
                self._made(lambda: self.server.push(unpack_push(Letter(head["push"], parts[0], parts[1]))))

    def _take_snapshot(self) -> None:
        """Writes a snapshot and begins another journal; what is older is removed."""
        self._make_folder()
        state = self.server.snapshot()
        number = state["number"]
        written = self._written()  # which nobody is shown before the snapshot is there
        os.fsync(self._trace)
        kept = {
            "server": state,
            "header": json.dumps(self._header),
            "trace": self._shown + written,
            "marked": self._marked,
            "began": self._began,
            "now": self._now,
        }
        path = self._folder / f"snapshot-{number}.pt"
        self._snapshot_size = self._save(kept, path)
        if self._job.folder is not None:
            self._save({"server": state, "engine": None}, self._job.folder / FILE)
            self._saved = self.server.version
        if self._journal is not None:
            self._journal.close()
        self._journal = Journal(self._folder / f"journal-{number}", sync=self._sync)
        self._files = [path, self._journal.path, self._folder / "trace.jsonl"]
        self._number, self._calls = number, 0
        self._shown += written
        for old, snapshot in _snapshots(self._folder):
            if old < number:
                for file in (snapshot, self._folder / f"journal-{old}"):
                    file.unlink(missing_ok=True)

    def _save(self, state: dict[str, Any], path: Path) -> int:
        """Puts a file in its place in one step, and returns its size."""
        unfinished = path.with_name(f"{path.name}.new")
        with unfinished.open("wb") as file:
            torch.save(state, file)
            if self._faults is not None:
                self._faults.reach(Place.IN_SNAPSHOT)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        unfinished.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return size

    def _make_folder(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)

    def _make_anew(self) -> None:
        """Makes the folder again that somebody has removed, with all that belongs in it."""
        log.warning("%s is gone, or files in it: making it anew", self._folder)
        self._make_folder()
        text = self.trace(0, self._shown)
        os.close(self._trace)
        self._trace = os.open(self._folder / "trace.jsonl", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(self._trace, text)
        self._take_snapshot()

    @contextlib.contextmanager
    def _mute(self) -> Iterator[None]:
        self._muted = True
        yield
        self._muted = False


_NUMBERS = ("worker", "incarnation", "sequence", "version", "ticket", "samples", "loss")


def _snapshots(folder: Path) -> list[tuple[int, Path]]:
    found = [(path.stem.removeprefix("snapshot-"), path) for path in folder.glob("snapshot-*.pt")]
    return [(int(number), path) for number, path in found if number.isdecimal()]
