"""Adam's rate for each method and activation of `lockfree reproduce sg-deep`, chosen on held-out training images.

The networks are those of the recipe's small budget with 20 hidden layers; all methods have the same grid of rates. The seed is 100,
none of the recipe's own; nothing of the test set decides. What it finds stands in `lockfree/recipes/czarnecki2017.py`, and a test
compares.

    python benchmarks/deep_rates.py [--workers 2] [--out benchmarks/results/deep_rates.json]     (CPU-minutes: 16)
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import lockfree as lf
from lockfree.recipes import RECIPES, RuleTrial, run

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SEED = 100
HIDDEN = 20
HELD_OUT = 10_000


def grid() -> dict[str, RuleTrial]:
    """Returns the trials that decide, by activation, method and rate."""
    found = {}
    for trial in RECIPES["sg-deep"]("small").trials:
        assert isinstance(trial, RuleTrial)
        if trial.seed or trial.x != HIDDEN:
            continue
        for rate in RATES:
            found[f"{trial.network_fields['activation']}|{trial.series}|{rate:g}"] = replace(
                trial, series=f"{trial.series} at {rate:g}", seed=SEED, learning_rate=rate, held_out=HELD_OUT
            )
    return found


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "deep_rates.json")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, help="where the trials go; a temporary folder if left out")
    arguments = parser.parse_args()
    named = grid()
    only = replace(RECIPES["sg-deep"]("small"), trials=list(named.values()), paper={}, findings=())
    with tempfile.TemporaryDirectory() as temporary:
        results = run(
            only,
            arguments.runs or Path(temporary),
            workers=arguments.workers,
            told=lambda trial, result: print(trial.name, round(result["test_error"], 2), flush=True),
        )
    about = {
        "command": "python benchmarks/deep_rates.py", "seed": SEED, "hidden": HIDDEN, "held_out": HELD_OUT, "lockfree": lf.__version__,
        "keys": "activation|method|rate: error in per cent on held-out training images",
    }  # fmt: skip
    errors = {name: round(results[trial.name]["test_error"], 2) for name, trial in named.items()}
    arguments.out.write_text(json.dumps({"about": about, "errors": errors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
