"""The learning rates of the HSIC papers' "fair" settings: for each method the best of three on 10,000 held-out training images.

Every trial that decides a rate is one of the recipes' own small trials (seed 0, two epochs of each phase at most), trained without the
held-out images; no test image is seen. What it finds stands in `lockfree/recipes/ma2019.py`, and a test compares.

    python benchmarks/fair_rates.py [--workers 2] [--out benchmarks/results/fair_rates.json]     (CPU-minutes: 40)
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import lockfree as lf
from lockfree.recipes import RECIPES
from lockfree.recipes.recipe import Recipe
from lockfree.recipes.rule_trial import RuleTrial
from lockfree.recipes.run import run

RATES = (3e-4, 1e-3, 3e-3)
HELD_OUT = 10_000
# By recipe: which series decides the rate of which method.
METHODS = {
    "hsic-unformatted": {"backprop": "backprop", "HSIC": "HSIC"},
    "hsic-format": {"backprop": "backprop", "HSIC": "HSIC"},
    "hsic-sigma": {"combined": "HSIC"},
    "hsic-resnet": {"backprop": "backprop", "HSIC": "HSIC"},
    "hsic-depth": {name: name for name in ("backprop", "HSIC", "backprop, no BatchNorm", "HSIC, no BatchNorm")},
}


def shortened(trial: RuleTrial) -> RuleTrial:
    """Returns the trial with two epochs of each phase at most, tested on held-out training images."""
    before, after = min(trial.hidden_epochs, 2), min(trial.epochs - trial.hidden_epochs, 2)
    fields = dict(trial.fields)
    if "format_after" in fields:
        images = trial.samples or {"cifar10": 50_000}.get(trial.data, 60_000) - HELD_OUT
        fields["format_after"] = before * -(-images // trial.batch_size)
    return replace(trial, epochs=before + after, hidden_epochs=before, fields=fields, held_out=HELD_OUT)


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fair_rates.json")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--recipes", nargs="+", choices=METHODS, default=list(METHODS), help="these anew; the others' numbers stay"
    )
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text())["accuracy"] if arguments.out.exists() else {}
    for name in arguments.recipes:
        methods = METHODS[name]
        found[name] = {}
        recipe = RECIPES[name]("small")
        fair = [trial for trial in recipe.trials if trial.panel.endswith("fair") and trial.series in methods]
        tried = {
            (trial.data, trial.series, rate): replace(
                shortened(trial), learning_rate=rate, series=f"{trial.series} at {rate:g}"
            )
            for trial in fair
            for rate in RATES
        }
        only: Recipe = replace(recipe, trials=list(tried.values()), paper={})
        with tempfile.TemporaryDirectory() as folder:
            results = run(
                only,
                Path(folder),
                workers=arguments.workers,
                told=lambda trial, result: print(trial.name, result["test_error"], flush=True),
            )
        for (data, series, rate), trial in tried.items():
            accuracy = round(100 - results[trial.name]["test_error"], 2)
            found[name].setdefault(data, {}).setdefault(methods[series], {})[f"{rate:g}"] = accuracy
        about = {"command": "python benchmarks/fair_rates.py", "held_out": HELD_OUT, "seeds": [0], "lockfree": lf.__version__}
        arguments.out.write_text(json.dumps({"about": about, "accuracy": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
