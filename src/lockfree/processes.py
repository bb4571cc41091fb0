"""Processes beside this one: what workers do when they begin, and several that train one learner together."""

import multiprocessing
import os
import threading
from multiprocessing.connection import wait

import torch


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
