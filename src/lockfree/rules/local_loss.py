"""Local losses: each block tells the classes apart by itself, and makes samples of one class alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.choose import choose
from lockfree.heads import Head, StackedHeads
from lockfree.local import HeadRule, as_input_of, twin_of_readout
from lockfree.objective import Objective
from lockfree.rule import Card, Context, Site
from lockfree.stacking import CreditStack
from lockfree.targets import target_rows
from lockfree.values import by_place

_PARTS = {"predsim": (True, True), "pred": (True, False), "sim": (False, True)}
_TITLES = {"predsim": "Local prediction and similarity loss", "pred": "Local prediction loss", "sim": "Local similarity loss"}


class _LocalHeads(nn.Module):
    """The linear classifier and the map whose outputs are to be alike within a class, as far as they are wanted."""

    def __init__(self, site: Site, y: Tensor, *, predicts: bool, compares: bool) -> None:
        super().__init__()
        self.by_place = by_place(y, site.scores)
        self.classifier = _classifier(site, y) if predicts else None
        self.map = _map_like(y) if compares else None


def _classifier(site: Site, y: Tensor) -> nn.Module:
    """Returns a linear classifier; right below a readout that sees less than it would, means over places say, one that looks like it."""
    head, twin = Head(y, site.scores), twin_of_readout(site, y)
    return twin if twin is not None and _weights(twin) < _weights(head) else head


def _weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _map_like(y: Tensor) -> nn.Module:
    """Returns a map to as many features: a 3 x 3 convolution for images, a matrix for all else."""
    if y.dim() == 4:
        return nn.Conv2d(y.shape[1], y.shape[1], 3, padding=1, bias=False)
    if y.dim() == 3:
        return nn.Linear(y.shape[2], y.shape[2], bias=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(y[0].numel(), y[0].numel(), bias=False))


@dataclass(frozen=True, kw_only=True)
class LocalLoss(HeadRule):
    r"""Each block descends $\beta\,\lVert S(h) - S(t)\rVert^2/m^2 + (1-\beta)\,\ell(Dh, t)$ of its own output h.

    S is the matrix of cosine similarities between samples, each less the mean over its features, after a layer that maps h; of
    images each channel counts by its standard deviation over places. D is a linear classifier of at most 2,048 features, pooled;
    $\ell$ the user's loss.

    Attributes:
        loss: "predsim" (both), "pred" ($\ell$ alone) or "sim" (similarity alone).
        balance: $\beta$, from 0 to 1; only of "predsim".
        rows: Most rows of S for sequences whose places have targets of their own; they are taken at even steps.
        learning_rate: Of the classifiers' and maps' Adam.

    Raises:
        ValueError: If a number is out of range or the name misspelt; in a step, if targets are neither class numbers nor real-valued.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.LocalLoss(loss="pred").title
        'Local prediction loss'

    Reference:
        Nøkland, Eidnes 2019, "Training neural networks with local error signals", arXiv 1901.06656, equations 1 to 3.
    """

    loss: str = "predsim"
    balance: float = 0.5
    rows: int = 1024

    card: ClassVar[Card] = Card(
        title="Local losses",
        summary="Each block tells the classes apart by a linear classifier, and makes samples of one class alike.",
        reference="Nøkland, Eidnes 2019, Training neural networks with local error signals, arXiv 1901.06656",
        bibtex=(
            "@inproceedings{nokland2019training, title={Training Neural Networks with Local Error Signals}, author={N{\\o}kland, Arild and "
            "Eidnes, Lars Hiller}, booktitle={International Conference on Machine Learning}, year={2019}}"
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(_PARTS, self.loss, "loss")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance={self.balance}: give a number from 0 to 1")
        if self.rows < 2:
            raise ValueError(f"rows={self.rows}: give 2 or more")

    @property
    def title(self) -> str:
        return _TITLES[self.loss]

    def head(self, site: Site, y: Tensor) -> nn.Module:
        predicts, compares = _PARTS[self.loss]
        return _LocalHeads(site, y, predicts=predicts, compares=compares)

    def head_loss(self, context: Context, head: _LocalHeads, y: Tensor) -> Tensor:
        assert context.loss is not None
        pred = sim = None
        if head.classifier is not None:
            pred = context.loss(head.classifier(as_input_of(head.classifier, y)))
        if head.map is not None:
            mapped = head.map(as_input_of(head.map, y))
            sim = F.mse_loss(similarity(self._rows(mapped, head)), self._wanted(context, head).to(mapped.dtype))
        if pred is None or sim is None:
            return pred if sim is None else sim  # pyrefly: ignore[bad-return]
        return self.balance * sim + (1 - self.balance) * pred

    def credit_stack(self, auxiliaries: Sequence[nn.Module | None], objective: Objective) -> CreditStack | None:
        heads = [cast("_LocalHeads", head) for auxiliary in auxiliaries for head in cast("nn.ModuleList", auxiliary or [])]
        classifiers = [head.classifier for head in heads if head.classifier is not None and head.map is None]
        by_hand = StackedHeads.of(classifiers, objective) if len(classifiers) == len(auxiliaries) else None
        return by_hand or super().credit_stack(auxiliaries, objective)

    def _wanted(self, context: Context, head: _LocalHeads) -> Tensor:
        """Returns S of the targets, made once a batch."""
        key = f"similarity of targets {head.by_place}"
        if key not in context.shared:
            context.shared[key] = similarity(self._rows(self._targets(context), head))
        return context.shared[key]

    def _targets(self, context: Context) -> Tensor:
        """Returns what S is taken of: a row for each sample, or for each place."""
        rows = target_rows(context, wanted_by=self.title)
        if not context.target.is_floating_point():
            return rows.double() if rows.dim() == 3 else rows.double().flatten(1)  # a map of labels is no image
        assert context.scores_shape is not None
        return rows.view(len(rows), *context.scores_shape)

    def _rows(self, x: Tensor, head: _LocalHeads) -> Tensor:
        if not head.by_place:
            return features(x)
        places = x.flatten(0, 1)
        return places[:: -(-len(places) // self.rows)]


def features(x: Float[Tensor, "m ..."]) -> Float[Tensor, "m d"]:
    """Returns what samples are compared by: of images with more than three channels each channel's deviation, else all numbers."""
    if x.dim() == 4 and x.shape[1] > 3 and x.shape[2] * x.shape[3] > 1:
        return x.flatten(2).std(2)
    return x.flatten(1)


def similarity(x: Float[Tensor, "m d"]) -> Float[Tensor, "m m"]:
    r"""Returns $S_{ij} = \cos(x_i - \bar x_i, x_j - \bar x_j)$, each sample less the mean over its own features.

    Example:
        >>> similarity(torch.eye(3)).round(decimals=2)
        tensor([[ 1.0000, -0.5000, -0.5000],
                [-0.5000,  1.0000, -0.5000],
                [-0.5000, -0.5000,  1.0000]])

    Reference:
        Nøkland, Eidnes 2019, arXiv 1901.06656, equation 2.
    """
    apart = x - x.mean(1, keepdim=True)
    unit = apart / (apart.square().sum(1, keepdim=True) + torch.finfo(x.dtype).tiny).sqrt().clamp_min(1e-8)
    return unit @ unit.T
