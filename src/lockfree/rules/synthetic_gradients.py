"""Synthetic gradients (decoupled neural interfaces): each block predicts its own credit."""

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.memory import hold, unhold
from lockfree.objective import describe
from lockfree.rule import Card, Context, Needs, Place, Rule, Site
from lockfree.values import Credit


@dataclass(frozen=True, kw_only=True)
class SyntheticGradients(Rule):
    r"""A synthesiser M predicts the credit from the block's own output, and learns from what the block above reports.

    $$\hat\delta_i = M_i(y_i[, c]), \qquad
    L_{M_i} = \frac{1}{2m}\sum_{n=1}^m \lVert \hat\delta_{i,n} - m\,\delta_{i,n} \rVert^2, \qquad
    \delta_i = (\partial y_{i+1}/\partial y_i)^T\, \hat\delta_{i+1}/m$$

    The target is bootstrapped: it is made of the next block's synthetic credit (at the top, of the loss). The synthesiser works
    on the scale of one sample's loss, m being the batch size, so that what it learns does not move with the batch size. It sees
    detached outputs, and its last layer starts at zero, so that training starts as if the blocks below were frozen.

    Attributes:
        conditioned: Whether M also sees the label c (then the block needs TARGET, else NOTHING).
        hidden_layers: Hidden layers of M, 0 (linear) or more; each is affine, batch normalisation, ReLU.
        hidden_units: Width of a hidden layer (channels where the block's output is an image).
        kernel_size: Odd width of M's convolutions where the block's output is an image.
        borders: Blocks that get a synthesiser, 0 at the bottom; ``None`` for all but the last. The others wait for the block
            above, as in backpropagation.
        learning_rate: Of the synthesisers' Adam, above 0; ``None``: 0.001 if conditioned, else 0.03, found on a held-out part of
            Fashion-MNIST (without the label the target is noisier than it is large, and only a fast synthesiser keeps up).

    Raises:
        ValueError: If a field is out of range, or a label-conditioned synthesiser meets a model without class scores.

    Example:
        >>> import lockfree as lf
        >>> rule = lf.rules.SyntheticGradients(conditioned=True)
        >>> rule.needs(lf.Place(0, 4)).name, rule.auxiliary_needs(lf.Place(0, 4)).name
        ('TARGET', 'ABOVE')

    Reference:
        Jaderberg et al. 2016, "Decoupled neural interfaces using synthetic gradients", arXiv 1608.05343, section 2 and
        appendix; M is $M_{i+1}$ and $\delta$ is $\delta_i$ there.
    """

    conditioned: bool = False
    hidden_layers: int = 0
    hidden_units: int = 256
    kernel_size: int = 5
    borders: tuple[int, ...] | None = None
    learning_rate: float | None = None

    card: ClassVar[Card] = Card(
        title="Synthetic gradients",
        summary="A small network at each block predicts the block's credit from its output (cdni: and the label).",
        reference="Jaderberg, Czarnecki, Osindero, Vinyals, Graves, Silver, Kavukcuoglu 2016, Decoupled neural interfaces using "
        "synthetic gradients, arXiv 1608.05343",
        bibtex=(
            "@inproceedings{jaderberg2017decoupled, title={Decoupled neural interfaces using synthetic gradients}, "
            "author={Jaderberg, Max and Czarnecki, Wojciech Marian and Osindero, Simon and Vinyals, Oriol and Graves, Alex and "
            "Silver, David and Kavukcuoglu, Koray}, booktitle={International Conference on Machine Learning}, year={2017}}"
        ),
    )

    def __post_init__(self) -> None:
        if self.hidden_layers < 0 or self.hidden_units < 1:
            raise ValueError(
                f"hidden_layers={self.hidden_layers} must be 0 or more and hidden_units={self.hidden_units} 1 or more"
            )
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd, so that a synthetic gradient has its output's size")
        if self.borders is not None and not self.borders:
            raise ValueError("borders=() leaves no synthesiser: name some, or leave borders out for all of them")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0")

    @property
    def title(self) -> str:
        return f"{self.card.title}, label-conditioned" if self.conditioned else self.card.title

    def needs(self, place: Place) -> Needs:
        if not self._synthesises(place):
            return Needs.ABOVE
        return Needs.TARGET if self.conditioned else Needs.NOTHING

    def passes_on(self, place: Place) -> bool:
        return not self._synthesises(place)

    def auxiliary_needs(self, place: Place) -> Needs | None:
        return Needs.ABOVE if self._synthesises(place) else None

    def _synthesises(self, place: Place) -> bool:
        """The block under the loss has the true gradient at hand; it never gets a synthesiser."""
        for border in self.borders or ():
            if not 0 <= border < place.count - 1:
                raise ValueError(
                    f"borders={self.borders}: {place.count} blocks have borders 0 to {place.count - 2}, not {border}"
                )
        return not place.top and (self.borders is None or place.index in self.borders)

    def build(self, site: Site) -> nn.Module | None:
        if not self._synthesises(site.place):
            return None
        classes = 0
        if self.conditioned:
            classes = site.scores.shape[1]
            if site.scores.dim() != 2:
                shape = tuple(site.scores.shape)
                raise ValueError(
                    f"a label-conditioned synthesiser needs class scores (batch, classes), this model gives {shape}"
                )
        return nn.ModuleList(self._synthesiser(y, classes) for y in site.outputs)

    def _synthesiser(self, y: Tensor, classes: int) -> "Synthesiser":
        if y.dim() == 4:
            return ConvolutionalSynthesiser(y, classes, self.hidden_layers, self.hidden_units, self.kernel_size)
        if self.hidden_layers:
            return DenseSynthesiser(y, classes, self.hidden_layers, self.hidden_units)
        return LinearSynthesiser(y, classes)

    def auxiliary_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        rate = (1e-3 if self.conditioned else 3e-2) if self.learning_rate is None else self.learning_rate
        return torch.optim.Adam(parameters, lr=rate, fused=True)

    def credit(self, context: Context) -> Credit | None:
        if not self._synthesises(context.place):
            return context.above
        synthesisers = _synthesisers(context)
        if not context.outputs:  # frozen up to here: there is nothing to have a gradient
            return ()
        which = _one_hot(context, synthesisers[0].classes) if self.conditioned else None
        pairs = zip(synthesisers, context.outputs, strict=True)
        context.memo = [synthesiser.predict(y, which, context.samples) for synthesiser, y in pairs]
        return tuple(prediction.credit for prediction in context.memo)

    def learn(self, context: Context) -> Tensor | None:
        if context.above is None:
            return None
        synthesisers = _synthesisers(context)
        loss = None
        for synthesiser, prediction, truth in zip(synthesisers, context.memo, context.above, strict=True):
            if truth is not None:
                # dL/d(prediction) = (prediction - m truth) / m, which is the credit minus the truth: the loss needs no graph.
                difference = prediction.credit.sub_(truth)
                synthesiser.regress(prediction, difference)
                flat = difference.flatten()  # a view, unless the memory is in another order (channels last)
                square = torch.dot(flat, flat)
                loss = square if loss is None else loss + square
        return None if loss is None else loss * (context.samples / 2)


@dataclass(slots=True)
class Prediction:
    """A prediction until the truth arrives.

    Attributes:
        credit: The predicted gradient of the batch's mean loss, shape of y; detached.
        graph: What the synthesiser needs to learn from it later.
    """

    credit: Tensor
    graph: Any


class Synthesiser(nn.Module, ABC):
    """Predicts the gradient of one sample's loss with respect to y, from y and optionally the label c (a one-hot row).

    Args:
        classes: Number of classes to condition on, 0 for none.

    Reference:
        Jaderberg et al. 2016, arXiv 1608.05343, appendix "Feed-forward implementation details".
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    @abstractmethod
    def forward(
        self, y: Float[Tensor, "m *shape"], label: Float[Tensor, "m classes"] | None = None
    ) -> Float[Tensor, "m *shape"]:
        """Returns the predicted gradient of each sample's loss; the label is given if and only if it is conditioned on."""

    def predict(self, y: Tensor, label: Tensor | None, samples: int) -> Prediction:
        """Returns the prediction on the scale of the mean loss over ``samples``, and what learning from it takes."""
        dtype = next(self.parameters()).dtype
        prediction = self(y.to(dtype), None if label is None else label.to(dtype))
        # The last layer is affine, whose gradient does not look at its own output: the output may be rescaled where it lies.
        return Prediction(prediction.detach().div_(samples), prediction)

    def regress(self, prediction: Prediction, difference: Tensor) -> None:
        """Leaves the gradients of the parameters, given that of the loss with respect to the prediction."""
        torch.autograd.backward(prediction.graph, difference)


class LinearSynthesiser(Synthesiser):
    r"""An affine map, $M(y, c) = W y + t_c$ with a row of the table t for each class (one row b if there is no label).

    It is that of $[y; \mathrm{onehot}(c)]$. Its gradients, $\partial L/\partial W = d^T y$ and $\partial L/\partial t =
    \mathrm{onehot}(c)^T d$, are taken by hand: it is the whole extra cost of a decoupled step, and autograd would double it.

    Args:
        like: An example of y, shape (m, d) or (m, ..., d).
        classes: Number of classes to condition on, 0 for none.
    """

    def __init__(self, like: Tensor, classes: int) -> None:
        super().__init__(classes)
        units = like.shape[-1]
        self.weight = nn.Parameter(like.new_zeros(units, units))
        self.table = nn.Parameter(like.new_zeros(max(classes, 1), units))

    def forward(self, y: Tensor, label: Tensor | None = None) -> Tensor:
        """Returns W y + t."""
        return F.linear(y, self.weight) + self._rows(y, label).view(-1, *[1] * (y.dim() - 2), y.shape[-1])

    def _rows(self, y: Tensor, label: Tensor | None) -> Tensor:
        """Returns the row of the table for each sample, or the one row."""
        return self.table if label is None else label @ self.table

    def predict(self, y: Tensor, label: Tensor | None, samples: int) -> Prediction:
        """Returns (W y + t) / samples."""
        weight, table = self.weight.detach(), self.table.detach()
        rows = y.to(weight.dtype).flatten(0, -2)
        if label is None:
            credit = torch.addmm(table, rows, weight.t(), beta=1 / samples, alpha=1 / samples)
        else:
            label = label.to(weight.dtype)
            if len(label) != len(rows):  # one label for all steps of a sequence
                label = label.repeat_interleave(len(rows) // len(label), dim=0)
            # A product with the one-hot rows is faster than gathering rows of the table.
            credit = (label @ table).addmm_(rows, weight.t(), beta=1 / samples, alpha=1 / samples)
        return Prediction(credit.view(y.shape), (hold(rows), label))

    def regress(self, prediction: Prediction, difference: Tensor) -> None:
        """Leaves the gradients in closed form."""
        rows, label = unhold(prediction.graph[0]), prediction.graph[1]
        difference = difference.flatten(0, -2)
        self.weight.grad = difference.t() @ rows
        self.table.grad = difference.sum(0, keepdim=True) if label is None else label.t() @ difference


class DenseSynthesiser(Synthesiser):
    """Hidden layers (affine, batch normalisation, ReLU), then an affine one that starts at zero; the label enters the first.

    Args:
        like: An example of y, shape (m, d) or (m, t, d); across time t there is no normalisation, steps not being independent.
        classes: Number of classes to condition on, 0 for none.
        hidden_layers: 1 or more.
        hidden_units: Their width.
    """

    def __init__(self, like: Tensor, classes: int, hidden_layers: int, hidden_units: int) -> None:
        super().__init__(classes)
        place = {"dtype": like.dtype, "device": like.device}
        widths = [like.shape[-1] + classes] + [hidden_units] * hidden_layers
        layers: list[nn.Module] = []
        for into, out in itertools.pairwise(widths):
            normalise = nn.BatchNorm1d(out, **place) if like.dim() == 2 else nn.Identity()
            layers += [nn.Linear(into, out, **place), normalise, nn.ReLU()]
        self.layers = nn.Sequential(*layers, _zero(nn.Linear(widths[-1], like.shape[-1], **place)))

    def forward(self, y: Tensor, label: Tensor | None = None) -> Tensor:
        """Returns the prediction."""
        if label is not None:
            y = torch.cat([y, label.view(len(y), *[1] * (y.dim() - 2), -1).expand(*y.shape[:-1], -1)], dim=-1)
        return self.layers(y)


class ConvolutionalSynthesiser(Synthesiser):
    """Convolutions of the same size on (m, channels, h, w); the label enters the first as one plane for each class.

    Args:
        like: An example of y.
        classes: Number of classes to condition on, 0 for none.
        hidden_layers: 0 or more, each with batch normalisation and ReLU.
        hidden_units: Their channels.
        kernel_size: Odd width of the kernels.
    """

    def __init__(self, like: Tensor, classes: int, hidden_layers: int, hidden_units: int, kernel_size: int) -> None:
        super().__init__(classes)
        place = {"dtype": like.dtype, "device": like.device}

        def convolution(into: int, out: int) -> nn.Module:
            return nn.Conv2d(into, out, kernel_size, padding=kernel_size // 2, **place)

        widths = [like.shape[1] + classes] + [hidden_units] * hidden_layers
        layers: list[nn.Module] = []
        for into, out in itertools.pairwise(widths):
            layers += [convolution(into, out), nn.BatchNorm2d(out, **place), nn.ReLU()]
        self.layers = nn.Sequential(*layers, _zero(convolution(widths[-1], like.shape[1])))

    def forward(self, y: Tensor, label: Tensor | None = None) -> Tensor:
        """Returns the prediction."""
        if label is not None:
            y = torch.cat([y, label[:, :, None, None].expand(-1, -1, *y.shape[2:])], dim=1)
        return self.layers(y)


def _synthesisers(context: Context) -> list[Synthesiser]:
    """Returns the synthesisers of the cell, one for each tensor that crosses its border and carries credit."""
    return list(cast("nn.ModuleList", context.auxiliary))  # pyrefly: ignore[bad-return]


def _one_hot(context: Context, classes: int) -> Tensor:
    """Returns the batch's labels as one-hot rows, made once for all cells."""
    if "one_hot" not in context.shared:
        label = context.target
        if not isinstance(label, Tensor) or label.dim() != 1 or label.is_floating_point():
            raise ValueError(
                f"a label-conditioned synthesiser needs class numbers of shape (batch,), the targets are {describe(label)}"
            )
        label = label.long()[:, None]
        zeros = context.outputs[0].new_zeros(len(label), classes)
        # A negative label is one that the loss ignores; it has no class.
        context.shared["one_hot"] = zeros.scatter_(1, label.clamp_min(0), (label >= 0).to(zeros.dtype))
    return context.shared["one_hot"]


def _zero(layer: nn.Module) -> nn.Module:
    """Starts a layer at zero, weights and biases, so that the first synthetic gradients are zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
