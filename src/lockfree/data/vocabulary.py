"""Vocabularies: text becomes symbol numbers, and symbol numbers text again."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

UNKNOWN = "<unk>"
LINE_END = "<eos>"


@dataclass(frozen=True, kw_only=True)
class Vocabulary(ABC):
    """The symbols of a text; a symbol's number is its place.

    Attributes:
        symbols: The symbols, each once; `UNKNOWN` among them, if there is one, stands for all others.

    Raises:
        ValueError: There is no symbol, or one of them twice.
    """

    symbols: tuple[str, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.symbols:
            raise ValueError("expected one symbol at least, got an empty vocabulary; take a text that is not empty")
        if len(set(self.symbols)) != len(self.symbols):
            twice, _ = Counter(self.symbols).most_common(1)[0]
            raise ValueError(f"expected each symbol once, got {twice!r} more often; leave the others out")
        self._check()

    def __len__(self) -> int:
        return len(self.symbols)

    @abstractmethod
    def encode(self, text: str, *, where: str = "the text") -> Int64[Tensor, " n"]:
        """Gives the numbers of a text's symbols.

        Args:
            text: Any text.
            where: What it is, for messages.

        Returns:
            As many numbers, from 0 to below the length of the vocabulary, as the text has symbols.

        Raises:
            ValueError: A symbol is not in the vocabulary, and the vocabulary has no `UNKNOWN`.
        """

    @abstractmethod
    def decode(self, numbers: Int64[Tensor, " n"]) -> str:
        """Gives the text of symbol numbers.

        Args:
            numbers: From 0 to below the length of the vocabulary.

        Returns:
            The text.

        Raises:
            ValueError: A number is outside the vocabulary.
        """

    @abstractmethod
    def _check(self) -> None:
        """Raises a ValueError where the symbols are none of this kind."""

    def _texts(self, numbers: Tensor) -> Iterator[str]:
        outside = numbers[(numbers < 0) | (numbers >= len(self))]
        if len(outside):
            raise ValueError(
                f"expected symbol numbers from 0 to {len(self) - 1:,}, got {int(outside[0]):,}; decode with the vocabulary "
                "that the text was encoded with"
            )
        return (self.symbols[number] for number in numbers.tolist())


@dataclass(frozen=True, kw_only=True)
class Characters(Vocabulary):
    """Every character is a symbol: `decode(encode(text)) == text` for what has no unknown character.

    Attributes:
        symbols: The characters, sorted by code point, with `UNKNOWN` as the last one where it is wanted.

    Example:
        >>> letters = Characters.of("a cab")
        >>> letters.symbols, letters.encode("bac").tolist()
        ((' ', 'a', 'b', 'c'), [2, 1, 3])
        >>> letters.decode(letters.encode("bac"))
        'bac'
        >>> letters.encode("bad")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: the text has a character that the vocabulary lacks: 'd' (U+0064) at line 1, column 3; read it with ...
    """

    @classmethod
    def of(cls, text: str, *, unknown: bool = False) -> "Characters":
        """Makes the vocabulary of a text.

        Args:
            text: Its characters are the symbols.
            unknown: Add `UNKNOWN`, which all other characters are taken for.

        Returns:
            The vocabulary.

        Raises:
            ValueError: The text is empty.

        Example:
            >>> Characters.of("abba", unknown=True).encode("abc").tolist()
            [0, 1, 2]
        """
        if not text:
            raise ValueError("expected some text, got none; take a text that is not empty")
        return cls(symbols=(*sorted(set(text)), *((UNKNOWN,) if unknown else ())))

    def encode(self, text: str, *, where: str = "the text") -> Int64[Tensor, " n"]:
        known = _points("".join(symbol for symbol in self.symbols if symbol != UNKNOWN))
        wanted = _points(text)
        numbers = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        lacking = np.flatnonzero(known[numbers] != wanted)
        if len(lacking):
            if UNKNOWN not in self.symbols:
                raise ValueError(_lacks(text, int(lacking[0]), where))
            numbers[lacking] = self.symbols.index(UNKNOWN)
        return torch.from_numpy(numbers.astype(np.int64))

    def decode(self, numbers: Int64[Tensor, " n"]) -> str:
        return "".join(self._texts(numbers))

    def _check(self) -> None:
        letters = self.symbols[:-1] if self.symbols[-1] == UNKNOWN else self.symbols
        if not letters or any(len(letter) != 1 for letter in letters) or list(letters) != sorted(letters):
            raise ValueError(f"expected single characters in order, and {UNKNOWN} last if at all; make it with Characters.of")


@dataclass(frozen=True, kw_only=True)
class Words(Vocabulary):
    r"""Words between white space are symbols, and so is `LINE_END` at the end of each line; what is rare is `UNKNOWN`.

    `decode` puts one space between words, so it gives a text back whose words are so set already, and that has no
    unknown word.

    Attributes:
        symbols: `UNKNOWN`, `LINE_END`, then words, the most frequent first and equally frequent ones by code points.

    Example:
        >>> words = Words.of("to be or\nnot to be\n")
        >>> words.symbols
        ('<unk>', '<eos>', 'be', 'to', 'not', 'or')
        >>> words.encode("to err\n").tolist()
        [3, 0, 1]
    """

    @classmethod
    def of(cls, text: str, *, size: int | None = None) -> "Words":
        """Makes the vocabulary of a text.

        Args:
            text: Its words are the symbols.
            size: Symbols in all, `UNKNOWN` and `LINE_END` among them, 3 or more; all words if left out.

        Returns:
            The vocabulary; it has fewer symbols where the text has fewer words.

        Raises:
            ValueError: The text has no word, or the size leaves room for none.

        Example:
            >>> Words.of("to be or not to be", size=3).symbols
            ('<unk>', '<eos>', 'be')
        """
        if size is not None and size < 3:
            raise ValueError(f"vocabulary_size must be 3 or more, for {UNKNOWN}, {LINE_END} and one word, got {size}")
        counts = Counter(word for word in text.split() if word not in (UNKNOWN, LINE_END))
        if not counts:
            raise ValueError("expected one word at least, got none; take a text that is not empty")
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(symbols=(UNKNOWN, LINE_END, *ordered[: None if size is None else size - 2]))

    def encode(self, text: str, *, where: str = "the text") -> Int64[Tensor, " n"]:
        places = {symbol: number for number, symbol in enumerate(self.symbols)}
        rare, end = places[UNKNOWN], places[LINE_END]
        numbers = []
        for line in text.split("\n"):
            numbers += [places.get(word, rare) for word in line.split()]
            numbers.append(end)
        numbers.pop()  # what follows the last line end is a line that has not ended
        return torch.tensor(numbers, dtype=torch.int64)

    def decode(self, numbers: Int64[Tensor, " n"]) -> str:
        lines = " ".join("\n" if text == LINE_END else text for text in self._texts(numbers))
        return lines.replace(" \n", "\n").replace("\n ", "\n")

    def _check(self) -> None:
        if self.symbols[:2] != (UNKNOWN, LINE_END):
            raise ValueError(f"expected {UNKNOWN} and {LINE_END} first, got {self.symbols[:2]}; make it with Words.of")


def _points(text: str) -> np.ndarray:
    # Numbers of characters; a lone surrogate, which no encoding has, is still a character of a Python string.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _lacks(text: str, place: int, where: str) -> str:
    line, column = text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
    return (
        f"{where} has a character that the vocabulary lacks: {text[place]!r} (U+{ord(text[place]):04X}) at line {line:,}, "
        f"column {column:,}; read it with unknown='count', which adds a symbol {UNKNOWN} for such, or mend the text"
    )
