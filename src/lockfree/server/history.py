"""What became of each push of a run, as plain numbers."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lockfree.trace import Line


@dataclass(frozen=True, slots=True)
class Entry:
    """One push that the server took.

    Attributes:
        update: The version that it is part of; of one that the correction left out, the version that stayed.
        worker: Who pushed.
        ticket: Number of the batch.
        applied: Whether it is part of an update; else the correction has left it out.
        delay: Updates between the weights that it was taken at and those that it changed.
        loss: Mean loss of the batch, at the weights that were pulled.
        gap: Distance between these weights, where it was measured.
        ratio: Size of the repair relative to the gradient, where it was measured.
        time: When it came, in seconds since the start, of the simulation or of the wall.
    """

    update: int
    worker: int
    ticket: int
    applied: bool
    delay: int
    loss: float
    gap: float | None
    ratio: float | None
    time: float


def entry_of(line: Line) -> Entry | None:
    """Returns the entry of a line of the trace, if it is of a push that was taken."""
    if line["kind"] != "push" or line["outcome"] not in ("applied", "dropped"):
        return None
    return Entry(
        update=line["version"],
        worker=line["worker"],
        ticket=line["ticket"],
        applied=line["outcome"] == "applied",
        delay=line["delay"],
        loss=line["loss"],
        gap=line.get("gap"),
        ratio=line.get("ratio"),
        time=line["time"],
    )


def delays(history: Iterable[Entry]) -> dict[int, int]:
    """Counts how many pushes had which delay, smallest delay first.

    Example:
        >>> one = Entry(update=1, worker=0, ticket=0, applied=True, delay=2, loss=0.1, gap=None, ratio=None, time=1.0)
        >>> delays([one, one])
        {2: 2}
    """
    return dict(sorted(Counter(entry.delay for entry in history).items()))
