"""What the processes of a run did, tick by tick, and whether one process comes to the same weights.

A trace is a list of plain lines, written as ``trace.jsonl`` into the run folder:

- ``header``: how many processes there are, and which cells each of them has; another one stands where a run was resumed;
- ``order``: a list of actions in the order in which a process did them, batches counted from the tick (``3F-2``: cell 3 ran forward
  on the batch that had entered two ticks before); written once, and referred to by number;
- ``tick``: what a process did in a tick, when it began, how long it took, and how much of that it waited for others;
- ``weights``: a fingerprint of each cell after so many steps.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lockfree.cell import Cell
from lockfree.schedule import Action, Kind, Tick
from lockfree.values import Values

if TYPE_CHECKING:
    from lockfree.learner import Learner

_ACTION = re.compile(r"(?P<cell>\d+)(?P<kind>[FLMAI])(?P<batch>-?\d+)")

Line = dict[str, Any]
"""One line: ``kind``, and what belongs to it."""


class Recorder:
    """Takes down what a process does.

    Args:
        process: Its number.
    """

    def __init__(self, process: int) -> None:
        self._process = process
        self._orders: dict[tuple[str, ...], int] = {}
        self._lines: list[Line] = []

    def note(self, tick: Tick, actions: Sequence[Action], *, began: float, seconds: float, waited: float) -> None:
        """Takes down a tick.

        Args:
            tick: The tick.
            actions: What this process did in it.
            began: Seconds since the process joined the others.
            seconds: How long it took.
            waited: How many of them the process waited.
        """
        relative = tuple(str(action._replace(batch=action.batch - tick.number)) for action in actions)
        if relative not in self._orders:
            self._orders[relative] = len(self._orders)
            self._add("order", order=self._orders[relative], actions=list(relative))
        numbers = {"tick": tick.number, "first": tick.first, "last": tick.last, "order": self._orders[relative]}
        self._add("tick", **numbers, began=round(began, 6), seconds=round(seconds, 6), waited=round(waited, 6))

    def _add(self, kind: str, **values: Any) -> None:
        self._lines.append({"kind": kind, "process": self._process, **values})

    def take(self) -> list[Line]:
        """Returns the lines since the last time."""
        taken, self._lines = self._lines, []
        return taken


def fingerprints(cells: Iterable[Cell]) -> dict[str, str]:
    """Returns for each cell the SHA-256 of its weights and buffers, those of auxiliary networks included.

    Example:
        >>> fingerprints([])
        {}
    """
    return {str(cell.place.index): _fingerprint(cell) for cell in cells}


def _fingerprint(cell: Cell) -> str:
    networks = [network for network in (cell.block, cell.auxiliary, cell.inputs) if network is not None]
    return fingerprint(tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Returns the SHA-256 of the bytes of some tensors.

    Example:
        >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(1), torch.zeros(1)])
        True
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


KINDS = ("header", "order", "tick", "weights")
"""The kinds of lines in the trace of processes that each have some of the blocks."""


def read(path: str | Path, kinds: Sequence[str] = KINDS) -> list[Line]:
    """Reads a trace; a last line that was not written to its end is left out.

    Args:
        path: A run folder, or the ``trace.jsonl`` in it.
        kinds: The kinds of lines that there may be.

    Raises:
        ValueError: If there is none, or a line is not of a trace.
    """
    path = Path(path)
    file = path / "trace.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} holds no trace: give the folder of a run with several processes, or its trace.jsonl")
    *whole, _ = file.read_text().split("\n")
    lines: list[Line] = []
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or line.get("kind") not in kinds:
            raise ValueError(f"{file}: line {number} is not of a trace: delete it and what follows")
        lines.append(line)
    if not lines or lines[0]["kind"] != "header":
        raise ValueError(f"{file} does not begin with a header: it is not a whole trace")
    return lines


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What came of a replay.

    Attributes:
        steps: Steps taken.
        processes: Processes of the run.
        compared: Steps after which weights were compared.
        differing: The cells whose weights differed first, and after how many steps; empty if none ever did. A model that is not cut is
            cell 0.
    """

    steps: int
    processes: int
    compared: tuple[int, ...]
    differing: Mapping[int, int]

    @property
    def identical(self) -> bool:
        """Whether all weights were the same, bit for bit, wherever they were compared."""
        return bool(self.compared) and not self.differing


def replay(lines: Sequence[Line], learner: "Learner", batches: Iterable[tuple[Values, Any]]) -> Replayed:
    """Repeats a run in one process and compares weights.

    Args:
        lines: The trace, as `read` returns it or `Learner.trace` has told it from the first step on.
        learner: As it was at the start of the run, but of one process (``executor="sequential"``). PyTorch must use as many threads
            as each process of the run did, since the order of a sum may depend on it.
        batches: The batches of the run, in order.

    Returns:
        Whether and where weights differ.

    Raises:
        ValueError: If the events are not those of the learner's schedule, or there are too few batches.
    """
    starts = [number for number, line in enumerate(lines) if line["kind"] == "header"]
    segments = [lines[start:end] for start, end in itertools.pairwise([*starts, len(lines)])]
    cells = lines[0]["groups"][-1][-1]
    if cells != len(learner.cells):
        raise ValueError(f"the trace is of {cells} cells, the learner has {len(learner.cells)}: replay the same model and cut")
    feed, compared = iter(batches), []
    differing: dict[int, int] = {}
    for event in itertools.chain.from_iterable(map(_events, segments)):
        if event[0]["kind"] == "weights":
            step = event[0]["step"]
            told = {cell: print_ for line in event for cell, print_ in line["cells"].items()}
            mine = fingerprints(learner.cells)
            compared.append(step)
            for cell in mine:
                if mine[cell] != told.get(cell):
                    differing.setdefault(int(cell), step)
            continue
        _check(event, learner)
        if event[0]["last"] == event[0]["tick"]:
            try:
                x, y = next(feed)
            except StopIteration:
                raise ValueError(
                    f"the trace has more than the {learner.steps} batches given: replay with the run's data"
                ) from None
            learner.step(x, y)
        else:
            learner.drain()  # all of it at once; what follows of it in the trace changes nothing
    return Replayed(steps=learner.steps, processes=lines[0]["processes"], compared=tuple(compared), differing=differing)


def _events(lines: Sequence[Line]) -> Iterator[list[Line]]:
    """Yields what the processes did in each tick, and what they told of their weights, a line of each process."""
    processes = lines[0]["processes"]
    orders = {(line["process"], line["order"]): line["actions"] for line in lines if line["kind"] == "order"}
    each: list[list[Line]] = [[] for _ in range(processes)]
    for line in lines:
        if line["kind"] in ("tick", "weights"):
            more = {"actions": orders[line["process"], line["order"]]} if line["kind"] == "tick" else {}
            each[line["process"]].append(line | more)
    for event in zip(*each, strict=False):
        if len({(line["kind"], line.get("tick"), line.get("last"), line.get("step")) for line in event}) > 1:
            raise ValueError("the processes of this trace did not take the same steps: it is not of one run")
        yield list(event)


def _check(event: Sequence[Line], learner: "Learner") -> None:
    """Refuses events that the schedule does not hold, or holds in another order."""
    tick, first, last = (event[0][name] for name in ("tick", "first", "last"))
    listed = [str(action) for action in learner.schedule_at(last).tick(tick, first, last)]
    done = [[_absolute(text, tick) for text in line["actions"]] for line in event]
    for actions in done:
        left = iter(listed)
        if not all(action in left for action in actions):
            raise ValueError(
                f"tick {tick} of the trace is not of this schedule: replay with the rule, schedule and links of the run"
            )
    if sum(map(len, done)) != len(listed):
        raise ValueError(f"tick {tick} of the trace lacks actions of the schedule: it is not whole")


def _absolute(text: str, tick: int) -> str:
    """Returns an action with its batch counted from the start."""
    found = _ACTION.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no action: write as in 2F-1")
    return str(Action(int(found["cell"]), Kind(found["kind"]), int(found["batch"]) + tick))
