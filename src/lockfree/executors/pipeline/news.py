"""What the process with the loss tells the others: losses of batches, and the error, where they need it."""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from lockfree.executors.pipeline.wire import Channel, Parcel
from lockfree.flight import Flight
from lockfree.values import move

AT_A_TIME = 64
"""Losses that may be on their way before this process waits for the first of them."""


@dataclass(slots=True)
class Awaited:
    """The loss of a batch, which is waited for when somebody looks."""

    batch: int
    _come: Callable[[], None]
    value: float | None = None

    def item(self) -> float:
        """Returns the number."""
        while self.value is None:
            self._come()
        return self.value


class News:
    """The end of the channel from the top that is in this process.

    Args:
        channel: From the process with the loss.
        kind_of: Returns what decides how a batch is laid out.
        flights: The batches in flight here.
        device: Where they are.
    """

    def __init__(
        self, channel: Channel, kind_of: Callable[[int], Hashable], flights: dict[int, Flight], device: torch.device
    ) -> None:
        self._channel, self._kind_of, self._flights, self._device = channel, kind_of, flights, device
        self._awaited: deque[Awaited] = deque()

    def expect(self, batch: int) -> Awaited:
        """Returns the loss of a batch that reaches the top in this tick."""
        self._channel.expect(self._kind_of(batch), batch)
        awaited = Awaited(batch, self._come)
        self._awaited.append(awaited)
        while len(self._awaited) > AT_A_TIME:
            self._come()
        return awaited

    def fetch(self, batch: int) -> None:
        """Waits for the news of a batch, unless they have come."""
        while any(awaited.batch == batch for awaited in self._awaited):
            self._come()

    def catch_up(self) -> None:
        """Takes in all that has been sent."""
        while self._awaited:
            self._come()

    def _come(self) -> None:
        awaited = self._awaited.popleft()
        parcel: Parcel = self._channel.receive()
        told: dict[str, Any] = parcel.values
        awaited.value = told["loss"].item()
        flight = self._flights.get(parcel.batch)
        if flight is not None:
            flight.error, flight.scores = (move(told[name], self._device) for name in ("error", "scores"))


def of(flight: Flight, loss: float, *, error: bool, scores: bool) -> dict[str, Any]:
    """Returns what there is to tell about a batch that has reached the top."""
    told = {"loss": torch.tensor(loss, dtype=torch.float64)}
    return told | {"error": flight.error if error else None, "scores": flight.scores if scores else None}
