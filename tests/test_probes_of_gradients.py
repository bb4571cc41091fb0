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


def learner(build=normalised, shape=(6,), rule="backprop", **fields):
    torch.manual_seed(0)
    return lf.convert(
        build(),
        lf.rules.get(rule, **fields),
        loss=F.cross_entropy,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        example_input=draw(shape, 4, 0)[0],
    )


def resnet20():
    return lf.models.build("resnet20", input_shape=(3, 8, 8), classes=4)


def plain(state):
    if isinstance(state, dict):
        return {str(key): plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else str(state)


# ---- all of them -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "shape"), [(normalised, (6,)), (resnet20, (3, 8, 8)), (Own, (6,))])
def test_all_probes_at_once_change_nothing(build, shape):
    ends, seen = [], set()
    for probes in ([], [probe(every=1) for probe in PROBES.values()]):
        one = learner(build, shape, "cdni")
        modes = [module.training for module in one.model.modules()]
        trainer = lf.Trainer(
            one,
            probes=probes,
            probe_data=draw(shape, 16, 9),
            sinks=[lambda kind, values: seen.add(values["probe"]) if kind == "probe" else None],
        )
        torch.manual_seed(5)
        trainer.fit([draw(shape, 8, seed) for seed in range(2)], epochs=1)
        assert [module.training for module in one.model.modules()] == modes
        assert not any("forward" in vars(block) for block in one.chain.blocks)
        assert all(not block._forward_hooks for block in one.chain.blocks)
        ends.append(json.dumps(plain(one.state_dict() | {"next": torch.rand(3)})))
    assert ends[0] == ends[1]
    assert seen == set(PROBES)


@pytest.mark.parametrize("probe", ["gradient-quality", "alignment", "representation", "implied-loss"])
def test_a_stack_of_blocks_looks_like_its_blocks(probe):
    """Where an executor keeps the weights of many blocks as one tensor, a probe sees them as they are now."""
    seen = []
    for executor in ("sequential", "stacked"):
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)]
        one = lf.convert(
            nn.Sequential(*layers, nn.Linear(8, 4)),
            lf.rules.SyntheticGradients(conditioned=True),
            loss=F.cross_entropy,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
            example_input=draw((8,), 4, 0)[0],
            schedule="pipelined",
            executor=executor,
        )
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


@pytest.mark.parametrize("rule", ["backprop", "dni", "fa", "dfa", "pred", "noise"])
@pytest.mark.parametrize(("build", "shape"), [(resnet20, (3, 8, 8)), (Own, (6,))])
def test_layers_need_no_names(build, shape, rule):
    view = View(learner(build, shape, rule), *draw(shape, 16, 3))
    count = len(view.learner.chain.blocks)
    credit = GradientQuality().look(view)
    assert {len(values) for values in credit.values()} == {count}
    assert credit["cosine"][-1] == pytest.approx(1)  # the block under the loss has the truth
    assert np.shape(Representation().look(view)["cka"]) == (count, count)


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


def test_a_comparison_refuses_a_probe_before_anything_is_trained(tmp_path, capsys):
    command = ["compare", "--rules", "cdni,backprop", "--data", "digits", "--epochs", "1", "--probe", "implied-loss"]
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
