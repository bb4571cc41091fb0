"""Kickback: errors travel down through weights that are all alike, so that a unit hears only the sum of those above."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lockfree.feedback import Feedback, FeedbackRule, Fixed, initial_deviation
from lockfree.rule import Card


@dataclass(frozen=True, kw_only=True)
class Kickback(FeedbackRule):
    r"""In the backward pass each layer's weight W is replaced by equal numbers: every unit is told the sum of the errors above.

    $$\partial L/\partial x := s\,(\delta\,\mathbf 1)\,\mathbf 1^T, \qquad s = 1/\sqrt{3\,\mathrm{fan\ in}}$$

    It is made for networks with few outputs whose errors do not cancel. The errors of a softmax under cross-entropy sum to zero in
    every sample, so there is no credit below the last layer; logistic or squared losses of each output leave some.

    Raises:
        ValueError: When a block holds a layer that has no feedback form; the message says how to register one.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.Kickback().needs(lf.Place(0, 4)).name
        'ABOVE'

    Reference:
        Balduzzi, Vanchinathan, Buhmann 2015, "Kickback cuts backprop's red-tape", arXiv 1411.6191, in the form in which Czarnecki et
        al. 2017, arXiv 1703.00522, table 1, set it beside feedback alignment.
    """

    card: ClassVar[Card] = Card(
        title="Kickback",
        summary="The error travels down through weights that are all equal: a unit hears the sum of the errors above it.",
        reference="Balduzzi, Vanchinathan, Buhmann 2015, Kickback cuts backprop's red-tape: biologically plausible credit assignment in "
        "neural networks, arXiv 1411.6191",
        bibtex=(
            "@inproceedings{balduzzi2015kickback, title={Kickback Cuts Backprop's Red-Tape: Biologically Plausible Credit Assignment in "
            "Neural Networks}, author={Balduzzi, David and Vanchinathan, Hastagiri and Buhmann, Joachim}, booktitle={AAAI Conference on "
            "Artificial Intelligence}, year={2015}}"
        ),
    )

    def feedback(self, weight: Tensor) -> Feedback:
        # Of the size of initial weights, so that credit keeps the size that it has under feedback alignment.
        return Fixed(torch.full_like(weight.detach(), initial_deviation(weight)))
