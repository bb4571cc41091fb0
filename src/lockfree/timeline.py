"""Who waits for whom: a schedule played on as many workers as there are cells."""

from collections.abc import Mapping

from lockfree.report import Span
from lockfree.schedule import Action, Kind, Schedule

# A backward pass takes about twice the products of a forward pass, half of them for the message; an auxiliary network is thinner
# than its block.
DURATIONS: Mapping[Kind, float] = {
    Kind.FORWARD: 1.0,
    Kind.LEARN: 2.0,
    Kind.MESSAGE: 1.0,
    Kind.AUXILIARY: 1.0,
    Kind.INPUT: 1.0,
}


def play(schedule: Schedule, batches: int, durations: Mapping[Kind, float] = DURATIONS) -> list[Span]:
    """Plays the events of a schedule as early as their dependencies allow, every cell on a worker of its own.

    A cell does its actions in the order of the schedule, and each starts once the cell is free and what it waits for is done.
    The locks that a rule keeps are what leaves gaps.

    Args:
        schedule: When things happen.
        batches: How many batches to play, 1 or more.
        durations: How long each kind of action takes; one forward pass is the unit.

    Returns:
        A span for each action.

    Example:
        >>> from lockfree.rule import Needs
        >>> from lockfree.schedule import lockstep
        >>> spans = play(lockstep((Needs.ABOVE, Needs.ABOVE), (None, None), (0,)), batches=1)
        >>> [(span.cell, span.kind, span.start, span.end) for span in spans]
        [(0, 'F', 0.0, 1.0), (1, 'F', 1.0, 2.0), (1, 'L', 2.0, 4.0), (0, 'L', 4.0, 6.0)]
    """
    free = [0.0] * schedule.cells
    done: dict[Action, float] = {}
    spans = []
    for action in schedule.actions(batches):
        start = max([free[action.cell], *(done[other] for other in schedule.waits_for(action))])
        end = start + durations[action.kind]
        free[action.cell] = done[action] = end
        spans.append(Span(action.cell, str(action.kind), action.batch, start, end))
    return spans
