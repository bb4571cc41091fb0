"""A run on disk: what was asked for, what was measured, what to go on from, and what came out."""

import importlib.metadata
import json
import logging
import math
import numbers
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lockfree import checkpoint

_logger = logging.getLogger(__name__)
_CONFIG, _METRICS, _RESULT, _TRACE = "config.json", "metrics.jsonl", "result.json", "trace.jsonl"
# A checkpoint's folder, or one of the two beside it that a killed writer leaves.
_CHECKPOINT = re.compile(r"(?P<step>\d{8,})|\.(?P<aside>\d{8,})\.(?:new|old)")
_FLOAT = "$float"


def version() -> str:
    """The version of this package.

    Returns:
        The installed version, or the source's where the package runs without being installed.
    """
    try:
        return importlib.metadata.version("lockfree")
    except importlib.metadata.PackageNotFoundError:
        return "0.1.0"


@dataclass(frozen=True)
class Run:
    """A folder that holds one run: `config.json`, `metrics.jsonl`, `checkpoints/`, `result.json` and `report.html`.

    Make one with `Run.create` or `Run.open`. Every file in it is whole at every moment: a run that is killed, or whose
    machine loses power, loses the last line of its metrics at most.

    Attributes:
        folder: Where the run lies.
        config: What `create` was given, with the package's version as `lockfree` and the time as `started`.

    Example:
        >>> import tempfile
        >>> run = Run.create(Path(tempfile.mkdtemp()) / "a", {"rule": "dni", "seed": 0})
        >>> run.log("step", step=1, loss=2.5)
        >>> path = run.save_checkpoint(1, {"weights": [0.5]})
        >>> run.finish({"test_loss": 2.25})
        >>> again = Run.open(run.folder)
        >>> again.metrics("step"), again.load_checkpoint(), again.result
        ([{'kind': 'step', 'step': 1, 'loss': 2.5}], (1, {'weights': [0.5]}), {'test_loss': 2.25})
    """

    folder: Path
    config: dict[str, Any]

    @classmethod
    def create(cls, folder: str | os.PathLike[str], config: Mapping[str, Any]) -> "Run":
        """Begins a run in a folder of its own.

        Args:
            folder: A folder that is empty or not there yet.
            config: All that is needed to do the run again, as JSON values; `lockfree` and `started` are filled in.

        Returns:
            The run.

        Raises:
            ValueError: If the folder holds a run or anything else; nothing in it is touched then.
        """
        folder = Path(folder)
        cls.refuse_taken(folder)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        content = _dumps({**config, "lockfree": version(), "started": started}, indent=2)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(folder / _CONFIG, content + "\n")
        return cls(folder, _loads(content))

    @staticmethod
    def refuse_taken(folder: Path) -> None:
        """Refuses a folder in which `create` could not begin a run.

        Raises:
            ValueError: If the folder holds a run or anything else.
        """
        if (folder / _CONFIG).exists():
            raise ValueError(f"{folder} holds another run ({_describe(folder)}): choose another --out, or go on with --resume")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is not an empty folder and holds no run: choose another --out, or empty it")

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Run":
        """Opens a run that `create` began.

        Args:
            folder: The run's folder.

        Returns:
            The run.

        Raises:
            ValueError: If no run is there, or its `config.json` is not a JSON object.
        """
        folder = Path(folder)
        if not (folder / _CONFIG).is_file():
            raise ValueError(f"{folder} holds no run (it has no {_CONFIG}): give the folder that --out named")
        return cls(folder, _read_object(folder / _CONFIG))

    def log(self, kind: str, **values: Any) -> None:
        """Appends one line to `metrics.jsonl`: strict JSON, in which inf and nan stand as {"$float": "inf"}.

        Args:
            kind: What the line is about, such as "step" or "epoch".
            **values: JSON values by name; numpy scalars are turned into numbers. `step` is what `rewind` goes by.

        Raises:
            TypeError: If a value is none that JSON knows.

        Example:
            >>> import tempfile
            >>> run = Run.create(tempfile.mkdtemp(), {})
            >>> run.log("epoch", epoch=1, val_loss=float("inf"))
            >>> run.metrics()
            [{'kind': 'epoch', 'epoch': 1, 'val_loss': inf}]
        """
        line = _dumps({"kind": kind, **values}) + "\n"
        with open(self.folder / _METRICS, "ab+") as file:
            _cut_torn_line(file)
            file.write(line.encode())

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Reads the logged lines.

        Args:
            kind: Which lines; all of them if None.

        Returns:
            The lines in the order in which they were logged. A last line that was not written to its end is left out.

        Raises:
            ValueError: If another line is not JSON.
        """
        path = self.folder / _METRICS
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        *whole, _ = text.split("\n")
        records = []
        for number, line in enumerate(whole, start=1):
            try:
                records.append(_loads(line))
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is not JSON ({error}): delete that line") from None
        return [record for record in records if kind in (None, record.get("kind"))]

    def rewind(self, step: int) -> None:
        """Drops the lines that were logged after a step, so that a resumed run does not log them twice.

        Args:
            step: The last step that stays. Lines without a step stay too.

        Example:
            >>> import tempfile
            >>> run = Run.create(tempfile.mkdtemp(), {})
            >>> run.log("step", step=1); run.log("step", step=2); run.rewind(1)
            >>> run.metrics()
            [{'kind': 'step', 'step': 1}]
        """
        kept = [record for record in self.metrics() if record.get("step", step) <= step]
        checkpoint.write_atomically(self.folder / _METRICS, "".join(_dumps(record) + "\n" for record in kept))

    def append_trace(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Writes what the processes of a run did to the end of `trace.jsonl`.

        Args:
            lines: As `Learner.trace` returns them.
        """
        if lines:
            with open(self.folder / _TRACE, "a") as file:
                file.write("".join(_dumps(line) + "\n" for line in lines))

    def cut_trace(self, keep: int) -> None:
        """Drops the end of `trace.jsonl`: steps that a resumed run takes again.

        Args:
            keep: How many lines stay, 0 or more.
        """
        path = self.folder / _TRACE
        if path.exists():
            known = path.read_text().split("\n")[:keep]
            checkpoint.write_atomically(path, "".join(line + "\n" for line in known))

    def save_checkpoint(self, step: int, state: Mapping[Any, Any], *, keep: int = 2) -> Path:
        """Writes a checkpoint, and deletes those that it makes needless only when it is whole.

        Checkpoints of later steps go too: a run that saves step 5 after step 9 was resumed from before both.

        Args:
            step: The number of steps behind the state, at least 0.
            state: What `lockfree.checkpoint.save` takes.
            keep: How many of the newest to keep, at least 1.

        Returns:
            The checkpoint's folder.

        Raises:
            TypeError: If the state holds what a checkpoint cannot; the message names the place.
            ValueError: If `step` or `keep` is out of range.
        """
        if step < 0 or keep < 1:
            raise ValueError(f"got step={step} and keep={keep}: a step is at least 0, and at least 1 checkpoint is kept")
        path = self._checkpoint(step)
        checkpoint.save(path, state)
        kept = [known for known in self._steps() if known <= step][:keep]
        for known in kept:
            checkpoint.tidy(self._checkpoint(known))
        for entry in path.parent.iterdir():
            if _CHECKPOINT.fullmatch(entry.name) and entry not in map(self._checkpoint, kept):
                shutil.rmtree(entry)
        return path

    def load_checkpoint(self) -> tuple[int, dict[Any, Any]] | None:
        """Reads the newest whole checkpoint; a warning is logged for every newer one that is corrupt.

        Returns:
            Its step and its state, or None if the run has written no checkpoint.

        Raises:
            CorruptCheckpoint: If there are checkpoints and none is whole.
        """
        steps = self._steps()
        for step in steps:
            try:
                return step, checkpoint.load(self._checkpoint(step))
            except checkpoint.CorruptCheckpoint as error:
                _logger.warning("skipped the checkpoint of step %d: %s", step, error)
        if steps:
            raise checkpoint.CorruptCheckpoint(
                f"{self.folder}: all checkpoints are corrupt (steps {', '.join(map(str, steps))}): start the run anew"
            )
        return None

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints, oldest first."""
        return self._steps()[::-1]

    def checkpoint_at(self, step: int) -> dict[Any, Any]:
        """Reads the checkpoint of one step.

        Args:
            step: One of `steps`.

        Raises:
            CorruptCheckpoint: If it is not whole.
        """
        return checkpoint.load(self._checkpoint(step))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes what the run came to.

        Args:
            result: JSON values by name, such as `test_accuracy` and `seconds`.
        """
        checkpoint.write_atomically(self.folder / _RESULT, _dumps(result, indent=2) + "\n")

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run came to, or None while it has not finished."""
        path = self.folder / _RESULT
        return _read_object(path) if path.exists() else None

    def _checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"{step:08d}"

    def _steps(self) -> list[int]:
        """The steps of all checkpoints, newest first; one whose replacement was cut short counts."""
        folder = self.folder / "checkpoints"
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        found = [_CHECKPOINT.fullmatch(name) for name in names if not name.endswith(".new")]
        return sorted({int(match["step"] or match["aside"]) for match in found if match}, reverse=True)


def _describe(folder: Path) -> str:
    try:
        config = Run.open(folder).config
    except ValueError:
        return f"its {_CONFIG} cannot be read"
    return ", ".join(f"{key} {config[key]}" for key in ("rule", "task", "data", "seed", "started") if key in config)


def _cut_torn_line(file: Any) -> None:
    """Removes the fragment that a writer left that was killed within a line, lest the next line grow onto it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if file.read(1) not in (b"", b"\n"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(_strict(value), indent=indent, allow_nan=False)


def _loads(text: str) -> Any:
    return json.loads(text, object_hook=lambda found: float(found[_FLOAT]) if found.keys() == {_FLOAT} else found)


def _strict(value: Any) -> Any:
    """Spells a tree in strict JSON, which has no word for inf and nan."""
    match value:
        case None | bool() | str():
            return value
        case Mapping():
            return {str(key): _strict(item) for key, item in value.items()}
        case list() | tuple():
            return [_strict(item) for item in value]
        case os.PathLike():
            return os.fspath(value)
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            return float(value) if math.isfinite(value) else {_FLOAT: str(float(value))}
    raise TypeError(
        f"cannot write {value!r} of type {type(value).__qualname__} as JSON: "
        "give numbers, text, None, lists and dicts (a tensor's number is .item(), a set's list is sorted(...))"
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = _loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it, or start the run anew") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: restore it, or start the run anew")
    return found
