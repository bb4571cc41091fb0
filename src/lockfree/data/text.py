"""Texts as symbol numbers: the sets by name, and any file."""

import dataclasses
import importlib.resources
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from lockfree.choose import choose, unknown
from lockfree.data.formats import decompressed
from lockfree.data.sources import TEXT_SOURCES, data_root
from lockfree.data.vocabulary import Characters, Vocabulary, Words

_logger = logging.getLogger(__name__)

_EMBEDDED = "lockfree.data.embedded.text"
_SAMPLE, _FULL = "shakespeare-sample", "tinyshakespeare"
_TRAIN, _VALID = 0.90, 0.05

_Parts = tuple[str, str, str]
Unit = Literal["character", "word"]


# Tensors have no truth value, so sets are compared by identity.
@dataclass(frozen=True, kw_only=True, eq=False)
class TextSet:
    """A text, whole in memory as symbol numbers.

    Attributes:
        name: What it was asked for by.
        train: The training part.
        valid: The part to choose settings by.
        test: The part to judge by.
        vocabulary: What the numbers mean; it is made of the training part alone.
        source: Where the text came from and how long it is, for people.

    Example:
        >>> sample = load_text("shakespeare-sample")
        >>> sample.vocabulary.decode(sample.train[:14])
        'First Citizen:'
    """

    name: str
    train: Int64[Tensor, " n_train"] = field(repr=False)
    valid: Int64[Tensor, " n_valid"] = field(repr=False)
    test: Int64[Tensor, " n_test"] = field(repr=False)
    vocabulary: Vocabulary
    source: str

    def to(self, device: str | torch.device) -> "TextSet":
        """Returns this text with every tensor on another device.

        Args:
            device: Where to, for example "cuda".

        Returns:
            A new set; tensors that are there already are shared, not copied.
        """
        parts = {part: getattr(self, part).to(device) for part in ("train", "valid", "test")}
        return dataclasses.replace(self, **parts)


def load_text(
    name: str,
    *,
    unit: Unit = "character",
    vocabulary_size: int | None = None,
    unknown: Literal["refuse", "count"] = "refuse",
    root: str | Path | None = None,
) -> TextSet:
    """Loads a text set by name.

    "brown" comes in three files, which are its parts; of all others the parts are the first 90 % of the characters, the next 5 %
    and the rest, each up to the end of the line.

    Args:
        name: "tinyshakespeare", "austen", "brown", or "shakespeare-sample" (the sample inside this package, which also stands
            in, with a logged warning, where "tinyshakespeare" is asked for and not found).
        unit: What a symbol is: "character" (the vocabulary is those of the training part, sorted) or "word" (what white space
            separates; the vocabulary is the words of the training part by frequency, then alphabetically, "<eos>" for the end
            of a line and "<unk>" for all other words).
        vocabulary_size: Symbols of a vocabulary of words; all words of the training part if left out.
        unknown: What becomes of a character that the training part lacks: "refuse" it, or "count" it as the symbol "<unk>",
            which is then in the vocabulary.
        root: The data folder, as for `load`.

    Returns:
        The set; its `source` says what was read.

    Raises:
        ValueError: The name is unknown, the text is not there, no UTF-8 or too short, or it has an unknown character.
        OSError: A file cannot be read.

    Example:
        >>> sample = load_text("shakespeare-sample", unit="word", vocabulary_size=1000)
        >>> len(sample.vocabulary), sample.vocabulary.symbols[:4]
        (1000, ('<unk>', '<eos>', 'the', 'to'))
    """
    parts, source = choose(_LOADERS, name, "text set")(data_root(root))
    return _text_set(name, parts, source, unit, vocabulary_size, unknown)


def read_text(
    path: str | Path,
    *,
    unit: Unit = "character",
    vocabulary_size: int | None = None,
    unknown: Literal["refuse", "count"] = "refuse",
) -> TextSet:
    r"""Reads a text of one's own: a UTF-8 file, plain or compressed with gzip or xz; `\r\n` counts as one line end.

    Args:
        path: The file.
        unit: As for `load_text`.
        vocabulary_size: As for `load_text`.
        unknown: As for `load_text`.

    Returns:
        The set: the first 90 % of the file, the next 5 % and the rest, each up to the end of the line.

    Raises:
        ValueError: The file is no UTF-8, too short or damaged, or has an unknown character.
        OSError: The file cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "own.txt"
        >>> _ = path.write_text("abc\n" * 100, encoding="utf-8")
        >>> own = read_text(path)
        >>> len(own.train), len(own.valid), len(own.test)
        (360, 20, 20)
    """
    path = Path(path)
    parts = _split(_read(path.read_bytes(), str(path)), str(path))
    return _text_set(path.name, parts, f"{path}: {_counts(parts)}", unit, vocabulary_size, unknown)


def text_names() -> tuple[str, ...]:
    """Lists what `load_text` takes.

    Returns:
        The names of the text sets.

    Example:
        >>> text_names()
        ('tinyshakespeare', 'austen', 'brown', 'shakespeare-sample')
    """
    return tuple(_LOADERS)


class AvailableText(NamedTuple):
    """A line of the list of text sets.

    Attributes:
        name: What `load_text` calls it.
        status: "found" in the data folder, "embedded" in this package, or "missing".
        where: The folder or package; for a missing set the folder where it would be.
        size: Bytes of the uncompressed text; None where that is not known without reading it.
        licence: What one may do with it.
    """

    name: str
    status: Literal["found", "embedded", "missing"]
    where: str
    size: int | None
    licence: str


def available_texts(root: str | Path | None = None) -> list[AvailableText]:
    """Lists the text sets and what `load_text` would serve for each, without reading those of the data folder.

    Args:
        root: The data folder, as for `load`.

    Returns:
        A line for each name; "tinyshakespeare" shows as embedded where only the sample inside this package is there.

    Example:
        >>> [line.status for line in available_texts() if line.name == "shakespeare-sample"]
        ['embedded']
    """
    folder = data_root(root)
    licence = TEXT_SOURCES[_FULL].licence
    sample = AvailableText(_SAMPLE, "embedded", "lockfree", len(_sample_bytes()), licence)
    lines = []
    for name, source in TEXT_SOURCES.items():
        paths = source.present(folder)
        plain = [path for path in paths if path is not None and path.suffix == ".txt"]
        size = sum(path.stat().st_size for path in plain) if len(plain) == len(paths) else None
        line = AvailableText(name, "found" if any(paths) else "missing", str(folder / source.folder), size, source.licence)
        lines.append(sample._replace(name=name) if name == _FULL and not any(paths) else line)
    return [*lines, sample]


def _sample_bytes() -> bytes:
    packed = importlib.resources.files(_EMBEDDED).joinpath(f"{_SAMPLE}.txt.xz").read_bytes()
    return decompressed(packed, _SAMPLE)[0]


def _sample(root: Path) -> tuple[_Parts, str]:
    parts = _split(_read(_sample_bytes(), _SAMPLE), _SAMPLE)
    return parts, f"embedded sample: {_counts(parts)}"


def _tinyshakespeare(root: Path) -> tuple[_Parts, str]:
    source = TEXT_SOURCES[_FULL]
    if any(source.present(root)):
        return _files(root, _FULL)
    parts, kind = _sample(root)
    _logger.warning(
        "no %s in %s, going on with the %s; `lockfree data fetch %s` gets all of it", _FULL, root / source.folder, kind, _FULL
    )
    return parts, kind


def _files(root: Path, name: str) -> tuple[_Parts, str]:
    source = TEXT_SOURCES[name]
    folder = root / source.folder
    paths = source.present(root)
    if not any(paths):
        raise ValueError(f"no {name} in {folder}: {source.by_hand.format(folder=folder)}, or point LOCKFREE_DATA elsewhere")
    texts, official = [], bool(source.mirrors)
    for file, path in zip(source.files, paths, strict=True):
        if path is None:
            raise ValueError(f"{folder} is incomplete: expected {file.name} there too; {source.by_hand.format(folder=folder)}")
        content = path.read_bytes()
        texts.append(_read(content, str(path)))
        official = official and file.holds(decompressed(content, str(path))[0])
    parts: _Parts = (texts[0], texts[1], texts[2]) if len(texts) == 3 else _split(texts[0], name)
    # Another text may be wanted, but no result on it may pass for the official one's.
    kind = "full text" if official else "text that differs from the official one" if source.mirrors else "text"
    return parts, f"{kind} in {folder}: {_counts(parts)}"


def _read(content: bytes, name: str) -> str:
    content, whole = decompressed(content, name)
    if not whole:
        raise ValueError(f"{name}: the compressed text is cut off; get the file anew")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: expected UTF-8, found byte 0x{content[error.start]:02x} at place {error.start:,}; save the text as UTF-8"
        ) from error
    return text.replace("\r\n", "\n")


def _split(text: str, name: str) -> _Parts:
    first = _border(text, round(_TRAIN * len(text)))
    second = max(first, _border(text, round((_TRAIN + _VALID) * len(text))))
    parts = text[:first], text[first:second], text[second:]
    if not all(parts):
        raise ValueError(
            f"{name}: {len(text):,} characters are too few for three parts of {_TRAIN:.0%}, {_VALID:.0%} and {_VALID:.0%} of "
            "whole lines; take a longer text"
        )
    return parts


def _border(text: str, place: int) -> int:
    """Says where the line ends that this place cuts; where the line is long, there is no border but the place itself."""
    end = text.find("\n", max(place - 1, 0), place + max(len(text) // 100, 1))
    return place if end < 0 else end + 1


def _text_set(name: str, parts: _Parts, source: str, unit: str, size: int | None, lacking: str) -> TextSet:
    if lacking not in ("refuse", "count"):
        raise unknown("answer to unknown characters", lacking, ("refuse", "count"))
    if not parts[0]:
        raise ValueError(f"{name}: the training part is empty; take a longer text")
    vocabulary = choose(_VOCABULARIES, unit, "unit")(parts[0], size, lacking == "count")
    train, valid, test = (
        vocabulary.encode(text, where=f"{name}, {part} part,")
        for part, text in zip(("training", "validation", "test"), parts, strict=True)
    )
    for part, numbers in (("validation", valid), ("test", test)):
        if len(numbers) < 2:
            raise ValueError(
                f"{name}: the {part} part has {len(numbers)} symbols, too few to predict one from another; take a longer text"
            )
    return TextSet(name=name, train=train, valid=valid, test=test, vocabulary=vocabulary, source=source)


def _characters(text: str, size: int | None, count_unknown: bool) -> Vocabulary:
    if size is not None:
        raise ValueError(f"vocabulary_size is for words, got {size} for characters; leave it out, or take unit='word'")
    return Characters.of(text, unknown=count_unknown)


def _words(text: str, size: int | None, count_unknown: bool) -> Vocabulary:
    return Words.of(text, size=size)


def _counts(parts: _Parts) -> str:
    train, valid, test = (f"{len(part):,}" for part in parts)
    return f"{train} training, {valid} validation and {test} test characters"


_VOCABULARIES: dict[str, Callable[[str, int | None, bool], Vocabulary]] = {"character": _characters, "word": _words}
_LOADERS: dict[str, Callable[[Path], tuple[_Parts, str]]] = {
    _FULL: _tinyshakespeare,
    "austen": lambda root: _files(root, "austen"),
    "brown": lambda root: _files(root, "brown"),
    _SAMPLE: _sample,
}
