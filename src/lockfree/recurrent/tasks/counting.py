"""Counting: a fast network counts odd digits, a slow one that hears from it counts threes."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from lockfree.data import Dataset, Split, load
from lockfree.recurrent.stretch import Stretch
from lockfree.recurrent.tasks.base import IGNORED, Predicts, Task, asked_accuracy, asked_bits, at_least, private

HELD_OUT = -1
"""Stands for the number of the stretches that are judged on; training counts from 0."""


class Counted(NamedTuple):
    """A stretch with what both networks are asked.

    Attributes:
        images: Of shape (steps, batch, channels, height, width), one a step.
        odd: What A is asked, of shape (steps, batch): at the last of each T steps the number of odd digits in them, else `IGNORED`.
        threes: What B is asked, likewise: at the last of the T^2 steps the number of threes in them, else `IGNORED`.
        done: Whether a sequence ends with this step.
    """

    images: Float32[Tensor, "steps batch c h w"]
    odd: Int64[Tensor, "steps batch"]
    threes: Int64[Tensor, "steps batch"]
    done: Bool[Tensor, "steps batch"]


@dataclass(frozen=True, kw_only=True)
class Counting(Task):
    """Two networks count digits: A sees an image each step, B ticks every T steps and hears from A alone.

    A is asked every T steps how many of the last T digits were odd; B is asked every T^2 steps how many of the last T^2 were threes. A
    stretch is one sequence of T^2 random training images: T counts for A, one for B.

    As a task of one network it is A's: `stretch`, `classes` and `evaluate` are about odd digits. `counted` gives what both are asked,
    `classes_b` how many scores B gives, and `figures` judges both.

    Attributes:
        batch: Sequences side by side.
        seed: What digits are drawn by.
        period: T, 1 or more.
        data: Name of a data set of ten classes; class k counts as digit k.
        evaluated: Sequences of test images to judge by.
        root: The data folder, as for `lockfree.data.load`.

    Raises:
        ValueError: A setting is out of its range; later, the data set is not there or has not ten classes.

    Example:
        >>> task = Counting(period=2, batch=3, data="digits")
        >>> counted = task.counted(0)
        >>> counted.images.shape, counted.odd[:, 0].tolist(), counted.threes[:, 0].tolist()
        (torch.Size([4, 3, 1, 8, 8]), [-100, 2, -100, 1], [-100, -100, -100, 0])

    Reference:
        Jaderberg et al. 2017, "Decoupled neural interfaces using synthetic gradients", arXiv 1608.05343, the experiment with two
        networks that tick at different rates.
    """

    period: int = 4
    data: str = "mnist"
    evaluated: int = 256
    root: Path | None = None
    measure: ClassVar[str] = "accuracy"
    larger_is_better: ClassVar[bool] = True

    def _prepare(self) -> None:
        at_least(1, period=self.period, evaluated=self.evaluated)

    @cached_property
    def images(self) -> Dataset:
        """The data set, read when it is first needed."""
        images = load(self.data, root=self.root)
        if len(images.classes) != 10:
            raise ValueError(f"expected a data set of ten classes, one a digit, got {self.data} of {len(images.classes)}")
        return images

    @property
    def symbols(self) -> None:
        return None

    @property
    def features(self) -> int:
        return self.images.train.inputs[0].numel()

    @property
    def classes(self) -> int:
        return self.period + 1

    @property
    def classes_b(self) -> int:
        """As many scores B gives: its counts go from 0 to T^2."""
        return self.period**2 + 1

    def counted(self, number: int) -> Counted:
        """Gives a stretch with what both networks are asked.

        Args:
            number: Which stretch, from 0; there is no last one.

        Returns:
            The stretch, a pure function of the seed and this number.

        Raises:
            ValueError: The number is negative.
        """
        at_least(0, number=number)
        return self.draw(self.images.train, number, self.batch)

    def held_out(self) -> Counted:
        """Gives `evaluated` sequences of test images, always the same for one seed."""
        return self.draw(self.images.test, HELD_OUT, self.evaluated)

    def stretch(self, number: int) -> Stretch:
        counted = self.counted(number)
        return Stretch(counted.images, counted.odd, counted.done)

    def evaluate(self, learner: Predicts) -> dict[str, float]:
        held_out = self.held_out()
        outputs, _ = learner.predict(held_out.images, done=held_out.done)
        outputs = outputs.cpu()
        return {"accuracy": asked_accuracy(outputs, held_out.odd), "bits": asked_bits(outputs, held_out.odd)}

    def figures(
        self, odd: Float[Tensor, "steps batch odd_classes"], threes: Float[Tensor, "steps batch three_classes"], asked: Counted
    ) -> dict[str, float]:
        """Judges both networks.

        Args:
            odd: A's scores at each step.
            threes: B's scores; only those of the last step count.
            asked: What they answer to, for example `held_out`.

        Returns:
            The share of right counts, and the error in bits per count, of either.
        """
        return {
            "accuracy_odd": asked_accuracy(odd, asked.odd),
            "accuracy_threes": asked_accuracy(threes, asked.threes),
            "bits_odd": asked_bits(odd, asked.odd),
            "bits_threes": asked_bits(threes, asked.threes),
        }

    def draw(self, split: Split, number: int, batch: int) -> Counted:
        """Draws sequences of the images of any split, ten classes of them: what `counted` and `held_out` are made by.

        Args:
            split: Images and their classes.
            number: Which sequences.
            batch: How many, side by side.
        """
        steps = self.period**2
        generator = private(self.seed, number)
        chosen = torch.randint(len(split.targets), (steps, batch), generator=generator)
        digits = split.targets[chosen]
        odd, threes = torch.full_like(digits, IGNORED), torch.full_like(digits, IGNORED)
        odd[self.period - 1 :: self.period] = (digits % 2).view(self.period, self.period, batch).sum(1)
        threes[-1] = (digits == 3).sum(0)
        done = torch.zeros_like(digits, dtype=torch.bool)
        done[-1] = True
        return Counted(split.inputs[chosen], odd, threes, done)
