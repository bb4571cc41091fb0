"""What was measured, and what follows from it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

from lockfree.advise.option import Option, pareto_front
from lockfree.advise.words import Verdict, table
from lockfree.rules import Backprop


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What was measured, and what follows from it. Its string is a table and a verdict.

    Attributes:
        options: Every way to train the model that was measured, the best first.
        refused: What got no score, and why.
        limit: The memory that training may take, bytes; ``None`` for any.
        metric: "accuracy", or "loss" where targets are no class numbers.
        start: The score before any training.
        steps: Steps that each option was trained for; 0 if none was.
        batch_size: Samples in a step.
        samples: Samples to train on.
        held_out: Samples that scores are taken on.
        spread: Standard deviation of backprop's score over orders of the batches.
        seconds: What all of it took.
        seed: What decided batches, dropout and auxiliary networks.
    """

    options: tuple[Option, ...]
    refused: Mapping[str, str]
    limit: int | None
    metric: str
    start: float
    steps: int
    batch_size: int
    samples: int
    held_out: int
    spread: float
    seconds: float
    seed: int

    @cached_property
    def front(self) -> tuple[Option, ...]:
        """The Pareto front of score, memory and time."""
        return pareto_front(self.options)

    @cached_property
    def baseline(self) -> Option | None:
        """Plain backprop, if it was measured."""
        return next((one for one in self.options if type(one.rule) is Backprop and not one.recompute), None)

    @cached_property
    def recommended(self) -> Option | None:
        """The best of what fits: backprop, then checkpointing, unless a rule is ahead by more than luck; ``None``: nothing fits.

        Of many rules the best looks better than it is. A rule has to be ahead by as many standard errors as the best of so many
        equal ones would be in one case out of twenty.
        """
        known = [one for one in self.options if one.fits and one.score is not None]
        exact = [one for one in known if one.exact]
        others = [one for one in known if not one.exact]
        if exact:
            errors = NormalDist().inv_cdf(0.95 ** (1 / max(len(others), 1)))
            others = [one for one in others if _score(one) - _score(exact[0]) > errors * (one.error or 0.0)]
        if others:
            return max(others, key=lambda one: (_score(one), -(one.milliseconds or 0.0)))
        return min(exact, key=lambda one: (one is not self.baseline, one.milliseconds or 0.0), default=None)

    @property
    def verdict(self) -> str:
        """What to do, in a few sentences."""
        return Verdict(self).text()

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain data, ready for JSON."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return own | {
            "recommended": self.recommended and self.recommended.name,
            "verdict": self.verdict,
            "front": [one.name for one in self.front],
            "options": [_plain(one) for one in self.options],
            "refused": dict(self.refused),
        }

    def __str__(self) -> str:
        call = [] if self.recommended is None else [self.recommended.code]
        return "\n".join([*table(self), "", self.verdict, *call])


def _score(option: Option) -> float:
    assert option.score is not None
    return option.score


def _plain(option: Option) -> dict[str, Any]:
    found = {field.name: getattr(option, field.name) for field in dataclasses.fields(option)}
    found["rule"] = found.pop("label")
    blocks = found["blocks"]
    return found | {
        "blocks": list(blocks) if isinstance(blocks, Sequence) else blocks,
        "cut": list(option.cut),
        "locks": list(option.locks),
        "memory": dataclasses.asdict(option.memory),
        "score": option.score,
        "exact": option.exact,
    }
