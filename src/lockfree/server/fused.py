"""Plain SGD with delay compensation in one pass over the weights, in pieces that stay in the processor's cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lockfree.server.descent import Descent, Effect, OptimizerDescent
from lockfree.staleness import Correction, DelayCompensation, Late

PIECE = 1 << 17
"""Numbers in a piece: few enough for the cache, enough for an operation to be worth its call."""


class _Piece(NamedTuple):
    """The same stretch of everything that a push touches."""

    g: Tensor
    now: Tensor
    then: Tensor
    made: Tensor
    mean_square: Tensor | None


class CompensatedDescent(Descent):
    r"""What `OptimizerDescent` does for plain SGD and `DelayCompensation`, moving each number once.

    $$w_{t+1} = w_t - \eta\,(g + \lambda\, g \odot g \odot (w_t - w_{t-\tau}))$$

    Done operation by operation, that is some ten passes over memory, and memory is what it waits for. Here all is done to a piece while
    it is in the cache. Whether the term is too long (`DelayCompensation.cap`) is known at the end alone: only if it is, a second
    pass shortens it.

    Args:
        general: Does everything that is not plain, and holds optimizer, schedule and patience.
        correction: The compensation.
    """

    def __init__(self, general: OptimizerDescent, correction: DelayCompensation) -> None:
        self._general, self._correction = general, correction
        self.optimizer = general.optimizer

    @staticmethod
    def of(general: OptimizerDescent, weights: Sequence[Tensor], correction: Correction, clip: float | None) -> Descent:
        """Returns the faster way where it serves, else the general one."""
        if CompensatedDescent.serves(weights, general.optimizer, correction, clip):
            assert isinstance(correction, DelayCompensation)
            return CompensatedDescent(general, correction)
        return general

    @staticmethod
    def serves(weights: Sequence[Tensor], optimizer: torch.optim.Optimizer, correction: Correction, clip: float | None) -> bool:
        """Whether this is how gradients make the next version."""
        if type(correction) is not DelayCompensation or type(optimizer) is not torch.optim.SGD or clip is not None:
            return False
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return False
        options = ("momentum", "weight_decay", "nesterov", "maximize", "dampening")
        plain = len(optimizer.param_groups) == 1 and not any(optimizer.param_groups[0][name] for name in options)
        return plain and all(w.device.type == "cpu" and w.dtype in _SERVED and w.is_contiguous() for w in weights)

    def memory(self, weights: Sequence[Tensor]) -> dict[str, Any]:
        """Makes what the correction remembers, from the first weights."""
        return self._general.memory(weights)

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
        if self._general.fell_back or any(g is None or not g.is_contiguous() for g in gradients):
            return self._general.apply(gradients, late, memory, room, measure=measure)
        made = room()
        # The present weights may be the room for the next ones; if they are to be read again they must stay for so long.
        apart = made is late.now and late.then is not late.now
        target = [torch.empty_like(weight) for weight in late.now] if apart else made
        squares = memory.get("mean_square", [None] * len(late.now))
        pieces = list(_pieces(gradients, late, target, squares))
        rate, strength = self.optimizer.param_groups[0]["lr"], self._correction.lambda_0
        length, excess, gap = _pass(pieces, self._correction, rate, strength, measure=measure)
        factor = self._correction.shortened(length, strength * excess)
        if factor < 1:
            _shorten(pieces, self._correction, rate, strength * factor)
        if apart:
            torch._foreach_copy_(made, target)
        self._general.tick()  # there are no gradients on its parameters: it moves nothing
        ratio = factor * strength * excess / length if length else 0.0
        fell_back = self._general.judged(ratio)
        return Effect(made, gap if measure else None, ratio if measure or fell_back else None, fell_back)

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of what changes with updates."""
        return self._general.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self._general.load_state_dict(state)


_SERVED = (torch.float32, torch.float64)


def _pieces(
    gradients: Sequence[Tensor | None], late: Late, made: Sequence[Tensor], squares: Sequence[Tensor | None]
) -> Iterator[_Piece]:
    for g, now, then, out, square in zip(gradients, late.now, late.then, made, squares, strict=True):
        assert g is not None, "looked at before"
        flat = [one.view(-1) for one in (g, now, then, out)]
        parts = zip(*(one.split(PIECE) for one in flat), strict=True)
        others = [None] * -(-max(g.numel(), 1) // PIECE) if square is None else square.view(-1).split(PIECE)
        for (a, b, c, d), other in zip(parts, others, strict=True):
            yield _Piece(a, b, c, d, other)


class _Room:
    """Memory for what is worked out of a piece, made once: to ask the system for it takes longer than to fill it."""

    def __init__(self, like: Tensor) -> None:
        self._whole = [like.new_empty(PIECE) for _ in range(3)]
        self._parts = {PIECE: self._whole}

    def of(self, size: int) -> list[Tensor]:
        """Returns three stretches of a length."""
        if size not in self._parts:
            self._parts[size] = [one[:size] for one in self._whole]
        return self._parts[size]


def _pass(
    pieces: Sequence[_Piece], correction: DelayCompensation, rate: float, strength: float, *, measure: bool
) -> tuple[float, float, float]:
    """Takes the step with the whole term; returns the norms of the gradient, of the term without its strength, and of the gap."""
    length = excess = gap = 0.0
    kept, rooms = 1 - correction.decay, dict[torch.dtype, _Room]()
    for g, now, then, made, mean_square in pieces:
        if g.dtype not in rooms:
            rooms[g.dtype] = _Room(g)
        square, term, root = rooms[g.dtype].of(g.numel())
        torch.mul(g, g, out=square)
        length += (size := torch.dot(g, g).item())
        if not math.isfinite(size):
            square.nan_to_num_(nan=0.0, posinf=0.0)
        torch.sub(now, then, out=term)
        if measure:
            gap += torch.dot(term, term).item()
        term.mul_(square)
        if mean_square is not None:
            mean_square.lerp_(square, kept)
            term.mul_(torch.add(mean_square, correction.eps, out=root).rsqrt_())
        size = torch.dot(term, term).item()
        if not math.isfinite(size):
            term.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            size = torch.dot(term, term).item()
        excess += size
        torch.add(now, g, alpha=-rate, out=made)
        made.add_(term, alpha=-rate * strength)
    return math.sqrt(length), math.sqrt(excess), math.sqrt(gap)


def _shorten(pieces: Sequence[_Piece], correction: DelayCompensation, rate: float, strength: float) -> None:
    """Takes the step again, with a shorter term."""
    for g, now, then, made, mean_square in pieces:
        term = (now - then).mul_((g * g).nan_to_num_(nan=0.0, posinf=0.0))
        if mean_square is not None:
            term.mul_((mean_square + correction.eps).rsqrt_())
        term.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        torch.add(now, g, alpha=-rate, out=made)
        made.add_(term, alpha=-rate * strength)
