"""What is proved of synthetic gradients (Czarnecki et al. 2017): convergence, what forms can represent, points that are added."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lockfree as lf
from lockfree.synthesisers import LinearSynthesiser, LineSearchedSynthesiser, LogisticSynthesiser
from lockfree.synthesisers.base import Design

SAMPLES = 60


def drawn(features: int, outputs: int, seed: int, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """A noisy linear task: inputs and real-valued targets, in double precision."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(SAMPLES, features)
    return x, x @ normal(features, outputs) / features**0.5 + 0.3 + noise * normal(SAMPLES, outputs)


def squared(scores: Tensor, y: Tensor) -> Tensor:
    return (scores - y).square().sum(1).mean() / 2


def between_output_and_loss(
    network: nn.Sequential, rule: lf.Rule, x: Tensor, *, loss: Callable[[Tensor, Tensor], Tensor] = squared, rate: float
) -> lf.Learner:
    """The network as one block, with a synthesiser on its output; the block above does nothing."""
    model = nn.Sequential(network, nn.Identity()).double()
    learner = lf.convert(
        model, rule, loss=loss, optimizer=lambda params: torch.optim.SGD(params, lr=rate), blocks=["1"], example_input=x[:2]
    )
    assert [cell.auxiliary is not None for cell in learner.cells] == [True, False]
    return learner


def truth(learner: lf.Learner, x: Tensor, y: Tensor) -> float:
    """The norm of the true gradient."""
    loss = learner.loss(learner.model(x), y)
    gradients = torch.autograd.grad(loss, list(learner.model.parameters()))
    return float(torch.cat([one.flatten() for one in gradients]).norm())


LINE_SEARCH = lf.rules.SyntheticGradients(conditioned=True, form="line-search")


# ---- the length of a step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 3, 3)], ids=["rows", "sequences", "images"])
@pytest.mark.parametrize("classes", [0, 2])
def test_a_step_is_the_best_along_the_gradient(shape, classes):
    generator = torch.Generator().manual_seed(1)
    y, target = (torch.randn(7, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    label = torch.eye(2, dtype=torch.float64)[torch.arange(7) % 2] if classes else None
    synthesiser = LineSearchedSynthesiser(y, Design(classes=classes))
    with torch.no_grad():
        for parameter in synthesiser.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    synthesiser.learn(synthesiser.predict(y, label, 7), target / 7, 7, None)
    before = [parameter.detach().clone() for parameter in synthesiser.parameters()]
    steps = [parameter.grad for parameter in synthesiser.parameters()]

    def missed(part: float) -> float:
        with torch.no_grad():
            for parameter, old, step in zip(synthesiser.parameters(), before, steps, strict=True):
                parameter.copy_(old - part * step)
            return float((synthesiser.network(y, label) - target).square().sum() / 14)

    at = {part: missed(part) for part in (0.0, 1 - 1e-3, 1.0, 1 + 1e-3)}
    assert min(at, key=at.__getitem__) == 1.0
    assert at[1 - 1e-3] - at[1.0] == pytest.approx(at[1 + 1e-3] - at[1.0], rel=1e-5)  # the bottom of a parabola
    assert at[0.0] - at[1.0] == pytest.approx(1e6 * (at[1 + 1e-3] - at[1.0]), rel=1e-5)


def test_a_step_is_nothing_where_nothing_is_seen():
    synthesiser = LineSearchedSynthesiser(torch.zeros(4, 3), Design(classes=2))
    prediction = synthesiser.predict(torch.zeros(4, 3), torch.zeros(4, 2), 4)
    synthesiser.learn(prediction, torch.ones(4, 3), 4, None)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in synthesiser.parameters())


@pytest.mark.parametrize("form", ["sigmoid", "line-search"])
def test_forms_without_hidden_layers_say_so(form):
    with pytest.raises(ValueError, match=f"form='{form}' has no hidden layers"):
        lf.rules.SyntheticGradients(form=form, hidden_layers=1)


def test_a_sigmoid_takes_no_images():
    with pytest.raises(ValueError, match="takes rows"):
        LogisticSynthesiser(torch.zeros(2, 3, 4, 4), Design())


# ---- theorem 1: a linear model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("features", "outputs"), [(1, 1), (5, 1), (6, 3)])
def test_a_linear_model_reaches_the_global_solution(features, outputs, seed):
    x, y = drawn(features, outputs, seed)
    torch.manual_seed(seed)
    learner = between_output_and_loss(nn.Sequential(nn.Linear(features, outputs)), LINE_SEARCH, x, rate=0.3)
    for _ in range(500):
        learner.step(x, y)
    with_ones = torch.cat([x, torch.ones(SAMPLES, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(with_ones, y).solution
    layer = learner.model[0][0]
    torch.testing.assert_close(torch.cat([layer.weight.t(), layer.bias[None]]).detach(), best, rtol=0, atol=1e-6)


# ---- theorem 2: a deep linear model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "seed"), [(2, 0), (5, 1)])
def test_a_deep_linear_model_reaches_a_critical_point_of_the_loss(depth, seed):
    x, y = drawn(4, 1, seed)
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 4, bias=False) for _ in range(depth - 1)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    learner = between_output_and_loss(nn.Sequential(*layers, nn.Linear(4, 1)), LINE_SEARCH, x, rate=0.05)
    start = truth(learner, x, y)
    for _ in range(1500):
        learner.step(x, y)
    assert truth(learner, x, y) < 1e-6 * start


# ---- what a form can represent -----------------------------------------------------------------------------------------------


def logistic(scores: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, y, reduction="sum") / len(y)


def output_and_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs all over the place, binary targets, and the gradient of the mean loss."""
    generator = torch.Generator().manual_seed(0)
    h = (4 * torch.randn(200, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    y = torch.randint(2, (200, 2), generator=generator).double()
    return h.detach(), y, torch.autograd.grad(loss(h, y), h)[0]


def test_a_linear_synthesiser_is_exact_for_the_squared_error():
    h, y, gradient = output_and_gradient(squared)
    synthesiser = LinearSynthesiser(h, Design(classes=2))
    with torch.no_grad():
        synthesiser.weight.copy_(torch.eye(2))
        synthesiser.table.copy_(-torch.eye(2))
    torch.testing.assert_close(synthesiser.predict(h, y, 200).credit, gradient, rtol=1e-12, atol=0)


def test_no_linear_synthesiser_is_exact_for_the_log_loss_but_one_with_a_sigmoid_is():
    h, y, gradient = output_and_gradient(logistic)
    seen = torch.cat([h, y, torch.ones(200, 1, dtype=torch.float64)], 1)
    best = seen @ torch.linalg.lstsq(seen, 200 * gradient).solution  # the best of all affine maps of (h, y)
    assert float((best - 200 * gradient).norm() / (200 * gradient).norm()) > 0.2
    synthesiser = LogisticSynthesiser(h, Design(classes=2))
    with torch.no_grad():
        synthesiser.affine.weight.copy_(torch.eye(2))
        synthesiser.offset.zero_()
        synthesiser.table.copy_(-torch.eye(2))
    torch.testing.assert_close(synthesiser.predict(h, y, 200).credit, gradient, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize(("form", "rate"), [("gradient", 0.02), ("sigmoid", 0.02)])
def test_a_logistic_regression_is_learnt_through_a_sigmoid(form, rate):
    """What is missed of the true gradient, at the end of training by the same settings."""
    x, y = drawn(5, 1, 0, noise=1.0)
    y = (y > 0.3).double()
    rule = lf.rules.SyntheticGradients(conditioned=True, form=form, learning_rate=rate)
    torch.manual_seed(0)
    learner = between_output_and_loss(nn.Sequential(nn.Linear(5, 1)), rule, x, loss=logistic, rate=0.1)
    for _ in range(1500):
        learner.step(x, y)
    (error,) = lf.probes.GradientQuality().look(lf.probes.View(learner, x, y))["relative_error"][:1]
    assert error < 0.02 if form == "sigmoid" else error > 0.05


# ---- critical points that are added ------------------------------------------------------------------------------------------


def odd(features: int) -> tuple[Tensor, Tensor]:
    """Every input with its negative, and targets that are an odd function of it: integers, whose means are exactly 0."""
    half = torch.randint(-3, 4, (16, features), generator=torch.Generator().manual_seed(0)).double()
    y = half.sum(1, keepdim=True) + half[:, :1] ** 3
    return torch.cat([half, -half]), torch.cat([y, -y])


@pytest.mark.parametrize("conditioned", [False, True])
def test_a_critical_point_is_added_where_the_synthesiser_sees_nothing(conditioned):
    """Weights of 0 make every output 0: one that sees nothing else says 0 for ever, one that sees the targets knows better."""
    x, y = odd(3)
    rule = lf.rules.SyntheticGradients(conditioned=conditioned, form="line-search")
    layer = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(layer.weight)
    learner = between_output_and_loss(nn.Sequential(layer), rule, x, rate=0.1)
    assert truth(learner, x, y) > 1
    for _ in range(500):
        learner.step(x, y)
    assert truth(learner, x, y) < 1e-6 if conditioned else not layer.weight.any()


def test_critical_points_are_added_where_the_output_says_little_of_the_residual():
    r"""What is predicted from $h = w^T x$ alone is $a h$: w learns only along $\Sigma w$, and stops where a = 0.

    That is on the ellipsoid $w^T \Sigma w = w^T c$ with $\Sigma = E[xx^T]$, $c = E[xy]$, on which the solution is one point of many.
    """
    x, y = odd(3)
    covariance, c = x.t() @ x / len(x), (x * y).mean(0)
    layer = nn.Linear(3, 1, bias=False)
    nn.init.constant_(layer.weight, 0.1)
    rule = lf.rules.SyntheticGradients(form="line-search")
    learner = between_output_and_loss(nn.Sequential(layer), rule, x, rate=0.03)
    for _ in range(700):
        learner.step(x, y)
    w = layer.weight.detach()[0]
    assert float(w @ covariance @ w) == pytest.approx(float(w @ c), rel=1e-6)
    assert float(w @ c) > 1
    assert truth(learner, x, y) > 0.5


@pytest.mark.parametrize("seed", range(3))
def test_critical_points_of_the_loss_stay_critical(seed):
    """At the solution, with a synthesiser that knows its gradient, nothing moves."""
    x, y = drawn(4, 2, seed)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(SAMPLES, 1, dtype=torch.float64)], 1), y).solution
    layer = nn.Linear(4, 2).double()
    with torch.no_grad():
        layer.weight.copy_(best[:-1].t())
        layer.bias.copy_(best[-1])
    learner = between_output_and_loss(nn.Sequential(layer), LINE_SEARCH, x, rate=0.1)
    synthesiser = learner.cells[0].auxiliary[0].network
    with torch.no_grad():
        synthesiser.weight.copy_(torch.eye(2))
        synthesiser.table.copy_(-torch.eye(2))
    for _ in range(10):
        learner.step(x, y)
    torch.testing.assert_close(layer.weight.detach(), best[:-1].t(), rtol=0, atol=1e-12)
