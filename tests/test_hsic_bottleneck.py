"""The HSIC bottleneck as a rule: gradients against autograd of the paper's formula, locality, readouts, models, recipes."""

import itertools
import weakref

import cases
import pytest
import torch
from cases import assert_same, descent, draw, labels
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree import checkpoint, models
from lockfree.fields import parse_fields
from lockfree.heads import Head
from lockfree.readouts import order_of, order_on_evaluated

HSIC = lf.rules.HSICBottleneck
F64 = torch.float64
CLASSES = cases.CLASSES


@pytest.fixture(autouse=True)
def _own_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def learner_of(model, rule, x, loss=F.cross_entropy, optimizer=descent, **more):
    return lf.convert(model, rule, loss=loss, optimizer=optimizer, example_input=x, **more)


def gradients(learner, x, y):
    """What one step of plain descent with rate 1 took off each parameter; it is put on again."""
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.step(x, y)
    after = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.model.load_state_dict(before, strict=False)
    return {name: before[name] - after[name] for name in before}


# ---- the paper's formulas, written naively -----------------------------------------------------------------------------------


def gaussian(rows, sigma, width=None):
    distances = (rows[:, None] - rows).square().sum(-1)
    if sigma is None:
        apart = distances.detach()[tuple(torch.tril_indices(len(rows), len(rows), -1))].sort().values
        return torch.exp(-distances / (apart[(len(apart) - 1) // 2] or apart.mean() or 1.0))
    return torch.exp(-distances / (2 * sigma**2 * (width or rows.shape[1])))


def similarity(kernel, rows, sigma, width=None):
    if kernel == "gaussian":
        return gaussian(rows, sigma, width)
    rows = rows / rows.norm(dim=1, keepdim=True) if kernel == "cosine" else rows
    return rows @ rows.T


def measure(objective, K, L, epsilon):
    m = len(K)
    if objective == "phsic":
        return ((K - K.mean()) * L).mean()
    H = torch.eye(m, dtype=F64) - 1 / m
    if objective == "hsic":
        return torch.trace(K @ H @ L @ H) / (m - 1) ** 2
    a, b = (H @ G @ H @ torch.inverse(H @ G @ H + epsilon * m * torch.eye(m, dtype=F64)) for G in (K, L))
    return torch.trace(a @ b)


def one_hot(numbers, classes):
    return F.one_hot(numbers.flatten(1) if numbers.dim() > 1 else numbers[:, None], classes).to(F64).flatten(1)


def flattened(x):
    """Rows of an input tree and the number of features; whole numbers are categories, a feature for each place."""
    parts = list(x.values()) if isinstance(x, dict) else [x]
    rows = [part.flatten(1).to(F64) if part.is_floating_point() else one_hot(part, 7) for part in parts]
    return torch.cat(rows, 1), sum(part[0].numel() for part in parts)


def naive(z, x, y, sigma, **settings):
    """The objective of one tensor of a block's output; labels are rows of 0 and 1, less their mean if classes are balanced."""
    of = {"objective": "nhsic", "kernel": "gaussian", "balance": 20.0, "epsilon": 1e-5} | settings
    targets = y.to(F64).reshape(len(y), -1) if y.is_floating_point() else one_hot(y, CLASSES) - 1 / CLASSES
    (inputs, width), size, found = flattened(x), min(of.get("block_size") or len(z), len(z)), []
    for start in range(0, len(z) - size + 1, size):
        part = slice(start, start + size)
        Z = similarity(of["kernel"], z[part].flatten(1), sigma)
        X = Z if of["objective"] == "phsic" else similarity(of["kernel"], inputs[part], of.get("sigma_x", sigma), width)
        Y = similarity(of["kernel"], targets[part], of.get("sigma_y", sigma))
        both = [measure(of["objective"], Z, other, of["epsilon"]) for other in (X, Y)]
        found.append(both[0] - of["balance"] * both[1])
    return sum(found) / len(found)


def in_sequence(children, x):
    """Runs blocks on detached inputs and returns what each hands up, a list of tensors a block."""
    made = []
    for block in children:
        out = block(x)
        made.append(list(out) if isinstance(out, tuple) else [out])
        x = tuple(t.detach() for t in out) if isinstance(out, tuple) else out.detach()
    return made


def naive_gradients(model, made, x, y, loss=F.cross_entropy, sigma=5.0, *, supervised=True, **settings):
    """Gradients of the sum of all blocks' objectives; blocks do not share a graph, so each gets its own."""
    total = loss(made[-1][0], y) if supervised else 0.0
    for tensors in made[: len(made) - supervised]:
        sigmas = sigma if isinstance(sigma, tuple) else (sigma,) * len(tensors)
        total = total + sum(naive(z, x, y, one, **settings) for z, one in zip(tensors, sigmas, strict=True))
    found = torch.autograd.grad(total, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def assert_near(found, wanted, tolerance=1e-6):
    """Equal up to a part of each tensor's largest entry; parameters that cannot matter (before BatchNorm) up to that of all."""
    assert found.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        size = max(float(gradient.abs().max()), 1e-4 * largest)
        assert float((found[name] - gradient).abs().max()) <= tolerance * size, name


# ---- 1: gradients ------------------------------------------------------------------------------------------------------------


def mlp(out=CLASSES):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU()),
        nn.Sequential(nn.Linear(10, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 7), nn.ELU()),
        nn.Linear(7, out),
    ).double()


class Skips(nn.Module):
    """What the first block made, the second and the third one need; the second hands it on as well."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        one = torch.tanh(self.stem(x))
        two = one + torch.tanh(self.first(one))
        return self.head(torch.tanh(self.second(two)) + one)

    def made(self, x):
        one = torch.tanh(self.stem(x))
        two = one.detach() + torch.tanh(self.first(one.detach()))
        three = torch.tanh(self.second(two.detach())) + one.detach()
        return [[one], [two], [three], [self.head(three.detach())]]


class Mixed(nn.Module):
    """Its forward takes a dictionary of real numbers and of categories."""

    def __init__(self):
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(7, 3), nn.Linear(12, 8), nn.Linear(8, CLASSES)

    def forward(self, batch):
        h = torch.cat([self.words(batch["kinds"]).flatten(1), batch["features"]], dim=1)
        return self.head(torch.tanh(self.mix(h)))

    def made(self, batch):
        words = self.words(batch["kinds"]).flatten(1)
        hidden = torch.tanh(self.mix(torch.cat([words, batch["features"]], dim=1).detach()))
        return [[torch.cat([words, batch["features"]], dim=1)], [hidden], [self.head(hidden.detach())]]


def token_loss(scores, y):
    return F.cross_entropy(scores.flatten(0, 1), y.flatten())


def convolutional():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.Tanh(), nn.Flatten()),
        nn.Linear(45, CLASSES),
    )


def words():
    return nn.Sequential(
        nn.Sequential(nn.Embedding(7, 3), nn.Flatten()), nn.Sequential(nn.Linear(15, 6), nn.Tanh()), nn.Linear(6, 4)
    )


def sequences():
    return nn.Sequential(nn.Sequential(nn.Linear(6, 9), nn.Tanh()), nn.Sequential(nn.Linear(9, 12), nn.Unflatten(1, (3, 4))))


def beside():
    return models.side_by_side((1, 2, 3), CLASSES, hidden=(9, 7), count=3, activation="tanh")


X = draw(10, 6)
GRADIENTS = {
    "mlp": (mlp, X, labels(10), F.cross_entropy, {}),
    "cnn": (convolutional, draw(10, 1, 6, 6), labels(10), F.cross_entropy, {}),
    "residual": (Skips, X, labels(10), F.cross_entropy, {}),
    "side by side": (beside, draw(10, 1, 2, 3), labels(10), F.cross_entropy, {"sigma": (1.0, 5.0, 0.7)}),
    "side by side, one sigma": (beside, draw(10, 1, 2, 3), labels(10), F.cross_entropy, {"sigma": 2.0}),
    "dictionary": (Mixed, {"features": draw(10, 6), "kinds": labels(10, 2, classes=7)}, labels(10), F.cross_entropy, {}),
    "words": (words, labels(10, 5, classes=7), labels(10, seed=3), F.cross_entropy, {}),
    "numbers": (lambda: mlp(3), X, draw(10, 3, seed=3), F.mse_loss, {}),
    "a number each": (lambda: mlp(1), X, draw(10, seed=3), lambda s, y: F.mse_loss(s[:, 0], y), {}),
    "sequences": (sequences, X, labels(10, 3), token_loss, {}),
}


def built(make):
    torch.manual_seed(0)
    return make().double()


@pytest.mark.parametrize("name", GRADIENTS)
def test_every_block_descends_the_paper_s_objective(name):
    make, x, y, loss, settings = GRADIENTS[name]
    found = gradients(learner_of(built(make), HSIC(balance=20.0, **settings), x, loss), x, y)
    model = built(make)
    made = model.made(x) if hasattr(model, "made") else in_sequence(model, x)
    assert_near(found, naive_gradients(model, made, x, y, loss, **settings))


SETTINGS = [
    *({"objective": objective, "sigma": sigma} for objective in ("nhsic", "hsic", "phsic") for sigma in (5.0, 0.8, None)),
    {"sigma_x": 1.0, "sigma_y": 0.3},
    {"objective": "hsic", "sigma_x": 1.0, "sigma_y": 0.3, "sigma": None},
    *({"kernel": kernel, "objective": objective} for kernel, objective in (("linear", "nhsic"), ("linear", "phsic"))),
    {"kernel": "cosine", "objective": "phsic", "balance": 2.0},
    {"readout": "one-hot"},
    {"readout": "heads"},
    {"balance": 0.0},
    {"balance": 300.0, "epsilon": 1e-2},
    *(
        {"block_size": size, "objective": objective}
        for size, objective in ((4, "nhsic"), (3, "hsic"), (2, "phsic"), (50, "nhsic"))
    ),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_setting_means_what_the_formula_says(settings):
    """Without a classifier the top block descends the objective, too."""
    found = gradients(learner_of(mlp(), HSIC(**{"balance": 20.0} | settings), X), X, labels(10))
    model, about = mlp(), {name: value for name, value in settings.items() if name != "readout"}
    made = in_sequence(model, X)
    assert_near(found, naive_gradients(model, made, X, labels(10), supervised="readout" not in settings, **about))


@pytest.mark.parametrize("name", ["mlp", "words"])
def test_in_double_precision_all_digits_are_right(name):
    """Labels and categories, too, are compared in the precision of what the blocks hand up."""
    make, x, y, loss, _ = GRADIENTS[name]
    found, model = gradients(learner_of(built(make), HSIC(balance=20.0), x, loss), x, y), built(make)
    assert_near(found, naive_gradients(model, in_sequence(model, x), x, y, loss), tolerance=1e-10)


@pytest.mark.parametrize("sigma", [5.0, None])
def test_a_batch_of_one_says_nothing_about_dependence(sigma):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    found = gradients(learner_of(model, HSIC(sigma=sigma), X[:2]), X[:1], labels(1))
    assert [bool(g.any()) for g in found.values()] == [False, False, True, True]


ODD = {
    "two": (X[:2], torch.arange(2)),
    "three": (X[:3], torch.arange(3)),
    "one class": (X, torch.ones(10, dtype=torch.int64)),
    "constant input": (torch.ones(10, 6, dtype=F64), labels(10)),
}


@pytest.mark.parametrize("sigma", [5.0, None])
@pytest.mark.parametrize("batch", ODD)
def test_small_and_one_sided_batches(batch, sigma):
    """One class: nothing to know, so the blocks forget the input. A constant input: nothing can be learnt from it."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()

    (x, y), model = ODD[batch], make()
    found = gradients(learner_of(make(), HSIC(balance=20.0, sigma=sigma), x), x, y)
    blocks = [nn.Sequential(*list(model)[i : i + 2]) for i in (0, 2, 4)]
    assert_near(found, naive_gradients(model, in_sequence(blocks, x), x, y, sigma=sigma))
    assert bool(found["0.weight"].abs().max() > 1e-9) == (batch != "constant input")


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
def test_optimizers_see_these_gradients(optimizer):
    """Momentum and Adam keep what they would in a plain loop over the formula."""
    make, model = cases.OPTIMIZERS[optimizer], mlp()
    learner, reference = learner_of(mlp(), HSIC(balance=20.0), X, optimizer=make), make(list(model.parameters()))
    for step in range(4):
        x, y = draw(10, 6, seed=step), labels(10, seed=step)
        learner.step(x, y)
        for name, gradient in naive_gradients(model, in_sequence(model, x), x, y).items():
            model.get_parameter(name).grad = gradient
        reference.step()
    mine, theirs = learner.optimizer.state_dict()["state"], reference.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for index, state in theirs.items():
        kept = {name: value for name, value in state.items() if value is not None}
        assert_near({name: mine[index][name] for name in kept}, kept, tolerance=1e-4)
    assert_near(dict(learner.model.state_dict()), dict(model.state_dict()), tolerance=1e-4)


# ---- 2: locality -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "count"), [(["2"], 2), (["0.1", "1.2", "3"], 4), (2, 2), (3, 3), (1, 1)])
def test_the_model_is_cut_where_it_is_told_and_learns_there(blocks, count):
    learner, model = learner_of(mlp(), HSIC(balance=20.0), X, blocks=blocks), mlp()
    assert len(learner.cells) == count
    leaves = {name: layer for name, layer in model.named_modules() if not list(layer.children())}
    pieces = [nn.Sequential(*(leaves[n] for n, _ in cell.block.layers() if n in leaves)) for cell in learner.cells]
    assert [id(layer) for piece in pieces for layer in piece] == [id(layer) for layer in leaves.values()]
    assert_near(gradients(learner, X, labels(10)), naive_gradients(model, in_sequence(pieces, X), X, labels(10)))


class Saved:
    """A tensor that autograd saved."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("settings", [{}, {"readout": "heads", "sigma": None}, {"features": 4, "objective": "hsic"}], ids=str)
def test_nothing_of_a_block_is_kept_when_the_next_one_runs(settings):
    learner, model = learner_of(mlp(), HSIC(**settings), X), None
    model, alive, counts = learner.model, [], []

    def pack(tensor):
        alive.append(weakref.ref(saved := Saved(tensor)))
        return saved

    for block in model:
        first = block if isinstance(block, nn.Linear) else block[0]
        first.register_forward_pre_hook(lambda *_: counts.append(sum(one() is not None for one in alive)))
    learner.step(X, labels(10))  # looks once at model and loss before
    counts.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        learner.step(X, labels(10))
    assert counts == [0, 0, 0, 0]
    assert len(alive) > 8
    assert all(one() is None for one in alive)


def deep(blocks, width=16):
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()) for _ in range(blocks - 1)]
    return nn.Sequential(*body, nn.Linear(width, CLASSES))


FACTORISATIONS = [
    (lambda: deep(5, 6), {}, X, 4 + 2),
    (lambda: deep(9, 6), {}, X, 8 + 2),
    (lambda: deep(5, 6), {"readout": "one-hot"}, X, 5 + 2),
    (lambda: deep(5, 6), {"block_size": 4}, X, 2 * (4 + 2)),
    (lambda: deep(5, 6), {"objective": "hsic"}, X, 0),
    (lambda: deep(5, 6), {"objective": "phsic"}, X, 0),
    (beside, {"sigma": (1.0, 2.0, 5.0)}, X.view(10, 1, 2, 3), 3 * 2 + 3 * 2),
    (beside, {"sigma": 5.0}, X.view(10, 1, 2, 3), 3 * 2 + 2),
]


@pytest.mark.parametrize(("make", "settings", "x", "count"), FACTORISATIONS)
def test_one_factorisation_a_block_and_two_a_batch(make, settings, x, count, monkeypatch):
    taken, original = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a, **k: (taken.append(tuple(a.shape)), original(a, **k))[1])
    for name in ("cholesky", "inv", "solve", "eigh", "svd", "lu_factor"):
        monkeypatch.setattr(torch.linalg, name, lambda *_, **__: pytest.fail("another factorisation"))
    learner_of(built(make), HSIC(**settings), x).step(x, labels(10))
    size = settings.get("block_size") or 10
    assert taken == [(size, size)] * count


# ---- 3: readouts -------------------------------------------------------------------------------------------------------------


def test_one_block_alone_is_backprop():
    learner, model = learner_of(mlp(), HSIC(), X, blocks=1, optimizer=cases.adam), mlp()
    optimizer = cases.adam(list(model.parameters()))
    for step in range(4):
        x, y = draw(10, 6, seed=step), labels(10, seed=step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        assert learner.step(x, y).loss == loss.item()
    assert_same(dict(learner.model.state_dict()), dict(model.state_dict()))


def batches_of(count):
    return [(draw(10, 6, seed=step), labels(10, seed=step)) for step in range(count)]


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
def test_format_training_is_the_blocks_and_then_the_classifier_on_frozen_features(optimizer):
    """Before, the blocks learn as without it; after, a plain loop on features in evaluation mode gives the same bits."""
    make = cases.OPTIMIZERS[optimizer]
    learner = learner_of(mlp(), HSIC(balance=20.0, format_after=3), X, optimizer=make)
    along = learner_of(mlp(), HSIC(balance=20.0), X, optimizer=make)
    fresh, seen = dict(mlp()[3].state_dict()), []
    for block in list(learner.model)[:3]:
        block[0].register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
    top = mlp()[3]
    reference, features = make(list(top.parameters())), None
    for step, (x, y) in enumerate(batches_of(7)):
        seen.clear()
        loss = learner.step(x, y).loss
        if step < 3:
            along.step(x, y)
            assert seen[-3:] == [(True, True)] * 3
            assert_same(dict(learner.model[3].state_dict()), fresh)
        else:
            assert seen[-3:] == [(False, False)] * 3
            features = along.model[:3].eval()
            with torch.no_grad():
                h = features(x)
            reference.zero_grad()
            wanted = F.cross_entropy(top(h), y)
            wanted.backward()
            reference.step()
            assert loss == wanted.item()
            assert_same(dict(learner.model[3].state_dict()), dict(top.state_dict()))
        assert_same(dict(learner.model[:3].state_dict()), dict(along.model[:3].state_dict()))
        assert all(module.training for module in learner.model.modules())


def brute_force_order(means):
    classes, units = means.shape
    return max(
        itertools.permutations(range(units), classes), key=lambda order: sum(float(means[c, u]) for c, u in enumerate(order))
    )


@pytest.mark.parametrize(("classes", "units"), [(4, 4), (3, 5), (1, 3), (5, 5)])
def test_classes_are_given_the_units_with_the_largest_sum(classes, units):
    for seed in range(10):
        means = draw(classes, units, seed=seed)
        assert tuple(order_of(means).tolist()) == brute_force_order(means)


@pytest.mark.parametrize("classes", [None, 4, 3])
def test_one_hot_classes_are_read_off_by_running_means(classes):
    learner = learner_of(mlp(), HSIC(readout="one-hot", classes=classes, balance=20.0), X)
    handed, count = [], classes or 4
    learner.model[3].register_forward_hook(lambda *args: handed.append(args[-1].detach()))
    sums, counts = torch.zeros(count, 4, dtype=F64), torch.zeros(count, 1, dtype=F64)
    for x, y in batches_of(5):
        y = y % count
        learner.step(x, y)
        sums, counts = 0.99 * sums, 0.99 * counts
        for output, label in zip(handed[-1], y, strict=True):
            sums[label] += output
            counts[label] += 1
    means = learner.cells[3].auxiliary.means()
    torch.testing.assert_close(means, sums / counts, rtol=1e-12, atol=1e-12)
    order = list(brute_force_order(sums / counts))
    learner.model.eval()
    assert_same(learner.predict(X), learner.model(X).detach()[:, order])

    other = learner_of(mlp(), HSIC(readout="one-hot", classes=classes, balance=20.0), X)
    other.load_state_dict(learner.state_dict())
    assert_same(other.predict(X), learner.predict(X))
    assert_same(other.cells[3].auxiliary.means(), means)


def test_unseen_classes_have_means_of_zero_and_may_be_read_out():
    learner = learner_of(mlp(), HSIC(readout="one-hot"), X)
    assert_same(learner.cells[3].auxiliary.means(), torch.zeros(4, 4, dtype=F64))
    assert sorted(learner.predict(X)[0].tolist()) == sorted(learner.model.eval()(X)[0].tolist())


def test_one_hot_refuses_what_has_no_classes():
    with pytest.raises(ValueError, match="5 classes cannot be read out of 4 outputs"):
        learner_of(mlp(), HSIC(readout="one-hot", classes=5), X)
    with pytest.raises(ValueError, match=r"class scores \(batch, units\), this model gives \(10, 3, 4\)"):
        learner_of(sequences().double(), HSIC(readout="one-hot"), X, token_loss)
    with pytest.raises(ValueError, match=r"class numbers of shape \(batch,\), the targets are float64 \(10, 4\)"):
        learner_of(mlp(), HSIC(readout="one-hot"), X, F.mse_loss).step(X, draw(10, 4))


def test_the_authors_order_is_greedy():
    for seed in range(20):
        outputs, target = draw(30, 5, seed=seed), torch.cat([torch.arange(4), labels(26, seed=seed)])
        means = {(c, u): outputs[target == c, u].mean().item() for c in range(4) for u in range(5)}
        order = [0] * 4
        while means:
            label, unit = max(means, key=means.__getitem__)
            order[label] = unit
            means = {(c, u): mean for (c, u), mean in means.items() if c != label and u != unit}
        assert order_on_evaluated(outputs, target, 4).tolist() == order


@pytest.mark.parametrize("head", [-1, 0, 2, -3])
def test_each_head_descends_the_loss_and_one_is_read(head):
    rule = HSIC(readout="heads", head=head, balance=20.0)
    learner = learner_of(mlp(), rule, X, optimizer=cases.sgd, auxiliary_optimizer=descent)
    assert not learner.predict(X).any()
    weights = [(torch.zeros(4, width, dtype=F64), torch.zeros(4, dtype=F64)) for width in (10, 8, 7, 4)]
    for x, y in batches_of(3):
        model = mlp()
        model.load_state_dict(learner.model.state_dict())
        losses = {}
        for index, (made,) in enumerate(in_sequence(model, x)):
            leaves = [w.requires_grad_() for w in weights[index]]
            losses[index] = F.cross_entropy(F.linear(made.detach(), *leaves), y)
            weights[index] = tuple(
                w.detach() - g for w, g in zip(leaves, torch.autograd.grad(losses[index], leaves), strict=True)
            )
        found = learner.step(x, y).auxiliary
        torch.testing.assert_close(dict(sorted(found.items())), {i: v.detach() for i, v in losses.items()})
    scores = learner.predict(X)
    blocks = learner.model.eval()[: range(4)[head] + 1]
    torch.testing.assert_close(scores, F.linear(blocks(X), *weights[head]).detach(), rtol=1e-10, atol=1e-12)


def test_heads_of_several_tensors_are_summed():
    x, y = X.view(10, 1, 2, 3), labels(10)
    learner = learner_of(built(beside), HSIC(readout="heads", head=1, sigma=5.0), x, auxiliary_optimizer=descent)
    learner.step(x, y)
    error = (0.25 - F.one_hot(y, 4).to(F64)) / 10  # dL/dscores of scores that are 0
    made = in_sequence(built(beside), x)[1]
    now = [z.detach() for z in in_sequence(learner.model.eval(), x)[1]]
    wanted = sum(z @ -(error.T @ before.detach()).T - error.sum(0) for z, before in zip(now, made, strict=True))
    torch.testing.assert_close(learner.predict(x), wanted, rtol=1e-10, atol=1e-12)


def test_heads_keep_2048_features_of_images_and_read_each_place_of_sequences():
    for shape, kept in (
        ((32, 8, 8), 2048),
        ((32, 16, 16), 32 * 64),
        ((33, 16, 16), 33 * 49),
        ((3000, 2, 2), 3000),
        ((4000,), 4000),
    ):
        assert Head(torch.zeros(2, *shape), torch.zeros(2, 5)).linear.in_features == kept
    heads = [Head(draw(2, *shape), draw(2, *to)) for shape, to in (((32, 16, 16), (5,)), ((5, 6), (5, 4)), ((6,), (5, 4)))]
    for head in heads:
        nn.init.normal_(head.linear.weight)
    image, sequence = draw(3, 32, 16, 16), draw(3, 5, 6)
    means = image.unflatten(2, (8, 2)).unflatten(4, (8, 2)).mean((3, 5))
    torch.testing.assert_close(heads[0](image), F.linear(means.flatten(1), heads[0].linear.weight))
    torch.testing.assert_close(heads[1](sequence), torch.einsum("btd,cd->btc", sequence, heads[1].linear.weight))
    weight = heads[2].linear.weight.view(5, 4, 6)
    torch.testing.assert_close(heads[2](sequence[:, 0]), torch.einsum("bd,tcd->btc", sequence[:, 0], weight))


@pytest.mark.parametrize("head", [4, -5])
def test_a_head_that_is_not_there_is_refused(head):
    with pytest.raises(ValueError, match=rf"head={head}: this model has blocks 0 to 3"):
        learner_of(mlp(), HSIC(readout="heads", head=head), X)


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
@pytest.mark.parametrize(
    "settings", [{}, {"format_after": 2}, {"readout": "one-hot"}, {"readout": "heads", "head": 1}], ids=str
)
def test_predicting_changes_nothing(settings, schedule):
    model = nn.Sequential(*mlp()[:2], nn.Sequential(nn.Linear(8, 7), nn.Dropout(0.5)), nn.Linear(7, 4)).double()
    learner = learner_of(model, HSIC(**settings), X, schedule=schedule, optimizer=cases.momentum)
    for x, y in batches_of(4):
        learner.step(x, y)
    model[1].eval()
    modes, before = [module.training for module in model.modules()], learner.state_dict()
    scores = learner.predict(X)
    assert [module.training for module in model.modules()] == modes
    assert_same(learner.state_dict(), before)
    assert not scores.requires_grad
    assert_same(learner.predict(X), scores)


# ---- 4: resume, and low precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"format_after": 4}, {"format_after": 1, "sigma": None}, {"readout": "one-hot"}], ids=str)
def test_resume_at_every_step_of_a_pipeline(settings, tmp_path):
    def make(seed):
        model = mlp()
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        return learner_of(model, HSIC(balance=20.0, **settings), X, schedule="pipelined", optimizer=cases.adam)

    whole, losses, batches = make(0), [], batches_of(9)
    for step, (x, y) in enumerate(batches):
        checkpoint.save(tmp_path / str(step), whole.state_dict())
        losses.append(whole.step(x, y).loss)
    whole.drain()
    other = make(1)
    for start in (7, 3, 5, 1, 4, 8, 2, 6):
        other.load_state_dict(checkpoint.load(tmp_path / str(start)))
        assert_same([other.step(x, y).loss for x, y in batches[start:]], losses[start:])
        other.drain()
        assert_same(other.state_dict(), whole.state_dict())


CREDITS = []


class Spied(HSIC):
    """Takes down what it was shown and what it answered."""

    def credit(self, context):
        credit = super().credit(context)
        CREDITS.append((context, credit))
        return credit


@pytest.mark.parametrize("settings", [{}, {"objective": "hsic"}, {"sigma": None}, {"readout": "heads"}], ids=str)
def test_under_autocast_credits_are_taken_in_float32(settings):
    """The credit is the formula's for the rounded outputs."""
    CREDITS.clear()
    x, y = X.float(), labels(10)
    learner = learner_of(mlp().float(), Spied(balance=20.0, **settings), x)
    with torch.autocast("cpu", torch.bfloat16):
        learner.step(x, y)
    lower = [(context, credit) for context, credit in CREDITS if context.place.index < 3]
    assert [context.outputs[0].dtype for context, _ in lower].count(torch.bfloat16) >= 1
    for context, (credit,) in lower:
        assert credit.dtype == torch.float32
        z = context.outputs[0].to(F64).requires_grad_()
        wanted = {"objective": "nhsic", "sigma": 5.0} | {k: v for k, v in settings.items() if k != "readout"}
        (gradient,) = torch.autograd.grad(naive(z, x, y, **wanted), z)
        assert_near({"credit": credit.to(F64)}, {"credit": gradient}, tolerance=0.1 if "sigma" in settings else 2e-2)
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in learner.model.parameters())


def test_readouts_made_under_autocast_are_in_float32_as_well():
    for readout in ("one-hot", "heads"):
        with torch.autocast("cpu", torch.bfloat16):
            learner = learner_of(mlp().float(), HSIC(readout=readout), X.float())
            learner.step(X.float(), labels(10))
        assert {v.dtype for v in learner.cells[3].auxiliary.state_dict().values()} == {torch.float32}


# ---- 5: what cannot be served ------------------------------------------------------------------------------------------------

REFUSED = [
    *(({name: -1}, f"{name}=-1: give 0 or more") for name in ("features", "landmarks", "groups", "block_size", "format_after")),
    ({"block_size": 1}, "block_size=1: dependence is between samples"),
    ({"classes": 0}, "classes=0: give 1 or more"),
    ({"learning_rate": 0.0}, r"learning_rate=0\.0: give a number above 0"),
    ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ({"features": 4, "landmarks": 4}, "two ways to approximate a kernel"),
    ({"features": 4, "kernel": "linear"}, "random features approximate a Gaussian kernel"),
    ({"features": 4, "sigma": None}, "random features approximate a Gaussian kernel"),
    ({"format_after": 3, "readout": "heads"}, "format_after=3 formats a classifier, which readout='heads' has none of"),
    ({"format_after": 3, "readout": "one-hot"}, "format_after=3"),
    ({"sigma": 0.0}, r"sigma=0\.0: a bandwidth must be positive"),
    ({"sigma": (1.0, -2.0)}, r"sigma=-2\.0"),
    ({"sigma_x": -1.0}, r"sigma=-1\.0"),
    ({"sigma_y": 0.0}, r"sigma=0\.0"),
    ({"balance": -1.0}, r"balance=-1\.0: give 0 or more"),
    ({"balance": float("nan")}, "balance=nan"),
    ({"epsilon": 0.0}, "epsilon"),
    ({"groups": 2, "power": 0.0}, r"power=0\.0"),
    ({"readout": "clasifier"}, "unknown readout 'clasifier': did you mean 'classifier'"),
    ({"objective": "nhisc"}, "unknown objective 'nhisc': did you mean 'nhsic'"),
    ({"kernel": "gausian"}, "unknown kernel 'gausian': did you mean 'gaussian'"),
]


@pytest.mark.parametrize(("fields", "match"), REFUSED, ids=str)
def test_numbers_out_of_range_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        HSIC(**fields)


@pytest.mark.parametrize("readout", ["classifier", "one-hot", "heads"])
def test_sigmas_must_be_as_many_as_tensors(readout):
    with pytest.raises(ValueError, match=r"block 0 hands up 1 tensor\(s\) to learn; give one sigma, or one for each"):
        learner_of(mlp(), HSIC(sigma=(1.0, 2.0), readout=readout), X)
    x = X.view(10, 1, 2, 3)
    with pytest.raises(ValueError, match=r"block 0 hands up 3 tensor\(s\) to learn; give one sigma, or one for each"):
        learner_of(built(beside), HSIC(sigma=(1.0, 2.0), readout=readout), x)
    if readout != "classifier":  # the top block learns by HSIC, too
        with pytest.raises(ValueError, match=r"block 2 hands up 1 tensor\(s\) to learn; give one sigma, or one for each"):
            learner_of(built(beside), HSIC(sigma=(1.0, 2.0, 3.0), readout=readout), x)


@pytest.mark.parametrize(
    ("assignments", "fields"),
    [
        (["rule.sigma=3"], {"sigma": 3.0}),
        (["rule.sigma=1,5,10"], {"sigma": (1.0, 5.0, 10.0)}),
        (["rule.sigma=none", "rule.balance=7"], {"sigma": None, "balance": 7.0}),
    ],
)
def test_sigma_can_be_set_on_the_command_line(assignments, fields):
    assert parse_fields(HSIC, assignments, prefix="rule", of="rule 'hsic'") == fields


@pytest.mark.parametrize(
    ("y", "said"), [(draw(5), r"float64 \(5,\)"), ([0.0] * 10, "list"), (torch.tensor(1.0), r"float32 \(\)")], ids=str
)
def test_targets_that_are_not_one_a_sample_are_refused(y, said):
    learner = learner_of(mlp(), HSIC(), X, lambda scores, target: scores.square().mean())
    before = learner.state_dict()
    with pytest.raises(ValueError, match=rf"wants targets along the first dimension, \(10, \.\.\.\), they are {said}"):
        learner.step(X, y)
    assert_same(learner.state_dict(), before)


@pytest.mark.parametrize("readout", ["classifier", "one-hot", "heads"])
@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
def test_bad_values_stop_at_the_first_block_and_nothing_is_learnt(schedule, readout):
    learner = learner_of(mlp(), HSIC(readout=readout), X, schedule=schedule, optimizer=cases.momentum)
    for x, y in batches_of(2):
        learner.step(x, y)
    learner.drain()
    before, bad = learner.state_dict(), X.clone()
    bad[3, 2] = torch.nan
    with pytest.raises(lf.Diverged, match=r"cell 0 \('0'\) gave the first output that is not finite"):
        learner.step(bad, labels(10))
    assert_same(learner.state_dict(), before)
    learner.step(X, labels(10))


def test_a_loss_that_is_not_finite_leaves_the_class_means_alone():
    factor = torch.ones(())
    learner = learner_of(mlp(), HSIC(readout="one-hot"), X, lambda scores, y: factor * F.cross_entropy(scores, y))
    learner.step(X, labels(10))
    before = learner.state_dict()
    factor.fill_(torch.inf)
    with pytest.raises(lf.Diverged, match="the loss is inf"):
        learner.step(X, labels(10))
    assert_same(learner.state_dict() | {"first": 0}, before | {"first": 0})


# ---- 6: depth ----------------------------------------------------------------------------------------------------------------

GAINS = {"tanh": (nn.Tanh, nn.init.xavier_normal_, {"gain": 5 / 3}), "relu": (nn.ReLU, nn.init.kaiming_normal_, {})}


def fifty_layers(activation, *, norm, gain):
    make, initialise, fields = GAINS[activation]
    torch.manual_seed(0)
    normalise = [nn.BatchNorm1d(64, affine=False)] if norm else []
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), *normalise, make()) for _ in range(49)), nn.Linear(64, 10))
    for layer in model.modules() if gain else ():
        if isinstance(layer, nn.Linear):
            initialise(layer.weight, **fields)
            nn.init.zeros_(layer.bias)
    return model.double()


SPREADS = [
    *(("tanh", norm, gain, sigma) for norm, gain in ((True, False), (True, True), (False, True)) for sigma in (5.0, None)),
    *(("relu", True, gain, 5.0) for gain in (False, True)),
]


@pytest.mark.parametrize(("activation", "norm", "gain", "sigma"), SPREADS)
def test_gradients_of_fifty_layers_are_of_one_size(activation, norm, gain, sigma):
    """Where the forward pass keeps its signal, HSIC's gradients differ by less than ten times, backpropagation's by more."""
    y = torch.arange(128) % 10
    x, spreads = draw(10, 64, seed=5)[y] + 0.5 * draw(128, 64, seed=6), []
    for rule in (HSIC(balance=100.0, sigma=sigma), lf.rules.Backprop()):
        found = gradients(learner_of(fifty_layers(activation, norm=norm, gain=gain), rule, x), x, y)
        sizes = [sum(g.square().sum() for name, g in found.items() if name.split(".")[0] == str(i)).sqrt() for i in range(49)]
        spreads.append(float(max(sizes) / min(sizes)))
    assert spreads[0] < 10 < spreads[1]


# ---- 7: models and recipes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("readout", "classifier"), [("classifier", True), ("one-hot", False), ("heads", False)])
def test_digits_are_told_apart_in_every_way_of_reading_out(readout, classifier):
    """Two hidden layers, 15 epochs; backpropagation gets about 97 %."""
    data = lf.data.load("digits")
    torch.manual_seed(0)
    model = lf.models.normalised_mlp(data.input_shape, 10, hidden=(64, 64), classifier=classifier)
    learner = lf.convert(
        model,
        HSIC(readout=readout),
        loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        example_input=data.train.inputs[:2],
    )
    lf.Trainer(learner).fit(lf.data.TensorLoader(*data.train, batch_size=128, drop_last=True), epochs=15)
    assert lf.evaluate(learner, [data.test]).accuracy > 0.92
    assert learner.locks == {"forward"}
