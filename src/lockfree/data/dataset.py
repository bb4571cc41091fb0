"""What a loaded data set is: two splits of whole tensors, its classes, and where it came from."""

import dataclasses
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor


class Split(NamedTuple):
    """The inputs of one half of a data set, and what they are.

    Attributes:
        inputs: Standardised images, float32 of shape (n, channels, height, width).
        targets: Their classes, int64 of shape (n,), from 0.
    """

    inputs: Float32[Tensor, "n c h w"]
    targets: Int64[Tensor, " n"]


# Tensors have no truth value, so data sets are compared by identity.
@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A classification set, whole in memory and standardised with the statistics of its own training images.

    Attributes:
        name: What `load` was asked for.
        train: The training images.
        test: The held-out images.
        classes: The name of each class; its place is the target's value.
        source: Where the set came from and how many samples it has, for people.

    Example:
        >>> import lockfree.data
        >>> digits = lockfree.data.load("digits")
        >>> digits.input_shape, len(digits.train.targets), len(digits.test.targets)
        ((1, 8, 8), 1437, 360)
    """

    name: str
    train: Split = field(repr=False)
    test: Split = field(repr=False)
    classes: tuple[str, ...]
    source: str

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of one input: (channels, height, width)."""
        channels, height, width = self.train.inputs.shape[1:]
        return channels, height, width

    def to(self, device: str | torch.device) -> "Dataset":
        """Returns this data set with every tensor on another device.

        Args:
            device: Where to, for example "cuda".

        Returns:
            A new data set; tensors that are there already are shared, not copied.
        """
        train, test = (Split(split.inputs.to(device), split.targets.to(device)) for split in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test)


def standardised(
    train: UInt8[Tensor, "n c h w"], test: UInt8[Tensor, "m c h w"], *, brightest: int = 255
) -> tuple[Float32[Tensor, "n c h w"], Float32[Tensor, "m c h w"]]:
    """Scales pixels to [0, 1], then takes off the training images' mean and divides by their standard deviation.

    Args:
        train: Training images of shape (n, channels, height, width), one sample at least.
        test: Held-out images of the same channels, height and width; the *training* statistics serve them too.
        brightest: The value that becomes 1.

    Returns:
        Both as float32. Over the training images every channel has mean 0 and standard deviation 1.

    Example:
        >>> dark, bright = torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
        >>> standardised(torch.cat([dark, bright]), bright)[1].unique()
        tensor([1.])
    """
    inputs = train.to(torch.float32).div_(brightest)
    deviation, mean = torch.std_mean(inputs, dim=(0, 2, 3), correction=0, keepdim=True)
    # A channel that never varies carries nothing: it becomes 0 everywhere instead of dividing by 0.
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return inputs.sub_(mean).div_(deviation), test.to(torch.float32).div_(brightest).sub_(mean).div_(deviation)
