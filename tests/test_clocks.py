"""When blocks learn, on what, and from what mixture: clocks, phases, noise, synthetic inputs, and blocks stepped alone."""

import copy
import itertools
from dataclasses import dataclass, replace
from random import Random

import cases
import pytest
import torch
from cases import CLASSES, MODELS, SCHEDULES, assert_same, learner_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree import checkpoint
from lockfree.flight import Flight
from lockfree.rule import Clock, Needs, Pace
from lockfree.rules import Backprop, SyntheticGradients
from lockfree.schedule import Action, Kind, lockstep, pipelined
from lockfree.timeline import DURATIONS, play

PLAIN, MLP = MODELS["in_place"], MODELS["mlp"]  # the first draws no random numbers
LOCKSTEP, LATE, LATER, PIPELINED, PIPELINED_LATE = (SCHEDULES[i] for i in (0, 1, 2, 3, 4))
F64 = torch.float64
HIDDEN = {"hidden_layers": 1, "hidden_units": 6, "kernel_size": 3}
UNLOCKED = {"conditioned": True, "synthetic_inputs": True, **HIDDEN}
NO_LOCKS = SyntheticGradients(**UNLOCKED)
MANY = 5.0  # standard deviations that no honest draw is away


@pytest.fixture(autouse=True)
def _own_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=F64)


def descent(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def decaying(parameters):
    """Descent that moves every weight that learns, even from a gradient of zero."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2)


def networks_of(learner):
    """Everything beside the model that learns, by cell and what it is for."""
    pairs = [(cell.place.index, name, getattr(cell, name)) for cell in learner.cells for name in ("auxiliary", "inputs")]
    return {(index, name): network for index, name, network in pairs if network is not None}


def randomise(learner, seed=4):
    """Gives synthesisers weights, as if they had learnt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for network in networks_of(learner).values():
            for parameter in network.parameters():
                parameter.copy_(0.3 * draw(generator, *parameter.shape))


def weights_of(learner):
    """Copies all weights: of blocks by number, of auxiliary networks by number and what they are for."""
    weights = {(cell.place.index, "block"): cell.block for cell in learner.cells} | networks_of(learner)
    return {key: [p.detach().clone() for p in module.parameters()] for key, module in weights.items()}


def moved(before, after):
    return {key for key, old in before.items() if cases.differs(old, after[key])}


def block_by_block(model, x):
    """Returns a leaf and an output for each block; they overwrite what they are given."""
    outputs, h = [], x
    for block in model:
        leaf = h.detach().requires_grad_()
        outputs.append((leaf, block(leaf.clone())))
        h = outputs[-1][1]
    return outputs


def trained(learner, batches, seed=3):
    torch.manual_seed(seed)
    for x, y in batches:
        learner.step(x, y)
    return learner


def assert_near(one, other, tolerance=1e-12):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# ---- clocks as data ----------------------------------------------------------------------------------------------------------


def hand_written(paces, silent=()):
    """A clock from a table {(cell, batch): pace}; blocks learn where it says nothing, auxiliary networks unless in ``silent``."""
    return Clock(lambda cell, batch: paces.get((cell, batch), Pace.LEARN), lambda cell, batch: (cell, batch) not in silent)


def printed(actions):
    return " ".join(map(str, actions))


DNI_NEEDS = (Needs.NOTHING, Needs.NOTHING, Needs.ABOVE), (Needs.ABOVE, Needs.ABOVE, None), (0, 0)
BACKPROP_NEEDS = (Needs.ABOVE,) * 3, (None,) * 3, (0, 0)


def test_a_schedule_leaves_out_what_rests_and_shows_reports():
    clock = hand_written({(1, 0): Pace.REST, (2, 1): Pace.REPORT, (0, 1): Pace.REPORT, (2, 2): Pace.REST}, {(1, 1), (0, 3)})
    plan = lockstep(*DNI_NEEDS, clock=clock)
    assert [printed(plan.tick(t, 0, t)) for t in range(4)] == [
        "0F0 0L0 1F0 2F0 2L0 1A0",  # 1 rests, so 0A has nothing to learn from
        "0F1 0M1 1F1 1L1 0A1 2F1 2M1",  # 2 reports, but 1A is silent
        "0F2 0L2 1F2 1L2 0A2 2F2",  # 2 rests
        "0F3 0L3 1F3 1L3 2F3 2L3 1A3",
    ]
    assert printed(plan.actions(4)) == " ".join(printed(plan.tick(t, 0, t)) for t in range(4))
    assert [plan.actions_of(t) for t in range(4)] == [6, 7, 6, 7]


def test_a_block_that_needs_the_one_above_rests_with_it():
    plan = lockstep(*BACKPROP_NEEDS, clock=hand_written({(1, 0): Pace.REST, (2, 1): Pace.REPORT, (0, 2): Pace.REPORT}))
    assert printed(plan.actions(3)) == "0F0 1F0 2F0 2L0 0F1 1F1 2F1 2M1 1L1 0L1 0F2 1F2 2F2 2L2 1L2 0M2"


def test_a_critic_learns_though_the_block_above_rests():
    needs, _, delays = DNI_NEEDS
    plan = lockstep(needs, (Needs.ERROR, Needs.ERROR, None), delays, clock=hand_written({(1, 0): Pace.REST, (2, 0): Pace.REST}))
    assert printed(plan.actions(1)) == "0F0 0L0 1F0 2F0 1A0 0A0"


def test_a_sobolev_critic_waits_for_the_message_and_for_the_loss():
    clock = hand_written({(1, 0): Pace.REST})
    for make, wanted in (
        (lockstep, ["0F0 0L0 1F0 2F0 2L0 1A0", "0F1 0L1 1F1 1L1 2F1 2L1 1A1 0A1"]),
        (pipelined, ["0F0 0L0", "0F1 0L1 1F0", "1F1 1L1 2F0 2L0 1A0", "2F1 2L1 1A1 0A1"]),
    ):
        plan = make(*DNI_NEEDS, clock=clock, losses=True)
        assert [printed(plan.tick(t, 0, min(t, 1))) for t in range(len(wanted))] == wanted
        assert printed(plan.waits_for(Action(0, Kind.AUXILIARY, 1))) == "2F1 1L1"


def test_a_pipelined_schedule_with_a_clock():
    plan = pipelined(*DNI_NEEDS, clock=hand_written({(1, 0): Pace.REST, (2, 1): Pace.REPORT}))
    assert [printed(plan.tick(t, 0, min(t, 1))) for t in range(4)] == [
        "0F0 0L0",
        "0F1 0L1 1F0",
        "1F1 1L1 0A1 2F0 2L0 1A0",
        "2F1 2M1 1A1",
    ]


def test_synthetic_inputs_take_all_cells_into_the_first_tick():
    needs, auxiliary, delays = (Needs.TARGET, Needs.TARGET, Needs.ABOVE), (Needs.ABOVE, Needs.ABOVE, None), (0, 0)
    clock = hand_written({(1, 1): Pace.REST}, {(2, 1)})
    for make in (lockstep, pipelined):
        plan = make(needs, auxiliary, delays, synthetic=(False, True, True), clock=clock)
        assert plan.depth == 0
        assert [printed(plan.tick(t, 0, t)) for t in range(2)] == [
            "0F0 0L0 1F0 1I0 1L0 0A0 2F0 2I0 2L0 1A0",
            "0F1 0L1 1F1 1I1 2F1 2L1 1A1",
        ]
    half = pipelined(needs, auxiliary, delays, synthetic=(False, False, True))
    assert half.depth == 1
    assert [printed(half.tick(t, 0, t)) for t in range(2)] == ["0F0 0L0 2F0 2L0", "0F1 0L1 1F0 1L0 1A0 0A0 2F1 2I0 2L1"]


def test_what_is_waited_for_by_hand():
    clock = hand_written({(1, 0): Pace.REPORT, (2, 1): Pace.REPORT})
    plan = lockstep(*DNI_NEEDS, synthetic=(False, False, True), clock=clock)
    waits = {str(action): printed(plan.waits_for(action)) for action in plan.actions(2)}
    assert waits == {
        **{"0F0": "", "0L0": "", "1F0": "0F0", "1M0": "", "0A0": "1M0", "2F0": "", "2I0": "1F0", "2L0": "", "1A0": "2L0"},
        **{"0F1": "", "0L1": "", "1F1": "0F1", "1L1": "", "0A1": "1L1", "2F1": "", "2I1": "1F1", "2M1": "", "1A1": "2M1"},
    }
    plan = lockstep(*BACKPROP_NEEDS, clock=clock)
    waits = {str(action): printed(plan.waits_for(action)) for action in plan.actions(2)}
    assert waits == {
        **{"0F0": "", "1F0": "0F0", "2F0": "1F0", "2L0": "", "1M0": "2L0", "0L0": "1M0"},
        **{"0F1": "", "1F1": "0F1", "2F1": "1F1", "2M1": "", "1L1": "2M1", "0L1": "1L1"},
    }


@st.composite
def clocked(draw):
    """What any schedule with a clock is made of."""
    cells, batches = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    needs = [*draw(st.lists(st.sampled_from(Needs), min_size=cells - 1, max_size=cells - 1)), Needs.ABOVE]
    auxiliary = draw(st.lists(st.none() | st.sampled_from(Needs), min_size=cells, max_size=cells))
    delays = draw(st.lists(st.integers(0, 2), min_size=cells - 1, max_size=cells - 1))
    synthetic = [False, *draw(st.lists(st.booleans(), min_size=cells - 1, max_size=cells - 1))]
    place = st.tuples(st.integers(0, cells - 1), st.integers(0, batches - 1))
    paces, silent = draw(st.dictionaries(place, st.sampled_from(Pace))), draw(st.sets(place))
    make = draw(st.sampled_from([lockstep, pipelined]))
    if make is pipelined:
        delays = [max(delay, 1) if need >= Needs.ERROR else delay for need, delay in zip(needs[:-1], delays, strict=True)]
    more = {"synthetic": tuple(synthetic), "losses": draw(st.booleans())}
    return make, (tuple(needs), tuple(auxiliary), tuple(delays)), more, (paces, silent), batches


STILL = (Pace.REST, Pace.FREEZE)


@given(clocked())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_clock_leaves_out_and_replaces_but_never_moves(drawn):
    """Every action of the schedule without the clock stays in its place, is left out, or becomes a report; the rule is written again."""
    make, arguments, more, (paces, silent), batches = drawn
    without = make(*arguments, **more)
    plan = make(*arguments, **more, clock=hand_written(paces, silent))
    needs, auxiliary, _ = arguments

    def pace(cell, batch):
        asked = paces.get((cell, batch), Pace.LEARN)
        follows = cell + 1 < len(needs) and needs[cell] == Needs.ABOVE and pace(cell + 1, batch) in STILL
        return Pace.REST if follows else asked

    def kept(action):
        cell, kind, batch = action
        if kind is Kind.FORWARD:
            return action
        if kind is Kind.LEARN:
            wanted = {Pace.LEARN: Kind.LEARN, Pace.REPORT: Kind.MESSAGE, Pace.REST: None, Pace.FREEZE: None}[pace(cell, batch)]
            return wanted and action._replace(kind=wanted)
        deaf = auxiliary[cell] == Needs.ABOVE and cell + 1 < len(needs) and pace(cell + 1, batch) in STILL
        return None if (cell, batch) in silent or (kind is Kind.AUXILIARY and deaf) else action

    for tick in range(batches + plan.depth):
        window = (tick, 0, min(tick, batches - 1))
        assert plan.tick(*window) == [kept(action) for action in without.tick(*window) if kept(action)]
    actions = plan.actions(batches)
    assert [plan.actions_of(t) for t in range(batches)] == [sum(a.batch == t for a in actions) for t in range(batches)]
    for cell, batch in itertools.product(range(plan.cells), range(batches)):
        assert plan.kinds(cell, batch) == {a.kind for a in actions if (a.cell, a.batch) == (cell, batch)}


@given(clocked())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_tick_of_each_action_is_the_equation(drawn):
    """The equations in the docstring of `Schedule` written again, with synthetic inputs and the losses of samples."""
    make, (needs, auxiliary, delays), more, _, batches = drawn
    plan = make(needs, auxiliary, delays, **more)
    synthetic, top = more["synthetic"], len(needs) - 1
    forward, learn, offset = [], [0] * len(needs), {}
    for cell in range(len(needs)):
        forward.append(0 if not cell or synthetic[cell] else forward[-1] + plan.hop)
    for cell in range(top, -1, -1):
        loss = forward[top] + sum(delays[cell:])
        above = learn[cell + 1] + delays[cell] if cell < top else 0
        arrives = {Needs.NOTHING: 0, Needs.TARGET: 0, Needs.ERROR: loss, Needs.ABOVE: above}
        learn[cell] = max(forward[cell], arrives[needs[cell]])
        offset[cell, Kind.FORWARD], offset[cell, Kind.LEARN] = forward[cell], learn[cell]
        if synthetic[cell]:
            offset[cell, Kind.INPUT] = max(forward[cell], forward[cell - 1])
        if auxiliary[cell] is not None:
            offset[cell, Kind.AUXILIARY] = max(learn[cell], arrives[auxiliary[cell]], loss if more["losses"] else 0)
    assert plan.depth == max(offset.values())
    for tick in range(batches + plan.depth):
        found = plan.tick(tick, 0, min(tick, batches - 1))
        assert sorted(found) == sorted(
            Action(cell, kind, tick - late) for (cell, kind), late in offset.items() if 0 <= tick - late < batches
        )


@given(clocked())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_every_action_waits_only_for_actions_that_are_there_and_come_before(drawn):
    make, arguments, more, clock, batches = drawn
    plan = make(*arguments, **more, clock=hand_written(*clock))
    place = {action: number for number, action in enumerate(plan.actions(batches))}
    assert len(place) == sum(plan.actions_of(t) for t in range(batches))
    for action, number in place.items():
        for other in plan.waits_for(action):
            assert place[other] < number, f"{action} waits for {other}"
            assert other.cell != action.cell
            assert other.batch == action.batch
        for kind in {"F": "", "I": "F", "L": "F", "M": "F", "A": "FLM"}[action.kind]:
            before = action._replace(kind=Kind(kind))
            assert place.get(before, -1) < number
    spans = play(plan, batches)
    ends = {Action(span.cell, Kind(span.kind), span.batch): span.end for span in spans}
    assert ends.keys() == place.keys()
    for span in spans:
        action = Action(span.cell, Kind(span.kind), span.batch)
        assert span.end - span.start == DURATIONS[action.kind]
        assert span.start >= max((ends[other] for other in plan.waits_for(action)), default=0.0)
    for cell in range(plan.cells):
        row = [span for span in spans if span.cell == cell]
        assert all(one.end <= other.start for one, other in itertools.pairwise(row))


# ---- which blocks learn ------------------------------------------------------------------------------------------------------


def learns(rule, cells, batches):
    """Whether each cell learns on each batch, as zeros and ones (batches, cells)."""
    clock = rule.clock(cells)
    rows = [[clock.pace(cell, batch) is Pace.LEARN for cell in range(cells)] for batch in range(batches)]
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_each_block_learns_from_that_share_of_the_batches(probability):
    count = 4000
    found = learns(SyntheticGradients(update_probability=probability), 5, count).sum(0)
    assert (found - count * probability).abs().max() < MANY * (count * probability * (1 - probability)) ** 0.5
    assert len(set(found.tolist())) > 1


@pytest.mark.parametrize("seed", [0, 1])
def test_blocks_and_batches_are_drawn_apart(seed):
    """Neither two blocks nor two batches in a row, nor two seeds, know of each other."""
    count = 4000
    one, other = (learns(SyntheticGradients(update_probability=0.5, seed=s), 4, count) for s in (seed, seed + 1))
    rows = torch.cat([one[1:], one[:-1], other[1:]], dim=1).T
    correlation = torch.corrcoef(rows) - torch.eye(12)
    assert correlation.abs().max() < MANY / count**0.5


def test_the_draws_are_a_pure_function_of_seed_block_and_batch():
    rule = SyntheticGradients(update_probability=0.3, seed=5)
    forwards = learns(rule, 4, 50)
    clock = SyntheticGradients(update_probability=0.3, seed=5, learning_rate=0.5).clock(4)
    for cell, batch in Random(0).sample(list(itertools.product(range(4), range(50))), 200):
        assert (clock.pace(cell, batch) is Pace.LEARN) == bool(forwards[batch, cell])
    assert torch.equal(learns(rule, 4, 50), forwards)
    assert not torch.equal(learns(replace(rule, seed=6), 4, 50), forwards)
    # a larger probability only adds
    assert bool((learns(replace(rule, update_probability=0.6), 4, 50) >= forwards).all())


@pytest.mark.parametrize("schedule", [LOCKSTEP, LATE, PIPELINED_LATE], ids=lambda row: row.name)
def test_blocks_that_hand_credit_down_to_each_other_rest_together(schedule):
    rule = SyntheticGradients(update_probability=0.5, borders=(1,))
    found = learns(rule, 5, 400)
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found[:, 2], found[:, 3])
    assert torch.equal(found[:, 3], found[:, 4])
    assert not torch.equal(found[:, 1], found[:, 2])
    mixed = learns(SyntheticGradients(update_probability=0.5, mix=0.5), 4, 400)
    assert all(torch.equal(mixed[:, 0], mixed[:, i]) for i in range(4))

    learner = learner_for(PLAIN, rule, schedule=schedule, optimizer=decaying)
    before, seen = weights_of(learner), set()
    for x, y in PLAIN.batches(16):
        learner.step(x, y)
        if schedule is LOCKSTEP:
            after = weights_of(learner)
            seen.add(tuple(sorted(index for index, name in moved(before, after) if name == "block")))
            before = after
    learner.drain()
    assert seen <= {(), (0, 1), (2, 3), (0, 1, 2, 3)}
    assert len(seen) == 4 * (schedule is LOCKSTEP)


@pytest.mark.parametrize("fields", [{}, {"conditioned": True}, UNLOCKED], ids=["dni", "cdni", "unlocked"])
def test_a_resting_block_changes_in_nothing_but_its_running_statistics(fields):
    """And a synthesiser learns exactly where the block above updates, from the message that this sends."""
    learner = learner_for(
        PLAIN, SyntheticGradients(update_probability=0.5, seed=1, **fields), optimizer=decaying, auxiliary_optimizer=decaying
    )
    randomise(learner)
    norm = learner.model[2][1]
    seen = set()
    for step, (x, y) in enumerate(PLAIN.batches(16)):
        on = [learner.rule.clock(4).pace(i, step) is Pace.LEARN for i in range(4)]
        seen.add(tuple(on))
        before, mean = weights_of(learner), norm.running_mean.clone()
        optimizer = [[copy_state(learner.optimizer.state[p]) for p in cell.block.parameters()] for cell in learner.cells]
        result = learner.step(x, y)
        told = {i for i in range(3) if on[i + 1]}
        assert set(result.auxiliary) == told
        assert set(result.inputs) == (set(range(1, 4)) if "synthetic_inputs" in fields else set())
        wanted = (
            {(i, "block") for i in range(4) if on[i]}
            | {(i, "auxiliary") for i in told}
            | {(i, "inputs") for i in result.inputs}
        )
        assert moved(before, weights_of(learner)) == wanted
        assert not torch.equal(norm.running_mean, mean)
        assert norm.num_batches_tracked.item() == step + 1
        for i, cell in enumerate(learner.cells):
            if not on[i]:
                assert_same([copy_state(learner.optimizer.state[p]) for p in cell.block.parameters()], optimizer[i])
    assert len(seen) > 8


def copy_state(state):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


@pytest.mark.parametrize("schedule", [LOCKSTEP, PIPELINED_LATE], ids=lambda row: row.name)
def test_the_same_seed_updates_the_same_blocks_whatever_the_weights_are(schedule):
    taken = {}
    for name, rule_seed, weights in (("one", 3, 0), ("other weights", 3, 1), ("other seed", 4, 0)):
        rule = SyntheticGradients(update_probability=0.5, seed=rule_seed)
        learner = learner_for(PLAIN, rule, schedule=schedule, seed=weights)
        run, seen = learner._executor.run, []

        def spy(assembly, actions, *, run=run, seen=seen):
            seen.extend(actions)
            return run(assembly, actions)

        learner._executor.run = spy
        trained(learner, PLAIN.batches(8, seed=weights)).drain()
        taken[name] = seen
    assert taken["one"] == taken["other weights"] != taken["other seed"]


@dataclass(frozen=True, kw_only=True)
class AlwaysOn(SyntheticGradients):
    """A clock that leaves nothing out."""

    def clock(self, cells):
        return Clock(lambda cell, batch: Pace.LEARN, lambda cell, batch: True)


@pytest.mark.parametrize("schedule", [LOCKSTEP, LATER, PIPELINED_LATE], ids=lambda row: row.name)
@pytest.mark.parametrize("fields", [{}, {"borders": (1,)}, {"mix": 0.4}, UNLOCKED], ids=["dni", "border", "mix", "unlocked"])
def test_a_clock_that_leaves_nothing_out_is_no_clock(fields, schedule):
    assert SyntheticGradients(update_probability=1.0, **fields).clock(4) is None
    always = SyntheticGradients(update_probability=1 - 2**-53, **fields)
    assert always.clock(4) is not None
    states = []
    for rule in (SyntheticGradients(**fields), AlwaysOn(**fields), always):
        learner = trained(learner_for(MLP, rule, schedule=schedule), MLP.batches(6))
        states.append(learner.state_dict())
        learner.drain()
        states[-1]["drained"] = learner.state_dict() | {"of": None}
        states[-1]["of"] = None
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])


# ---- every so-manieth batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("synthesiser_every", [1, 3])
@pytest.mark.parametrize("block_every", [1, 2, 3])
@pytest.mark.parametrize("fields", [{}, {"borders": (1,)}, {"mix": 0.4}, UNLOCKED], ids=["dni", "border", "mix", "unlocked"])
def test_blocks_and_synthesisers_learn_on_their_own_batches(fields, block_every, synthesiser_every):
    rule = SyntheticGradients(block_every=block_every, synthesiser_every=synthesiser_every, **fields)
    learner = learner_for(PLAIN, rule, optimizer=decaying, auxiliary_optimizer=decaying)
    randomise(learner)
    blocks, synthesisers = {(i, "block") for i in range(4)}, set(networks_of(learner))
    assert len(synthesisers) == (1 if "borders" in fields else 6 if "synthetic_inputs" in fields else 3)
    for step, (x, y) in enumerate(PLAIN.batches(7)):
        before = weights_of(learner)
        result = learner.step(x, y)
        wanted = (blocks if step % block_every == 0 else set()) | (synthesisers if step % synthesiser_every == 0 else set())
        assert moved(before, weights_of(learner)) == wanted
        assert {(i, "auxiliary") for i in result.auxiliary} | {(i, "inputs") for i in result.inputs} == wanted - blocks


def test_synthesisers_learn_between_the_updates_of_blocks_from_what_is_reported():
    """The report is the gradient with respect to what the block above was given, worked out apart."""
    learner = learner_for(
        PLAIN, SyntheticGradients(block_every=2), optimizer=cases.sgd, auxiliary_optimizer=descent(1.0), dtype=F64
    )
    randomise(learner)
    first, (x, y) = PLAIN.batches(2, dtype=F64)
    learner.step(*first)
    tables = {i: (cell.auxiliary[0].weight.detach().clone(), cell.auxiliary[0].table.detach().clone())
              for i, cell in enumerate(learner.cells[:-1])}  # fmt: skip
    outputs = block_by_block(copy.deepcopy(learner.model), x)
    blocks = cases.copy_of(learner.model)
    result = learner.step(x, y)
    for name, value in learner.model.named_parameters():
        assert torch.equal(value, blocks[name])
        assert value.grad is None  # or it would be a part of the next update
    for i, (W, t) in tables.items():
        leaf, above = outputs[i + 1]
        if i < 2:
            W_above, t_above = tables[i + 1]
            (delta,) = torch.autograd.grad(above, leaf, (above.detach() @ W_above.T + t_above) / len(x))
        else:
            (delta,) = torch.autograd.grad(F.cross_entropy(above, y), leaf)
        difference = (leaf.detach() @ W.T + t) / len(x) - delta
        assert result.auxiliary[i].item() == pytest.approx((difference.square().sum() * len(x) / 2).item(), rel=1e-12)
        assert_near(W - learner.cells[i].auxiliary[0].weight.detach(), difference.T @ leaf.detach())
        assert_near(t - learner.cells[i].auxiliary[0].table.detach(), difference.sum(0, keepdim=True))


# ---- the leak ----------------------------------------------------------------------------------------------------------------


def kept_calls(learner):
    """Calls and old weights that are kept for gradients still to come."""
    stashes = [part.stash for cell in learner.cells for part in cell._parts.values() if part.stash is not None]
    assert stashes
    return sum(sum(stash._live.values()) + len(stash._kept) for stash in stashes)


@pytest.mark.parametrize(
    ("fields", "schedule"),
    [
        pytest.param(HIDDEN, LATE, id="plain"),
        pytest.param({"update_probability": 0.5, "mix": 0.5}, LATE, id="sparse mix"),
        pytest.param({"block_every": 2, "mix": 0.5}, PIPELINED_LATE, id="clocked mix"),
        pytest.param({"update_probability": 0.5, **HIDDEN}, LATE, id="sparse"),
        pytest.param({"synthesiser_every": 2, **HIDDEN}, PIPELINED, id="clocked"),
        pytest.param({"synthesiser_every": 2, "borders": (1,), **UNLOCKED}, PIPELINED_LATE, id="inputs"),
    ],
)
def test_nothing_is_kept_for_what_will_not_come(fields, schedule):
    learner = trained(learner_for(PLAIN, SyntheticGradients(**fields), schedule=schedule), PLAIN.batches(12))
    learner.drain()
    assert kept_calls(learner) == 0


def test_a_block_that_is_stepped_alone_keeps_nothing():
    learner = learner_for(PLAIN, SyntheticGradients(**UNLOCKED), schedule=LATE)
    for x, y in PLAIN.batches(4):
        learner.step_block(1, x, y)
    assert kept_calls(learner) == 0


# ---- warming up --------------------------------------------------------------------------------------------------------------

ALL, FORWARD = {"forward", "update", "backward"}, {"forward"}
WARMING = {
    "dni": {}, "cdni": {"conditioned": True}, "hidden": {"conditioned": True, **HIDDEN}, "gaussian": {"form": "gaussian"},
    "critic": {"form": "critic", **HIDDEN}, "sobolev": {"form": "sobolev", **HIDDEN}, "noise": {"noise": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("schedule", [LOCKSTEP, LATE, PIPELINED_LATE], ids=lambda row: row.name)
@pytest.mark.parametrize("fields", WARMING.values(), ids=WARMING)
def test_warming_up_is_backprop_and_teaches_the_synthesisers(fields, schedule):
    """Then the locks come off: what is in flight is finished, and what follows is no longer backprop."""
    count = 4
    learner, backprop = (
        learner_for(PLAIN, rule, schedule=schedule, optimizer=cases.momentum, dtype=F64)
        for rule in (SyntheticGradients(warm_up=count, **fields), Backprop())
    )
    assert learner.locks == ALL
    start, batches = weights_of(learner), PLAIN.batches(count + 3, dtype=F64)
    for x, y in batches[:count]:
        losses = [learner.step(x, y).loss for learner in (learner, backprop)]
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12, equal_nan=True)
        assert learner.locks == ALL
        assert_near(dict(learner.model.state_dict()), dict(backprop.model.state_dict()))
    if schedule is LOCKSTEP:
        assert_same(dict(learner.model.state_dict()), dict(backprop.model.state_dict()))
        assert {(i, "auxiliary") for i in range(3)} <= moved(start, weights_of(learner))
    backprop.drain()
    flights = []
    run = learner._executor.run

    def spy(assembly, actions):
        flights.append(sorted({action.batch for action in actions}))
        if not flights[-1] or flights[-1][-1] < count:  # the last tick of the warming up, or of its drain
            outcome = run(assembly, actions)
            drained.append({name: value.clone() for name, value in learner.model.state_dict().items()})
            return outcome
        return run(assembly, actions)

    drained = []
    learner._executor.run = spy
    learner.step(*batches[count])
    assert learner.locks == FORWARD
    assert flights[-1] == [count]
    assert len(flights) == 1 + backprop.schedule.depth
    if drained:
        assert_near(drained[-1], dict(backprop.model.state_dict()))
    assert (not drained) == (schedule is LOCKSTEP)
    backprop.step(*batches[count])
    for x, y in batches[count + 1 :]:
        learner.step(x, y)
        backprop.step(x, y)
    learner.drain()
    backprop.drain()
    assert cases.differs(list(learner.model.parameters()), list(backprop.model.parameters()))


def test_warming_up_draws_as_backprop_does():
    learner, backprop = (learner_for(MLP, rule) for rule in (SyntheticGradients(warm_up=5), Backprop()))
    for one in (learner, backprop):
        trained(one, MLP.batches(5))
    assert_same(dict(learner.model.state_dict()), dict(backprop.model.state_dict()))


def test_a_pipeline_must_serve_every_phase():
    with pytest.raises(ValueError, match="which needs ABOVE"):
        learner_for(PLAIN, SyntheticGradients(warm_up=1), schedule=PIPELINED)


@pytest.mark.parametrize("start", [3, 4, 6])
@pytest.mark.parametrize("schedule", [LOCKSTEP, LATER, PIPELINED_LATE], ids=lambda row: row.name)
@pytest.mark.parametrize(
    "fields", [{"conditioned": True}, {"form": "critic", **HIDDEN}, UNLOCKED], ids=["cdni", "critic", "unlocked"]
)
def test_resume_before_at_and_after_the_switch_is_bit_identical(fields, schedule, start, tmp_path):
    rule = SyntheticGradients(warm_up=4, **fields)
    batches = MLP.batches(8)
    whole = trained(learner_for(MLP, rule, schedule=schedule), batches[:start])
    checkpoint.save(tmp_path / "middle", whole.state_dict())
    other = learner_for(MLP, rule, schedule=schedule, seed=1)
    other.load_state_dict(checkpoint.load(tmp_path / "middle"))
    free = set() if "synthetic_inputs" in fields else FORWARD
    for learner in (whole, other):
        assert (learner.locks == free) == (start > 4)
    random = torch.get_rng_state()
    results = []
    for learner in (whole, other):
        torch.set_rng_state(random)
        results.append([learner.step(x, y) for x, y in batches[start:]])
        assert learner.locks == free
        learner.drain()
    for mine, theirs in zip(*results, strict=True):
        assert mine.batch == theirs.batch
        assert mine.batch is None or mine.loss == theirs.loss
        assert_same((mine.auxiliary, mine.inputs), (theirs.auxiliary, theirs.inputs))
    assert_same(other.state_dict(), whole.state_dict())


def test_a_state_of_an_earlier_phase_can_be_loaded_into_a_later_one_and_back():
    rule = SyntheticGradients(warm_up=2, conditioned=True)
    learner, batches = learner_for(PLAIN, rule, schedule=LATE), PLAIN.batches(5)
    states = [learner.state_dict()]
    for x, y in batches:
        learner.step(x, y)
        states.append(learner.state_dict())
    for count in (1, 4, 2, 3, 0):
        learner.load_state_dict(states[count])
        assert learner.locks == (FORWARD if count > 2 else ALL)
        for x, y in batches[count:]:
            learner.step(x, y)
        assert_same(learner.state_dict(), states[-1])


# ---- a mixture with the truth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LOCKSTEP, LATE, PIPELINED_LATE], ids=lambda row: row.name)
@pytest.mark.parametrize("fields", [{}, {"conditioned": True}, {"form": "sobolev", **HIDDEN}, {"noise": 1.0}], ids=str)
def test_the_truth_alone_is_backprop(fields, schedule):
    learner, backprop = (
        learner_for(PLAIN, rule, schedule=schedule, optimizer=cases.momentum, dtype=F64)
        for rule in (SyntheticGradients(mix=1.0, **fields), Backprop())
    )
    assert learner.locks == ALL
    for one in (learner, backprop):
        trained(one, PLAIN.batches(8, dtype=F64)).drain()
    assert_near(dict(learner.model.state_dict()), dict(backprop.model.state_dict()))
    assert learner.cells[0].auxiliary is not None
    assert all(bool(p.any()) for p in learner.cells[0].auxiliary[0].parameters() if p.dim() == 2)


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("mix", [0.0, 0.25, 0.5, 1.0])
def test_a_mixture_is_so_much_of_each(mix, conditioned):
    """One step of descent at rate 1, every block's gradient worked out apart from the same weights."""
    rule = SyntheticGradients(mix=mix, conditioned=conditioned)
    learner = learner_for(PLAIN, rule, optimizer=descent(1.0), auxiliary_optimizer=descent(1.0), dtype=F64)
    randomise(learner)
    assert learner.locks == (ALL if mix else FORWARD)
    x, y = PLAIN.batches(1, dtype=F64)[0]
    model = copy.deepcopy(learner.model)
    outputs, parameters = block_by_block(model, x), [list(block.parameters()) for block in model]
    h = outputs[-1][1]
    label = F.one_hot(y, CLASSES).to(F64)
    (credit,) = torch.autograd.grad(F.cross_entropy(h, y), h, retain_graph=True)
    wanted, losses, reported = {}, {}, {}
    for i in reversed(range(4)):
        leaf, made = outputs[i]
        if i < 3:
            network = learner.cells[i].auxiliary[0]
            guess = network(made.detach(), label if conditioned else None).detach()
            losses[i] = (guess - len(x) * reported[i]).square().sum().item() / (2 * len(x))
            credit = (1 - mix) * guess / len(x) + mix * reported[i]
        wanted[i] = torch.autograd.grad(made, parameters[i], credit, retain_graph=True)
        if i:
            (reported[i - 1],) = torch.autograd.grad(made, leaf, credit)
    before = weights_of(learner)
    result = learner.step(x, y)
    after = weights_of(learner)
    for i in range(4):
        assert_near([old - new for old, new in zip(before[i, "block"], after[i, "block"], strict=True)], list(wanted[i]))
    assert {i: value.item() for i, value in result.auxiliary.items()} == pytest.approx(losses, rel=1e-10)


# ---- noise -------------------------------------------------------------------------------------------------------------------


def credits_of(rule, batch=0, cell=0, samples=400, units=60, label=None):
    """Returns the credit of a block of many units, by the same weights every time."""
    generator = torch.Generator().manual_seed(1)
    y, scores = draw(generator, samples, units), draw(generator, samples, CLASSES)
    place = lf.Place(cell, 3)
    auxiliary = rule.build(lf.Site(place=place, block=nn.Identity(), rehearsal=[y.clone().requires_grad_()] * 2 + [scores]))
    with torch.no_grad():
        for parameter in auxiliary.parameters():
            parameter.copy_(0.3 * draw(generator, *parameter.shape))
            if len(parameter) == 1:
                parameter.add_(2.0)  # so that the credit's root mean square is not its deviation
        for buffer in auxiliary.buffers():
            buffer.fill_(2.0)
    context = lf.Context(place=place, auxiliary=auxiliary, inputs=None, outputs=(y, y), samples=samples, batch=batch)
    auxiliary.append(auxiliary[0])  # a second tensor crosses the border
    return rule.credit(context), context


@pytest.mark.parametrize("batch", [0, 1, 50, 10_000])
@pytest.mark.parametrize(("noise", "decay"), [(0.5, 0.55), (1.0, 0.0), (0.1, 1.0)])
def test_noise_has_the_deviation_that_is_asked_for_and_anneals(noise, decay, batch):
    """In units of the credit's root mean square: noise (1 + t)^(-decay/2), a variance that falls as Neelakantan et al.'s."""
    clean, _ = credits_of(SyntheticGradients(), batch)
    assert clean[0].square().mean().sqrt() > 1.2 * clean[0].std()
    noisy, context = credits_of(SyntheticGradients(noise=noise, noise_decay=decay), batch)
    wanted = noise * (1 + batch) ** (-decay / 2)
    count = clean[0].numel()
    errors = [(b - a) / a.square().mean().sqrt() for a, b in zip(clean, noisy, strict=True)]
    for error in errors:
        assert error.std().item() == pytest.approx(wanted, rel=MANY / (2 * count) ** 0.5)
        assert abs(error.mean().item()) < MANY * wanted / count**0.5
        fourth = (error / error.std()).pow(4).mean().item()  # a normal's kurtosis, known to sqrt(96/n)
        assert fourth == pytest.approx(3.0, abs=MANY * (96 / count) ** 0.5)
        of_units, of_samples = error.mean(0), error.mean(1)
        assert of_units.abs().max() < 1.2 * MANY * wanted / len(error) ** 0.5
        assert of_samples.abs().max() < 1.2 * MANY * wanted / error.shape[1] ** 0.5
    assert abs(torch.corrcoef(torch.stack([error.flatten() for error in errors]))[0, 1].item()) < MANY / count**0.5
    # the synthesiser learns from its own prediction, not from the noisy one
    for prediction, credit in zip(context.memo, clean, strict=True):
        assert torch.equal(prediction.credit, credit)


def test_a_gaussian_s_noise_has_the_deviation_that_it_predicts():
    """With noise=1 and no decay the credit is a sample of the prediction, unit by unit."""
    mean, context = credits_of(SyntheticGradients(form="gaussian"))
    (scale, _) = (prediction.scale for prediction in context.memo)
    assert scale.max() > 2 * scale.min()
    sample, _ = credits_of(SyntheticGradients(form="gaussian", noise=1.0, noise_decay=0.0), batch=9)
    standard = (sample[0] - mean[0]) / scale
    count = standard.numel()
    assert standard.std().item() == pytest.approx(1.0, rel=MANY / (2 * count) ** 0.5)
    assert abs(standard.mean().item()) < MANY / count**0.5
    large = scale > scale.median()
    for part in (large, ~large):
        assert standard[part].std().item() == pytest.approx(1.0, rel=MANY / count**0.5)
    annealed, _ = credits_of(SyntheticGradients(form="gaussian", noise=0.5, noise_decay=1.0), batch=9)
    assert ((annealed[0] - mean[0]) / scale).std().item() == pytest.approx(0.5 / 10**0.5, rel=MANY / (2 * count) ** 0.5)


def test_noise_differs_by_seed_block_and_batch_and_by_nothing_else():
    rule = SyntheticGradients(noise=1.0, noise_decay=0.0)
    (clean, _), _ = credits_of(SyntheticGradients())
    noises = [
        (credits_of(replace(rule, seed=seed), batch, cell)[0][0] - clean).flatten()
        for seed, batch, cell in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1))
    ]
    correlation = torch.corrcoef(torch.stack(noises)) - torch.eye(5)
    assert correlation.abs().max() < MANY / len(noises[0]) ** 0.5
    assert_same(credits_of(rule, 3, 1)[0], credits_of(replace(rule, learning_rate=0.5), 3, 1)[0])


@pytest.mark.parametrize("fields", [{}, {"form": "gaussian"}, {"conditioned": True}], ids=str)
def test_no_noise_is_bit_identical_to_none_asked_for(fields):
    states = []
    for more in ({}, {"noise": 0.0, "noise_decay": 2.0, "seed": 9}):
        learner = trained(learner_for(MLP, SyntheticGradients(**fields, **more)), MLP.batches(6))
        states.append(learner.state_dict() | {"of": None})
    assert_same(*states)


@pytest.mark.parametrize("form", ["gradient", "gaussian"])
def test_noise_is_drawn_apart_from_the_global_generator_and_by_the_seed(form):
    states = {}
    for name, seed, random in (("one", 0, 3), ("another state", 0, 4), ("another seed", 1, 3)):
        learner = learner_for(PLAIN, SyntheticGradients(form=form, noise=0.5, seed=seed))
        torch.manual_seed(random)
        before = torch.get_rng_state()
        for x, y in PLAIN.batches(6):
            learner.step(x, y)
        assert torch.equal(torch.get_rng_state(), before)
        states[name] = dict(learner.model.state_dict())
    assert_same(states["one"], states["another state"])
    assert cases.differs(list(states["one"].values()), list(states["another seed"].values()))


# ---- everything at once, stopped and resumed ---------------------------------------------------------------------------------

TOGETHER = {
    "sparse border": {"update_probability": 0.5, "borders": (1,)},
    "sparse mix": {"update_probability": 0.5, "mix": 0.5, "noise": 0.5},
    "clocked border": {"block_every": 2, "synthesiser_every": 3, "borders": (1,)},
    "clocked gaussian": {"form": "gaussian", "noise": 1.0, "update_probability": 0.6, "synthesiser_every": 2},
    "sparse critic": {"form": "critic", "update_probability": 0.5, **HIDDEN},
    "sparse classes": {"conditioned": True, "per_class": True, "update_probability": 0.5, **HIDDEN},
    "sparse unlocked": {"update_probability": 0.5, "synthesiser_every": 2, **UNLOCKED},
    "unlocked border": {"borders": (1,), **UNLOCKED},
    "sparse warm": {"warm_up": 3, "noise": 0.5, "update_probability": 0.5},
}


@pytest.mark.parametrize(
    ("fields", "schedule"),
    [
        pytest.param(fields, schedule, id=f"{name}-{schedule.name}")
        for (name, fields), schedule in itertools.product(TOGETHER.items(), [LOCKSTEP, LATER, PIPELINED_LATE])
    ],
)
def test_resume_of_clocks_and_mixtures_is_bit_identical(fields, schedule):
    batches, start = MLP.batches(8), 4
    whole = trained(learner_for(MLP, SyntheticGradients(**fields), schedule=schedule), batches[:start])
    other = learner_for(MLP, SyntheticGradients(**fields), schedule=schedule, seed=1)
    state = whole.state_dict()
    results = []
    for learner in (whole, other):
        torch.manual_seed(11)
        learner.load_state_dict(state)
        results.append([(r.batch, r.loss, r.auxiliary, r.inputs) for r in (learner.step(x, y) for x, y in batches[start:])])
        learner.drain()
    assert_same(*results)
    assert_same(other.state_dict(), whole.state_dict())


# ---- synthetic inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LOCKSTEP, LATE, PIPELINED, PIPELINED_LATE], ids=lambda row: row.name)
def test_synthetic_inputs_take_every_lock_off(schedule):
    learner = learner_for(PLAIN, SyntheticGradients(**UNLOCKED), schedule=schedule)
    assert learner.locks == frozenset()
    assert [cell.synthetic for cell in learner.cells] == [False, True, True, True]
    assert learner_for(PLAIN, SyntheticGradients(**UNLOCKED, borders=(1,))).locks == ALL
    assert learner_for(PLAIN, SyntheticGradients(**UNLOCKED, mix=0.5)).locks == {"update", "backward"}
    unconditioned = UNLOCKED | {"conditioned": False}
    assert learner_for(PLAIN, SyntheticGradients(**unconditioned), schedule=schedule).locks == frozenset()


def test_where_no_synthesiser_is_there_is_no_synthetic_input():
    learner = learner_for(PLAIN, SyntheticGradients(**UNLOCKED, borders=(1,)))
    assert [cell.synthetic for cell in learner.cells] == [False, False, True, False]
    assert learner_for(PLAIN, SyntheticGradients(**UNLOCKED), blocks=1).cells[0].synthetic is False


@pytest.mark.parametrize("schedule", [PIPELINED, LOCKSTEP], ids=lambda row: row.name)
def test_all_cells_take_a_batch_in_the_tick_in_which_it_enters(schedule):
    learner = learner_for(PLAIN, SyntheticGradients(**UNLOCKED), schedule=schedule)
    assert learner.schedule.depth == 0
    for tick in range(4):
        actions = learner.schedule.tick(tick, 0, tick)
        assert {action.batch for action in actions} == {tick}
        assert len(actions) == learner.schedule.actions_of(tick) == 4 + 4 + 3 + 3
        x, y = PLAIN.batches(1, seed=tick)[0]
        result = learner.step(x, y)
        assert result.batch == tick
        assert sorted(result.auxiliary) == [0, 1, 2]
        assert sorted(result.inputs) == [1, 2, 3]


def test_lockstep_and_pipelined_are_one_training_without_locks():
    states = []
    for schedule in (LOCKSTEP, PIPELINED):
        learner = trained(learner_for(MLP, SyntheticGradients(**UNLOCKED), schedule=schedule), MLP.batches(8))
        states.append(learner.state_dict() | {"of": None})
    assert_same(*states)


@pytest.fixture(scope="module")
def unlocked_reference():
    return everything_in(run_in_order(None))


def everything_in(learner):
    """All of a learner's state but the global generator's."""
    return learner.state_dict() | {"rng": None}


def run_in_order(order):
    """Trains for three ticks, whose actions are put in an order by ``order``, and returns the learner."""
    learner = learner_for(PLAIN, SyntheticGradients(**UNLOCKED), optimizer=cases.adam)
    for tick, (x, y) in enumerate(PLAIN.batches(3)):
        actions = learner.schedule.tick(tick, 0, tick)
        if order is not None:
            put = order(actions)
            assert sorted(put) == sorted(actions)
            place = {action: number for number, action in enumerate(put)}
            assert all(place[other] < place[action] for action in put for other in learner.schedule.waits_for(action))
            actions = put
        learner._assembly.flights[tick] = Flight(x, y, learner.schedule.actions_of(tick))
        learner._executor.run(learner._assembly, actions)
        learner.steps += 1
    return learner


@pytest.mark.parametrize("kinds", ["F", "FL"])
def test_forwards_and_learning_of_the_cells_may_come_in_any_order(kinds, unlocked_reference):
    """All 24 orders of four cells: nobody reads what another one writes within the tick."""
    wanted = unlocked_reference

    for cells in itertools.permutations(range(4)):

        def order(actions, cells=cells):
            def key(action):
                first = action.kind in kinds
                return (not first, cells.index(action.cell) if first else 0)

            return sorted(actions, key=key)  # stable: the others stay as they are listed

        assert_same(everything_in(run_in_order(order)), wanted)


def test_any_order_that_keeps_the_waits_is_as_good(unlocked_reference):
    random = Random(0)

    def order(actions):
        plan = learner_for(PLAIN, SyntheticGradients(**UNLOCKED)).schedule
        left, made = list(actions), []
        while left:
            heads = list({action.cell: action for action in reversed(left)}.values())
            ready = [action for action in heads if not any(other in left for other in plan.waits_for(action))]
            made.append(random.choice(ready))
            left.remove(made[-1])
        return made

    for _ in range(5):
        assert_same(everything_in(run_in_order(order)), unlocked_reference)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_predict_runs_on_real_activations(model):
    case = MODELS[model]
    learner = trained(learner_for(case, SyntheticGradients(**UNLOCKED)), case.batches(4))
    x, _ = case.batches(1, seed=5)[0]
    found = learner.predict(x)
    learner.model.eval()
    with torch.no_grad():
        assert torch.equal(found, learner.model(x))
        h = x
        for cell in learner.cells:
            h = cell.block(x if cell.inputs is None else cell.inputs.eval()(x))
    assert not torch.allclose(found, h)  # which is what the top block makes of its synthetic input


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("hidden_layers", [0, 1])
@pytest.mark.parametrize("samples", [8, 5])
def test_everything_that_a_block_on_a_synthetic_input_learns_from(hidden_layers, conditioned, samples):
    """One step of descent at rate 1, against autograd through copies of all networks at the old weights.

    What predicts an input descends |h' - h|^2 / 2m, h being the output that the block below made of *its* synthetic input; the
    synthesiser below regresses the gradient with respect to h'; and the loss is that of the top block's synthetic input.
    """
    rule = SyntheticGradients(**UNLOCKED | {"hidden_layers": hidden_layers, "conditioned": conditioned})
    learner = learner_for(PLAIN, rule, optimizer=descent(1.0), auxiliary_optimizer=descent(1.0), dtype=F64)
    randomise(learner)
    x, y = PLAIN.batches(1, dtype=F64, samples=samples)[0]
    model = copy.deepcopy(learner.model)
    imagine = [copy.deepcopy(cell.inputs.networks[0]) for cell in learner.cells[1:]]
    synthesise = [copy.deepcopy(cell.auxiliary[0]) for cell in learner.cells[:-1]]
    guesses = [x] + [network(x) for network in imagine]
    leaves = [guess.detach().requires_grad_() for guess in guesses]
    outputs = [block(leaf.clone()) for block, leaf in zip(model, leaves, strict=True)]
    label = F.one_hot(y, CLASSES).to(F64) if conditioned else None
    made = [network(h.detach(), label) for network, h in zip(synthesise, outputs, strict=False)]
    loss = F.cross_entropy(outputs[3], y)
    (error,) = torch.autograd.grad(loss, outputs[3], retain_graph=True)
    credits = [prediction.detach() / samples for prediction in made] + [error]
    wanted, losses, of_inputs = {}, {}, {}
    for i in range(4):
        wanted[i, "block"] = torch.autograd.grad(outputs[i], list(model[i].parameters()), credits[i], retain_graph=True)
        if i:
            (delta,) = torch.autograd.grad(outputs[i], leaves[i], credits[i], retain_graph=True)
            regression = (made[i - 1] - samples * delta).square().sum() / (2 * samples)
            wanted[i - 1, "auxiliary"] = torch.autograd.grad(regression, list(synthesise[i - 1].parameters()))
            losses[i - 1] = regression.item()
            regression = (guesses[i] - outputs[i - 1].detach()).square().sum() / (2 * samples)
            wanted[i, "inputs"] = torch.autograd.grad(regression, list(imagine[i - 1].parameters()))
            of_inputs[i] = regression.item()
    before = weights_of(learner)
    result = learner.step(x, y)
    after = weights_of(learner)
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    assert {i: value.item() for i, value in result.auxiliary.items()} == pytest.approx(losses, rel=1e-10)
    assert {i: value.item() for i, value in result.inputs.items()} == pytest.approx(of_inputs, rel=1e-10)
    assert wanted.keys() == before.keys()
    for key, gradient in wanted.items():
        assert_near([old - new for old, new in zip(before[key], after[key], strict=True)], list(gradient), 1e-11)


# ---- one block alone ---------------------------------------------------------------------------------------------------------


def deep(seed=0):
    torch.manual_seed(seed)
    body = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(*body, nn.Linear(6, CLASSES))


def alone(**fields):
    x = PLAIN.batches(1)[0][0]
    model = deep()
    return lf.convert(
        model, SyntheticGradients(**UNLOCKED | fields), loss=F.cross_entropy, optimizer=cases.adam, example_input=x
    )


@pytest.mark.parametrize(
    "fields", [{}, {"conditioned": False}, {"form": "gaussian"}, {"per_class": True}, {"form": "sobolev"}], ids=str
)
def test_blocks_that_are_no_neighbours_may_be_stepped_in_any_order(fields):
    """What one of them writes (itself, the synthesiser below, the input above), none of the others reads or writes."""
    batches = dict(zip((0, 2, 4), PLAIN.batches(3), strict=True))
    states = []
    for order in itertools.permutations((0, 2, 4)):
        learner = alone(**fields)
        for block in (0, 1, 2, 3, 4) * 2:  # so that nothing is zero
            learner.step_block(block, *PLAIN.batches(1, seed=block)[0])
        for block in order:
            learner.step_block(block, *batches[block])
        assert learner.steps == 13
        states.append([dict(learner.model.state_dict()), [dict(one.state_dict()) for one in networks_of(learner).values()]])
    for state in states[1:]:
        assert_same(state, states[0])


@pytest.mark.parametrize("form", ["gradient", "sobolev", "critic"])
@pytest.mark.parametrize("block", range(1, 5))
def test_a_block_alone_moves_itself_and_what_predicts_for_its_sake(block, form):
    learner = alone(form=form)
    for (x, y), other in zip(PLAIN.batches(5), (4, 3, 2, 1, 0), strict=True):
        learner.step_block(other, x, y)
    before, running = weights_of(learner), {n: b.clone() for n, b in learner.model.named_buffers()}
    x, y = PLAIN.batches(1, seed=9)[0]
    result = learner.step_block(block, x, y)
    told = {(block - 1, "auxiliary")} if form != "critic" or block == 4 else set()
    # A critic's values reach it from the top alone, so those of the blocks further down have said nothing yet.
    speaks = form != "critic" or block >= 3
    wanted = ({(block, "block")} if speaks else set()) | {(block + 1, "inputs")} | told
    assert moved(before, weights_of(learner)) == wanted & before.keys()
    assert {name for name, buffer in learner.model.named_buffers() if not torch.equal(buffer, running[name])} == {
        f"{block}.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked") if block < 4
    }
    assert {(i, "auxiliary") for i in result.auxiliary} == told
    assert set(result.inputs) == {block + 1} - {5}
    assert result.batch == (5 if block == 4 else None)
    assert (result.loss == result.loss) == (block == 4)
    assert learner.steps == 6
    assert not learner._assembly.flights


def test_the_lowest_block_alone_moves_itself_and_the_input_above():
    for form in ("gradient", "critic"):
        learner = alone(form=form)
        randomise(learner)
        before = weights_of(learner)
        assert learner.step_block(0, *PLAIN.batches(1)[0]).auxiliary == {}
        assert moved(before, weights_of(learner)) == {(0, "block"), (1, "inputs")}


@pytest.mark.parametrize("block", [0, 1, 2, 3])
def test_a_block_alone_learns_as_in_a_step_and_its_neighbours_from_its_synthetic_input(block):
    """Every network that moves, by one step of descent at rate 1, against autograd through copies of those at hand."""
    samples, (x, y) = 8, PLAIN.batches(1, dtype=F64)[0]
    learners = []
    for _ in range(2):
        learners.append(learner_for(PLAIN, NO_LOCKS, optimizer=descent(1.0), auxiliary_optimizer=descent(1.0), dtype=F64))
        randomise(learners[-1])
    whole, apart = learners
    model, before = copy.deepcopy(apart.model), weights_of(apart)
    guesses = [x] + [copy.deepcopy(cell.inputs.networks[0])(x).detach() for cell in apart.cells[1:]]
    leaf, label = guesses[block].requires_grad_(), F.one_hot(y, CLASSES).to(F64)
    made = model[block](leaf.clone())
    if block == 3:
        (credit,) = torch.autograd.grad(F.cross_entropy(made, y), made, retain_graph=True)
    else:
        credit = copy.deepcopy(apart.cells[block].auxiliary[0])(made.detach(), label).detach() / samples
    wanted = {(block, "block"): torch.autograd.grad(made, list(model[block].parameters()), credit, retain_graph=True)}
    auxiliary, inputs = {}, {}
    if block:
        (delta,) = torch.autograd.grad(made, leaf, credit)
        below = copy.deepcopy(apart.cells[block - 1].auxiliary[0])
        regression = (below(leaf.detach(), label) - samples * delta).square().sum() / (2 * samples)
        wanted[block - 1, "auxiliary"] = torch.autograd.grad(regression, list(below.parameters()))
        auxiliary = {block - 1: regression.item()}
    if block < 3:
        above = copy.deepcopy(apart.cells[block + 1].inputs.networks[0])
        regression = (above(x) - made.detach()).square().sum() / (2 * samples)
        wanted[block + 1, "inputs"] = torch.autograd.grad(regression, list(above.parameters()))
        inputs = {block + 1: regression.item()}

    result = apart.step_block(block, x, y)
    after = weights_of(apart)
    assert moved(before, after) == wanted.keys()
    for key, gradient in wanted.items():
        assert_near([old - new for old, new in zip(before[key], after[key], strict=True)], list(gradient), 1e-11)
    assert {i: value.item() for i, value in result.auxiliary.items()} == pytest.approx(auxiliary, rel=1e-10)
    assert {i: value.item() for i, value in result.inputs.items()} == pytest.approx(inputs, rel=1e-10)
    # a step on the same batch moves the block, and the input above, to the same place
    together = whole.step(x, y)
    for key in ((block, "block"), (block + 1, "inputs")):
        assert_same(weights_of(whole).get(key), after.get(key))
    if block == 3:
        assert result.loss == together.loss


def test_blocks_in_random_order_on_random_batches_learn_digits():
    digits = lf.data.load("digits")
    x, y = digits.train.inputs.flatten(1), digits.train.targets
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU()),
        nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()),
        nn.Linear(32, 10),
    )
    learner = lf.convert(
        model,
        SyntheticGradients(conditioned=True, synthetic_inputs=True, hidden_layers=1, hidden_units=64),
        loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
        example_input=x[:4],
    )
    random, generator = Random(0), torch.Generator().manual_seed(0)
    stepped = [0, 0, 0]
    for _ in range(1200):
        block, rows = random.randrange(3), torch.randint(len(x), (64,), generator=generator)
        stepped[block] += 1
        learner.step_block(block, x[rows], y[rows])
    assert min(stepped) > 300
    predicted = learner.predict(digits.test.inputs.flatten(1)).argmax(1)
    accuracy = (predicted == digits.test.targets).float().mean().item()
    assert accuracy > 0.8  # chance is 0.1


@pytest.mark.parametrize(
    ("rule", "held"),
    [
        (Backprop(), "forward, update, backward"),
        (lf.rules.DirectFeedbackAlignment(), "forward, update"),
        (SyntheticGradients(conditioned=True), "forward"),
        (replace(NO_LOCKS, mix=0.5), "update, backward"),
        (replace(NO_LOCKS, warm_up=3), "update, backward"),
        (replace(NO_LOCKS, borders=(1,)), "forward, update, backward"),
    ],
    ids=["backprop", "dfa", "cdni", "mix", "warm up", "border"],
)
def test_a_rule_with_locks_cannot_step_a_block_alone(rule, held):
    learner = learner_for(PLAIN, rule)
    x, y = PLAIN.batches(1)[0]
    before = learner.state_dict()
    with pytest.raises(ValueError, match=f"^a block cannot be stepped alone under .* keeps the locks {held}: [^\n]*$"):
        learner.step_block(0, x, y)
    assert_same(learner.state_dict(), before)


@pytest.mark.parametrize("block", [-1, 4, 100])
def test_a_block_that_is_not_there_is_refused(block):
    learner = learner_for(PLAIN, NO_LOCKS)
    before = learner.state_dict()
    with pytest.raises(ValueError, match=f"^block {block}: this model has blocks 0 to 3$"):
        learner.step_block(block, *PLAIN.batches(1)[0])
    assert_same(learner.state_dict(), before)


def test_a_block_cannot_be_stepped_alone_with_batches_in_flight():
    learner = learner_for(PLAIN, NO_LOCKS, schedule=LATE)
    x, y = PLAIN.batches(1)[0]
    learner.step(x, y)
    before = learner.state_dict()
    with pytest.raises(ValueError, match=r"^[^\n]*batches in flight: call drain first$"):
        learner.step_block(0, x, y)
    assert_same(learner.state_dict(), before)
    learner.drain()
    learner.step_block(0, x, y)
    assert learner.steps == 2


@pytest.mark.parametrize("block", [0, 3])
@pytest.mark.parametrize("fault", ["empty", "labels", "single"])
def test_a_batch_that_does_not_fit_is_refused_by_a_block_alone(block, fault):
    learner = learner_for(PLAIN, NO_LOCKS)
    x, y = PLAIN.batches(1)[0]
    given_x, given_y, match = {
        "empty": (x[:0], y[:0], "the batch is empty"),
        "labels": (x, y + 3, "class numbers from"),
        "single": (x[:1], y[:1], "batch of one sample"),
    }[fault]
    before = learner.state_dict()
    with pytest.raises(ValueError, match=match):
        learner.step_block(block, given_x, given_y)
    assert_same(learner.state_dict(), before)


@pytest.mark.parametrize("block", [0, 3])
def test_a_block_alone_refuses_to_learn_from_what_is_not_finite(block):
    learner = learner_for(PLAIN, NO_LOCKS)
    trained(learner, PLAIN.batches(3))
    x, y = PLAIN.batches(1)[0]
    x[0, 0] = float("nan")
    before = dict(learner.state_dict()["model"])
    with pytest.raises(lf.Diverged):
        learner.step_block(block, x, y)
    assert_same(dict(learner.state_dict()["model"]), before)


def test_blocks_alone_and_whole_steps_may_alternate_and_resume():
    batches = PLAIN.batches(8)
    whole, other = (learner_for(PLAIN, NO_LOCKS, seed=seed) for seed in (0, 1))
    for number, (x, y) in enumerate(batches):
        if number == 4:
            other.load_state_dict(whole.state_dict())
        for learner in [whole] + [other] * (number >= 4):
            if number % 2:
                learner.step(x, y)
            else:
                learner.step_block(number // 2, x, y)
    assert_same(other.state_dict(), whole.state_dict())
    assert whole.steps == 8
