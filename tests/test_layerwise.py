"""Networks of equal structure as one, layer by layer: what comes out is what each gives by itself."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lockfree.flight import Flight
from lockfree.heads import Head, StackedHeads
from lockfree.layerwise import LAYERS, Layerwise
from lockfree.models.residual import ResidualBlock, SingleResidualBlock
from lockfree.objective import Objective
from lockfree.rule import Context, Place
from lockfree.stacking import Descent, ModuleStack

N, M = 3, 4


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1)

    def forward(self, x):
        y = torch.tanh(self.conv(x)) * self.gate(x).sigmoid()
        y += 0.5 * x
        return F.relu(2 - y)


class Mixed(nn.Module):
    """Values that lie as rows meet values that lie as channels, from both sides."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        return x + self.norm(self.linear(x)) - (self.norm(x) - x)


class Decaying(nn.Module):
    """A loop over a list of its own layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + F.gelu(layer(x), approximate="tanh")
        return x


SERVED = {
    "residual": (lambda: ResidualBlock(4, 4), (4, 6, 6)),
    "residual of one convolution": (lambda: SingleResidualBlock(4), (4, 6, 6)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding="same", groups=2, dilation=2), nn.ELU()), (4, 6, 6)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 2, 3, padding=1, bias=False), nn.BatchNorm3d(2), nn.GELU()), (2, 3, 3, 3)),
    "a layer alone": (lambda: nn.Conv2d(4, 4, 3, padding=1), (4, 6, 6)),
    "1d with a gate": (Gated, (4, 6)),
    "rows and channels": (Mixed, (5,)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.SiLU()), (4, 3, 3)),
    "layer norm of places": (lambda: nn.Sequential(nn.LayerNorm((3, 5)), nn.Linear(5, 5), nn.LayerNorm(5)), (3, 5)),
    "without scale": (lambda: nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, affine=False, track_running_stats=False)), (5,)),
    "a loop": (Decaying, (5,)),
    "pools": (
        lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(2, 3, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)),
        (2, 8, 8),
    ),
    "pools of sequences": (lambda: nn.Sequential(nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(1)), (2, 8)),
    "pools of volumes": (lambda: nn.Sequential(nn.MaxPool3d(2), nn.AvgPool3d(2), nn.AdaptiveAvgPool3d(1)), (2, 8, 8, 8)),
    "means over places": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)), (2, 8, 8)),
}


def networks(make, training=True):
    torch.manual_seed(0)
    made = [make().double().train(training) for _ in range(N)]
    for network in made:
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.data.add_(0.1 * torch.rand_like(tensor))
    return made


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SERVED)
def test_values_gradients_and_buffers_are_those_of_each_alone(name, training):
    make, shape = SERVED[name]
    alone = networks(make, training)
    together = copy.deepcopy(alone)
    x = torch.randn(N, M, *shape, dtype=torch.float64)
    stack = ModuleStack(together)
    assert stack.gives(lambda: [network(one) for network, one in zip(copy.deepcopy(alone), x, strict=True)], x)
    assert isinstance(stack._run, Layerwise)

    leaf = x.clone().requires_grad_()
    made = stack.run(leaf)
    credit = torch.randn_like(made)
    (reported,) = stack.differentiate(made, credit, (leaf,))
    gradients = list(zip(*(found.unbind() for found in stack._found), strict=True))
    stack.descend(_Nothing())

    for index, network in enumerate(alone):
        own = x[index].clone().requires_grad_()
        y = network(own)
        found = torch.autograd.grad(y, [own, *network.parameters()], credit[index])
        torch.testing.assert_close(made[index], y, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(reported[index], found[0], rtol=1e-9, atol=1e-11)
        if found[1:]:
            torch.testing.assert_close(gradients[index], found[1:], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(dict(together[index].named_buffers()), dict(network.named_buffers()), rtol=1e-12, atol=0)


class _Nothing(Descent):
    def follow(self, stack, gradient):
        pass


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.factor * x


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(5, 5), nn.Linear(5, 5)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(self.one(x))


def hooked():
    layer = nn.Linear(5, 5)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


UNKNOWN = {
    "branches on what it is given": Branching,
    "a parameter of its own": Scaled,
    "tied weights": Tied,
    "a hook": hooked,
    "draws": lambda: nn.Sequential(nn.Linear(5, 5), nn.Dropout()),
    "padded by reflection": lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
    "an average over all batches": lambda: nn.BatchNorm1d(5, momentum=None),
    "a softmax over features": lambda: nn.Softmax(dim=1),
    "two inputs": lambda: nn.Bilinear(5, 5, 5),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_in_the_tables_is_left_to_others(name):
    assert Layerwise.of(UNKNOWN[name]()) is None


def test_another_function_under_a_known_name_is_found_out():
    """What is in the table by type but holds a number that tells it from its likes gives other values."""
    made = [nn.Sequential(nn.Linear(5, 5), nn.LeakyReLU(slope)).double() for slope in (0.1, 0.2, 0.3)]
    x = torch.randn(N, M, 5, dtype=torch.float64)
    stack = ModuleStack(made)
    assert not stack.gives(lambda: [network(one) for network, one in zip(made, x, strict=True)], x)


def test_every_layer_of_the_table_is_tried():
    tried = {type(part) for make, _ in SERVED.values() for part in make().modules()}
    elementwise = {kind for kind, (run, _) in LAYERS.items() if run.__name__ == "_elementwise"}
    assert LAYERS.keys() - elementwise <= tried


@pytest.mark.parametrize("kind", sorted((k for k, (run, _) in LAYERS.items() if run.__name__ == "_elementwise"), key=repr))
def test_elementwise_layers(kind):
    made = [kind() for _ in range(N)]
    x = torch.randn(N, M, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = Layerwise.of(made[0])
    assert torch.equal(together({}, {}, (x,)), made[0](x))


# ---- heads -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 4, 4), (64, 8, 8)], ids=["rows", "images", "pooled images"])
@pytest.mark.parametrize("ignored", [False, True])
def test_stacked_heads_are_each_head_alone(shape, ignored):
    torch.manual_seed(0)
    example = torch.zeros(1, *shape, dtype=torch.float64)
    heads = [Head(example, torch.zeros(1, 5, dtype=torch.float64)) for _ in range(N)]
    for parameter in (p for head in heads for p in head.parameters()):
        parameter.data.normal_()
    outputs, targets = torch.randn(N, M, *shape, dtype=torch.float64), torch.randint(5, (N, M))
    if ignored:
        targets[1, 2] = targets[2, 0] = -100
    wanted = []
    for head, y, target in zip(copy.deepcopy(heads), outputs, targets, strict=True):
        leaf = y.clone().requires_grad_()
        loss = F.cross_entropy(head(leaf), target)
        wanted.append((loss, *torch.autograd.grad(loss, [leaf, head.linear.weight, head.linear.bias])))

    stack = StackedHeads.of(heads, Objective(nn.CrossEntropyLoss()))
    credit = stack.credit(outputs, stack.shown([Flight(torch.empty(0), target, 1) for target in targets], outputs))
    gradients = _Gradients()
    stack.descend(gradients)
    made = zip(stack.losses(), credit, *gradients.found, strict=True)
    for mine, theirs in zip(made, wanted, strict=True):
        torch.testing.assert_close(mine, tuple(one.detach() for one in theirs), rtol=1e-10, atol=1e-12)


class _Gradients(Descent):
    def __init__(self):
        self.found = []

    def follow(self, stack, gradient):
        self.found.append(gradient)

    def follow_product(self, stack, left, right):
        self.found.append(torch.bmm(left, right))


def test_other_losses_and_heads_are_left_to_others():
    heads = [Head(torch.zeros(1, 7), torch.zeros(1, 5)) for _ in range(N)]
    for loss in (F.mse_loss, nn.CrossEntropyLoss(label_smoothing=0.1), lambda scores, target: F.cross_entropy(scores, target)):
        assert StackedHeads.of(heads, Objective(loss)) is None
    assert StackedHeads.of([nn.Linear(7, 5)] * N, Objective(F.cross_entropy)) is None
    of_places = [Head(torch.zeros(1, 4, 7), torch.zeros(1, 4, 5)) for _ in range(N)]
    assert StackedHeads.of(of_places, Objective(F.cross_entropy)) is None
    context = Context(Place(0, 2), None, None, (torch.zeros(2, 7),), 2, target=torch.rand(2, 5))
    assert not StackedHeads.of(heads, Objective(F.cross_entropy)).agrees([context])
