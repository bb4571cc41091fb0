"""The benchmark of pipelines: its baselines are right, its ratios are those of what it prints, and nothing hangs."""

import math
import multiprocessing
import os
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import distributed, nn

from lockfree.bench import BENCHMARKS
from lockfree.bench import pipeline as run_pipeline
from lockfree.bench.pipeline import Size, Training, network, plain, sequential, staged, workers

pytestmark = pytest.mark.xdist_group("bench pipeline")  # what is started once is started in one process

bench = sys.modules["lockfree.bench.pipeline"]  # the package has a function of this name

SMALL = Size(blocks=4, units=16, batch=32)
PATIENCE = 60.0


def fill(rank, size):
    losses = iter([math.nan, math.nan, math.nan])
    return Training(nn.Identity(), lambda: next(losses), lead=2)


def fail(rank, size):
    def step():
        if rank == 1:
            raise ValueError("not today\nnor tomorrow")

    return Training(nn.Identity(), step)


def die(rank, size):
    def step():
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.recv(torch.empty(1), 1)  # fails, too, but is not to blame

    return Training(nn.Identity(), step)


ENDS = {
    fill: "process 1 failed at run of it: RuntimeError: what was timed was no full pipeline: a step came to no loss",
    fail: "process 1 failed at run of it: ValueError: not today",
    die: "process 1 was ended by SIGKILL: run of it",
}


@pytest.fixture(scope="module")
def told():
    """What one pair of processes has to tell: the weights after five steps of each contestant, then what is said when steps go wrong."""
    schedules = {
        f"{name}_{number}": partial(staged, schedule=name, microbatches=number)
        for name in ("gpipe", "1f1b")
        for number in (2, 4)
    }
    found = {}
    with workers(SMALL, PATIENCE) as both:
        for name, make in {"plain": plain, "pred": partial(sequential, rule="pred"), **schedules}.items():
            both.ask((0, 1), "make", name, make)
            both.ask((0, 1), "run", name, 5)
            both.ask((0, 1), "settle", name)
            found[name] = both.ask((0, 1), "weights", name)
        for make in ENDS:
            both.ask((0, 1), "make", "it", make)
            both.ask((0, 1), "lead", "it") if make is fill else None
            with pytest.raises(ChildProcessError) as caught:
                both.ask((0, 1) if make is die else (1,), "run", "it", 1)
            found[make] = str(caught.value)
    assert not any(process.is_alive() for process in both.processes)
    return found


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("microbatches", [2, 4])
def test_a_schedule_trains_as_a_plain_loop_does(told, schedule, microbatches):
    below, above = told[f"{schedule}_{microbatches}"]
    assert list(below | above) == list(told["plain"][0])
    assert len(below) == len(above) - 2
    start = dict(network(SMALL).named_parameters())
    for name, value in (below | above).items():
        np.testing.assert_allclose(value, told["plain"][0][name], atol=1e-5 * np.abs(value).max())
        assert np.abs(value - start[name].detach().numpy()).max() > 1e-4 * np.abs(value).max()


@pytest.mark.parametrize("name", ["plain", "pred"])
def test_independent_processes_do_the_same_work(told, name):
    one, other = told[name]
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


def test_the_benchmark_returns_ratios_of_what_it_prints():
    before = dict(os.environ)
    found = run_pipeline(rounds=1, repeats=1, size=SMALL, microbatches=(2, 4), steps=2, patience=PATIENCE)
    assert dict(os.environ) == before
    speed = {name.removesuffix("_samples_per_second"): value for name, value in found.items() if name.endswith("per_second")}
    for schedule in ("gpipe", "1f1b"):
        assert speed[schedule] == max(speed[f"{schedule}_2"], speed[f"{schedule}_4"])
        assert speed[schedule] == speed[f"{schedule}_{found[f'{schedule}_microbatches'][0]}"]
        assert found[f"{schedule}_over_plain"] == pytest.approx(speed[schedule] / speed["plain"])
        assert found[f"{schedule}_over_ceiling"] == pytest.approx(speed[schedule] / speed["two_plain"])
        for rule in ("pred", "dni"):
            assert found[f"{rule}_over_{schedule}"] == pytest.approx(speed[rule] / speed[schedule])
    for rule in ("pred", "dni"):
        assert found[f"{rule}_over_ceiling"] == pytest.approx(speed[rule] / speed[f"two_{rule}"])
    assert found["two_processes_over_one"] == pytest.approx(speed["two_plain"] / speed["plain"])
    assert found["gpipe_over_plain_range"] == [found["gpipe_over_plain"]] * 2
    assert (found["threads"], found["processes"], found["blocks"]) == (1, 2, 4)
    assert BENCHMARKS["pipeline"] is run_pipeline


@pytest.mark.parametrize("make", ENDS)
def test_a_process_that_fails_or_dies_is_named(told, make):
    assert told[make] == ENDS[make]


def test_a_process_that_does_not_answer_is_given_up():
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs, pytest.raises(TimeoutError, match=r"^no answer from process 0 in 0\.1 s: run of it$"):
        bench.Workers([], [ours], 0.1).ask((0,), "run", "it", 1)
