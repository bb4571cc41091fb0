"""Direct random target projection: the targets themselves, broadcast to every block, stand for the error."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lockfree.broadcast import Broadcast
from lockfree.rule import Card, Context, Needs, Place, Rule, Site
from lockfree.targets import target_rows
from lockfree.values import Credit


@dataclass(frozen=True, kw_only=True)
class DirectRandomTargets(Rule):
    r"""The credit of block i is the one-hot target times a fixed random matrix, $\delta_i = t B_i / m$ for m targets.

    The sign of the error $p - t$ is known before the network has run: negative for the right class, positive for the others. So the
    target can stand for it, and a block learns and frees its graph in the forward pass. (As B is symmetric about 0, so is the
    credit, and its sign is no matter.) The top block learns from the loss.

    Attributes:
        scale: Standard deviation of $t B_i$ times the number of classes' root, above 0.

    Raises:
        ValueError: If ``scale`` is not positive, the model's output is not one tensor, or the targets are neither class numbers nor
            real-valued, one of them a sample.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.DirectRandomTargets().needs(lf.Place(0, 4)).name
        'TARGET'

    Reference:
        Frenkel, Lefebvre, Bol 2021, "Learning without feedback: fixed random learning signals allow for feedforward training of deep
        neural networks", arXiv 1909.01311, section 2.2.
    """

    scale: float = 1.0

    card: ClassVar[Card] = Card(
        title="Direct random target projection",
        summary="The credit of a block is the target, projected by a fixed random matrix.",
        reference="Frenkel, Lefebvre, Bol 2021, Learning without feedback: fixed random learning signals allow for feedforward training of "
        "deep neural networks, arXiv 1909.01311",
        bibtex=(
            "@article{frenkel2021learning, title={Learning Without Feedback: Fixed Random Learning Signals Allow for Feedforward Training "
            "of Deep Neural Networks}, author={Frenkel, Charlotte and Lefebvre, Martin and Bol, David}, journal={Frontiers in "
            "Neuroscience}, volume={15}, year={2021}}"
        ),
    )

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale}: random feedback must have a positive size")

    def needs(self, place: Place) -> Needs:
        return Needs.ABOVE if place.top else Needs.TARGET

    def passes_on(self, place: Place) -> bool:
        return place.top

    def build(self, site: Site) -> nn.Module | None:
        return None if site.place.top else Broadcast(site.outputs, site.scores, scale=self.scale)

    def credit(self, context: Context) -> Credit | None:
        if context.place.top:
            return context.above
        assert context.auxiliary is not None
        key = "random targets"
        if key not in context.shared:
            context.shared[key] = target_rows(context, wanted_by=self.card.title)
        rows, target = context.shared[key], context.target
        places = rows.shape[:-1].numel() if rows.dim() == 3 else context.samples
        count = places if target.is_floating_point() else target.numel()
        return tuple(share / count for share in context.auxiliary(rows, context.outputs))  # divided in the block's own type
