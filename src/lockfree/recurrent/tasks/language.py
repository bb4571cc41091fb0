"""Language models: which character, or which word, comes next."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from lockfree.data import Stream, TextSet, load_text
from lockfree.recurrent.stretch import Stretch
from lockfree.recurrent.tasks.base import IGNORED, Predicts, Task, at_least

_SCORES = 1 << 24  # as many scores are held at once while a text is judged: 64 MB


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Task):
    """Reads a text as parallel rows, on and on, and is asked for the next symbol at each step.

    A stretch is `length` steps of all rows, and the state is to be carried from one to the next (`lockfree.data.Stream`). The seed
    changes nothing: a text has but one order.

    Judging goes through a part of the text in `rows` parallel rows from the initial state each, carrying the state to their end; every
    symbol but the first is asked for once.

    Attributes:
        text: Name of the text set.
        length: Steps of a stretch, 1 or more.
        evaluated: Predictions in each part to judge by, from its beginning; all if left out.
        rows: Rows to judge in, 1 or more. The fewer, the less often the network has to begin without knowing what went before.
        root: The data folder, as for `lockfree.data.load`.

    Raises:
        ValueError: A setting is out of its range; later, the text is not there or too short.
    """

    text: str = "tinyshakespeare"
    length: int = 40
    evaluated: int | None = None
    rows: int = 64
    root: Path | None = None
    larger_is_better: ClassVar[bool] = False

    def _prepare(self) -> None:
        at_least(1, length=self.length, rows=self.rows)
        if self.evaluated is not None:
            at_least(1, evaluated=self.evaluated)

    @abstractmethod
    def _load(self) -> TextSet:
        """Reads the text."""

    @abstractmethod
    def _figures(self, bits: float, part: str) -> dict[str, float]:
        """Names what a mean error in bits per symbol comes to."""

    @cached_property
    def corpus(self) -> TextSet:
        """The text, read when it is first needed."""
        return self._load()

    @cached_property
    def _stream(self) -> Stream:
        return Stream(self.corpus.train, self.batch, self.length)

    @property
    def symbols(self) -> int:
        return len(self.corpus.vocabulary)

    @property
    def features(self) -> int:
        return len(self.corpus.vocabulary)

    @property
    def classes(self) -> int:
        return len(self.corpus.vocabulary)

    def stretch(self, number: int) -> Stretch:
        return Stretch(*self._stream.at(number))

    def evaluate(self, learner: Predicts) -> dict[str, float]:
        return {
            **self._figures(self.bits_of(learner, self.corpus.valid), ""),
            **self._figures(self.bits_of(learner, self.corpus.test), "test_"),
        }

    def bits_of(self, learner: Predicts, symbols: Int64[Tensor, " n"]) -> float:
        """Judges a learner on any text of the same vocabulary.

        Args:
            learner: It is asked to predict, and not changed.
            symbols: The text, two symbols or more; `evaluated` and `rows` hold here too.

        Returns:
            The mean error in bits per symbol.
        """
        if self.evaluated is not None:
            symbols = symbols[: self.evaluated + 1]
        predictions = len(symbols) - 1
        assert predictions > 0, "a part of a text set has two symbols at least"
        rows = min(self.rows, predictions)
        steps = -(-predictions // rows)
        missing = rows * steps - predictions
        inputs = F.pad(symbols[:-1], (0, missing)).view(rows, steps).T
        targets = F.pad(symbols[1:], (0, missing), value=IGNORED).view(rows, steps).T
        piece = max(1, _SCORES // (rows * self.classes))
        state, nats = None, 0.0
        for shown, asked in zip(inputs.split(piece), targets.split(piece), strict=True):
            outputs, state = learner.predict(shown, state=state)
            sums = F.cross_entropy(
                outputs.flatten(0, 1), asked.flatten().to(outputs.device), reduction="none", ignore_index=IGNORED
            )
            nats += sums.sum(dtype=torch.float64).item()
        return nats / predictions / math.log(2)


@dataclass(frozen=True, kw_only=True)
class CharacterModel(LanguageModel):
    """Predicts the next character, judged by bits per character.

    `evaluate` gives `bits_per_character` of the validation part and `test_bits_per_character` of the test part.

    Attributes:
        batch: Rows side by side; the paper's are 256.
        seed: Changes nothing.
        text: Name of the text set; the paper's is the Penn Treebank, which is not free.
        length: Steps of a stretch.
        evaluated: Predictions in each part to judge by, from its beginning; all if left out.
        rows: Rows to judge in.
        root: The data folder.
        unknown: Whether a character that the training part lacks is refused, or counted as one symbol more.

    Raises:
        ValueError: A setting is out of its range; later, the text is not there, too short, or has an unknown character.

    Example:
        >>> task = CharacterModel(text="shakespeare-sample", batch=4, length=6)
        >>> task.corpus.vocabulary.decode(task.stretch(1).inputs[:, 0])
        'Citize'
        >>> task.classes
        63

    Reference:
        Jaderberg et al. 2017, "Decoupled neural interfaces using synthetic gradients", arXiv 1608.05343, Table 1.
    """

    unknown: Literal["refuse", "count"] = "refuse"
    measure: ClassVar[str] = "bits per character"

    def _load(self) -> TextSet:
        return load_text(self.text, unknown=self.unknown, root=self.root)

    def _figures(self, bits: float, part: str) -> dict[str, float]:
        return {f"{part}bits_per_character": bits}


@dataclass(frozen=True, kw_only=True)
class WordModel(LanguageModel):
    r"""Predicts the next word, judged by bits per word, and by perplexity, which is two to the power of them.

    `evaluate` gives `bits_per_word` and `perplexity` of the validation part, and both with `test_` before them of the test part. The
    end of a line and the symbol for rare words count as words.

    Attributes:
        batch: Rows side by side; Shang and Zhang's are 20.
        seed: Changes nothing.
        text: Name of the text set; Shang and Zhang's are the Penn Treebank and WikiText-2.
        length: Steps of a stretch.
        evaluated: Predictions in each part to judge by, from its beginning; all if left out.
        rows: Rows to judge in.
        root: The data folder.
        vocabulary_size: Symbols, those for rare words and line ends among them, 3 or more; all words if left out.

    Raises:
        ValueError: A setting is out of its range; later, the text is not there or too short.

    Example:
        >>> task = WordModel(text="shakespeare-sample", batch=4, length=6, vocabulary_size=1000)
        >>> task.corpus.vocabulary.decode(task.stretch(0).inputs[:, 0])
        'First Citizen:\nBefore we <unk>'

    Reference:
        Shang and Zhang 2019, "Alternating synthetic and real gradients for neural language modeling", arXiv 1902.10630.
    """

    text: str = "brown"
    vocabulary_size: int | None = 10_000
    measure: ClassVar[str] = "bits per word"

    def _load(self) -> TextSet:
        return load_text(self.text, unit="word", vocabulary_size=self.vocabulary_size, root=self.root)

    def _figures(self, bits: float, part: str) -> dict[str, float]:
        return {f"{part}bits_per_word": bits, f"{part}perplexity": 2.0**bits}
