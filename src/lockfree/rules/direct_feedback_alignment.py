"""Direct feedback alignment: the output error is broadcast to every block through fixed random matrices."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lockfree.broadcast import Broadcast
from lockfree.rule import Card, Context, Needs, Place, Rule, Site
from lockfree.values import Credit


@dataclass(frozen=True, kw_only=True)
class DirectFeedbackAlignment(Rule):
    r"""The credit of block i is the output error times a fixed random matrix, $\delta_i = e B_i$ with $e = \partial L/\partial\hat y$.

    A block need not wait for the blocks above to learn, and no message travels between blocks. Within a block of several layers
    the credit is differentiated as usual. Where block and model give sequences of the same length, each place has its own error
    and all have the same matrix.

    Attributes:
        scale: Standard deviation of $e B_i$ for an error of unit norm per class, above 0.

    Raises:
        ValueError: If ``scale`` is not positive, or the model's output is not one tensor (batch, classes, ...).

    Example:
        >>> import lockfree as lf
        >>> lf.rules.DirectFeedbackAlignment().needs(lf.Place(0, 4)).name
        'ERROR'

    Reference:
        Nøkland 2016, "Direct feedback alignment provides learning in deep neural networks", arXiv 1609.01596, equation 6.
    """

    scale: float = 1.0

    card: ClassVar[Card] = Card(
        title="Direct feedback alignment",
        summary="The credit of a block is the output error, broadcast through a fixed random matrix.",
        reference="Nøkland 2016, Direct feedback alignment provides learning in deep neural networks, arXiv 1609.01596",
        bibtex=(
            "@inproceedings{nokland2016direct, title={Direct feedback alignment provides learning in deep neural networks}, "
            "author={N{\\o}kland, Arild}, booktitle={Advances in Neural Information Processing Systems}, year={2016}}"
        ),
    )

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale}: random feedback must have a positive size")

    def needs(self, place: Place) -> Needs:
        return Needs.ABOVE if place.top else Needs.ERROR

    def build(self, site: Site) -> nn.Module | None:
        return None if site.place.top else Broadcast(site.outputs, site.scores, scale=self.scale)

    def credit(self, context: Context) -> Credit | None:
        if context.place.top:
            return context.above
        assert context.error is not None
        assert context.auxiliary is not None
        (error,) = context.error
        assert error is not None, "the loss depends on the model's output"
        return context.auxiliary(error, context.outputs)
