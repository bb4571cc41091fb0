"""The mean of gradients that lie in as many processes: bit for bit what one process would make of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lockfree.server.rounds import mean_buffers, mean_gradients

_ALIGNMENT = 64  # bytes, as of PyTorch's own memory


class Exchange(ABC):
    """Carries bytes between the workers. All of them make the same calls with as many bytes.

    Attributes:
        rank: Number of this worker.
        size: M, how many there are.
    """

    rank: int
    size: int

    @abstractmethod
    def to_each(self, whole: Tensor, parts: Tensor) -> None:
        """Gives each worker its part.

        Args:
            whole: Bytes, M parts of equal length, that of worker 0 first.
            parts: Is written to: this worker's part of each worker's, that of worker 0 first.
        """

    @abstractmethod
    def from_each(self, mine: Tensor, whole: Tensor) -> None:
        """Collects from each worker.

        Args:
            mine: Bytes.
            whole: Is written to: those of all workers, of worker 0 first.
        """

    def rows(self, mine: Tensor) -> Tensor:
        """Returns a row of each worker.

        Args:
            mine: This worker's row, of the same length and type in all of them.
        """
        rows = mine.new_empty(self.size, len(mine))
        self.from_each(mine.view(torch.uint8), rows.view(-1).view(torch.uint8))
        return rows


class Reduction:
    r"""Makes the gradient and buffers of a round, $g = \sum_k \frac{n_k}{N} g_k$, in all workers at once.

    Each worker sums one part of it: it is sent that part of everybody's gradient, adds in the order of the workers, and sends the sum to
    everybody. That is as many bytes as go around a ring, $2 \frac{M-1}{M}$ of a gradient from each worker; but a ring adds each part in
    another order, and not that of a server. Buffers are few, and go to everybody as they are, where they have changed.

    Args:
        weights: The model's weights, of which there will be gradients.
        exchange: Connects the workers.
    """

    def __init__(self, weights: Sequence[Tensor], exchange: Exchange) -> None:
        self._exchange = exchange
        places: dict[torch.dtype, list[int]] = {}
        for place, weight in enumerate(weights):
            places.setdefault(weight.dtype, []).append(place)
        self._pieces = [_Piece(found, [weights[place] for place in found], exchange.size) for found in places.values()]

    def gradients(
        self, mine: Sequence[Tensor | None], there: Sequence[Sequence[bool]], samples: Sequence[int]
    ) -> list[Tensor | None]:
        """Returns the mean gradient. Its memory is used again the next time.

        Args:
            mine: This worker's.
            there: For each worker, of which weights it has a gradient.
            samples: Of each worker's batch.
        """
        if self._exchange.size == 1:
            return list(mine)
        found: list[Tensor | None] = [None] * len(mine)
        for piece in self._pieces:
            piece.sum(mine, there, samples, self._exchange)
            for place, view in zip(piece.places, piece.views, strict=True):
                if any(has[place] for has in there):
                    found[place] = view
        return found

    def buffers(self, mine: Sequence[Tensor], changed: Sequence[Sequence[bool]]) -> list[Tensor]:
        """Returns the buffers of the round.

        Args:
            mine: This worker's.
            changed: For each worker, which ones its batch has changed.
        """
        moved = [any(each) for each in zip(*changed, strict=True)]
        if self._exchange.size == 1 or not any(moved):
            return list(mine)
        sent = [buffer for buffer, one in zip(mine, moved, strict=True) if one]
        packed = torch.cat([_bytes(buffer) for buffer in sent])
        rows = self._exchange.rows(packed)
        results = iter(mean_buffers([_unpacked(row, sent) for row in rows]))
        return [next(results) if one else buffer for buffer, one in zip(mine, moved, strict=True)]


class _Piece:
    """The gradients of one type, in one piece of memory that is cut into as many equal parts as there are workers.

    Where an element lies makes no difference to its sum in float32 and wider. The narrow types are rounded otherwise at the end of a
    tensor than within (the processor's vectors hold them as float32), so a part of them is made of whole tensors.

    Attributes:
        places: Which of the weights they are of.
        views: The gradients, in the piece.
    """

    def __init__(self, places: Sequence[int], weights: Sequence[Tensor], parts: int) -> None:
        self.places = places
        kind, device = weights[0].dtype, weights[0].device
        step = _ALIGNMENT // kind.itemsize
        sizes = [weight.numel() for weight in weights]
        starts, length = (_whole if kind.itemsize < 4 else _dense)([-(-size // step) * step for size in sizes], parts, step)
        self._memory = torch.zeros(parts * length, dtype=kind, device=device)
        self._parts = torch.empty(parts, length, dtype=kind, device=device)
        self.views = [
            self._memory.as_strided(weight.shape, torch.empty_like(weight).stride(), start)
            for weight, start in zip(weights, starts, strict=True)
        ]
        self._slices: list[list[tuple[int, int, int]]] = []  # of each part: place of the weight, and from where to where
        for part in range(parts):
            bounds = [
                (max(start - part * length, 0), min(start + size - part * length, length))
                for start, size in zip(starts, sizes, strict=True)
            ]
            self._slices.append([(place, *ends) for place, ends in zip(places, bounds, strict=True) if ends[0] < ends[1]])

    @torch.no_grad()
    def sum(
        self, mine: Sequence[Tensor | None], there: Sequence[Sequence[bool]], samples: Sequence[int], exchange: Exchange
    ) -> None:
        """Writes the mean into the views; where nobody has a gradient, whatever."""
        for place, view in zip(self.places, self.views, strict=True):
            gradient = mine[place]
            if gradient is not None:
                view.copy_(gradient)
        exchange.to_each(self._memory.view(torch.uint8), self._parts.view(-1).view(torch.uint8))
        slices = self._slices[exchange.rank]
        each = [
            [part[start:end] if has[place] else None for place, start, end in slices]
            for part, has in zip(self._parts, there, strict=True)
        ]
        total = self._parts[0]
        for (_, start, end), found in zip(slices, mean_gradients(each, samples) if slices else (), strict=True):
            if found is not None:
                total[start:end].copy_(found)
        exchange.from_each(total.view(torch.uint8), self._memory.view(torch.uint8))


def _dense(sizes: Sequence[int], parts: int, step: int) -> tuple[list[int], int]:
    """Lays tensors one after the other. Returns where they begin, and the length of a part."""
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return starts, max(-(-sum(sizes) // (parts * step)), 1) * step


def _whole(sizes: Sequence[int], parts: int, step: int) -> tuple[list[int], int]:
    """Lays tensors so that each is in one part: the largest first, always into the emptiest."""
    filled, where = [0] * parts, [(0, 0)] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        part = filled.index(min(filled))
        where[place] = (part, filled[part])
        filled[part] += sizes[place]
    length = max(*filled, step)
    return [part * length + start for part, start in where], length


def _bytes(buffer: Tensor) -> Tensor:
    """Returns the bytes of a buffer, and so many more that the next one lies well."""
    found = buffer.detach().contiguous().view(-1).view(torch.uint8)
    return torch.cat([found, found.new_zeros(-len(found) % _ALIGNMENT)])


def _unpacked(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    found, start = [], 0
    for buffer in like:
        size = buffer.numel() * buffer.dtype.itemsize
        found.append(row[start : start + size].clone().view(buffer.dtype).view(buffer.shape))
        start += size + -size % _ALIGNMENT
    return found
