"""The networks that predict gradients: linear, fully connected, convolutional, one for each class, or the user's own."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.memory import hold, unhold
from lockfree.rng import undisturbed
from lockfree.synthesisers.base import Design, GradientSynthesiser, Prediction, zero


def gradient_network(like: Tensor, design: Design) -> GradientSynthesiser:
    """Makes the network that suits a block's output: convolutional on images, linear or with hidden layers elsewhere.

    Args:
        like: An example of the output, shape (m, ...).
        design: Its size and what it sees.
    """
    if design.per_class and design.classes:
        return _for_each_class(gradient_network, like, design)
    if like.dim() == 4:
        return ConvolutionalSynthesiser(like, design)
    return DenseSynthesiser(like, design) if design.hidden_layers else LinearSynthesiser(like, design)


def logistic_network(like: Tensor, design: Design) -> GradientSynthesiser:
    """Makes an affine map under a sigmoid, or one for each class.

    Args:
        like: An example of the output, shape (m, d) or (m, t, d).
        design: Of it, the number of classes and whether each has a network of its own.
    """
    each = design.per_class and design.classes
    return _for_each_class(logistic_network, like, design) if each else LogisticSynthesiser(like, design)


def _for_each_class(
    make: Callable[[Tensor, Design], GradientSynthesiser], like: Tensor, design: Design
) -> "PerClassSynthesiser":
    alone = replace(design, classes=0, per_class=False)
    return PerClassSynthesiser([make(like, alone) for _ in range(design.classes)])


class LinearSynthesiser(GradientSynthesiser):
    r"""An affine map, $M(y, c) = W y + t_c$ with a row of the table t for each class (one row b if there is no label).

    It is that of $[y; \mathrm{onehot}(c)]$. Its gradients, $\partial L/\partial W = d^T y$ and $\partial L/\partial t =
    \mathrm{onehot}(c)^T d$, are taken by hand: it is the whole extra cost of a decoupled step, and autograd would double it.

    Args:
        like: An example of y, shape (m, d) or (m, ..., d).
        design: Of it, the number of classes.
    """

    plain = True
    is_affine = True

    def __init__(self, like: Tensor, design: Design) -> None:
        super().__init__(design.classes)
        units = like.shape[-1]
        self.weight = nn.Parameter(like.new_zeros(units, units))
        self.table = nn.Parameter(like.new_zeros(max(design.classes, 1), units))

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

    @staticmethod
    def opened(prediction: Prediction) -> tuple[Tensor, Tensor | None]:
        """Returns what a prediction was made from: the outputs as rows, and the labels."""
        rows, label = prediction.graph
        return unhold(rows), label

    def store(self, prediction: Prediction) -> dict[str, Tensor | None]:
        """Returns the prediction, and what it was made from."""
        rows, label = self.opened(prediction)
        return {"credit": prediction.credit, "rows": rows, "label": label}

    def restore(self, state: dict[str, Any]) -> Prediction:
        """Returns the prediction that `store` took apart."""
        return Prediction(state["credit"], (hold(state["rows"]), state["label"]))

    def regress(self, prediction: Prediction, difference: Tensor) -> None:
        """Leaves the gradients in closed form."""
        rows, label = self.opened(prediction)
        difference = difference.flatten(0, -2)
        self.weight.grad = difference.t() @ rows
        self.table.grad = difference.sum(0, keepdim=True) if label is None else label.t() @ difference


class LogisticSynthesiser(GradientSynthesiser):
    r"""An affine map under a sigmoid, and another of the label: $M(y, c) = \sigma(W y + b) + o + t_c$ with a row $t_c$ for each class.

    At the output of a model with logistic loss, whose gradient is $\sigma(y) - c$, it can be exact, as an affine map cannot. The
    offset o starts at -1/2 and the rest at 0, so that the first synthetic gradients are zero.

    Args:
        like: An example of y, shape (m, d) or (m, t, d).
        design: Of it, the number of classes.

    Raises:
        ValueError: If y is an image.

    Reference:
        Czarnecki et al. 2017, arXiv 1703.00522, section 3.
    """

    def __init__(self, like: Tensor, design: Design) -> None:
        super().__init__(design.classes)
        if like.dim() > 3:
            raise ValueError(
                f"a synthesiser of the form sigmoid takes rows, not outputs {tuple(like.shape)}: take the form gradient"
            )
        units = like.shape[-1]
        self.affine = zero(nn.Linear(units, units, dtype=like.dtype, device=like.device))
        self.offset = nn.Parameter(like.new_full((units,), -0.5))
        self.table = nn.Parameter(like.new_zeros(design.classes, units))

    def forward(self, y: Tensor, label: Tensor | None = None) -> Tensor:
        """Returns sigmoid(W y + b) + o + t."""
        made = torch.sigmoid(self.affine(y)) + self.offset
        if label is None:
            return made
        return made + (label @ self.table).view(-1, *[1] * (y.dim() - 2), y.shape[-1])


class DenseSynthesiser(GradientSynthesiser):
    """Hidden layers (affine, batch normalisation, ReLU), then an affine one that starts at zero; the label enters the first.

    Args:
        like: An example of y, shape (m, d) or (m, t, d); across time t there is no normalisation, steps not being independent.
        design: 1 or more hidden layers.
    """

    def __init__(self, like: Tensor, design: Design) -> None:
        super().__init__(design.classes)
        place = {"dtype": like.dtype, "device": like.device}
        hidden, width = dense_layers(like, design, like.shape[-1] + design.classes)
        self.layers = nn.Sequential(*hidden, zero(nn.Linear(width, like.shape[-1], **place)))

    def forward(self, y: Tensor, label: Tensor | None = None) -> Tensor:
        """Returns the prediction."""
        return self.layers(with_label(y, label))


class ConvolutionalSynthesiser(GradientSynthesiser):
    """Convolutions of the same size on (m, channels, h, w); the label enters the first as one plane for each class.

    Args:
        like: An example of y.
        design: 0 or more hidden layers, each with batch normalisation and ReLU.
    """

    def __init__(self, like: Tensor, design: Design) -> None:
        super().__init__(design.classes)
        hidden, width = convolutional_layers(like, design, like.shape[1] + design.classes)
        self.layers = nn.Sequential(*hidden, zero(convolution(like, width, like.shape[1], design.kernel_size)))

    def forward(self, y: Tensor, label: Tensor | None = None) -> Tensor:
        """Returns the prediction."""
        return self.layers(with_label(y, label))


class PerClassSynthesiser(GradientSynthesiser):
    """A network for each class; each sees the samples of its class only. Samples without a class get a gradient of zero.

    Args:
        networks: One for each class, which see no label.
    """

    def __init__(self, networks: list[GradientSynthesiser]) -> None:
        super().__init__(len(networks))
        self.networks = nn.ModuleList(networks)

    def forward(self, y: Tensor, label: Tensor | None = None) -> Tensor:
        """Returns the prediction."""
        return by_class(self.networks, y, label)


def by_class(networks: nn.ModuleList, y: Tensor, label: Tensor | None) -> Tensor:
    """Runs each network on the rows of its class; a class of one row is normalised by running statistics, having no others."""
    assert label is not None, "a network for each class is only built where there are labels"
    classed = label.any(dim=1)
    numbers = label.argmax(dim=1).where(classed, len(networks))
    order = numbers.argsort(stable=True)
    counts = numbers.bincount(minlength=len(networks) + 1).tolist()
    parts = []
    for network, rows in zip(networks, y[order].split(counts), strict=False):
        if len(rows):
            training = network.training
            made = network.train(training and len(rows) > 1)(rows)
            network.train(training)
            parts.append(made)
    if counts[-1]:
        shape = (parts[0] if parts else y).shape[1:]
        nothing = 0 * y[order][-counts[-1] :].flatten(1).sum(1)  # zeros, which can be differentiated as the others can
        parts.append(nothing.view(-1, *[1] * len(shape)).expand(-1, *shape))
    return torch.cat(parts)[order.argsort()]


class ModuleSynthesiser(GradientSynthesiser):
    """A user's own module as a synthesiser: it maps y, or (y, one-hot label), to a tensor of y's shape.

    Nothing is zeroed: a module whose last layer starts at zero lets training start as if the blocks below were frozen.

    Args:
        module: It.
        like: An example of y.
        classes: Number of classes to condition on, 0 for none.

    Raises:
        ValueError: If it does not take y, or gives another shape.
    """

    def __init__(self, module: nn.Module, like: Tensor, classes: int) -> None:
        super().__init__(classes)
        self.module = module.to(like)
        with undisturbed(module), torch.no_grad():
            module.eval()
            label = like.new_zeros(len(like), classes)
            try:
                made = module(like, label) if classes else module(like)
            except (RuntimeError, TypeError, IndexError) as error:
                labels = f" and one-hot labels {tuple(label.shape)}" if classes else ""
                reason = str(error).strip().splitlines()[0]
                raise ValueError(
                    f"the synthesiser {type(module).__name__} does not take outputs {tuple(like.shape)}{labels}: {reason}"
                ) from error
        if not isinstance(made, Tensor) or made.shape != like.shape:
            found = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(
                f"the synthesiser {type(module).__name__} gives {found} for outputs {tuple(like.shape)}: a gradient has the "
                "shape of what it belongs to"
            )

    def forward(self, y: Tensor, label: Tensor | None = None) -> Tensor:
        """Returns what the module returns."""
        return self.module(y) if label is None else self.module(y, label)


# ---- layers ------------------------------------------------------------------------------------------------------------------


def dense_layers(like: Tensor, design: Design, into: int, *, smooth: bool = False) -> tuple[list[nn.Module], int]:
    """Returns the hidden layers on (m, d) or (m, t, d), and the width of what comes out of them.

    Each is affine, batch normalisation, ReLU; if they are to be smooth functions of each sample alone, affine and softplus.
    """
    place = {"dtype": like.dtype, "device": like.device}
    layers: list[nn.Module] = []
    widths = [into] + [design.hidden_units] * design.hidden_layers
    for below, above in itertools.pairwise(widths):
        layers += [nn.Linear(below, above, **place)]
        layers += [nn.BatchNorm1d(above, **place)] if like.dim() == 2 and not smooth else []
        layers += [nn.Softplus() if smooth else nn.ReLU()]
    return layers, widths[-1]


def convolutional_layers(like: Tensor, design: Design, into: int, *, smooth: bool = False) -> tuple[list[nn.Module], int]:
    """Returns the hidden layers on (m, channels, h, w), and the channels of what comes out of them; see `dense_layers`."""
    layers: list[nn.Module] = []
    widths = [into] + [design.hidden_units] * design.hidden_layers
    for below, above in itertools.pairwise(widths):
        layers += [convolution(like, below, above, design.kernel_size)]
        layers += [] if smooth else [nn.BatchNorm2d(above, dtype=like.dtype, device=like.device)]
        layers += [nn.Softplus() if smooth else nn.ReLU()]
    return layers, widths[-1]


def convolution(like: Tensor, into: int, out: int, kernel_size: int) -> nn.Module:
    """Returns a convolution that keeps height and width."""
    return nn.Conv2d(into, out, kernel_size, padding=kernel_size // 2, dtype=like.dtype, device=like.device)


def with_label(y: Tensor, label: Tensor | None) -> Tensor:
    """Joins the label to each position: as one plane for each class on images, as one-hot entries elsewhere."""
    if label is None:
        return y
    if y.dim() == 4:
        return torch.cat([y, label[:, :, None, None].expand(-1, -1, *y.shape[2:])], dim=1)
    return torch.cat([y, label.view(len(y), *[1] * (y.dim() - 2), -1).expand(*y.shape[:-1], -1)], dim=-1)
