"""Networks of equal structure run as one, layer by layer: a single operation of PyTorch for the same layer of all.

`torch.func.vmap` runs any function of many networks, and goes through several of its own operations for each of theirs. For the layers
that most networks are made of there is one that does the work of all: a batched product, a convolution with groups, a normalisation of
more channels.
"""

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


class Layout(Enum):
    """How the numbers of n networks lie in one tensor."""

    STACKED = "(n, m, ...)"
    CHANNELS = "(m, n c, ...)"


class Lain(NamedTuple):
    """The values of n networks at one place.

    Attributes:
        tensor: All of them.
        layout: How they lie in it.
    """

    tensor: Tensor
    layout: Layout

    def stacked(self, n: int) -> Tensor:
        """Returns them as (n, m, c, ...)."""
        return self.tensor if self.layout is Layout.STACKED else self.tensor.unflatten(1, (n, -1)).transpose(0, 1)

    def channels(self) -> Tensor:
        """Returns them as (m, n c, ...)."""
        return self.tensor if self.layout is Layout.CHANNELS else self.tensor.transpose(0, 1).flatten(1, 2)


class Layer(NamedTuple):
    """A layer of n networks.

    Attributes:
        module: That of the first network, for its settings.
        n: How many there are.
        parameters: Of all of them, by name, with n as first dimension.
        buffers: The same; what is written to them is what they become.
    """

    module: Any
    n: int
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]


Run = Callable[[Layer, Lain], Lain]


def _linear(layer: Layer, x: Lain) -> Lain:
    values, weight, bias = x.stacked(layer.n), layer.parameters["weight"], layer.parameters.get("bias")
    rows = values.flatten(1, -2)
    y = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
    return Lain(y.view(*values.shape[:-1], -1), Layout.STACKED)


def _convolution(function: Callable[..., Tensor]) -> Run:
    def run(layer: Layer, x: Lain) -> Lain:
        module, bias = layer.module, layer.parameters.get("bias")
        weights = layer.parameters["weight"].flatten(0, 1), None if bias is None else bias.flatten()
        y = function(x.channels(), *weights, module.stride, module.padding, module.dilation, layer.n * module.groups)
        return Lain(y, Layout.CHANNELS)

    return run


def _batch_norm(layer: Layer, x: Lain) -> Lain:
    module, buffers = layer.module, layer.buffers
    mean, variance = (buffers[name].flatten() if name in buffers else None for name in ("running_mean", "running_var"))
    if module.training and "num_batches_tracked" in buffers:
        buffers["num_batches_tracked"].add_(1)
    batch = module.training or mean is None
    y = F.batch_norm(x.channels(), mean, variance, *_scale(layer), batch, module.momentum, module.eps)
    return Lain(y, Layout.CHANNELS)


def _group_norm(layer: Layer, x: Lain) -> Lain:
    return Lain(
        F.group_norm(x.channels(), layer.n * layer.module.num_groups, *_scale(layer), layer.module.eps), Layout.CHANNELS
    )


def _scale(layer: Layer) -> tuple[Tensor | None, Tensor | None]:
    """Returns weight and bias of all channels of all networks, as far as there are any."""
    weight, bias = layer.parameters.get("weight"), layer.parameters.get("bias")
    return None if weight is None else weight.flatten(), None if bias is None else bias.flatten()


def _layer_norm(layer: Layer, x: Lain) -> Lain:
    y = F.layer_norm(x.stacked(layer.n), layer.module.normalized_shape, eps=layer.module.eps)
    between = [1] * (y.dim() - 1 - len(layer.module.normalized_shape))
    for name, combine in (("weight", torch.mul), ("bias", torch.add)):
        if name in layer.parameters:
            own = layer.parameters[name]
            y = combine(y, own.view(layer.n, *between, *own.shape[1:]))
    return Lain(y, Layout.STACKED)


def _elementwise(layer: Layer, x: Lain) -> Lain:
    return x._replace(tensor=layer.module(x.tensor))


def _pool(layer: Layer, x: Lain) -> Lain:
    return Lain(layer.module(x.channels()), Layout.CHANNELS)


def _flatten(layer: Layer, x: Lain) -> Lain:
    return Lain(x.stacked(layer.n).flatten(2), Layout.STACKED)


def _always(module: Any) -> bool:
    return True


def _zero_padded(module: Any) -> bool:
    return module.padding_mode == "zeros"


def _all_but_samples(module: Any) -> bool:
    return (module.start_dim, module.end_dim) == (1, -1)


_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_MEANS = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_ELEMENTWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Softplus, nn.Softsign, nn.LogSigmoid),
)

LAYERS: dict[type[nn.Module], tuple[Run, Callable[[Any], bool]]] = {
    nn.Linear: (_linear, _always),
    **{kind: (_convolution(function), _zero_padded) for kind, function in _CONVOLUTIONS.items()},
    # Without a momentum the running statistics are averages over all batches so far, in which each network might be elsewhere.
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), (_batch_norm, lambda module: module.momentum is not None)
    ),
    nn.GroupNorm: (_group_norm, _always),
    nn.LayerNorm: (_layer_norm, _always),
    **dict.fromkeys(_MEANS, (_pool, _always)),
    **dict.fromkeys(_MAXIMA, (_pool, lambda module: not module.return_indices)),
    nn.Flatten: (_flatten, _all_but_samples),
    **dict.fromkeys(_ELEMENTWISE, (_elementwise, _always)),
}
"""How a layer of n networks runs, and which settings of it are served."""

_OF_ONE = {
    torch.relu,
    torch.tanh,
    torch.sigmoid,
    F.relu,
    F.gelu,
    F.silu,
    F.elu,
    F.selu,
    F.leaky_relu,
    F.softplus,
    F.tanh,
    F.sigmoid,
}
_OF_TWO = {
    operator.add,
    operator.sub,
    operator.mul,
    operator.iadd,
    operator.isub,
    operator.imul,
    torch.add,
    torch.sub,
    torch.mul,
}
FUNCTIONS: frozenset[Any] = frozenset(_OF_ONE | _OF_TWO)
"""Elementwise functions of tensors of one shape, and of numbers."""

METHODS = frozenset({"relu", "tanh", "sigmoid", "add", "sub", "mul"})
"""The same as methods of a tensor."""


class Layerwise:
    """n networks of equal structure as one.

    Args:
        graph: The steps of the first.
        network: The first, for the settings of its layers.

    Example:
        >>> networks = [nn.Sequential(nn.Linear(2, 3), nn.ReLU()) for _ in range(4)]
        >>> together = Layerwise.of(networks[0])
        >>> stacks = torch.func.stack_module_state(networks)
        >>> together(*stacks, (torch.zeros(4, 5, 2),)).shape
        torch.Size([4, 5, 3])
    """

    def __init__(self, graph: fx.Graph, network: nn.Module) -> None:
        self._graph = graph
        self._layers = {node: network.get_submodule(_name(node)) for node in graph.nodes if node.op == "call_module"}

    @staticmethod
    def of(network: nn.Module) -> "Layerwise | None":
        """Returns it for networks like this one; ``None`` if one does something that is not in the tables."""
        hooked = any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in network.modules())
        names, all_names = (len(list(network.named_parameters(remove_duplicate=one))) for one in (True, False))
        if hooked or names != all_names or len(inspect.signature(network.forward).parameters) != 1:
            return None
        try:
            graph = fx.Tracer().trace(nn.Sequential(network))  # so that a single layer is a step like any other
        except Exception:  # a network may do anything while it is traced; then it is run another way
            return None
        return Layerwise(graph, network) if all(_served(node, network) for node in graph.nodes) else None

    def __call__(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], values: Sequence[Tensor]) -> Tensor:
        """Runs network i on slice i of each value.

        Args:
            parameters: By name in the network, with n as first dimension.
            buffers: The same; running statistics are brought up to date in place.
            values: Of shape (n, m, ...), as many as the network takes.

        Returns:
            What they make, shape (n, m, ...).
        """
        given, n = iter(values), len(values[0])
        at: dict[fx.Node, Lain] = {}
        for node in self._graph.nodes:
            if node.op == "placeholder":
                at[node] = Lain(next(given), Layout.STACKED)
            elif node.op == "call_module":
                layer = Layer(self._layers[node], n, _of(_name(node), parameters), _of(_name(node), buffers))
                at[node] = LAYERS[type(layer.module)][0](layer, at[node.args[0]])
            elif node.op == "output":
                return at[node.args[0]].stacked(n).contiguous()
            else:
                at[node] = _computed(node, at, n)
        raise AssertionError("a graph ends with its output")


def _name(node: fx.Node) -> str:
    """Returns the name of a step's layer in the network, which was traced inside a `nn.Sequential`."""
    return str(node.target).removeprefix("0").removeprefix(".")


def _of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}." if name else ""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _computed(node: fx.Node, at: Mapping[fx.Node, Lain], n: int) -> Lain:
    """Runs an elementwise step; where values lie differently, as the first of them does."""
    first = at[node.all_input_nodes[0]]

    def laid(other: fx.Node) -> Tensor:
        value = at[other]
        if value.layout is first.layout:
            return value.tensor
        return value.stacked(n) if first.layout is Layout.STACKED else value.channels()

    args, kwargs = fx.map_arg((node.args, node.kwargs), laid)
    function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
    return first._replace(tensor=function(*args, **kwargs))


def _served(node: fx.Node, network: nn.Module) -> bool:
    """Whether a step is in the tables."""
    if node.op == "call_module":
        module = network.get_submodule(_name(node))
        found = LAYERS.get(type(module))
        return found is not None and found[1](module) and len(node.args) == 1 and not node.kwargs
    if node.op in ("call_function", "call_method"):
        known = FUNCTIONS if node.op == "call_function" else METHODS
        return node.target in known and bool(node.all_input_nodes)
    return node.op == "placeholder" or (node.op == "output" and isinstance(node.args[0], fx.Node))
