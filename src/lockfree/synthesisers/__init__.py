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
from lockfree.synthesisers.networks import ModuleSynthesiser, gradient_network


@dataclass(frozen=True)
class Form:
    """A form of synthesiser.

    Attributes:
        build: Makes one for an example of the block's output.
        needs: What it must have received before it may learn.
    """

    build: Callable[[Tensor, Design], Synthesiser]
    needs: Needs


FORMS: dict[str, Form] = {
    "gradient": Form(gradient_network, Needs.ABOVE),
    "gaussian": Form(GaussianSynthesiser, Needs.ABOVE),
    "critic": Form(partial(CriticSynthesiser, matching=0.0), Needs.ERROR),
    "sobolev": Form(partial(CriticSynthesiser, matching=1.0), Needs.ABOVE),
}
"""Every form of synthesiser by the name that `lockfree.rules.SyntheticGradients` takes."""

__all__ = [
    "FORMS",
    "Design",
    "Form",
    "GradientSynthesiser",
    "InputSynthesiser",
    "ModuleSynthesiser",
    "Prediction",
    "Synthesiser",
]
