"""Recurrent learning step by step: streams, states that are carried and kept, and what is refused."""

import copy
import io
import itertools

import pytest
import recurrences
import torch
from recurrences import (
    CASES,
    CLASSES,
    EVERY,
    F64,
    FEATURES,
    HIDDEN,
    TIGHT,
    assert_same,
    batch_for,
    descent,
    everything,
    learner_for,
    network_for,
)
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import lockfree as lf
from lockfree.memory import ActivationMeter
from lockfree.recurrent import LeastSquaresGradient, SyntheticGradient


@pytest.fixture(autouse=True)
def _own_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


# ---- streams ------------------------------------------------------------------------------------------------------------------


def stream(learner, batch):
    """Passes a batch step by step; returns what was learnt."""
    steps = zip(*batch, strict=True)
    return [learnt for learnt in (learner.observe(*step)[1] for step in steps) if learnt is not None]


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("bootstrap", EVERY)
@pytest.mark.parametrize("name", ["lstm", "starting", "counting"])
def test_one_step_at_a_time_is_the_same_as_all_at_once(name, bootstrap, auxiliary):
    case, auxiliary = CASES[name], auxiliary and bootstrap != "none"
    batch = batch_for(case, steps=29)
    stretches, streams = (learner_for(*network_for(case), EVERY[bootstrap], auxiliary=auxiliary) for _ in range(2))
    whole = [stretches.step(*batch[:18]), stretches.step(*batch[18:])]
    parts = stream(streams, batch)
    assert [one.steps for one in parts] == [3] * 9
    parts.append(streams.drain())
    assert (parts[-1].steps, sum(one.updates for one in parts), streams.drain()) == (2, 10, None)
    assert sum(one.steps * one.loss for one in parts) == pytest.approx(sum(one.steps * one.loss for one in whole), abs=1e-9)
    for module, other in zip((streams.core, *streams.auxiliaries), (stretches.core, *stretches.auxiliaries), strict=True):
        torch.testing.assert_close([*module.parameters()], [*other.parameters()], rtol=0.0, atol=1e-10)


def test_a_stream_shows_the_scores_before_it_learns_from_them():
    case = CASES["lstm"]
    learner = learner_for(*network_for(case), "dni")
    batch = batch_for(case, steps=3)
    wanted, _ = learner.predict(batch.inputs, done=batch.done)
    for t in range(3):
        scores, learnt = learner.observe(batch.inputs[t], batch.targets[t], batch.done[t])
        torch.testing.assert_close(scores, wanted[t], **TIGHT)
        assert not scores.requires_grad
        assert (learnt is None) == (t < 2)


@pytest.mark.parametrize("name", ["echo", "noisy"])
@pytest.mark.parametrize("bootstrap", EVERY)
def test_a_look_between_two_steps_of_a_stream_changes_nothing(bootstrap, name):
    case, found = CASES["gru-cell"], []
    batch = batch_for(case, steps=8)
    for looks in (False, True):
        torch.manual_seed(5)
        network = Noisy().to(F64) if name == "noisy" else CASES["echo"].make().to(F64)
        learner = learner_for(network, nn.Linear(HIDDEN, CLASSES, dtype=F64), EVERY[bootstrap], auxiliary=bootstrap != "none")
        for step in zip(*batch, strict=True):
            learner.observe(*step)
            if looks:
                learner.predict(batch.inputs)
                learner.gradients(*batch)
        found.append(everything(learner))
    assert_same(*found)


def test_states_are_carried_until_a_reset():
    case = CASES["lstm"]
    batch, learner = batch_for(case, steps=12), None
    found = []
    for cuts in ([0, 12], [0, 3, 9, 12]):
        learner = learner_for(*network_for(case), SyntheticGradient(steps=6), auxiliary=True)
        for start, end in itertools.pairwise(cuts):
            learner.step(*batch[start:end])
        found.append(everything(learner))
    assert_same(*found)

    # After a reset the same weights begin anew, and what waits to be learnt is forgotten.
    core, readout = network_for(case)
    fresh = learner_for(core, readout, "none", optimizer=descent)
    core.load_state_dict(learner.core.state_dict())
    readout.load_state_dict(learner.readout.state_dict())
    used = learner_for(learner.core, learner.readout, "none", optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    used.step(*batch)
    used.observe(batch.inputs[0], batch.targets[0])
    used.reset()
    assert used.drain() is None
    used.optimizer.param_groups[0]["lr"] = 1.0
    assert used.step(*batch[:6]).loss == fresh.step(*batch[:6]).loss
    assert all(torch.equal(a, b) for a, b in zip(core.parameters(), used.core.parameters(), strict=True))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("bootstrap", ["none", SyntheticGradient(gamma=0.9), SyntheticGradient(steps=20)])
def test_memory_does_not_depend_on_the_length(bootstrap, streamed):
    case, peaks = CASES["gru"], []
    for steps in (80, 800):
        learner = learner_for(*network_for(case), bootstrap, horizon=10)
        batch, data = batch_for(case, steps=steps, samples=2, ends=0.0), nn.Module()
        for name, tensor in vars(batch).items():
            data.register_buffer(name, tensor)  # what the user holds anyway, of which chunks are views
        meter = ActivationMeter(learner.core, learner.readout, data)
        with meter.watch():
            if streamed:
                stream(learner, batch)
            else:
                learner.step(*batch)
        peaks.append(meter.peak)
    assert peaks[0] == peaks[1] > 0


# ---- keeping ------------------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Drops units and normalises over the batch at each step."""

    def __init__(self):
        super().__init__()
        self.cell, self.norm = nn.GRUCell(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN)

    def forward(self, x, h=None):
        h = F.dropout(self.norm(self.cell(x, h)), 0.3, self.training)
        return h, h


KEPT = {
    "lstm": lambda: nn.LSTM(FEATURES, HIDDEN, 2, dropout=0.3),
    "noisy": Noisy,
    "starting": CASES["starting"].make,
}


def kept_learner(name, bootstrap):
    torch.manual_seed(11)
    return learner_for(
        KEPT[name](), nn.Linear(HIDDEN, CLASSES), EVERY[bootstrap], auxiliary=bootstrap != "none", clip_norm=0.5, accumulate=2
    )


def draw(steps, samples=4):
    """Draws a stretch from the global generator, as a stream does that is made as it goes."""
    return torch.randn(steps, samples, FEATURES), torch.randint(0, CLASSES, (steps, samples)), torch.rand(steps, samples) < 0.15


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("bootstrap", EVERY)
@pytest.mark.parametrize("name", KEPT)
@pytest.mark.thinned(1)
def test_a_run_resumes_bit_by_bit_wherever_it_is_cut(name, bootstrap, streamed):
    def go(learner):
        if streamed:
            learner.observe(*(one[0] for one in draw(1)))
        else:
            learner.step(*draw(5))

    learner, saved = kept_learner(name, bootstrap), []
    rounds = 16 if streamed else 5
    for _ in range(rounds):
        saved.append(io.BytesIO())
        torch.save(learner.state_dict(), saved[-1])
        go(learner)
    wanted, random = everything(learner), torch.get_rng_state()
    fresh = kept_learner(name, bootstrap)
    for start in reversed(range(rounds)):  # at last what had seen nothing yet
        saved[start].seek(0)
        fresh.load_state_dict(torch.load(saved[start], weights_only=True))
        for _ in range(start, rounds):
            go(fresh)
        assert_same(everything(fresh), wanted)
        assert torch.equal(torch.get_rng_state(), random)


def test_a_snapshot_does_not_move_with_the_learner():
    learner = kept_learner("lstm", "dni")
    learner.step(*draw(6))
    learner.observe(*(one[0] for one in draw(1)))
    saved = learner.state_dict()
    before = copy.deepcopy(saved)
    learner.drain()
    learner.step(*draw(6))
    leaves = (pytree.tree_leaves(state) for state in (saved, before))
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*leaves, strict=True))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"horizon": 6}, "another horizon: it was saved with 6, this learner has 3"),
        ({"bootstrap": "none"}, "another bootstrap"),
        ({"auxiliary": True}, "another auxiliary task"),
        ({"core": nn.GRU(FEATURES, HIDDEN)}, "another core"),
        ({"readout": nn.Linear(HIDDEN, CLASSES, bias=False)}, "another readout"),
        ({"optimizer": torch.optim.Adam}, "another optimizer"),
        ({"core": nn.LSTM(FEATURES, HIDDEN, dtype=F64)}, "another core.*float64"),
    ],
)
def test_the_state_of_another_learner_is_refused(other, says):
    def make(**more):
        settings = {"core": nn.LSTM(FEATURES, HIDDEN), "readout": nn.Linear(HIDDEN, CLASSES), "bootstrap": "dni"} | more
        return learner_for(settings.pop("core"), settings.pop("readout"), settings.pop("bootstrap"), **settings)

    learner = make()
    learner.step(*draw(4))
    before = everything(learner)
    with pytest.raises(ValueError, match=says):
        learner.load_state_dict(make(**other).state_dict())
    assert_same(everything(learner), before)
    with pytest.raises(ValueError, match="not a recurrent learner's state: it lacks"):
        learner.load_state_dict({"core": {}})


# ---- bad input ----------------------------------------------------------------------------------------------------------------


def plain_learner(bootstrap="dni", **more):
    case = CASES["lstm"]
    core, readout = network_for(case)
    return learner_for(core, readout, bootstrap, **more)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("more", "kind", "says"),
    [
        *(
            ({"horizon": one}, ValueError, f"horizon={one}: give a whole number of steps, 1 or more")
            for one in (0, -1, 2.5, True)
        ),
        ({"bootstrap": 3}, TypeError, "bootstrap must be one such as"),
        ({"bootstrap": "dmi"}, ValueError, "dni"),
        ({"bootstrap": "none", "auxiliary": True}, ValueError, "give a bootstrap"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=1.0)}, TypeError, "must be a function such as"),
        ({"loss": "cross_entropy"}, TypeError, "loss must be a function"),
        ({"accumulate": 0}, ValueError, "accumulate=0"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm=0.0"),
    ],
)
def test_settings_out_of_range_are_refused(more, kind, says):
    with pytest.raises(kind, match=says) as raised:
        plain_learner(**more)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_trained_is_refused():
    with pytest.raises(TypeError, match=r"core must be a torch\.nn\.Module, got int"):
        learner_for(3, nn.Linear(1, 1), "none")
    with pytest.raises(ValueError, match="nothing to train"):
        learner_for(nn.Identity(), nn.Identity(), "none")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SyntheticGradient(scale=-0.1), "scale=-0.1: give 0 or more"),
        (lambda: SyntheticGradient(gamma=float("nan")), "gamma=nan: give 0 or more"),
        (lambda: SyntheticGradient(steps=0), "steps=0: give a multiple of the horizon"),
        (lambda: SyntheticGradient(reads="everything"), "state"),
        (lambda: SyntheticGradient(hidden_layers=-1), "hidden_layers=-1"),
        (lambda: SyntheticGradient(learning_rate=0.0), "learning_rate=0.0"),
        (lambda: LeastSquaresGradient(forgetting=1.0), "forgetting=1.0"),
        (lambda: LeastSquaresGradient(ridge=0.0), "ridge=0.0"),
        (lambda: plain_learner(SyntheticGradient(steps=4)).step(*batch_for(CASES["lstm"])), "steps=4: give a multiple.* 3"),
    ],
)
def test_a_bootstrap_out_of_range_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


BATCH = batch_for(CASES["lstm"])
X, Y, DONE = BATCH
WRONG = {
    "no step": (lambda one: one.step(X[:0], Y[:0]), "one step and one sample or more"),
    "no sample": (lambda one: one.step(X[:, :0], Y[:, :0]), "one step and one sample or more"),
    "one dimension": (lambda one: one.step(X[0, 0], Y[0, 0]), r"give a tensor \(steps, samples, ...\)"),
    "a step too few": (lambda one: one.step(X, Y[:-1]), "give one for each step and sample"),
    "a sample too few": (lambda one: one.step(X, Y[:, :-1]), "give one for each step and sample"),
    "targets of a wrong type": (lambda one: one.step(X, Y.double()), "the loss does not accept these targets"),
    "a class too many": (lambda one: one.step(X, torch.full_like(Y, CLASSES)), "the loss does not accept these targets"),
    "done of a wrong shape": (lambda one: one.step(X, Y, DONE[:, :-1]), "give a bool for each step and sample"),
    "done of a wrong type": (lambda one: one.step(X, Y, DONE.long()), "give a bool for each step and sample"),
    "one done too few": (lambda one: one.observe(X[0], Y[0], DONE[0, :-1]), "give a bool for each step and sample"),
    "other features": (lambda one: one.step(X[..., :-1], Y), "have been float64"),
    "another type": (lambda one: one.step(X.float(), Y), "inputs are float32.*have been float64"),
    "other samples": (lambda one: one.step(X[:, :-1], Y[:, :-1]), r"inputs hold 5 samples.*of 6: call reset\(\)"),
    "a state of another structure": (
        lambda one: one.predict(X, state=torch.zeros(2, 6, HIDDEN)),
        "the state is .*this core's is",
    ),
    "a state of other sizes": (
        lambda one: one.predict(X, state=(torch.zeros(2, 6, HIDDEN, dtype=F64), torch.zeros(2, 6, 1, dtype=F64))),
        "the state is .*this core's is",
    ),
    "a state of other samples": (lambda one: one.predict(X[:, :-1], state=one.predict(X)[1]), "for 5 samples this core's is"),
    "a state of whole numbers": (
        lambda one: one.predict(X, state=(torch.zeros(2, 6, HIDDEN, dtype=F64), torch.zeros(2, 6, HIDDEN, dtype=torch.int64))),
        "the state is .*this core's is",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_is_learnt(what):
    call, says = WRONG[what]
    learner = plain_learner()
    learner.step(*BATCH)
    before = everything(learner)
    with pytest.raises(ValueError, match=says) as raised:
        call(learner)
    assert "\n" not in str(raised.value)
    assert_same(everything(learner), before)


def test_a_loss_that_is_not_one_number_is_refused():
    with pytest.raises(ValueError, match="the loss must return one scalar tensor"):
        plain_learner(loss=lambda scores, y: F.cross_entropy(scores, y, reduction="none")).step(*BATCH)


def test_chunks_before_the_one_that_fails_have_been_learnt():
    inputs, targets = X.clone(), Y.clone()
    inputs[7, 1], targets[8, 1] = torch.nan, CLASSES
    wanted = plain_learner()
    wanted.step(*BATCH[:6])
    for x, y, kind in ((inputs, Y, lf.Diverged), (X, targets, ValueError)):
        learner = plain_learner()
        with pytest.raises(kind, match=r"nan|the loss does not accept these targets"):
            learner.step(x, y, DONE)
        assert_same(everything(learner), everything(wanted))


def test_a_step_that_the_loss_refuses_takes_its_chunk_with_it():
    learner = plain_learner()
    stream(learner, BATCH[:3])
    before = everything(learner)
    stream(learner, BATCH[3:5])
    with pytest.raises(ValueError, match="the loss does not accept these targets"):
        learner.observe(X[5], torch.full_like(Y[5], CLASSES), DONE[5])
    assert_same(everything(learner), before)
    assert learner.drain() is None
    assert [one.steps for one in stream(learner, BATCH[3:9])] == [3, 3]


def test_a_stretch_while_observed_steps_wait_is_refused():
    learner = plain_learner()
    stream(learner, BATCH[:5])
    before = everything(learner)
    with pytest.raises(ValueError, match=r"2 observed steps wait to be learnt: call drain\(\) before step"):
        learner.step(*BATCH)
    assert_same(everything(learner), before)
    assert learner.drain().steps == 2


def test_the_truth_cannot_be_told_in_a_stream():
    learner = plain_learner("oracle")
    with pytest.raises(ValueError, match="pass whole sequences to step"):
        stream(learner, BATCH)


class Normalised(nn.Module):
    """Normalises what it takes in, and what a gated cell makes of it."""

    def __init__(self):
        super().__init__()
        self.norm, self.cell = nn.BatchNorm1d(FEATURES), nn.GRUCell(FEATURES, HIDDEN)

    def forward(self, x, h=None):
        h = self.cell(self.norm(x), h)
        return h, h


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("bootstrap", EVERY)
def test_what_is_not_a_number_is_not_learnt(bootstrap, seen, streamed):
    found = []
    for broken in (False, True):
        torch.manual_seed(3)
        readout = nn.Sequential(nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, CLASSES)).to(F64)
        learner = learner_for(
            Normalised().to(F64), readout, EVERY[bootstrap], auxiliary=bootstrap != "none", clip_norm=1.0, accumulate=2
        )
        if seen:
            learner.step(*BATCH[:9])
        if broken:
            inputs = X[:3].clone()
            inputs[1, 2] = torch.nan
            bad = recurrences.Batch(inputs=inputs, targets=Y[:3], done=DONE[:3])
            before = everything(learner)
            with pytest.raises(lf.Diverged, match=r"^the loss is nan at update \d: lower the learning rate"):
                stream(learner, bad) if streamed else learner.step(*bad)
            if seen:
                assert_same(everything(learner), before)
        learner.step(*BATCH)
        found.append(everything(learner))
    assert_same(*found)


@pytest.mark.parametrize("bootstrap", EVERY)
def test_a_state_that_is_not_a_number_is_seen_even_where_the_loss_is_not_taken(bootstrap):
    learner = plain_learner(
        EVERY[bootstrap], loss=lambda scores, y: F.cross_entropy(scores, y, ignore_index=-1, reduction="sum") / len(y)
    )
    learner.step(*BATCH)
    before = everything(learner)
    inputs = X[:3].clone()
    inputs[1, 2] = torch.nan
    ignored = Y[:3].clone()
    ignored[:, 2] = -1
    with pytest.raises(lf.Diverged, match=r"^the state is not finite at update 4"):
        learner.step(inputs, ignored)
    assert_same(everything(learner), before)
    learner.step(*BATCH)
