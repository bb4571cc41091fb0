"""A paper's experiment as a list of trials, and what is made of their results: a table, a plot, a JSON file."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lockfree.recipes.findings import Finding, mean_interval
from lockfree.recipes.picture import draw
from lockfree.recipes.trial import Point, Trial
from lockfree.run import Run, version

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Key = tuple[str, float | int, str]
"""(panel, x, series): one entry of a recipe's table."""

ERROR = "test error, %"
"""What most recipes show."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An experiment: what to run, what a paper found, and how to show it.

    Attributes:
        name: Command-line name.
        title: What it shows, in words.
        reference: Whose experiment it is.
        budget: smoke, small or full.
        scope: What this budget trains on and for how long, in a sentence.
        trials: What to run.
        x_label: What the horizontal axis is.
        x_labels: What it is in panels where it is something else.
        log_x: Whether it is logarithmic.
        y_label: What the table and the plot show, with its unit.
        y_labels: What panels show that show something else.
        x_names: Names of the points of a panel whose horizontal axis is no number.
        from_zero: Whether the vertical axis begins with 0.
        digits: Decimals that are worth showing.
        paper: What the paper gives, where it gives something.
        source: Where those numbers come from.
        paper_note: What sets the paper's runs apart, in a few words for the plot.
        findings: What follows from several entries.
        derived: What is known of each method without training, by method and heading.
        pictures: Further pictures by file name, each drawn from the results of the trials by name.
    """

    name: str
    title: str
    reference: str
    budget: str
    scope: str
    trials: Sequence[Trial]
    x_label: str
    x_labels: Mapping[str, str] = field(default_factory=dict)
    log_x: bool = False
    y_label: str = ERROR
    y_labels: Mapping[str, str] = field(default_factory=dict)
    x_names: Mapping[str, Mapping[float | int, str]] = field(default_factory=dict)
    from_zero: bool = True
    digits: int = 2
    paper: Mapping[Key, float] = field(default_factory=dict)
    source: str = ""
    paper_note: str = ""
    findings: Sequence[Finding] = ()
    derived: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    pictures: Mapping[str, Callable[[Mapping[str, Mapping[str, Any]]], "Figure"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [trial.name for trial in self.trials]
        assert len(set(names)) == len(names), "two trials of a recipe share a folder"

    def open(self, folder: Path) -> Run:
        """Makes the recipe's folder, or opens the one that a stopped run left.

        Raises:
            ValueError: If the folder holds something else.
        """
        config = {"recipe": self.name, "budget": self.budget}
        if not (folder / "config.json").exists():
            return Run.create(folder, config)
        run = Run.open(folder)
        if any(run.config.get(name) != value for name, value in config.items()):
            raise ValueError(f"{folder} holds another run, not {self.name} with budget {self.budget}: choose another --out")
        return run

    # ---- what came out -------------------------------------------------------------------------------------------------------

    def summary(self, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Gathers the results of the trials, by name, into what is written as JSON."""
        entries = []
        for key in self.keys():
            panel, x, series = key
            done, values = [], []
            for trial in self._of(key):
                value = trial.reading(results[trial.name], Point(panel, x)) if trial.name in results else None
                if value is not None:
                    done.append(trial)
                    values.append(value)
            found = [results[trial.name] for trial in done]
            entries.append(
                {
                    "panel": panel,
                    "x": x,
                    "series": series,
                    "seeds": [trial.seed for trial in done],
                    "values": values,
                    "mean": statistics.fmean(values) if values else None,
                    "sd": statistics.stdev(values) if len(values) > 1 else None,
                    "interval": list(mean_interval(values) or ()) or None,
                    "train_error": [one.get("train_error") for one in found],
                    "seconds": [one["seconds"] for one in found],
                    "paper": self.paper.get(key),
                }
            )
        return {
            "recipe": self.name,
            "budget": self.budget,
            "scope": self.scope,
            "command": f"lockfree reproduce {self.name} --budget {self.budget}",
            "reference": self.reference,
            "paper_source": self.source,
            "shown": self.y_label,
            "shown_in": dict(self.y_labels),
            "derived": {series: dict(facts) for series, facts in self.derived.items()},
            "torch": torch.__version__,
            "lockfree": version(),
            "entries": entries,
            "findings": [
                finding.find([(trial, results[trial.name]) for trial in self.trials if trial.name in results])
                for finding in self.findings
            ],
        }

    def keys(self) -> list[Key]:
        """Lists the entries of the table in the order of the trials, panel by panel."""
        found = list(dict.fromkeys((point.panel, point.x, trial.series) for trial in self.trials for point in trial.points))
        panels = list(dict.fromkeys(panel for panel, _, _ in found))
        return sorted(found, key=lambda key: panels.index(key[0]))

    def _of(self, key: Key) -> list[Trial]:
        panel, x, series = key
        return [trial for trial in self.trials if trial.series == series and Point(panel, x) in trial.points]

    def rows(self, summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """Returns header and rows of the table: a row for each panel and x, a column for each method; ours (the paper's)."""
        series = list(dict.fromkeys(entry["series"] for entry in summary["entries"]))
        found = {(entry["panel"], entry["x"], entry["series"]): entry for entry in summary["entries"]}
        points = list(dict.fromkeys((entry["panel"], entry["x"]) for entry in summary["entries"]))
        rows = [
            [panel, self._x(panel, x), *(_cell(found.get((panel, x, one)), self.digits) for one in series)]
            for panel, x in points
        ]
        return ["", self.x_label, *series], rows

    def _x(self, panel: str, x: float | int) -> str:
        if panel in self.x_names:
            return self.x_names[panel][x]
        return f"{self.x_labels[panel]} {x:g}" if panel in self.x_labels else f"{x:g}"

    def derived_rows(self) -> tuple[list[str], list[list[str]]]:
        """Returns header and rows of what is known of each method without training."""
        headings = list(dict.fromkeys(heading for facts in self.derived.values() for heading in facts))
        return ["", *headings], [[series, *(facts.get(one, "-") for one in headings)] for series, facts in self.derived.items()]

    def plot(self, summary: Mapping[str, Any], path: Path) -> None:
        """Draws what is shown against x, a panel each, a line for each method, dashed where the paper's numbers are."""
        draw(self, summary).savefig(path, dpi=120)

    def write(self, folder: Path, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Writes ``results.json``, ``plot.png`` and further pictures into the folder and returns the summary."""
        summary = self.summary(results)
        (folder / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
        self.plot(summary, folder / "plot.png")
        for name, further in self.pictures.items():
            further(results).savefig(folder / f"{name}.png", dpi=120)
        return summary


def _cell(entry: Mapping[str, Any] | None, digits: int) -> str:
    if entry is None or entry["mean"] is None:
        return "-"
    spread = f" ± {entry['sd']:.{digits}f}" if entry["sd"] is not None else ""
    paper = f" ({entry['paper']:g})" if entry["paper"] is not None else ""
    return f"{entry['mean']:.{digits}f}{spread}{paper}"


def seeds(count: int) -> Iterator[int]:
    """Yields 0, 1, ...: seeds are counted, never chosen."""
    yield from range(count)
