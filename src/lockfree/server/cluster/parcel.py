"""Messages as plain data and bytes, which travel between processes and are written to files without being pickled."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockfree.server.messages import Pulled, Push

_ALIGNMENT = 64  # of PyTorch's own memory. A product may come out differently in the last bit where it is less.


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """A tensor as its bytes, in the order in which they lie in memory.

    Attributes:
        kind: Its type, such as float32.
        shape: Its sizes, that of the largest stride first.
        order: The dimension that each of these is of.
        data: All of its memory, uint8.
    """

    kind: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Letter:
    """A message whose tensors are packed.

    Attributes:
        head: Its fields that are numbers.
        tensors: Weights or gradients.
        buffers: The buffers.
    """

    head: dict[str, Any]
    tensors: list[Parcel | None]
    buffers: list[Parcel | None]


def pack(tensors: Sequence[Tensor | None]) -> list[Parcel | None]:
    """Packs tensors, without a copy where that is possible.

    Args:
        tensors: Of any type and device; where nothing is, nothing will be.
    """
    return [None if tensor is None else _packed(tensor) for tensor in tensors]


def unpack(parcels: Sequence[Parcel | None], *, own: bool) -> list[Tensor | None]:
    """Makes tensors of what `pack` has packed, bit for bit, with the same strides.

    Args:
        parcels: The packed tensors, perhaps from another process.
        own: Whether they get memory of their own. Else they may lie in memory that nobody must write to.

    Example:
        >>> unpack(pack([torch.arange(4).reshape(2, 2).T, None]), own=True)
        [tensor([[0, 2],
                [1, 3]]), None]
    """
    return [None if parcel is None else _unpacked(parcel, own) for parcel in parcels]


def pack_pulled(pulled: Pulled) -> Letter:
    """Packs what the server hands out."""
    return Letter(_numbers(pulled), pack(pulled.weights), pack(pulled.buffers))


def unpack_pulled(letter: Letter) -> Pulled:
    """Undoes `pack_pulled`, without a copy where that is possible: a worker writes to none of it."""
    weights, buffers = unpack(letter.tensors, own=False), unpack(letter.buffers, own=False)
    return Pulled(**letter.head, weights=weights, buffers=buffers)  # pyrefly: ignore[bad-argument-type]


def pack_push(push: Push) -> Letter:
    """Packs what a worker has found."""
    return Letter(_numbers(push), pack(push.gradients), pack(push.buffers))


def unpack_push(letter: Letter) -> Push:
    """Undoes `pack_push`. All of it is copied: some optimizers write to gradients, and these lie in memory that others read."""
    gradients, buffers = unpack(letter.tensors, own=True), unpack(letter.buffers, own=True)
    return Push(**letter.head, gradients=gradients, buffers=buffers)  # pyrefly: ignore[bad-argument-type]


def _numbers(message: Pulled | Push) -> dict[str, Any]:
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _packed(tensor: Tensor) -> Parcel:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    order = tuple(sorted(range(tensor.dim()), key=lambda dimension: -tensor.stride(dimension)))
    if not tensor.permute(order).is_contiguous():  # it does not fill its memory
        tensor, order = tensor.contiguous(), tuple(range(tensor.dim()))
    dense = tensor.permute(order)
    kind = str(tensor.dtype).removeprefix("torch.")
    return Parcel(kind, tuple(dense.shape), order, dense.reshape(-1).view(torch.uint8).numpy())


def _unpacked(parcel: Parcel, own: bool) -> Tensor:
    if (
        own or not parcel.data.size or parcel.data.ctypes.data % _ALIGNMENT
    ):  # an empty array has no stride that a tensor may have
        memory = torch.empty(parcel.data.size, dtype=torch.uint8)
        memory.numpy()[:] = parcel.data
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            memory = torch.from_numpy(parcel.data)
    dense = memory.view(getattr(torch, parcel.kind)).reshape(parcel.shape)
    places = sorted(range(len(parcel.order)), key=parcel.order.__getitem__)  # the inverse permutation
    return dense.permute(places)
