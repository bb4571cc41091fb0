"""The state of a recurrent network: any tree of tensors, and the same as a matrix with a row for each sample."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils import _pytree as pytree

from lockfree.objective import describe
from lockfree.values import Values

State = Values
"""One tensor, or any nested tuple, list or dict of tensors; each has one dimension along which the samples lie."""


class Layout:
    """Where each sample's numbers lie in a state.

    A state becomes rows, (m, width): for each tensor of floating point, in tree order, all that belongs to the sample. Tensors of whole
    numbers are carried along but have no row: no gradient goes through them.

    Args:
        state: An example.
        batched: For each tensor, in tree order, the dimension along which the samples lie.

    Attributes:
        width: Numbers of one sample.

    Example:
        >>> layout = Layout((torch.zeros(1, 4, 3), torch.zeros(4, 2)), [1, 0])
        >>> layout.width, layout.rows((torch.ones(1, 4, 3), torch.zeros(4, 2)))[0].tolist()
        (5, [1.0, 1.0, 1.0, 0.0, 0.0])
    """

    def __init__(self, state: State, batched: Sequence[int]) -> None:
        tensors, self._tree = pytree.tree_flatten(state)
        self._batched = list(batched)
        self._nothing = [tensor.new_zeros(()) for tensor in tensors]  # of their types, on their devices
        self._shapes = [_of_sample(tensor, dim) for tensor, dim in zip(tensors, batched, strict=True)]
        self._floating = [tensor.is_floating_point() for tensor in tensors]
        self._widths = [shape.numel() for shape, floating in zip(self._shapes, self._floating, strict=True) if floating]
        self.width = sum(self._widths)

    def zeros(self, samples: int) -> State:
        """Returns a state of zeros."""
        shapes = zip(self._nothing, self._shapes, self._batched, strict=True)
        made = [nothing.new_zeros((*shape[:dim], samples, *shape[dim:])) for nothing, shape, dim in shapes]
        return pytree.tree_unflatten(made, self._tree)

    def leaves(self, state: State) -> list[Tensor]:
        """Returns the tensors that rows are made of."""
        return [tensor for tensor, floating in zip(pytree.tree_leaves(state), self._floating, strict=True) if floating]

    def rows(self, state: State) -> Float[Tensor, "m width"]:
        """Returns the state as rows."""
        return self.joined(self.leaves(state))

    def joined(self, leaves: Sequence[Tensor]) -> Float[Tensor, "m width"]:
        """Returns the tensors of floating point, or gradients of them, as rows."""
        rows = [
            leaf.movedim(dim, 0).reshape(leaf.shape[dim], -1) for leaf, dim in zip(leaves, self._floating_dims(), strict=True)
        ]
        return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]

    def parted(self, rows: Float[Tensor, "m width"]) -> list[Tensor]:
        """Returns rows as tensors of the shapes of the state: the inverse of `joined`."""
        shapes = [shape for shape, floating in zip(self._shapes, self._floating, strict=True) if floating]
        parts = zip(rows.split(self._widths, dim=1), shapes, self._floating_dims(), strict=True)
        return [part.view(-1, *shape).movedim(0, dim) for part, shape, dim in parts]

    def where(self, chosen: Bool[Tensor, " m"], one: State, other: State) -> State:
        """Takes each sample from one state if it is chosen, else from the other."""
        tensors = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), self._batched, strict=True)
        mixed = [torch.where(chosen.view([-1, *[1] * (a.dim() - dim - 1)]), a, b) for a, b, dim in tensors]
        return pytree.tree_unflatten(mixed, self._tree)

    def samples(self, state: State) -> int:
        """Returns how many samples a state holds."""
        return pytree.tree_leaves(state)[0].shape[self._batched[0]]

    def check(self, state: State, samples: int) -> None:
        """Refuses a state that is built otherwise or holds another number of samples.

        Raises:
            ValueError: With what was given and what was wanted.
        """
        tensors, tree = pytree.tree_flatten(state)
        if tree != self._tree or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise ValueError(f"the state is {_outline(state)}: this core's is {self._wanted(samples)}")
        for tensor, shape, dim, floating in zip(tensors, self._shapes, self._batched, self._floating, strict=True):
            fits = tensor.dim() == len(shape) + 1 and tensor.is_floating_point() == floating
            if not fits or tensor.shape[dim] != samples or _of_sample(tensor, dim) != shape:
                raise ValueError(
                    f"the state is {describe(state)}: for {samples} samples this core's is {self._wanted(samples)}"
                )

    def _floating_dims(self) -> list[int]:
        return [dim for dim, floating in zip(self._batched, self._floating, strict=True) if floating]

    def _wanted(self, samples: int) -> str:
        shapes = [(*shape[:dim], samples, *shape[dim:]) for shape, dim in zip(self._shapes, self._batched, strict=True)]
        return _outline(pytree.tree_unflatten(shapes, self._tree))


def _outline(state: Any) -> str:
    """Says how a tree of tensors, or of their shapes, is built."""
    return str(pytree.tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), state))


def _of_sample(tensor: Tensor, batched: int) -> torch.Size:
    """The shape of what belongs to one sample."""
    return torch.Size((*tensor.shape[:batched], *tensor.shape[batched + 1 :]))


def layout_of(two: State, three: State) -> Layout:
    """Finds where the samples lie in a state, given one of two samples and one of three.

    Raises:
        ValueError: If some tensor does not grow with the samples along one dimension.
    """
    dims = []
    for small, large in zip(pytree.tree_leaves(two), pytree.tree_leaves(three), strict=True):
        found = [dim for dim in range(small.dim()) if (small.shape[dim], large.shape[dim]) == (2, 3)]
        others = small.dim() == large.dim() and sum(a != b for a, b in zip(small.shape, large.shape, strict=True)) == 1
        if len(found) != 1 or not others:
            raise ValueError(
                f"the core's state holds a tensor of shape {tuple(small.shape)} for 2 samples and {tuple(large.shape)} for 3: "
                "every tensor of a state needs one dimension that is the number of samples"
            )
        dims += found
    layout = Layout(two, dims)
    if not layout.width:
        raise ValueError("the core's state holds no numbers of floating point: there is no gradient to carry through time")
    return layout
