"""Cutting a model into blocks by tracing its own forward pass.

The model is traced with `torch.fx`, only as deep as the cuts lie: a module that holds no cut inside is called as it is, whatever
it does. The traced operations are dealt to the blocks in the order in which they run, and a value that a later block needs
travels through every block between. The blocks call the user's own modules and parameters; nothing is copied.
"""

import contextlib
import difflib
import inspect
import linecache
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, no_type_check
from unittest import mock

import torch
from torch import fx, nn

_CONSTRUCTORS = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros")
_NORMALISATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
_TORCH = os.path.dirname(torch.__file__)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


class CannotCutError(ValueError):
    """A model cannot be cut where it was asked to be."""


class _Root(nn.Module):
    """Calls the model with one argument, so that further arguments of its forward keep their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return self.model(inputs)


class _Tracer(fx.Tracer):
    """Traces a model as deep as `leaf` allows and notes for each operation the block that it falls into."""

    proxy_buffer_attributes = True

    def __init__(self, leaf: Callable[[str, nn.Module], bool], begins: Callable[[str], bool]) -> None:
        super().__init__(autowrap_modules=(math,))
        self._leaf, self._begins = leaf, begins
        self.block, self._has_weights = 0, False
        self.began: list[str] = []  # the cuts taken, in the order of execution
        self.entered: list[str] = []  # every module called, in the order of execution

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        name = _public(module_qualified_name)
        return bool(name) and self._leaf(name, m)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        name = _public(self.path_of_module(m))
        if name not in self.entered:
            self.entered.append(name)
            if self._begins(name):
                self.began.append(name)
                # A block without weights has nothing to learn: what came before joins the block that begins here.
                self.block += self._has_weights
                self._has_weights = False
        if self.is_leaf_module(m, self.path_of_module(m)):
            self._has_weights |= any(True for _ in m.parameters())
        return super().call_module(m, forward, args, kwargs)

    @no_type_check  # a checker's wrapper would be one more frame
    def to_bool(self, obj: fx.Proxy) -> bool:
        # An assertion about the input checks the user's usage; the trace takes it as true. Any other branch is refused.
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        if linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("assert "):
            return True
        return super().to_bool(obj)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["block"] = self.block
        self._has_weights |= node.op == "get_attr"
        return node


def _public(name: str) -> str:
    """Turns a name under `_Root` into the user's own."""
    return name.removeprefix("model").removeprefix(".")


def trace(model: nn.Module, leaf: Callable[[str, nn.Module], bool], begins: Callable[[str], bool]) -> tuple[_Tracer, fx.Graph]:
    """Traces a model in its present mode.

    Raises:
        CannotCutError: With the line that cannot be traced and the ways out.
    """
    tracer = _Tracer(leaf, begins)
    try:
        with _traceable_constructors(tracer):
            return tracer, tracer.trace(_Root(model))
    except CannotCutError:
        raise
    except Exception as error:  # whatever a user's forward raises when it is fed a proxy
        raise CannotCutError(_explain(model, error)) from error


@contextlib.contextmanager
def _traceable_constructors(tracer: fx.Tracer) -> Iterator[None]:
    """Lets ``torch.arange(x.size(1))`` and its kin be traced: they accept no proxies by themselves."""

    def wrap(original: Callable) -> Callable:
        def construct(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(value, fx.Proxy) for value in [*args, *kwargs.values()]):
                return tracer.create_proxy("call_function", original, args, kwargs)
            return original(*args, **kwargs)

        return construct

    with contextlib.ExitStack() as patches:
        for name in _CONSTRUCTORS:
            patches.enter_context(mock.patch.object(torch, name, wrap(getattr(torch, name))))
        yield


def untraceable_module(model: nn.Module, error: BaseException) -> str | None:
    """Returns the name of the innermost of the user's modules in whose forward an error arose, or ``None``."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
        if frame.f_code.co_name == "forward" and id(owner) in names:
            found = names[id(owner)]
    return found


def _explain(model: nn.Module, error: BaseException) -> str:
    """Says at which line of which module tracing stopped, and what to do instead."""
    name = untraceable_module(model, error)
    owner = model if not name else model.get_submodule(name)
    where = f"{type(owner).__name__}.forward" + (f" (module '{name}')" if name else "")
    file = inspect.getsourcefile(type(owner))
    lines = [entry for entry in traceback.extract_tb(error.__traceback__) if entry.filename == file]
    at = f"line {lines[-1].lineno} of {lines[-1].filename}, in {where}, `{lines[-1].line}`" if lines else where
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"cannot cut {type(model).__name__}: {at} cannot be traced ({reason}); cut only outside of that module, move the line into "
        "a submodule of its own (a module without cuts inside may do anything), or write the model as an nn.Sequential of blocks"
    )


def names_for(model: nn.Module, blocks: Sequence[str] | None) -> list[str]:
    """Returns where blocks may begin: the modules that were named, or the children that hold weights.

    A child without weights, or with those of a normalisation only, belongs to the block before it.

    Raises:
        CannotCutError: If a name is not a module of the model.
    """
    known = [name for name, _ in model.named_modules() if name]
    if blocks is None:
        return [name for name, module in _children(model) if _holds_weights(module)]
    for name in blocks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:8]
            raise CannotCutError(f"no module is named {name!r} in {type(model).__name__}; did you mean {', '.join(near)}?")
    return list(blocks)


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the children that are called: a list or dict of modules is never called itself, its members are."""
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS):
            yield from _children(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _holds_weights(module: nn.Module) -> bool:
    return any(
        any(True for _ in part.parameters(recurse=False)) and not isinstance(part, _NORMALISATIONS) for part in module.modules()
    )


class Piece(NamedTuple):
    """What runs one block.

    Attributes:
        name: The first module with weights inside.
        body: The operations.
        takes: How many values it takes.
    """

    name: str
    body: nn.Module
    takes: int


def ancestors(names: Sequence[str]) -> set[str]:
    """Returns the names of the modules that hold the named ones; these are traced through.

    Example:
        >>> sorted(ancestors(["a.b.c", "d"]))
        ['a', 'a.b']
    """
    return {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)}


def cut(model: nn.Module, names: Sequence[str], *, strict: bool) -> list[Piece]:
    """Cuts a model, in its present mode, where the named modules begin.

    Args:
        model: The user's model.
        names: Names of modules; each begins a new block, unless nothing with weights came before it.
        strict: Whether a name that the forward pass never reaches is an error.

    Returns:
        What runs each block, bottom to top.

    Raises:
        CannotCutError: If the forward pass cannot be traced, or never calls a named module.
    """
    if not names:
        return [Piece("", model, 1)]
    above, wanted = ancestors(names), set(names)
    tracer, graph = trace(model, lambda name, _: name not in above, wanted.__contains__)
    missed = [name for name in names if name not in tracer.began]
    if strict and missed:
        raise CannotCutError(
            f"the forward pass of {type(model).__name__} never calls {', '.join(missed)} as a module, so no block can begin there; "
            f"it calls {', '.join(name for name in tracer.entered if name)}"
        )
    return _deal(model, tracer.root, graph)


def _deal(model: nn.Module, root: nn.Module, graph: fx.Graph) -> list[Piece]:
    """Deals the operations of a traced model to blocks, with the values that travel between them."""
    nodes = list(graph.nodes)
    last = nodes[-1].meta["block"]
    pieces = []
    for block in range(last + 1):
        incoming = [n for n in nodes if n.op == "placeholder"] if block == 0 else _crossing(nodes, block)
        outgoing = _crossing(nodes, block + 1) if block < last else None
        own = [n for n in nodes if n.meta["block"] == block and n.op not in ("placeholder", "output", "get_attr")]
        called = [_public(str(n.target)) for n in own if n.op == "call_module"]
        called.sort(key=lambda name: not any(True for _ in model.get_submodule(name).parameters()))  # those with weights first
        body = _plain_sequence(root, incoming, own, outgoing, nodes[-1])
        if body is None:
            body = fx.GraphModule(root, _block_graph(incoming, own, outgoing, nodes[-1]))
        pieces.append(Piece(called[0] if called else "", body, len(incoming)))
    return pieces


def _plain_sequence(
    root: nn.Module, incoming: list[fx.Node], own: list[fx.Node], outgoing: list[fx.Node] | None, output: fx.Node
) -> nn.Module | None:
    """Returns the user's own module, or a sequence of them, if that is all that a block is; it runs faster than a graph."""
    value, modules = (incoming[0] if len(incoming) == 1 else None), []
    for node in own:
        if node.op != "call_module" or node.args != (value,) or node.kwargs:
            return None
        value = node
        modules.append(root.get_submodule(str(node.target)))
    if [value] != (outgoing if outgoing is not None else [output.args[0]]):
        return None
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _crossing(nodes: list[fx.Node], block: int) -> list[fx.Node]:
    """Returns the values made below a block that it or one above it needs; attributes are fetched anew where they are used."""
    return [
        node
        for node in nodes
        if node.meta["block"] < block and node.op != "get_attr" and any(user.meta["block"] >= block for user in node.users)
    ]


def _block_graph(incoming: list[fx.Node], own: list[fx.Node], outgoing: list[fx.Node] | None, output: fx.Node) -> fx.Graph:
    """Writes the graph of one block: its inputs, its operations, and what it hands up (``None``: the model's output)."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"value_{index}") for index, node in enumerate(incoming)}

    def look_up(node: fx.Node) -> fx.Node:
        if node not in copies:
            assert node.op == "get_attr", f"{node} is used before it is made"
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in own:
        copies[node] = graph.node_copy(node, look_up)
    if outgoing is None:
        graph.output(fx.map_arg(output.args[0], look_up))
    else:
        values = tuple(look_up(node) for node in outgoing)
        graph.output(values if len(values) > 1 else values[0])
    return graph
