r"""Kernels: how alike two samples are, with the analytic gradient of whatever is made of it.

The Gaussian's bandwidth is in units of one feature: $k(a, b) = \exp(-|a - b|^2 / 2\sigma^2 d)$ with d features, so that one
$\sigma$ serves layers of any width.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Samples = Float[Tensor, "m d"]
Gram = Float[Tensor, "m m"]


class Kernel(ABC):
    """A similarity of samples; whoever calls it sees to the precision of products (`lockfree.precision.exact_products`).

    Estimators do not change when a number, or a term that depends on one of the two samples alone, is added to a kernel; so they
    work on `contrast`, which leaves such terms out and loses no digits to them. A kernel of one's own gives `between`, `contrast`
    and `pullback`; `features`, too, where it is a product of finitely many.
    """

    @abstractmethod
    def between(self, x: Samples, others: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
        """Returns $k(x_i, o_j)$, shape (m, n); differentiable.

        Args:
            x: Samples as rows, shape (m, d).
            others: Others of as many features, shape (n, d).
        """

    def gram(self, x: Samples) -> Gram:
        """Returns $k(x_i, x_j)$, shape (m, m); differentiable.

        Args:
            x: Samples as rows, shape (m, d).
        """
        return self.between(x, x)

    @abstractmethod
    def contrast(self, x: Samples) -> Gram:
        """Returns the Gram matrix up to terms of one sample, shape (m, m); autograd need not pass (`pullback` is for that).

        Args:
            x: Samples as rows, shape (m, d).
        """

    @abstractmethod
    def pullback(self, x: Samples, contrast: Gram, weights: Gram) -> Samples:
        r"""Returns the gradient of $\sum_{ij} w_{ij} c_{ij}$ for symmetric weights, c the contrast; shape (m, d).

        Args:
            x: Samples as rows, shape (m, d).
            contrast: What `contrast` returned for them.
            weights: w, shape (m, m).
        """

    def settled(self, x: Samples) -> "Kernel":
        """Returns the kernel with all that depends on the samples as a whole decided; a constant for gradients.

        Args:
            x: Samples as rows, shape (m, d).
        """
        return self

    def features(self, x: Samples) -> Float[Tensor, "m D"] | None:
        r"""Returns $\phi$ with $k = \phi\phi^T$, exactly or as an approximation; ``None`` if the kernel is no such product.

        Args:
            x: Samples as rows, shape (m, d); differentiable in them.
        """
        return None


class ProductKernel(Kernel):
    """A kernel that the products of samples determine, so that it can be had of samples that are no longer there."""

    @abstractmethod
    def of_products(self, products: Gram, dimension: int) -> Gram:
        """Returns `contrast` of samples of which only the products $x_i^Tx_j$ are known.

        Args:
            products: The products, shape (m, m).
            dimension: The number of features d.
        """

    def contrast(self, x: Samples) -> Gram:
        inner = x - x.mean(0)  # takes off what would cancel
        return self.of_products(inner @ inner.T, x.shape[1])


@dataclass(frozen=True)
class Gaussian(ProductKernel):
    r"""$k(a, b) = \exp(-|a - b|^2 / 2\sigma^2 d)$.

    Used exactly: $2m^2d$ operations for distances and as many for the gradient, $m^2$ exponentials.

    Attributes:
        sigma: $\sigma$, above 0, in units of one feature; ``None``: $2\sigma^2 d$ is the (lower) median of the samples' squared
            distances, a constant for gradients.

    Raises:
        ValueError: If ``sigma`` is not positive.

    Example:
        >>> round(Gaussian(1.0).gram(torch.tensor([[0.0], [1.0]]))[0, 1].item(), 4)  # exp(-1/2)
        0.6065

    Reference:
        Ma, Lewis, Kleijn 2019, arXiv 1908.01580, equation 6, scaled by the dimension as in the authors' code; the median
        heuristic is Gretton et al. 2005's.
    """

    sigma: float | None = 5.0

    def __post_init__(self) -> None:
        if self.sigma is not None and not self.sigma > 0:
            raise ValueError(f"sigma={self.sigma}: a bandwidth must be positive; None takes the median heuristic")

    def between(self, x: Samples, others: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
        middle = x.mean(0)
        a, b = x - middle, others - middle
        distances = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)
        return torch.exp(-distances * self.settled(x)._rate(x.shape[1]))

    def of_products(self, products: Gram, dimension: int) -> Gram:
        distances = _squared_distances(products)
        # k - 1, whose digits are those of the distances: at the usual sigma every k is close to 1.
        kernel = self._of_distances(distances, dimension)
        return distances.mul_(-kernel._rate(dimension)).expm1_()

    def pullback(self, x: Samples, contrast: Gram, weights: Gram) -> Samples:
        pull = torch.addcmul(weights, weights, contrast)  # w k
        # The gradient is 4 rate (pull - diag(pull 1)) x: each sample is drawn to the others.
        pull.diagonal().sub_(pull.sum(1))
        return pull.mul_(4 * self.settled(x)._rate(x.shape[1])) @ (x - x.mean(0))

    def settled(self, x: Samples) -> "Gaussian":
        if self.sigma is not None:
            return self
        inner = x.detach() - x.detach().mean(0)
        return self._of_distances(_squared_distances(inner @ inner.T), x.shape[1])

    def _of_distances(self, distances: Gram, dimension: int) -> "Gaussian":
        return Gaussian(math.sqrt(_typical(distances) / (2 * dimension))) if self.sigma is None else self

    def _rate(self, dimension: int) -> float:
        r"""Returns $1/2\sigma^2d$, what squared distances are multiplied by."""
        assert self.sigma is not None, "a settled kernel has a bandwidth"
        return 1 / (2 * self.sigma**2 * dimension)


@dataclass(frozen=True)
class Linear(ProductKernel):
    """$k(a, b) = a^T b$, whose HSIC is the squared covariance; its features are the samples themselves.

    Used in primal form where there are fewer features than samples: $md^2$ operations instead of $m^2d$.

    Example:
        >>> Linear().gram(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))[0, 1].item()
        3.0
    """

    def between(self, x: Samples, others: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
        return x @ others.T

    def of_products(self, products: Gram, dimension: int) -> Gram:
        return products

    def pullback(self, x: Samples, contrast: Gram, weights: Gram) -> Samples:
        pulled = weights @ (x - x.mean(0))
        return 2 * (pulled - pulled.mean(0))

    def features(self, x: Samples) -> Samples:
        return x


@dataclass(frozen=True)
class Cosine(ProductKernel):
    """$k(a, b) = a^T b / |a||b|$; 0 where a sample is all zeros.

    Used in primal form where there are fewer features than samples.

    Example:
        >>> round(Cosine().gram(torch.tensor([[1.0, 0.0], [3.0, 3.0]]))[0, 1].item(), 4)
        0.7071
    """

    def between(self, x: Samples, others: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
        return self.features(x) @ self.features(others).T

    def of_products(self, products: Gram, dimension: int) -> Gram:
        lengths = products.diagonal().clamp_min(0).sqrt()
        lengths = torch.where(lengths > 0, lengths, 1)
        return products / lengths / lengths[:, None]

    def contrast(self, x: Samples) -> Gram:
        unit = self.features(x)
        unit = unit - unit.mean(0)
        return unit @ unit.T

    def pullback(self, x: Samples, contrast: Gram, weights: Gram) -> Samples:
        length = _lengths(x)
        unit = x / length
        pulled = 2 * weights @ (unit - unit.mean(0))
        pulled = pulled - pulled.mean(0)
        return (pulled - unit * (pulled * unit).sum(1, keepdim=True)) / length

    def features(self, x: Samples) -> Samples:
        return x / _lengths(x)


class _Features(Kernel):
    """A kernel that is approximated by finitely many features."""

    @abstractmethod
    def features(self, x: Samples) -> Float[Tensor, "m D"]: ...

    def between(self, x: Samples, others: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
        found = self.features(torch.cat([x, others]))
        return found[: len(x)] @ found[len(x) :].T

    def gram(self, x: Samples) -> Gram:
        found = self.features(x)
        return found @ found.T

    def contrast(self, x: Samples) -> Gram:
        return self.gram(x)

    def pullback(self, x: Samples, contrast: Gram, weights: Gram) -> Samples:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            found = self.features(leaf)
            (gradient,) = torch.autograd.grad(found, leaf, 2 * weights @ found.detach())
        return gradient


@dataclass(frozen=True)
class Fourier(_Features):
    r"""The Gaussian by random features, $\phi(x) = \sqrt{2/D}\cos(xW/\sigma\sqrt d + b)$, W normal, b uniform on $[0, 2\pi)$.

    Used for large batches: $mdD + mD^2$ operations, linear in m, with an error that falls as $1/\sqrt D$.

    Attributes:
        sigma: $\sigma$, above 0.
        count: Features D, 1 or more.
        seed: What W and b are drawn from; equal seeds give equal features.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        >>> bool((Fourier(1.0, count=20000).gram(x) - Gaussian(1.0).gram(x)).abs().max() < 0.05)
        True

    Reference:
        Rahimi, Recht 2007, "Random features for large-scale kernel machines", algorithm 1.
    """

    sigma: float = 5.0
    count: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sigma is None:
            raise ValueError("sigma=None: random features need a bandwidth; take the exact Gaussian for the median heuristic")
        Gaussian(self.sigma)
        _from_one("count", self.count, "features")

    def features(self, x: Samples) -> Float[Tensor, "m D"]:
        directions, shift = _random_directions(x.shape[1], self.count, self.seed, x.dtype, x.device)
        return math.sqrt(2 / self.count) * torch.cos(torch.addmm(shift, x, directions / (self.sigma * math.sqrt(x.shape[1]))))


@dataclass(frozen=True)
class Nystrom(_Features):
    r"""A kernel by what a few landmarks see of it, $\phi = K_{ml}K_{ll}^{-1/2}$ in the form of a Cholesky factor.

    Used for large batches: $mld + ml^2 + l^3$ operations, linear in m; exact if all samples are landmarks.

    Attributes:
        kernel: The kernel that is approximated.
        count: Landmarks l, 1 or more; drawn from the samples, all of them if there are no more.
        seed: What they are drawn by.
        jitter: Added to the diagonal of $K_{ll}$, relative to its mean, above 0; at least some multiple of the rounding error.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> torch.allclose(Nystrom(Gaussian(1.0), count=6, jitter=1e-12).gram(x), Gaussian(1.0).gram(x))
        True

    Reference:
        Williams, Seeger 2001, "Using the Nyström method to speed up kernel machines".
    """

    kernel: Kernel = Gaussian()
    count: int = 128
    seed: int = 0
    jitter: float = 1e-6

    def __post_init__(self) -> None:
        _from_one("count", self.count, "landmarks")
        if not self.jitter > 0:
            raise ValueError(f"jitter={self.jitter}: give a number above 0, or the factorisation may fail")

    def features(self, x: Samples) -> Float[Tensor, "m D"]:
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(x), generator=generator)[: self.count].to(x.device)
        joint = torch.cat([x[chosen], x])
        count = len(chosen)
        both = self.kernel.settled(joint[:count]).between(joint, joint[:count])
        corner = both[:count]
        # Below some multiple of the rounding error a jitter keeps nothing positive.
        jitter = max(self.jitter, 4 * count * torch.finfo(x.dtype).eps) * (float(corner.detach().diagonal().mean()) or 1.0)
        factor, failed = torch.linalg.cholesky_ex(corner + jitter * torch.eye(count, dtype=x.dtype, device=x.device))
        if failed:
            raise ValueError(f"the landmarks' kernel could not be factorised: raise jitter={self.jitter}, or pass float64")
        return torch.linalg.solve_triangular(factor, both[count:].T, upper=False).T


@dataclass(frozen=True)
class Grouped(Kernel):
    r"""A kernel of the groups' deviations: $g_a = (\delta + \mathrm{var}_{n\in a}x_n)^{p/2}$ over consecutive features.

    A group is a part of the channels at all places, since features are flattened with the channel first.

    Attributes:
        kernel: What the deviations are put into.
        groups: How many, 1 or more; each needs two features.
        power: p, above 0.
        delta: Keeps the power differentiable at 0, above 0.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> Grouped(Linear(), groups=1, delta=1e-12).gram(torch.tensor([[1.0, -1.0], [3.0, -3.0]]))[0, 1].item()
        3.0

    Reference:
        Pogodin, Latham 2020, "Kernelized information bottleneck leads to biologically plausible 3-factor Hebbian learning in deep
        networks", arXiv 2006.07123, section 4 (grouping).
    """

    kernel: Kernel = Cosine()
    groups: int = 32
    power: float = 1.0
    delta: float = 1e-6

    def __post_init__(self) -> None:
        _from_one("groups", self.groups, "groups")
        for name in ("power", "delta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0")

    def between(self, x: Samples, others: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
        return self.kernel.between(self.deviations(x), self.deviations(others))

    def contrast(self, x: Samples) -> Gram:
        return self.kernel.contrast(self.deviations(x))

    def settled(self, x: Samples) -> "Grouped":
        return replace(self, kernel=self.kernel.settled(self.deviations(x)))

    def features(self, x: Samples) -> Float[Tensor, "m D"] | None:
        return self.kernel.features(self.deviations(x))

    def pullback(self, x: Samples, contrast: Gram, weights: Gram) -> Samples:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            found = self.deviations(leaf)
            (gradient,) = torch.autograd.grad(found, leaf, self.kernel.pullback(found.detach(), contrast, weights))
        return gradient

    def deviations(self, x: Samples) -> Float[Tensor, "m groups"]:
        """Returns g.

        Raises:
            ValueError: If a group would have less than two features.
        """
        count = x.shape[1]
        if count < 2 * self.groups:
            raise ValueError(f"{count} features make no {self.groups} groups of two or more: take fewer groups")
        belongs = torch.arange(count, device=x.device) * self.groups // count
        share = torch.nn.functional.one_hot(belongs, self.groups).to(x.dtype)
        share = share / share.sum(0)
        apart = x - (x @ share)[:, belongs]
        return (apart.square() @ share + self.delta) ** (self.power / 2)


@lru_cache(maxsize=32)
def _random_directions(
    dimension: int, count: int, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "d D"], Float[Tensor, " D"]]:
    """Draws on the CPU, so that every device has the same."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(dimension, count, generator=generator, dtype=torch.float64)
    shift = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    return directions.to(device, dtype), shift.to(device, dtype)


class _Contrast(torch.autograd.Function):
    """`Kernel.contrast` with the kernel's own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel) -> Tensor:
        ctx.kernel = kernel
        found = kernel.contrast(x)
        ctx.save_for_backward(x, found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        x, found = ctx.saved_tensors
        return ctx.kernel.pullback(x, found, (gradient + gradient.T) / 2), None


def contrast(kernel: Kernel, x: Samples) -> Gram:
    """Returns `Kernel.contrast`, differentiable."""
    return _Contrast.apply(x, kernel)  # pyrefly: ignore[bad-return]


def _squared_distances(products: Gram) -> Gram:
    """Returns $|x_i - x_j|^2$, the diagonal exactly 0."""
    norms = products.diagonal()
    return torch.sub(norms[:, None] + norms, products, alpha=2).clamp_min_(0).fill_diagonal_(0)


def centred(gram: Gram) -> Gram:
    """Returns HKH of a symmetric K, with $H = I - 11^T/m$."""
    means = gram.mean(0)
    return gram - means - (means - means.mean())[:, None]


def _typical(distances: Tensor) -> float:
    """Returns the median of the squared distances of different samples; their mean if it is 0, and 1 if that is, too."""
    rows, columns = distances.shape
    apart = distances[~torch.eye(rows, columns, dtype=torch.bool, device=distances.device)]
    if not len(apart):
        return 1.0
    return float(apart.median()) or float(apart.mean()) or 1.0


def _lengths(x: Tensor) -> Tensor:
    length = x.norm(dim=1, keepdim=True)
    return torch.where(length > 0, length, 1)


def _from_one(name: str, count: int, what: str) -> None:
    if count < 1:
        raise ValueError(f"{name}={count}: give 1 or more {what}")
