"""Feedback alignment: errors travel down through fixed random weights instead of the transposed ones."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lockfree.feedback import Feedback, FeedbackRule, fixed_random
from lockfree.rule import Card


@dataclass(frozen=True, kw_only=True)
class FeedbackAlignment(FeedbackRule):
    r"""In the backward pass each layer's weight W is replaced by a fixed random B, $\partial L/\partial x := \delta B$ for $y = x W^T$.

    Gradients of the weights themselves are the usual ones, given that credit. B has the distribution that PyTorch initialises W
    with. Layers with nothing to transpose (normalisations, activations) differentiate as usual.

    Raises:
        ValueError: When a block holds a layer that has no feedback form; the message says how to register one.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.FeedbackAlignment().needs(lf.Place(0, 4)).name
        'ABOVE'

    Reference:
        Lillicrap et al. 2016, "Random synaptic feedback weights support error backpropagation for deep learning", Nature
        Communications 7:13276, arXiv 1411.0247.
    """

    card: ClassVar[Card] = Card(
        title="Feedback alignment",
        summary="The error travels down through fixed random weights instead of the transposed forward weights.",
        reference="Lillicrap, Cownden, Tweed, Akerman 2016, Random synaptic feedback weights support error backpropagation for deep "
        "learning, Nature Communications 7:13276, arXiv 1411.0247",
        bibtex=(
            "@article{lillicrap2016random, title={Random synaptic feedback weights support error backpropagation for deep "
            "learning}, author={Lillicrap, Timothy P. and Cownden, Daniel and Tweed, Douglas B. and Akerman, Colin J.}, "
            "journal={Nature Communications}, volume={7}, pages={13276}, year={2016}}"
        ),
    )

    def feedback(self, weight: Tensor) -> Feedback:
        return fixed_random(weight)
