"""`lockfree replay`."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from lockfree.experiment import Experiment
from lockfree.run import Run
from lockfree.server import trace as server
from lockfree.trace import KINDS, read


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Repeat a run of several processes in one, and say whether the weights are the same, bit for bit.

    Args:
        trace: The run's folder, or the trace.jsonl in it.
        json: Print one JSON object.
    """

    trace: tyro.conf.Positional[Path]
    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Replays; the exit code is 1 if weights differ."""
        lines = read(self.trace, KINDS + server.KINDS)
        folder = self.trace if self.trace.is_dir() else self.trace.parent
        experiment = Experiment.from_config(Run.open(folder).config | {"executor": "sequential", "processes": 1})
        torch.set_num_threads(lines[0]["threads"])
        found = experiment.replay(lines)
        if self.json:
            print(json.dumps({**dataclasses.asdict(found), "identical": found.identical}))
        elif found.identical:
            print(
                f"{found.steps} steps of {found.processes} processes, repeated in one: all weights are the same, bit for bit, at each "
                f"of {len(found.compared)} places"
            )
        elif not found.compared:
            print("the trace tells of no weights: nothing could be compared")
        else:
            cell, step = min(found.differing.items(), key=lambda pair: (pair[1], pair[0]))
            print(f"the weights differ: first those of cell {cell}, after {step} steps")
        if not found.identical:
            raise SystemExit(1)
