"""Timing several things in turn, so that a machine whose speed drifts slows them all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(things: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 10) -> dict[str, list[float]]:
    """Runs each thing once a round and returns the seconds of every round.

    Args:
        things: What to time, by name.
        rounds: Timed rounds, 1 or more.
        warm_up: Rounds before them that do not count.

    Example:
        >>> sorted(interleaved({"a": lambda: 1, "b": lambda: 2}, rounds=2))
        ['a', 'b']
    """
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for turn in range(warm_up + rounds):
        for name, run in things.items():
            _finish()
            start = time.perf_counter()
            run()
            _finish()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """Returns how much longer one thing takes than another: the median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def _finish() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
