"""Learning past the horizon: targets, estimates, the auxiliary task and synthesisers, each against its formula."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import recurrences
import torch
from recurrences import CASES, F64, TIGHT, batch_for, descent, gradient_rows, learner_for, network_for, rows_of
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lockfree.recurrent import (
    Bootstrap,
    Border,
    Estimator,
    Layout,
    LeastSquaresGradient,
    Report,
    Site,
    SyntheticGradient,
)


@pytest.fixture(autouse=True)
def _own_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


# ---- what is said of the future, and what became of it ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fixed(Bootstrap):
    """Says the same of the same state for ever, and takes down what it is told."""

    used: float = 0.3
    discount: float = 0.8
    ahead: int = 1

    def estimator(self, site):
        return Noting(self, site)


def says(rows):
    """What `Fixed` says: some function of the state, nowhere near zero."""
    weight = torch.linspace(-1, 1, rows.shape[1] ** 2, dtype=rows.dtype).view(rows.shape[1], -1)
    return torch.cos(rows @ weight)


class Noting(Estimator):
    def __init__(self, settings, site):
        super().__init__()
        self.settings, self.reports = settings, []

    def scale(self, update):
        return self.settings.used

    def gamma(self, update):
        return self.settings.discount

    @property
    def chunks(self):
        return self.settings.ahead

    def estimate(self, border):
        return says(border.rows)

    def learn(self, report):
        self.reports.append(report)


class Curious(Noting):
    wants_jacobian = True


@dataclass(frozen=True, kw_only=True)
class WithJacobian(Fixed):
    def estimator(self, site):
        return Curious(self, site)


def beyond(case, after, done):
    """What `Fixed` says of the state at the end of a chunk; nothing of samples that end there."""
    return says(rows_of(after, case.dims).detach()).masked_fill(done.unsqueeze(1), 0.0)


def with_credit(case, chunk, batch, end, part, counted):
    """The loss of a chunk and a part of what `Fixed` says of its end, times the state there."""
    _, losses, after, _ = chunk
    said = beyond(case, after, batch.done[min(end, len(batch.done)) - 1])
    return losses.sum() / counted + part / batch.inputs.shape[1] * (said * rows_of(after, case.dims)).sum()


SHAPES = ["lstm", "stacked", "carrying", "counting", "starting", "columns", "encoded"]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("used", "discount"), [(0.3, 0.8), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_the_core_is_given_the_scale_and_the_target_gamma_of_what_is_said(name, used, discount):
    case = CASES[name]
    core, readout = network_for(case)
    batch = batch_for(case)  # 11 steps: chunks of 3, 3, 3 and 2
    parameters = recurrences.named(core, readout)
    chunks = recurrences.borders(case, core, readout, batch, 3)
    wanted = [
        recurrences.gradients(parameters, with_credit(case, chunk, batch, 3 * k + 3, used, 3)) for k, chunk in enumerate(chunks)
    ]
    truths = [
        6 * gradient_rows(case, with_credit(case, chunk, batch, 3 * k + 3, discount, 3), chunk[0])
        for k, chunk in enumerate(chunks)
    ]
    ends = [(rows_of(after, case.dims).detach(), output.detach()) for _, _, after, output in chunks]

    learner = learner_for(core, readout, Fixed(used=used, discount=discount), optimizer=descent, accumulate=4)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    learner.step(*batch)
    for key, p in parameters.items():
        torch.testing.assert_close(4 * (before[key] - p.detach()), sum(one[key] for one in wanted), rtol=0.0, atol=1e-12)

    reports = learner.auxiliaries[0].reports
    assert len(reports) == 3
    for k, report in enumerate(reports):
        border, going = report.border, ~batch.done[3 * k + 2]
        torch.testing.assert_close((border.rows, border.outputs), ends[k], **TIGHT)
        assert torch.equal(border.ended, ~going)
        torch.testing.assert_close(report.truth[going], truths[k + 1][going], **TIGHT)
        assert report.jacobian is None


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ahead", [2, 3])
def test_a_target_of_several_horizons_discounts_at_each_border(name, ahead):
    case = CASES[name]
    core, readout = network_for(case)
    batch, gamma = batch_for(case, steps=14, ends=0.1), 0.7
    chunks = recurrences.borders(case, core, readout, batch, 3)
    wanted = []
    for first in range(1, 5 - ahead + 1):
        # One graph over all the chunks, whose borders let gamma of the gradient through and all of the state.
        leaf = state = recurrences.detached(chunks[first][0])
        total = 0.0
        for k in range(first, first + ahead):
            chunk = batch[3 * k : 3 * k + 3]
            if k > first:
                state = recurrences.mixed(done, case.begin(core, 6), state, case.dims)
            losses, state, _ = recurrences.loop(case, core, readout, chunk, state)
            done = chunk.done[-1]
            total = total + losses.sum() / 3
            state = pytree.tree_map(lambda a: gamma * a + (1 - gamma) * a.detach() if a.is_floating_point() else a, state)
        said = beyond(case, state, done)
        wanted.append(6 * gradient_rows(case, total + (said * rows_of(state, case.dims)).sum() / 6, leaf))

    learner = learner_for(core, readout, Fixed(discount=gamma, ahead=ahead), optimizer=descent, accumulate=1000)
    learner.step(*batch)
    reports = learner.auxiliaries[0].reports
    assert len(reports) == len(wanted)
    assert any(batch.done[3 * k + 2].any() for k in range(4))
    for k, (report, truth) in enumerate(zip(reports, wanted, strict=True)):
        going = ~batch.done[3 * k + 2]
        torch.testing.assert_close(report.border.rows, rows_of(chunks[k][2], case.dims).detach(), **TIGHT)
        torch.testing.assert_close(report.truth[going], truth[going], **TIGHT)


@pytest.mark.parametrize("name", ["lstm", "carrying", "columns"])
def test_the_jacobian_of_a_chunk(name):
    case = CASES[name]
    core, readout = network_for(case)
    batch = batch_for(case, steps=6)
    learner = learner_for(core, readout, WithJacobian(), optimizer=descent, accumulate=1000)
    learner.step(*batch)
    (report,) = learner.auxiliaries[0].reports
    leaf, _, after, _ = recurrences.borders(case, core, readout, batch, 3)[1]
    rows = rows_of(after, case.dims)
    wanted = torch.stack([gradient_rows(case, rows[:, i].sum(), leaf) for i in range(rows.shape[1])], dim=1)
    going = ~batch.done[2]
    torch.testing.assert_close(report.jacobian[going], wanted[going], **TIGHT)


def test_nothing_lies_beyond_the_end_of_a_sequence():
    # Every sample ends where a chunk does, so that what is said of the time after it must have no effect at all.
    case = CASES["lstm"]
    core, readout = network_for(case)
    batch = batch_for(case, steps=12)
    done = batch.done.clone()
    done[2::3] = True
    plain, fixed = (learner_for(core, readout, one).gradients(batch.inputs, batch.targets, done) for one in ("none", Fixed()))
    assert all(torch.equal(fixed[name], one) for name, one in plain.items())


@pytest.mark.parametrize("used", [0.0, 0.4])
@pytest.mark.parametrize("name", ["lstm", "stacked", "carrying", "starting"])
def test_the_gradient_of_the_auxiliary_task_reaches_the_core(name, used):
    case = CASES[name]
    core, readout = network_for(case)
    batch = batch_for(case, steps=6)
    learner = learner_for(core, readout, Fixed(used=used), optimizer=descent, accumulate=2, auxiliary=True)
    learner.predict(batch.inputs)  # makes the head
    head = learner.auxiliaries[1]
    nn.init.normal_(head.layers[2].weight)
    mine = copy.deepcopy(head.layers)

    parameters = recurrences.named(core, readout)
    first, second = recurrences.borders(case, core, readout, batch, 3)
    wanted = [
        recurrences.gradients(parameters, with_credit(case, one, batch, end, used, 3)) for one, end in ((first, 3), (second, 6))
    ]
    # The step before the second chunk again, from the state before it.
    _, state, _ = recurrences.loop(case, core, readout, batch[0:2])
    state = recurrences.detached(recurrences.mixed(batch.done[1], case.begin(core, 6), state, case.dims))
    _, state = case.step(core, batch.inputs[2], state)
    known = ~batch.done[2:6].any(0)
    assert known.any()
    assert not known.all()
    difference = mine(rows_of(state, case.dims)) - says(rows_of(second[2], case.dims).detach())
    auxiliary = 0.5 * difference[known].square().sum() / 6
    wanted.append(recurrences.gradients(parameters, auxiliary))
    assert max(one.abs().max().item() for one in wanted[2].values()) > 1e-3

    auxiliary.backward(inputs=[*mine.parameters()])
    torch.optim.Adam(mine.parameters(), lr=1e-3).step()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    learnt = learner.step(*batch)
    assert learnt.auxiliary == pytest.approx(auxiliary.item(), abs=1e-12)
    for key, p in parameters.items():
        torch.testing.assert_close(2 * (before[key] - p.detach()), sum(one[key] for one in wanted), **TIGHT)
    for one, other in zip(head.layers.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


# ---- synthesisers -------------------------------------------------------------------------------------------------------------


def site_for(samples=9, width=5, features=4):
    """A site of a made-up core, and a report of a border at which some samples end."""
    rows, outputs = torch.randn(samples, width, dtype=F64), torch.randn(samples, features, dtype=F64)
    ended = torch.rand(samples) < 0.3
    ended[0] = False
    report = Report(Border(rows, outputs, ended, None), torch.randn(samples, width, dtype=F64), None)
    return Site(Layout(rows, [0]), rows, outputs, 3), report


@pytest.mark.parametrize("reads", ["state", "output"])
@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
def test_the_synthesiser_descends_what_autograd_says(hidden_layers, reads):
    site, report = site_for()
    settings = SyntheticGradient(hidden_layers=hidden_layers, hidden_units=6, reads=reads, learning_rate=0.01)
    synthesiser = settings.estimator(site)
    assert torch.equal(synthesiser.estimate(report.border), torch.zeros(9, 5, dtype=F64))
    for p in synthesiser.parameters():
        nn.init.normal_(p)
    mine = [p.detach().clone().requires_grad_() for p in synthesiser.parameters()]

    seen = report.border.rows if reads == "state" else report.border.outputs
    going = ~report.border.ended
    out = seen
    for layer in range(hidden_layers + 1):
        out = F.linear(out if layer == 0 else F.relu(out), *mine[2 * layer : 2 * layer + 2])
    torch.testing.assert_close(synthesiser.estimate(report.border), out.detach(), **TIGHT)
    loss = 0.5 * (out - report.truth)[going].square().sum() / going.sum()
    loss.backward()
    torch.optim.Adam(mine, lr=0.01).step()

    torch.testing.assert_close(synthesiser.learn(report), loss.detach(), **TIGHT)
    for p, own in zip(synthesiser.parameters(), mine, strict=True):
        torch.testing.assert_close((p.grad, p.detach()), (own.grad, own.detach()), **TIGHT)


@pytest.mark.parametrize("bootstrap", [SyntheticGradient(), LeastSquaresGradient(every=1)])
def test_a_border_at_which_all_sequences_end_teaches_nothing(bootstrap):
    site, report = site_for()
    synthesiser = bootstrap.estimator(site)
    before = copy.deepcopy(synthesiser.state_dict())
    assert synthesiser.learn(report._replace(border=report.border._replace(ended=torch.ones(9, dtype=torch.bool)))) is None
    assert all(torch.equal(one, before[name]) for name, one in synthesiser.state_dict().items())


def test_the_solved_synthesiser_is_the_least_squares_of_all_it_was_told():
    settings = LeastSquaresGradient(forgetting=0.7, ridge=1e-2, every=2)
    reports = [site_for(samples=n)[1] for n in (9, 4, 7, 12, 5)]
    synthesiser = settings.estimator(site_for()[0])
    for report in reports[:1]:
        synthesiser.learn(report)
        assert not synthesiser.estimate(report.border).any()  # not solved for yet: every second border
    for report in reports[1:]:
        synthesiser.learn(report)

    rows, answers = [], []  # of the first four: the last solution was after them
    for k, report in enumerate(reports[:4]):
        going = ~report.border.ended
        x = np.hstack([report.border.rows[going].numpy(), np.ones((int(going.sum()), 1))])
        weight = np.sqrt(0.7 ** (3 - k) / len(x))
        rows.append(weight * x)
        answers.append(weight * report.truth[going].numpy())
    sums = np.vstack(rows)
    ridge = 1e-2 * np.mean(np.diag(sums.T @ sums))
    wanted, *_ = np.linalg.lstsq(
        np.vstack([sums, np.sqrt(ridge) * np.eye(6)]), np.vstack([*answers, np.zeros((6, 5))]), rcond=None
    )
    estimate = synthesiser.estimate(reports[4].border)
    rows = reports[4].border.rows
    np.testing.assert_allclose(estimate, rows.numpy() @ wanted[:-1] + wanted[-1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize(
    "bootstrap", [SyntheticGradient(gamma=0.9, scale=0.5), SyntheticGradient(steps=6), LeastSquaresGradient(every=1, ridge=0.1)]
)
def test_estimates_do_not_depend_on_the_number_of_samples(bootstrap, auxiliary):
    # Every sample twice: the mean over the batch halves each one's gradient, and its estimate must not notice.
    case = CASES["lstm"]
    batch, found = batch_for(case, steps=24), []
    for times in (1, 2):
        core, readout = network_for(case)
        learner = learner_for(core, readout, bootstrap, auxiliary=auxiliary)
        inputs, targets, done = (torch.cat([one] * times, dim=1) for one in batch)
        learnt = learner.step(inputs, targets, done)
        tensors = [one for module in (core, readout, *learner.auxiliaries) for one in module.state_dict().values()]
        found.append([*tensors, torch.tensor([learnt.loss, learnt.synthetic, learnt.auxiliary or 0.0])])
    torch.testing.assert_close(*found, rtol=0.0, atol=1e-9)
    assert learnt.synthetic > 0
