"""What follows from several entries of a recipe's table, with an interval over seeds."""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockfree.recipes.trial import Point, Trial

Interval = tuple[float, float]
"""Lower and upper end."""

Found = Sequence[tuple[Trial, Mapping[str, Any]]]
"""Trials that are done, and what came out."""


@dataclass(frozen=True, kw_only=True)
class Finding(ABC):
    """A figure for each of several methods.

    Attributes:
        panel: Part of the recipe's table that it is about.
        series: The methods.
        digits: Decimals that are worth showing.
    """

    panel: str
    series: Sequence[str]
    digits: int = 0

    @property
    @abstractmethod
    def what(self) -> str:
        """What the figure is, in words, with its unit."""

    @abstractmethod
    def figure(self, found: Found, series: str) -> dict[str, Any] | None:
        """Returns a method's figure: ``mean``, ``low`` and ``high`` of a 95 % interval (``None``: there is none), and more.

        Args:
            found: The trials of the panel.
            series: The method.

        Returns:
            ``None`` if nothing can be said.
        """

    def find(self, found: Found) -> dict[str, Any]:
        """Returns all figures as JSON values."""
        here = [(trial, result) for trial, result in found if any(point.panel == self.panel for point in trial.points)]
        figures = {one: self.figure(here, one) for one in self.series}
        return {"panel": self.panel, "what": self.what, "digits": self.digits, "figures": figures}

    def values(self, found: Found, series: str, x: float | int) -> dict[int, float]:
        """Returns what a method shows at a point of the panel, by seed."""
        point = Point(self.panel, x)
        read = {
            trial.seed: trial.reading(result, point)
            for trial, result in found
            if trial.series == series and point in trial.points
        }
        return {seed: value for seed, value in read.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Recovery(Finding):
    r"""How much of what a baseline loses to a reference a method wins back: $(e_b - e) / (e_b - e_r)$ of mean errors.

    The interval is Fieller's: seeds are paired, and both differences are taken to be normal. Where the loss itself is not
    above 0 at 95 %, there is no share.

    Attributes:
        x: Point on the horizontal axis.
        reference: The method with error e_r.
        reference_x: Its place.
        baseline: The method with error e_b.
    """

    x: float | int
    reference: str
    reference_x: float | int
    baseline: str

    @property
    def what(self) -> str:
        """What the figure is."""
        return f"{self.x:g}: recovered of what {self.baseline} loses to {self.reference}, %"

    def figure(self, found: Found, series: str) -> dict[str, Any] | None:
        """Returns a method's share in per cent."""
        points = {self.reference: self.reference_x}
        by_series = [self.values(found, one, points.get(one, self.x)) for one in (self.reference, self.baseline, series)]
        seeds = sorted(set.intersection(*(set(errors) for errors in by_series)))
        if not seeds:
            return None
        reference, baseline, own = ([errors[seed] for seed in seeds] for errors in by_series)
        won = [b - e for b, e in zip(baseline, own, strict=True)]
        lost = [b - r for b, r in zip(baseline, reference, strict=True)]
        loss, share, low, high = statistics.fmean(lost), None, None, None
        ends = ratio_interval(won, lost)
        if loss > 0 and (ends is not None or len(seeds) == 1):
            share = 100 * statistics.fmean(won) / loss
            low, high = (None, None) if ends is None else (100 * ends[0], 100 * ends[1])
        return {"mean": share, "low": low, "high": high, "loss": loss, "seeds": seeds}


@dataclass(frozen=True, kw_only=True)
class TimeTo(Finding):
    """Simulated seconds until the test error is first at or below a level; no figure where a seed does not get there.

    Attributes:
        error: The level in per cent.
    """

    error: float

    @property
    def what(self) -> str:
        """What the figure is."""
        return f"simulated seconds to {self.error:g} % error"

    def figure(self, found: Found, series: str) -> dict[str, Any] | None:
        """Returns a method's time."""
        curves = [(trial.seed, result["curve"]) for trial, result in found if trial.series == series]
        times = [next((when for when, error in curve if error <= self.error), None) for _, curve in curves]
        reached = [when for when in times if when is not None]
        if not reached or len(reached) < len(times):
            return {"mean": None, "low": None, "high": None, "values": times, "seeds": [seed for seed, _ in curves]}
        low, high = mean_interval(reached) or (None, None)
        return {
            "mean": statistics.fmean(reached),
            "low": low,
            "high": high,
            "values": times,
            "seeds": [seed for seed, _ in curves],
        }


@dataclass(frozen=True, kw_only=True)
class Ratio(Finding):
    r"""How many times a reference's mean figure a method's is: $\bar v / \bar v_r$, seeds paired, with Fieller's interval.

    Attributes:
        x: Place on the horizontal axis, of both.
        reference: The method that is divided by.
        shown: What is compared, in words.
    """

    x: float | int
    reference: str
    shown: str

    @property
    def what(self) -> str:
        """What the figure is."""
        return f"{self.x:g}: {self.shown}, times that of {self.reference}"

    def figure(self, found: Found, series: str) -> dict[str, Any] | None:
        """Returns a method's ratio."""
        own, other = self.values(found, series, self.x), self.values(found, self.reference, self.x)
        seeds = sorted(own.keys() & other.keys())
        above, below = [own[seed] for seed in seeds], [other[seed] for seed in seeds]
        if not seeds or not statistics.fmean(below):
            return None
        low, high = ratio_interval(above, below) or (None, None)
        return {"mean": statistics.fmean(above) / statistics.fmean(below), "low": low, "high": high, "seeds": seeds}


@dataclass(frozen=True, kw_only=True)
class Difference(Finding):
    r"""How much more a method shows than a reference, which may stand elsewhere: $\bar v - \bar v_r$, seeds paired, by Student's t.

    Attributes:
        x: Place on the horizontal axis.
        reference: The method that is subtracted.
        reference_x: Its place.
        shown: What is compared, in words.
    """

    x: float | int
    reference: str
    reference_x: float | int
    shown: str
    digits: int = 3

    @property
    def what(self) -> str:
        """What the figure is."""
        return f"{self.x:g}: {self.shown}, less that of {self.reference} at {self.reference_x:g}"

    def figure(self, found: Found, series: str) -> dict[str, Any] | None:
        """Returns a method's difference."""
        own, other = self.values(found, series, self.x), self.values(found, self.reference, self.reference_x)
        return _paired_difference(own, other)


@dataclass(frozen=True, kw_only=True)
class Rise(Finding):
    r"""How much more a method shows at one place than at another: $\bar v_b - \bar v_a$, by Student's t.

    Attributes:
        x: The first place, a.
        to: The second, b.
        shown: What is compared, in words.
    """

    x: float | int
    to: float | int
    shown: str
    digits: int = 2

    @property
    def what(self) -> str:
        """What the figure is."""
        return f"{self.shown}, rise from {self.x:g} to {self.to:g}"

    def figure(self, found: Found, series: str) -> dict[str, Any] | None:
        """Returns a method's rise."""
        low, high = self.values(found, series, self.x), self.values(found, series, self.to)
        return _paired_difference(high, low)


@dataclass(frozen=True, kw_only=True)
class Farthest(Finding):
    r"""How far a method is from a reference where it is farthest: $\max_x |v_x - v_{r,x}|$, seeds paired, their mean by Student's t.

    Attributes:
        xs: Places on the horizontal axis.
        reference: The method that it is compared with.
        shown: What is compared, in words.
    """

    xs: Sequence[float | int]
    reference: str
    shown: str
    digits: int = 4

    @property
    def what(self) -> str:
        """What the figure is."""
        return f"{self.shown}: farthest from {self.reference}"

    def figure(self, found: Found, series: str) -> dict[str, Any] | None:
        """Returns a method's largest difference."""
        pairs = [(self.values(found, series, x), self.values(found, self.reference, x)) for x in self.xs]
        seeds = sorted(set.intersection(*(own.keys() & other.keys() for own, other in pairs)))
        return _mean({seed: max(abs(own[seed] - other[seed]) for own, other in pairs) for seed in seeds})


@dataclass(frozen=True, kw_only=True)
class ChangeAbove(Finding):
    r"""Where on the way up layers change: the part of $\sum_l (1 - \mathrm{CKA}_{l,l+1})$ that the last few pairs have.

    Attributes:
        layers: Layers; the panel has the likeness of each, from 1, with the next.
        last: How many pairs at the top count as the last.
    """

    layers: int
    last: int
    digits: int = 1

    @property
    def what(self) -> str:
        """What the figure is."""
        even = 100 * self.last / (self.layers - 1)
        return f"share of all change in the last {self.last} of {self.layers - 1} pairs, % ({even:.0f} if even)"

    def figure(self, found: Found, series: str) -> dict[str, Any] | None:
        """Returns a method's share in per cent."""
        changes = [self.values(found, series, layer) for layer in range(1, self.layers)]
        shares = {}
        for seed in sorted(set.intersection(*(set(one) for one in changes))):
            change = [1 - one[seed] for one in changes]
            shares[seed] = 100 * sum(change[-self.last :]) / sum(change)
        return _mean(shares)


def _paired_difference(values: Mapping[int, float], less: Mapping[int, float]) -> dict[str, Any] | None:
    """Returns the mean difference of values by seed, with its interval."""
    return _mean({seed: values[seed] - less[seed] for seed in sorted(values.keys() & less.keys())})


def _mean(by_seed: Mapping[int, float]) -> dict[str, Any] | None:
    """Returns the mean of values by seed, with its interval."""
    if not by_seed:
        return None
    values = list(by_seed.values())
    low, high = mean_interval(values) or (None, None)
    return {"mean": statistics.fmean(values), "low": low, "high": high, "seeds": list(by_seed)}


def rows(findings: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the table of findings: a column for each method, mean (from to)."""
    series = list(dict.fromkeys(one for finding in findings for one in finding["figures"]))
    body = [
        [one["panel"], one["what"], *(_cell(one["figures"].get(name), one["digits"]) for name in series)] for one in findings
    ]
    return ["", "", *series], body


def _cell(figure: Mapping[str, Any] | None, digits: int) -> str:
    if figure is None or figure["mean"] is None:
        return "-"
    mean, *ends = (
        None if value is None else round(value, digits) + 0.0 for value in (figure[key] for key in ("mean", "low", "high"))
    )
    interval = "" if None in ends else f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"
    return f"{mean:.{digits}f}{interval}"


# ---- intervals ----------------------------------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Returns the 95 % interval of the mean by Student's t, if there are two values at least.

    Example:
        >>> [round(end, 2) for end in mean_interval([1.0, 2.0, 3.0])]
        [-0.48, 4.48]
    """
    if len(values) < 2:
        return None
    half = _quantile(len(values)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> Interval | None:
    r"""Returns Fieller's 95 % interval of a ratio of means of paired values.

    All $\rho$ at which the mean of $a - \rho b$ is not told from 0 by Student's t:
    $(\bar a - \rho\bar b)^2 \le t^2 (s_a^2 - 2\rho s_{ab} + \rho^2 s_b^2) / n$.

    Returns:
        ``None`` if the values are fewer than two, or the denominator is not told from 0.

    Example:
        >>> [round(end, 2) for end in ratio_interval([1.0, 1.1, 0.9, 1.0], [2.0, 2.2, 1.8, 2.0])]
        [0.5, 0.5]
    """
    n = len(above)
    if n < 2:
        return None
    scale = _quantile(n) ** 2 / n
    a, b = statistics.fmean(above), statistics.fmean(below)
    square = b * b - scale * statistics.variance(below)
    middle = a * b - scale * statistics.covariance(above, below)
    rest = a * a - scale * statistics.variance(above)
    if square <= 0:
        return None
    root = math.sqrt(max(middle * middle - square * rest, 0.0))
    return (middle - root) / square, (middle + root) / square


def _quantile(count: int) -> float:
    """Returns the 97.5 % quantile of Student's t for so many values."""
    from scipy import stats

    return float(stats.t.ppf(0.975, count - 1))
