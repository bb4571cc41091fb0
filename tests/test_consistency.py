"""When a worker may go on: the rules by themselves, and that a run keeps them."""

import itertools

import pytest
from served import Net, assert_same, data, plain, served, smooth, trained

from lockfree.server import Constant, Failure, Gamma, Simulator, Straggler, delays
from lockfree.staleness import ASP, BSP, SSP, DelayCompensation, NoCorrection, ScaleByDelay, consistency_from

pytestmark = pytest.mark.usefixtures("unchecked")  # checking types takes most of the time, and is done in the other files


@pytest.fixture
def double():
    x, y = data()
    return x.double(), y


@pytest.mark.parametrize("bound", [-1, True, 1.5, "3", None])
def test_a_bound_is_a_whole_number(bound, unchecked):
    with pytest.raises(ValueError, match=r"^SSP\(.*\): give a whole number of steps .*, 0 or more$"):
        SSP(bound)


def test_who_may_pull_is_the_rule_of_the_paper():
    for clock, slowest in itertools.combinations_with_replacement(range(6), 2):
        clock, slowest = max(clock, slowest), min(clock, slowest)
        assert BSP().may_pull(clock, slowest) == (clock == slowest)
        assert ASP().may_pull(clock, slowest)
        for s in range(4):
            assert SSP(s).may_pull(clock, slowest) == (slowest >= clock - s)
    assert [one.barrier for one in (BSP(), SSP(0), SSP(1), ASP())] == [True, True, False, False]


def test_names_of_the_command_line():
    assert [consistency_from(text) for text in ("bsp", "asp", "ssp:0", "ssp:12")] == [BSP(), ASP(), SSP(0), SSP(12)]
    for text, message in {
        "bps": "did you mean 'bsp'",
        "asp:3": "asp takes no number, write 'asp'",
        "ssp": "as in 'ssp:3'",
        "ssp:": "as in 'ssp:3'",
        "ssp:-1": "as in 'ssp:3'",
        "ssp:1.5": "as in 'ssp:3'",
    }.items():
        with pytest.raises(ValueError, match=message):
            consistency_from(text)


def gaps(result):
    """How far the clocks of the fastest and the slowest were apart, after each push and at each pull."""
    clocks = dict.fromkeys((line["worker"] for line in result.trace if line["kind"] == "join"), 0)
    pushed, pulled = [], []
    for line in result.trace:
        if line["kind"] == "push":
            clocks[line["worker"]] += 1
            pushed.append(max(clocks.values()) - min(clocks.values()))
        if line["kind"] == "pull":
            pulled.append(clocks[line["worker"]] - min(clocks.values()))
    return pushed, pulled


@pytest.mark.parametrize("bound", [1, 3])
def test_workers_are_as_far_apart_as_ssp_allows_and_no_further(bound):
    slow = Simulator(speeds=Gamma(shape=4), stragglers=[Straggler(worker=2, factor=20)])
    pushed, pulled = gaps(trained(updates=60, consistency=SSP(bound), engine=slow))
    assert max(pulled) == bound  # nobody begins further ahead
    assert max(pushed) == bound + 1  # what was begun is finished


def test_nothing_holds_workers_back_under_asp():
    slow = Simulator(stragglers=[Straggler(worker=2, factor=30)])
    result = trained(updates=60, consistency=ASP(), engine=slow)
    assert max(gaps(result)[0]) == 20
    assert sum(entry.worker == 2 for entry in result.history) == 0  # 20 steps of the other three; it takes 30


def test_delays_of_equal_workers_are_one_less_than_there_are():
    for workers in (1, 3, 8):
        history = trained(updates=40, workers=workers, engine=Simulator(speeds=Constant(mean=0.5))).history
        assert [entry.delay for entry in history] == [min(number, workers - 1) for number in range(40)]
        assert delays(history)[workers - 1] == 40 - (workers - 1)


def test_behind_a_barrier_nothing_is_late():
    for consistency in (BSP(), SSP(0)):
        result = trained(updates=6, consistency=consistency, engine=Simulator(speeds=Gamma(shape=2)))
        assert delays(result.history) == {0: 24}
        assert [entry.update for entry in result.history] == [1 + number // 4 for number in range(24)]


@pytest.mark.parametrize("correction", [NoCorrection(), ScaleByDelay(), DelayCompensation()])
def test_ssp_0_is_bsp(correction):
    engine = Simulator(speeds=Gamma(shape=2))
    one, other = (
        trained(consistency=consistency, correction=correction, engine=engine, updates=10) for consistency in (BSP(), SSP(0))
    )
    assert_same(one.model, other.model)
    assert one.trace[1:] == other.trace[1:]


SPEEDS = [1.0, [5.0, 1.0, 3.0, 0.1], [0.1, 0.2, 0.3, 0.4], Gamma(shape=1)]


@pytest.mark.parametrize("speeds", SPEEDS[1:])
def test_behind_a_barrier_it_does_not_matter_who_is_faster(speeds):
    settings = {"consistency": BSP(), "updates": 8}
    assert_same(trained(**settings).model, trained(**settings, engine=Simulator(speeds=speeds)).model)


def test_behind_a_barrier_it_does_not_matter_who_comes_first():
    models = []
    for order in itertools.permutations(range(3)):
        server, worker, _ = served(consistency=BSP())
        for number in range(3):
            server.join(number)
        for _ in range(3):
            pulled = {number: server.pull(number, 1) for number in order}
            assert [pulled[number].ticket % 3 for number in range(3)] == [0, 1, 2]
            for number in reversed(order):
                server.push(worker.answer(pulled[number]))
        model = Net()
        server.write_to(model)
        models.append(model)
    for other in models[1:]:
        assert_same(models[0], other)


def test_a_round_of_small_batches_is_one_large_batch():
    many = trained(smooth(), consistency=BSP(), workers=4, batch_size=4, updates=20).model
    one = trained(smooth(), consistency=BSP(), workers=1, batch_size=16, updates=20).model
    assert_same(many, one, rtol=0, atol=1e-6)


def test_a_round_of_small_batches_is_one_large_batch_in_float64(double):
    many = trained(smooth().double(), double, consistency=BSP(), workers=4, batch_size=4, updates=20, clip=0.5).model
    one = trained(smooth().double(), double, consistency=BSP(), workers=1, batch_size=16, updates=20, clip=0.5).model
    assert_same(many, one, rtol=0, atol=1e-12)


def test_samples_of_a_round_count_alike_in_batches_of_unlike_size(double):
    x, y = double  # 45 samples in batches of 4: the last batch of an epoch has one
    some = (x[:45], y[:45])
    many = trained(smooth().double(), some, consistency=BSP(), workers=12, batch_size=4, updates=9, optimizer=plain).model
    one = trained(smooth().double(), some, consistency=BSP(), workers=1, batch_size=None, updates=9, optimizer=plain).model
    assert_same(many, one, rtol=0, atol=1e-12)


def test_who_is_evicted_is_not_waited_for():
    engine = Simulator(failures=[Failure(worker=1, batch=2, point="before push", down=None)])
    for consistency in (BSP(), SSP(2)):
        result = trained(consistency=consistency, updates=40, engine=engine)
        assert sum(entry.worker == 1 for entry in result.history) == 1
        assert result.history[-1].update == 40


def test_who_is_not_known_to_be_dead_is_waited_for_in_vain():
    engine = Simulator(failures=[Failure(worker=1, batch=2, point="before push", down=None, noticed=False)])
    for consistency in (BSP(), SSP(2)):
        with pytest.raises(ValueError, match="all workers wait for one that does not come back"):
            trained(consistency=consistency, engine=engine, updates=40)


@pytest.mark.parametrize("noticed", [False, True])
@pytest.mark.parametrize("point", ["before pull", "after pull", "before push"])
def test_a_round_in_which_a_worker_dies_and_comes_back_in_time_is_as_if_nothing_had_been(point, noticed):
    # The others have not all pushed by the time that it is back, so its batch is still to be had in this round.
    speeds = [1.0, 1.0, 1.0, 0.2]
    engine = Simulator(speeds=speeds, failures=[Failure(worker=1, batch=3, point=point, down=1.5, noticed=noticed)])
    settings = {"consistency": BSP(), "updates": 7}
    assert_same(trained(**settings, engine=engine).model, trained(**settings).model)
