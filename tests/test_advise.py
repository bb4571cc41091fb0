"""Advice: what is measured is so, what follows from it follows, and what cannot be measured is said in one line."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from cases import MODELS, assert_same, copy_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree import cli
from lockfree.advise import Advice, Memory, Option, pareto_front, parse_memory, survey
from lockfree.advise.memory import AllocationMeter, measure
from lockfree.advise.own_model import make_model
from lockfree.advise.survey import Cuts, Survey
from lockfree.advise.task import Candidate, Samples, Scores, Task, evaluate, falls_at, label, share_right
from lockfree.advise.training import Group, groups, plan
from lockfree.rules import RULES, Backprop, Checkpointing

CLASSES = 4


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def network(width=32, dropout=0.1):
    """Four blocks that need more memory for activations than for weights."""
    torch.manual_seed(3)
    hidden = [
        nn.Sequential(nn.Linear(n, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout)) for n in (6, width, width)
    ]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES))


def data(samples=400, seed=0):
    """Classes that a linear map tells apart, so that a few steps teach something."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 6, generator=generator)
    return x, (x @ torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(9))).argmax(1)


def ask(model=None, x=None, y=None, loss=F.cross_entropy, **settings):
    """A short advice of few rules, unless told otherwise."""
    x, y = data() if x is None else (x, y)
    settings = {"rules": ["dfa"], "batch_size": 64, "steps": 4, "optimizer": sgd} | settings
    return lf.advise(network() if model is None else model, x, y, loss, **settings)


@pytest.fixture(autouse=True, scope="module")
def _hurry():
    """Times are medians of a few steps here, and small learners may stay a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "forget_learners", lambda self: None)
        patch.setattr(survey, "_SECONDS_EACH", 0.0)
        yield


def by_name(advice):
    return {option.name: option for option in advice.options}


def task_of(model=None, size=64, optimizer=sgd, seed=0, samples=None):
    samples = samples or Samples(*data())
    return Task.of(model or network(), samples, None, loss=F.cross_entropy, optimizer=optimizer, size=size, seed=seed)


@pytest.fixture(scope="module")
def usual():
    """An advice without a limit, with a rule of every need."""
    return ask(rules=["dfa", "dni", "pred", "fa"], steps=20)


# ---- what is measured --------------------------------------------------------------------------------------------------------


def test_model_flags_gradients_and_random_generators_are_left_as_they_were():
    model = network()
    model[1].eval()
    model[0][0].weight.grad = torch.ones_like(model[0][0].weight)
    x, y = data()
    before, random, modes = copy_of(model), torch.get_rng_state(), [module.training for module in model.modules()]
    inputs, targets = x.clone(), y.clone()
    ask(model, x, y, rules=["cdni", "hsic"])
    assert_same(copy_of(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[0][0].weight.grad, torch.ones_like(model[0][0].weight))
    assert model[0][2].weight.grad is None if hasattr(model[0][2], "weight") else True
    assert torch.equal(x, inputs)
    assert torch.equal(y, targets)


def test_an_error_leaves_the_random_generators_as_they_were():
    model = network()
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match="no module is named"):
        ask(model, *data(), blocks=["1", "nonsense"])
    assert torch.equal(torch.get_rng_state(), random)


def test_backprop_is_a_plain_loop_whose_rate_falls_at_the_end():
    task, steps = task_of(), 10
    found = task.train(Candidate(Backprop(), None), [steps])[steps]
    model = network().train()
    optimizer = sgd(model.parameters())
    torch.manual_seed(lf.rng.seed_of(0, 0))
    for step in range(steps):
        x, y = task.batch(step)
        optimizer.param_groups[0]["lr"] = 0.1 if step < 8 else 0.1 * (steps - step) / 3
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(model(x), y).item() for x, y in task.parts]
        right = [(model(x).argmax(1) == y).double().mean().item() for x, y in task.parts]
    assert found.losses.tolist() == losses
    assert found.accuracies.tolist() == right
    sizes = [len(y) for _, y in task.parts]  # one or two: 80 samples in 50 parts
    assert found.accuracy == found.mean == pytest.approx(sum(n * share for n, share in zip(sizes, right, strict=True)) / 80)
    assert found.loss == pytest.approx(sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / 80)


def test_an_earlier_mark_changes_nothing_about_a_later_one():
    candidate = Candidate(RULES["cdni"](), None)
    both, late, early = (task_of().train(candidate, marks) for marks in ({7, 12}, {12}, {7}))
    assert torch.equal(both[12].losses, late[12].losses)
    assert torch.equal(both[7].losses, early[7].losses)
    assert falls_at(12) == 10


@pytest.mark.parametrize(
    "candidate", [Candidate(Checkpointing(), None), Candidate(Backprop(), 2, recompute=True)], ids=lambda c: c.name
)
def test_what_is_called_exact_gets_the_numbers_of_backprop(candidate):
    one, other = (task_of().train(each, [6])[6] for each in (Candidate(Backprop(), None), candidate))
    assert torch.equal(one.losses, other.losses)
    assert torch.equal(one.accuracies, other.accuracies)


def test_scores_of_backprop_and_checkpointing_are_identical(usual):
    exact = [option for option in usual.options if option.exact]
    assert {option.label for option in exact} == {"backprop", "checkpoint"}
    assert len({(option.accuracy, option.loss, option.error) for option in exact}) == 1
    assert exact[0].error == 0.0


def test_equal_seeds_give_equal_scores_and_other_seeds_do_not():
    one, same, other = (by_name(ask(seed=seed, blocks=None))["dfa"] for seed in (1, 1, 2))
    assert (one.loss, one.memory, one.at_equal_time is None) == (same.loss, same.memory, same.at_equal_time is None)
    assert one.loss != other.loss


def test_every_option_is_timed_and_backprop_is_the_unit_of_time(usual):
    assert usual.baseline.time == 1.0
    for option in usual.options:
        assert option.milliseconds == pytest.approx(option.time * usual.baseline.milliseconds)
        assert option.fits
    assert by_name(usual)["dfa"].locks == ("forward", "update")
    assert by_name(usual)["pred"].cut == ("0.0", "1.0", "2.0", "3") or by_name(usual)["pred"].cut == ("0", "1", "2", "3")


def test_the_parts_of_memory():
    task = task_of(network(dropout=0.0), optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    weights = sum(p.numel() for p in task.model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in task.model.buffers())
    _, plain = measure(task, Candidate(Backprop(), None))
    assert plain.parameters == 4 * weights + buffers
    assert plain.gradients == 4 * weights
    assert plain.optimizer == 2 * 4 * weights + 4 * len(list(task.model.parameters()))  # two moments, and a counter each
    assert (plain.auxiliary, plain.batch) == (0, 64 * (6 * 4 + 8))
    assert plain.fixed == plain.parameters + plain.gradients + plain.optimizer
    held = plain.parameters + plain.optimizer + plain.batch
    assert plain.total >= held + plain.saved
    _, dfa = measure(task, Candidate(RULES["dfa"](), None))
    assert dfa.auxiliary == 4 * 3 * CLASSES * 32  # a matrix for each block below the top, none of which learns


def test_memory_grows_with_the_batch_alone():
    small, large = (measure(task_of(size=size), Candidate(Backprop(), None))[1] for size in (64, 128))
    assert small.fixed == large.fixed
    assert large.batch == 2 * small.batch
    assert large.saved == pytest.approx(2 * small.saved, rel=0.02)  # but for the statistics of BatchNorm


def test_allocations_are_counted_for_as_long_as_they_live():
    held = torch.zeros(100)
    meter = AllocationMeter()
    meter.ignore([held])
    with meter:
        held.add_(1)
        view = held[:50]
        assert (meter.now, meter.peak) == (0, 0)
        made = held + 1
        assert (meter.now, meter.peak) == (400, 400)
        other = made * 2
        del made
        assert (meter.now, meter.peak) == (400, 800)
    del other
    assert (meter.now, len(view)) == (0, 50)


def test_what_checkpointing_makes_again_is_counted():
    """Autograd's hooks do not see it, so that what is kept in between would pass for all of it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8))) for _ in range(4)))
    x = torch.randn(600, 64)
    task = Task.of(model, Samples(x, x), None, loss=F.mse_loss, optimizer=sgd, size=256, seed=0)
    plain, again = (measure(task, Candidate(rule(), None))[1] for rule in (Backprop, Checkpointing))
    one = 256 * 64 * 4  # bytes of a layer's activations
    assert plain.saved >= 32 * one
    assert again.saved <= 14 * one  # the borders, and the top block, which is not made again
    assert again.total - again.parameters - again.optimizer >= 8 * one + 3 * one
    assert again.total < plain.total


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_memory_is_what_its_allocator_saw():
    x, y = data(2000)
    advice = ask(network(width=512).cuda(), x, y, batch_size=1024, rules=["pred"])  # samples on the CPU go there batch by batch
    for option in advice.options:
        assert option.memory.total >= option.memory.parameters + option.memory.optimizer + option.memory.saved
    assert advice.baseline.accuracy > advice.start


@pytest.mark.parametrize(
    ("scores", "targets", "share"),
    [
        (torch.eye(3), torch.tensor([0, 1, 0]), 2 / 3),
        (torch.eye(3), torch.tensor([0, -100, 0]), 0.5),
        (torch.eye(3).expand(2, 3, 3), torch.tensor([[0, 1, 1], [0, 1, 2]]), 5 / 6),
        (torch.eye(2).expand(5, 2, 2).movedim(0, -1), torch.zeros(2, 5, dtype=torch.int64), 0.5),
        (torch.eye(3), torch.tensor([-100, -100, -100]), 0.0),
        (torch.eye(3), torch.tensor([0, 1, 3]), None),
        (torch.eye(3), torch.zeros(3), None),
        (torch.eye(3), torch.zeros(3, 3), None),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), None),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), None),
        ((torch.eye(3),), torch.tensor([0, 1, 2]), None),
    ],
)
def test_the_share_of_right_answers(scores, targets, share):
    assert share_right(scores, targets) == (None if share is None else pytest.approx(share))


def test_the_standard_error_of_a_difference_is_that_of_pairs():
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(50, generator=generator, dtype=torch.float64)
    weights = torch.full((50,), 0.02, dtype=torch.float64)
    first, second = Scores(one, one, weights), Scores(one + 0.1, one, weights)
    assert first.error() == pytest.approx(one.std().item() / 50**0.5)
    assert second.error(first) == pytest.approx(0.0, abs=1e-12)


def test_what_is_held_out_is_not_trained_on():
    x = torch.arange(100.0)[:, None]
    task = task_of(nn.Linear(1, 2), size=7, samples=Samples(x, (x[:, 0] > 50).long()))
    held = {value.item() for part, _ in task.parts for value in part}
    seen = [{value.item() for step in range(11 * epoch, 11 * epoch + 11) for value in task.batch(step)[0]} for epoch in (0, 1)]
    assert len(held) == task.held_out == 20
    assert [len(values) for values in seen] == [77, 77]
    assert not held & (seen[0] | seen[1])
    assert not torch.equal(task.batch(0)[0], task.batch(11)[0])
    assert not torch.equal(task.batch(0)[0], task.batch(0, order=1)[0])


def test_samples_to_score_on_may_be_given():
    advice = ask(validation=data(30, seed=5), rules=[])
    assert (advice.samples, advice.held_out) == (400, 30)
    x = torch.arange(300.0)[:, None]
    parts = Task.of(nn.Linear(1, 1), Samples(x, x), Samples(x, x), loss=F.mse_loss, optimizer=sgd, size=2, seed=0).parts
    assert len(parts) == 50
    assert (
        100 < torch.cat([part for part, _ in parts[:10]]).mean() < 200
    )  # those of a budget that allows no more are like the others


# ---- models and targets of all kinds -----------------------------------------------------------------------------------------


def test_real_valued_targets_are_scored_by_the_loss():
    x, _ = data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 16), nn.Tanh()), nn.Linear(16, 2))
    advice = ask(
        model, x, x[:, :2] * 2, F.mse_loss, rules=["pred", "dfa"], steps=40, optimizer=lambda p: torch.optim.Adam(p, lr=0.01)
    )
    assert advice.metric == "loss"
    for option in advice.options:
        assert option.accuracy is None
        assert option.score == -option.loss > advice.start
    assert re.search(r"\n\*? +backprop +\d\.\d+ ", str(advice))
    assert " points" not in advice.verdict


@pytest.mark.parametrize("name", ["gpt", "dict"])
def test_sequences_and_trees_of_tensors(name):
    case = MODELS[name]
    x, y = case.batches(1, samples=60)[0]
    advice = lf.advise(case.build(), x, y, case.loss, rules=["dfa", "pred", "cdni"], batch_size=16, steps=2, blocks=None)
    assert {"backprop", "checkpoint", "dfa", "pred"} <= {option.name for option in advice.options}
    assert advice.metric == "accuracy"
    assert advice.held_out == 12
    if name == "gpt":
        assert advice.refused == {
            "cdni": "a label-conditioned synthesiser needs class scores (batch, classes), this model gives (2, 5, 7)"
        }
        (single,) = [option for option in advice.options if option.name == "backprop"]
        assert (single.accuracy * 12 * 5) % 1 == pytest.approx(0, abs=1e-9)  # a share of the 60 held-out symbols


def test_the_language_model_of_the_package():
    torch.manual_seed(0)
    symbols = (torch.arange(7).repeat(80, 1) + torch.randint(7, (80, 1))) % 7  # each is followed by the next
    advice = ask(
        lf.models.transformer.gpt(7, 6, width=16, depth=2, heads=2),
        *(symbols[:, :-1], symbols[:, 1:], lambda scores, y: F.cross_entropy(scores.flatten(0, 1), y.flatten())),
        rules=["dfa"],
        steps=30,
        batch_size=32,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
    )
    assert advice.start < 0.5
    assert advice.baseline.accuracy > 0.9


class Untraceable(nn.Module):
    """Its forward depends on the values that it is given."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, x):
        h = self.below(x)
        return self.above(h if h.sum() > 0 else -h)


def test_a_model_that_cannot_be_cut_still_gets_backprop_beside_the_reason():
    advice = ask(Untraceable(), rules=["dfa", "fa"])
    assert "backprop" in by_name(advice)
    assert set(by_name(advice)) <= {"backprop", "backprop (recompute)"}
    assert set(advice.refused) == {"checkpoint", "dfa", "fa"}
    assert all("cannot cut Untraceable" in reason and "\n" not in reason for reason in advice.refused.values())
    assert advice.recommended is advice.baseline
    with pytest.raises(lf.CannotCutError, match="cannot cut Untraceable"):
        ask(Untraceable(), blocks=["above"])


def test_a_model_of_one_block_is_cut_inside_if_it_may_be():
    model = nn.Sequential(network())
    assert {option.name for option in ask(model).options} >= {"backprop", "dfa (4 blocks)"}
    assert ask(model, blocks=None).refused == dict.fromkeys(
        ("checkpoint", "dfa"), "the model is one block here, without a border between blocks: pass blocks"
    )


def test_cuts_of_deep_models():
    task = Task.of(
        lf.models.resnet20((1, 8, 8), CLASSES),
        Samples(torch.randn(40, 1, 8, 8), torch.zeros(40, dtype=torch.int64)),
        None,
        loss=F.cross_entropy,
        optimizer=sgd,
        size=8,
        seed=0,
    )
    cuts = Cuts.of(task, "auto")
    assert (cuts.own, cuts.count, cuts.reason) == (None, 5, "")
    assert cuts.pieces == (2, 4, 8, 16)  # 5, about the root of the number of matrices, is the children's own
    assert Cuts.of(task, 3) == (3, 3, (), "")
    dry = Survey(task, limit=None, seconds=None, expected=1, progress=lambda *_: None)
    dry.rule(RULES["drtp"](), cuts)
    dry.coarser(RULES["drtp"](), cuts)
    dry.coarser(RULES["dni"](), cuts)  # which was not measured on the model's own cut
    assert [candidate.name for candidate, _ in dry.end()] == ["drtp", "drtp (4 blocks)"]


# ---- what cannot serve -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Backprop):
    """Fails in its first step.

    Attributes:
        how: What it says.
    """

    how: str = "out of order"

    def run(self, block, context):
        raise KeyError(f"{self.how}\nmore of it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Late(lf.rules.DirectFeedbackAlignment):
    """Fails once it is trained in earnest."""

    def credit(self, context):
        if context.batch > 40:
            raise RuntimeError("no more")
        return super().credit(context)


def test_a_rule_that_fails_is_a_line_and_not_the_end():
    advice = ask(rules=["dfa", Broken(how="well"), Broken(), Late()], steps=60)
    assert advice.refused["Broken(how='well')"] == "'well\\nmore of it'"
    assert advice.refused["Broken()"] == "'out of order\\nmore of it'"
    assert advice.refused["Late()"] == "no more"
    assert by_name(advice)["Late()"].score is None
    assert by_name(advice)["dfa"].score is not None
    assert "Without a score: Late(): no more." in str(advice)


def test_what_diverges_is_said_to():
    advice = ask(optimizer=lambda p: torch.optim.SGD(p, lr=1e30), rules=["fa"])
    assert advice.recommended is None
    assert "backprop" in advice.refused
    assert "not finite" in advice.refused["backprop"] or "the loss is nan" in advice.refused["backprop"]
    assert advice.verdict == "Nothing could be trained here: see the reasons above."
    assert json.loads(json.dumps(advice.to_dict()))["recommended"] is None


def test_rules_of_one_s_own():
    rules = [lf.rules.SyntheticGradients(hidden_layers=1, hidden_units=8), lf.rules.SyntheticGradients(), "dni", Backprop()]
    advice = ask(rules=rules)
    names = {option.label for option in advice.options}
    assert names == {"backprop", "checkpoint", "dni", "SyntheticGradients(hidden_layers=1, hidden_units=8)"}
    (own,) = [option for option in advice.options if "hidden" in option.label]
    assert own.rule is rules[0]
    assert own.code == (
        "lockfree.convert(model, lockfree.rules.SyntheticGradients(hidden_layers=1, hidden_units=8), loss=loss, "
        "optimizer=optimizer, example_input=x[:2])"
    )
    assert label(Broken()) == "Broken()"


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"rules": ["dfq"]}, ValueError, "unknown rule 'dfq': did you mean 'dfa'?"),
        ({"rules": "dfa"}, TypeError, r"rules='dfa' is one name: pass a list of names, rules=\['dfa'\]"),
        ({"memory": "2 XB"}, ValueError, "memory '2 XB': give bytes, or a number with a unit"),
        ({"steps": 0}, ValueError, "steps=0: give 1 or more"),
        ({"batch_size": 0}, ValueError, "batch_size=0: give 1 or more"),
        ({"steps": None, "seconds": 0.0}, ValueError, "seconds=0.0: give a number above 0"),
        ({"blocks": "layer"}, TypeError, "blocks='layer' is one name"),
        ({"blocks": 40}, lf.CannotCutError, "can be cut into at most"),
        ({"y": torch.zeros(399, dtype=torch.int64)}, ValueError, "expected 400 targets, one for each input, got 399"),
        ({"y": [1, 2]}, ValueError, "got a list without a tensor of them"),
        ({"y": torch.full((400,), 9)}, ValueError, "targets hold class numbers from 9 to 9"),
        (
            {"x": torch.zeros(6, 6), "y": torch.zeros(6, dtype=torch.int64)},
            ValueError,
            "6 samples are too few to hold some out",
        ),
        ({"validation": (torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))}, ValueError, "validation is empty: pass one"),
        ({"model": nn.ReLU()}, ValueError, "ReLU has no parameters: there is nothing to train"),
        ({"model": nn.Linear(6, CLASSES).requires_grad_(False)}, ValueError, "there is nothing to train"),
        ({"model": nn.Linear(7, CLASSES)}, ValueError, r"Linear does not take these inputs, float32 \(64, 6\): mat1 and mat2"),
        ({"loss": lambda scores, y: scores}, ValueError, "the loss must return one scalar tensor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_with_the_call_is_said_at_once(settings, error, words):
    x, y = data()
    with pytest.raises(error, match=words):
        ask(**{"x": x, "y": y} | settings)


# ---- limits of memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "size"),
    [
        *(
            ("2GB", 2 * 10**9),
            ("2GiB", 2 * 2**30),
            ("512MiB", 512 * 2**20),
            ("1.5 kB", 1500),
            ("800M", 8 * 10**8),
            (" 2 g ", 2 * 10**9),
        ),
        *(
            ("1e6", 10**6),
            ("2e3kB", 2 * 10**6),
            ("12", 12),
            (12, 12),
            (2e9, 2 * 10**9),
            ("3B", 3),
            ("1Ki", 1024),
            (".5TB", 5 * 10**11),
        ),
    ],
)
def test_memory_is_read(written, size):
    assert parse_memory(written) == size


@pytest.mark.parametrize(
    "written", ["", "GB", "2 XB", "-1GB", "0", "0MB", "2GBit", "nan", "inf", "1e999", "two", "2 G B", -5, float("nan")]
)
def test_memory_that_cannot_be_read_is_one_clear_line(written):
    with pytest.raises(ValueError, match=r"give bytes, or a number with a unit, such as 2GB, 512MiB or 1\.5GiB") as caught:
        parse_memory(written)
    assert "\n" not in str(caught.value)


def test_a_limit_between_checkpointing_and_backprop(usual):
    exact = sorted((option.memory.total, option.name) for option in usual.options if option.exact)
    (least, _), (most, name) = exact[0], exact[-1]
    assert name == "backprop"
    advice = ask(rules=[], memory=(least + most) // 2, steps=20)
    assert not advice.baseline.fits
    assert advice.recommended.fits
    assert advice.recommended.exact
    assert advice.baseline.score == advice.recommended.score == usual.baseline.score  # another one was trained in its place
    assert re.match(
        r"Backprop needs [\d.]+ kB and does not fit in [\d.]+ kB; [\w, ()]+ does, with [\d.]+ kB and the same", advice.verdict
    )


def test_a_limit_below_everything():
    advice = ask(memory=1000, rules=["dfa", "pred"])
    assert advice.recommended is None
    assert (advice.steps, advice.front) == (0, ())
    assert not any(option.fits for option in advice.options)
    least = min(advice.options, key=lambda option: option.memory.total)
    assert advice.verdict.startswith(f"Nothing here fits in 1 kB: the least is {least.name} with ")
    assert advice.verdict.endswith("take an optimizer with fewer states, or a smaller model.")
    assert "Nothing was trained." in str(advice)


def test_a_limit_that_a_smaller_batch_keeps():
    about = {"model": network(width=8), "rules": [], "blocks": None}
    fixed = ask(batch_size=256, **about).baseline.memory.fixed
    advice = ask(memory=fixed + 2000, batch_size=256, **about)
    (samples,) = re.findall(r"With batches of (\d+) samples or fewer, .* should fit\.$", advice.verdict)
    assert ask(memory=fixed + 2000, batch_size=int(samples), **about).recommended is not None


def test_rules_are_brought_within_a_limit_if_that_is_possible():
    torch.manual_seed(0)
    layers = [nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(8))) for _ in range(3)]
    model, x = nn.Sequential(*layers), torch.randn(400, 16)
    about = {"rules": ["drtp"], "blocks": None, "batch_size": 256, "optimizer": lambda p: torch.optim.SGD(p, lr=1e-3)}
    plain = by_name(ask(model, x, x, F.mse_loss, **about))["drtp"]
    advice = ask(model, x, x, F.mse_loss, memory=plain.memory.total - 1, **about)
    (drtp,) = [option for option in advice.options if option.label == "drtp"]
    assert (drtp.name, drtp.fits) == ("drtp (recompute)", True)
    assert drtp.score == plain.score


# ---- what follows ------------------------------------------------------------------------------------------------------------

SMALL = st.integers(0, 3)


def option_of(rule, score, total=100, milliseconds=1.0, **more):
    memory = Memory(parameters=10, gradients=10, optimizer=10, auxiliary=0, batch=5, saved=20, total=total)
    made = {"label": label(rule), "rule": rule, "blocks": None, "recompute": False, "cut": ("0", "1"), "error": 0.01}
    made |= {"locks": ("forward",) if isinstance(rule, lf.rules.LocalLoss) else ("forward", "update", "backward")}
    made |= {"milliseconds": milliseconds, "time": milliseconds, "accuracy": score, "loss": 1.0, "name": label(rule)}
    return Option(memory=memory, **made | more)


def advice_of(*options, limit=None, start=0.1, **more):
    fitting = [dataclasses.replace(one, fits=limit is None or one.memory.total <= limit) for one in options]
    made = {"refused": {}, "metric": "accuracy", "steps": 50, "batch_size": 20, "samples": 500, "held_out": 100, "spread": 0.01}
    return Advice(options=tuple(fitting), limit=limit, start=start, **made | {"seconds": 1.0, "seed": 0} | more)


BP, CP, LOCAL = Backprop(), Checkpointing(), RULES["pred"]()


@given(st.lists(st.tuples(SMALL, SMALL, SMALL), max_size=12))
@settings(max_examples=200, deadline=None)
def test_the_front_is_what_nobody_beats(points):
    options = [option_of(BP, score / 10, total, float(time)) for score, total, time in points]
    expected = []
    for option, (score, total, time) in zip(options, points, strict=True):
        as_good = [(s, m, t) for s, m, t in points if s >= score and m <= total and t <= time]
        if all(point == (score, total, time) for point in as_good):
            expected.append(option)
    assert list(pareto_front(options)) == expected
    assert bool(expected) == bool(points)


def test_what_has_no_score_or_no_time_is_not_on_the_front():
    options = [option_of(BP, None, loss=None), option_of(CP, 0.5, milliseconds=None), option_of(LOCAL, 0.1)]
    assert [option.label for option in pareto_front(options)] == ["pred"]


def test_backprop_is_recommended_unless_another_is_ahead_by_more_than_luck():
    def chosen(lead, **more):
        return advice_of(
            option_of(BP, 0.8), option_of(CP, 0.8, 80, 1.4), option_of(LOCAL, 0.8 + lead), **more
        ).recommended.label

    assert chosen(0.0) == "backprop"
    assert chosen(0.016) == "backprop"  # 1.645 standard errors of 0.01, if it is the only one
    assert chosen(0.017) == "pred"
    assert chosen(0.016, limit=90) == "checkpoint"
    others = [option_of(RULES[name](), 0.7) for name in ("dfa", "fa", "dni", "cdni", "drtp", "mono", "sim", "usf", "hsic")]
    crowd = advice_of(option_of(BP, 0.8), option_of(LOCAL, 0.825), *others)
    assert crowd.recommended.label == "backprop"  # of ten, the best one is 2.6 standard errors ahead in one case out of twenty
    assert "nothing here is measurably more accurate or faster" in crowd.verdict


def test_the_best_that_fits_is_recommended_where_backprop_s_numbers_do_not():
    advice = advice_of(option_of(BP, 0.8, 100), option_of(CP, 0.8, 90), option_of(LOCAL, 0.7, 50), limit=60)
    assert advice.recommended.label == "pred"
    assert advice.verdict == (
        "Backprop needs 100 B and does not fit in 60 B. Use pred: accuracy 70.00 % (-10.00 ± 1.00 points against backprop), with "
        "50 % of the memory and 1.00 × the time. Checkpointing does not fit either. With batches of 8 samples or fewer, backprop "
        "should fit."
    )


@pytest.mark.parametrize(
    ("advice", "verdict"),
    [
        (
            advice_of(option_of(BP, 0.8), option_of(CP, 0.8, 95, 1.4), option_of(LOCAL, 0.7, 60, 1.2), limit=2_000_000_000),
            "Use backprop: it fits in 2 GB, and nothing here is more accurate or faster. The best rule that takes off a lock is pred: "
            "accuracy 70.00 % (-10.00 ± 1.00 points against backprop), with 60 % of the memory and 1.20 × the time.",
        ),
        (
            advice_of(option_of(BP, 0.8), option_of(CP, 0.8, 80, 1.4), option_of(RULES["fa"](), 0.79, 110, 0.8)),
            "Use backprop: nothing here is more accurate. The best of what is faster is fa: accuracy 79.00 % (-1.00 ± 1.00 points "
            "against backprop), with 110 % of the memory and 0.80 × the time. Should memory run short: checkpoint gives the same "
            "numbers with 80 % of the memory and 1.40 × the time.",
        ),
        (
            advice_of(option_of(BP, 0.8), option_of(CP, 0.8, 80, 1.4), option_of(LOCAL, 0.7, 60, 1.2), limit=90),
            "Backprop needs 100 B and does not fit in 90 B; checkpoint does, with 80 B and the same numbers at 1.40 × the time: use it "
            "unless time matters. The best other rule that fits is pred: accuracy 70.00 % (-10.00 ± 1.00 points against backprop), "
            "with 60 % of the memory and 1.20 × the time.",
        ),
        (
            advice_of(option_of(BP, 0.8), option_of(LOCAL, 0.9, 60, 1.2)),
            "Use pred: accuracy 90.00 % (+10.00 ± 1.00 points against backprop), with 60 % of the memory and 1.20 × the time. That is "
            "more than luck, but one short run: train both to the end before you rely on it.",
        ),
        (
            advice_of(option_of(LOCAL, 0.7, time=None), refused={"backprop": "it ran out of the device's memory"}),
            "Backprop cannot be used here (it ran out of the device's memory). Use pred: accuracy 70.00 %, with 100 B.",
        ),
        (
            advice_of(option_of(BP, 0.11), spread=0.01),
            "Use backprop: nothing here is more accurate or faster. But 50 steps have hardly taught the model anything: give more, or "
            "other learning rates, before you trust these scores.",
        ),
    ],
    ids=["it fits", "faster", "checkpointing", "another", "out of memory", "too short"],
)
def test_verdicts(advice, verdict):
    assert advice.verdict == verdict


def test_the_table_shows_every_option_and_the_refused_by_reason(usual):
    lines = str(usual).splitlines()
    assert lines[0].split() == [
        "option",
        "accuracy",
        "vs",
        "backprop",
        "at",
        "equal",
        "time",
        "memory",
        "a",
        "step",
        "time",
        "locks",
        "kept",
    ]
    for line, option in zip(lines[1:], usual.options, strict=False):
        assert line.startswith("* " if option in usual.front else "  ")
        assert f" {option.name}  " in line
        assert f"{100 * option.accuracy:.2f} %" in line
    assert lines[-1].startswith("lockfree.convert(model, ")
    scores = [option.score for option in usual.options]
    assert scores == sorted(scores, reverse=True)
    advice = advice_of(option_of(BP, 0.8), refused={"dni": "no", "fa": "never", "cdni": "no"})
    assert "Without a score: fa: never." in str(advice)
    assert "Without a score: dni; cdni: no." in str(advice)


def test_as_plain_data(usual):
    found = json.loads(json.dumps(usual.to_dict()))
    assert found["recommended"] == usual.recommended.name
    assert found["front"] == [option.name for option in usual.front]
    assert found["verdict"] == usual.verdict
    (backprop,) = [option for option in found["options"] if option["name"] == "backprop"]
    assert backprop["rule"] == "backprop"
    assert backprop["score"] == backprop["accuracy"] == usual.baseline.accuracy
    assert backprop["memory"] == dataclasses.asdict(usual.baseline.memory)
    assert backprop["locks"] == ["forward", "update", "backward"]


# ---- the time given ----------------------------------------------------------------------------------------------------------


def group_of(rule, seconds, time=None, **more):
    option = option_of(rule, None, milliseconds=1e3 * seconds, loss=None, **more)
    return Group(Candidate(rule, None), seconds, [dataclasses.replace(option, time=time)])


def test_a_group_is_trained_for_all_steps_and_for_as_long_as_backprop():
    assert group_of(LOCAL, 0.2, time=2.0).marks(100) == {"pred": 50}
    assert group_of(LOCAL, 0.2, time=2.0).work(100) == 100 + 10  # up to 40, ten more while rates fall, and from 40 on to 100
    assert group_of(LOCAL, 0.05, time=0.5).marks(100) == {"pred": 200}
    assert group_of(LOCAL, 0.01, time=0.1).marks(100) == {"pred": 200}
    assert group_of(LOCAL, 0.05, time=0.5).work(100) == 200 + 20
    assert group_of(LOCAL, 0.2).work(100) == 100


def test_steps_are_as_many_as_there_is_time_for():
    todo = plan(task_of(), [group_of(BP, 0.01), group_of(LOCAL, 0.02)], given=20.0, spent=1.0, asked=False)
    assert not todo.dropped
    assert len(todo.groups) == 2
    assert 200 < todo.steps < 0.9 * 20 / (3 * 0.01 + 0.02)
    assert plan(task_of(), [group_of(BP, 0.01)], given=1e6, spent=0.0, asked=False).steps == 1000


def test_where_time_is_short_the_slowest_are_left_out_but_never_backprop():
    candidates = [group_of(BP, 0.1), group_of(RULES["hsic"](), 0.9), group_of(LOCAL, 0.2), group_of(RULES["dfa"](), 0.3)]
    todo = plan(task_of(), candidates, given=40.0, spent=5.0, asked=False)
    assert [group.run.name for group in todo.groups] == ["backprop", "pred"]
    assert set(todo.dropped) == {"hsic", "dfa"}
    assert re.fullmatch(r"left out to keep to 40 seconds; all of them want about \d+0", todo.dropped["hsic"])
    assert todo.orders == 3
    hasty = plan(task_of(), candidates, given=1.0, spent=5.0, asked=False)
    assert (hasty.steps, hasty.orders) == (10, 1)


def test_a_heavy_rule_is_trained_only_if_it_was_asked_for():
    candidates = [group_of(BP, 0.001), group_of(RULES["hsic"](), 0.02)]
    assert plan(task_of(), candidates, given=500.0, spent=0.0, asked=False).dropped == {
        "hsic": "a step takes 20 × the time of backprop's: name it in rules to have it trained"
    }
    assert not plan(task_of(), candidates, given=500.0, spent=0.0, asked=True).dropped


def test_what_does_not_fit_is_not_trained_but_for_backprop():
    options = [option_of(BP, None, 100, 1.0, fits=False), option_of(CP, None, 80, 2.0), option_of(LOCAL, None, 90, fits=False)]
    found = [(Candidate(option.rule, None), option) for option in options]
    (group,) = groups(found)
    assert (group.run.name, group.seconds, group.options) == ("checkpoint", 0.002, options[:2])
    found[1] = (found[1][0], dataclasses.replace(options[1], fits=False))
    assert groups(found) == []


def test_the_time_given_is_kept_and_progress_is_told():
    told = []
    advice = ask(rules=["dfa", "pred", "hsic"], steps=None, seconds=2.0, progress=lambda *what: told.append(what))
    assert advice.seconds < 8
    assert advice.steps >= 10
    stages = [stage for stage, *_ in told]
    assert stages == sorted(stages)  # first all is measured, then trained
    assert {name for stage, _, _, name in told if stage == "training"} | set(advice.refused) >= {"dfa", "pred", "hsic"}
    assert all(1 <= number <= count for _, number, count, _ in told)


def test_time_that_is_spent_before_a_rule_s_turn():
    dry = Survey(task_of(), limit=None, seconds=1e-9, expected=1, progress=lambda *_: None)
    dry.rule(LOCAL, Cuts(None, 4, ()))
    assert dry.refused == {"pred": "the time given was spent before its turn: give more, or name fewer rules"}
    assert dry.end() == []


# ---- the command -------------------------------------------------------------------------------------------------------------

SHORT = ["--data", "digits", "--steps", "3", "--rules", "dfa"]


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Runs a command in this process, in an empty folder; returns exit code, standard output, standard error."""
    monkeypatch.setenv("LOCKFREE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = cli.main(["advise", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


OWN = """
import torch
from helper_of_my_model import WIDTH

def plain():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 10))

def sized(input_shape, classes, width=5):
    assert (input_shape, classes) == ((1, 8, 8), 10)
    return plain()

def greedy(one):
    pass

def empty():
    pass

def broken():
    raise RuntimeError("too bad")

def narrow():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(63, 10))

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(64, 8), torch.nn.Linear(8, 10)

    def forward(self, x):
        return self.two(self.one(x.flatten(1)).relu())
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my_model.py").write_text(OWN)
    (folder / "helper_of_my_model.py").write_text("WIDTH = 12\n")
    path = list(sys.path)
    yield folder / "my_model.py"
    for name in ("helper_of_my_model", "my_model", "lockfree_model_my_model"):
        sys.modules.pop(name, None)
    assert sys.path == path


def test_the_command_prints_plain_lines_when_piped(call):
    code, out, err = call("mlp", *SHORT, "--memory", "1GB")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0] == "measuring 1/5: backprop"
    assert any(line.startswith("training 1/2: ") or line.startswith("training 1/4: ") for line in lines)
    assert any(line.startswith("Use backprop: it fits in 1 GB, and nothing here is ") for line in lines)


def test_json_is_one_object(call):
    code, out, err = call("mlp", *SHORT, "--json", "--seed", 3, "--blocks", 2, "--optimizer", "sgd")
    assert code == 0
    (line,) = out.splitlines()
    found = json.loads(line)
    assert (found["model"], found["data"], found["device"], found["seed"], found["steps"]) == ("mlp", "digits", "cpu", 3, 3)
    assert found["metric"] == "accuracy"
    assert (found["limit"], found["refused"], found["samples"], found["held_out"]) == (None, {}, 1150, 287)
    keys = {"name", "rule", "blocks", "recompute", "cut", "locks", "memory", "fits", "milliseconds", "time", "accuracy", "loss"}
    for option in found["options"]:
        assert set(option) == keys | {"error", "at_equal_time", "score", "exact"}
        assert option["blocks"] == 2
    assert {option["name"] for option in found["options"]} >= {"backprop (2 blocks)", "dfa (2 blocks)"}
    assert err.startswith("measuring 1/")


@pytest.mark.parametrize("function", ["plain", "sized", "Net"])
def test_a_model_of_one_s_own(call, own, function):
    code, out, _ = call(f"{own}:{function}", *SHORT, "--json", "--blocks", "children")
    assert code == 0
    found = json.loads(out)
    parameters = found["options"][0]["memory"]["parameters"]
    assert parameters == 4 * (64 * 8 + 8 + 8 * 10 + 10 if function == "Net" else 64 * 12 + 12 + 12 * 10 + 10)
    assert not found["refused"]


def test_a_model_in_a_module(call, own, monkeypatch):
    monkeypatch.chdir(own.parent)
    code, out, _ = call("my_model:Net", *SHORT, "--json", "--blocks", "two")
    assert code == 0
    assert json.loads(out)["options"][0]["cut"] == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "model"),
        (["mpl"], "unknown model 'mpl': did you mean 'mlp'?"),
        (["mlp", "--rules", "dfq"], "unknown rule 'dfq': did you mean 'dfa'?"),
        (["mlp", "--memory", "2XB"], "memory '2XB': give bytes, or a number with a unit"),
        (["mlp", "--data", "digit"], "unknown data set 'digit'"),
        (["mlp", "--optimizer", "adm"], "unknown optimizer 'adm'"),
        (["mlp", "--learning-rate", "0"], "learning_rate=0.0: give a number above 0"),
        (["mlp", "--steps", "0"], "steps=0: give 1 or more"),
        (["mlp", "--seconds", "-1"], "seconds=-1.0: give a number above 0"),
        (["mlp", "--blocks", "nine"], "no module is named 'nine'"),
        (["mlp", "--device", "gpu"], "unknown device 'gpu'"),
        (["mlp", "--nonsense"], "nonsense"),
        (["{own}"], "name the function in it"),
        (["{own}:nothing"], "there is no function 'nothing' in it; it has plain, sized, greedy, empty, broken, narrow, Net"),
        (
            ["{own}:greedy"],
            r"it takes \(one\); give a function that returns the model, given nothing or \(input_shape, classes\)",
        ),
        (["{own}:empty"], "it returned a NoneType; give a function"),
        (["{own}:broken"], "failed: RuntimeError: too bad"),
        (["{own}:narrow"], r"Sequential does not take these inputs, float32 \(256, 1, 8, 8\): mat1 and mat2 shapes"),
        (["gone.py:plain"], "gone.py:plain cannot be imported: FileNotFoundError"),
        (["gone:plain"], "gone:plain cannot be imported: ModuleNotFoundError: No module named 'gone'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_and_exit_code_2(call, own, arguments, words):
    given = [argument.format(own=own) for argument in arguments]
    defaults = [] if "--data" in given else ["--data", "digits"]
    code, out, err = call(*given, *defaults)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("lockfree advise: ")
    assert re.search(words, line)
    assert "Traceback" not in line


def test_a_model_of_the_package_is_made_by_its_name():
    torch.manual_seed(0)
    one = make_model("mlp", (1, 8, 8), 10)
    torch.manual_seed(0)
    assert_same(copy_of(one), copy_of(lf.models.build("mlp", input_shape=(1, 8, 8), classes=10)))


def test_evaluation_that_is_not_finite_is_divergence():
    task = task_of()
    learner = task.learner(Candidate(Backprop(), None))
    with torch.no_grad():
        learner.model[3].bias.fill_(float("nan"))
    with pytest.raises(lf.Diverged, match="the loss of held-out samples is nan after 0 steps"):
        evaluate(learner, task.parts)
