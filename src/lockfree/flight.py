"""One batch on its way through the chain."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lockfree.values import Credit, Values


@dataclass(slots=True)
class Flight:
    """A batch between its entry and its last action.

    Attributes:
        inputs: The batch, detached.
        target: Its targets.
        remaining: Actions still to come.
        shared: Scratch space of the rule for this batch, common to all cells.
        error: dL/d(model output), once the top cell has run forward; never if the loss is joined to the top block.
        loss: The loss, with the graph of what it is joined to, between the top cell's forward and its learning.
        scores: The model's output, detached, once the top cell has run forward; where `error` is.
    """

    inputs: Values
    target: Any
    remaining: int
    shared: dict[str, Any] = field(default_factory=dict)
    error: Credit | None = None
    loss: Tensor | None = None
    scores: Values = None
