"""A synthesiser whose every step is as long as serves it best, as the convergence theorems ask for."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lockfree.synthesisers.base import Design, Prediction, Synthesiser
from lockfree.synthesisers.networks import gradient_network


class LineSearchedSynthesiser(Synthesiser):
    r"""A gradient synthesiser without hidden layers that descends to the lowest point along each gradient.

    Its loss J is quadratic in its parameters $\theta$, so the best step is known in closed form. With $G = \partial J/\partial\theta$
    and $M_G$ the synthesiser that has G for parameters,

    $$\alpha = \arg\min_a J(\theta - a G) = \frac{m \lVert G\rVert^2}{\sum_n \lVert M_G(y_n, c_n)\rVert^2}$$

    Gradients are left multiplied by $\alpha$: plain gradient descent at rate 1 then takes that step.

    Args:
        like: An example of y.
        design: Hidden layers are left out.

    Reference:
        Czarnecki et al. 2017, arXiv 1703.00522, theorems 1 and 2, which ask for such steps.
    """

    def __init__(self, like: Tensor, design: Design) -> None:
        super().__init__(design.classes)
        self.network = gradient_network(like, replace(design, hidden_layers=0))

    def predict(self, y: Tensor, label: Tensor | None, samples: int) -> Prediction:
        """Predicts as the network does, and keeps what it was shown."""
        dtype = next(self.parameters()).dtype
        shown = y.to(dtype), None if label is None else label.to(dtype)
        prediction = self.network.predict(*shown, samples)
        return Prediction(prediction.credit, (prediction, shown))

    def learn(
        self, prediction: Prediction, truth: Tensor | None, samples: int, sample_losses: Callable[[], Tensor] | None
    ) -> Tensor | None:
        """Regresses on the truth; the gradients that are left are whole steps."""
        inner, shown = prediction.graph
        loss = self.network.learn(inner, truth, samples, sample_losses)
        gradients = {name: one.grad for name, one in self.network.named_parameters() if one.grad is not None}
        if loss is None or not gradients:
            return loss
        with torch.no_grad():
            moved = torch.func.functional_call(self.network, gradients, shown).flatten()
            length = sum(torch.dot(gradient.flatten(), gradient.flatten()) for gradient in gradients.values())
            reach = torch.dot(moved, moved)
            # Where nothing is seen, nothing can be learnt: the gradient is 0, too.
            step = torch.where(reach > 0, samples * length / reach, torch.zeros_like(reach))
            for gradient in gradients.values():
                gradient.mul_(step)
        return loss
