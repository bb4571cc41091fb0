"""What every synthesiser does: predict a credit, and learn from the truth when it arrives."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Design:
    """How large the synthesisers of a rule are and what they see.

    Attributes:
        classes: Number of classes of the label that they see beside the output, 0 if they do not see it.
        per_class: Whether each class has a network of its own instead of a label among its inputs.
        hidden_layers: Hidden layers, 0 or more.
        hidden_units: Their width (channels on images), 1 or more.
        kernel_size: Odd width of convolutions on images.
        matching: Weight of derivatives against values in Sobolev training, 0 or more.
    """

    classes: int = 0
    per_class: bool = False
    hidden_layers: int = 0
    hidden_units: int = 256
    kernel_size: int = 5
    matching: float = 100.0


@dataclass(slots=True)
class Prediction:
    """A prediction until the truth arrives.

    Attributes:
        credit: The predicted gradient of the batch's mean loss, shape of y; detached.
        graph: What the synthesiser needs to learn from it later.
        scale: Its standard deviation, shape of y, where the synthesiser gives one; detached.
    """

    credit: Tensor
    graph: Any
    scale: Tensor | None = None


class Synthesiser(nn.Module, ABC):
    """Predicts the gradient of the loss with respect to y, from y and optionally the label c (a one-hot row, or real numbers).

    It works on the scale of one sample's loss; what goes in and out of `predict` and `learn` is on that of the batch's mean loss.

    Args:
        classes: Number of classes to condition on, 0 for none.

    Attributes:
        plain: Whether a prediction of it holds tensors alone and no graph of autograd; `store` and `restore` then serve it.
        is_affine: Whether what it predicts is an affine function of y.

    Reference:
        Jaderberg et al. 2016, arXiv 1608.05343, section 2.
    """

    plain: ClassVar[bool] = False
    is_affine: ClassVar[bool] = False

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    @abstractmethod
    def predict(self, y: Tensor, label: Tensor | None, samples: int) -> Prediction:
        """Predicts the gradient of the mean loss over ``samples``; the label is given if and only if it is conditioned on.

        Args:
            y: A block's output, shape (m, ...), detached.
            label: One-hot rows or real-valued targets, shape (m, classes), or ``None``.
            samples: m.
        """

    @abstractmethod
    def learn(
        self, prediction: Prediction, truth: Tensor | None, samples: int, sample_losses: Callable[[], Tensor] | None
    ) -> Tensor | None:
        """Leaves gradients on the parameters and returns the loss that they descend; may use up the prediction.

        Args:
            prediction: What `predict` returned for the batch.
            truth: The gradient of the mean loss as the block above reports it, shape of y; ``None`` if there is none.
            samples: m.
            sample_losses: Returns the loss of each sample, shape (m,); ``None`` if the error has not been asked for.
        """

    def store(self, prediction: Prediction) -> dict[str, Tensor | None]:
        """Returns a plain prediction as tensors by name."""
        raise NotImplementedError(f"{type(self).__name__} does not store predictions")

    def restore(self, state: dict[str, Any]) -> Prediction:
        """Returns the prediction that `store` took apart."""
        raise NotImplementedError(f"{type(self).__name__} does not read predictions")


class GradientSynthesiser(Synthesiser):
    r"""A network whose output *is* the gradient, by regression on the truth: $\frac{1}{2m}\sum_n \lVert M(y_n, c_n) - m\delta_n \rVert^2$.

    Reference:
        Jaderberg et al. 2016, arXiv 1608.05343, appendix "Feed-forward implementation details".
    """

    @abstractmethod
    def forward(
        self, y: Float[Tensor, "m *shape"], label: Float[Tensor, "m classes"] | None = None
    ) -> Float[Tensor, "m *shape"]:
        """Returns the predicted gradient of each sample's loss."""

    def predict(self, y: Tensor, label: Tensor | None, samples: int) -> Prediction:
        """Runs the network once; autograd keeps what learning from it takes."""
        dtype = next((parameter.dtype for parameter in self.parameters()), y.dtype)
        prediction = self(y.to(dtype), None if label is None else label.to(dtype))
        return Prediction(prediction.detach() / samples, prediction)

    def learn(
        self, prediction: Prediction, truth: Tensor | None, samples: int, sample_losses: Callable[[], Tensor] | None
    ) -> Tensor | None:
        """Regresses on the truth."""
        if truth is None:
            return None
        # dL/d(network's output) = (output - m truth) / m, which is the credit minus the truth: the loss needs no graph.
        difference = prediction.credit.sub_(truth)
        self.regress(prediction, difference)
        flat = difference.flatten()  # a view, unless the memory is in another order (channels last)
        return torch.dot(flat, flat) * (samples / 2)

    def regress(self, prediction: Prediction, difference: Tensor) -> None:
        """Leaves the gradients of the parameters, given that of the loss with respect to the network's output."""
        if prediction.graph.requires_grad:  # not if no sample has a class, or nothing in a user's module learns
            torch.autograd.backward(prediction.graph, difference)


def zero(layer: nn.Module) -> nn.Module:
    """Starts a layer at zero, weights and biases, so that the first synthetic gradients are zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
