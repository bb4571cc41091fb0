r"""How dependent two sets of samples are: HSIC, its normalised form, CKA, and what of it is more than chance."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockfree.choose import choose
from lockfree.hsic.kernels import Gaussian, Gram, Kernel, Samples, centred, contrast
from lockfree.precision import exact_products

Given = Shaped[Tensor, "m ..."]
Scalar = Float[Tensor, ""]
Estimator = Literal["biased", "unbiased"]


def hsic(
    x: Given,
    y: Given,
    *,
    sigma_x: float | None = 5.0,
    sigma_y: float | None = 5.0,
    estimator: Estimator = "biased",
    kernel_x: Kernel | None = None,
    kernel_y: Kernel | None = None,
    block_size: int | None = None,
) -> Scalar:
    r"""The Hilbert-Schmidt independence criterion: how dependent x and y are; 0 if they are independent.

    Biased: $(m-1)^{-2}\,\mathrm{tr}(KHLH)$, of order 1/m for independent samples. Unbiased:
    $[\mathrm{tr}\tilde K\tilde L + 1^T\tilde K1\,1^T\tilde L1/((m-1)(m-2)) - 2\cdot 1^T\tilde K\tilde L1/(m-2)]/(m(m-3))$ with zero
    diagonals, 0 on average for independent samples.

    Cost: $m^2d$. Where both kernels are products of fewer features than samples (`Linear`, `Cosine`, `Fourier`, `Nystrom`) no m x m
    matrix is made: $m D_x D_y$.

    Args:
        x: Samples of shape (m, ...), flattened to m rows; sums are taken in float32 or better, integers are numbers.
        y: As many samples.
        sigma_x: Bandwidth of the Gaussian kernel $\exp(-|a-b|^2/2\sigma^2d)$; ``None``: the median heuristic.
        sigma_y: Likewise.
        estimator: "biased" (m from 2) or "unbiased" (m from 4).
        kernel_x: Takes the Gaussian's place.
        kernel_y: Likewise.
        block_size: Take the mean over consecutive blocks of so many samples, $mb$ instead of $m^2$ operations a feature; a last
            block of fewer is left out.

    Returns:
        A scalar, differentiable in x and y.

    Raises:
        ValueError: If there are too few samples, numbers differ, values are not finite, tensors are sparse, or a bandwidth is not
            positive.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> bool(hsic(x, x, sigma_x=1.0, sigma_y=1.0) > 5 * hsic(x, x.flip(0), sigma_x=1.0, sigma_y=1.0))
        True

    Reference:
        Gretton, Bousquet, Smola, Schölkopf 2005, "Measuring statistical dependence with Hilbert-Schmidt norms", equation 9; Song,
        Smola, Gretton, Bedo, Borgwardt 2012, equation 5 (unbiased); Zhang, Filippi, Gretton, Sejdinovic 2018 (blocks).
    """
    measure, least = choose(_CRITERIA, estimator, "estimator")
    return _measured(x, y, (kernel_x or Gaussian(sigma_x), kernel_y or Gaussian(sigma_y)), least, block_size, measure)


def nhsic(
    x: Given,
    y: Given,
    *,
    sigma_x: float | None = 5.0,
    sigma_y: float | None = 5.0,
    epsilon: float = 1e-5,
    kernel_x: Kernel | None = None,
    kernel_y: Kernel | None = None,
    block_size: int | None = None,
) -> Scalar:
    r"""Normalised HSIC: $\mathrm{tr}(\tilde K_x\tilde K_y)$ with $\tilde K = \bar K(\bar K + \epsilon m I)^{-1}$ and $\bar K = HKH$.

    It counts the directions that x and y share, up to the rank of the smaller one. Independent samples give much more than 0 where
    features are not much fewer than samples: see `above_chance`.

    Cost: $m^2d$ and one factorisation, $m^3$, for each of x and y, whose gradient takes two products more. Where both kernels are
    products of fewer features than samples: $mD^2 + D^3$.

    Args:
        x: Samples of shape (m, ...), m from 2.
        y: As many samples.
        sigma_x: Bandwidth of the Gaussian kernel; ``None``: the median heuristic.
        sigma_y: Likewise.
        epsilon: Ridge, above 0; in float32 from about 1e-6.
        kernel_x: Takes the Gaussian's place.
        kernel_y: Likewise.
        block_size: Take the mean over consecutive blocks of so many samples.

    Returns:
        A scalar, 0 or more, differentiable in x and y.

    Raises:
        ValueError: As `hsic`, or if ``epsilon`` is not positive.

    Example:
        >>> labels = torch.eye(4).repeat(10, 1)
        >>> round(nhsic(labels, labels, epsilon=1e-6).item(), 1)
        3.0

    Reference:
        Ma, Lewis, Kleijn 2019, "The HSIC bottleneck: deep learning without back-propagation", arXiv 1908.01580, equation 7.
    """
    check_epsilon(epsilon)

    def measure(a: "Side", b: "Side") -> Tensor:
        ridge = epsilon * a.samples
        if a.features is not None and b.features is not None:
            return _primal_trace(a.features, b.features, ridge)
        return (a.smoother(ridge) * b.smoother(ridge)).sum()

    return _measured(x, y, (kernel_x or Gaussian(sigma_x), kernel_y or Gaussian(sigma_y)), 2, block_size, measure)


def cka(
    x: Given,
    y: Given,
    *,
    sigma_x: float | None = 5.0,
    sigma_y: float | None = 5.0,
    estimator: Estimator = "biased",
    kernel_x: Kernel | None = None,
    kernel_y: Kernel | None = None,
) -> Scalar:
    r"""Centred kernel alignment, $\mathrm{HSIC}(x,y)/\sqrt{\mathrm{HSIC}(x,x)\,\mathrm{HSIC}(y,y)}$: how alike two representations are.

    Args:
        x: Samples of shape (m, ...).
        y: As many samples.
        sigma_x: Bandwidth of the Gaussian kernel; ``None``: the median heuristic.
        sigma_y: Likewise.
        estimator: "biased" (m from 2; 0 to 1) or "unbiased" (m from 4; near 0 for independent samples).
        kernel_x: Takes the Gaussian's place; `Linear` is the usual choice for comparing layers.
        kernel_y: Likewise.

    Returns:
        A scalar, differentiable in x and y.

    Raises:
        ValueError: As `hsic`, or if x or y is constant: nothing can be alike then.

    Example:
        >>> x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        >>> from lockfree.hsic import Linear
        >>> round(cka(x, 2 * x + 1, kernel_x=Linear(), kernel_y=Linear()).item(), 4)
        1.0

    Reference:
        Kornblith, Norouzi, Lee, Hinton 2019, "Similarity of neural network representations revisited", arXiv 1905.00414.
    """
    criterion, least = choose(_CRITERIA, estimator, "estimator")

    def measure(a: "Side", b: "Side") -> Tensor:
        own = criterion(a, a), criterion(b, b)
        for name, size, side in zip("xy", own, (a, b), strict=True):
            if side.constant or not size > 0:
                raise ValueError(f"{name} does not vary (enough) from sample to sample: its alignment with anything is 0 / 0")
        return criterion(a, b) / (own[0].sqrt() * own[1].sqrt())

    return _measured(x, y, (kernel_x or Gaussian(sigma_x), kernel_y or Gaussian(sigma_y)), least, None, measure)


def above_chance(
    x: Given,
    y: Given,
    *,
    sigma_x: float | None = 5.0,
    sigma_y: float | None = 5.0,
    epsilon: float = 1e-5,
    kernel_x: Kernel | None = None,
    kernel_y: Kernel | None = None,
) -> Scalar:
    r"""Normalised HSIC less its mean over all shuffles of y: what is left is dependence, not the fitting of m samples by d features.

    The mean over all permutations P of $\mathrm{tr}(\tilde K_xP\tilde K_yP^T)$ is $\mathrm{tr}\tilde K_x\,\mathrm{tr}\tilde K_y/(m-1)$,
    since both are centred. With 10 balanced classes, 256 features and 256 samples `nhsic` gives about 5.7 of 9 for features that
    know nothing of the class; this gives 0 on average.

    Args:
        x: Samples of shape (m, ...), m from 2.
        y: As many samples.
        sigma_x: Bandwidth of the Gaussian kernel; ``None``: the median heuristic.
        sigma_y: Likewise.
        epsilon: Ridge, above 0.
        kernel_x: Takes the Gaussian's place.
        kernel_y: Likewise.

    Returns:
        A scalar, differentiable in x and y.

    Raises:
        ValueError: As `nhsic`.

    Example:
        >>> x, y = torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(0))
        >>> bool(above_chance(x, y).abs() < 0.1 * nhsic(x, y))
        True
    """
    check_epsilon(epsilon)

    def measure(a: "Side", b: "Side") -> Tensor:
        left, right = (side.smoother(epsilon * side.samples) for side in (a, b))
        return (left * right).sum() - left.trace() * right.trace() / (a.samples - 1)

    return _measured(x, y, (kernel_x or Gaussian(sigma_x), kernel_y or Gaussian(sigma_y)), 2, None, measure)


# ---- one side of a dependence ------------------------------------------------------------------------------------------------


class Side:
    """Samples under a kernel, as a matrix of features where that is smaller than the Gram matrix.

    Args:
        kernel: The kernel.
        x: The samples.

    Attributes:
        samples: m.
        kernel: The kernel, with all that depends on the samples as a whole decided.
        features: Of shape (m, D), D < m, centred; ``None`` in dual form.
    """

    def __init__(self, kernel: Kernel, x: Samples) -> None:
        self.samples, self._x, self.kernel = len(x), x, kernel.settled(x)
        self.features: Tensor | None = None
        found = self.kernel.features(x)
        if found is not None and found.shape[1] < len(x):
            self.features = found - found.mean(0)

    @property
    def constant(self) -> bool:
        """Whether all samples are the same."""
        return bool((self._x == self._x[0]).all())

    @cached_property
    def contrast(self) -> Gram:
        """The Gram matrix up to terms of one sample."""
        return contrast(self.kernel, self._x) if self.features is None else self.features @ self.features.T

    def smoother(self, ridge: float) -> Gram:
        r"""Returns $\\bar K(\\bar K + rI)^{-1}$."""
        if self.features is None:
            return smoother(centred(self.contrast), ridge)
        return self.features @ torch.cholesky_solve(self.features.T, ridged_factor(self.features.T @ self.features, ridge))


def _biased(a: Side, b: Side) -> Tensor:
    if a.features is not None and b.features is not None:
        total = (a.features.T @ b.features).square().sum()
    else:
        total = (centred(a.contrast) * b.contrast).sum()
    return total / (a.samples - 1) ** 2


def _unbiased(a: Side, b: Side) -> Tensor:
    m = a.samples
    if a.features is not None and b.features is not None:
        return _unbiased_of_features(a.features, b.features)
    # U-centring takes off what depends on one sample alone, so that the sum over pairs is Song et al.'s.
    return (_u_centred(a.contrast) * _u_centred(b.contrast)).sum() / (m * (m - 3))


# The criterion, and how many samples it needs.
_CRITERIA: dict[str, tuple[Callable[[Side, Side], Tensor], int]] = {"biased": (_biased, 2), "unbiased": (_unbiased, 4)}


def _u_centred(gram: Tensor) -> Tensor:
    m = len(gram)
    off = gram - torch.diag(gram.diagonal())
    rows = off.sum(0) / (m - 2)
    inner = off - rows - rows[:, None] + off.sum() / ((m - 1) * (m - 2))
    return inner - torch.diag(inner.diagonal())


def _unbiased_of_features(a: Tensor, b: Tensor) -> Tensor:
    m = len(a)
    own = a.square().sum(1), b.square().sum(1)
    # Features are centred, so that the rows of their products sum to 0 with the diagonal and to minus it without.
    rows = tuple(-one for one in own)
    pairs = (a.T @ b).square().sum() - (own[0] * own[1]).sum()
    both = rows[0].sum() * rows[1].sum() / ((m - 1) * (m - 2))
    return (pairs + both - 2 / (m - 2) * (rows[0] * rows[1]).sum()) / (m * (m - 3))


def _primal_trace(a: Tensor, b: Tensor, ridge: float) -> Tensor:
    r"""Returns $\mathrm{tr}((A^TA + r)^{-1}A^TB(B^TB + r)^{-1}B^TA)$, the nHSIC of features."""
    between = a.T @ b
    left = torch.cholesky_solve(between, ridged_factor(a.T @ a, ridge))
    right = torch.cholesky_solve(between.T, ridged_factor(b.T @ b, ridge))
    return (left * right.T).sum()


class IndefiniteError(ValueError):
    """Rounding has made a kernel matrix indefinite by more than its ridge."""


def ridged_factor(gram: Gram, ridge: float) -> Gram:
    """Returns the Cholesky factor of a positive matrix plus a ridge.

    Raises:
        IndefiniteError: If rounding has made it indefinite.
    """
    raised = gram.clone()
    raised.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(raised)
    if failed:
        raise IndefiniteError(
            "a kernel matrix could not be factorised: raise epsilon, or look for values that are far too large"
        )
    return factor


class _Smoother(torch.autograd.Function):
    r"""$R = \bar K S^{-1}$, $S = \bar K + rI$: one factorisation forward, two products backward, $dL/d\bar K = r S^{-1} (dL/dR) S^{-1}$."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor, ridge: float) -> Tensor:
        inverse = torch.cholesky_inverse(ridged_factor(gram, ridge))
        ctx.ridge = ridge
        ctx.save_for_backward(inverse)
        found = inverse.mul(-ridge)
        found.diagonal().add_(1)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        (inverse,) = ctx.saved_tensors
        return ctx.ridge * inverse @ gradient @ inverse, None


def smoother(gram: Gram, ridge: float) -> Gram:
    r"""Returns $\bar K(\bar K + rI)^{-1}$ of a centred Gram matrix, differentiable."""
    return _Smoother.apply(gram, ridge)  # pyrefly: ignore[bad-return]


# ---- what is given -----------------------------------------------------------------------------------------------------------


def _measured(
    x: Tensor,
    y: Tensor,
    kernels: tuple[Kernel, Kernel],
    least: int,
    block_size: int | None,
    measure: Callable[[Side, Side], Tensor],
) -> Tensor:
    """Checks, flattens, and measures whole or block by block."""
    for name, one in (("x", x), ("y", y)):
        if one.dim() == 0:
            raise ValueError(f"{name} is a single number: give samples along the first dimension")
    if len(x) != len(y):
        raise ValueError(f"x holds {len(x)} samples and y {len(y)}: give the same samples seen in two ways")
    if len(x) < least:
        raise ValueError(f"a dependence between {len(x)} samples cannot be measured: give {least} or more")
    if block_size is not None and not least <= block_size <= len(x):
        raise ValueError(f"block_size={block_size}: give {least} to {len(x)}, the number of samples")
    size = block_size or len(x)
    rows = [as_samples("x", x), as_samples("y", y)]
    dtype = torch.promote_types(rows[0].dtype, rows[1].dtype)

    def mean_of_blocks(*both: Tensor) -> Tensor:
        found = [
            measure(*(Side(kernel, side[start : start + size]) for kernel, side in zip(kernels, both, strict=True)))
            for start in range(0, len(x) - size + 1, size)
        ]
        return torch.stack(found).mean()

    try:
        return _Exact.apply(mean_of_blocks, *(one.to(dtype) for one in rows))  # pyrefly: ignore[bad-return]
    except IndefiniteError:
        if dtype == torch.float64:
            raise
    # Distances between samples that are near each other and far from the rest: their digits are lost in float32.
    return _Exact.apply(mean_of_blocks, *(one.double() for one in rows)).to(dtype)  # pyrefly: ignore[missing-attribute]


class _Exact(torch.autograd.Function):
    """A measure whose gradient, too, is taken with exact products, whatever surrounds the call of ``backward``."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        with exact_products(rows[0].device.type):
            if not any(ctx.needs_input_grad):
                return run(*rows)
            wanted = ctx.needs_input_grad[1:]
            ctx.leaves = [one.detach().requires_grad_(wants) for one, wants in zip(rows, wanted, strict=True)]
            with torch.enable_grad():
                ctx.value = run(*ctx.leaves)
            return ctx.value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        wanted = [one for one in ctx.leaves if one.requires_grad]
        with exact_products(gradient.device.type):
            found = iter(torch.autograd.grad(ctx.value, wanted, gradient, retain_graph=True))
        return None, *(next(found) if one.requires_grad else None for one in ctx.leaves)


def as_samples(name: str, x: Given) -> Samples:
    """Returns a tensor as rows of float32 or better.

    Raises:
        ValueError: If it is sparse, complex, empty or not finite.
    """
    if x.layout is not torch.strided:
        raise ValueError(f"{name} is sparse: pass {name}.to_dense()")
    if x.is_complex():
        raise ValueError(f"{name} is complex: pass torch.view_as_real({name})")
    if x.dim() == 0 or not x.numel():
        raise ValueError(f"{name} has shape {tuple(x.shape)}: give samples along the first dimension, with features")
    rows = x.reshape(len(x), -1)
    rows = rows if x.dtype == torch.float64 else rows.float()
    if not bool(rows.isfinite().all()):
        raise ValueError(
            f"{name} holds values that are not finite: look for bad values in the data, or lower the learning rate"
        )
    return rows


def check_epsilon(epsilon: float) -> None:
    """Refuses a ridge that is not positive."""
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon}: the ridge must be positive, such as 1e-5")
