"""Every form of synthesiser against formulas written again: what it predicts, what it descends, and what it starts as."""

import copy
from dataclasses import replace

import cases
import numpy as np
import pytest
import torch
from cases import CLASSES, MODELS, assert_same, learner_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree.objective import Objective
from lockfree.rules import SyntheticGradients
from lockfree.schedule import Kind
from lockfree.synthesisers import FORMS, Design, GaussianSynthesiser, GradientSynthesiser, InputSynthesiser, ModuleSynthesiser
from lockfree.synthesisers.critic import CriticSynthesiser
from lockfree.synthesisers.networks import LinearSynthesiser, PerClassSynthesiser, gradient_network

PLAIN, MLP, CNN = MODELS["in_place"], MODELS["mlp"], MODELS["cnn"]  # the first draws no random numbers
F64 = torch.float64
SHAPES = {"vectors": (7,), "sequences": (3, 5), "images": (2, 3, 4)}
HIDDEN = {"hidden_layers": 1, "hidden_units": 6, "kernel_size": 3}


@pytest.fixture(autouse=True)
def _own_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=F64)


def randomise(module, seed=4, size=0.3):
    """Gives a network weights, as if it had learnt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(size * draw(generator, *parameter.shape))
    return module


def onehot(numbers, classes=CLASSES):
    """Rows of zeros for negative numbers."""
    return torch.stack([torch.eye(classes, dtype=F64)[n] if n >= 0 else torch.zeros(classes, dtype=F64) for n in numbers])


def descent(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def gradients(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def assert_near(one, other, tolerance=1e-12):
    # Sums of large terms are rounded by how they lie in memory.
    torch.testing.assert_close(one, other, rtol=1e-14, atol=tolerance)


# ---- critics -----------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    samples=st.integers(1, 5), units=st.integers(1, 6), classes=st.integers(0, 4), hidden=st.integers(1, 7),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_critic_s_credit_is_the_gradient_of_its_value_over_the_batch_size(samples, units, classes, hidden, seed):
    """One hidden layer by NumPy: v = w softplus(A [y; c] + b) + a, and dv/dy = A_y^T (w sigmoid(A [y; c] + b))."""
    generator = torch.Generator().manual_seed(seed)
    y, label = draw(generator, samples, units), torch.randint(max(classes, 1), (samples,), generator=generator)
    label = onehot(label, classes) if classes else None
    design = Design(classes=classes, hidden_layers=1, hidden_units=hidden)
    for form in ("critic", "sobolev"):
        critic = randomise(FORMS[form].build(y, design), seed)
        A, b, w, a = (parameter.detach().numpy() for parameter in critic.parameters())
        seen = y.numpy() if label is None else np.concatenate([y.numpy(), label.numpy()], axis=1)
        z = seen @ A.T + b
        prediction = critic.predict(y, label, samples)
        np.testing.assert_allclose(critic(y, label).detach().numpy(), (np.log1p(np.exp(z)) @ w.T + a)[:, 0], atol=1e-12)
        by_hand = (w / (1 + np.exp(-z))) @ A[:, :units] / samples
        np.testing.assert_allclose(prediction.credit.numpy(), by_hand, rtol=0, atol=1e-12)
        assert not prediction.credit.requires_grad
        assert prediction.scale is None


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("hidden_layers", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", ["critic", "sobolev"])
def test_a_critic_learns_as_a_double_backward_written_apart(form, shape, hidden_layers, per_class):
    """Value and derivative of one sample at a time, by torch.func; the critic does the batch at once, by autograd."""
    generator = torch.Generator().manual_seed(1)
    samples, beta = 6, 3.0
    y, truth, losses = draw(generator, samples, *shape), draw(generator, samples, *shape), draw(generator, samples)
    label = onehot([0, 2, 2, 1, 0, 2])
    design = Design(
        classes=CLASSES, per_class=per_class, hidden_layers=hidden_layers, hidden_units=5, kernel_size=3, matching=beta
    )
    critic = randomise(FORMS[form].build(y, design))
    weights = dict(critic.named_parameters())

    def value(weights, one, c):
        return torch.func.functional_call(critic, weights, (one[None], c[None]))[0]

    def loss(weights):
        total = 0.0
        for n in range(samples):
            v, slope = value(weights, y[n], label[n]), torch.func.grad(value, argnums=1)(weights, y[n], label[n])
            total += (v - losses[n]) ** 2
            if form == "sobolev":
                total += beta * (slope - samples * truth[n]).square().sum()
        return total / (2 * samples)

    wanted, value_of_it = torch.func.grad_and_value(loss)(weights)
    prediction = critic.predict(y, label, samples)
    found = critic.learn(prediction, truth, samples, lambda: losses)
    assert found.item() == pytest.approx(value_of_it.item(), rel=1e-12)
    assert not found.requires_grad
    for name, gradient in gradients(critic).items():
        if gradient is None:  # the last class occurs in no sample, and autograd leaves what it did not meet alone
            gradient = torch.zeros_like(wanted[name])
        assert_near(gradient, wanted[name])
    assert sum(bool(gradient.any()) for gradient in wanted.values()) > hidden_layers


def test_a_critic_without_losses_or_truth_learns_what_it_can():
    generator = torch.Generator().manual_seed(1)
    y, truth = draw(generator, 4, 5), draw(generator, 4, 5)
    design = Design(hidden_layers=1, hidden_units=4, matching=2.0)
    critic, sobolev = (randomise(FORMS[form].build(y, design)) for form in ("critic", "sobolev"))
    assert critic.learn(critic.predict(y, None, 4), truth, 4, None) is None
    assert sobolev.learn(sobolev.predict(y, None, 4), None, 4, None) is None
    assert set(gradients(critic).values()) | set(gradients(sobolev).values()) == {None}
    prediction = sobolev.predict(y, None, 4)
    slope = 4 * prediction.credit
    found = sobolev.learn(prediction, truth, 4, None)
    assert found.item() == pytest.approx((2.0 / 8 * (slope - 4 * truth).square().sum()).item(), rel=1e-12)
    prediction = sobolev.predict(y, None, 4)
    values = sobolev(y).detach()
    assert sobolev.learn(prediction, None, 4, lambda: torch.ones(4, dtype=F64)).item() == pytest.approx(
        ((values - 1).square().mean() / 2).item(), rel=1e-12
    )


class Quadratic(nn.Module):
    """v(y) = y^T S y / 2 + a, whose derivative S y is known."""

    def __init__(self, S):
        super().__init__()
        self.S, self.a = nn.Parameter(S), nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, y):
        return ((y @ self.S) * y).sum(1, keepdim=True) / 2 + self.a


def test_sobolev_matching_is_zero_where_the_derivative_is_exact():
    generator = torch.Generator().manual_seed(1)
    samples = 8
    y, S = draw(generator, samples, 5), draw(generator, 5, 5)
    S = S + S.T
    truth, losses = y @ S / samples, ((y @ S) * y).sum(1) / 2
    made = {}
    for form, away in (("sobolev", 0.0), ("sobolev", 0.5), ("critic", 0.5)):
        network = FORMS[form].build(y, Design(hidden_layers=1, matching=10.0))
        assert network.matching == {"sobolev": 10.0, "critic": 0.0}[form]
        network.networks = nn.ModuleList([Quadratic(S)])
        with torch.no_grad():
            network.networks[0].a.fill_(away)
        prediction = network.predict(y, None, samples)
        assert_near(prediction.credit, truth)
        made[form, away] = network.learn(prediction, truth, samples, lambda: losses).item(), gradients(network)
    assert made["sobolev", 0.0][0] == pytest.approx(0.0, abs=1e-24)
    assert max(gradient.abs().max().item() for gradient in made["sobolev", 0.0][1].values()) < 1e-11
    # a value that is wrong by a constant costs its square, and leaves the derivative out of it
    assert made["sobolev", 0.5][0] == pytest.approx(0.125, rel=1e-12)
    assert made["critic", 0.5][0] == pytest.approx(0.125, rel=1e-12)
    assert_near(made["sobolev", 0.5][1], made["critic", 0.5][1], 1e-11)
    assert made["critic", 0.5][1]["networks.0.a"].item() == pytest.approx(0.5)


def test_matching_weighs_derivatives_against_values():
    generator = torch.Generator().manual_seed(1)
    y, truth = draw(generator, 4, 5), draw(generator, 4, 5)
    found = {}
    for matching in (0.0, 1.0, 7.0):
        network = randomise(FORMS["sobolev"].build(y, Design(hidden_layers=1, hidden_units=4, matching=matching)))
        found[matching] = network.learn(network.predict(y, None, 4), truth, 4, lambda: torch.ones(4, dtype=F64)).item()
    assert found[7.0] - found[0.0] == pytest.approx(7 * (found[1.0] - found[0.0]), rel=1e-12)
    learner = learner_for(PLAIN, SyntheticGradients(form="sobolev", matching=7.0, **HIDDEN))
    assert [cell.auxiliary[0].matching for cell in learner.cells[:-1]] == [7.0] * 3


def test_a_sobolev_critic_s_values_are_fitted_at_every_border():
    """The losses of the batch's samples are a part of what each border learns from, whatever has been done first."""
    learner = learner_for(PLAIN, SyntheticGradients(form="sobolev", **HIDDEN), dtype=F64)
    given_losses = {}
    for cell in learner.cells[:-1]:
        original = cell.learn_auxiliary

        def spy(batch, above, error, losses, *, index=cell.place.index, original=original):
            given_losses[index] = losses is not None
            return original(batch, above, error, losses)

        cell.learn_auxiliary = spy
    learner.step(*PLAIN.batches(1, dtype=F64)[0])
    assert given_losses == {0: True, 1: True, 2: True}


@pytest.mark.parametrize("form", ["critic", "sobolev"])
def test_a_critic_needs_a_hidden_layer(form):
    with pytest.raises(ValueError, match="affine critic"):
        FORMS[form].build(torch.zeros(2, 3), Design())
    with pytest.raises(ValueError, match="hidden_layers=1"):
        SyntheticGradients(form=form)


# ---- the losses of samples ---------------------------------------------------------------------------------------------------


def losses_that_critics_of(rule, loss, model, x, y):
    """Returns the losses that the critics of a learner are given in one step."""
    learner = lf.convert(model, rule, loss=loss, optimizer=cases.sgd, example_input=x)
    (cell,) = learner.cells[:-1]
    original, seen = cell.learn_auxiliary, []

    def spy(batch, above, error, losses):
        seen.append(losses())
        return original(batch, above, error, losses)

    cell.learn_auxiliary = spy
    with torch.no_grad():
        scores = model(x)
    assert learner.step(x, y).auxiliary[0].isfinite()
    return scores, seen[0]


@pytest.mark.parametrize("form", ["critic", "sobolev"])
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("ignored", [(), (0,), (2, 5)])
def test_the_loss_of_a_sample_is_the_user_s_loss_of_it_alone(form, conditioned, ignored):
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, CLASSES))).double()
    x, y = PLAIN.batches(1, dtype=F64)[0]
    y[list(ignored)] = -100
    rule = SyntheticGradients(form=form, conditioned=conditioned, **HIDDEN)
    scores, found = losses_that_critics_of(rule, F.cross_entropy, model, x, y)
    assert_near(found, F.cross_entropy(scores, y, reduction="none"))
    assert [found[n].item() for n in ignored] == [0.0] * len(ignored)


@pytest.mark.parametrize(
    ("loss", "apart"),
    [
        (F.mse_loss, lambda scores, wanted: F.mse_loss(scores, wanted, reduction="none").mean(1)),
        (F.l1_loss, lambda scores, wanted: (scores - wanted).abs().mean(1)),
        (
            lambda scores, wanted: (scores - wanted).square().sum(1).mean(),
            lambda scores, wanted: (scores - wanted).square().sum(1),
        ),
        (
            F.binary_cross_entropy_with_logits,
            lambda scores, wanted: (F.softplus(scores) - wanted * scores).mean(1),
        ),
        (
            lambda scores, wanted: F.cross_entropy(scores, wanted.softmax(1), label_smoothing=0.1),
            lambda scores, wanted: -((0.9 * wanted.softmax(1) + 0.1 / CLASSES) * scores.log_softmax(1)).sum(1),
        ),
    ],
    ids=["mse", "l1", "sum of squares", "bits", "soft labels"],
)
def test_real_valued_targets_have_losses_of_samples_too(loss, apart):
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, CLASSES))).double()
    x, wanted = PLAIN.batches(1, dtype=F64)[0][0], draw(torch.Generator().manual_seed(3), 8, CLASSES)
    scores, found = losses_that_critics_of(
        SyntheticGradients(form="critic", conditioned=True, **HIDDEN), loss, model, x, wanted
    )
    assert_near(found, apart(scores, wanted))
    assert found.mean().item() == pytest.approx(loss(scores, wanted).item(), rel=1e-12)


def test_the_loss_of_a_sequence_is_the_mean_over_its_steps():
    case = MODELS["gpt"]
    words, following = case.batches(1)[0]
    learner = learner_for(case, SyntheticGradients(form="critic", **HIDDEN))
    scores = learner.predict(words)
    found = learner._assembly.objective.sample_losses(scores, following)
    by_step = F.cross_entropy(scores.flatten(0, 1), following.flatten(), reduction="none").view(len(words), -1)
    assert_near(found, by_step.mean(1), 1e-6)
    assert learner.step(words, following).auxiliary.keys() == set(range(4))


def test_outputs_and_targets_may_be_trees():
    generator = torch.Generator().manual_seed(1)
    outputs = {"a": draw(generator, 5, 3), "b": (draw(generator, 5),)}
    wanted = [draw(generator, 5, 3), draw(generator, 5)]

    def loss(outputs, wanted):
        return F.mse_loss(outputs["a"], wanted[0]) + F.l1_loss(outputs["b"][0], wanted[1])

    apart = (outputs["a"] - wanted[0]).square().mean(1) + (outputs["b"][0] - wanted[1]).abs()
    assert_near(Objective(loss).sample_losses(outputs, wanted), apart)


def leaves_torch(scores, target):
    return F.cross_entropy(scores, target) * (1.0 if float(scores.sum().item()) > -1e9 else 2.0)


def branches(scores, target):
    return F.cross_entropy(scores, target) if (target >= 0).all() else scores.sum() * 0


@pytest.mark.parametrize("loss", [leaves_torch, branches])
@pytest.mark.parametrize("form", ["critic", "sobolev"])
def test_a_loss_that_cannot_be_taken_sample_by_sample_is_refused_and_nothing_is_learnt(form, loss):
    model = PLAIN.build()
    rule = SyntheticGradients(form=form, conditioned=True, **HIDDEN)
    x, y = PLAIN.batches(1)[0]
    learner = lf.convert(model, rule, loss=loss, optimizer=cases.adam, example_input=x)
    before = learner.state_dict()
    with pytest.raises(
        ValueError, match=r"^a critic needs the loss of each sample alone, which this loss does not give [^\n]*$"
    ):
        learner.step(x, y)
    after = learner.state_dict()
    assert_same(after["model"], before["model"])
    assert_same(
        (after["optimizer"], after["auxiliary_optimizer"], after["steps"]),
        (before["optimizer"], before["auxiliary_optimizer"], 0),
    )
    plain = lf.convert(PLAIN.build(), "cdni", loss=loss, optimizer=cases.adam, example_input=x)
    assert plain.step(x, y).loss > 0  # any other form takes it


# ---- mean and scale ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("hidden_layers", [0, 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_gaussian_s_mean_is_the_plain_synthesiser(shape, hidden_layers, per_class):
    """Same predictions, same loss, and the same gradients of the mean: the scale does not weigh it."""
    generator = torch.Generator().manual_seed(1)
    samples = 6
    y, truth, label = draw(generator, samples, *shape), draw(generator, samples, *shape), onehot([0, 1, 1, 0, 2, 2])
    design = Design(classes=CLASSES, per_class=per_class, **HIDDEN | {"hidden_layers": hidden_layers})
    plain = randomise(gradient_network(y, design))
    gaussian = GaussianSynthesiser(y, design)
    gaussian.mean.load_state_dict(plain.state_dict())
    randomise(gaussian.log_scale, seed=5)
    for _ in range(2):
        one, other = plain.predict(y, label, samples), gaussian.predict(y, label, samples)
        assert_same(other.credit, one.credit)
        assert other.scale.shape == y.shape
        losses = [network.learn(made, truth, samples, None) for network, made in ((plain, one), (gaussian, other))]
        assert_same(*losses)
        assert_same(gradients(gaussian.mean), gradients(plain))
        for parameter in [*plain.parameters(), *gaussian.parameters()]:
            parameter.grad = None


@pytest.mark.parametrize("hidden_layers", [0, 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_gaussian_s_scale_descends_the_negative_log_likelihood(shape, hidden_layers):
    generator = torch.Generator().manual_seed(1)
    samples = 6
    y, label = draw(generator, samples, *shape), onehot([0, 1, 1, 3, -1, 2])
    gaussian = randomise(GaussianSynthesiser(y, Design(classes=CLASSES, **HIDDEN | {"hidden_layers": hidden_layers})))
    mean_square = None
    for _ in range(3):
        truth = draw(generator, samples, *shape) / samples
        seen = (samples * truth).square().mean().item()
        mean_square = seen if mean_square is None else 0.99 * mean_square + 0.01 * seen
        prediction = gaussian.predict(y, label, samples)
        mu = samples * prediction.credit.clone()
        gaussian.learn(prediction, truth, samples, None)
        assert gaussian.mean_square.item() == pytest.approx(mean_square, rel=1e-12)
        sigma = gaussian.log_scale(y, label).exp() * mean_square**0.5
        nll = -torch.distributions.Normal(mu, sigma).log_prob(samples * truth).sum() / samples
        wanted = torch.autograd.grad(nll, list(gaussian.log_scale.parameters()))
        assert max(gradient.abs().max() for gradient in wanted) > 1e-3
        for parameter, gradient in zip(gaussian.log_scale.parameters(), wanted, strict=True):
            assert_near(parameter.grad, gradient)
        assert_near(gaussian.predict(y, label, samples).scale, sigma.detach() / samples)
        for parameter in gaussian.parameters():
            parameter.grad = None


def test_a_gaussian_s_scale_becomes_that_of_the_gradients():
    """Targets from N(mu_c, s_c^2), each class with its own: at the optimum, the deviation within each class."""
    generator = torch.Generator().manual_seed(1)
    samples, units = 1200, 2
    number = torch.arange(samples) % 3
    s, mu = torch.tensor([0.1, 1.0, 4.0], dtype=F64), torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    delta = mu[number, None] + s[number, None] * draw(generator, samples, units)
    y, label = torch.zeros(samples, units, dtype=F64), onehot(number, 3)
    gaussian = GaussianSynthesiser(y, Design(classes=3))
    optimizer = torch.optim.Adam(gaussian.parameters(), lr=0.1)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.985**step
        gaussian.learn(gaussian.predict(y, label, samples), delta / samples, samples, None)
        optimizer.step()
        optimizer.zero_grad()
    prediction = gaussian.predict(y, label, samples)
    for c in range(3):
        rows = number == c
        found = samples * prediction.scale[rows][0]
        torch.testing.assert_close(found, delta[rows].std(dim=0, correction=0), rtol=1e-2, atol=0)
        # a deviation estimated from n numbers is known to 1/sqrt(2n)
        torch.testing.assert_close(found, s[c].expand(units), rtol=5 / (2 * samples / 3) ** 0.5 + 1e-2, atol=0)
        assert_near(samples * prediction.credit[rows][0], delta[rows].mean(dim=0), 1e-2)


def test_a_gaussian_of_gradients_that_are_all_zero_is_sure_of_zero():
    y, zeros = torch.ones(4, 3), torch.zeros(4, 3)
    gaussian = GaussianSynthesiser(y, Design())
    for _ in range(2):
        prediction = gaussian.predict(y, None, 4)
        assert not prediction.credit.any()
        assert not prediction.scale.any()
        assert gaussian.learn(prediction, zeros, 4, None).item() == 0
        assert all(bool(parameter.grad.isfinite().all()) for parameter in gaussian.parameters())


def test_a_scale_stays_within_bounds():
    y = torch.ones(4, 3, dtype=F64)
    gaussian = GaussianSynthesiser(y, Design())
    gaussian.mean_square.fill_(4.0)
    for shift, wanted in ((100.0, 2 * np.exp(7)), (-100.0, 2 * np.exp(-7))):
        with torch.no_grad():
            gaussian.log_scale.table.fill_(shift)
        assert_near(gaussian.predict(y, None, 4).scale, torch.full_like(y, wanted / 4), 1e-9)


# ---- a network for each class ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    labels=st.lists(st.integers(-1, 3), min_size=1, max_size=9).filter(lambda labels: max(labels) >= 0),
    shape=st.sampled_from(list(SHAPES.values())), hidden_layers=st.integers(0, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_each_class_has_a_network_of_its_own(labels, shape, hidden_layers, seed):
    """Row by row by hand: the network of its class, in evaluation mode where a row is alone, and zero without a class."""
    generator = torch.Generator().manual_seed(seed)
    samples = len(labels)
    y, truth = draw(generator, samples, *shape), draw(generator, samples, *shape)
    design = Design(classes=CLASSES, per_class=True, hidden_layers=hidden_layers, hidden_units=5, kernel_size=3)
    synthesiser = randomise(gradient_network(y, design), seed)
    assert isinstance(synthesiser, PerClassSynthesiser)
    by_hand = [copy.deepcopy(network) for network in synthesiser.networks]
    prediction = synthesiser.predict(y, onehot(labels), samples)
    loss = synthesiser.learn(prediction, truth, samples, None)

    wanted, rows_of = torch.zeros_like(y), {c: [n for n in range(samples) if labels[n] == c] for c in range(CLASSES)}
    for c, rows in rows_of.items():
        if rows:
            wanted[rows] = by_hand[c].train(len(rows) > 1)(y[rows])
    total = (wanted - samples * truth).square().sum() / (2 * samples)
    total.backward()
    assert_near(prediction.graph.detach(), wanted.detach())
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    for c, network in enumerate(synthesiser.networks):
        torch.testing.assert_close(dict(network.named_buffers()), dict(by_hand[c].named_buffers()), rtol=1e-14, atol=1e-14)
        assert network.training
        assert {module.training for module in network.modules()} == {True}
        for mine, other in zip(network.parameters(), by_hand[c].parameters(), strict=True):
            assert (mine.grad is None) == (not rows_of[c])
            if rows_of[c]:
                assert_near(mine.grad, other.grad)


@pytest.mark.parametrize("form", ["critic", "gaussian"])
def test_each_class_has_a_critic_or_a_scale_of_its_own(form):
    generator = torch.Generator().manual_seed(1)
    y, labels = draw(generator, 7, 5), [2, 0, -1, 2, 0, 3, 0]
    synthesiser = randomise(FORMS[form].build(y, Design(classes=CLASSES, per_class=True, **HIDDEN)))
    by_hand = copy.deepcopy(synthesiser)
    prediction = synthesiser.predict(y, onehot(labels), 7)
    for c in (0, 2, 3):
        rows = [n for n in range(7) if labels[n] == c]
        leaf = y[rows].requires_grad_()
        if form == "critic":
            (wanted,) = torch.autograd.grad(by_hand.networks[c](leaf).sum(), leaf)
        else:
            wanted = by_hand.mean.networks[c].train(len(rows) > 1)(leaf).detach()
        assert_near(prediction.credit[rows], wanted / 7)
    assert not prediction.credit[2].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_which_no_sample_has_a_class_teaches_nothing(form):
    y = torch.ones(3, 5)
    synthesiser = FORMS[form].build(y, Design(classes=CLASSES, per_class=True, **HIDDEN))
    prediction = synthesiser.predict(y, torch.zeros(3, CLASSES), 3)
    assert not prediction.credit.any()
    synthesiser.learn(prediction, torch.ones(3, 5), 3, lambda: torch.zeros(3))
    assert not any(gradient is not None and gradient.any() for gradient in gradients(synthesiser).values())


def test_a_batch_of_one_class_trains_a_learner_with_a_network_for_each():
    learner = learner_for(PLAIN, SyntheticGradients(conditioned=True, per_class=True, **HIDDEN))
    x, y = PLAIN.batches(1)[0]
    before = [cases.copy_of(network) for cell in learner.cells[:-1] for network in cell.auxiliary[0].networks]
    for _ in range(4):
        learner.step(x, torch.full_like(y, 2))
    after = [cases.copy_of(network) for cell in learner.cells[:-1] for network in cell.auxiliary[0].networks]
    changed = [cases.differs(list(one.values()), list(other.values())) for one, other in zip(before, after, strict=True)]
    assert changed == [False, False, True, False] * 3


# ---- the user's own ----------------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """What a linear synthesiser computes, written as a user would."""

    def __init__(self, units, classes):
        super().__init__()
        self.of_output = nn.Linear(units, units, bias=not classes)
        self.of_label = nn.Linear(classes, units, bias=False) if classes else None
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, y, label=None):
        return self.of_output(y) if label is None else self.of_output(y) + self.of_label(label)


@pytest.mark.parametrize("schedule", [cases.SCHEDULES[0], cases.SCHEDULES[4]], ids=lambda row: row.name)
@pytest.mark.parametrize("conditioned", [False, True])
def test_a_user_s_module_that_is_the_linear_one_trains_the_same(conditioned, schedule):
    models = []
    for own in (None, lambda y, classes: Affine(y.shape[-1], classes)):
        learner = learner_for(
            MLP,
            SyntheticGradients(conditioned=conditioned, synthesiser=own, learning_rate=0.01),
            schedule=schedule,
            optimizer=cases.momentum,
            auxiliary_optimizer=cases.momentum,
            dtype=F64,
        )
        assert isinstance(learner.cells[0].auxiliary[0], ModuleSynthesiser if own else LinearSynthesiser)
        torch.manual_seed(3)
        losses = [learner.step(x, y).loss for x, y in MLP.batches(12, dtype=F64)]
        learner.drain()
        models.append((losses, dict(learner.model.state_dict()), learner))
    torch.testing.assert_close(models[0][0], models[1][0], rtol=0, atol=1e-12, equal_nan=True)
    assert_near(models[0][1], models[1][1])
    for mine, linear in zip(models[1][2].cells[:-1], models[0][2].cells[:-1], strict=True):
        assert_near(mine.auxiliary[0].module.of_output.weight.detach(), linear.auxiliary[0].weight.detach())
        assert linear.auxiliary[0].weight.abs().max() > 1e-4


def test_a_user_s_module_is_copied_for_each_border():
    module = Affine(8, 0)
    start = cases.copy_of(module)
    learner = learner_for(PLAIN, SyntheticGradients(synthesiser=module), dtype=F64)
    for x, y in PLAIN.batches(6, dtype=F64):
        learner.step(x, y)
    copies = [cell.auxiliary[0].module for cell in learner.cells[:-1]]
    assert len({id(one) for one in [module, *copies]}) == 4
    assert len({parameter.data_ptr() for one in [module, *copies] for parameter in one.parameters()}) == 8
    assert_same(cases.copy_of(module), start)
    assert module.of_output.weight.dtype == torch.float32
    assert {one.of_output.weight.dtype for one in copies} == {F64}  # the model's own
    assert all(not torch.equal(one.of_output.weight, other.of_output.weight) for one, other in [copies[:2], copies[1:]])


@pytest.mark.parametrize(("conditioned", "classes"), [(False, 0), (True, CLASSES)])
def test_a_factory_is_given_an_example_of_the_output_and_the_number_of_classes(conditioned, classes):
    seen = []

    def factory(y, classes):
        seen.append((tuple(y.shape), y.dtype, classes))
        return Affine(y.shape[-1], classes)

    learner = learner_for(MLP, SyntheticGradients(conditioned=conditioned, synthesiser=factory), dtype=F64)
    assert seen == [((8, units), F64, classes) for units in (10, 9, 8)]
    assert len({id(cell.auxiliary[0].module) for cell in learner.cells[:-1]}) == 3


class Constant(GradientSynthesiser):
    """A synthesiser by the package's own interface."""

    def __init__(self, y, classes):
        super().__init__(classes)
        self.value = nn.Parameter(y.new_ones(y.shape[1:]))

    def forward(self, y, label=None):
        return self.value.expand(y.shape)


def test_a_factory_may_return_a_synthesiser_itself():
    learner = learner_for(PLAIN, SyntheticGradients(synthesiser=Constant), optimizer=descent(1.0), dtype=F64)
    assert [type(cell.auxiliary[0]) for cell in learner.cells[:-1]] == [Constant] * 3
    (x, y), bias = PLAIN.batches(1, dtype=F64)[0], learner.model[0].bias.detach().clone()
    learner.step(x, y)
    assert_near(bias - learner.model[0].bias.detach(), torch.ones(8, dtype=F64))  # a mean over the batch of ones


def test_a_trial_of_a_user_s_module_leaves_no_trace():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8))
    module[0].eval()
    random = torch.get_rng_state()
    made = ModuleSynthesiser(module, torch.ones(4, 8), 0)
    assert torch.equal(torch.get_rng_state(), random)
    assert module[2].num_batches_tracked.item() == 0
    assert not module[2].running_mean.any()
    assert made.training
    assert module.training


def test_a_trial_of_a_user_s_module_leaves_its_modes():
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    module[1].eval()  # frozen statistics, say
    ModuleSynthesiser(module, torch.ones(4, 8), 0)
    assert [part.training for part in module] == [True, False]


@pytest.mark.parametrize(
    ("module", "conditioned", "match"),
    [
        (nn.Linear(8, 7), False, r"gives \(8, 7\) for outputs \(8, 8\)"),
        (nn.Sequential(nn.Linear(8, 8), nn.Flatten(0)), False, r"gives \(64,\) for outputs \(8, 8\)"),
        (nn.LSTM(8, 8), False, r"gives tuple for outputs"),
        (nn.Linear(5, 8), False, r"Linear does not take outputs \(8, 8\): "),
        (nn.Linear(8, 8), True, r"Linear does not take outputs \(8, 8\) and one-hot labels \(8, 4\): "),
        (Affine(8, 3), True, r"Affine does not take outputs \(8, 8\) and one-hot labels \(8, 4\): "),
    ],
    ids=["width", "flat", "tuple", "input", "no label", "classes"],
)
def test_a_module_that_does_not_fit_is_refused_at_conversion(module, conditioned, match):
    with pytest.raises(ValueError, match=match) as error:
        learner_for(PLAIN, SyntheticGradients(synthesiser=module, conditioned=conditioned))
    assert str(error.value).startswith("the synthesiser ")
    assert "\n" not in str(error.value)


class Nothing(nn.Module):
    def forward(self, y):
        return 0 * y


@pytest.mark.parametrize(
    "own",
    [Nothing(), nn.Linear(8, 8).requires_grad_(requires_grad=False), lambda y, classes: None],
    ids=["no parameters", "frozen", "no module"],
)
def test_a_synthesiser_that_cannot_learn_is_served_or_refused_in_one_line(own):
    try:
        learner = learner_for(PLAIN, SyntheticGradients(synthesiser=own))
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017  (either is right)
        return
    for x, y in PLAIN.batches(2):
        assert learner.step(x, y).loss > 0


# ---- how they start ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_first_synthetic_gradients_are_zero(form, shape, hidden_layers, classes, per_class):
    if form in ("critic", "sobolev") and not hidden_layers:
        pytest.skip("refused")
    generator = torch.Generator().manual_seed(1)
    y = draw(generator, 6, *shape)
    design = Design(classes=classes, per_class=per_class, hidden_layers=hidden_layers, hidden_units=5, kernel_size=3)
    synthesiser = FORMS[form].build(y, design)
    for labels in ([0, 1, 2, 0, 1, 2], [2] * 6, [-1, 0, 0, -1, 1, 1]):
        prediction = synthesiser.predict(3 * draw(generator, 6, *shape), onehot(labels, 3) if classes else None, 6)
        assert prediction.credit.shape == y.shape
        assert not prediction.credit.any()
        assert prediction.scale is None or not prediction.scale.any()


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("model", [PLAIN, CNN], ids=lambda row: row.name)
@pytest.mark.parametrize(
    "fields", [{"form": "gaussian"}, {"form": "critic"}, {"form": "sobolev"}, {"per_class": True}, {"form": "gaussian", "per_class": True}]
)  # fmt: skip
def test_the_first_step_moves_only_the_top_block_in_every_form(fields, model, noise):
    rule = SyntheticGradients(conditioned=True, noise=noise, **HIDDEN, **fields)
    learner = learner_for(model, rule, optimizer=cases.sgd)
    before = [cases.copy_of(cell.block) for cell in learner.cells]
    for step in range(1 if rule.wants_sample_losses() else 2):
        learner.step(*model.batches(1)[0])
        moved = [
            any(not torch.equal(value, old[name]) for name, value in cell.block.named_parameters())
            for cell, old in zip(learner.cells, before, strict=True)
        ]
        count = len(moved)
        # then, by one block with each batch, those whose synthesisers have been told of a credit; critics know the loss at once
        assert moved[-1 - step :] == [True] * (1 + step)
        assert moved[: count - 1 - step] == [False] * (count - 1 - step)


# ---- how often they run ------------------------------------------------------------------------------------------------------


CALLED = {
    "plain": {},
    "conditioned": {"conditioned": True},
    "per class": {"conditioned": True, "per_class": True},
    "gaussian": {"form": "gaussian", "noise": 1.0},
    "critic": {"form": "critic", "update_probability": 0.5, "seed": 2},
    "sobolev": {"form": "sobolev", "update_probability": 0.5},
    "noise": {"noise": 0.5},
    "mix": {"mix": 0.5},
    "true": {"mix": 1.0},
    "warm up": {"warm_up": 3},
    "sparse": {"update_probability": 0.4},
    "clocked": {"block_every": 2, "synthesiser_every": 3},
    "sparse mix": {"update_probability": 0.5, "mix": 0.5, "synthesiser_every": 2},
    "unlocked": {"conditioned": True, "synthetic_inputs": True},
    "unlocked sparse": {"conditioned": True, "synthetic_inputs": True, "update_probability": 0.4, "synthesiser_every": 2},
}


@pytest.mark.parametrize("schedule", [cases.SCHEDULES[0], cases.SCHEDULES[1], cases.SCHEDULES[4]], ids=lambda row: row.name)
@pytest.mark.parametrize("fields", CALLED.values(), ids=CALLED)
def test_every_network_runs_once_for_a_batch_that_uses_it(fields, schedule):
    """Calls are counted, and so is what BatchNorm counts: in the blocks, in the synthesisers, and in what predicts inputs."""
    steps = 9
    learner = learner_for(PLAIN, SyntheticGradients(**HIDDEN, **fields), schedule=schedule)
    calls = {}

    def count(name):
        def hook(*_):
            calls[name] = calls.get(name, 0) + 1

        return hook

    norms = {}
    for cell in learner.cells:
        index = cell.place.index
        for kind, network in (("block", cell.block), ("synthesiser", cell.auxiliary), ("inputs", cell.inputs)):
            parts = [] if network is None else [network]
            if kind == "synthesiser" and network is not None:
                (one,) = network
                parts = [one.mean, one.log_scale] if isinstance(one, GaussianSynthesiser) else [one]
            for number, part in enumerate(parts):
                part.register_forward_hook(count((kind, index, number)))
                found = [module for module in part.modules() if isinstance(module, nn.BatchNorm1d)]
                norms[kind, index, number] = [] if isinstance(part, PerClassSynthesiser) else found
    done = {"block": [0] * 4, "synthesiser": [0] * 4, "inputs": [0] * 4}
    run = learner._executor.run

    def spy(assembly, actions):
        for cell, batch in {(action.cell, action.batch) for action in actions if action.kind is Kind.FORWARD}:
            kinds = assembly.schedule.kinds(cell, batch)
            done["block"][cell] += 1
            done["inputs"][cell] += assembly.cells[cell].inputs is not None
            done["synthesiser"][cell] += cell < 3 and bool(kinds & {Kind.LEARN, Kind.MESSAGE, Kind.AUXILIARY})
        return run(assembly, actions)

    learner._executor.run = spy
    for x, y in PLAIN.batches(steps):
        learner.step(x, y)
    learner.drain()
    assert done["block"] == [steps] * 4
    assert calls == {(kind, i, n): done[kind][i] for kind, i, n in norms if done[kind][i]}
    assert {key: [norm.num_batches_tracked.item() for norm in found] for key, found in norms.items()} == {
        (kind, i, n): [done[kind][i]] * len(found) for (kind, i, n), found in norms.items()
    }
    # a critic learns from the losses even where its block and the one above rest
    resting = "update_probability" in fields and fields.get("form") != "critic"
    assert (min(done["synthesiser"][:3]) < steps) == resting


# ---- the scale of one sample -------------------------------------------------------------------------------------------------

SCALED = {
    "per class": {"per_class": True},
    "gaussian": {"form": "gaussian"},
    "critic": {"form": "critic"},
    "sobolev": {"form": "sobolev", "matching": 2.0},
    "user's own": {"synthesiser": Affine(8, CLASSES)},
    "inputs": {"synthetic_inputs": True},
    "mix": {"mix": 0.4},
}


@pytest.mark.parametrize("fields", SCALED.values(), ids=SCALED)
def test_a_batch_twice_over_teaches_every_form_the_same(fields):
    """What synthesisers regress on is on the scale of one sample's loss, whatever the size of the batch."""
    x, y = PLAIN.batches(1, dtype=F64)[0]
    y[:] = torch.arange(8) // 2  # two of each class, so that none is normalised alone
    updates = []
    for batch in ((x, y), (torch.cat([x, x]), torch.cat([y, y]))):
        rule = SyntheticGradients(conditioned=True, **HIDDEN, **fields)
        learner = learner_for(PLAIN, rule, optimizer=cases.sgd, auxiliary_optimizer=descent(0.5), dtype=F64)
        networks = [network for cell in learner.cells for network in (cell.auxiliary, cell.inputs) if network is not None]
        for network in networks:
            randomise(network)
        result = learner.step(*batch)
        updates.append([list(network.parameters()) for network in networks] + [list(learner.model.parameters())])
        updates[-1] += [list(result.auxiliary.values()), list(result.inputs.values())]
    start = randomise(copy.deepcopy(networks[0]))
    assert cases.differs(list(start.parameters()), updates[0][0])
    torch.testing.assert_close(updates[0], updates[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_credit_of_a_sample_is_that_of_its_own_loss_over_the_batch_size(form, shape):
    generator = torch.Generator().manual_seed(1)
    y = draw(generator, 8, *shape)
    synthesiser = randomise(FORMS[form].build(y, Design(**HIDDEN))).eval()  # batches are not to be normalised together
    if form == "gaussian":
        synthesiser.mean_square.fill_(2.0)
    whole, half = synthesiser.predict(y, None, 8), synthesiser.predict(y[:4], None, 4)
    assert_near(8 * whole.credit[:4], 4 * half.credit)
    assert whole.credit.abs().max() > 1e-3
    if form == "gaussian":
        assert_near(8 * whole.scale[:4], 4 * half.scale)


# ---- real-valued targets -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(samples=st.integers(1, 6), units=st.integers(1, 5), width=st.integers(1, 4), seed=st.integers(0, 99))
def test_real_valued_targets_condition_as_they_are(samples, units, width, seed):
    generator = torch.Generator().manual_seed(seed)
    y, target, scores = draw(generator, samples, units), draw(generator, samples, width), draw(generator, samples, width)
    rule, place = SyntheticGradients(conditioned=True), lf.Place(0, 2)
    auxiliary = rule.build(lf.Site(place=place, block=nn.Identity(), rehearsal=[y.clone().requires_grad_(), scores]))
    randomise(auxiliary, seed)
    (W, T) = (parameter.detach().numpy() for parameter in auxiliary.parameters())
    assert T.shape == (width, units)
    context = lf.Context(place=place, auxiliary=auxiliary, inputs=None, outputs=(y,), samples=samples, target=target)
    (credit,) = rule.credit(context)
    np.testing.assert_allclose(credit.numpy(), (y.numpy() @ W.T + target.numpy() @ T) / samples, rtol=0, atol=1e-12)


def test_bits_condition_as_one_hot_rows_do():
    """Class numbers, and the same as real numbers: one training."""
    x, y = PLAIN.batches(1, dtype=F64)[0]
    states = []
    for target in (y, F.one_hot(y, CLASSES).to(F64)):
        learner = learner_for(PLAIN, SyntheticGradients(conditioned=True, **HIDDEN), dtype=F64)
        losses = [learner.step(x, target).loss for _ in range(5)]
        states.append((losses, dict(learner.model.state_dict())))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("fields", [{}, {"form": "gaussian"}, {"synthetic_inputs": True}], ids=str)
def test_a_regression_learns_with_conditioned_synthesisers(fields):
    generator = torch.Generator().manual_seed(1)
    x, matrix = draw(generator, 128, 6).float(), draw(generator, 6, 2).float()
    wanted = torch.tanh(x @ matrix)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.Sequential(nn.Tanh(), nn.Linear(16, 16)), nn.Sequential(nn.Tanh(), nn.Linear(16, 2))
    )
    rule = SyntheticGradients(conditioned=True, hidden_layers=1, hidden_units=16, learning_rate=0.01, **fields)
    learner = lf.convert(model, rule, loss=F.mse_loss, optimizer=cases.adam, example_input=x)
    for _ in range(150):
        learner.step(x, wanted)
    assert F.mse_loss(learner.predict(x), wanted).item() < 0.2 * wanted.var().item()


# ---- inputs ------------------------------------------------------------------------------------------------------------------


def test_an_input_is_predicted_by_affine_layers_or_by_convolutions_on_the_pooled_image():
    generator = torch.Generator().manual_seed(1)
    source, wanted = draw(generator, 4, 2, 3), draw(generator, 4, 5)
    imagine = randomise(InputSynthesiser(source, wanted, Design()))
    (W, b) = (parameter.detach().numpy() for parameter in imagine.parameters())
    np.testing.assert_allclose(imagine(source).detach().numpy(), source.flatten(1).numpy() @ W.T + b, rtol=0, atol=1e-12)

    source, wanted = draw(generator, 4, 2, 6, 8), draw(generator, 4, 5, 3, 4)
    imagine = randomise(InputSynthesiser(source, wanted, Design(kernel_size=3)))
    (W, b) = imagine.parameters()
    by_hand = F.conv2d(F.avg_pool2d(source, 2), W, b, padding=1)
    assert_near(imagine(source).detach(), by_hand.detach())


def test_a_tree_of_inputs_is_predicted_as_a_tree():
    generator = torch.Generator().manual_seed(1)
    source = draw(generator, 4, 6)
    wanted = {"h": draw(generator, 4, 3), "more": (draw(generator, 4, 2, 2), draw(generator, 4, 1))}
    made = InputSynthesiser(source, wanted, Design(hidden_layers=1, hidden_units=5))(source)
    assert {"h": made["h"].shape, "more": [one.shape for one in made["more"]]} == {"h": (4, 3), "more": [(4, 2, 2), (4, 1)]}
    assert isinstance(made["more"], tuple)


@pytest.mark.parametrize(
    ("source", "wanted", "match"),
    [
        ({"x": torch.zeros(2, 3)}, torch.zeros(2, 3), "one input tensor, this model takes a dict"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), "whole numbers"),
        (torch.zeros(2, 3), (torch.zeros(2, 3), 7), "plain values"),
    ],
    ids=["tree", "numbers", "plain"],
)
def test_inputs_that_cannot_be_predicted_are_refused(source, wanted, match):
    with pytest.raises(ValueError, match=match) as error:
        InputSynthesiser(source, wanted, Design())
    assert "\n" not in str(error.value)


def test_what_predicts_inputs_can_be_copied():
    learner = learner_for(PLAIN, SyntheticGradients(conditioned=True, synthetic_inputs=True))
    copied, x = copy.deepcopy(learner.cells[1].inputs), PLAIN.batches(1)[0][0]
    assert_same(copied(x), learner.cells[1].inputs(x))


# ---- fields ------------------------------------------------------------------------------------------------------------------

WRONG = {
    "update_probability of nothing": ({"update_probability": 0.0}, "update_probability=0.0 must be above 0 and at most 1"),
    "update_probability": ({"update_probability": 1.5}, "update_probability=1.5 must be above 0 and at most 1"),
    "update_probability below": ({"update_probability": -0.5}, "update_probability=-0.5 must"),
    "update_probability nan": ({"update_probability": float("nan")}, "update_probability=nan must"),
    "mix below": ({"mix": -0.1}, r"mix=-0.1 must be from 0 \(synthetic\) to 1 \(true gradient\)"),
    "mix above": ({"mix": 1.1}, "mix=1.1 must"),
    "mix nan": ({"mix": float("nan")}, "mix=nan must"),
    "noise": ({"noise": -1.0}, "noise=-1.0 must be 0 or more"),
    "noise nan": ({"noise": float("nan")}, "noise=nan must be 0 or more"),
    "noise_decay": ({"noise_decay": -0.1}, "noise_decay=-0.1 must be 0 or more"),
    "block_every": ({"block_every": 0}, "block_every=0 must be 1 or more"),
    "synthesiser_every": ({"synthesiser_every": 0}, "synthesiser_every=0 must be 1 or more"),
    "warm_up": ({"warm_up": -1}, "warm_up=-1 must be 0 or more"),
    "matching": ({"matching": -1.0}, "matching=-1.0 must be 0 or more"),
    "hidden_layers": ({"hidden_layers": -1}, "hidden_layers=-1 must be 0 or more"),
    "hidden_units": ({"hidden_units": 0}, "hidden_units=0 must be 1 or more"),
    "kernel_size": ({"kernel_size": 4}, "kernel_size=4 must be odd"),
    "learning_rate": ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
    "form": ({"form": "gausian"}, "unknown form of synthesiser 'gausian': did you mean 'gaussian'?"),
    "another form": ({"form": "sobolov", "hidden_layers": 1}, "did you mean 'sobolev'?"),
    "per_class": ({"per_class": True}, "give conditioned=True, too"),
    "critic": ({"form": "critic"}, "form='critic' needs a hidden layer, hidden_layers=1"),
    "sobolev": ({"form": "sobolev"}, "form='sobolev' needs a hidden layer, hidden_layers=1"),
    "own critic": ({"form": "critic", "hidden_layers": 1, "synthesiser": nn.Linear(2, 2)}, 'leave form at "gradient"'),
    "own per class": ({"conditioned": True, "per_class": True, "synthesiser": nn.Linear(2, 2)}, "leave .* per_class out"),
    "borders": ({"borders": ()}, r"borders=\(\) leaves no synthesiser"),
}


@pytest.mark.parametrize(("fields", "match"), WRONG.values(), ids=WRONG)
def test_a_field_out_of_range_is_refused_in_one_line(fields, match):
    with pytest.raises(ValueError, match=match) as error:
        SyntheticGradients(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"update_probability": 1e-9}, {"update_probability": 1.0}, {"mix": 0.0}, {"mix": 1.0}, {"noise": 0.0, "noise_decay": 0.0},
        {"block_every": 1, "synthesiser_every": 1, "warm_up": 0}, {"matching": 0.0}, {"kernel_size": 1, "hidden_units": 1},
    ],
)  # fmt: skip
def test_the_ends_of_every_range_are_legal(fields):
    rule = SyntheticGradients(**fields)
    assert {name: getattr(rule, name) for name in fields} == fields
    assert replace(rule, **fields) == rule


def test_the_default_rate_goes_by_form_and_conditioning():
    (parameter,) = nn.Linear(1, 1, bias=False).parameters()

    def rate(**fields):
        return SyntheticGradients(**fields).auxiliary_optimizer([parameter]).param_groups[0]["lr"]

    assert rate() != rate(conditioned=True)
    assert rate(form="gaussian") == rate()
    for form in ("critic", "sobolev"):
        assert (
            rate(form=form, hidden_layers=1) == rate(form=form, hidden_layers=1, conditioned=True) == FORMS[form].learning_rate
        )
        assert rate(form=form, hidden_layers=1, learning_rate=0.25) == 0.25


def test_the_critic_s_own_module_is_exported_by_its_form():
    y = torch.zeros(2, 3)
    made = {form: FORMS[form].build(y, Design(hidden_layers=1)) for form in FORMS}
    assert [type(made[form]).__name__ for form in ("gaussian", "critic", "sobolev")] == [
        "GaussianSynthesiser",
        "CriticSynthesiser",
        "CriticSynthesiser",
    ]
    assert isinstance(made["gradient"], GradientSynthesiser)
    assert isinstance(made["critic"], CriticSynthesiser)
