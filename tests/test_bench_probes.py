"""The benchmark of probes: its shares are those of what it times, and it shows probes what the command line does."""

import sys
from dataclasses import replace

import pytest

from lockfree.bench import BENCHMARKS
from lockfree.bench import probes as run_probes
from lockfree.bench.probes import SETTINGS, Setting
from lockfree.probes import View

bench = sys.modules["lockfree.bench.probes"]  # the package has a function of this name

SMALL = Setting(model="mlp", shape=(1, 4, 4), rule="cdni", samples=1280, steps=2, rounds=3)
FOUR = ("gradient-quality", "alignment", "representation", "implied-loss")


def test_a_share_is_six_looks_over_five_epochs(monkeypatch):
    seconds = {
        "steps of 128": [0.2, 9.0, 0.2],
        "steps of 256": [0.3] * 3,
        **{name: [0.05, 0.05, 7.0] for name in FOUR},
        "all": [0.1] * 3,
    }
    asked = []

    def timed(things, *, rounds, warm_up):
        asked.append((list(things), rounds))
        return seconds

    monkeypatch.setattr(bench, "interleaved", timed)
    found = run_probes({"small": SMALL})
    assert asked == [(list(seconds), 3)]
    assert found["small_step_of_128_seconds"] == pytest.approx(0.1)
    assert found["small_step_of_256_seconds"] == pytest.approx(0.15)
    for name, look in {**dict.fromkeys(FOUR, 0.05), "all": 0.1}.items():
        assert found[f"small_{name}_seconds"] == look
        assert found[f"small_{name}_over_training_in_batches_of_128"] == pytest.approx(6 * look / (5 * 10 * 0.1))
        assert found[f"small_{name}_over_training_in_batches_of_256"] == pytest.approx(6 * look / (5 * 5 * 0.15))


def test_looks_are_at_what_the_command_line_shows(monkeypatch):
    seen = []

    def view(learner, x, y):
        seen.append((len(x), len(y)))
        return View(learner, x, y)

    monkeypatch.setattr(bench, "View", view)
    settings = {"cdni": SMALL, "backprop": replace(SMALL, rule="backprop", samples=20_000)}
    found = run_probes({name: replace(setting, rounds=1) for name, setting in settings.items()})
    assert seen == [(128, 128)] * 5 + [(400, 400)] * 4  # each alone and all at once; backpropagation has no synthesiser
    looks = [name for name in found if name.endswith("_seconds") and "_step_" not in name]
    assert looks == [f"cdni_{name}_seconds" for name in (*FOUR, "all")] + [
        f"backprop_{name}_seconds" for name in (*FOUR[:3], "all")
    ]
    assert all(found[name] > 0 for name in looks)
    assert found["rounds"] == {"cdni": 1, "backprop": 1}


def test_what_is_claimed_is_of_mnist_and_cifar10():
    assert BENCHMARKS["probes"] is run_probes
    assert {(one.model, one.shape, one.samples) for one in SETTINGS.values()} == {
        ("mlp", (1, 28, 28), 60_000),
        ("mlp", (1, 8, 8), 1_437),
        ("resnet20", (3, 32, 32), 50_000),
    }
