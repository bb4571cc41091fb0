r"""Layers whose backward pass uses other weights than their forward pass: a registry by layer type.

A layer $y = f(x, W)$ that is linear in x sends $\partial L/\partial x = J(W)^T \delta$ down. With feedback weights B of the shape
of W it sends $J(B)^T \delta$ instead; everything else, the gradient of W included, stays as it is.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Backward = Callable[[nn.Module, Tensor, Tensor, torch.Size], Tensor]

_BACKWARDS: dict[type[nn.Module], Backward] = {}
# Layers without a matrix to transpose on the way down: nothing to replace.
_EXEMPT = (nn.Embedding, nn.EmbeddingBag)


def register_feedback(layer_type: type[nn.Module]) -> Callable[[Backward], Backward]:
    """Registers how a type of layer sends credit down through feedback weights.

    The function gets (layer, feedback weights of the weight's shape, dL/dy, shape of x) and returns dL/dx.

    Example:
        >>> class Scale(nn.Linear):
        ...     pass
        >>> @register_feedback(Scale)
        ... def _(layer, feedback, gradient, shape):
        ...     return gradient @ feedback
    """

    def register(backward: Backward) -> Backward:
        _BACKWARDS[layer_type] = backward
        return backward

    return register


@register_feedback(nn.Linear)
def _linear(layer: nn.Module, feedback: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    return gradient @ feedback


def _convolution(layer: Any, feedback: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return _by_autograd(layer, feedback, gradient, shape)
    empty = gradient.new_empty(1).expand(shape)
    transposed, no_output_padding = False, [0] * len(layer.kernel_size)
    wanted = [True, False, False]  # dL/dx alone
    arguments = (layer.stride, layer.padding, layer.dilation, transposed, no_output_padding, layer.groups, wanted)
    return torch.ops.aten.convolution_backward(gradient, empty, feedback, None, *arguments)[0]


def _by_autograd(layer: nn.Module, feedback: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    """Differentiates the layer with B for W; it is linear in x, so any x will do."""
    with torch.enable_grad():
        x = gradient.new_zeros(shape, requires_grad=True)
        y = torch.func.functional_call(layer, {"weight": feedback}, (x,))
    return torch.autograd.grad(y, x, gradient)[0]


for _type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_feedback(_type)(_convolution)


class FeedbackWeights(nn.Module):
    """Fixed random feedback weights for every layer of a block, as buffers named after the layers.

    Args:
        layers: The modules of a block, each with its name.
        rule: Who asks, for the error message.

    Raises:
        ValueError: If a layer with a weight matrix has no registered feedback form.
    """

    def __init__(self, layers: Iterable[tuple[str, nn.Module]], *, rule: str) -> None:
        super().__init__()
        self._layers: list[nn.Module] = []
        for name, layer in layers:
            matrices = [key for key, value in layer.named_parameters(recurse=False) if value.dim() > 1]
            if not matrices or isinstance(layer, _EXEMPT):
                continue
            if matrices != ["weight"]:
                raise ValueError(
                    f"{rule} serves layers with one matrix, called weight; {type(layer).__name__} ('{name}') has "
                    f"{', '.join(matrices)}: build it from such layers, or register one with register_feedback"
                )
            if type(layer) not in _BACKWARDS:
                raise ValueError(
                    f"{rule} does not know how a {type(layer).__name__} ('{name}') sends credit down: register it with "
                    "lockfree.feedback.register_feedback, or build it from layers that are known"
                )
            weight = layer.get_parameter("weight")
            # In the usual memory order, so that what is drawn does not depend on the weight's.
            feedback = torch.empty_like(weight, requires_grad=False, memory_format=torch.contiguous_format)
            nn.init.kaiming_uniform_(feedback, a=5**0.5)  # as PyTorch initialises these layers' weights
            self.register_buffer(f"layer_{len(self._layers)}", feedback)
            self._layers.append(layer)

    def pairs(self) -> Iterator[tuple[nn.Module, Tensor]]:
        """Yields each layer with its feedback weights."""
        return zip(self._layers, self.buffers(), strict=True)


class _SendDown(torch.autograd.Function):
    """The identity of y, whose backward gives y its gradient and x the one through the feedback weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, feedback: Tensor, layer: nn.Module) -> Tensor:
        ctx.save_for_backward(feedback)
        ctx.layer, ctx.shape = layer, x.shape
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (feedback,), (gradient,) = ctx.saved_tensors, gradients
        down = _BACKWARDS[type(ctx.layer)](ctx.layer, feedback.to(gradient.dtype), gradient, ctx.shape)
        return down, gradient, None, None


@contextmanager
def routed(block: nn.Module, weights: FeedbackWeights) -> Iterator[None]:
    """Lets the layers of a block run as they are, but differentiate through their feedback weights."""
    pairs = list(weights.pairs())
    for layer, feedback in pairs:
        layer.forward = _forward_through(layer, feedback)
    try:
        yield
    finally:
        for layer, _ in pairs:
            del layer.forward  # the class's own forward shows again


def _forward_through(layer: nn.Module, feedback: Tensor) -> Callable[[Tensor], Tensor]:
    original = layer.forward

    def forward(x: Tensor, *more: Tensor) -> Tensor:
        if more:
            kind = type(layer).__name__
            raise ValueError(
                f"feedback weights serve layers of one input, {kind} got {1 + len(more)}: build it from such layers"
            )
        if not x.requires_grad:
            return original(x)
        return _SendDown.apply(x, original(x.detach()), feedback, layer)

    return forward
