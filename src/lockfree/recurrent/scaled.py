"""Bootstraps with two numbers: how much of an estimate the core is given, and how much of the next one counts in the truth."""

from abc import ABC
from dataclasses import dataclass

from lockfree.recurrent.bootstrap import Bootstrap, Estimator


@dataclass(frozen=True, kw_only=True)
class Scaled(Bootstrap, ABC):
    r"""A bootstrap that gives the core $\beta\,G(s_{t+T})$ and takes $\partial L_{t+1..t+T}/\partial s_t + \gamma J^T G(s_{t+T})$ for true.

    Attributes:
        scale: β, how much of the estimate the core is given, 0 or more.
        gamma: γ, how much of the next one counts in the truth, 0 or more; β if ``None``. Another than β costs half a backward pass.

    Raises:
        ValueError: If a number is out of range.
    """

    scale: float = 1.0
    gamma: float | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "gamma"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value}: give 0 or more")

    @property
    def discount(self) -> float:
        """γ, whether it has been given or not."""
        return self.scale if self.gamma is None else self.gamma


class ScaledEstimator(Estimator, ABC):
    """An estimator whose numbers are the same at every update.

    Args:
        settings: Of it.
    """

    def __init__(self, settings: Scaled) -> None:
        super().__init__()
        self.settings = settings

    def scale(self, update: int) -> float:
        return self.settings.scale

    def gamma(self, update: int) -> float:
        return self.settings.discount
