"""The experiment of "Alternating synthetic and real gradients for neural language modeling" (Shang and Zhang 2019), in small."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockfree.choose import choose
from lockfree.recipes.findings import Difference
from lockfree.recipes.recipe import Recipe, seeds
from lockfree.recipes.recurrent_trial import RecurrentTrial

REAL, SYNTHETIC, ALTERNATING = "real", "synthetic", "alternating"

METHODS = {REAL: "none", SYNTHETIC: "dni-coordinatewise", ALTERNATING: "alternating"}
"""The bootstrap of each method; all have the same warm restarts."""


@dataclass(frozen=True, kw_only=True)
class _Size:
    """What a budget means.

    Attributes:
        seeds: How many.
        training: Settings of every trial.
    """

    seeds: int
    training: Mapping[str, Any]


# The first restart comes after an epoch, the next ones after 2, 4 and 8: real, synthetic, real, synthetic.
_SIZES = {
    "smoke": _Size(
        seeds=1,
        training={
            "units": 16, "embedding": 16, "horizon": 5, "batch": 8, "epochs": 4, "stretches": 4, "restart": 8,
            "task_fields": {"text": "shakespeare-sample", "length": 10, "vocabulary_size": 100, "evaluated": 300},
        },
    ),
    "small": _Size(
        seeds=3,
        training={
            "units": 128, "embedding": 128, "horizon": 10, "batch": 20, "epochs": 8, "stretches": 250, "restart": 1000,
            "learning_rate": 2e-3, "clip_norm": 0.25, "task_fields": {"length": 40, "vocabulary_size": 2000, "evaluated": 20_000},
        },
    ),
    "full": _Size(
        seeds=1,
        training={
            "units": 1150, "layers": 3, "embedding": 400, "horizon": 200, "batch": 20, "epochs": 320, "stretches": 250,
            "restart": 1250, "clip_norm": 0.25, "task_fields": {"length": 200, "vocabulary_size": 10_000},
        },
    ),
}  # fmt: skip


def alternating_lm(budget: str) -> Recipe:
    """Perplexity of a word model after each epoch: real, synthetic, and in turn real and synthetic gradients, with warm restarts.

    Args:
        budget: smoke, small or full (about the paper's sizes; not its regularisation).
    """
    size = choose(_SIZES, budget, "budget")
    one, panel = size.training, "Words"
    trials = [
        RecurrentTrial(
            panel=panel,
            series=series,
            x=None,
            seed=seed,
            data="word-lm",
            measure="test_perplexity",
            settings={**one, "task": "word-lm", "decay": "restarts", "bootstrap": bootstrap},
        )
        for series, bootstrap in METHODS.items()
        for seed in seeds(size.seeds)
    ]
    return Recipe(
        name="alternating-lm",
        title="Alternating synthetic and real gradients",
        reference="Shang and Zhang 2019, Alternating synthetic and real gradients for neural language modeling, arXiv 1902.10630",
        budget=budget,
        scope=f"{one.get('layers', 1)} LSTM of {one['units']}, {one['task_fields']['vocabulary_size']} words, horizon "
        f"{one['horizon']}, {one['epochs']} epochs of {one['stretches'] * one['task_fields']['length']} steps of {one['batch']} rows, "
        f"restarts after 1, 2, 4, ... times {one['restart']} chunks, {size.seeds} seed(s)",
        trials=trials,
        x_label="epoch",
        y_label="perplexity",
        from_zero=False,
        findings=[
            Difference(
                panel=panel,
                series=(SYNTHETIC, ALTERNATING),
                digits=2,
                x=one["epochs"],
                reference=REAL,
                reference_x=one["epochs"],
                shown="perplexity",
            )
        ],
    )
