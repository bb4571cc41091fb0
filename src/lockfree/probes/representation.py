"""What the representations of a network are like: similarity, geometry, and what can be read out of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lockfree.choose import choose
from lockfree.learner import Learner
from lockfree.probes.base import Probe, View, blue

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def linear_cka(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Float[Tensor, "n k"]:
    r"""Linear CKA of every layer of one network with every layer of another, or of the same.

    $$\mathrm{CKA}(A, B) = \frac{\langle K_A, K_B\rangle_F}{\lVert K_A\rVert_F \lVert K_B\rVert_F}, \qquad K_A = H A A^T H$$

    It is `lockfree.hsic.cka` with linear kernels; here each Gram matrix is made once for all pairs.

    Args:
        ones: Representations of the same m samples, shape (m, ...) each.
        others: Likewise; features may differ in number.

    Returns:
        Numbers from 0 to 1; nan where a layer is constant.

    Raises:
        ValueError: If the numbers of samples differ.

    Example:
        >>> x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        >>> round(float(linear_cka([x], [2 * x + 1])[0, 0]), 4)
        1.0

    Reference:
        Kornblith, Norouzi, Lee, Hinton 2019, arXiv 1905.00414, equations 1 to 3.
    """
    counts = {len(z) for z in (*ones, *others)}
    if len(counts) != 1:
        raise ValueError(f"representations of {sorted(counts)} samples: compare layers on the same samples")
    return _directions([_gram(z) for z in ones]) @ _directions([_gram(z) for z in others]).T


def _directions(grams: Sequence[Tensor]) -> Tensor:
    """Returns Gram matrices as vectors of length 1: their products are CKA."""
    return torch.stack([gram.flatten() / gram.norm() for gram in grams])


def _gram(z: Tensor) -> Tensor:
    rows = _centred(z)
    return rows @ rows.T


def _centred(z: Tensor) -> Tensor:
    rows = z.detach().flatten(1).double()
    return rows - rows.mean(0)


def draw_likeness(cka: Float[Tensor, "n k"], one: str, other: str) -> "Figure":
    """Draws how alike the layers of two networks are.

    Args:
        cka: What `linear_cka` returned.
        one: The network whose layers are rows.
        other: The one whose layers are columns.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.0), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(cka.cpu().numpy(), vmin=0, vmax=1, cmap="magma", interpolation="nearest", origin="lower")
    figure.colorbar(image, ax=axis, label="linear CKA")
    axis.set(xlabel=f"block of {other}", ylabel=f"block of {one}")
    return figure


def dissimilarity(z: Float[Tensor, "m ..."]) -> Float[Tensor, "m m"]:
    """Returns the representational dissimilarity matrix: 1 minus the correlation of each two samples' features, 0 to 2.

    A sample whose features are all equal correlates with none: its dissimilarities are 1.

    Example:
        >>> dissimilarity(torch.tensor([[0.0, 1.0], [1.0, 3.0], [1.0, 0.0]]))[0].round().tolist()
        [0.0, 0.0, 2.0]

    Reference:
        Kriegeskorte, Mur, Bandettini 2008, "Representational similarity analysis".
    """
    rows = z.detach().flatten(1).double()
    rows = F.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    found = (1 - rows @ rows.T).clamp(0, 2)
    return found.fill_diagonal_(0)


def participation_ratio(z: Float[Tensor, "m ..."]) -> float:
    r"""Returns $(\mathrm{tr}\,C)^2/\mathrm{tr}\,C^2$ of the features' covariance: how many directions carry the variance.

    It is from 1 to the number of features; nan where nothing varies.

    Reference:
        Gao, Trautmann, Yu et al. 2017, "A theory of multineuronal dimensionality, dynamics and measurement".
    """
    rows = _centred(z)
    return _directions_that_vary(rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows)


def _directions_that_vary(gram: Tensor) -> float:
    """Returns the participation ratio, given the Gram matrix or the covariance: the same eigenvalues, but for zeros."""
    return float(gram.trace().square() / gram.square().sum())


def linear_probe(z: Float[Tensor, "m ..."], classes: Int[Tensor, " m"], *, ridge: float = 1e-2) -> float:
    r"""Accuracy of a linear classifier on held-out samples: ridge regression of one-hot classes, in closed form.

    $$W = (Z^TZ + \lambda I)^{-1}Z^TY, \qquad \lambda = \rho\,\mathrm{tr}(Z^TZ)/m$$

    Every second sample, from the second, is held out; $Z$ and $Y$ are centred by the others' means.

    Args:
        z: A layer's output.
        classes: Class numbers.
        ridge: $\rho$, above 0.

    Reference:
        Alain, Bengio 2016, "Understanding intermediate layers using linear classifier probes", arXiv 1610.01644 (there logistic).
    """
    return _read_out(_gram(z), classes, ridge)


def _read_out(gram: Tensor, classes: Tensor, ridge: float) -> float:
    """Returns a linear probe's accuracy, given products of samples alone: as many unknowns as samples, however many features."""
    labels = F.one_hot(classes.clamp_min(0)).double()
    train, held = slice(0, None, 2), slice(1, None, 2)
    prior = labels[train].mean(0)
    # What samples are centred by is the mean of those that are fitted: in products, a mean over their columns and rows.
    gram = gram - gram[:, train].mean(1, keepdim=True)
    gram = gram - gram[train].mean(0)
    mine, others = gram[train, train], gram[held, train]
    penalty = ridge * float(mine.trace()) / len(mine)
    if not penalty > 0:
        scores = prior.expand(len(others), -1)
    else:
        eye = torch.eye(len(mine), dtype=mine.dtype, device=mine.device)
        scores = others @ torch.linalg.solve(mine + penalty * eye, labels[train] - prior) + prior
    return float((scores.argmax(1) == classes[held]).double().mean())


@dataclass(frozen=True, kw_only=True)
class Representation(Probe):
    """Dissimilarity matrices, linear CKA between all layers, a linear probe and the participation ratio of each layer.

    Attributes:
        layers: Names of submodules, as in ``model.named_modules()``, that are looked at in this order; ``None``: what each block
            hands up.
        pictured: Samples in a dissimilarity matrix, 2 or more, ordered by class; as many of each as there are.
        ridge: Of the linear probes, above 0; see `linear_probe`.

    Raises:
        ValueError: If a number is out of range; when attached, if the model has no layer of a name.

    Example:
        >>> import lockfree as lf
        >>> lf.probes.Representation(layers=("layer1", "layer2.0.conv1")).layers
        ('layer1', 'layer2.0.conv1')

    Reference:
        Czarnecki et al. 2017, arXiv 1703.00522, section 5.
    """

    name = "representation"
    said = (
        "At the end: how unlike each two samples are in a layer (1 minus correlation, samples ordered by class), and how alike each two "
        "layers are (linear CKA); along training: what a linear classifier reads out of each layer on samples that it was not fitted "
        "to, and how many directions carry the layer's variance. In evaluation mode, on held-out samples."
    )
    layers: tuple[str, ...] | None = None
    pictured: int = 100
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers == ():
            raise ValueError("layers=() names none: name some, or leave layers out for all blocks")
        if self.pictured < 2 or not self.ridge > 0:
            raise ValueError(f"pictured={self.pictured}, ridge={self.ridge}: give 2 or more samples and a ridge above 0")

    def check(self, learner: Learner) -> None:
        there = dict(learner.model.named_modules())
        for name in self.layers or ():
            choose(there, name, "layer of this model")

    def look(self, view: View) -> dict[str, Any]:
        self.check(view.learner)
        layers = view.representations if self.layers is None else view.outputs_of(self.layers)
        classes = view.targets
        if not isinstance(classes, Tensor) or classes.is_floating_point() or classes.dim() != 1:
            raise ValueError("layers are compared by class: this probe wants class numbers of shape (batch,)")
        order = torch.argsort(classes, stable=True)
        order = order[torch.linspace(0, len(order) - 1, min(self.pictured, len(order)), device=order.device).round().long()]
        grams = [_gram(z) for z in layers]  # all but dissimilarity is in them
        alike, labels = _directions(grams), _gram(F.one_hot(classes.clamp_min(0)))
        return {
            "layers": [f"block {index}" for index in range(len(layers))] if self.layers is None else list(self.layers),
            "classes": classes[order].tolist(),
            "rdm": [dissimilarity(z[order]).round(decimals=2).tolist() for z in layers],
            "cka": (alike @ alike.T).tolist(),
            "class_cka": (alike @ _directions([labels])[0]).tolist(),
            "probe_accuracy": [_read_out(gram, classes, self.ridge) for gram in grams],
            "participation_ratio": [_directions_that_vary(gram) for gram in grams],
        }

    @classmethod
    def draw(cls, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.2, 4.6 * len(runs)), layout="constrained")
        for part, (title, records) in zip(figure.subfigures(len(runs), 1, squeeze=False)[:, 0], runs.items(), strict=True):
            upper, lower = part.subfigures(2, 1)
            part.suptitle(title, fontsize=10)
            last, steps = records[-1], [record["step"] for record in records]
            count = len(last["rdm"])
            shown = sorted({round(index * (count - 1) / min(7, max(count - 1, 1))) for index in range(min(8, count))})
            for axis, layer in zip(upper.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
                axis.imshow(last["rdm"][layer], vmin=0, vmax=2, cmap="viridis", interpolation="nearest")
                axis.set(xticks=(), yticks=())
                axis.set_title(last["layers"][layer], fontsize=8)
            alike, read, wide = lower.subplots(1, 3)
            figure.colorbar(alike.imshow(last["cka"], vmin=0, vmax=1, cmap="magma", interpolation="nearest"), ax=alike)
            alike.set_title(f"linear CKA after step {last['step']}", fontsize=9)
            for axis, key, scale, name in (
                (read, "probe_accuracy", 100, "linear probe, %"),
                (wide, "participation_ratio", 1, "participation ratio"),
            ):
                for block in range(count):
                    shade = blue((block + 1) / count)
                    axis.plot(steps, [scale * record[key][block] for record in records], color=shade, marker=".")
                axis.set_title(name + ", dark: top", fontsize=9)
                axis.set_xlabel("step")
                axis.grid(alpha=0.25)
        return figure
