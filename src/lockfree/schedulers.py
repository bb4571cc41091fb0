"""Learning-rate schedulers, stepped and kept together."""

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import LRScheduler


class Schedulers:
    """What changes learning rates as training goes on.

    Args:
        given: A scheduler, several, or none.
    """

    def __init__(self, given: LRScheduler | Sequence[LRScheduler] | None) -> None:
        self._all = [given] if isinstance(given, LRScheduler) else list(given or ())

    def step(self) -> None:
        """Goes on to the next epoch, or whatever they count."""
        for scheduler in self._all:
            scheduler.step()

    def states(self) -> list[dict[str, Any]]:
        """Returns of each what a checkpoint can hold; functions are the caller's to pass again."""
        return [{name: value for name, value in one.state_dict().items() if not callable(value)} for one in self._all]

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """Goes where `states` was taken."""
        for scheduler, saved in zip(self._all, states, strict=False):
            scheduler.load_state_dict(saved)
