"""What tasks with a curriculum share."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

from lockfree.recurrent.stretch import Stretch
from lockfree.recurrent.tasks.base import IGNORED, Predicts, Task, asked_accuracy, asked_bits, at_least, private
from lockfree.recurrent.tasks.curriculum import Curriculum

_HELD_OUT = -1  # stands for the number of the stretch that is judged on; training counts from 0


@dataclass(frozen=True, kw_only=True)
class LevelTask(Task):
    """Symbols are shown, then asked for; all sequences of a stretch are whole ones of the curriculum's present level.

    Attributes:
        alphabet: Symbols to be remembered, 2 or more.
        threshold: The error in bits per symbol asked below which the next level comes.
        window: Batches whose mean error must be below it.
        curriculum: The progress.

    Raises:
        ValueError: A setting is out of its range.
    """

    alphabet: int = 2
    threshold: float = 0.15
    window: int = 10
    curriculum: Curriculum = field(init=False, repr=False, compare=False)
    measure: ClassVar[str] = "length solved"
    larger_is_better: ClassVar[bool] = True

    def _prepare(self) -> None:
        at_least(2, alphabet=self.alphabet)
        object.__setattr__(self, "curriculum", Curriculum(threshold=self.threshold, window=self.window))
        self._check()

    @property
    def features(self) -> int:
        return self._symbols

    @property
    def symbols(self) -> int:
        return self._symbols

    @property
    @abstractmethod
    def _symbols(self) -> int:
        """How many symbols are shown in all."""

    def _check(self) -> None:
        """Checks the settings of the task's own."""

    @property
    @abstractmethod
    def solved(self) -> dict[str, float]:
        """What the levels solved so far come to."""

    @abstractmethod
    def _sequences(self, shown: Int64[Tensor, "n batch"], level: int) -> tuple[Tensor, Tensor]:
        """Makes inputs and targets, both of shape (steps, batch), of symbols that are to be remembered."""

    @abstractmethod
    def _length(self, level: int) -> int:
        """Says how many symbols are to be remembered."""

    def stretch(self, number: int) -> Stretch:
        at_least(0, number=number)
        return self._at(number)

    def learnt(self, bits: float) -> None:
        self.curriculum.told(bits)

    def evaluate(self, learner: Predicts) -> dict[str, float]:
        inputs, targets, done = self._at(_HELD_OUT)
        outputs, _ = learner.predict(inputs, done=done)
        targets = targets.to(outputs.device)
        return {**self.solved, "bits": asked_bits(outputs, targets), "accuracy": asked_accuracy(outputs, targets)}

    def state_dict(self) -> dict[str, Any]:
        return self.curriculum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.curriculum.load_state_dict(state)

    def _at(self, number: int) -> Stretch:
        level = self.curriculum.level
        generator = private(self.seed, number, level)
        shown = torch.randint(self.alphabet, (self._length(level), self.batch), generator=generator)
        inputs, targets = self._sequences(shown, level)
        done = torch.zeros_like(inputs, dtype=torch.bool)
        done[-1] = True
        return Stretch(inputs, targets, done)


def asked_after(
    shown: Int64[Tensor, "n batch"], answers: Int64[Tensor, "m batch"], cue: int, blank: int
) -> tuple[Tensor, Tensor]:
    """Lays out sequences: what is shown, a cue, and a blank for each answer.

    Args:
        shown: The symbols to be remembered.
        answers: What is asked for, step by step, after the cue.
        cue: The symbol that ends what is shown.
        blank: The symbol that is shown meanwhile.

    Returns:
        Inputs and targets, both of shape (n + 1 + m, batch).

    Example:
        >>> inputs, targets = asked_after(torch.tensor([[0], [1]]), torch.tensor([[0], [1]]), cue=2, blank=3)
        >>> inputs.T.tolist(), targets.T.tolist()
        ([[0, 1, 2, 3, 3]], [[-100, -100, -100, 0, 1]])
    """
    quiet = shown.new_full((len(shown) + 1, shown.shape[1]), IGNORED)
    inputs = torch.cat([shown, torch.full_like(shown[:1], cue), torch.full_like(answers, blank)])
    return inputs, torch.cat([quiet, answers])
