"""The dry pass: which ways to train the model there are, what each takes in memory and how long a step is."""

import contextlib
import dataclasses
import io
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from lockfree.advise import memory
from lockfree.advise.option import Option
from lockfree.advise.task import Blocks, Candidate, Task, is_exact, label
from lockfree.balance import balanced_names
from lockfree.chain import Chain
from lockfree.cut import CannotCutError
from lockfree.learner import Learner
from lockfree.objective import Diverged
from lockfree.rng import undisturbed
from lockfree.rule import LOCKS, Needs, Place, Rule
from lockfree.rules import Backprop, Checkpointing

Progress = Callable[[str, int, int, str], None]
"""Is told what begins: "measuring" or "training", its number from 1, of how many, and the option's name."""

_DEEP = 4  # blocks; a model of more is measured in so many as well
_FINER = (2, 4, 8, 16)
_SECONDS_EACH = 0.3  # to time a candidate, where no time is given
_ONE_BLOCK = "the model is one block here, without a border between blocks: pass blocks"


class Cuts(NamedTuple):
    """Where the model may be cut.

    Attributes:
        own: The cut that was asked for, or the model's children.
        count: How many blocks that gives.
        pieces: Other numbers of blocks that may be tried.
        reason: Why the model cannot be cut, if it cannot.
    """

    own: Blocks
    count: int
    pieces: tuple[int, ...]
    reason: str = ""

    @classmethod
    def of(cls, task: Task, blocks: Blocks | str) -> "Cuts":
        """Tries out where the model can be cut.

        Raises:
            CannotCutError: If it cannot be cut where it was asked to be.
        """
        automatic = blocks == "auto"
        wanted: Any = None if automatic else blocks
        try:
            with undisturbed(task.model):
                chain = Chain(task.model, wanted, example_input=task.example)
                chain.rehearse(task.example)
        except CannotCutError as error:
            if wanted is not None:
                raise
            return cls((), 1, (), str(error))
        root = round(math.sqrt(_layers(task.model)))
        tried = sorted({*_FINER, max(root, 2)} - {len(chain)}) if automatic else []
        return cls(wanted, len(chain), tuple(itertools.takewhile(lambda count: _can_cut(task, count), tried)))


def _can_cut(task: Task, count: int) -> bool:
    try:
        balanced_names(task.model, count, task.example)
    except CannotCutError:
        return False
    return True


def _layers(model: nn.Module) -> int:
    """Counts the modules that hold matrices."""
    return sum(any(p.dim() > 1 for p in module.parameters(recurse=False)) for module in model.modules())


def _coarse(cuts: Cuts) -> int | None:
    """Returns the number of blocks of a coarse cut, if there may be one."""
    return max((count for count in cuts.pieces if count <= _DEEP), default=None)


def _is_local(rule: Rule) -> bool:
    """Whether blocks learn without a message from above, so that the cut makes a difference."""
    return rule.needs(Place(0, 3)) < Needs.ABOVE


class Survey:
    """Measures candidates, and keeps what was found.

    Args:
        task: What is to be learnt.
        limit: The memory that training may take, bytes; ``None`` for any.
        seconds: What the dry pass may take in all; ``None`` for as long as it takes.
        expected: About how many candidates there will be.
        progress: Is told of each candidate.

    Attributes:
        refused: What was not measured, and why.
    """

    def __init__(self, task: Task, *, limit: int | None, seconds: float | None, expected: int, progress: Progress) -> None:
        self._task, self._limit, self._progress, self._expected = task, limit, progress, expected
        self._each = _SECONDS_EACH if seconds is None else 0.5 * seconds / expected
        self._ends = math.inf if seconds is None else time.perf_counter() + seconds
        self._reference: Callable[[], object] | None = None
        self._reference_seconds: list[float] = []
        self._told = 0
        self._found: list[tuple[Candidate, Option]] = []
        self.refused: dict[str, str] = {}

    def baselines(self, cuts: Cuts) -> None:
        """Measures backprop, and what gives its numbers with less memory; other cuts, too, where none of these fits."""
        plain, again = Candidate(Backprop(), cuts.own), Candidate(Checkpointing(), cuts.own)
        self._measure(plain)
        self._measure(dataclasses.replace(plain, recompute=True))
        root = max(2, round(math.sqrt(_layers(self._task.model))))
        tried = [cuts.own] * (cuts.count > 1) + [root] * (root in cuts.pieces)
        found = [self._measure(dataclasses.replace(again, blocks=blocks)) for blocks in tried]
        if not tried:
            self.refused[again.name] = cuts.reason or _ONE_BLOCK
        if not any(option.fits for _, option in self._found) and self._may_shrink(found):
            others = [count for count in cuts.pieces if count not in tried]
            self._first_that_fits(dataclasses.replace(again, blocks=count) for count in others)

    def rule(self, rule: Rule, cuts: Cuts) -> None:
        """Measures a rule on the model's own cut, or on a coarse one if that is no cut; where it does not fit, on finer ones."""
        candidate, local, coarse = Candidate(rule, cuts.own), _is_local(rule), _coarse(cuts)
        cut = cuts.count > 1 or not local
        if cuts.reason or not (cut or coarse):
            self.refused[candidate.name] = cuts.reason or _ONE_BLOCK
            return
        candidate = candidate if cut else dataclasses.replace(candidate, blocks=coarse)
        found = self._measure(candidate)
        if found is None or found.fits or not self._may_shrink([found]):
            return
        finer = [count for count in cuts.pieces if local and count > len(found.cut)]
        ways = itertools.product([candidate.blocks, *finer], (False, True))
        self._first_that_fits(
            dataclasses.replace(candidate, blocks=blocks, recompute=again)
            for blocks, again in ways
            if again or blocks != candidate.blocks
        )

    def coarser(self, rule: Rule, cuts: Cuts) -> None:
        """Measures a rule that fits on a coarse cut as well, where the model is deep: fewer borders, better credit."""
        coarse = _coarse(cuts)
        fits = any(candidate.rule == rule and option.fits for candidate, option in self._found)
        if fits and coarse and cuts.count > _DEEP and _is_local(rule):
            self._measure(Candidate(rule, coarse))

    def _may_shrink(self, found: Iterable[Option | None]) -> bool:
        """Whether another cut could bring one of these within the limit: it changes what is kept for the backward pass alone."""
        held = [option.memory.fixed + option.memory.batch for option in found if option is not None]
        return self._limit is not None and any(size < self._limit for size in held)

    # ---- one candidate -------------------------------------------------------------------------------------------------------

    def _measure(self, candidate: Candidate) -> Option | None:
        """Measures a candidate and keeps it; returns ``None`` if it cannot serve, or the time is up."""
        if time.perf_counter() > self._ends:
            self.refused[candidate.name] = "the time given was spent before its turn: give more, or name fewer rules"
            return None
        return self._keep(candidate, self._try(candidate))

    def _first_that_fits(self, candidates: Iterable[Candidate]) -> None:
        """Keeps the first candidate that fits, in place of those of its rule that do not; of the others nothing is said."""
        for candidate in candidates:
            if time.perf_counter() > self._ends:
                return
            found = self._try(candidate)
            self.refused.pop(candidate.name, None)
            if found is not None and found[1].fits:
                if not is_exact(candidate.rule):
                    self._found = [pair for pair in self._found if pair[0].rule != candidate.rule]
                self._keep(candidate, found)
                return

    def _try(self, candidate: Candidate) -> tuple[Learner, Option] | None:
        self._told += 1
        self._progress("measuring", self._told, max(self._expected, self._told), candidate.name)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a graph that fails prints its own traceback
                learner, taken = memory.measure(self._task, candidate)
        except Exception as error:  # whatever a rule, or a layer under it, raises
            plain = type(candidate.rule) is Backprop and not candidate.recompute
            if plain and not isinstance(error, Diverged | torch.OutOfMemoryError):
                raise  # then it is not the rule that cannot serve
            self.refused[candidate.name] = reason_of(error)
            return None
        return learner, Option(
            name=candidate.name,
            label=label(candidate.rule),
            rule=candidate.rule,
            blocks=candidate.blocks,
            recompute=candidate.recompute,
            cut=tuple(block.name for block in learner.chain.blocks),
            locks=tuple(sorted(learner.locks, key=LOCKS.index)),
            memory=taken,
            fits=self._limit is None or taken.total <= self._limit,
        )

    def _keep(self, candidate: Candidate, found: tuple[Learner, Option] | None) -> Option | None:
        if found is None:
            return None
        learner, option = found
        try:
            timed = self._time(learner) if option.fits or option.exact else None
        except Exception as error:
            self.refused[candidate.name] = reason_of(error)
            return None
        option = dataclasses.replace(option, time=timed)
        self._found.append((candidate, option))
        return option

    # ---- times ---------------------------------------------------------------------------------------------------------------

    def _time(self, learner: Learner) -> float:
        """Returns the time of a step over the first learner's, which is the reference: the median of steps taken in turn."""
        batches = itertools.cycle([self._task.batch(0), self._task.batch(1)])

        def step() -> float:
            return learner.step(*next(batches)).loss

        if not self._reference_seconds:
            self._reference_seconds, self._reference = self._rounds({"reference": step})["reference"], step
            return 1.0
        if self._reference is not None:
            try:
                seconds = self._rounds({"reference": self._reference, "candidate": step})
            except torch.OutOfMemoryError:  # there is room for one learner at a time
                self._reference = None
            else:
                self._reference_seconds += seconds["reference"]
                return statistics.median(a / b for a, b in zip(seconds["candidate"], seconds["reference"], strict=True))
        return statistics.median(self._rounds({"candidate": step})["candidate"]) / statistics.median(self._reference_seconds)

    def _rounds(self, things: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        # Here and not above: the benchmarks import much that `import lockfree` does not.
        from lockfree.bench.timing import interleaved

        first = interleaved(things, rounds=1, warm_up=0)
        rounds = max(1, min(20, int(self._each / sum(map(sum, first.values())))))
        more = interleaved(things, rounds=rounds, warm_up=0)
        return {name: first[name] + more[name] for name in things}

    def end(self) -> list[tuple[Candidate, Option]]:
        """Lets the reference go.

        Returns:
            What was measured, with times in milliseconds; without ways to backprop's numbers that another one beats in memory
            and time, but for plain backprop and the first way of checkpointing.
        """
        self._reference = None
        if not self._found:
            return []
        first, step = self._found[0][0], 1e3 * statistics.median(self._reference_seconds or [math.nan])
        plain = type(first.rule) is Backprop and not first.recompute
        timed = [
            (candidate, dataclasses.replace(option, milliseconds=option.time * step, time=option.time if plain else None))
            if option.time is not None
            else (candidate, option)
            for candidate, option in self._found
        ]
        return _without_beaten(timed)


def _without_beaten(found: list[tuple[Candidate, Option]]) -> list[tuple[Candidate, Option]]:
    exact = [option for _, option in found if option.exact and option.milliseconds is not None]
    checkpointing = next((option.name for option in exact if type(option.rule) is Checkpointing), "")

    def beaten(option: Option) -> bool:
        return any(
            other.memory.total <= option.memory.total and (other.milliseconds or 0.0) < (option.milliseconds or 0.0)
            for other in exact
        )

    def stays(option: Option) -> bool:
        plain = type(option.rule) is Backprop and not option.recompute
        return not option.exact or plain or option.name == checkpointing or not beaten(option)

    return [pair for pair in found if stays(pair[1])]


def reason_of(error: Exception) -> str:
    """Says in one line what went wrong."""
    if isinstance(error, torch.OutOfMemoryError):
        return "it ran out of the device's memory"
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
