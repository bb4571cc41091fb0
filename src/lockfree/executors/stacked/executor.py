"""The executor that runs blocks of equal structure as one."""

import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from lockfree.executors.base import Assembly, Executor, Outcome
from lockfree.executors.sequential import Sequential
from lockfree.executors.stacked.plan import Plan, plan_for, shape_of, stacks_of
from lockfree.flight import Flight
from lockfree.schedule import Action, Tick

_logger = logging.getLogger(__name__)


class Stacked(Executor):
    """Runs neighbouring blocks of equal structure as one batched operation, whenever the pipeline is full; else as `Sequential`.

    A block can be part of a stack if it learns the moment that it has run (needs TARGET at most), draws no random numbers, takes and
    makes one tensor of the same shape as its neighbours in the stack, and shares no weight. All other blocks run one by one.
    """

    def __init__(self) -> None:
        self._reference = Sequential()
        self._plan: Plan | None = None
        self._tick = -1  # the last one that ran
        self._in_vain: Any = None  # shape of batches with which nothing could be stacked

    def check(self, assembly: Assembly) -> None:
        """Refuses schedules under which no two blocks can work at the same time.

        Raises:
            ValueError: Under ``lockstep``, where each block needs what the one below makes in the same tick (the forward lock);
                or if weights are to change before the tick ends.
        """
        if assembly.schedule.hop < 1:
            raise ValueError(
                f"the stacked executor cannot serve the {assembly.schedule.name} schedule: each block needs, in the same tick, what "
                'the one below makes (the forward lock); use schedule="pipelined", or executor="sequential"'
            )
        if assembly.at_once:
            raise ValueError(
                'the stacked executor changes weights at the end of a tick: leave out update="block", or use executor="sequential"'
            )

    def run(self, assembly: Assembly, actions: Sequence[Action]) -> Outcome:
        """Runs the actions of one tick, then the update."""
        whole = isinstance(actions, Tick) and actions.whole and not torch.is_autocast_enabled(self._device(assembly))
        tick = actions.number if isinstance(actions, Tick) else -1
        plan = self._entered(assembly, tick) if whole else None
        if plan is None:
            self.settle(assembly)
            outcome = self._reference.run(assembly, actions)
        else:
            outcome = _run(assembly, plan, tick)
        self._tick = tick
        return outcome

    def _device(self, assembly: Assembly) -> str:
        """Returns where blocks run; under autocast they run in a shorter type there, which operations by hand do not follow."""
        if self._plan is not None:
            return self._plan.device
        return next(assembly.cells[0].block.parameters(), torch.empty(0)).device.type

    def _entered(self, assembly: Assembly, tick: int) -> Plan | None:
        """Returns what is to be run as one in a tick, if anything can be."""
        shape = shape_of(assembly.flights[tick].inputs)
        if self._plan is not None and self._plan.holds and shape == self._plan.shape:
            return self._plan
        self.settle(assembly)
        if shape == self._in_vain or any(shape_of(flight.inputs) != shape for flight in assembly.flights.values()):
            return None
        stacks = list(stacks_of(assembly, tick))
        if not stacks:
            self._in_vain = shape
            _logger.warning(
                "nothing to stack, so blocks run one by one: no neighbours have equal structure, learn as soon as they have run "
                "(needs TARGET at most), draw no random numbers and share no weights"
            )
            return None
        self._plan = plan_for(stacks, assembly, tick)
        if self._plan is not None:
            for lower, upper in itertools.pairwise(stacks):
                upper.joins(lower)
            for stack in stacks:
                stack.enter(tick)
        return self._plan

    def settle(self, assembly: Assembly) -> None:
        """Gives what the stacks keep back to cells, links and flights."""
        plan, self._plan = self._plan, None
        if plan is None:
            return
        for stack in plan.stacks:
            stack.leave(self._tick)
        for batch, flight in assembly.flights.items():
            if batch <= self._tick:
                flight.remaining = assembly.schedule.remaining(batch, self._tick)

    def forget(self) -> None:
        """Forgets what the stacks keep."""
        self._plan = self._in_vain = None

    def run_alone(self, assembly: Assembly, cell: int, batch: int, flight: Flight) -> Outcome:
        """Lets one cell learn alone, as the reference does."""
        self.settle(assembly)
        return self._reference.run_alone(assembly, cell, batch, flight)


def _run(assembly: Assembly, plan: Plan, tick: int) -> Outcome:
    """A tick of a full pipeline: everything runs and is found finite before any weight changes."""
    outcome = Outcome()
    shown = [stack.shown(tick) for stack in plan.stacks]
    ticks = plan.captured(assembly)
    check = plan.compute(assembly, tick, shown, outcome) if ticks is None else ticks.compute(shown)
    for stack in plan.stacks:
        stack.credits.tell(assembly, tick, outcome)
    if not math.isfinite(check.item()):
        for stack in plan.stacks:
            stack.refuse_what_is_not_finite(tick, outcome)
    block_learnt = any(cell.learnt[0] for cell in plan.alone)
    auxiliary_learnt = any(cell.learnt[1] for cell in plan.alone)
    for cell in plan.alone:
        cell.before_update()
    if ticks is None:
        plan.descend(block_learnt, auxiliary_learnt)
    else:
        ticks.descend()
    if plan.auxiliaries is None and auxiliary_learnt and assembly.auxiliaries is not None:
        assembly.auxiliaries.take()
    del assembly.flights[tick - assembly.schedule.depth]
    return outcome
