r"""Layers whose backward pass uses other weights than their forward pass: a registry by layer type.

A layer $y = f(x, W)$ that is linear in x sends $\partial L/\partial x = J(W)^T \delta$ down. With feedback weights B of the shape
of W it sends $J(B)^T \delta$ instead; everything else, the gradient of W included, stays as it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lockfree.chain import Block
from lockfree.rule import Context, Needs, Place, Rule, Site
from lockfree.values import Credit, Values, detach, tensors

Backward = Callable[[Any, Tensor, Tensor, torch.Size], Tensor]
"""Maps (layer, feedback weights, dL/dy, shape of x) to dL/dx."""


# ---- what stands for a weight on the way down ---------------------------------------------------------------------------------


class Feedback(nn.Module, ABC):
    """What stands for one weight on the way down: fixed, or made of the weight itself."""

    @abstractmethod
    def keep(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Returns what B is made of on the way down: W as it is when the layer runs forward, and whatever is decided then.

        Args:
            weight: W.
            generator: What to draw from; the rule may have given it a seed for this batch.
        """

    @abstractmethod
    def matrix(self, *kept: Tensor) -> Tensor:
        """Returns B, of the shape of W.

        Args:
            *kept: What `keep` returned.
        """


def like_initial(weight: Tensor) -> Tensor:
    """Draws a tensor of the shape of a weight, and of its type and device, as PyTorch initialises linear layers and convolutions."""
    # What is drawn does not depend on the weight's memory order or precision.
    drawn = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    return nn.init.kaiming_uniform_(drawn, a=5**0.5).to(weight.dtype)


def initial_deviation(weight: Tensor) -> float:
    """Returns the standard deviation of what PyTorch initialises such a weight with, 1/sqrt(3 fan in)."""
    return (3 * weight[0].numel()) ** -0.5


class Fixed(Feedback):
    """A B that stays as it is.

    Args:
        weights: B, of the shape of W.
    """

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights: Tensor
        self.register_buffer("weights", weights)

    def keep(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (self.weights,)

    def matrix(self, *kept: Tensor) -> Tensor:
        return kept[0]


def fixed_random(weight: Tensor) -> Feedback:
    """Makes a fixed random B with the distribution that PyTorch initialises W with."""
    return Fixed(like_initial(weight))


class Way:
    """The way down past one weight.

    Args:
        feedback: What stands for the weight.
        generator: What may be drawn from.

    Attributes:
        kept: What has been kept of the batch that runs forward, if anything has yet.
    """

    __slots__ = ("_generator", "feedback", "kept")

    def __init__(self, feedback: Feedback, generator: torch.Generator) -> None:
        self.feedback, self._generator = feedback, generator
        self.kept: tuple[Tensor, ...] | None = None

    def keep(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Returns what B will be made of, which is decided once for all calls of a layer on a batch."""
        if self.kept is None:
            self.kept = self.feedback.keep(weight, self._generator)
        return self.kept


# ---- the registry ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """How a type of layer runs, and which of its parameters are matrices that something stands for.

    Attributes:
        run: Maps (layer, ways down by the matrices' names, *what the layer is called with) to the layer's output.
        whole: Whether the form speaks for the layers inside, too.
    """

    run: Callable[..., Any]
    whole: bool = False

    def matrices(self, layer: nn.Module) -> list[str]:
        """Returns the names of the parameters that are matrices."""
        return [name for name, value in layer.named_parameters(recurse=self.whole) if value.dim() > 1]


_FORMS: dict[type[nn.Module], _Form] = {}
# Layers without a matrix to transpose on the way down: nothing to replace.
_EXEMPT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


def register_feedback(layer_type: type[nn.Module]) -> Callable[[Backward], Backward]:
    """Registers how a type of layer with one input, which it is linear in, sends credit down through feedback weights.

    The function gets (layer, feedback weights of the shape of ``layer.weight``, dL/dy, shape of x) and returns dL/dx.

    Example:
        >>> class Scale(nn.Linear):
        ...     pass
        >>> @register_feedback(Scale)
        ... def _(layer, feedback, gradient, shape):
        ...     return gradient @ feedback
    """

    def register(backward: Backward) -> Backward:
        def run(layer: nn.Module, ways: Mapping[str, Way], *given: Any, **named: Any) -> Tensor:
            if len(given) == 1 and not named:  # nearly always
                (x,) = given
                y = type(layer).forward(layer, x.detach())
            else:
                x = _only_tensor(layer, (given, named))
                given, named = detach((given, named))
                y = type(layer).forward(layer, *given, **named)
            return _reroute(x, y, layer.weight, ways["weight"], lambda *known: backward(layer, *known))

        _FORMS[layer_type] = _Form(run)
        return backward

    return register


def _only_tensor(layer: nn.Module, given: Any) -> Tensor:
    inputs = tensors(given)
    if len(inputs) != 1:
        kind = type(layer).__name__
        raise ValueError(f"feedback weights serve layers of one input, {kind} got {len(inputs)}: build it from such layers")
    return inputs[0]


def _reroute(x: Tensor, y: Tensor, weight: Any, way: Way, send: Callable[..., Tensor]) -> Tensor:
    """Returns y, which knows of x only that credit for it goes down by ``send(B, dL/dy, shape of x)``."""
    if not x.requires_grad:
        return y
    return _Reroute.apply(x, y, weight.detach(), way, send)  # pyrefly: ignore[bad-return]


class _Reroute(torch.autograd.Function):
    """The identity of y, whose backward gives y its gradient and x the one through the feedback weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, way: Way, send: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(*way.keep(weight))
        ctx.feedback, ctx.send, ctx.shape = way.feedback, send, x.shape
        return y.detach()  # not a view: what comes next may overwrite it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        matrix = ctx.feedback.matrix(*ctx.saved_tensors).to(gradient.dtype)
        return ctx.send(matrix, gradient, ctx.shape), gradient, None, None, None


# ---- layers that are known ---------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    r"""$y = xW^T + b$ whose dL/dx is $\delta B$: one node of the graph, since dense layers are many and often small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, way: Way) -> Tensor:
        ctx.save_for_backward(x, *way.keep(weight))
        ctx.feedback = way.feedback
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x, *kept = ctx.saved_tensors
        matrix = ctx.feedback.matrix(*kept)
        if not matrix.dtype == gradient.dtype == x.dtype:  # autocast
            matrix, x = matrix.to(gradient.dtype), x.to(gradient.dtype)
        message = gradient @ matrix
        if gradient.dim() != 2:
            gradient, x = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        _, learns, shifts, _ = ctx.needs_input_grad
        return message, gradient.t() @ x if learns else None, gradient.sum(0) if shifts else None, None


def _through_linear(x: Tensor, weight: Tensor, bias: Tensor | None, way: Way) -> Tensor:
    if not x.requires_grad:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, way)  # pyrefly: ignore[bad-return]


def _linear(layer: nn.Linear, ways: Mapping[str, Way], input: Tensor) -> Tensor:
    # As `_through_linear`, a call less where calls are what it costs.
    if not input.requires_grad:
        return F.linear(input, layer.weight, layer.bias)
    return _Linear.apply(input, layer.weight, layer.bias, ways["weight"])  # pyrefly: ignore[bad-return]


_FORMS[nn.Linear] = _Form(_linear)


def _convolution(layer: Any, feedback: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or gradient.dim() < feedback.dim():
        return _by_autograd(layer, feedback, gradient, shape)
    empty = gradient.new_empty(1).expand(shape)
    wanted = [True, False, False]  # dL/dx alone
    extra = layer.output_padding
    if layer.transposed:  # a call may ask for another size of the output than the layer's own
        sizes = zip(gradient.shape[2:], shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True)
        extra = [out - ((into - 1) * s - 2 * p + d * (k - 1) + 1) for out, into, s, p, d, k in sizes]
    arguments = (layer.stride, layer.padding, layer.dilation, layer.transposed, extra, layer.groups, wanted)
    return torch.ops.aten.convolution_backward(gradient, empty, feedback, None, *arguments)[0]


def _by_autograd(layer: nn.Module, feedback: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    """Differentiates the layer with B for W; it is linear in x, so any x will do."""
    with torch.enable_grad():
        x = gradient.new_zeros(shape, requires_grad=True)
        y = torch.func.functional_call(layer, {"weight": feedback}, (x,))
    return torch.autograd.grad(y, x, gradient)[0]


for _type in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_feedback(_type)(_convolution)


def _attention(
    layer: nn.MultiheadAttention,
    ways: Mapping[str, Way],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention as `nn.MultiheadAttention` has it, whose four projections send credit down through feedback weights."""
    if is_causal and attn_mask is None:
        raise ValueError("MultiheadAttention: is_causal is a hint about attn_mask, pass attn_mask, too")
    given = (query, key, value)
    batched = query.dim() == 3
    given = tuple(x[None] if not batched else x if layer.batch_first else x.transpose(0, 1) for x in given)
    q, k, v = _projected(layer, ways, given, same=query is key is value)
    batch, length, width = q.shape
    if layer.bias_k is not None and layer.bias_v is not None:
        k, v = (torch.cat([x, bias.expand(batch, 1, width)], 1) for x, bias in ((k, layer.bias_k), (v, layer.bias_v)))
    if layer.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(batch, 1, width)], 1) for x in (k, v))
    q, k, v = (x.view(batch, -1, layer.num_heads, layer.head_dim).transpose(1, 2) for x in (q, k, v))
    mask = _additive_mask(attn_mask, key_padding_mask, q, k)
    dropout = layer.dropout if layer.training else 0.0
    weights = None
    if need_weights:
        scores = (q * layer.head_dim**-0.5) @ k.transpose(2, 3)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        mixed = weights @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    mixed = mixed.transpose(1, 2).reshape(batch, length, width)
    out = _through_linear(mixed, layer.out_proj.weight, layer.out_proj.bias, ways["out_proj.weight"])
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if not batched:
        return out[0], None if weights is None else weights[0]
    return (out if layer.batch_first else out.transpose(0, 1)), weights


def _projected(layer: nn.MultiheadAttention, ways: Mapping[str, Way], given: tuple[Tensor, ...], *, same: bool) -> list[Tensor]:
    """Returns queries, keys and values."""
    bias = layer.in_proj_bias
    if layer.in_proj_weight is None:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        own = zip(given, names, biases, strict=True)
        return [_through_linear(x, getattr(layer, name), one, ways[name]) for x, name, one in own]
    weight, way = layer.in_proj_weight, ways["in_proj_weight"]
    if same:
        return list(_through_linear(given[0], weight, bias, way).chunk(3, dim=-1))
    # Each is a third of what the packed matrix makes.
    return [_through_linear(x, weight, bias, way).chunk(3, dim=-1)[index] for index, x in enumerate(given)]


def _additive_mask(attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Joins both masks into one that is added to scores of shape (batch, heads, queries, keys)."""
    batch, heads = q.shape[:2]
    masks = []
    if attention is not None:
        masks.append(attention.view(batch, heads, *attention.shape[1:]) if attention.dim() == 3 else attention)
    if padding is not None:
        masks.append(padding.view(batch, 1, 1, -1))
    found = None
    for mask in masks:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)
        mask = F.pad(mask.to(q.dtype), (0, k.shape[2] - mask.shape[-1]))  # what the layer has added is seen by all
        found = mask if found is None else found + mask
    return found


_FORMS[nn.MultiheadAttention] = _Form(_attention, whole=True)


# ---- a block and its feedback weights ----------------------------------------------------------------------------------------


class FeedbackWeights(nn.Module):
    """What stands for every weight matrix of a block on the way down.

    Args:
        layers: The modules of a block, each with its name.
        make: Makes what stands for one weight.
        rule: Who asks, for the error message.

    Raises:
        ValueError: If a layer with a weight matrix has no registered feedback form.
    """

    def __init__(
        self, layers: Iterable[tuple[str, nn.Module]], *, make: Callable[[Tensor], Feedback] = fixed_random, rule: str
    ) -> None:
        super().__init__()
        self.feedbacks = nn.ModuleList()
        self._force = _InForce()
        spoken_for: set[int] = set()
        for name, layer in layers:
            if id(layer) in spoken_for or isinstance(layer, _EXEMPT):
                continue
            form = _FORMS.get(type(layer))
            if form is not None and form.whole:
                spoken_for |= {id(inner) for inner in layer.modules()}
            own = [key for key, value in layer.named_parameters(recurse=False) if _may_be_transposed(value, form)]
            if not own and (form is None or not form.whole):
                continue
            if form is None or (own != ["weight"] and not form.whole):
                raise ValueError(_refusal(rule, name, layer, own))
            found = {key: make(layer.get_parameter(key)) for key in form.matrices(layer) if not key.startswith("bias_")}
            self.feedbacks.extend(found.values())
            self._force.add(layer, form.run, found)

    def pairs(self) -> Iterator[tuple[Tensor, Feedback]]:
        """Yields each weight with what stands for it."""
        yield from self._force.pairs()

    def in_force(self, seed: int | None = None) -> "_InForce":
        """Lets the layers run as they are, in a ``with`` statement, but differentiate through what stands for their weights.

        Args:
            seed: What is drawn for this batch is drawn from this; from nothing known if left out.
        """
        if seed is not None:
            self._force.sow(seed)
        return self._force


class _InForce:
    """Gives layers a forward of their own; an instance's hides the class's."""

    def __init__(self) -> None:
        self._ways: list[tuple[nn.Module, str, Way]] = []
        self._forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._generators: dict[torch.device, torch.Generator] = {}

    def add(self, layer: nn.Module, run: Callable[..., Any], feedbacks: Mapping[str, Feedback]) -> None:
        """Adds a layer, with how it is to run and what stands for its weights by their names."""
        ways = {}
        for name, feedback in feedbacks.items():
            device = attrgetter(name)(layer).device
            if device not in self._generators:
                self._generators[device] = torch.Generator(device)
            ways[name] = Way(feedback, self._generators[device])
            self._ways.append((layer, name, ways[name]))
        self._forwards.append((layer, partial(run, layer, ways)))

    def pairs(self) -> Iterator[tuple[Tensor, Feedback]]:
        """Yields each weight with what stands for it."""
        for layer, name, way in self._ways:
            yield attrgetter(name)(layer), way.feedback

    def sow(self, seed: int) -> None:
        """Begins what is drawn anew from a seed."""
        for generator in self._generators.values():
            generator.manual_seed(seed)

    def __enter__(self) -> None:
        for layer, forward in self._forwards:
            layer.__dict__["forward"] = forward  # past nn.Module.__setattr__, which is slow

    def __exit__(self, *raised: object) -> None:
        for layer, _ in self._forwards:
            layer.__dict__.pop("forward", None)
        for _, _, way in self._ways:
            way.kept = None  # the graph has it


def _may_be_transposed(parameter: Tensor, form: _Form | None = None) -> bool:
    """Whether credit may have to pass a parameter's transpose; not where it is as wide as a sample, added or put beside each."""
    beside = form is None and parameter.dim() > 2 and parameter.shape[0] == 1
    return parameter.dim() > 1 and not beside


def _refusal(rule: str, name: str, layer: nn.Module, matrices: list[str]) -> str:
    kind = type(layer).__name__
    if matrices != ["weight"]:
        return (
            f"{rule} serves layers with one matrix, called weight; {kind} ('{name}') has {', '.join(matrices)}: build it from "
            "such layers, register one with register_feedback, or, if it is only added (a position, a token), give it a first "
            "dimension of 1"
        )
    return (
        f"{rule} does not know how a {kind} ('{name}') sends credit down: register it with "
        "lockfree.feedback.register_feedback, or build it from layers that are known"
    )


@dataclass(frozen=True, kw_only=True)
class FeedbackRule(Rule):
    """A rule under which credit travels down the layers as in backpropagation, but through other weights than the forward ones."""

    @abstractmethod
    def feedback(self, weight: Tensor) -> Feedback:
        """Makes what stands for one weight on the way down.

        Args:
            weight: W.
        """

    def needs(self, place: Place) -> Needs:
        return Needs.ABOVE

    def passes_on(self, place: Place) -> bool:
        return True

    def build(self, site: Site) -> nn.Module | None:
        assert isinstance(site.block, Block)
        rule, layers = self.card.title.lower(), list(site.block.layers())
        owned = {id(parameter) for _, layer in layers for parameter in layer.parameters(recurse=False)}
        for parameter in site.block.parameters():
            if _may_be_transposed(parameter) and id(parameter) not in owned:
                raise ValueError(
                    f"{rule} cannot tell how a weight of shape {tuple(parameter.shape)} is used in block {site.place.index}: a "
                    "function takes it, not a layer of that block; call a layer such as nn.Linear instead, or, if it is only added (a "
                    "position, a token), give it a first dimension of 1"
                )
        return FeedbackWeights(layers, make=self.feedback, rule=rule)

    def seed_for(self, context: Context) -> int | None:
        """Returns what feedback is drawn from for a batch, if any of it is: a function of batch and place alone.

        Args:
            context: Batch and place.
        """
        return None

    def run(self, block: nn.Module, context: Context) -> Values:
        assert isinstance(context.auxiliary, FeedbackWeights)
        with context.auxiliary.in_force(self.seed_for(context)):
            return block.forward(context.inputs)  # a view of the model has no hooks that a call would look for

    def credit(self, context: Context) -> Credit | None:
        return context.above
