"""Rules whose blocks descend losses of their own: each against its paper's equation, written out and differentiated."""

import copy
import dataclasses
import math
import weakref
from fractions import Fraction
from types import SimpleNamespace

import cases
import numpy as np
import pytest
import torch
from cases import assert_same, descent, draw, labels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree import checkpoint, local
from lockfree.heads import Head
from lockfree.rules.aug_local import AugLocal
from lockfree.rules.decoupled_greedy import DecoupledGreedy
from lockfree.rules.info_pro import InfoPro, contrast
from lockfree.rules.local_loss import LocalLoss, features, similarity
from lockfree.rules.mono_forward import MonoForward

F64 = torch.float64
CLASSES = cases.CLASSES


@pytest.fixture(autouse=True)
def _own_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def token_loss(scores, y):
    return F.cross_entropy(scores.flatten(0, 1), y.flatten())


# ---- models ------------------------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """The first block hands up two tensors: what skips a block, and what does not."""

    def __init__(self, channels=1, width=3):
        super().__init__()
        self.down, self.middle = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        self.up, self.out = nn.Conv2d(4 + width, 5, 3, padding=1), nn.Linear(5, CLASSES)

    def piece(self, index, values):
        if index == 0:
            one = torch.tanh(self.down(values))
            return one, F.avg_pool2d(one, 2)
        if index == 1:
            one, low = values
            return torch.cat([F.interpolate(torch.tanh(self.middle(low)), scale_factor=2), one], dim=1)
        return torch.tanh(self.up(values)).mean((2, 3)) if index == 2 else self.out(values)

    def forward(self, x):
        for index in range(4):
            x = self.piece(index, x)
        return x


def run(model, index, values):
    return model.piece(index, values) if isinstance(model, UNet) else model[index](values)


class Piece(nn.Module):
    """One block of a model, to be called with other weights."""

    def __init__(self, model, index):
        super().__init__()
        self.model, self.index = model, index
        own = list(model.children())[index]
        self.names = [name for name, p in self.named_parameters() if any(p is q for q in own.parameters())]

    def forward(self, values):
        return run(self.model, self.index, values)

    def with_weights(self, weights, values):
        return torch.func.functional_call(self, {name: next(weights) for name in self.names}, (values,))


def attention(width):
    layer = cases.Attention(width, 2)
    layer.mlp[-1].p = 0.0
    return layer


def mlp(into=6, widths=(10, 8, 7), out=CLASSES):
    ends = zip((into, *widths), widths, strict=False)
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in ends), nn.Linear(widths[-1], out))


def normalised():
    return nn.Sequential(nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ELU()), *mlp(10, (8, 7)))


def cnn(channels=1, widths=(3, 5), side=6, out=CLASSES):
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.Tanh()),
        nn.Sequential(nn.Conv2d(widths[0], widths[1], 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(widths[1], 4, 3, padding=1), nn.Tanh(), nn.Flatten()),
        nn.Linear(4 * (side // 2) ** 2, out),
    )


def gpt(words=7, width=8):
    embed = nn.Sequential(nn.Linear(6, width), nn.Tanh())
    return nn.Sequential(nn.Embedding(words, 6), embed, attention(width), attention(width), nn.Linear(width, words))


WORDS = labels(5, 6, classes=7)
KINDS = {
    "vectors": (mlp, draw(10, 6), labels(10), F.cross_entropy),
    "normalised": (normalised, draw(10, 6), labels(10), F.cross_entropy),
    "images": (cnn, draw(10, 1, 6, 6), labels(10), F.cross_entropy),
    "sequences": (gpt, WORDS[:, :-1], WORDS[:, 1:], token_loss),
    "skips": (UNet, draw(10, 1, 6, 6), labels(10), F.cross_entropy),
}
X, Y = KINDS["vectors"][1:3]


def built(make):
    torch.manual_seed(0)
    return make().double()


def learner_of(model, rule, x, loss=F.cross_entropy, optimizer=descent, scatter=True, **more):
    """Auxiliary networks are drawn anew, since a head that starts at 0 says nothing."""
    learner = lf.convert(model, rule, loss=loss, optimizer=optimizer, example_input=x, **more)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for cell in learner.cells[:-1] if scatter else ():
            for p in cell.auxiliary.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=F64))
    return learner


# ---- the papers' equations, written out --------------------------------------------------------------------------------------


def by_place(s, y):
    return y.dim() == 3 and len(s.scores) == 2


def linear(h, p, *, bias=True):
    h = h @ next(p).T
    return h + next(p) if bias else h


def normalise(h, p):
    """A sample that is alone is normalised by running statistics, which start at 0 and 1."""
    over = [0, *range(2, h.dim())]
    alone = h.numel() == h.shape[1]
    mean, variance = (0.0, 1.0) if alone else (h.mean(over, keepdim=True), h.var(over, correction=0, keepdim=True))
    weight, bias = (next(p).view(-1, *[1] * (h.dim() - 2)) for _ in range(2))
    return (h - mean) / (variance + 1e-5) ** 0.5 * weight + bias


def pooled(y):
    if y.dim() < 4 or y[0].numel() <= 2048:
        return y.flatten(1)
    side = math.isqrt(2048 // y.shape[1])
    return F.adaptive_avg_pool2d(y, (min(side, y.shape[2]), min(side, y.shape[3]))).flatten(1)


def read(s, y, p):
    return linear(y, p) if by_place(s, y) else linear(pooled(y), p).view(-1, *s.scores)


def deviations(h):
    if h.dim() == 4 and h.shape[1] > 3 and h[0, 0].numel() > 1:
        apart = h - h.mean((2, 3), keepdim=True)
        return (apart.square().sum((2, 3)) / (h[0, 0].numel() - 1)).sqrt()
    return h.flatten(1)


def cosines(rows):
    apart = rows - rows.mean(1, keepdim=True)
    size = apart.square().sum(1, keepdim=True)
    unit = apart / torch.where(size > 0, size, 1.0).sqrt()
    return unit @ unit.T


def one_hot(t, classes):
    return (t[..., None] == torch.arange(classes)).to(F64)


def predsim(beta, rows=1024, *, predicts=True, compares=True):
    def pred(s, y, p):
        return s.loss(read(s, y, p), s.t)

    def sim(s, y, p):
        weight = next(p)
        h = F.conv2d(y, weight, padding=1) if y.dim() == 4 else (y if y.dim() == 3 else y.flatten(1)) @ weight.T
        wanted = s.t if s.t.is_floating_point() else one_hot(s.t, s.scores[-1])
        if by_place(s, y):
            step = math.ceil(s.t.numel() / rows)
            h, wanted = h.flatten(0, 1)[::step], wanted.flatten(0, 1)[::step]
        else:
            h, wanted = deviations(h), wanted.flatten(1)
        return (cosines(h) - cosines(wanted)).square().sum() / len(h) ** 2

    def formula(s, y, p):
        parts = (1 - beta) * pred(s, y, p) if predicts else 0.0
        return parts + beta * sim(s, y, p) if compares else parts

    return formula


PRED, SIM = predsim(0.0, compares=False), predsim(1.0, predicts=False)


def goodness(s, y, p):
    return s.loss(linear(y, p, bias=False) if by_place(s, y) else linear(y.flatten(1), p, bias=False).view(-1, *s.scores), s.t)


def greedy(convolutions, hidden):
    def formula(s, y, p):
        if s.index == s.count - 2:  # the block below the classifier has a twin of it
            return s.loss(Piece(s.model, s.count - 1).with_weights(p, y), s.t)
        if by_place(s, y):
            for _ in range(hidden):
                y = linear(y, p).relu()
            return s.loss(linear(y, p), s.t)
        if y.dim() == 4:
            sides = y.shape[2:]
            y = F.adaptive_avg_pool2d(y, [math.ceil(side / 4) for side in sides])
            for _ in range(convolutions):
                y = normalise(torch.einsum("bchw,dc->bdhw", y, next(p)[..., 0, 0]), p).relu()
            y = F.adaptive_avg_pool2d(y, [min(2, side) for side in sides])
        y = y.flatten(1)
        for _ in range(hidden):
            y = normalise(linear(y, p), p).relu()
        return s.loss(linear(y, p).view(-1, *s.scores), s.t)

    return formula


def supervised_contrast(z, t, temperature):
    total = torch.zeros((), dtype=z.dtype)
    for a in range(len(z)):
        others = [b for b in range(len(z)) if b != a]
        alike = [b for b in others if t[b] == t[a] and t[a] >= 0]
        for b in alike:
            below = sum(torch.exp(z[a] @ z[c] / temperature) for c in others)
            total = total - torch.log(torch.exp(z[a] @ z[b] / temperature) / below) / len(alike)
    return total / len(z)


def kept_and_told(task, reconstruction=(1.0, 0.0), supervision=(1.0, 1.0), temperature=0.07):
    def brought_back(s, y, p):
        if s.x.dim() != 4:
            return (linear(y.flatten(1), p) - s.x.flatten(1)).square().mean()
        if y.dim() == 4:
            h = F.interpolate(y, s.x.shape[2:], mode="bilinear", align_corners=True)
            h = normalise(F.conv2d(h, next(p), next(p), padding=1), p).relu()
            made = F.conv2d(h, next(p), next(p), padding=1)
        else:
            made = linear(y, p).view(s.x.shape)
        likely = torch.sigmoid(made)
        x = (s.x - s.x.min()) / (s.x.max() - s.x.min() or 1.0)
        return -(x * likely.log() + (1 - x) * (1 - likely).log()).mean()

    def told(s, y, p):
        if by_place(s, y):
            return s.loss(linear(linear(y, p).relu(), p), s.t)
        if y.dim() == 4:
            y = normalise(F.conv2d(y, next(p), next(p), padding=1), p).relu().mean((2, 3))
        made = linear(linear(y.flatten(1), p).relu(), p)
        if task == "loss" or len(s.scores) == 2:
            return s.loss(made.view(-1, *s.scores), s.t)
        return supervised_contrast(made / made.norm(dim=1, keepdim=True), s.t, temperature)

    def formula(s, y, p):
        keep, tell = (np.linspace(*ends, s.count - 1)[s.index] for ends in (reconstruction, supervision))
        kept = keep * brought_back(s, y, p) if keep and s.x.is_floating_point() else 0.0
        return kept + tell * told(s, y, p)

    return formula


def adapted(h, wanted, p):
    if h.shape[1:] == wanted:
        return h
    if h.dim() == 4 and len(wanted) == 3:
        h = h if h.shape[2:] == wanted[1:] else F.adaptive_avg_pool2d(h, wanted[1:])
        return h if h.shape[1] == wanted[0] else F.conv2d(h, next(p), next(p))
    if h.dim() == 3 and len(wanted) == 2 and h.shape[1] == wanted[0]:
        return linear(h, p)
    return linear(h.flatten(1), p).view(-1, *wanted)


def depth_of(index, count, depth, pyramid):
    part = Fraction(pyramid) * index / max(count - 2, 1)
    return depth * (1 - part) + part


def copies_of(index, count, copies):
    """The top block, and those in the middle of equal shares of the blocks between."""
    between = range(index + 1, count - 1)
    shares = min(copies - 1, len(between))
    return [between[math.floor(Fraction(2 * j + 1, 2) * len(between) / shares)] for j in range(shares)] + [count - 1]


def shortcut(depth, pyramid=0.5):
    def formula(s, outputs, named):
        adapters, copies = (iter([v for k, v in named.items() if k.startswith(part)]) for part in ("adapters", "copies"))
        values = outputs
        for block in copies_of(s.index, s.count, max(1, round(depth_of(s.index, s.count, depth, pyramid)))):
            wanted = s.borders[block]
            pairs = zip(values if len(values) == len(wanted) else values[:1] * len(wanted), wanted, strict=True)
            handed = [adapted(h, w.shape[1:], adapters) for h, w in pairs]
            made = Piece(s.model, block).with_weights(copies, handed[0] if len(handed) == 1 else tuple(handed))
            values = [made] if isinstance(made, torch.Tensor) else list(made)
        return s.loss(values[0], s.t)

    return formula


def heads(formula):
    """The sum over the tensors that a block hands up, each with a head of its own."""

    def total(s, outputs, named):
        p = iter(named.values())
        found = sum(formula(s, y, p) for y in outputs)
        assert next(p, None) is None
        return found

    return total


RULES = {
    "predsim": (lambda: LocalLoss(balance=0.3), heads(predsim(0.3))),
    "predsim, all of it sim": (lambda: LocalLoss(balance=1.0), heads(predsim(1.0))),
    "predsim, all of it pred": (lambda: LocalLoss(balance=0.0), heads(predsim(0.0))),
    "pred": (lambda: LocalLoss(loss="pred"), heads(PRED)),
    "sim": (lambda: LocalLoss(loss="sim"), heads(SIM)),
    "mono": (MonoForward, heads(goodness)),
    "dgl": (DecoupledGreedy, heads(greedy(3, 2))),
    "dgl, shallow": (lambda: DecoupledGreedy(convolutions=1, hidden=0), heads(greedy(1, 0))),
    "infopro": (lambda: InfoPro(width=9), heads(kept_and_told("contrast"))),
    "infopro, loss": (
        lambda: InfoPro(width=9, task="loss", reconstruction=(0.5, 2.0), supervision=(2.0, 0.7)),
        heads(kept_and_told("loss", (0.5, 2.0), (2.0, 0.7))),
    ),
    "auglocal": (AugLocal, shortcut(2)),
    "auglocal, deep": (lambda: AugLocal(depth=4, pyramid=0.25), shortcut(4, 0.25)),
    "auglocal, alone": (lambda: AugLocal(depth=1), shortcut(1)),
}
ONE_EACH = ["predsim", "mono", "dgl", "infopro", "infopro, loss", "auglocal, deep"]


def detached(values):
    return tuple(v.detach() for v in values) if isinstance(values, tuple) else values.detach()


def listed(values):
    return list(values) if isinstance(values, tuple) else [values]


def losses_of(formula, model, networks, x, t, loss):
    """The loss of each block on a detached input, the top one's last."""
    count, borders, made, values = len(list(model.children())), [], [], x
    for index in range(count):
        borders.append(listed(values))
        out = run(model, index, values)
        made.append(listed(out))
        values = detached(out)
    about = {"count": count, "borders": borders, "x": x, "t": t, "loss": loss, "model": model, "scores": values.shape[1:]}
    found = [formula(SimpleNamespace(index=i, **about), made[i], networks[i]) for i in range(count - 1)]
    return [*found, loss(made[-1][0], t)]


def networks_of(learner):
    """Copies of the auxiliary networks' parameters, as leaves."""
    return [{n: p.detach().clone().requires_grad_() for n, p in c.auxiliary.named_parameters()} for c in learner.cells[:-1]]


def flat(model, networks):
    found = {f"model.{name}": p for name, p in model.named_parameters()}
    return found | {f"{i}.{name}": p for i, one in enumerate(networks) for name, p in one.items()}


def assert_near(found, wanted, tolerance=1e-6):
    """Equal up to a part of each tensor's largest entry; parameters that cannot matter (before BatchNorm) up to that of all."""
    assert found.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        size = max(float(gradient.abs().max()), 1e-4 * largest)
        assert float((found[name] - gradient).abs().max()) <= tolerance * size, name


def assert_descends(rule, formula, make, x, t, loss, tolerance=1e-6, steps_on=None):
    """One step of plain descent takes the gradient of the written losses off every parameter, and reports these losses."""
    learner, model = learner_of(built(make), rule, x, loss, auxiliary_optimizer=descent), built(make)
    x, t = steps_on or (x, t)
    networks = networks_of(learner)
    losses = losses_of(formula, model, networks, x, t, loss)
    leaves = flat(model, networks)
    found = torch.autograd.grad(sum(losses), list(leaves.values()), allow_unused=True, materialize_grads=True)
    result = learner.step(x, t)
    after = flat(learner.model, networks_of(learner))
    taken = {name: (leaves[name] - after[name]).detach() for name in leaves}
    assert_near(taken, dict(zip(leaves, found, strict=True)), tolerance)
    assert result.loss == pytest.approx(losses[-1].item(), rel=tolerance)
    reported = [result.auxiliary[i].item() for i in range(len(losses) - 1)]
    assert reported == pytest.approx([one.item() for one in losses[:-1]], rel=tolerance)
    return taken


# ---- 1: gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_blocks_and_auxiliary_networks_descend_the_written_loss(name, kind):
    rule, formula = RULES[name]
    taken = assert_descends(rule(), formula, *KINDS[kind])
    assert all(bool(g.any()) for name, g in taken.items() if name.startswith("model"))


@settings(deadline=None, max_examples=6)
@given(data=st.data())
@pytest.mark.parametrize("name", ONE_EACH)
def test_they_do_so_for_any_sizes(name, data):
    size = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kind, samples, classes, seed = (
        data.draw(st.sampled_from(["vectors", "images", "sequences"])),
        size(2, 7),
        size(2, 5),
        size(0, 99),
    )
    if kind == "vectors":
        into, widths = size(1, 6), [size(2, 7) for _ in range(size(1, 4))]
        make, x = lambda: mlp(into, widths, classes), draw(samples, into, seed=seed)
    elif kind == "images":
        channels, widths, side = size(1, 3), (size(1, 6), size(1, 6)), 2 * size(1, 5)
        make, x = lambda: cnn(channels, widths, side, classes), draw(samples, channels, side, side, seed=seed)
    else:
        length, width = size(1, 4), 2 * size(1, 4)
        words = labels(samples, length + 1, classes=classes + 2, seed=seed)
        make, x = lambda: gpt(classes + 2, width), words[:, :-1]
    t, loss = (
        (words[:, 1:], token_loss) if kind == "sequences" else (labels(samples, classes=classes, seed=seed), F.cross_entropy)
    )
    rule, formula = RULES[name]
    assert_descends(rule(), formula, make, x, t, loss, tolerance=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_in_double_precision_all_digits_are_right(name):
    rule, formula = RULES[name]
    assert_descends(rule(), formula, *KINDS["vectors"], tolerance=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_three_steps_are_a_plain_loop_with_the_heads_own_adam(name):
    rule, formula = RULES[name]
    make, _, _, loss = KINDS["vectors"]
    learner = learner_of(built(make), dataclasses.replace(rule(), learning_rate=0.02), X, loss, cases.momentum)
    model, networks = built(make), networks_of(learner)
    assert type(learner.auxiliary_optimizer) is torch.optim.Adam
    own = cases.momentum(list(model.parameters()))
    helping = torch.optim.Adam([p for network in networks for p in network.values()], lr=0.02)
    for step in range(3):
        x, t = draw(10, 6, seed=step), labels(10, seed=step)
        own.zero_grad()
        helping.zero_grad()
        sum(losses_of(formula, model, networks, x, t, loss)).backward()
        own.step()
        helping.step()
        learner.step(x, t)
    ours, theirs = flat(learner.model, networks_of(learner)), flat(model, networks)
    noise = [
        p for p, kept in helping.state.items() if float(kept["exp_avg_sq"].max()) < 1e-20
    ]  # it does not matter before BatchNorm
    for name, p in theirs.items():
        if not any(p is one for one in noise):
            torch.testing.assert_close(ours[name].detach(), p.detach(), rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", RULES)
def test_heads_are_of_the_outputs_type_and_none_is_at_the_top(name):
    for dtype in (torch.float32, F64):
        learner = learner_of(mlp().to(dtype), RULES[name][0](), X.to(dtype))
        assert learner.cells[-1].auxiliary is None
        for cell in learner.cells[:-1]:
            kinds = {v.dtype for v in cell.auxiliary.state_dict().values() if v.is_floating_point()}
            assert kinds == {dtype}
        learner.step(X.to(dtype), Y)
        assert {p.dtype for p in learner.model.parameters()} == {dtype}
        assert learner.locks == {"forward"}


# ---- 2: similarity -----------------------------------------------------------------------------------------------------------


def similarity_in_numpy(x):
    out = np.zeros((len(x), len(x)))
    for i, one in enumerate(x):
        for j, other in enumerate(x):
            a, b = one - one.mean(), other - other.mean()
            size = np.linalg.norm(a) * np.linalg.norm(b)
            out[i, j] = a @ b / size if size else 0.0
    return out


@settings(deadline=None, max_examples=25)
@given(m=st.integers(1, 7), d=st.integers(1, 9), seed=st.integers(0, 999), constant=st.booleans())
def test_similarity_is_the_cosine_of_centred_rows(m, d, seed, constant):
    x = draw(m, d, seed=seed)
    if constant:
        x[0] = 0.5  # has no direction once its mean is off
    np.testing.assert_allclose(similarity(x), similarity_in_numpy(x.numpy()), atol=1e-12)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(similarity(x).sum(), x)
    assert bool(gradient.isfinite().all())


SHAPES = st.one_of(
    st.tuples(st.integers(1, 9)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)),
)


@settings(deadline=None, max_examples=30)
@given(m=st.integers(1, 5), shape=SHAPES, seed=st.integers(0, 999))
def test_images_of_more_than_three_channels_are_compared_by_deviations(m, shape, seed):
    x = draw(m, *shape, seed=seed)
    wanted = x.numpy().reshape(m, -1)
    if len(shape) == 3 and shape[0] > 3 and shape[1] * shape[2] > 1:
        wanted = x.numpy().reshape(m, shape[0], -1).std(2, ddof=1)
    np.testing.assert_allclose(features(x), wanted, atol=1e-12)


def test_channels_without_deviation_have_finite_gradients():
    x = torch.zeros(3, 5, 2, 2, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(similarity(features(x)).sum(), x)
    assert not gradient.any()


@pytest.mark.parametrize("name", ["predsim", "sim", "pred", "mono", "dgl", "infopro, loss", "auglocal"])
@pytest.mark.parametrize("kind", ["vectors", "sequences"])
def test_ignored_labels_are_rows_of_zeros_and_not_predicted(name, kind):
    make, x, t, loss = KINDS[kind]
    t = t.clone()
    t[2] = -100
    t[3:5].view(-1)[::2] = -100
    rule, formula = RULES[name]
    assert_descends(rule(), formula, make, x, t, loss)


@pytest.mark.parametrize("rows", [2, 3, 7, 24, 25, 26])
def test_places_of_sequences_are_thinned_to_so_many_rows(rows):
    """25 places: every ceil(25 / rows)-th counts."""
    rule = LocalLoss(loss="sim", rows=rows)
    make, x, t, loss = KINDS["sequences"]
    counted = []

    def formula(s, y, p):
        places, wanted = (y @ next(p).T).flatten(0, 1), one_hot(s.t, 7).flatten(0, 1)
        chosen = [i for i in range(25) if i % math.ceil(25 / rows) == 0]
        counted.append(len(chosen))
        return (cosines(places[chosen]) - cosines(wanted[chosen])).square().mean()

    assert_descends(rule, heads(formula), make, x, t, loss, tolerance=1e-5)
    assert max(counted) <= rows


NUMBERS = {
    "rows": (lambda: mlp(out=3), X, draw(10, 3, seed=3), F.mse_loss),
    "images": (
        lambda: nn.Sequential(*mlp()[:3], nn.Sequential(nn.Linear(7, 18), nn.Unflatten(1, (2, 3, 3)))),
        X,
        draw(10, 2, 3, 3, seed=3),
        F.mse_loss,
    ),
    "rows at each place": (
        lambda: nn.Sequential(*gpt()[:4], nn.Linear(8, 3)),
        WORDS,
        draw(5, 6, 3, seed=3),
        F.mse_loss,
    ),
}


@pytest.mark.parametrize("name", ["predsim", "sim", "pred", "mono", "dgl", "infopro, loss", "auglocal"])
@pytest.mark.parametrize("targets", NUMBERS)
def test_real_valued_targets_are_compared_as_they_are(name, targets):
    rule, formula = RULES[name]
    assert_descends(rule(), formula, *NUMBERS[targets])


def test_a_real_number_for_each_sample_is_a_row_of_one():
    """Such a row has no direction once its mean is off: S(t) = 0."""

    def formula(s, y, p):
        return cosines(y @ next(p).T).square().mean()

    loss = lambda scores, t: F.mse_loss(scores[:, 0], t)  # noqa: E731
    assert_descends(LocalLoss(loss="sim"), heads(formula), lambda: mlp(out=1), X, draw(10, seed=3), loss)


def test_a_real_number_for_each_place_is_a_row_of_one():
    def formula(s, y, p):
        return cosines((y @ next(p).T).flatten(0, 1)).square().mean()

    loss = lambda scores, t: F.mse_loss(scores[..., 0], t)  # noqa: E731
    make = lambda: nn.Sequential(*gpt()[:4], nn.Linear(8, 1))  # noqa: E731
    assert_descends(LocalLoss(loss="sim"), heads(formula), make, WORDS, draw(5, 6, seed=3), loss)


def test_maps_of_labels_are_compared_label_by_label():
    """A class for each pixel: one-hot rows are flattened, for they are no channels."""

    def make():
        return nn.Sequential(nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.Tanh()), nn.Conv2d(5, CLASSES, 1))

    x, t = draw(6, 1, 5, 5), labels(6, 5, 5)

    def formula(s, y, p):
        wanted = cosines(one_hot(s.t, CLASSES).flatten(1))
        return (cosines(deviations(F.conv2d(y, next(p), padding=1))) - wanted).square().mean()

    assert_descends(LocalLoss(loss="sim"), heads(formula), make, x, t, F.cross_entropy)


def test_classifiers_see_2048_pooled_features():
    def make():
        top = nn.Sequential(nn.Flatten(), nn.Linear(2 * 64, CLASSES))
        return nn.Sequential(nn.Conv2d(1, 33, 3, padding=1), nn.Conv2d(33, 2, 3, padding=1), top)

    x = draw(4, 1, 8, 8)
    assert_descends(LocalLoss(loss="pred"), heads(PRED), make, x, labels(4), F.cross_entropy)
    (head,) = learner_of(built(make), LocalLoss(loss="pred"), x).cells[0].auxiliary
    assert isinstance(head.classifier, Head)
    assert head.classifier.linear.in_features == 33 * 7 * 7


def test_classifiers_start_at_zero_so_blocks_rest_for_a_step():
    learner = learner_of(mlp().double(), LocalLoss(loss="pred"), X, scatter=False)
    before = cases.copy_of(learner.model)
    result = learner.step(X, Y)
    assert [value.item() for value in result.auxiliary.values()] == pytest.approx([math.log(CLASSES)] * 3)
    for index in range(3):
        assert_same(cases.copy_of(learner.model[index]), {k[2:]: v for k, v in before.items() if k[0] == str(index)})
    assert bool(learner.model[3].weight.ne(before["3.weight"]).any())


# ---- 3: InfoPro --------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    m=st.integers(1, 8),
    d=st.integers(1, 5),
    temperature=st.sampled_from([0.07, 0.5, 3.0]),
    classes=st.integers(1, 9),
    ignored=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_contrast_is_the_double_sum(m, d, temperature, classes, ignored, seed):
    """Those who are alone in their class, or in none, count as 0, but are told apart from by all others."""
    z, t = F.normalize(draw(m, d, seed=seed), dim=1), labels(m, classes=classes, seed=seed)
    t[:ignored] = -100
    rows, total = z.numpy(), 0.0
    for a in range(m):
        partners = [p for p in range(m) if p != a and t[p] == t[a] and t[a] >= 0]
        below = sum(np.exp(rows[a] @ rows[b] / temperature) for b in range(m) if b != a)
        for p in partners:
            total -= np.log(np.exp(rows[a] @ rows[p] / temperature) / below) / len(partners)
    assert contrast(z, t, temperature).item() == pytest.approx(total / m, rel=1e-9, abs=1e-12)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(contrast(z, t, temperature), z)
    (wanted,) = torch.autograd.grad(supervised_contrast(z, t, temperature) + 0 * z.sum(), z)
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "t", [torch.arange(10), torch.full((10,), 3), torch.tensor([-100, -100, 0, 1, 2, 3, 0, -100, 2, 5])], ids=str
)
def test_blocks_descend_the_contrast_whatever_the_classes(t):
    loss = lambda scores, t: F.cross_entropy(scores, t)  # noqa: E731
    make = lambda: mlp(out=12)  # noqa: E731
    rule = InfoPro(width=9, temperature=0.4, reconstruction=(0.0, 0.0))
    formula = heads(kept_and_told("contrast", (0.0, 0.0), temperature=0.4))
    taken = assert_descends(rule, formula, make, X, t, loss)
    assert bool(taken["model.0.0.weight"].any()) == (t.unique().numel() < 10)


@pytest.mark.parametrize("count", [2, 3, 4, 6])
@pytest.mark.parametrize(("keep", "tell"), [((1.0, 0.0), (1.0, 1.0)), ((0.25, 3.0), (0.0, 2.0)), ((0.0, 1.0), (4.0, 0.5))])
def test_weights_go_evenly_from_the_first_local_block_to_the_last(count, keep, tell):
    rule = InfoPro(width=5, task="loss", reconstruction=keep, supervision=tell)
    make = lambda: mlp(widths=(7,) * (count - 1))  # noqa: E731
    assert_descends(rule, heads(kept_and_told("loss", keep, tell)), make, X, Y, F.cross_entropy)
    learner = learner_of(built(make), rule, X)
    weights = np.linspace(*keep, count - 1)
    assert [cell.auxiliary[0].decoder is not None for cell in learner.cells[:-1]] == [bool(weight) for weight in weights]


@pytest.mark.parametrize("shift", [(1.0, 0.0), (7.0, -3.0), (0.0, 2.0)])
def test_images_are_brought_back_as_0_to_1_whatever_their_range(shift):
    """(0, 2) is one value all over, which counts as 0."""
    make, x, t, loss = KINDS["images"]
    rule = InfoPro(width=5, task="loss", reconstruction=(1.0, 1.0), supervision=(0.0, 0.0))
    formula = heads(kept_and_told("loss", (1.0, 1.0), (0.0, 0.0)))
    assert_descends(rule, formula, make, shift[0] * x + shift[1], t, loss)


@pytest.mark.parametrize("kind", ["sequences", "vectors", "images"])
def test_decoders_are_there_for_real_inputs_with_a_weight(kind):
    make, x, _, loss = KINDS[kind]
    for ends, wanted in (((1.0, 1.0), kind != "sequences"), ((0.0, 0.0), False)):
        learner = learner_of(built(make), InfoPro(width=5, task="loss", reconstruction=ends), x, loss)
        decoders = [head.decoder for cell in learner.cells[:-1] for head in cell.auxiliary]
        assert {decoder is not None for decoder in decoders} == {wanted}


@pytest.mark.parametrize("t", [draw(10, 4), labels(10, 4).double(), draw(10)], ids=["rows", "whole", "numbers"])
def test_contrast_of_what_are_no_classes_is_refused_and_nothing_learnt(t):
    learner = learner_of(mlp().double(), InfoPro(width=5), X, lambda scores, t: scores.square().mean() + 0 * t.sum())
    before = learner.state_dict()
    with pytest.raises(ValueError, match=r'these targets are no class numbers of shape \(batch,\): set task="loss"') as error:
        learner.step(X, t)
    assert "\n" not in str(error.value)
    assert_same(learner.state_dict(), before)


# ---- 4: AugLocal -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(count=st.integers(2, 30), part=st.floats(0, 1), depth=st.integers(1, 40), pyramid=st.floats(0, 1))
def test_depths_fall_and_copies_are_taken_at_even_steps(count, part, depth, pyramid):
    index = min(int(part * (count - 1)), count - 2)
    rule, place = AugLocal(depth=depth, pyramid=pyramid), lf.Place(index, count)
    exact = depth_of(index, count, depth, pyramid)
    assert abs(rule.depth_at(place) - exact) <= Fraction(1, 2) + Fraction(1, 10**9)
    assert 1 <= rule.depth_at(place) <= depth
    chosen = rule.chosen(place)
    assert chosen == copies_of(index, count, rule.depth_at(place))
    assert chosen[-1] == count - 1
    assert len(chosen) == min(rule.depth_at(place), count - 1 - index)
    gaps = np.diff(chosen[:-1])
    assert not len(gaps) or 1 <= min(gaps) <= max(gaps) <= min(gaps) + 1
    assert all(index < block < count for block in chosen)


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize(("depth", "pyramid"), [(1, 0.5), (2, 0.0), (5, 0.5), (6, 1.0), (9, 0.3)])
def test_depths_are_the_formula_s(index, depth, pyramid):
    down = pyramid * index / 8
    assert AugLocal(depth=depth, pyramid=pyramid).depth_at(lf.Place(index, 10)) == max(1, round(depth * (1 - down) + down))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_begin_as_the_blocks_and_have_weights_of_their_own(kind):
    make, x, t, loss = KINDS[kind]
    model = built(make)
    parameters = dict(model.named_parameters())
    learner = learner_of(model, AugLocal(depth=9, pyramid=0.0), x, loss, scatter=False)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert parameters.keys() == dict(model.named_parameters()).keys()
    own = [p for cell in learner.cells[:-1] for p in cell.auxiliary.parameters()]
    places = [p.untyped_storage().data_ptr() for p in (*parameters.values(), *own)]
    assert len(set(places)) == len(places)
    for index, cell in enumerate(learner.cells[:-1]):
        assert len(cell.auxiliary.copies) == len(learner.cells) - 1 - index
        for twin, child in zip(cell.auxiliary.copies, list(model.children())[index + 1 :], strict=True):
            assert_same([p.detach() for p in twin.parameters()], [p.detach() for p in child.parameters()])
    before, buffers = [p.detach().clone() for p in own], {name: b.clone() for name, b in model.named_buffers()}
    learner.optimizer.param_groups[0]["lr"] = 0.0
    learner.step(x, t)
    assert all(cases.differs(a, b.detach()) for a, b in zip(before, own, strict=True))
    assert_same(dict(model.named_parameters()), dict(built(make).named_parameters()))
    for name in buffers:
        if name.endswith("num_batches_tracked"):
            assert model.get_buffer(name) == buffers[name] + 1  # copies keep statistics of their own


def shapes_of(cell):
    return [[tuple(p.shape) for p in adapter.parameters()] for adapter in cell.auxiliary.adapters]


def test_adapters_of_images_pool_and_map_channels():
    """Blocks hand up 3 x 6 x 6, then 5 x 3 x 3, then 36 numbers."""
    make, x, _, _ = KINDS["images"]
    cells = learner_of(built(make), AugLocal(depth=9, pyramid=0.0), x).cells
    assert [shapes_of(cell) for cell in cells[:-1]] == [[[], [], []], [[], []], [[]]]
    cells = learner_of(built(make), AugLocal(depth=2, pyramid=0.0), x).cells
    assert [shapes_of(cell) for cell in cells[:-1]] == [[[(5, 3, 1, 1), (5,)], []], [[], []], [[]]]
    assert cells[0].auxiliary.adapters[0]([draw(2, 3, 6, 6)]).shape == (2, 5, 3, 3)
    cells = learner_of(built(make), AugLocal(depth=1), x).cells
    assert shapes_of(cells[0]) == [[(36, 108), (36,)]]


def test_adapters_of_sequences_map_features_at_each_place():
    make, x, _, loss = KINDS["sequences"]
    cells = learner_of(built(make), AugLocal(depth=2), x, loss).cells
    assert [shapes_of(cell) for cell in cells[:-1]] == [[[(8, 6), (8,)], []], [[], []], [[], []], [[]]]


def test_adapters_of_residual_networks_join_stages():
    """ResNet-20 on 8 x 8: 16, 32 and 64 channels of 8, 4 and 2 a side."""
    model = lf.models.resnet20((1, 8, 8), CLASSES).double()
    learner = learner_of(model, AugLocal(depth=3, pyramid=0.0), draw(4, 1, 8, 8), optimizer=cases.sgd)
    assert [shapes_of(cell) for cell in learner.cells[:-1]] == [[[], [(32, 16, 1, 1), (32,)], []], [[], [], []], [[], []], [[]]]
    before = cases.copy_of(model)
    learner.step(draw(4, 1, 8, 8), labels(4))
    assert all(cases.differs(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", RULES)
def test_blocks_in_place_learn_as_others_do(name):
    twins = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = cases.in_place()
        for layer in model.modules():
            if hasattr(layer, "inplace"):
                layer.inplace = in_place
        learner = learner_of(model.double(), RULES[name][0](), X, optimizer=cases.sgd)
        results = [learner.step(draw(10, 6, seed=step), labels(10, seed=step)) for step in range(3)]
        twins.append(([(r.loss, r.auxiliary) for r in results], dict(model.state_dict())))
    assert_same(*twins)


class Rereads(nn.Module):
    """Whole numbers go past a block to a later one."""

    def __init__(self):
        super().__init__()
        self.words, self.mix, self.more, self.head = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Embedding(7, 5), nn.Linear(5, 4)

    def forward(self, words):
        h = torch.tanh(self.mix(self.words(words)))
        return self.head(h + self.more(words)).mean(1)


def test_whole_numbers_across_borders_are_refused():
    x = labels(6, 3, classes=7)
    with pytest.raises(ValueError, match=r"AugLocal cannot copy block 'mix': it is handed torch.int64 numbers") as error:
        learner_of(Rereads(), AugLocal(depth=4), x)
    assert "\n" not in str(error.value)
    learner = learner_of(Rereads(), AugLocal(depth=1), x)  # copies the last block alone, which is handed real numbers
    assert sorted(learner.step(x, labels(6)).auxiliary) == [0, 1, 2]


class Reshapes(nn.Module):
    """The size of the batch is read off at the bottom and used at the top."""

    def __init__(self):
        super().__init__()
        self.low, self.middle, self.head = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3), nn.Linear(2 * 4 * 4, 4)

    def forward(self, images):
        batch = images.shape[0]
        h = torch.tanh(self.middle(torch.tanh(self.low(images))))
        return self.head(h.reshape(batch, -1))


def test_the_size_of_a_batch_may_cross_a_border():
    model = Reshapes().double()
    learner = learner_of(model, AugLocal(depth=4), draw(3, 1, 8, 8), optimizer=cases.sgd)
    before = cases.copy_of(model)
    for count in (3, 10, 7):
        assert sorted(learner.step(draw(count, 1, 8, 8), labels(count)).auxiliary) == [0, 1]
    assert all(cases.differs(before[name], p) for name, p in model.named_parameters())


# ---- 5: all ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normalised", "images"])
@pytest.mark.parametrize("name", RULES)
def test_the_top_block_learns_as_backprop_s_on_the_same_inputs(name, kind):
    make, x, _, loss = KINDS[kind]
    learner = learner_of(built(make), RULES[name][0](), x, loss, cases.adam)
    top = built(make)[-1]
    reference = cases.adam(list(top.parameters()))
    for step in range(3):
        x, t = draw(*x.shape, seed=step), labels(10, seed=step)
        with torch.no_grad():
            h = copy.deepcopy(learner.model[:-1])(x)
        reference.zero_grad()
        wanted = loss(top(h), t)
        wanted.backward()
        reference.step()
        assert learner.step(x, t).loss == wanted.item()
        assert_same(dict(learner.model[-1].state_dict()), dict(top.state_dict()))


@pytest.mark.parametrize("name", RULES)
def test_one_block_alone_is_backprop(name):
    learner, model = learner_of(built(mlp), RULES[name][0](), X, blocks=1, optimizer=cases.adam), built(mlp)
    assert learner.auxiliary_optimizer is None
    optimizer = cases.adam(list(model.parameters()))
    for step in range(3):
        x, t = draw(10, 6, seed=step), labels(10, seed=step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), t)
        loss.backward()
        optimizer.step()
        assert learner.step(x, t).loss == loss.item()
    assert_same(dict(learner.model.state_dict()), dict(model.state_dict()))


def small_images(side):
    return lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(5, CLASSES),
    )


SINGLE = {
    "vectors": (mlp, X, Y, F.cross_entropy),
    "sequences": KINDS["sequences"],
    "skips": (UNet, draw(10, 1, 8, 8), Y, F.cross_entropy),
    **{f"images of {side}": (small_images(side), draw(10, 1, side, side), Y, F.cross_entropy) for side in (1, 4, 8)},
}


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("name", ONE_EACH)
def test_a_batch_of_one_sample_is_learnt(name, kind):
    """What BatchNorm cannot normalise by the sample itself, it does by running statistics."""
    make, x, t, loss = SINGLE[kind]
    rule, formula = RULES[name]
    assert_descends(rule(), formula, make, x, t, loss, steps_on=(x[:1], t[:1]))


REFUSED = [
    *((make, {"learning_rate": rate}, "learning_rate=") for make in (LocalLoss, MonoForward, AugLocal) for rate in (0.0, -1.0)),
    *((make, {"learning_rate": math.nan}, "learning_rate=nan") for make in (DecoupledGreedy, InfoPro)),
    *((LocalLoss, {"balance": value}, "balance=") for value in (-0.1, 1.1, math.nan)),
    *((LocalLoss, {"rows": value}, "rows=") for value in (1, 0, -3)),
    (LocalLoss, {"loss": "predsin"}, "unknown loss 'predsin': did you mean 'predsim'"),
    (DecoupledGreedy, {"convolutions": -1}, "convolutions=-1: give 0 or more"),
    (DecoupledGreedy, {"hidden": -1}, "hidden=-1: give 0 or more"),
    (InfoPro, {"task": "contras"}, "unknown task 'contras': did you mean 'contrast'"),
    *((InfoPro, {"temperature": value}, "temperature=") for value in (0.0, -1.0, math.nan)),
    (InfoPro, {"width": 0}, "width=0: give 1 or more"),
    *(
        (InfoPro, {name: ends}, f"{name}=")
        for name in ("reconstruction", "supervision")
        for ends in ((-1.0, 1.0), (1.0, -1.0), (math.nan, 1.0), (1.0, math.nan))
    ),
    (AugLocal, {"depth": 0}, "depth=0: give 1 or more"),
    *((AugLocal, {"pyramid": value}, "pyramid=") for value in (-0.1, 1.5, math.nan)),
]


@pytest.mark.parametrize(("make", "fields", "match"), REFUSED, ids=str)
def test_numbers_out_of_range_are_refused_in_one_line(make, fields, match):
    with pytest.raises(ValueError, match=match) as error:
        make(**fields)
    assert "\n" not in str(error.value)


def with_nan(x):
    x = x.clone()
    x[3] = math.nan
    return x


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
@pytest.mark.parametrize("kind", ["normalised", "images"])
@pytest.mark.parametrize("name", ONE_EACH)
def test_nothing_is_learnt_from_a_batch_that_is_refused(name, kind, schedule):
    """Running statistics of auxiliary networks are as before, too, and the next batch is learnt as if nothing had been."""
    make, x, t, loss = KINDS[kind]
    learners = [learner_of(built(make), RULES[name][0](), x, loss, cases.momentum, schedule=schedule) for _ in range(2)]
    for learner in learners:
        learner.step(x, t)
        learner.drain()
    before = learners[0].state_dict()
    # In a pipeline blocks that contrast have learnt when the loss says that there is no such class.
    bad = [(with_nan(x), t, "is not finite|the loss is nan")]
    # In a pipeline blocks that contrast have learnt when the loss says that there is no such class.
    bad += [(x, t + 9, "does not accept")] * (schedule == "lockstep" or name != "infopro")
    for *batch, said in bad:
        with pytest.raises(ValueError, match=said) as error:
            learners[0].step(*batch)
        assert "\n" not in str(error.value)
        assert_same(learners[0].state_dict() | {"first": 0}, before | {"first": 0})
    for learner in learners:
        learner.step(x, t)
        learner.drain()
    assert_same(*(dict(learner.model.state_dict()) for learner in learners))


@pytest.mark.parametrize("frozen", range(4))
@pytest.mark.parametrize("name", ONE_EACH)
def test_frozen_blocks_stay_and_the_others_learn(name, frozen):
    """A frozen one has no auxiliary network that learns; a copy of it is frozen, or not, but serves whoever is below."""
    model = built(mlp)
    model[frozen].requires_grad_(False)
    learner = learner_of(model, RULES[name][0](), X, scatter=False)
    for _ in range(2):  # heads that start at 0 tell their blocks nothing before the second
        found = learner.step(X, Y).auxiliary
    assert sorted(found) == [index for index in range(3) if index != frozen]
    moved = [cases.differs(list(model[i].parameters()), list(built(mlp)[i].parameters())) for i in range(4)]
    assert moved == [index != frozen for index in range(4)]


@pytest.mark.parametrize("name", RULES)
def test_under_autocast_losses_are_taken_in_float32_of_the_rounded_outputs(name, monkeypatch):
    seen, original = [], local.LocalRule.credit

    def spied(self, context):
        credit = original(self, context)
        seen.append((context.place.index, context.outputs, credit))
        return credit

    monkeypatch.setattr(local.LocalRule, "credit", spied)
    rule, formula = RULES[name]
    make, _, _, loss = KINDS["vectors"]
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        learner = learner_of(built(make).float(), rule(), x)
        networks = [{n: p.to(F64) for n, p in network.items()} for network in networks_of(learner)]
        learner.step(x, Y)
    model = built(make)
    borders = [[v] for v in (X, *(draw(10, width) for width in (10, 8, 7)))]
    lower = [one for one in seen if one[0] < 3]
    assert sorted(index for index, _, _ in lower) == [0, 1, 2]
    for index, (y,), (credit,) in lower:
        assert y.dtype == torch.bfloat16
        leaf = y.to(F64).requires_grad_()
        about = SimpleNamespace(index=index, count=4, borders=borders, x=X, t=Y, loss=loss, model=model, scores=(CLASSES,))
        (wanted,) = torch.autograd.grad(formula(about, [leaf], networks[index]), leaf)
        assert_near({"credit": credit.to(F64)}, {"credit": wanted}, tolerance=1e-2)
    parameters = [*learner.model.parameters(), *(p for c in learner.cells[:-1] for p in c.auxiliary.parameters())]
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in parameters)


@pytest.mark.parametrize(
    ("model", "schedule"), [("cnn", cases.SCHEDULES[0]), ("unet", cases.SCHEDULES[3])], ids=["cnn", "unet"]
)
@pytest.mark.parametrize("name", ONE_EACH)
def test_resume_is_bit_identical(name, model, schedule, tmp_path):
    case = cases.MODELS[model]
    batches = case.batches(5)
    whole = cases.learner_for(case, RULES[name][0](), schedule=schedule)
    torch.manual_seed(3)
    for x, y in batches[:3]:
        whole.step(x, y)
    checkpoint.save(tmp_path / "middle", whole.state_dict())
    other = cases.learner_for(case, RULES[name][0](), schedule=schedule, seed=1)
    ends = [[whole.step(x, y) for x, y in batches[3:]]]
    whole.drain()
    wanted = whole.state_dict()
    other.load_state_dict(checkpoint.load(tmp_path / "middle"))
    ends.append([other.step(x, y) for x, y in batches[3:]])
    assert_same(*([(r.loss, r.auxiliary) for r in results] for results in ends))
    other.drain()
    assert_same(other.state_dict(), wanted)


class Saved:
    """A tensor that autograd saved."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("kind", ["normalised", "images"])
@pytest.mark.parametrize("name", RULES)
def test_nothing_of_a_block_is_kept_when_the_next_one_runs(name, kind):
    make, x, t, loss = KINDS[kind]
    learner, alive, counts = learner_of(built(make), RULES[name][0](), x, loss), [], []

    def pack(tensor):
        alive.append(weakref.ref(saved := Saved(tensor)))
        return saved

    for block in learner.model:
        first = block if isinstance(block, nn.Linear) else block[0]
        first.register_forward_pre_hook(lambda *_: counts.append(sum(one() is not None for one in alive)))
    learner.step(x, t)  # looks once at model and loss before
    counts.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        learner.step(x, t)
    assert counts == [0, 0, 0, 0]
    assert len(alive) > 8
    assert all(one() is None for one in alive)


# ---- 6: learning -------------------------------------------------------------------------------------------------------------

DIGITS = {
    "predsim": LocalLoss,
    "pred": lambda: LocalLoss(loss="pred"),
    "sim": lambda: LocalLoss(loss="sim"),
    "mono": MonoForward,
    "dgl": DecoupledGreedy,
    "infopro": InfoPro,
    "infopro, loss": lambda: InfoPro(task="loss"),
    "auglocal": AugLocal,
}


@pytest.mark.parametrize("name", DIGITS)
def test_digits_are_told_apart(name):
    """Two hidden layers, 4 epochs."""
    data = lf.data.load("digits")
    torch.manual_seed(0)
    learner = lf.convert(
        lf.models.normalised_mlp(data.input_shape, 10, hidden=(64, 64)),
        DIGITS[name](),
        loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        example_input=data.train.inputs[:2],
    )
    lf.Trainer(learner).fit(lf.data.TensorLoader(*data.train, batch_size=64, drop_last=True), epochs=4)
    assert lf.evaluate(learner, [data.test]).accuracy > 0.9


# ---- right below a plain readout -----------------------------------------------------------------------------------------------


def pooling(top=None):
    convolutions = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.Tanh()) for a, b in ((1, 4), (4, 5))]
    return nn.Sequential(*convolutions, top or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, CLASSES)))


@pytest.mark.parametrize("rule", [LocalLoss(loss="pred"), DecoupledGreedy()])
def test_the_block_below_a_pooling_readout_learns_for_that_readout(rule):
    x, t = KINDS["images"][1:3]
    model = built(pooling)
    learner = learner_of(model, rule, x, scatter=False)
    twin = learner.cells[1].auxiliary[0]
    twin = twin.classifier if isinstance(rule, LocalLoss) else twin
    assert [p.shape for p in twin.parameters()] == [p.shape for p in model[2].parameters()]
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    weight, bias = (p.detach().clone() for p in twin.parameters())
    out = model[1](model[0](x).detach())
    wanted = torch.autograd.grad(F.cross_entropy(out.mean((2, 3)) @ weight.T + bias, t), list(model[1].parameters()))
    found = learner.gradients(x, t)
    for name, gradient in zip(("1.0.weight", "1.0.bias"), wanted, strict=True):
        torch.testing.assert_close(found[name], gradient)


def test_a_head_of_more_than_one_layer_is_no_readout():
    deep = nn.Sequential(nn.Flatten(), nn.Linear(180, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    for top in (deep, nn.Sequential(nn.Conv2d(5, CLASSES, 6), nn.Flatten())):
        learner = learner_of(built(lambda top=top: pooling(copy.deepcopy(top))), DecoupledGreedy(), KINDS["images"][1])
        assert len(list(learner.cells[1].auxiliary.parameters())) == len(list(learner.cells[0].auxiliary.parameters()))


def test_a_readout_that_sees_all_leaves_the_classifier_as_the_paper_has_it():
    model = built(lambda: pooling(nn.Sequential(nn.Flatten(), nn.Linear(180, CLASSES))))
    learner = learner_of(model, LocalLoss(loss="pred"), KINDS["images"][1], scatter=False)
    assert all(isinstance(cell.auxiliary[0].classifier, Head) for cell in learner.cells[:-1])
