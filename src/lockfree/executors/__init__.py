"""How fast and where the events of a schedule run; never what they compute."""

from lockfree.executors.base import Assembly, Executor, Outcome
from lockfree.executors.pipeline import FailedElsewhere, Pipeline, ProcessLost
from lockfree.executors.sequential import Sequential
from lockfree.executors.stacked import Stacked
from lockfree.executors.stopwatch import Stopwatch

EXECUTORS: dict[str, type[Executor]] = {"sequential": Sequential, "stacked": Stacked, "pipeline": Pipeline}
"""Every executor by the name that `lockfree.convert` takes."""

__all__ = [
    "EXECUTORS",
    "Assembly",
    "Executor",
    "FailedElsewhere",
    "Outcome",
    "Pipeline",
    "ProcessLost",
    "Sequential",
    "Stacked",
    "Stopwatch",
]
