"""The networks by name."""

from collections.abc import Callable

from torch import nn

from lockfree.choose import choose
from lockfree.models.convolutional import cnn, lenet, vgg8b
from lockfree.models.dense import mlp
from lockfree.models.residual import resnet20
from lockfree.models.transformer import vit

_MODELS: dict[str, Callable[[tuple[int, int, int], int], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "lenet": lenet,
    "vgg8b": vgg8b,
    "resnet20": resnet20,
    "vit": vit,
}


def names() -> tuple[str, ...]:
    """Lists what `build` takes.

    Returns:
        The names of the networks.

    Example:
        >>> names()
        ('mlp', 'cnn', 'lenet', 'vgg8b', 'resnet20', 'vit')
    """
    return tuple(_MODELS)


def build(name: str, *, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Makes a network by name; its weights are drawn from torch's global generator.

    Args:
        name: One of `names()`.
        input_shape: (channels, height, width) of a sample.
        classes: How many class scores come out.

    Returns:
        A module that maps (n, channels, height, width) to scores of shape (n, classes).

    Raises:
        ValueError: The name is unknown, or the network cannot take such inputs.

    Example:
        >>> len(build("mlp", input_shape=(1, 8, 8), classes=10))
        4
    """
    check(name)
    return _MODELS[name](input_shape, classes)


def check(name: str) -> None:
    """Refuses a name that `build` does not know.

    Raises:
        ValueError: With the nearest name and the list.
    """
    choose(_MODELS, name, "model")
