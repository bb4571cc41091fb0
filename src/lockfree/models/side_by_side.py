"""Several networks side by side, summed into one representation."""

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lockfree.models.dense import normalised_mlp


class SideBySide(nn.Module):
    """Runs modules next to each other: all on one input, or each on its own.

    Args:
        parts: The modules.

    Example:
        >>> pair = SideBySide([nn.Linear(3, 2), nn.Linear(3, 2)])
        >>> len(pair(pair.split(torch.zeros(4, 3))))
        2
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Gives each part the same input."""
        return (x,) * len(self.parts)

    @no_type_check
    def forward(self, x: Any) -> tuple[Tensor, ...]:
        """Returns what each part makes of its input."""
        inputs = x if isinstance(x, tuple) else self.split(x)
        return tuple(part(value) for part, value in zip(self.parts, inputs, strict=True))


class MeanOfParts(nn.Module):
    """The mean of several representations, normalised.

    Args:
        features: Of each.

    Example:
        >>> MeanOfParts(3)((torch.zeros(4, 3), torch.ones(4, 3))).shape
        torch.Size([4, 3])
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features, affine=False)

    @no_type_check
    def forward(self, parts: tuple[Tensor, ...]) -> Float[Tensor, "m d"]:
        """Returns it."""
        return self.norm(torch.stack(tuple(parts)).mean(0))


def side_by_side(
    input_shape: tuple[int, int, int], classes: int, *, hidden: Sequence[int] = (128, 128, 64), count: int = 3, **fields: Any
) -> nn.Sequential:
    """The sigma-combined network: so many equal perceptrons side by side, their last layers averaged, then a classifier.

    Each block hands up one tensor a network; under `lockfree.rules.HSICBottleneck` with one sigma for each they are HSIC networks
    of different bandwidths.

    Args:
        input_shape: (channels, height, width) of a sample.
        classes: How many class scores come out.
        hidden: Units of each network's layers.
        count: How many networks, 1 or more.
        **fields: What `normalised_mlp` is told besides.

    Returns:
        The network; its children are its blocks.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> len(side_by_side((1, 8, 8), 10, hidden=(32, 16)))
        3

    Reference:
        Ma, Lewis, Kleijn 2019, arXiv 1908.01580, section 3 (sigma-combined network); the mean and its normalisation are those of
        the authors' code.
    """
    if count < 1:
        raise ValueError(f"side_by_side: expected one network or more, got count={count}")
    if not hidden:
        raise ValueError("side_by_side: expected one hidden layer or more")
    networks = [list(normalised_mlp(input_shape, classes, hidden=hidden, **fields))[:-1] for _ in range(count)]
    layers = [SideBySide(parts) for parts in zip(*networks, strict=True)]
    return nn.Sequential(*layers, nn.Sequential(MeanOfParts(hidden[-1]), nn.Linear(hidden[-1], classes)))
