"""Small transformers: one for images, one for sequences of symbols.

Their `forward` methods are `no_type_check`: torch.fx traces them with proxies, which no run-time checker takes for
tensors.
"""

from typing import no_type_check

from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.models.shape import check_shape


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each after a normalisation and with a skip: h = x + A(LN(x)), y = h + P(LN(h)).

    Args:
        width: Features of each place; a multiple of ``heads``.
        heads: Of the attention.
        causal: Whether a place sees those before it alone.

    Example:
        >>> import torch
        >>> TransformerBlock(8, 2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])

    Reference:
        Vaswani et al. 2017, arXiv 1706.03762, section 3, normalised first as in Xiong et al. 2020, arXiv 2002.04745.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    @no_type_check
    def forward(self, x: Float[Tensor, "m length width"]) -> Float[Tensor, "m length width"]:
        """Mixes the places, then the features of each."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    """Makes a place of each patch of an image, and tells it where it is.

    Args:
        input_shape: (channels, height, width) of a sample.
        width: Features of each place.
        patch: Side of a patch.

    Example:
        >>> import torch
        >>> PatchEmbedding((1, 8, 8), 6, patch=4)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 4, 6])
    """

    def __init__(self, input_shape: tuple[int, int, int], width: int, *, patch: int) -> None:
        super().__init__()
        channels, high, broad = input_shape
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.places = nn.Embedding((high // patch) * (broad // patch), width)

    @no_type_check
    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m length width"]:
        """Embeds the patches."""
        return self.patches(x).flatten(2).transpose(1, 2) + self.places.weight


class SymbolEmbedding(nn.Module):
    """Makes a place of each symbol, and tells it where it is.

    Args:
        symbols: How many there are.
        length: Most places of a sequence.
        width: Features of each place.

    Example:
        >>> import torch
        >>> SymbolEmbedding(10, 5, 6)(torch.zeros(2, 4, dtype=torch.int64)).shape
        torch.Size([2, 4, 6])
    """

    def __init__(self, symbols: int, length: int, width: int) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(length, width)

    @no_type_check
    def forward(self, x: Int64[Tensor, "m length"]) -> Float[Tensor, "m length width"]:
        """Embeds the symbols."""
        return self.symbols(x) + self.places.weight[: x.shape[1]]


class MeanPool(nn.Module):
    """The mean over places."""

    @no_type_check
    def forward(self, x: Float[Tensor, "m length width"]) -> Float[Tensor, "m width"]:
        """Takes the mean."""
        return x.mean(1)


def vit(input_shape: tuple[int, int, int], classes: int, *, width: int = 64, depth: int = 4, heads: int = 4) -> nn.Sequential:
    """A small vision transformer, read out by the mean over its places; patches are about a seventh of the image.

    Args:
        input_shape: (channels, height, width) of a sample; height and width from 4.
        classes: How many class scores come out.
        width: Features of each place, a multiple of ``heads``.
        depth: Transformer blocks, 1 or more.
        heads: Of the attention.

    Returns:
        The network; its children are its blocks.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> import torch
        >>> vit((1, 28, 28), 10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    Reference:
        Dosovitskiy et al. 2021, arXiv 2010.11929, without the class token.
    """
    check_shape("vit", input_shape, classes, smallest=4)
    _check_sizes("vit", width, depth, heads)
    patch = max(2, round(min(input_shape[1:]) / 7))
    blocks = [TransformerBlock(width, heads) for _ in range(depth)]
    readout = nn.Sequential(nn.LayerNorm(width), MeanPool(), nn.Linear(width, classes))
    return nn.Sequential(PatchEmbedding(input_shape, width, patch=patch), *blocks, readout)


def gpt(symbols: int, length: int, *, width: int = 64, depth: int = 4, heads: int = 4) -> nn.Sequential:
    """A small language model: for each place, scores of the symbol that comes next.

    Args:
        symbols: How many there are, 1 or more.
        length: Most places of a sequence, 1 or more.
        width: Features of each place, a multiple of ``heads``.
        depth: Transformer blocks, 1 or more.
        heads: Of the attention.

    Returns:
        The network, (m, length) symbol numbers to (m, length, symbols) scores; its children are its blocks.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> import torch
        >>> gpt(10, 5)(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 10])

    Reference:
        Radford et al. 2019, "Language models are unsupervised multitask learners".
    """
    if symbols < 1 or length < 1:
        raise ValueError(f"gpt: expected one symbol and one place or more, got symbols={symbols}, length={length}")
    _check_sizes("gpt", width, depth, heads)
    blocks = [TransformerBlock(width, heads, causal=True) for _ in range(depth)]
    readout = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, symbols))
    return nn.Sequential(SymbolEmbedding(symbols, length, width), *blocks, readout)


def _check_sizes(name: str, width: int, depth: int, heads: int) -> None:
    if depth < 1 or heads < 1 or width < 1 or width % heads:
        raise ValueError(
            f"{name}: expected one block and one head or more and a width that is a multiple of heads, got width={width}, "
            f"depth={depth}, heads={heads}"
        )
