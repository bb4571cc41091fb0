"""What a block under the HSIC bottleneck minimises, as the gradient with respect to its own Gram matrix."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lockfree.hsic.estimators import IndefiniteError, Side, check_epsilon, ridged_factor, smoother
from lockfree.hsic.kernels import Gram, Kernel, Samples, centred


@dataclass(frozen=True, kw_only=True)
class Bottleneck(ABC):
    r"""An objective of a block's output Z, given the network's input X and the targets Y.

    What concerns X and Y alone is a constant of the batch: made once, used by every block.

    Attributes:
        balance: $\lambda$, how much knowing Y weighs against knowing X; 0 or more.

    Raises:
        ValueError: If it is negative.
    """

    balance: float

    def __post_init__(self) -> None:
        if not self.balance >= 0:
            raise ValueError(f"balance={self.balance}: give 0 or more")

    @abstractmethod
    def constants(self, x: Gram, y: Gram) -> Gram:
        """Returns what the blocks share, shape (m, m).

        Args:
            x: Gram matrix of the network's inputs, or its contrast where that is as good; shape (m, m).
            y: Of the targets.
        """

    @abstractmethod
    def gradient(self, kernel: Kernel, z: Samples, constants: Gram) -> Samples:
        """Returns dL/dz of a block's output, shape (m, d).

        Args:
            kernel: Of the block's output.
            z: The output, samples as rows, shape (m, d).
            constants: What `constants` returned for the batch.

        Raises:
            ValueError: If a kernel matrix cannot be factorised.
        """


class _CentredHSIC(Bottleneck):
    """An objective of the centred Gram matrix, so that a kernel's contrast, or its centred features, will do."""

    @abstractmethod
    def weights(self, z: Gram, constants: Gram) -> Gram:
        """Returns dL/dK of a block's contrast, symmetric."""

    @abstractmethod
    def feature_gradient(self, features: Float[Tensor, "m D"], constants: Gram) -> Float[Tensor, "m D"]:
        r"""Returns $dL/d\phi$ of a block's centred features, $K = \phi\phi^T$: the primal form of `weights`."""

    def gradient(self, kernel: Kernel, z: Samples, constants: Gram) -> Samples:
        try:
            return self._gradient(kernel, z, constants)
        except IndefiniteError:
            if z.dtype == torch.float64:
                raise
        # Distances between samples that are near each other and far from the rest: their digits are lost in float32.
        return self._gradient(kernel, z.double(), constants.double()).to(z.dtype)

    def _gradient(self, kernel: Kernel, z: Samples, constants: Gram) -> Samples:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            side = Side(kernel, leaf)
        if side.features is None:
            contrast = side.kernel.contrast(z)
            return side.kernel.pullback(z, contrast, self.weights(contrast, constants))
        (gradient,) = torch.autograd.grad(side.features, leaf, self.feature_gradient(side.features.detach(), constants))
        return gradient


@dataclass(frozen=True, kw_only=True)
class NormalisedHSIC(_CentredHSIC):
    r"""$L = \mathrm{nHSIC}(Z,X) - \lambda\,\mathrm{nHSIC}(Z,Y) = \mathrm{tr}(R_ZM)$ with $M = R_X - \lambda R_Y$.

    $dL/dK = r\,S^{-1}MS^{-1}$ with $S = \bar K + rI$, $r = \epsilon m$: one factorisation a block and batch. In primal form, with
    $P = \phi^T\phi + rI$ and $A = \phi^TM\phi$, $dL/d\phi = 2(M\phi - \phi P^{-1}A)P^{-1}$.

    Attributes:
        epsilon: $\epsilon$, above 0.

    Reference:
        Ma, Lewis, Kleijn 2019, arXiv 1908.01580, equations 7 and 10; the gradient is ours.
    """

    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_epsilon(self.epsilon)

    def constants(self, x: Gram, y: Gram) -> Gram:
        ridge = self.epsilon * len(x)
        return smoother(centred(x), ridge).sub_(smoother(centred(y), ridge), alpha=self.balance)

    def weights(self, z: Gram, constants: Gram) -> Gram:
        ridge = self.epsilon * len(z)
        inverse = torch.cholesky_inverse(ridged_factor(centred(z), ridge))
        # Its rows sum to 0 but for rounding, which a kernel close to 1 everywhere would make much of.
        return centred(inverse @ torch.addmm(constants, constants, inverse, beta=0, alpha=ridge))

    def feature_gradient(self, features: Float[Tensor, "m D"], constants: Gram) -> Float[Tensor, "m D"]:
        factor = ridged_factor(features.T @ features, self.epsilon * len(features))
        seen = constants @ features
        rest = torch.addmm(seen, features, torch.cholesky_solve(features.T @ seen, factor), alpha=-1)
        return torch.cholesky_solve(rest.T, factor).T.mul(2)


@dataclass(frozen=True, kw_only=True)
class PlainHSIC(_CentredHSIC):
    r"""$L = \mathrm{HSIC}(Z,X) - \lambda\,\mathrm{HSIC}(Z,Y)$, $dL/dK = (\bar K_X - \lambda\bar K_Y)/(m-1)^2$; no factorisation.

    Reference:
        Ma, Lewis, Kleijn 2019, arXiv 1908.01580, equation 9.
    """

    def constants(self, x: Gram, y: Gram) -> Gram:
        return (centred(x) - self.balance * centred(y)).div_(max(len(x) - 1, 1) ** 2)

    def weights(self, z: Gram, constants: Gram) -> Gram:
        return constants

    def feature_gradient(self, features: Float[Tensor, "m D"], constants: Gram) -> Float[Tensor, "m D"]:
        return 2 * constants @ features


@dataclass(frozen=True, kw_only=True)
class PlausibleHSIC(Bottleneck):
    r"""$L = \mathrm{pHSIC}(Z,Z) - \gamma\,\mathrm{pHSIC}(Z,Y)$ with $\mathrm{pHSIC}(A,B) = \mathrm{mean}((A - \mathrm{mean}A)\circ B)$.

    Only the grand mean is taken off, so that a synapse needs no sum over pairs; that is enough while labels are balanced. No input
    term: the block is told to be simple instead. $\gamma$ is ``balance``.

    Reference:
        Pogodin, Latham 2020, arXiv 2006.07123, equations 6 and 9.
    """

    def constants(self, x: Gram, y: Gram) -> Gram:
        return (y - y.mean()).mul_(-self.balance / y.numel())

    def gradient(self, kernel: Kernel, z: Samples, constants: Gram) -> Samples:
        # Terms of one sample matter here, so the contrast, which leaves them out, does not serve.
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            found = kernel.gram(leaf)
            weights = torch.add(constants, found.detach() - found.detach().mean(), alpha=2 / found.numel())
            (gradient,) = torch.autograd.grad(found, leaf, weights)
        return gradient
