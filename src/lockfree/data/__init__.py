"""Data: real sets as whole tensors, texts as symbol numbers, resumable loaders, and checked downloads."""

from lockfree.data.catalogue import Available, available, load, names
from lockfree.data.dataset import Dataset, Split
from lockfree.data.download import fetch
from lockfree.data.formats import read_cifar10_binary, read_idx, write_idx
from lockfree.data.loader import TensorLoader
from lockfree.data.sources import data_root
from lockfree.data.stream import Passage, Stream
from lockfree.data.text import AvailableText, TextSet, available_texts, load_text, read_text, text_names
from lockfree.data.vocabulary import Characters, Vocabulary, Words

__all__ = [
    "Available",
    "AvailableText",
    "Characters",
    "Dataset",
    "Passage",
    "Split",
    "Stream",
    "TensorLoader",
    "TextSet",
    "Vocabulary",
    "Words",
    "available",
    "available_texts",
    "data_root",
    "fetch",
    "load",
    "load_text",
    "names",
    "read_cifar10_binary",
    "read_idx",
    "read_text",
    "text_names",
    "write_idx",
]
