"""The fully connected network."""

import itertools
import math
from collections.abc import Callable, Sequence

from torch import nn

from lockfree.choose import choose
from lockfree.models.shape import check_shape


def mlp(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    hidden: Sequence[int] = (256, 256, 256),
    batch_norm: bool = True,
) -> nn.Sequential:
    """A multi-layer perceptron whose children are its blocks: a hidden layer each, then the classifier.

    Args:
        input_shape: (channels, height, width) of a sample.
        classes: How many class scores come out.
        hidden: Units of each hidden layer, 1 or more each; empty gives a linear classifier.
        batch_norm: Normalise before each ReLU; a training batch then needs two samples at least.

    Returns:
        The network.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> [type(layer).__name__ for layer in mlp((1, 8, 8), 10, hidden=(32,))[0]]
        ['Flatten', 'Linear', 'BatchNorm1d', 'ReLU']
    """
    check_shape("mlp", input_shape, classes)
    if any(units < 1 for units in hidden):
        raise ValueError(f"mlp: expected hidden layers of 1 unit or more, got {tuple(hidden)}")
    widths = (math.prod(input_shape), *hidden)
    blocks: list[nn.Module] = []
    for below, units in zip(widths, hidden, strict=False):
        # The normalisation takes the mean off again, so a bias before it would never learn.
        layers: list[nn.Module] = [nn.Linear(below, units, bias=not batch_norm)]
        layers += [nn.BatchNorm1d(units)] if batch_norm else []
        blocks.append(nn.Sequential(*([] if blocks else [nn.Flatten()]), *layers, nn.ReLU()))
    classifier = nn.Linear(widths[-1], classes)
    return nn.Sequential(*blocks, classifier if blocks else nn.Sequential(nn.Flatten(), classifier))


def normalised_mlp(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    hidden: Sequence[int] = (256, 256, 256),
    activation: str = "relu",
    batch_norm: bool = True,
    classifier: bool = True,
) -> nn.Sequential:
    """The perceptron of the paper on the HSIC bottleneck: each layer is Linear, BatchNorm without weights, activation.

    Args:
        input_shape: (channels, height, width) of a sample.
        classes: How many class scores come out.
        hidden: Units of each hidden layer, 1 or more each.
        activation: One of "relu", "tanh", "sigmoid", "elu", "leaky-relu", "selu".
        batch_norm: Normalise before each activation.
        classifier: Whether the last layer is a plain linear one; otherwise it is like the others, and its units are the classes.

    Returns:
        The network; its children are its blocks.

    Raises:
        ValueError: A number is out of range or the activation unknown.

    Example:
        >>> [type(layer).__name__ for layer in normalised_mlp((1, 8, 8), 10, hidden=(32,), classifier=False)[1]]
        ['Linear', 'BatchNorm1d', 'ReLU']

    Reference:
        Ma, Lewis, Kleijn 2019, arXiv 1908.01580, section 4; the layers are those of the authors' code.
    """
    check_shape("normalised_mlp", input_shape, classes)
    if any(units < 1 for units in hidden):
        raise ValueError(f"normalised_mlp: expected hidden layers of 1 unit or more, got {tuple(hidden)}")
    make = choose(ACTIVATIONS, activation, "activation")
    widths = (math.prod(input_shape), *hidden, *(() if classifier else (classes,)))
    blocks: list[nn.Module] = []
    for below, units in itertools.pairwise(widths):
        normalisation = [nn.BatchNorm1d(units, affine=False)] if batch_norm else []
        layers = [nn.Linear(below, units, bias=not batch_norm), *normalisation, make()]
        blocks.append(nn.Sequential(*([] if blocks else [nn.Flatten()]), *layers))
    return nn.Sequential(*blocks, *([nn.Linear(widths[-1], classes)] if classifier else []))


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "leaky-relu": nn.LeakyReLU,
    "selu": nn.SELU,
}
"""Activations by name."""
