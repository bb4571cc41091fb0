"""The precision in which gradients and statistics are taken, whatever surrounds them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def full_precision(device_type: str) -> AbstractContextManager:
    """Leaves the ambient autocast: gradients are taken, and auxiliary networks run, in the precision of their tensors."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    # Weights change below, so autocast's copies of them in low precision are stale from here on.
    torch.clear_autocast_cache()
    return torch.autocast(device_type, enabled=False)


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Takes products of float32 matrices in float32: neither autocast nor TF32 nor their like on processors."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        with full_precision(device_type):
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
