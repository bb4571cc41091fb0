"""Plain networks that know nothing of any rule; `build` makes one by name."""

from lockfree.models.convolutional import cnn, vgg8b
from lockfree.models.dense import mlp
from lockfree.models.registry import build, names
from lockfree.models.residual import ResNet, resnet20

__all__ = ["ResNet", "build", "cnn", "mlp", "names", "resnet20", "vgg8b"]
