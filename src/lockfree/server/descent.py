"""How a gradient makes the next version of the weights."""

import copy
import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lockfree.staleness import Correction, Late, NoCorrection

log = logging.getLogger(__name__)

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer of parameters."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What became of a gradient.

    Attributes:
        weights: The next version's; ``None`` if the correction has left the gradient out.
        gap: Distance between the weights that it was taken at and those that it changed, where it was measured.
        ratio: Size of the repair relative to the gradient, where it was measured.
        fell_back: Whether with this gradient the correction was given up.
    """

    weights: list[Tensor] | None
    gap: float | None = None
    ratio: float | None = None
    fell_back: bool = False


class Descent(ABC):
    """How a gradient makes the next version: clipping, correction, the optimizer's step.

    It owns everything that changes with an update but the weights themselves, so another way to the same numbers (one pass over all
    of it, say) is another `Descent`.
    """

    @abstractmethod
    def memory(self, weights: Sequence[Tensor]) -> dict[str, Any]:
        """Makes what the correction remembers, from the first weights."""

    @abstractmethod
    def apply(
        self,
        gradients: Sequence[Tensor | None],
        late: Late,
        memory: dict[str, Any],
        room: Callable[[], list[Tensor]],
        *,
        measure: bool,
    ) -> Effect:
        """Makes the next version.

        Args:
            gradients: Finite, of the weights' shapes and types; they are not written to.
            late: How late they are, with the weights then and now; those are not written to, unless ``room`` returns the present ones.
            memory: What `memory` made, of the worker or of all.
            room: Returns the memory that the next version is written to, perhaps that of the present one. Called at most once, and
                only if there is a next version.
            measure: Whether to measure gap and ratio; it may measure more often.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of what changes with updates."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""


class OptimizerDescent(Descent):
    r"""Clips and corrects, then lets any PyTorch optimizer step parameters whose memory is the next version's.

    Where the correction's repair is out of hand (`Correction.overshoots`) for some gradients in a row it is given up for good. Its size
    is measured now and then, and at each gradient from the first one out of hand to the next one that is not.

    Args:
        weights: The first ones.
        optimizer: Makes the optimizer.
        correction: Repairs gradients that come late.
        clip: c, gradients are shortened to $\lVert g\rVert \le c$ before they are corrected; ``None``: whatever their norm.
        schedule: Makes a learning-rate schedule of the optimizer, which is stepped after each update.
        patience: For how many gradients in a row the repair may be out of hand, 1 or more.

    Attributes:
        optimizer: The optimizer.
        fell_back: Whether the correction was given up.

    Raises:
        ValueError: If the optimizer wants to evaluate the loss itself, or a number is out of range.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        optimizer: OptimizerFactory,
        correction: Correction,
        clip: float | None = None,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        patience: int = 20,
    ) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"clip={clip!r}: give a norm above 0, or None")
        if patience < 1:
            raise ValueError(f"patience={patience!r}: give a number of gradients in a row, 1 or more")
        self._parameters = [
            nn.Parameter(weight) for weight in weights
        ]  # the optimizer's own, in the memory of the present version
        self._memory_of: Sequence[Tensor] | None = None
        self.optimizer = optimizer(self._parameters)
        closure = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"{type(self.optimizer).__name__} evaluates the loss itself: give an optimizer that steps on gradients"
            )
        self._schedule = None if schedule is None else schedule(self.optimizer)
        self._given = self._correction = correction
        self._clip, self._patience = clip, patience
        self._overshot = 0  # gradients in a row
        self.fell_back = False

    def memory(self, weights: Sequence[Tensor]) -> dict[str, Any]:
        """Makes what the correction remembers, from the first weights."""
        return self._correction.memory(weights)

    @torch.no_grad()
    def apply(
        self,
        gradients: Sequence[Tensor | None],
        late: Late,
        memory: dict[str, Any],
        room: Callable[[], list[Tensor]],
        *,
        measure: bool,
    ) -> Effect:
        """Makes the next version."""
        clipped = gradients if self._clip is None else _clipped(gradients, self._clip)
        repaired = self._correction.correct(clipped, late, memory)
        if all(gradient is None for gradient in repaired) and any(gradient is not None for gradient in clipped):
            return Effect(None)
        gap = ratio = None
        if measure or self._overshot:
            gap = 0.0 if late.then is late.now else _norm(torch._foreach_sub(list(late.now), list(late.then)))
            ratio = _ratio(clipped, repaired)
        weights = room()
        self._step(repaired, late.now, weights)
        return Effect(weights, gap, ratio, self.judged(ratio))

    def judged(self, ratio: float | None) -> bool:
        """Gives the correction up if its repair has been out of hand too often, and says whether it has done so now.

        Args:
            ratio: Size of the repair, relative to the gradient; ``None``: not measured.
        """
        if ratio is not None:
            self._overshot = self._overshot + 1 if self._correction.overshoots(ratio) else 0
        gives_up = self._overshot >= self._patience
        if gives_up:
            self._fall_back()
        return gives_up

    def _step(self, gradients: Sequence[Tensor | None], now: Sequence[Tensor], weights: list[Tensor]) -> None:
        if weights is not now:
            torch._foreach_copy_(weights, list(now))
        if weights is not self._memory_of:
            for parameter, weight in zip(self._parameters, weights, strict=True):
                parameter.data = weight
            self._memory_of = weights
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self.tick()
        for parameter in self._parameters:
            parameter.grad = None

    def tick(self) -> None:
        """Lets the optimizer step on what gradients there are, and the schedule count a step."""
        self.optimizer.step()
        if self._schedule is not None:
            self._schedule.step()

    def _fall_back(self) -> None:
        log.warning("%r has been out of hand for %d gradients in a row: going on without", self._correction, self._patience)
        self._correction, self._overshot, self.fell_back = NoCorrection(), 0, True

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of what changes with updates."""
        return {
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "schedule": None if self._schedule is None else copy.deepcopy(self._schedule.state_dict()),
            "overshot": self._overshot,
            "fell_back": self.fell_back,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self._schedule is not None:
            self._schedule.load_state_dict(copy.deepcopy(state["schedule"]))
        self._overshot, self.fell_back, self._memory_of = state["overshot"], state["fell_back"], None
        self._correction = NoCorrection() if self.fell_back else self._given


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no entry is infinite or not a number: one reduction, and a look at each entry only where it overflows.

    Example:
        >>> all_finite([torch.ones(2)]), all_finite([torch.tensor([1.0, float("nan")])])
        (True, False)
    """
    kinds = {tensor.dtype for tensor in tensors}
    for kind in kinds:
        same = [tensor for tensor in tensors if tensor.dtype == kind]
        norms = torch._foreach_norm(same, dtype=torch.float32 if kind.itemsize < 4 else None)
        if not math.isfinite(torch.stack(norms).sum()) and not all(bool(tensor.isfinite().all()) for tensor in same):
            return False
    return True


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(get_total_norm(list(tensors))) if tensors else 0.0


def _clipped(gradients: Sequence[Tensor | None], clip: float) -> list[Tensor | None]:
    """Shortens as `torch.nn.utils.clip_grad_norm_` does, but in memory of its own."""
    present = _present(gradients)
    factor = (clip / (get_total_norm(present) + 1e-6)).clamp(max=1.0)
    shortened = iter(torch._foreach_mul(present, factor))
    return [None if gradient is None else next(shortened) for gradient in gradients]


def _ratio(gradients: Sequence[Tensor | None], repaired: Sequence[Tensor | None]) -> float:
    pairs = [(g, r) for g, r in zip(gradients, repaired, strict=True) if g is not None and r is not None and g is not r]
    if not pairs:
        return 0.0
    change = _norm(torch._foreach_sub([r for _, r in pairs], [g for g, _ in pairs]))
    whole = _norm(_present(gradients))
    return change / whole if whole else math.inf if change else 0.0
