"""The recipes of the recurrent experiments: what a budget trains, what is compared with what, and what the findings say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lockfree.cli import main
from lockfree.recipes import RECIPES
from lockfree.recipes.findings import Difference, Ratio, rows
from lockfree.recipes.jaderberg2016_recurrent import AUXILIARY, CHARACTER_RATES, DNI, SOLVED, TRUNCATED
from lockfree.recipes.recurrent_trial import RecurrentTrial
from lockfree.recipes.trial import Point
from lockfree.recurrent import LeastSquaresGradient, NoBootstrap, SyntheticGradient

RATES = Path(__file__).parent.parent / "benchmarks" / "results" / "horizon_rates.json"
NAMES = ("dni-copy", "dni-repeat-copy", "dni-char-lm", "alternating-lm")


def trials(name, budget):
    found = RECIPES[name](budget).trials
    assert all(isinstance(trial, RecurrentTrial) for trial in found)
    return [trial for trial in found if isinstance(trial, RecurrentTrial)]


@pytest.mark.parametrize("budget", ["smoke", "small", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_methods_differ_in_what_stands_for_the_future_alone(name, budget):
    own = {"bootstrap", "bootstrap_fields", "auxiliary", "horizon", "seed"} | (
        {"learning_rate"} if name == "dni-char-lm" else set()
    )
    settings = [trial.experiment().config() for trial in trials(name, budget)]
    assert len({json.dumps({key: one[key] for key in one if key not in own}, sort_keys=True) for one in settings}) == 1


@pytest.mark.parametrize("name", ["dni-copy", "dni-repeat-copy", "dni-char-lm"])
def test_each_method_is_what_it_is_called(name):
    kinds = {TRUNCATED: NoBootstrap, DNI: SyntheticGradient, AUXILIARY: SyntheticGradient, SOLVED: LeastSquaresGradient}
    for trial in trials(name, "small"):
        experiment = trial.experiment()
        assert type(experiment.make_bootstrap()) is kinds[trial.series]
        assert (experiment.horizon, experiment.auxiliary) == (trial.x, trial.series == AUXILIARY)


@pytest.mark.parametrize("name", ["dni-copy", "dni-repeat-copy", "dni-char-lm"])
def test_the_full_budget_has_the_paper_s_settings(name):
    for trial in trials(name, "full"):
        experiment = trial.experiment()
        assert (experiment.learning_rate, experiment.batch, experiment.core) == (7e-5, 256, "lstm")
        assert experiment.units == (1024 if name == "dni-char-lm" else 256)
        if trial.series in (DNI, AUXILIARY):
            bootstrap = experiment.make_bootstrap()
            assert isinstance(bootstrap, SyntheticGradient)
            assert (bootstrap.scale, bootstrap.hidden_layers, bootstrap.reads) == (0.1, 1, "output")


def test_three_seeds_of_truncation_at_twice_the_horizon_stand_beside_dni():
    small = trials("dni-char-lm", "small")
    at = {series: {trial.x for trial in small if trial.series == series} for series in (TRUNCATED, DNI)}
    assert {2, 4, 8} <= at[DNI]
    assert {2 * x for x in at[DNI] if x} <= at[TRUNCATED]
    assert {trial.seed for trial in small} == {0, 1, 2}
    asked = [
        (one.x, one.reference, one.reference_x)
        for one in RECIPES["dni-char-lm"]("small").findings
        if isinstance(one, Difference)
    ]
    assert {(x, TRUNCATED, 2 * x) for x in (2, 4, 8)} <= set(asked)


def test_rates_are_those_that_the_validation_part_chose():
    tried: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for name, bits in json.loads(RATES.read_text())["bits_per_character"].items():
        series, horizon, rate = name.split("|")
        tried.setdefault((series, int(horizon)), []).append((bits, float(rate)))
    assert {len(one) for one in tried.values()} == {3}
    chosen = {(series, horizon): rate for series, rates in CHARACTER_RATES.items() for horizon, rate in rates.items()}
    assert chosen == {key: min(one)[1] for key, one in tried.items()}
    assert {(trial.series, trial.x) for trial in trials("dni-char-lm", "small")} == set(chosen)


def test_alternation_ends_in_a_synthetic_cycle_after_one_that_is_real():
    experiment = next(trial for trial in trials("alternating-lm", "small") if trial.series == "alternating").experiment()
    bootstrap = experiment.make_bootstrap()
    per_stretch = -(-experiment.make_task().length // experiment.horizon)
    last = experiment.epochs * experiment.stretches * per_stretch - 1
    assert [bootstrap.synthetic(update) for update in (0, last // 4 - 1, last // 2 - 1, last)] == [False, True, False, True]
    assert bootstrap.restarts.cycle(last + 1) == bootstrap.restarts.cycle(last) + 1


ONE = RecurrentTrial(
    panel="copy", series="a", x=3, seed=0, data="copy", measure="length_solved", curve="along",
    settings={"task": "copy", "epochs": 2, "bootstrap": "dni"},
)  # fmt: skip


def found(values):
    """Trials of series a and b with these figures, seed by seed, and their results."""
    return [
        (replace(ONE, series=series, seed=seed, x=x), {"length_solved": value, "curve": [0.0, value]})
        for (series, x), numbers in values.items()
        for seed, value in enumerate(numbers)
    ]


def test_a_trial_shows_its_end_and_its_curve():
    assert ONE.points == [Point("copy", 3), Point("along", 1), Point("along", 2)]
    ((trial, result),) = found({("a", 3): [5.0]})
    assert [trial.reading(result, point) for point in trial.points] == [5.0, 0.0, 5.0]
    assert trial.told(result) == "length solved 5"


def test_a_ratio_of_means_has_fieller_s_interval():
    ratio = Ratio(panel="copy", series=["a"], digits=2, x=3, reference="b", shown="length")
    said = ratio.find(found({("a", 3): [2.0, 2.2, 1.8, 2.0], ("b", 3): [1.0, 1.1, 0.9, 1.0]}))
    assert said["figures"]["a"] == {"mean": 2.0, "low": pytest.approx(2.0), "high": pytest.approx(2.0), "seeds": [0, 1, 2, 3]}
    assert rows([said])[1] == [["copy", "3: length, times that of b", "2.00 (2.00 to 2.00)"]]
    assert ratio.find(found({("a", 3): [2.0], ("b", 3): [0.0]}))["figures"]["a"] is None
    assert ratio.find(found({("a", 3): [2.0]}))["figures"]["a"] is None


def test_a_difference_is_of_paired_seeds_and_may_look_elsewhere():
    difference = Difference(panel="copy", series=["a"], x=2, reference="b", reference_x=4, shown="bits")
    said = difference.find(found({("a", 2): [1.0, 2.0, 3.0], ("b", 4): [0.5, 1.4, 2.6], ("b", 2): [9.0, 9.0, 9.0]}))
    figure = said["figures"]["a"]
    assert figure["mean"] == pytest.approx(0.5)
    half = 4.302652729911275 * 0.1 / 3**0.5  # t of 2 degrees of freedom, and the standard deviation of 0.5, 0.6, 0.4
    assert (figure["low"], figure["high"]) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert said["what"] == "2: bits, less that of b at 4"
    assert said["digits"] == 3


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", NAMES)
def test_smoke_runs_from_the_command_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCKFREE_DATA", str(tmp_path / "nothing"))
    assert main(["reproduce", name, "--budget", "smoke", "--out", str(tmp_path / "a"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert all(entry["mean"] is not None for entry in summary["entries"])
    assert (tmp_path / "a" / "plot.png").exists()


def test_a_panel_of_curves_has_an_axis_of_its_own():
    recipe = RECIPES["dni-copy"]("smoke")
    header, lines = recipe.rows(recipe.summary({}))
    assert header[:2] == ["", "horizon T"]
    assert [line[:2] for line in lines] == [["Copy", "3"], ["Copy, T = 3", "epoch 1"], ["Copy, T = 3", "epoch 2"]]
