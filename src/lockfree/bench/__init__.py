"""Benchmarks of speed and memory: each measures things in turn and returns ratios of medians; `lockfree bench NAME` runs one."""

from collections.abc import Callable
from typing import Any

from lockfree.bench.depth import depth
from lockfree.bench.hsic import hsic
from lockfree.bench.memory import memory
from lockfree.bench.pipeline import pipeline
from lockfree.bench.probes import probes
from lockfree.bench.recurrent import recurrent
from lockfree.bench.server import server
from lockfree.bench.step import step
from lockfree.bench.synthetic import synthetic

BENCHMARKS: dict[str, Callable[[], dict[str, Any]]] = {
    "step": step,
    "synthetic": synthetic,
    "hsic": hsic,
    "memory": memory,
    "depth": depth,
    "pipeline": pipeline,
    "server": server,
    "recurrent": recurrent,
    "probes": probes,
}
"""Every benchmark by its command-line name."""
