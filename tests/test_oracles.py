"""Identities that hold exactly when one part is replaced by something known."""

import copy
import itertools
from dataclasses import dataclass

import cases
import numpy as np
import pytest
import torch
from cases import CLASSES, MODELS, assert_same, learner_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree import feedback
from lockfree.feedback import FeedbackWeights, register_feedback
from lockfree.memory import ActivationMeter
from lockfree.rules import SyntheticGradients
from lockfree.rules.direct_feedback_alignment import DirectFeedbackAlignment
from lockfree.synthesisers import Design, GradientSynthesiser
from lockfree.synthesisers.networks import LinearSynthesiser

MLP = MODELS["mlp"]
F64 = torch.float64


@pytest.fixture(autouse=True)
def _own_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def draw(generator, *shape, dtype=F64):
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


def descent(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def two_learners(make, rules, x, optimizer, **more):
    """Converts the same model twice, with other rules."""
    learners = []
    for rule in rules:
        torch.manual_seed(0)
        model = make().to(x.dtype)
        learners.append(lf.convert(model, rule, loss=F.cross_entropy, optimizer=optimizer, example_input=x[:4], **more))
    return learners


# ---- synthetic gradients -----------------------------------------------------------------------------------------------------


class KnowsTheTruth(GradientSynthesiser):
    """Looks the gradient up: plain autograd through a copy of what is above, at its weights of this moment."""

    def __init__(self, classes, index):
        super().__init__(classes)
        self.index, self.model = index, ()
        self.nothing = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, y, label=None):
        above = copy.deepcopy(self.model[0][self.index + 1 :])
        leaf = y.detach().clone().requires_grad_()
        with torch.random.fork_rng(devices=[]):  # the blocks above will draw the same dropout masks
            loss = F.cross_entropy(above(leaf), label.argmax(dim=1))
        return torch.autograd.grad(loss, leaf)[0] * len(y) + 0 * self.nothing


@dataclass(frozen=True, kw_only=True)
class Oracle(SyntheticGradients):
    conditioned: bool = True

    def build(self, site):
        return None if site.place.top else nn.ModuleList([KnowsTheTruth(CLASSES, site.place.index)])


@pytest.mark.parametrize(("samples", "tolerance"), [(16, 0.0), (20, 1e-12)])
@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_a_synthesiser_that_knows_the_truth_is_backprop(network, optimizer, samples, tolerance):
    if network == "mlp":
        make, shape = cases.mlp, (6,)
    else:
        make, shape = (lambda: lf.models.cnn((1, 8, 8), CLASSES)), (1, 8, 8)
    generator = torch.Generator().manual_seed(1)
    x = draw(generator, samples, *shape)
    oracle, backprop = two_learners(make, (Oracle(), lf.rules.Backprop()), x, cases.OPTIMIZERS[optimizer])
    for cell in oracle.cells[:-1]:
        cell.auxiliary[0].model = (oracle.model,)
    assert oracle.locks == {"forward"}
    losses = {id(oracle): [], id(backprop): []}
    for learner in (oracle, backprop):
        torch.manual_seed(3)
        generator.manual_seed(2)
        for _ in range(6):
            batch = draw(generator, samples, *shape), torch.randint(CLASSES, (samples,), generator=generator)
            result = learner.step(*batch)
            losses[id(learner)].append(result.loss)
            if learner is oracle:
                assert sorted(result.auxiliary) == [0, 1, 2]
                assert max(value.item() for value in result.auxiliary.values()) <= tolerance
    mine, other = dict(oracle.model.state_dict()), dict(backprop.model.state_dict())
    if tolerance:
        torch.testing.assert_close(losses[id(oracle)], losses[id(backprop)], rtol=0, atol=1e-11)
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11 if optimizer == "adam" else tolerance)
    else:
        assert losses[id(oracle)] == losses[id(backprop)]
        assert_same(mine, other)


@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("model", ["mlp", "cnn", "residual", "in_place", "resnet20"])
def test_the_first_step_moves_only_the_top_block(model, conditioned, hidden_layers):
    model = MODELS[model]
    rule = SyntheticGradients(conditioned=conditioned, hidden_layers=hidden_layers, hidden_units=5)
    learner = learner_for(model, rule, optimizer=cases.sgd)
    before = [cases.copy_of(cell.block) for cell in learner.cells]
    learner.step(*model.batches(1)[0])
    for cell, old in zip(learner.cells, before, strict=True):
        same = [torch.equal(value, old[name]) for name, value in cell.block.named_parameters()]
        assert same == [not cell.place.top] * len(same)


def randomise(learner, seed=4):
    """Gives synthesisers weights, as if they had learnt."""
    generator = torch.Generator().manual_seed(seed)
    for cell in learner.cells:
        if cell.auxiliary is not None:
            for parameter in cell.auxiliary.parameters():
                with torch.no_grad():
                    parameter.copy_(0.3 * draw(generator, *parameter.shape))


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("hidden_layers", [0, 1])
@pytest.mark.parametrize("samples", [8, 11])
def test_the_regression_target_is_the_message_of_the_block_above_before_its_update(conditioned, hidden_layers, samples):
    """One step of descent at rate 1 is the gradient of 1/(2m) sum |M(y) - m delta|^2, worked out apart with the old weights."""
    rule = SyntheticGradients(conditioned=conditioned, hidden_layers=hidden_layers, hidden_units=5)
    learner = learner_for(
        MODELS["in_place"], rule, optimizer=cases.sgd, auxiliary_optimizer=descent(1.0), dtype=F64
    )  # no dropout: every random number below is of this test
    randomise(learner)
    (x, y) = MODELS["in_place"].batches(1, dtype=F64, samples=samples)[0]
    blocks = copy.deepcopy(learner.model)
    synthesisers = copy.deepcopy(nn.ModuleList(cell.auxiliary[0] for cell in learner.cells[:-1]))
    result = learner.step(x, y)

    label = F.one_hot(y, CLASSES).to(F64) if conditioned else None
    outputs, h = [], x
    for block in blocks:  # the blocks overwrite their inputs, so they get copies
        outputs.append((h, block(h.clone())))
        h = outputs[-1][1].detach().requires_grad_()
    for index, synthesiser in enumerate(synthesisers):
        leaf, above = outputs[index + 1]
        if index + 1 < len(synthesisers):
            (delta,) = torch.autograd.grad(above, leaf, synthesisers[index + 1](above.detach(), label).detach() / samples)
        else:
            (delta,) = torch.autograd.grad(F.cross_entropy(above, y), leaf)
        loss = (synthesiser(leaf.detach(), label) - samples * delta).square().sum() / (2 * samples)
        gradients = torch.autograd.grad(loss, list(synthesiser.parameters()))
        wanted = {name: one for (name, _), one in zip(synthesiser.named_parameters(), gradients, strict=True)}
        assert result.auxiliary[index].item() == pytest.approx(loss.item(), rel=1e-12)
        for name, after in learner.cells[index].auxiliary[0].named_parameters():
            moved = synthesiser.get_parameter(name) - after
            torch.testing.assert_close(moved, wanted[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("hidden_layers", [0, 2])
@pytest.mark.parametrize("model", ["in_place", "cnn"])
def test_a_batch_twice_over_teaches_the_same(model, hidden_layers, conditioned):
    case = MODELS[model]
    (x, y) = case.batches(1, dtype=F64)[0]
    updates = []
    for batch in ((x, y), (torch.cat([x, x]), torch.cat([y, y]))):
        rule = SyntheticGradients(conditioned=conditioned, hidden_layers=hidden_layers, hidden_units=5, kernel_size=3)
        learner = learner_for(case, rule, optimizer=cases.sgd, auxiliary_optimizer=descent(0.5), dtype=F64)
        for module in learner.model.modules():
            if isinstance(module, nn.Dropout2d):
                module.p = 0.0
        randomise(learner)
        learner.step(*batch)
        learnt = nn.ModuleList(cell.auxiliary for cell in learner.cells[:-1])
        updates.append([list(learnt.parameters()), list(learner.model.parameters())])
    torch.testing.assert_close(updates[0], updates[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("conditioned", [False, True])
def test_the_target_of_a_sample_does_not_depend_on_the_batch_size(conditioned):
    generator = torch.Generator().manual_seed(1)
    x, y = draw(generator, 256, 6, dtype=torch.float32), torch.randint(CLASSES, (256,), generator=generator)
    targets = {}
    for samples in (64, 256):
        learner = two_learners(
            lambda: nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 7)), nn.Linear(7, CLASSES)),
            [SyntheticGradients(conditioned=conditioned)],
            x,
            cases.sgd,
        )[0]
        randomise(learner)
        found = targets[samples] = {}
        for cell in learner.cells[:-1]:
            original = cell.learn_auxiliary

            def spy(batch, above, error, losses, *, cell=cell, original=original, found=found, samples=samples):
                found[cell.place.index] = samples * above[0]
                return original(batch, above, error, losses)

            cell.learn_auxiliary = spy
        learner.step(x[:samples], y[:samples])
    for border in (0, 1):
        assert targets[64][border].abs().max() > 1e-2
        torch.testing.assert_close(targets[256][border][:64], targets[64][border], rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(
    samples=st.integers(1, 6),
    units=st.integers(1, 7),
    classes=st.integers(1, 5),
    steps=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_linear_synthesiser_is_a_matrix_over_features_and_label(samples, units, classes, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, steps, units) if steps else (samples, units)
    y, label = draw(generator, *shape), torch.randint(classes, (samples,), generator=generator)
    synthesiser = LinearSynthesiser(y, Design(classes=classes))
    W, b = draw(generator, units, units + classes).numpy(), draw(generator, units).numpy()
    with torch.no_grad():  # W [y; onehot(c)] + b: the bias is a part of every row of the table
        synthesiser.weight.copy_(torch.tensor(W[:, :units]))
        synthesiser.table.copy_(torch.tensor(W[:, units:].T + b))
    onehot = np.eye(classes)[label.numpy()]
    beside = np.broadcast_to(onehot.reshape(samples, *[1] * bool(steps), classes), (*shape[:-1], classes))
    wanted = np.concatenate([y.numpy(), beside], axis=-1) @ W.T + b
    np.testing.assert_allclose(synthesiser(y, torch.tensor(onehot)).detach().numpy(), wanted, rtol=0, atol=1e-12)
    prediction = synthesiser.predict(y, torch.tensor(onehot), samples)
    np.testing.assert_allclose(prediction.credit.numpy(), wanted / samples, rtol=0, atol=1e-12)

    # its gradients by hand are those of autograd
    difference = draw(generator, *shape)
    synthesiser.regress(prediction, difference.clone())
    by_hand = [parameter.grad.clone() for parameter in synthesiser.parameters()]
    automatic = torch.autograd.grad(synthesiser(y, torch.tensor(onehot)), list(synthesiser.parameters()), difference)
    torch.testing.assert_close(by_hand, list(automatic), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)])
def test_an_unconditioned_linear_synthesiser_learns_as_autograd_would(shape):
    generator = torch.Generator().manual_seed(2)
    y, difference = draw(generator, *shape), draw(generator, *shape)
    synthesiser = LinearSynthesiser(y, Design())
    with torch.no_grad():
        for parameter in synthesiser.parameters():
            parameter.copy_(draw(generator, *parameter.shape))
    wanted = y.numpy() @ synthesiser.weight.detach().numpy().T + synthesiser.table.detach().numpy()[0]
    np.testing.assert_allclose(synthesiser(y).detach().numpy(), wanted, rtol=0, atol=1e-12)
    prediction = synthesiser.predict(y, None, 5)
    np.testing.assert_allclose(prediction.credit.numpy(), wanted / 5, rtol=0, atol=1e-12)
    automatic = torch.autograd.grad(synthesiser(y), list(synthesiser.parameters()), difference)
    synthesiser.regress(prediction, difference.clone())
    torch.testing.assert_close([p.grad for p in synthesiser.parameters()], list(automatic), rtol=0, atol=1e-12)


def test_a_label_enters_an_image_as_one_plane_for_each_class():
    generator = torch.Generator().manual_seed(2)
    rule = SyntheticGradients(conditioned=True, kernel_size=3)
    learner = learner_for(MODELS["cnn"], rule, dtype=F64)
    randomise(learner)
    synthesiser = learner.cells[0].auxiliary[0]
    y, label = draw(generator, 5, 4, 4, 4), torch.randint(CLASSES, (5,), generator=generator)
    (weight, bias) = synthesiser.parameters()
    by_features = F.conv2d(y, weight[:, :4], bias, padding=1)
    of_label = torch.stack([F.conv2d(torch.ones(1, 1, 4, 4, dtype=F64), weight[:, 4 + c, None], padding=1)[0] for c in label])
    torch.testing.assert_close(synthesiser(y, F.one_hot(label, CLASSES).to(F64)), by_features + of_label, rtol=0, atol=1e-12)


def test_labels_that_the_loss_ignores_do_not_break_a_conditioned_synthesiser():
    learner = learner_for(MODELS["in_place"], SyntheticGradients(conditioned=True))
    x, y = MODELS["in_place"].batches(1)[0]
    y[0] = -100
    assert learner.step(x, y).loss > 0


@pytest.mark.parametrize(
    ("target", "loss"),
    [
        (torch.zeros(8, CLASSES + 1), lambda scores, target: F.mse_loss(scores, target[:, :-1])),
        (torch.zeros(8), lambda scores, target: F.mse_loss(scores[:, 0], target)),
        (torch.zeros(8, CLASSES, dtype=torch.int64), lambda scores, target: F.mse_loss(scores, target.float())),
        ((torch.zeros(8, CLASSES), torch.zeros(8)), lambda scores, target: F.mse_loss(scores, target[0])),
    ],
    ids=["width", "no width", "whole bits", "tree"],
)
def test_targets_that_cannot_condition_are_refused_by_a_conditioned_synthesiser(target, loss):
    """Neither class numbers nor real numbers of the shape of the model's output; nothing is learnt."""
    learner = lf.convert(
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, CLASSES)),
        "cdni",
        loss=loss,
        optimizer=cases.sgd,
        example_input=torch.zeros(2, 6),
    )
    before = learner.state_dict()
    with pytest.raises(ValueError, match=r"^a label-conditioned synthesiser needs class numbers [^\n]*$"):
        learner.step(torch.ones(8, 6), target)
    assert_same(learner.state_dict(), before)


# ---- checkpointing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", cases.MODELS)
@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
def test_checkpointing_is_backprop_and_keeps_less(model, optimizer):
    case, after, peaks = cases.MODELS[model], [], []
    for rule in (lf.rules.Backprop(), lf.rules.Checkpointing()):
        learner = cases.learner_for(case, rule, optimizer=cases.OPTIMIZERS[optimizer])
        meter = ActivationMeter(learner.model)
        torch.manual_seed(3)
        with meter.watch():
            losses = [learner.step(*batch).loss for batch in case.batches(5)]
        after.append([losses, dict(learner.model.state_dict())])
        peaks.append(meter.peak)
        assert meter.now == 0
    assert_same(after[1], after[0])
    assert peaks[1] < peaks[0]


def test_checkpointing_refuses_late_links():
    with pytest.raises(ValueError, match=r"^checkpointing runs blocks again .*: use links without delay, or plain backprop$"):
        cases.learner_for(cases.MODELS["mlp"], lf.rules.Checkpointing(), schedule=cases.SCHEDULES[1])


# ---- feedback alignment ------------------------------------------------------------------------------------------------------

FEEDBACK_NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, CLASSES)), (6,)),
    "mlp": (cases.mlp, (6,)),
    "conv1d": (
        lambda: nn.Sequential(
            *(
                nn.Conv1d(2, 4, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2),
                nn.Tanh(),
            ),
            *(nn.Flatten(), nn.Linear(36, CLASSES)),
        ),
        (2, 11),
    ),
    "conv2d": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 8, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2), nn.Tanh()),
            *(nn.Conv2d(8, 4, 1, bias=False), nn.Flatten(), nn.Linear(60, CLASSES)),
        ),
        (2, 9, 7),
    ),
    "conv3d": (
        lambda: nn.Sequential(
            *(nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv3d(2, 4, 2, stride=2, groups=2), nn.Flatten()),
            nn.Linear(32, CLASSES),
        ),
        (1, 4, 5, 4),
    ),
    "residual": (cases.Residual, (6,)),
}


def use_own_weights(learner):
    """B = W, which moves on with every update."""
    for cell in learner.cells:
        for weight, fixed in cell.auxiliary.pairs():
            fixed.weights.copy_(weight.detach())


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("blocks", [None, 1])
@pytest.mark.parametrize("network", FEEDBACK_NETWORKS)
def test_feedback_through_the_forward_weights_is_backprop(network, blocks, dtype):
    make, shape = FEEDBACK_NETWORKS[network]
    generator = torch.Generator().manual_seed(1)
    batches = [(draw(generator, 8, *shape, dtype=dtype), torch.randint(CLASSES, (8,), generator=generator)) for _ in range(5)]
    own, backprop, fixed = two_learners(
        make, (lf.rules.FeedbackAlignment(), lf.rules.Backprop(), lf.rules.FeedbackAlignment()), batches[0][0], cases.momentum,
        blocks=blocks,
    )  # fmt: skip
    for learner in (own, backprop, fixed):
        torch.manual_seed(3)
        for batch in batches:
            if learner is own:
                use_own_weights(learner)
            learner.step(*batch)
    assert_same(dict(own.model.state_dict()), dict(backprop.model.state_dict()))
    assert cases.differs(next(fixed.model.parameters()), next(backprop.model.parameters()))


@settings(deadline=None, max_examples=15)
@given(
    samples=st.integers(1, 5), widths=st.lists(st.integers(1, 6), min_size=3, max_size=4), seed=st.integers(0, 99),
    cut=st.booleans(),
)  # fmt: skip
def test_a_dense_network_s_errors_go_down_through_the_feedback_matrices(samples, widths, seed, cut):
    """Every weight's update against NumPy: delta_l = (delta_{l+1} B_{l+1}) * tanh'(z_l), dW_l = delta_l^T h_{l-1}."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layers = [nn.Linear(into, out, dtype=F64) for into, out in itertools.pairwise([3, *widths])]
    model = nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers))
    start = [layer.weight.detach().numpy().copy() for layer in layers], [layer.bias.detach().numpy().copy() for layer in layers]
    x, y = draw(generator, samples, 3), draw(generator, samples, widths[-1])
    learner = lf.convert(model, "fa", loss=F.mse_loss, optimizer=descent(1.0), blocks=None if cut else 1, example_input=x)
    matrices = {id(weight): B.weights.numpy() for cell in learner.cells for weight, B in cell.auxiliary.pairs()}
    learner.step(x, y)

    h = [x.numpy()]
    for W, b in zip(*start, strict=True):
        h.append(np.tanh(h[-1] @ W.T + b))
    credit = 2 * (h[-1] - y.numpy()) / y.numel()
    for index in reversed(range(len(layers))):
        delta = credit * (1 - h[index + 1] ** 2)
        np.testing.assert_allclose(start[0][index] - layers[index].weight.detach().numpy(), delta.T @ h[index], atol=1e-12)
        np.testing.assert_allclose(start[1][index] - layers[index].bias.detach().numpy(), delta.sum(0), atol=1e-12)
        credit = delta @ matrices[id(layers[index].weight)]


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_convolution_sends_credit_down_through_its_feedback_weights(data):
    """Against autograd through a plain convolution with B in the place of W; the weight's own gradient stays the usual one."""
    rank = data.draw(st.integers(1, 3), label="rank")
    groups = data.draw(st.integers(1, 2), label="groups")

    def tuples(low, high):
        return tuple(data.draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank)))

    kernel, stride, padding, dilation = tuples(1, 3), tuples(1, 2), tuples(0, 2), tuples(1, 2)
    size = tuple(d * (k - 1) + extra for d, k, extra in zip(dilation, kernel, tuples(1, 4), strict=True))
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    settings_ = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](2 * groups, 2 * groups, kernel, dtype=F64, **settings_)
    plain = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    block = nn.Sequential(layer)
    weights = FeedbackWeights(block.named_modules(), rule="feedback alignment")
    ((_, fixed),) = weights.pairs()
    B = fixed.weights
    x = torch.randn(2, 2 * groups, *size, dtype=F64, requires_grad=True)
    with weights.in_force():
        y = block(x)
    credit = torch.randn_like(y)
    at_x, at_weight, at_bias = torch.autograd.grad(y, [x, layer.weight, layer.bias], credit)
    torch.testing.assert_close(y, plain(x, layer.weight, layer.bias, **settings_), rtol=0, atol=1e-12)
    torch.testing.assert_close(at_x, torch.autograd.grad(plain(x, B, **settings_), x, credit)[0], rtol=0, atol=1e-12)
    usual = torch.autograd.grad(plain(x.detach(), layer.weight, layer.bias, **settings_), [layer.weight, layer.bias], credit)
    torch.testing.assert_close([at_weight, at_bias], list(usual), rtol=0, atol=1e-12)


class Wrapped(nn.Module):
    """Calls a layer as its kind wants to be called."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if isinstance(self.layer, nn.Bilinear):
            return self.layer(x, x)
        if isinstance(self.layer, nn.GRUCell):
            return self.layer(x)
        if isinstance(self.layer, nn.LSTM):
            return self.layer(x[:, None])[0][:, 0]
        return self.layer(x[:, :, None])[:, :, 0]


STRANGE_LAYERS = {
    "Bilinear": lambda: nn.Bilinear(6, 6, 6),
    "GRUCell": lambda: nn.GRUCell(6, 6),
    "LSTM": lambda: nn.LSTM(6, 6, batch_first=True),
}


def strange_model(name):
    return nn.Sequential(nn.Linear(6, 6), Wrapped(STRANGE_LAYERS[name]()), nn.Linear(6, CLASSES))


@pytest.mark.parametrize("name", STRANGE_LAYERS)
def test_a_layer_without_a_feedback_form_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"(?s)feedback alignment.*{name}.*register_feedback"):
        lf.convert(strange_model(name), "fa", loss=F.cross_entropy, optimizer=cases.sgd)


@pytest.mark.parametrize("name", STRANGE_LAYERS)
def test_the_refusal_calls_the_layer_as_the_user_s_model_does(name):
    with pytest.raises(ValueError, match=r"'1\.layer'"):
        lf.convert(strange_model(name), "fa", loss=F.cross_entropy, optimizer=cases.sgd)


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(feedback, "_FORMS", dict(feedback._FORMS))


def transposed(layer, weights, gradient, shape):
    return torch.ops.aten.convolution_backward(
        gradient, gradient.new_empty(shape), weights, None, layer.stride, layer.padding, layer.dilation, True,
        layer.output_padding, layer.groups, [True, False, False],
    )[0]  # fmt: skip


@pytest.mark.usefixtures("registry")
def test_a_registered_layer_works():
    class Widening(nn.ConvTranspose2d):
        pass

    register_feedback(Widening)(transposed)
    generator = torch.Generator().manual_seed(1)

    def make():
        return nn.Sequential(
            *(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), Widening(2, 3, 3, stride=2, output_padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(192, CLASSES)),
        )

    batches = [(draw(generator, 8, 1, 8, 8), torch.randint(CLASSES, (8,), generator=generator)) for _ in range(4)]
    own, backprop = two_learners(make, (lf.rules.FeedbackAlignment(), lf.rules.Backprop()), batches[0][0], cases.sgd)
    for batch in batches:
        use_own_weights(own)
        assert own.step(*batch).loss == backprop.step(*batch).loss
    assert_same(dict(own.model.state_dict()), dict(backprop.model.state_dict()))


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", ["Bilinear", "LSTM"])
def test_a_registered_layer_of_several_matrices_or_inputs_is_refused_with_a_reason(name):
    register_feedback(getattr(nn, name))(lambda layer, weights, gradient, shape: gradient.new_zeros(shape))
    generator = torch.Generator().manual_seed(1)
    with pytest.raises(ValueError, match=name):
        lf.convert(strange_model(name), "fa", loss=F.cross_entropy, optimizer=cases.sgd).step(
            draw(generator, 8, 6, dtype=torch.float32), torch.randint(CLASSES, (8,), generator=generator)
        )


@pytest.mark.parametrize(
    "padding", [{"padding": "same"}, {"padding": "valid"}, {"padding": 1, "padding_mode": "circular"}], ids=str
)
def test_every_padding_has_a_feedback_form(padding):
    def make():
        convolution = nn.Conv1d(4, 4, 3, dtype=F64, **padding)
        return nn.Sequential(nn.Conv1d(2, 4, 1, dtype=F64), convolution, nn.Flatten(), nn.LazyLinear(CLASSES, dtype=F64))

    generator = torch.Generator().manual_seed(1)
    x, y = draw(generator, 8, 2, 6), torch.randint(CLASSES, (8,), generator=generator)
    torch.manual_seed(0)
    first = make()
    first(x)
    second = copy.deepcopy(first)
    own, backprop = (
        lf.convert(model, rule, loss=F.cross_entropy, optimizer=cases.sgd)
        for model, rule in ((first, "fa"), (second, "backprop"))
    )
    use_own_weights(own)
    own.step(x, y)
    backprop.step(x, y)
    for value, expected in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


# ---- direct feedback alignment -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(
    samples=st.integers(1, 5), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), classes=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_broadcast_credit_is_the_error_times_a_matrix(samples, shape, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    y, scores, error = draw(generator, samples, *shape), draw(generator, samples, classes), draw(generator, samples, classes)
    rule, place = DirectFeedbackAlignment(), lf.Place(0, 2)
    marked = [y.clone().requires_grad_(), scores.clone().requires_grad_()]
    auxiliary = rule.build(lf.Site(place=place, block=nn.Identity(), rehearsal=marked))
    (B,) = auxiliary.buffers()
    assert B.shape == (classes, y[0].numel())
    context = lf.Context(place=place, auxiliary=auxiliary, inputs=None, outputs=(y,), samples=samples, error=(error,))
    (credit,) = rule.credit(context)
    np.testing.assert_allclose(credit.numpy(), (error.numpy() @ B.numpy()).reshape(y.shape), rtol=0, atol=1e-12)


def test_a_broadcast_error_moves_a_block_as_numpy_says():
    generator = torch.Generator().manual_seed(1)
    layers = [nn.Linear(6, 5, dtype=F64), nn.Linear(5, 4, dtype=F64), nn.Linear(4, CLASSES, dtype=F64)]
    model = nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers[:2]), layers[2])
    x, y = draw(generator, 8, 6), torch.randint(CLASSES, (8,), generator=generator)
    learner = lf.convert(model, "dfa", loss=F.cross_entropy, optimizer=descent(1.0), example_input=x)
    W = [layer.weight.detach().numpy().copy() for layer in layers]
    b = [layer.bias.detach().numpy().copy() for layer in layers]
    loss = learner.step(x, y).loss

    h = [x.numpy()]
    h += [np.tanh(h[-1] @ W[0].T + b[0])]
    h += [np.tanh(h[-1] @ W[1].T + b[1])]
    scores = np.exp(h[2] @ W[2].T + b[2])
    likely = scores / scores.sum(axis=1, keepdims=True)
    onehot = np.eye(CLASSES)[y.numpy()]
    error = (likely - onehot) / len(x)
    assert loss == pytest.approx(-np.log((likely * onehot).sum(axis=1)).mean(), rel=1e-12)
    matrices = [next(iter(cell.auxiliary.buffers())).numpy() for cell in learner.cells[:2]]
    deltas = [(error @ matrices[i]) * (1 - h[i + 1] ** 2) for i in (0, 1)] + [error]
    for index, delta in enumerate(deltas):
        np.testing.assert_allclose(W[index] - layers[index].weight.detach().numpy(), delta.T @ h[index], rtol=0, atol=1e-12)
        np.testing.assert_allclose(b[index] - layers[index].bias.detach().numpy(), delta.sum(axis=0), rtol=0, atol=1e-12)
