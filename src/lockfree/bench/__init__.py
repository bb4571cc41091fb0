"""Benchmarks: each measures things in turn in one process and returns ratios of medians; `lockfree bench NAME` runs one."""

from collections.abc import Callable
from typing import Any

from lockfree.bench.step import step

BENCHMARKS: dict[str, Callable[[], dict[str, Any]]] = {"step": step}
"""Every benchmark by its command-line name."""
