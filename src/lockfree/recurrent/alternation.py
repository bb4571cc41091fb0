"""Cycles of real and of synthetic gradients in turn, and the warm restarts that part them."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lockfree.choose import choose
from lockfree.recurrent.bootstrap import Bootstrap, Border, Estimator, Report, Site
from lockfree.recurrent.coordinatewise import CoordinatewiseSynthesiser

BEGINS = {"real": 0, "synthetic": 1}
"""Whether the even cycles are synthetic, by what they begin with."""


@dataclass(frozen=True, kw_only=True)
class WarmRestarts:
    r"""A rate that falls along a cosine and starts anew: $\frac12\,(1 + \cos\pi\frac{u - u_c}{u_{c+1} - u_c})$ in cycle c, at update u.

    Attributes:
        first: Updates of the first cycle, 1 or more.
        growth: What the time of a restart grows by from one to the next: 2 restarts at 1, 2, 4, 8, ... times the first; 2 or more.
        lengths: Whether growth, then 1 or more, is that of the cycles' lengths instead: 2 restarts at 1, 3, 7, 15, ... times the first.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> restarts = WarmRestarts(first=5)
        >>> [update for update in range(50) if restarts.share(update) == 1.0]
        [0, 5, 10, 20, 40]
        >>> restarts.cycle(19), restarts.cycle(20)
        (2, 3)

    Reference:
        Loshchilov and Hutter 2017, "SGDR", arXiv 1608.03983, equation 5 with a least rate of 0; there ``lengths`` grow. Shang and Zhang
        2019, arXiv 1902.10630, restart after 5, 10, 20, ... epochs.
    """

    first: int = 1000
    growth: int = 2
    lengths: bool = False

    def __post_init__(self) -> None:
        least = 1 if self.lengths else 2
        if self.first < 1 or self.growth < least:
            raise ValueError(
                f"first={self.first}, growth={self.growth}: give 1 update or more, and a growth of {least} or more"
            )

    def begins(self, cycle: int) -> int:
        """Returns the number of the update, from 0, that a cycle begins with."""
        if not self.lengths:
            return self.first * self.growth ** (cycle - 1) if cycle else 0
        return self.first * (cycle if self.growth == 1 else (self.growth**cycle - 1) // (self.growth - 1))

    def cycle(self, update: int) -> int:
        """Returns the number, from 0, of the cycle that an update is in."""
        if self.growth == 1:
            return update // self.first
        cycle = 0
        while self.begins(cycle + 1) <= update:
            cycle += 1
        return cycle

    def share(self, update: int) -> float:
        """Returns how much of the full rate an update has, above 0 up to 1."""
        cycle = self.cycle(update)
        start, end = self.begins(cycle), self.begins(cycle + 1)
        return 0.5 * (1 + math.cos(math.pi * (update - start) / (end - start)))

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """Makes a scheduler; the updates are counted by its ``step()``.

        Args:
            optimizer: Such as a learner's `optimizer`; its rates now are the full ones.
        """
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.share)


@dataclass(frozen=True, kw_only=True)
class Alternating(Bootstrap):
    r"""Gives the core synthetic gradients in every other cycle, and none in the others: $\beta_u = \beta\,[c(u) \text{ is synthetic}]$.

    In a cycle of real gradients the core learns by truncated backpropagation through time. What estimates learns in both, by its own γ
    (so that a real cycle costs half a backward pass more).

    Attributes:
        bootstrap: What estimates.
        restarts: The cycles, counted in chunks that have been learnt. Give the learner's rate their `WarmRestarts.scheduler`, too.
        begins: What the first cycle is: ``"real"`` or ``"synthetic"``.

    Raises:
        ValueError: If it is to begin with anything else; from `estimator`, if nothing estimates.

    Example:
        >>> estimating = Alternating(restarts=WarmRestarts(first=2))
        >>> [estimating.synthetic(update) for update in range(6)]
        [False, False, True, True, False, False]

    Reference:
        Shang and Zhang 2019, "Alternating synthetic and real gradients for neural language modeling", arXiv 1902.10630.
    """

    bootstrap: Bootstrap = field(default_factory=CoordinatewiseSynthesiser)
    restarts: WarmRestarts = field(default_factory=WarmRestarts)
    begins: str = "real"

    def __post_init__(self) -> None:
        choose(BEGINS, self.begins, "begins")

    def synthetic(self, update: int) -> bool:
        """Whether an update is in a cycle of synthetic gradients."""
        return (self.restarts.cycle(update) + BEGINS[self.begins]) % 2 == 1

    def estimator(self, site: Site) -> "Estimator":
        """Makes what estimates, and what lets it speak."""
        inner = self.bootstrap.estimator(site)
        if inner is None:
            raise ValueError(f"bootstrap={self.bootstrap}: it estimates nothing, so there is nothing to alternate with")
        return _Alternation(self, inner)


class _Alternation(Estimator):
    def __init__(self, settings: Alternating, inner: Estimator) -> None:
        super().__init__()
        self.settings, self.inner = settings, inner

    def scale(self, update: int) -> float:
        return self.inner.scale(update) if self.settings.synthetic(update) else 0.0

    def gamma(self, update: int) -> float:
        return self.inner.gamma(update)

    @property
    def chunks(self) -> int:
        return self.inner.chunks

    @property
    def wants_jacobian(self) -> bool:
        return self.inner.wants_jacobian

    def estimate(self, border: Border) -> Tensor:
        return self.inner.estimate(border)

    def learn(self, report: Report) -> Tensor | None:
        return self.inner.learn(report)

    def reset(self) -> None:
        self.inner.reset()

    def optimizer_state(self) -> Any:
        return self.inner.optimizer_state()

    def load_optimizer_state(self, state: Any) -> None:
        self.inner.load_optimizer_state(state)
