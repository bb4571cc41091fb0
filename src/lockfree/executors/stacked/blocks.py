"""Blocks of equal structure run forward, differentiated and stepped as one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lockfree.stacking import Descent, ModuleStack, ParameterStack


class BlockStack(ABC):
    """n blocks as one.

    Attributes:
        parameters: What they learn.
    """

    parameters: Sequence[ParameterStack] = ()

    @property
    def holds(self) -> bool:
        """Whether it still stands for the blocks: their parameters are its own, and they are in the modes that it was made in."""
        return all(stack.holds for stack in self.parameters)

    @abstractmethod
    def room(self, inputs: Tensor) -> Tensor:
        """Returns memory for the outputs that belong to these inputs."""

    @abstractmethod
    def forward(self, inputs: Tensor, outputs: Tensor) -> None:
        """Runs the blocks on ``inputs``, shape (n, m, ...), and writes what they make to ``outputs``."""

    @abstractmethod
    def backward(self, credit: Tensor, *, reports: bool) -> None:
        """Takes the credit, shape of the outputs; ``reports``: somebody will ask for dL/dx."""

    @abstractmethod
    def report(self, messages: Tensor, *, first: int = 0, beta: float = 0.0, alpha: float = 1.0) -> None:
        r"""Sets messages of the last `backward`: $m \leftarrow \beta m + \alpha\,\partial L/\partial x$.

        Args:
            messages: m of some neighbouring cells, shape of their inputs.
            first: Which cell of the stack comes first in it.
            beta: How much is kept of what is there; if 0, it need not be finite.
            alpha: How much comes of the cells' own.
        """

    @abstractmethod
    def descend(self, descent: Descent) -> None:
        """Hands over the gradients of the last `backward`."""


class Activation(NamedTuple):
    """An elementwise function whose derivative follows from its value.

    Attributes:
        apply: Writes the function of a tensor in its place.
        differentiate: Returns the gradient before the function, given (credit, value, room for it).
    """

    apply: Callable[[Tensor], Tensor]
    differentiate: Callable[[Tensor, Tensor, Tensor], Tensor]


# Overloads are named: to find the one that fits takes about as long as such an operation.
_relu_backward = torch.ops.aten.threshold_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input

ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation(torch.relu_, lambda credit, value, room: _relu_backward(credit, value, 0, grad_input=room)),
    nn.Tanh: Activation(torch.tanh_, lambda credit, value, room: _tanh_backward(credit, value, grad_input=room)),
    nn.Sigmoid: Activation(torch.sigmoid_, lambda credit, value, room: _sigmoid_backward(credit, value, grad_input=room)),
}
_IDENTITY = Activation(lambda values: values, lambda credit, value, room: credit)


def affine(body: nn.Module) -> tuple[nn.Linear, Activation] | None:
    """Returns what a body consists of if that is an affine map and at most one `ACTIVATIONS`, all learning; else ``None``."""
    parts = [part for part in body.modules() if not any(True for _ in part.children())]
    plain = all(type(part) is nn.Sequential for part in body.modules() if part not in parts)
    kinds = [type(part) for part in parts]
    if not plain or kinds[:1] != [nn.Linear] or len(kinds) > 2 or (len(kinds) == 2 and kinds[1] not in ACTIVATIONS):
        return None
    if any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in body.modules()):
        return None
    if not all(parameter.requires_grad for parameter in body.parameters()):
        return None
    layer = parts[0]
    assert isinstance(layer, nn.Linear)
    return layer, ACTIVATIONS[kinds[1]] if len(kinds) == 2 else _IDENTITY


class AffineBlocks(BlockStack):
    r"""Affine maps with an activation, $y = f(W x + b)$, by hand: three batched products a tick.

    $$g = f'(\cdot)\,\delta, \qquad \partial L/\partial x = g W, \qquad \partial L/\partial W = g^T x, \qquad
    \partial L/\partial b = \textstyle\sum_m g_m$$

    Args:
        layers: The maps.
        activation: f.
    """

    def __init__(self, layers: Sequence[nn.Linear], activation: Activation) -> None:
        self._weight = ParameterStack([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self._bias = ParameterStack(biases) if biases else None
        self.parameters = [self._weight] + ([self._bias] if self._bias else [])
        self._activation = activation
        self._transposed = self._weight.value.mT
        self._offset = None if self._bias is None else self._bias.value[:, None]
        self._x = self._y = self._g = torch.empty(0)
        self._gradient_room = torch.empty(0)

    def room(self, inputs: Tensor) -> Tensor:
        return inputs.new_empty(*inputs.shape[:-1], self._weight.value.shape[1])

    def forward(self, inputs: Tensor, outputs: Tensor) -> None:
        x, y = inputs.flatten(1, -2), outputs.flatten(1, -2)
        if self._offset is None:
            torch.bmm(x, self._transposed, out=y)
        else:
            torch.baddbmm(self._offset, x, self._transposed, out=y)
        self._activation.apply(y)
        self._x, self._y = x, y

    def backward(self, credit: Tensor, *, reports: bool) -> None:
        if self._gradient_room.shape != self._y.shape:
            self._gradient_room = torch.empty_like(self._y)
        self._g = self._activation.differentiate(credit.flatten(1, -2), self._y, self._gradient_room)

    def report(self, messages: Tensor, *, first: int = 0, beta: float = 0.0, alpha: float = 1.0) -> None:
        cells = slice(first, first + messages.shape[0])
        messages.flatten(1, -2).baddbmm_(self._g[cells], self._weight.value[cells], beta=beta, alpha=alpha)

    def descend(self, descent: Descent) -> None:
        descent.follow_product(self._weight, self._g.mT, self._x)
        if self._bias is not None:
            descent.follow(self._bias, self._g.sum(1))


class ModuleBlocks(BlockStack):
    """Any blocks: layer by layer, or by `torch.func.vmap`.

    Args:
        bodies: What runs the blocks.
    """

    def __init__(self, bodies: Sequence[nn.Module]) -> None:
        self._modules = ModuleStack(bodies)
        self.parameters = self._modules.parameters
        self._shape = torch.Size()  # of what one block makes
        self._x = self._y = self._messages = torch.empty(0)

    @property
    def holds(self) -> bool:
        return self._modules.holds

    def agrees(self, bodies: Sequence[nn.Module], inputs: Tensor) -> bool:
        """Whether each block by itself makes of its input what they make together."""
        made: list[Tensor] = []

        def alone() -> list[Tensor]:
            made.extend(body(x) for body, x in zip(bodies, inputs, strict=True))
            return made

        agrees = self._modules.gives(alone, inputs)
        self._shape = made[0].shape
        return agrees

    def room(self, inputs: Tensor) -> Tensor:
        return inputs.new_empty(len(inputs), *self._shape)

    def forward(self, inputs: Tensor, outputs: Tensor) -> None:
        self._x = inputs.detach().requires_grad_()
        self._y = self._modules.run(self._x)
        outputs.copy_(self._y.detach())

    def backward(self, credit: Tensor, *, reports: bool) -> None:
        found = self._modules.differentiate(self._y, credit.to(self._y.dtype), (self._x,) if reports else ())
        self._x = self._y = torch.empty(0)
        self._messages = found[0] if found else self._x

    def report(self, messages: Tensor, *, first: int = 0, beta: float = 0.0, alpha: float = 1.0) -> None:
        kept = messages.mul_(beta) if beta else messages.zero_()
        kept.add_(self._messages[first : first + len(messages)], alpha=alpha)

    def descend(self, descent: Descent) -> None:
        self._modules.descend(descent)
