"""`lockfree reproduce`."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lockfree import recipes
from lockfree.choose import choose
from lockfree.console import print_table, trials
from lockfree.experiment import check_device
from lockfree.recipes.findings import rows as finding_rows


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Repeat a paper's experiment and print its numbers beside ours; the same command goes on where it stopped.

    Args:
        name: Which experiment: dni-table1, dni-sparse-updates, dni-unlocked, dni-noise, dni-copy, dni-repeat-copy, dni-char-lm,
            alternating-lm, dni-multi-network, sobolev-critics, sg-table, sg-artificial, sg-deep, sg-representations,
            hsic-unformatted, hsic-format, hsic-sigma, hsic-resnet, hsic-depth, dc-asgd-cifar, dc-asgd-sweep or stragglers.
        budget: smoke (a minute), small (tens of minutes on 2 cores) or full (the paper's own).
        out: Folder for results.json, plot.png and the trials; runs/NAME-BUDGET if left out.
        workers: Trials that run at a time, each in one thread; one for each core if left out.
        device: Where to train: cpu, cuda, ...
        json: End with one JSON object on standard output.
    """

    name: tyro.conf.Positional[str]
    budget: Literal["smoke", "small", "full"] = "small"
    out: Path | None = None
    workers: int | None = None
    device: str = "cpu"
    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Runs what has not been run, writes results and plot, prints the table."""
        recipe = choose(recipes.RECIPES, self.name, "recipe")(self.budget)
        out = self.out or Path("runs") / f"{self.name}-{self.budget}"
        workers = (os.cpu_count() or 1) if self.workers is None else self.workers
        if workers < 1:
            raise ValueError(f"--workers {workers}: give 1 or more")
        check_device(self.device)
        for trial in {trial.data: trial for trial in recipe.trials}.values():
            trial.load()  # refuses what is missing before anything is written
        folder = recipe.open(out)
        with trials(len(recipe.trials), quiet=self.json, label=self.name) as told:
            results = recipes.run(recipe, out, workers=min(workers, len(recipe.trials)), device=self.device, told=told)
        summary = recipe.write(out, results)
        folder.finish({"entries": summary["entries"]})
        if self.json:
            print(json.dumps(summary | {"out": str(out)}))
            return
        if recipe.derived:
            print_table(*recipe.derived_rows())
        print_table(*recipe.rows(summary))
        if summary["findings"]:
            print_table(*finding_rows(summary["findings"]))
        ours = f"{recipe.y_label}, mean ± standard deviation over seeds; {recipe.scope}"
        print(ours + (f"\nin brackets the paper's: {recipe.source}" if recipe.paper else ""))
        print(f"{recipe.reference}\nresults: {out / 'results.json'}, plot: {out / 'plot.png'}")
