"""How long values that are not finite are put up with."""

from typing import Any

from lockfree.objective import Diverged
from lockfree.server.messages import NotFinite


class Patience:
    """Counts refusals of values that are not finite: in a row, where the weights are spoilt, and by batch, where the data are.

    Args:
        limit: How many there may be before training ends, 1 or more.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0
        self._of_batch: dict[int, int] = {}

    def renew(self, ticket: int) -> None:
        """Forgets what was, as a gradient of a batch was good."""
        self._in_a_row = 0
        self._of_batch.pop(ticket, None)

    def bear(self, ticket: int, version: int, refusal: NotFinite) -> None:
        """Counts a refusal.

        Args:
            ticket: Number of the batch.
            version: Number of updates so far.
            refusal: What was said.

        Raises:
            Diverged: If that was one too many.
        """
        self._in_a_row += 1
        times = self._of_batch[ticket] = self._of_batch.get(ticket, 0) + 1
        if max(times, self._in_a_row) < self._limit:
            return
        often = f"{times} times for batch {ticket}" if times >= self._in_a_row else f"{self._in_a_row} times in a row"
        raise Diverged(
            f"training broke after {version} updates: {refusal}, {often}; look for bad values in the data, lower the learning rate, "
            "or go on from the last checkpoint"
        ) from refusal

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts."""
        return {"in_a_row": self._in_a_row, "of_batch": dict(self._of_batch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self._in_a_row, self._of_batch = state["in_a_row"], dict(state["of_batch"])
