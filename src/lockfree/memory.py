"""Counting the bytes that autograd keeps alive for backward passes, on any device."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_watching: list["ActivationMeter"] = []


class ActivationMeter:
    """Counts saved activations: each storage once, for as long as some graph holds it, parameters and buffers left out.

    What gradient checkpointing makes again is not seen: there the peak is what it keeps in between, a lower bound.

    Args:
        *modules: Whose parameters and buffers are left out.

    Example:
        >>> import torch
        >>> meter = ActivationMeter(torch.nn.Linear(2, 2))
        >>> with meter.watch():
        ...     y = torch.ones(3, requires_grad=True).exp()
        >>> meter.peak
        12

    Attributes:
        now: Bytes alive at this moment.
        peak: Most bytes that were ever alive at once.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.now = 0
        self.peak = 0
        self._holders: dict[int, int] = {}
        self._modules = modules
        self._own: set[int] = set()

    @contextmanager
    def watch(self, besides: Iterable[Tensor] = ()) -> Iterator[None]:
        """Counts what is saved inside; graphs that outlive it are still counted down when they are freed.

        Args:
            besides: Tensors that are left out, too, such as the batch; with all that share their memory.
        """
        own = [tensor for module in self._modules for tensor in [*module.parameters(), *module.buffers()]] + list(besides)
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        _watching.append(self)
        try:
            with torch.autograd.graph.saved_tensors_hooks(hold, unhold):
                yield
        finally:
            _watching.remove(self)

    def reset(self) -> None:
        """Starts a new peak from what is alive now."""
        self.peak = self.now

    def _hold(self, pointer: int, size: int) -> None:
        if not self._holders.get(pointer):
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[pointer] = self._holders.get(pointer, 0) + 1

    def _free(self, pointer: int, size: int) -> None:
        self._holders[pointer] -= 1
        if not self._holders[pointer]:
            del self._holders[pointer]
            self.now -= size


class _Holder:
    """Stands for a saved tensor; its end is the end of the graph that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor, pointer: int, meter: ActivationMeter) -> None:
        self.tensor = tensor
        size = tensor.untyped_storage().nbytes()
        meter._hold(pointer, size)
        weakref.finalize(self, meter._free, pointer, size)


def hold(tensor: Tensor) -> Tensor | _Holder:
    """Packs a tensor that autograd saves, so that a meter that watches counts it; others who pack tensors pass theirs on to it.

    Only the innermost hooks of autograd see a tensor, so they have to help.
    """
    tensor = tensor.detach()  # an operation that saves its own result would keep itself alive if nobody differentiates it
    pointer = tensor.untyped_storage().data_ptr()
    if not _watching or not pointer or pointer in _watching[-1]._own:
        return tensor
    return _Holder(tensor, pointer, _watching[-1])


def unhold(saved: Tensor | _Holder) -> Tensor:
    """Unpacks what `hold` packed."""
    return saved.tensor if isinstance(saved, _Holder) else saved
