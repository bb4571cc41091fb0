"""The step in one pass is the step in many."""

import copy

import pytest
import torch
from torch import nn

from lockfree.server import fused
from lockfree.server.descent import OptimizerDescent
from lockfree.server.fused import CompensatedDescent
from lockfree.staleness import DelayCompensation, GapAware, Late

SHAPES = [(7, 5), (), (3,), (0, 4), (2, 2, 2)]


def sgd(weights, **more):
    return torch.optim.SGD(weights, lr=0.1, **more)


def tensors(seed, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def both(correction, dtype=torch.float64, optimizer=sgd, schedule=None, patience=20):
    weights = tensors(0, dtype=dtype)
    general, inner = (
        OptimizerDescent(weights, optimizer=optimizer, correction=correction, schedule=schedule, patience=patience)
        for _ in range(2)
    )
    found = CompensatedDescent.of(inner, weights, correction, None)
    assert isinstance(found, CompensatedDescent)
    return general, found


def applied(descent, gradients, late, memory, *, in_place=False, measure=True):
    now = [one.clone() for one in late.now]
    then = now if late.then is late.now else late.then
    late = Late(late.read, late.applied, then, now)
    return descent.apply(
        gradients, late, memory, lambda: now if in_place else [torch.empty_like(one) for one in now], measure=measure
    )


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("piece", [3, 1000])
@pytest.mark.parametrize("distance", [1e-3, 1.0, 100.0], ids=["near", "middling", "far, so that the cap shortens"])
@pytest.mark.parametrize(
    "correction",
    [
        DelayCompensation(),
        DelayCompensation(strength=0.3, cap=None),
        DelayCompensation(adaptive=False, strength=0.5),
        DelayCompensation(decay=0.0, eps=0.0, cap=0.2),
    ],
    ids=["adaptive", "without a cap", "constant", "absolute value"],
)
def test_it_is_the_general_step(correction, distance, piece, in_place, monkeypatch):
    monkeypatch.setattr(fused, "PIECE", piece)
    general, found = both(correction)
    memories = [one.memory(tensors(0)) for one in (general, found)]
    for step in range(4):
        gradients = tensors(10 + step)
        now = tensors(20 + step)
        late = Late(step, step + 3, [w + distance * d for w, d in zip(now, tensors(30 + step), strict=True)], now)
        one, other = (
            applied(descent, gradients, late, memory, in_place=in_place)
            for descent, memory in zip((general, found), memories, strict=True)
        )
        torch.testing.assert_close(other.weights, one.weights, rtol=1e-12, atol=1e-14)
        assert other.gap == pytest.approx(one.gap, rel=1e-10)
        assert other.ratio == pytest.approx(one.ratio, rel=1e-9)
        torch.testing.assert_close(memories[1], memories[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_no_strength_and_no_delay_are_plain_sgd_bit_for_bit(strength):
    general, found = both(DelayCompensation(strength=strength), dtype=torch.float32)
    now, then = tensors(1, dtype=torch.float32), tensors(2, dtype=torch.float32)
    late = Late(0, 3, then, now) if strength == 0 else Late(3, 3, now, now)
    gradients = tensors(3, dtype=torch.float32)
    plain = [w.add(g, alpha=-0.1) for w, g in zip(now, gradients, strict=True)]
    for in_place in (False, True):
        assert_equal(applied(found, gradients, late, found.memory(now), in_place=in_place).weights, plain)
    assert_equal(applied(general, gradients, late, general.memory(now)).weights, plain)


def assert_equal(some, others):
    assert all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("cap", [None, 1.0])
def test_what_overflows_is_left_out_as_in_the_general_step(cap):
    general, found = both(DelayCompensation(cap=cap), dtype=torch.float32)
    now, then, gradients = (tensors(seed, dtype=torch.float32) for seed in range(3))
    gradients[0][1, 2] = 1e25
    then[0][3, 3] = 3e38
    late = Late(0, 2, then, now)
    memories = [one.memory(now) for one in (general, found)]
    one, other = (applied(descent, gradients, late, memory) for descent, memory in zip((general, found), memories, strict=True))
    torch.testing.assert_close(memories[1], memories[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other.weights, one.weights, rtol=1e-5, atol=1e-6)
    assert all(bool(weight.isfinite().all()) for weight in other.weights)


def test_a_schedule_counts_and_a_compensation_out_of_hand_is_given_up():
    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)

    general, found = both(DelayCompensation(strength=1e4), schedule=schedule, patience=3)
    memories = [one.memory(tensors(0)) for one in (general, found)]
    for step in range(6):
        now = tensors(20 + step)
        late = Late(step, step + 3, tensors(30 + step), now)
        one, other = (
            applied(descent, tensors(step), late, memory) for descent, memory in zip((general, found), memories, strict=True)
        )
        assert one.fell_back == other.fell_back == (step == 2)
        torch.testing.assert_close(other.weights, one.weights, rtol=1e-12, atol=1e-14)
    assert found.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**3)
    state = copy.deepcopy(found.state_dict())
    assert state["fell_back"] == general.state_dict()["fell_back"] is True


@pytest.mark.parametrize(
    ("optimizer", "correction", "clip"),
    [
        (lambda weights: sgd(weights, momentum=0.9), DelayCompensation(), None),
        (lambda weights: sgd(weights, weight_decay=0.1), DelayCompensation(), None),
        (torch.optim.Adam, DelayCompensation(), None),
        (sgd, GapAware(), None),
        (sgd, DelayCompensation(), 1.0),
    ],
    ids=["momentum", "weight decay", "adam", "another correction", "clipping"],
)
def test_everything_else_takes_the_general_step(optimizer, correction, clip):
    weights = [nn.Parameter(torch.zeros(2))]
    general = OptimizerDescent(weights, optimizer=optimizer, correction=correction, clip=clip)
    assert CompensatedDescent.of(general, weights, correction, clip) is general
