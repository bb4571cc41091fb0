"""The lesson in examples/ teaches what is true: its gradients are gradients, its signs are right, and it learns to add."""

import copy
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def lesson(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module("binary_addition")
    sys.modules.pop("binary_addition")


@pytest.fixture
def lesson_in_lockfree(lesson):
    yield importlib.import_module("binary_addition_lockfree")
    sys.modules.pop("binary_addition_lockfree")


def small_batch(lesson, seed=0):
    """Seven samples for the networks that `lesson.build` makes."""
    x, target, *_ = lesson.make_task(np.random.default_rng(seed))
    return x[:7], target[:7]


def moved(lesson, hint_bits, seed=0):
    """A decoupled network whose synthesisers do not stand at zero any more."""
    layers, rng = lesson.build(seed, hint_bits), np.random.default_rng(seed)
    for layer in layers[:-1]:
        layer.synthesiser = rng.normal(0, 0.1, layer.synthesiser.shape)
    return layers


# ---- the task ----------------------------------------------------------------------------------------------------------------


def test_targets_are_sums_and_no_held_out_pair_is_trained_on(lesson):
    x, target, held_out_x, held_out_target = lesson.make_task(np.random.default_rng(0))
    assert x.shape == held_out_x.shape == (1000, 16)
    inputs, sums = np.vstack([x, held_out_x]), np.vstack([target, held_out_target])
    numbers = [bits @ 2 ** np.arange(8) for bits in (inputs[:, :8], inputs[:, 8:], sums)]
    assert np.array_equal(numbers[0] + numbers[1], numbers[2])
    assert len(np.unique(inputs, axis=0)) == 2000


# ---- gradients and signs -----------------------------------------------------------------------------------------------------


def test_backpropagation_s_gradients_are_those_of_numerical_differentiation(lesson):
    rng = np.random.default_rng(0)
    layers = [lesson.Layer(5, 4, rng), lesson.Layer(4, 3, rng), lesson.Layer(3, 2, rng)]
    x, target = rng.random((6, 5)), rng.integers(0, 2, (6, 2))

    def loss():
        return 0.5 * ((lesson.run_forward(layers, x) - target) ** 2).sum()

    gradient = lesson.loss_gradient(lesson.run_forward(layers, x), target)
    for layer in reversed(layers):
        gradient = layer.backward(gradient)
    pairs = [(x, gradient)]
    pairs += [(layer.weights, layer.weight_gradient) for layer in layers]
    pairs += [(layer.biases, layer.bias_gradient) for layer in layers]
    for values, claimed in pairs:
        numerical = np.empty_like(values)
        for place in np.ndindex(values.shape):
            kept = values[place]
            values[place] = kept + 1e-5
            above = loss()
            values[place] = kept - 1e-5
            numerical[place] = (above - loss()) / 2e-5
            values[place] = kept
        np.testing.assert_allclose(claimed, numerical, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("hint_bits", [0, 8])
def test_with_true_gradients_for_guesses_it_is_backpropagation(lesson, monkeypatch, hint_bits):
    layers = lesson.build(0, hint_bits)
    reference = copy.deepcopy(layers)
    x, target = small_batch(lesson)
    reported = []
    for _ in range(3):
        truths = []
        gradient = lesson.loss_gradient(lesson.run_forward(reference, x), target)
        for layer in reversed(reference):
            truths.insert(0, gradient)
            gradient = layer.backward(gradient)
        lesson.backprop_step(reference, x, target)
        reported.clear()
        for layer, truth in zip(layers[:-1], truths, strict=False):
            monkeypatch.setattr(layer, "guess", lambda _, truth=truth: truth)
            monkeypatch.setattr(layer, "learn_to_guess", lambda message, _: reported.append(message))
        lesson.decoupled_step(layers, x, target)
        for mine, theirs in zip(layers, reference, strict=True):
            assert np.array_equal(mine.weights, theirs.weights)
            assert np.array_equal(mine.biases, theirs.biases)
        # What each layer reports to the one below is the gradient at the weights of the forward pass.
        for message, truth in zip(reported, truths[:-1], strict=True):
            assert np.array_equal(message, truth)


@pytest.mark.parametrize("hint_bits", [0, 8])
def test_a_step_of_the_synthesiser_lowers_its_error_and_the_wrong_sign_raises_it(lesson, hint_bits):
    x, target = small_batch(lesson)
    errors = {}
    for rate in (lesson.SYNTHESISER_RATE, 0, -lesson.SYNTHESISER_RATE):
        layer, _, _ = moved(lesson, hint_bits)
        reported = np.random.default_rng(1).normal(size=(7, 128))
        layer.forward(x)
        layer.synthetic = layer.guess(target)
        layer.learn_to_guess(reported, rate)
        errors[rate] = ((layer.guess(target) - reported) ** 2).sum()
    right, none, wrong = errors.values()
    assert right < none < wrong


def test_only_a_synthesiser_with_a_hint_sees_the_true_bits(lesson):
    x, target = small_batch(lesson)
    for hint_bits in (0, 8):
        layer, _, _ = moved(lesson, hint_bits)
        layer.forward(x)
        assert np.array_equal(layer.guess(target), layer.guess(1 - target)) == (hint_bits == 0)


def test_guesses_of_zero_leave_the_layer_as_it_is(lesson):
    layers = lesson.build(0, 8)
    before = copy.deepcopy(layers)
    for _ in range(3):
        lesson.decoupled_step(layers, *small_batch(lesson), rate=0)
    changed = [not np.array_equal(layer.weights, old.weights) for layer, old in zip(layers, before, strict=True)]
    assert changed == [False, False, True]


def test_a_rate_ten_times_as_high_is_beyond_the_stable_ones(lesson):
    layers = lesson.build(0, 8)
    x, target, *_ = lesson.make_task(np.random.default_rng(0))
    lesson.train(layers, lesson.decoupled_step, x, target, 1, np.random.default_rng(0))
    bound = 2 / np.linalg.norm(layers[0].seen, 2) ** 2
    assert lesson.SYNTHESISER_RATE < bound < 10 * lesson.SYNTHESISER_RATE


# ---- it learns ---------------------------------------------------------------------------------------------------------------


def test_the_lesson_returns_the_numbers_of_its_table(lesson, capsys):
    results = lesson.main(seed=0, epochs=1)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(results) == 4
    for line, (name, found) in zip(lines, results.items(), strict=True):
        assert line.startswith(name)
        assert line.split()[-3:] == [f"{found['bits']:.3f}", f"{found['sums']:.3f}", f"{found['seconds']:.1f}"]


def test_half_the_lesson_is_enough_to_add(lesson):
    x, target, *held_out = lesson.make_task(np.random.default_rng([0, 0]))
    for layers, step, least in (
        (lesson.build(0), lesson.backprop_step, 0.95),
        (lesson.build(0, 8), lesson.decoupled_step, 0.92),
    ):
        lesson.train(layers, step, x, target, 100, np.random.default_rng(2))
        assert lesson.measure(layers, *held_out)["bits"] > least


@pytest.mark.slow
def test_the_whole_lesson(lesson):
    bits = {name: found["bits"] for name, found in lesson.main(seed=1).items()}
    assert bits["backpropagation"] > 0.95
    assert bits["synthetic, from output and true bits"] > 0.92
    assert bits["synthetic, from output"] == pytest.approx(bits["last layer only"], abs=0.1)  # hidden layers hardly help
    assert bits["synthetic, from output"] < 0.7


def test_the_lesson_in_lockfree_runs(lesson_in_lockfree, capsys):
    assert len(lesson_in_lockfree.main(seed=0, epochs=1)) == 2
    assert capsys.readouterr().out.splitlines()[1].endswith("locks kept: forward")


@pytest.mark.slow
def test_the_whole_lesson_in_lockfree():
    # In a process of its own, since checking shapes, as the tests do, makes so many small steps three times as slow.
    command = [sys.executable, "-W", "error", str(EXAMPLES / "binary_addition_lockfree.py"), "--seed", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    backprop, synthetic = (float(bits) for bits in re.findall(r"bits right (\S+)", out))
    assert backprop > 0.95
    assert synthetic > 0.92
