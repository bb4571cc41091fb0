"""Credit through other weights than the forward ones: layers, rules and models against formulas written down here once more."""

import itertools
import re
import weakref
from contextlib import nullcontext
from functools import partial

import cases
import numpy as np
import pytest
import torch
from cases import CLASSES, assert_same, copy_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree import feedback
from lockfree.feedback import FeedbackWeights, register_feedback

F64 = torch.float64
EXACT = {"rtol": 0, "atol": 1e-12}
SIGN = lf.rules.SignSymmetry
FEEDBACK_RULES = {
    "fa": lf.rules.FeedbackAlignment(),
    "usf": SIGN(),
    "brsf": SIGN(magnitude="batchwise"),
    "frsf": SIGN(magnitude="fixed"),
}
few = partial(settings, deadline=None)
given_rule = pytest.mark.parametrize("rule", FEEDBACK_RULES.values(), ids=FEEDBACK_RULES.keys())


@pytest.fixture(autouse=True)
def _own_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        yield


def descent(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def gradients(outputs, wanted, credits):
    pairs = [(y, credit) for y, credit in zip(outputs, credits, strict=True) if y is not None]
    return torch.autograd.grad([y for y, _ in pairs], wanted, [credit for _, credit in pairs], allow_unused=True)


def assert_close(one, other, **tolerance):
    assert [a is None for a in one] == [b is None for b in other]
    for a, b in zip(one, other, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, **(tolerance or EXACT))


def fixed_for(layer):
    """Random feedback for a layer, and the matrices by the names of what they stand for."""
    weights = FeedbackWeights([("layer", layer)], rule="a rule")
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    return weights, {names[id(weight)]: own.weights for weight, own in weights.pairs()}


def assert_untouched(model):
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def assert_serves(call, layer, inputs, reference):
    """A layer's outputs are its own; its gradients those of the reference, and with B = W those of the layer itself.

    Args:
        call: Runs the layer on its inputs; returns a tuple of outputs, some of them ``None``.
        layer: The layer.
        inputs: What credit is wanted for, besides the parameters.
        reference: Maps feedback matrices by name to the same outputs, differentiated as the paper says.
    """
    weights, B = fixed_for(layer)
    wanted = [*inputs, *layer.parameters()]
    plain = call()
    credits = [None if y is None else torch.randn_like(y) for y in plain]
    with weights.in_force():
        made = call()
    assert_untouched(layer)
    assert_close(made, plain)
    assert_close(reference(B), plain)
    assert_close(gradients(made, wanted, credits), gradients(reference(B), wanted, credits))
    for weight, own in weights.pairs():
        own.weights.copy_(weight.detach())
    with weights.in_force():
        made = call()
    assert_close(gradients(made, wanted, credits), gradients(plain, wanted, credits))


# ---- layers ------------------------------------------------------------------------------------------------------------------


@few(max_examples=15)
@given(
    into=st.integers(1, 5), out=st.integers(1, 5), rows=st.lists(st.integers(1, 3), max_size=2), bias=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_linear_layer_sends_its_credit_times_b_down(into, out, rows, bias, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(into, out, bias=bias, dtype=F64)
    weights, B = fixed_for(layer)
    x, credit = torch.randn(*rows, into, dtype=F64, requires_grad=True), torch.randn(*rows, out, dtype=F64)
    with weights.in_force():
        y = layer(x)
    at_x, at_weight, *at_bias = torch.autograd.grad(y, [x, *layer.parameters()], credit)
    d, h = credit.reshape(-1, out).numpy(), x.detach().reshape(-1, into).numpy()
    W, b = layer.weight.detach().numpy(), layer.bias.detach().numpy() if bias else 0.0
    near = partial(np.testing.assert_allclose, **EXACT)
    near(y.detach().numpy(), (h @ W.T + b).reshape(*rows, out))
    near(at_x.numpy(), (d @ B["weight"].numpy()).reshape(x.shape))
    near(at_weight.numpy(), d.T @ h)
    assert len(at_bias) == bias
    for gradient in at_bias:
        near(gradient.numpy(), d.sum(axis=0))


@few(max_examples=40)
@given(data=st.data())
def test_a_convolution_of_either_direction_sends_credit_down_as_if_b_were_its_kernel(data):
    rank, transposed = data.draw(st.integers(1, 3), label="rank"), data.draw(st.booleans(), label="transposed")
    groups, bias = data.draw(st.integers(1, 2), label="groups"), data.draw(st.booleans(), label="bias")

    def numbers(low, high, label):
        return tuple(data.draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank), label=label))

    kernel, stride, padding = numbers(1, 3, "kernel"), numbers(1, 3, "stride"), numbers(0, 2, "padding")
    dilation, size = numbers(1, 2, "dilation"), numbers(1, 4, "size")
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        more = numbers(0, 2, "output padding")
        assume(all(o < max(s, d) for o, s, d in zip(more, stride, dilation, strict=True)))
        parts = zip(size, stride, padding, dilation, kernel, more, strict=True)
        assume(all((n - 1) * s - 2 * p + d * (k - 1) + o + 1 > 0 for n, s, p, d, k, o in parts))
        how["output_padding"] = more
    else:
        size = tuple(n + d * (k - 1) for n, d, k in zip(size, dilation, kernel, strict=True))
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    name = f"{'_transpose' if transposed else ''}{rank}d"
    kind, plain = getattr(nn, f"Conv{name.title().replace('_', '').replace('D', 'd')}"), getattr(F, f"conv{name}")
    plain = partial(plain, **how)
    layer = kind(2 * groups, 3 * groups, kernel, bias=bias, dtype=F64, **how)
    x = torch.randn(2, 2 * groups, *size, dtype=F64, requires_grad=True)

    def reference(B):
        as_if = plain(x, B["weight"])
        return (plain(x.detach(), layer.weight, layer.bias) + as_if - as_if.detach(),)

    assert_serves(lambda: (layer(x),), layer, [x], reference)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_a_convolution_of_one_sample_without_a_batch_dimension_is_served(kind):
    layer = kind(2, 3, 2, dtype=F64)
    weights, B = fixed_for(layer)
    x = torch.randn(2, *[4] * (layer.weight.dim() - 2), dtype=F64, requires_grad=True)
    with weights.in_force():
        y = layer(x)
    credit = torch.randn_like(y)
    batch = x.detach()[None].requires_grad_()
    as_if = torch.func.functional_call(layer, {"weight": B["weight"]}, (batch,))
    assert_close(torch.autograd.grad(y, x, credit), torch.autograd.grad(as_if, batch, credit[None])[0])


def test_a_transposed_convolution_may_be_told_the_size_of_its_output():
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2, dtype=F64)
    x = torch.randn(2, 2, 4, 4, dtype=F64, requires_grad=True)

    def reference(B):
        plain = partial(F.conv_transpose2d, stride=2, output_padding=1)
        as_if = plain(x, B["weight"])
        return (plain(x.detach(), layer.weight, layer.bias) + as_if - as_if.detach(),)

    assert_serves(lambda: (layer(x, output_size=(10, 10)),), layer, [x], reference)


def test_a_layer_may_be_called_by_keyword():
    layer = nn.Linear(3, 2, dtype=F64)
    x = torch.randn(4, 3, dtype=F64, requires_grad=True)
    assert_serves(lambda: (layer(input=x),), layer, [x], lambda B: (through(x, layer.weight, B["weight"], layer.bias),))


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.ConvTranspose1d(4, 4, 1)], ids=lambda m: type(m).__name__
)
def test_an_activation_may_overwrite_what_a_layer_has_made(layer):
    weights, _ = fixed_for(layer)
    x = torch.randn(4, 4, 1) if layer.weight.dim() > 2 else torch.randn(4, 4)
    found = []
    for in_place in (False, True):
        leaf = x.clone().requires_grad_()
        with weights.in_force():
            y = F.relu(layer(leaf), inplace=in_place)
        found.append(gradients([y], [leaf, *layer.parameters()], [torch.ones_like(y)]))
    assert_same(*found)


# ---- attention ---------------------------------------------------------------------------------------------------------------


def through(x, W, B, bias):
    """A linear layer that plain autograd differentiates at x as if its weights were B."""
    as_if = x @ B.mT
    y = x.detach() @ W.mT + as_if - as_if.detach()
    return y if bias is None else y + bias


def attended(layer, B, query, key, value, mask):
    """softmax(q k^T / sqrt d + mask) v head by head, all with the batch first; returns it with the weights of each head."""
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    packed = layer.in_proj_weight is not None
    W = layer.in_proj_weight.chunk(3) if packed else [getattr(layer, name) for name in names]
    M = B["in_proj_weight"].chunk(3) if packed else [B[name] for name in names]
    bias = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    q, k, v = (through(x, *three) for x, *three in zip((query, key, value), W, M, bias, strict=True))
    if layer.bias_k is not None:
        k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, layer.bias_k), (v, layer.bias_v)))
    if layer.add_zero_attn:
        k, v = (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (k, v))
    q, k, v = (x.unflatten(2, (layer.num_heads, -1)) for x in (q, k, v))
    scores = torch.einsum("nlhd,nshd->nhls", q, k) / layer.head_dim**0.5
    if mask is not None:
        scores = scores + F.pad(mask, (0, scores.shape[3] - mask.shape[3]))
    likely = scores.exp() / scores.exp().sum(3, keepdim=True)
    mixed = torch.einsum("nhls,nshd->nlhd", likely, v).flatten(2)
    return through(mixed, layer.out_proj.weight, B["out_proj.weight"], layer.out_proj.bias), likely


def hidden(kind, *shape):
    """A mask of booleans or of what is added to the scores; the first key is seen by all."""
    if kind == "bool":
        mask = torch.rand(shape) > 0.6
        mask[..., 0] = False
        return mask
    return torch.randn(shape, dtype=F64)


def added(mask):
    return torch.where(mask, -torch.inf, 0.0).to(F64) if mask.dtype == torch.bool else mask


@few(max_examples=60)
@given(
    sources=st.sampled_from(["self", "memory", "cross"]), widths=st.sampled_from([(4, 4), (3, 4), (4, 5), (2, 3)]),
    heads=st.sampled_from([1, 2]), bias=st.booleans(), bias_kv=st.booleans(), zero=st.booleans(),
    layout=st.sampled_from(["batch first", "batch second", "no batch"]), masks=st.sampled_from(["none", "bool", "float"]),
    of_each_head=st.booleans(), padding=st.booleans(), need=st.sampled_from(["none", "mean", "each"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_s_projections_send_credit_down_through_their_feedback_matrices(
    sources, widths, heads, bias, bias_kv, zero, layout, masks, of_each_head, padding, need, seed
):
    torch.manual_seed(seed)
    n, length, keys = (1 if layout == "no batch" else 3), 3, 3 if sources == "self" else 5
    kdim, vdim = widths if sources == "cross" else (4, 4)
    layer = nn.MultiheadAttention(
        4, heads, bias=bias, add_bias_kv=bias_kv, add_zero_attn=zero, kdim=kdim, vdim=vdim,
        batch_first=layout == "batch first", dtype=F64,
    )  # fmt: skip
    with torch.no_grad():  # they begin at zero
        for one in (layer.in_proj_bias, layer.out_proj.bias) if bias else ():
            one.normal_()

    def source(rows, width):
        return torch.randn(n, rows, width, dtype=F64, requires_grad=True)

    query = source(length, 4)
    key = query if sources == "self" else source(keys, kdim)
    value = source(keys, vdim) if sources == "cross" else key
    arranged = {"batch first": lambda x: x, "batch second": lambda x: x.transpose(0, 1), "no batch": lambda x: x[0]}[layout]
    given_, total = {}, torch.zeros(n, heads, length, keys, dtype=F64)
    if masks != "none":
        given_["attn_mask"] = hidden(masks, *([n * heads] if of_each_head else []), length, keys)
        whole = added(given_["attn_mask"])
        for i, head in itertools.product(range(n), range(heads)):
            total[i, head] += whole[i * heads + head] if of_each_head else whole
    if padding:
        rows = hidden("bool" if masks == "none" else masks, n, keys)
        given_["key_padding_mask"] = rows[0] if layout == "no batch" else rows
        for i in range(n):
            total[i] += added(rows)[i]

    def call():
        made = {}  # the same object three times in self-attention
        for x in (query, key, value):
            made.setdefault(id(x), arranged(x))
        three = [made[id(x)] for x in (query, key, value)]
        return layer(*three, need_weights=need != "none", average_attn_weights=need == "mean", **given_)

    def reference(B):
        y, likely = attended(layer, B, query, key, value, total)
        likely = likely.mean(1) if need == "mean" else likely
        return arranged(y), None if need == "none" else likely[0] if layout == "no batch" else likely

    assert_serves(call, layer, list({id(x): x for x in (query, key, value)}.values()), reference)


def test_a_causal_hint_alone_is_refused_as_torch_refuses_it():
    layer = nn.MultiheadAttention(4, 2)
    weights, _ = fixed_for(layer)
    x = torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match=r"is_causal.*attn_mask"), weights.in_force():
        layer(x, x, x, is_causal=True)
    assert_untouched(layer)


def feedback_of(layer):
    """Random feedback for all that is inside a layer, and the matrices by name."""
    weights = FeedbackWeights(layer.named_modules(), rule="a rule")
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    return weights, {names[id(weight)]: own.weights for weight, own in weights.pairs()}


def under(B, prefix):
    return {name.removeprefix(f"{prefix}."): matrix for name, matrix in B.items() if name.startswith(f"{prefix}.")}


def perceptron(layer, B, x):
    h = F.relu(through(x, layer.linear1.weight, B["linear1.weight"], layer.linear1.bias))
    return through(h, layer.linear2.weight, B["linear2.weight"], layer.linear2.bias)


def normalised(norm, x):
    spread = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (spread + norm.eps).sqrt() * norm.weight + norm.bias


def residual(x, parts, *, first):
    """x + f(norm(x)) or norm(x + f(x)), one part after the other."""
    for norm, part in parts:
        x = x + part(normalised(norm, x)) if first else normalised(norm, x + part(x))
    return x


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_transformer_layer_in_training_is_served_whole(kind, norm_first):
    make = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}[kind]
    layer = make(4, 2, 6, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=F64)
    x, memory = (torch.randn(2, length, 4, dtype=F64, requires_grad=True) for length in (3, 5))
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=F64)
    inputs = [x] if kind == "encoder" else [x, memory]

    def call():
        return layer(x, src_mask=causal) if kind == "encoder" else layer(x, memory, tgt_mask=causal)

    def reference(B):
        mask = causal.expand(2, 2, 3, 3)
        parts = [
            (layer.norm1, lambda h: attended(layer.self_attn, under(B, "self_attn"), h, h, h, mask)[0]),
            (layer.norm2, lambda h: attended(layer.multihead_attn, under(B, "multihead_attn"), h, memory, memory, None)[0]),
        ][: len(inputs)]
        last = layer.norm2 if kind == "encoder" else layer.norm3
        return residual(x, [*parts, (last, lambda h: perceptron(layer, B, h))], first=norm_first)

    weights, B = feedback_of(layer)
    assert len(B) == {"encoder": 4, "decoder": 6}[kind]
    wanted = [*inputs, *layer.parameters()]
    with weights.in_force():
        made = call()
    assert_untouched(layer)
    credit = torch.randn_like(made)
    assert_close([made], [call()])
    assert_close(gradients([made], wanted, [credit]), gradients([reference(B)], wanted, [credit]))
    for weight, own in weights.pairs():
        own.weights.copy_(weight.detach())
    with weights.in_force():
        made = call()
    assert_close(gradients([made], wanted, [credit]), gradients([call()], wanted, [credit]))


# ---- in force, and no longer -------------------------------------------------------------------------------------------------


def every_kind():
    """Takes (batch, 2, 4, 4); every registered kind of layer in one block or another."""
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(3, 2, 2, stride=2), nn.Tanh(), nn.Flatten(2)),
        *(nn.Conv1d(2, 3, 1), nn.Tanh(), nn.ConvTranspose1d(3, 4, 1), nn.Tanh(), Transposed(), Attending(4)),
        *(nn.Flatten(), nn.Linear(256, CLASSES)),
    )


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Attending(nn.Module):
    """Self-attention and a perceptron, both with skips."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def pictures(samples=6, dtype=torch.float32):
    return torch.randn(samples, 2, 4, 4, dtype=dtype), torch.randint(CLASSES, (samples,))


class Stumbles(nn.Module):
    """Raises whenever it is told to."""

    now = False

    def forward(self, x):
        if self.now:
            raise RuntimeError("stumbled")
        return x


@given_rule
def test_no_layer_keeps_another_forward_after_a_step_or_a_failed_one(rule):
    model = every_kind()
    model.insert(9, Stumbles())
    x, y = pictures()
    learner = lf.convert(model, rule, loss=F.cross_entropy, optimizer=cases.sgd)
    learner.step(x, y)
    assert_untouched(model)
    before = copy_of(model)
    model[9].now = True
    with pytest.raises(RuntimeError, match="stumbled"):
        learner.step(x, y)
    model[9].now = False
    assert_untouched(model)
    with pytest.raises(lf.Diverged):
        learner.step(x * torch.nan, y)
    assert_untouched(model)
    assert_same(copy_of(model), before)


@given_rule
def test_a_layer_that_is_not_known_is_an_error_that_names_layer_rule_and_way_out(rule):
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), Doubling(3, CLASSES)))
    with pytest.raises(ValueError, match=rf"(?s){re.escape(rule.card.title.lower())}.*Doubling \('1\.1'\).*register_feedback"):
        lf.convert(model, rule, loss=F.cross_entropy, optimizer=cases.sgd)


@given_rule
def test_a_registered_layer_is_served_by_every_rule(rule, monkeypatch):
    monkeypatch.setattr(feedback, "_FORMS", dict(feedback._FORMS))

    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    register_feedback(Doubling)(lambda layer, weights, gradient, shape: 2 * gradient @ weights)
    layer = Doubling(3, 5, dtype=F64)
    (B,) = matrices_of(rule, layer)
    assert_close([at_input(rule, layer, torch.eye(5, dtype=F64))], [2 * B])


# ---- sign symmetry -----------------------------------------------------------------------------------------------------------


def stand_ins(rule, layer):
    return FeedbackWeights([("layer", layer)], make=rule.feedback, rule=rule.title)


def at_input(rule, layer, credit, *, seed=0, weights=None):
    """Returns what a dense layer reports for a credit."""
    torch.manual_seed(seed)
    weights = weights or stand_ins(rule, layer)
    x = torch.randn(len(credit), layer.in_features, dtype=credit.dtype, requires_grad=True)
    with weights.in_force(seed):
        y = layer(x)
    return torch.autograd.grad(y, x, credit)[0]


def matrices_of(rule, layer, *, seed=0):
    """The matrices of a layer: those of the rule that draws when it is built, or per batch, from the same seed."""
    bound = layer.weight[0].numel() ** -0.5
    torch.manual_seed(seed)
    if rule == SIGN():
        return (layer.weight.sign() * (bound / 3**0.5),)
    if rule == SIGN(magnitude="batchwise"):  # of each number of 64 bits its four of 16
        words = torch.empty(-(-layer.weight.numel() // 4), dtype=torch.int64)
        words.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
        numbers = words.numpy().view("<i2")[: layer.weight.numel()].reshape(layer.weight.shape)
        return (torch.from_numpy(np.abs(numbers * np.float32(bound / 2**15))).double() * layer.weight.sign(),)
    drawn = torch.empty(layer.weight.shape).uniform_(-bound, bound).double()  # in any precision the same
    return (drawn if isinstance(rule, lf.rules.FeedbackAlignment) else drawn.abs() * layer.weight.sign(),)


@few(max_examples=10)
@given(into=st.integers(1, 5), out=st.integers(1, 5), seed=st.integers(0, 99), name=st.sampled_from([*FEEDBACK_RULES]))
def test_what_stands_for_a_weight_has_the_size_of_initial_weights_and_under_sign_symmetry_their_signs(into, out, seed, name):
    rule, layer = FEEDBACK_RULES[name], nn.Linear(into, out, dtype=F64)
    (B,) = matrices_of(rule, layer, seed=seed)
    assert_close([at_input(rule, layer, torch.eye(out, dtype=F64), seed=seed)], [B.detach()])


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), 18),
        (nn.ConvTranspose1d(4, 6, 5, groups=2), 15),
        (nn.Linear(7, 2), 7),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=5), None),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("magnitude", ["uniform", "fixed", "batchwise"])
def test_magnitudes_are_those_of_the_initial_weights_of_each_kind_of_layer(layer, fan_in, magnitude):
    for weight, own in stand_ins(SIGN(magnitude=magnitude), layer).pairs():
        bound = (fan_in or weight.shape[1]) ** -0.5
        B = own.matrix(*own.keep(weight.detach(), torch.Generator().manual_seed(3)))
        assert torch.equal(B.sign(), weight.sign())
        sizes = B.abs().flatten()
        if magnitude == "uniform":
            torch.testing.assert_close(sizes, torch.full_like(sizes, bound / 3**0.5))
        else:
            assert sizes.max() <= bound
            assert len(sizes.unique()) > 0.9 * len(sizes)


def test_magnitudes_that_are_drawn_are_uniform_up_to_the_bound():
    layer = nn.Linear(100, 200)
    for magnitude in ("fixed", "batchwise"):
        ((weight, own),) = stand_ins(SIGN(magnitude=magnitude), layer).pairs()
        sizes = own.matrix(*own.keep(weight.detach(), torch.Generator().manual_seed(3))).abs() * 10
        counts = torch.histc(sizes, 10, 0.0, 1.0)
        assert counts.sum() == 20000
        assert ((counts - 2000).abs() < 5 * 2000**0.5).all()


@pytest.mark.parametrize("magnitude", ["uniform", "fixed", "batchwise"])
def test_the_sign_follows_the_weight_and_zero_sends_nothing(magnitude):
    rule, layer = SIGN(magnitude=magnitude), nn.Linear(4, 3, dtype=F64)
    weights, credit = stand_ins(rule, layer), torch.eye(3, dtype=F64)
    first = at_input(rule, layer, credit, weights=weights)
    with torch.no_grad():
        layer.weight[0].neg_()
        layer.weight[1, 2] = 0.0
        layer.weight[2] *= 100
    second = at_input(rule, layer, credit, weights=weights)
    expected = first.clone()
    expected[0].neg_()
    expected[1, 2] = 0.0
    assert_same(second, expected)


def test_signs_are_those_of_the_forward_pass_of_the_batch():
    """Two blocks of two layers, and a message that comes a step late: the lower block's weights have moved on meanwhile."""
    torch.manual_seed(5)
    layers = [nn.Linear(4, 4, dtype=F64) for _ in range(4)]
    model = nn.Sequential(*(nn.Sequential(*(part for one in layers[i : i + 2] for part in (one, nn.Tanh()))) for i in (0, 2)))
    W = [layer.weight.detach().numpy().copy() for layer in layers]
    b = [layer.bias.detach().numpy().copy() for layer in layers]
    batches = [(torch.randn(5, 4, dtype=F64), torch.randn(5, 4, dtype=F64)) for _ in range(8)]
    rate = 6.0
    learner = lf.convert(model, "usf", loss=F.mse_loss, optimizer=descent(rate), links=lf.Link(delay=1))
    for batch in batches:
        learner.step(*batch)

    waiting, flips = None, 0
    for x, y in batches:
        used, h = [one.copy() for one in W], [x.numpy()]
        for one, other in zip(W, b, strict=True):
            h.append(np.tanh(h[-1] @ one.T + other))

        def down(credit, indices, used, h):
            moves = []
            for index in indices:
                delta = credit * (1 - h[index + 1] ** 2)
                moves.append((index, delta.T @ h[index], delta.sum(0)))
                credit = delta @ (np.sign(used[index]) * (3 * 4) ** -0.5)
            return credit, moves

        message, moves = down(2 * (h[-1] - y.numpy()) / y.numel(), (3, 2), used, h)
        if waiting is not None:
            late, old, seen = waiting
            flips += int((np.sign(old[1]) != np.sign(W[1])).sum())
            moves += down(late, (1, 0), old, seen)[1]
        for index, at_weight, at_bias in moves:
            W[index] -= rate * at_weight
            b[index] -= rate * at_bias
        waiting = message, used, h
    assert flips > 0
    for layer, one, other in zip(layers, W, b, strict=True):
        np.testing.assert_allclose(layer.weight.detach().numpy(), one, rtol=0, atol=1e-10)
        np.testing.assert_allclose(layer.bias.detach().numpy(), other, rtol=0, atol=1e-10)


@few(max_examples=10)
@given(
    samples=st.integers(1, 5), widths=st.lists(st.integers(1, 5), min_size=2, max_size=3), seed=st.integers(0, 99),
    cut=st.booleans(), magnitude=st.sampled_from(["uniform", "fixed"]),
)  # fmt: skip
def test_a_tanh_network_under_sign_symmetry_moves_as_numpy_says(samples, widths, seed, cut, magnitude):
    torch.manual_seed(seed)
    layers = [nn.Linear(into, out, dtype=F64) for into, out in itertools.pairwise([3, *widths])]
    model = nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers))
    W = [layer.weight.detach().numpy().copy() for layer in layers]
    b = [layer.bias.detach().numpy().copy() for layer in layers]
    x, y = torch.randn(samples, 3, dtype=F64), torch.randn(samples, widths[-1], dtype=F64)
    learner = lf.convert(
        model, SIGN(magnitude=magnitude), loss=F.mse_loss, optimizer=descent(3.0), blocks=None if cut else 1, example_input=x
    )
    found = {id(weight): own.magnitude.numpy() for cell in learner.cells for weight, own in cell.auxiliary.pairs()}
    M = [found[id(layer.weight)] for layer in layers]
    for _ in range(3):
        learner.step(x, y)
        h = [x.numpy()]
        for one, other in zip(W, b, strict=True):
            h.append(np.tanh(h[-1] @ one.T + other))
        credit = 2 * (h[-1] - y.numpy()) / y.numel()
        for index in reversed(range(len(W))):
            delta = credit * (1 - h[index + 1] ** 2)
            credit = delta @ (M[index] * np.sign(W[index]))
            W[index] = W[index] - 3.0 * delta.T @ h[index]
            b[index] = b[index] - 3.0 * delta.sum(axis=0)
    for layer, one, other in zip(layers, W, b, strict=True):
        np.testing.assert_allclose(layer.weight.detach().numpy(), one, rtol=0, atol=1e-10)
        np.testing.assert_allclose(layer.bias.detach().numpy(), other, rtol=0, atol=1e-10)


def square_learner(rule, *, blocks=3, **more):
    """Equal square layers without bias, one a block; with the loss below, credit at the top is the target."""
    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False, dtype=F64) for _ in range(blocks)))
    return lf.convert(model, rule, loss=lambda scores, y: (scores * y).sum(), optimizer=descent(1.0), **more)


def reported(learner, cell, batch):
    """Returns B of a block of one layer: what it reports for the identity."""
    one = learner.cells[cell]
    x = torch.randn(4, 4, dtype=F64, requires_grad=True)
    context = lf.Context(place=one.place, auxiliary=one.auxiliary, inputs=x, outputs=(), samples=4, batch=batch)
    y = one.rule.run(one.block, context)
    return torch.autograd.grad(y, x, torch.eye(4, dtype=F64))[0]


GRID = [(cell, batch) for cell in range(3) for batch in range(4)]


def test_batchwise_magnitudes_are_a_pure_function_of_seed_block_and_batch():
    learner = square_learner(SIGN(magnitude="batchwise", seed=3))
    found = {where: reported(learner, *where).abs() for where in GRID}
    assert not any(torch.equal(found[one], found[other]) for one, other in itertools.combinations(GRID, 2))
    again = square_learner(SIGN(magnitude="batchwise", seed=3))
    torch.manual_seed(99)
    backwards = {where: reported(again, *where).abs() for where in reversed(GRID)}
    assert_same(found, {where: backwards[where] for where in GRID})
    other = square_learner(SIGN(magnitude="batchwise", seed=4))
    assert not any(torch.equal(found[where], reported(other, *where).abs()) for where in GRID)


@pytest.mark.parametrize("magnitude", ["uniform", "fixed"])
def test_other_magnitudes_stay_from_batch_to_batch(magnitude):
    learner = square_learner(SIGN(magnitude=magnitude))
    found = {where: reported(learner, *where).abs() for where in GRID}
    for cell, batch in GRID:
        assert torch.equal(found[cell, batch], found[cell, 0])
    assert torch.equal(found[0, 0], found[1, 0]) == (magnitude == "uniform")


def test_batchwise_magnitudes_of_a_step_are_those_of_its_batch_also_after_a_resume():
    """x = y = 1 (the identity): the lower layer's update is -B^T, where B = M * sign(W) of the upper layer."""
    one, rule = torch.eye(4, dtype=F64), SIGN(magnitude="batchwise", seed=3)

    def moved(learner):
        lower, upper = (layer.weight.detach().clone() for layer in learner.model)
        learner.step(one, one)
        return (lower - learner.model[0].weight.detach()).T, upper.sign()

    learner, resumed = square_learner(rule, blocks=2), square_learner(rule, blocks=2)
    drawn = [reported(learner, 1, batch).abs() for batch in range(4)]
    straight = [moved(learner) for _ in range(2)]
    state = learner.state_dict()
    straight += [moved(learner) for _ in range(2)]
    resumed.load_state_dict(state)
    assert_same([moved(resumed) for _ in range(2)], straight[2:])
    assert_close([B for B, _ in straight], [M * sign for M, (_, sign) in zip(drawn, straight, strict=True)])


def test_a_layer_that_is_called_twice_has_one_matrix_in_a_batch():
    layer = nn.Linear(4, 4, bias=False, dtype=F64)
    weights = stand_ins(SIGN(magnitude="batchwise"), layer)
    x = torch.randn(2, 4, 4, dtype=F64, requires_grad=True)
    with weights.in_force(3):
        y = torch.stack([layer(x[0]), layer(x[1])])
    (at_x,) = torch.autograd.grad(y, x, torch.eye(4, dtype=F64).expand(2, 4, 4))
    assert_same(at_x[0], at_x[1])


# ---- what is broadcast: targets and errors ------------------------------------------------------------------------------------

LENGTH = 4


def tanh_network(*widths):
    """Linear layers, all but the last with a tanh, a block each."""
    layers = [nn.Linear(into, out, dtype=F64) for into, out in itertools.pairwise(widths)]
    return nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers[:-1]), layers[-1]), layers


def sequence_loss(scores, y):
    return F.cross_entropy(scores.flatten(0, -2), y.flatten())


def first_half_squared(scores, y):
    return 0.5 * (scores - y).square().sum() / scores[..., 0].numel()


def one_hot(y):
    """A row for each class number, zeros for what is ignored."""
    return np.concatenate([np.eye(CLASSES), np.zeros((1, CLASSES))])[np.where(y.numpy() < 0, CLASSES, y.numpy())]


def error_of(scores, y, rows):
    """dL/dscores: (softmax - one-hot) / counted targets, none for ignored ones; or (scores - target) / targets."""
    if y.is_floating_point():
        return (scores - rows) / scores[..., 0].size
    likely = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    counted = rows.sum(-1, keepdims=True)
    return (likely - rows) * counted / counted.sum()


TARGETS = {
    "classes": lambda samples: torch.randint(CLASSES, (samples,)),
    "ignored": lambda samples: torch.randint(CLASSES, (samples,)).masked_fill(torch.arange(samples) % 3 == 1, -100),
    "sequences": lambda samples: torch.randint(CLASSES, (samples, LENGTH)),
    "sequences ignored": lambda samples: torch.randint(CLASSES, (samples, LENGTH)).masked_fill(
        torch.arange(samples * LENGTH).view(samples, LENGTH) % 4 == 1, -100
    ),
    "numbers": lambda samples: torch.randn(samples, CLASSES, dtype=F64),
    "sequences of numbers": lambda samples: torch.randn(samples, LENGTH, CLASSES, dtype=F64),
}


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("rule", [lf.rules.DirectRandomTargets, lf.rules.DirectFeedbackAlignment], ids=["drtp", "dfa"])
def test_blocks_move_by_what_is_broadcast_as_numpy_says(rule, kind, scale):
    """delta_i = (t B_i / m) * tanh'(z_i), or (e B_i) * tanh'(z_i), at each place of a sequence; the top moves by the error."""
    samples, y = 8, TARGETS[kind](8)  # a power of two: 1 / m is exact
    x = torch.randn(samples, *[LENGTH] * ("sequences" in kind), 3, dtype=F64)
    model, layers = tanh_network(3, 6, 5, CLASSES)
    loss = first_half_squared if y.is_floating_point() else sequence_loss
    learner = lf.convert(model, rule(scale=scale), loss=loss, optimizer=descent(1.0), example_input=x[:2])
    W = [layer.weight.detach().numpy().copy() for layer in layers]
    b = [layer.bias.detach().numpy().copy() for layer in layers]
    B = [next(iter(cell.auxiliary.buffers())).numpy() for cell in learner.cells[:2]]
    assert [matrix.shape for matrix in B] == [(CLASSES, 6), (CLASSES, 5)]
    learner.step(x, y)

    rows = y.numpy() if y.is_floating_point() else one_hot(y)
    h = [x.numpy()]
    h += [np.tanh(h[0] @ W[0].T + b[0])]
    h += [np.tanh(h[1] @ W[1].T + b[1])]
    error = error_of(h[2] @ W[2].T + b[2], y, rows)
    signal = error if rule is lf.rules.DirectFeedbackAlignment else rows / rows[..., 0].size
    deltas = [(signal @ B[i]) * (1 - h[i + 1] ** 2) for i in (0, 1)] + [error]
    for layer, one, other, delta, below in zip(layers, W, b, deltas, h, strict=True):
        delta, below = delta.reshape(-1, delta.shape[-1]), below.reshape(-1, below.shape[-1])
        np.testing.assert_allclose(one - layer.weight.detach().numpy(), delta.T @ below, rtol=0, atol=1e-12)
        np.testing.assert_allclose(other - layer.bias.detach().numpy(), delta.sum(0), rtol=0, atol=1e-12)


def built(rule, y, scores):
    """The context of a lower block, whose output and the model's are given."""
    place = lf.Place(0, 2)
    marked = [y.clone().requires_grad_(), scores.clone().requires_grad_()]
    auxiliary = rule.build(lf.Site(place=place, block=nn.Identity(), rehearsal=marked))
    return lf.Context(
        place=place, auxiliary=auxiliary, inputs=None, outputs=(y,), samples=len(y), scores_shape=scores.shape[1:]
    )


@few(max_examples=15)
@given(
    samples=st.integers(1, 5),
    length=st.integers(1, 4),
    width=st.integers(1, 4),
    classes=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_each_place_of_a_sequence_has_its_own_error_and_all_have_one_matrix(samples, length, width, classes, seed):
    torch.manual_seed(seed)
    y, error = torch.randn(samples, length, width, dtype=F64), torch.randn(samples, length, classes, dtype=F64)
    rule = lf.rules.DirectFeedbackAlignment()
    context = built(rule, y, error)
    (B,) = context.auxiliary.buffers()
    context.error = (error,)
    (credit,) = rule.credit(context)
    np.testing.assert_allclose(credit.numpy(), np.einsum("mlc,cw->mlw", error.numpy(), B.numpy()), rtol=0, atol=1e-12)


@few(max_examples=15)
@given(
    samples=st.integers(1, 5), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), classes=st.integers(1, 4),
    length=st.integers(0, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_credit_of_a_block_is_its_targets_times_a_matrix(samples, shape, classes, length, seed):
    """One target or a sequence of them a sample, for outputs of any shape: place by place only where the places are the same."""
    torch.manual_seed(seed)
    places = [length] * (length > 0)
    y, scores = torch.randn(samples, *shape, dtype=F64), torch.randn(samples, *places, classes, dtype=F64)
    rule = lf.rules.DirectRandomTargets()
    context = built(rule, y, scores)
    (B,) = context.auxiliary.buffers()
    context.target = torch.randint(-1, classes, (samples, *places))
    (credit,) = rule.credit(context)
    rows = (context.target[..., None] == torch.arange(classes)).to(F64).numpy() / context.target.numel()
    if length and len(shape) == 2 and shape[0] == length:
        assert B.shape == (classes, shape[1])
        expected = np.einsum("mlc,cw->mlw", rows, B.numpy())
    else:
        assert B.shape == (rows[0].size, y[0].numel())
        expected = (rows.reshape(samples, -1) @ B.numpy()).reshape(y.shape)
    np.testing.assert_allclose(credit.numpy(), expected, rtol=0, atol=1e-6)


def test_credit_from_targets_is_as_precise_as_the_block():
    rule, y = lf.rules.DirectRandomTargets(), torch.randn(3, 5, dtype=F64)
    context = built(rule, y, torch.randn(3, CLASSES, dtype=F64))
    context.target = torch.tensor([2, 0, 1])
    (B,) = context.auxiliary.buffers()
    assert_close(rule.credit(context), [B[[2, 0, 1]] / 3])


def test_sequences_may_be_of_another_length_than_the_example():
    model, _ = tanh_network(3, 6, CLASSES)
    for rule in ("dfa", "drtp"):
        learner = lf.convert(
            model, rule, loss=sequence_loss, optimizer=descent(1.0), example_input=torch.randn(2, 5, 3, dtype=F64)
        )
        before, x, y = copy_of(model), torch.randn(4, 2, 3, dtype=F64), torch.randint(CLASSES, (4, 2))
        (B,) = learner.cells[0].auxiliary.buffers()
        h = np.tanh(x.numpy() @ before["0.0.weight"].numpy().T + before["0.0.bias"].numpy())
        error = error_of(h @ before["1.weight"].numpy().T + before["1.bias"].numpy(), y, one_hot(y))
        learner.step(x, y)
        delta = ((error if rule == "dfa" else one_hot(y) / 8) @ B.numpy()) * (1 - h**2)
        moved = before["0.0.bias"] - model[0][0].bias.detach()
        np.testing.assert_allclose(moved.numpy(), delta.sum((0, 1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_scale_is_the_size_of_what_a_matrix_makes_of_a_unit(scale):
    for rule in (lf.rules.DirectRandomTargets(scale=scale), lf.rules.DirectFeedbackAlignment(scale=scale)):
        context = built(rule, torch.randn(2, 2000), torch.randn(2, 25))
        (B,) = context.auxiliary.buffers()
        assert B.std().item() == pytest.approx(scale / 5, rel=0.02)
        assert abs(B.mean().item()) < 5 * scale / 5 / B.numel() ** 0.5


@pytest.mark.parametrize("rule", ["DirectRandomTargets", "DirectFeedbackAlignment"])
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_is_a_positive_number(rule, scale):
    with pytest.raises(ValueError, match=f"scale={scale}"):
        getattr(lf.rules, rule)(scale=scale)


def test_a_block_learns_from_random_targets_without_anything_from_above():
    """Other weights above, another loss: the lower blocks' updates are the same bit for bit, the top's are not."""
    x, y = torch.randn(8, 3, dtype=F64), torch.randint(CLASSES, (8,))
    found = []
    for changed in (False, True):
        torch.manual_seed(1)
        model, layers = tanh_network(3, 6, 5, CLASSES)
        learner = lf.convert(
            model, "drtp", loss=F.multi_margin_loss if changed else F.cross_entropy, optimizer=descent(1.0), example_input=x
        )
        assert learner.locks == {"forward"}
        if changed:
            nn.init.normal_(layers[2].weight)
        learner.step(x, y)
        found.append(copy_of(model))
    for name in ("0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias"):
        assert torch.equal(found[0][name], found[1][name])
    assert not torch.equal(found[0]["2.bias"], found[1]["2.bias"])


def test_ignored_targets_alone_leave_the_blocks_where_they_are():
    model, _ = tanh_network(3, 6, CLASSES)
    learner = lf.convert(
        model,
        "drtp",
        loss=lambda scores, y: F.cross_entropy(scores, y, reduction="sum") / len(y),
        optimizer=descent(1.0),
        example_input=torch.randn(2, 3, dtype=F64),
    )
    before = copy_of(model)
    learner.step(torch.randn(5, 3, dtype=F64), torch.full((5,), -100))
    assert_same(copy_of(model), before)


def test_one_real_number_a_sample_is_a_target():
    model, layers = tanh_network(3, 6, 1)
    x, y = torch.randn(5, 3, dtype=F64), torch.randn(5, dtype=F64)
    learner = lf.convert(
        model, "drtp", loss=lambda scores, y: F.mse_loss(scores[:, 0], y), optimizer=descent(1.0), example_input=x
    )
    W, b = layers[0].weight.detach().numpy().copy(), layers[0].bias.detach().numpy().copy()
    learner.step(x, y)
    (B,) = learner.cells[0].auxiliary.buffers()
    delta = (y.numpy()[:, None] @ B.numpy() / 5) * (1 - np.tanh(x.numpy() @ W.T + b) ** 2)
    np.testing.assert_allclose(b - layers[0].bias.detach().numpy(), delta.sum(0), rtol=0, atol=1e-12)


def of_first(scores, y):
    """A loss that accepts almost any targets."""
    return scores.square().mean()


REFUSED = {
    "dictionary": ({"y": torch.arange(6) % CLASSES}, of_first),
    "scalar": (torch.tensor(1), of_first),
    "too few": (torch.arange(3) % CLASSES, of_first),
    "three of eight": (torch.zeros(6, 3, dtype=torch.int64), of_first),
    "out of range": (torch.arange(6) + 9, F.cross_entropy),
    "several classes as booleans": (torch.ones(6, CLASSES, dtype=torch.bool), of_first),
    "several classes as whole numbers": (torch.ones(6, CLASSES, dtype=torch.int64), of_first),
    "another width": (torch.zeros(6, 3, dtype=F64), of_first),
}


@pytest.mark.parametrize("name", REFUSED)
def test_targets_that_cannot_stand_for_an_error_are_one_clear_error_and_teach_nothing(name):
    target, loss = REFUSED[name]
    x = torch.randn(6, 3, dtype=F64)
    model, _ = tanh_network(3, 5, CLASSES)
    learner = lf.convert(model, "drtp", loss=loss, optimizer=cases.momentum, example_input=x)
    before = copy_of(model)
    with pytest.raises(ValueError, match="target"):
        learner.step(x, target)
    assert_same(copy_of(model), before)
    assert learner.steps == 0


@pytest.mark.parametrize("kind", ["classes", "sequences"])
def test_a_class_that_does_not_exist_is_an_error_also_later_on(kind):
    x, y = torch.randn(8, *[LENGTH] * (kind == "sequences"), 3, dtype=F64), TARGETS[kind](8)
    model, _ = tanh_network(3, 5, CLASSES)
    learner = lf.convert(model, "drtp", loss=sequence_loss, optimizer=cases.momentum, example_input=x)
    learner.step(x, y)
    before = copy_of(model)
    with pytest.raises(ValueError, match="targets"):
        learner.step(x, y + CLASSES)
    assert_same(copy_of(model), before)


def test_classes_before_places_are_served_or_refused_in_words():
    """The layout (batch, classes, length), which cross entropy takes as it is."""
    model = nn.Sequential(nn.Sequential(nn.Conv1d(2, CLASSES, 1), nn.Tanh()), nn.Conv1d(CLASSES, CLASSES, 1))
    x, y = torch.randn(6, 2, 5), torch.randint(CLASSES, (6, 5))
    learner = lf.convert(model, "drtp", loss=F.cross_entropy, optimizer=cases.sgd, example_input=x)
    assert learner.step(x, y).loss > 0


# ---- precision and memory ----------------------------------------------------------------------------------------------------


@given_rule
def test_under_autocast_gradients_are_float32_and_those_without_it_but_for_rounding(rule):
    model = every_kind()
    x, _ = pictures(8)
    found, layers = [], [(name, module) for name, module in model.named_modules()]
    torch.manual_seed(4)
    weights = FeedbackWeights(layers, make=rule.feedback, rule=rule.title)
    credit = torch.randn(8, CLASSES)
    for on in (False, True):
        leaf = x.clone().requires_grad_()
        seed = rule.seed_for(lf.Context(lf.Place(0, 1), None, x, (), 8))
        with weights.in_force(seed), torch.autocast("cpu", torch.bfloat16, enabled=on):
            y = model(leaf)
        assert y.dtype == (torch.bfloat16 if on else torch.float32)
        found.append(gradients([y], [leaf, *model.parameters()], [credit.to(y.dtype)]))
    # The terms of a bias's gradient cancel, down to their rounding on some processors; so it is judged together with its layer's weight.
    owners = ["input", *(name.rpartition(".")[0] for name, _ in model.named_parameters())]
    for owner in dict.fromkeys(owners):
        low, high = (
            torch.cat([gradient.flatten() for name, gradient in zip(owners, one, strict=True) if name == owner])
            for one in found[::-1]
        )
        assert low.dtype == torch.float32
        assert (low - high).norm() <= 0.3 * high.norm() + 1e-6


def test_under_autocast_feedback_through_the_forward_weights_is_backprop():
    model, (x, _) = every_kind(), pictures(8)
    weights, _ = feedback_of(model)
    for weight, own in weights.pairs():
        own.weights.copy_(weight.detach())
    found = []
    for force in (weights.in_force, nullcontext):
        leaf = x.clone().requires_grad_()
        with force(), torch.autocast("cpu", torch.bfloat16):
            y = model(leaf)
        found.append((y, *gradients([y], [leaf, *model.parameters()], [torch.ones_like(y)])))
    for own, plain in zip(*found, strict=True):
        assert (own - plain).norm() <= 0.01 * plain.norm() + 1e-6


BROADCAST = {"drtp": lf.rules.DirectRandomTargets(), "dfa": lf.rules.DirectFeedbackAlignment()}
ALL_RULES = FEEDBACK_RULES | BROADCAST


@pytest.mark.parametrize("rule", ALL_RULES.values(), ids=ALL_RULES.keys())
def test_a_step_under_autocast_gives_every_parameter_a_float32_gradient(rule):
    model = every_kind()
    x, y = pictures()
    learner = lf.convert(model, rule, loss=F.cross_entropy, optimizer=cases.sgd, example_input=x)
    seen = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append((p.grad.dtype, bool(p.grad.isfinite().all()))))
    with torch.autocast("cpu", torch.bfloat16):
        assert learner.step(x, y).loss > 0
    assert seen == [(torch.float32, True)] * len(list(model.parameters()))


@pytest.mark.parametrize("rule", ALL_RULES.values(), ids=ALL_RULES.keys())
def test_a_model_in_float64_stays_there(rule):
    """Twice as many digits: the same step in float32 is the same but for its rounding, and not better than that."""
    found = {}
    for dtype in (F64, torch.float32):
        torch.manual_seed(1)
        model = every_kind().to(F64).to(dtype)
        x, y = pictures(dtype=F64)
        learner = lf.convert(model, rule, loss=F.cross_entropy, optimizer=cases.sgd, example_input=x.to(dtype))
        copied = [buffer for cell in learner.cells if cell.auxiliary is not None for buffer in cell.auxiliary.buffers()]
        if dtype == F64:
            kept = [buffer.to(torch.float32).to(F64) for buffer in copied]
        for buffer, value in zip(copied, kept, strict=True):
            assert buffer.dtype == dtype
            buffer.copy_(value)
        if rule != SIGN(magnitude="batchwise"):  # other numbers are drawn in another type
            learner.step(x.to(dtype), y)
        found[dtype] = copy_of(model)
    for name, value in found[F64].items():
        assert value.dtype == F64
        torch.testing.assert_close(value, found[torch.float32][name].to(F64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ALL_RULES.values(), ids=ALL_RULES.keys())
def test_nothing_of_a_batch_stays_after_its_step(rule):
    model = every_kind()
    learner = lf.convert(model, rule, loss=F.cross_entropy, optimizer=cases.sgd, example_input=pictures()[0])
    learner.step(*pictures())
    alive = []

    def note(module, given_, made):
        alive.extend(weakref.ref(tensor) for tensor in (*given_, made) if isinstance(tensor, torch.Tensor))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    x, y = pictures()
    alive += [weakref.ref(x), weakref.ref(y)]
    learner.step(x, y)
    del x, y
    for handle in handles:
        handle.remove()
    assert len(alive) > 20
    assert not [one() for one in alive if one() is not None]


# ---- models ------------------------------------------------------------------------------------------------------------------


class VisionTransformer(nn.Module):
    """Patches, places, two layers of attention, and a mean over patches."""

    def __init__(self):
        super().__init__()
        self.patches, self.places = nn.Conv2d(1, 16, 4, stride=4), nn.Embedding(4, 16)
        self.layers = nn.ModuleList([Attending(16), Attending(16)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, CLASSES)

    def forward(self, x):
        h = self.patches(x).flatten(2).transpose(1, 2) + self.places(torch.arange(4, device=x.device))
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h).mean(1))


class Encoder(nn.Module):
    """Rows of a picture as a sequence, and PyTorch's own encoder layers."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Linear(8, 16)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)])
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        h = self.rows(x.squeeze(1))
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


@given_rule
@pytest.mark.parametrize("cut", ["blocks", "one block"])
@pytest.mark.parametrize("make", [VisionTransformer, Encoder])
def test_a_transformer_learns(make, cut, rule):
    torch.manual_seed(0)
    x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % CLASSES
    model = make()
    learner = lf.convert(
        model,
        rule,
        loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3),
        blocks=["layers.0", "layers.1", "head"] if cut == "blocks" else 1,
        example_input=x[:2],
    )
    losses = [learner.step(x, y).loss for _ in range(30)]
    assert np.mean(losses[-3:]) < 0.85 * np.mean(losses[:3])
    assert_untouched(model)


class Positions(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.embed, self.positions = nn.Linear(4, 6), nn.Parameter(torch.randn(shape))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.embed(x) + self.positions)).mean(1)


@pytest.mark.parametrize("blocks", [None, []])
def test_what_is_added_to_every_sample_alike_needs_no_feedback(blocks):
    x, y = torch.randn(5, 7, 4), torch.randint(0, 3, (5,))
    options = {"loss": F.cross_entropy, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "blocks": blocks, "example_input": x}
    model = Positions((1, 7, 6))
    learner = lf.convert(model, "fa", **options)
    (feedback,) = [
        one.feedbacks[-1].weights
        for one in (cell.auxiliary for cell in learner.cells)
        if one.feedbacks[-1].weights.shape[0] == 3
    ]
    found = learner.gradients(x, y)["positions"]
    scores = model(x)
    error = torch.autograd.grad(F.cross_entropy(scores, y), scores)[0]
    hidden = torch.tanh(model.embed(x) + model.positions).detach()
    wanted = ((error[:, None] / 7) @ feedback * (1 - hidden**2)).sum(0, keepdim=True)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="first dimension of 1"):
        lf.convert(Positions((7, 6)), "fa", **options)
