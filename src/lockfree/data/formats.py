"""Readers for the two layouts that small image sets come in: IDX files and CIFAR-10's binary batches."""

import gzip
import lzma
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

_UNSIGNED_BYTE = 0x08
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_CLASSES = 10
_CIFAR_RECORD = 1 + math.prod(_CIFAR_SHAPE)


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


# By what a file starts with and not by its name, so that a renamed file still reads.
_DECOMPRESSORS: dict[bytes, Callable[[], _Decompressor]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
    b"\xfd7zXZ\x00": lzma.LZMADecompressor,
}
_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    # mtime=0 and no file name: the same array always gives the same bytes.
    ".gz": lambda content: gzip.compress(content, 9, mtime=0),
    ".xz": lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
}


def decompressed(blob: bytes, name: str) -> tuple[bytes, bool]:
    """Undoes gzip or xz, if there is any.

    Args:
        blob: A file's bytes.
        name: The file's name, for messages.

    Returns:
        The content, and whether it is whole: a compressed file that was cut off gives what could be saved and False.

    Raises:
        ValueError: The compressed bytes are damaged.

    Example:
        >>> decompressed(gzip.compress(b"lock"), "a.gz")
        (b'lock', True)
    """
    factory = next((factory for magic, factory in _DECOMPRESSORS.items() if blob.startswith(magic)), None)
    if factory is None:
        return blob, True
    parts = []
    # One file may hold several compressed streams, one after the other.
    while blob:
        stream = factory()
        try:
            parts.append(stream.decompress(blob))
        except (zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{name}: the compressed data is damaged ({error}); delete it and fetch it anew") from error
        if not stream.eof:
            return b"".join(parts), False
        blob = stream.unused_data
    return b"".join(parts), True


def read_idx(path: str | Path) -> UInt8[Tensor, "..."]:
    """Reads an IDX file of unsigned bytes, plain or compressed with gzip or xz.

    Args:
        path: The file.

    Returns:
        Its array, uint8, of the rank and shape that its header gives.

    Raises:
        ValueError: The file is no IDX file of unsigned bytes, is cut off, is too long or is damaged.
        OSError: The file cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels-idx1-ubyte.gz"
        >>> write_idx(path, torch.tensor([3, 1, 4], dtype=torch.uint8))
        >>> read_idx(path)
        tensor([3, 1, 4], dtype=torch.uint8)

    Reference:
        LeCun, Cortes and Burges, "The MNIST database of handwritten digits", section "File formats".
    """
    content, whole = decompressed(Path(path).read_bytes(), str(path))
    return parse_idx(content, str(path), whole=whole)


def parse_idx(content: bytes, name: str, *, whole: bool = True) -> UInt8[Tensor, "..."]:
    """Makes an array of the decompressed content of an IDX file.

    Args:
        content: Header and elements.
        name: The file's name, for messages.
        whole: Whether the content came out of its compression whole.

    Returns:
        The array, uint8.

    Raises:
        ValueError: As `read_idx`.

    Example:
        >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]), "two labels")
        tensor([7, 9], dtype=torch.uint8)
    """
    cut = "" if whole else " (its compressed data is cut off)"
    if len(content) < 4:
        raise ValueError(f"{name}: expected an IDX header of 4 bytes at least, found {len(content)} bytes{cut}")
    if content[:2] != b"\x00\x00" or content[2] != _UNSIGNED_BYTE or content[3] == 0:
        raise ValueError(
            f"{name}: expected an IDX file of unsigned bytes, which starts 00 00 08 and then the rank from 1; "
            f"found {content[:4].hex(' ')}"
        )
    rank = content[3]
    start = 4 + 4 * rank
    if len(content) < start:
        raise ValueError(f"{name}: expected an IDX header of {start:,} bytes, found {len(content):,} bytes{cut}")
    shape = struct.unpack(f">{rank}I", content[4:start])
    expected = start + math.prod(shape)
    if len(content) != expected or not whole:
        raise ValueError(
            f"{name}: expected {expected:,} bytes for shape {shape}, found {len(content):,}{cut}; delete it and fetch it anew"
        )
    # The copy makes the memory writable, which torch insists on.
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def write_idx(path: str | Path, array: UInt8[Tensor, "..."]) -> None:
    """Writes an array as an IDX file, compressed when the name ends in `.gz` or `.xz`.

    Args:
        path: The file to write.
        array: Unsigned bytes of rank 1 to 255.

    Raises:
        ValueError: The array has another type or rank.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels-idx1-ubyte"
        >>> write_idx(path, torch.tensor([7, 9], dtype=torch.uint8))
        >>> path.read_bytes().hex(" ")
        '00 00 08 01 00 00 00 02 07 09'
    """
    if array.dtype != torch.uint8 or not 1 <= array.dim() <= 255:
        raise ValueError(
            f"an IDX file here holds torch.uint8 of rank 1 to 255, got {array.dtype} of rank {array.dim()}; "
            "convert with .to(torch.uint8) and give it a dimension with .reshape(-1)"
        )
    header = struct.pack(f">HBB{array.dim()}I", 0, _UNSIGNED_BYTE, array.dim(), *array.shape)
    content = header + array.cpu().contiguous().numpy().tobytes()
    compress = _COMPRESSORS.get(Path(path).suffix, bytes)
    Path(path).write_bytes(compress(content))


def read_cifar10_binary(
    paths: Sequence[str | Path],
) -> tuple[UInt8[Tensor, "n 3 32 32"], Int64[Tensor, " n"]]:
    """Reads CIFAR-10 batches: records of one label byte and 3 x 32 x 32 pixels, red plane first.

    Args:
        paths: The batch files, joined in this order; one at least.

    Returns:
        The images, uint8 of shape (n, 3, 32, 32), and their classes, int64 of shape (n,), 0 to 9.

    Raises:
        ValueError: No file given, or a file is empty, is no whole number of records, or has a label above 9.
        OSError: A file cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "data_batch_1.bin"
        >>> _ = path.write_bytes(bytes([6]) + bytes(3072))
        >>> images, labels = read_cifar10_binary([path])
        >>> tuple(images.shape), labels
        ((1, 3, 32, 32), tensor([6]))

    Reference:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; layout of the binary version.
    """
    if not paths:
        raise ValueError("expected one CIFAR-10 batch file at least, got an empty list; name data_batch_1.bin and so on")
    return parse_cifar10([(Path(path).read_bytes(), str(path)) for path in paths])


def parse_cifar10(
    batches: Sequence[tuple[bytes, str]],
) -> tuple[UInt8[Tensor, "n 3 32 32"], Int64[Tensor, " n"]]:
    """Makes tensors of the content of CIFAR-10 batch files.

    Args:
        batches: Content and name of each file, in order; one at least.

    Returns:
        As `read_cifar10_binary`.

    Raises:
        ValueError: As `read_cifar10_binary`.

    Example:
        >>> parse_cifar10([(bytes([6]) + bytes(3072), "frog")])[1]
        tensor([6])
    """
    records = []
    for content, name in batches:
        if not content or len(content) % _CIFAR_RECORD:
            below = len(content) // _CIFAR_RECORD
            raise ValueError(
                f"{name}: expected whole records of {_CIFAR_RECORD:,} bytes, {below * _CIFAR_RECORD:,} or "
                f"{(below + 1) * _CIFAR_RECORD:,} bytes say, found {len(content):,}; delete it and fetch it anew"
            )
        table = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD)
        check_labels(torch.from_numpy(table[:, 0].astype(np.int64)), _CIFAR_CLASSES, name)
        records.append(table)
    joined = np.concatenate(records)
    images = torch.from_numpy(np.ascontiguousarray(joined[:, 1:])).reshape(-1, *_CIFAR_SHAPE)
    return images, torch.from_numpy(joined[:, 0].astype(np.int64))


def check_labels(labels: Int64[Tensor, " n"], classes: int, name: str) -> None:
    """Makes sure that every label is a class.

    Args:
        labels: Labels from 0.
        classes: How many classes there are.
        name: The file's name, for messages.

    Raises:
        ValueError: A label is negative or too large.

    Example:
        >>> check_labels(torch.tensor([0, 9]), 10, "labels")
    """
    wrong = torch.nonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{name}: expected labels from 0 to {classes - 1}, found {int(labels[first])} at record {first:,} "
            f"({len(wrong):,} such labels); delete it and fetch it anew"
        )
