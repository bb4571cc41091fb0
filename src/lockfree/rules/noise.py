"""Noise: the credit of a block is drawn at random, the lower end of every comparison of credit."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lockfree.rng import seed_of
from lockfree.rule import Card, Context, Needs, Place, Rule
from lockfree.values import Credit


@dataclass(frozen=True, kw_only=True)
class Noise(Rule):
    r"""The credit of block i is Gaussian, $\delta_i = s\,\epsilon/m$ with $\epsilon \sim N(0, 1)$ drawn anew for each batch of m samples.

    It needs nothing and teaches nothing: blocks below the top walk at random, and the top one learns from the loss. Whatever a
    rule gains over it comes from its credit.

    Attributes:
        scale: s, the standard deviation of one sample's credit, above 0.
        seed: What the noise is drawn from, with the numbers of block and batch.

    Raises:
        ValueError: If ``scale`` is not positive.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.Noise().needs(lf.Place(0, 4)).name
        'NOTHING'

    Reference:
        Czarnecki et al. 2017, "Understanding synthetic gradients and decoupled neural interfaces", arXiv 1703.00522, section 5.
    """

    scale: float = 0.01
    seed: int = 0

    card: ClassVar[Card] = Card(
        title="Noise",
        summary="The credit of a block is drawn at random; what every other rule must do better than.",
        reference="Czarnecki, Świrszcz, Jaderberg, Osindero, Vinyals, Kavukcuoglu 2017, Understanding synthetic gradients and decoupled "
        "neural interfaces, arXiv 1703.00522",
        bibtex=(
            "@inproceedings{czarnecki2017understanding, title={Understanding Synthetic Gradients and Decoupled Neural Interfaces}, "
            "author={Czarnecki, Wojciech Marian and {\\'S}wirszcz, Grzegorz and Jaderberg, Max and Osindero, Simon and Vinyals, Oriol and "
            "Kavukcuoglu, Koray}, booktitle={International Conference on Machine Learning}, year={2017}}"
        ),
    )

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale}: noise must have a positive size")

    def needs(self, place: Place) -> Needs:
        return Needs.ABOVE if place.top else Needs.NOTHING

    def passes_on(self, place: Place) -> bool:
        return place.top

    def credit(self, context: Context) -> Credit | None:
        if context.place.top:
            return context.above
        return tuple(self._drawn(context, index, y) for index, y in enumerate(context.outputs))

    def _drawn(self, context: Context, index: int, y: Tensor) -> Tensor:
        # A function of place and batch alone, so that the order in which blocks learn is no matter.
        generator = torch.Generator(y.device).manual_seed(seed_of(self.seed, context.place.index, context.batch, index))
        # What is drawn does not depend on the precision either.
        noise = torch.randn(y.shape, generator=generator, dtype=torch.float32, device=y.device)
        return noise.to(y.dtype) * (self.scale / context.samples)
