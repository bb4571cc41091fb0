"""Forward-Forward against NumPy and against loops written out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree.rules.forward_forward import _Activity, _outputs, _without_length

FF = lf.rules.ForwardForward


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def mlp(*, normalised=False):
    torch.manual_seed(0)
    blocks = []
    for a, b in ((12, 10), (10, 9), (9, 8)):
        blocks.append(nn.Sequential(nn.Linear(a, b), *([nn.BatchNorm1d(b)] if normalised else []), nn.ReLU()))
    return nn.Sequential(*blocks, nn.Linear(8, 4))


def batch(samples=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 12, generator=generator)
    return x, (x[:, 4:8] @ torch.randn(4, 4, generator=generator)).argmax(1)


def learner_of(model, rule, rate=0.1):
    return lf.convert(
        model, rule, loss=F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, lr=rate), example_input=torch.zeros(2, 12)
    )


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(5,), (3, 4), (3, 4, 5)]),
    pairs=st.integers(1, 5),
    threshold=st.floats(0.2, 3),
    peers=st.sampled_from([0.0, 0.5]),
    batches=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_the_local_gradient_is_the_papers(shape, pairs, threshold, peers, batches, seed):
    """By hand: dL/dz = -+ sigma(-+l) 2z / (sqrt(d) 2m), and the variance of the units' mean activities."""
    rule, random, momentum = FF(threshold=threshold, peers=peers, momentum=0.8), np.random.default_rng(seed), 0.8
    d = int(np.prod(shape))
    units = 0 if len(shape) == 3 else len(shape) - 1  # channels of images, features of all else
    activity = _Activity(torch.zeros(2, *shape), 3)
    running = np.zeros(shape[units])
    for step in range(1, batches + 1):
        z = random.normal(size=(2 * pairs, *shape))
        leaf = torch.tensor(z, dtype=torch.float32, requires_grad=True)
        loss = rule.local_loss(leaf, activity)
        (gradient,) = torch.autograd.grad(loss, leaf)
        logit = (np.square(z).reshape(2 * pairs, -1).mean(1) - threshold) * d**0.5
        sign = np.where(np.arange(2 * pairs) < pairs, -1.0, 1.0)
        wanted = np.mean(np.log1p(np.exp(sign * logit)))
        rows = (sign * sigmoid(sign * logit)).reshape(-1, *[1] * len(shape))
        expected = rows * 2 * z / d**0.5 / (2 * pairs)
        if peers:
            axes = tuple(axis for axis in range(len(shape) + 1) if axis != units + 1)
            running = momentum * running + (1 - momentum) * z[:pairs].mean(axes)
            mean = running / (1 - momentum**step)
            wanted += peers * np.var(mean)
            slope = peers * 2 / len(mean) * (mean - mean.mean()) * (1 - momentum) / (1 - momentum**step)
            slope = slope * len(mean) / (pairs * d)
            spread = [1] * (len(shape) + 1)
            spread[units + 1] = -1
            expected[:pairs] += slope.reshape(spread)
        assert loss.item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("negatives", ["uniform", "hard"])
def test_what_is_fed_has_the_right_a_wrong_and_a_neutral_label(negatives):
    learner = learner_of(mlp(), FF(negatives=negatives, label=3.0))
    x, y = batch(400)
    fed = learner.rule.feed(learner._trained, x, y, 7)
    right, wrong, neutral = fed.chunk(3)
    assert fed.shape == (1200, 12)
    for part in (right, wrong, neutral):
        assert torch.equal(part[:, 4:], x[:, 4:])
    assert torch.equal(right[:, :4], 3.0 * F.one_hot(y, 4))
    assert torch.equal(neutral[:, :4], torch.full((400, 4), 0.75))
    assert torch.equal(wrong[:, :4].sum(1), torch.full((400,), 3.0))
    assert not (wrong[:, :4].argmax(1) == y).any()
    assert torch.equal(learner.rule.feed(learner._trained, x, y, 7), fed)
    assert not torch.equal(learner.rule.feed(learner._trained, x, y, 8), fed)


def test_hard_labels_are_drawn_by_the_networks_own_odds():
    model = mlp()
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    learner = learner_of(model, FF(negatives="hard"))
    x, y = batch(6000)[0], torch.zeros(6000, dtype=torch.int64)
    drawn = learner.rule.feed(learner._trained, x, y, 0)[6000:12000, :4].argmax(1)
    odds = torch.tensor([1.0, 2.0, 3.0]).softmax(0)
    assert (torch.bincount(drawn, minlength=4)[1:] / 6000 - odds).abs().max() < 0.02


def test_a_step_is_a_step_of_each_block_on_its_own_loss():
    model, plain = mlp(normalised=True), mlp(normalised=True)
    rule = FF(peers=0.0)
    learner = learner_of(model, rule)
    x, y = batch()
    fed = rule.feed(learner._trained, x, y, 0)
    expected_loss = None
    told, neutral = fed[:32], fed[32:]
    for index, block in enumerate(plain):
        if index:
            told, neutral = (part / part.square().mean(1, keepdim=True).sqrt().clamp_min(1e-4) for part in (told, neutral))
        if index == 3:
            expected_loss = F.cross_entropy(block(neutral), y)
            expected_loss.backward()
            break
        z = block(told)
        logit = (z.square().mean(1) - 1) * z.shape[1] ** 0.5
        (F.softplus(-logit[:16]).mean() / 2 + F.softplus(logit[16:]).mean() / 2).backward()
        block.eval()
        with torch.no_grad():
            neutral = block(neutral)
        block.train()
        told = z.detach()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter -= 0.1 * parameter.grad
    assert learner.step(x, y).loss == pytest.approx(expected_loss.item())
    for mine, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_classes_are_read_off_under_each_label():
    learner = learner_of(mlp(normalised=True), FF(threshold=0.5, label=2.0))
    for seed in range(3):
        learner.step(*batch(seed=seed))
    x, _ = batch(5)
    learner.model.eval()
    expected = torch.zeros(5, 4)
    with torch.no_grad():
        for label in range(4):
            h = x.clone()
            h[:, :4] = 0
            h[:, label] = 2.0
            for index, block in enumerate(list(learner.model)[:3]):
                h = block(h if not index else h / h.square().mean(1, keepdim=True).sqrt())
                if index:
                    expected[:, label] += (h.square().mean(1) - 0.5) * h.shape[1] ** 0.5
    learner.model.train()
    torch.testing.assert_close(learner.predict(x), expected)
    assert all(module.training for module in learner.model.modules())


def test_two_blocks_are_judged_by_the_only_hidden_one():
    model = nn.Sequential(nn.Sequential(nn.Linear(12, 9), nn.ReLU()), nn.Linear(9, 4))
    learner = learner_of(model, FF())
    x, _ = batch(5)
    with torch.no_grad():
        labelled = torch.cat([2.5 * 2 * F.one_hot(torch.zeros(5, dtype=torch.int64), 4), x[:, 4:]], 1)
        h = model[0](labelled)
    torch.testing.assert_close(learner.predict(x)[:, 0], (h.square().mean(1) - 1) * 3)


def test_it_learns_what_a_linear_map_tells():
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(a, 64), nn.BatchNorm1d(64), nn.ReLU()) for a in (12, 64)]
    model = nn.Sequential(*hidden, nn.Linear(64, 4))
    learner = lf.convert(
        model, FF(), loss=F.cross_entropy, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), example_input=torch.zeros(2, 12)
    )
    x, y = batch(2000)
    for epoch in range(8):
        for part in torch.randperm(2000, generator=torch.Generator().manual_seed(epoch)).split(100):
            learner.step(x[part], y[part])
    assert (learner.predict(x).argmax(1) == y).float().mean() > 0.7


def test_lengths_are_taken_off():
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(_without_length(x).square().mean((1, 2, 3)), torch.ones(4))
    assert torch.equal(_without_length(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_locks_follow_from_where_wrong_labels_come_from():
    assert set(learner_of(mlp(), FF()).locks) == {"forward"}
    assert set(learner_of(mlp(), FF(negatives="hard")).locks) == {"forward", "update"}
    with pytest.raises(ValueError, match="needs ERROR"):
        lf.convert(
            mlp(),
            FF(negatives="hard"),
            loss=F.cross_entropy,
            optimizer=torch.optim.SGD,
            example_input=torch.zeros(2, 12),
            schedule="pipelined",
        )


def test_the_blocks_pass_through_what_they_hand_up():
    learner = learner_of(mlp(), FF())
    outputs = list(_outputs(learner._trained, batch(3)[0]))
    assert [tuple(one.shape) for one in outputs] == [(3, 10), (3, 9), (3, 8), (3, 4)]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"threshold": 0.0}, "threshold=0"),
        ({"label": -1.0}, "label=-1"),
        ({"peers": -0.1}, "peers=-0.1"),
        ({"momentum": 1.0}, "momentum=1"),
        ({"negatives": "hrad"}, "hard"),
    ],
)
def test_fields_out_of_range_are_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        FF(**fields)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (torch.randn(16, 4), "a class number for each sample"),
        (torch.full((16,), 4), "0 to 3"),
        (torch.full((16,), -100), "Forward-Forward wants class numbers"),
    ],
)
def test_other_targets_are_refused_and_nothing_has_changed(target, told):
    model = mlp(normalised=True)
    learner = learner_of(model, FF())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=told):
        learner.step(batch()[0], target)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_that_fails_leaves_the_activities_as_they_were():
    learner = learner_of(mlp(), FF())
    x, y = batch()
    learner.step(x, y)
    before = [buffer.clone() for cell in learner.cells[:3] for buffer in cell.auxiliary.buffers()]
    with pytest.raises(lf.Diverged):
        learner.step(torch.full_like(x, torch.inf), y)
    after = [buffer for cell in learner.cells[:3] for buffer in cell.auxiliary.buffers()]
    assert len(before) == 6
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("model", "example", "told"),
    [
        (nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)), torch.zeros(2, 3), "first 4 numbers of the input"),
        (nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 4)), torch.zeros(2, 7, dtype=torch.int64), "gives .batch, classes."),
    ],
)
def test_models_that_it_cannot_serve_are_refused(model, example, told):
    with pytest.raises(ValueError, match=told):
        lf.convert(model, FF(), loss=F.cross_entropy, optimizer=torch.optim.SGD, example_input=example)
