"""Sequential images: an image seen pixel by pixel, or row by row, and its class asked for at the end."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float32
from torch import Tensor

from lockfree.choose import choose
from lockfree.data import Dataset, load
from lockfree.recurrent.stretch import Stretch
from lockfree.recurrent.tasks.base import IGNORED, Predicts, Task, asked_accuracy, asked_bits, at_least, private

_AT_ONCE = 500  # images judged in one call


@dataclass(frozen=True, kw_only=True)
class SequentialImages(Task):
    """A stretch is a batch of whole images, read from top left to bottom right; the class is asked for at the last step only.

    An epoch deals every training image once, in an order of its own, but for those that fill no batch. `evaluate` gives `accuracy`,
    from 0 to 1, and `bits` per image, of the test images.

    Attributes:
        batch: Images side by side, at most as many as there are.
        seed: What the orders come from.
        data: Name of the data set, for `lockfree.data.load`.
        by: "pixel" (a step is a pixel, all its channels) or "row" (a step is a row).
        evaluated: Test images to judge by, from the first; all if left out.
        root: The data folder, as for `lockfree.data.load`.

    Raises:
        ValueError: A setting is out of its range; later, the data set is not there or smaller than a batch.

    Example:
        >>> task = SequentialImages(data="digits", by="row", batch=3)
        >>> stretch = task.stretch(0)
        >>> stretch.inputs.shape, stretch.targets.T.tolist()[0], task.classes
        (torch.Size([8, 3, 8]), [-100, -100, -100, -100, -100, -100, -100, 5], 10)

    Reference:
        Le, Jaitly and Hinton 2015, "A simple way to initialize recurrent networks of rectified linear units", arXiv 1504.00941: MNIST
        pixel by pixel.
    """

    data: str = "mnist"
    by: Literal["pixel", "row"] = "pixel"
    evaluated: int | None = None
    root: Path | None = None
    measure: ClassVar[str] = "accuracy"
    larger_is_better: ClassVar[bool] = True

    def _prepare(self) -> None:
        choose(_READINGS, self.by, "reading")
        if self.evaluated is not None:
            at_least(1, evaluated=self.evaluated)

    @cached_property
    def images(self) -> Dataset:
        """The data set, read when it is first needed."""
        return load(self.data, root=self.root)

    @property
    def symbols(self) -> None:
        return None

    @property
    def features(self) -> int:
        return _READINGS[self.by](self.images.test.inputs[:1]).shape[-1]

    @property
    def classes(self) -> int:
        return len(self.images.classes)

    def stretch(self, number: int) -> Stretch:
        at_least(0, number=number)
        inputs, targets = self.images.train
        batches = len(inputs) // self.batch
        if not batches:
            raise ValueError(f"batch {self.batch:,} is larger than {self.data} of {len(inputs):,} images; take a smaller batch")
        epoch, place = divmod(number, batches)
        order = torch.randperm(len(inputs), generator=private(self.seed, epoch))
        chosen = order[place * self.batch : (place + 1) * self.batch]
        return self._read(inputs[chosen], targets[chosen])

    def evaluate(self, learner: Predicts) -> dict[str, float]:
        images, classes = (half[: self.evaluated] for half in self.images.test)
        scores = []
        for some in images.split(_AT_ONCE):
            outputs, _ = learner.predict(_READINGS[self.by](some))
            scores.append(outputs[-1].cpu())
        scores = torch.cat(scores)
        return {"accuracy": asked_accuracy(scores, classes), "bits": asked_bits(scores, classes)}

    def _read(self, images: Tensor, classes: Tensor) -> Stretch:
        inputs = _READINGS[self.by](images)
        targets = F.pad(classes.unsqueeze(0), (0, 0, len(inputs) - 1, 0), value=IGNORED)
        done = torch.zeros_like(targets, dtype=torch.bool)
        done[-1] = True
        return Stretch(inputs, targets, done)


def by_pixel(images: Float32[Tensor, "n c h w"]) -> Float32[Tensor, "steps n c"]:
    """Reads images pixel by pixel.

    Args:
        images: As a data set has them.

    Returns:
        A step for each of the h w pixels, from top left, row after row.

    Example:
        >>> by_pixel(torch.arange(4.0).view(1, 1, 2, 2)).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    return images.flatten(2).permute(2, 0, 1)


def by_row(images: Float32[Tensor, "n c h w"]) -> Float32[Tensor, "h n features"]:
    """Reads images row by row.

    Args:
        images: As a data set has them.

    Returns:
        A step for each of the h rows, from the top; its c w features are channel after channel.

    Example:
        >>> by_row(torch.arange(4.0).view(1, 1, 2, 2)).tolist()
        [[[0.0, 1.0]], [[2.0, 3.0]]]
    """
    return images.permute(2, 0, 1, 3).flatten(2)


_READINGS = {"pixel": by_pixel, "row": by_row}
