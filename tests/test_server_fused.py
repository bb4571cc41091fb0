"""The step in one pass is the step in many."""

import copy
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lockfree.server import NotFinite, Push, Server, fused, kernel
from lockfree.server.descent import OptimizerDescent
from lockfree.server.fused import CompensatedDescent
from lockfree.staleness import DelayCompensation, GapAware, Late

SHAPES = [(7, 5), (), (3,), (0, 4), (2, 2, 2)]


@pytest.fixture(autouse=True, params=["compiled", "by operations"])
def way(request, monkeypatch):
    """Both ways there are, whatever is installed elsewhere."""
    if request.param == "by operations":
        monkeypatch.setitem(sys.modules, "lockfree.server.kernel", None)  # as if numba were missing
    assert fused.fastest() is (kernel.sweep if request.param == "compiled" else fused.by_operations)
    return request.param


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


def applied(descent, gradients, late, memory, *, room="new", measure=True):
    """Applies a gradient; the next version is written to new memory, or to that of the weights now or then."""
    now = [one.clone() for one in late.now]
    then = now if late.then is late.now else [one.clone() for one in late.then]
    rooms = {"new": [torch.full_like(one, torch.nan) for one in now], "now": now, "then": then}
    late = Late(late.read, late.applied, then, now)
    return descent.apply(gradients, late, memory, lambda: rooms[room], measure=measure)


@pytest.mark.parametrize("room", ["new", "now", "then"])
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
def test_it_is_the_general_step(correction, distance, piece, room, monkeypatch):
    monkeypatch.setattr(fused, "PIECE", piece)
    general, found = both(correction)
    memories = [one.memory(tensors(0)) for one in (general, found)]
    for step in range(4):
        gradients = tensors(10 + step)
        now = tensors(20 + step)
        late = Late(step, step + 3, [w + distance * d for w, d in zip(now, tensors(30 + step), strict=True)], now)
        one, other = (
            applied(descent, gradients, late, memory, room=room)
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
    for room in ("new", "now", "then"):
        assert_equal(applied(found, gradients, late, found.memory(now), room=room).weights, plain)
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


@pytest.mark.parametrize("size", [1, 31, 1025, 5000])
@pytest.mark.parametrize("distance", [1e-2, 10.0], ids=["near", "far, so that the cap shortens"])
@pytest.mark.parametrize("correction", [DelayCompensation(), DelayCompensation(adaptive=False), DelayCompensation(decay=0.0)])
def test_in_single_precision_it_is_the_general_step_up_to_rounding(correction, distance, size):
    generator = torch.Generator().manual_seed(size)
    gradient, now, away = (torch.randn(size, generator=generator) for _ in range(3))
    late = Late(0, 1, [now + distance * away], [now])
    general = OptimizerDescent([now], optimizer=sgd, correction=correction)
    found = CompensatedDescent.of(OptimizerDescent([now], optimizer=sgd, correction=correction), [now], correction, None)
    memories = [one.memory([now]) for one in (general, found)]
    one, other = (applied(way, [gradient], late, memory) for way, memory in zip((general, found), memories, strict=True))
    torch.testing.assert_close(other.weights, one.weights, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(memories[1], memories[0], rtol=1e-6, atol=1e-9)
    assert other.ratio == pytest.approx(one.ratio, rel=1e-3)
    assert other.gap == pytest.approx(one.gap, rel=1e-5)


def test_a_gradient_that_is_not_aligned_takes_the_general_step():
    general, found = both(DelayCompensation())
    now, then = tensors(1), tensors(2)
    gradients = [off_by_a_byte(one) for one in tensors(3)]
    assert gradients[0].data_ptr() % 8
    late = Late(0, 1, then, now)
    one, other = (applied(way, gradients, late, way.memory(now)) for way in (general, found))
    assert_equal(other.weights, one.weights)


def off_by_a_byte(tensor):
    raw = np.frombuffer(bytearray(1) + tensor.numpy().tobytes(), np.uint8)[1:]
    return torch.from_numpy(raw.view(np.float64).reshape(tensor.shape))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("strength", [0.1, 50.0], ids=["whole", "shortened"])
def test_threads_change_no_bit(strength, threads, monkeypatch, way):
    monkeypatch.setattr(fused, "PIECE", 1000)
    monkeypatch.setattr(kernel, "ENOUGH", 1)
    generator = torch.Generator().manual_seed(0)
    gradient, now, then = (torch.randn(20_011, generator=generator) for _ in range(3))
    correction = DelayCompensation(strength=strength)
    found = []
    for number in (1, 2, 3):
        threads(number)
        descent = CompensatedDescent(OptimizerDescent([now], optimizer=sgd, correction=correction), correction)
        memory = descent.memory([now])
        effect = applied(descent, [gradient], Late(0, 1, [then], [now]), memory)
        found.append((effect.weights, memory["mean_square"], effect.ratio, effect.gap))
    for weights, mean_square, ratio, gap in found[1:]:
        assert_equal(weights + mean_square, found[0][0] + found[0][1])
        assert (ratio, gap) == found[0][2:]
    assert (found[0][2] > 0.999) == (strength == 50.0)


def two_workers_in_turn(correction, *, general=False, apart=False):
    """Each pushes two updates late, and the next version is written where the weights were that it has had."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    server = Server(nn.Linear(9, 7), optimizer=sgd, correction=correction, patience=1000, memory_per_worker=apart)
    if general:
        server.descent = server.descent._general
    pulled = [server.pull(number, server.join(number)) for number in range(2)]
    for turn in range(20):
        gradients = [torch.randn(weight.shape, generator=generator) for weight in server.weights]
        server.push(push_for(pulled[turn % 2], gradients))
        pulled[turn % 2] = server.pull(turn % 2, pulled[turn % 2].incarnation)
    return server, pulled[0]


def push_for(pulled, gradients):
    which = (pulled.worker, pulled.incarnation, pulled.sequence, pulled.version, pulled.ticket)
    return Push(*which, gradients, [], samples=1, loss=0.0)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("strength", [1.0, 50.0], ids=["whole", "shortened"])
def test_a_server_of_two_workers_is_as_by_the_general_step_and_the_same_again(strength, apart):
    correction = DelayCompensation(strength=strength, cap=0.5)
    found, again, general = (
        two_workers_in_turn(correction, general=general, apart=apart)[0] for general in (False, False, True)
    )
    assert isinstance(found.descent, CompensatedDescent)
    torch.testing.assert_close(found.weights, general.weights, rtol=1e-4, atol=1e-4)
    assert_equal(found.weights, again.weights)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_push_that_is_not_finite_changes_nothing(bad):
    server, pulled = two_workers_in_turn(DelayCompensation())
    before = copy.deepcopy((server.weights, server._memories.state_dict()))
    gradients = [torch.ones_like(weight) for weight in server.weights]
    gradients[0][6, 8] = bad
    with pytest.raises(NotFinite):
        server.push(push_for(pulled, gradients))
    torch.testing.assert_close((server.weights, server._memories.state_dict()), before, rtol=0, atol=0)


def test_finite_gradients_whose_norm_overflows_are_taken():
    server, pulled = two_workers_in_turn(DelayCompensation())
    server.push(push_for(pulled, [torch.full_like(weight, 3e38) for weight in server.weights]))
    assert all(bool(weight.isfinite().all()) for weight in server.weights)


def test_what_cannot_be_kept_is_compiled_all_the_same(monkeypatch):
    asked = []

    def njit(signatures, **options):
        asked.append(options.get("cache", False))
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(kernel.numba, "njit", njit)
    assert kernel._compiled(off_by_a_byte) is off_by_a_byte
    assert asked == [True, False]


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
