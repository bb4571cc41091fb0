"""Sign symmetry: errors travel down through weights that share only their signs with the forward ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lockfree.choose import choose
from lockfree.feedback import Feedback, FeedbackRule, initial_deviation, like_initial
from lockfree.rng import seed_of
from lockfree.rule import Card, Context


class _Signed(Feedback):
    r"""$B = M \circ \mathrm{sign}\,W$; what is kept is W and M."""

    def matrix(self, *kept: Tensor) -> Tensor:
        weight, magnitude = kept
        return weight.sign().mul_(magnitude)


class _Unchanged(_Signed):
    """Magnitudes that stay from batch to batch.

    Args:
        magnitude: M, of the shape of the weight, or one number for all.
    """

    def __init__(self, magnitude: Tensor) -> None:
        super().__init__()
        self.magnitude: Tensor
        self.register_buffer("magnitude", magnitude)

    def keep(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return weight, self.magnitude


class _Redrawn(_Signed):
    """Magnitudes that are drawn anew for each batch, uniformly up to the largest initial weight.

    Args:
        weight: W.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # Four numbers of 16 bits out of each of 64: drawing takes longer than anything else here.
        self._words = torch.empty((weight.numel() + 3) // 4, dtype=torch.int64, device=weight.device)
        self._numbers = self._words.view(torch.int16)[: weight.numel()].view(weight.shape)
        self._unit = weight[0].numel() ** -0.5 / 2**15

    def keep(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        self._words.random_(-(2**63), None, generator=generator)
        return weight, torch.mul(self._numbers, self._unit).abs_().to(weight.dtype)


def _uniform(weight: Tensor) -> Feedback:
    return _Unchanged(torch.full((), initial_deviation(weight), dtype=weight.dtype, device=weight.device))


_MAGNITUDES = {
    "uniform": _uniform,
    "batchwise": _Redrawn,
    "fixed": lambda weight: _Unchanged(like_initial(weight).abs_()),
}
_NAMES = {"uniform": "uniform", "batchwise": "batchwise random", "fixed": "fixed random"}


@dataclass(frozen=True, kw_only=True)
class SignSymmetry(FeedbackRule):
    r"""In the backward pass each layer's weight W is replaced by $B = M \circ \mathrm{sign}\,W$: the signs are kept, the sizes are not.

    Attributes:
        magnitude: M. "uniform" (uSF): the standard deviation of PyTorch's initial weights, $1/\sqrt{3\,\mathrm{fan\ in}}$, everywhere;
            "batchwise" (brSF): sizes of such weights, drawn anew for each batch; "fixed" (frSF): drawn once.
        seed: What batchwise magnitudes are drawn from, with the numbers of block and batch.

    Raises:
        ValueError: If ``magnitude`` is misspelt, or a block holds a layer that has no feedback form; the message says how to
            register one.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.SignSymmetry(magnitude="fixed").title
        'Sign symmetry, fixed random magnitudes'

    Reference:
        Liao, Leibo, Poggio 2016, "How important is weight symmetry in backpropagation?", arXiv 1510.05067, section 3.
    """

    magnitude: str = "uniform"
    seed: int = 0

    card: ClassVar[Card] = Card(
        title="Sign symmetry",
        summary="The error travels down through weights that share only their signs with the forward ones.",
        reference="Liao, Leibo, Poggio 2016, How important is weight symmetry in backpropagation?, arXiv 1510.05067",
        bibtex=(
            "@inproceedings{liao2016important, title={How Important Is Weight Symmetry in Backpropagation?}, author={Liao, Qianli and "
            "Leibo, Joel Z. and Poggio, Tomaso}, booktitle={AAAI Conference on Artificial Intelligence}, year={2016}}"
        ),
    )

    def __post_init__(self) -> None:
        choose(_MAGNITUDES, self.magnitude, "magnitude")

    @property
    def title(self) -> str:
        return f"{self.card.title}, {_NAMES[self.magnitude]} magnitudes"

    def feedback(self, weight: Tensor) -> Feedback:
        return _MAGNITUDES[self.magnitude](weight)

    def seed_for(self, context: Context) -> int | None:
        return seed_of(self.seed, context.place.index, context.batch) if self.magnitude == "batchwise" else None
