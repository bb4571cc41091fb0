"""Late gradients: how late one may be, how late it is, and what repairs it.

The same corrections serve a delayed link and a parameter server.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from lockfree.choose import choose
from lockfree.staleness.base import Correction, Late
from lockfree.staleness.compensation import DelayCompensation, HessianCompensation
from lockfree.staleness.consistency import ASP, BSP, CONSISTENCIES, SSP, Consistency, consistency_from
from lockfree.staleness.corrections import AdaDelay, DropStale, GapAware, NoCorrection, ScaleByDelay
from lockfree.staleness.prediction import WeightPrediction

CORRECTIONS: dict[str, Callable[..., Correction]] = {
    "none": NoCorrection,
    "scale": ScaleByDelay,
    "adadelay": AdaDelay,
    "dc-constant": partial(DelayCompensation, adaptive=False),
    "dc-adaptive": DelayCompensation,
    "gap-aware": GapAware,
    "drop": DropStale,
    "predict": WeightPrediction,
}
"""Every correction by its command-line name, each made without arguments or with its fields."""


def correction_from(text: str) -> Correction:
    """Makes a correction from its command-line name, and a number for its first field where one is given.

    Args:
        text: A name of `CORRECTIONS`, alone or as in ``"drop:8"`` (bound), ``"dc-adaptive:4"`` (strength), ``"adadelay:10"``
            (smoothness), ``"gap-aware:0.99"`` (decay).

    Raises:
        ValueError: If there is no such correction (the nearest name is given), or it takes no such number.

    Example:
        >>> correction_from("drop:8")
        DropStale(bound=8)
        >>> correction_from("dc-constant").adaptive
        False
    """
    name, colon, number = text.partition(":")
    make = choose(CORRECTIONS, name, "correction")
    if not colon:
        return make()
    dials = fields(make())
    if not dials:
        raise ValueError(f"{text!r}: {name} takes no number, write {name!r}")
    return make(**{dials[0].name: _number(text, number)})


def _number(text: str, number: str) -> Any:
    """Reads a whole number as such, since some fields count."""
    for read in (int, float):
        try:
            return read(number)
        except ValueError:
            continue
    raise ValueError(f"{text!r}: {number!r} is no number, write as in 'drop:8'")


__all__ = [
    "ASP",
    "BSP",
    "CONSISTENCIES",
    "CORRECTIONS",
    "SSP",
    "AdaDelay",
    "Consistency",
    "Correction",
    "DelayCompensation",
    "DropStale",
    "GapAware",
    "HessianCompensation",
    "Late",
    "NoCorrection",
    "ScaleByDelay",
    "WeightPrediction",
    "consistency_from",
    "correction_from",
]
