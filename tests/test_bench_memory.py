"""The memory benchmark: what a chain of equal blocks holds, counted and by the peak of a process of its own."""

import functools
import itertools
import sys

import pytest

from lockfree.bench import BENCHMARKS
from lockfree.bench import memory as run_memory
from lockfree.bench.memory import LOCAL, Size, process, saved

bench = sys.modules["lockfree.bench.memory"]  # the package has a function of this name

SMALL = Size(channels=32, side=8, batch=16)
ACTIVATION = 4 * SMALL.channels * SMALL.side**2 * SMALL.batch
STATISTICS = 2 * 4 * SMALL.channels  # BatchNorm's means and deviations of a batch
SHORT = {"auglocal": 2, "dgl": 2}  # the only equal block of a chain has none above it to copy, or a twin of the head alone
SHARE = {"infopro": 1 / 4}  # its decoder and its projection see all places


@functools.cache
def held(rule, blocks):
    return saved(rule, blocks, SMALL)


def test_backprop_keeps_two_tensors_a_block_and_checkpointing_one():
    assert held("backprop", 16) - held("backprop", 2) == 14 * (2 * ACTIVATION + STATISTICS)
    assert held("checkpoint", 5) - held("checkpoint", 2) == 3 * ACTIVATION


@pytest.mark.parametrize("rule", LOCAL)
def test_under_a_local_rule_sixteen_blocks_hold_what_one_does(rule):
    assert held(rule, 16) <= 1.2 * held(rule, SHORT.get(rule, 1))
    assert held(rule, 16) <= SHARE.get(rule, 1 / 6) * held("backprop", 16)


@pytest.mark.parametrize("rule", SHORT)
def test_a_chain_of_one_has_no_block_with_all_that_these_rules_add(rule):
    assert held(rule, 16) > 1.1 * held(rule, 1)


@pytest.mark.slow
def test_a_process_of_its_own_grows_by_what_is_counted_and_by_what_a_backward_pass_makes():
    size = Size(channels=8, side=16, batch=256)
    activation = 4 * size.channels * size.side**2 * size.batch
    backprop, pred = (process(rule, 16, size) / activation for rule in ("backprop", "pred"))
    # A backward pass has a few gradients of activations at a time; some code is loaded by the first whole batch.
    assert 2 * 16 + 1 <= backprop <= 2 * 16 + 1 + 6
    assert 3 <= pred <= 3 + 6


ENDS = {
    "raise MemoryError('no more')": "failed: MemoryError: no more",
    "raise SystemExit(3)": "failed: exit code 3",
    "import os; os.kill(os.getpid(), 9)": r"was ended by SIGKILL: is there enough memory\?",
}


@pytest.mark.parametrize("child", ENDS)
def test_a_process_that_fails_says_why(monkeypatch, child):
    monkeypatch.setattr(bench, "_CHILD", child)
    with pytest.raises(ChildProcessError, match=rf"^the process that was to measure pred with 3 blocks {ENDS[child]}$"):
        process("pred", 3, SMALL)


def test_where_the_system_does_not_tell_the_peak_it_is_said(monkeypatch):
    monkeypatch.setattr(bench.Path, "exists", lambda path: False)
    with pytest.raises(
        OSError, match=r"^the peak of a process is read from .*, which only Linux has: measure there, or on cuda$"
    ):
        bench._resident("VmRSS")


def test_the_benchmark_returns_ratios_of_what_it_prints(monkeypatch):
    asked = []

    def grown(rule, blocks, size, device):
        asked.append((rule, blocks))
        return 2 * held(rule, blocks)

    monkeypatch.setattr(bench, "process", grown)
    found = run_memory(blocks=4, rounds=1, repeats=1, rules=("pred",), size=SMALL)
    assert asked == list(itertools.product(("backprop", "checkpoint", "pred"), (1, 2, 4)))
    assert found["backprop_4_saved_mib"] == held("backprop", 4) / 2**20
    for way, rule in itertools.product(("saved", "process"), ("checkpoint", "pred")):
        whole = found[f"{rule}_4_{way}_mib"]
        assert found[f"{rule}_over_backprop_{way}"] == pytest.approx(whole / found[f"backprop_4_{way}_mib"])
        assert found[f"{rule}_4_over_1_{way}"] == pytest.approx(whole / found[f"{rule}_1_{way}_mib"])
        assert found[f"{rule}_4_over_2_{way}"] == pytest.approx(whole / found[f"{rule}_2_{way}_mib"])
    low, high = found["pred_over_backprop_time_range"]
    assert 0 < low <= found["pred_over_backprop_time"] <= high
    assert BENCHMARKS["memory"] is run_memory
