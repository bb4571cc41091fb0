"""The data sets by name: load one, or see which are there."""

import importlib.resources
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from lockfree.choose import unknown
from lockfree.data.dataset import Dataset, Split, standardised
from lockfree.data.formats import check_labels, decompressed, parse_cifar10, parse_idx
from lockfree.data.sources import SOURCES, ImageSource, data_root

_logger = logging.getLogger(__name__)

_EMBEDDED = "lockfree.data.embedded"
_EMBEDDED_TRAIN, _EMBEDDED_TEST = 10_000, 2_000
_DIGITS_BRIGHTEST = 16
_DIGITS_TRAIN, _DIGITS_TEST = 1_437, 360


class _Content(NamedTuple):
    """A file's uncompressed bytes, its name for messages, and whether its compression was whole."""

    data: bytes
    name: str
    whole: bool


# Images and labels of a half; `_` because the two halves have different lengths.
_Samples = tuple[UInt8[Tensor, "_ c h w"], Int64[Tensor, " _"]]


def load(name: str, *, root: str | Path | None = None) -> Dataset:
    """Loads a data set by name, standardised with the statistics of its own training images.

    Args:
        name: "digits" (bundled with scikit-learn), "mnist", "fashion-mnist", "cifar10", or "fashion-mnist-sample" (the
            class-balanced sample inside this package, which also stands in, with a logged warning, where
            "fashion-mnist" is asked for and not found).
        root: The data folder; by default the environment's LOCKFREE_DATA, else a folder in the user's cache.

    Returns:
        The set; its `source` says what was read.

    Raises:
        ValueError: The name is unknown, the set is not there, or its files are damaged or incomplete.
        OSError: A file cannot be read.

    Example:
        >>> digits = load("digits")
        >>> digits.train.inputs.shape
        torch.Size([1437, 1, 8, 8])
    """
    if name not in _LOADERS:
        raise unknown("data set", name, names())
    return _LOADERS[name](data_root(root))


def names() -> tuple[str, ...]:
    """Lists what `load` takes.

    Returns:
        The names of the data sets.

    Example:
        >>> "digits" in names()
        True
    """
    return tuple(_LOADERS)


class Available(NamedTuple):
    """A line of the list of data sets.

    Attributes:
        name: What `load` calls it.
        status: "found" in the data folder, "embedded" in an installed package, or "missing".
        where: The folder or package; for a missing set the folder where it would be.
        n_train: Training samples that `load` would give (of a full set: that the official files hold).
        n_test: Test samples, likewise.
        licence: What one may do with it.
    """

    name: str
    status: Literal["found", "embedded", "missing"]
    where: str
    n_train: int
    n_test: int
    licence: str


def available(root: str | Path | None = None) -> list[Available]:
    """Lists the data sets and what `load` would serve for each, without reading them.

    Args:
        root: The data folder, as for `load`.

    Returns:
        A line for each name; "fashion-mnist" shows as embedded where only the sample inside this package is there.

    Example:
        >>> [line.status for line in available() if line.name == "digits"]
        ['embedded']
    """
    folder = data_root(root)
    sample = Available(
        "fashion-mnist-sample",
        "embedded",
        "lockfree",
        _EMBEDDED_TRAIN,
        _EMBEDDED_TEST,
        SOURCES["fashion-mnist"].licence,
    )
    digits = Available("digits", "embedded", "scikit-learn", _DIGITS_TRAIN, _DIGITS_TEST, "CC BY 4.0, Alpaydin and Kaynak")
    lines = [digits]
    for name, source in SOURCES.items():
        found = any(source.present(folder))
        status = "found" if found else "missing"
        line = Available(name, status, str(folder / source.folder), source.n_train, source.n_test, source.licence)
        lines.append(sample._replace(name=name) if name == "fashion-mnist" and not found else line)
    return [*lines, sample]


def _digits(root: Path) -> Dataset:
    # Here and not above: scikit-learn takes a second to import, and only this set needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, digits = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(digits).to(torch.int64)
    # scikit-learn brings no split of its own, so this one is fixed here: one in five of every digit is held out.
    train, test = train_test_split(range(len(labels)), test_size=_DIGITS_TEST, stratify=digits, random_state=0)
    halves = ((images[train], labels[train]), (images[test], labels[test]))
    source = f"bundled with scikit-learn: {_counts(*halves)}"
    return _dataset("digits", *halves, tuple("0123456789"), source, brightest=_DIGITS_BRIGHTEST)


def _embedded(root: Path, name: str = "fashion-mnist-sample") -> Dataset:
    source = SOURCES["fashion-mnist"]
    folder = importlib.resources.files(_EMBEDDED)
    contents = []
    for file in source.files:
        data, whole = decompressed(folder.joinpath(f"{file.name}.xz").read_bytes(), file.name)
        contents.append(_Content(data, f"{file.name}.xz inside the package", whole))
    train, test = _idx_halves(contents, source.classes)
    return _dataset(name, train, test, source.classes, f"embedded sample: {_counts(train, test)}")


def _fashion_mnist(root: Path) -> Dataset:
    source = SOURCES["fashion-mnist"]
    if any(source.present(root)):
        return _full_set(root, "fashion-mnist", _idx_halves)
    sample = _embedded(root, "fashion-mnist")
    _logger.warning(
        "no full fashion-mnist in %s, going on with the %s; `lockfree data fetch fashion-mnist` gets all 70,000 images",
        root / source.folder,
        sample.source,
    )
    return sample


def _full_set(
    root: Path, name: str, halves: Callable[[Sequence[_Content], tuple[str, ...]], tuple[_Samples, _Samples]]
) -> Dataset:
    source = SOURCES[name]
    folder = root / source.folder
    contents = _read(source, root)
    if not contents:
        raise ValueError(
            f"no {name} in {folder}: run `lockfree data fetch {name}`, or point LOCKFREE_DATA at the folder that holds "
            f"{source.folder}"
        )
    train, test = halves(contents, source.classes)
    # Other bytes may be wanted (a re-encoded copy, a subset), but no result on them may pass for the official set's.
    official = all(file.holds(content.data) for file, content in zip(source.files, contents, strict=True))
    kind = "full set" if official else "files that differ from the official set"
    return _dataset(name, train, test, source.classes, f"{kind} in {folder}: {_counts(train, test)}")


def _read(source: ImageSource, root: Path) -> list[_Content]:
    """Reads every file of a set: all of them, or none if none is there."""
    paths = source.present(root)
    if not any(paths):
        return []
    contents = []
    for file, path in zip(source.files, paths, strict=True):
        if path is None:
            raise ValueError(
                f"{root / source.folder} is incomplete: expected {file.name} there too; fetch the set anew, or "
                "take the folder away"
            )
        data, whole = decompressed(path.read_bytes(), str(path))
        contents.append(_Content(data, str(path), whole))
    return contents


def _idx_halves(contents: Sequence[_Content], classes: tuple[str, ...]) -> tuple[_Samples, _Samples]:
    train_images, train_labels, test_images, test_labels = contents
    train, test = _idx_samples(train_images, train_labels, classes), _idx_samples(test_images, test_labels, classes)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"{test_images.name}: expected test images of the training images' size {tuple(train[0].shape[2:])}, found "
            f"{tuple(test[0].shape[2:])}; fetch the set anew"
        )
    return train, test


def _idx_samples(images: _Content, labels: _Content, classes: tuple[str, ...]) -> _Samples:
    pixels = parse_idx(images.data, images.name, whole=images.whole)
    targets = parse_idx(labels.data, labels.name, whole=labels.whole).to(torch.int64)
    if pixels.dim() != 3 or pixels.numel() == 0:
        raise ValueError(
            f"{images.name}: expected images of shape (n, height, width), found {tuple(pixels.shape)}; fetch it anew"
        )
    if targets.shape != pixels.shape[:1]:
        raise ValueError(
            f"{labels.name}: expected {len(pixels):,} labels, one for each image of {images.name}, found shape "
            f"{tuple(targets.shape)}; fetch the set anew"
        )
    check_labels(targets, len(classes), labels.name)
    return pixels.unsqueeze(1), targets


def _cifar10_halves(contents: Sequence[_Content], classes: tuple[str, ...]) -> tuple[_Samples, _Samples]:
    batches = [(content.data, content.name) for content in contents]
    return parse_cifar10(batches[:-1]), parse_cifar10(batches[-1:])


def _dataset(
    name: str, train: _Samples, test: _Samples, classes: tuple[str, ...], source: str, *, brightest: int = 255
) -> Dataset:
    inputs, held_out = standardised(train[0], test[0], brightest=brightest)
    return Dataset(name=name, train=Split(inputs, train[1]), test=Split(held_out, test[1]), classes=classes, source=source)


def _counts(train: _Samples, test: _Samples) -> str:
    return f"{len(train[1]):,} training and {len(test[1]):,} test images"


_LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "digits": _digits,
    "mnist": partial(_full_set, name="mnist", halves=_idx_halves),
    "fashion-mnist": _fashion_mnist,
    "cifar10": partial(_full_set, name="cifar10", halves=_cifar10_halves),
    "fashion-mnist-sample": _embedded,
}
