"""Two networks on different clocks (Jaderberg et al. 2016): what it is worth that the faster one need not wait for the slower."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lockfree.choose import choose
from lockfree.recipes.clock_trial import ClockTrial
from lockfree.recipes.recipe import Recipe, seeds


class Chosen(NamedTuple):
    """What a method is trained with.

    Attributes:
        rate: Adam's learning rate, of both networks.
        scale: How much of the synthetic gradient A is given; nothing to the other methods.
    """

    rate: float
    scale: float = 1.0


METHODS = ("coupled", "decoupled", "severed")

CHOSEN: dict[str, Chosen] = {"coupled": Chosen(3e-3), "decoupled": Chosen(1e-3, 10.0), "severed": Chosen(1e-2)}
"""Rates and scale that held-out images chose: `benchmarks/clock_rates.py`. A test compares."""

PAPER: dict[str, Chosen] = {method: Chosen(1e-5, 10.0) for method in METHODS}
"""The paper's, as remembered, not checked."""


@dataclass(frozen=True, kw_only=True)
class _Size:
    """What a budget means.

    Attributes:
        data: Data set.
        seeds: How many.
        chosen: Rates and scale.
        training: Fields of each trial.
    """

    data: str
    seeds: int
    chosen: Mapping[str, Chosen]
    training: Mapping[str, Any]


SMALL: dict[str, Any] = {"period": 5, "units": 64, "batch_size": 32, "stretches": 6000, "readings": 20}
"""Fields of the trials of the small budget; `benchmarks/clock_rates.py` takes them too, but for how long."""

_SIZES = {
    "smoke": _Size(
        data="digits",
        seeds=1,
        chosen=CHOSEN,
        training={"period": 2, "units": 16, "batch_size": 16, "stretches": 60, "readings": 3, "evaluated": 64},
    ),
    "small": _Size(data="mnist", seeds=3, chosen=CHOSEN, training=SMALL),
    "full": _Size(
        data="mnist",
        seeds=3,
        chosen=PAPER,
        training={
            "period": 10,
            "units": 256,
            "batch_size": 256,
            "stretches": 200_000,
            "readings": 100,
            "synthesiser_rate": 1e-5,
        },
    ),
}


def dni_multi_network(budget: str) -> Recipe:
    """Errors of two networks that count on different clocks, by the steps of their image streams.

    Args:
        budget: smoke, small or full (the paper's sizes).
    """
    size = choose(_SIZES, budget, "budget")
    trials = [
        clock_trial(method, seed, size.chosen[method], data=size.data, **size.training)
        for method in METHODS
        for seed in seeds(size.seeds)
    ]
    one = trials[0]
    rates = ", ".join(f"{method} {size.chosen[method].rate:g}" for method in METHODS)
    return Recipe(
        name="dni-multi-network",
        title="Two networks on different clocks",
        reference="Jaderberg et al. 2016, arXiv 1608.05343, section on training a system of two networks",
        budget=budget,
        scope=f"{size.data}, T = {one.period}, {one.units} units, {one.stretches} stretches of {one.period**2} steps of {one.batch_size} "
        f"sequences, {size.seeds} seed(s); Adam {rates}; synthetic gradient times {size.chosen['decoupled'].scale:g}",
        trials=trials,
        x_label="steps of the image streams",
    )  # fmt: skip


def clock_trial(method: str, seed: int, chosen: Chosen, **more: Any) -> ClockTrial:
    """Makes a trial.

    Args:
        method: One of `METHODS`.
        seed: Its seed.
        chosen: Its rate and scale.
        more: Fields that differ.
    """
    return ClockTrial(
        panel="counting",
        series=method,
        x=None,
        seed=seed,
        coupling=method,
        learning_rate=chosen.rate,
        scale=chosen.scale if method == "decoupled" else 1.0,
        **more,
    )
