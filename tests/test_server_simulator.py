"""The simulator: the same run every time, whatever fails; no batch lost, none counted twice; many workers in little memory."""

import random
import time
from collections import Counter

import pytest
import torch
from served import a_plain_loop, assert_same, data, plain, smooth, trained
from torch import nn

from lockfree.server import Constant, Failure, Gamma, Point, ServerFailure, Simulator, Straggler, train
from lockfree.staleness import ASP, BSP, SSP, DelayCompensation

pytestmark = pytest.mark.usefixtures("unchecked")  # checking types takes most of the time, and is done in the other files

# ---- time ----------------------------------------------------------------------------------------------------------------------


def test_the_same_run_every_time():
    engine = Simulator(speeds=Gamma(shape=2), stragglers=[Straggler(worker=1, factor=3)])
    one, other = (trained(engine=engine, consistency=SSP(2)) for _ in range(2))
    assert one.trace == other.trace
    assert one.history == other.history
    assert_same(one.model, other.model)
    assert trained(engine=engine, consistency=SSP(2), seed=4).trace != one.trace


def test_times_of_a_worker_are_its_own():
    """Who else takes part, and whether they wait, does not change how long a worker takes."""
    few, many = (trained(engine=Simulator(speeds=Gamma(shape=2)), workers=workers, updates=12 * workers) for workers in (2, 6))

    def times(result, worker):
        return [entry.time for entry in result.history if entry.worker == worker][:8]

    for worker in range(2):
        assert times(few, worker) == times(many, worker)
    assert times(many, 0) != times(many, 1)


def test_gamma_times_have_the_mean_and_the_spread_they_should():
    generator = random.Random(0)
    times = torch.tensor([Gamma(shape=4, mean=0.5).draw(generator) for _ in range(4000)])
    assert times.mean().item() == pytest.approx(0.5, rel=0.03)  # 3.8 standard errors
    assert times.std().item() == pytest.approx(0.25, rel=0.06)


@pytest.mark.parametrize(
    "engine",
    [
        Simulator(speeds=[2.0, 1.0, 1.0, 0.5]),
        Simulator(speeds=[Constant(mean=0.5), 1.0, 1, Constant(mean=2)]),
        Simulator(speeds=[2, Gamma(shape=1e12), 1.0, 2.0], stragglers=[Straggler(worker=3, factor=4)]),
    ],
)
def test_who_is_twice_as_fast_pushes_twice_as_often(engine):
    history = trained(engine=engine, updates=4 * 18).history
    counts = Counter(entry.worker for entry in history)
    for worker, speed in enumerate((2.0, 1.0, 1.0, 0.5)):
        assert abs(counts[worker] - 16 * speed) <= 1
    assert history[-1].time == pytest.approx(16, abs=1)


def test_a_barrier_takes_the_time_of_the_slowest():
    settings = {"engine": Simulator(speeds=[1.0, 1.0, 1.0, 0.1])}
    assert trained(consistency=BSP(), updates=5, **settings).history[-1].time == 50.0
    assert trained(consistency=ASP(), updates=20, **settings).history[-1].time == 7.0


def test_equal_times_are_taken_in_the_order_of_workers():
    history = trained(updates=12).history
    assert [entry.worker for entry in history] == [0, 1, 2, 3] * 3
    assert [entry.ticket for entry in history] == list(range(12))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(mean=0.0), "Constant: mean=0.0, give a number above 0"),
        (lambda: Gamma(shape=-1.0), "Gamma: shape=-1.0, give a number above 0"),
        (lambda: Gamma(mean=float("nan")), "Gamma: mean=nan, give a number above 0"),
        (lambda: Straggler(worker=-1, factor=2.0), "Straggler: worker=-1, give a whole number"),
        (lambda: Straggler(worker=0, factor=0.0), "Straggler: factor=0.0, give a number above 0"),
        (lambda: Failure(worker=0, batch=0, point="before pull"), "Failure: batch=0, give a whole number, 1 or more"),
        (
            lambda: Failure(worker=0, batch=1, point="during lunch"),
            "Failure: point='during lunch', choose from 'before pull', ",
        ),
        (lambda: Failure(worker=0, batch=1, point="before pull", down=-1.0), "Failure: down=-1.0, give seconds"),
        (lambda: Failure(worker=0, batch=1, point="answer lost", down=None), "a worker whose answer is lost lives on"),
        (lambda: ServerFailure(update=-1), "ServerFailure: update=-1"),
        (lambda: ServerFailure(update=3, snapshot=4), "the snapshot after update 4 is later than update 3"),
        (lambda: trained(engine=Simulator(speeds=[1.0, 1.0])), "2 speeds for 4 workers: give one for each, or one for all"),
        (lambda: trained(engine=Simulator(speeds=[1.0, 1.0, 1.0, 0.0])), "speed 0.0: give batches a second, above 0"),
        (lambda: trained(engine=Simulator(stragglers=[Straggler(worker=4, factor=2)])), "is none of the 4 workers"),
        (
            lambda: trained(engine=Simulator(failures=[Failure(worker=9, batch=1, point="after pull")])),
            "is of none of the 4 workers",
        ),
    ],
)
def test_what_cannot_be_simulated_is_a_clear_error(make, message, unchecked):
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


# ---- failures ------------------------------------------------------------------------------------------------------------------


def accounts(result):
    """Which tickets were given out, and how often each was made part of the weights, by the trace."""
    given = {line["ticket"] for line in result.trace if line["kind"] == "pull"}
    counted = Counter(line["ticket"] for line in result.trace if line["kind"] == "push" and line["outcome"] == "applied")
    return given, counted


def assert_no_batch_is_lost_and_none_counted_twice(result, workers=4):
    given, counted = accounts(result)
    assert set(counted.values()) == {1}
    # What was never counted is what was on its way when training ended.
    on_its_way = given - set(counted)
    assert len(on_its_way) <= workers
    assert given == set(range(len(given)))
    early = set(range(len(given) - 3 * workers))
    assert early <= set(counted)


FAILURES = [
    [Failure(worker=worker, batch=batch, point=point, down=down)]
    for point in Point
    for worker, batch, down in ((0, 1, 0.0), (3, 4, 3.3))
] + [[Failure(worker=2, batch=2, point=point, down=None)] for point in Point if point is not Point.ANSWER_LOST]


@pytest.mark.parametrize("failures", FAILURES, ids=lambda failures: f"{failures[0].point.value}, down {failures[0].down}")
def test_no_batch_is_lost_when_a_worker_fails(failures):
    for consistency in (BSP(), SSP(1), ASP()):
        updates = 9 if consistency.barrier else 36
        result = trained(
            smooth(), consistency=consistency, updates=updates, engine=Simulator(failures=failures, speeds=Gamma(shape=4))
        )
        assert_no_batch_is_lost_and_none_counted_twice(result)
        assert result.history[-1].update == updates
        kinds = Counter(line.get("outcome") for line in result.trace)
        point, down = failures[0].point, failures[0].down
        assert kinds["refused"] == (point is Point.AFTER_PUSH and down is not None)  # the zombie
        assert kinds["duplicate"] == (point is Point.ANSWER_LOST)
        joined = Counter(line["worker"] for line in result.trace if line["kind"] == "join")
        assert joined[failures[0].worker] == (1 if point is Point.ANSWER_LOST or down is None else 2)


def test_everything_at_once():
    failures = [
        Failure(worker=worker, batch=batch, point=point, down=0.3 * batch + worker, noticed=(worker + batch) % 3 > 0)
        for worker in range(4)
        for batch, point in enumerate(Point, start=2)
    ]
    for consistency in (BSP(), SSP(1), ASP()):
        engine = Simulator(failures=[*failures, ServerFailure(update=20)], speeds=Gamma(shape=1))
        result = trained(smooth(), consistency=consistency, updates=40, engine=engine)
        assert_no_batch_is_lost_and_none_counted_twice(result)
        assert sum(line["kind"] == "join" for line in result.trace) == 4 + 4 * 4


def test_a_batch_that_was_lost_goes_out_first_of_all():
    engine = Simulator(failures=[Failure(worker=1, batch=2, point="before push", down=0.25)])
    lines = trained(engine=engine, updates=20).trace
    (evicted,) = [place for place, line in enumerate(lines) if line["kind"] == "evict"]
    lost = [line["ticket"] for line in lines[:evicted] if line["kind"] == "pull" and line["worker"] == 1][-1]
    after = [line for line in lines[evicted:] if line["kind"] == "pull"]
    assert (after[0]["ticket"], after[0]["worker"]) == (lost, 2)
    assert after[1]["ticket"] == 1 + max(line["ticket"] for line in lines[:evicted] if line["kind"] == "pull")


@pytest.mark.parametrize("consistency", [BSP(), SSP(1), ASP()])
@pytest.mark.parametrize("update", [0, 1, 7, 11])
def test_a_server_that_dies_right_after_its_snapshot_loses_nothing(consistency, update):
    settings = {"consistency": consistency, "updates": 12, "correction": DelayCompensation(), "memory_per_worker": True}
    speeds = Gamma(shape=2)
    wanted = trained(engine=Simulator(speeds=speeds), **settings)
    result = trained(engine=Simulator(speeds=speeds, failures=[ServerFailure(update=update)]), **settings)
    assert_same(result.model, wanted.model)
    assert [line for line in result.trace[1:] if line["kind"] not in ("snapshot", "restore")] == wanted.trace[1:]
    assert sum(line["kind"] == "restore" for line in result.trace) == 1


@pytest.mark.parametrize("consistency", [BSP(), SSP(1), ASP()])
def test_a_server_that_loses_updates_makes_them_anew(consistency):
    failures = [ServerFailure(update=9, snapshot=4), Failure(worker=1, batch=2, point="after pull", down=2.0)]
    result = trained(smooth(), consistency=consistency, updates=16, engine=Simulator(failures=failures))
    (restored,) = [place for place, line in enumerate(result.trace) if line["kind"] == "restore"]
    (taken,) = [place for place, line in enumerate(result.trace) if line["kind"] == "snapshot"]
    kept = [line for line in (*result.trace[:taken], *result.trace[restored:]) if line.get("outcome") == "applied"]
    # What counts in the end is each batch once.
    assert set(Counter(line["ticket"] for line in kept).values()) == {1}
    assert {line["version"] for line in kept} == set(range(1, 17))
    assert result.trace[restored]["version"] == 4


def test_behind_a_barrier_a_server_that_loses_rounds_comes_to_the_same_weights():
    settings = {"consistency": BSP(), "updates": 10}
    result = trained(engine=Simulator(failures=[ServerFailure(update=7, snapshot=3)]), **settings)
    assert_same(result.model, trained(**settings).model)


# ---- many workers --------------------------------------------------------------------------------------------------------------


def test_ten_thousand_workers():
    x, y = data()
    started = time.perf_counter()
    result = train(
        nn.Linear(6, 3),
        (x, y),
        loss=nn.functional.cross_entropy,
        optimizer=lambda w: torch.optim.SGD(w, lr=1e-3),
        workers=10_000,
        batch_size=1,
        updates=300,
        consistency=ASP(),
        engine=Simulator(speeds=Gamma(shape=2)),
        every=1000,
        fingerprints=1000,
    )
    assert result.history[-1].delay > 250
    assert len({entry.worker for entry in result.history}) > 250
    assert time.perf_counter() - started < 30


def test_a_round_of_a_thousand_workers_is_one_large_batch():
    x, y = data(samples=1_000)
    settings = {"batch_size": 1, "optimizer": plain, "consistency": BSP(), "updates": 1}
    many = trained(smooth().double(), (x.double(), y), workers=1_000, **settings).model
    one = a_plain_loop(smooth().double(), (x.double(), y), plain, batch_size=1_000, updates=1)
    assert_same(many, one, rtol=0, atol=1e-12)


class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return (self.w * x[:, :1]).mean(1)


def test_workers_that_wait_keep_no_weights_of_their_own(monkeypatch):
    """A thousand workers at one version: one copy of the weights, and nothing in flight."""
    from lockfree.server.core import Server
    from lockfree.server.versions import Versions

    most, pull, room, made = [], Server.pull, Versions.room, []

    def counting(self, worker, incarnation):
        found = pull(self, worker, incarnation)
        most.append(self.versions)
        return found

    def asked(self):
        memory = room(self)
        made.append(memory[0].data_ptr())
        return memory

    monkeypatch.setattr(Server, "pull", counting)
    monkeypatch.setattr(Versions, "room", asked)
    x = torch.ones(8, 1)
    train(
        Wide(1000),
        (x, torch.ones(8)),
        loss=nn.functional.mse_loss,
        optimizer=plain,
        workers=1000,
        batch_size=1,
        updates=60,
        consistency=SSP(5),
        every=1000,
        fingerprints=1000,
    )
    assert max(most[:1000]) == 1
    assert max(most) <= 61
    assert len(set(made)) <= 61
