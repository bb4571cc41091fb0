"""A file of records, of which a process that dies as it writes leaves all but perhaps the last."""

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lockfree.server.cluster.parcel import Parcel

_PREFIX = struct.Struct("<IQI")  # bytes of the head, bytes of the tensors, checksum of both


class Journal:
    """Takes records down, one after the other: plain data, and perhaps tensors.

    What is written outlives the process at once, and the machine too, if it is synced.

    Args:
        path: The file, which must not be there yet.
        sync: Whether to wait at each record with tensors until the disk has it.
    """

    def __init__(self, path: Path, *, sync: bool) -> None:
        self.path, self._sync = path, sync
        self.size = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)

    def append(self, head: dict[str, Any], parts: Sequence[Sequence[Parcel | None]] = ()) -> None:
        """Takes down a record.

        Args:
            head: What JSON can hold.
            parts: Lists of tensors.

        Raises:
            OSError: If the file cannot be written, because the disk is full, say. A part of the record may be in it, which `read`
                passes over.
        """
        described = [[None if p is None else [p.kind, p.shape, p.order, p.data.nbytes] for p in part] for part in parts]
        text = json.dumps({"head": head, "parts": described}).encode()
        arrays = [memoryview(p.data) for part in parts for p in part if p is not None]  # pyrefly: ignore[bad-argument-type]
        check = zlib.crc32(text)
        for array in arrays:
            check = zlib.crc32(array, check)
        length = sum(array.nbytes for array in arrays)
        _write(self._file, [_PREFIX.pack(len(text), length, check), text, *arrays])
        if self._sync and parts:
            os.fsync(self._file)
        self.size += _PREFIX.size + len(text) + length

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def read(path: Path) -> Iterator[tuple[dict[str, Any], list[list[Parcel | None]]]]:
    """Yields the records of a journal up to the first that is not whole.

    Args:
        path: The file. If it is not there, there are no records.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        while len(prefix := file.read(_PREFIX.size)) == _PREFIX.size:
            length, bytes_, check = _PREFIX.unpack(prefix)
            text, data = file.read(length), file.read(bytes_)
            if len(text) + len(data) < length + bytes_ or zlib.crc32(data, zlib.crc32(text)) != check:
                return
            record = json.loads(text)
            yield record["head"], _parts(record["parts"], np.frombuffer(data, np.uint8))


def _parts(described: list[list[Any]], data: np.ndarray) -> list[list[Parcel | None]]:
    parts, start = [], 0
    for part in described:
        found: list[Parcel | None] = []
        for each in part:
            if each is None:
                found.append(None)
                continue
            kind, shape, order, size = each
            found.append(Parcel(kind, tuple(shape), tuple(order), data[start : start + size]))
            start += size
        parts.append(found)
    return parts


def _write(file: int, pieces: Sequence[bytes | memoryview]) -> None:
    """Writes all of it, at once where the system lets us."""
    left = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
    while left:
        done = os.writev(file, left[:512])
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if done:
            left[0] = left[0][done:]
