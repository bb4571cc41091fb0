"""Synthetic gradients (decoupled neural interfaces): each block predicts its own credit."""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

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
        title="Synthetic gradients (decoupled neural interfaces)",
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
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0")

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
        return nn.ModuleList(
            Synthesiser(y, classes, self.hidden_layers, self.hidden_units, self.kernel_size) for y in site.outputs
        )

    def auxiliary_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        rate = (1e-3 if self.conditioned else 3e-2) if self.learning_rate is None else self.learning_rate
        return torch.optim.Adam(parameters, lr=rate, fused=True)

    def credit(self, context: Context) -> Credit | None:
        if not self._synthesises(context.place):
            return context.above
        assert isinstance(context.auxiliary, nn.ModuleList)
        label = context.target if self.conditioned else None
        predictions = [synthesiser(y, label) for synthesiser, y in zip(context.auxiliary, context.outputs, strict=True)]
        # The last layer is affine, whose gradient does not look at its own output: the output may be rescaled where it lies.
        credit = tuple(prediction.detach().div_(context.samples) for prediction in predictions)
        context.memo = list(zip(predictions, credit, strict=True))
        return credit

    def learn(self, context: Context) -> Tensor | None:
        if context.above is None:
            return None
        predictions, differences = [], []
        for (prediction, credit), truth in zip(context.memo, context.above, strict=True):
            if truth is not None:
                predictions.append(prediction)
                differences.append(credit.sub_(truth))
        # dL/d(prediction) = (prediction - m truth) / m is this difference: no graph of the loss itself is needed.
        torch.autograd.backward(predictions, differences)
        squares = [torch.dot(d.flatten(), d.flatten()) for d in differences]
        return torch.stack(squares).sum() * (context.samples / 2)


class Synthesiser(nn.Module):
    """Predicts the gradient of one tensor from the tensor itself, and optionally the label.

    Affine layers act on the last dimension of (m, d) or (m, t, d), and as convolutions of the same size on (m, d, h, w). The
    label enters the first layer: as a one-hot vector beside the features, on images as one plane for each class.

    Args:
        like: An example of the tensor, shape (m, ...).
        classes: Number of classes to condition on, 0 for none.
        hidden_layers: Hidden layers, 0 or more.
        hidden_units: Their width.
        kernel_size: Width of convolutions.

    Reference:
        Jaderberg et al. 2016, arXiv 1608.05343, appendix "Feed-forward implementation details".
    """

    def __init__(self, like: Tensor, classes: int, hidden_layers: int, hidden_units: int, kernel_size: int) -> None:
        super().__init__()
        self.classes, self.image = classes, like.dim() == 4
        units = like.shape[1] if self.image else like.shape[-1]
        widths = [units] + [hidden_units] * hidden_layers + [units]
        first, *rest = itertools.pairwise(widths)
        place = {"dtype": like.dtype, "device": like.device}

        def affine(into: int, out: int, bias: bool = True) -> nn.Module:
            if self.image:
                return nn.Conv2d(into, out, kernel_size, padding=kernel_size // 2, bias=bias, **place)
            return nn.Linear(into, out, bias=bias, **place)

        # W [x; onehot(c)] + b = W_x x + t[c]: the row of a table instead of a product with a mostly empty vector.
        self.label = None
        if classes and not self.image:
            self.label = nn.Embedding(classes, first[1], **place)
            nn.init.uniform_(self.label.weight, -((units + classes) ** -0.5), (units + classes) ** -0.5)
        self.enter = affine(first[0] + (classes if self.image else 0), first[1], bias=self.label is None)
        layers: list[nn.Module] = []
        for into, out in rest:
            layers += [_normalise(like.dim(), into, place), nn.ReLU(), affine(into, out)]
        self.rest = nn.Sequential(*layers)
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        last = [self.rest[-1]] if len(self.rest) else [self.enter, *([] if self.label is None else [self.label])]
        for module in last:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def forward(self, y: Float[Tensor, "m *shape"], label: Int[Tensor, " m"] | None = None) -> Float[Tensor, "m *shape"]:
        """Returns the predicted gradient of one sample's loss.

        Args:
            y: The block's output.
            label: Class numbers; given if and only if the synthesiser is conditioned.
        """
        if self.image and label is not None:
            planes = F.one_hot(label, self.classes).to(y.dtype)[:, :, None, None].expand(-1, -1, *y.shape[2:])
            return self.rest(self.enter(torch.cat([y, planes], dim=1)))
        if self.label is None or label is None:
            return self.rest(self.enter(y))
        rows = self.label(label)
        if y.dim() == 2:
            return self.rest(torch.addmm(rows, y, self.enter.weight.t()))
        return self.rest(self.enter(y) + rows[:, None])


def _normalise(rank: int, width: int, place: dict) -> nn.Module:
    """Batch normalisation over units; over channels for images; none across time, where samples are not independent."""
    makers = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    return makers[rank](width, **place) if rank in makers else nn.Identity()
