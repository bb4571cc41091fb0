"""The training pass: each way to train the model for as many steps, scored on held-out samples."""

import bisect
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from lockfree.advise.option import Option
from lockfree.advise.survey import Progress, reason_of
from lockfree.advise.task import Candidate, Scores, Task, evaluate, falls_at
from lockfree.rules import Backprop

_LEAST_STEPS, _ENOUGH_STEPS, _MOST_STEPS = 10, 50, 1000
_LEAST_PARTS = 10  # of the held-out samples, so that there is a standard error
_TOO_SLOW = 10.0  # times backprop's step; such a rule is trained only if it was asked for
_ORDERS = 3  # of the batches, where there is time


class Group(NamedTuple):
    """Options that get the same numbers, so that one training run serves them all.

    Attributes:
        run: The candidate that is trained: the fastest that fits, else the leanest.
        seconds: What a step of it takes.
        options: All of them.
    """

    run: Candidate
    seconds: float
    options: list[Option]

    @property
    def exact(self) -> bool:
        """Whether they get backprop's numbers."""
        return self.options[0].exact

    def marks(self, steps: int) -> dict[str, int]:
        """Returns for each option how many steps it makes in the time that backprop takes for ``steps``; twice as many at most."""
        times = {option.name: option.time for option in self.options}
        return {name: max(1, min(2 * steps, round(steps / time))) for name, time in times.items() if time}

    def work(self, steps: int) -> int:
        """Returns how many steps it takes to train for ``steps``, and for as long as backprop does."""
        *others, last = sorted({steps, *self.marks(steps).values()})
        return last + sum(mark - falls_at(mark) for mark in others)


def groups(found: Sequence[tuple[Candidate, Option]]) -> list[Group]:
    """Puts together what gets the same numbers; what does not fit is not trained, but for backprop, which others are held against.

    Args:
        found: What the dry pass has measured.
    """
    alike: dict[str, list[tuple[Candidate, Option]]] = {}
    for candidate, option in found:
        alike.setdefault(candidate.numbers, []).append((candidate, option))
    made, any_fits = [], any(option.fits for _, option in found)
    for members in alike.values():
        fitting = [pair for pair in members if pair[1].fits]
        if fitting:
            run, option = min(fitting, key=lambda pair: pair[1].milliseconds or 0.0)
        elif any_fits and members[0][1].exact:
            run, option = min(members, key=lambda pair: pair[1].memory.total)
        else:
            continue
        made.append(Group(run, (option.milliseconds or 0.0) / 1e3, [option for _, option in members]))
    return made


class Plan(NamedTuple):
    """What is trained, and for how long.

    Attributes:
        task: With as many held-out samples as there is time for.
        groups: What is trained.
        steps: For how many steps.
        dropped: What is not trained, and why.
        orders: How many orders of the batches backprop is trained on, to see what an order alone changes.
    """

    task: Task
    groups: list[Group]
    steps: int
    dropped: dict[str, str]
    orders: int = _ORDERS


def plan(task: Task, candidates: list[Group], *, given: float, spent: float, asked: bool) -> Plan:
    """Chooses the steps that there is time for; where they would be too few, the slowest are left out.

    Args:
        task: What is to be learnt.
        candidates: What may be trained.
        given: Seconds for everything.
        spent: Seconds of them that the dry pass took.
        asked: Whether the user named the rules, so that none is too slow.
    """
    base = next((group.seconds for group in candidates if group.exact), 0.0)
    a_part = _seconds_of_a_part(task)
    task = dataclasses.replace(task, parts=task.parts[: _parts_within(0.15 * given, a_part, task, candidates)])
    left, dropped = list(candidates), {}

    def cost(steps: int) -> float:
        training = sum(group.seconds * group.work(steps) for group in left) + (_ORDERS - 1) * base * steps
        return training + _evaluations(left) * len(task.parts) * a_part

    for group in candidates:
        if not (group.exact or asked) and base and group.seconds > _TOO_SLOW * base:
            left.remove(group)
            why = f"a step takes {group.seconds / base:.0f} × the time of backprop's: name it in rules to have it trained"
            dropped |= {option.name: why for option in group.options}
    wanted = spent + cost(_ENOUGH_STEPS)
    for group in sorted(left, key=lambda group: -group.seconds):
        if not group.exact and len(left) > 2 and spent + cost(_ENOUGH_STEPS) > given:
            left.remove(group)
            why = f"left out to keep to {given:g} seconds; all of them want about {math.ceil(wanted / 10) * 10}"
            dropped |= {option.name: why for option in group.options}
    orders = _ORDERS if spent + cost(_ENOUGH_STEPS) <= given else 1
    steps = bisect.bisect_right(range(_MOST_STEPS), 0.9 * given - spent, lo=_LEAST_STEPS, key=cost)
    return Plan(task, left, steps, dropped, orders)


def _evaluations(candidates: Sequence[Group]) -> int:
    return 2 * len(candidates) + _ORDERS


def _seconds_of_a_part(task: Task) -> float:
    learner = task.learner(Candidate(Backprop(), ()))
    evaluate(learner, task.parts[:1])
    started = time.perf_counter()
    evaluate(learner, task.parts[:3])
    return (time.perf_counter() - started) / len(task.parts[:3])


def _parts_within(seconds: float, a_part: float, task: Task, candidates: Sequence[Group]) -> int:
    return min(len(task.parts), max(_LEAST_PARTS, int(seconds / (_evaluations(candidates) * max(a_part, 1e-9)))))


class Trained(NamedTuple):
    """What training has brought to light.

    Attributes:
        scores: By option: after all steps, and after as much time as backprop takes for them.
        exact: Backprop's, after all steps, for each order of the batches.
        refused: What broke, and how.
    """

    scores: dict[str, tuple[Scores, Scores | None]]
    exact: list[Scores]
    refused: dict[str, str]

    @property
    def spread(self) -> float:
        """Standard deviation of backprop's score over orders of the batches."""
        return statistics.stdev(scores.mean for scores in self.exact) if len(self.exact) > 1 else 0.0

    def score(self, option: Option) -> Option:
        """Fills in an option's scores."""
        if option.name not in self.scores:
            return option
        last, early = self.scores[option.name]
        error = last.error()
        if self.exact:  # both scores of a difference vary with the order of the batches
            error = 0.0 if option.exact else math.hypot(last.error(self.exact[0]), math.sqrt(2) * self.spread)
        return dataclasses.replace(
            option, accuracy=last.accuracy, loss=last.loss, error=error, at_equal_time=None if early is None else early.mean
        )


def train(todo: Plan, progress: Progress) -> Trained:
    """Trains every group, and what gives backprop's numbers on several orders of the batches.

    Args:
        todo: What to train.
        progress: Is told of each training run.
    """
    trained = Trained({}, [], {})
    total = len(todo.groups) + (todo.orders - 1) * any(group.exact for group in todo.groups)
    told = itertools.count(1)
    for group in todo.groups:
        marks = group.marks(todo.steps)
        progress("training", next(told), total, group.run.name)
        try:
            found = todo.task.train(group.run, {todo.steps, *marks.values()})
            exact = [found[todo.steps]] if group.exact else []
            for order in range(1, todo.orders) if group.exact else ():
                progress("training", next(told), total, f"{group.run.name}, another order of the batches")
                exact.append(todo.task.train(group.run, [todo.steps], order)[todo.steps])
        except Exception as error:  # whatever a rule raises
            trained.refused.update({option.name: reason_of(error) for option in group.options})
            continue
        trained.exact.extend(exact)
        for option in group.options:
            trained.scores[option.name] = found[todo.steps], found.get(marks.get(option.name, 0))
    return trained
