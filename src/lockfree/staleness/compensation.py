"""Corrections that add to a late gradient what it would have changed by: a first-order Taylor term."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from lockfree.staleness.base import (
    Correction,
    Late,
    check_weights,
    finite_squares,
    in_range,
    pick,
    present,
    put_back,
    recall,
    statistics,
    wide,
)

Product = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""Maps (weights w, direction v) to $H(w)v$, a tensor for each weight."""


@dataclass(frozen=True, kw_only=True)
class DelayCompensation(Correction):
    r"""Adds a Taylor term in which the squared gradient stands for the diagonal of the Hessian (DC-ASGD).

    $$\tilde g = g + \lambda\, g \odot g \odot (w_t - w_{t-\tau}), \qquad
    \lambda = \lambda_0 \quad\text{or}\quad \lambda = \frac{\lambda_0}{\sqrt{\mathrm{MS} + \epsilon}}, \quad
    \mathrm{MS} \leftarrow m\,\mathrm{MS} + (1 - m)\, g \odot g$$

    The mean square takes in the present gradient before it is used. With m = 0 and $\epsilon = 0$ the adaptive term is
    $\lambda_0\,|g| \odot (w_t - w_{t-\tau})$. The constant $\lambda$ has to be found anew for another scale of the loss squared or
    batch size; the adaptive one depends on them less.

    The term is shortened to $\lVert\tilde g - g\rVert \le \kappa\,\lVert g\rVert$, over all tensors together. The useful range of
    $\lambda_0$ is narrow, and past it the term turns a run that stalls into one that diverges. A coordinate in which the term is not
    finite gets none, and with a cap no coordinate gets any if a norm is not finite; so what is finite in g comes back finite (up to
    overflow in the sum), and what is not is left for others to see. The mean square takes squares that are not finite as 0.

    Whether all workers share one mean square, or each has its own, is decided by whoever owns the memory: one `memory` for all
    costs a tensor for each weight, one for each worker as many times that.

    Attributes:
        strength: $\lambda_0$, 0 or more; ``None``: 2 if adaptive, else 0.04.
        adaptive: Whether $\lambda$ follows the mean square of the gradient.
        decay: m, what a gradient leaves of the mean square, from 0 to below 1; for ``adaptive`` only.
        eps: $\epsilon$, 0 or more; for ``adaptive`` only.
        cap: $\kappa$, above 0; ``None``: whatever its norm. 1 is the largest that never lets $\tilde g$ point against g.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> correction, then, now = DelayCompensation(adaptive=False, strength=0.5), [torch.zeros(2)], [torch.ones(2)]
        >>> late = Late(read=0, applied=1, then=then, now=now)
        >>> correction.correct([torch.tensor([1.0, -1.0])], late, correction.memory(now))
        [tensor([ 1.5000, -0.5000])]

    Reference:
        Zheng, Meng, Wang, Chen, Yu, Ma, Liu 2017, "Asynchronous stochastic gradient descent with delay compensation", arXiv
        1609.08326: DC-ASGD-c (constant) and DC-ASGD-a (adaptive). The cap is not in the paper.
    """

    strength: float | int | None = None
    adaptive: bool = True
    decay: float | int = 0.95
    eps: float | int = 1e-7
    cap: float | int | None = 1.0

    wants_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.strength is not None:
            in_range(self, "strength", lambda strength: strength >= 0, "a number, 0 or more, or None")
        in_range(self, "decay", lambda decay: 0 <= decay < 1, "a number from 0 to below 1")
        in_range(self, "eps", lambda eps: eps >= 0, "a number, 0 or more")
        if self.cap is not None:
            in_range(self, "cap", lambda cap: cap > 0, "a number above 0, or None")

    def memory(self, weights: Sequence[Tensor]) -> dict[str, Any]:
        return {"mean_square": statistics(weights)} if self.adaptive else {}

    def overshoots(self, ratio: float) -> bool:
        # Past the cap the term is shortened to it, up to rounding: its direction is then all that is left of it.
        return not math.isfinite(ratio) or (self.cap is not None and ratio >= 0.999 * self.cap)

    @torch.no_grad()
    def correct(self, gradients: Sequence[Tensor | None], late: Late, memory: dict[str, Any]) -> list[Tensor | None]:
        check_weights(gradients, late)
        places = present(gradients)
        if not places:
            return list(gradients)
        g = wide(gradients, places)
        squares = finite_squares(g)
        # Taken as g - λg²(then - now): where nothing has moved +0 is subtracted, which leaves every g, -0 too, as it is.
        excess = torch._foreach_sub(wide(late.then, places), wide(late.now, places))
        torch._foreach_mul_(excess, squares)
        if self.adaptive:
            mean_square = pick(recall(memory, "mean_square", gradients), places)
            torch._foreach_lerp_(mean_square, squares, 1.0 - self.decay)
            roots = torch._foreach_add(mean_square, float(self.eps))
            torch._foreach_sqrt_(roots)
            torch._foreach_div_(excess, roots)
        for term in excess:
            term.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        torch._foreach_mul_(excess, self.lambda_0)
        if self.cap is not None:
            torch._foreach_mul_(excess, self._shortening(g, excess, self.cap))
        return put_back(gradients, places, torch._foreach_sub(g, excess))

    @property
    def lambda_0(self) -> float:
        r"""$\lambda_0$, the default one if none was given."""
        if self.strength is not None:
            return float(self.strength)
        return 2.0 if self.adaptive else 0.04

    def shortened(self, length: float, excess: float) -> float:
        r"""Returns what to multiply a term by, from 0 to 1; 0 if a norm is not finite.

        Args:
            length: $\lVert g\rVert$.
            excess: Norm of the term.
        """
        if self.cap is None or excess == 0:
            return 1.0
        ratio = self.cap * length / excess if math.isfinite(length) and math.isfinite(excess) else 0.0
        return min(ratio, 1.0)

    def _shortening(self, gradients: Sequence[Tensor], excess: Sequence[Tensor], cap: float) -> Tensor:
        """Returns what to multiply the term by, at most 1; 0 if a norm is not finite. It stays a tensor: nobody waits for it."""
        ratio = cap * get_total_norm(gradients) / get_total_norm(excess)
        return ratio.nan_to_num(nan=0.0, posinf=0.0).clamp(max=1.0)


@dataclass(frozen=True, kw_only=True)
class HessianCompensation(Correction):
    r"""Adds the Taylor term itself: $\tilde g = g + H(w_{t-\tau})\,(w_t - w_{t-\tau})$.

    It is exact where the loss is quadratic, and so the oracle for every other compensation. It needs whoever can multiply by the
    Hessian of the very loss that the gradient was taken of, batch included.

    Attributes:
        product: Maps (weights w, direction v) to $H(w)v$, lists of a tensor for each weight. It is called with autograd on.

    Raises:
        TypeError: If the product cannot be called.

    Example:
        >>> curvature = torch.tensor([1.0, 3.0])  # of the loss (w_1^2 + 3 w_2^2) / 2
        >>> oracle = HessianCompensation(product=lambda weights, direction: [curvature * direction[0]])
        >>> then, now = [torch.tensor([1.0, 1.0])], [torch.tensor([0.5, 0.0])]
        >>> oracle.correct([curvature * then[0]], Late(read=0, applied=2, then=then, now=now), {})
        [tensor([0.5000, 0.0000])]

    Reference:
        Zheng et al. 2017, arXiv 1609.08326: the Taylor expansion that `DelayCompensation` approximates.
    """

    product: Product

    wants_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(self.product):
            raise TypeError(
                f"product={self.product!r}: give a function of (weights, direction) that returns H(weights) direction"
            )

    @torch.no_grad()
    def correct(self, gradients: Sequence[Tensor | None], late: Late, memory: dict[str, Any]) -> list[Tensor | None]:
        check_weights(gradients, late)
        places = present(gradients)
        if not places:
            return list(gradients)
        direction = list(torch._foreach_sub(list(late.now), list(late.then)))
        with torch.enable_grad():
            found = self.product(late.then, direction)
        if len(found) != len(gradients):
            raise ValueError(f"product returned {len(found)} tensors for {len(gradients)} weights: give one for each weight")
        return put_back(gradients, places, torch._foreach_add(wide(gradients, places), wide(found, places)))
