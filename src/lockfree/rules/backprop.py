"""Backpropagation: every block waits for the true gradient."""

from dataclasses import dataclass
from typing import ClassVar

from lockfree.rule import Card, Context, Needs, Place, Rule
from lockfree.values import Credit


@dataclass(frozen=True, kw_only=True)
class Backprop(Rule):
    r"""The baseline: the credit of a block is what the block above reports, $\delta_i = (\partial y_{i+1}/\partial y_i)^T \delta_{i+1}$.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.Backprop()
        Backprop()

    Reference:
        Rumelhart, Hinton and Williams 1986, "Learning representations by back-propagating errors", Nature 323.
    """

    card: ClassVar[Card] = Card(
        title="Backpropagation",
        summary="The credit of a block is the true gradient, handed down from the block above.",
        reference="Rumelhart, Hinton, Williams 1986, Learning representations by back-propagating errors, Nature 323:533-536",
        bibtex=(
            "@article{rumelhart1986learning, title={Learning representations by back-propagating errors}, "
            "author={Rumelhart, David E. and Hinton, Geoffrey E. and Williams, Ronald J.}, journal={Nature}, "
            "volume={323}, pages={533--536}, year={1986}}"
        ),
    )

    def needs(self, place: Place) -> Needs:
        return Needs.ABOVE

    def passes_on(self, place: Place) -> bool:
        return True

    def credit(self, context: Context) -> Credit | None:
        return context.above
