"""Choosing where to cut a model into K pieces whose saved activations take about the same memory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lockfree.cut import CannotCutError, cut, trace, untraceable_module
from lockfree.memory import ActivationMeter
from lockfree.rng import undisturbed
from lockfree.values import Values, as_leaves, clone, detach, tensors


class _Piece(NamedTuple):
    """The smallest piece between two possible cuts: what it saves for its backward, and what comes in at its bottom."""

    name: str
    saved: int
    incoming: int


def balanced_names(model: nn.Module, count: int, example_input: Values) -> list[str]:
    """Chooses ``count - 1`` modules to begin blocks at, so that the largest piece is as small as it can be.

    A piece costs the bytes that its backward keeps plus the bytes of the values that cross its lower border; so among equal
    balances the cut through a narrow place wins over one in the middle of a residual branch.

    Args:
        model: The user's model; it is run once in training mode and left as it was.
        count: Number of blocks, 1 or more.
        example_input: A batch of at least two samples.

    Returns:
        Names of modules, in the order of execution.

    Raises:
        CannotCutError: If the model has fewer places to cut than that.
        ValueError: If ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"blocks={count}: the number of blocks must be at least 1")
    if count == 1:
        return []
    pieces = _measure(model, _candidates(model), example_input)
    if count > len(pieces):
        raise CannotCutError(
            f"{type(model).__name__} can be cut into at most {len(pieces)} blocks with weights, asked for {count}: "
            f"pass blocks={len(pieces)} or fewer, or name the modules"
        )
    return [pieces[start].name for start in _smallest_maximum(pieces, count)[1:]]


def _candidates(model: nn.Module) -> list[str]:
    """Returns every module at which a block could begin, in the order of execution, one for each place."""
    opaque: set[str] = set()
    while True:
        try:
            with undisturbed(model):
                model.train()
                tracer, _ = trace(model, lambda name, module: name in opaque or _is_layer(module), lambda name: True)
            break
        except CannotCutError as error:
            # A module whose own forward cannot be traced is still good as one piece; only the model itself must be traceable.
            inner = untraceable_module(model, error.__cause__ or error)
            if not inner or inner in opaque:
                raise
            opaque.add(inner)
    return [name for name in tracer.began if name]


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own layers, which are not cut inside."""
    return module.__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)


def _measure(model: nn.Module, names: Sequence[str], example_input: Values) -> list[_Piece]:
    """Runs the model once, cut at every candidate, and measures each piece."""
    measured = []
    with undisturbed(model), torch.enable_grad():
        model.train()
        finest = cut(model, names, strict=False)
        values, held = example_input, []
        for name, body, takes in finest:
            meter = ActivationMeter(model)
            with meter.watch():
                copies = clone(values)  # a piece may begin with an operation in place
                made = body(copies) if takes == 1 else body(*copies)
            incoming = sum(tensor.untyped_storage().nbytes() for tensor in tensors(values))
            measured.append(_Piece(name, meter.peak, incoming))
            values = as_leaves(detach(made), made)
            held.append(made)
    return measured


def _smallest_maximum(pieces: Sequence[_Piece], count: int) -> list[int]:
    """Returns the first pieces of ``count`` consecutive groups whose largest cost is smallest (dynamic programming)."""
    total = len(pieces)

    def cost(start: int, end: int) -> int:
        return pieces[start].incoming + sum(piece.saved for piece in pieces[start:end])

    # best[end] = (largest cost, sum of squared costs, starts) of the pieces before `end` in the groups made so far
    best: list[tuple[int, int, list[int]] | None] = [None] * (total + 1)
    best[0] = (0, 0, [])
    for _ in range(count):
        longer: list[tuple[int, int, list[int]] | None] = [None] * (total + 1)
        for end in range(1, total + 1):
            options = [
                (max(known[0], price), known[1] + price**2, [*known[2], start])
                for start in range(end)
                if (known := best[start]) is not None
                for price in (cost(start, end),)
            ]
            longer[end] = min(options, default=None)
        best = longer
    found = best[total]
    assert found is not None
    return found[2]
