"""Late links: kept weights, weights that are not kept, corrections; each against the formula written out."""

import cases
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lockfree as lf

RATE, BATCHES = 0.5, 7


def network():
    torch.manual_seed(0)
    low = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5))
    return nn.Sequential(low, nn.Sequential(nn.Tanh(), nn.Linear(5, 3))).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 4, generator=generator, dtype=torch.float64), torch.randint(3, (8,), generator=generator))
        for _ in range(BATCHES)
    ]


def convert(model, link, **more):
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=RATE)  # noqa: E731
    return lf.convert(model, "backprop", loss=F.cross_entropy, optimizer=optimizer, schedule="lockstep", links=link, **more)


def written_out(*, stash, strength):
    """Delayed backpropagation of two blocks (Huo et al. 2018): the lower one learns a batch late; returns its weights."""
    low, high = network()
    weights = [parameter.detach().clone() for parameter in low.parameters()]
    late = None
    for batch in [*batches(), None]:
        fresh = None
        if batch is not None:
            (x, y), (w1, b1, w2, b2) = batch, weights
            h = torch.tanh(x @ w1.T + b1)
            out = (h @ w2.T + b2).requires_grad_()
            message, *gradients = torch.autograd.grad(F.cross_entropy(high(out), y), [out, *high.parameters()])
            with torch.no_grad():
                for parameter, gradient in zip(high.parameters(), gradients, strict=True):
                    parameter -= RATE * gradient
            fresh = x, h, message, weights
        if late is not None:
            x, h, message, then = late
            back = message @ (then[2] if stash else weights[2])
            at_h = back * (1 - h * h)
            gradients = [at_h.T @ x, at_h.sum(0), message.T @ h, message.sum(0)]
            repaired = [g + strength * g * g * (now - old) for g, now, old in zip(gradients, weights, then, strict=True)]
            weights = [w - RATE * g for w, g in zip(weights, repaired, strict=True)]
        late = fresh
    return [*weights, *(parameter.detach() for parameter in high.parameters())]


@pytest.mark.parametrize("resumed", [False, True], ids=["at a stretch", "resumed at every step"])
@pytest.mark.parametrize("strength", [0.0, 0.7])
@pytest.mark.parametrize("stash", [True, False], ids=["kept", "not kept"])
def test_late_gradients_are_those_written_out(stash, strength, resumed):
    correction = lf.staleness.DelayCompensation(adaptive=False, strength=strength, cap=None) if strength else None
    model, link = network(), lf.Link(delay=1, stash=stash, correction=correction)
    learner = convert(model, link)
    for x, y in batches():
        if resumed:
            state = learner.state_dict()
            learner = convert(model, link)
            learner.load_state_dict(state)
        learner.step(x, y)
    learner.drain()
    torch.testing.assert_close([p.detach() for p in model.parameters()], written_out(stash=stash, strength=strength))


def test_no_correction_at_strength_0_is_plain_delay():
    weights = []
    for correction in (None, lf.staleness.NoCorrection(), lf.staleness.DelayCompensation(adaptive=False, strength=0.0)):
        model = network()
        learner = convert(model, lf.Link(delay=2, correction=correction))
        for x, y in batches():
            learner.step(x, y)
        learner.drain()
        weights.append(dict(model.state_dict()))
    cases.assert_same(weights[0], weights[1])
    cases.assert_same(weights[0], weights[2])


def test_an_adaptive_memory_survives_a_resume():
    link = lf.Link(delay=1, correction=lf.staleness.DelayCompensation())
    weights = []
    for resumed in (False, True):
        model = network()
        learner = convert(model, link)
        for x, y in batches():
            if resumed:
                state = learner.state_dict()
                learner = convert(model, link)
                learner.load_state_dict(state)
            learner.step(x, y)
        weights.append(dict(model.state_dict()))
    cases.assert_same(*weights)


def test_the_order_is_clip_then_correct():
    class Seen(lf.staleness.ScaleByDelay):
        def correct(self, gradients, late, memory):
            norms.append(torch.stack([g.norm() for g in gradients if g is not None]).norm().item())
            return super().correct(gradients, late, memory)

    norms: list[float] = []
    learner = convert(network(), lf.Link(delay=1, correction=Seen()), clip_norm=1e-3)
    for x, y in batches():
        learner.step(x, y)
    assert norms
    assert max(norms) <= 1e-3 * (1 + 1e-6)


def test_what_cannot_be_corrected_is_refused():
    link = lf.Link(delay=1, correction=lf.staleness.ScaleByDelay())
    with pytest.raises(ValueError, match="accumulate=2"):
        convert(network(), link, accumulate=2)
    tied = cases.MODELS["tied"]
    with pytest.raises(ValueError, match="share a parameter"):
        lf.convert(tied.build(), "backprop", loss=tied.loss, optimizer=cases.sgd, links=link)
    with pytest.raises(TypeError, match="correction"):
        lf.Link(delay=1, correction="dc-adaptive")
    assert repr(lf.Link(delay=1, stash=False, correction=lf.staleness.ScaleByDelay())) == (
        "Link(delay=1, stash=False, correction=ScaleByDelay())"
    )
