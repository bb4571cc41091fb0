"""Feedback alignment: errors travel down through fixed random weights instead of the transposed ones."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lockfree.chain import Block
from lockfree.feedback import FeedbackWeights, routed
from lockfree.rule import Card, Context, Needs, Place, Rule, Site
from lockfree.values import Credit, Values


@dataclass(frozen=True, kw_only=True)
class FeedbackAlignment(Rule):
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

    def needs(self, place: Place) -> Needs:
        return Needs.ABOVE

    def build(self, site: Site) -> nn.Module | None:
        assert isinstance(site.block, Block)
        layers = list(site.block.layers())
        owned = {id(parameter) for _, layer in layers for parameter in layer.parameters(recurse=False)}
        for parameter in site.block.parameters():
            if parameter.dim() > 1 and id(parameter) not in owned:
                raise ValueError(
                    f"feedback alignment cannot tell how a weight of shape {tuple(parameter.shape)} is used in block "
                    f"{site.place.index}: a function takes it, not a layer of that block; call a layer such as nn.Linear instead"
                )
        return FeedbackWeights(layers, rule="feedback alignment")

    def run(self, block: nn.Module, auxiliary: nn.Module | None, inputs: Values) -> Values:
        assert isinstance(auxiliary, FeedbackWeights)
        with routed(block, auxiliary):
            return block(inputs)

    def passes_on(self, place: Place) -> bool:
        return True

    def credit(self, context: Context) -> Credit | None:
        return context.above
