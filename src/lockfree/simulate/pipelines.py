"""What can be simulated: any rule under the schedule that its needs allow, and the synchronous pipelines of backpropagation."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from lockfree.rule import Needs, Place, Rule
from lockfree.rules import Backprop
from lockfree.schedule import Action, Kind, Schedule, lockstep, pipelined, schedule_of
from lockfree.simulate.costs import DIRECT, Costs, Transport
from lockfree.simulate.plan import Plan, Step, connect

# ---- what a schedule says ----------------------------------------------------------------------------------------------------


def from_schedule(
    schedule: Schedule,
    costs: Costs,
    *,
    transport: Transport = DIRECT,
    workers: Sequence[int] | None = None,
    method: str | None = None,
) -> Plan:
    """Returns what workers do in one tick of a full pipeline, in the order of the schedule.

    Nothing waits for a tick to end: a tick says which batch each cell works on, and whoever has what it needs goes on.

    Args:
        schedule: When is data. Its clock is left out: on every batch everything learns.
        costs: What a batch costs each cell.
        transport: How long links take; the error is broadcast in one hop.
        workers: The worker of each cell, 0, 1, ...; one each if left out.
        method: Name of the plan; the schedule's if left out.

    Raises:
        ValueError: If numbers of cells differ.

    Example:
        >>> from lockfree.simulate import predict
        >>> needs = (Needs.TARGET, Needs.TARGET)
        >>> predict(from_schedule(pipelined(needs, (None, None), (0,)), Costs.equal(2, forward=1.0, learn=2.0))).period
        3.0
    """
    workers = _workers(workers, costs)
    if schedule.cells != costs.cells:
        raise ValueError(f"the schedule is of {schedule.cells} cells, the costs are of {costs.cells}: make them agree")
    schedule = dataclasses.replace(schedule, clock=None)
    now = schedule.depth
    steps = [
        Step(
            action.cell,
            action.kind,
            0,
            now - action.batch,
            costs.seconds[action.kind][action.cell],
            tuple(((other.cell, other.kind, 0), _bytes(other, action, costs)) for other in schedule.waits_for(action)),
        )
        for action in schedule.tick(now, 0, now)
    ]
    events = connect(steps, workers, transport)
    return Plan(method=method or schedule.name, costs=costs, workers=workers, events=events)


def _bytes(source: Action, target: Action, costs: Costs) -> float:
    """Returns what must come from one action for another: activations, the error, or a message."""
    if source.kind is not Kind.FORWARD:
        return costs.down_bytes[source.cell]
    return costs.up_bytes[source.cell] if target.kind in (Kind.FORWARD, Kind.INPUT) else costs.error_bytes


def _workers(given: Sequence[int] | None, costs: Costs) -> tuple[int, ...]:
    workers = tuple(range(costs.cells)) if given is None else tuple(given)
    if len(workers) != costs.cells or set(workers) != set(range(max(workers) + 1)):
        raise ValueError(f"workers {list(workers)}: give one for each of {costs.cells} cells, numbered from 0 without a gap")
    return workers


def schedule_at_work(rule: Rule, cells: int, *, delay: int = 0) -> Schedule:
    """Returns the schedule on which the cells of a rule can work at once, or lockstep where they would have to wait.

    That is the pipelined one, if its blocks need TARGET at most, or links of so much delay bring them late what they need.

    Args:
        rule: How blocks get their credit; of its phases the last.
        cells: How many blocks.
        delay: Ticks that a message takes, 0 or more, for rules whose blocks need ERROR or ABOVE.

    Raises:
        ValueError: If the delay is negative.

    Example:
        >>> from lockfree import rules
        >>> schedule_at_work(rules.get("dni"), 3).name, schedule_at_work(rules.get("backprop"), 3).name
        ('pipelined', 'lockstep')
    """
    if delay < 0:
        raise ValueError(f"delay={delay}: a message takes 0 ticks or more")
    rule = rule.phases()[-1][1]
    waits = max((rule.needs(Place(index, cells)) for index in range(cells - 1)), default=Needs.NOTHING) >= Needs.ERROR
    return schedule_of(rule, lockstep if waits and not delay else pipelined, (delay if waits else 0,) * (cells - 1))


def delayed_backprop(costs: Costs, *, transport: Transport = DIRECT, workers: Sequence[int] | None = None) -> Plan:
    """Delayed backpropagation (DDG): backpropagation on links that bring a message one batch late.

    In iteration t cell k of K runs forward on batch t and learns on batch t - (K - 1 - k), so it keeps K - k graphs, and, for
    gradients at the weights of their own forward passes, K - 1 - k older versions of its weights.

    Args:
        costs: What a batch costs each cell.
        transport: How long links take.
        workers: The worker of each cell; one each if left out.

    Example:
        >>> from lockfree.simulate import predict
        >>> predict(delayed_backprop(Costs.equal(4, forward=1.0, learn=2.0))).staleness
        (3, 2, 1, 0)

    Reference:
        Huo, Gu, Yang, Huang 2018, "Decoupled parallel backpropagation with convergence guarantee", arXiv 1804.10574.
    """
    exact = schedule_at_work(Backprop(), costs.cells)
    late = dataclasses.replace(exact, delays=(1,) * (costs.cells - 1))
    return from_schedule(late, costs, transport=transport, workers=workers, method="ddg")


# ---- synchronous pipelines ---------------------------------------------------------------------------------------------------


def gpipe(costs: Costs, *, microbatches: int, transport: Transport = DIRECT, workers: Sequence[int] | None = None) -> Plan:
    """GPipe: every stage runs forward on all microbatches, then backward on all of them, last one first; then it updates.

    Args:
        costs: What a whole batch costs each cell; a microbatch costs its share of that.
        microbatches: In how many a batch is cut, 1 or more.
        transport: How long links take.
        workers: The worker of each cell, in the order of the cells; one each if left out.

    Raises:
        ValueError: If there is no microbatch, or cells are not in the order of the workers.

    Example:
        >>> from lockfree.simulate import predict
        >>> predict(gpipe(Costs.equal(4, forward=1.0, learn=2.0), microbatches=3)).bubble  # (K - 1) / (M + K - 1)
        0.5

    Reference:
        Huang et al. 2019, "GPipe", arXiv 1811.06965, section 2.3 and figure 2.
    """

    def order(stage: int, stages: int) -> list[tuple[Kind, int]]:
        parts = range(microbatches)
        return [(Kind.FORWARD, part) for part in parts] + [(Kind.LEARN, part) for part in reversed(parts)]

    return _flushed("gpipe", order, costs, microbatches, transport, workers)


def one_forward_one_backward(
    costs: Costs, *, microbatches: int, transport: Transport = DIRECT, workers: Sequence[int] | None = None
) -> Plan:
    """1F1B with a flush: stage k of K runs forward K - 1 - k times, then forward and backward in turn; then it updates.

    The bubble is GPipe's, but no stage keeps more than K - k microbatches.

    Args:
        costs: What a whole batch costs each cell; a microbatch costs its share of that.
        microbatches: In how many a batch is cut, 1 or more.
        transport: How long links take.
        workers: The worker of each cell, in the order of the cells; one each if left out.

    Raises:
        ValueError: If there is no microbatch, or cells are not in the order of the workers.

    Example:
        >>> from lockfree.simulate import predict
        >>> predict(one_forward_one_backward(Costs.equal(4, forward=1.0, learn=2.0), microbatches=3)).in_flight
        (3, 3, 2, 1)

    Reference:
        Narayanan et al. 2021, "Memory-efficient pipeline-parallel DNN training", arXiv 2006.09503 (PipeDream-Flush).
    """

    def order(stage: int, stages: int) -> list[tuple[Kind, int]]:
        ahead = min(stages - 1 - stage, microbatches)
        warm_up = [(Kind.FORWARD, part) for part in range(ahead)]
        turns = [one for part in range(microbatches - ahead) for one in ((Kind.FORWARD, ahead + part), (Kind.LEARN, part))]
        return warm_up + turns + [(Kind.LEARN, part) for part in range(microbatches - ahead, microbatches)]

    return _flushed("1f1b", order, costs, microbatches, transport, workers)


def _flushed(
    method: str,
    order: Callable[[int, int], list[tuple[Kind, int]]],
    costs: Costs,
    parts: int,
    transport: Transport,
    workers: Sequence[int] | None,
) -> Plan:
    """Returns the plan of a synchronous pipeline, each stage one cell."""
    if parts < 1:
        raise ValueError(f"microbatches={parts}: give 1 or more")
    costs = costs if workers is None else costs.merged(workers)
    top = costs.cells - 1
    if parts * costs.cells > _MOST_EVENTS:
        raise ValueError(
            f"{costs.cells:,} stages times {parts:,} microbatches are too many events, {_MOST_EVENTS:,} are the most: give fewer of them"
        )

    def waits(stage: int, kind: Kind, part: int) -> tuple[tuple[tuple[int, Kind, int], float], ...]:
        if kind is Kind.FORWARD:
            return (((stage - 1, kind, part), costs.up_bytes[stage - 1] / parts),) if stage else ()
        return (((stage + 1, kind, part), costs.down_bytes[stage + 1] / parts),) if stage < top else ()

    queues = [order(stage, costs.cells) for stage in range(costs.cells)]
    steps = [
        Step(stage, kind, part, 0, costs.seconds[kind][stage] / parts, waits(stage, kind, part))
        for stage, kind, part in _in_turn(queues)
    ]
    stages = tuple(range(costs.cells))
    return Plan(method=method, costs=costs, workers=stages, parts=parts, events=connect(steps, stages, transport))


def _in_turn(queues: Sequence[Sequence[tuple[Kind, int]]]) -> Iterable[tuple[int, Kind, int]]:
    """Merges the orders of the stages so that nothing comes before what it waits for."""
    top = len(queues) - 1
    place, done = [0] * len(queues), set()
    waiting = list(range(top, -1, -1))
    while waiting:
        stage = waiting.pop()
        while place[stage] < len(queues[stage]):
            kind, part = queues[stage][place[stage]]
            neighbour = stage - 1 if kind is Kind.FORWARD else stage + 1
            if 0 <= neighbour <= top and (neighbour, kind, part) not in done:
                break
            done.add((stage, kind, part))
            place[stage] += 1
            yield stage, kind, part
            waiting.append(min(stage + 1, top) if kind is Kind.FORWARD else max(stage - 1, 0))
    assert all(place[stage] == len(queue) for stage, queue in enumerate(queues)), "stages that wait for each other"


_MOST_EVENTS = 500_000
