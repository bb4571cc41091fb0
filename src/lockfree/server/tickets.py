"""Which samples belong to which batch, and which batch is whose."""

import heapq
from typing import Any

import torch
from torch import Tensor

from lockfree.rng import seed_of


class Tickets:
    """The batches of a run: ticket n is a minibatch, the same one whoever works on it.

    Tickets go through the data in the order of a permutation, another one each epoch; the last batch of an epoch may be smaller. With
    it, any number of workers go together through the data once an epoch, and M tickets in a row are M b samples in a row.

    Args:
        seed: What the permutations are drawn from, with the number of the epoch.
        length: How many samples there are, 1 or more.
        batch_size: b, 1 or more; ``None``: all samples.

    Raises:
        ValueError: If there are no samples, or the batch size is not a whole number, 1 or more.

    Example:
        >>> tickets = Tickets(seed=0, length=5, batch_size=2)
        >>> tickets.per_epoch, sorted(torch.cat([tickets.samples(n) for n in range(3)]).tolist())
        (3, [0, 1, 2, 3, 4])
    """

    def __init__(self, *, seed: int, length: int, batch_size: int | None) -> None:
        if length < 1:
            raise ValueError("the dataset is empty: give one with samples")
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size={batch_size!r}: give a whole number of samples, 1 or more, or None for all of them")
        self.seed, self.length = seed, length
        self.batch_size = length if batch_size is None else batch_size
        self._orders: dict[int, Tensor] = {}

    @property
    def per_epoch(self) -> int:
        """How many tickets an epoch has."""
        return -(-self.length // self.batch_size)

    def samples(self, ticket: int) -> Tensor:
        """Returns the numbers of the samples of a ticket, 0 or more.

        Args:
            ticket: Its number, 0 or more.
        """
        epoch, place = divmod(ticket, self.per_epoch)
        return self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def seed_at(self, ticket: int) -> int:
        """Returns the seed of whatever is drawn at random while a ticket is worked on."""
        return seed_of(self.seed, ticket)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            if len(self._orders) > 1:  # workers may be an epoch apart
                del self._orders[min(self._orders)]
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch) % 2**63)
            self._orders[epoch] = torch.randperm(self.length, generator=generator)
        return self._orders[epoch]


class Deck:
    """Deals tickets: first those that came back, then new ones.

    Example:
        >>> deck = Deck()
        >>> deck.deal(), deck.deal()
        (0, 1)
        >>> deck.put_back(0)
        >>> deck.deal(), deck.deal()
        (0, 2)
    """

    def __init__(self) -> None:
        self._next = 0
        self._back: list[int] = []  # a heap

    @property
    def came_back(self) -> bool:
        """Whether a ticket that was out before waits to go out again."""
        return bool(self._back)

    def deal(self) -> int:
        """Gives out a ticket."""
        if self._back:
            return heapq.heappop(self._back)
        self._next += 1
        return self._next - 1

    def put_back(self, ticket: int) -> None:
        """Takes back a ticket whose gradient never came."""
        heapq.heappush(self._back, ticket)

    def state_dict(self) -> dict[str, Any]:
        """Returns what goes out next."""
        return {"next": self._next, "back": list(self._back)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self._next, self._back = state["next"], list(state["back"])
