"""The repaired step as one compiled loop that reads and writes each number once. It needs numba; `fused.py` does without if it must."""

import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lockfree.server.fused import Piece, Step, Sums

ENOUGH = 1 << 19
"""Numbers that are worth a thread."""

# `made` may be in the memory of `now` or `then`. There the loop could do but one number at a time, so it writes elsewhere first.
_BLOCK = 1 << 10

if numba.config.DISABLE_JIT:  # pyrefly: ignore[missing-attribute]
    raise ImportError("numba is told not to compile: what is below would be slower than what it replaces")


def sweep(pieces: Sequence[Piece], step: Step) -> Sums:
    """Takes the step, in as many threads as PyTorch has; which of them does a piece is never seen in the numbers.

    Args:
        pieces: All that the step touches.
        step: The step.

    Returns:
        What it has measured, summed in the order of the pieces.
    """
    found = [Sums()] * len(pieces)
    pending = iter(enumerate(pieces))
    with np.errstate(over="ignore"):
        numbers = {kind: _numbers(step, kind.type) for kind in (np.dtype(np.float32), np.dtype(np.float64))}

    def work() -> None:
        for place, piece in pending:
            found[place] = _one(piece, numbers)

    threads = min(torch.get_num_threads(), sum(piece.g.numel() for piece in pieces) // ENOUGH)
    if threads > 1:
        with ThreadPoolExecutor(threads - 1) as pool:  # not kept: a process with threads cannot be forked
            others = [pool.submit(work) for _ in range(threads - 1)]
            work()
            for other in others:
                other.result()
    else:
        work()
    return Sums.of(found)


def _numbers(step: Step, kind: Any) -> tuple[Any, ...]:
    return tuple(map(kind, (step.kept, step.eps, -step.rate, -step.rate * step.strength)))


def _one(piece: Piece, numbers: dict[np.dtype, tuple[Any, ...]]) -> Sums:
    arrays = [tensor.detach().numpy() for tensor in piece[:4]]
    mean_square = arrays[0] if piece.mean_square is None else piece.mean_square.numpy()
    return Sums(*_step(*arrays, mean_square, piece.mean_square is not None, *numbers[mean_square.dtype]))


# ---- compiled ------------------------------------------------------------------------------------------------------------------


def _multiply_add(context, a, b, c):
    """$ab + c$ rounded once, as PyTorch's own step does it: without a term the step is plain SGD's to the bit."""

    def generate(context, builder: ir.IRBuilder, signature, arguments):
        return builder.fma(*arguments)

    return a(a, b, c), generate


_fma: Any = intrinsic(_multiply_add)


def _signature(kind: Any) -> Any:
    numbers = kind[::1]
    return types.UniTuple(types.float64, 3)(*[numbers] * 5, types.boolean, *[kind] * 4)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles for both types, or finds what was compiled before."""
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",  # x / 0 is infinite, not an error
        "fastmath": {"reassoc"},  # sums in lanes; what is not finite must stay visible, so neither "nnan" nor "ninf"
    }
    signatures = [_signature(kind) for kind in (types.float32, types.float64)]
    plain = inspect.unwrap(function)  # tests check types of all functions
    try:
        return numba.njit(signatures, cache=True, **options)(plain)
    except (RuntimeError, OSError):  # there is nowhere to keep it
        return numba.njit(signatures, **options)(plain)


@_compiled
def _block(g, now, then, made, mean_square, adaptive, kept, eps, descent, repair):
    """Steps where nothing that is read lies where something is written."""
    length = excess = gap = 0.0
    zero, one = g.dtype.type(0), g.dtype.type(1)
    near = kept >= 0.5  # as `torch.lerp`: from the end that is nearer
    part = one - kept if near else kept
    for i in range(len(g)):
        square = g[i] * g[i]
        length += square
        square = square if math.isfinite(square) else zero
        away = now[i] - then[i]
        gap += away * away
        term = away * square
        if adaptive:
            mean = mean_square[i]
            mean = _fma(part, mean - square, square) if near else _fma(part, square - mean, mean)
            mean_square[i] = mean
            term = term / np.sqrt(mean + eps)
        term = term if math.isfinite(term) else zero
        excess += term * term
        made[i] = _fma(term, repair, _fma(g[i], descent, now[i]))
    return length, excess, gap


@_compiled
def _step(g, now, then, made, mean_square, adaptive, kept, eps, descent, repair):
    """Steps by ``descent`` times g and ``repair`` times the term; returns the squared norms of g, term and gap."""
    length = excess = gap = 0.0
    room = np.empty(_BLOCK, g.dtype)
    for start in range(0, len(g), _BLOCK):
        part = slice(start, min(start + _BLOCK, len(g)))
        sums = _block(g[part], now[part], then[part], room, mean_square[part], adaptive, kept, eps, descent, repair)
        length, excess, gap = length + sums[0], excess + sums[1], gap + sums[2]
        goal = made[part]
        for i in range(len(goal)):
            goal[i] = room[i]
    return length, excess, gap
