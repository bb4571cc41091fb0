"""Batches from tensors that are whole in memory, in an order that a resume can take up anywhere."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from lockfree.rng import seed_of


class TensorLoader:
    """Hands out batches of one pair of tensors, an epoch for each `for` loop.

    The order of epoch e is a pure function of (seed, e), on every device. A batch counts as consumed as soon as it is
    handed out; a loop that was left, or that a resumed program begins with `load_state_dict`, goes on with exactly the
    batches that remain of that epoch (with none after its last one), and the loop after it begins the next epoch.

    Args:
        inputs: Samples along the first dimension.
        targets: As many targets; on the inputs' device.
        batch_size: Samples in a batch, from 1.
        shuffle: Draw a new order for each epoch; otherwise batches are views of the tensors, in their order.
        seed: What the orders come from.
        drop_last: Leave out the last batch of an epoch if it is smaller than the others.

    Raises:
        ValueError: The set is empty, the lengths differ, or no batch can be made.

    Attributes:
        epoch: Epochs handed out whole.
        position: Batches handed out in the current epoch.

    Example:
        >>> loader = TensorLoader(torch.arange(5.0), torch.arange(5), batch_size=2, shuffle=False)
        >>> [targets.tolist() for _, targets in loader]
        [[0, 1], [2, 3], [4]]
        >>> loader.state_dict()
        {'epoch': 1, 'position': 0, 'seed': 0}
    """

    def __init__(
        self,
        inputs: Shaped[Tensor, "n ..."],
        targets: Shaped[Tensor, "n_targets ..."],
        *,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        samples = len(inputs)
        if samples != len(targets):
            raise ValueError(
                f"expected as many targets as inputs, got {samples:,} inputs and {len(targets):,} targets; cut both alike"
            )
        if samples == 0:
            raise ValueError("expected one sample at least, got an empty set; check how it was selected")
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if drop_last and batch_size > samples:
            raise ValueError(
                f"batch_size {batch_size:,} is larger than the set of {samples:,} and drop_last would leave nothing; "
                "take a smaller batch_size or drop_last=False"
            )
        self._inputs, self._targets = inputs, targets
        self._batch_size, self._shuffle, self._drop_last = batch_size, shuffle, drop_last
        self._seed = seed
        self.epoch = self.position = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self._inputs), self._batch_size)
        return whole + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[tuple[Shaped[Tensor, "batch ..."], Shaped[Tensor, "batch ..."]]]:
        epoch = self.epoch
        order = self._order(epoch) if self._shuffle else None
        # The state is the loader's and not the loop's; a loop that another one overtook ends instead of mixing orders.
        while self.epoch == epoch and self.position < len(self):
            start = self.position * self._batch_size
            self.position += 1
            yield self._batch(order, start)
        if self.epoch == epoch:
            self.epoch, self.position = epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Says where the loader is.

        Returns:
            The epoch, the batches already handed out in it, and the seed.
        """
        return {"epoch": self.epoch, "position": self.position, "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where another loader was: the next loop hands out the batches that remained there.

        Args:
            state: What `state_dict` of a loader over the same samples with the same batch size returned.

        Raises:
            ValueError: The state has other entries, or lies beyond this loader's batches.
        """
        wanted = {"epoch", "position", "seed"}
        if set(state) != wanted:
            raise ValueError(f"expected a state with {sorted(wanted)}, got {sorted(state)}; pass what state_dict() returned")
        epoch, position, seed = (int(state[key]) for key in ("epoch", "position", "seed"))
        if epoch < 0 or not 0 <= position <= len(self):
            raise ValueError(
                f"expected an epoch from 0 and a position from 0 to {len(self)}, got epoch {epoch} and "
                f"position {position}; resume with the data and the batch_size that the state was saved with"
            )
        self.epoch, self.position, self._seed = epoch, position, seed

    def _batch(self, order: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
        stop = start + self._batch_size
        if order is None:
            return self._inputs[start:stop], self._targets[start:stop]
        chosen = order[start:stop]
        return self._inputs.index_select(0, chosen), self._targets.index_select(0, chosen)

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self._seed, epoch))
        return torch.randperm(len(self._inputs), generator=generator).to(self._inputs.device)
