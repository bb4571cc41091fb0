"""How long a simulated worker takes for a batch."""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real


@dataclass(frozen=True, kw_only=True)
class Duration(ABC):
    """The time from a worker's pull to its push.

    Example:
        >>> Constant(mean=2.0).draw(random.Random(0))
        2.0
    """

    @abstractmethod
    def draw(self, generator: random.Random) -> float:
        """Returns the time of one batch in seconds, above 0.

        Args:
            generator: The worker's own; the only place where chance comes from.
        """

    def _check(self, name: str) -> None:
        value = getattr(self, name)
        if not _positive(value):
            raise ValueError(f"{type(self).__name__}: {name}={value!r}, give a number above 0")


@dataclass(frozen=True, kw_only=True)
class Constant(Duration):
    """The same for every batch.

    Attributes:
        mean: The time in seconds, above 0.

    Raises:
        ValueError: If it is not above 0.
    """

    mean: float | int = 1.0

    def __post_init__(self) -> None:
        self._check("mean")

    def draw(self, generator: random.Random) -> float:
        """Returns the time of one batch in seconds."""
        return float(self.mean)


@dataclass(frozen=True, kw_only=True)
class Gamma(Duration):
    r"""Gamma distributed: with shape k and mean $\mu$, of standard deviation $\mu/\sqrt k$.

    Attributes:
        shape: k, above 0.
        mean: $\mu$ in seconds, above 0.

    Raises:
        ValueError: If one is not above 0.
    """

    shape: float | int = 16.0
    mean: float | int = 1.0

    def __post_init__(self) -> None:
        self._check("shape")
        self._check("mean")

    def draw(self, generator: random.Random) -> float:
        """Returns the time of one batch in seconds."""
        return max(generator.gammavariate(self.shape, self.mean / self.shape), 1e-12)


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A worker that is slower than the others.

    Attributes:
        worker: Its number, 0 or more.
        factor: How many times as long it takes, above 0.

    Raises:
        ValueError: If a number is out of range.
    """

    worker: int
    factor: float | int

    def __post_init__(self) -> None:
        if isinstance(self.worker, bool) or not isinstance(self.worker, int) or self.worker < 0:
            raise ValueError(f"Straggler: worker={self.worker!r}, give a whole number, 0 or more")
        if not _positive(self.factor):
            raise ValueError(f"Straggler: factor={self.factor!r}, give a number above 0")


Speeds = Duration | float | int | Sequence[Duration | float | int]
"""What workers are like: all alike, or one after the other. A number is a speed, in batches a second."""


def durations(speeds: Speeds, stragglers: Sequence[Straggler], workers: int) -> list[tuple[Duration, float]]:
    """Returns for each worker how long it takes, and how many times as long as that.

    Raises:
        ValueError: If there is not one speed for each worker, or one is no speed.

    Example:
        >>> durations([2.0, Gamma()], [Straggler(worker=1, factor=3)], workers=2)
        [(Constant(mean=0.5), 1.0), (Gamma(shape=16.0, mean=1.0), 3.0)]
    """
    each = list(speeds) if isinstance(speeds, Sequence) else [speeds] * workers
    if len(each) != workers:
        raise ValueError(f"{len(each)} speeds for {workers} workers: give one for each, or one for all")
    factors = [1.0] * workers
    for straggler in stragglers:
        if straggler.worker >= workers:
            raise ValueError(f"{straggler} is none of the {workers} workers, whose numbers begin at 0")
        factors[straggler.worker] *= straggler.factor
    return list(zip(map(_duration, each), factors, strict=True))


def _duration(speed: object) -> Duration:
    if isinstance(speed, Duration):
        return speed
    if not _positive(speed):
        raise ValueError(f"speed {speed!r}: give batches a second, above 0, or a Duration such as Gamma(shape=16, mean=1)")
    return Constant(mean=1.0 / float(speed))  # pyrefly: ignore[bad-argument-type]


def _positive(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
