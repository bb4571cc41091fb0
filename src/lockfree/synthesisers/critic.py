"""Value-form synthesisers: a critic predicts the loss, and its derivative is the synthetic gradient."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lockfree.synthesisers.base import Design, Prediction, Synthesiser, zero
from lockfree.synthesisers.networks import by_class, convolutional_layers, dense_layers, with_label


class CriticSynthesiser(Synthesiser):
    r"""A network v(y, c) that predicts one sample's loss; the credit is $\partial v/\partial y$.

    $$L_v = \frac{1}{2m}\sum_n (v(y_n, c_n) - \ell_n)^2
        + \frac{\beta}{2m}\sum_n \lVert \partial v/\partial y_n - m\delta_n \rVert^2$$

    With $\beta = 0$ it fits values alone; with $\beta > 0$ derivatives too (Sobolev training), those that the block above reports.
    The hidden layers have a smooth activation, softplus, since what is consumed is a derivative, and no normalisation, which would
    make a sample's value depend on the others.

    Args:
        like: An example of y.
        design: 1 or more hidden layers; $\beta$ is its ``matching``.
        sobolev: Whether derivatives are fitted, too; if not, $\beta$ is 0.

    Raises:
        ValueError: If there is no hidden layer: an affine value has the same gradient everywhere.

    Reference:
        Czarnecki, Osindero, Jaderberg, Swirszcz, Pascanu 2017, "Sobolev training for neural networks", arXiv 1706.04859.
    """

    def __init__(self, like: Tensor, design: Design, *, sobolev: bool) -> None:
        super().__init__(design.classes)
        if not design.hidden_layers:
            raise ValueError(
                "hidden_layers=0: an affine critic has the same gradient at every output; give it a hidden layer, hidden_layers=1"
            )
        self.matching = design.matching if sobolev else 0.0
        per_class = design.per_class and design.classes
        self.networks = nn.ModuleList(_value_network(like, design) for _ in range(design.classes if per_class else 1))
        self.per_class = bool(per_class)

    def forward(self, y: Float[Tensor, "m *shape"], label: Float[Tensor, "m classes"] | None = None) -> Float[Tensor, " m"]:
        """Returns the predicted loss of each sample."""
        values = by_class(self.networks, y, label) if self.per_class else self.networks[0](with_label(y, label))
        return values.flatten(1).sum(1)

    def predict(self, y: Tensor, label: Tensor | None, samples: int) -> Prediction:
        """Differentiates the predicted loss."""
        dtype = next(self.parameters()).dtype
        with torch.enable_grad():
            leaf = y.detach().to(dtype).requires_grad_()
            values = self(leaf, None if label is None else label.to(dtype))
            (gradient,) = torch.autograd.grad(values.sum(), leaf, create_graph=self.matching > 0, retain_graph=True)
        return Prediction(gradient.detach() / samples, (values, gradient))

    def learn(
        self, prediction: Prediction, truth: Tensor | None, samples: int, sample_losses: Callable[[], Tensor] | None
    ) -> Tensor | None:
        """Fits the values to the samples' losses, as far as they are known, and with them the derivatives."""
        values, gradient = prediction.graph
        loss = None
        if sample_losses is not None:
            loss = (values - sample_losses().to(values.dtype)).square().mean() / 2
        if self.matching and truth is not None:
            far = (gradient - samples * truth.to(gradient.dtype)).square().flatten(1).sum(1).mean()
            loss = far * (self.matching / 2) + (0.0 if loss is None else loss)
        if loss is None:
            return None
        if loss.requires_grad:  # not if no sample has a class
            loss.backward()
        return loss.detach()


def _value_network(like: Tensor, design: Design) -> nn.Module:
    classes = 0 if design.per_class else design.classes
    if like.dim() == 4:
        hidden, width = convolutional_layers(like, design, like.shape[1] + classes, smooth=True)
        hidden += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    else:
        hidden, width = dense_layers(like, design, like.shape[-1] + classes, smooth=True)
    return nn.Sequential(*hidden, zero(nn.Linear(width, 1, dtype=like.dtype, device=like.device)))
