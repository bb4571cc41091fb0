"""How often a class ends up without a unit of its own: Fashion-MNIST, unformatted, the paper's setting, one epoch, eight seeds.

Such a class has an accuracy near 0, and the mean falls by about a tenth.

    python benchmarks/hsic_seeds.py [--workers 2] [--out benchmarks/results/hsic_seeds.json]        (CPU-minutes: 5)
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import lockfree as lf
from lockfree.recipes import RECIPES
from lockfree.recipes.run import run

SEEDS = range(8)


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "hsic_seeds.json")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    recipe = RECIPES["hsic-unformatted"]("small")
    (trial,) = [one for one in recipe.trials if (one.panel, one.series) == ("Fashion-MNIST, paper", "HSIC")]
    trials = {seed: replace(trial, seed=seed, epochs=1) for seed in SEEDS}
    with tempfile.TemporaryDirectory() as folder:
        results = run(
            replace(recipe, trials=list(trials.values()), paper={}),
            Path(folder),
            workers=arguments.workers,
            told=lambda trial, result: print(trial.name, result["test_error"], flush=True),
        )
    found = {seed: round(100 - results[one.name]["test_error"], 2) for seed, one in trials.items()}
    about = {"command": "python benchmarks/hsic_seeds.py", "epochs": 1, "lockfree": lf.__version__}
    arguments.out.write_text(json.dumps({"about": about, "test_accuracy": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
