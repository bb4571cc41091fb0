"""The batch of a ticket, out of whatever the user calls a dataset."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, TensorDataset, default_collate

from lockfree.server.tickets import Tickets

Data = Dataset | tuple[Tensor, Tensor]
"""A dataset of pairs (x, y) that is indexed by number, or all x and all y as tensors of equal length."""


class Batches:
    """Makes the batch of a ticket.

    Args:
        data: A dataset of pairs (x, y) with a length, or a tuple of tensors (x, y).
        batch_size: b, 1 or more; ``None``: all samples.
        seed: Decides the order of the samples.

    Attributes:
        tickets: Which samples belong to which ticket.

    Raises:
        TypeError: If the data are something else.
        ValueError: If there are none, their lengths differ, or the batch size is no such number.

    Example:
        >>> batches = Batches((torch.arange(4.0), torch.arange(4)), batch_size=2, seed=0)
        >>> x, y = batches(0)
        >>> bool((x == y).all())
        True
    """

    def __init__(self, data: Data, *, batch_size: int | None, seed: int) -> None:
        self._data: Dataset | None = None
        self._tensors: tuple[Tensor, ...] = ()
        if isinstance(data, TensorDataset):
            data = data.tensors  # pyrefly: ignore[bad-assignment]
        if isinstance(data, tuple):
            if len(data) != 2 or not all(isinstance(part, Tensor) and part.dim() for part in data):
                raise TypeError("a dataset in a tuple is two tensors, (x, y), with a sample in each row")
            if len(data[0]) != len(data[1]):
                raise ValueError(f"{len(data[0])} samples and {len(data[1])} targets: give one target for each sample")
            self._tensors, length = data, len(data[0])
        elif isinstance(data, Dataset):
            try:
                length = len(data)  # pyrefly: ignore[bad-argument-type]
            except TypeError as error:
                raise TypeError(
                    "the dataset has no length: give one whose samples are found by number, or tensors (x, y)"
                ) from error
            self._data = data
        else:
            raise TypeError(
                f"dataset is a {type(data).__name__}: give a torch Dataset of pairs (x, y), or a tuple of tensors (x, y)"
            )
        self.tickets = Tickets(seed=seed, length=length, batch_size=batch_size)

    def __call__(self, ticket: int) -> tuple[Any, Any]:
        """Returns the batch of a ticket: (x, y).

        Args:
            ticket: Its number, 0 or more.
        """
        samples = self.tickets.samples(ticket)
        if self._data is None:
            x, y = self._tensors
            return x[samples.to(x.device)], y[samples.to(y.device)]
        x, y = default_collate([self._data[sample] for sample in samples.tolist()])
        return x, y


def to_device(batch: Any, device: torch.device) -> Any:
    """Moves all tensors of a batch to a device."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def count(x: Any) -> int:
    """Returns how many samples the inputs of a batch hold."""
    return next(len(leaf) for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor))
