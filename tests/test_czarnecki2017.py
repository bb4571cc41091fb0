"""Recipes on what synthetic gradients do: settings, figures of layers, what is derived, and what follows from several entries."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch.nn import functional as F

from lockfree import rules
from lockfree.cli import main
from lockfree.convert import convert
from lockfree.experiment import load_once
from lockfree.probes import GradientQuality, ImpliedLoss, Representation, View
from lockfree.recipes import RECIPES, LayerTrial, LinearTrial, Recipe
from lockfree.recipes.czarnecki2017 import DEEP_METHODS, DEEP_RATES
from lockfree.recipes.findings import ChangeAbove, Farthest, Rise
from lockfree.recipes.layer_trial import MEASURES
from lockfree.recipes.linear_trial import SAMPLES, TASKS
from lockfree.recipes.rule_trial import LOOKED_AT, one_vs_all
from lockfree.recipes.trial import Point
from lockfree.run import Run

RATES = Path(__file__).parent.parent / "benchmarks" / "results" / "deep_rates.json"
TINY = LayerTrial(
    panel="digits",
    series="cdni",
    x=4,
    seed=0,
    data="digits",
    layers=4,
    units=16,
    rule="cdni",
    epochs=2,
    batch_size=64,
    measures={"credit": "cosine", "alike": "neighbours", "class": "classes", "read": "readout", "belief": "implied"},
)
LINEAR = LinearTrial(panel="tiny", series="backprop", x=0, seed=0, task="noisy", features=3, rule="backprop", steps=400)


def trained(trial, folder):
    return trial.run(folder)


# ---- settings ----------------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_everything_that_can_stand_for_a_gradient():
    recipe = RECIPES["sg-table"]("small")
    facts = recipe.derived
    assert list(facts) == list(dict.fromkeys(trial.series for trial in recipe.trials))
    assert {one["rule"] for one in facts.values()} == {"noise", "kickback", "fa", "dfa", "pred", "dni", "cdni", "backprop"}
    by_locks = {}
    for method, one in facts.items():
        by_locks.setdefault(one["locks kept"], set()).add(method)
    assert by_locks == {
        "forward": {"noise", "local classifier", "loss critic", "synthetic gradient", "synthetic gradient, label"},
        "forward, update": {"direct feedback alignment"},
        "forward, update, backward": {"kickback", "feedback alignment", "true gradient"},
    }
    assert facts["noise"]["credit needs"] == "h"
    assert facts["local classifier"]["credit needs"] == "h, y"
    assert facts["loss critic"]["what estimates it learns from"] == "h, y, error at the output"
    header, rows = recipe.derived_rows()
    assert len(header) == 7
    assert {len(row) for row in rows} == {7}


def test_artificial_tasks_come_in_2_and_100_dimensions_and_four_models():
    recipe = RECIPES["sg-artificial"]("full")
    assert {trial.panel for trial in recipe.trials} == {
        f"{a}, {b}" for a in ("linear", "deep linear") for b in ("MSE", "log loss")
    }
    assert {(trial.task, trial.features) for trial in recipe.trials} == {(task, n) for task in TASKS for n in (2, 100)}
    deep = {trial.hidden for trial in recipe.trials if trial.panel.startswith("deep") and trial.rule != "optimum"}
    assert deep == {10}
    assert {trial.hidden for trial in recipe.trials if trial.rule == "optimum"} == {0}


def test_deep_networks_have_their_synthesiser_half_way():
    for trial in RECIPES["sg-deep"]("full").trials:
        if trial.rule != "backprop":
            (border,) = trial.fields["borders"]
            assert border + 1 == (trial.layers - 1) // 2
    assert {trial.layers - 1 for trial in RECIPES["sg-deep"]("full").trials} == {5, 10, 20, 50}


def test_twenty_layers_have_their_synthesiser_between_the_eleventh_and_the_twelfth():
    by_method = {trial.series: trial for trial in RECIPES["sg-representations"]("full").trials}
    one = by_method["SG between 11 and 12"]
    assert one.layers == 21
    assert one.fields == {"borders": (10,)}
    digits = load_once("digits", "cpu")
    learner = replace(one, data="digits", units=8).learner(digits)
    assert [cell.place.index for cell in learner.cells if cell.auxiliary is not None] == [10]


# ---- layers ------------------------------------------------------------------------------------------------------------------


def test_figures_of_layers_are_those_of_the_probes_at_the_end(tmp_path):
    result = trained(TINY, tmp_path)
    digits = load_once("digits", "cpu")
    learner = TINY.learner(digits)
    run = Run.open(tmp_path)
    learner.load_state_dict(run.checkpoint_at(max(run.steps))["learner"])
    view = View(learner, *(part[:LOOKED_AT] for part in digits.test))
    seen, credit = Representation().look(view), GradientQuality().look(view)
    layers = result["layers"]
    assert layers["cosine"] == pytest.approx(credit["cosine"][:-1])
    assert layers["neighbours"] == pytest.approx([seen["cka"][i][i + 1] for i in range(3)])
    assert layers["classes"] == pytest.approx(seen["class_cka"])
    assert layers["readout"] == pytest.approx([100 * one for one in seen["probe_accuracy"]])
    assert layers["implied"] == pytest.approx(ImpliedLoss().look(view)["correlation"])
    assert TINY.reading(result, Point("alike", 2)) == layers["neighbours"][1]
    assert TINY.reading(result, Point("digits", 4)) == result["test_error"]
    assert [point.x for point in TINY.points if point.panel == "class"] == [1, 2, 3, 4]
    assert [point.x for point in TINY.points if point.panel == "belief"] == [1, 2, 3]


def test_probes_of_a_trial_change_nothing(tmp_path):
    plain = replace(TINY, measures={}).run(tmp_path / "plain")
    assert trained(TINY, tmp_path / "seen")["test_error"] == plain["test_error"]


def test_an_averaged_figure_is_the_mean_over_epochs_and_layers_without_one_are_left_out(tmp_path):
    trial = replace(TINY, averaged=True, fields={"borders": (1,)}, measures={"credit": "cosine", "belief": "implied"})
    result = trained(trial, tmp_path)
    looks = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    cosines = [one["cosine"] for one in looks if one.get("probe") == "gradient-quality"]
    assert len(cosines) == 3  # at the start, which does not count, and after each epoch
    assert result["layers"]["cosine"] == pytest.approx(np.mean(cosines[1:], axis=0)[:3])
    assert [trial.reading(result, Point("belief", layer)) is None for layer in (1, 2, 3)] == [True, False, True]
    entries = Recipe(
        name="tiny", title="Tiny", reference="nobody", budget="smoke", scope="nothing", x_label="x", trials=[trial]
    ).summary({trial.name: result})["entries"]
    assert [e["mean"] is None for e in entries if e["panel"] == "belief"] == [True, False, True]


def test_an_unknown_measure_is_named():
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        replace(TINY, measures={"x": "cosin"})
    assert set(MEASURES) == {"cosine", "neighbours", "classes", "readout", "implied"}


# ---- linear models -----------------------------------------------------------------------------------------------------------


def test_the_optimum_is_that_of_ordinary_regression(tmp_path):
    for loss in ("MSE", "log loss"):
        trial = replace(LINEAR, rule="optimum", series="optimum", loss=loss)
        x, y = trial.task_data()
        if loss == "MSE":
            fit = LinearRegression().fit(x.numpy(), y.numpy()[:, 0])
            best = float(np.square(fit.predict(x.numpy()) - y.numpy()[:, 0]).mean() / 2)
        else:
            fit = LogisticRegression(C=np.inf, tol=1e-8).fit(x.numpy(), y.numpy()[:, 0])
            scores = torch.from_numpy(fit.decision_function(x.numpy()))
            best = float(F.binary_cross_entropy_with_logits(scores, y[:, 0].double()))
        assert trained(trial, tmp_path / loss)["loss"] == pytest.approx(best, rel=1e-4)


def test_a_linear_model_reaches_the_optimum_through_a_line_searched_synthesiser(tmp_path):
    best = trained(replace(LINEAR, rule="optimum", series="optimum"), tmp_path / "optimum")
    found = trained(replace(LINEAR, rule="cdni", series="SG", fields={"form": "line-search"}), tmp_path / "sg")
    assert found["loss"] == pytest.approx(best["loss"], rel=1e-4)
    assert found["gradient_norm"] < 1e-4


def test_tasks_are_what_they_are_called():
    flipped = {}
    for task in TASKS:
        x, y = replace(LINEAR, task=task, features=2).task_data()
        assert x.shape == (SAMPLES, 2)
        assert y.shape == (SAMPLES, 1)
        assert 0.4 < float(y.mean()) < 0.6
        flipped[task] = float(((x.sum(1) > 0) != y[:, 0].bool()).double().mean())
        if task == "xor":
            assert torch.equal(y[:, 0].bool(), x[:, 0] * x[:, 1] > 0)
    assert flipped["linear"] == 0
    assert 0.05 < flipped["noisy"] < 0.15
    assert 0.4 < flipped["random"] < 0.6


def test_a_linear_trial_that_breaks_has_no_figure(tmp_path):
    trial = replace(LINEAR, learning_rate=1e6)
    result = trained(trial, tmp_path)
    assert result["loss"] is None
    assert "not finite" in result["diverged"]
    assert trial.told(result) == "diverged"
    assert trial.reading(result, trial.points[0]) is None


# ---- losses and findings -----------------------------------------------------------------------------------------------------


def test_one_vs_all_is_a_sum_of_logistic_losses():
    scores, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1])
    p = scores.sigmoid()
    by_hand = -sum((p[n, c] if c == y[n] else 1 - p[n, c]).log() for n in range(6) for c in range(4)) / 6
    assert float(one_vs_all(scores, y)) == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize("loss", [F.cross_entropy, one_vs_all], ids=["softmax", "one-vs-all"])
def test_kickback_hears_nothing_of_a_softmax(loss):
    digits = load_once("digits", "cpu")
    model = replace(RECIPES["sg-table"]("smoke").trials[0], data="digits").learner(digits).model
    learner = convert(
        model, rules.get("kickback"), loss=loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        example_input=digits.train.inputs[:2],
    )  # fmt: skip
    gradients = learner.gradients(digits.test.inputs[:32], digits.test.targets[:32])
    below = [value for name, value in gradients.items() if not name.startswith("2.")]
    largest = max(float(value.abs().max()) for value in below)
    assert largest < 1e-6 if loss is F.cross_entropy else largest > 1e-4


def fake(series, seed, alike):
    trial = replace(TINY, series=series, seed=seed, measures={"alike": "neighbours"})
    return trial, {"layers": {"neighbours": alike}, "test_error": 1.0}


def test_the_share_of_change_at_the_top():
    found = [fake("sg", 0, [1.0, 0.9, 0.7]), fake("sg", 1, [0.8, 1.0, 0.8])]
    finding = ChangeAbove(panel="alike", series=["sg", "none"], layers=4, last=1)
    assert "33 if even" in finding.what
    figures = finding.find(found)["figures"]
    assert figures["sg"]["mean"] == pytest.approx(100 * (0.75 + 0.5) / 2)
    assert figures["sg"]["low"] < 50 < figures["sg"]["high"]
    assert figures["none"] is None


def test_the_rise_between_two_layers():
    found = [fake("sg", 0, [0.1, 0.9, 0.7]), fake("sg", 1, [0.3, 0.5, 0.7])]
    finding = Rise(panel="alike", series=["sg"], x=1, to=3, shown="CKA")
    assert finding.what == "CKA, rise from 1 to 3"
    figure = finding.find(found)["figures"]["sg"]
    assert figure["mean"] == pytest.approx(0.5)
    assert figure["low"] == pytest.approx(0.5 - 12.7062 * 0.1, abs=1e-3)  # t of one degree of freedom


@pytest.mark.skipif(not RATES.exists(), reason="rates have not been measured: python benchmarks/deep_rates.py")
def test_rates_of_deep_networks_are_those_that_held_out_images_chose():
    errors = json.loads(RATES.read_text())["errors"]
    for activation, chosen in DEEP_RATES.items():
        assert set(chosen) == set(DEEP_METHODS)
        for method, rate in chosen.items():
            tried = {name.split("|")[2]: error for name, error in errors.items() if name.split("|")[:2] == [activation, method]}
            assert len(tried) == 6
            assert float(min(tried, key=tried.__getitem__)) == rate


def test_the_largest_difference():
    found = [fake("sg", 0, [1.0, 0.9, 0.7]), fake("bp", 0, [0.9, 1.1, 0.6]), fake("sg", 1, [0.5, 0.5, 0.5])]
    figure = Farthest(panel="alike", series=["sg"], xs=[1, 2, 3], reference="bp", shown="CKA").find(found)["figures"]["sg"]
    assert figure["mean"] == pytest.approx(0.2)
    assert figure["seeds"] == [0]


# ---- the command -------------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ["sg-table", "sg-representations"])
def test_the_command_prints_what_is_derived_and_draws_further_pictures(name, tmp_path, capsys, monkeypatch):
    recipe = RECIPES[name]("smoke")
    small = replace(
        recipe, trials=[replace(one, data="digits", units=8, samples=None, epochs=1, batch_size=64) for one in recipe.trials]
    )
    monkeypatch.setitem(RECIPES, name, lambda budget: small)
    assert main(["reproduce", name, "--budget", "smoke", "--out", str(tmp_path), "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "layer 2" in out
    summary = json.loads((tmp_path / "results.json").read_text())
    assert set(summary["derived"]) == set(recipe.derived)
    if name == "sg-table":
        assert "backward locked" in out
    else:
        assert (tmp_path / "dissimilarities.png").stat().st_size > 5000
        assert "share of all change" in out
