"""The versions of the weights that somebody still works with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Versions:
    """Weights and buffers by number of updates. What a version holds never changes while somebody holds the version.

    A new version is written to memory of its own, or to that of a version that nobody holds any more: to the present one's if nobody
    holds that. So workers at the same version share one copy, and what one of them is reading is never half new.

    Args:
        weights: Those of version 0, which are taken over.
        buffers: Likewise.

    Attributes:
        now: Number of the present version.
    """

    def __init__(self, weights: list[Tensor], buffers: list[Tensor]) -> None:
        self.now = 0
        self._weights, self._buffers = {0: weights}, {0: buffers}
        self._held: dict[int, int] = {}
        self._spare: list[list[Tensor]] = []

    def __contains__(self, version: int) -> bool:
        return version in self._weights

    def __len__(self) -> int:
        return len(self._weights)

    def weights(self, version: int) -> list[Tensor]:
        """Returns the weights of a version that is held, or the present one's."""
        return self._weights[version]

    def buffers(self, version: int) -> list[Tensor]:
        """Returns the buffers of a version that is held, or the present one's."""
        return self._buffers[version]

    def hold(self) -> int:
        """Keeps the present version until it is let go, and returns its number."""
        self._held[self.now] = self._held.get(self.now, 0) + 1
        return self.now

    def let_go(self, version: int) -> None:
        """Undoes one `hold`. The version's weights stay as they are until the next `room`."""
        self._held[version] -= 1
        if not self._held[version]:
            del self._held[version]
            if version != self.now:
                self._forget(version)

    def room(self) -> list[Tensor]:
        """Returns memory for the next version's weights; the present weights themselves if nobody holds them."""
        present = self._weights[self.now]
        if self.now not in self._held:
            return present
        return self._spare.pop() if self._spare else [torch.empty_like(weight) for weight in present]

    def advance(self, weights: list[Tensor], buffers: Sequence[Tensor]) -> None:
        """Makes the next version the present one.

        Args:
            weights: In the memory that `room` returned.
            buffers: Taken over, not copied.
        """
        before = self.now
        self.now = before + 1
        self._weights[self.now], self._buffers[self.now] = weights, list(buffers)
        if before not in self._held:
            if self._weights[before] is weights:
                del self._weights[before], self._buffers[before]
            else:
                self._forget(before)

    def _forget(self, version: int) -> None:
        del self._buffers[version]
        memory = self._weights.pop(version)
        if len(self._spare) < 2:  # in the long run one is made for each that is let go
            self._spare.append(memory)

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of every version that is held, and of the present one."""
        kept = {
            version: {"weights": _copies(self._weights[version]), "buffers": _copies(self._buffers[version])}
            for version in self._weights
        }
        return {"now": self.now, "held": dict(self._held), "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned, on the devices where the weights are."""
        devices = [[tensor.device for tensor in tensors] for tensors in (self._weights[self.now], self._buffers[self.now])]
        self.now, self._held = state["now"], dict(state["held"])
        self._weights = {number: _copies(kept["weights"], devices[0]) for number, kept in state["kept"].items()}
        self._buffers = {number: _copies(kept["buffers"], devices[1]) for number, kept in state["kept"].items()}
        self._spare = []


def _copies(tensors: Sequence[Tensor], devices: Sequence[torch.device] | None = None) -> list[Tensor]:
    places = devices or [tensor.device for tensor in tensors]
    return [tensor.detach().to(device, copy=True) for tensor, device in zip(tensors, places, strict=True)]
