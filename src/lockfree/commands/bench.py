"""`lockfree bench`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from lockfree.bench import BENCHMARKS
from lockfree.choose import choose
from lockfree.console import print_table, short


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed or memory, as ratios of things measured in turn on this machine.

    Args:
        name: Which benchmark: step, synthetic, hsic, memory, depth, pipeline, server, recurrent or
            probes.
        json: Print one JSON object.
    """

    name: tyro.conf.Positional[str]
    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Measures and prints."""
        found = choose(BENCHMARKS, self.name, "benchmark")()
        if self.json:
            print(json.dumps(found))
            return
        print_table(["what", "value"], [[name, short(value)] for name, value in found.items()])
