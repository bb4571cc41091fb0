"""Tasks of recurrent training: what is shown, what is asked, when it becomes harder, and what answers are worth."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from lockfree import data
from lockfree.recurrent.tasks import (
    IGNORED,
    TASKS,
    CharacterModel,
    Copy,
    Counting,
    Curriculum,
    RepeatCopy,
    SequentialImages,
    WordModel,
)
from lockfree.recurrent.tasks.base import asked_accuracy, asked_bits
from lockfree.recurrent.tasks.sequential_images import by_pixel, by_row

SMALL = {
    "copy": {"batch": 3, "window": 1},
    "repeat-copy": {"batch": 3, "window": 1, "most_repeats": 5},
    "char-lm": {"text": "shakespeare-sample", "batch": 3, "length": 7, "evaluated": 100},
    "word-lm": {"text": "shakespeare-sample", "batch": 3, "length": 7, "evaluated": 100, "vocabulary_size": 50},
    "sequential-images": {"data": "digits", "batch": 3, "by": "row"},
    "counting": {"data": "digits", "batch": 3, "period": 3, "evaluated": 5},
}


class Uniform:
    """Gives equal scores to all classes."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def predict(self, inputs, *, done=None, state=None):
        return torch.zeros(*inputs.shape[:2], self.classes), state


class Lookup:
    """Has a table of scores for a symbol and the one before, which is its state."""

    def __init__(self, classes: int) -> None:
        self.scores = torch.randn(classes, classes, classes, generator=torch.Generator().manual_seed(0))
        self.calls = 0

    def predict(self, inputs, *, done=None, state=None):
        self.calls += 1
        before = torch.cat([torch.zeros_like(inputs[:1]) if state is None else state, inputs[:-1]])
        return self.scores[before, inputs], inputs[-1:]


class Knows:
    """Gives the answers of a stretch."""

    def __init__(self, targets: torch.Tensor, classes: int) -> None:
        self.outputs = 50.0 * F.one_hot(targets.clamp(min=0), classes)

    def predict(self, inputs, *, done=None, state=None):
        assert inputs.shape[:2] == self.outputs.shape[:2]
        return self.outputs, state


def same(first, second) -> bool:
    return all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", TASKS)
class TestEvery:
    def test_a_stretch_has_the_promised_shapes(self, name):
        task = TASKS[name](**SMALL[name])
        inputs, targets, done = task.stretch(0)
        assert inputs.shape[:2] == targets.shape == done.shape
        assert inputs.shape[1] == 3
        assert (targets.dtype, done.dtype) == (torch.int64, torch.bool)
        asked = targets[targets != IGNORED]
        assert len(asked)
        assert int(asked.min()) >= 0
        assert int(asked.max()) < task.classes
        if task.symbols is None:
            assert inputs.is_floating_point()
            assert inputs[0, 0].numel() == task.features
        else:
            assert inputs.dtype == torch.int64
            assert int(inputs.min()) >= 0
            assert int(inputs.max()) < task.symbols == task.features

    def test_a_stretch_depends_on_seed_and_number_alone(self, name):
        first, second = TASKS[name](**SMALL[name]), TASKS[name](**SMALL[name])
        state = torch.get_rng_state()
        ahead = [first.stretch(number) for number in range(4)]
        torch.rand(3)
        assert all(same(second.stretch(number), ahead[number]) for number in (3, 1, 0, 2))
        assert not same(ahead[0], ahead[1]) or name == "copy"
        torch.set_rng_state(state)
        first.evaluate(Uniform(first.classes))
        assert torch.equal(torch.get_rng_state(), state)
        with pytest.raises(ValueError, match="-1"):
            first.stretch(-1)

    def test_equal_scores_cost_the_logarithm_of_the_classes(self, name):
        task = TASKS[name](**SMALL[name])
        _, targets, _ = task.stretch(0)
        loss = task.loss(torch.zeros(targets.numel(), task.classes), targets.flatten())
        asked = int((targets != IGNORED).sum())
        assert loss.item() == pytest.approx(math.log(task.classes) * asked / targets.numel(), rel=1e-5)
        assert task.bits(loss.item(), targets) == pytest.approx(math.log2(task.classes), rel=1e-5)
        figures = task.evaluate(Uniform(task.classes))
        assert task.measure.replace(" ", "_") in figures
        bits = next(value for key, value in figures.items() if "bits" in key)
        assert bits == pytest.approx(math.log2(task.classes), rel=1e-6)

    def test_the_state_goes_round(self, name):
        task, other = TASKS[name](**SMALL[name]), TASKS[name](**SMALL[name])
        for _ in range(3):
            task.learnt(0.0)
        other.load_state_dict(task.state_dict())
        assert other.state_dict() == task.state_dict()
        assert same(other.stretch(5), task.stretch(5))
        with pytest.raises(ValueError, match="resume the same task"):
            other.load_state_dict({"elsewhere": 1})
        again = pickle.loads(pickle.dumps(task))
        assert again == task
        assert same(again.stretch(5), task.stretch(5))

    def test_a_batch_of_none_is_refused(self, name):
        with pytest.raises(ValueError, match="batch must be 1 or more, got 0"):
            TASKS[name](**{**SMALL[name], "batch": 0})


class TestLoss:
    def test_is_a_mean_over_all_positions(self):
        task = Copy()
        outputs = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        targets = torch.tensor([IGNORED, 0, IGNORED, 1, 1, IGNORED])
        chances = outputs.softmax(1)
        by_hand = -(chances[1, 0].log() + chances[3, 1].log() + chances[4, 1].log()) / 6
        assert task.loss(outputs, targets).item() == pytest.approx(by_hand.item(), rel=1e-12)
        assert task.bits(by_hand.item(), targets) == pytest.approx(asked_bits(outputs, targets), rel=1e-12)
        # Pieces of equal length add up to the whole.
        halves = task.loss(outputs[:3], targets[:3]) + task.loss(outputs[3:], targets[3:])
        assert (halves / 2).item() == pytest.approx(by_hand.item(), rel=1e-12)

    def test_where_nothing_is_asked(self):
        nothing = torch.full((4,), IGNORED)
        scores = torch.ones(4, 2, requires_grad=True)
        loss = Copy().loss(scores, nothing)
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(scores.grad, torch.zeros(4, 2))
        assert math.isnan(Copy().bits(0.0, nothing))
        assert math.isnan(asked_bits(scores, nothing))
        assert math.isnan(asked_accuracy(scores, nothing))


class TestCurriculum:
    def test_moves_exactly_when_the_mean_of_a_whole_window_is_below(self):
        curriculum = Curriculum(threshold=0.5, window=3)
        told = [0.0, 0.0, 1.5, 0.1, 0.0, 0.0, 0.0, 0.0, 1.0, 0.25, 0.25, 0.0]
        # Means of whole windows: 0.5 (not below), .53, .53, .03 (on, and emptied); 0, 0, 1 (.33: on); .25, .25, 0 (on at the third).
        assert [curriculum.told(bits) for bits in told] == [False] * 5 + [True] + [False] * 2 + [True] + [False] * 2 + [True]
        assert curriculum.level == 3
        assert math.isnan(curriculum.error)
        curriculum.told(0.25)
        curriculum.told(0.75)
        assert curriculum.error == 0.5

    def test_the_state_includes_the_errors_of_the_level(self):
        first, second = Curriculum(window=3), Curriculum(window=3)
        for bits in (0.0, 0.0, 0.0, 0.0, 0.4):
            first.told(bits)
        assert first.state_dict() == {"level": 1, "errors": [0.0, 0.4]}
        second.load_state_dict(first.state_dict())
        for bits in (0.04, 0.01, 0.09, 0.3, 0.0):
            assert first.told(bits) == second.told(bits)
            assert first.state_dict() == second.state_dict()

    @pytest.mark.parametrize("bits", [math.nan, -0.1])
    def test_what_is_no_error(self, bits):
        with pytest.raises(ValueError, match="expected an error from 0 bits"):
            Curriculum().told(bits)
        with pytest.raises(ValueError, match="expected an error from 0 bits"):
            Copy().learnt(bits)

    def test_settings(self):
        with pytest.raises(ValueError, match="window must be 1 or more, got 0"):
            Copy(window=0)
        with pytest.raises(ValueError, match="threshold must be above 0 bits, got 0"):
            Copy(threshold=0.0)


class TestCopy:
    def test_what_is_asked_is_what_was_shown(self):
        task = Copy(batch=50, window=1, alphabet=5)
        for length in range(1, 8):
            inputs, targets, done = task.stretch(3)
            assert inputs.shape == (2 * length + 1, 50)
            assert torch.equal(targets[length + 1 :], inputs[:length])
            assert bool((targets[: length + 1] == IGNORED).all())
            assert bool((inputs[length] == 5).all())
            assert bool((inputs[length + 1 :] == 6).all())
            assert inputs[:length].unique().tolist() == list(range(5))[-len(inputs[:length].unique()) :]
            assert done.all(1).tolist() == done.any(1).tolist() == [False] * (2 * length) + [True]
            assert task.solved == {"length_solved": length - 1}
            task.learnt(0.149)
        assert (task.symbols, task.classes) == (7, 5)

    def test_symbols_are_equally_frequent(self):
        task = Copy(batch=10_000)
        # Four standard deviations of a share of 10,000 fair coins.
        assert task.stretch(0).inputs[0].double().mean().item() == pytest.approx(0.5, abs=4 * 0.005)

    def test_levels_numbers_and_seeds_draw_alike_nowhere(self):
        def first(seed: int, number: int, level: int) -> list[int]:
            task = Copy(batch=64, seed=seed, window=1)
            for _ in range(level):
                task.learnt(0.0)
            return task.stretch(number).inputs[0].tolist()

        drawn = {tuple(first(*place)) for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1))}
        assert len(drawn) == 5

    def test_judging(self):
        task = Copy(batch=8, window=1)
        for _ in range(4):
            task.learnt(0.0)
        held_out = task._at(-1)
        assert not torch.equal(held_out.inputs, task.stretch(0).inputs)
        assert task.evaluate(Knows(held_out.targets, 2)) == {
            "length_solved": 4.0,
            "bits": pytest.approx(0, abs=1e-12),
            "accuracy": 1.0,
        }
        assert task.evaluate(Knows(1 - held_out.targets.clamp(min=0), 2))["accuracy"] == 0

    def test_an_alphabet_of_one_is_refused(self):
        with pytest.raises(ValueError, match="alphabet must be 2 or more, got 1"):
            Copy(alphabet=1)


class TestRepeatCopy:
    def test_length_and_repeats_grow_by_turns(self):
        task = RepeatCopy(batch=4, window=1, alphabet=3, most_repeats=4)
        levels = [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (5, 4), (6, 4), (7, 4)]
        solved = {"length_solved": 0.0, "sequence_solved": 0.0}
        for length, repeats in levels:
            assert task.solved == solved
            inputs, targets, _ = task.stretch(9)
            assert len(inputs) == length + 1 + length * repeats + 1
            shown, cue = inputs[:length], inputs[length]
            assert int(shown.max()) < 3
            assert cue.tolist() == [3 + repeats - 1] * 4
            assert bool((inputs[length + 1 :] == 7).all())
            assert bool((targets[: length + 1] == IGNORED).all())
            assert torch.equal(targets[length + 1 : -1], torch.cat([shown] * repeats))
            assert targets[-1].tolist() == [3] * 4
            solved = {"length_solved": length * repeats, "sequence_solved": length + length * repeats + 3}
            task.learnt(0.0)
        assert (task.symbols, task.classes) == (8, 4)

    def test_lengths_of_the_published_table_are_lengths_of_levels(self):
        task, lengths = RepeatCopy(batch=1, window=1), set()
        for _ in range(20):
            task.learnt(0.0)
            lengths.add(task.solved["sequence_solved"])
        assert {5, 7, 19, 23, 33, 39, 59, 67} <= lengths

    def test_settings(self):
        with pytest.raises(ValueError, match="most_repeats must be 1 or more, got 0"):
            RepeatCopy(most_repeats=0)


class TestLanguageModels:
    def test_stretches_are_those_of_the_training_part(self):
        task = CharacterModel(**SMALL["char-lm"])
        rows = torch.cat([task.stretch(number).inputs for number in range(9)]).T
        text = data.load_text("shakespeare-sample")
        row = (len(text.train) - 1) // 3
        for place in range(3):
            assert torch.equal(rows[place], text.train[place * row : place * row + 63])
        assert not task.stretch(0).done.any()
        assert task.stretch((row - 1) // 7).done.any()

    @pytest.mark.parametrize("rows, evaluated", [(1, 40), (4, 40), (7, 40), (64, 40), (3, 2), (1, 1)])
    def test_every_symbol_but_the_first_is_asked_for_once(self, rows, evaluated, monkeypatch):
        task = CharacterModel(**SMALL["char-lm"] | {"rows": rows, "evaluated": evaluated})
        learner = Lookup(task.classes)
        symbols = task.corpus.valid[: evaluated + 1]
        rows = min(rows, evaluated)
        steps = -(-evaluated // rows)
        nats = 0.0
        for place in range(evaluated):
            before = 0 if place % steps == 0 else symbols[place - 1]
            scores = learner.scores[before, symbols[place]].double()
            nats -= scores.log_softmax(0)[symbols[place + 1]].item()
        expected = nats / evaluated / math.log(2)
        assert task.bits_of(learner, task.corpus.valid) == pytest.approx(expected, rel=1e-6)
        # In small pieces, with the state carried, it is the same.
        calls, learner.calls = learner.calls, 0
        monkeypatch.setattr("lockfree.recurrent.tasks.language._SCORES", 2 * rows * task.classes)
        assert task.bits_of(learner, task.corpus.valid) == pytest.approx(expected, rel=1e-6)
        assert (calls, learner.calls) == (1, -(-steps // 2))

    def test_parts_and_names(self):
        task = WordModel(**SMALL["word-lm"])
        learner = Lookup(50)
        figures = task.evaluate(learner)
        assert set(figures) == {"bits_per_word", "perplexity", "test_bits_per_word", "test_perplexity"}
        assert figures["bits_per_word"] == task.bits_of(learner, task.corpus.valid)
        assert figures["test_perplexity"] == 2 ** task.bits_of(learner, task.corpus.test)
        whole = WordModel(**SMALL["word-lm"] | {"evaluated": None})
        assert whole.evaluate(Uniform(50))["test_perplexity"] == pytest.approx(50, rel=1e-5)

    def test_a_text_too_short_for_the_batch(self):
        with pytest.raises(ValueError, match=r"359,920 symbols are too few for 90,000 rows of 7 steps"):
            CharacterModel(**SMALL["char-lm"] | {"batch": 90_000}).stretch(0)

    def test_settings(self):
        for name in ("length", "rows", "evaluated"):
            with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
                CharacterModel(**{name: 0})


class TestSequentialImages:
    def test_readings_can_be_undone(self):
        images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
        assert torch.equal(by_pixel(images).permute(1, 2, 0).reshape(2, 3, 4, 5), images)
        assert torch.equal(by_row(images).view(4, 2, 3, 5).permute(1, 2, 0, 3), images)
        assert torch.equal(by_pixel(images)[7], images[:, :, 1, 2])
        assert torch.equal(by_row(images)[1][:, 5:10], images[:, 1, 1])

    @pytest.mark.parametrize("by, steps, features", [("pixel", 64, 1), ("row", 8, 8)])
    def test_an_epoch_deals_every_image_once(self, by, steps, features):
        task = SequentialImages(data="digits", by=by, batch=479)  # 3 x 479 = 1,437 images
        digits = data.load("digits").train
        assert (task.features, task.classes) == (features, 10)
        seen = torch.cat([task.stretch(number).inputs for number in (3, 4, 5)], dim=1)
        assert seen.shape == (steps, 1437, features)
        labels = torch.cat([task.stretch(number).targets for number in (3, 4, 5)], dim=1)
        assert bool((labels[:-1] == IGNORED).all())
        dealt = {
            (tuple(image), label)
            for image, label in zip(seen.transpose(0, 1).flatten(1).tolist(), labels[-1].tolist(), strict=True)
        }
        assert dealt == {
            (tuple(image), label)
            for image, label in zip(digits.inputs.flatten(1).tolist(), digits.targets.tolist(), strict=True)
        }
        assert not torch.equal(task.stretch(0).targets, task.stretch(3).targets)

    def test_judging(self):
        task = SequentialImages(data="digits", by="row", batch=2, evaluated=200)
        classes = data.load("digits").test.targets
        known = Knows(classes[:200].expand(8, -1), 10)
        assert task.evaluate(known) == {"accuracy": 1.0, "bits": pytest.approx(0, abs=1e-12)}
        assert SequentialImages(data="digits", batch=2).evaluate(Uniform(10))["accuracy"] == (classes == 0).double().mean()

    def test_settings(self, unchecked):
        with pytest.raises(ValueError, match="unknown reading 'rows': did you mean 'row'"):
            SequentialImages(by="rows")
        with pytest.raises(ValueError, match=r"batch 2,000 is larger than digits of 1,437 images"):
            SequentialImages(data="digits", batch=2000).stretch(0)


class TestCounting:
    def test_counts_are_those_of_the_images(self):
        task = Counting(data="digits", period=3, batch=40)
        digits = data.load("digits").train
        place = {
            tuple(image): label for image, label in zip(digits.inputs.flatten(1).tolist(), digits.targets.tolist(), strict=True)
        }
        counted = task.counted(2)
        labels = [[place[tuple(image.flatten().tolist())] for image in step] for step in counted.images]
        for step in range(9):
            for row in range(40):
                seen = [labels[earlier][row] for earlier in range(step + 1)]
                odd = sum(label % 2 for label in seen[-3:]) if step % 3 == 2 else IGNORED
                threes = seen.count(3) if step == 8 else IGNORED
                assert (counted.odd[step, row], counted.threes[step, row]) == (odd, threes)
        assert counted.done.any(1).tolist() == [False] * 8 + [True]
        assert same(task.stretch(2), (counted.images, counted.odd, counted.done))
        assert (task.classes, task.classes_b) == (4, 10)

    def test_judging_both(self):
        task = Counting(data="digits", period=3, batch=2, evaluated=30)
        asked = task.held_out()
        known = Knows(asked.odd, 4).outputs
        figures = task.figures(known, torch.zeros(9, 30, 10), asked)
        assert figures["accuracy_odd"] == 1
        assert figures["bits_threes"] == pytest.approx(math.log2(10))
        assert figures["accuracy_threes"] == (asked.threes[-1] == 0).double().mean()
        assert task.evaluate(Knows(asked.odd, 4))["accuracy"] == 1

    def test_settings(self):
        with pytest.raises(ValueError, match="period must be 1 or more, got 0"):
            Counting(period=0)
