"""Plain SGD with delay compensation in one pass over the weights, in pieces that stay in the processor's cache."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lockfree.server.descent import Descent, Effect, OptimizerDescent
from lockfree.staleness import Correction, DelayCompensation, Late

PIECE = 1 << 17
"""Numbers in a piece: few enough for the cache, enough for an operation to be worth its call."""


class Piece(NamedTuple):
    """The same stretch of everything that a push touches: contiguous tensors of one dimension and one type."""

    g: Tensor
    now: Tensor
    then: Tensor
    made: Tensor
    mean_square: Tensor | None


class Step(NamedTuple):
    r"""What is done to a piece.

    Attributes:
        rate: $\eta$.
        strength: $\lambda_0$.
        kept: 1 - m, how much the mean square takes of a square.
        eps: $\epsilon$.
    """

    rate: float
    strength: float
    kept: float
    eps: float


class Sums(NamedTuple):
    """Squared norms that a step has come by: of the gradient, of the term without its strength, of the gap."""

    length: float = 0.0
    excess: float = 0.0
    gap: float = 0.0

    @staticmethod
    def of(parts: Iterable["Sums"]) -> "Sums":
        """Adds them up in their order."""
        length = excess = gap = 0.0
        for part in parts:
            length, excess, gap = length + part.length, excess + part.excess, gap + part.gap
        return Sums(length, excess, gap)


Sweep = Callable[[Sequence[Piece], Step], Sums]
"""Takes a step on all pieces."""


def fastest() -> Sweep:
    """Returns the compiled loop where numba is installed, else `by_operations`; they agree up to rounding."""
    try:
        from lockfree.server.kernel import sweep
    except ImportError:
        return by_operations
    return sweep


class CompensatedDescent(Descent):
    r"""What `OptimizerDescent` does for plain SGD and `DelayCompensation`, moving each number once.

    $$w_{t+1} = w_t - \eta\,(g + \lambda\, g \odot g \odot (w_t - w_{t-\tau}))$$

    Done operation by operation, that is some ten passes over memory, and memory is what it waits for. Here each number comes by once:
    in a compiled loop where there is one (`kernel.py`), else in pieces that stay in the cache. Whether the term is too long
    (`DelayCompensation.cap`) is known at the end alone: only if it is, a second pass takes back the rest of it.

    Args:
        general: Does everything that is not plain, and holds optimizer, schedule and patience.
        correction: The compensation.
    """

    def __init__(self, general: OptimizerDescent, correction: DelayCompensation) -> None:
        self._general, self._correction, self._sweep = general, correction, fastest()
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
        if self._general.fell_back or not all(map(_plain, gradients)):
            return self._general.apply(gradients, late, memory, room, measure=measure)
        # It may be in the memory of the weights then, of which nothing may be left after the first pass.
        made = room()
        # The present weights may be the room for the next ones; if they are to be read again they must stay for so long.
        apart = made is late.now and late.then is not late.now
        target = [torch.empty_like(weight) for weight in late.now] if apart else made
        squares = memory.get("mean_square", [None] * len(late.now))
        pieces = list(_pieces(gradients, late, target, squares))
        correction = self._correction
        step = Step(float(self.optimizer.param_groups[0]["lr"]), correction.lambda_0, 1.0 - correction.decay, correction.eps)
        length, excess, gap = map(math.sqrt, self._sweep(pieces, step))
        excess *= step.strength
        factor = correction.shortened(length, excess)
        if factor < 1:
            _shorten(pieces, step.rate, factor)
        if apart:
            torch._foreach_copy_(made, target)
        self._general.tick()  # there are no gradients on its parameters: it moves nothing
        ratio = factor * excess / length if length else 0.0
        fell_back = self._general.judged(ratio)
        return Effect(made, gap if measure else None, ratio if measure or fell_back else None, fell_back)

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of what changes with updates."""
        return self._general.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self._general.load_state_dict(state)


_SERVED = (torch.float32, torch.float64)


def _plain(gradient: Tensor | None) -> bool:
    """Whether it lies in memory number by number."""
    return gradient is not None and gradient.is_contiguous() and gradient.data_ptr() % gradient.itemsize == 0


def _pieces(
    gradients: Sequence[Tensor | None], late: Late, made: Sequence[Tensor], squares: Sequence[Tensor | None]
) -> Iterator[Piece]:
    for g, now, then, out, square in zip(gradients, late.now, late.then, made, squares, strict=True):
        assert g is not None, "looked at before"
        flat = [one.view(-1) for one in (g, now, then, out)]
        parts = zip(*(one.split(PIECE) for one in flat), strict=True)
        others = [None] * -(-max(g.numel(), 1) // PIECE) if square is None else square.view(-1).split(PIECE)
        for (a, b, c, d), other in zip(parts, others, strict=True):
            yield Piece(a, b, c, d, other)


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


def by_operations(pieces: Sequence[Piece], step: Step) -> Sums:
    """Takes the step by PyTorch's operations on pieces that stay in the cache."""
    rooms, found = dict[torch.dtype, _Room](), []
    for g, now, then, made, mean_square in pieces:
        if g.dtype not in rooms:
            rooms[g.dtype] = _Room(g)
        square, term, root = rooms[g.dtype].of(g.numel())
        torch.mul(g, g, out=square)
        length = torch.dot(g, g).item()
        if not math.isfinite(length):
            square.nan_to_num_(nan=0.0, posinf=0.0)
        torch.sub(now, then, out=term)
        gap = torch.dot(term, term).item()
        term.mul_(square)
        if mean_square is not None:
            mean_square.lerp_(square, step.kept)
            term.div_(torch.add(mean_square, step.eps, out=root).sqrt_())
        excess = torch.dot(term, term).item()
        if not math.isfinite(excess):
            term.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            excess = torch.dot(term, term).item()
        torch.add(now, g, alpha=-step.rate, out=made)
        made.add_(term, alpha=-step.rate * step.strength)
        found.append(Sums(length, excess, gap))
    return Sums.of(found)


def _shorten(pieces: Sequence[Piece], rate: float, factor: float) -> None:
    """Goes so far back to where the step leads without the term; the weights then may be gone."""
    for g, now, _, made, _ in pieces:
        plain = torch.add(now, g, alpha=-rate)
        if factor:
            torch.lerp(plain, made, factor, out=made)
        else:
            made.copy_(plain)
