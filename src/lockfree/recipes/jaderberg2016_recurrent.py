"""The recurrent experiments of "Decoupled neural interfaces using synthetic gradients" (Jaderberg et al. 2016): Table 1."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lockfree.choose import choose
from lockfree.recipes.findings import Difference, Finding, Ratio
from lockfree.recipes.jaderberg2016 import REFERENCE
from lockfree.recipes.recipe import Key, Recipe, seeds
from lockfree.recipes.recurrent_trial import RecurrentTrial

SOURCE = "Table 1, as remembered, not checked against the paper"
TRUNCATED, DNI, AUXILIARY, SOLVED = "truncated", "DNI", "DNI + auxiliary", "solved DNI"

METHODS: dict[str, Mapping[str, Any]] = {
    TRUNCATED: {"bootstrap": "none"},
    DNI: {"bootstrap": "dni"},
    AUXILIARY: {"bootstrap": "dni", "auxiliary": True},
    SOLVED: {"bootstrap": "dni-solved"},
}
"""Settings of each method; the last one, whose linear synthesiser is solved for by least squares, is ours."""

_PAPER_HORIZONS = (2, 3, 4, 5)
_PAPER_COPY = {TRUNCATED: (7, 8, 10, 8), DNI: (16, 14, 18, 18), AUXILIARY: (16, 17, 19, 18)}
_PAPER_REPEAT = {TRUNCATED: (7, 5, 19, 23), DNI: (39, 33, 39, 59), AUXILIARY: (39, 59, 67, 59)}
_PAPER_TEXT_HORIZONS = (2, 3, 4, 5, 8, 20, 40)
_PAPER_TEXT = {
    TRUNCATED: (1.39, 1.38, 1.37, 1.37, 1.35, 1.35, 1.34),
    DNI: (1.37, 1.36, 1.35, 1.35, 1.34),
    AUXILIARY: (1.37, 1.36, 1.35, 1.35, 1.33),
}
_PAPER_FIELDS = {"scale": 0.1, "hidden_layers": 1, "reads": "output"}
"""The paper's synthesiser: it reads the LSTM's output, and has as many hidden units as that."""


@dataclass(frozen=True, kw_only=True)
class _Size:
    """What a budget means for one task.

    Attributes:
        horizons: T by method.
        seeds: How many.
        training: Settings of every trial.
        fields: Hyperparameters of the bootstrap by method.
        rates: Learning rates that differ from that of the training, by method and horizon.
    """

    horizons: Mapping[str, Sequence[int]]
    seeds: int
    training: Mapping[str, Any]
    fields: Mapping[str, Mapping[str, Any]]
    rates: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


def _everywhere(*horizons: int) -> dict[str, Sequence[int]]:
    return dict.fromkeys(METHODS, horizons)


# ---- copy and repeat copy -----------------------------------------------------------------------------------------------------

_SMOKE_COPY = {"units": 16, "batch": 16, "learning_rate": 5e-3, "epochs": 2, "stretches": 20}
# Chosen on seeds 100 and 101.
_SMALL_COPY = {
    "units": 64, "batch": 256, "learning_rate": 2e-3, "decay": "constant", "clip_norm": 1.0, "epochs": 10, "stretches": 400,
}  # fmt: skip
_LINEAR = {"hidden_layers": 0, "reads": "state", "scale": 0.7}
_SMALL_FIELDS: dict[str, Mapping[str, Any]] = {DNI: _LINEAR, AUXILIARY: _LINEAR, SOLVED: {"scale": 0.7}}
_PAPER_SETTINGS = {"units": 256, "batch": 256, "learning_rate": 7e-5, "decay": "constant", "epochs": 1000, "stretches": 1000}
_PAPER_BOOTSTRAPS = {DNI: _PAPER_FIELDS, AUXILIARY: _PAPER_FIELDS}

_CURVES = 3
"""The horizon at which all of training is shown."""


def _sizes(*horizons: int) -> dict[str, _Size]:
    """Returns what budgets mean, with the horizons of the small one."""
    at = {TRUNCATED: horizons, DNI: horizons, AUXILIARY: (_CURVES,), SOLVED: (_CURVES,)}
    return {
        "smoke": _Size(horizons=_everywhere(3), seeds=1, training=_SMOKE_COPY, fields=_SMALL_FIELDS),
        "small": _Size(horizons=at, seeds=3, training=_SMALL_COPY, fields=_SMALL_FIELDS),
        "full": _Size(horizons=_everywhere(*_PAPER_HORIZONS), seeds=3, training=_PAPER_SETTINGS, fields=_PAPER_BOOTSTRAPS),
    }


_COPY, _REPEAT = _sizes(2, 3, 5), _sizes(3, 5)


def dni_copy(budget: str) -> Recipe:
    """The longest sequences that an LSTM learns to say again, by the horizon that it is differentiated through.

    Args:
        budget: smoke, small or full.
    """
    return _curriculum("copy", "Copy", "length_solved", budget, choose(_COPY, budget, "budget"), _PAPER_COPY)


def dni_repeat_copy(budget: str) -> Recipe:
    """The longest sequences that an LSTM learns to say again several times, by the horizon that it is differentiated through.

    Args:
        budget: smoke, small or full.
    """
    size = choose(_REPEAT, budget, "budget")
    return _curriculum("repeat-copy", "Repeat copy", "sequence_solved", budget, size, _PAPER_REPEAT)


def _curriculum(
    task: str, panel: str, measure: str, budget: str, size: _Size, paper: Mapping[str, Sequence[float | int]]
) -> Recipe:
    curves = f"{panel}, T = {_CURVES}"
    trials = _trials(panel, task, measure, size, curves={_CURVES: curves})
    shown = "longest sequence solved"
    here = {(trial.panel, trial.x, trial.series) for trial in trials}
    one = size.training
    findings = [
        Ratio(
            panel=panel,
            series=[series for series in METHODS if series != TRUNCATED],
            digits=2,
            x=x,
            reference=TRUNCATED,
            shown=shown,
        )
        for x in size.horizons[TRUNCATED]
    ]
    return Recipe(
        name=f"dni-{task}",
        title=f"{panel}: how long a sequence is learnt",
        reference=f"{REFERENCE}, section 3.1 and Table 1",
        budget=budget,
        scope=f"an LSTM of {one['units']}, {one['epochs'] * one['stretches']} batches of {one['batch']}, Adam {one['learning_rate']:g}, "
        f"{size.seeds} seed(s)",
        trials=trials,
        x_label="horizon T",
        x_labels={curves: "epoch"},
        y_label=shown,
        digits=1,
        paper={key: figure for key, figure in _by_key(panel, paper, _PAPER_HORIZONS).items() if key in here},
        source=f"{SOURCE}; an LSTM of 256, batches of 256, Adam 7e-5; how long it was trained is not known",
        paper_note="trained for far longer",
        findings=findings,
    )


# ---- characters ---------------------------------------------------------------------------------------------------------------

CHARACTER_RATES: dict[str, Mapping[int, float]] = {
    TRUNCATED: {2: 4e-3, 4: 8e-3, 8: 1.6e-2, 16: 1.6e-2},
    DNI: {2: 8e-3, 4: 1.6e-2, 8: 1.6e-2},
}
"""Rates of the small budget, by method and horizon, that the validation part chose: `benchmarks/horizon_rates.py`. A test compares."""

_TEXT_TASK = {"text": "tinyshakespeare"}
_CHARACTERS = {
    "smoke": _Size(
        horizons=_everywhere(2),
        seeds=1,
        training={
            "units": 16, "batch": 16, "learning_rate": 1e-3, "epochs": 1, "stretches": 10,
            "task_fields": {"text": "shakespeare-sample", "evaluated": 500},
        },
        fields=_SMALL_FIELDS,
    ),
    "small": _Size(
        horizons={TRUNCATED: (2, 4, 8, 16), DNI: (2, 4, 8), AUXILIARY: (), SOLVED: ()},
        seeds=3,
        training={"units": 128, "batch": 32, "epochs": 6, "stretches": 150, "task_fields": _TEXT_TASK | {"length": 48}},
        # The paper's, with a smaller rate: on a stream without end one that sees the cells, which have no bound, chases its own guesses.
        fields={DNI: _PAPER_FIELDS | {"learning_rate": 3e-4}},
        rates=CHARACTER_RATES,
    ),
    "full": _Size(
        horizons={TRUNCATED: _PAPER_TEXT_HORIZONS} | dict.fromkeys((DNI, AUXILIARY, SOLVED), _PAPER_TEXT_HORIZONS[:5]),
        seeds=1,
        training={
            "units": 1024, "batch": 256, "learning_rate": 7e-5, "decay": "constant", "epochs": 100, "stretches": 1000,
            "task_fields": _TEXT_TASK | {"length": 40},
        },
        fields=_PAPER_BOOTSTRAPS,
    ),
}  # fmt: skip


def dni_char_lm(budget: str) -> Recipe:
    """Bits per character of an LSTM by the horizon that it is differentiated through; DNI at T beside truncation at 2 T.

    Args:
        budget: smoke, small or full.
    """
    size = choose(_CHARACTERS, budget, "budget")
    panel, shown, one = "Characters", "bits per character", size.training
    text = one["task_fields"]["text"]
    length = one["task_fields"].get("length", 40)
    rates = f"{one['learning_rate']:g}" if "learning_rate" in one else "with the best of three rates for each method and T"
    beyond = [x for x in size.horizons[DNI] if 2 * x in size.horizons[TRUNCATED]]
    guessing = [series for series in METHODS if size.horizons[series] and series != TRUNCATED]
    findings: list[Finding] = [
        Difference(panel=panel, series=guessing, x=x, reference=TRUNCATED, reference_x=times * x, shown=shown)
        for times in (1, 2)
        for x in beyond
    ]
    return Recipe(
        name="dni-char-lm",
        title="Bits per character by the horizon",
        reference=f"{REFERENCE}, section 3.1 and Table 1",
        budget=budget,
        scope=f"an LSTM of {one['units']} on {text}, {one['epochs'] * one['stretches']} stretches of {length} steps of "
        f"{one['batch']} rows, Adam {rates}, test part, {size.seeds} seed(s)",
        trials=_trials(panel, "char-lm", "test_bits_per_character", size),
        x_label="horizon T",
        log_x=True,
        y_label="bits per character",
        from_zero=False,
        digits=3,
        paper=_by_key(panel, _PAPER_TEXT, _PAPER_TEXT_HORIZONS) if budget == "full" else {},
        source=f"{SOURCE}; an LSTM of 1024 on the Penn Treebank: compare differences between methods, not values",
        paper_note="another text",
        findings=findings,
    )


# ---- both ---------------------------------------------------------------------------------------------------------------------


def _trials(panel: str, task: str, measure: str, size: _Size, curves: Mapping[int, str] | None = None) -> list[RecurrentTrial]:
    """Lists the trials; ``curves`` are the panels that show all of training, by the horizon."""
    return [
        RecurrentTrial(
            panel=panel,
            series=series,
            x=horizon,
            seed=seed,
            data=task,
            measure=measure,
            curve=(curves or {}).get(horizon),
            settings={
                **size.training,
                **METHODS[series],
                "task": task,
                "horizon": horizon,
                **({"learning_rate": rate} if (rate := size.rates.get(series, {}).get(horizon)) is not None else {}),
                "bootstrap_fields": size.fields.get(series, {}),
            },
        )
        for series in METHODS
        for horizon in size.horizons[series]
        for seed in seeds(size.seeds)
    ]


def _by_key(panel: str, figures: Mapping[str, Sequence[float | int]], horizons: Sequence[int]) -> dict[Key, float]:
    return {
        (panel, horizon, series): float(figure)
        for series, row in figures.items()
        for horizon, figure in zip(horizons, row, strict=False)
    }
