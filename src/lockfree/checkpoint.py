"""Checkpoints: a tree of plain values and tensors in a folder that is either whole or recognised as broken.

Its two files are `state.safetensors` (the tensors) and `state.json` (everything else, references to the tensors, and
the size and SHA-256 of the other file). Nothing is pickled, so loading a stranger's checkpoint runs no code.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import singledispatchmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save_file

FORMAT = 1

_STATE, _TENSORS = "state.json", "state.safetensors"
# state.json begins with the digest of all that follows it: every flipped bit is noticed, and the file stays JSON.
_HEAD, _DIGEST_LENGTH = b'{"sha256": "', 64
_PORTABLE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_PORTABLE |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class CorruptCheckpoint(ValueError):  # noqa: N818, it says what is wrong without the word
    """A checkpoint that is missing, half-written or changed since it was written.

    Example:
        >>> try:
        ...     load(Path("no such folder"))
        ... except CorruptCheckpoint as error:
        ...     print(error)
        no such folder: there is no checkpoint here
    """


def save(folder: Path, state: Mapping) -> None:
    """Writes a checkpoint; whoever looks sees the one before or the new one, never half of either.

    Subclasses come back as what they extend (`OrderedDict` as dict, `Parameter` as tensor), tensors on the CPU and
    contiguous. Tensors that share all of their memory share it again after loading.

    Args:
        folder: The checkpoint's own folder; one that stands there is replaced.
        state: Nested dicts (str or int keys), lists and tuples of None, bool, int, float, str and dense tensors of any
            shape and dtype.

    Raises:
        TypeError: If the tree holds anything else; the message names the place. Nothing is written then.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "checkpoint"
        >>> save(folder, {"step": 3, "momentum": {0: torch.ones(2)}})
        >>> load(folder)
        {'step': 3, 'momentum': {0: tensor([1., 1.])}}
    """
    packer = _Packer()
    tree = packer.pack(state, "")
    tidy(folder)
    fresh, former = _asides(folder)
    fresh.mkdir(parents=True)
    try:
        _write_files(fresh, tree, packer)
        if folder.exists():
            os.rename(folder, former)
        os.rename(fresh, folder)
        _sync(folder.parent)
    except BaseException:
        with suppress(OSError):
            tidy(folder)
        raise
    tidy(folder)


def load(folder: Path) -> dict:
    """Reads a checkpoint after verifying every byte of it.

    Args:
        folder: The folder that `save` was given.

    Returns:
        The tree, with its tensors on the CPU.

    Raises:
        CorruptCheckpoint: If the checkpoint is missing, half-written, truncated or altered.
    """
    _, former = _asides(folder)
    # A writer that was killed between its two renames has left the old checkpoint, whole, under its other name.
    source = former if former.is_dir() and not folder.exists() else folder
    if not source.is_dir():
        raise CorruptCheckpoint(f"{folder}: there is no checkpoint here")
    header = _verified_header(source / _STATE)
    content = _bytes_of(source / _TENSORS)
    wanted = header["tensors"]
    if len(content) != wanted["bytes"]:
        raise CorruptCheckpoint(f"{source / _TENSORS}: has {len(content)} bytes, {wanted['bytes']} were written")
    if hashlib.sha256(content).hexdigest() != wanted["sha256"]:
        raise CorruptCheckpoint(f"{source / _TENSORS}: its SHA-256 differs from the one in {_STATE}: it was altered")
    # Copied, because the parsed ones lie wherever the file put them, and vector code may round by alignment.
    tensors = {name: tensor.clone() for name, tensor in tensors_from_bytes(content).items()}
    for name, (kind, shape) in header["views"].items():
        tensors[name] = tensors[name].view(getattr(torch, kind)).reshape(shape)
    return _unpack(header["state"], tensors)


def tidy(folder: Path) -> None:
    """Clears what a killed `save` left beside a checkpoint, and puts the old one back if the new one is not there.

    Args:
        folder: The checkpoint's folder; it need not exist.
    """
    fresh, former = _asides(folder)
    if former.exists() and not folder.exists():
        os.rename(former, folder)
    for leftover in (fresh, former):
        if leftover.exists():
            shutil.rmtree(leftover)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that is either the old one or the new one at every moment, also over a power cut.

    Args:
        path: The file; its folder must exist.
        text: What it shall hold, written as UTF-8.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_atomically(path, "done")
        >>> path.read_text()
        'done'
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        _write_synced(fresh, text.encode())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    _sync(path.parent)


class _Packer:
    """Turns a tree into JSON values and sets its tensors aside under the names of their places."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.views: dict[str, tuple[str, list[int]]] = {}  # the dtype and shape of those that are stored as bytes
        self._names: dict[tuple, str] = {}
        # Kept alive while the addresses in `_names` count: a lazy mapping may make its tensors on the fly.
        self._alive: list[torch.Tensor] = []

    @singledispatchmethod
    def pack(self, value: Any, path: str) -> Any:
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise TypeError(
            f"cannot save {path or 'the state'} of type {kind}: a checkpoint holds dicts, lists, tuples, tensors, "
            "None, bool, int, float and str only, so convert it to one of these"
        )

    @pack.register(type(None) | bool | int | str)
    def _(self, value: Any, path: str) -> Any:
        return value

    @pack.register
    def _(self, value: float, path: str) -> Any:
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}

    @pack.register
    def _(self, value: list, path: str) -> Any:
        return [self.pack(item, _at(path, index)) for index, item in enumerate(value)]

    @pack.register
    def _(self, value: tuple, path: str) -> Any:
        return {"$tuple": [self.pack(item, _at(path, index)) for index, item in enumerate(value)]}

    @pack.register
    def _(self, value: Mapping, path: str) -> Any:
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(
                    f"cannot save the key {key!r} of {path or 'the state'}, of type {type(key).__qualname__}: "
                    "a checkpoint's dicts have str or int keys only, so convert it to one of these"
                )
        pairs = [(key, self.pack(item, _at(path, key))) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$dict": pairs}

    @pack.register
    def _(self, value: torch.Tensor, path: str) -> Any:
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise TypeError(
                f"cannot save {path} of type {value.type()}: a checkpoint holds dense tensors with values only, "
                "so convert it with .to_dense(), .dequantize() or .to_empty()"
            )
        identity = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device, value.is_conj())
        identity = (*identity, value.is_neg()) if value.numel() else (id(value),)
        if identity not in self._names:
            self._alive.append(value)
            self._names[identity] = self._set_aside(value, path)
        return {"$tensor": self._names[identity]}

    def _set_aside(self, tensor: torch.Tensor, path: str) -> str:
        name = path.encode("utf-8", "backslashreplace").decode()
        while name in self.tensors or name == "__metadata__":  # the latter is safetensors' own
            name += "'"
        # Cloned, because safetensors refuses tensors that share memory; and dtypes that it may not know go as bytes.
        dense = tensor.detach().resolve_conj().resolve_neg().cpu().clone(memory_format=torch.contiguous_format)
        if dense.dtype not in _PORTABLE:
            self.views[name] = (str(dense.dtype).removeprefix("torch."), list(dense.shape))
            dense = dense.reshape(-1).view(torch.uint8)
        self.tensors[name] = dense
        return name


def _at(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    match value:
        case list():
            return [_unpack(item, tensors) for item in value]
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(_unpack(item, tensors) for item in items)
        case {"$dict": pairs}:
            return {key: _unpack(item, tensors) for key, item in pairs}
        case {"$tensor": name}:
            return tensors[name]
        case dict():
            return {key: _unpack(item, tensors) for key, item in value.items()}
    return value


def _write_files(folder: Path, tree: Any, packer: _Packer) -> None:
    path = folder / _TENSORS
    save_file(packer.tensors, path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    about = {"file": _TENSORS, "bytes": path.stat().st_size, "sha256": digest}
    content = {"format": FORMAT, "tensors": about, "views": packer.views, "state": tree}
    header = json.dumps(content, allow_nan=False)
    rest = b'", ' + header.removeprefix("{").encode()
    _write_synced(folder / _STATE, _HEAD + hashlib.sha256(rest).hexdigest().encode() + rest)
    _sync(folder)


def _verified_header(path: Path) -> dict:
    content = _bytes_of(path)
    digest, rest = content[len(_HEAD) :][:_DIGEST_LENGTH], content[len(_HEAD) + _DIGEST_LENGTH :]
    if not content.startswith(_HEAD) or hashlib.sha256(rest).hexdigest().encode() != digest:
        raise CorruptCheckpoint(f"{path}: its content differs from its own SHA-256: it was cut short or altered")
    header = json.loads(content)
    if header["format"] != FORMAT:
        raise CorruptCheckpoint(
            f"{path}: has format {header['format']}, this version of lockfree reads {FORMAT}: use the one that wrote it"
        )
    return header


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{path}: the file is missing: the checkpoint was not written to its end") from None


def _asides(folder: Path) -> tuple[Path, Path]:
    """Where the new checkpoint is written, and where the old one waits while the new one takes its place."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Makes a folder's list of names durable: without it a rename may be lost in a power cut."""
    if os.name == "nt":  # Windows opens no folders, and orders renames itself.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
