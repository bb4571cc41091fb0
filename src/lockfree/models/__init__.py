"""Plain networks that know nothing of any rule; `build` makes one by name."""

from lockfree.models.convolutional import cnn, lenet, pooled_cnn, vgg8b
from lockfree.models.dense import mlp, normalised_mlp
from lockfree.models.registry import build, check, names
from lockfree.models.residual import ResNet, resnet20, single_resnet
from lockfree.models.side_by_side import side_by_side
from lockfree.models.transformer import gpt, vit

__all__ = [
    "ResNet",
    "build",
    "check",
    "cnn",
    "gpt",
    "lenet",
    "mlp",
    "names",
    "normalised_mlp",
    "pooled_cnn",
    "resnet20",
    "side_by_side",
    "single_resnet",
    "vgg8b",
    "vit",
]
