"""Recipes: what they run, what they write, and that they go on where they were stopped."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

import lockfree as lf
from lockfree.cli import main
from lockfree.experiment import load_once
from lockfree.recipes import RECIPES, Recipe, RuleTrial, picture, run

BUDGETS = ("smoke", "small", "full")
TINY = RuleTrial(
    panel="digits", series="cdni", x=1, seed=0, data="digits", layers=3, units=16, rule="cdni", steps=30, batch_size=64
)


def recipe_of(*trials, **fields):
    about = {"name": "tiny", "title": "Tiny", "reference": "nobody", "budget": "smoke", "scope": "nothing", "x_label": "x"}
    return Recipe(**about, trials=trials, **fields)


def learned(recipe, folder, workers=1):
    recipe.open(folder)
    told = []
    results = run(recipe, folder, workers=workers, told=lambda trial, result: told.append(trial.name))
    assert sorted(told) == sorted(trial.name for trial in recipe.trials)
    return {name: {k: v for k, v in result.items() if k != "seconds"} for name, result in results.items()}


@pytest.mark.thinned(1)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_trial_of_every_recipe_can_be_made(name, budget):
    recipe = RECIPES[name](budget)
    assert recipe.name == name
    assert recipe.budget == budget
    dataset = load_once("digits", "cpu")
    for trial in recipe.trials:
        if isinstance(trial, RuleTrial) and trial.seed == 0 and trial.network == "fcn":
            narrow = {"hidden_units": 8} if trial.rule in ("dni", "cdni") else {}
            small = replace(trial, data="digits", units=8, fields=trial.fields | narrow)
            assert len(small.learner(dataset).cells) == trial.layers
    if budget != "smoke":
        assert set(recipe.paper) <= set(recipe.keys())


def test_table_one_is_whole():
    recipe = RECIPES["dni-table1"]("full")
    assert {(trial.panel, trial.layers) for trial in recipe.trials} == {
        *(("MNIST FCN", n) for n in (3, 4, 5, 6)),
        *(("CIFAR-10 FCN", n) for n in (3, 4, 5, 6)),
        *((f"{data} CNN", n) for data in ("MNIST", "CIFAR-10") for n in (3, 4)),
    }
    assert {trial.series for trial in recipe.trials} == {"no backprop", "backprop", "DNI", "cDNI"}
    assert all(trial.steps == 500_000 and trial.batch_size == 256 and trial.learning_rate == 3e-5 for trial in recipe.trials)
    assert len(recipe.paper) == len(recipe.keys()) == 48


def test_results_do_not_depend_on_how_many_run_at_a_time(tmp_path):
    trials = [replace(TINY, seed=seed, rule=rule, series=rule) for rule in ("backprop", "cdni", "frozen") for seed in (0, 1)]
    alone = learned(recipe_of(*trials), tmp_path / "one", workers=1)
    assert learned(recipe_of(*trials), tmp_path / "two", workers=2) == alone
    # what is done is not done again
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*.json")}
    assert learned(recipe_of(*trials), tmp_path / "one", workers=2) == alone
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_trial_that_was_stopped_goes_on_bit_identically(tmp_path, monkeypatch):
    trial = replace(TINY, steps=120, fields={"update_probability": 0.5, "noise": 0.5})
    whole = trial.run(tmp_path / "whole")
    step, count = lf.Learner.step, []

    def interrupted(self, x, y):
        count.append(1)
        if len(count) == 47:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, x, y)

    monkeypatch.setattr(lf.Learner, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trial.run(tmp_path / "stopped")
    monkeypatch.undo()
    again = trial.run(tmp_path / "stopped")
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    assert again["steps"] == whole["steps"] >= 120


def test_a_folder_with_other_settings_is_not_taken_for_this_trial(tmp_path):
    TINY.run(tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds a trial with units=16, not 8: choose another --out, or delete it"):
        replace(TINY, units=8).run(tmp_path / "a")


def test_without_backprop_only_the_last_block_learns():
    dataset = load_once("digits", "cpu")
    learner = replace(TINY, rule="frozen").learner(dataset)
    before = [p.clone() for p in learner.model.parameters()]
    learner.model.train()
    for _ in range(3):
        learner.step(dataset.train.inputs[:64], dataset.train.targets[:64])
    moved = [not torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True)]
    assert moved == [False] * (len(moved) - 2) + [True, True]


def test_results_stand_beside_the_paper_s(tmp_path):
    trials = [replace(TINY, seed=seed) for seed in (0, 1)] + [replace(TINY, series="backprop", rule="backprop")]
    recipe = recipe_of(*trials, paper={("digits", 1, "cdni"): 2.5}, source="made up")
    results = {trial.name: {"test_error": 3.0 + trial.seed, "train_error": 1.0, "seconds": 2.0} for trial in trials}
    recipe.open(tmp_path / "a")
    summary = recipe.write(tmp_path / "a", results)
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == summary
    assert (tmp_path / "a" / "plot.png").read_bytes().startswith(b"\x89PNG")
    (cdni, backprop) = summary["entries"]
    assert (cdni["mean"], cdni["sd"], cdni["seeds"], cdni["paper"]) == (3.5, pytest.approx(0.5**0.5), [0, 1], 2.5)
    assert (backprop["mean"], backprop["sd"], backprop["paper"]) == (3.0, None, None)
    header, rows = recipe.rows(summary)
    assert header == ["", "x", "cdni", "backprop"]
    assert rows == [["digits", "1", "3.50 ± 0.71 (2.5)", "3.00"]]


def test_half_the_results_are_shown_as_far_as_they_go(tmp_path):
    trials = [TINY, replace(TINY, x=2)]
    recipe = recipe_of(*trials)
    summary = recipe.summary({TINY.name: {"test_error": 3.0, "train_error": 1.0, "seconds": 2.0}})
    assert [row[2] for row in recipe.rows(summary)[1]] == ["3.00", "-"]
    recipe.plot(summary, tmp_path / "plot.png")


def complaint(capsys, *arguments):
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) == 1
    return said.err


def test_bad_input_gets_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "unknown recipe 'dni-table': did you mean 'dni-table1'" in complaint(capsys, "reproduce", "dni-table")
    assert "smoke" in complaint(capsys, "reproduce", "dni-table1", "--budget", "tiny")
    assert "--workers 0: give 1 or more" in complaint(capsys, "reproduce", "dni-table1", "--workers", "0")
    assert "no device 'cuda:77'" in complaint(capsys, "reproduce", "dni-table1", "--device", "cuda:77")
    monkeypatch.setenv("LOCKFREE_DATA", str(tmp_path / "nowhere"))
    assert "lockfree data fetch mnist" in complaint(capsys, "reproduce", "dni-table1")
    assert not list(tmp_path.iterdir())


def test_another_recipe_s_folder_is_refused(tmp_path):
    recipe_of(TINY).open(tmp_path / "a")
    with pytest.raises(ValueError, match="holds another run, not other with budget smoke: choose another --out"):
        replace(recipe_of(TINY), name="other").open(tmp_path / "a")
    recipe_of(TINY).open(tmp_path / "a")


@pytest.fixture
def mnist():
    try:
        load_once("mnist", "cpu")
    except ValueError as missing:
        pytest.skip(f"{missing}"[:60])


def reproduce(*arguments):
    command = [sys.executable, "-m", "lockfree", "reproduce", "dni-sparse-updates", "--budget", "smoke", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("mnist")
def test_ctrl_c_ends_a_recipe_and_the_same_command_goes_on(tmp_path):
    undisturbed = reproduce("--out", tmp_path / "a", "--workers", "1", "--json")
    out, err = undisturbed.communicate(timeout=120)
    assert undisturbed.returncode == 0, err
    stopped = reproduce("--out", tmp_path / "b", "--workers", "1")
    assert stopped.stdout is not None
    assert re.match(r"1/4 MNIST FCN, DNI, 0\.2, seed 0: error \d+\.\d\d % \(\d+ s\)", stopped.stdout.readline())
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=60)
    if stopped.returncode:  # it may have been done before the signal came
        assert stopped.returncode == 130
        assert said.splitlines()[-1] == "interrupted; checkpoints were written, go on with the same command"
    again = reproduce("--out", tmp_path / "b", "--json")
    ours, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    whole, resumed = json.loads(out), json.loads(ours)
    assert len(whole["entries"]) == 4
    assert [e["values"] for e in resumed["entries"]] == [e["values"] for e in whole["entries"]]
    assert (tmp_path / "b" / "plot.png").exists()


def test_ctrl_c_that_meets_a_worker_between_two_trials_stops_the_next(tmp_path, monkeypatch):
    runner = importlib.import_module("lockfree.recipes.run")
    monkeypatch.setattr(runner, "_interrupted", threading.Event())
    before = signal.signal(signal.SIGINT, runner._interrupt)
    try:
        assert runner._work(TINY, tmp_path / "first", "cpu")["steps"] >= 30
        os.kill(os.getpid(), signal.SIGINT)  # nothing is raised here, where the pool would print it
        with pytest.raises(KeyboardInterrupt):
            runner._work(TINY, tmp_path / "second", "cpu")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "second").exists()


def entry_of(panel, x, series, mean, paper=None):
    return {"panel": panel, "x": x, "series": series, "mean": mean, "sd": 0.1, "paper": paper}


def test_a_picture_has_lines_over_numbers_points_at_names_and_a_number_where_there_is_one_place():
    trials = [replace(TINY, panel=panel, x=x, series=one) for panel in ("many", "named", "one") for x in (1, 2) for one in "ab"]
    recipe = recipe_of(*trials, x_names={"named": {1: "first", 2: "second"}}, y_labels={"named": "share"})
    entries = [entry_of(panel, x, one, x + 0.5, 1.0) for panel in ("many", "named") for x in (1, 2) for one in "ab"]
    entries += [entry_of("one", 3, one, 7.25) for one in "ab"]
    figure = picture.draw(recipe, {"entries": entries})
    many, named, one = figure.axes
    assert [len(line.get_xdata()) for line in many.lines if line.get_linestyle() == "--"] == [2, 2]  # the paper's
    assert [label.get_text() for label in named.get_xticklabels()] == ["first", "second"]
    assert named.get_ylabel() == "share"
    assert sorted({float(x) for line in named.lines for x in line.get_xdata()})[:2] == pytest.approx([0.85, 1.15])
    assert [text.get_text() for text in one.texts] == ["7.25", "7.25"]
    assert one.get_xlabel() == "x: 3"


def test_what_is_derived_is_told_and_layers_without_a_figure_are_left_out():
    recipe = recipe_of(TINY, derived={"cdni": {"needs": "y"}, "dni": {"locks": "none"}})
    assert recipe.derived_rows() == (["", "needs", "locks"], [["cdni", "y", "-"], ["dni", "-", "none"]])
