"""Processes beside this one: what workers do when they begin, and several that train one learner together."""

import multiprocessing
import os
import threading
from multiprocessing.connection import wait

import torch


class ProcessLost(RuntimeError):  # noqa: N818  (it is what happened, not a mistake in the call)
    """A process of several that train together is gone; what the others have learnt since the last checkpoint cannot be used.

    Args:
        process: Its number.
        processes: How many there were.
        what: What they are called.
        how: What became of it.

    Attributes:
        process: Its number.

    Example:
        >>> print(ProcessLost(1, 3, what="worker", how="was ended by SIGKILL"))
        worker 1 of 3 was ended by SIGKILL, so the others stopped at the end of a batch; go on from the last checkpoint
    """

    def __init__(self, process: int, processes: int, *, what: str = "process", how: str = "is gone") -> None:
        self.process = process
        super().__init__(
            f"{what} {process} of {processes} {how}, so the others stopped at the end of a batch; go on from the last checkpoint"
        )


def first() -> bool:
    """Whether this process is the first of those that ``torchrun`` has started together, or alone."""
    return os.environ.get("RANK", "0") == "0"


def begin_worker() -> None:
    """Begins a worker process: one thread for the arithmetic, and gone with its parent, however that one ends."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
