"""Putting tensors back: after a step that failed, or from a checkpoint that must be of the same network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lockfree.objective import describe


class Undo:
    """Remembers the values of tensors; of each type and device in one piece, since they are many and small.

    Args:
        tensors: What is to be remembered, time and again.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        alike: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.is_contiguous():
                alike.setdefault((tensor.dtype, tensor.device), []).append(tensor.view(-1))
            else:
                alike[id(tensor)] = [tensor]
        self._pieces = [(parts, torch.cat(parts)) for parts in alike.values()]

    def note(self) -> None:
        """Remembers the present values."""
        for parts, whole in self._pieces:
            torch.cat(parts, out=whole)

    def state_dict(self) -> list[Tensor]:
        """Returns what was remembered last."""
        return [whole for _, whole in self._pieces]

    def load_state_dict(self, state: Sequence[Tensor]) -> None:
        """Remembers what `state_dict` returned."""
        for (_, whole), value in zip(self._pieces, state, strict=True):
            whole.copy_(value)

    def restore(self) -> None:
        """Puts back what was remembered last."""
        for parts, whole in self._pieces:
            torch._foreach_copy_(parts, whole.split([len(part) for part in parts]))


def same_tensors(what: str, theirs: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    """Refuses tensors of other names, types or shapes than one's own.

    Args:
        what: They belong to.
        theirs: By name.
        mine: Likewise.

    Raises:
        ValueError: With the first that differs.
    """
    for name in sorted(theirs.keys() | mine.keys()):
        there, here = (describe(tensors[name]) if name in tensors else "missing" for tensors in (theirs, mine))
        if there != here:
            raise ValueError(f"the state is of another {what}: '{name}' is {there} there and {here} here")
