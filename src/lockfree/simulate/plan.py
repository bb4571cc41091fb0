"""One period of a training run as a list of events: who does what, for how long, after what."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lockfree.report import Span
from lockfree.schedule import Kind
from lockfree.simulate.costs import Costs, Transport

TRANSFER = "T"
"""The kind of an event in which a link carries something."""


class Event(NamedTuple):
    """One event; it happens in every period, each time on the next batch.

    Attributes:
        on: The worker that is busy with it, or the wire (from worker, to worker).
        cell: Which cell; of a transfer the one that sends.
        kind: As in `lockfree.Kind`, or `TRANSFER`.
        late: Periods between the entry of a batch and this event.
        part: Which microbatch, 0 where batches are whole.
        seconds: How long it takes.
        after: What it waits for on the *same* batch: (number in the list of events, seconds from that one's end).
    """

    on: int | tuple[int, int]
    cell: int
    kind: str
    late: int
    part: int
    seconds: float
    after: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What happens in each period, in an order in which nobody waits for what comes later in it.

    Workers and wires do their events in this order, period after period; an event starts as soon as its worker is free and what
    it waits for is there.

    Attributes:
        method: Name of what is simulated.
        costs: What a batch costs each cell.
        workers: The worker of each cell.
        parts: Microbatches in a batch.
        events: The events of one period.
    """

    method: str
    costs: Costs
    workers: Sequence[int]
    parts: int = 1
    events: Sequence[Event]

    @property
    def stages(self) -> int:
        """Number of workers."""
        return max(self.workers) + 1


class Step(NamedTuple):
    """One thing that a worker does, before links are thought of.

    Attributes:
        cell: Which cell.
        kind: What it does.
        part: Which microbatch.
        late: Periods since the batch's entry.
        seconds: How long it takes.
        waits: What it waits for, (cell, kind, part), each with the bytes that must come from there.
    """

    cell: int
    kind: Kind
    part: int
    late: int
    seconds: float
    waits: tuple[tuple[tuple[int, Kind, int], float], ...]


def connect(steps: Sequence[Step], workers: Sequence[int], transport: Transport) -> list[Event]:
    """Turns steps into events: wherever one waits for another worker, a transfer comes in between.

    What several steps of a worker wait for is sent there once.

    Args:
        steps: In an order in which each worker does them, and nobody waits for what comes later in the same period.
        workers: The worker of each cell.
        transport: How long links take.
    """
    sent: dict[tuple[int, Kind, int], dict[int, float]] = {}
    for step in steps:
        for source, size in step.waits:
            if workers[source[0]] != workers[step.cell]:
                sent.setdefault(source, {})[workers[step.cell]] = size
    numbers: dict[Hashable, int] = {}
    places: list[tuple[Step, tuple[int, int] | None, float]] = []
    for step in steps:
        key, worker = (step.cell, step.kind, step.part), workers[step.cell]
        numbers[key] = len(places)
        places.append((step, None, step.seconds))
        for receiver, size in sent.get(key, {}).items():
            numbers[key, receiver] = len(places)
            places.append((step, (worker, receiver), size / transport.bandwidth))
    events = []
    for step, wire, seconds in places:
        worker = workers[step.cell]
        if wire is not None:
            after = ((numbers[step.cell, step.kind, step.part], 0.0),)
            events.append(Event(wire, step.cell, TRANSFER, step.late, step.part, seconds, after))
            continue
        after = tuple(
            (numbers[source], 0.0) if workers[source[0]] == worker else (numbers[source, worker], transport.latency)
            for source, _ in step.waits
        )
        events.append(Event(worker, step.cell, step.kind, step.late, step.part, seconds, after))
    return events


def play(plan: Plan, batches: int) -> Iterator[Span]:
    """Plays a plan event by event from an idle start until so many batches are done; each event as early as it can be.

    This is the reference that `steady_state` is held against; its time grows with batches times events.

    Args:
        plan: What happens.
        batches: How many batches, 1 or more.

    Yields:
        A span for each event of a worker, in seconds; its ``cell`` is the worker, its ``batch`` counts microbatches.

    Example:
        >>> from lockfree.simulate import Costs, gpipe
        >>> [(span.kind, span.start) for span in play(gpipe(Costs.equal(2, forward=1.0, learn=2.0), microbatches=1), 1)]
        [('F', 0.0), ('F', 1.0), ('L', 2.0), ('L', 4.0)]
    """
    free: dict[Hashable, float] = defaultdict(float)
    ended: dict[tuple[int, int], float] = {}
    for period in range(batches + max(event.late for event in plan.events)):
        for number, event in enumerate(plan.events):
            batch = period - event.late
            if not 0 <= batch < batches:
                continue
            start = max([free[event.on], *(ended[other, batch] + delay for other, delay in event.after)])
            free[event.on] = ended[number, batch] = start + event.seconds
            if isinstance(event.on, int):
                yield Span(event.on, str(event.kind), batch * plan.parts + event.part, start, start + event.seconds)
