"""The simulator: closed forms, the fast way against an event-by-event one, costs that are measured, and the command."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lockfree import cli, rules
from lockfree.rule import Needs, Place
from lockfree.schedule import Kind, lockstep, pipelined
from lockfree.simulate import (
    METHODS,
    Costs,
    Setting,
    Transport,
    delayed_backprop,
    from_schedule,
    gpipe,
    measure,
    one_forward_one_backward,
    plan_for,
    play,
    predict,
    schedule_at_work,
    simulate,
    steady_state,
)
from lockfree.simulate.draw import settled_spans
from lockfree.timeline import DURATIONS
from lockfree.timeline import play as play_schedule

EQUAL = {"forward": 1.0, "learn": 2.0}
STAGES = [1, 2, 3, 5, 8]


# ---- closed forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", STAGES)
def test_backprop_keeps_one_worker_busy_at_a_time(stages):
    found = simulate("backprop", Costs.equal(stages, **EQUAL))
    assert found.period == pytest.approx(3 * stages)
    assert found.bubble == pytest.approx((stages - 1) / stages)
    assert found.speedup == pytest.approx(1)
    assert found.in_flight == (1,) * stages
    assert found.staleness == (0,) * stages


def test_backprop_s_step_is_the_sum_of_all_times_and_links():
    costs = Costs(forward=[1.0, 2.0, 4.0], learn=[3.0, 5.0, 6.0], up_bytes=[10.0, 20.0, 7.0], down_bytes=[9.0, 30.0, 40.0])
    found = simulate("backprop", costs, transport=Transport(latency=0.5, bandwidth=10.0))
    assert found.period == pytest.approx(21 + 4 * 0.5 + (10 + 20 + 30 + 40) / 10)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("microbatches", [1, 2, 4, 9])
def test_synchronous_pipelines_have_the_known_bubble_and_memory(stages, microbatches):
    costs = Costs.equal(stages, **EQUAL, activation_bytes=36.0)
    for make in (gpipe, one_forward_one_backward):
        found = predict(make(costs, microbatches=microbatches))
        assert found.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
        assert found.period == pytest.approx(3 * (microbatches + stages - 1) / microbatches)
        assert found.staleness == (0,) * stages
    held = predict(gpipe(costs, microbatches=microbatches))
    assert held.in_flight == (microbatches,) * stages
    assert held.activation_bytes == pytest.approx((36.0,) * stages)
    held = predict(one_forward_one_backward(costs, microbatches=microbatches))
    assert held.in_flight == tuple(min(stages - stage, microbatches) for stage in range(stages))
    assert held.activation_bytes == pytest.approx([36 * count / microbatches for count in held.in_flight])


@pytest.mark.parametrize("stages", STAGES)
def test_delayed_backprop_is_busy_all_the_time_and_stale_at_the_bottom(stages):
    costs = Costs.equal(stages, **EQUAL, activation_bytes=5.0, parameter_bytes=7.0)
    found = simulate("ddg", costs)
    assert found.period == pytest.approx(3)
    assert found.bubble == pytest.approx(0)
    assert found.staleness == tuple(stages - 1 - stage for stage in range(stages))
    assert found.in_flight == tuple(stages - stage for stage in range(stages))
    assert found.activation_bytes == tuple(5.0 * count for count in found.in_flight)
    assert found.stash_bytes == tuple(7.0 * late for late in found.staleness)


def test_a_link_s_latency_is_felt_by_delayed_backprop_and_hidden_by_the_pipelined_schedule():
    """A cycle up and down m links takes (m + 1)(f + l) + 2 m latency in m + 1 ticks of lockstep, in 2 m + 1 of pipelined."""
    costs, stages, wire = Costs.equal(6, **EQUAL), 6, Transport(latency=1.2)
    assert simulate("ddg", costs, transport=wire).period == pytest.approx(3 + 2 * 1.2 * (stages - 1) / stages)
    late = simulate("backprop", costs, transport=wire, delay=1)
    assert late.period == pytest.approx(3)
    assert late.staleness == tuple(2 * (stages - 1 - stage) for stage in range(stages))


@pytest.mark.parametrize("rule", ["pred", "drtp", "mono", "ff"])
def test_local_rules_wait_for_nobody(rule):
    found = simulate(rule, Costs.equal(6, **EQUAL), transport=Transport(latency=50.0))
    assert found.period == pytest.approx(3)
    assert found.bubble == pytest.approx(0)
    assert found.in_flight == (1,) * 6
    assert found.staleness == (0,) * 6


@pytest.mark.parametrize("stages", [2, 3, 8])
def test_synthetic_gradients_leave_only_the_top_worker_a_rest(stages):
    found = simulate("dni", Costs.equal(stages, **EQUAL, auxiliary=1.0, up_bytes=4.0, activation_bytes=10.0))
    assert found.period == pytest.approx(4)
    assert found.bubble == pytest.approx(1 / (4 * stages))  # the top one has no synthesiser
    assert found.staleness == (0,) * stages
    assert found.auxiliary_staleness == (1,) * (stages - 1) + (0,)
    assert found.activation_bytes == (14.0,) * (stages - 1) + (10.0,)  # an output waits for its truth


def test_broadcast_errors_wait_for_the_top_alone():
    found = simulate("dfa", Costs.equal(5, **EQUAL, error_bytes=3.0), transport=Transport(bandwidth=10.0))
    assert found.period == pytest.approx(5 + 0.3 + 2)


def test_the_slowest_worker_sets_the_pace_where_nobody_waits():
    costs = Costs(forward=[1.0, 4.0, 2.0, 0.5], learn=[2.0, 3.0, 1.0, 0.5])
    for method in ("pred", "ddg"):
        assert simulate(method, costs).period == pytest.approx(7)
    assert simulate("pred", costs).bubble == pytest.approx(1 - 14 / 28)


def test_a_link_that_carries_more_than_it_can_sets_the_pace():
    costs = Costs.equal(3, **EQUAL, up_bytes=50.0)
    assert simulate("pred", costs, transport=Transport(bandwidth=10.0)).period == pytest.approx(5)
    assert simulate("pred", costs, transport=Transport(bandwidth=20.0)).period == pytest.approx(3)


def test_several_cells_on_a_worker():
    costs = Costs.equal(6, **EQUAL, activation_bytes=4.0)
    workers = [0, 0, 1, 1, 2, 2]
    found = simulate("pred", costs, workers=workers)
    assert (found.stages, found.period, found.activation_bytes) == (3, pytest.approx(6), (8.0, 8.0, 8.0))
    assert simulate("backprop", costs, workers=workers).bubble == pytest.approx(2 / 3)
    assert simulate("gpipe", costs, workers=workers, microbatches=4).bubble == pytest.approx(2 / 6)
    one = simulate("dni", costs, workers=[0] * 6)
    assert one.bubble == pytest.approx(0)
    assert one.period == pytest.approx(18)


# ---- what is fast against what is plain --------------------------------------------------------------------------------------


@st.composite
def plans(draw):
    """Any schedule or synchronous pipeline, with any times, bytes and links."""
    cells = draw(st.integers(1, 5))
    numbers = st.integers(0, 8).map(lambda number: number / 2)
    lists = {name: draw(st.lists(numbers, min_size=cells, max_size=cells)) for name in ("learn", "auxiliary", "inputs")}
    lists |= {name: draw(st.lists(numbers, min_size=cells, max_size=cells)) for name in ("up_bytes", "down_bytes")}
    forward = draw(st.lists(st.integers(1, 8).map(float), min_size=cells, max_size=cells))
    costs = {"forward": forward, "error_bytes": draw(numbers), **lists}
    transport = {"latency": draw(numbers), "bandwidth": draw(st.sampled_from([0.5, 2.0, float("inf")]))}
    needs = (*draw(st.lists(st.sampled_from(Needs), min_size=cells - 1, max_size=cells - 1)), Needs.ABOVE)
    auxiliary = tuple(draw(st.lists(st.none() | st.sampled_from(Needs), min_size=cells, max_size=cells)))
    delays = tuple(draw(st.lists(st.integers(0, 2), min_size=cells - 1, max_size=cells - 1)))
    synthetic = (False, *draw(st.lists(st.booleans(), min_size=cells - 1, max_size=cells - 1)))
    workers = [0]
    for _ in range(cells - 1):
        workers.append(workers[-1] + draw(st.integers(0, 1)))
    kind = draw(st.sampled_from(["lockstep", "pipelined", "gpipe", "1f1b"]))
    return kind, costs, transport, needs, auxiliary, delays, synthetic, workers, draw(st.integers(1, 4))


def made(drawn):
    """Makes the plan, outside of the strategy: run-time type checks in there would draw random numbers."""
    kind, costs, transport, needs, auxiliary, delays, synthetic, workers, parts = drawn
    costs, transport = Costs(**costs), Transport(**transport)
    if kind in ("gpipe", "1f1b"):
        make = {"gpipe": gpipe, "1f1b": one_forward_one_backward}[kind]
        return make(costs, microbatches=parts, transport=transport, workers=workers)
    if kind == "pipelined":
        delays = tuple(max(delay, 1) if need >= Needs.ERROR else delay for need, delay in zip(needs, delays, strict=False))
    make = {"lockstep": lockstep, "pipelined": pipelined}[kind]
    return from_schedule(make(needs, auxiliary, delays, synthetic=synthetic), costs, transport=transport, workers=workers)


@given(plans())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_period_is_the_growth_of_an_event_by_event_run(drawn):
    """After a while a run repeats itself: so many batches later everything is so many periods later."""
    plan = made(drawn)
    period = steady_state(plan).period
    ends = {}
    for span in play(plan, 130):
        batch = span.batch // plan.parts
        ends[batch] = max(ends.get(batch, 0.0), span.end)
    # Past the transient and before the drain; 60 is a multiple of most numbers of ticks that such a cycle may take to repeat.
    assert (ends[100] - ends[40]) / 60 == pytest.approx(period, rel=1e-9)


@given(plans())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_settled_starts_keep_every_order_and_waste_no_time(drawn):
    plan = made(drawn)
    period, starts = steady_state(plan)
    ready = [[0.0] for _ in plan.events]
    queues = {}
    for number, event in enumerate(plan.events):
        queues.setdefault(event.on, []).append(number)
        for other, delay in event.after:
            source = plan.events[other]
            ready[number].append(starts[other] + source.seconds + delay - period * (event.late - source.late))
    for queue in queues.values():
        for place, number in enumerate(queue):
            before = queue[place - 1]
            ready[number].append(starts[before] + plan.events[before].seconds - (0 if place else period))
    for number, times in enumerate(ready):
        assert starts[number] == pytest.approx(max(times), abs=1e-9)


@given(plans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_memory_and_staleness_are_what_a_run_shows(drawn):
    """Counted in a run: forward passes that have begun and not been learnt from, and updates in between."""
    plan = made(drawn)
    found, batches = predict(plan), 12
    for cell, worker in enumerate(plan.workers):
        events = [event for event in plan.events if event.cell == cell and event.on == worker]
        flying, stale, updates, begun = 0, [], 0, {}
        most = 0
        for period in range(batches):
            for event in events:
                if period < event.late:
                    continue
                key = (period - event.late, event.part)
                if event.kind == Kind.FORWARD:
                    flying += 1
                    begun[key] = updates
                if event.kind == Kind.LEARN:
                    flying -= 1
                    stale.append(updates - begun[key])
                    updates += plan.parts == 1
                most = max(most, flying)
        assert most <= found.in_flight[worker]
        assert max(stale) <= found.staleness[worker]
        if plan.workers.count(worker) == 1:
            assert most == found.in_flight[worker]
            assert max(stale) == found.staleness[worker]


@pytest.mark.parametrize("method", ["backprop", "dni", "cdni", "dfa", "pred", "ff"])
def test_a_run_is_the_timeline_of_the_schedule(method):
    costs = Costs.equal(4, forward=DURATIONS[Kind.FORWARD], learn=DURATIONS[Kind.LEARN], auxiliary=DURATIONS[Kind.AUXILIARY])
    spans = play(plan_for(method, costs), 5)
    assert sorted(spans) == sorted(play_schedule(schedule_at_work(rules.get(method), 4), 5))


@pytest.mark.parametrize("method", ["backprop", "gpipe", "1f1b", "ddg", "dni", "pred", "dfa"])
def test_a_window_of_the_timeline_is_as_idle_as_predicted(method):
    plan = plan_for(method, Costs.equal(5, **EQUAL, auxiliary=0.5), Setting(transport=Transport(latency=0.1)))
    steady, found = steady_state(plan), predict(plan)
    spans = settled_spans(plan, steady, until=7 * steady.period, lanes=range(5))
    assert 1 - sum(span.end - span.start for span in spans) / (35 * steady.period) == pytest.approx(found.bubble)
    assert min(span.batch for span in spans) == 0


@pytest.mark.parametrize("method", ["backprop", "ddg", "dni", "pred"])
def test_thousands_of_stages(method):
    stages = 1_000
    costs = Costs.equal(stages, **EQUAL, auxiliary=1.0 * (method == "dni"))
    found = simulate(method, costs)
    expected = {"backprop": 3 * stages, "ddg": 3, "dni": 4, "pred": 3}[method]
    assert found.period == pytest.approx(expected)


# ---- schedules by rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", rules.RULES)
def test_a_rule_is_pipelined_where_its_needs_allow_it(rule):
    waits = rules.get(rule).needs(Place(0, 3)) >= Needs.ERROR
    assert schedule_at_work(rules.get(rule), 3).name == ("lockstep" if waits else "pipelined")
    late = schedule_at_work(rules.get(rule), 3, delay=2)
    assert (late.name, late.delays) == ("pipelined", (2, 2) if waits else (0, 0))


def test_every_method_gives_a_prediction():
    for method in METHODS:
        found = simulate(method, Costs.equal(3, **EQUAL))
        assert 0 <= found.bubble < 1
        assert found.period >= 2.999
        assert json.loads(json.dumps(found.to_dict()))["method"] == method


# ---- costs -------------------------------------------------------------------------------------------------------------------


def test_costs_are_checked():
    with pytest.raises(ValueError, match="learn has 1 entries, forward has 2: give one for each cell"):
        Costs(forward=[1.0, 1.0], learn=[1.0])
    with pytest.raises(ValueError, match="learn has the entry -1"):
        Costs(forward=[1.0], learn=[-1.0])
    with pytest.raises(ValueError, match="there are no cells"):
        Costs(forward=[], learn=[])
    with pytest.raises(ValueError, match="latency is 0 seconds or more"):
        Transport(latency=-1.0)
    with pytest.raises(ValueError, match="bandwidth is above 0"):
        Transport(bandwidth=0.0)
    with pytest.raises(ValueError, match="measure 3 or more"):
        Costs.equal(2, **EQUAL).repeated(5)
    with pytest.raises(ValueError, match="0 first, each the same or the next"):
        Costs.equal(2, **EQUAL).merged([1, 0])
    with pytest.raises(ValueError, match="numbered from 0 without a gap"):
        simulate("pred", Costs.equal(2, **EQUAL), workers=[0, 2])
    with pytest.raises(ValueError, match="the schedule is of 3 cells, the costs are of 2"):
        from_schedule(schedule_at_work(rules.get("dni"), 3), Costs.equal(2, **EQUAL))
    with pytest.raises(ValueError, match="nothing takes any time"):
        simulate("pred", Costs.equal(2, forward=0.0, learn=0.0))
    with pytest.raises(ValueError, match="microbatches=0: give 1 or more"):
        simulate("gpipe", Costs.equal(2, **EQUAL), microbatches=0)


def test_costs_are_repeated_between_first_and_last():
    costs = Costs(forward=[1.0, 2.0, 3.0, 4.0], learn=[5.0, 6.0, 7.0, 8.0])
    assert costs.repeated(5).learn == (5.0, 6.0, 7.0, 6.0, 8.0)
    assert costs.repeated(2).forward == (1.0, 4.0)
    assert costs.repeated(1).forward == (4.0,)
    assert costs.repeated(4) == costs


def test_merged_cells_hand_on_what_their_outermost_do():
    costs = Costs(forward=[1.0, 2.0, 3.0], learn=[1.0] * 3, up_bytes=[5.0, 6.0, 7.0], down_bytes=[8.0, 9.0, 10.0])
    merged = costs.merged([0, 1, 1])
    assert (merged.forward, merged.up_bytes, merged.down_bytes) == ((1.0, 5.0), (5.0, 7.0), (8.0, 9.0))


@pytest.mark.parametrize("rule", ["backprop", "dni", "dfa", "pred"])
def test_measured_costs(rule):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)), nn.Linear(16, 4))
    before = [parameter.clone() for parameter in model.parameters()]
    x, y = torch.randn(32, 16), torch.randint(0, 4, (32,))
    costs = measure(
        model,
        rules.get(rule),
        x,
        y,
        loss=nn.functional.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        rounds=3,
        warm_up=1,
    )
    assert all(map(torch.equal, before, model.parameters()))
    assert costs.cells == 4
    assert min(*costs.forward, *costs.learn) > 0
    assert [seconds > 0 for seconds in costs.auxiliary] == [rule in ("dni", "pred")] * 3 + [False]
    assert costs.up_bytes == (2048.0, 2048.0, 2048.0, 512.0)
    assert costs.down_bytes == (0.0, 2048.0, 2048.0, 2048.0)
    assert costs.error_bytes == 512.0
    assert costs.parameter_bytes == (1088.0, 1088.0, 1088.0, 272.0)
    # A linear layer keeps its input, a ReLU its output.
    assert all(held >= 2048 for held in costs.activation_bytes[1:3])


# ---- the command -------------------------------------------------------------------------------------------------------------

GIVEN = ["--stages", "6", "--forward-ms", "1", "--learn-ms", "2", "--latency-us", "0", "--bandwidth-gb", "inf"]


def test_simulate_prints_a_table(capsys):
    assert cli.main(["simulate", *GIVEN, "--rule", "pred", "--compare", "backprop,ddg"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["method", "backprop", "ddg", "pred"]
    assert "18.000" in lines[1]
    assert "1.00 of 6" in lines[1]
    assert "6.00 of 6" in lines[3]


def test_simulate_writes_json_and_pictures(capsys, tmp_path):
    assert cli.main(["simulate", *GIVEN, "--auxiliary-ms", "1", "--json", "--out", str(tmp_path / "a")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    found = {one["method"]: one for one in told["methods"]}
    assert list(found) == ["backprop", "gpipe", "1f1b", "ddg", "dni"]
    assert told["plain_step"] == pytest.approx(0.018)
    assert found["dni"]["period"] == pytest.approx(0.004)
    assert found["ddg"]["staleness"] == 5
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"timeline.png", "timeline.svg", "simulate.json"}
    whole = json.loads((tmp_path / "a" / "simulate.json").read_text())
    assert whole["methods"][3]["staleness"] == [5, 4, 3, 2, 1, 0]
    assert whole["costs"]["dni"]["auxiliary"] == [0.001] * 5 + [0.0]


def test_simulate_times_a_network(capsys):
    small = ["--width", "16", "--batch", "8", "--rounds", "2"]
    assert cli.main(["simulate", "--stages", "20", "--compare", "backprop", *small, "--json"]) == 0
    found = {one["method"]: one for one in json.loads(capsys.readouterr().out)["methods"]}
    assert found["backprop"]["bubble"] > 0.8
    assert found["dni"]["bubble"] < found["backprop"]["bubble"]
    assert found["dni"]["activation_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "0"], "--stages 0: give 1 or more"),
        (["--stages", "10001"], "--stages 10001: 10,000 are the most"),
        (["--stages", "4", "--rule", "dnl"], "did you mean 'dni'?"),
        (["--stages", "4", "--forward-ms", "1"], "--forward-ms and --learn-ms belong together"),
        (["--stages", "4", "--auxiliary-ms", "1"], "--auxiliary-ms belongs to --forward-ms and --learn-ms"),
        (["--stages", "4", "--bandwidth-gb", "0"], "--bandwidth-gb 0.0: give a number above 0"),
        (["--stages", "4", "--latency-us", "-1"], "--latency-us -1.0: give 0 or more"),
        (["--stages", "4", "--microbatches", "0"], "--microbatches 0: give 1 or more"),
        (["--stages", "x"], "see lockfree simulate --help"),
    ],
)
def test_simulate_says_in_one_line_what_is_wrong(arguments, said, capsys):
    assert cli.main(["simulate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert said in line


def test_delayed_backprop_is_lockstep_on_late_links():
    costs = Costs.equal(4, **EQUAL)
    exact = schedule_at_work(rules.get("backprop"), 4)
    late = from_schedule(dataclasses.replace(exact, delays=(1, 1, 1)), costs)
    assert delayed_backprop(costs).events == late.events
