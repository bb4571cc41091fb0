"""AugLocal: each block learns through copies of a few of the layers above it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lockfree.chain import Block
from lockfree.local import LocalRule, as_input_of
from lockfree.rule import Card, Context, Place, Site
from lockfree.values import Values, batch_size, tensors


class _Adapter(nn.Module):
    """Makes what a copied block wants out of what is at hand, by means over patches, 1 x 1 convolutions and matrices where it must."""

    def __init__(self, given: Sequence[Tensor], wanted: Values, block: str) -> None:
        super().__init__()
        self._pattern = pytree.tree_map_only(Tensor, lambda tensor: Tensor, wanted)  # the class stands for what is to be made
        self._samples = batch_size(given)
        self._from: list[int] = []
        self.adapters = nn.ModuleList()
        for index, leaf in enumerate(tensors(wanted)):
            if not leaf.is_floating_point():
                raise ValueError(
                    f"AugLocal cannot copy block '{block}': it is handed {leaf.dtype} numbers, which no layer can make anew; cut the "
                    "model elsewhere"
                )
            self._from.append(_nearest(given, leaf, index))
            self.adapters.append(_adapt(given[self._from[-1]].shape[1:], leaf.shape[1:]))

    def forward(self, given: Sequence[Tensor]) -> Values:
        made = iter(adapter(given[index]) for adapter, index in zip(self.adapters, self._from, strict=True))

        def fill(leaf: Any) -> Any:
            if leaf is Tensor:
                return next(made)
            # A plain number that crosses a border was read off a shape: that of the batch, if it has its size.
            return batch_size(given) if type(leaf) is int and leaf == self._samples else leaf

        return pytree.tree_map(fill, self._pattern)


def _nearest(given: Sequence[Tensor], leaf: Tensor, index: int) -> int:
    """Returns which tensor is nearest to a wanted one: of the same shape, or of the same rank, or at the same place."""

    def distance(other: int) -> tuple[bool, bool, int]:
        there = given[other]
        return there.shape[1:] != leaf.shape[1:], there.dim() != leaf.dim(), abs(other - index)

    return min(range(len(given)), key=distance)


def _adapt(given: torch.Size, wanted: torch.Size) -> nn.Module:
    if given == wanted:
        return nn.Identity()
    if len(given) == len(wanted) == 3:
        resized = [nn.AdaptiveAvgPool2d(tuple(wanted[1:]))] if given[1:] != wanted[1:] else []
        return nn.Sequential(*resized, *([nn.Conv2d(given[0], wanted[0], 1)] if given[0] != wanted[0] else []))
    if len(given) == len(wanted) == 2 and given[0] == wanted[0]:
        return nn.Linear(given[1], wanted[1])
    return nn.Sequential(nn.Flatten(), nn.Linear(given.numel(), wanted.numel()), nn.Unflatten(1, wanted))


def _without_dropout(network: nn.Module) -> nn.Module:
    """Takes dropout out of a copy, which would move the random numbers of the user's model."""
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return network


class _Shortcut(nn.Module):
    """Copies of blocks from above, joined by adapters."""

    def __init__(self, site: Site, chosen: Sequence[int]) -> None:
        super().__init__()
        self.adapters, self.copies = nn.ModuleList(), nn.ModuleList()
        given = site.outputs
        for index in chosen:
            block = site.above[index - site.place.index - 1]
            assert isinstance(block, Block)
            self.adapters.append(_Adapter(given, site.handed_to(index), block.name))
            self.copies.append(_without_dropout(block.copy()))
            if index + 1 < site.place.count:
                given = tensors(site.handed_to(index + 1))

    def forward(self, outputs: Sequence[Tensor]) -> Values:
        values: Values = outputs
        for adapter, copy in zip(self.adapters, self.copies, strict=True):
            values = copy(adapter(tensors(values)))
        return values


@dataclass(frozen=True, kw_only=True)
class AugLocal(LocalRule):
    r"""Each block descends $\ell(A_i(y_i), t)$ with A made of copies of layers above it, taken at even steps, and of the top one.

    Of K blocks block i has $d_i = \max(1, \mathrm{round}(d(1-c_i) + c_i))$ of them, $c_i = ci/(K-2)$: lower ones have more. The
    copies are trained along, with weights of their own, and thrown away.

    Attributes:
        depth: d, how many layers the bottom block's auxiliary network has, the top block's copy among them; 1 or more.
        pyramid: c, the part of the depth by which it falls towards the top, 0 to 1.
        learning_rate: Of the copies' Adam.

    Raises:
        ValueError: If a number is out of range, or a block is handed numbers that are not real.

    Example:
        >>> import lockfree as lf
        >>> [lf.rules.AugLocal(depth=4).depth_at(lf.Place(index, 8)) for index in range(7)]
        [4, 4, 4, 3, 3, 3, 2]

    Reference:
        Ma, Wu, Si, Tan 2024, "Scaling supervised local learning with augmented auxiliary networks", arXiv 2402.17318, section 3.
    """

    depth: int = 2
    pyramid: float = 0.5

    card: ClassVar[Card] = Card(
        title="AugLocal",
        summary="Each block learns through copies of a few of the layers above it.",
        reference="Ma, Wu, Si, Tan 2024, Scaling supervised local learning with augmented auxiliary networks, arXiv 2402.17318",
        bibtex=(
            "@inproceedings{ma2024scaling, title={Scaling Supervised Local Learning with Augmented Auxiliary Networks}, author={Ma, "
            "Chenxiang and Wu, Jibin and Si, Chenyang and Tan, Kay Chen}, booktitle={International Conference on Learning "
            "Representations}, "
            "year={2024}}"
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise ValueError(f"depth={self.depth}: give 1 or more")
        if not 0 <= self.pyramid <= 1:
            raise ValueError(f"pyramid={self.pyramid}: give a number from 0 to 1")

    def depth_at(self, place: Place) -> int:
        """Returns $d_i$."""
        down = self.pyramid * place.index / max(place.count - 2, 1)
        return max(1, round(self.depth * (1 - down) + down))

    def chosen(self, place: Place) -> list[int]:
        """Returns the numbers of the blocks that are copied, bottom to top; the top block is the last of them."""
        between = range(place.index + 1, place.count - 1)
        count = min(self.depth_at(place) - 1, len(between))
        return [between[(2 * part + 1) * len(between) // (2 * count)] for part in range(count)] + [place.count - 1]

    def network(self, site: Site) -> nn.Module:
        return _Shortcut(site, self.chosen(site.place))

    def local_loss(self, context: Context, network: nn.Module, outputs: list[Tensor]) -> Tensor:
        assert context.loss is not None
        return context.loss(network([as_input_of(network, y) for y in outputs]))
