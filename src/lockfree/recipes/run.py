"""Running the trials of a recipe, several at a time, each on one core."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import FrameType
from typing import Any

from lockfree.interrupt import held_back, let_through
from lockfree.processes import begin_worker
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
        with held_back(signal.SIGINT):  # and so by the workers, which start at the first `submit`, until they are ready for it
            futures = {pool.submit(_work, trial, folder / "trials" / trial.name, device): trial for trial in recipe.trials}
        try:
            for future in as_completed(futures):
                trial = futures[future]
                results[trial.name] = future.result()
                told(trial, results[trial.name])
        except BaseException:
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGINT)
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return results


_interrupted = threading.Event()
_at_work = threading.Event()


def _work(trial: Trial, folder: Path, device: str) -> dict[str, Any]:
    """Runs a trial in a worker, unless it has been interrupted: the pool hands each worker one more than it asks for."""
    _at_work.set()
    try:
        if _interrupted.is_set():
            raise KeyboardInterrupt
        return trial.run(folder, device)
    except KeyboardInterrupt:  # the Trainer's, which takes the signal while it trains
        _interrupted.set()
        raise
    finally:
        _at_work.clear()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stops the trial in progress; between two there is nothing to stop but the next one."""
    _interrupted.set()
    if _at_work.is_set():
        raise KeyboardInterrupt


def _begin() -> None:
    """Starts a worker, out of reach of the terminal's Ctrl-C, which is passed on once."""
    begin_worker()
    os.setpgrp()
    signal.signal(signal.SIGINT, _interrupt)
    let_through(signal.SIGINT)
