"""Gradient checkpointing: running a piece again on the way down instead of keeping its activations."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from lockfree.values import clone


def recomputed(module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls what runs a module, keeps what it is called with alone, and calls it again when it is differentiated.

    Random numbers are drawn again as they were; running statistics stay as the first run left them. Weights must not change in
    between.

    Args:
        module: Whose running statistics are kept.
        call: What runs it.
        *args: Of the call.
        **kwargs: Of the call.

    Returns:
        What the call returns.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> torch.equal(recomputed(layer, layer, x), layer(x))
        True

    Reference:
        Chen, Xu, Zhang, Guestrin 2016, "Training deep nets with sublinear memory cost", arXiv 1604.06174, section 4.1.
    """
    if not torch.is_grad_enabled():
        return call(*args, **kwargs)

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), _leaving_no_trace(module)

    def run(*args: Any, **kwargs: Any) -> Any:
        # What is kept for the second run must not be overwritten by the first.
        return call(*clone(args), **clone(kwargs)) if in_place else call(*args, **kwargs)

    in_place = any(getattr(inner, "inplace", False) for inner in module.modules())
    return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def _leaving_no_trace(module: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        torch.clear_autocast_cache()  # weights change before the next forward pass, which must not find copies of these


def run_in_parts(body: nn.Module, *values: Any) -> Any:
    r"""Runs a module so that its parts run again when they are differentiated; the last one keeps its activations.

    A sequence of n modules is taken in about $\sqrt n$ parts; of any other module the parts are the outermost modules inside that
    hold others.

    Args:
        body: The module.
        *values: What it is called with.

    Returns:
        What it returns.
    """
    modules = _chain(body)
    if modules is None:
        with ExitStack() as stack:
            for part in _parts(body):
                stack.enter_context(_recomputing(part))
            return body(*values)
    size = math.ceil(len(modules) / max(round(math.sqrt(len(modules))), 1))
    starts = range(0, len(modules), size)
    for start in starts:
        part = nn.Sequential(*modules[start : start + size])
        values = (part(*values) if start == starts[-1] else recomputed(part, part, *values),)
    return values[0]


def _chain(body: nn.Module) -> list[nn.Module] | None:
    """Returns the modules of a plain sequence, those of a sequence within a sequence instead of it; ``None`` if it is none."""
    if type(body) is not nn.Sequential:
        return None
    modules = list(body)
    return _chain(modules[0]) or modules if len(modules) == 1 else modules


def _parts(module: nn.Module) -> list[nn.Module]:
    """Returns the outermost modules that are called inside and hold others."""
    if isinstance(module, fx.GraphModule):
        called = dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "call_module")
        inside = [module.get_submodule(name) for name in called]
    else:
        inside = list(module.children())
    found = []
    for child in inside:
        if isinstance(child, nn.ModuleList | nn.ModuleDict):  # never called itself
            found += _parts(child)
        elif any(True for _ in child.children()):
            found.append(child)
    return found


@contextmanager
def _recomputing(part: nn.Module) -> Iterator[None]:
    original = part.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return recomputed(part, original, *args, **kwargs)

    # An instance's own forward hides the class's; written past nn.Module.__setattr__, which is slow.
    part.__dict__["forward"] = forward
    try:
        yield
    finally:
        part.__dict__.pop("forward", None)
