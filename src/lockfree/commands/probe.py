"""`lockfree probe`."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from lockfree.commands.shared import command_line, names_in
from lockfree.console import print_table
from lockfree.experiment import Experiment, entry, load_once, probed, write_report
from lockfree.probes import PROBES, View, linear_cka
from lockfree.probes.representation import draw_likeness
from lockfree.rng import undisturbed
from lockfree.run import Run


@dataclass(frozen=True, kw_only=True)
class Look:
    """Look at the checkpoints of a run after the fact; its report is drawn anew.

    What is seen goes to the run's metrics.jsonl, tables of numbers to probes/NAME-STEP.npz, too.

    Args:
        folder: The run's folder.
        probe: What looks, with commas; the names are those of lockfree train --probe.
        against: Another run on the same data: how alike its layers are to this run's in the end, linear CKA of each with each, is
            drawn into probes/.
        json: Print one JSON object.
    """

    folder: tyro.conf.Positional[Path]
    probe: str = ""
    against: Path | None = None
    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Looks at every checkpoint that there is."""
        if not names_in(self.probe) and self.against is None:
            raise ValueError(f"name a probe: {', '.join(PROBES)}; or another run with --against")
        opened = _opened(self.folder, self.probe)
        run, experiment = opened.run, opened.experiment
        other = None if self.against is None else _opened(self.against)
        if other is not None and other.experiment.data != experiment.data:
            raise ValueError(
                f"{self.against} was trained on {other.experiment.data}, not {experiment.data}: layers are compared on the same data"
            )
        dataset = load_once(experiment.data, experiment.device)
        learner, probes = experiment.make_learner(dataset), experiment.make_probes()
        for probe in probes:
            probe.check(learner)
        known = {(line["probe"], line["step"]) for line in run.metrics("probe")}
        made = []
        for step in run.steps:
            state = run.checkpoint_at(step)
            learner.load_state_dict(state["learner"])
            view = View(learner, *probed(dataset))
            for probe in probes:
                if (probe.name, step) in known:
                    continue
                clock = time.perf_counter()
                with undisturbed(learner.model):
                    seen = probe.look(view)
                about = {"probe": probe.name, "step": step, "epoch": state["progress"]["epoch"]}
                about["seconds"] = time.perf_counter() - clock
                run.log("probe", **about, **seen)
                _save_tables(self.folder / "probes" / f"{probe.name}-{step:08d}.npz", seen)
                made.append(about)
        if run.result is not None:
            shown = entry(dataclasses.replace(experiment, probe=""), run.result, run)
            write_report(self.folder / "report.html", experiment.title, [shown], command_line(argv))
        told: dict[str, Any] = {"looks": made, "out": str(self.folder)}
        if other is not None:
            told["cka"] = _compared(opened, other)
        if self.json:
            print(json.dumps(told))
            return
        if other is not None:
            names = [f"block {index}" for index in range(len(told["cka"][0]))]
            rows = [[f"block {index}", *(f"{value:.2f}" for value in row)] for index, row in enumerate(told["cka"])]
            print_table([f"{self.folder} with {self.against}", *names], rows)
            print(f"picture: {_likeness_path(opened, other)}.png")
        for one in made:
            print(f"{one['probe']}: step {one['step']}, {one['seconds']:.2f} s")
        if probes:
            print(f"report: {self.folder / 'report.html'}" if run.result is not None else "no report: the run has not finished")


class _Opened(NamedTuple):
    """A run that can be looked at."""

    folder: Path
    run: Run
    experiment: Experiment


def _opened(folder: Path, probe: str = "") -> _Opened:
    """Opens a run of a rule, which is looked at in one process."""
    run = Run.open(folder)
    if "rule" not in run.config:
        raise ValueError(f"{folder} is no run of lockfree train by a rule: probes look at the blocks of such a run")
    experiment = Experiment.from_config(run.config | {"executor": "sequential", "processes": 1, "probe": probe})
    if experiment.by_workers:
        raise ValueError(f"{folder}: probes look at the blocks of a rule, and a run of many workers has none")
    if not run.steps:
        raise ValueError(f"{folder} holds no checkpoint: train first, with --out")
    return _Opened(folder, run, experiment)


def _compared(one: _Opened, other: _Opened) -> list[list[float]]:
    """Returns linear CKA of each layer of a run with each of another, and draws it."""
    layers = []
    for opened in (one, other):
        dataset = load_once(opened.experiment.data, opened.experiment.device)
        learner = opened.experiment.make_learner(dataset)
        learner.load_state_dict(opened.run.checkpoint_at(opened.run.steps[-1])["learner"])
        layers.append(View(learner, *probed(dataset)).representations)
    found = linear_cka(*layers)
    path = _likeness_path(one, other)
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(f"{path}.npz", cka=found.cpu().numpy())
    draw_likeness(found, str(one.folder), str(other.folder)).savefig(f"{path}.png", dpi=120)
    return found.tolist()


def _likeness_path(one: _Opened, other: _Opened) -> Path:
    """Returns where it is kept how alike the layers of two runs are, without the ending."""
    return one.folder / "probes" / f"cka-with-{other.folder.resolve().name}"


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
