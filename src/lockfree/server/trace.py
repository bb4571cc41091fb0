"""What a server did, line by line.

A trace is a list of plain lines, one JSON object each:

- ``header``: what was trained, and how;
- ``join``: a worker came, or came again, at which clock; ``evict``: it was taken out;
- ``pull``: a worker was given a version of the weights and a ticket;
- ``push``: a gradient came: of which pull, and its ``outcome``: ``applied`` (to become part of which version, how late), ``dropped`` by
  the correction, ``duplicate``, ``refused`` or ``not finite``;
- ``fallback``: the correction was given up;
- ``weights``: a fingerprint of all weights and buffers after so many updates;
- ``snapshot``, ``restore``: the server's state was copied, or put back to what it was at that snapshot.

Every line has a ``time``. `lockfree.server.replay` repeats what the lines say in one process.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lockfree import trace
from lockfree.server.history import Entry, entry_of
from lockfree.trace import Line

log = logging.getLogger(__name__)

KINDS = ("header", "join", "evict", "pull", "push", "fallback", "weights", "snapshot", "restore")
"""The kinds of lines in the trace of a server."""


class Recorder:
    """Takes down the lines of a run, in memory and perhaps in a file.

    Args:
        path: The file, or a folder in which it is called ``trace.jsonl``; folders that are missing are made.
        progress: Is told of each push that was taken.
        resume: Whether to go on with what the file holds.

    Attributes:
        lines: The lines so far.
        history: The pushes so far that were taken.
        clock: Returns the time, in seconds; an engine sets it.

    Example:
        >>> recorder = Recorder()
        >>> recorder.note({"kind": "join", "worker": 0})
        >>> recorder.lines
        [{'kind': 'join', 'worker': 0, 'time': 0.0}]
    """

    def __init__(
        self, path: str | Path | None = None, *, progress: Callable[[Entry], None] | None = None, resume: bool = False
    ) -> None:
        self.lines: list[Line] = []
        self.history: list[Entry] = []
        self.clock: Callable[[], float] = lambda: 0.0
        self._progress = progress
        self._path: Path | None = None
        self._file: Any = None
        if path is not None:
            path = Path(path)
            self._path = path if path.suffix == ".jsonl" else path / "trace.jsonl"
            if resume:
                self.lines = read(self._path)
                self.history = [entry for entry in map(entry_of, self.lines) if entry is not None]
            self._write_all(self._path)

    def note(self, line: Line) -> None:
        """Takes down a line. One that comes from elsewhere has a ``time`` already."""
        if "time" not in line:
            line = {**line, "time": round(self.clock(), 9)}
        self.lines.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            if line["kind"] != "pull":  # a push that is seen elsewhere is in the file
                self._file.flush()
        entry = entry_of(line)
        if entry is not None:
            self.history.append(entry)
            if self._progress is not None:
                self._progress(entry)

    def keep(self) -> None:
        """Writes the file anew if somebody has taken it away."""
        if self._path is not None and not self._path.is_file():
            log.warning("the trace %s is not there any more: it is written anew", self._path)
            self.close()
            self._write_all(self._path)

    def _write_all(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        self._file.writelines(json.dumps(line) + "\n" for line in self.lines)
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def read(path: str | Path) -> list[Line]:
    """Reads a trace; a last line that was not written to its end is left out.

    Args:
        path: The file, or the folder of the run.

    Raises:
        ValueError: If there is none, or a line is not of a server's trace.
    """
    return trace.read(path, KINDS)
