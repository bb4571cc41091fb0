"""The plain networks: shapes, sizes, blocks, and that nothing in them works in place."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import lockfree as lf
from lockfree import models

SHAPES = {
    "mlp": [(1, 8, 8), (3, 5, 7), (1, 28, 28)],
    "cnn": [(1, 8, 8), (1, 28, 28), (3, 32, 32)],
    "lenet": [(1, 12, 12), (1, 28, 28), (3, 32, 32)],
    "vit": [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 9, 13)],
    "vgg8b": [(1, 16, 16), (1, 28, 28), (3, 32, 32)],
    "resnet20": [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 9, 13)],
}
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_table_above_covers_every_model():
    assert set(SHAPES) == set(models.names())


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_scores_have_a_column_for_each_class(name, shape):
    model = models.build(name, input_shape=shape, classes=7)
    assert model(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_every_parameter_learns(name, shape):
    torch.manual_seed(0)
    model = models.build(name, input_shape=shape, classes=5)
    nn.functional.cross_entropy(model(torch.randn(4, *shape)), torch.tensor([0, 1, 2, 3])).backward()
    still = [key for key, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    assert still == []


@pytest.mark.parametrize("name", models.names())
def test_nothing_works_in_place(name):
    model = models.build(name, input_shape=(3, 32, 32), classes=10)
    assert [key for key, module in model.named_modules() if getattr(module, "inplace", False)] == []
    graph = fx.symbolic_trace(model).graph
    called = [node.target for node in graph.nodes if node.op in ("call_function", "call_method")]
    names = [target if isinstance(target, str) else target.__name__ for target in called]
    assert [target for target in names if target.endswith("_") or target.startswith("i")] == []
    assert not any(node.kwargs.get("inplace") for node in graph.nodes)


@pytest.mark.parametrize("name", models.names())
def test_the_same_seed_builds_the_same_weights(name):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(
            torch.cat([p.detach().flatten() for p in models.build(name, input_shape=(1, 28, 28), classes=10).parameters()])
        )
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(("name", "blocks"), [("mlp", 4), ("cnn", 4), ("lenet", 5), ("vgg8b", 8), ("vit", 6)])
def test_children_are_the_blocks(name, blocks):
    model = models.build(name, input_shape=(1, 28, 28), classes=10).eval()
    assert isinstance(model, nn.Sequential)
    assert len(model) == blocks
    x = y = torch.randn(2, 1, 28, 28)
    for child in model:
        y = child(y)
    assert torch.equal(y, model(x))


def test_sizes_are_the_papers():
    assert parameters(models.build("resnet20", input_shape=(3, 32, 32), classes=10)) == 269_722
    assert parameters(models.build("vgg8b", input_shape=(1, 28, 28), classes=10)) == pytest.approx(7.3e6, rel=0.01)
    assert parameters(models.build("vgg8b", input_shape=(3, 32, 32), classes=10)) == pytest.approx(8.9e6, rel=0.01)


def test_vgg8b_is_the_sum_of_its_layers():
    kernels = 9 * (3 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512 + 512 * 512)
    normalisations = 2 * (128 + 256 + 256 + 512 + 512 + 512 + 1024)
    dense = 512 * 2 * 2 * 1024 + 1024 * 10 + 10
    assert parameters(models.build("vgg8b", input_shape=(3, 32, 32), classes=10)) == kernels + normalisations + dense


def test_resnet20_has_twenty_layers_with_weights():
    model = models.build("resnet20", input_shape=(3, 32, 32), classes=10)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == 20
    assert [name for name, _ in model.named_children()] == ["conv1", "bn1", "layer1", "layer2", "layer3", "fc"]


def test_the_shortcut_thins_out_and_pads_with_zeros():
    x = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    y = models.resnet20((2, 8, 8), 2).layer2[0].shortcut(x)
    assert y.shape == (1, 2 + 16, 2, 2)
    assert torch.equal(y[0, :2], torch.tensor([[[0.0, 2.0], [8.0, 10.0]], [[16.0, 18.0], [24.0, 26.0]]]))
    assert y[0, 2:].abs().sum() == 0


def test_a_residual_block_that_adds_nothing_passes_on_the_input():
    block = models.resnet20((1, 8, 8), 2).layer1[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(x), x)


def test_mlp_takes_any_hidden_layers():
    kinds = [type(layer).__name__ for layer in models.mlp((1, 2, 3), 4, hidden=(5, 6), batch_norm=False)[1]]
    assert kinds == ["Linear", "ReLU"]
    assert parameters(models.mlp((1, 2, 3), 4, hidden=(5, 6), batch_norm=False)) == (6 + 1) * 5 + (5 + 1) * 6 + (6 + 1) * 4
    assert parameters(models.mlp((1, 2, 3), 4, hidden=(5,))) == 6 * 5 + 2 * 5 + (5 + 1) * 4
    linear = models.mlp((1, 2, 3), 4, hidden=())
    assert parameters(linear) == (6 + 1) * 4
    assert linear(torch.zeros(3, 1, 2, 3)).shape == (3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.build("resnet2", input_shape=(1, 8, 8), classes=2), "did you mean 'resnet20'"),
        (
            lambda: models.build("transformer", input_shape=(1, 8, 8), classes=2),
            "choose from mlp, cnn, lenet, vgg8b, resnet20, vit",
        ),
        (lambda: models.build("vgg8b", input_shape=(1, 8, 8), classes=2), "16x16 or larger, got 8x8"),
        (lambda: models.build("cnn", input_shape=(1, 28, 7), classes=2), "8x8 or larger, got 28x7"),
        (lambda: models.build("resnet20", input_shape=(1, 4, 4), classes=2), "8x8 or larger, got 4x4"),
        (lambda: models.build("mlp", input_shape=(0, 8, 8), classes=2), r"got \(0, 8, 8\)"),
        (lambda: models.build("mlp", input_shape=(1, 8, 8), classes=0), "classes=0"),
        (lambda: models.mlp((1, 8, 8), 2, hidden=(3, 0)), r"got \(3, 0\)"),
    ],
)
def test_errors_say_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_hsic_paper_s_perceptron():
    model = models.normalised_mlp((1, 4, 4), 10, hidden=(8, 6))
    assert parameters(model) == 16 * 8 + 8 * 6 + 6 * 10 + 10
    assert model(torch.randn(5, 1, 4, 4)).shape == (5, 10)
    assert parameters(models.normalised_mlp((1, 4, 4), 10, hidden=(8,), classifier=False)) == 16 * 8 + 8 * 10
    assert parameters(models.normalised_mlp((1, 4, 4), 10, hidden=(8,), batch_norm=False)) == 17 * 8 + 9 * 10
    x = torch.randn(5, 1, 4, 4)
    for activation, function in (("leaky-relu", F.leaky_relu), ("selu", F.selu), ("sigmoid", torch.sigmoid)):
        layer = models.normalised_mlp((1, 4, 4), 3, hidden=(8,), activation=activation)[0]
        made = x.flatten(1) @ layer[1].weight.T
        normal = (made - made.mean(0)) / (made.var(0, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(layer(x), function(normal))
    with pytest.raises(ValueError, match="unknown activation 'rellu'"):
        models.normalised_mlp((1, 4, 4), 10, activation="rellu")
    with pytest.raises(ValueError, match=r"normalised_mlp: expected hidden layers of 1 unit or more, got \(0,\)"):
        models.normalised_mlp((1, 4, 4), 10, hidden=(0,))


def test_the_hsic_paper_s_residual_network():
    for shape, side in (((1, 28, 28), 12), ((3, 32, 32), 14)):
        model = models.single_resnet(shape, 10)
        assert [type(block).__name__ for block in model][1:6] == ["SingleResidualBlock"] * 5
        convolutions = shape[0] * 25 * 64 + 5 * 25 * 64 * 64
        assert parameters(model) == convolutions + side * side * 64 * 512 + 5130
    stem, block, dense, _ = models.single_resnet((1, 8, 8), 10, channels=3, depth=1)
    images, x = torch.randn(4, 1, 8, 8), torch.randn(4, 3, 6, 6)

    def normal(y):
        return F.batch_norm(y, None, None, training=True)

    torch.testing.assert_close(stem(images), F.relu(normal(F.conv2d(images, stem[0].weight, stride=2))))
    torch.testing.assert_close(dense(x[:, :, :2, :2]), F.relu(normal(x[:, :, :2, :2].flatten(1) @ dense[1].weight.T)))
    torch.testing.assert_close(block(x), F.relu(normal(F.relu(normal(F.conv2d(x, block.conv.weight, padding=2))) + x)))
    assert models.single_resnet((1, 5, 5), 3, channels=2, depth=0, features=4)(torch.randn(2, 1, 5, 5)).shape == (2, 3)
    with pytest.raises(ValueError, match="single_resnet"):
        models.single_resnet((1, 4, 4), 10)


def test_networks_side_by_side():
    model, x = models.side_by_side((1, 4, 4), 10, hidden=(8, 6), count=2), torch.randn(5, 1, 4, 4)
    assert parameters(model) == 2 * (16 * 8 + 8 * 6) + 6 * 10 + 10
    handed = [model[0].parts[i](x) for i in range(2)]
    assert all(map(torch.equal, model[0](x), handed))
    second = [model[1].parts[i](handed[i]) for i in range(2)]
    mean = F.batch_norm(sum(second) / 2, None, None, training=True)
    torch.testing.assert_close(model(x), model[2][1](mean))
    with pytest.raises(ValueError, match="side_by_side: expected one network or more, got count=0"):
        models.side_by_side((1, 4, 4), 10, count=0)
    with pytest.raises(ValueError, match="side_by_side: expected one hidden layer or more"):
        models.side_by_side((1, 4, 4), 10, hidden=())


def test_a_language_model_sees_what_came_before_alone():
    torch.manual_seed(0)
    model = models.gpt(7, 6, width=8, depth=2, heads=2)
    x = torch.randint(7, (3, 6))
    y = x.clone()
    y[:, 4] = (y[:, 4] + 1) % 7
    before, after = model(x), model(y)
    assert before.shape == (3, 6, 7)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])
    assert model(x[:, :2]).shape == (3, 2, 7)
    for sizes in ({"width": 9, "heads": 2}, {"depth": 0}, {"heads": 0}):
        with pytest.raises(ValueError, match="gpt: expected one block and one head or more and a width"):
            models.gpt(7, 6, **sizes)
    with pytest.raises(ValueError, match="gpt: expected one symbol and one place or more"):
        models.gpt(0, 6)


@pytest.mark.parametrize(
    "rule", ["backprop", "fa", "usf", "dfa", "predsim", "mono", "dgl", "infopro", "auglocal", "hsic", "dni"]
)
@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_transformers_learn_under_every_family_of_rules(name, rule):
    """Not under drtp, whose credit does not grow smaller as the network learns and which a residual stream adds up."""
    torch.manual_seed(0)
    if name == "vit":
        model, x, y = models.vit((1, 8, 8), 4, width=16, depth=2, heads=2), torch.randn(16, 1, 8, 8), torch.arange(16) % 4
        x, loss = x + y[:, None, None, None], F.cross_entropy
    else:
        model, x = models.gpt(7, 6, width=16, depth=2, heads=2), torch.randint(7, (16, 6))
        y, loss = (x + 1) % 7, lambda scores, target: F.cross_entropy(scores.flatten(0, 1), target.flatten())
    learner = lf.convert(model, rule, loss=loss, optimizer=lambda p: torch.optim.Adam(p, lr=3e-3), example_input=x[:2])
    losses = [learner.step(x, y).loss for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]
