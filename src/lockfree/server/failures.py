"""What goes wrong in a simulation, and when."""

from dataclasses import dataclass
from enum import Enum
from numbers import Real


class Point(Enum):
    """Where in its exchange with the server a worker fails."""

    BEFORE_PULL = "before pull"
    AFTER_PULL = "after pull"
    BEFORE_PUSH = "before push"
    AFTER_PUSH = "after push"
    """The server has taken the push, the worker dies without having heard, and its old self pushes once more when the new one is back."""
    ANSWER_LOST = "answer lost"
    """The server has taken the push, the worker lives on without having heard of it, and pushes once more."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A worker fails, once.

    Attributes:
        worker: Its number, 0 or more.
        batch: At which of its batches, counted from 1; one that it begins anew counts again.
        point: Where, as a `Point` or in its words.
        down: After how many seconds it is back, 0 or more; ``None``: never.
        noticed: Whether the server is told at once, and takes it out. Else others wait for it until it is back.

    Raises:
        ValueError: If a number is out of range, or there is no such point.

    Example:
        >>> Failure(worker=1, batch=3, point="after pull").point
        <Point.AFTER_PULL: 'after pull'>
    """

    worker: int
    batch: int
    point: Point | str
    down: float | int | None = 1.0
    noticed: bool = True

    def __post_init__(self) -> None:
        for name, least in (("worker", 0), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Failure: {name}={value!r}, give a whole number, {least} or more")
        if self.down is not None and (isinstance(self.down, bool) or not isinstance(self.down, Real) or not self.down >= 0):
            raise ValueError(f"Failure: down={self.down!r}, give seconds, 0 or more, or None")
        try:
            object.__setattr__(self, "point", Point(self.point))
        except ValueError:
            choices = ", ".join(repr(point.value) for point in Point)
            raise ValueError(f"Failure: point={self.point!r}, choose from {choices}") from None
        if self.down is None and self.point is Point.ANSWER_LOST:
            raise ValueError(
                "Failure: a worker whose answer is lost lives on, give seconds after which it pushes again as `down`"
            )


@dataclass(frozen=True, kw_only=True)
class ServerFailure:
    """The server dies, and a new one goes on from a snapshot. If updates are lost, all workers start anew.

    Attributes:
        update: After which update it dies, 0 or more.
        snapshot: After which update the snapshot was taken, from 0 to ``update``; ``None``: right before.

    Raises:
        ValueError: If a number is out of range.
    """

    update: int
    snapshot: int | None = None

    def __post_init__(self) -> None:
        for name in ("update", "snapshot"):
            value = getattr(self, name)
            if name == "snapshot" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"ServerFailure: {name}={value!r}, give a number of updates, 0 or more")
        if self.snapshot is not None and self.snapshot > self.update:
            raise ValueError(f"ServerFailure: the snapshot after update {self.snapshot} is later than update {self.update}")
