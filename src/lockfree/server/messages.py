"""What a server and its workers say to each other. All of it is plain data and tensors, so that any engine can carry it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


class Refused(ValueError):  # noqa: N818  (it is the server's answer)
    """The server did not take what a worker said; it is unchanged and goes on."""


class NotFinite(Refused):
    """A push held a value that is not finite. The worker keeps its place, and its ticket goes out again."""


class Gone(Refused):
    """Who spoke is not at work: never joined, evicted, or replaced by a later incarnation of itself. It has to join."""


@dataclass(frozen=True, slots=True, eq=False)
class Pulled:
    """Weights to take a gradient at, and the batch to take it of.

    Attributes:
        worker: Who pulled, 0 or more.
        incarnation: Its incarnation, 1 or more.
        sequence: Number of this pull within the incarnation, 1 or more; the push that answers it carries it too.
        version: Number of updates that made the weights.
        ticket: Number of the batch.
        weights: The trained weights, in the model's order. Nobody may write to them.
        buffers: The model's buffers, likewise.
    """

    worker: int
    incarnation: int
    sequence: int
    version: int
    ticket: int
    weights: Sequence[Tensor]
    buffers: Sequence[Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Push:
    """A gradient, as the answer to a pull.

    Attributes:
        worker: As in the pull.
        incarnation: As in the pull.
        sequence: As in the pull. It is what tells a push that was sent twice.
        version: As in the pull.
        ticket: As in the pull.
        gradients: Gradient of the mean loss, a tensor for each weight; ``None`` where there is none.
        buffers: The buffers after the batch.
        samples: How many samples the batch had, 1 or more.
        loss: The mean loss.
    """

    worker: int
    incarnation: int
    sequence: int
    version: int
    ticket: int
    gradients: Sequence[Tensor | None]
    buffers: Sequence[Tensor]
    samples: int
    loss: float


@dataclass(frozen=True, slots=True)
class Applied:
    """The server has taken a gradient.

    Attributes:
        version: The version that the gradient is part of. Behind a barrier it is made when the round is complete.
        delay: Updates between the weights that it was taken at and those that it changes.
        gap: Distance between these weights, where it was measured.
        ratio: Size of the repair, relative to the gradient, where it was measured.
    """

    version: int
    delay: int
    gap: float | None = None
    ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """The correction has left a gradient out; its batch counts as done.

    Attributes:
        version: The version that stays.
        delay: Updates between the weights that the gradient was taken at and those of that version.
    """

    version: int
    delay: int


Answer = Applied | Dropped
"""What a push is answered with, and again if it comes again."""
