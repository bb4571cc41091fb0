"""Gradients taken where the weights will be."""

import pytest
import torch
from served import adam, assert_same, plain, sgd, smooth, trained
from torch import nn

import lockfree as lf
from lockfree.server import Push, Server, Simulator
from lockfree.staleness import BSP, NoCorrection, WeightPrediction

RATE, MOMENTUM = 0.1, 0.9


def server(correction=None, optimizer=None):
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    make = optimizer or (lambda weights: torch.optim.SGD(weights, lr=RATE, momentum=MOMENTUM))
    core = Server(model, optimizer=make, correction=correction or WeightPrediction())
    return core, [core.join(number) for number in range(3)]


def push(core, pulled, value):
    gradient = [torch.full((1, 2), value)]
    which = (pulled.worker, pulled.incarnation, pulled.sequence, pulled.version, pulled.ticket)
    return core.push(Push(*which, gradient, [], samples=1, loss=0.0))


def test_with_momentum_it_is_spectrain_written_out():
    core, lives = server()
    first = [core.pull(number, life) for number, life in enumerate(lives)]
    assert all(torch.equal(one.weights[0], torch.ones(1, 2)) for one in first)  # no step yet, none was late
    w, v = torch.ones(1, 2), torch.zeros(1, 2)
    for one, value in zip(first, (1.0, -2.0, 0.5), strict=True):
        assert push(core, one, value).delay == one.worker
        v = MOMENTUM * v + value
        w = w - RATE * v
    for number, life in enumerate(lives):  # worker k was late by k
        pulled = core.pull(number, life)
        torch.testing.assert_close(pulled.weights[0], w - number * RATE * v)
        again = core.pull(number, life)
        assert torch.equal(again.weights[0], pulled.weights[0])
        torch.testing.assert_close(core.weights[0], w)


def test_with_adam_the_step_is_that_of_its_moments():
    core, lives = server(WeightPrediction(steps=4), lambda weights: torch.optim.Adam(weights, lr=RATE))
    pulled = core.pull(0, lives[0])
    push(core, pulled, 3.0)
    ahead = core.pull(0, lives[0]).weights[0]
    torch.testing.assert_close(ahead, torch.ones(1, 2) - RATE - 4 * RATE)  # its first step is of length lr


def test_what_a_gradient_was_taken_at_is_what_the_gap_is_measured_from():
    core, lives = server()
    for value in (1.0, 1.0, 1.0):
        for number, life in enumerate(lives):
            push(core, core.pull(number, life), value)
    pulled = core.pull(2, lives[2])
    assert torch.equal(pulled.weights[0], core.weights[0])  # alone at work, nobody was late
    answer = push(core, pulled, 1.0)
    assert answer.delay == 0


@pytest.mark.parametrize("optimizer", [plain, sgd, adam])
def test_who_is_not_late_computes_at_the_weights(optimizer):
    for more in ({"workers": 1}, {"workers": 3, "consistency": BSP()}):
        some, other = (
            trained(smooth(), optimizer=optimizer, correction=correction, **more).model
            for correction in (NoCorrection(), WeightPrediction())
        )
        assert_same(some, other)


def test_no_step_is_no_prediction():
    some, other = (
        trained(smooth(), correction=c, engine=Simulator()).model for c in (NoCorrection(), WeightPrediction(steps=0))
    )
    assert_same(some, other)


def test_it_makes_up_for_delays_on_a_quadratic():
    """Eight workers with momentum: late gradients swing ever further, predicted ones settle."""
    x = torch.eye(2).repeat(8, 1)
    y = x @ torch.tensor([[1.0], [-1.0]])

    def distance(correction):
        model = nn.Linear(2, 1, bias=False).double()
        result = lf.server.train(
            model,
            (x.double(), y.double()),
            loss=nn.functional.mse_loss,
            optimizer=lambda weights: torch.optim.SGD(weights, lr=0.02, momentum=0.9),
            workers=8,
            batch_size=None,
            updates=400,
            correction=correction,
        )
        return (result.model.weight - torch.tensor([[1.0, -1.0]])).norm().item()

    assert distance(WeightPrediction()) < 1e-3 * distance(NoCorrection())


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    for steps in (-1, 1.5, True):
        with pytest.raises(ValueError, match="steps"):
            WeightPrediction(steps=steps)
    with pytest.raises(ValueError, match="on a parameter server: give a link another correction"):
        lf.Link(delay=1, correction=WeightPrediction())
