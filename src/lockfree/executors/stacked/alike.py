"""Which blocks compute the same function of their weights and their input."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from lockfree.chain import Block


def anatomy(module: nn.Module) -> Any:
    """Describes a module: types, settings, modes, and the shapes of what it holds; weights and names play no part.

    Example:
        >>> anatomy(nn.Linear(2, 3)) == anatomy(nn.Linear(2, 3)), anatomy(nn.Linear(2, 3)) == anatomy(nn.Linear(3, 2))
        (True, False)
    """
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    held = [(_shape(tensor), tensor.requires_grad) for _, tensor in own]
    parts = [anatomy(part) for part in module.children()]
    graph = list(_operations(module.graph)) if isinstance(module, fx.GraphModule) else None
    settings = "" if isinstance(module, fx.GraphModule) else module.extra_repr()
    kind = fx.GraphModule if isinstance(module, fx.GraphModule) else type(module)  # each traced module has a class of its own
    return kind, settings, module.training, held, parts, graph


def _operations(graph: fx.Graph) -> Iterator[Any]:
    """Yields the operations of a traced module, with places instead of names."""
    places = {node: index for index, node in enumerate(graph.nodes)}
    attributes: dict[str, int] = {}
    for node in graph.nodes:
        named = node.op in ("call_module", "get_attr")
        target = attributes.setdefault(str(node.target), len(attributes)) if named else node.target
        if node.op in ("placeholder", "output"):
            target = None
        yield node.op, target, repr(fx.map_arg((node.args, node.kwargs), lambda other: places[other]))


def _shape(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def held_alone(blocks: Sequence[Block]) -> list[bool]:
    """Says of each block whether its parameters and buffers are its own."""
    owners: dict[int, int] = {}
    alone = [True] * len(blocks)
    for index, block in enumerate(blocks):
        for tensor in (*block.parameters(), *block.buffers()):
            owner = owners.setdefault(id(tensor), index)
            alone[owner], alone[index] = alone[owner] and owner == index, alone[index] and owner == index
    return alone
