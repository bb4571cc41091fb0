"""Adam's rate for each way of coupling two networks, and the scale of the synthetic gradient, chosen on 10,000 held-out images of MNIST.

The networks and the batch are those of `lockfree reproduce dni-multi-network --budget small`, a third as long; all methods have the same
grid of rates. The seed is 100, none of the recipe's own; no test image is seen. What is to be small is the mean of both networks' errors
over the last half of the readings; of equals the smaller rate, and the smaller scale, is taken. What it finds stands in
`lockfree/recipes/multi_network.py`, and a test compares. Trials that are done are not done again with the same --runs.

    python benchmarks/clock_rates.py [--workers 2] [--out benchmarks/results/clock_rates.json]     (CPU-minutes: 10)
"""

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import lockfree as lf
from lockfree.recipes import run
from lockfree.recipes.clock_trial import ClockTrial
from lockfree.recipes.multi_network import METHODS, SMALL, Chosen, clock_trial
from lockfree.recipes.recipe import Recipe

RATES = (1e-3, 3e-3, 1e-2)
SCALES = {"decoupled": (1.0, 10.0, 100.0)}
SEED = 100
HELD_OUT = 10_000
STRETCHES, READINGS = 2000, 8


def grid() -> list[ClockTrial]:
    """Returns the trials that decide."""
    training = SMALL | {"stretches": STRETCHES, "readings": READINGS}
    return [
        clock_trial(method, SEED, Chosen(rate, scale), data="mnist", held_out=HELD_OUT, **training)
        for method in METHODS
        for rate in RATES
        for scale in SCALES.get(method, (1.0,))
    ]


def key(trial: ClockTrial) -> str:
    """Returns what a trial is called in the table."""
    return f"{trial.coupling}|{trial.learning_rate:g}|{f'{trial.scale:g}' if trial.coupling in SCALES else ''}"


def figures(trial: ClockTrial, result: dict[str, Any]) -> dict[str, float]:
    """Returns mean errors over the last half of the readings, in per cent, and what is to be small; 100 if training broke."""
    late = [line for line in result["curve"] if line[0] in trial.steps[trial.readings // 2 :]]
    odd, threes = (statistics.fmean(line[which] for line in late) if late else 100.0 for which in (1, 2))
    if result["diverged"] is not None or not math.isfinite(odd + threes):
        odd = threes = 100.0
    return {"odd": round(odd, 2), "threes": round(threes, 2), "both": round((odd + threes) / 2, 2)}


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "clock_rates.json")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, help="where the trials go; a temporary folder if left out")
    arguments = parser.parse_args()
    named = {key(trial): replace(trial, series=key(trial).replace("|", " at ")) for trial in grid()}
    only = Recipe(name="clock-rates", title="", reference="", budget="small", scope="", x_label="", trials=list(named.values()))
    with tempfile.TemporaryDirectory() as temporary:
        results = run(
            only,
            arguments.runs or Path(temporary),
            workers=arguments.workers,
            told=lambda trial, result: print(trial.name, result["curve"][-1], result["diverged"], flush=True),
        )
    table = {name: figures(trial, results[trial.name]) for name, trial in named.items()}
    about = {
        "command": "python benchmarks/clock_rates.py", "held_out": HELD_OUT, "seed": SEED, "stretches": STRETCHES,
        "lockfree": lf.__version__, "keys": "method|rate|scale: held-out errors in per cent, mean of the last half of the readings",
    }  # fmt: skip
    arguments.out.write_text(json.dumps({"about": about, "errors": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
