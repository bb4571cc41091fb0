"""The channel between two neighbouring cells."""

from collections.abc import Sequence
from typing import Any

from lockfree.staleness import Correction
from lockfree.values import Credit, Values, carrying, detach, mark


class Link:
    """Carries activations up and messages down between cell i and cell i+1, and owns the delay of the messages.

    A message sent for batch t in tick k is learnt from in tick k + ``delay``. Delay is a property of the channel, never of a
    rule: the schedule reads it here, and the link keeps what is on its way.

    Where messages are late, the weights of the block below have moved on since it ran forward. By default they are kept, and its
    gradient is exactly the one at the weights of its forward pass.

    Args:
        delay: Ticks (under ``lockstep``: batches) that a message takes, 0 or more.
        stash: Whether the weights of batches in flight are kept. If not, a gradient is taken with the activations of the forward
            pass and the weights that are there when the message comes (Huo et al. 2018): a copy of the weights less for each batch
            in flight, for a gradient that is not quite one.
        correction: Repairs the late gradient of the block below, before it is stepped.

    Raises:
        ValueError: If the delay is negative or not a whole number, or the correction looks ahead.
        TypeError: If the correction is none.

    Example:
        >>> link = Link(delay=1)
        >>> link.send(7, (None,))
        >>> link.receive(7)
        (None,)

    Reference:
        Huo, Gu, Yang, Huang 2018, "Decoupled parallel backpropagation with convergence guarantee", arXiv 1804.10574 (late gradients);
        Narayanan et al. 2019, "PipeDream", SOSP (keeping the weights).
    """

    def __init__(self, *, delay: int = 0, stash: bool = True, correction: Correction | None = None) -> None:
        if delay != int(delay) or delay < 0:
            raise ValueError(f"a link's delay is a whole number of ticks, 0 or more, got {delay!r}")
        if correction is not None and not isinstance(correction, Correction):
            raise TypeError(f"correction must be one of lockfree.staleness, such as DelayCompensation(), got {correction!r}")
        if correction is not None and correction.looks_ahead:
            raise ValueError(
                f"{correction} works where weights are handed out, on a parameter server: give a link another correction"
            )
        self.delay, self.stash, self.correction = int(delay), bool(stash), correction
        self._up: dict[int, Values] = {}
        self._down: dict[int, Credit | None] = {}

    def __repr__(self) -> str:
        more = ("" if self.stash else ", stash=False") + ("" if self.correction is None else f", correction={self.correction}")
        return f"Link(delay={self.delay}{more})"

    def copy(self) -> "Link":
        """Returns a link of the same kind with nothing on its way."""
        return Link(delay=self.delay, stash=self.stash, correction=self.correction)

    def lift(self, batch: int, values: Values) -> None:
        """Hands the activations of a batch up."""
        self._up[batch] = values

    def take(self, batch: int) -> Values:
        """Takes the activations of a batch from below, once."""
        return self._up.pop(batch)

    def peek(self, batch: int) -> Values | None:
        """Returns the activations of a batch that wait to be taken; ``None`` if there are none."""
        return self._up.get(batch)

    def send(self, batch: int, message: Credit | None) -> None:
        """Sends the message of a batch down."""
        self._down[batch] = message

    def receive(self, batch: int) -> Credit | None:
        """Takes the message of a batch from above, once; ``None`` means that the cell above had no credit itself."""
        return self._down.pop(batch)

    def forget(self, batch: int) -> None:
        """Forgets what nobody took of a batch: a neighbour that rested, say, had no use for it."""
        self._up.pop(batch, None)
        self._down.pop(batch, None)

    def keep(self, *, up: bool, down: bool) -> None:
        """Forgets what is on its way in a direction whose end is elsewhere."""
        if not up:
            self._up.clear()
        if not down:
            self._down.clear()

    def clear(self) -> None:
        """Forgets everything on its way."""
        self._up.clear()
        self._down.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns what is on its way."""
        up = {batch: {"values": detach(values), "carrying": carrying(values)} for batch, values in self._up.items()}
        return {"up": up, "down": dict(self._down)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what was on its way."""
        self._up = {batch: mark(one["values"], one["carrying"]) for batch, one in state["up"].items()}
        self._down = dict(state["down"])


def links_between(cells: int, given: Link | Sequence[Link] | None) -> list[Link]:
    """Returns the ``cells - 1`` links of a chain: direct ones, copies of one, or the user's own.

    Raises:
        ValueError: If a list of another length is given.
    """
    if given is None:
        return [Link() for _ in range(cells - 1)]
    if isinstance(given, Link):
        return [given.copy() for _ in range(cells - 1)]
    if len(given) != cells - 1:
        raise ValueError(
            f"{cells} blocks have {cells - 1} links between them, got {len(given)}: pass one Link for all or a list"
        )
    return list(given)
