"""Learning rates and λ0 of the recipes `dc-asgd-sweep` and `stragglers`, chosen on 287 held-out training images of the digits.

The seed is 100, none of the recipes' own; no test image is seen. The rules:

* the rate for all in `dc-asgd-sweep` is the smallest at which sequential SGD is within half a point of its least held-out error; λ0 is
  the one with the least error at that rate;
* a method's own rate (and λ0) is the one with the least error;
* `stragglers`: a method's own rate is the one that is first at 10 % held-out error; the rate for all is plain ASP's. λ0 is 8.

Of equals the smaller rate, and the smaller λ0, is taken. What it finds stands in `lockfree/recipes/`, and a test compares. Trials that are
done are not done again with the same --runs.

    python benchmarks/delay_rates.py [--workers 2] [--out benchmarks/results/delay_rates.json]     (CPU-minutes: 10)
"""

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lockfree as lf
from lockfree.recipes import ServerTrial, run
from lockfree.recipes.recipe import Recipe
from lockfree.recipes.stragglers import METHODS as WAITING
from lockfree.recipes.stragglers import straggler_trial
from lockfree.recipes.zheng2017 import METHODS, sweep_trial

RATES: dict[str, Sequence[float]] = {
    "sequential": (0.05, 0.1, 0.2, 0.4, 0.8),
    "SSGD": (0.1, 0.2, 0.4, 0.8, 1.6),
    "rate / delay": (0.05, 0.1, 0.2, 0.4, 0.8),
    "ASGD": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
    "DC-c": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
    "DC-a": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
}
"""Rates to try in the sweep; those below 0.05 only with 16 workers and more."""
WAITING_RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
WORKERS = (4, 8, 16, 32)
STRENGTHS: dict[str, Sequence[float | None]] = {"DC-c": (1.0, 10.0), "DC-a": (2.0, 8.0, 32.0)}
SEED = 100
HELD_OUT = 287
LEVEL = 10.0


def sweep() -> list[ServerTrial]:
    """Returns the trials that decide for `dc-asgd-sweep`; panels are method and rate, series λ0."""
    return [
        sweep_trial(
            method, workers, (rate, strength), panel=method, seed=SEED, data="digits", epochs=30, held_out=HELD_OUT
        )
        for method in METHODS
        for rate in RATES[method]
        for strength in STRENGTHS.get(method, (None,))
        for workers in ((1,) if method == "sequential" else WORKERS)
        if rate >= 0.05 or workers >= 16
    ]  # fmt: skip


def waiting() -> list[ServerTrial]:
    """Returns the trials that decide for `stragglers`."""
    return [
        straggler_trial(method, method, SEED, rate=rate, epochs=20, readings=100, times=(1e9,), held_out=HELD_OUT)
        for method in WAITING
        for rate in WAITING_RATES
    ]


def named(trial: ServerTrial) -> ServerTrial:
    """Gives a trial a name of its own."""
    strength = trial.fields.get("strength")
    what = f"{trial.series} {'' if strength is None else f'λ {strength:g} '}at {trial.learning_rate:g}"
    return type(trial)(**{**vars(trial), "series": what})


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "delay_rates.json")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, help="where the trials go; a temporary folder if left out")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for name, trials in (("dc-asgd-sweep", sweep()), ("stragglers", waiting())):
        only = Recipe(
            name=name, title="", reference="", budget="small", scope="", x_label="", trials=[named(trial) for trial in trials]
        )
        with tempfile.TemporaryDirectory() as temporary:
            results = run(
                only,
                (arguments.runs or Path(temporary)) / name,
                workers=arguments.workers,
                told=lambda trial, result: print(trial.name, result["test_error"], flush=True),
            )
        found[name] = {}
        for trial, kept in zip(trials, only.trials, strict=True):
            strength = trial.fields.get("strength")
            key = f"{trial.series}|{trial.workers}|{trial.learning_rate:g}|{'' if strength is None else f'{strength:g}'}"
            found[name][key] = round(figure(name, results[kept.name]), 2)
    about = {
        "command": "python benchmarks/delay_rates.py", "held_out": HELD_OUT, "seed": SEED, "lockfree": lf.__version__,
        "keys": "method|workers|rate|λ0: held-out error in per cent (stragglers: simulated seconds to 10 %, 1e9 if never)",
    }  # fmt: skip
    arguments.out.write_text(json.dumps({"about": about, **found}, indent=1, ensure_ascii=False) + "\n")


def figure(name: str, result: dict[str, Any]) -> float:
    """Returns what is to be small."""
    if name == "dc-asgd-sweep":
        return result["test_error"] if math.isfinite(result["test_error"]) else 100.0
    return next((when for when, error in result["curve"] if error <= LEVEL), 1e9)


if __name__ == "__main__":
    main()
