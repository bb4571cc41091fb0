"""The precision in which gradients and statistics are taken, whatever surrounds them."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def full_precision(device_type: str) -> AbstractContextManager:
    """Leaves the ambient autocast: gradients are taken, and auxiliary networks run, in the precision of their tensors."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    # Weights change below, so autocast's copies of them in low precision are stale from here on.
    torch.clear_autocast_cache()
    return torch.autocast(device_type, enabled=False)


class _Products:
    """The process-wide precision of products, which the first one in sets and the last one out puts back."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyrefly: ignore[missing-attribute]
        self._before: list[str] = []

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before = [setting.fp32_precision for setting in self._settings]
                for setting in self._settings:
                    setting.fp32_precision = "ieee"

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for setting, precision in zip(self._settings, self._before, strict=True):
                    setting.fp32_precision = precision


_products = _Products()


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Takes products of float32 matrices in float32: neither autocast nor TF32 nor their like on processors."""
    _products.enter()
    try:
        with full_precision(device_type):
            yield
    finally:
        _products.leave()
