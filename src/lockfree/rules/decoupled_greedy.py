"""Decoupled greedy learning: each block learns from a small network of its own that tells the classes apart."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from lockfree.local import BatchNorm1d, BatchNorm2d, HeadRule, as_input_of, twin_of_readout
from lockfree.rule import Card, Context, Site
from lockfree.values import by_place


def _perceptron(widths: list[int], *, normalised: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in pairwise(widths[:-1]):
        layers += [nn.Linear(into, out), *([BatchNorm1d(out)] if normalised else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


@dataclass(frozen=True, kw_only=True)
class DecoupledGreedy(HeadRule):
    r"""Each block descends $\ell(A_i(y_i), t)$, the user's loss of an auxiliary network's scores; blocks wait for no one above.

    For images the network is the paper's MLP-SR: means over patches, a quarter as many a side; 1 x 1 convolutions with BatchNorm
    and ReLU; means over 2 x 2 patches; a perceptron with BatchNorm. For vectors it is the perceptron alone; for sequences, if the
    model scores each place, a perceptron at each place without BatchNorm.

    Attributes:
        convolutions: 1 x 1 convolutions, 0 or more.
        hidden: Hidden layers of the perceptron, 0 or more, as wide as what comes in.
        learning_rate: Of the auxiliary networks' Adam.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.DecoupledGreedy().needs(lf.Place(0, 4)).name
        'TARGET'

    Reference:
        Belilovsky, Eickenberg, Oyallon 2020, "Decoupled greedy learning of CNNs", arXiv 1901.08164, algorithm 1 and section 4.1.
    """

    convolutions: int = 3
    hidden: int = 2

    card: ClassVar[Card] = Card(
        title="Decoupled greedy learning",
        summary="Each block learns from a small network of its own that tells the classes apart.",
        reference="Belilovsky, Eickenberg, Oyallon 2020, Decoupled greedy learning of CNNs, arXiv 1901.08164",
        bibtex=(
            "@inproceedings{belilovsky2020decoupled, title={Decoupled Greedy Learning of {CNN}s}, author={Belilovsky, Eugene and "
            "Eickenberg, Michael and Oyallon, Edouard}, booktitle={International Conference on Machine Learning}, year={2020}}"
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("convolutions", "hidden"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or more")

    def head(self, site: Site, y: Tensor) -> nn.Module:
        scores, twin = site.scores, twin_of_readout(site, y)
        if twin is not None:
            return twin
        if by_place(y, scores):
            width = y.shape[2]
            return _perceptron([width] * (1 + self.hidden) + [scores.shape[2]], normalised=False)
        layers: list[nn.Module] = []
        width = y[0].numel()
        if y.dim() == 4:
            channels, height, breadth = y.shape[1:]
            layers.append(nn.AdaptiveAvgPool2d((math.ceil(height / 4), math.ceil(breadth / 4))))
            for _ in range(self.convolutions):
                layers += [nn.Conv2d(channels, channels, 1, bias=False), BatchNorm2d(channels), nn.ReLU()]
            layers.append(nn.AdaptiveAvgPool2d((min(2, height), min(2, breadth))))
            width = channels * min(2, height) * min(2, breadth)
        perceptron = _perceptron([width] * (1 + self.hidden) + [scores[0].numel()], normalised=True)
        return nn.Sequential(*layers, nn.Flatten(), perceptron, nn.Unflatten(1, scores.shape[1:]))

    def head_loss(self, context: Context, head: nn.Module, y: Tensor) -> Tensor:
        assert context.loss is not None
        return context.loss(head(as_input_of(head, y)))
