"""Networks that predict: gradients of a block's output, losses to be differentiated, and a block's input."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lockfree.rule import Needs
from lockfree.synthesisers.base import Design, GradientSynthesiser, Prediction, Synthesiser
from lockfree.synthesisers.critic import CriticSynthesiser
from lockfree.synthesisers.gaussian import GaussianSynthesiser
from lockfree.synthesisers.inputs import InputSynthesiser
from lockfree.synthesisers.networks import LinearSynthesiser, ModuleSynthesiser, gradient_network
from lockfree.synthesisers.stacked import LinearCredits


@dataclass(frozen=True)
class Form:
    """A form of synthesiser.

    Attributes:
        build: Makes one for an example of the block's output.
        needs: What it must have received before it may learn.
        values: Whether it learns from the losses of samples.
        learning_rate: Default of its Adam; ``None``: by conditioning.
    """

    build: Callable[[Tensor, Design], Synthesiser]
    needs: Needs
    values: bool = False
    learning_rate: float | None = None


FORMS: dict[str, Form] = {
    "gradient": Form(gradient_network, Needs.ABOVE),
    "gaussian": Form(GaussianSynthesiser, Needs.ABOVE),
    "critic": Form(partial(CriticSynthesiser, sobolev=False), Needs.ERROR, values=True, learning_rate=1e-2),
    "sobolev": Form(partial(CriticSynthesiser, sobolev=True), Needs.ABOVE, values=True, learning_rate=3e-3),
}
"""Every form of synthesiser by the name that `lockfree.rules.SyntheticGradients` takes."""

__all__ = [
    "FORMS",
    "Design",
    "Form",
    "GradientSynthesiser",
    "InputSynthesiser",
    "LinearCredits",
    "LinearSynthesiser",
    "ModuleSynthesiser",
    "Prediction",
    "Synthesiser",
]
