"""Repeat copy: say again what was shown, as often as is asked."""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from lockfree.recurrent.tasks.base import at_least
from lockfree.recurrent.tasks.levels import LevelTask, asked_after


@dataclass(frozen=True, kw_only=True)
class RepeatCopy(LevelTask):
    """N random symbols are shown, then how often, R; then a blank is shown while R times the N symbols and an end are asked for.

    A sequence has N + 1 + N R + 1 steps. Inputs are the alphabet, a symbol for each number of repeats from 1 to `most_repeats`, and
    the blank; outputs are the alphabet and the end, the number after it. The curriculum begins with N = R = 1 and adds one to N and
    to R by turns, N first; once R is at its most, to N alone.

    What counts as solved is the largest level that was left behind, 0 before the first: `length_solved` is N R, the symbols written
    without the end. `sequence_solved` is N + N R + 3, with a start, a delimiter and an end: the figures of the paper's Table 1,
    as remembered and not checked, are all of this form along these levels, so it is probably what is counted there.

    Attributes:
        batch: Sequences side by side; the paper's are 256.
        seed: What symbols are drawn by.
        alphabet: Symbols to be remembered, 2 or more.
        threshold: The error in bits per symbol asked, the end among them, below which the next level comes; 0.15 in the paper.
        window: Batches whose mean error must be below it.
        most_repeats: The largest R, 1 or more.

    Raises:
        ValueError: A setting is out of its range.

    Example:
        >>> repeat = RepeatCopy(batch=1, window=1, most_repeats=4)
        >>> repeat.learnt(0.1), repeat.learnt(0.1)
        (None, None)
        >>> repeat.stretch(1).inputs.T.tolist(), repeat.stretch(1).targets.T.tolist()
        ([[1, 0, 3, 6, 6, 6, 6, 6]], [[-100, -100, -100, 1, 0, 1, 0, 2]])
        >>> repeat.solved
        {'length_solved': 2.0, 'sequence_solved': 7.0}

    Reference:
        Graves, Wayne and Danihelka 2014, "Neural Turing machines", arXiv 1410.5401, section 4.2; the curriculum is that of Jaderberg
        et al. 2017, "Decoupled neural interfaces using synthetic gradients", arXiv 1608.05343, Table 1.
    """

    most_repeats: int = 32

    def _check(self) -> None:
        at_least(1, most_repeats=self.most_repeats)

    @property
    def _symbols(self) -> int:
        return self.alphabet + self.most_repeats + 1

    @property
    def classes(self) -> int:
        return self.alphabet + 1

    @property
    def solved(self) -> dict[str, float]:
        level = self.curriculum.level - 1
        if level < 0:
            return {"length_solved": 0.0, "sequence_solved": 0.0}
        written = self._length(level) * self._repeats(level)
        return {"length_solved": float(written), "sequence_solved": float(self._length(level) + written + 3)}

    def _repeats(self, level: int) -> int:
        return min(1 + level // 2, self.most_repeats)

    def _length(self, level: int) -> int:
        return 2 + level - self._repeats(level)

    def _sequences(self, shown: Int64[Tensor, "n batch"], level: int) -> tuple[Tensor, Tensor]:
        repeats = self._repeats(level)
        answers = torch.cat([shown.repeat(repeats, 1), torch.full_like(shown[:1], self.alphabet)])
        return asked_after(shown, answers, cue=self.alphabet + repeats - 1, blank=self.alphabet + self.most_repeats)
