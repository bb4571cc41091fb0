"""The recipes of the HSIC bottleneck paper: the authors' settings, the fair ones, and curves that go on where they were stopped."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import cases
import pytest
import torch
from cases import assert_same

import lockfree as lf
from lockfree.data import Split
from lockfree.experiment import load_once
from lockfree.recipes import RECIPES, RuleTrial
from lockfree.recipes.trial import as_pixels, held_out

ROOT = Path(__file__).parent.parent
NAMES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
IMAGES = {"mnist": 60_000, "fashion-mnist": 60_000, "cifar10": 50_000}
PLAIN = {"classifier": False}
FIGURES = [  # what the authors ran: units, batch size, rate, the classifier's, sigma, balance, fields of the network
    ("hsic-unformatted", "backprop", 1024, 256, 0.05, None, None, None, {}),
    ("hsic-unformatted", "HSIC", 1024, 256, 1e-3, None, 6.0, (200.0, 1000.0, 2500.0), PLAIN),
    ("hsic-format", "backprop", 128, 256, 1e-3, None, None, None, {}),
    ("hsic-format", "HSIC", 128, 256, 1e-4, 0.005, 5.0, 50.0, {"last": 128}),
    *(
        ("hsic-format", f"HSIC {n}", 256, 256, 1e-4, 0.005, 5.0, 50.0, {"last": 128})
        for n in ("1 epoch", "5 epochs", "10 epochs")
    ),
    *(("hsic-format", f"last {n}", 256, 256, 2e-4, 0.01, 5.0, 50.0, {"last": n}) for n in (8, 32, 64)),
    *(("hsic-sigma", f"sigma {one:g}", 128, 512, 1e-4, 0.004, one, 50.0, {"last": 64}) for one in (1.0, 5.0, 10.0)),
    ("hsic-sigma", "combined", 128, 512, 1e-4, 0.004, (1.0, 5.0, 10.0), 50.0, {"last": 64, "count": 3}),
    ("hsic-resnet", "HSIC", 64, 512, 0.01, None, 5.0, (200.0, 500.0, 500.0), {}),
    ("hsic-resnet", "backprop", 64, 512, 0.01, None, None, None, {}),
    ("hsic-depth", "backprop", 1024, 256, 0.01, None, None, None, {"batch_norm": True}),
    ("hsic-depth", "HSIC", 1024, 256, 1e-3, None, 6.0, (2500.0, 1000.0, 500.0), PLAIN | {"batch_norm": True}),
    ("hsic-depth", "backprop, no BatchNorm", 1024, 256, 0.01, None, None, None, {"batch_norm": False}),
    ("hsic-depth", "HSIC, no BatchNorm", 1024, 256, 1e-3, None, 6.0, (2500.0, 1000.0, 500.0), PLAIN | {"batch_norm": False}),
]
COMBINED_TOP = {"momentum": 0.9, "weight_decay": 1e-4}
NETWORKS = {"hsic-resnet": ("residual", 8), "hsic-depth": ("normalised", 50)}


@pytest.mark.parametrize("row", FIGURES, ids=lambda row: f"{row[0]} {row[1]}")
def test_the_paper_panels_of_full_recipes_have_the_authors_settings(row):
    name, series, units, batch, rate, top_rate, sigma, balance, network = row
    trials = [trial for trial in RECIPES[name]("full").trials if trial.panel.endswith(", paper")]
    assert {trial.series for trial in trials} == {one[1] for one in FIGURES if one[0] == name}
    for trial in (trial for trial in trials if trial.series == series):
        wanted = balance[list(NAMES).index(trial.data)] if isinstance(balance, tuple) else balance
        readout = "one-hot" if PLAIN.items() <= network.items() else None
        epochs = int(series.split()[1]) if "epoch" in series else 5
        before = 0 if sigma is None or readout else epochs
        assert trial.panel == f"{NAMES[trial.data]}, paper"
        assert (trial.optimizer, trial.shuffle, trial.pixels, trial.samples, trial.drops) == ("sgd", False, True, None, ())
        kind = "side-by-side" if series == "combined" else "normalised"
        assert (trial.network, trial.layers) == NETWORKS.get(name, (kind, 7))
        assert (trial.units, trial.batch_size, trial.network_fields) == (units, batch, network)
        top = {} if top_rate is None else {"lr": top_rate} | (COMBINED_TOP if series == "combined" else {})
        assert (trial.learning_rate, trial.top) == (rate, top)
        assert tuple(trial.fields.get(field) for field in ("sigma", "balance", "readout")) == (sigma, wanted, readout)
        assert (trial.hidden_epochs, trial.epochs, trial.order_on_evaluated) == (before, before + 5, bool(readout))
        assert trial.weight_decay == (1e-5 if series.startswith("backprop") else 1e-3)


def test_the_fair_panels_have_the_rates_that_held_out_images_chose():
    chosen = json.loads((ROOT / "benchmarks" / "results" / "fair_rates.json").read_text())["accuracy"]
    assert chosen.keys() == {row[0] for row in FIGURES}
    for name, by_data in chosen.items():
        for data, by_method in by_data.items():
            trials = [one for one in RECIPES[name]("small").trials if (one.data, one.panel) == (data, f"{NAMES[data]}, fair")]
            assert trials
            for trial in trials:
                tried = by_method.get(trial.series) or by_method["HSIC"]
                assert len(tried) == 3
                assert tried[f"{trial.learning_rate:g}"] == max(tried.values()), trial.name


def test_a_trial_that_holds_images_out_never_sees_the_test_set():
    dataset = load_once("digits", "cpu")
    kept = held_out(dataset, 100)
    assert len(kept.train.inputs) + 100 == len(dataset.train.inputs)
    assert_same(kept.test.inputs, dataset.train.inputs[-100:])
    assert_same(kept.train.targets, dataset.train.targets[:-100])


@pytest.mark.parametrize("budget", ["smoke", "small", "full"])
@pytest.mark.parametrize("name", sorted({row[0] for row in FIGURES}))
def test_every_trial_freezes_after_its_hidden_epochs_and_shows_the_rest(name, budget):
    recipe = RECIPES[name](budget)
    keys = recipe.keys()
    for trial in recipe.trials:
        epoch = -(-(trial.samples or IMAGES[trial.data]) // trial.batch_size)
        assert trial.fields.get("format_after", 0) == trial.hidden_epochs * epoch
        shown = [x for panel, x, series in keys if (panel, series) == (trial.panel, trial.series)]
        assert shown == list(range(1, trial.epochs - trial.hidden_epochs + 1))
    assert {trial.panel.split(", ")[1] for trial in recipe.trials} == {"paper", "fair"}


CURVE = RuleTrial(
    panel="digits", series="HSIC", x=None, seed=0, data="digits", samples=300, network="normalised", layers=3, units=16,
    rule="hsic", fields={"balance": 20.0, "format_after": 2 * 5}, epochs=4, hidden_epochs=2, batch_size=64, shuffle=False,
    pixels=True, optimizer="sgd", learning_rate=1e-3, top={"lr": 0.01, "momentum": 0.9}, drops=(),
)  # fmt: skip
ONE_HOT = replace(
    CURVE, fields={"readout": "one-hot"}, network_fields={"classifier": False}, hidden_epochs=0, top={},
    order_on_evaluated=True,
)  # fmt: skip
COMBINED = replace(
    CURVE, network="side-by-side", network_fields={"last": 8, "count": 2}, fields={"sigma": (1.0, 5.0), "format_after": 10}
)


@pytest.mark.parametrize("trial", [CURVE, ONE_HOT, COMBINED], ids=["format", "one-hot", "combined"])
def test_a_curve_has_an_error_for_each_epoch_and_goes_on_where_it_was_stopped(trial, tmp_path, monkeypatch):
    whole = trial.run(tmp_path / "whole")
    assert len(whole["curve"]) == trial.epochs - trial.hidden_epochs
    assert whole["curve"][-1] == whole["test_error"]
    assert whole["steps"] == 4 * 5
    assert replace(trial, hidden_epochs=0, series="all").run(tmp_path / "all")["curve"][trial.hidden_epochs :] == whole["curve"]
    step = lf.Learner.step
    for stop in (8, 13, 15):
        count = []

        def interrupted(self, x, y, *, count=count, stop=stop):
            count.append(1)
            if len(count) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, x, y)

        monkeypatch.setattr(lf.Learner, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trial.run(tmp_path / str(stop))
        monkeypatch.undo()
        assert trial.run(tmp_path / str(stop)) | {"seconds": 0} == whole | {"seconds": 0}


def test_format_training_of_a_trial_moves_the_classifier_alone_at_its_own_rate():
    dataset = load_once("digits", "cpu")
    learner = CURVE.learner(dataset)
    assert [(group["lr"], group["momentum"]) for group in learner.optimizer.param_groups] == [(1e-3, 0), (0.01, 0.9)]
    assert [id(p) for p in learner.optimizer.param_groups[1]["params"]] == [id(p) for p in learner.model[2].parameters()]
    x, y = dataset.train.inputs[:64], dataset.train.targets[:64]
    for step in range(12):
        before = cases.copy_of(learner.model)
        learner.step(x, y)
        moved = {
            name.split(".")[0] for name, value in learner.model.state_dict().items() if not torch.equal(value, before[name])
        }
        assert moved == ({"0", "1"} if step < 10 else {"2"})


def test_pixels_are_from_nought_to_one():
    dataset = load_once("digits", "cpu")
    found = as_pixels(dataset)
    assert (float(found.train.inputs.min()), float(found.train.inputs.max())) == (0.0, 1.0)
    mean, sd = dataset.train.inputs.mean(), dataset.train.inputs.std()
    torch.testing.assert_close(
        (found.train.inputs - found.train.inputs.mean()) / found.train.inputs.std(), (dataset.train.inputs - mean) / sd
    )
    assert_same(found.test.targets, dataset.test.targets)
    x = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0], x[1, :, 0, 0] = 0.0, 1.0
    shift, scale = torch.tensor([0.1, 0.5, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 2.0])[:, None, None]
    parts = Split((x - shift) / scale, torch.zeros(20, dtype=torch.int64))
    again = as_pixels(replace(dataset, train=parts, test=Split(parts.inputs[3:5], parts.targets[3:5])))
    torch.testing.assert_close(again.train.inputs, x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again.test.inputs, x[3:5], rtol=1e-5, atol=1e-6)
