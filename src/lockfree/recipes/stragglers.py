"""What waiting for a slow worker costs: accuracy against time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockfree.choose import choose
from lockfree.recipes.findings import TimeTo
from lockfree.recipes.recipe import Recipe, seeds
from lockfree.recipes.server_trial import ServerTrial

METHODS: dict[str, dict[str, Any]] = {
    "BSP": {"consistency": "bsp"},
    "SSP(3)": {"consistency": "ssp:3"},
    "ASP": {},
    "ASP, DC-a": {"correction": "dc-adaptive", "fields": {"strength": 8.0}},
}
"""What sets a method's trials apart."""


@dataclass(frozen=True, kw_only=True)
class _Size:
    """What a budget means.

    Attributes:
        seeds: How many.
        times: Simulated seconds that are shown.
        errors: Levels of test error in per cent, the time to which is told.
        training: Fields of each trial.
    """

    seeds: int
    times: Sequence[float]
    errors: Sequence[float]
    training: Mapping[str, Any]


_TIMES = (25.0, 50.0, 75.0, 100.0, 150.0, 200.0, 300.0, 500.0)
_SIZES = {
    "smoke": _Size(seeds=2, times=(5.0, 10.0, 20.0), errors=(90.0,), training={"samples": 320, "epochs": 2, "readings": 10}),
    "small": _Size(seeds=5, times=_TIMES, errors=(10.0, 5.0), training={"epochs": 20, "readings": 100}),
    "full": _Size(seeds=20, times=_TIMES, errors=(10.0, 5.0), training={"epochs": 20, "readings": 100}),
}

SHARED_RATE = 0.05
"""Of the panel with one rate for all: the one at which plain ASP is fastest."""

CHOSEN: dict[str, dict[str, float]] = {
    "same rate": dict.fromkeys(METHODS, SHARED_RATE),
    "own rate": {"BSP": 0.4, "SSP(3)": 0.1, "ASP": 0.05, "ASP, DC-a": 0.2},
}
"""Learning rates that held-out images chose, by panel: `benchmarks/delay_rates.py`. A test compares."""


def stragglers(budget: str) -> Recipe:
    """Test error against simulated time, of 8 workers the first of which takes 5 times as long, by how workers wait.

    Args:
        budget: smoke, small or full (more seeds).
    """
    size = choose(_SIZES, budget, "budget")
    trials = [
        straggler_trial(panel, method, seed, rate=rates[method], times=tuple(size.times), **size.training)
        for panel, rates in CHOSEN.items()
        for method in METHODS
        for seed in seeds(size.seeds)
    ]
    return Recipe(
        name="stragglers",
        title="One of eight workers five times slower",
        reference="a comparison of our own; SSP: Ho et al. 2013, More effective distributed ML via a stale synchronous parallel parameter "
        "server; DC-a: Zheng et al. 2017, arXiv 1609.08326",
        budget=budget,
        scope=f"digits, 64-64-64-10, {size.training['epochs']} epochs of batches of 32 a worker at a constant rate, {size.seeds} seed(s); "
        f"a batch takes a second (gamma, k = 16), the slow worker's five; same rate: {SHARED_RATE:g}; own rate: what was fastest on "
        "held-out images; who has seen all epochs stays where it is",
        trials=trials,
        x_label="simulated seconds",
        log_x=True,
        findings=[
            TimeTo(panel=panel, series=list(METHODS), error=error) for panel in CHOSEN for error in size.errors
        ],
    )  # fmt: skip


def straggler_trial(panel: str, method: str, seed: int, *, rate: float, **more: Any) -> ServerTrial:
    """Makes a trial.

    Args:
        panel: Its panel.
        method: One of `METHODS`.
        seed: Its seed.
        rate: Learning rate.
        more: Fields that differ.
    """
    own: dict[str, Any] = {"data": "digits", "workers": 8, "slower": 5.0, "drops": (), "learning_rate": rate} | METHODS[method]
    return ServerTrial(panel=panel, series=method, x=None, seed=seed, **own | more)
