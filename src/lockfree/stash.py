"""Calls whose backward comes after the weights have moved on.

Under a delayed link or a pipelined schedule a module runs forward on batch t, its weights are updated from earlier batches, and
only then the credit of batch t arrives. The gradient is then taken at the weights that the forward pass used (weight stashing,
Narayanan et al. 2019), or, to save the copies, partly at those that are there by then (Huo et al. 2018); autograd alone refuses
either, because the weights that it saved were changed in place.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lockfree.memory import hold, unhold
from lockfree.rng import get_rng, set_rng


@dataclass(frozen=True, slots=True)
class _Saved:
    """What autograd keeps instead of a weight: where to find the right version of it."""

    weight: int
    version: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


@dataclass(slots=True)
class Call:
    """One recorded call: enough to take its gradient late, and to make it again after a resume.

    Attributes:
        version: Number of updates that the weights had seen.
        rng: State of the random generators before the call.
        autocast: The ambient autocast as (device type, dtype), or ``None``.
        buffers: The module's buffers before the call.
        saved: What autograd keeps of the call beside weights, in order, where old weights are not there to make it again.
    """

    version: int
    rng: dict[str, Tensor]
    autocast: tuple[str, torch.dtype] | None
    buffers: list[Tensor]
    saved: list[Any] = field(default_factory=list)


class Stash:
    """Keeps the weights that calls in flight ran with, copied only when an update is about to change them.

    Args:
        module: Whose weights change.
        keep: Whether the weights of calls in flight are kept.
        exact: Whether gradients are taken at them, not at the present ones.
    """

    def __init__(self, module: nn.Module, *, keep: bool = True, exact: bool = True) -> None:
        assert keep or not exact, "gradients cannot be taken at weights that are not there"
        self._module, self._keep, self._exact = module, keep, exact
        self._weights: list[Tensor] = list(module.parameters())
        self._version = 0
        self._live: Counter[int] = Counter()
        self._kept: dict[int, list[Tensor]] = {}

    @contextmanager
    def record(self, call: Call | None = None) -> Iterator[Call]:
        """Records the calls made inside, so that their backward may come after updates."""
        made = iter(() if call is None else list(call.saved))
        if call is None:
            buffers = [buffer.clone() for buffer in self._module.buffers()]
            call = Call(self._version, get_rng(), _ambient_autocast(self._weights), buffers)
        by_storage = {weight.untyped_storage().data_ptr(): index for index, weight in enumerate(self._weights)}

        moving = {buffer.untyped_storage().data_ptr() for buffer in self._module.buffers()}

        def pack(tensor: Tensor) -> Any:
            pointer = tensor.untyped_storage().data_ptr()
            weight = by_storage.get(pointer)
            if weight is None:
                # A later call may change a buffer in place; it is small enough to be copied.
                held = next(made, None)
                if held is None:
                    held = tensor.detach().clone() if pointer in moving else hold(tensor)
                    if not self._keep:
                        call.saved.append(held)
                return held
            return _Saved(weight, call.version, tensor.size(), tensor.stride(), tensor.storage_offset())

        def unpack(saved: Any) -> Tensor:
            if not isinstance(saved, _Saved):
                return unhold(saved)
            weights = self._kept.get(saved.version, self._weights) if self._exact else self._weights
            return weights[saved.weight].detach().as_strided(saved.size, saved.stride, saved.offset)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield call
        self._live[call.version] += 1

    def release(self, call: Call) -> None:
        """Ends a call: once nobody needs a version any more, its copy is dropped."""
        call.saved.clear()
        self._live[call.version] -= 1
        if self._live[call.version] <= 0:
            del self._live[call.version]
            self._kept.pop(call.version, None)

    def before_update(self) -> None:
        """Must be called before the weights change."""
        if self._keep and self._live[self._version]:
            self._kept[self._version] = [_copy_with_layout(weight) for weight in self._weights]
        self._version += 1

    def weights_of(self, call: Call) -> list[Tensor]:
        """Returns the weights that a call ran with, as far as they are kept."""
        return self._kept.get(call.version, self._weights)

    def clear(self) -> None:
        """Forgets every call in flight."""
        self._live.clear()
        self._kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of updates and the weights kept for calls in flight."""
        return {"version": self._version, "kept": {version: list(kept) for version, kept in self._kept.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts the kept weights back; the calls themselves are made again by `replay`."""
        self._version, self._live = state["version"], Counter()
        self._kept = {
            int(version): [_copy_with_layout(weight).copy_(old) for weight, old in zip(self._weights, kept, strict=True)]
            for version, kept in state["kept"].items()
        }

    def replay(self, call: Call, run: Callable[[], Any]) -> Any:
        """Makes a recorded call again as it was: old weights, old random numbers, and buffers left alone."""
        now = [weight.detach().clone() for weight in self._weights]
        buffers = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        random = get_rng()
        device_type, dtype = call.autocast or (_device_type(self._weights), None)
        try:
            self._write(self._kept.get(call.version, now))
            for (buffer, _), value in zip(buffers, call.buffers, strict=True):
                buffer.copy_(value)
            set_rng(call.rng)
            with self.record(call), torch.autocast(device_type, dtype, enabled=dtype is not None, cache_enabled=False):
                return run()
        finally:
            self._write(now)
            set_rng(random)
            for buffer, value in buffers:
                buffer.copy_(value)

    def _write(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for weight, value in zip(self._weights, values, strict=True):
                weight.copy_(value)


def call_state(call: Call) -> dict[str, Any]:
    """Returns a recorded call as plain data."""
    autocast = call.autocast and [call.autocast[0], str(call.autocast[1]).removeprefix("torch.")]
    saved = [unhold(one) for one in call.saved]
    return {"version": call.version, "rng": call.rng, "autocast": autocast, "buffers": call.buffers, "saved": saved}


def call_from(state: dict[str, Any]) -> Call:
    """Makes a recorded call from plain data."""
    autocast = state["autocast"] and (state["autocast"][0], getattr(torch, state["autocast"][1]))
    return Call(state["version"], state["rng"], autocast, state["buffers"], list(state["saved"]))


def _copy_with_layout(weight: Tensor) -> Tensor:
    """Copies a weight with all of its storage, so that strides and offsets that autograd saw stay valid."""
    storage = weight.detach().untyped_storage().clone()
    return torch.empty(0, dtype=weight.dtype, device=weight.device).set_(
        storage, weight.storage_offset(), weight.size(), weight.stride()
    )


def _device_type(weights: list[Tensor]) -> str:
    return weights[0].device.type if weights else "cpu"


def _ambient_autocast(weights: list[Tensor]) -> tuple[str, torch.dtype] | None:
    device_type = _device_type(weights)
    if not torch.is_autocast_enabled(device_type):
        return None
    return device_type, torch.get_autocast_dtype(device_type)
