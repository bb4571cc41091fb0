"""A bootstrap of your own: what stands for the gradient from beyond the horizon, in one file.

This one remembers the mean gradient that chunks have reported, and says the same of every state: a baseline that any synthesiser, which
looks at the state, should beat. Run it: python examples/own_bootstrap.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import lockfree as lf
from lockfree.recurrent import Border, Estimator, Report, Scaled, ScaledEstimator, Site


@dataclass(frozen=True, kw_only=True)
class MeanGradient(Scaled):
    r"""Predicts $G(s) = \bar g$, where $\bar g \leftarrow \phi\,\bar g + (1 - \phi)\,\mathrm{mean}_n\,g_n$ with every report.

    Attributes:
        memory: φ, 0 up to but not including 1.
    """

    memory: float = 0.99

    def estimator(self, site: Site) -> Estimator:
        """Makes what is alive."""
        return _Mean(self, site)


class _Mean(ScaledEstimator):
    def __init__(self, settings: MeanGradient, site: Site) -> None:
        super().__init__(settings)
        self.memory = settings.memory
        self.register_buffer("mean", torch.zeros(site.layout.width))  # buffers are in checkpoints

    def estimate(self, border: Border) -> Tensor:
        return self.mean.expand_as(border.rows)

    def learn(self, report: Report) -> Tensor:
        self.mean.lerp_(report.truth.mean(0), 1 - self.memory)
        return 0.5 * (report.truth - self.mean).square().sum(1).mean()


def main(stretches: int = 60) -> tuple[float, float]:
    """Trains a small character model with it; returns bits per character before and after."""
    torch.manual_seed(0)
    task = lf.recurrent.tasks.CharacterModel(text="shakespeare-sample", batch=16, evaluated=2000)
    learner = lf.recurrent.convert(
        lf.recurrent.Encoded(lf.recurrent.OneHot(task.symbols), torch.nn.GRU(task.symbols, 64)),
        torch.nn.Linear(64, task.classes),
        horizon=4,
        bootstrap=MeanGradient(scale=0.1),
        loss=task.loss,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3),
    )
    before = task.evaluate(learner)["bits_per_character"]
    for number in range(stretches):
        learner.step(*task.stretch(number))
    return before, task.evaluate(learner)["bits_per_character"]


if __name__ == "__main__":
    print("bits per character: {:.2f} before, {:.2f} after".format(*main()))
