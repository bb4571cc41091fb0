"""`lockfree probe`."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from lockfree.commands.shared import command_line, names_in
from lockfree.experiment import Experiment, entry, load_once, probed, write_report
from lockfree.probes import PROBES, View
from lockfree.rng import undisturbed
from lockfree.run import Run


@dataclass(frozen=True, kw_only=True)
class Look:
    """Look at the checkpoints of a run after the fact; its report is drawn anew.

    What is seen goes to the run's metrics.jsonl, tables of numbers to probes/NAME-STEP.npz, too.

    Args:
        folder: The run's folder.
        probe: What looks, with commas; the names are those of lockfree train --probe.
        json: Print one JSON object.
    """

    folder: tyro.conf.Positional[Path]
    probe: str
    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Looks at every checkpoint that there is."""
        run = Run.open(self.folder)
        if "rule" not in run.config:
            raise ValueError(f"{self.folder} is no run of lockfree train by a rule: probes look at the blocks of such a run")
        experiment = Experiment.from_config(run.config | {"executor": "sequential", "processes": 1, "probe": self.probe})
        if experiment.by_workers:
            raise ValueError("probes look at the blocks of a rule: a run of many workers has none")
        if not names_in(self.probe):
            raise ValueError(f"name a probe: {', '.join(PROBES)}")
        if not run.steps:
            raise ValueError(f"{self.folder} holds no checkpoint: train first, with --out")
        dataset = load_once(experiment.data, experiment.device)
        learner, probes = experiment.make_learner(dataset), experiment.make_probes()
        for probe in probes:
            probe.check(learner)
        known = {(line["probe"], line["step"]) for line in run.metrics("probe")}
        made = []
        for step in run.steps:
            state = run.checkpoint_at(step)
            learner.load_state_dict(state["learner"])
            for probe in probes:
                if (probe.name, step) in known:
                    continue
                clock = time.perf_counter()
                with undisturbed(learner.model):
                    seen = probe.look(View(learner, *probed(dataset)))
                about = {"probe": probe.name, "step": step, "epoch": state["progress"]["epoch"]}
                about["seconds"] = time.perf_counter() - clock
                run.log("probe", **about, **seen)
                _save_tables(self.folder / "probes" / f"{probe.name}-{step:08d}.npz", seen)
                made.append(about)
        if run.result is not None:
            shown = entry(dataclasses.replace(experiment, probe=""), run.result, run)
            write_report(self.folder / "report.html", experiment.title, [shown], command_line(argv))
        if self.json:
            print(json.dumps({"looks": made, "out": str(self.folder)}))
            return
        for one in made:
            print(f"{one['probe']}: step {one['step']}, {one['seconds']:.2f} s")
        print(f"report: {self.folder / 'report.html'}" if run.result is not None else "no report: the run has not finished")


def _save_tables(path: Path, seen: Mapping[str, Any]) -> None:
    """Writes what is a whole table of numbers, for those who draw their own pictures."""
    tables = {}
    for name, value in seen.items():
        try:
            tables[name] = np.asarray(value, dtype=float)
        except (TypeError, ValueError):  # rows of several lengths, words
            continue
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **tables)  # pyrefly: ignore[bad-argument-type]
