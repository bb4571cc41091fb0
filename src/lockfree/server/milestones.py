"""What is done after every so many updates: fingerprints into the trace, checkpoints on disk, a look at the weights."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockfree.server.core import Server

log = logging.getLogger(__name__)

Watch = Callable[[int, Sequence[Tensor], Sequence[Tensor]], None]
"""Looks at (version, weights, buffers), and changes nothing; the tensors are the server's own."""

FILE = "server.pt"
"""What a checkpoint is called in its folder."""


class Milestones:
    """Looks after each event whether the version has passed a milestone.

    A checkpoint that cannot be written is a warning, and training goes on: the next one may be.

    Args:
        fingerprints: After every so many updates a fingerprint goes into the trace, 1 or more.
        folder: Where checkpoints go; ``None``: there are none. It is made if it is not there, or no longer.
        checkpoints: After every so many updates there is a checkpoint, 1 or more.
        watch: Looks at the weights; ``None``: nobody does.
        watch_every: After every so many updates, 1 or more, at the start, and at the end.
    """

    def __init__(
        self, *, fingerprints: int, folder: Path | None, checkpoints: int, watch: Watch | None = None, watch_every: int = 100
    ) -> None:
        self._fingerprints, self._folder, self._checkpoints = fingerprints, folder, checkpoints
        self._watch, self._watch_every = watch, watch_every
        self._last: dict[str, int] = {}  # the last versions that were

    def look(self, server: Server, *, last: bool = False, engine: Callable[[], dict[str, Any]] | None = None) -> bool:
        """Does what is due at the server's present version, once.

        Args:
            server: The server.
            last: Whether training ends here, which is a milestone too.
            engine: Returns what the engine itself wants to find again: plain data and tensors.

        Returns:
            Whether a checkpoint was due.
        """
        version = server.version
        if self._due("printed", self._fingerprints, version, last):
            server.fingerprint()
        if self._watch is not None and self._due("seen", self._watch_every, version, last):
            self._watch(version, server.weights, server.buffers)
        saves = self._due("saved", self._checkpoints, version, last) or last  # what workers are about may have changed since
        if self._folder is None or not saves:
            return False
        self._save(server, self._folder, None if engine is None else engine())
        return True

    def _due(self, what: str, every: int, version: int, last: bool) -> bool:
        """Whether a multiple of so many updates has been reached, or passed unseen, since the last time."""
        before = self._last.get(what)
        due = before is None or version // every > before // every or (last and version != before)
        if due and (before is not None or version % every == 0 or last):
            self._last[what] = version
            return True
        self._last.setdefault(what, version)
        return False

    def _save(self, server: Server, folder: Path, engine: dict[str, Any] | None) -> None:
        try:
            if not folder.is_dir():
                log.warning("the folder %s for checkpoints is not there: it is made", folder)
                folder.mkdir(parents=True)
            unfinished = folder / f"{FILE}.new"
            torch.save({"server": server.snapshot(), "engine": engine}, unfinished)
            os.replace(unfinished, folder / FILE)  # so that there is always a whole one
        except (OSError, RuntimeError) as error:  # torch writes files by itself, and says RuntimeError
            log.warning("no checkpoint after %d updates, training goes on: %s", server.version, error)


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Reads the checkpoint of a folder: the server's snapshot, and what the engine wanted to find again.

    Raises:
        ValueError: If there is none.
    """
    file = folder / FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no checkpoint {FILE}: give the folder of a run that has written one, or start anew")
    found = torch.load(file, weights_only=True)
    return found["server"], found["engine"]
