"""Adam's rate for each method and horizon of `lockfree reproduce dni-char-lm`, chosen on the validation part of the text.

The networks and batches are those of the recipe's small budget, half as long; all methods and horizons have the same grid of
rates. The seed is 100, none of the recipe's own; nothing of the test part decides. With as many characters a short horizon makes more
updates, so at one rate for all it would look better than it is. What it finds stands in
`lockfree/recipes/jaderberg2016_recurrent.py`, and a test compares.

    python benchmarks/horizon_rates.py [--workers 2] [--out benchmarks/results/horizon_rates.json]     (CPU-minutes: 15)
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import lockfree as lf
from lockfree.recipes import RECIPES, run
from lockfree.recipes.recurrent_trial import RecurrentTrial

RATES = (4e-3, 8e-3, 1.6e-2)
SEED = 100
EPOCHS = 3
EVALUATED = 30_000


def grid() -> dict[str, RecurrentTrial]:
    """Returns the trials that decide, by method, horizon and rate."""
    found = {}
    for trial in RECIPES["dni-char-lm"]("small").trials:
        assert isinstance(trial, RecurrentTrial)
        if trial.seed:
            continue
        for rate in RATES:
            task = {**trial.settings["task_fields"], "evaluated": EVALUATED}
            settings = {**trial.settings, "learning_rate": rate, "epochs": EPOCHS, "task_fields": task}
            found[f"{trial.series}|{trial.x}|{rate:g}"] = replace(
                trial, series=f"{trial.series} at {rate:g}", seed=SEED, settings=settings
            )
    return found


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "horizon_rates.json")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, help="where the trials go; a temporary folder if left out")
    arguments = parser.parse_args()
    named = grid()
    only = replace(RECIPES["dni-char-lm"]("small"), trials=list(named.values()), paper={}, findings=())
    with tempfile.TemporaryDirectory() as temporary:
        results = run(
            only,
            arguments.runs or Path(temporary),
            workers=arguments.workers,
            told=lambda trial, result: print(trial.name, round(result["bits_per_character"], 4), flush=True),
        )
    about = {
        "command": "python benchmarks/horizon_rates.py", "seed": SEED, "epochs": EPOCHS, "lockfree": lf.__version__,
        "keys": "method|horizon|rate: bits per character of the validation part",
    }  # fmt: skip
    bits = {name: round(results[trial.name]["bits_per_character"], 4) for name, trial in named.items()}
    arguments.out.write_text(json.dumps({"about": about, "bits_per_character": bits}, indent=1) + "\n")


if __name__ == "__main__":
    main()
