"""Who is at work, and at which clock."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from lockfree.server.messages import Answer, Applied, Dropped, Gone


@dataclass(slots=True)
class Member:
    """What the server knows of a worker.

    Attributes:
        incarnation: How often it has joined.
        clock: How many of its gradients count.
        live: Whether it is at work.
        sequence: Number of its last pull in this incarnation, 0 before the first.
        version: The version that it pulled and has not yet pushed for.
        ticket: The batch that it works on; behind a barrier, perhaps one that it has not fetched yet.
        answered: Number of its last pull whose push was answered, 0 if none.
        answer: That answer.
    """

    incarnation: int = 0
    clock: int = 0
    live: bool = False
    sequence: int = 0
    version: int | None = None
    ticket: int | None = None
    answered: int = 0
    answer: Answer | None = None


class Roster:
    """All workers that ever joined, and the smallest clock of those at work, found without a look at each.

    Example:
        >>> roster = Roster()
        >>> for worker in (0, 1):
        ...     _ = roster.enter(worker, clock=0)
        >>> roster.tick(0)
        >>> roster.slowest
        0
        >>> roster.leave(1)
        >>> roster.slowest
        1
    """

    def __init__(self) -> None:
        self._members: dict[int, Member] = {}
        self._clocks: Counter[int] = Counter()
        self._slowest = 0

    @property
    def slowest(self) -> int:
        """The smallest clock of the workers at work; if there are none, the last that was."""
        return self._slowest

    @property
    def live(self) -> list[int]:
        """The workers at work, in order."""
        return sorted(worker for worker, member in self._members.items() if member.live)

    @property
    def empty(self) -> bool:
        """Whether nobody is at work."""
        return not self._clocks

    def clocks(self) -> dict[int, int]:
        """Returns the clock of each worker at work."""
        return {worker: self._members[worker].clock for worker in self.live}

    def known(self, worker: int) -> Member | None:
        """Returns what is known of a worker, if anything."""
        return self._members.get(worker)

    def member(self, worker: int, incarnation: int) -> Member:
        """Returns what is known of a worker at work.

        Raises:
            Gone: If it is not at work in this incarnation.
        """
        member = self._members.get(worker)
        if member is None:
            raise Gone(f"worker {worker} is unknown: let it join first")
        if incarnation < member.incarnation:
            raise Gone(
                f"worker {worker} of incarnation {incarnation} was replaced by {member.incarnation}: let it end, or join anew"
            )
        if incarnation > member.incarnation:
            raise Gone(
                f"worker {worker} says incarnation {incarnation}, the server gave it {member.incarnation}: let it join anew"
            )
        if not member.live:
            raise Gone(f"worker {worker} was evicted: let it join anew")
        return member

    def enter(self, worker: int, clock: int) -> Member:
        """Begins a new incarnation of a worker that is not at work."""
        member = self._members.setdefault(worker, Member())
        member.incarnation += 1
        member.clock, member.live = clock, True
        member.sequence = member.answered = 0
        member.answer = None
        self._clocks[clock] += 1
        self._slowest = min(self._slowest, clock)
        self._find_slowest()
        return member

    def leave(self, worker: int) -> None:
        """Takes a worker out of the clocks."""
        member = self._members[worker]
        member.live = False
        self._less(member.clock)
        self._find_slowest()

    def tick(self, worker: int) -> None:
        """Sets the clock of a worker one forward."""
        member = self._members[worker]
        self._clocks[member.clock + 1] += 1
        self._less(member.clock)
        member.clock += 1
        self._find_slowest()

    def _less(self, clock: int) -> None:
        self._clocks[clock] -= 1
        if not self._clocks[clock]:
            del self._clocks[clock]

    def _find_slowest(self) -> None:
        if self._clocks and self._slowest not in self._clocks:
            self._slowest = min(self._clocks)  # of at most as many as there are different clocks

    def state_dict(self) -> dict[str, Any]:
        """Returns all of it as plain data."""
        members = {}
        for worker, member in self._members.items():
            answer = member.answer
            told = None if answer is None else {"applied": isinstance(answer, Applied), **asdict(answer)}
            members[worker] = {**asdict(member), "answer": told}
        return {"slowest": self._slowest, "members": members}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self._slowest, self._members = state["slowest"], {}
        for worker, fields in state["members"].items():
            plain = dict(fields)
            told = plain.pop("answer")
            member = self._members[worker] = Member(**plain)
            if told is not None:
                kind = Applied if told["applied"] else Dropped
                member.answer = kind(**{name: value for name, value in told.items() if name != "applied"})
        self._clocks = Counter(member.clock for member in self._members.values() if member.live)
