"""When a worker may go on: what is left of the barrier of synchronous data parallelism."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from lockfree.choose import choose


@dataclass(frozen=True)
class Consistency(ABC):
    r"""Says when a worker may read the weights, by clocks: a worker's clock c counts the gradients that were taken from it.

    Example:
        >>> BSP().may_pull(clock=1, slowest=0), ASP().may_pull(clock=9, slowest=0)
        (False, True)
    """

    @property
    @abstractmethod
    def barrier(self) -> bool:
        """Whether workers wait for each other after every step, so that one update takes a gradient of each."""

    @abstractmethod
    def may_pull(self, clock: int, slowest: int) -> bool:
        """Whether a worker may read the weights.

        Args:
            clock: Its clock, 0 or more.
            slowest: The smallest clock of the workers at work, its own among them.
        """


@dataclass(frozen=True)
class BSP(Consistency):
    r"""Bulk synchronous: nobody begins step c + 1 before everybody has done step c. This is the barrier lock.

    An update takes the mean gradient of a round, so M workers of batch b are one worker of batch Mb.

    Example:
        >>> BSP().may_pull(clock=1, slowest=1)
        True

    Reference:
        Valiant 1990, "A bridging model for parallel computation".
    """

    @property
    def barrier(self) -> bool:
        return True

    def may_pull(self, clock: int, slowest: int) -> bool:
        return clock <= slowest


@dataclass(frozen=True)
class SSP(Consistency):
    r"""Stale synchronous: a worker at clock c goes on iff the slowest is at c - s or later.

    So no worker is ever more than s + 1 gradients ahead of another (s when it begins one). Every gradient is an update, except with
    s = 0, which is `BSP`.

    Attributes:
        bound: s, 0 or more.

    Raises:
        ValueError: If the bound is not a whole number, 0 or more.

    Example:
        >>> SSP(2).may_pull(clock=2, slowest=0), SSP(2).may_pull(clock=3, slowest=0)
        (True, False)

    Reference:
        Ho et al. 2013, "More effective distributed ML via a stale synchronous parallel parameter server".
    """

    bound: int

    def __post_init__(self) -> None:
        if isinstance(self.bound, bool) or not isinstance(self.bound, int) or self.bound < 0:
            raise ValueError(f"SSP({self.bound!r}): give a whole number of steps that workers may be apart, 0 or more")

    @property
    def barrier(self) -> bool:
        return self.bound == 0

    def may_pull(self, clock: int, slowest: int) -> bool:
        return clock - self.bound <= slowest


@dataclass(frozen=True)
class ASP(Consistency):
    """Asynchronous: nobody waits for anybody, and every gradient is an update.

    Example:
        >>> ASP().barrier
        False

    Reference:
        Recht, Ré, Wright, Niu 2011, "Hogwild!"; Dean et al. 2012, "Large scale distributed deep networks".
    """

    @property
    def barrier(self) -> bool:
        return False

    def may_pull(self, clock: int, slowest: int) -> bool:
        return True


CONSISTENCIES: dict[str, Callable[..., Consistency]] = {"bsp": BSP, "ssp": SSP, "asp": ASP}
"""Every consistency by its command-line name."""


def consistency_from(text: str) -> Consistency:
    """Makes a consistency from its command-line name: ``"bsp"``, ``"asp"``, or ``"ssp:3"`` with the bound.

    Raises:
        ValueError: If there is no such consistency (the nearest name is given), or the bound is missing, superfluous or wrong.

    Example:
        >>> consistency_from("ssp:3")
        SSP(bound=3)
    """
    name, colon, number = text.partition(":")
    make = choose(CONSISTENCIES, name, "consistency")
    if make is not SSP:
        if colon:
            raise ValueError(f"{text!r}: {name} takes no number, write {name!r}")
        return make()
    if not number.isdecimal():
        raise ValueError(f"{text!r}: give ssp the steps that workers may be apart, 0 or more, as in 'ssp:3'")
    return SSP(int(number))
