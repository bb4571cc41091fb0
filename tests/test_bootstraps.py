"""What stands for the gradient from beyond the horizon: what each begins as, learns, forgets, and keeps in a checkpoint."""

import copy
import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from cases import assert_same, copy_of, differs
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree.recurrent import (
    BOOTSTRAPS,
    Alternating,
    Bootstrap,
    Border,
    BPLambda,
    CoordinatewiseSynthesiser,
    Estimator,
    Layout,
    LeastSquaresGradient,
    NoBootstrap,
    Oracle,
    RecurrentSynthesiser,
    Report,
    Site,
    SyntheticGradient,
    WarmRestarts,
)

F64, SAMPLES, UNITS, T = torch.float64, 3, 4, 2
SMALL = CoordinatewiseSynthesiser(hidden_units=5, learning_rate=0.01, zero_start=True)
BEGIN_AT_ZERO = {
    "bp-lambda": BPLambda(lam=0.9, learning_rate=0.01),
    "dni": SyntheticGradient(learning_rate=0.01),
    "dni-coordinatewise": SMALL,
    "dni-coordinatewise-lstm": replace(SMALL, cell="lstm"),
    "dni-recurrent": RecurrentSynthesiser(learning_rate=0.01),
    "dni-recurrent-far": RecurrentSynthesiser(learning_rate=0.01, steps=2 * T, reads="output", gamma=0.9),
    "dni-solved": LeastSquaresGradient(every=1),
}
ALTERNATING = Alternating(bootstrap=SyntheticGradient(learning_rate=0.01), restarts=WarmRestarts(first=2), begins="real")
KEPT = {
    **BEGIN_AT_ZERO,
    "alternating": replace(ALTERNATING, bootstrap=SMALL),
    "alternating-traces": replace(ALTERNATING, bootstrap=BEGIN_AT_ZERO["bp-lambda"], begins="synthetic"),
    "dni-coordinatewise-uniform": replace(SMALL, zero_start=False),
}


@pytest.fixture(autouse=True)
def _own_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def learner_for(bootstrap, rate=0.1, core=nn.LSTM):
    torch.manual_seed(3)
    made, readout = core(2, UNITS, dtype=F64), nn.Linear(UNITS, 2, dtype=F64)
    return lf.recurrent.convert(
        made, readout, horizon=T, bootstrap=bootstrap, loss=F.mse_loss, optimizer=lambda p: torch.optim.SGD(p, lr=rate)
    )


def stretch(steps, seed=5, ends=0.0):
    """Inputs and targets, and who is done, each with a chance of ``ends``."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randn(steps, SAMPLES, 2, generator=generator, dtype=F64) for _ in range(2))
    return inputs, targets, torch.rand(steps, SAMPLES, generator=generator) < ends


def weights(learner):
    return [copy_of(learner.core), copy_of(learner.readout)]


# ---- how it begins, and what a checkpoint keeps --------------------------------------------------------------------------------


def test_every_bootstrap_has_a_name_and_settings_of_its_own():
    assert {"alternating", "bp-lambda", "dni", "dni-coordinatewise", "dni-recurrent", "dni-solved", "none", "oracle"} <= set(
        BOOTSTRAPS
    )
    assert len(set(BOOTSTRAPS.values())) == len(BOOTSTRAPS)
    for name in set(BOOTSTRAPS) - {"oracle"}:
        learner = lf.recurrent.convert(
            nn.GRU(2, 3),
            nn.Linear(3, 2),
            horizon=2,
            bootstrap=name,
            loss=F.mse_loss,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        )
        learnt = learner.step(torch.ones(6, 2, 2), torch.zeros(6, 2, 2))
        assert (learnt.synthetic is None) == (name == "none"), name
        assert all(p.dtype == torch.float32 for module in learner.auxiliaries for p in module.parameters())


@pytest.mark.parametrize("name", BEGIN_AT_ZERO)
def test_what_begins_at_zero_leaves_the_first_step_as_it_is_without(name):
    learner, plain = learner_for(BEGIN_AT_ZERO[name]), learner_for(NoBootstrap())
    for one in (learner, plain):
        one.step(*stretch(T))
    assert_same(weights(learner), weights(plain))
    for _ in range(3):
        for one in (learner, plain):
            one.step(*stretch(3 * T))
    assert differs(weights(learner), weights(plain))


@pytest.mark.parametrize("ends", [0.0, 0.3])
@pytest.mark.parametrize("name", KEPT)
def test_a_resume_after_any_step_of_a_stream_is_bit_identical(name, ends):
    learner = learner_for(KEPT[name])
    steps = [[one.unsqueeze(0) for one in step] for step in zip(*stretch(13, ends=ends), strict=True)]
    states = [learner.state_dict()]
    for inputs, targets, done in steps:
        learner.observe(inputs[0], targets[0], done[0])
        states.append(learner.state_dict())
    assert differs(states[-1]["horizon"]["estimator"], states[4]["horizon"]["estimator"])
    for before, after, (inputs, targets, done) in zip(states, states[1:], steps, strict=False):
        resumed = learner_for(KEPT[name])
        resumed.load_state_dict(copy.deepcopy(before))
        assert_same(resumed.state_dict(), before)
        resumed.observe(inputs[0], targets[0], done[0])
        assert_same(resumed.state_dict(), after)


@pytest.mark.parametrize("name", KEPT)
def test_a_resume_between_stretches_is_bit_identical(name):
    learner, resumed = learner_for(KEPT[name]), learner_for(KEPT[name])
    for seed in range(4):
        resumed.load_state_dict(learner.state_dict())
        for one in (learner, resumed):
            one.step(*stretch(5, seed=seed, ends=0.2))  # its last chunk is a shorter one
        assert_same(learner.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("name", KEPT)
def test_reset_forgets_the_sequences_and_keeps_what_was_learnt(name):
    learner = learner_for(KEPT[name], rate=0.0)
    learner.step(*stretch(10))
    learner.reset()
    estimator = learner.auxiliaries[0]
    kept, (inputs, targets, done) = copy_of(estimator), stretch(T, seed=9)
    first = learner.gradients(inputs, targets, done)
    learner.step(inputs, targets, done)  # one border: nothing to learn from yet
    after, noisy = copy_of(estimator), [key for key in kept if key.endswith("drawn")]
    assert_same({**kept, **{key: after[key] for key in noisy}}, after)
    if not noisy:
        assert_same(first, learner.gradients(inputs, targets, done))


class Noting(Estimator):
    """Notes its borders and reports, of whatever estimates."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.borders, self.reports, self.errors = inner, [], [], []

    def scale(self, update):
        return 0.0

    def gamma(self, update):
        return self.inner.gamma(update)

    @property
    def chunks(self):
        return self.inner.chunks

    @property
    def wants_jacobian(self):
        return self.inner.wants_jacobian

    def estimate(self, border):
        estimate = self.inner.estimate(border)
        self.borders.append(border)
        if border.ahead is not None:
            truth = border.ahead()
            self.errors.append([(estimate - truth).square().sum().item(), truth.square().sum().item()])
        return estimate

    def learn(self, report):
        self.reports.append(report)
        return self.inner.learn(report)


@dataclass(frozen=True, kw_only=True)
class Noted(Bootstrap):
    inner: Bootstrap

    def estimator(self, site):
        return Noting(self.inner.estimator(site))


# ---- what an estimator is told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_a_border_says_who_began_inside_of_its_chunk_and_who_ended_with_it(streams):
    learner, (inputs, targets, done) = learner_for(Noted(inner=SyntheticGradient())), stretch(6 * T, ends=0.3)
    learner.horizon = 3
    if streams:
        for step in zip(inputs, targets, done, strict=True):
            learner.observe(*step)
    else:
        learner.step(inputs, targets, done)
    borders = learner.auxiliaries[0].borders
    assert len(borders) == 4
    for index, border in enumerate(borders):
        assert torch.equal(border.begun, done[3 * index : 3 * index + 2].any(0))
        assert torch.equal(border.ended, done[3 * index + 2])
    assert any(border.begun.any() and not border.begun.all() for border in borders)


@pytest.mark.parametrize("inner", [BPLambda(), SyntheticGradient(gamma=0.5), SyntheticGradient(steps=2 * T)], ids=repr)
def test_a_report_tells_nothing_of_samples_that_had_ended(inner):
    learner, (inputs, targets, done) = learner_for(Noted(inner=inner)), stretch(8)
    done[T - 1, 1] = done[2 * T - 1, 0] = True
    learner.step(inputs, targets, done)
    reports = learner.auxiliaries[0].reports
    for report in reports:
        ended = report.border.ended
        assert report.truth[ended].eq(0).all()
        assert report.truth[~ended].ne(0).all()
        assert report.jacobian is None or report.jacobian[ended].eq(0).all()
        assert report.jacobian is None or report.jacobian[~ended].ne(0).any()
    assert sum(int(report.border.ended.sum()) for report in reports) == 2


# ---- each learns ---------------------------------------------------------------------------------------------------------------


class Decaying(nn.Module):
    """s <- 0.6 s + x: what is to come of a loss that is the square of s is linear in s, and the same for every number of it."""

    def forward(self, inputs, state):
        state = 0.6 * state + inputs
        return state, state

    def initial_state(self, samples):
        return torch.zeros(samples, 2, dtype=F64)


EASY = CoordinatewiseSynthesiser(scale=1.0, hidden_units=20, learning_rate=0.005)
LEARNS = {  # what is left of the error of an estimate of zero
    "bp-lambda": (BPLambda(lam=0.9, learning_rate=0.01), 200, 0.05),
    "bp-lambda-0": (BPLambda(lam=0.0, learning_rate=0.01), 200, 0.05),
    "bp-lambda-sgd": (BPLambda(lam=1.0, learning_rate=0.1, optimizer="sgd", clip=1.0), 200, 0.05),
    "dni": (SyntheticGradient(learning_rate=0.01, hidden_units=20), 400, 0.1),
    "dni-coordinatewise": (replace(EASY, noise=0.0), 400, 0.1),
    "dni-coordinatewise-lstm": (replace(EASY, noise=0.1, cell="lstm"), 400, 0.1),
    "dni-recurrent": (RecurrentSynthesiser(learning_rate=0.01, hidden_units=20), 400, 0.1),
    "dni-recurrent-far": (RecurrentSynthesiser(learning_rate=0.01, hidden_units=20, steps=2 * T), 400, 0.1),
    "dni-solved": (LeastSquaresGradient(), 200, 0.05),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", LEARNS)
def test_it_learns_the_true_gradient_of_a_stationary_linear_problem(name):
    bootstrap, updates, fraction = LEARNS[name]
    readout = nn.Linear(2, 2, bias=False, dtype=F64)
    nn.init.eye_(readout.weight)
    learner = lf.recurrent.convert(
        Decaying(),
        readout,
        horizon=T,
        bootstrap=Noted(inner=bootstrap),
        loss=F.mse_loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )
    generator = torch.Generator().manual_seed(1)
    done = torch.zeros(10 * T, 16, dtype=torch.bool)

    done[-1] = True
    for _ in range(updates // 10):
        inputs = torch.zeros(10 * T, 16, 2, dtype=F64)
        inputs[:2] = torch.randn(2, 16, 2, generator=generator, dtype=F64)  # and nothing after it: the future is known
        learner.step(inputs, torch.zeros_like(inputs), done)
    assert learner.updates == updates
    # Of the first half of each stretch, where its end is far; the first stretch, and the last ten.
    errors = torch.tensor(learner.auxiliaries[0].errors).unflatten(0, (-1, 10))[:, :5].sum(1)
    assert errors[0, 0] > 0.4 * errors[0, 1]
    assert errors[-10:, 0].sum() < fraction * errors[-10:, 1].sum()


# ---- synthesisers that remember ------------------------------------------------------------------------------------------------


def site_for(width=3, dtype=F64):
    return Site(
        Layout(torch.zeros(2, width, dtype=dtype), [0]), torch.zeros(2, width, dtype=dtype), torch.zeros(2, 5, dtype=dtype), T
    )


def border_for(seed, ended=None, begun=None, samples=2, width=3):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(samples, width, generator=generator, dtype=F64)
    return Border(rows, torch.randn(samples, 5, generator=generator, dtype=F64), ended, None, begun)


def awake(bootstrap, width=3):
    """An estimator of which no weight is zero."""
    torch.manual_seed(2)
    estimator = bootstrap.estimator(site_for(width))
    for parameter in estimator.parameters():
        nn.init.normal_(parameter, std=0.5)
    return estimator


REMEMBER = {
    "recurrent": RecurrentSynthesiser(hidden_units=6),
    "gru": CoordinatewiseSynthesiser(hidden_units=6, noise=0.0),
    "lstm": CoordinatewiseSynthesiser(hidden_units=6, noise=0.0, cell="lstm"),
}
FIRST = torch.tensor([True, False])


@pytest.mark.parametrize("how", ["ended", "begun"])
@pytest.mark.parametrize("name", REMEMBER)
def test_a_memory_is_renewed_with_its_sequence_and_kept_else(name, how):
    remembering, fresh, other = (awake(REMEMBER[name]) for _ in range(3))
    remembering.estimate(border_for(1, ended=FIRST if how == "ended" else None))
    other.estimate(border_for(1))
    second = border_for(2)
    seen = remembering.estimate(second._replace(begun=FIRST if how == "begun" else None))
    new, old = fresh.estimate(second), other.estimate(second)
    torch.testing.assert_close(seen, torch.stack([new[0], old[1]]), rtol=0, atol=1e-13)
    assert (new - old).abs().min() > 1e-4
    other.reset()
    assert torch.equal(other.estimate(second), new)


@pytest.mark.parametrize("name", REMEMBER)
def test_it_descends_its_error_from_the_memory_as_it_was(name):
    estimator = awake(REMEMBER[name])
    borders = [border_for(1), border_for(2, ended=FIRST), border_for(3)]
    estimator.estimate(borders[0])
    memory = estimator.memory.clone()
    for border in borders[1:]:
        estimator.estimate(border)
    twin, truth = copy.deepcopy(estimator), torch.randn(2, 3, dtype=F64)
    loss = 0.5 * (twin.run(borders[1].rows, memory)[0] - truth)[1].square().sum()  # of the sample that went on
    gradients = torch.autograd.grad(loss, list(twin.parameters()))
    before = copy_of(estimator)
    told = estimator.learn(Report(borders[1], truth, None))
    torch.testing.assert_close(told, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close([p.grad for p in estimator.parameters()], list(gradients), rtol=0, atol=1e-13)
    assert all(differs(p.detach(), before[name]) for name, p in estimator.named_parameters())
    assert estimator.learn(Report(borders[1]._replace(ended=torch.tensor([True, True])), truth, None)) is None


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_what_it_kept_of_a_border_is_that_of_its_report(chunks):
    learner = learner_for(Noted(inner=RecurrentSynthesiser(steps=chunks * T)))
    noting = None
    for step in zip(*stretch(8 * T, ends=0.2), strict=True):
        learner.observe(*step)
        noting = learner.auxiliaries[0]
        if noting.reports:
            assert torch.equal(noting.inner.kept[0][0], noting.reports[-1].border.rows)
    assert len(noting.reports) == 8 - chunks


def test_the_recurrent_one_is_a_gated_recurrent_unit_over_borders():
    estimator, unit = awake(REMEMBER["recurrent"]), nn.GRU(3, 6, dtype=F64)
    unit.load_state_dict({f"{name}_l0": value for name, value in estimator.cell.state_dict().items()})
    borders = [border_for(seed) for seed in range(4)]
    estimates = torch.stack([estimator.estimate(border) for border in borders])
    expected = estimator.last(unit(torch.stack([border.rows for border in borders]))[0])
    torch.testing.assert_close(estimates, expected.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_coordinatewise_one_runs_the_same_unit_over_each_number_of_the_state(cell):
    estimator = awake(REMEMBER[cell])
    unit = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](6, 6, dtype=F64)
    unit.load_state_dict({f"{name}_l0": value for name, value in estimator.cell.state_dict().items()})
    borders = [border_for(seed) for seed in range(4)]
    estimates = torch.stack([estimator.estimate(border) for border in borders])
    rows = torch.stack([border.rows for border in borders])
    for number in range(3):
        expected = estimator.last(unit(estimator.first(rows[:, :, number, None]))[0])[..., 0]
        torch.testing.assert_close(estimates[:, :, number], expected.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("cell", "count"), [("gru", 100 + 15300 + 51), ("lstm", 100 + 20400 + 51)])
def test_the_coordinatewise_one_is_as_large_for_any_state_and_starts_as_theirs(cell, count):
    for width in (3, 30):
        estimator = CoordinatewiseSynthesiser(cell=cell).estimator(site_for(width))
        assert sum(p.numel() for p in estimator.parameters()) == count
        assert 0.05 < estimator.last.weight.abs().max() <= 0.1
        assert estimator.last.bias.eq(0).all()
        assert (estimator.scale(0), estimator.gamma(0)) == (0.1, 0.1)


def test_the_noise_multiplies_around_one_and_is_its_own():
    estimator, twin, other = (CoordinatewiseSynthesiser(seed=seed, noise=0.5).estimator(site_for(400)) for seed in (0, 0, 1))
    border = border_for(1, samples=100, width=400)
    before = torch.get_rng_state()
    factors = [one.look(border) / border.rows for one in (estimator, twin, other)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(factors[0], factors[1])
    assert (factors[0] - factors[2]).abs().mean() > 0.3
    assert factors[0].mean().item() == pytest.approx(1.0, abs=0.01)
    assert factors[0].std().item() == pytest.approx(0.5, abs=0.01)
    assert (estimator.look(border) / border.rows - factors[0]).abs().mean() > 0.3  # another at every border
    twin.load_state_dict(estimator.state_dict())
    assert torch.equal(estimator.look(border), twin.look(border))


@pytest.mark.parametrize(
    "wrong",
    [
        (RecurrentSynthesiser(), {"hidden_units": 0}),
        (RecurrentSynthesiser(), {"learning_rate": 0.0}),
        (RecurrentSynthesiser(), {"reads": "outputs"}),
        (SMALL, {"hidden_units": 0}),
        (SMALL, {"learning_rate": -1.0}),
        (SMALL, {"weight_decay": -1.0}),
        (SMALL, {"noise": -0.5}),
        (SMALL, {"reads": "output"}),
        (SMALL, {"cell": "rnn"}),
        (SMALL, {"scale": -1.0}),
        (WarmRestarts(), {"first": 0}),
        (WarmRestarts(), {"growth": 1}),
        (WarmRestarts(lengths=True), {"growth": 0}),
        (ALTERNATING, {"begins": "reel"}),
    ],
    ids=lambda wrong: f"{type(wrong[0]).__name__}-{wrong[1]}",
)
def test_settings_out_of_range_are_refused(wrong):
    settings, changes = wrong
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(settings, **changes)


# ---- alternation ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("restarts", "begins"),
    [
        (WarmRestarts(first=5), [0, 5, 10, 20, 40, 80]),
        (WarmRestarts(first=160), [0, 160, 320, 640]),
        (WarmRestarts(first=2, growth=3), [0, 2, 6, 18, 54]),
        (WarmRestarts(first=5, lengths=True), [0, 5, 15, 35, 75]),
        (WarmRestarts(first=7, growth=1, lengths=True), [0, 7, 14, 21, 28]),
    ],
    ids=repr,
)
def test_restarts_come_when_they_should(restarts, begins):
    cycles = [restarts.cycle(update) for update in range(begins[-1] + 1)]
    assert [cycles.index(cycle) for cycle in range(len(begins))] == begins == [restarts.begins(c) for c in range(len(begins))]
    assert cycles == sorted(cycles)
    shares = [restarts.share(update) for update in range(begins[-1] + 1)]
    assert [update for update, share in enumerate(shares) if share == 1.0] == begins
    assert all(later < share for share, later in itertools.pairwise(shares) if later != 1.0)
    assert restarts.share(begins[1] - 1) == pytest.approx(0.5 * (1 + math.cos(math.pi * (begins[1] - 1) / begins[1])))


def test_cycles_whose_lengths_grow_are_those_of_pytorch():
    restarts = WarmRestarts(first=5, growth=2, lengths=True)
    optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3) for _ in range(2)]
    ours = restarts.scheduler(optimizers[0])
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizers[1], T_0=5, T_mult=2)
    for update in range(40):
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        assert rates[0] == pytest.approx(rates[1], rel=1e-12)
        assert rates[0] == 0.3 * restarts.share(update)
        for optimizer, scheduler in zip(optimizers, (ours, theirs), strict=True):
            optimizer.step()
            scheduler.step()


def test_a_scheduler_drives_a_learners_rate():
    learner, restarts = learner_for(ALTERNATING), WarmRestarts(first=2)
    scheduler = restarts.scheduler(learner.optimizer)
    rates = []
    for _ in range(5):
        rates.append(learner.optimizer.param_groups[0]["lr"])
        for _ in range(learner.step(*stretch(T)).updates):
            scheduler.step()
    assert rates == pytest.approx([0.1, 0.05, 0.1, 0.05, 0.1])


@pytest.mark.parametrize("begins", ["real", "synthetic"])
@pytest.mark.parametrize("name", BEGIN_AT_ZERO)
def test_real_cycles_step_as_if_nothing_estimated_while_it_learns_in_all(name, begins):
    bootstrap = Alternating(bootstrap=BEGIN_AT_ZERO[name], restarts=WarmRestarts(first=3), begins=begins)
    learner, real = learner_for(bootstrap), []
    for _ in range(8):  # three chunks at a time, of one cycle: restarts at 3, 6, 12, 24
        plain = learner_for(NoBootstrap())
        plain.core.load_state_dict(learner.core.state_dict())
        plain.readout.load_state_dict(learner.readout.state_dict())
        learner.reset()
        estimates = copy_of(learner.auxiliaries[0]) if learner.auxiliaries else None
        data = stretch(3 * T, seed=learner.updates)
        for one in (learner, plain):
            one.step(*data)
        assert estimates is None or differs(estimates, copy_of(learner.auxiliaries[0]))
        real.append(not differs(weights(learner), weights(plain)))
    cycles = [0, 1, 2, 2, 3, 3, 3, 3]
    expected = [cycle % 2 == ("real", "synthetic").index(begins) for cycle in cycles]
    assert real[1:] == expected[1:]


def test_it_keeps_what_the_inner_one_wants():
    site = site_for()
    traces = Alternating(bootstrap=BPLambda(scale=0.3, gamma=0.8), restarts=WarmRestarts(first=2)).estimator(site)
    assert [traces.scale(update) for update in range(8)] == [0, 0, 0.3, 0.3, 0, 0, 0, 0]
    assert {traces.gamma(update) for update in range(8)} == {0.8}
    assert traces.wants_jacobian
    assert Alternating(bootstrap=RecurrentSynthesiser(steps=3 * T)).estimator(site).chunks == 3


def test_there_is_nothing_to_alternate_with_where_nothing_estimates():
    with pytest.raises(ValueError, match="nothing to alternate with"):
        learner_for(Alternating(bootstrap=NoBootstrap())).step(*stretch(T))


def test_it_alternates_the_truth_itself():
    learner, full = learner_for(Alternating(bootstrap=Oracle(), begins="synthetic")), learner_for(Oracle())
    inputs, targets, done = stretch(4 * T)
    assert_same(learner.gradients(inputs, targets, done), full.gradients(inputs, targets, done))
