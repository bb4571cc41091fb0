"""Networks that predict: gradients of a block's output, losses to be differentiated, and a block's input."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lockfree.rule import Needs
from lockfree.synthesisers.base import Design, GradientSynthesiser, Prediction, Synthesiser
from lockfree.synthesisers.critic import CriticSynthesiser
from lockfree.synthesisers.gaussian import GaussianSynthesiser
from lockfree.synthesisers.inputs import InputSynthesiser
from lockfree.synthesisers.line_search import LineSearchedSynthesiser
from lockfree.synthesisers.networks import (
    LinearSynthesiser,
    LogisticSynthesiser,
    ModuleSynthesiser,
    gradient_network,
    logistic_network,
)
from lockfree.synthesisers.stacked import LinearCredits


def _adam(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=rate, fused=True)


def _descent(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate)


@dataclass(frozen=True)
class Form:
    """A form of synthesiser.

    Attributes:
        build: Makes one for an example of the block's output.
        needs: What it must have received before it may learn.
        values: Whether it learns from the losses of samples.
        hidden_layers: Hidden layers that it may have, least and most; ``None``: any number.
        learning_rate: Default rate of its optimizer; ``None``: by conditioning.
        optimizer: Makes its optimizer for a rate.
    """

    build: Callable[[Tensor, Design], Synthesiser]
    needs: Needs
    values: bool = False
    hidden_layers: tuple[int, int | None] = (0, None)
    learning_rate: float | None = None
    optimizer: Callable[[list[nn.Parameter], float], torch.optim.Optimizer] = _adam


FORMS: dict[str, Form] = {
    "gradient": Form(gradient_network, Needs.ABOVE),
    "sigmoid": Form(logistic_network, Needs.ABOVE, hidden_layers=(0, 0)),
    "line-search": Form(LineSearchedSynthesiser, Needs.ABOVE, hidden_layers=(0, 0), learning_rate=1.0, optimizer=_descent),
    "gaussian": Form(GaussianSynthesiser, Needs.ABOVE),
    "critic": Form(
        partial(CriticSynthesiser, sobolev=False), Needs.ERROR, values=True, hidden_layers=(1, None), learning_rate=1e-2
    ),
    "sobolev": Form(
        partial(CriticSynthesiser, sobolev=True), Needs.ABOVE, values=True, hidden_layers=(1, None), learning_rate=3e-3
    ),
}
"""Every form of synthesiser by the name that `lockfree.rules.SyntheticGradients` takes."""

__all__ = [
    "FORMS",
    "Design",
    "Form",
    "GradientSynthesiser",
    "InputSynthesiser",
    "LineSearchedSynthesiser",
    "LinearCredits",
    "LinearSynthesiser",
    "LogisticSynthesiser",
    "ModuleSynthesiser",
    "Prediction",
    "Synthesiser",
]
