"""Data: real sets as whole tensors, a resumable loader, and checked downloads."""

from lockfree.data.catalogue import Available, available, load, names
from lockfree.data.dataset import Dataset, Split
from lockfree.data.download import fetch
from lockfree.data.formats import read_cifar10_binary, read_idx, write_idx
from lockfree.data.loader import TensorLoader
from lockfree.data.sources import data_root

__all__ = [
    "Available",
    "Dataset",
    "Split",
    "TensorLoader",
    "available",
    "data_root",
    "fetch",
    "load",
    "names",
    "read_cifar10_binary",
    "read_idx",
    "write_idx",
]
