"""Synthetic inputs: a network that predicts what a block will be given, from what the whole network is given."""

import math
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lockfree.synthesisers.base import Design
from lockfree.synthesisers.networks import convolution, convolutional_layers, dense_layers
from lockfree.values import Values, tensors


class InputSynthesiser(nn.Module):
    r"""Predicts a block's input from the network's, $\hat h_i = I_i(x)$; it regresses the real one.

    Images become images by convolutions on the input, pooled to the wanted height and width; all else goes through affine layers.

    Args:
        source: An example of the network's input, one tensor of shape (m, ...).
        wanted: An example of the block's input, a tensor or a tree of tensors of shape (m, ...).
        design: Of the hidden layers; it sees no label.

    Raises:
        ValueError: If the network's input is not one tensor, or the block's holds whole numbers.

    Reference:
        Jaderberg et al. 2016, arXiv 1608.05343, section 3.1.3 "Complete unlock" ($\hat h_i$, $I_i$).
    """

    def __init__(self, source: Values, wanted: Values, design: Design) -> None:
        super().__init__()
        leaves = tensors(wanted)
        if not isinstance(source, Tensor):
            raise ValueError(f"synthetic inputs are made from one input tensor, this model takes a {type(source).__name__}")
        if len(leaves) != len(pytree.tree_leaves(wanted)) or not all(leaf.is_floating_point() for leaf in leaves):
            raise ValueError(
                "synthetic inputs are predicted by regression, but whole numbers or plain values cross a border of this model: "
                "begin blocks elsewhere, or leave synthetic_inputs out"
            )
        self._like = pytree.tree_map(
            lambda _: 0, wanted
        )  # torch's own description of a tree cannot be copied without a warning
        design = replace(design, classes=0, per_class=False)
        self.networks = nn.ModuleList(_network(source, leaf, design) for leaf in leaves)

    def forward(self, source: Float[Tensor, "m ..."]) -> Values:
        """Returns the predicted input, of the wanted tree and shapes."""
        return pytree.tree_unflatten([network(source) for network in self.networks], pytree.tree_structure(self._like))


def _network(source: Tensor, wanted: Tensor, design: Design) -> nn.Module:
    if source.dim() == wanted.dim() == 4:
        return _Images(source, wanted, design)
    return _Vectors(source, wanted, design)


class _Vectors(nn.Module):
    def __init__(self, source: Tensor, wanted: Tensor, design: Design) -> None:
        super().__init__()
        flat = wanted.new_zeros(2, math.prod(source.shape[1:]))
        hidden, width = dense_layers(flat, design, flat.shape[1])
        self._shape = wanted.shape[1:]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, math.prod(self._shape), dtype=wanted.dtype, device=wanted.device))

    def forward(self, source: Tensor) -> Tensor:
        weight = next(self.parameters())
        return self.layers(source.flatten(1).to(weight.dtype)).view(len(source), *self._shape)


class _Images(nn.Module):
    def __init__(self, source: Tensor, wanted: Tensor, design: Design) -> None:
        super().__init__()
        hidden, width = convolutional_layers(wanted, design, source.shape[1])
        self._size = (wanted.shape[2], wanted.shape[3])
        self.layers = nn.Sequential(*hidden, convolution(wanted, width, wanted.shape[1], design.kernel_size))

    def forward(self, source: Tensor) -> Tensor:
        weight = next(self.parameters())
        return self.layers(F.adaptive_avg_pool2d(source.to(weight.dtype), self._size))
