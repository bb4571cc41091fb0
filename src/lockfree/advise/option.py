"""One way to train a model, measured; and which of several nobody else beats."""

from collections.abc import Sequence
from dataclasses import dataclass

from lockfree import rules
from lockfree.advise.memory import Memory
from lockfree.advise.task import Blocks, is_exact
from lockfree.rule import Rule


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to train the model, measured.

    Attributes:
        name: The rule, with the cut and whether blocks run again.
        label: The rule's command-line name; of a rule of one's own, its class and what differs from the defaults.
        rule: The rule itself.
        blocks: Where the model is cut, as `lockfree.convert` takes it.
        recompute: Whether blocks run again instead of keeping their activations.
        cut: The module that each block begins with.
        locks: The locks that training keeps.
        memory: What training takes.
        fits: Whether that is within the limit; true without one.
        milliseconds: Median time of a step; ``None`` if it was not timed.
        time: The same over backprop's.
        accuracy: Share of held-out targets that are the highest score; ``None`` if not trained, or if targets are no class numbers.
        loss: Mean loss of the held-out samples; ``None`` if not trained.
        error: Standard error of the score less backprop's: that of the held-out samples and of the order of the batches.
        at_equal_time: The score after as much time as all steps of backprop take.
    """

    name: str
    label: str
    rule: Rule
    blocks: Blocks
    recompute: bool
    cut: tuple[str, ...]
    locks: tuple[str, ...]
    memory: Memory
    fits: bool = True
    milliseconds: float | None = None
    time: float | None = None
    accuracy: float | None = None
    loss: float | None = None
    error: float | None = None
    at_equal_time: float | None = None

    @property
    def score(self) -> float | None:
        """The higher the better: the accuracy, or else the loss with its sign turned."""
        if self.accuracy is not None:
            return self.accuracy
        return None if self.loss is None else -self.loss

    @property
    def exact(self) -> bool:
        """Whether its numbers are backprop's, bit for bit."""
        return is_exact(self.rule)

    @property
    def code(self) -> str:
        """The call that makes a learner of it."""
        ours = type(self.rule).__module__.startswith(f"{rules.__name__}.")
        rule = repr(self.label) if self.label in rules.RULES else f"{rules.__name__}." * ours + self.label
        cut = list(self.blocks) if isinstance(self.blocks, Sequence) else self.blocks
        more = "" if cut is None else f", blocks={cut!r}"
        more += ", recompute=True" if self.recompute else ""
        return f"lockfree.convert(model, {rule}, loss=loss, optimizer=optimizer{more}, example_input=x[:2])"


def pareto_front(options: Sequence[Option]) -> tuple[Option, ...]:
    """Returns the options that no other beats: one that is as good in score, memory and time, and better in one of them.

    Args:
        options: Those without a score or a time are left out.

    Returns:
        The front, in the order given.
    """
    points = [(one, _goods(one)) for one in options if one.score is not None and one.milliseconds is not None]
    return tuple(one for one, mine in points if not any(_beats(theirs, mine) for _, theirs in points))


def _goods(option: Option) -> tuple[float, int, float]:
    assert option.score is not None
    assert option.milliseconds is not None
    return option.score, -option.memory.total, -option.milliseconds


def _beats(theirs: tuple[float, int, float], mine: tuple[float, int, float]) -> bool:
    return theirs != mine and all(a >= b for a, b in zip(theirs, mine, strict=True))
