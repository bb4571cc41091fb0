"""When a task becomes harder."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Curriculum:
    """Moves on to the next level when the mean of the last `window` errors, all of the present level, is below a threshold.

    Attributes:
        threshold: In bits per position asked, above 0.
        window: How many errors a level is judged by, 1 or more. The paper's is not known; 10 batches of 256 are about as sure as
            anything the learner will see again.
        level: The present level, which is also the number of those solved, from 0.

    Raises:
        ValueError: A setting is out of its range.

    Example:
        >>> curriculum = Curriculum(window=2)
        >>> [curriculum.told(bits) for bits in (0.1, 0.3, 0.1, 0.1, 0.1)]
        [False, False, False, True, False]
        >>> curriculum.level
        1

    Reference:
        Jaderberg et al. 2017, "Decoupled neural interfaces using synthetic gradients", arXiv 1608.05343, Copy and Repeat Copy: on to
        the next level at an error below 0.15 bits.
    """

    threshold: float = 0.15
    window: int = 10
    level: int = field(default=0, init=False)
    _errors: deque[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above 0 bits, got {self.threshold}")
        if self.window < 1:
            raise ValueError(f"window must be 1 or more, got {self.window}")
        self._errors = deque(maxlen=self.window)

    @property
    def error(self) -> float:
        """The mean of the last errors at the present level, at most `window` of them; NaN before the first."""
        return math.fsum(self._errors) / len(self._errors) if self._errors else math.nan

    def told(self, bits: float) -> bool:
        """Takes an error down.

        Args:
            bits: The error of a batch of the present level, not below 0.

        Returns:
            Whether this moved on to the next level.

        Raises:
            ValueError: It is negative or not a number.
        """
        if not bits >= 0:
            raise ValueError(f"expected an error from 0 bits, got {bits}; a loss that is not finite cannot be learnt from")
        self._errors.append(bits)
        if len(self._errors) < self.window or self.error >= self.threshold:
            return False
        self.level += 1
        self._errors.clear()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns the level and the errors that it is judged by."""
        return {"level": self.level, "errors": list(self._errors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where another curriculum was.

        Args:
            state: What its `state_dict` returned.

        Raises:
            ValueError: The state has other entries.
        """
        if set(state) != {"level", "errors"}:
            raise ValueError(f"expected a state with errors and level, got {sorted(state)}; resume the same task")
        self.level = int(state["level"])
        self._errors = deque(map(float, state["errors"]), maxlen=self.window)
