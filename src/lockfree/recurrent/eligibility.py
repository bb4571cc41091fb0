"""BP(λ): a linear synthesiser that learns from all borders at once, by traces that run forward in time and need no past."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lockfree.choose import choose
from lockfree.recurrent.bootstrap import Border, Report, Site
from lockfree.recurrent.scaled import Scaled, ScaledEstimator

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "adam": lambda parameters, rate: torch.optim.Adam(parameters, lr=rate, fused=True),
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate),
}
"""What takes the steps, by name."""

LARGEST = 2**29
"""Bytes of the largest trace; two of them are there while one is carried over a chunk."""


@dataclass(frozen=True, kw_only=True)
class BPLambda(Scaled):
    r"""Learns $G(s) = W\,[s; 1]$ by eligibility traces.

    At the k-th border, with the state $s_k$, the loss $L_{k+1}$ of the chunk that begins there and its Jacobian
    $J_{k+1} = \partial s_{k+1}/\partial s_k$,

    $$\delta_k = \partial L_{k+1}/\partial s_k + \gamma J_{k+1}^T G(s_{k+1}) - G(s_k),$$

    $$e_k = \gamma\lambda J_k\,e_{k-1} + \partial G(s_k)/\partial W, \qquad \Delta W = \frac1m\sum_n \delta_k^T e_k,$$

    where samples whose sequence has ended count as zero. The trace starts at zero with every sequence. Summed over a sequence at a
    fixed W, the steps are $\sum_k (g^\lambda_k - G(s_k))^T\,\partial G(s_k)/\partial W$, where
    $g^\lambda_k = \partial L_{k+1}/\partial s_k + \gamma J_{k+1}^T\,[(1-\lambda)\,G(s_{k+1}) + \lambda g^\lambda_{k+1}]$: for
    $\lambda = 0$ the target of one chunk, for $\lambda = \gamma = 1$ the gradient of backpropagation through all of the time to come.

    A trace has width² (width + 1) numbers for each sample, and a Jacobian takes width backward passes: it is for small states. With
    $\gamma\lambda = 0$ there is neither.

    Attributes:
        lam: λ, from 0 to 1: how much of a chunk's error goes to the borders before the one that it began at.
        learning_rate: Above 0.
        optimizer: What takes the steps: ``"adam"`` or ``"sgd"``.
        clip: Longest ΔW, its 2-norm, above 0; any if ``None``.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> BPLambda(scale=0.1, gamma=0.9, lam=1.0).discount
        0.9

    Reference:
        Pemberton and Costa 2024, "BP(λ): Online learning via synthetic gradients", TMLR, arXiv 2401.07044. Their θ is our W; they clip
        at 1, weight and bias each by itself, and start at zero.
    """

    lam: float = 1.0
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(OPTIMIZERS, self.optimizer, "optimizer")
        if not 0 <= self.lam <= 1 or not self.learning_rate > 0 or (self.clip is not None and not self.clip > 0):
            raise ValueError(
                f"lam={self.lam}, learning_rate={self.learning_rate}, clip={self.clip}: give a lam from 0 to 1, a rate above 0 and a "
                "clip above 0 or None"
            )

    def estimator(self, site: Site) -> "EligibilityTraces":
        """Makes the linear synthesiser."""
        return EligibilityTraces(self, site)


class EligibilityTraces(ScaledEstimator):
    """A linear synthesiser, and the trace of each sample.

    Args:
        settings: Of it.
        site: Where it stands.

    Attributes:
        weight: W, (width, width + 1).
        trace: $J_k e_{k-1}$ times γλ, (m, width, width, width + 1): of each number of the estimate by each of W. ``None``: zero.
    """

    def __init__(self, settings: BPLambda, site: Site) -> None:
        super().__init__(settings)
        width = site.layout.width
        self._decay, self._clip = settings.discount * settings.lam, settings.clip
        self.weight = nn.Parameter(site.rows.new_zeros(width, width + 1))
        self.trace: Tensor | None = None
        self._optimizer = OPTIMIZERS[settings.optimizer]([self.weight], settings.learning_rate)

    @property
    def wants_jacobian(self) -> bool:
        return self._decay > 0

    @torch.no_grad()
    def estimate(self, border: Border) -> Tensor:
        self._refuse_too_large(len(border.rows))
        return self._value(border.rows)

    def _value(self, rows: Tensor) -> Tensor:
        return torch.addmm(self.weight[:, -1], rows, self.weight[:, :-1].t())

    def _refuse_too_large(self, samples: int) -> None:
        size = samples * len(self.weight) * self.weight.numel() * self.weight.element_size()
        if self.wants_jacobian and size > LARGEST:
            raise ValueError(
                f"the traces of {samples} samples with a state of {len(self.weight)} numbers take {size / 1e6:.0f} MB, more than "
                f"{LARGEST / 1e6:.0f}: give fewer samples, a smaller core, lam=0, or another bootstrap such as 'dni'"
            )

    @torch.no_grad()
    def learn(self, report: Report) -> Tensor | None:
        error, going = self._error(report), _going(report)
        correction = self._correction(report, error)
        if not going:  # nobody has told anything: not even the optimizer's momentum moves the weight
            return None
        self.weight.grad = -correction
        if self._clip is not None:
            nn.utils.clip_grad_norm_([self.weight], self._clip)
        self._optimizer.step()
        return 0.5 * error.square().sum() / going

    @torch.no_grad()
    def correction(self, report: Report) -> Float[Tensor, "width seen"]:
        """Returns ΔW for a border, without taking it, and carries the trace over the chunk that begins there."""
        return self._correction(report, self._error(report))

    def _error(self, report: Report) -> Tensor:
        """Returns δ of each sample, (m, width); zero for those whose sequence had ended."""
        error, ended = report.truth - self._value(report.border.rows), report.border.ended
        return error if ended is None else error.masked_fill_(ended.unsqueeze(1), 0.0)

    def _correction(self, report: Report, error: Tensor) -> Tensor:
        rows, ended, jacobian = report.border.rows, report.border.ended, report.jacobian
        shares, x = error / len(rows), torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        if not self.wants_jacobian:
            return shares.t() @ x
        assert jacobian is not None
        trace = rows.new_zeros(len(rows), *[len(self.weight)] * 2, x.shape[1]) if self.trace is None else self.trace
        if ended is not None:  # the error of those is zero, and so is their Jacobian: their traces end here
            trace = trace.masked_fill(ended[:, None, None, None], 0.0)
        trace.diagonal(dim1=1, dim2=2).add_(x.unsqueeze(2))
        step = shares.flatten() @ trace.flatten(0, 1).flatten(1)
        self.trace = torch.bmm(jacobian * self._decay, trace.flatten(2)).view_as(trace)
        return step.view_as(self.weight)

    def reset(self) -> None:
        self.trace = None

    def optimizer_state(self) -> Any:
        return {"optimizer": self._optimizer.state_dict(), "trace": self.trace}

    def load_optimizer_state(self, state: Any) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self.trace = state["trace"]


def _going(report: Report) -> int:
    """How many samples' sequences went on after the border."""
    ended = report.border.ended
    return len(report.truth) - (0 if ended is None else int(ended.sum()))
