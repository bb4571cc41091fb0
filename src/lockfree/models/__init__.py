"""Plain networks that know nothing of any rule; `build` makes one by name."""

from lockfree.models.convolutional import cnn, pooled_cnn, vgg8b
from lockfree.models.dense import mlp
from lockfree.models.registry import build, check, names
from lockfree.models.residual import ResNet, resnet20

__all__ = ["ResNet", "build", "check", "cnn", "mlp", "names", "pooled_cnn", "resnet20", "vgg8b"]
