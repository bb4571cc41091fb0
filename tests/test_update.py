"""Gathered gradients, clipping, learning-rate schedules, and when weights change, on real models and under autocast."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lockfree as lf
import lockfree.experiment
from lockfree.models.transformer import gpt
from lockfree.update import Update

RULES = [
    "backprop",
    "checkpoint",
    "fa",
    "usf",
    "dfa",
    "drtp",
    "pred",
    "predsim",
    "mono",
    "dgl",
    "infopro",
    "auglocal",
    "hsic",
    "dni",
]


def mlp(seed=0):
    torch.manual_seed(seed)
    widths = [12, 10, 9, 8]
    blocks = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*blocks, nn.Linear(8, 3))


def batches(count, samples=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(samples, 12, generator=generator), torch.randint(0, 3, (samples,), generator=generator))
        for _ in range(count)
    ]


def learner_of(model, rule="backprop", rate=0.1, **options):
    options.setdefault("example_input", torch.zeros(2, 12))
    return lf.convert(
        model, rule, loss=F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9), **options
    )


def assert_same(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("every", [2, 4])
def test_gathering_is_a_plain_loop_that_adds_up_gradients(every):
    model, plain = mlp(), mlp()
    learner = learner_of(model, accumulate=every, clip_norm=0.05)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step, (x, y) in enumerate(batches(3 * every + 1), 1):
        learner.step(x, y)
        (F.cross_entropy(plain(x), y) / every).backward()
        if step % every == 0:
            assert nn.utils.clip_grad_norm_(plain.parameters(), 0.05) > 0.05
            optimizer.step()
            optimizer.zero_grad()
        assert difference(model, plain) < 1e-6


@pytest.mark.parametrize("clip_norm", [None, 0.1, 10.0])
def test_clipping_is_that_of_a_plain_loop_bit_for_bit(clip_norm):
    model, plain = mlp(), mlp()
    learner = learner_of(model, clip_norm=clip_norm)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches(5):
        learner.step(x, y)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
        optimizer.step()
        assert_same(model, plain)


@pytest.mark.parametrize("rule", RULES)
def test_batches_gathered_are_one_large_batch(rule):
    """Without BatchNorm, and where the rule's credit is a mean over samples, four quarters are the whole."""
    if rule in ("predsim", "infopro", "hsic"):
        pytest.skip("these compare the samples of a batch")
    whole, quarters = mlp(), mlp()
    torch.manual_seed(7)
    one = learner_of(whole, rule, auxiliary_optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    torch.manual_seed(7)
    four = learner_of(quarters, rule, accumulate=4, auxiliary_optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    for cell, other in zip(one.cells, four.cells, strict=True):
        if cell.auxiliary is not None:
            other.auxiliary.load_state_dict(cell.auxiliary.state_dict())
    for x, y in batches(3, samples=16):
        one.step(x, y)
        for part in range(4):
            four.step(x[part * 4 : part * 4 + 4], y[part * 4 : part * 4 + 4])
    if rule != "dgl":  # its heads hold BatchNorm
        assert difference(whole, quarters) < 2e-5
    assert difference(whole, mlp()) > 1e-3


@pytest.mark.parametrize("rule", ["backprop", "dni", "dgl"])
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resume_in_the_middle_of_gathering_is_bit_identical(rule, stop):
    data = batches(8)
    model, again = mlp(), mlp(5)
    torch.manual_seed(3)
    learner = learner_of(model, rule, accumulate=3, clip_norm=0.1)
    other = learner_of(again, rule, accumulate=3, clip_norm=0.1)
    for x, y in data[:stop]:
        learner.step(x, y)
    other.load_state_dict(learner.state_dict())
    for x, y in data[stop:]:
        learner.step(x, y)
    expected = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    other.load_state_dict(other.state_dict())
    for x, y in data[stop:]:
        other.step(x, y)
    for name, value in again.state_dict().items():
        assert torch.equal(value, expected[name])


def test_a_batch_that_fails_takes_nothing_of_what_was_gathered():
    model, plain = mlp(), mlp()
    learner, calm = learner_of(model, accumulate=2), learner_of(plain, accumulate=2)
    (x, y), (x2, y2) = batches(2)
    learner.step(x, y)
    with pytest.raises(lf.Diverged):
        learner.step(torch.full_like(x, torch.nan), y)
    learner.step(x2, y2)
    calm.step(x, y)
    calm.step(x2, y2)
    assert_same(model, plain)


@pytest.mark.parametrize("rule", RULES)
def test_weights_that_change_at_once_change_alike(rule):
    model, early = mlp(), mlp()
    torch.manual_seed(7)
    learner = learner_of(model, rule)
    torch.manual_seed(7)
    at_once = learner_of(early, rule, update="block")
    for x, y in batches(6):
        assert learner.step(x, y).loss == at_once.step(x, y).loss
    assert_same(model, early)


def test_late_links_and_weights_that_change_at_once():
    model, early = mlp(), mlp()
    options = {"schedule": "pipelined", "links": lf.Link(delay=1)}
    learner, at_once = learner_of(model, **options), learner_of(early, update="block", **options)
    for x, y in batches(9):
        learner.step(x, y)
        at_once.step(x, y)
    assert_same(model, early)


def test_gradients_are_dropped_before_the_next_block_runs():
    model = mlp()
    learner = learner_of(model, "pred", update="block")
    alive = []
    for block in model:
        block.register_forward_pre_hook(lambda *_: alive.append([p.grad is not None for p in model.parameters()]))
    (x, y), *_ = batches(1)
    learner.step(x, y)
    alive.clear()
    learner.step(x, y)
    assert len(alive) == 4
    assert not any(any(one) for one in alive)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"accumulate": 0}, r"accumulate=0: give a whole number of batches, 1 or more"),
        ({"clip_norm": 0.0}, r"clip_norm=0\.0: give a number above 0"),
        ({"update": "blocks"}, r"'blocks'.*block"),
        ({"update": "block", "accumulate": 2}, r"accumulate=2 keeps the gradients of all blocks"),
    ],
)
def test_bad_options_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        learner_of(mlp(), **options)


def test_shared_parameters_cannot_change_at_once():
    model = mlp()
    model[1][0].weight = nn.Parameter(torch.randn(9, 10))
    model.append(nn.Linear(3, 3))
    model[3].weight, model[4].weight = nn.Parameter(torch.zeros(3, 8)), nn.Parameter(torch.eye(3))
    model.append(nn.Linear(3, 3))
    model[5].weight = model[4].weight
    with pytest.raises(ValueError, match=r"^blocks 4 and 5 share a parameter"):
        learner_of(model, update="block")


def test_the_update_takes_missing_gradients_for_zeros_of_others_batches():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    update = Update(torch.optim.SGD([a, b], lr=1.0), every=2)
    a.grad = torch.ones(1)
    update.take()
    b.grad = torch.ones(1)
    update.take()
    assert (a.item(), b.item()) == (-0.5, -0.5)
    assert a.grad is None
    assert b.grad is None


# ---- real models ---------------------------------------------------------------------------------------------------------------


def images(name, size):
    torch.manual_seed(0)
    return (
        lf.models.build(name, input_shape=(3, size, size), classes=4),
        torch.randn(6, 3, size, size),
        torch.randint(0, 4, (6,)),
    )


def text():
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (6, 9))
    return gpt(11, length=8, width=16, heads=2, depth=2), tokens[:, :-1], tokens[:, 1:]


REAL = {
    "resnet20": lambda: images("resnet20", 8),
    "vgg8b": lambda: images("vgg8b", 16),
    "vit": lambda: images("vit", 16),
    "gpt": text,
}


SMALL = [(name, rule) for name in ("resnet20", "vit", "gpt") for rule in lf.rules.RULES if rule not in ("hsic", "dni", "cdni")]
LARGE = [pytest.param("vgg8b", rule, marks=pytest.mark.slow) for rule in ("fa", "predsim", "auglocal", "ff")]


@pytest.mark.parametrize(("name", "rule"), [*SMALL, *LARGE])
@pytest.mark.thinned(4)
def test_real_models_learn_under_autocast_with_gathering_clipping_and_a_schedule(name, rule):
    model, x, y = REAL[name]()
    loss = (lambda scores, target: F.cross_entropy(scores.transpose(1, 2), target)) if name == "gpt" else F.cross_entropy
    if rule == "ff" and name == "gpt":
        pytest.skip("Forward-Forward tells samples apart, not places")
    learner = lf.convert(
        model,
        rule,
        loss=loss,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        blocks=None if rule == "ff" else 3,  # which wants borders of one tensor each
        example_input=x[:2],
        accumulate=2,
        clip_norm=0.5,
    )
    schedule = torch.optim.lr_scheduler.StepLR(learner.optimizer, step_size=1, gamma=0.5)
    before = {key: value.clone() for key, value in model.named_parameters()}
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                assert torch.tensor(learner.step(x, y).loss).isfinite()
        schedule.step()
    assert learner.optimizer.param_groups[0]["lr"] == 2.5e-4
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert len(moved) > 0.6 * len(before)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in model.parameters())


def test_the_command_line_gathers_and_clips(tmp_path):
    common = {"data": "digits", "epochs": 1, "batch_size": 128, "optimizer": "sgd", "learning_rate": 0.05}
    plain, gathered, clipped = (
        lf.experiment.Experiment(**common, **more).run()["test_loss"]
        for more in ({}, {"accumulate": 4}, {"accumulate": 4, "clip_norm": 1e-3})
    )
    assert plain < gathered < clipped
    for wrong in ({"accumulate": 0}, {"clip_norm": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            lf.experiment.Experiment(**wrong)
