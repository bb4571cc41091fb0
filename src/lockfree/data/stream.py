"""A long text as parallel rows that are read stretch by stretch."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


class Passage(NamedTuple):
    """Some steps of all rows of a `Stream`.

    Attributes:
        inputs: Symbols of shape (steps, batch).
        targets: The symbol after each of them.
        done: Whether a row ends with this step, and begins anew with the next one.
    """

    inputs: Int64[Tensor, "steps batch"]
    targets: Int64[Tensor, "steps batch"]
    done: Bool[Tensor, "steps batch"]


class Stream:
    """Cuts a text into parallel contiguous rows and reads all of them on and on, a stretch at a time.

    Row b has the predictions from b L to below (b + 1) L, where L is the number of predictions, one less than that of symbols,
    divided by that of rows and rounded down. Each of these is made once in a pass. The state of a network may be carried from one
    stretch to the next; where the rows end they begin anew, in the midst of a stretch if it falls so.

    A stretch is a pure function of its number, so a resume needs nothing else.

    Args:
        symbols: The text.
        batch: Rows, 1 or more.
        stretch: Steps of a stretch, 1 or more.

    Raises:
        ValueError: A number is too small, or the text too short to fill one stretch of each row.

    Attributes:
        row: L, the steps of one pass over the text.

    Example:
        >>> stream = Stream(torch.arange(9), batch=2, stretch=3)
        >>> stream.at(0).inputs.T.tolist(), stream.at(0).targets.T.tolist()
        ([[0, 1, 2], [4, 5, 6]], [[1, 2, 3], [5, 6, 7]])
        >>> stream.at(1).inputs.T.tolist(), stream.at(1).done[:, 0].tolist()
        ([[3, 0, 1], [7, 4, 5]], [True, False, False])
    """

    def __init__(self, symbols: Int64[Tensor, " n"], batch: int, stretch: int) -> None:
        for name, value in (("batch", batch), ("stretch", stretch)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.row = (len(symbols) - 1) // batch
        if self.row < stretch:
            raise ValueError(
                f"{len(symbols):,} symbols are too few for {batch:,} rows of {stretch:,} steps, which take "
                f"{batch * stretch + 1:,}; take fewer rows, shorter stretches or a longer text"
            )
        self.batch, self.stretch = batch, stretch
        self._inputs = symbols[: self.row * batch].view(batch, self.row).T
        self._targets = symbols[1 : self.row * batch + 1].view(batch, self.row).T

    def at(self, number: int) -> Passage:
        """Gives a stretch.

        Args:
            number: Which one, from 0; there is no last one.

        Returns:
            Its inputs, targets and ends, each of shape (stretch, batch).

        Raises:
            ValueError: The number is negative.
        """
        if number < 0:
            raise ValueError(f"stretches are numbered from 0, got {number}")
        first = number * self.stretch % self.row
        steps = torch.arange(first, first + self.stretch, device=self._inputs.device) % self.row
        done = (steps == self.row - 1).unsqueeze(1).expand(-1, self.batch)
        return Passage(self._inputs[steps], self._targets[steps], done)
