"""Synthetic gradients at the horizon: a network predicts the gradient of what comes after a state, and learns from its next guess."""

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.choose import choose
from lockfree.recurrent.bootstrap import Border, Report, Site
from lockfree.recurrent.scaled import Scaled, ScaledEstimator
from lockfree.synthesisers.base import zero

READS = {"state": lambda border: border.rows, "output": lambda border: border.outputs}
"""What a synthesiser sees of a border, by name."""


@dataclass(frozen=True, kw_only=True)
class Synthesised(Scaled, ABC):
    r"""What every synthesiser at the horizon has: it learns $G(s_t) \to \partial L_{t+1..t+n}/\partial s_t + \gamma J^T G(s_{t+n})$.

    J is the derivative of the state after those n steps with respect to that before them. The core is given $\beta\,G(s_{t+T})$.

    Attributes:
        steps: n, how far the target looks before it relies on the next guess, a multiple of the horizon; the horizon if ``None``.
            More runs that many steps again.
        reads: What the synthesiser sees: ``"state"``, all of it, or ``"output"``, what the core gives at the last step.

    Raises:
        ValueError: If a number is out of range.

    Reference:
        Jaderberg et al. 2016, arXiv 1608.05343, section 3.1, equation 8.
    """

    steps: int | None = None
    reads: str = "state"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}: give a multiple of the horizon, or None for the horizon itself")
        choose(READS, self.reads, "reads")

    @abstractmethod
    def estimator(self, site: Site) -> "StateSynthesiser":
        """Makes the synthesiser."""


class StateSynthesiser(ScaledEstimator):
    """A synthesiser at the horizon.

    Args:
        settings: Of it.
        site: Where it stands.

    Attributes:
        seen: Numbers of a sample that it sees.
        width: Numbers of a sample's state.

    Raises:
        ValueError: If the target does not look ahead by whole chunks.
    """

    def __init__(self, settings: Synthesised, site: Site) -> None:
        super().__init__(settings)
        self._see = READS[settings.reads]
        self.seen = (site.rows if settings.reads == "state" else site.outputs).shape[1]
        self.width = site.layout.width
        steps = settings.steps or site.horizon
        if steps % site.horizon:
            raise ValueError(f"steps={settings.steps}: give a multiple of the horizon, {site.horizon}")
        self._chunks = steps // site.horizon

    @property
    def chunks(self) -> int:
        return self._chunks

    def known(self, report: Report) -> tuple[Tensor, Tensor]:
        """Returns what a report teaches: what was seen, (n, seen), and the truth, (n, width), of samples that went on."""
        seen, truth = self._see(report.border), report.truth
        if report.border.ended is None:
            return seen, truth
        going = ~report.border.ended
        return seen[going], truth[going]


@dataclass(frozen=True, kw_only=True)
class SyntheticGradient(Synthesised):
    r"""Predicts by a small network, linear or with hidden layers, which descends $\frac{1}{2m}\sum_n\lVert G(s_n)-g_n\rVert^2$.

    The last layer starts at zero, so the first step is that of truncated backpropagation through time. The hidden activations are
    rectified; nothing is normalised over the batch, whose samples may be at different places of their sequences.

    The defaults are the paper's, and careful. On sequences that end, a linear one that sees the whole state and is believed more learns
    faster (``hidden_layers=0, reads="state", scale=0.7``); on a stream without end that one runs away: the cells of an LSTM have no bound,
    so neither has a guess that grows with them.

    Attributes:
        scale: As for all synthesisers.
        reads: As for all synthesisers.
        hidden_layers: 0 or more.
        hidden_units: Their width; that of the core's output if ``None``.
        learning_rate: Of its Adam, above 0.

    Example:
        >>> SyntheticGradient().discount, SyntheticGradient(gamma=0.9).discount
        (0.1, 0.9)

    Reference:
        Jaderberg et al. 2016, arXiv 1608.05343, section 3.1: one hidden layer of as many units as the core, the core's output to read,
        and a scale of 0.1.
    """

    scale: float = 0.1
    reads: str = "output"
    hidden_layers: int = 1
    hidden_units: int | None = None
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_layers < 0 or (self.hidden_units is not None and self.hidden_units < 1) or not self.learning_rate > 0:
            raise ValueError(
                f"hidden_layers={self.hidden_layers}, hidden_units={self.hidden_units}, learning_rate={self.learning_rate}: give 0 or "
                "more layers of 1 or more units and a rate above 0"
            )

    def estimator(self, site: Site) -> "StateSynthesiser":
        """Makes the network."""
        return Dense(self, site)


class Dense(StateSynthesiser):
    """A network of affine layers and ReLUs. Its gradients are taken by hand: for so few operations autograd doubles the cost."""

    def __init__(self, settings: SyntheticGradient, site: Site) -> None:
        super().__init__(settings, site)
        units = settings.hidden_units or site.outputs.shape[1]
        widths = [self.seen, *[units] * settings.hidden_layers, self.width]
        place: dict[str, Any] = {"dtype": site.rows.dtype, "device": site.rows.device}
        layers = [nn.Linear(before, after, **place) for before, after in itertools.pairwise(widths)]
        zero(layers[-1])
        self._layers = layers
        self.layers = nn.ModuleList(layers)
        self._optimizer = torch.optim.Adam(self.parameters(), lr=settings.learning_rate, fused=True)

    def _run(self, seen: Float[Tensor, "m seen"]) -> list[Tensor]:
        """Returns what goes into each layer, and what comes out of the last."""
        passed = [seen]
        for layer in self._layers:
            made = F.linear(passed[-1], layer.weight, layer.bias)
            passed.append(made if layer is self._layers[-1] else made.relu_())
        return passed

    @torch.no_grad()
    def estimate(self, border: Border) -> Tensor:
        return self._run(self._see(border))[-1]

    @torch.no_grad()
    def learn(self, report: Report) -> Tensor | None:
        seen, truth = self.known(report)
        if not len(seen):
            return None
        passed = self._run(seen)
        difference = passed[-1] - truth
        gradient = difference / len(seen)
        for index in reversed(range(len(self._layers))):
            layer = self._layers[index]
            layer.weight.grad, layer.bias.grad = gradient.t() @ passed[index], gradient.sum(0)
            if index:
                gradient = (gradient @ layer.weight).mul_(passed[index] > 0)
        self._optimizer.step()
        return 0.5 * difference.square().sum() / len(seen)

    def optimizer_state(self) -> Any:
        return self._optimizer.state_dict()

    def load_optimizer_state(self, state: Any) -> None:
        self._optimizer.load_state_dict(state)
