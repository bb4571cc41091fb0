"""BP(λ): traces that run forward against targets that look forward, by backpropagation through all of time."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree.recurrent import Border, BPLambda, Layout, Report, Site, SyntheticGradient
from lockfree.recurrent.eligibility import LARGEST, EligibilityTraces

F64, SAMPLES, SIZES = torch.float64, 3, (2, 3)


@pytest.fixture(autouse=True)
def _own_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


class Linear(nn.Module):
    """A linear recurrent network, one step at a time; its transition is not symmetric."""

    def __init__(self, inputs, units):
        super().__init__()
        self.within, self.into = nn.Linear(units, units, dtype=F64), nn.Linear(inputs, units, dtype=F64)

    def forward(self, inputs, state):
        state = self.within(state) + self.into(inputs)
        return state, state

    def initial_state(self, samples):
        return torch.zeros(samples, self.within.in_features, dtype=F64)


CORES = {"linear": Linear, "tanh": lambda *sizes: nn.RNN(*sizes, dtype=F64), "lstm": lambda *sizes: nn.LSTM(*sizes, dtype=F64)}


class Gathering(EligibilityTraces):
    """Keeps its weight, and gathers what it would have done with it."""

    def __init__(self, settings, site):
        super().__init__(settings, site)
        self.total, self.borders, self.reports = torch.zeros_like(self.weight), [], []
        nn.init.normal_(self.weight)

    def estimate(self, border):
        self.borders.append((border, border.ahead()))
        return super().estimate(border)

    def learn(self, report):
        self.reports.append(report)
        self.total += self.correction(report)


@dataclass(frozen=True, kw_only=True)
class Gathered(BPLambda):
    def estimator(self, site):
        return Gathering(self, site)


def learner_for(bootstrap, core="tanh", horizon=2, rate=0.0):
    torch.manual_seed(3)
    made, readout = CORES[core](*SIZES), nn.Linear(SIZES[1], 2, dtype=F64)
    return lf.recurrent.convert(
        made, readout, horizon=horizon, bootstrap=bootstrap, loss=F.mse_loss, optimizer=lambda p: torch.optim.SGD(p, lr=rate)
    )


def stretch(steps, ends=(), seed=5, samples=SAMPLES):
    """A stretch, with the ends of sequences at (step, sample); all end with the last step."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randn(steps, samples, 2, generator=generator, dtype=F64) for _ in range(2))
    done = torch.zeros(steps, samples, dtype=torch.bool)
    done[-1] = True
    for step, sample in ends:
        done[step, sample] = True
    return inputs, targets, done


def gathered(core, ends=(), steps=13, **settings):
    learner = learner_for(Gathered(**settings), core)
    learner.step(*stretch(steps, ends))
    return learner.auxiliaries[0]


def products(errors, borders):
    """Sum over borders of the errors (m, width) times [s; 1], the mean over samples; zero where a sequence ended."""
    total = 0
    for error, border in zip(errors, borders, strict=True):
        x = torch.cat([border.rows, border.rows.new_ones(len(border.rows), 1)], dim=1)
        for n in range(len(x)):
            if border.ended is None or not border.ended[n]:
                total = total + torch.outer(error[n], x[n]) / len(x)
    return total


# Ends at a border (after an even number of steps) and inside of a chunk, one sample with several.
ENDS = {"one_sequence": (), "several": [(3, 0), (6, 1), (4, 2), (7, 2), (9, 2)]}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("core", CORES)
def test_with_lambda_and_gamma_one_the_steps_of_a_sequence_sum_to_the_errors_against_full_backpropagation(core, ends):
    estimator = gathered(core, ENDS[ends], lam=1.0, gamma=1.0, scale=0.3)
    borders = estimator.borders[:-1]  # nothing comes after the last
    assert len(borders) == 6
    errors = [ahead - estimator._value(border.rows) for border, ahead in borders]
    expected = products(errors, [border for border, _ in borders]).detach()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(estimator.total, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(("lam", "gamma"), [(0.0, 0.9), (0.3, 0.9), (0.8, 0.5), (1.0, 0.7)])
def test_the_steps_of_a_sequence_sum_to_the_errors_against_the_lambda_return(lam, gamma, ends):
    estimator = gathered("linear", ENDS[ends], lam=lam, gamma=gamma)
    reports, errors, beyond = estimator.reports, [], torch.zeros(SAMPLES, SIZES[1], dtype=F64)
    assert all((report.jacobian is None) == (lam == 0) for report in reports)
    for report in reversed(reports):
        error = report.truth - estimator._value(report.border.rows)
        if lam:
            error = error + gamma * lam * torch.einsum("mji,mj->mi", report.jacobian, beyond)
        beyond = error if report.border.ended is None else error.masked_fill(report.border.ended.unsqueeze(1), 0.0)
        errors.insert(0, error)
    expected = products(errors, [report.border for report in reports]).detach()
    torch.testing.assert_close(estimator.total, expected, rtol=0, atol=1e-10)


def test_the_true_gradient_of_a_linear_loss_is_a_fixed_point():
    """Where the gradient beyond every border is a linear function of the state, BP(λ) has nothing to correct."""
    a = 0.5  # s <- a s; a sample's loss at a step is half the sum of s² over the two units that are read
    learner = learner_for(Gathered(lam=0.7, gamma=1.0), "linear", horizon=1)
    with torch.no_grad():
        learner.core.within.weight.copy_(a * torch.eye(3, dtype=F64))
        learner.core.within.bias.zero_()
        learner.readout.weight.copy_(torch.eye(2, 3, dtype=F64))
        learner.readout.bias.zero_()
        learner.core.into.bias.zero_()
    inputs, _, _ = stretch(40)
    inputs[1:] = 0
    learner.step(inputs[:1], torch.zeros(1, SAMPLES, 2, dtype=F64))  # builds the estimator
    estimator = learner.auxiliaries[0]
    with torch.no_grad():  # the sum over k of a^2k s, from 1
        estimator.weight.zero_()
        estimator.weight[:2, :2] = a**2 / (1 - a**2) * torch.eye(2, dtype=F64)
    estimator.total.zero_()
    learner.step(inputs[1:], torch.zeros(39, SAMPLES, 2, dtype=F64))
    assert len(estimator.reports) == 39
    assert estimator.total.abs().max() < 1e-14


def test_with_lambda_zero_it_is_the_linear_synthesiser():
    """Both learn by Adam from the same target; one has its bias in the weight."""
    learners = [
        learner_for(bootstrap, "lstm", rate=0.1)
        for bootstrap in (BPLambda(lam=0.0, gamma=0.9), SyntheticGradient(hidden_layers=0, reads="state", scale=1.0, gamma=0.9))
    ]
    for seed in range(4):
        losses = [learner.step(*stretch(8, seed=seed)[:2]) for learner in learners]
        assert losses[0].synthetic == pytest.approx(losses[1].synthetic, abs=1e-12)
    ours, dense = (learner.auxiliaries[0] for learner in learners)
    (layer,) = dense.layers
    torch.testing.assert_close(ours.weight, torch.cat([layer.weight, layer.bias[:, None]], 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(*[learner.core.weight_hh_l0 for learner in learners], rtol=0, atol=1e-12)
    assert ours.weight.abs().max() > 1e-3
    assert not ours.wants_jacobian
    assert ours.trace is None


# ---- one estimator by itself ---------------------------------------------------------------------------------------------------


def estimator_for(width=3, **settings):
    layout = Layout(torch.zeros(2, width, dtype=F64), [0])
    return BPLambda(**settings).estimator(Site(layout, torch.zeros(2, width, dtype=F64), torch.zeros(2, width, dtype=F64), 2))


def report_for(samples=2, width=3, ended=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
    border = Border(draw(samples, width), draw(samples, width), ended, None)
    truth, jacobian = draw(samples, width), draw(samples, width, width)
    if ended is not None:
        truth, jacobian = truth.masked_fill(ended[:, None], 0.0), jacobian.masked_fill(ended[:, None, None], 0.0)
    return Report(border, truth, jacobian)


def test_the_trace_is_carried_by_the_jacobian_as_it_is_and_takes_up_each_state():
    estimator, reports = estimator_for(gamma=0.9, lam=0.5), [report_for(seed=1), report_for(seed=2)]
    x = [torch.cat([report.border.rows, torch.ones(2, 1, dtype=F64)], 1) for report in reports]
    for report in reports:
        estimator.correction(report)
    unit = torch.eye(3, dtype=F64)
    first = 0.45 * torch.einsum("mij,jk,ml->mikl", reports[0].jacobian, unit, x[0])
    second = 0.45 * torch.einsum("mij,mjkl->mikl", reports[1].jacobian, first + torch.einsum("ik,ml->mikl", unit, x[1]))
    torch.testing.assert_close(estimator.trace, second, rtol=0, atol=1e-13)


def test_a_sequence_that_ends_takes_its_trace_with_it():
    estimator, other = estimator_for(), estimator_for()
    estimator.correction(report_for(seed=1))
    ended = torch.tensor([True, False])
    report = report_for(ended=ended, seed=2)
    correction = estimator.correction(report)
    assert torch.equal(estimator.trace[0], torch.zeros(3, 3, 4, dtype=F64))
    assert estimator.trace[1].abs().max() > 0.1
    other.correction(report_for(seed=1))
    alone = other.correction(report._replace(border=report.border._replace(ended=None)))
    torch.testing.assert_close(correction, alone, rtol=0, atol=1e-14)  # its truth is zero, and so is its estimate here


def test_reset_forgets_the_traces():
    estimator, fresh = estimator_for(), estimator_for()
    estimator.correction(report_for(seed=1))
    estimator.reset()
    torch.testing.assert_close(estimator.correction(report_for(seed=2)), fresh.correction(report_for(seed=2)), rtol=0, atol=0)


def test_nobody_left_moves_nothing_though_the_optimizer_has_momentum():
    estimator = estimator_for()
    assert estimator.learn(report_for(seed=1)) is not None
    before = estimator.weight.detach().clone()
    assert before.abs().max() > 0
    assert estimator.learn(report_for(ended=torch.ones(2, dtype=torch.bool))) is None
    assert torch.equal(estimator.weight, before)
    assert torch.equal(estimator.trace, torch.zeros_like(estimator.trace))


@pytest.mark.parametrize("clip", [None, 0.25, 100.0])
def test_clip_shortens_the_step_to_its_norm(clip):
    estimator, free = estimator_for(optimizer="sgd", learning_rate=0.5, clip=clip), estimator_for()
    estimator.learn(report_for())
    step = free.correction(report_for())
    norm = min(step.norm().item(), clip or 1e9)
    assert step.norm() > 0.25
    torch.testing.assert_close(estimator.weight.detach(), 0.5 * norm * step / step.norm(), rtol=1e-5, atol=0)


def test_traces_that_take_too_much_memory_are_refused_before_anything_is_learnt():
    samples = LARGEST // (3 * 12 * 8)
    border = report_for(1).border
    estimator = estimator_for()
    rows = border.rows.expand(samples + 1, -1)
    assert estimator.estimate(border._replace(rows=rows[:samples])).shape == (samples, 3)
    with pytest.raises(
        ValueError, match=r"traces of \d+ samples with a state of 3 numbers take 537 MB, more than 537: give fewer"
    ):
        estimator.estimate(border._replace(rows=rows))
    unlimited = estimator_for(lam=0.0)
    assert unlimited.estimate(border._replace(rows=rows)).shape == (samples + 1, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lam": -0.1},
        {"lam": 1.1},
        {"learning_rate": 0.0},
        {"clip": 0.0},
        {"scale": -1.0},
        {"gamma": -1.0},
        {"optimizer": "adm"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        replace(BPLambda(), **wrong)
