"""Cutting: the chain computes bit for bit what the model computes, with the user's own parameters, or says why it cannot."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree import models
from lockfree.chain import Chain
from lockfree.cut import CannotCutError
from lockfree.memory import ActivationMeter
from lockfree.values import as_leaves, detach, tensors

# ---- models ------------------------------------------------------------------------------------------------------------------


class Outer(nn.Module):
    """Named submodules at depth."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.body = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(torch.relu(self.stem(x))))


class Listed(nn.Module):
    """Layers in a ModuleList, called in a loop."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)


class UNet(nn.Module):
    """Two skips, the outer of which travels over three blocks."""

    def __init__(self):
        super().__init__()
        self.down1 = nn.Conv2d(1, 4, 3, padding=1)
        self.down2 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up2 = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.up1 = nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(a))
        y = self.up2(self.middle(b))
        y = self.up1(torch.cat([y, b], dim=1))
        return self.out(torch.cat([y, a], dim=1))


class DictModel(nn.Module):
    """Takes a dict with a flag in it and gives one back."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, batch):
        mixed = torch.relu(self.left(batch["a"])) + self.right(batch["b"]) * batch["scale"]
        return {"scores": self.head(mixed), "mixed": mixed}


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.second(h), h


class Defaults(nn.Module):
    """Further arguments of forward keep their defaults."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, mask=None, scale=3.0, double=False):
        h = self.first(x) * scale
        if mask is not None:
            h = h * mask
        if double:
            h = 2 * h
        return self.second(h)


class Positions(nn.Module):
    """A transformer's embedding: ``torch.arange`` of a traced size, a buffer, and assertions about the input."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(11, 8), nn.Embedding(9, 8)
        self.register_buffer("offset", torch.linspace(0, 1, 8))
        self.mixer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, ids):
        assert ids.size(1) <= 9, "too long"
        where = torch.arange(ids.size(1), device=ids.device)
        h = self.token(ids) + self.position(where) + self.offset
        return self.head(self.mixer(h))


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.second(F.dropout(torch.relu(self.first(x)), 0.5, self.training))


class DifferentInEvaluation(nn.Module):
    """An ``if self.training`` with other arithmetic in each arm."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.first(x)
        h = torch.tanh(h) + torch.rand_like(h) if self.training else torch.relu(h)
        return self.second(h)


class Tied(nn.Module):
    """One parameter in the first and the last block, and a bare one in the middle."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(6, 4)
        self.middle = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.full((4,), 1.5))
        self.last = nn.Linear(6, 6)

    def forward(self, x):
        h = self.middle(torch.tanh(self.encode(x))) * self.scale
        return self.last(F.linear(h, self.encode.weight.t()))


class InPlace(nn.Module):
    """Every block begins by changing its input in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(4, 4),
            nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)),
            nn.Sequential(nn.Hardtanh(inplace=True), nn.Linear(4, 2)),
        )

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class Branching(nn.Module):
    """A branch that depends on the data."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        if x.sum() > 0:
            x = -x
        return self.second(x)


class AroundBranching(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(4, 4), Branching(), nn.Linear(4, 2)

    def forward(self, x):
        return self.after(self.inner(torch.relu(self.before(x))))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(F.relu(self.used(x)))


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def ids():
    return torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))


def pair():
    return {"a": images(5, 4), "b": images(5, 3), "scale": 2.0, "note": "kept", "flag": True}


MODELS = {
    "flat": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)), None, lambda: images(6, 4)),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.BatchNorm1d(5), nn.ReLU())), nn.Linear(5, 3)),
        None,
        lambda: images(6, 4),
    ),
    "deep name": (Outer, ["body.1", "head"], lambda: images(5, 6)),
    "deepest name": (Outer, ["body.0.0", "body.1.0"], lambda: images(5, 6)),
    "module list": (Listed, None, lambda: images(5, 6)),
    "resnet20": (lambda: models.build("resnet20", input_shape=(3, 8, 8), classes=5), None, lambda: images(4, 3, 8, 8)),
    "resnet20 inside": (
        lambda: models.build("resnet20", input_shape=(3, 8, 8), classes=5),
        ["layer1.1", "layer2.0.bn1", "layer3.2.conv2", "fc"],
        lambda: images(4, 3, 8, 8),
    ),
    "resnet20 in 4": (lambda: models.build("resnet20", input_shape=(3, 8, 8), classes=5), 4, lambda: images(4, 3, 8, 8)),
    "vgg8b": (lambda: models.build("vgg8b", input_shape=(1, 16, 16), classes=3), None, lambda: images(2, 1, 16, 16)),
    "unet": (UNet, None, lambda: images(4, 1, 8, 8)),
    "unet in 3": (UNet, 3, lambda: images(4, 1, 8, 8)),
    "dict": (DictModel, None, pair),
    "tuple": (TwoOutputs, None, lambda: images(5, 4)),
    "defaults": (Defaults, None, lambda: images(5, 4)),
    "positions": (Positions, None, ids),
    "positions in 2": (Positions, 2, ids),
    "functional dropout": (FunctionalDropout, None, lambda: images(5, 4)),
    "module dropout": (
        lambda: nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.4), nn.Linear(9, 9), nn.Dropout(0.4), nn.Linear(9, 2)),
        None,
        lambda: images(5, 4),
    ),
    "other in evaluation": (DifferentInEvaluation, None, lambda: images(5, 4)),
    "tied": (Tied, None, lambda: images(5, 6)),
    "in place": (InPlace, None, lambda: images(5, 4)),
    "branch without cuts": (AroundBranching, None, lambda: images(5, 4)),
    "branch, in 2": (AroundBranching, 2, lambda: images(5, 4)),
    "branch, in 3": (AroundBranching, 3, lambda: images(5, 4)),
    "unused": (Unused, None, lambda: images(5, 4)),
}


def make(name):
    build, blocks, example = MODELS[name]
    torch.manual_seed(0)
    model, x = build(), example()
    return model, Chain(model, blocks, example_input=x), x


def through(chain, x):
    for block in chain.blocks:
        x = block(x)
    return x


def assert_equal(one, other):
    one, other = tensors(one), tensors(other)
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


# ---- equality ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_chain_computes_what_the_model_computes_in_both_modes(name):
    model, chain, x = make(name)
    twin = copy.deepcopy(model)
    assert len(chain) > 1
    for training, _ in itertools.product((True, False), range(2)):  # twice, since a block's first call is special
        model.train(training), twin.train(training)
        torch.manual_seed(7)
        wanted = twin(x)
        random = torch.get_rng_state()
        torch.manual_seed(7)
        made = through(chain, x)
        assert torch.equal(torch.get_rng_state(), random)
        assert_equal(made, wanted)
        assert isinstance(made, type(wanted))
        for (buffer_name, mine), (_, theirs) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
            assert torch.equal(mine, theirs), buffer_name


@pytest.mark.parametrize("name", MODELS)
def test_gradients_through_the_blocks_are_the_models(name):
    model, chain, x = make(name)
    twin = copy.deepcopy(model)
    for run, parts in ((lambda: through(chain, x), model), (lambda: twin(x), twin)):
        torch.manual_seed(7)
        sum((t**2).sum() for t in tensors(run())).backward()
        assert any(p.grad is not None for p in parts.parameters())
    for (key, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), key
        # A parameter used twice may be summed in another order.
        assert mine.grad is None or torch.allclose(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize("name", MODELS)
def test_blocks_hold_the_users_own_parameters(name):
    model, chain, _ = make(name)
    own = {id(parameter) for parameter in model.parameters()}
    held = [id(parameter) for block in chain.blocks for parameter in block.parameters()]
    assert set(held) <= own
    if name != "unused":
        assert set(held) == own
    if name not in ("tied",):
        assert len(held) == len(set(held))  # in one block each


def test_a_parameter_used_in_two_blocks_is_in_both():
    model, chain, _ = make("tied")
    holders = [index for index, block in enumerate(chain.blocks) if any(p is model.encode.weight for p in block.parameters())]
    assert len(holders) == 2
    assert holders[0] == 0


@pytest.mark.parametrize("name", ["in place", "unet", "dict", "resnet20 inside"])
def test_running_a_block_leaves_what_crosses_its_border_alone(name):
    _, chain, values = make(name)
    for block in chain.blocks:
        before = [t.clone() for t in tensors(values)]
        first, second = block(values), block(values)
        assert_equal(values, before)
        assert len(tensors(first)) == len(tensors(second))
        values = as_leaves(detach(second), second)


def test_an_assertion_of_the_user_does_not_stop_the_cut():
    model, chain, x = make("positions")
    assert len(chain) >= 3
    assert torch.equal(through(chain, x), model(x))
    longer = torch.cat([x, x[:, :2]], dim=1)  # torch.arange follows the size of the batch
    assert torch.allclose(through(chain, longer), model(longer))


def test_functional_dropout_drops_in_training_alone():
    model, chain, x = make("functional dropout")
    model.eval()
    assert torch.equal(through(chain, x), through(chain, x))
    model.train()
    assert not torch.equal(through(chain, x), through(chain, x))


class DropoutInside(nn.Module):
    """Functional dropout in a module that a cut opens."""

    def __init__(self):
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(4, 4), FunctionalDropout(), nn.Linear(3, 2)

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


def test_a_submodule_that_the_user_set_to_evaluation_stays_so():
    torch.manual_seed(0)
    model = DropoutInside().train()
    chain, x = Chain(model, ["inner.second", "after"]), images(5, 4)
    model.inner.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(through(chain, x), model(x))


def test_converting_changes_neither_modes_nor_buffers_nor_random_numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[1].eval()
    flags = [module.training for module in model.modules()]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for blocks in (None, 2, ["3"]):
        Chain(model, blocks, example_input=images(4, 4)).rehearse(images(4, 4))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == flags
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


# ---- where blocks begin ------------------------------------------------------------------------------------------------------


def begins(model, blocks=None, example=None):
    return [block.name for block in Chain(model, blocks, example_input=example).blocks]


def test_a_sequential_is_cut_at_its_children():
    assert begins(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))) == ["0", "1", "2"]


def test_children_without_weights_or_with_a_normalisation_join_the_block_before():
    layers = [
        nn.Flatten(),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        nn.Dropout(),
        nn.Tanh(),
    ]
    assert begins(nn.Sequential(*layers, nn.Linear(4, 2), nn.LogSoftmax(1))) == ["1", "4", "8"]


def test_a_prelu_has_weights_of_its_own():
    assert begins(nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 4))) == ["0", "1", "2"]


def test_a_nested_sequential_is_cut_at_the_outer_children():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert begins(model) == ["0", "1"]
    assert begins(model, ["0.1", "1"]) == ["0.0", "0.1", "1"]


def test_module_lists_are_cut_at_their_members():
    assert begins(Listed()) == ["layers.0", "layers.1", "layers.2", "out"]


def test_a_name_at_the_very_beginning_cuts_nothing_off():
    assert begins(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["0"]) == ["0"]


def test_an_empty_list_and_one_block_leave_the_model_whole():
    model = Outer()
    for blocks in ([], 1):
        chain = Chain(model, blocks, example_input=images(5, 6))
        assert len(chain) == 1
        assert torch.equal(chain.blocks[0](images(5, 6)), model(images(5, 6)))


def test_the_order_of_names_does_not_matter():
    assert begins(Outer(), ["head", "body.1"]) == begins(Outer(), ["body.1", "head"])


def test_skips_of_a_unet_travel_over_the_blocks_between():
    _, chain, x = make("unet")
    shapes = [[tuple(t.shape) for t in tensors(values)] for values in chain.rehearse(x)]
    assert len(chain) == 6
    outer, inner = (4, 4, 8, 8), (4, 8, 4, 4)
    # The concatenations run before the module after them is entered, so they end the blocks up2 and up1.
    assert [outer in found for found in shapes] == [True, True, True, True, False, False]
    assert [inner in found for found in shapes] == [False, True, True, False, False, False]
    assert [len(found) for found in shapes] == [1, 2, 3, 2, 1, 1]


def test_integers_and_masks_travel_without_credit():
    _, chain, x = make("positions")
    outputs = chain.rehearse(x)
    assert all(t.is_floating_point() for t in tensors(outputs[-1]))
    for values in outputs:
        for t in tensors(values):
            assert not t.requires_grad or t.is_floating_point()


# ---- balance -----------------------------------------------------------------------------------------------------------------


def costs(model, names, x):
    """Bytes that each block saves for its backward, plus those that enter at its bottom."""
    chain, values, found = Chain(model, names), x, []
    model.train()
    for block in chain.blocks:
        block(values)  # the first call copies its input
        meter = ActivationMeter(model)
        with meter.watch():
            made = block(values)
        found.append(meter.peak + sum(t.untyped_storage().nbytes() for t in tensors(values)))
        values = as_leaves(detach(made), made)
    return found


def widths_model(*widths):
    layers = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(
    "widths", [(8, 64, 8, 32, 16, 128, 4), (100, 4, 4, 4, 4, 50, 10), (3, 3, 3, 3, 3, 3, 3), (2, 9, 30, 80, 200, 20, 5)]
)
def test_the_largest_of_k_pieces_is_as_small_as_any_cut_allows(widths, count):
    torch.manual_seed(0)
    model, x = widths_model(*widths), images(16, widths[0])
    places = [str(i) for i in range(2, len(model), 2)]
    best = min(max(costs(model, list(names), x)) for names in itertools.combinations(places, count - 1))
    chain = Chain(model, count, example_input=x)
    assert len(chain) == count
    assert max(costs(model, [block.name for block in chain.blocks[1:]], x)) <= best


@pytest.mark.parametrize("count", [2, 3])
def test_a_residual_network_is_balanced_too(count):
    torch.manual_seed(0)
    model, x = models.ResNet(1, 4, depth=1), images(4, 1, 16, 16)
    places = ["layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2", "fc"]
    best = min(max(costs(model, list(names), x)) for names in itertools.combinations(places, count - 1))
    names = [block.name for block in Chain(model, count, example_input=x).blocks[1:]]
    assert max(costs(model, names, x)) <= best


def test_the_number_of_pieces_is_the_number_of_blocks():
    torch.manual_seed(0)
    x = images(2, 3, 8, 8)
    for count in (1, 2, 3, 5, 8, 20):
        assert len(Chain(models.build("resnet20", input_shape=(3, 8, 8), classes=5), count, example_input=x)) == count


def test_too_many_pieces_say_how_many_there_can_be():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(
        CannotCutError, match=r"^Sequential can be cut into at most 2 blocks with weights, asked for 3: pass blocks=2"
    ):
        Chain(model, 3, example_input=images(4, 4))


@pytest.mark.parametrize("count", [0, -1])
def test_the_number_of_pieces_is_one_at_least(count):
    with pytest.raises(ValueError, match=rf"blocks={count}: the number of blocks must be at least 1"):
        Chain(Outer(), count, example_input=images(5, 6))


def test_a_number_of_pieces_needs_an_example():
    with pytest.raises(ValueError, match=r"blocks=2 .* pass example_input"):
        Chain(Outer(), 2)


# ---- what cannot be cut ------------------------------------------------------------------------------------------------------


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("blocks", [None, ["second"], 2])
def test_a_branch_on_data_is_named_by_file_line_module_and_source(blocks):
    with pytest.raises(CannotCutError) as error:
        Chain(Branching(), blocks, example_input=images(5, 4))
    text = one_line(error)
    number = Branching.forward.__code__.co_firstlineno + 2
    assert f"line {number} of {__file__}" in text
    assert "Branching.forward" in text
    assert "`if x.sum() > 0:`" in text
    assert "cut only outside of that module" in text
    assert "nn.Sequential of blocks" in text


def test_a_branch_in_an_inner_module_is_named_when_a_cut_lies_in_it():
    with pytest.raises(CannotCutError) as error:
        Chain(AroundBranching(), ["inner.second"])
    text = one_line(error)
    assert text.startswith("cannot cut AroundBranching: line ")
    assert "Branching.forward (module 'inner')" in text
    assert "`if x.sum() > 0:`" in text


@pytest.mark.parametrize("blocks", [None, ["inner"], ["after"], ["inner", "after"], 2, 3])
def test_a_branch_in_an_inner_module_is_fine_when_no_cut_lies_in_it(blocks):
    torch.manual_seed(0)
    model = AroundBranching()
    chain = Chain(model, blocks, example_input=images(5, 4))
    for x in (images(5, 4), -images(5, 4), 100 * torch.ones(5, 4)):
        assert torch.equal(through(chain, x), model(x))


def test_more_pieces_than_lie_outside_of_a_branching_module():
    with pytest.raises(CannotCutError, match="at most 3 blocks with weights, asked for 4"):
        Chain(AroundBranching(), 4, example_input=images(5, 4))


@pytest.mark.parametrize(("given", "wanted"), [("haed", "head"), ("bodi", "body"), ("stm", "stem")])
def test_an_unknown_name_is_answered_with_the_nearest(given, wanted):
    with pytest.raises(
        CannotCutError, match=rf"^no module is named '{re.escape(given)}' in Outer; did you mean {re.escape(wanted)}"
    ):
        Chain(Outer(), [given])


def test_a_name_without_a_near_one_lists_some():
    with pytest.raises(CannotCutError, match=r"no module is named 'zzzz' in Unused; did you mean used, spare, out\?"):
        Chain(Unused(), ["zzzz"])


def test_a_named_module_that_is_never_called():
    with pytest.raises(CannotCutError) as error:
        Chain(Unused(), ["spare", "out"])
    assert one_line(error) == (
        "the forward pass of Unused never calls spare as a module, so no block can begin there; it calls used, out"
    )


def test_a_module_list_itself_is_never_called():
    with pytest.raises(CannotCutError, match="never calls layers as a module"):
        Chain(Listed(), ["layers"])


def test_one_name_as_a_string_is_not_taken_for_its_letters():
    with pytest.raises((ValueError, TypeError), match=r"\['head'\]|\[\"head\"\]"):
        Chain(Outer(), "head")


class ChosenByValue(nn.Module):
    """Reads a number out of the data with ``item``."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        return self.second(x) * float(x.mean())


class Counting(nn.Module):
    """Depends on a Python value that tracing cannot see."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.second(self.first(x) * self.calls)


def test_reading_a_number_out_of_the_data():
    with pytest.raises(CannotCutError) as error:
        Chain(ChosenByValue())
    assert "`return self.second(x) * float(x.mean())`" in one_line(error)


def test_a_model_that_is_not_what_was_traced_is_found_by_the_rehearsal():
    torch.manual_seed(0)
    chain = Chain(Counting())
    with pytest.raises(CannotCutError, match="the blocks of Counting do not compute what the model computes"):
        chain.rehearse(images(5, 4))


def test_blocks_must_be_the_same_in_training_and_evaluation():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.extra, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.body(x)
            if self.training:
                x = x + self.extra(x)
            return self.head(x)

    with pytest.raises(CannotCutError, match="runs 3 of the blocks in training and 2 in other modes"):
        Chain(Auxiliary())
    assert len(Chain(Auxiliary(), ["head"])) == 2


def test_the_first_step_holds_no_more_than_the_next():
    """Blocks of PyTorch's own layers are not given a copy of their input to find out whether they change it."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Tanh()) for _ in range(6)]
    model = nn.Sequential(*blocks, nn.Linear(32, 3))
    learner = lf.convert(model, "backprop", loss=F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    x, y = torch.randn(64, 32), torch.randint(0, 3, (64,))
    peaks = []
    for _ in range(2):
        meter = ActivationMeter(model)
        with meter.watch():
            learner.step(x, y)
        peaks.append(meter.peak)
    assert peaks[0] == peaks[1]
