"""Backpropagation with gradient checkpointing: blocks run again on the way down instead of keeping their activations."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lockfree.recompute import recomputed
from lockfree.rule import Card, Context, Needs, Place, Rule, Site
from lockfree.values import Credit, Values


@dataclass(frozen=True, kw_only=True)
class Checkpointing(Rule):
    """Backpropagation, bit for bit, that keeps what crosses the borders between blocks and runs each block again on the way down.

    With K blocks of equal size it holds K borders and one block's activations at a time, for one more forward pass; about the root
    of the number of layers is a good K. Random numbers are drawn again as they were, and running statistics are left as the first run
    left them. It is the memory that local rules are to be measured against.

    Raises:
        ValueError: If links are late: a block would run again with other weights.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.Checkpointing().needs(lf.Place(0, 4)).name
        'ABOVE'

    Reference:
        Chen, Xu, Zhang, Guestrin 2016, "Training deep nets with sublinear memory cost", arXiv 1604.06174, section 4.1.
    """

    card: ClassVar[Card] = Card(
        title="Backpropagation with checkpointing",
        summary="The gradient of the loss, chained through all blocks above; blocks run again instead of keeping their activations.",
        reference="Chen, Xu, Zhang, Guestrin 2016, Training deep nets with sublinear memory cost, arXiv 1604.06174",
        bibtex=(
            "@article{chen2016training, title={Training Deep Nets with Sublinear Memory Cost}, author={Chen, Tianqi and Xu, Bing and "
            "Zhang, Chiyuan and Guestrin, Carlos}, journal={arXiv preprint arXiv:1604.06174}, year={2016}}"
        ),
    )

    def needs(self, place: Place) -> Needs:
        return Needs.ABOVE

    def passes_on(self, place: Place) -> bool:
        return True

    def build(self, site: Site) -> nn.Module | None:
        if site.late:
            raise ValueError(
                "checkpointing runs blocks again with their present weights, which late links would have changed: use links without "
                "delay, or plain backprop"
            )
        return None

    def run(self, block: nn.Module, context: Context) -> Values:
        if context.place.top:  # its activations are needed at once
            return block(context.inputs)
        return recomputed(block, block, context.inputs)

    def credit(self, context: Context) -> Credit | None:
        return context.above
