"""Corrections that make a late gradient smaller, or leave it out; what adds something to it is in `compensation`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

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


@dataclass(frozen=True, kw_only=True)
class NoCorrection(Correction):
    r"""Takes a late gradient as it is: $\tilde g = g$.

    This is plain asynchronous descent, the baseline.

    Example:
        >>> NoCorrection().correct([torch.ones(2)], Late(read=0, applied=4), {})
        [tensor([1., 1.])]
    """

    def correct(self, gradients: Sequence[Tensor | None], late: Late, memory: dict[str, Any]) -> list[Tensor | None]:
        return list(gradients)


@dataclass(frozen=True, kw_only=True)
class ScaleByDelay(Correction):
    r"""Divides a gradient by its delay: $\tilde g = g / \max(1, \tau)$.

    With plain SGD this is a learning rate divided by the delay. A gradient of delay 0 or 1 is taken as it is.

    Example:
        >>> ScaleByDelay().correct([torch.ones(2)], Late(read=0, applied=4), {})
        [tensor([0.2500, 0.2500])]

    Reference:
        Zhang, Gupta, Lian, Liu 2016, "Staleness-aware async-SGD for distributed deep learning", arXiv 1511.05950.
    """

    def correct(self, gradients: Sequence[Tensor | None], late: Late, memory: dict[str, Any]) -> list[Tensor | None]:
        places = present(gradients)
        if late.delay <= 1 or not places:
            return list(gradients)
        return put_back(gradients, places, torch._foreach_div(pick(gradients, places), float(late.delay)))


@dataclass(frozen=True, kw_only=True)
class DropStale(Correction):
    r"""Ignores gradients that are too late: $\tilde g = g$ if $\tau < R$, else there is none.

    A gradient that is ignored comes back as ``None`` everywhere. It should make no update: neither the version nor a momentum
    moves. M workers of equal speed have delays of about M - 1, so a bound below M ignores most of what they do.

    Attributes:
        bound: R, the least delay that is ignored, 1 or more. The default is twice the delay of eight equal workers, rounded up.

    Raises:
        ValueError: If the bound is not a whole number, 1 or more.

    Example:
        >>> DropStale(bound=4).correct([torch.ones(2)], Late(read=0, applied=4), {})
        [None]

    Reference:
        Maranjyan, Tyurin, Richtárik 2025, "Ringmaster ASGD", arXiv 2501.16168; R is its delay threshold.
    """

    bound: int = 16

    def __post_init__(self) -> None:
        in_range(self, "bound", lambda bound: bound == int(bound) >= 1, "a whole number of updates, 1 or more")

    def correct(self, gradients: Sequence[Tensor | None], late: Late, memory: dict[str, Any]) -> list[Tensor | None]:
        return list(gradients) if late.delay < self.bound else [None] * len(gradients)


@dataclass(frozen=True, kw_only=True)
class AdaDelay(Correction):
    r"""Gives each coordinate a step that falls with its gradients and their delays.

    $$\tilde g_j = \frac{g_j}{L + c_j\sqrt{t + \tau}}, \qquad
    c_j^2 = \frac1t \sum_{s=1}^t \frac{s}{s + \tau_s}\, g_{s,j}^2$$

    t counts the gradients, the present one included. The formula is as remembered, not checked against the paper. It is a step
    size, not a repair: it divides also a gradient that is not late (at $\tau = 0$ throughout it is AdaGrad, with L instead of its
    small constant). So it wants plain SGD after it, with a constant learning rate, 1 for the formula as it stands. Squares that
    are not finite count as 0.

    Attributes:
        smoothness: L, how fast the loss's gradient changes with the weights, above 0.

    Raises:
        ValueError: If the smoothness is not above 0.

    Example:
        >>> correction, weights = AdaDelay(smoothness=1.0), [torch.zeros(2)]
        >>> correction.correct([torch.tensor([3.0, 0.0])], Late(read=0, applied=0, now=weights), correction.memory(weights))
        [tensor([0.7500, 0.0000])]

    Reference:
        Sra, Yu, Li, Smola 2015, "AdaDelay: delay adaptive distributed stochastic convex optimization", arXiv 1508.05003; its
        practical step size for each coordinate. As remembered, not checked.
    """

    smoothness: float | int = 1.0

    def __post_init__(self) -> None:
        in_range(self, "smoothness", lambda smoothness: smoothness > 0, "a number above 0")

    def memory(self, weights: Sequence[Tensor]) -> dict[str, Any]:
        return {"count": 0, "squares": statistics(weights)}

    @torch.no_grad()
    def correct(self, gradients: Sequence[Tensor | None], late: Late, memory: dict[str, Any]) -> list[Tensor | None]:
        sums, places = recall(memory, "squares", gradients), present(gradients)
        memory["count"] = t = memory["count"] + 1
        if not places:
            return list(gradients)
        g, sums = wide(gradients, places), pick(sums, places)
        torch._foreach_add_(sums, finite_squares(g), alpha=t / (t + late.delay))
        divisors = torch._foreach_mul(sums, (t + late.delay) / t)
        torch._foreach_sqrt_(divisors)
        torch._foreach_add_(divisors, float(self.smoothness))
        return put_back(gradients, places, torch._foreach_div(g, divisors))


@dataclass(frozen=True, kw_only=True)
class GapAware(Correction):
    r"""Divides each coordinate by how far its weight has moved meanwhile, in steps of usual size.

    $$\tilde g_j = \frac{g_j}{1 + |w_{t,j} - w_{t-\tau,j}| / \bar s_j}, \qquad
    \bar s_j^2 = \frac{1}{1 - \gamma^t}\sum_{s=1}^{t} (1 - \gamma)\,\gamma^{t-s}\,(w_{s,j} - w_{s-1,j})^2$$

    The average step $\bar s$ is the root of a running mean of squares of the steps that the weights really took, whatever optimizer
    took them, up to the present weights. It is measured here, from one call to the next, so it costs a copy of the weights. If
    versions have passed unseen, each counts as an equal part of the way. Until a step has been measured there is no penalty;
    afterwards, a coordinate that has moved but of which no step was measured gets a gradient of 0. The memory belongs to the
    weights, so workers share one.

    Attributes:
        decay: $\gamma$, what an update keeps of the mean, from 0 to below 1.

    Raises:
        ValueError: If the decay is out of range.

    Example:
        >>> correction, w = GapAware(), [torch.tensor([0.0]), torch.tensor([0.5])]
        >>> memory = correction.memory(w[:1])
        >>> correction.correct([torch.ones(1)], Late(read=0, applied=0, then=w[:1], now=w[:1]), memory)
        [tensor([1.])]
        >>> correction.correct([torch.ones(1)], Late(read=0, applied=1, then=w[:1], now=w[1:]), memory)  # late by a usual step
        [tensor([0.5000])]

    Reference:
        Barkai, Hakimi, Schuster 2019, "Gap aware mitigation of gradient staleness", arXiv 1909.10802. How the average step is
        kept is a choice made here: steps are measured instead of derived from learning rate and momentum. Weight decay, added
        afterwards, is not divided.
    """

    decay: float | int = 0.999

    wants_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        in_range(self, "decay", lambda decay: 0 <= decay < 1, "a number from 0 to below 1")

    def memory(self, weights: Sequence[Tensor]) -> dict[str, Any]:
        before = [weight.detach().clone() for weight in weights]
        return {"version": None, "measured": 0, "before": before, "squares": statistics(weights)}

    @torch.no_grad()
    def correct(self, gradients: Sequence[Tensor | None], late: Late, memory: dict[str, Any]) -> list[Tensor | None]:
        check_weights(gradients, late)
        if gradients:
            self._measure(late, memory)
        places = present(gradients)
        if not memory["measured"] or not places:
            return list(gradients)
        squares = recall(memory, "squares", late.now)
        steps = torch._foreach_div(pick(squares, places), 1 - self.decay ** memory["measured"])
        torch._foreach_sqrt_(steps)
        torch._foreach_clamp_min_(steps, torch.finfo(torch.float32).tiny)  # so that no way over no step is no gap
        penalties = torch._foreach_sub(wide(late.now, places), wide(late.then, places))
        torch._foreach_abs_(penalties)
        torch._foreach_div_(penalties, steps)
        torch._foreach_add_(penalties, 1.0)
        return put_back(gradients, places, torch._foreach_div(wide(gradients, places), penalties))

    def _measure(self, late: Late, memory: dict[str, Any]) -> None:
        """Takes the way since the last call into the running mean."""
        before, squares = recall(memory, "before", late.now), recall(memory, "squares", late.now)
        known = memory["version"]
        passed = 0 if known is None else late.applied - known
        if passed > 0:
            every = range(len(before))
            ways = torch._foreach_sub(wide(late.now, every), wide(before, every))
            torch._foreach_div_(ways, float(passed))
            torch._foreach_lerp_(squares, finite_squares(ways), 1 - self.decay**passed)
        if passed > 0 or known is None:
            torch._foreach_copy_(before, list(late.now))
            memory["version"], memory["measured"] = late.applied, memory["measured"] + passed
