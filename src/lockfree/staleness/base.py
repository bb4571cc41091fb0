"""What a correction is: it repairs a gradient that comes late, whoever let it come late."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Late:
    r"""How late a gradient is: taken at the weights $w_{t-\tau}$, about to change $w_t$.

    Attributes:
        read: Version (number of updates) of the weights that it was taken at, 0 or more.
        applied: Version of the weights that it is about to change, ``read`` or more.
        then: The weights that it was taken at, one tensor for each gradient; may be left out where nobody wants them
            (`Correction.wants_weights`).
        now: The weights that it is about to change, in the same order and on the same device.

    Raises:
        ValueError: If a version is not a whole number, or the gradient is applied before it was taken.

    Example:
        >>> Late(read=3, applied=5).delay
        2
    """

    read: int
    applied: int
    then: Sequence[Tensor] = ()
    now: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        for name in ("read", "applied"):
            version = getattr(self, name)
            if isinstance(version, bool) or not isinstance(version, Integral) or version < 0:
                raise ValueError(f"{name}={version!r}: a version counts updates, give a whole number, 0 or more")
        if self.delay < 0:
            raise ValueError(f"a gradient taken at version {self.read} cannot change the earlier version {self.applied}")

    @property
    def delay(self) -> int:
        r"""$\tau$: updates between the weights that the gradient was taken at and those that it changes."""
        return self.applied - self.read


@dataclass(frozen=True, kw_only=True)
class Correction(ABC):
    r"""Turns a late gradient $g = \nabla L(w_{t-\tau})$ into one that suits the weights $w_t$. Its fields are its hyperparameters.

    A correction is mathematics alone. Whoever lets gradients come late (a delayed link, a parameter server) keeps the weights
    ``then`` and the correction's memory, and calls `correct` once for each gradient, on the gradient of the loss alone: weight
    decay and momentum come afterwards.

    Attributes:
        wants_weights: Whether `correct` looks at ``late.then``, which somebody must then have kept.
        looks_ahead: Whether gradients are to be taken at other weights than the present ones, which `ahead` returns.

    Example:
        >>> from lockfree.staleness import ScaleByDelay
        >>> correction, late = ScaleByDelay(), Late(read=3, applied=5)
        >>> correction.correct([torch.tensor([4.0]), None], late, correction.memory([]))
        [tensor([2.]), None]
    """

    wants_weights: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False

    def memory(self, weights: Sequence[Tensor]) -> dict[str, Any]:
        """Makes what `correct` remembers from gradient to gradient: plain data and tensors, ready for a checkpoint.

        Statistics of weights in low precision are kept in float32.

        Args:
            weights: The weights as they are before the first update.

        Returns:
            An empty dict if there is nothing to remember.
        """
        return {}

    def ahead(self, weights: Sequence[Tensor], step: Sequence[Tensor], *, delay: int) -> list[Tensor]:
        """Returns the weights that a gradient is to be taken at; the present ones, unless a correction `looks_ahead`.

        Args:
            weights: The present ones, which are not written to.
            step: What the last update has added to them.
            delay: How late the last gradient was of whoever will take it.
        """
        return list(weights)

    def overshoots(self, ratio: float) -> bool:
        r"""Whether a repair of this size, $\lVert\tilde g - g\rVert / \lVert g\rVert$, says that the repair has gone out of hand.

        Args:
            ratio: The size, 0 or more, or not a number.
        """
        return False

    @abstractmethod
    def correct(self, gradients: Sequence[Tensor | None], late: Late, memory: dict[str, Any]) -> list[Tensor | None]:
        """Repairs a gradient; nothing waits for an accelerator.

        Args:
            gradients: Gradient of the loss, a dense tensor of its weight's shape for each weight; ``None`` where there is none.
            late: How late it is.
            memory: What `memory` made, which is brought up to date in place. It may have come out of a checkpoint, on
                another device.

        Returns:
            The repaired gradient, of the same shapes and types, never written into the tensors given. What needs no repair is
            returned itself, and ``None`` stays ``None``.

        Raises:
            ValueError: If gradients, weights and memory do not belong to each other.
        """


# ---- what corrections are made with -------------------------------------------------------------------------------------------


def in_range(correction: Correction, name: str, accepts: Callable[[Any], bool], wanted: str) -> None:
    """Refuses a hyperparameter that is not a finite number in its range.

    Raises:
        ValueError: In one line that says what to give.
    """
    value = getattr(correction, name)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not accepts(value):
        raise ValueError(f"{type(correction).__name__}: {name}={value!r}, give {wanted}")


def check_weights(gradients: Sequence[Tensor | None], late: Late) -> None:
    """Refuses weights that are not those of the gradients; shapes that merely broadcast would give wrong numbers silently.

    Raises:
        ValueError: In one line that names the first pair that does not fit.
    """
    for name, weights in (("then", late.then), ("now", late.now)):
        if len(weights) != len(gradients):
            raise ValueError(
                f"{len(gradients)} gradients, {len(weights)} weights in `{name}`: give one weight for each gradient"
            )
        for place, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            if gradient is not None and gradient.shape != weight.shape:
                shapes = f"{tuple(gradient.shape)}, its weight in `{name}` {tuple(weight.shape)}"
                raise ValueError(f"gradient {place} has the shape {shapes}: give both in the same order")


def present(gradients: Sequence[Tensor | None]) -> list[int]:
    """Returns the places where there is a gradient."""
    return [place for place, gradient in enumerate(gradients) if gradient is not None]


def pick(tensors: Sequence[Any], places: Sequence[int]) -> list[Tensor]:
    """Returns the tensors at these places."""
    return [tensors[place] for place in places]


def wide(tensors: Sequence[Any], places: Sequence[int]) -> list[Tensor]:
    """Returns the tensors at these places in float32 or better: squares of half precision vanish or overflow."""
    return [one if one.dtype in (torch.float32, torch.float64) else one.float() for one in pick(tensors, places)]


def put_back(gradients: Sequence[Tensor | None], places: Sequence[int], repaired: Sequence[Tensor]) -> list[Tensor | None]:
    """Returns the gradients with the repaired ones in their places, in the type that each came in."""
    found = list(gradients)
    for place, tensor in zip(places, repaired, strict=True):
        found[place] = tensor.to(gradients[place].dtype)  # pyrefly: ignore[missing-attribute]
    return found


def finite_squares(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the squares, 0 where one is not finite: an average that has met infinity once would stay there."""
    squares = list(torch._foreach_mul(list(tensors), list(tensors)))
    for square in squares:
        square.nan_to_num_(nan=0.0, posinf=0.0)
    return squares


def statistics(weights: Sequence[Tensor]) -> list[Tensor]:
    """Returns zeros to gather a statistic of each weight in, in float32 or better."""
    return [torch.zeros_like(weight) for weight in wide([weight.detach() for weight in weights], range(len(weights)))]


def recall(memory: dict[str, Any], name: str, like: Sequence[Tensor | None]) -> list[Tensor]:
    """Returns the tensors that a memory holds under a name, and brings them to the device of what they belong to for good.

    Raises:
        ValueError: If the memory is somebody else's.
    """
    if len(memory.get(name, ())) != len(like):
        raise ValueError(
            f"the memory holds {len(memory.get(name, ()))} of {name!r} for {len(like)} gradients: make it by `memory`"
        )
    pairs = list(zip(memory[name], like, strict=True))
    if any(one is not None and kept.device != one.device for kept, one in pairs):
        memory[name] = [kept if one is None else kept.to(one.device) for kept, one in pairs]
    return memory[name]
