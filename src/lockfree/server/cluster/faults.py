"""Processes that die where it hurts, for tests."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Place(Enum):
    """Where a process dies."""

    BEFORE_PULL = "worker before pull"
    AFTER_PULL = "worker after pull"
    BEFORE_PUSH = "worker before push"
    AFTER_PUSH = "worker after push is sent, before the answer"
    BEFORE_APPLYING = "server before applying"
    AFTER_APPLYING = "server after applying, before logging"
    AFTER_LOGGING = "server after logging, before acknowledging"
    IN_SNAPSHOT = "server while writing a snapshot"


WORKER = (Place.BEFORE_PULL, Place.AFTER_PULL, Place.BEFORE_PUSH, Place.AFTER_PUSH)
"""The places of a worker."""

SERVER = (Place.BEFORE_APPLYING, Place.AFTER_APPLYING, Place.AFTER_LOGGING, Place.IN_SNAPSHOT)
"""The places of a server."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One death.

    Attributes:
        place: Where.
        passage: The process dies when it comes there for the so many-th time in its life, 1 or more.
    """

    place: Place
    passage: int


class Faults:
    """The deaths that a process and its successors have before them, one each.

    It leaves a file for each death, from which the next life knows that it has been suffered.

    Args:
        folder: Of this process and its successors alone.
        kills: In order.
    """

    def __init__(self, folder: Path, kills: Sequence[Kill] = ()) -> None:
        self._folder, self._kills = folder, kills
        self._passages: Counter[Place] = Counter()
        self._life: int | None = None

    @property
    def suffered(self) -> int:
        """How often the process has died."""
        return len(list(self._folder.glob("*.death")))

    def reach(self, place: Place, wait: float = 0.0) -> None:
        """Dies, if it is time, after some seconds."""
        if self._life is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._life = self.suffered
        self._passages[place] += 1
        if self._life < len(self._kills) and self._kills[self._life] == Kill(place, self._passages[place]):
            (self._folder / f"{self._life}.death").touch()
            time.sleep(wait)
            self.die()

    def die(self) -> None:
        """Ends the process as nothing can prevent."""
        os.kill(os.getpid(), signal.SIGKILL)

    def note(self, text: str) -> None:
        """Takes a line down that outlives the process."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "notes.txt").open("a") as file:
            file.write(text + "\n")

    @property
    def notes(self) -> list[str]:
        """Returns what all lives have taken down."""
        file = self._folder / "notes.txt"
        return file.read_text().splitlines() if file.is_file() else []


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Who dies where.

    Attributes:
        folder: Where deaths are taken down.
        workers: The deaths of each worker.
        server: Those of the server.
    """

    folder: Path
    workers: Sequence[Sequence[Kill]] = ()
    server: Sequence[Kill] = ()

    @classmethod
    def at_random(cls, folder: Path, *, seed: int, workers: int, worker_kills: int, server_kills: int) -> "Schedule":
        """Draws deaths: every worker has its share of them, at any place, within its first batches or somewhat later.

        Args:
            folder: Where deaths are taken down.
            seed: Decides about it.
            workers: How many there are.
            worker_kills: Deaths of workers altogether.
            server_kills: Deaths of the server.
        """
        draw = random.Random(seed)
        shares: list[list[Kill]] = [[] for _ in range(workers)]
        for number in range(worker_kills):
            shares[number % workers].append(Kill(draw.choice(WORKER), draw.randint(1, 8)))
        server = [Kill(draw.choice(SERVER), draw.randint(1, 20)) for _ in range(server_kills)]
        server = [Kill(kill.place, 1) if kill.place is Place.IN_SNAPSHOT else kill for kill in server]
        return cls(folder=folder, workers=shares, server=server)

    def of_worker(self, number: int) -> Faults:
        """Returns the deaths of a worker."""
        return Faults(self.folder / f"worker-{number}", self.workers[number] if number < len(self.workers) else ())

    def of_server(self) -> Faults:
        """Returns the deaths of the server."""
        return Faults(self.folder / "server", self.server)
