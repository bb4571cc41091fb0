"""The executor that times: one action after the other."""

import time
from collections import defaultdict
from collections.abc import Sequence

import torch

from lockfree.executors.base import Assembly, Executor, Outcome
from lockfree.executors.sequential import Sequential
from lockfree.flight import Flight
from lockfree.memory import ActivationMeter
from lockfree.schedule import Action, Kind


class Stopwatch(Executor):
    """Runs one action after the other, each with its update, and takes down how long it took and what it left held.

    Attributes:
        seconds: Of each (cell, kind), every time that it happened.
        held: Bytes that autograd held after the last forward pass of each cell more than before it.
        meter: Counts them while somebody has it watch.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, Kind], list[float]] = defaultdict(list)
        self.held: dict[int, int] = {}
        self.meter: ActivationMeter | None = None
        self._reference = Sequential()

    def run(self, assembly: Assembly, actions: Sequence[Action]) -> Outcome:
        """Runs the actions of one tick."""
        whole = Outcome()
        for action in actions:
            before = self.meter.now if self.meter is not None else 0
            _finish()
            start = time.perf_counter()
            outcome = self._reference.run(assembly, [action])
            _finish()
            self.seconds[action.cell, action.kind].append(time.perf_counter() - start)
            if self.meter is not None and action.kind is Kind.FORWARD:
                self.held[action.cell] = max(self.meter.now - before, 0)
            whole.losses |= outcome.losses
            whole.auxiliary |= outcome.auxiliary
            whole.inputs |= outcome.inputs
        return whole

    def run_alone(self, assembly: Assembly, cell: int, batch: int, flight: Flight) -> Outcome:
        """Lets one cell learn on a batch; it is not timed."""
        return self._reference.run_alone(assembly, cell, batch, flight)


def _finish() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
