"""Mono-Forward: each block tells the classes apart by one matrix of its own."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lockfree.local import HeadRule, as_input_of
from lockfree.rule import Card, Context, Site
from lockfree.values import by_place


@dataclass(frozen=True, kw_only=True)
class MonoForward(HeadRule):
    r"""Each block descends the user's loss of its goodness scores, $G_i = a_iM_i^T$, one for each class; M learns along.

    All features of the output count, nothing is pooled; where output and scores are sequences of the same length, each place has
    scores of its own.

    Attributes:
        learning_rate: Of the matrices' Adam.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.MonoForward().needs(lf.Place(0, 4)).name
        'TARGET'

    Reference:
        Gong, Li, Abdulla 2025, "Mono-Forward: Backpropagation-free algorithm for efficient neural network training harnessing local
        errors", arXiv 2501.09238.
    """

    card: ClassVar[Card] = Card(
        title="Mono-Forward",
        summary="Each block tells the classes apart by one matrix of its own, without pooling.",
        reference="Gong, Li, Abdulla 2025, Mono-Forward: Backpropagation-free algorithm for efficient neural network training harnessing "
        "local errors, arXiv 2501.09238",
        bibtex=(
            "@article{gong2025mono, title={Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network Training Harnessing "
            "Local Errors}, author={Gong, James and Li, Bruce and Abdulla, Waleed}, journal={arXiv preprint arXiv:2501.09238}, year={2025}}"
        ),
    )

    def head(self, site: Site, y: Tensor) -> nn.Module:
        if by_place(y, site.scores):
            return nn.Linear(y.shape[-1], site.scores.shape[-1], bias=False)
        shape = site.scores.shape[1:]
        return nn.Sequential(nn.Flatten(), nn.Linear(y[0].numel(), shape.numel(), bias=False), nn.Unflatten(1, shape))

    def head_loss(self, context: Context, head: nn.Module, y: Tensor) -> Tensor:
        assert context.loss is not None
        return context.loss(head(as_input_of(head, y)))
