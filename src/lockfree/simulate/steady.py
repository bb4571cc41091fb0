"""How fast a plan runs once it has settled: the longest cycle of its events."""

import itertools
import math
from collections.abc import Hashable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lockfree.simulate.plan import Plan


class Edges(NamedTuple):
    """What waits for what: event ``target`` of period p starts ``seconds`` after event ``source`` of period p - ``lag`` did.

    Sorted by target; every event is a target, for it waits at least for its own worker or wire.

    Attributes:
        source: Number of an event.
        target: Number of an event.
        seconds: From start to start.
        lag: Periods in between.
    """

    source: Int[np.ndarray, "edges"]
    target: Int[np.ndarray, "edges"]
    seconds: Float[np.ndarray, "edges"]
    lag: Int[np.ndarray, "edges"]


class Steady(NamedTuple):
    """A plan that has settled: event n of period p starts at ``starts[n] + p * period``.

    Attributes:
        period: Seconds between a batch and the next.
        starts: Seconds, one for each event, at the least 0.
    """

    period: float
    starts: Float[np.ndarray, "events"]


def steady_state(plan: Plan) -> Steady:
    r"""Finds the period of a plan, and when its events happen in it.

    Starts obey $x_n(p) = \max_{m \to n}\,(x_m(p - l_{mn}) + s_{mn})$, which is linear in the algebra of maximum and plus. Its
    growth, the period, is the greatest ratio of a cycle,

    $$P = \max_{\mathrm{cycles}\ c} \frac{\sum_{e \in c} s_e}{\sum_{e \in c} l_e},$$

    and starts are longest paths at weights $s_e - P l_e$. Both are found by policy iteration: each event keeps the one that it
    waits for longest, paths are summed by doubling, and a cycle that gains raises P. Workers that nothing holds back are paced
    by the slowest.

    Args:
        plan: What happens in a period.

    Returns:
        The period, and the earliest starts.

    Reference:
        Baccelli, Cohen, Olsder, Quadrat 1992, "Synchronization and Linearity". Cochet-Terrasson, Cohen, Gaubert, McGettrick,
        Quadrat 1998, "Numerical computation of spectral elements in max-plus algebra".

    Example:
        >>> from lockfree.simulate import Costs, gpipe
        >>> steady_state(gpipe(Costs.equal(2, forward=1.0, learn=2.0), microbatches=1)).period
        6.0
    """
    edges, count = edges_of(plan), len(plan.events)
    loads: dict[Hashable, float] = {}
    for event in plan.events:
        loads[event.on] = loads.get(event.on, 0.0) + event.seconds
    period = max(loads.values())
    tolerance = _ROUNDING * sum(loads.values())
    up, down = range(count), range(count - 1, -1, -1)
    chosen, starts = _two_periods(edges, count), np.zeros(count)
    changed = True
    while changed:
        starts, cycles = _follow(chosen, edges, period)
        while len(cycles):
            ratio = _greatest_ratio(chosen, cycles, edges)
            if ratio <= period:  # it gains by rounding alone, or is the worker's own, from which the search began
                tolerance *= 2
            period = max(period, ratio)
            chosen[cycles] = _NOBODY
            starts, cycles = _follow(chosen, edges, period)
        weights = edges.seconds - period * edges.lag
        # Up and down, so that the news of a long way runs through the whole chain of cells whichever way it is listed.
        changed = _sweep(up, chosen, starts, edges, weights, tolerance)
        changed |= _sweep(down, chosen, starts, edges, weights, tolerance)
    return Steady(float(period), starts)


def edges_of(plan: Plan) -> Edges:
    """Lists what waits for what in a plan: data, and the order on each worker and wire."""
    events = plan.events
    rows = [
        (other, number, events[other].seconds + delay, event.late - events[other].late)
        for number, event in enumerate(events)
        for other, delay in event.after
    ]
    queues: dict[Hashable, list[int]] = {}
    for number, event in enumerate(events):
        queues.setdefault(event.on, []).append(number)
    for queue in queues.values():
        rows += [(one, other, events[one].seconds, 0) for one, other in itertools.pairwise(queue)]
        rows.append((queue[-1], queue[0], events[queue[-1]].seconds, 1))
    source, target, seconds, lag = (np.array(column) for column in zip(*rows, strict=True))
    order = np.argsort(target, kind="stable")
    return Edges(source[order], target[order], seconds[order].astype(np.float64), lag[order])


def _two_periods(edges: Edges, count: int) -> Int[np.ndarray, "events"]:
    """Plays two periods and returns what each event of the second waits for, a guess at what it will go on to wait for.

    Where a period is one long chain of events, as under lockstep and in a flush, the guess is right.
    """
    # What the events of the period before have come to stands behind what those of this one do.
    source = np.where(edges.lag == 1, edges.source + count, edges.source)
    weights = np.where(edges.lag <= 1, edges.seconds, -np.inf)
    starts = np.zeros(count)
    for _ in range(2):
        both, chosen = np.append(np.zeros(count), starts), np.full(count, _NOBODY)
        _sweep(range(count), chosen, both, edges._replace(source=source), weights, 0.0)
        starts = both[:count]
    return chosen


def _sweep(
    order: Iterable[int],
    chosen: Int[np.ndarray, "events"],
    starts: Float[np.ndarray, "starts"],
    edges: Edges,
    weights: Float[np.ndarray, "edges"],
    tolerance: float,
) -> bool:
    """Lets each event in turn choose the longest of its edges, or nobody.

    Returns:
        Whether anything has changed; ``chosen`` and ``starts`` have.
    """
    # Lists, for there is one number at a time to look at.
    first = np.searchsorted(edges.target, np.arange(len(chosen) + 1)).tolist()
    source, weight, at, way = edges.source.tolist(), weights.tolist(), starts.tolist(), chosen.tolist()
    changed = False
    for number in order:
        least = at[number] + tolerance
        if least < 0:
            at[number], way[number], least, changed = 0.0, _NOBODY, tolerance, True
        for edge in range(first[number], first[number + 1]):
            offer = at[source[edge]] + weight[edge]
            if offer > least:
                at[number], way[number], least, changed = offer, edge, offer, True
    chosen[:], starts[:] = way, at
    return changed


def _follow(
    chosen: Int[np.ndarray, "events"], edges: Edges, period: float
) -> tuple[Float[np.ndarray, "events"], Int[np.ndarray, "cycles"]]:
    """Follows each event's chosen edges back to their end.

    Returns:
        The weights on the way summed, which mean something where there are no cycles; and one event of each cycle.
    """
    count = len(chosen)
    waits = chosen != _NOBODY
    # One more place stands for nobody: it waits for itself at no weight.
    back = np.append(np.where(waits, edges.source[chosen], count), count)
    sums = np.append(np.where(waits, edges.seconds[chosen] - period * edges.lag[chosen], 0.0), 0.0)
    least = np.append(np.arange(count), count)
    for _ in range(count.bit_length()):
        sums = sums + sums[back]
        least = np.minimum(least, least[back])
        back = back[back]
    return sums[:-1], np.unique(least[back[back != count]])


def _greatest_ratio(chosen: Int[np.ndarray, "events"], cycles: Int[np.ndarray, "cycles"], edges: Edges) -> float:
    """Returns the greatest seconds over lags of some cycles, each given by one of its events."""
    ratios = []
    for begin in cycles:
        way, event = [], begin
        while not way or event != begin:
            way.append(chosen[event])
            event = edges.source[chosen[event]]
        ratios.append(math.fsum(edges.seconds[way]) / int(edges.lag[way].sum()))
    return max(ratios)


_NOBODY = -1
"""Stands for the edge of an event that waits for nothing in the past: it starts at 0."""

_ROUNDING = 1e-13
"""What sums of so many seconds may be wrong by, as a part of them all."""
