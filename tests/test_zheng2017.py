"""Recipes of many workers: settings, what they write, that a stopped trial begins anew, and the figures with their intervals."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lockfree.cli import main
from lockfree.data import Split
from lockfree.recipes import RECIPES, ServerTrial
from lockfree.recipes.findings import Recovery, TimeTo, mean_interval, ratio_interval, rows
from lockfree.recipes.server_trial import Augmented
from lockfree.recipes.stragglers import CHOSEN as RATES
from lockfree.recipes.trial import Point
from lockfree.recipes.zheng2017 import CHOSEN, METHODS, SHARED_RATE
from lockfree.staleness import DelayCompensation, consistency_from

ROOT = Path(__file__).parent.parent
NAMES = ("dc-asgd-cifar", "dc-asgd-sweep", "stragglers")
SHAPES = {"digits": (1, 8, 8), "fashion-mnist-sample": (1, 28, 28), "cifar10": (3, 32, 32)}
IMAGES = {"digits": 1437, "fashion-mnist-sample": 10_000, "cifar10": 50_000}
TINY = ServerTrial(
    panel="digits", series="ASGD", x=3, seed=0, data="digits", samples=320, workers=3, epochs=3, learning_rate=0.1, readings=5
)


def bare(result):
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.parametrize("budget", ["smoke", "small", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_every_trial_can_be_made_and_all_methods_see_as_many_samples(name, budget):
    recipe = RECIPES[name](budget)
    assert {trial.seed for trial in recipe.trials} == set(range(max(trial.seed for trial in recipe.trials) + 1))
    seen: dict[str, list[int]] = {}
    for trial in recipe.trials:
        assert isinstance(trial, ServerTrial)
        assert not trial.held_out
        trial.repair()
        updates = trial.updates(trial.samples or IMAGES[trial.data])
        together = trial.workers if consistency_from(trial.consistency).barrier else 1
        seen.setdefault(trial.panel, []).append(updates * together)
        assert max(seen[trial.panel]) - updates * together < trial.workers or together == 1
        if trial.seed == 0 and trial.workers <= 4:
            model = trial.model(SHAPES[trial.data], 10).eval()
            assert model(torch.zeros(2, *SHAPES[trial.data])).shape == (2, 10)
    for batches in seen.values():
        assert max(batches) - min(batches) < 32


def test_the_full_comparison_has_the_paper_s_settings():
    recipe = RECIPES["dc-asgd-cifar"]("full")
    for trial in recipe.trials:
        assert (trial.data, trial.network, trial.samples, trial.augment) == ("cifar10", "resnet20", None, True)
        assert (trial.batch_size, trial.epochs, trial.learning_rate, trial.drops) == (128, 160, 0.5, (0.5, 0.75))
    by_method = {trial.series: trial.repair() for trial in recipe.trials}
    assert by_method["DC-c"] == DelayCompensation(adaptive=False, strength=0.04, cap=None)
    assert by_method["DC-a"] == DelayCompensation(strength=2.0, decay=0.95, eps=1e-7, cap=None)
    assert {(trial.series, trial.x) for trial in recipe.trials} == {
        ("sequential", 1), *((method, workers) for method in ("SSGD", "ASGD", "DC-c", "DC-a") for workers in (4, 8))
    }  # fmt: skip
    assert recipe.paper.keys() == set(recipe.keys())
    assert recipe.paper["CIFAR-10, ResNet-20", 4, "DC-a"] == 8.19
    assert "as remembered, not checked" in recipe.source


def test_settings_are_those_that_held_out_images_chose():
    measured = json.loads((ROOT / "benchmarks" / "results" / "delay_rates.json").read_text())

    def least(table, method, workers, rate=None):
        """Returns (rate, λ0) with the least figure; of equals the smaller rate, then the smaller λ0."""
        tried = []
        for key, figure in table.items():
            its_method, its_workers, its_rate, strength = key.split("|")
            if (its_method, int(its_workers)) == (method, workers) and rate in (None, float(its_rate)):
                tried.append((figure, float(its_rate), float(strength) if strength else None))
        return min(tried, key=lambda one: (one[0], one[1], one[2] or 0.0))[1:]

    sweep = measured["dc-asgd-sweep"]
    alone = {float(key.split("|")[2]): error for key, error in sweep.items() if key.startswith("sequential|")}
    assert min(rate for rate, error in alone.items() if error <= min(alone.values()) + 0.5) == SHARED_RATE
    for method in METHODS:
        for workers in CHOSEN["own rate"][method]:
            assert CHOSEN["own rate"][method][workers] == least(sweep, method, workers)
            assert CHOSEN["same rate"][method][workers] == least(sweep, method, workers, SHARED_RATE)
    for method, rate in RATES["own rate"].items():
        assert rate == least(measured["stragglers"], method, 8)[0]
    assert set(RATES["same rate"].values()) == {RATES["own rate"]["ASP"]}


def test_a_strength_of_zero_is_plain_asynchronous_descent(tmp_path):
    plain = TINY.run(tmp_path / "plain")
    zero = replace(TINY, correction="dc-adaptive", fields={"strength": 0.0}).run(tmp_path / "zero")
    assert bare(zero) == bare(plain)
    assert plain["updates"] == 30
    assert plain["diverged"] is None


def test_the_barrier_takes_the_slowest_s_time_and_nobody_else_does(tmp_path):
    slow = replace(TINY, slower=5.0, shape=1e6, x=None, times=(0.0, 7.0, 1e9))
    waiting = replace(slow, consistency="bsp").run(tmp_path / "bsp")
    free = slow.run(tmp_path / "asp")
    assert waiting["simulated_seconds"] == pytest.approx(5.0 * waiting["updates"], rel=0.01)
    assert waiting["updates"] == 10
    assert free["simulated_seconds"] == pytest.approx(30 / 2.2, rel=0.1)
    assert waiting["delay"] == 0 < free["delay"]
    for result in (waiting, free):
        when, errors = zip(*result["curve"], strict=True)
        assert when[0] == 0.0
        assert list(when) == sorted(when)
        assert when[-1] == result["simulated_seconds"]
        assert errors[-1] == result["test_error"] == slow.reading(result, Point(slow.panel, 1e9))
        assert slow.reading(result, Point(slow.panel, 0.0)) == errors[0]
        last = max(place for place, one in enumerate(when) if one <= 7.0)
        assert slow.reading(result, Point(slow.panel, 7.0)) == errors[last]


def test_a_trial_that_was_stopped_begins_anew_and_comes_out_the_same(tmp_path, monkeypatch):
    whole = TINY.run(tmp_path / "whole")
    module = "lockfree.recipes.server_trial.error_of"
    looks = []

    def interrupted(model, split):
        looks.append(1)
        if len(looks) == 4:
            raise KeyboardInterrupt
        return 50.0

    with monkeypatch.context() as patch:
        patch.setattr(module, interrupted)
        with pytest.raises(KeyboardInterrupt):
            TINY.run(tmp_path / "stopped")
    assert bare(TINY.run(tmp_path / "stopped")) == bare(whole)


def test_augmented_images_are_moved_and_mirrored_and_a_trial_of_them_comes_out_the_same_again(tmp_path):
    image = torch.arange(1.0, 13.0).reshape(1, 1, 3, 4)
    images = Augmented(Split(image, torch.tensor([7])), padding=2)
    torch.manual_seed(0)
    drawn = {tuple(images[0][0].flatten().int().tolist()) for _ in range(400)}
    framed = torch.nn.functional.pad(image[0], (2, 2, 2, 2))
    crops = [framed[:, y : y + 3, x : x + 4] for y in range(5) for x in range(5)]
    assert drawn == {tuple(one.flatten().int().tolist()) for crop in crops for one in (crop, crop.flip(2))}
    assert (len(images), int(images[0][1])) == (1, 7)
    moved = replace(TINY, augment=True, epochs=1)
    first, again = (bare(moved.run(tmp_path / name)) for name in "ab")
    assert first == again != bare(replace(moved, augment=False).run(tmp_path / "c"))


def test_a_method_that_breaks_is_a_result(tmp_path):
    found = replace(TINY, learning_rate=1e9, readings=0).run(tmp_path / "broken")
    assert found["diverged"].startswith("training broke after")
    assert found["test_error"] > 50


@pytest.mark.parametrize("name", NAMES)
def test_a_smoke_run_gives_table_figures_and_intervals(name, tmp_path, monkeypatch, capsys):
    def alone(recipe, folder, *, workers, device, told):
        return {trial.name: trial.run(folder / "trials" / trial.name, device) for trial in recipe.trials}

    monkeypatch.setattr("lockfree.recipes.run", alone)
    assert main(["reproduce", name, "--budget", "smoke", "--out", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    recipe = RECIPES[name]("smoke")
    summary = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [(one["panel"], one["x"], one["series"]) for one in summary["entries"]] == recipe.keys()
    for entry in summary["entries"]:
        errors = entry["values"]
        assert entry["mean"] == statistics.fmean(errors)
        assert entry["interval"] == (list(mean_interval(errors)) if len(errors) > 1 else None)
    assert [one["what"] for one in summary["findings"]] == [one.what for one in recipe.findings]
    for finding in summary["findings"]:
        assert finding["what"] in shown
        assert set(finding["figures"]) <= {trial.series for trial in recipe.trials}
    assert (tmp_path / "a" / "plot.png").stat().st_size > 10_000


# ---- figures and their intervals ----------------------------------------------------------------------------------------------


def found(series, errors, x=4):
    return [
        (replace(TINY, series=series, x=x, seed=seed), {"test_error": error, "curve": [[0.0, 90.0], [10.0 + seed, error]]})
        for seed, error in enumerate(errors)
    ]


def test_recovery_is_a_share_of_mean_losses_of_paired_seeds():
    finding = Recovery(panel="digits", series=["DC-a"], x=4, reference="sequential", reference_x=1, baseline="ASGD")
    trials = [*found("sequential", [3.0, 4.0, 3.5], x=1), *found("ASGD", [13.0, 24.0, 15.5]), *found("DC-a", [5.0, 6.0, 5.5])]
    figure = finding.find(trials)["figures"]["DC-a"]
    won, lost = [8.0, 18.0, 10.0], [10.0, 20.0, 12.0]
    assert figure["mean"] == pytest.approx(100 * sum(won) / sum(lost))
    assert figure["loss"] == pytest.approx(14.0)
    assert (figure["low"], figure["high"]) == pytest.approx([100 * end for end in ratio_interval(won, lost) or ()])
    assert figure["low"] < figure["mean"] < figure["high"]
    assert (
        finding.find([*trials[:3], *found("ASGD", [3.0, 4.0, 3.0]), *trials[6:]])["figures"]["DC-a"]["mean"] is None
    )  # nothing is lost
    assert rows([finding.find(trials)])[1][0][2].startswith("86 (")


def test_the_interval_of_a_ratio_holds_what_student_s_t_does_not_tell_from_it():
    a, b = [8.0, 11.0, 10.0, 9.0], [10.0, 14.0, 13.0, 9.0]
    low, high = ratio_interval(a, b) or (0.0, 0.0)
    for ratio in (low, high):
        rest = [one - ratio * other for one, other in zip(a, b, strict=True)]
        interval = mean_interval(rest) or (1.0, 1.0)
        assert min(abs(end) for end in interval) == pytest.approx(0.0, abs=1e-9)
    assert ratio_interval(a, [1.0, -1.0, 1.0, -1.0]) is None
    assert ratio_interval([1.0], [1.0]) is None
    assert mean_interval([1.0]) is None


def test_time_to_an_error_is_told_only_where_every_seed_gets_there():
    finding = TimeTo(panel="digits", series=["BSP", "ASP"], error=5.0)
    figures = finding.find([*found("BSP", [4.0, 5.0]), *found("ASP", [4.0, 6.0])])["figures"]
    assert figures["BSP"]["mean"] == 10.5
    assert (figures["BSP"]["low"], figures["BSP"]["high"]) == mean_interval([10.0, 11.0])
    assert figures["ASP"]["mean"] is None
    assert figures["ASP"]["values"] == [10.0, None]
