"""Steps of a batch of sequences: what a task hands out, and what a learner takes in and cuts into chunks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.utils import _pytree as pytree


class Stretch(NamedTuple):
    """Some steps of a batch of sequences.

    Attributes:
        inputs: (steps, m, ...): features, or the numbers of symbols.
        targets: (steps, m, ...), or a tree of such.
        done: (steps, m): whether a sequence ends with this step, after which its state begins anew; ``None``: none does.

    Example:
        >>> stretch = Stretch(torch.zeros(5, 2, 3), torch.zeros(5, 2), None)
        >>> [len(stretch.cut(start, start + 3).inputs) for start in (0, 3)]
        [3, 2]
    """

    inputs: Shaped[Tensor, "steps m ..."]
    targets: Any
    done: Bool[Tensor, "steps m"] | None

    def cut(self, start: int, end: int) -> "Stretch":
        """Returns some of its steps."""
        return Stretch(*pytree.tree_map_only(Tensor, lambda tensor: tensor[start:end], tuple(self)))

    def to(self, device: torch.device | str) -> "Stretch":
        """Returns it on a device."""
        return Stretch(*pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), tuple(self)))


def joined(pieces: Sequence[Stretch]) -> Stretch:
    """Returns pieces that follow each other as one; where some say who is done and others do not, in these nobody is."""
    if len(pieces) == 1:
        return pieces[0]
    if any(piece.done is not None for piece in pieces):
        pieces = [
            piece
            if piece.done is not None
            else piece._replace(done=piece.inputs.new_zeros(piece.inputs.shape[:2], dtype=torch.bool))
            for piece in pieces
        ]
    return Stretch(
        *pytree.tree_map(lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *map(tuple, pieces))
    )
