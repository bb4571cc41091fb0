"""Probes of credit, of what a synthesiser believes, and of representations: each against a closed form or brute force."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree.cli import main
from lockfree.experiment import Experiment, load_once, probed
from lockfree.hsic import Linear, cka
from lockfree.probes import (
    PROBES,
    Alignment,
    GradientQuality,
    ImpliedLoss,
    Representation,
    View,
    along_path,
    dissimilarity,
    linear_cka,
    linear_probe,
    participation_ratio,
)
from lockfree.probes.gradient_quality import bias_and_variance, compare


def normalised():
    layers = [nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2))]
    return nn.Sequential(*layers, nn.Linear(8, 4))


class Own(nn.Module):
    """A model whose layers nobody has named to the library."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(x + torch.tanh(self.second(x)))


def draw(shape, samples, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, *shape, generator=generator), torch.arange(samples) % 4


def learner(build=normalised, shape=(6,), rule="backprop", loss=F.cross_entropy, **fields):
    return learner_with(build, shape, lf.rules.get(rule, **fields), loss=loss)


def learner_with(build, shape, rule, loss=F.cross_entropy, **settings):
    torch.manual_seed(0)
    return lf.convert(
        build(),
        rule,
        loss=loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        example_input=draw(shape, 4, 0)[0],
        **settings,
    )


def resnet20():
    return lf.models.build("resnet20", input_shape=(3, 32, 32), classes=4)


def alike():
    layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*layers, nn.Linear(8, 4))


def plain(state):
    if isinstance(state, dict):
        return {str(key): plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else str(state)


# ---- all of them -------------------------------------------------------------------------------------------------------------


SHAPES = {resnet20: (3, 32, 32), Own: (6,), alike: (8,), normalised: (6,)}
CUTS = {Own: {"blocks": 3}}
STACKED = {"schedule": "pipelined", "executor": "stacked"}


def fitted(build, rule, probes, settings):
    """Trains, and returns everything that training leaves behind, with the next random numbers."""
    shape = SHAPES[build]
    one = learner_with(build, shape, rule, **CUTS.get(build, {}), **settings)
    seen = set()
    trainer = lf.Trainer(
        one,
        probes=probes,
        probe_data=draw(shape, 16, 9),
        sinks=[lambda kind, values: seen.add(values["probe"]) if kind == "probe" else None],
    )
    torch.manual_seed(5)
    trainer.fit([draw(shape, 8, seed) for seed in range(2 if build is resnet20 else 12)], epochs=1)
    assert seen == {probe.name for probe in probes}
    assert all(module.training for module in one.model.modules())
    assert not any("forward" in vars(block) or block._forward_hooks for block in one.chain.blocks)
    return json.dumps(plain(one.state_dict() | {"next": torch.rand(3)}))


@pytest.mark.parametrize(
    ("rule", "executor"),
    [
        *((rule, "sequential") for rule in ("backprop", "fa", "dni", "cdni")),
        *((rule, "stacked") for rule in ("dni", "cdni")),  # the others wait for the block above
    ],
)
@pytest.mark.parametrize("build", [normalised, resnet20, Own, alike])
def test_all_probes_at_once_change_nothing(build, rule, executor):
    settings = STACKED if executor == "stacked" else {}
    served = [name for name in PROBES if name != "implied-loss" or "dni" in rule]
    probes = [PROBES[name](every=1) for name in served]
    ends = [fitted(build, rule, looking, settings) for looking in ([], probes)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("probe", ["gradient-quality", "alignment", "representation", "implied-loss"])
def test_a_stack_of_blocks_looks_like_its_blocks(probe):
    """Where an executor keeps the weights of many blocks as one tensor, a probe sees them as they are now."""
    seen = []
    for executor in ("sequential", "stacked"):
        one = learner_with(alike, (8,), "cdni", schedule="pipelined", executor=executor)
        for seed in range(12):
            one.step(*draw((8,), 8, seed))
        seen.append(PROBES[probe]().look(View(one, *draw((8,), 32, 99))))
        one.step(*draw((8,), 8, 12))  # and training goes on
    flat, other = (_numbers(one) for one in seen)
    assert len(flat) >= 5
    assert flat == pytest.approx(other, rel=1e-3, abs=1e-4)


def _numbers(seen):
    if isinstance(seen, dict):
        seen = list(seen.values())
    if isinstance(seen, list):
        return [number for one in seen for number in _numbers(one)]
    return [seen] if isinstance(seen, int | float) else []


@pytest.mark.parametrize("rule", ["backprop", "dni", "cdni", "fa", "dfa", "pred", "noise"])
@pytest.mark.parametrize("build", [resnet20, Own])
def test_layers_need_no_names(build, rule):
    one = learner_with(build, SHAPES[build], rule, **CUTS.get(build, {}))
    view = View(one, *draw(SHAPES[build], 16, 3))
    count = len(one.chain.blocks)
    assert count == {resnet20: 5, Own: 3}[build]
    credit = GradientQuality().look(view)
    assert {len(values) for values in credit.values()} == {count}
    assert credit["cosine"][-1] == pytest.approx(1)  # the block under the loss has the truth
    angles = Alignment().look(view)["angles"]
    assert len(angles) == count
    assert angles[-1] == pytest.approx(0, abs=0.1)
    if rule == "backprop":
        assert credit["cosine"] == pytest.approx([1] * count)
        assert angles == pytest.approx([0] * count, abs=0.1)
    layers = Representation().look(view)
    assert layers["layers"] == [f"block {index}" for index in range(count)]
    assert np.diag(layers["cka"]) == pytest.approx([1] * count)
    if "dni" in rule:
        alone = [index for index, y in enumerate(view.outputs[:-1]) if isinstance(y, torch.Tensor)]
        assert ImpliedLoss().look(view)["block"] == alone != []


# ---- what probes share -------------------------------------------------------------------------------------------------------


def test_probes_that_share_a_view_see_what_each_sees_alone_in_fewer_passes(monkeypatch):
    one = learner(rule="cdni")
    for seed in range(5):
        one.step(*draw((6,), 16, seed))
    data = draw((6,), 24, 7)
    alone = {name: probe().look(View(one, *data)) for name, probe in PROBES.items()}
    passes = {"gradients": 0, "evaluation": 0}
    gradients, forward = lf.Learner.gradients, type(one.chain.blocks[0]).forward

    def counted(self, *batch):
        passes["gradients"] += 1
        return gradients(self, *batch)

    def run(self, *inputs):
        passes["evaluation"] += self is one.chain.blocks[0] and not one.model.training
        return forward(self, *inputs)

    monkeypatch.setattr(lf.Learner, "gradients", counted)
    monkeypatch.setattr(type(one.chain.blocks[0]), "forward", run)
    view = View(one, *data)
    assert {name: probe().look(view) for name, probe in PROBES.items()} == alone
    assert passes == {"gradients": 1 + GradientQuality().minibatches, "evaluation": 1}


class InPlace(nn.Module):
    """A model that overwrites what its first layer puts out."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 4))

    def forward(self, x):
        return self.second(self.first(x))


def test_a_block_that_works_in_place_spoils_no_view():
    one = learner_with(InPlace, (6,), "backprop", blocks=["second"])
    x, y = draw((6,), 16, 1)
    view = View(one, x, y)
    for first in (view.outputs[0], view.outputs_of(("first",))[0]):
        torch.testing.assert_close(first, one.model.first(x), rtol=0, atol=0)
        assert (first < 0).any()


@pytest.mark.parametrize(("training", "count"), [(1437, 128), (10_000, 200), (50_000, 512), (60_000, 512)])
def test_the_command_line_shows_probes_all_classes_alike(training, count):
    targets = torch.arange(5000) // 500  # sorted by class
    inputs = torch.arange(5000.0)[:, None, None, None]
    dataset = lf.data.Dataset(
        name="sorted", classes=tuple("abcdefghij"), source="made",
        train=lf.data.Split(torch.zeros(training, 1, 1, 1), torch.zeros(training, dtype=torch.int64)),
        test=lf.data.Split(inputs, targets),
    )  # fmt: skip
    x, y = probed(dataset)
    assert len(x) == len(y) == count
    assert torch.equal(targets[x.flatten().long()], y)
    counts = torch.bincount(y, minlength=10)
    assert counts.max() - counts.min() <= 1
    parts = [torch.bincount(part, minlength=10).min() for part in (y[::2], y[1::2], y[:64])]
    assert min(parts) > 0  # what a linear probe is fitted and scored on, and where paths begin


# ---- gradient quality --------------------------------------------------------------------------------------------------------


def test_comparison_of_gradients_on_numbers():
    found = compare(torch.tensor([1.0, -1.0, 2.0, 5.0]), torch.tensor([2.0, 1.0, 2.0, 0.0]))
    assert found["cosine"] == pytest.approx(5 / (31**0.5 * 3))
    assert found["relative_error"] == pytest.approx(30**0.5 / 3)
    assert found["sign_agreement"] == pytest.approx(2 / 3)
    assert compare(None, torch.ones(2))["cosine"] is None
    assert compare(torch.ones(2), torch.zeros(2))["relative_error"] is None


def test_bias_and_variance_on_numbers():
    bias, variance = bias_and_variance([torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])], torch.tensor([0.0, 2.0]))
    assert bias == pytest.approx(2 / 2)
    assert variance == pytest.approx((4 + 16) / 2 / 4)


def test_backpropagation_has_no_error_and_without_batch_norm_no_bias():
    one = learner(Own)
    seen = GradientQuality().look(View(one, *draw((6,), 16, 1)))
    for block in range(3):
        assert seen["cosine"][block] == pytest.approx(1)
        assert seen["relative_error"][block] == pytest.approx(0, abs=1e-6)
        assert seen["sign_agreement"][block] == 1
        assert seen["bias"][block] == pytest.approx(0, abs=1e-5)
        assert seen["variance"][block] > 0


def test_a_synthetic_credit_is_compared_with_the_gradient_of_each_output():
    one = learner(Own, rule="cdni", learning_rate=0.01)
    for seed in range(20):
        one.step(*draw((6,), 16, seed))
    x, y = draw((6,), 16, 77)
    seen = GradientQuality().look(View(one, x, y))
    values, outputs = x, []
    for block in one.chain.blocks:
        values = block(values)
        outputs.append(values)
    true = torch.autograd.grad(F.cross_entropy(values, y), outputs)
    for index in range(2):
        synthesiser = one.cells[index].auxiliary[0]
        label = F.one_hot(y, 4).float()
        guess = synthesiser(outputs[index].detach(), label).detach().flatten() / len(x)
        cosine = float(F.cosine_similarity(guess, true[index].flatten(), dim=0))
        assert seen["cosine"][index] == pytest.approx(cosine, abs=1e-5)
        error = float((guess - true[index].flatten()).norm() / true[index].norm())
        assert seen["relative_error"][index] == pytest.approx(error, rel=1e-4)
    assert seen["cosine"][2] == pytest.approx(1)


def test_below_a_joined_border_the_credit_is_what_the_synthesiser_above_sends_down():
    one = learner(Own, rule="cdni", borders=(1,), learning_rate=0.01)
    for seed in range(5):
        one.step(*draw((6,), 16, seed))
    seen = GradientQuality().look(View(one, *draw((6,), 16, 77)))
    assert seen["cosine"][0] is not None
    assert seen["cosine"][0] < 0.999


# ---- representations ---------------------------------------------------------------------------------------------------------


def test_linear_cka_is_that_of_hsic():
    layers = [torch.randn(12, width, generator=torch.Generator().manual_seed(width)) for width in (3, 5, 20)]
    others = [layers[0] @ torch.ones(3, 2) + 1, layers[2]]
    found = linear_cka(layers, others)
    for i, a in enumerate(layers):
        for j, b in enumerate(others):
            assert float(found[i, j]) == pytest.approx(float(cka(a, b, kernel_x=Linear(), kernel_y=Linear())), abs=1e-5)


def test_dissimilarity_is_one_minus_correlation():
    z = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(dissimilarity(z).numpy(), 1 - np.corrcoef(z.flatten(1).double().numpy()), atol=1e-12)


@pytest.mark.parametrize("width", [4, 30])
def test_participation_ratio_is_that_of_the_eigenvalues(width):
    z = torch.randn(12, width, generator=torch.Generator().manual_seed(0))
    eigenvalues = np.linalg.eigvalsh(np.cov(z.double().numpy().T))
    assert participation_ratio(z) == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


def test_a_linear_probe_is_ridge_regression():
    z, classes = draw((5,), 40, 3)
    z[:, 0] += classes
    rows, labels = z.double().numpy(), np.eye(4)[classes.numpy()]
    mine, wanted = rows[::2] - rows[::2].mean(0), labels[::2] - labels[::2].mean(0)
    penalty = 0.1 * np.trace(mine.T @ mine) / len(mine)
    weights = np.linalg.solve(mine.T @ mine + penalty * np.eye(5), mine.T @ wanted)
    scores = (rows[1::2] - rows[::2].mean(0)) @ weights + labels[::2].mean(0)
    assert linear_probe(z, classes, ridge=0.1) == (scores.argmax(1) == classes.numpy()[1::2]).mean()
    assert linear_probe(F.one_hot(torch.arange(40) // 2 % 4).float(), torch.arange(40) // 2 % 4) == 1


def test_layers_can_be_named():
    one = learner(Own)
    x, y = draw((6,), 24, 1)
    whole = Representation(layers=("second", "", "first")).look(View(one, x, y))
    assert whole["layers"] == ["second", "", "first"]
    model = one.model
    first = model.first(x)
    wanted = [model.second(torch.relu(first)), model(x), first]
    torch.testing.assert_close(torch.tensor(whole["cka"]).double(), linear_cka(wanted, wanted), rtol=0, atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())
    for seen, titles in (
        (whole, ["second", "", "first"]),
        (Representation().look(View(one, x, y)), ["block 0", "block 1", "block 2"]),
    ):
        figure = Representation.draw({"run": [{**seen, "step": 0, "epoch": 0}]})
        assert [axis.get_title() for axis in figure.axes if not axis.get_xlabel()][: len(titles)] == titles
    twice = View(one, x, y).outputs_of(("first", "first"))
    assert torch.equal(twice[0], twice[1])


class Twice(nn.Module):
    """A model that runs a layer twice, and another never."""

    def __init__(self):
        super().__init__()
        self.layer, self.unused, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.total = nn.Flatten(0)

    def forward(self, x):
        self.total(x)
        return self.last(self.layer(self.layer(x)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("layer", "'layer' runs 2 times on a batch"),
        ("unused", "'unused' runs 0 times on a batch"),
        ("total", "'total' puts out no tensor with a row for each of 8 samples"),
        ("lst", "did you mean 'last'"),
    ],
)
def test_a_layer_that_cannot_be_looked_at_is_named(layer, message):
    torch.manual_seed(0)
    one = lf.convert(
        Twice(), "backprop", loss=F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), blocks=1,
        example_input=draw((6,), 4, 0)[0],
    )  # fmt: skip
    probe = Representation(layers=(layer,))
    with pytest.raises(ValueError, match=re.escape(message)):
        probe.look(View(one, *draw((6,), 8, 0)))
    assert not any(module._forward_hooks for module in one.model.modules())
    if layer == "lst":
        with pytest.raises(ValueError, match=re.escape(message)):
            lf.Trainer(one, probes=[probe], probe_data=draw((6,), 8, 0))


def test_likeness_to_the_classes_is_cka_with_one_hot_rows():
    x, y = draw((6,), 24, 1)
    one = learner()
    seen = Representation().look(View(one, x, y))
    rows = F.one_hot(y).double()
    wanted = [float(cka(z.double(), rows, kernel_x=Linear(), kernel_y=Linear())) for z in View(one, x, y).representations]
    assert seen["class_cka"] == pytest.approx(wanted)


def test_a_dissimilarity_matrix_is_ordered_by_class():
    one = learner()
    x, y = draw((6,), 40, 2)
    seen = Representation(pictured=8).look(View(one, x, y))
    assert seen["classes"] == sorted(seen["classes"])
    assert {len(row) for layer in seen["rdm"] for row in layer} == {8}
    assert np.asarray(seen["cka"]).shape == (3, 3)


# ---- implied loss ------------------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_quadratic_is_integrated_exactly():
    start, end = torch.randn(5, 3), torch.randn(5, 3)
    A = torch.randn(3, 3)
    A = A + A.T
    value = lambda h: ((h @ A) * h).sum(1) / 2 + h.sum(1)  # noqa: E731
    found = along_path(lambda h: h @ A + 1, start, end, points=1)
    torch.testing.assert_close(found, value(end) - value(start), rtol=1e-4, atol=1e-4)


class Truth(nn.Module):
    """A synthesiser of the user's own that knows the loss above."""

    def __init__(self, above):
        super().__init__()
        self.above = [above]

    def forward(self, y, label):
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            loss = F.cross_entropy(self.above[0](leaf), label.argmax(1), reduction="sum")
            return torch.autograd.grad(loss, leaf)[0]


def test_a_synthesiser_that_knows_the_truth_believes_in_the_true_loss():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    above = model[1]
    one = learner(lambda: model, rule="cdni", synthesiser=lambda like, classes: Truth(above))
    seen = ImpliedLoss(points=64).look(View(one, *draw((6,), 24, 4)))
    assert seen["block"] == [0]
    assert seen["correlation"][0] == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(seen["implied"][0], seen["true"][0], atol=1e-3)
    assert seen["implied_label"] == seen["true_label"]


def one_by_one(scores, labels):
    """A loss that cannot be taken of many samples at once."""
    return F.cross_entropy(scores, labels) if scores.sum().item() < 1e9 else scores.sum()


@pytest.mark.parametrize("loss", [F.cross_entropy, one_by_one])
@pytest.mark.parametrize("form", ["gradient", "sigmoid"])
def test_implied_and_true_loss_are_those_of_each_sample_path_and_class(form, loss):
    one = learner(Own, rule="cdni", loss=loss, form=form, learning_rate=0.01)
    for seed in range(20):
        one.step(*draw((6,), 16, seed))
    x, y = draw((6,), 24, 4)
    seen = ImpliedLoss(samples=10, points=50).look(View(one, x, y))
    model, synthesiser = one.model, one.cells[0].auxiliary[0]
    assert synthesiser.is_affine is (form == "gradient")  # one midpoint is as good as 50 then
    for parameter in (*model.parameters(), *synthesiser.parameters()):
        parameter.requires_grad_(False)
    above = lambda h: model.last(h + torch.tanh(model.second(h)))  # noqa: E731
    h = torch.relu(model.first(x))
    implied, true = np.zeros((10, 4)), np.zeros((10, 4))
    for i, c in np.ndindex(10, 4):
        p, label = h[y == c].mean(0), y[i : i + 1]
        true[i, c] = F.cross_entropy(above(p)[None], label) - F.cross_entropy(above(h[i])[None], label)
        shown = F.one_hot(label, 4).float()
        for t in (np.arange(50) + 0.5) / 50:
            implied[i, c] += float(synthesiser((h[i] + t * (p - h[i]))[None], shown)[0] @ (p - h[i])) / 50
    mean = lambda values: [values[y[:10].numpy() == c].mean(0) for c in range(4)]  # noqa: E731
    np.testing.assert_allclose(seen["implied"][0], mean(implied), atol=1e-5)
    np.testing.assert_allclose(seen["true"][0], mean(true), atol=1e-5)
    assert seen["correlation"][0] == pytest.approx(np.corrcoef(implied.flatten(), true.flatten())[0, 1], abs=1e-4)
    assert seen["true_label"][0] == (true.argmin(1) == y[:10].numpy()).mean()


def test_a_critic_is_asked_for_its_value():
    one = learner(Own, rule="cdni", form="critic", hidden_layers=1)
    for seed in range(5):
        one.step(*draw((6,), 16, seed))
    x, y = draw((6,), 16, 4)
    seen = ImpliedLoss(samples=16).look(View(one, x, y))
    h = one.chain.blocks[0](x).detach()
    critic, label = one.cells[0].auxiliary[0], F.one_hot(y, 4).float()
    rise = critic(h[y == 2].mean(0).expand_as(h), label) - critic(h, label)
    assert seen["implied"][0][1][2] == pytest.approx(float(rise[y == 1].mean().detach()), abs=1e-5)


# ---- where things are wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lf.Trainer(learner(), probes=[ImpliedLoss()], probe_data=draw((6,), 8, 0)), "Backprop has no synthesiser"),
        (lambda: lf.Trainer(learner(), probes=[lf.probes.Activations(block=7)], probe_data=draw((6,), 8, 0)), "blocks 0 to 2"),
        (lambda: GradientQuality(minibatches=1), "a variance takes 2 or more"),
        (lambda: GradientQuality().look(View(learner(), *draw((6,), 6, 0))), "pass more probe_data"),
        (lambda: Representation(pictured=1), "give 2 or more samples"),
        (lambda: Representation().look(View(learner(), draw((6,), 8, 0)[0], torch.rand(8))), "wants class numbers"),
        (lambda: ImpliedLoss(points=0), "1 or more points"),
        (lambda: linear_cka([torch.rand(3, 2)], [torch.rand(4, 2)]), "on the same samples"),
    ],
)
def test_bad_input_is_one_clear_line(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# ---- the command -------------------------------------------------------------------------------------------------------------


def test_checkpoints_are_looked_at_after_the_fact_as_along_training(tmp_path, capsys):
    train = ["train", "--rule", "cdni", "--data", "digits", "--epochs", "2", "--json"]
    names = "gradient-quality,implied-loss,representation"
    main([*train, "--out", str(tmp_path / "a"), "--probe", names])
    main([*train, "--out", str(tmp_path / "b")])
    assert not main(["probe", str(tmp_path / "b"), "--probe", names])
    along, after = (lf.Run.open(tmp_path / name).metrics("probe") for name in "ab")
    steps = {line["step"] for line in after}
    assert len(steps) == 2
    for line in after:
        (same,) = [one for one in along if (one["probe"], one["step"]) == (line["probe"], line["step"])]
        assert {**same, "seconds": 0} == {**line, "seconds": 0}
    page = (tmp_path / "b" / "report.html").read_text()
    assert page.count("<h2>Probe:") == 3
    assert "% of the training time" in page
    with np.load(tmp_path / "b" / "probes" / f"representation-{max(steps):08d}.npz") as tables:
        assert tables["cka"].shape[0] == tables["cka"].shape[1] == len(tables["rdm"])
    main(["probe", str(tmp_path / "b"), "--probe", names])  # what has been seen is not looked at again
    assert lf.Run.open(tmp_path / "b").metrics("probe") == after
    capsys.readouterr()
    assert main(["probe", str(tmp_path), "--probe", names]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["train", "--data", "digits", "--probe", "implied-loss", "--out", str(tmp_path / "c")]) == 2
    assert "has no synthesiser" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("rules", ["cdni,backprop", "backprop,cdni"])
def test_a_comparison_refuses_a_probe_before_anything_is_trained(tmp_path, capsys, rules):
    command = ["compare", "--rules", rules, "--data", "digits", "--epochs", "1", "--probe", "implied-loss"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 2
    told = capsys.readouterr().err
    assert "Backprop has no synthesiser" in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "a").exists()


def test_the_layers_of_two_runs_are_compared(tmp_path, capsys):
    for name, rule in (("a", "cdni"), ("b", "backprop")):
        main(["train", "--rule", rule, "--data", "digits", "--epochs", "1", "--json", "--out", str(tmp_path / name)])
    capsys.readouterr()
    assert main(["probe", str(tmp_path / "a"), "--against", str(tmp_path / "b"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    views = []
    for name in "ab":
        run = lf.Run.open(tmp_path / name)
        experiment = Experiment.from_config(run.config)
        dataset = load_once("digits", "cpu")
        one = experiment.make_learner(dataset)
        one.load_state_dict(run.checkpoint_at(run.steps[-1])["learner"])
        views.append(View(one, *probed(dataset)).representations)
    found = torch.tensor(told["cka"]).double()
    torch.testing.assert_close(found, linear_cka(*views).double(), rtol=0, atol=1e-6)
    assert (tmp_path / "a" / "probes" / "cka-with-b.png").exists()
    with np.load(tmp_path / "a" / "probes" / "cka-with-b.npz") as tables:
        assert tables["cka"].shape == found.shape
    assert main(["probe", str(tmp_path / "a"), "--against", str(tmp_path / "b")]) == 0
    assert "block 3" in capsys.readouterr().out
    assert main(["probe", str(tmp_path / "a")]) == 2
    assert "name a probe" in capsys.readouterr().err
