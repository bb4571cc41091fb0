"""Corrections of late gradients: against the formulas in NumPy, on quadratic losses, at their limits, with bad input."""

import copy
import inspect
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import lockfree as lf
from lockfree import checkpoint
from lockfree.staleness import (
    CORRECTIONS,
    AdaDelay,
    DelayCompensation,
    DropStale,
    GapAware,
    HessianCompensation,
    Late,
    NoCorrection,
    ScaleByDelay,
    correction_from,
)

F64 = torch.float64

# ---- the formulas, of arrays: one gradient after the other, a list of arrays each ----------------------------------------------


def scaled(history):
    return [[g / (delay if delay > 1 else 1) for g in gradients] for gradients, _, _, delay in history]


def ada_delayed(history, smoothness):
    found, total = [], 0.0
    for t, (gradients, _, _, delay) in enumerate(history, 1):
        g = flat(gradients)
        total = total + t / (t + delay) * g**2
        c = np.sqrt(total / t)
        found.append(like(g / (smoothness + c * np.sqrt(t + delay)), gradients))
    return found


def compensated(history, strength, decay=None, eps=None, cap=None):
    found, mean_square = [], 0.0
    for gradients, then, now, _ in history:
        g = flat(gradients)
        rate = strength
        if decay is not None:
            mean_square = decay * mean_square + (1 - decay) * g**2
            rate = strength / np.sqrt(mean_square + eps)
        term = rate * g * g * (flat(now) - flat(then))
        if cap is not None:
            term = term * min(1, cap * np.linalg.norm(g) / max(np.linalg.norm(term), 1e-300))
        found.append(like(g + term, gradients))
    return found


def divided_by_gap(history, decay):
    """The weights of each call are those of the next version, so each call but the first has seen one more step."""
    found, steps = [], []
    for number, (gradients, then, now, _) in enumerate(history):
        if number:
            steps.append(flat(now) - flat(history[number - 1][2]))
        g = flat(gradients)
        if steps:
            weights = np.array([decay ** (len(steps) - 1 - age) for age in range(len(steps))])
            usual = np.sqrt((weights[:, None] * np.square(steps)).sum(0) / weights.sum())
            g = g / (1 + np.abs(flat(now) - flat(then)) / usual)
        found.append(like(g, gradients))
    return found


def flat(arrays):
    return np.concatenate([array.ravel() for array in arrays])


def like(vector, arrays):
    ends = np.cumsum([array.size for array in arrays])[:-1]
    return [part.reshape(array.shape) for part, array in zip(np.split(vector, ends), arrays, strict=True)]


SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=4)


@st.composite
def histories(draw):
    """A run: the weights of five versions, and for each a gradient that was taken at an earlier one."""
    shapes, seed = draw(SHAPES), draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)

    def arrays(scale):
        return [np.asarray(scale * random.normal(size=shape)) for shape in shapes]

    versions, history = [arrays(1.0)], []
    for _ in range(4):
        versions.append([a + b for a, b in zip(versions[-1], arrays(0.3), strict=True)])
    for version, now in enumerate(versions):
        delay = int(random.integers(0, version + 1))
        history.append((arrays(10 ** random.uniform(-2, 1)), versions[version - delay], now, delay))
    return history


def tensors(arrays, dtype=F64):
    return [torch.tensor(array, dtype=dtype) for array in arrays]


def run(correction, history, dtype=F64):
    memory, found = correction.memory(tensors(history[0][2], dtype)), []
    for version, (gradients, then, now, delay) in enumerate(history):
        late = Late(read=version - delay, applied=version, then=tensors(then, dtype), now=tensors(now, dtype))
        found.append(correction.correct(tensors(gradients, dtype), late, memory))
    return found


def assert_follows(correction, history, wanted):
    for got, want in zip(run(correction, history), wanted, strict=True):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(histories())
def test_scaling_by_delay_is_its_formula(history):
    assert_follows(ScaleByDelay(), history, scaled(history))


@settings(deadline=None, max_examples=30)
@given(histories(), st.floats(0.01, 100))
def test_ada_delay_is_its_formula(history, smoothness):
    assert_follows(AdaDelay(smoothness=smoothness), history, ada_delayed(history, smoothness))


@settings(deadline=None, max_examples=30)
@given(histories(), st.floats(0, 10), st.one_of(st.none(), st.floats(0.01, 3)))
def test_constant_compensation_is_its_formula(history, strength, cap):
    correction = DelayCompensation(adaptive=False, strength=strength, cap=cap)
    assert_follows(correction, history, compensated(history, strength, cap=cap))


@settings(deadline=None, max_examples=30)
@given(histories(), st.floats(0, 10), st.floats(0, 0.999), st.floats(1e-9, 1), st.one_of(st.none(), st.floats(0.01, 3)))
def test_adaptive_compensation_is_its_formula(history, strength, decay, eps, cap):
    correction = DelayCompensation(strength=strength, decay=decay, eps=eps, cap=cap)
    assert_follows(correction, history, compensated(history, strength, decay, eps, cap))


@settings(deadline=None, max_examples=30)
@given(histories(), st.floats(0.1, 0.9999))
def test_gap_awareness_is_its_formula(history, decay):
    assert_follows(GapAware(decay=decay), history, divided_by_gap(history, decay))


@settings(deadline=None, max_examples=30)
@given(histories())
def test_an_adaptive_term_without_memory_is_the_magnitude_of_the_gradient(history):
    found = run(DelayCompensation(strength=3.0, decay=0.0, eps=0.0, cap=None), history)
    for got, (gradients, then, now, _) in zip(found, history, strict=True):
        for tensor, g, a, b in zip(got, gradients, then, now, strict=True):
            np.testing.assert_allclose(tensor.numpy(), g + 3.0 * np.abs(g) * (b - a), rtol=1e-9, atol=1e-12)


def test_the_published_settings_are_the_defaults():
    history = example_history()
    assert_follows(correction_from("dc-constant"), history, compensated(history, 0.04, cap=1.0))
    assert_follows(correction_from("dc-adaptive"), history, compensated(history, 2.0, 0.95, 1e-7, cap=1.0))


def example_history(seed=0):
    random = np.random.default_rng(seed)
    weights = [[random.normal(size=(3, 2)), random.normal(size=4)] for _ in range(4)]
    return [
        ([random.normal(size=(3, 2)), random.normal(size=4)], weights[max(t - 2, 0)], weights[t], min(t, 2)) for t in range(4)
    ]


# ---- oracles and limits -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(histories(), st.integers(0, 2**32 - 1))
def test_the_exact_hessian_recovers_the_gradient_of_a_quadratic(history, seed):
    generator = torch.Generator().manual_seed(seed)
    curvatures = [torch.rand(array.shape, generator=generator, dtype=F64) * 10 for array in history[0][0]]

    def product(weights, direction):
        return [curvature * v for curvature, v in zip(curvatures, direction, strict=True)]

    oracle = HessianCompensation(product=product)
    for _, then, now, delay in history:
        then, now = tensors(then), tensors(now)
        late = Late(read=0, applied=delay, then=then, now=now)
        found = oracle.correct(product(then, then), late, oracle.memory(now))
        for got, want in zip(found, product(now, now), strict=True):
            assert (got - want).abs().max() < 1e-10


def test_the_oracle_takes_a_product_that_autograd_makes():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 5, generator=generator, dtype=F64)
    matrix = matrix @ matrix.T
    then, now = torch.randn(2, 5, generator=generator, dtype=F64)

    def product(weights, direction):
        _, found = torch.autograd.functional.hvp(lambda w: w @ matrix @ w / 2, tuple(weights), tuple(direction))
        return found

    late = Late(read=0, applied=1, then=[then], now=[now])
    (found,) = HessianCompensation(product=product).correct([matrix @ then], late, {})
    assert (found - matrix @ now).abs().max() < 1e-10
    assert not found.requires_grad


def test_without_delays_ada_delay_is_adagrad():
    generator = torch.Generator().manual_seed(0)
    weight, plain = torch.nn.Parameter(torch.ones(6, dtype=F64)), torch.nn.Parameter(torch.ones(6, dtype=F64))
    adagrad = torch.optim.Adagrad([plain], lr=0.3, eps=2.0)
    correction = AdaDelay(smoothness=2.0)
    memory = correction.memory([weight])
    for version in range(5):
        plain.grad = torch.randn(6, generator=generator, dtype=F64)
        (step,) = correction.correct([plain.grad], Late(read=version, applied=version), memory)
        weight.data -= 0.3 * step
        adagrad.step()
    assert torch.allclose(weight, plain, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["none", "scale", "dc-constant", "dc-adaptive", "gap-aware", "drop"])
def test_what_is_not_late_comes_back_bit_for_bit(name, dtype):
    correction = correction_from(name)
    weights = [torch.randn(5, generator=torch.Generator().manual_seed(0)).to(dtype)]
    memory = correction.memory(weights)
    for version in range(3):
        values = [-0.0, 0.0, 1e-6 * version, -3.1, 7.7]
        g = torch.tensor(values, dtype=dtype)
        late = Late(read=version, applied=version, then=[weight.clone() for weight in weights], now=weights)
        (found,) = correction.correct([g], late, memory)
        assert found.dtype == dtype
        assert torch.equal(found.view(torch.uint8), g.view(torch.uint8))
        weights = [weight + 0.25 for weight in weights]


def test_ada_delay_divides_also_what_is_not_late():
    correction = AdaDelay(smoothness=1.0)
    (found,) = correction.correct([torch.tensor([1.0, 4.0])], Late(read=0, applied=0), correction.memory([torch.zeros(2)]))
    assert torch.allclose(found, torch.tensor([0.5, 0.8]))


@pytest.mark.parametrize(("delay", "kept"), [(0, True), (7, True), (8, False), (9, False)])
def test_gradients_are_dropped_from_the_bound_on(delay, kept):
    g = torch.ones(2)
    (found,) = correction_from("drop:8").correct([g], Late(read=3, applied=3 + delay), {})
    assert (found is not None) == kept


@settings(deadline=None, max_examples=30)
@given(histories(), st.floats(0.01, 1), st.booleans())
def test_the_cap_holds_and_up_to_one_a_gradient_is_never_turned_round(history, cap, adaptive):
    capped = run(DelayCompensation(strength=1e6, adaptive=adaptive, cap=cap), history)
    free = run(DelayCompensation(strength=1e6, adaptive=adaptive, cap=None), history)
    for got, wild, (gradients, _, _, _) in zip(capped, free, history, strict=True):
        g, got, wild = flat(gradients), flat([one.numpy() for one in got]), flat([one.numpy() for one in wild])
        term = got - g
        assert np.linalg.norm(term) <= cap * np.linalg.norm(g) * (1 + 1e-9)
        assert g @ got >= -1e-9 * (g @ g)
        # It shortens, and does not turn.
        assert term @ (wild - g) >= (1 - 1e-6) * np.linalg.norm(term) * np.linalg.norm(wild - g)


# ---- numbers that are none ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 1.0])
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_term_that_is_not_finite_is_left_out(adaptive, cap):
    correction = DelayCompensation(adaptive=adaptive, strength=1.0, cap=cap)
    then, now = [torch.zeros(3)], [torch.tensor([0.5, math.inf, math.nan])]
    (found,) = correction.correct([torch.ones(3)], Late(read=0, applied=1, then=then, now=now), correction.memory(then))
    assert torch.equal(found[1:], torch.ones(2))
    assert found[0] >= 1.5


@pytest.mark.parametrize("cap", [None, 1.0])
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_square_that_overflows_adds_nothing(adaptive, cap):
    correction = DelayCompensation(adaptive=adaptive, strength=1.0, cap=cap)
    then, now, g = [torch.zeros(2)], [torch.ones(2)], torch.tensor([1e25, -1e30])
    (found,) = correction.correct([g], Late(read=0, applied=1, then=then, now=now), correction.memory(then))
    assert torch.equal(found, g)


@pytest.mark.parametrize("name", ["dc-adaptive", "dc-constant", "adadelay"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_seen_and_not_remembered(name, bad):
    correction, weights = correction_from(name), [torch.zeros(2), torch.zeros(1)]
    moved = [weight + 0.1 for weight in weights]
    memory = correction.memory(weights)
    late = Late(read=0, applied=1, then=weights, now=moved)
    found = correction.correct([torch.tensor([bad, 1.0]), torch.ones(1)], late, memory)
    assert not found[0][0].isfinite()
    assert found[0][1].isfinite()
    assert found[1].isfinite()
    later = correction.correct([torch.ones(2), torch.ones(1)], late, memory)
    assert all(one.isfinite().all() for one in later)
    assert all(one.isfinite().all() for kept in memory.values() if isinstance(kept, list) for one in kept)


def test_weights_that_do_not_move_have_no_gap():
    correction, weights = GapAware(), [torch.zeros(2)]
    memory = correction.memory(weights)
    moved = [torch.tensor([0.5, 0.0])]
    correction.correct([torch.ones(2)], Late(read=0, applied=0, then=weights, now=weights), memory)
    (found,) = correction.correct([torch.ones(2)], Late(read=0, applied=1, then=weights, now=moved), memory)
    assert torch.allclose(found, torch.tensor([0.5, 1.0]))


def test_a_gap_over_versions_that_went_by_unseen_is_shared_among_them():
    correction, start = GapAware(), [torch.zeros(1)]
    memory = correction.memory(start)
    correction.correct([torch.ones(1)], Late(read=5, applied=5, then=start, now=start), memory)
    now = [torch.tensor([3.0])]
    for _ in range(2):  # a second gradient on the same version measures nothing new
        (found,) = correction.correct([torch.ones(1)], Late(read=5, applied=8, then=start, now=now), memory)
        assert found.item() == pytest.approx(1 / (1 + 3))
        assert memory["measured"] == 3


# ---- what every correction does -----------------------------------------------------------------------------------------------

ALL = {name: make() for name, make in CORRECTIONS.items()}
ALL["oracle"] = HessianCompensation(product=lambda weights, direction: [2 * v for v in direction])
every_correction = pytest.mark.parametrize("correction", ALL.values(), ids=ALL.keys())


def with_gaps(version=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    then = [torch.randn(shape, generator=generator).to(dtype) for shape in [(3, 2), (4,), (), (2,)]]
    now = [weight + 0.125 for weight in then]
    gradients = [torch.randn(weight.shape, generator=generator).to(dtype) for weight in then]
    gradients[1] = None
    return gradients, Late(read=version - 2, applied=version, then=then, now=now)


@every_correction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inputs_stay_and_types_and_gaps_are_kept(correction, dtype):
    gradients, late = with_gaps(dtype=dtype)
    memory = correction.memory([torch.nn.Parameter(weight) for weight in late.then])
    before = copy.deepcopy((gradients, list(late.then), list(late.now)))
    for _ in range(2):
        found = correction.correct(gradients, late, memory)
        for passed, kept in zip((gradients, late.then, late.now), before, strict=True):
            for a, b in zip(passed, kept, strict=True):
                assert a is b is None or torch.equal(a, b)
    assert found[1] is None
    if not isinstance(correction, DropStale):
        for g, got in zip(gradients, found, strict=True):
            assert g is None or (got.dtype, got.shape) == (dtype, g.shape)


@every_correction
def test_low_precision_is_within_its_rounding(correction):
    gradients, late = with_gaps()
    exact = correction.correct(gradients, late, correction.memory(late.then))
    low, low_late = with_gaps(dtype=torch.bfloat16)
    found = correction.correct(low, low_late, correction.memory(low_late.then))
    for a, b in zip(exact, found, strict=True):
        assert a is b is None or torch.allclose(a, b.float(), rtol=0.05, atol=0.02)


@every_correction
def test_nothing_to_correct_is_no_trouble(correction):
    late = Late(read=0, applied=1, then=[torch.zeros(2)], now=[torch.ones(2)])
    assert correction.correct([None], late, correction.memory(late.then)) == [None]
    empty = Late(read=0, applied=1)
    assert correction.correct([], empty, correction.memory([])) == []


@every_correction
def test_a_memory_goes_through_a_checkpoint(correction, tmp_path):
    memory = correction.memory(with_gaps()[1].now)
    correction.correct(*with_gaps(version=3), memory)
    checkpoint.save(tmp_path / "memory", memory)
    loaded = checkpoint.load(tmp_path / "memory")
    for version in (4, 6):
        gradients, late = with_gaps(version=version, seed=version)
        for a, b in zip(correction.correct(gradients, late, memory), correction.correct(gradients, late, loaded), strict=True):
            assert a is b is None or torch.equal(a, b)


@every_correction
def test_weights_are_looked_at_only_where_that_is_said(correction):
    gradients, late = with_gaps()
    blind = Late(read=late.read, applied=late.applied)
    if correction.wants_weights:
        with pytest.raises(ValueError, match=r"^4 gradients, 0 weights in `then`: .*$"):
            correction.correct(gradients, blind, correction.memory(late.then))
    else:
        found = [correction.correct(gradients, one, correction.memory(late.then)) for one in (late, blind)]
        for a, b in zip(*found, strict=True):
            assert a is b is None or torch.equal(a, b)


@every_correction
def test_nobody_waits_for_an_accelerator(correction):
    """Tensors without numbers: whoever asks one for its value gets an error."""
    with FakeTensorMode():
        gradients = [torch.empty(3, 2), None, torch.empty(4)]
        then, now = ([torch.empty(3, 2), torch.empty(1), torch.empty(4)] for _ in range(2))
        memory = correction.memory(then)
        for version in (2, 3):
            found = correction.correct(gradients, Late(read=1, applied=version, then=then, now=now), memory)
            assert len(found) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_correction
def test_an_accelerator_gives_the_numbers_of_the_processor(correction, tmp_path):
    gradients, late = with_gaps()
    moved = [None if g is None else g.cuda() for g in gradients]
    moved_late = Late(read=1, applied=3, then=[w.cuda() for w in late.then], now=[w.cuda() for w in late.now])
    memory, here = correction.memory(late.now), correction.memory(late.now)  # a memory on the processor follows
    correction.correct(moved, moved_late, memory)
    correction.correct(gradients, late, here)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = correction.correct(moved, moved_late, memory)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(correction.correct(gradients, late, here), found, strict=True):
        assert a is b is None or torch.allclose(a, b.cpu(), rtol=1e-5)


# ---- names, documentation, bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRECTIONS)
def test_every_name_makes_a_correction(name):
    correction = correction_from(name)
    assert correction == CORRECTIONS[name]()
    assert hash(correction) == hash(CORRECTIONS[name]())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("drop:8", DropStale(bound=8)),
        ("dc-constant:0.1", DelayCompensation(adaptive=False, strength=0.1)),
        ("dc-adaptive:4", DelayCompensation(strength=4)),
        ("adadelay:10", AdaDelay(smoothness=10)),
        ("gap-aware:0.9", GapAware(decay=0.9)),
        ("none", NoCorrection()),
    ],
)
def test_a_number_sets_the_first_field(text, wanted):
    assert correction_from(text) == wanted


@pytest.mark.parametrize("name", [name for name in lf.staleness.__all__ if not name.isupper() or name in ("ASP", "BSP", "SSP")])
def test_a_public_name_is_documented_with_an_example(name):
    words = inspect.getdoc(getattr(lf.staleness, name))
    assert ">>>" in words
    if name in {type(correction).__name__ for correction in ALL.values()} - {"NoCorrection"}:
        assert re.search(r"Reference:\n.*\b20\d\d\b", words)


BAD = [
    (lambda: DropStale(bound=0), "bound=0, give a whole number"),
    (lambda: AdaDelay(smoothness=0.0), r"smoothness=0\.0, give a number above 0"),
    (lambda: GapAware(decay=1.0), r"decay=1\.0, give a number from 0 to below 1"),
    (lambda: DelayCompensation(strength=-1.0), r"strength=-1\.0, give a number, 0 or more"),
    (lambda: DelayCompensation(strength=math.nan), "strength=nan, give"),
    (lambda: DelayCompensation(decay=-0.1), r"decay=-0\.1, give a number from 0"),
    (lambda: DelayCompensation(eps=-1e-9), "eps=-1e-09, give a number, 0 or more"),
    (lambda: DelayCompensation(cap=0.0), r"cap=0\.0, give a number above 0, or None"),
    (lambda: DelayCompensation(cap=math.inf), "cap=inf, give a number above 0, or None"),
    (lambda: Late(read=5, applied=4), "taken at version 5 cannot change the earlier version 4"),
    (lambda: Late(read=-1, applied=4), "read=-1: a version counts updates"),
    (lambda: correction_from("dc-adaptiv"), "unknown correction 'dc-adaptiv': did you mean 'dc-adaptive'"),
    (lambda: correction_from("drop:soon"), "'drop:soon': 'soon' is no number"),
    (lambda: correction_from("scale:2"), "'scale:2': scale takes no number"),
    (lambda: correct_with(memory={}), "the memory holds 0 of 'mean_square' for 1 gradients"),
    (lambda: correct_with(now=[torch.zeros(2), torch.zeros(2)]), "1 gradients, 2 weights in `now`"),
    (lambda: correct_with(then=[torch.zeros(1)]), r"gradient 0 has the shape \(2,\), its weight in `then` \(1,\)"),
    (lambda: oracle_of([]), "product returned 0 tensors for 1 weights"),
]


def correct_with(**given):
    correction = DelayCompensation()
    weights = [torch.zeros(2)]
    late = Late(read=0, applied=1, then=given.get("then", weights), now=given.get("now", weights))
    return correction.correct([torch.ones(2)], late, given.get("memory", correction.memory(weights)))


def oracle_of(answer):
    late = Late(read=0, applied=1, then=[torch.zeros(2)], now=[torch.zeros(2)])
    return HessianCompensation(product=lambda weights, direction: answer).correct([torch.ones(2)], late, {})


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_input_gets_one_clear_line(make, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_types_are_checked_also_without_the_tests_type_checker():
    program = """
from lockfree.staleness import *
for make in (
    lambda: DropStale(bound=2.5), lambda: DropStale(bound="8"), lambda: DropStale(bound=True), lambda: correction_from("drop:2.5"),
    lambda: DelayCompensation(strength="2"), lambda: HessianCompensation(product=3), lambda: Late(read=0, applied=1.5),
):
    try:
        print("accepted", make())
    except (TypeError, ValueError) as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "DropStale: bound=2.5, give a whole number of updates, 1 or more",
        "DropStale: bound='8', give a whole number of updates, 1 or more",
        "DropStale: bound=True, give a whole number of updates, 1 or more",
        "DropStale: bound=2.5, give a whole number of updates, 1 or more",
        "DelayCompensation: strength='2', give a number, 0 or more, or None",
        "product=3: give a function of (weights, direction) that returns H(weights) direction",
        "applied=1.5: a version counts updates, give a whole number, 0 or more",
    ]
