"""The recipe of two networks on different clocks: settings, what a trial gives, that it goes on, and where its rates come from."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from lockfree.experiment import load_once
from lockfree.recipes import RECIPES, ClockTrial
from lockfree.recipes.clock_trial import PANELS
from lockfree.recipes.multi_network import CHOSEN, METHODS, PAPER, Chosen, clock_trial
from lockfree.recipes.trial import Point
from lockfree.recurrent import Coupled, Decoupled, Severed, TwoClocks

ROOT = Path(__file__).parent.parent
RATES = ROOT / "benchmarks" / "results" / "clock_rates.json"
TINY = clock_trial(
    "decoupled", 0, Chosen(1e-2, 10.0), data="digits", period=2, units=8, batch_size=8, stretches=12, readings=4, evaluated=32
)


def bare(result):
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.parametrize("budget", ["smoke", "small", "full"])
def test_methods_differ_in_how_they_learn_alone(budget):
    recipe = RECIPES["dni-multi-network"](budget)
    alike = {"panel", "data", "samples", "held_out", "period", "units", "hidden_layers", "batch_size", "stretches", "readings"}
    alike |= {"evaluated", "synthesiser_rate"}
    assert len({tuple(getattr(trial, name) for name in sorted(alike)) for trial in recipe.trials}) == 1
    assert {trial.series for trial in recipe.trials} == set(METHODS)
    for trial in recipe.trials:
        assert isinstance(trial, ClockTrial)
        assert (trial.held_out, trial.stretches % trial.readings) == (0, 0)
        chosen = (PAPER if budget == "full" else CHOSEN)[trial.coupling]
        assert trial.learning_rate == chosen.rate
        assert trial.coupling != "decoupled" or trial.scale == chosen.scale


def test_the_full_budget_has_the_paper_s_sizes():
    trial = RECIPES["dni-multi-network"]("full").trials[0]
    assert (trial.data, trial.units, trial.hidden_layers, trial.learning_rate) == ("mnist", 256, 2, 1e-5)
    assert PAPER["decoupled"].scale == 10.0


def test_the_networks_are_those_that_the_recipe_names():
    dataset = load_once("digits", "cpu")
    kinds = {"coupled": Coupled, "decoupled": Decoupled, "severed": Severed}
    for method, kind in kinds.items():
        learner = replace(TINY, coupling=method).learner(dataset)
        assert isinstance(learner.coupling, kind)
        assert (learner.horizon, learner.slow) == (2, 2)
        assert (learner.parts.a_readout.out_features, learner.parts.b_readout.out_features) == (3, 5)
    with pytest.raises(ValueError, match="unknown coupling 'cupled'"):
        replace(TINY, coupling="cupled").learner(dataset)


def test_a_result_holds_the_errors_of_both_at_every_reading(tmp_path):
    result = TINY.run(tmp_path / "a")
    assert TINY.steps == [12, 24, 36, 48]
    assert list(TINY.points) == [Point(panel, steps) for panel in PANELS for steps in TINY.steps]
    assert [line[0] for line in result["curve"]] == [0, *TINY.steps]
    assert result["updates"] == [24, 12]
    assert result["diverged"] is None
    last = result["curve"][-1]
    assert [TINY.reading(result, Point(panel, 48)) for panel in PANELS] == last[1:]
    assert result["test_error"] == last[2]
    assert all(0 <= error <= 100 for line in result["curve"] for error in line[1:])
    assert replace(TINY, coupling="coupled").run(tmp_path / "b")["updates"] == [12, 12]


def test_a_trial_that_was_stopped_goes_on_bit_identically(tmp_path, monkeypatch):
    whole = TINY.run(tmp_path / "whole")
    step, count = TwoClocks.step, []

    def interrupted(self, *stretch):
        count.append(1)
        if len(count) == 8:
            raise KeyboardInterrupt
        return step(self, *stretch)

    monkeypatch.setattr(TwoClocks, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TINY.run(tmp_path / "stopped")
    assert bare(TINY.run(tmp_path / "stopped")) == bare(whole)
    assert len(count) == 8 + 6  # the two readings that it had are not done again


def test_training_that_breaks_is_a_result(tmp_path):
    result = replace(TINY, learning_rate=1e38).run(tmp_path / "a")
    assert "lower the learning rate" in result["diverged"]
    assert TINY.reading(result, Point(PANELS[1], 48)) == result["curve"][-1][2]


def script():
    spec = importlib.util.spec_from_file_location("clock_rates", ROOT / "benchmarks" / "clock_rates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_is_tuned_over_the_same_rates():
    rates = script()
    trials = rates.grid()
    assert len({rates.key(trial) for trial in trials}) == len(trials) == 15
    tried = {method: {trial.learning_rate for trial in trials if trial.coupling == method} for method in METHODS}
    assert set(map(frozenset, tried.values())) == {frozenset(rates.RATES)}
    assert all(trial.held_out and trial.seed == 100 for trial in trials)
    result = {"curve": [[0, 90.0, 80.0]] + [[place, 50.0 if n < 4 else 20.0, 10.0] for n, place in enumerate(trials[0].steps)]}
    assert rates.figures(trials[0], result | {"diverged": None}) == {"odd": 20.0, "threes": 10.0, "both": 15.0}
    assert rates.figures(trials[0], result | {"diverged": "nan"})["both"] == 100.0


@pytest.mark.skipif(not RATES.exists(), reason="rates have not been measured: python benchmarks/clock_rates.py")
def test_settings_are_those_that_held_out_images_chose():
    errors = json.loads(RATES.read_text())["errors"]
    for method in METHODS:
        tried = [(figure["both"], *name.split("|")[1:]) for name, figure in errors.items() if name.split("|")[0] == method]
        _, rate, scale = min((both, float(rate), float(scale or 1.0)) for both, rate, scale in tried)
        assert CHOSEN[method] == Chosen(rate, scale)
