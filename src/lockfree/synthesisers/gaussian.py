"""A synthesiser that knows how far it may be wrong: mean and scale of the gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from lockfree.synthesisers.base import Design, Prediction, Synthesiser
from lockfree.synthesisers.networks import gradient_network

_MOST = 7.0  # a scale stays within e^7 of the gradients' own, either way
_MEMORY = 0.99  # of the running mean square of the gradients


class GaussianSynthesiser(Synthesiser):
    r"""Predicts $\mathcal N(\mu(y, c), \sigma(y, c)^2)$ for each unit; what is consumed is the mean, plus noise of that scale.

    The mean regresses the truth as any synthesiser; the scale, $\sigma = r\, e^{s(y, c)}$ with r the running root mean square of
    the gradients, descends the negative log-likelihood at that mean, $\frac1m\sum_n\sum_u \frac12((m\delta-\mu)/\sigma)^2 + s$. The
    mean is kept out of the latter: weighted by $1/\sigma^2$ it would learn most where it is already good.

    Args:
        like: An example of y.
        design: Of both networks.
    """

    def __init__(self, like: Tensor, design: Design) -> None:
        super().__init__(design.classes)
        self.mean, self.log_scale = gradient_network(like, design), gradient_network(like, design)
        self.mean_square: Tensor
        self.register_buffer("mean_square", like.new_zeros(()))

    def predict(self, y: Tensor, label: Tensor | None, samples: int) -> Prediction:
        """Predicts mean and scale."""
        mean = self.mean.predict(y, label, samples)
        dtype = self.mean_square.dtype
        log_scale = self.log_scale(y.to(dtype), None if label is None else label.to(dtype)).clamp(-_MOST, _MOST)
        scale = log_scale.detach().exp() * self.mean_square.sqrt() / samples
        return Prediction(mean.credit, (mean, log_scale), scale)

    def learn(
        self, prediction: Prediction, truth: Tensor | None, samples: int, sample_losses: Callable[[], Tensor] | None
    ) -> Tensor | None:
        """Regresses the mean, and fits the scale to what is left."""
        if truth is None:
            return None
        mean, log_scale = prediction.graph
        with torch.no_grad():
            seen = (samples * truth.to(self.mean_square.dtype)).square().mean()
            self.mean_square.copy_(torch.where(self.mean_square > 0, self.mean_square.lerp(seen, 1 - _MEMORY), seen))
        loss = self.mean.learn(mean, truth, samples, sample_losses)
        residual = samples * mean.credit  # learning has left prediction minus truth there
        tiny = torch.finfo(residual.dtype).tiny
        squares = (residual / (self.mean_square + tiny).sqrt()).square()
        if log_scale.requires_grad:
            (0.5 * squares * (-2 * log_scale).exp() + log_scale).flatten(1).sum(1).mean().backward()
        return loss
