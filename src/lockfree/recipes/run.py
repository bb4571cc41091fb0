"""Running the trials of a recipe, several at a time, each on one core."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from lockfree.recipes.recipe import Recipe
from lockfree.recipes.trial import Trial

Told = Callable[[Trial, dict[str, Any]], None]
"""Is told of every trial that is done, and what came out."""


def run(recipe: Recipe, folder: Path, *, workers: int, device: str = "cpu", told: Told) -> dict[str, dict[str, Any]]:
    """Runs the trials, or those that a stopped run left, and returns their results by name.

    Each trial runs in one thread, so its numbers do not depend on how many run at a time.

    Args:
        recipe: What to run.
        folder: The recipe's folder; each trial is a run folder in ``trials``.
        workers: Processes, 1 or more.
        device: Where to train.
        told: Is told of every trial that is done.

    Raises:
        KeyboardInterrupt: After every trial in progress has written a checkpoint.
    """
    results: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin) as pool:
        futures = {pool.submit(_work, trial, folder / "trials" / trial.name, device): trial for trial in recipe.trials}
        try:
            for future in as_completed(futures):
                trial = futures[future]
                results[trial.name] = future.result()
                told(trial, results[trial.name])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGINT)
            raise
    return results


_interrupted = threading.Event()


def _work(trial: Trial, folder: Path, device: str) -> dict[str, Any]:
    """Runs a trial in a worker, unless it has been interrupted: the pool hands each worker one more than it asks for."""
    if _interrupted.is_set():
        raise KeyboardInterrupt
    try:
        return trial.run(folder, device)
    except KeyboardInterrupt:
        _interrupted.set()
        raise


def _begin() -> None:
    """Starts a worker: one thread, out of reach of the terminal's Ctrl-C (which is passed on once), and gone with its parent."""
    torch.set_num_threads(1)
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
