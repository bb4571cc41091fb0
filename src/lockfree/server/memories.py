"""What a correction remembers: of all workers together, or of each by itself."""

import copy
from typing import Any


class Memories:
    """The memories of a correction.

    Args:
        first: The memory before the first gradient.
        apart: Whether each worker has one of its own. It costs as many times as much.

    Example:
        >>> memories = Memories({"count": 0}, apart=True)
        >>> memories.of(0)["count"] = 5
        >>> memories.of(1)
        {'count': 0}
    """

    def __init__(self, first: dict[str, Any], *, apart: bool) -> None:
        self._first, self._apart = first, apart
        self._each: dict[int, dict[str, Any]] = {}

    def of(self, worker: int) -> dict[str, Any]:
        """Returns the memory that a worker's gradients go to, to be changed in place."""
        if not self._apart:
            return self._first
        if worker not in self._each:
            self._each[worker] = copy.deepcopy(self._first)
        return self._each[worker]

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of all of them."""
        return copy.deepcopy({"apart": self._apart, "first": self._first, "each": self._each})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned.

        Raises:
            ValueError: If workers had memories of their own there and have none here, or the other way round.
        """
        if state["apart"] != self._apart:
            raise ValueError("the snapshot is of another memory_per_worker: make the server with the same arguments")
        self._first, self._each = copy.deepcopy(state["first"]), copy.deepcopy(state["each"])
