"""Residual networks of the CIFAR kind.

Their `forward` methods are `no_type_check`: torch.fx traces them with proxies, which no run-time checker takes for
tensors.
"""

from typing import no_type_check

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.models.shape import check_shape


class Shortcut(nn.Module):
    """The parameter-free way past a residual block (the paper's option A).

    Takes every stride-th pixel and adds channels of zeros.

    Args:
        stride: Step between the pixels that stay, from 1.
        added: Channels of zeros to append, from 0.

    Example:
        >>> import torch
        >>> Shortcut(stride=2, added=16)(torch.ones(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", 2016, arXiv:1512.03385, section 3.3.
    """

    def __init__(self, *, stride: int, added: int) -> None:
        super().__init__()
        self.stride, self.added = stride, added

    @no_type_check
    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n channels height width"]:
        """Thins out the pixels and appends the channels."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))

    def extra_repr(self) -> str:
        """What torch prints between the brackets."""
        return f"stride={self.stride}, added={self.added}"


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: y = relu(F(x) + shortcut(x)).

    Args:
        below: Channels that come in.
        above: Channels that go out, at least as many.
        stride: Step of the first convolution.

    Example:
        >>> import torch
        >>> ResidualBlock(16, 32, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    def __init__(self, below: int, above: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(below, above, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(above)
        self.conv2 = nn.Conv2d(above, above, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(above)
        plain = stride == 1 and below == above
        self.shortcut = nn.Identity() if plain else Shortcut(stride=stride, added=above - below)

    @no_type_check
    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n channels height width"]:
        """Adds what the convolutions make of the input to the input."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """The paper's network for CIFAR-10: a 3x3 convolution, three groups of residual blocks, and a linear classifier.

    Args:
        channels: Of the input.
        classes: How many class scores come out.
        depth: Residual blocks in each group; the network has 6 depth + 2 layers with weights.

    Example:
        >>> import torch
        >>> ResNet(1, 10, depth=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", 2016, arXiv:1512.03385, section 4.2.
    """

    def __init__(self, channels: int, classes: int, *, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _group(16, 16, depth, stride=1)
        self.layer2 = _group(16, 32, depth, stride=2)
        self.layer3 = _group(32, 64, depth, stride=2)
        self.fc = nn.Linear(64, classes)
        for module in (self.conv1, self.layer1, self.layer2, self.layer3):
            module.apply(_initialise)

    @no_type_check
    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Gives the class scores."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.fc(y.mean(dim=(2, 3)))


def resnet20(input_shape: tuple[int, int, int], classes: int) -> ResNet:
    """ResNet-20, with parameter-free shortcuts (option A).

    Args:
        input_shape: (channels, height, width) of a sample; height and width from 8.
        classes: How many class scores come out.

    Returns:
        The network: 0.27 million parameters for CIFAR-10.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> sum(parameter.numel() for parameter in resnet20((3, 32, 32), 10).parameters())
        269722

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", 2016, arXiv:1512.03385, table 6.
    """
    check_shape("resnet20", input_shape, classes, smallest=8)
    return ResNet(input_shape[0], classes, depth=3)


def _group(below: int, above: int, depth: int, *, stride: int) -> nn.Sequential:
    first = ResidualBlock(below, above, stride=stride)
    return nn.Sequential(first, *(ResidualBlock(above, above) for _ in range(depth - 1)))


def _initialise(module: nn.Module) -> None:
    # He et al., 2015, arXiv:1502.01852, equation 10: forward variances stay the same under ReLU.
    for parameter in module.parameters(recurse=False):
        if parameter.dim() == 4:
            nn.init.kaiming_normal_(parameter, mode="fan_in", nonlinearity="relu")


class SingleResidualBlock(nn.Module):
    """One convolution and a shortcut, normalised again: y = relu(BN(relu(BN(conv(x))) + x)).

    Args:
        channels: That come in and go out.

    Example:
        >>> import torch
        >>> SingleResidualBlock(4)(torch.zeros(2, 4, 6, 6)).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 5, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, affine=False)
        self.bn2 = nn.BatchNorm2d(channels, affine=False)

    @no_type_check
    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Adds what the convolution makes of the input to the input."""
        return F.relu(self.bn2(F.relu(self.bn1(self.conv(x))) + x))


def single_resnet(
    input_shape: tuple[int, int, int], classes: int, *, channels: int = 64, depth: int = 5, features: int = 512
) -> nn.Sequential:
    """The residual network of the paper on the HSIC bottleneck: one 5x5 convolution a block, then a dense layer and a classifier.

    Args:
        input_shape: (channels, height, width) of a sample; height and width from 5.
        classes: How many class scores come out.
        channels: Of each block, 1 or more.
        depth: Residual blocks, 0 or more.
        features: Units of the dense layer.

    Returns:
        The network; its children are its blocks.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> len(single_resnet((1, 28, 28), 10))
        8

    Reference:
        Ma, Lewis, Kleijn 2019, arXiv 1908.01580, section 4 (ResNet); sizes and normalisation as in the authors' code.
    """
    check_shape("single_resnet", input_shape, classes, smallest=5)
    height, width = ((side - 5) // 2 + 1 for side in input_shape[1:])
    convolution = nn.Conv2d(input_shape[0], channels, 5, stride=2, bias=False)
    stem = nn.Sequential(convolution, nn.BatchNorm2d(channels, affine=False), nn.ReLU())
    linear = nn.Linear(channels * height * width, features, bias=False)
    dense = nn.Sequential(nn.Flatten(), linear, nn.BatchNorm1d(features, affine=False), nn.ReLU())
    return nn.Sequential(stem, *(SingleResidualBlock(channels) for _ in range(depth)), dense, nn.Linear(features, classes))
