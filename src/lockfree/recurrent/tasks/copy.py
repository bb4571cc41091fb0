"""Copy: say again what was shown."""

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

from lockfree.recurrent.tasks.levels import LevelTask, asked_after


@dataclass(frozen=True, kw_only=True)
class Copy(LevelTask):
    """N random symbols are shown, then a delimiter; then a blank is shown N times while the symbols are asked for.

    A sequence has 2 N + 1 steps. Inputs are the alphabet, the delimiter (the number after it) and the blank (the one after that). The
    curriculum begins with N = 1, and every level adds one.

    What counts as solved, `length_solved`, is the largest N whose level was left behind, 0 before the first.

    Attributes:
        batch: Sequences side by side; the paper's are 256.
        seed: What symbols are drawn by.
        alphabet: Symbols to be remembered, 2 or more.
        threshold: The error in bits per symbol asked below which N grows; 0.15 in the paper.
        window: Batches whose mean error must be below it.

    Raises:
        ValueError: A setting is out of its range.

    Example:
        >>> copy = Copy(batch=1, window=1)
        >>> copy.learnt(0.1)
        >>> copy.stretch(0).inputs.T.tolist(), copy.stretch(0).targets.T.tolist()
        ([[1, 1, 2, 3, 3]], [[-100, -100, -100, 1, 1]])
        >>> copy.solved
        {'length_solved': 1.0}

    Reference:
        Graves, Wayne and Danihelka 2014, "Neural Turing machines", arXiv 1410.5401, section 4.1; the curriculum is that of Jaderberg
        et al. 2017, "Decoupled neural interfaces using synthetic gradients", arXiv 1608.05343, Table 1.
    """

    @property
    def _symbols(self) -> int:
        return self.alphabet + 2

    @property
    def classes(self) -> int:
        return self.alphabet

    @property
    def solved(self) -> dict[str, float]:
        return {"length_solved": float(self.curriculum.level)}

    def _length(self, level: int) -> int:
        return 1 + level

    def _sequences(self, shown: Int64[Tensor, "n batch"], level: int) -> tuple[Tensor, Tensor]:
        return asked_after(shown, shown, cue=self.alphabet, blank=self.alphabet + 1)
