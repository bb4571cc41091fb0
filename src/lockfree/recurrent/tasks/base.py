"""What a task is: sequences by number, what is asked of them, and what answers are worth."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from lockfree.recurrent.stretch import Stretch
from lockfree.rng import seed_of

IGNORED = -100
"""The target of a step at which nothing is asked."""


@runtime_checkable
class Predicts(Protocol):
    """Who answers: a learner, as far as a task must know it."""

    def predict(self, inputs: Tensor, *, done: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """Answers in evaluation mode and changes nothing.

        Args:
            inputs: Of shape (steps, batch, ...).
            done: Where the state is reset afterwards; nowhere if left out.
            state: The state to begin with; the initial one if left out.

        Returns:
            Scores of shape (steps, batch, classes), and the state after the last step.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Hands out sequences to learn from and judges a learner.

    A stretch is a pure function of seed, number and progress, so a resume needs only the number and `state_dict`. Its tensors
    are on the CPU.

    Attributes:
        batch: Sequences side by side, 1 or more.
        seed: What random numbers come from.
        measure: The name of what a learner is judged by; `evaluate` gives it by the same name with underscores.
        larger_is_better: Whether more of it is better.

    Raises:
        ValueError: A setting is out of its range.
    """

    batch: int = 256
    seed: int = 0
    measure: ClassVar[str]
    larger_is_better: ClassVar[bool]

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch)
        self._prepare()

    def _prepare(self) -> None:  # noqa: B027  most tasks need nothing
        """Checks the settings of the task's own, and makes what it keeps."""

    @property
    @abstractmethod
    def symbols(self) -> int | None:
        """Inputs are symbol numbers below this; None where they are features."""

    @property
    @abstractmethod
    def features(self) -> int:
        """Length of the vector of one step: of a one-hot one where inputs are symbol numbers."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """Targets are below this; as many scores the readout gives."""

    @abstractmethod
    def stretch(self, number: int) -> Stretch:
        """Gives what is to be learnt.

        Args:
            number: Which stretch, from 0; there is no last one.

        Returns:
            The stretch, a pure function of the seed, this number and the progress.

        Raises:
            ValueError: The number is negative.
        """

    @abstractmethod
    def evaluate(self, learner: Predicts) -> dict[str, float]:
        """Judges a learner on what it does not learn from.

        Args:
            learner: It is asked to predict, and not changed.

        Returns:
            Figures by name, `measure` among them with underscores for spaces.
        """

    def loss(self, outputs: Float[Tensor, "n classes"], targets: Int64[Tensor, " n"]) -> Float[Tensor, ""]:
        r"""Mean over *all* positions of what is asked: $\frac{1}{n} \sum_{i\,\text{asked}} -\ln p_i(\text{target}_i)$.

        So pieces of a stretch of equal length weigh alike, however much is asked in each, and one where nothing is asked costs 0.

        Args:
            outputs: Scores.
            targets: Classes, or `IGNORED`.

        Returns:
            The loss in nats.
        """
        return F.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="sum") / targets.numel()

    def bits(self, loss: float, targets: Int64[Tensor, "..."]) -> float:
        """Turns the loss of a stretch into what `learnt` wants to be told.

        Args:
            loss: The mean over all positions in nats, as `loss` gives it.
            targets: All targets of the stretch.

        Returns:
            The mean over the positions asked in bits; NaN where nothing is asked.
        """
        asked = int((targets != IGNORED).sum())
        return loss * targets.numel() / asked / math.log(2) if asked else math.nan

    def learnt(self, bits: float) -> None:  # noqa: B027  most tasks have no progress
        """Is told how well the stretch that was just learnt from went, before it was learnt; a curriculum moves on by it.

        Args:
            bits: The mean error in bits per position asked, not below 0.

        Raises:
            ValueError: It is negative or not a number.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the progress as plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where another task of the same settings was.

        Args:
            state: What its `state_dict` returned.

        Raises:
            ValueError: The state is that of another kind of task.
        """
        if state:
            raise ValueError(f"expected the empty state of a task without progress, got {sorted(state)}; resume the same task")


def at_least(least: int, **settings: int) -> None:
    """Checks whole numbers.

    Args:
        least: The smallest that is allowed.
        **settings: Numbers by name.

    Raises:
        ValueError: One of them is smaller.

    Example:
        >>> at_least(1, batch=0)
        Traceback (most recent call last):
        ValueError: batch must be 1 or more, got 0
    """
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")


def asked_bits(outputs: Float[Tensor, "... classes"], targets: Int64[Tensor, "..."]) -> float:
    """Measures the mean error in bits of the positions where something is asked.

    Args:
        outputs: Scores.
        targets: Classes, or `IGNORED`.

    Returns:
        The mean; log2 of the number of classes for equal scores. NaN where nothing is asked.

    Example:
        >>> asked_bits(torch.zeros(3, 8), torch.tensor([1, IGNORED, 7]))
        3.0
    """
    nats = F.cross_entropy(outputs.flatten(0, -2).double(), targets.flatten(), ignore_index=IGNORED, reduction="mean")
    return nats.item() / math.log(2)


def asked_accuracy(outputs: Float[Tensor, "... classes"], targets: Int64[Tensor, "..."]) -> float:
    """Measures the share of right answers among the positions where something is asked.

    Args:
        outputs: Scores.
        targets: Classes, or `IGNORED`.

    Returns:
        From 0 to 1; NaN where nothing is asked.

    Example:
        >>> asked_accuracy(torch.eye(3), torch.tensor([0, IGNORED, 1]))
        0.5
    """
    asked = targets != IGNORED
    return (outputs.argmax(-1) == targets)[asked].double().mean().item()


def private(*numbers: int) -> torch.Generator:
    """Makes a generator of random numbers that is a pure function of whole numbers.

    Args:
        *numbers: For example seed, number of the stretch and level.

    Returns:
        A generator on the CPU.
    """
    return torch.Generator().manual_seed(seed_of(*numbers))
