"""How an advice is told: a table, and what to do in a few sentences."""

import itertools
import math
from typing import TYPE_CHECKING

from lockfree.advise.option import Option
from lockfree.rule import LOCKS

if TYPE_CHECKING:
    from lockfree.advise.advice import Advice

_FASTER = 0.9  # shares of backprop's time above this are not told apart from it
_SLOWER = 1.05


def table(advice: "Advice") -> list[str]:
    """Returns the lines of the table, and how to read it.

    Args:
        advice: What was measured.
    """
    limited = advice.limit is not None
    header = ["", "option", advice.metric, "vs backprop", "at equal time", "memory", "a step", "time", "locks kept"]
    rows = [
        header + ["fits"] * limited,
        *(_row(one, advice) + ["yes" if one.fits else "no"] * limited for one in advice.options),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "", *_legend(advice), *_refusals(advice)]


def _row(one: Option, advice: "Advice") -> list[str]:
    return [
        "*" if one in advice.front else "",
        one.name,
        _score(one.score, advice.metric),
        "" if one.exact and one.score is not None else _gap(one, advice),
        _score(one.at_equal_time, advice.metric),
        human(one.memory.total),
        _milliseconds(one.milliseconds),
        "-" if one.time is None else f"{one.time:.2f} ×",
        "all" if len(one.locks) == len(LOCKS) else ", ".join(one.locks) or "none",
    ]


def _legend(advice: "Advice") -> list[str]:
    if not advice.steps:
        return ["Nothing was trained."]
    start = f"{advice.metric} before training {_score(advice.start, advice.metric)}"
    return [
        f"{advice.steps} steps of {advice.batch_size} samples each; scored on {advice.held_out:,} held-out samples; {start}.",
        "*: on the Pareto front of score, memory and time. ±: one standard error. At equal time: after as much time as all of "
        "backprop's steps take.",
    ]


def _refusals(advice: "Advice") -> list[str]:
    """Returns a line for each reason why something has no score."""
    by_reason = sorted(advice.refused.items(), key=lambda item: item[1])
    grouped = itertools.groupby(by_reason, key=lambda item: item[1])
    return [f"Without a score: {'; '.join(name for name, _ in items)}: {reason}." for reason, items in grouped]


def _score(score: float | None, metric: str) -> str:
    if score is None:
        return "-"
    return f"{100 * score:.2f} %" if metric == "accuracy" else f"{-score:.4g}"


def _milliseconds(time: float | None) -> str:
    if time is None:
        return "-"
    return f"{time:,.0f} ms" if time >= 99.95 else f"{time:.3g} ms"


def _gap(option: Option, advice: "Advice") -> str:
    """Writes how far a score is from backprop's, in points of accuracy or units of the loss."""
    base = advice.baseline
    if option.score is None or base is None or base.score is None:
        return "-"
    gap, error = _lead(option, base), option.error or 0.0
    return f"{100 * gap:+.2f} ± {100 * error:.2f}" if advice.metric == "accuracy" else f"{-gap:+.3g} ± {error:.2g}"


def _lead(option: Option, base: Option) -> float:
    assert option.score is not None
    assert base.score is not None
    return option.score - base.score


def human(count: int) -> str:
    """Writes a number of bytes for people, in decimal units, as limits are given.

    Example:
        >>> human(3_100_000_000), human(999)
        ('3.1 GB', '999 B')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:,.0f} {unit}" if count >= 999.5 * size else f"{count / size:.3g} {unit}"
    return f"{count} B"


class Verdict:
    """Puts into words what to do.

    Args:
        advice: What was measured.
    """

    def __init__(self, advice: "Advice") -> None:
        self._advice, self._base, self._chosen = advice, advice.baseline, advice.recommended
        self._trained = [one for one in advice.options if one.fits and one.score is not None]
        self._other = self._best_other()

    def text(self) -> str:
        """Returns it."""
        if self._chosen is None:
            return self._nothing_fits()
        if self._chosen is self._base:
            told = self._use_backprop(self._chosen)
        elif self._chosen.exact:
            told = self._use_checkpointing(self._chosen)
        else:
            told = self._use_another(self._chosen)
        return f"{told}{self._too_short()}"

    def _best_other(self) -> Option | None:
        """Returns the best of what is not backprop in disguise; one that takes off a lock, if there is any."""
        others = [one for one in self._trained if not one.exact and one is not self._chosen]
        return max(others, key=lambda one: (len(one.locks) < len(LOCKS), one.score or 0.0), default=None)

    def _use_backprop(self, base: Option) -> str:
        limit = self._advice.limit
        fits = "" if limit is None else f"it fits in {human(limit)}, and "
        faster = [one for one in self._trained if one.time is not None and one.time < _FASTER]
        best = max(faster, key=lambda one: one.score or 0.0, default=None)
        leads = any(not one.exact and _lead(one, base) > 0 for one in self._trained)
        more = "measurably more accurate" if leads else "more accurate"
        told = f"Use backprop: {fits}nothing here is {more}{'' if best else ' or faster'}."
        if best is not None:
            told += f" The best of what is faster is {self._described(best)}."
        if self._other is not None and self._other is not best:
            of = "that takes off a lock" if len(self._other.locks) < len(LOCKS) else "of the others"
            told += f" The best rule {of} is {self._described(self._other)}."
        return told + self._leaner(base)

    def _leaner(self, base: Option) -> str:
        """Says how to get backprop's numbers with less memory, where there is no limit that would ask for it."""
        exact = [one for one in self._trained if one.exact]
        lean = min(exact, key=lambda one: one.memory.total)
        if self._advice.limit is not None or lean.memory.total > 0.9 * base.memory.total:
            return ""
        return f" Should memory run short: {lean.name} gives the same numbers with {self._cost(lean)}."

    def _use_checkpointing(self, chosen: Option) -> str:
        told = f"{self._backprop_is_out()}; {chosen.name} does, with {human(chosen.memory.total)} and the same numbers"
        if chosen.time is not None and chosen.time > _SLOWER:
            told += f" at {chosen.time:.2f} × the time: use it unless time matters."
        else:
            told += ": use it."
        if self._other is None:
            return told
        return f"{told} The best other rule that fits is {self._described(self._other)}."

    def _use_another(self, chosen: Option) -> str:
        told = f"Use {self._described(chosen)}."
        if self._base is None or not self._base.fits:
            told = f"{self._backprop_is_out()}. {told}"
        if any(one.exact for one in self._trained):
            return f"{told} That is more than luck, but one short run: train both to the end before you rely on it."
        if self._base is None or self._base.fits:
            return told
        return f"{told} Checkpointing does not fit either.{self._smaller_batch(self._base)}"

    def _nothing_fits(self) -> str:
        advice = self._advice
        if advice.limit is None or not advice.options or any(one.fits for one in advice.options):
            return "Nothing could be trained here: see the reasons above."
        least = min(advice.options, key=lambda one: one.memory.total)
        told = f"Nothing here fits in {human(advice.limit)}: the least is {least.name} with {human(least.memory.total)}, "
        told += f"{human(least.memory.fixed)} of them weights, gradients and the optimizer's states."
        smaller = self._smaller_batch(least)
        return told + (
            smaller or " A smaller batch alone will not do: take an optimizer with fewer states, or a smaller model."
        )

    # ---- parts of sentences --------------------------------------------------------------------------------------------------

    def _backprop_is_out(self) -> str:
        if self._base is None:
            return f"Backprop cannot be used here ({self._advice.refused.get('backprop', 'it was not measured')})"
        assert self._advice.limit is not None
        return f"Backprop needs {human(self._base.memory.total)} and does not fit in {human(self._advice.limit)}"

    def _described(self, option: Option) -> str:
        """Names an option with what it reaches and what it costs."""
        metric, gap = self._advice.metric, _gap(option, self._advice)
        unit = " points" if metric == "accuracy" else ""
        against = "" if gap == "-" or option.exact else f" ({gap}{unit} against backprop)"
        return f"{option.name}: {metric} {_score(option.score, metric)}{against}, with {self._cost(option)}"

    def _cost(self, option: Option) -> str:
        """Says what an option costs next to backprop."""
        if self._base is None or option.time is None:
            return human(option.memory.total)
        return f"{100 * option.memory.total / self._base.memory.total:.0f} % of the memory and {option.time:.2f} × the time"

    def _smaller_batch(self, option: Option) -> str:
        """Says from which size of the batch on an option would fit, if there is one."""
        memory, limit = option.memory, self._advice.limit
        assert limit is not None
        grows = max(memory.total - memory.fixed, 1)
        samples = math.floor((limit - memory.fixed) / grows * self._advice.batch_size)
        return f" With batches of {samples} samples or fewer, {option.name} should fit." if samples >= 2 else ""

    def _too_short(self) -> str:
        advice = self._advice
        best = max(self._trained, key=lambda one: one.score or -math.inf)
        if (best.score or 0.0) - advice.start > 2 * math.hypot(advice.spread, best.error or 0.0):
            return ""
        return (
            f" But {advice.steps} steps have hardly taught the model anything: give more, or other learning rates, before you trust "
            "these scores."
        )
