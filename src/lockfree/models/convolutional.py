"""Convolutional networks without skips: a small one for quick work, LeNet-5, and VGG8B."""

import itertools
from collections.abc import Sequence

from torch import nn

from lockfree.models.shape import check_shape


def cnn(input_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """A small convolutional network whose children are its blocks: 32, 64 and 128 channels, then the classifier.

    Each block halves height and width; the classifier sees the mean over what is left of them.

    Args:
        input_shape: (channels, height, width) of a sample; height and width from 8.
        classes: How many class scores come out.

    Returns:
        The network.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> import torch
        >>> cnn((1, 28, 28), 10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    check_shape("cnn", input_shape, classes, smallest=8)
    channels = (input_shape[0], 32, 64, 128)
    blocks = [
        nn.Sequential(*_convolution(below, above), nn.ReLU(), nn.MaxPool2d(2)) for below, above in itertools.pairwise(channels)
    ]
    return nn.Sequential(*blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes)))


def lenet(input_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """LeNet-5 with ReLU and maximum pooling: two convolutions, two hidden dense layers and the classifier, a block each.

    Args:
        input_shape: (channels, height, width) of a sample; height and width from 12.
        classes: How many class scores come out.

    Returns:
        The network: 61,706 parameters for 28 x 28 inputs.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> sum(parameter.numel() for parameter in lenet((1, 28, 28), 10).parameters())
        61706

    Reference:
        LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document recognition", section II.B.
    """
    check_shape("lenet", input_shape, classes, smallest=12)
    channels, height, width = input_shape
    height, width = ((side // 2 - 4) // 2 for side in (height, width))
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(16 * height * width, 120), nn.ReLU()),
        nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, classes),
    )


def pooled_cnn(input_shape: tuple[int, int, int], classes: int, *, channels: Sequence[int] = (128, 128, 128)) -> nn.Sequential:
    """Wide convolutions with a pooling after each: the network of the paper on synthetic gradients, of any depth.

    Each block is a 5x5 convolution, batch normalisation, ReLU and a 3x3 pooling of stride 2 (maximum in the first, mean in the
    rest) that halves height and width, rounding up; then the classifier.

    Args:
        input_shape: (channels, height, width) of a sample.
        classes: How many class scores come out.
        channels: Of each block, one or more.

    Returns:
        The network.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> import torch
        >>> pooled_cnn((1, 28, 28), 10, channels=(8, 8))(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    Reference:
        Jaderberg et al. 2016, "Decoupled neural interfaces using synthetic gradients", arXiv 1608.05343, appendix.
    """
    check_shape("pooled_cnn", input_shape, classes)
    if not channels or any(units < 1 for units in channels):
        raise ValueError(f"pooled_cnn: expected blocks of 1 channel or more, got {tuple(channels)}")
    below, height, width = input_shape
    blocks: list[nn.Module] = []
    for above in channels:
        pool = nn.AvgPool2d(3, 2, padding=1) if blocks else nn.MaxPool2d(3, 2, padding=1)
        # The normalisation takes the mean off again, so a bias before it would never learn.
        convolution = nn.Conv2d(below, above, 5, padding=2, bias=False)
        blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(above), nn.ReLU(), pool))
        below, height, width = above, (height + 1) // 2, (width + 1) // 2
    return nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(below * height * width, classes)))


def vgg8b(input_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """VGG8B: six convolutions, one hidden dense layer and the classifier, a block each.

    The paper trains it with local losses, a block for each layer. Differences from the authors' code: no dropout,
    LeakyReLU(0.01) where theirs takes ReLU by default, and no bias before a batch normalisation.

    Args:
        input_shape: (channels, height, width) of a sample; height and width from 16.
        classes: How many class scores come out.

    Returns:
        The network: 7.3 million parameters for 28x28 inputs and 8.9 million for 32x32.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> len(vgg8b((3, 32, 32), 10))
        8

    Reference:
        Nøkland and Eidnes, "Training Neural Networks with Local Error Signals", 2019, arXiv:1901.06656, table 1.
    """
    check_shape("vgg8b", input_shape, classes, smallest=16)
    below, height, width = input_shape
    blocks: list[nn.Module] = []
    for above, pooled in ((128, False), (256, True), (256, False), (512, True), (512, True), (512, True)):
        pool = [nn.MaxPool2d(2)] if pooled else []
        blocks.append(nn.Sequential(*_convolution(below, above), nn.LeakyReLU(0.01), *pool))
        below = above
        if pooled:
            height, width = height // 2, width // 2
    dense = nn.Linear(below * height * width, 1024, bias=False)
    blocks.append(nn.Sequential(nn.Flatten(), dense, nn.BatchNorm1d(1024), nn.LeakyReLU(0.01)))
    return nn.Sequential(*blocks, nn.Linear(1024, classes))


def _convolution(below: int, above: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    # The normalisation takes the mean off again, so a bias before it would never learn.
    return nn.Conv2d(below, above, 3, padding=1, bias=False), nn.BatchNorm2d(above)
