"""What follows from a plan: step time, bubble, memory and staleness of every stage."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from lockfree import rules
from lockfree.choose import choose
from lockfree.rules import RULES
from lockfree.schedule import Kind
from lockfree.simulate.costs import DIRECT, Costs, Transport
from lockfree.simulate.pipelines import delayed_backprop, from_schedule, gpipe, one_forward_one_backward, schedule_at_work
from lockfree.simulate.plan import TRANSFER, Event, Plan
from lockfree.simulate.steady import steady_state


@dataclass(frozen=True, kw_only=True)
class Prediction:
    r"""What to expect of a way to train once it has settled. Lists have an entry for each stage, bottom to top.

    Attributes:
        method: Its name.
        stages: Workers, K.
        period: Seconds between a batch and the next, P; of synchronous pipelines the time from flush to flush.
        bubble: The part of their time that workers are idle, $1 - \sum_k w_k / (K P)$, from 0 to 1.
        speedup: Batches for each that one worker finishes by plain backpropagation; K is ideal.
        busy: Seconds of a period in which the worker works, $w_k$.
        in_flight: Batches (of synchronous pipelines: microbatches) between forward pass and learning, at the most.
        activation_bytes: What is held of them; and outputs, where auxiliary networks have yet to learn from them.
        stash_bytes: Older versions of the weights, where late gradients are taken at the weights of their own forward pass.
        staleness: Updates of a block between its forward pass on a batch and its update made of it.
        auxiliary_staleness: Updates of an auxiliary network between its prediction for a batch and its update made of the truth.
    """

    method: str
    stages: int
    period: float
    bubble: float
    speedup: float
    busy: tuple[float, ...]
    in_flight: tuple[int, ...]
    activation_bytes: tuple[float, ...]
    stash_bytes: tuple[float, ...]
    staleness: tuple[int, ...]
    auxiliary_staleness: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers as plain data."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """Returns one number of each kind: of lists the greatest entry."""
        return {name: max(value) if isinstance(value, tuple) else value for name, value in self.to_dict().items()}


def predict(plan: Plan, *, plain_step: float | None = None) -> Prediction:
    """Works out what to expect of a plan.

    Args:
        plan: What happens in a period.
        plain_step: Seconds of a step of plain backpropagation on one worker, above 0; that of the plan's costs if left out.

    Returns:
        The prediction.

    Raises:
        ValueError: If nothing takes any time.

    Example:
        >>> found = predict(gpipe(Costs.equal(4, forward=1.0, learn=2.0), microbatches=3))
        >>> found.period, found.bubble, found.speedup
        (6.0, 0.5, 2.0)

    Reference:
        The bubble: Huang et al. 2019, "GPipe", arXiv 1811.06965, section 2.3.
    """
    costs, period = plan.costs, steady_state(plan).period
    if not period > 0:
        raise ValueError("nothing takes any time: give seconds above 0")
    cells = _cells(plan)
    busy = _by_stage(plan, [cell.busy for cell in cells], math.fsum)
    return Prediction(
        method=plan.method,
        stages=plan.stages,
        period=period,
        bubble=max(0.0, 1 - sum(busy) / (plan.stages * period)),
        speedup=(costs.plain_step if plain_step is None else plain_step) / period,
        busy=busy,
        in_flight=_by_stage(plan, [cell.in_flight for cell in cells], max),
        activation_bytes=_by_stage(plan, [cell.held for cell in cells], math.fsum),
        stash_bytes=_by_stage(
            plan, [cell.staleness * size for cell, size in zip(cells, costs.parameter_bytes, strict=True)], math.fsum
        ),
        staleness=_by_stage(plan, [cell.staleness for cell in cells], max),
        auxiliary_staleness=_by_stage(plan, [cell.auxiliary_staleness for cell in cells], max),
    )


class _Cell(NamedTuple):
    """What the order of events means for one cell."""

    busy: float
    in_flight: int
    held: float
    staleness: int
    auxiliary_staleness: int


def _cells(plan: Plan) -> list[_Cell]:
    events: list[list[Event]] = [[] for _ in plan.workers]
    for event in plan.events:
        if event.kind != TRANSFER:
            events[event.cell].append(event)
    return [_cell(plan, cell, mine) for cell, mine in enumerate(events)]


def _cell(plan: Plan, cell: int, events: Sequence[Event]) -> _Cell:
    late = {(event.kind, event.part): event.late for event in events}
    waits = [late[Kind.LEARN, part] - late[Kind.FORWARD, part] for part in range(plan.parts)]
    learnt = late[Kind.LEARN, 0]
    auxiliary = late.get((Kind.AUXILIARY, 0), learnt) - learnt
    # Batches of earlier periods that have not been learnt yet, and what this period adds and takes away.
    changes = [{Kind.FORWARD: 1, Kind.LEARN: -1}.get(Kind(event.kind), 0) for event in events]
    in_flight = max(itertools.accumulate(changes, initial=sum(waits)))
    held = in_flight * plan.costs.activation_bytes[cell] / plan.parts + auxiliary * plan.costs.up_bytes[cell]
    return _Cell(math.fsum(event.seconds for event in events), in_flight, held, max(waits), auxiliary)


T = TypeVar("T")


def _by_stage(plan: Plan, values: Sequence[T], gather: Callable[[list[T]], T]) -> tuple[T, ...]:
    """Gathers the values of the cells that a worker has."""
    stages: list[list[T]] = [[] for _ in range(plan.stages)]
    for worker, value in zip(plan.workers, values, strict=True):
        stages[worker].append(value)
    return tuple(gather(mine) for mine in stages)


# ---- by name -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method may be told besides the costs.

    Attributes:
        transport: How long links take.
        microbatches: In how many synchronous pipelines cut a batch, 1 or more.
        delay: Ticks that messages take under rules whose blocks need ERROR or ABOVE, 0 or more; 0 lets them wait.
        workers: The worker of each cell; one each if left out.
    """

    transport: Transport = DIRECT
    microbatches: int = 8
    delay: int = 0
    workers: Sequence[int] | None = None


def _gpipe(costs: Costs, setting: Setting) -> Plan:
    return gpipe(costs, microbatches=setting.microbatches, transport=setting.transport, workers=setting.workers)


def _one_forward_one_backward(costs: Costs, setting: Setting) -> Plan:
    cut, given = setting.microbatches, setting
    return one_forward_one_backward(costs, microbatches=cut, transport=given.transport, workers=given.workers)


def _delayed_backprop(costs: Costs, setting: Setting) -> Plan:
    return delayed_backprop(costs, transport=setting.transport, workers=setting.workers)


def _rule(name: str, costs: Costs, setting: Setting) -> Plan:
    schedule = schedule_at_work(rules.get(name), costs.cells, delay=setting.delay)
    return from_schedule(schedule, costs, transport=setting.transport, workers=setting.workers, method=name)


PIPELINES: dict[str, Callable[[Costs, Setting], Plan]] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "ddg": _delayed_backprop,
}
"""What backpropagation can be run as beside its own schedule, by command-line name."""

METHODS: dict[str, Callable[[Costs, Setting], Plan]] = {**PIPELINES, **{name: partial(_rule, name) for name in RULES}}
"""Everything that can be simulated, by command-line name: pipelines of backpropagation, and every rule."""


def plan_for(method: str, costs: Costs, setting: Setting | None = None) -> Plan:
    """Returns the plan of a method by its command-line name.

    Args:
        method: One of `METHODS`: "gpipe", "1f1b", "ddg", or a rule.
        costs: What a batch costs each cell.
        setting: What else the method may be told; its defaults if left out.

    Raises:
        ValueError: If there is no such method, or what it is told is out of range.

    Example:
        >>> plan_for("dni", Costs.equal(3, forward=1.0, learn=2.0, auxiliary=1.0)).method
        'dni'
    """
    return choose(METHODS, method, "method")(costs, setting or Setting())


def simulate(
    method: str,
    costs: Costs,
    *,
    transport: Transport = DIRECT,
    microbatches: int = 8,
    delay: int = 0,
    workers: Sequence[int] | None = None,
    plain_step: float | None = None,
) -> Prediction:
    """Predicts what a way to train takes on as many workers as you like.

    Args:
        method: Command-line name of a rule, or "gpipe", "1f1b" (synchronous pipelines), "ddg" (delayed backpropagation).
        costs: What a batch costs each cell, bottom to top.
        transport: How long links take.
        microbatches: In how many synchronous pipelines cut a batch, 1 or more.
        delay: Ticks that messages take under rules whose blocks need ERROR or ABOVE, 0 or more; 0 lets them wait.
        workers: The worker of each cell, 0, 1, ...; one each if left out.
        plain_step: Seconds of a step of plain backpropagation on one worker, above 0; that of the costs if left out.

    Returns:
        The prediction.

    Raises:
        ValueError: If there is no such method, or a number is out of range.

    Example:
        >>> costs = Costs.equal(8, forward=1.0, learn=2.0)
        >>> [round(simulate(method, costs).bubble, 3) for method in ("backprop", "gpipe", "pred")]
        [0.875, 0.467, 0.0]
    """
    setting = Setting(transport=transport, microbatches=microbatches, delay=delay, workers=workers)
    return predict(plan_for(method, costs, setting), plain_step=plain_step)
