"""Linear synthesisers of several cells as one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lockfree.flight import Flight
from lockfree.stacking import CreditStack, Descent, ParameterStack
from lockfree.synthesisers.base import Prediction
from lockfree.synthesisers.networks import LinearSynthesiser

LabelsOf = Callable[[dict[str, Any], Any, Tensor, int], Tensor]
"""Returns the labels of a batch, given its scratch space, its targets, an output and the number of classes."""


class LinearCredits(CreditStack):
    r"""Linear synthesisers $M_i(y, c) = W_i y + t_{i,c}$ of n cells, in one batched product each way.

    $$\hat\delta = (W y + t)/m, \qquad d = \hat\delta - \delta, \qquad \partial L/\partial W = d^T y, \qquad
    \partial L/\partial t = c^T d$$

    Args:
        networks: The synthesisers, bottom to top.
        labels: Makes the one-hot rows that they are conditioned on; ``None`` if they are not.
    """

    waits = True

    def __init__(self, networks: Sequence[LinearSynthesiser], labels: LabelsOf | None) -> None:
        self._weight = ParameterStack([network.weight for network in networks])
        self._table = ParameterStack([network.table for network in networks])
        self.parameters = [self._weight, self._table]
        self._classes, self._labels = networks[0].classes, labels
        self._transposed = self._weight.value.mT
        # What the predictions whose truth is to come were made from; they themselves are `awaiting`.
        self._rows = torch.empty(0)
        self._label: Tensor | None = None
        # The predictions of the present tick wait here, until the truth of those of the last one has been learnt from.
        self._next: tuple[Tensor, Tensor, Tensor | None] | None = None
        # What the last predictions missed the truth by; its memory is that of the next ones.
        self._missed = self._table_gradient = torch.empty(0)

    def enter(self, memos: Sequence[list[Prediction]]) -> None:
        predictions = [prediction for (prediction,) in memos]
        self.awaiting = torch.stack([one.credit for one in predictions])
        stored = [LinearSynthesiser.opened(one) for one in predictions]
        self._rows = torch.stack([rows for rows, _ in stored])
        self._label = None if self._labels is None else torch.stack([label for _, label in stored if label is not None])

    def leave(self) -> Sequence[list[Prediction]]:
        labels = [None] * len(self._rows) if self._label is None else list(self._label.clone().unbind())
        rows, credits = self._rows.clone().unbind(), self.awaiting.clone().unbind()
        return [[Prediction(c, (r, label))] for c, r, label in zip(credits, rows, labels, strict=True)]

    def shown(self, flights: Sequence[Flight], outputs: Tensor) -> list[Tensor]:
        if self._labels is None:
            return []
        label = torch.stack([self._labels(flight.shared, flight.target, outputs[0], self._classes) for flight in flights])
        label, rows = label.to(outputs.dtype), outputs.flatten(1, -2).shape[1]
        # One label for all steps of a sequence.
        return [label if label.shape[1] == rows else label.repeat_interleave(rows // label.shape[1], dim=1)]

    def credit(self, outputs: Tensor, shown: Sequence[Tensor]) -> Tensor:
        rows, samples = outputs.flatten(1, -2), outputs.shape[1]
        credit = self._missed if self._missed.shape == outputs.shape else torch.empty_like(outputs)
        predicted, table, label = credit.flatten(1, -2), self._table.value / samples, next(iter(shown), None)
        if label is None:
            torch.baddbmm(table, rows, self._transposed, alpha=1 / samples, out=predicted)
        else:
            torch.bmm(label, table, out=predicted).baddbmm_(rows, self._transposed, alpha=1 / samples)
        self._next = rows, credit, label
        return credit

    def carried(self) -> list[Tensor]:
        return [self._rows, self.awaiting, *([] if self._label is None else [self._label])]

    def carry(self, kept: Sequence[Tensor]) -> None:
        self._rows, self.awaiting, *labels = kept
        self._label = next(iter(labels), None)

    def learn(self) -> Tensor:
        self._missed = self.awaiting
        missed = self._missed.flatten(1, -2)
        gradient = missed.sum(1, keepdim=True) if self._label is None else torch.bmm(self._label.mT, missed)
        self._table_gradient = gradient
        # Every miss has a part in it, so it is finite only if they all are; their own squares are many more.
        return torch.dot(gradient.view(-1), gradient.view(-1))

    def losses(self) -> Tensor:
        """Returns m/2 of the squared norm of what each missed the mean loss's gradient by."""
        missed = self._missed
        return torch.linalg.vector_norm(missed.flatten(1), dim=1).square_().mul_(missed.shape[1] / 2)

    def descend(self, descent: Descent) -> None:
        descent.follow_product(self._weight, self._missed.flatten(1, -2).mT, self._rows)
        descent.follow(self._table, self._table_gradient)
        assert self._next is not None, "credit comes before learning"
        self._rows, self.awaiting, self._label = self._next
