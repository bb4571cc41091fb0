"""What crosses a border between two blocks: any tree of tensors and plain Python values.

A block may hand up one tensor, or several (a U-Net's skips), or a dictionary that the user's model passes around. The engine
treats them alike: it detaches the whole tree, and it knows which of its tensors *carry credit*, that is, lie on a path from a
trainable parameter and so have a gradient worth sending down.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Values = Any
"""One tensor, or any nested tuple, list or dict of tensors and plain values."""

Credit = tuple[Tensor | None, ...]
"""One gradient for each tensor of a border that carries credit, in tree order; ``None`` where there is no path."""


def carriers(values: Values) -> tuple[Tensor, ...]:
    """Returns the tensors of a tree that carry credit, in tree order.

    Example:
        >>> import torch
        >>> len(carriers({"h": torch.ones(2, requires_grad=True), "mask": torch.ones(2)}))
        1
    """
    if isinstance(values, Tensor):  # by far the most frequent tree
        return (values,) if values.requires_grad else ()
    return tuple(leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.requires_grad)


def tensors(values: Values) -> tuple[Tensor, ...]:
    """Returns every tensor of a tree, in tree order."""
    if isinstance(values, Tensor):
        return (values,)
    return tuple(leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def detach(values: Values) -> Values:
    """Cuts a tree off the graph that made it; tensors share memory with the originals."""
    if isinstance(values, Tensor):
        return values.detach()
    return pytree.tree_map_only(Tensor, Tensor.detach, values)


def as_leaves(values: Values, made: Values) -> Values:
    """Marks as wanting a gradient those tensors of a detached tree whose originals in ``made`` carried credit."""
    if isinstance(values, Tensor):
        return values.requires_grad_(made.requires_grad)
    for leaf, original in zip(tensors(values), tensors(made), strict=True):
        leaf.requires_grad_(original.requires_grad)
    return values


def carrying(values: Values) -> list[bool]:
    """Returns for each tensor of a tree whether it carries credit: what storing the tensors would lose."""
    return [tensor.requires_grad for tensor in tensors(values)]


def mark(values: Values, carry: list[bool]) -> Values:
    """Marks the tensors of a detached tree as `carrying` found them."""
    for tensor, carries in zip(tensors(values), carry, strict=True):
        tensor.requires_grad_(carries)
    return values


def move(values: Values, device: torch.device) -> Values:
    """Brings every tensor of a tree to a device."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), values)


def clone(values: Values) -> Values:
    """Copies every tensor of a tree; the copies stay in the graph of the originals."""
    return pytree.tree_map_only(Tensor, torch.clone, values)


def batch_size(values: Values) -> int:
    """Returns the length of the first dimension of the first tensor that has one.

    Raises:
        ValueError: If the tree holds no such tensor.
    """
    for tensor in tensors(values):
        if tensor.dim():
            return tensor.shape[0]
    raise ValueError(f"the input is {type(values).__name__} without a batched tensor: pass tensors of shape (batch, ...)")


def by_place(y: Tensor, scores: Tensor) -> bool:
    """Whether two batched tensors are sequences of the same length, (batch, length, features) each.

    Example:
        >>> by_place(torch.zeros(2, 5, 8), torch.zeros(2, 5, 3))
        True
    """
    return y.dim() == scores.dim() == 3 and y.shape[1] == scores.shape[1]
