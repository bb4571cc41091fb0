"""Schedules as data: every event once, every event after what it waits for, and the pictures that follow from it."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockfree import rules
from lockfree.rule import Needs, Place, locks
from lockfree.schedule import SCHEDULES, Action, Kind, Schedule, lockstep, pipelined
from lockfree.timeline import DURATIONS, play

F, L, A = Kind.FORWARD, Kind.LEARN, Kind.AUXILIARY


def _lockstep(needs, auxiliary, delays):
    return lockstep(needs, auxiliary, delays)


def _pipelined(needs, auxiliary, delays):
    late = (max(delay, 1) if need >= Needs.ERROR else delay for need, delay in zip(needs[:-1], delays, strict=True))
    return pipelined(needs, auxiliary, tuple(late))


@st.composite
def arguments(draw, kinds=(_lockstep, _pipelined)):
    """What any schedule is made of; the block under the loss needs what the loss reports."""
    cells = draw(st.integers(1, 5))
    needs = [*draw(st.lists(st.sampled_from(Needs), min_size=cells - 1, max_size=cells - 1)), Needs.ABOVE]
    auxiliary = draw(st.lists(st.none() | st.sampled_from(Needs), min_size=cells, max_size=cells))
    delays = draw(st.lists(st.integers(0, 3), min_size=cells - 1, max_size=cells - 1))
    return draw(st.sampled_from(kinds)), tuple(needs), tuple(auxiliary), tuple(delays)


def made(drawn):
    """Makes the schedule, outside of the strategy: run-time type checks in there would draw random numbers."""
    make, needs, auxiliary, delays = drawn
    return make(needs, auxiliary, delays)


def wanted(schedule, batches):
    """Every action that there should be."""
    every = [Action(cell, kind, t) for cell in range(schedule.cells) for kind in (F, L) for t in range(batches)]
    helped = [cell for cell in range(schedule.cells) if schedule.auxiliary[cell] is not None]
    return every + [Action(cell, A, t) for cell in helped for t in range(batches)]


def own_before(action):
    return {F: [], L: [F], A: [F, L]}[action.kind]


@given(arguments(), st.integers(0, 6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_action_of_every_batch_occurs_once(drawn, batches):
    schedule = made(drawn)
    assert Counter(schedule.actions(batches)) == Counter(wanted(schedule, batches))


@given(arguments(), st.integers(1, 6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_action_comes_after_what_it_waits_for(drawn, batches):
    schedule = made(drawn)
    place = {action: number for number, action in enumerate(schedule.actions(batches))}
    for action, number in place.items():
        others = list(schedule.waits_for(action))
        assert all(other.cell != action.cell and other.batch == action.batch for other in others)
        for before in [*others, *(Action(action.cell, kind, action.batch) for kind in own_before(action))]:
            assert place[before] < number, f"{action} before {before}"
        if action.batch:  # a cell takes batches in their order
            assert place[action._replace(batch=action.batch - 1)] < number


@given(arguments(), st.integers(1, 6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_ticks_one_after_the_other_are_the_actions(drawn, batches):
    schedule = made(drawn)
    ticks = [schedule.tick(tick, 0, min(tick, batches - 1)) for tick in range(batches + schedule.depth)]
    assert [action for tick in ticks for action in tick] == schedule.actions(batches)
    assert schedule.tick(batches + schedule.depth, 0, batches - 1) == []
    assert schedule.actions_of(0) == len(wanted(schedule, 1))


@given(arguments(), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_drain_separates_what_comes_before_from_what_comes_after(drawn, before, after):
    """Batches after a drain take the same course as the first ones did."""
    schedule = made(drawn)
    total = before + after
    ticks = [schedule.tick(tick, before, min(tick, total - 1)) for tick in range(before, total + schedule.depth)]
    moved = [action._replace(batch=action.batch - before) for tick in ticks for action in tick]
    assert moved == schedule.actions(after)


@given(arguments(), st.integers(1, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_tick_of_each_action_is_the_equation(drawn, batches):
    """The equations in the docstring of `Schedule`, written again."""
    schedule = made(drawn)
    top = schedule.cells - 1
    forward = [cell * schedule.hop for cell in range(schedule.cells)]
    learn = [0] * schedule.cells
    offset = {}
    for cell in reversed(range(schedule.cells)):

        def arrives(needs, cell=cell):
            if needs == Needs.ERROR:
                return forward[top] + sum(schedule.delays[cell:])
            if needs == Needs.ABOVE and cell < top:
                return learn[cell + 1] + schedule.delays[cell]
            return 0

        learn[cell] = max(forward[cell], arrives(schedule.needs[cell]))
        offset[cell, F], offset[cell, L] = forward[cell], learn[cell]
        if schedule.auxiliary[cell] is not None:
            offset[cell, A] = max(learn[cell], arrives(schedule.auxiliary[cell]))
    assert schedule.depth == max(offset.values())
    for tick in range(batches + schedule.depth):
        found = Counter(schedule.tick(tick, 0, min(tick, batches - 1)))
        expected = [Action(c, k, tick - late) for (c, k), late in offset.items() if 0 <= tick - late <= min(tick, batches - 1)]
        assert found == Counter(expected)


@given(arguments((_lockstep,)))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_lockstep_without_delays_finishes_a_batch_in_its_own_tick(drawn):
    schedule = made(drawn)
    direct = lockstep(schedule.needs, schedule.auxiliary, (0,) * (schedule.cells - 1))
    assert direct.depth == 0
    for tick in range(3):
        actions = direct.tick(tick, 0, tick)
        assert {action.batch for action in actions} == {tick}
        assert len(actions) == direct.actions_of(0)


@given(arguments((_pipelined,)), st.integers(1, 6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_pipelined_cell_i_runs_forward_on_batch_t_minus_i(drawn, batches):
    schedule = made(drawn)
    for tick in range(batches + schedule.depth):
        found = {action.cell: action.batch for action in schedule.tick(tick, 0, min(tick, batches - 1)) if action.kind is F}
        assert found == {cell: tick - cell for cell in range(schedule.cells) if 0 <= tick - cell < batches}


# ---- golden strings ----------------------------------------------------------------------------------------------------------


def schedule_of(name, cells=3, kind="lockstep", delay=0):
    rule = rules.get(name)
    places = [Place(index, cells) for index in range(cells)]
    needs = tuple(rule.needs(place) for place in places)
    return SCHEDULES[kind](needs, tuple(rule.auxiliary_needs(place) for place in places), (delay,) * (cells - 1))


def printed(schedule, batches):
    return " ".join(map(str, schedule.actions(batches)))


def test_an_action_prints_as_cell_kind_batch():
    assert str(Action(2, F, 7)) == "2F7"
    assert f"{Action(10, L, 0)} {Action(0, A, 123)}" == "10L0 0A123"


@pytest.mark.parametrize(
    ("rule", "golden"),
    [
        ("backprop", "0F0 1F0 2F0 2L0 1L0 0L0 0F1 1F1 2F1 2L1 1L1 0L1"),
        ("fa", "0F0 1F0 2F0 2L0 1L0 0L0 0F1 1F1 2F1 2L1 1L1 0L1"),
        ("dni", "0F0 0L0 1F0 1L0 0A0 2F0 2L0 1A0 0F1 0L1 1F1 1L1 0A1 2F1 2L1 1A1"),
        ("cdni", "0F0 0L0 1F0 1L0 0A0 2F0 2L0 1A0 0F1 0L1 1F1 1L1 0A1 2F1 2L1 1A1"),
        ("dfa", "0F0 1F0 2F0 2L0 1L0 0L0 0F1 1F1 2F1 2L1 1L1 0L1"),
    ],
)
def test_lockstep_golden(rule, golden):
    assert printed(schedule_of(rule), 2) == golden


def test_pipelined_golden():
    assert printed(schedule_of("dni", kind="pipelined"), 2) == "0F0 0L0 0F1 0L1 1F0 1L0 0A0 1F1 1L1 0A1 2F0 2L0 1A0 2F1 2L1 1A1"


def test_delayed_golden():
    assert printed(schedule_of("backprop", 2, "pipelined", 1), 3) == "0F0 0F1 1F0 1L0 0F2 0L0 1F1 1L1 0L1 1F2 1L2 0L2"
    assert printed(schedule_of("backprop", 2, "lockstep", 2), 3) == "0F0 1F0 1L0 0F1 1F1 1L1 0F2 0L0 1F2 1L2 0L1 0L2"
    assert schedule_of("backprop", 3, "lockstep", 2).depth == 4
    assert schedule_of("dfa", 3, "lockstep", 2).depth == 4


def test_one_cell_has_nobody_to_wait_for():
    assert printed(schedule_of("dni", 1), 2) == "0F0 0L0 0F1 0L1"
    assert schedule_of("dni", 1).depth == 0


def test_no_batches_no_actions():
    assert schedule_of("dni").actions(0) == []


# ---- what pipelined refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "need"), [("backprop", "ABOVE"), ("fa", "ABOVE"), ("dfa", "ERROR")])
def test_pipelined_names_the_need_that_it_cannot_serve(rule, need):
    with pytest.raises(ValueError, match=rf"^the pipelined schedule cannot serve block 0, which needs {need}: ") as error:
        schedule_of(rule, kind="pipelined")
    text = str(error.value)
    assert "\n" not in text
    assert "links=Link(delay=1)" in text
    assert 'schedule="lockstep"' in text
    assert schedule_of(rule, kind="pipelined", delay=1).hop == 1


def test_pipelined_names_the_block_whose_link_is_direct():
    needs = (Needs.NOTHING, Needs.ERROR, Needs.ABOVE, Needs.ABOVE)
    with pytest.raises(ValueError, match="cannot serve block 2, which needs ABOVE"):
        pipelined(needs, (None,) * 4, (0, 1, 0))
    assert isinstance(pipelined(needs, (None,) * 4, (0, 1, 1)), Schedule)


# ---- locks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("backprop", {"forward", "update", "backward"}),
        ("fa", {"forward", "update", "backward"}),
        ("dfa", {"forward", "update"}),
        ("dni", {"forward"}),
        ("cdni", {"forward"}),
    ],
)
def test_locks_follow_from_needs(name, held):
    assert locks(list(schedule_of(name).needs)) == held


# ---- the timeline ------------------------------------------------------------------------------------------------------------


@given(arguments(), st.integers(1, 5), st.tuples(*[st.floats(0.25, 4)] * 3))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_played_actions_wait_for_what_they_depend_on_and_never_overlap(drawn, batches, times):
    schedule = made(drawn)
    durations = dict(zip((F, L, A), times, strict=True))
    spans = play(schedule, batches, durations)
    by_action = {Action(span.cell, Kind(span.kind), span.batch): span for span in spans}
    assert set(by_action) == set(wanted(schedule, batches))
    for action, span in by_action.items():
        assert span.end == span.start + durations[action.kind]
        starts = [by_action[other].end for other in schedule.waits_for(action)]
        starts += [by_action[Action(action.cell, kind, action.batch)].end for kind in own_before(action)]
        assert span.start >= max(starts, default=0.0)
    for cell in range(schedule.cells):
        row = [span for span in spans if span.cell == cell]
        assert all(one.end <= other.start for one, other in pairwise(row))
        assert row == sorted(row, key=lambda span: span.start)


@pytest.mark.parametrize("cells", [1, 2, 3, 5])
@pytest.mark.parametrize("batches", [1, 2, 7])
def test_backprop_takes_every_forward_and_every_learning_in_turn(cells, batches):
    spans = play(schedule_of("backprop", cells), batches)
    assert max(span.end for span in spans) == batches * cells * (DURATIONS[F] + DURATIONS[L])
    ordered = sorted(spans, key=lambda span: span.start)
    assert all(one.end == other.start for one, other in pairwise(ordered))  # never do two cells work at once


@pytest.mark.parametrize("cells", [2, 3, 5])
@pytest.mark.parametrize("batches", [1, 2, 7])
def test_dfa_learns_all_cells_at_once(cells, batches):
    spans = play(schedule_of("dfa", cells), batches)
    # A batch takes all forwards in turn and one learning; a cell is free for the next batch when it has learnt.
    assert max(span.end for span in spans) == batches * (cells * DURATIONS[F] + DURATIONS[L])
    first = [span for span in spans if span.batch == 0 and span.kind == "L"]
    assert [span.start for span in first] == [float(cells)] * cells


@pytest.mark.parametrize("cells", [2, 3, 5])
def test_pipelined_dni_keeps_every_lower_cell_busy_without_a_gap(cells):
    batches = 12
    schedule = schedule_of("dni", cells, "pipelined")
    spans = play(schedule, batches)
    for cell in range(cells - 1):
        row = [span for span in spans if span.cell == cell]
        first, last = (min(s.start for s in row if s.batch == t and s.kind == "F") for t in (cells, batches - cells))
        steady = [span for span in row if first <= span.start < last]
        assert sum(span.end - span.start for span in steady) == last - first
    # Work of a lower cell on a batch: 1 + 2 + 1; so batches leave the bottom every 4 units, whatever the depth.
    starts = [span.start for span in spans if span.cell == 0 and span.kind == "F"]
    assert {b - a for a, b in pairwise(starts[cells:])} == {4.0}


def test_lockstep_dni_waits_only_for_the_truth_about_its_synthesiser():
    # Cell 0 learns on batch t without waiting; its synthesiser waits one unit for 1L, one forward behind.
    schedule = schedule_of("dni", 3)
    spans = {(s.cell, s.kind, s.batch): s for s in play(schedule, 6)}
    for t in range(6):
        assert spans[0, "L", t].start == spans[0, "F", t].end
        assert spans[0, "A", t].start == spans[1, "L", t].end
    assert spans[0, "F", 5].start - spans[0, "F", 4].start == 5.0
    backprop = max(span.end for span in play(schedule_of("backprop", 3), 6))
    assert max(span.end for span in spans.values()) < 0.7 * backprop
