"""A linear synthesiser that is solved for instead of descended: the least squares of all it has been told, the older the less."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lockfree.recurrent.bootstrap import Border, Report, Site
from lockfree.recurrent.synthetic import StateSynthesiser, Synthesised


@dataclass(frozen=True, kw_only=True)
class LeastSquaresGradient(Synthesised):
    r"""Predicts by $G(s) = A^T x$ with $A = (\sum_k\phi^{K-k} x_k x_k^T + \rho\,\bar{c} I)^{-1}\sum_k\phi^{K-k} x_k g_k^T$, $x = [s; 1]$.

    The sums run over all samples of all borders so far, each border's divided by its samples; $\bar{c}$ is the mean of the diagonal. A
    gradient that moves with the weights is followed at once, where descent lags behind; there is no learning rate.

    Attributes:
        forgetting: φ, what the sums keep from border to border, 0 up to but not including 1.
        ridge: ρ, above 0.
        every: Borders between two solutions, 1 or more.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> LeastSquaresGradient().forgetting < 1
        True

    Reference:
        Our own; with a target that contains its own guess it is the recursive form of least-squares temporal differences (Bradtke and
        Barto 1996, section 5), of a vector of values. The first guess is zero, as in Jaderberg et al. 2016.
    """

    forgetting: float = 0.99
    ridge: float = 1e-3
    every: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.forgetting < 1 or not self.ridge > 0 or self.every < 1:
            raise ValueError(
                f"forgetting={self.forgetting}, ridge={self.ridge}, every={self.every}: give a forgetting from 0 to below 1, a ridge "
                "above 0 and 1 or more borders"
            )

    def estimator(self, site: Site) -> "StateSynthesiser":
        """Makes it."""
        return _LeastSquares(self, site)


class _LeastSquares(StateSynthesiser):
    def __init__(self, settings: LeastSquaresGradient, site: Site) -> None:
        super().__init__(settings, site)
        like = site.rows
        self.own = settings
        self.register_buffer("weight", like.new_zeros(self.seen + 1, self.width))
        self.register_buffer("products", like.new_zeros(self.seen + 1, self.seen + 1))  # sums of x x^T
        self.register_buffer("answers", like.new_zeros(self.seen + 1, self.width))  # sums of x g^T
        self.register_buffer("told", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def estimate(self, border: Border) -> Tensor:
        return torch.addmm(self.weight[-1], self._see(border), self.weight[:-1])

    @torch.no_grad()
    def learn(self, report: Report) -> Tensor | None:
        seen, truth = self.known(report)
        if not len(seen):
            return None
        x = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
        self.products.addmm_(x.t(), x, beta=self.own.forgetting, alpha=1 / len(x))
        self.answers.addmm_(x.t(), truth, beta=self.own.forgetting, alpha=1 / len(x))
        self.told += 1
        difference = x @ self.weight - truth
        if int(self.told) % self.own.every == 0:
            self._solve()
        return 0.5 * difference.square().sum() / len(x)

    def _solve(self) -> None:
        ridge = self.own.ridge * self.products.diagonal().mean()
        regular = self.products + ridge * torch.eye(len(self.products), dtype=self.products.dtype, device=self.products.device)
        factor, failed = torch.linalg.cholesky_ex(regular)
        if int(failed) == 0:  # else rounding has made the sums indefinite: the last solution serves until they are not
            self.weight.copy_(torch.cholesky_solve(self.answers, factor))
