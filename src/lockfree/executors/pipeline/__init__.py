"""Groups of neighbouring blocks learn at the same time, each in a process of its own."""

from lockfree.executors.pipeline.executor import Pipeline
from lockfree.executors.pipeline.world import FailedElsewhere
from lockfree.processes import ProcessLost

__all__ = ["FailedElsewhere", "Pipeline", "ProcessLost"]
