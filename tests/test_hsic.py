"""Dependence measures: values and gradients against the papers' formulas, approximations, precision, bad input."""

import importlib.util
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import lockfree.hsic.estimators
from lockfree.hsic import (
    Cosine,
    Fourier,
    Gaussian,
    Grouped,
    Linear,
    NormalisedHSIC,
    Nystrom,
    PlainHSIC,
    PlausibleHSIC,
    above_chance,
    cka,
    hsic,
    nhsic,
)
from lockfree.hsic.estimators import IndefiniteError, ridged_factor
from lockfree.hsic.kernels import centred
from lockfree.precision import exact_products

F32, F64 = torch.float32, torch.float64

# ---- the papers' formulas, of arrays for values and of tensors for plain autograd ----------------------------------------------


def library(x):
    return torch if isinstance(x, Tensor) else np


def naive_gaussian(sigma):
    def gram(x):
        apart = ((x[:, None] - x[None]) ** 2).sum(-1)
        twice = 2 * sigma**2 * x.shape[1] if sigma else naive_median(x)
        return library(x).exp(-apart / twice)

    return gram


def naive_median(x):
    """The median squared distance of two samples; the lower one of two."""
    rows = x.detach().numpy() if isinstance(x, Tensor) else x
    apart = sorted(((a - b) ** 2).sum() for a, b in itertools.combinations(rows, 2))
    return apart[(len(apart) - 1) // 2]


def naive_cosine(x):
    length = (x**2).sum(1) ** 0.5
    return x @ x.T / (length[:, None] * length)


def naive_deviations(x, groups, power, delta):
    found = []
    for group in range(groups):
        part = x[:, [c for c in range(x.shape[1]) if c * groups // x.shape[1] == group]]
        variance = ((part - part.mean(1)[:, None]) ** 2).mean(1)
        found.append((delta + variance) ** (power / 2))
    return library(x).stack(found).T


def centring(K):
    lib = library(K)
    return lib.eye(len(K), dtype=lib.float64) - 1 / len(K)


def naive_biased(K, L):
    H = centring(K)
    return (K @ H @ L @ H).trace() / (len(K) - 1) ** 2


def naive_unbiased(K, L):
    """Song et al. 2012, equation 5."""
    m, lib = len(K), library(K)
    K, L = K * (1 - lib.eye(m, dtype=lib.float64)), L * (1 - lib.eye(m, dtype=lib.float64))
    terms = (K @ L).trace() + K.sum() * L.sum() / ((m - 1) * (m - 2)) - 2 * (K @ L).sum() / (m - 2)
    return terms / (m * (m - 3))


def naive_smoother(K, epsilon):
    H, lib = centring(K), library(K)
    return H @ K @ H @ lib.linalg.inv(H @ K @ H + epsilon * len(K) * lib.eye(len(K), dtype=lib.float64))


def naive_nhsic(K, L, epsilon=1e-5):
    return (naive_smoother(K, epsilon) @ naive_smoother(L, epsilon)).trace()


def naive_cka(K, L, criterion=naive_biased):
    return criterion(K, L) / (criterion(K, K) * criterion(L, L)) ** 0.5


def naive_above_chance(K, L, epsilon=1e-5):
    """The mean of nHSIC over all permutations is tr R_x tr R_y / (m - 1): the mean of a permuted R_y is tr R_y / (m - 1) H."""
    R, S = naive_smoother(K, epsilon), naive_smoother(L, epsilon)
    return (R @ S).trace() - R.trace() * S.trace() / (len(K) - 1)


KERNELS = {
    "gaussian": (Gaussian(1.0), naive_gaussian(1.0)),
    "narrow": (Gaussian(0.4), naive_gaussian(0.4)),
    "median": (Gaussian(None), naive_gaussian(None)),
    "linear": (Linear(), lambda x: x @ x.T),
    "cosine": (Cosine(), naive_cosine),
}
GROUPED = {
    "grouped cosine": (Grouped(Cosine(), groups=2), lambda x: naive_cosine(naive_deviations(x, 2, 1, 1e-6))),
    "grouped gaussian": (
        Grouped(Gaussian(0.5), groups=1, power=0.2, delta=0.1),
        lambda x: naive_gaussian(0.5)(naive_deviations(x, 1, 0.2, 0.1)),
    ),
    "grouped linear": (
        Grouped(Linear(), groups=2, power=3.0, delta=0.1),
        lambda x: (lambda g: g @ g.T)(naive_deviations(x, 2, 3.0, 0.1)),
    ),
}


def of_features(kernel):
    return kernel, lambda x: kernel.features(x) @ kernel.features(x).T


APPROXIMATE = {
    "fourier": of_features(Fourier(1.0, count=5)),
    "fourier of many": of_features(Fourier(1.0, count=30)),
    "nystrom": of_features(Nystrom(Gaussian(1.0), count=4)),
    "nystrom of all": of_features(Nystrom(Gaussian(1.0), count=30)),
    "nystrom cosine": of_features(Nystrom(Cosine(), count=3)),
}
MEASURES = {
    "hsic": (hsic, naive_biased),
    "hsic unbiased": (lambda *xy, **more: hsic(*xy, estimator="unbiased", **more), naive_unbiased),
    "nhsic": (lambda *xy, **more: nhsic(*xy, epsilon=1e-3, **more), lambda K, L: naive_nhsic(K, L, 1e-3)),
    "cka": (cka, naive_cka),
    "cka unbiased": (
        lambda *xy, **more: cka(*xy, estimator="unbiased", **more),
        lambda K, L: naive_cka(K, L, naive_unbiased),
    ),
}


def pair(seed, m, d, other, dtype=F64):
    """Two dependent sets of samples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, d, generator=generator, dtype=F64)
    y = x @ torch.randn(d, other, generator=generator, dtype=F64) / d**0.5 + torch.randn(
        m, other, generator=generator, dtype=F64
    )
    return x.to(dtype), y.to(dtype)


def close(found, wanted, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=found.dtype), rtol=rtol, atol=atol)


# ---- values --------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@example(m=4, d=1, other=1, kernels=("cosine", "cosine"), image=False, seed=1)
@given(
    m=st.integers(4, 24),
    d=st.integers(1, 30),
    other=st.integers(1, 30),
    kernels=st.tuples(st.sampled_from(sorted(KERNELS)), st.sampled_from(sorted(KERNELS))),
    image=st.booleans(),
    seed=st.integers(0, 999),
)
def test_values_are_those_of_the_papers(m, d, other, kernels, image, seed):
    x, y = pair(seed, m, d, other)
    (kernel_x, gram_x), (kernel_y, gram_y) = (KERNELS[name] for name in kernels)
    K, L = gram_x(x.numpy()), gram_y(y.numpy())
    shaped = (x.view(m, 1, d, 1), y.view(m, 1, 1, other)) if image else (x, y)
    for name, (measure, naive) in MEASURES.items():
        if name == "cka unbiased" and min(m / 5, d, other) <= 1:
            continue  # cosines of one feature and U-centred matrices of four samples may be 0 on both sides
        if name.startswith("cka") and min(np.ptp(K), np.ptp(L)) < 1e-12:  # cosines of one feature that has one sign
            with pytest.raises(ValueError, match="does not vary"):
                measure(*shaped, kernel_x=kernel_x, kernel_y=kernel_y)
            continue
        close(measure(*shaped, kernel_x=kernel_x, kernel_y=kernel_y), naive(K, L), rtol=1e-7, atol=1e-11)
    own = cka(*shaped[:1] * 2, kernel_x=kernel_x, kernel_y=kernel_x) if d > 1 else torch.ones((), dtype=F64)
    close(own, 1.0)


@pytest.mark.parametrize("sigma", [0.5, 5.0, None])
def test_sigma_names_a_gaussian_of_each_side(sigma):
    x, y = pair(1, 15, 6, 3)
    K, L, default = naive_gaussian(sigma)(x.numpy()), naive_gaussian(2.0)(y.numpy()), naive_gaussian(5.0)(y.numpy())
    close(hsic(x, y, sigma_x=sigma, sigma_y=2.0), naive_biased(K, L))
    close(nhsic(x, y, sigma_x=sigma, sigma_y=2.0, epsilon=1e-3), naive_nhsic(K, L, 1e-3))
    close(cka(y, x, sigma_x=2.0, sigma_y=sigma), naive_cka(K, L))
    close(nhsic(x, y, sigma_x=sigma), naive_nhsic(K, default, 1e-5), rtol=1e-8)


@pytest.mark.parametrize("name", [*KERNELS, *GROUPED])
def test_a_gram_matrix_is_the_kernel_of_each_two_samples(name):
    kernel, naive = {**KERNELS, **GROUPED}[name]
    x, _ = pair(2, 9, 7, 1)
    close(kernel.gram(x), naive(x.numpy()))
    if name != "median":  # whose bandwidth is the given samples'
        close(kernel.between(x[:4], x[4:]), naive(x.numpy())[:4, 4:])
    H = torch.tensor(centring(x.numpy()))
    close(H @ kernel.contrast(x) @ H, H @ kernel.gram(x) @ H)
    half = torch.zeros(2, 7, dtype=F64)
    assert Cosine().gram(half).eq(0).all()


@pytest.mark.parametrize("kernel", [Linear(), Cosine()], ids=["linear", "cosine"])
@pytest.mark.parametrize("name", [*MEASURES, "above_chance"])
def test_primal_and_dual_form_agree(name, kernel):
    """Features that are always 0 change no product, though they make the dual form the cheaper one."""
    measure = above_chance if name == "above_chance" else MEASURES[name][0]
    x, y = pair(3, 12, 4, 5)
    found = []
    for wide_x, wide_y in itertools.product([False, True], repeat=2):
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        given = [F.pad(leaf, (0, 12)) if wide else leaf for leaf, wide in zip(leaves, (wide_x, wide_y), strict=True)]
        assert [kernel.features(one).shape[1] < 12 for one in given] == [not wide_x, not wide_y]
        value = measure(*given, kernel_x=kernel, kernel_y=kernel)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["hsic", "hsic unbiased", "nhsic"])
@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_blocks_are_measured_one_by_one(name, kernel):
    measure, naive = MEASURES[name]
    (kernel, gram), (x, y) = KERNELS[kernel], pair(4, 23, 3, 6)
    both = {"kernel_x": kernel, "kernel_y": kernel}
    parts = [(gram(x.numpy()[s : s + 5]), gram(y.numpy()[s : s + 5])) for s in range(0, 20, 5)]  # the last three are left out
    close(measure(x, y, block_size=5, **both), np.mean([naive(K, L) for K, L in parts]))
    assert torch.equal(measure(x, y, block_size=23, **both), measure(x, y, **both))


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_sums_are_taken_in_float32_or_better(name, kernel):
    measure, naive = MEASURES[name]
    (kernel, gram), (x, y) = KERNELS[kernel], pair(5, 14, 5, 20)
    both = {"kernel_x": kernel, "kernel_y": kernel}
    for dtype in (torch.float16, torch.bfloat16, F32, F64, torch.int64, torch.uint8, torch.bool):
        a, b = ((3 * one).relu().to(dtype) for one in (x, y))
        better = F64 if dtype == F64 else F32
        found = measure(a, b, **both)
        assert found.dtype == better
        assert torch.equal(found, measure(a.to(better), b.to(better), **both))
        wanted = naive(gram(a.double().numpy()), gram(b.double().numpy()))
        close(found, wanted, rtol=1e-9 if dtype == F64 else 2e-4, atol=1e-12 if dtype == F64 else 1e-6)
    mixed = measure(x.float(), y, **both)
    assert mixed.dtype == F64
    assert torch.equal(mixed, measure(x.float().double(), y, **both))


def test_the_gaussian_of_near_samples_keeps_its_digits_in_float32():
    """At sigma 5 and features of 1e-3 every k is within 1e-7 of 1, which float32 cannot tell from 1."""
    x, y = (1e-3 * one for one in pair(6, 20, 8, 8, F32))
    x, y = x + 3, y - 2
    K, L = (naive_gaussian(5.0)(one.double().numpy()) for one in (x, y))
    close(hsic(x, y), naive_biased(K, L), rtol=1e-3, atol=0)
    close(cka(x, y), naive_cka(K, L), rtol=1e-3, atol=0)


def test_independent_samples_give_nothing_on_average_or_about_one_over_m():
    """Gretton et al. 2005: E HSIC_b = (1 - E k)(1 - E l) / m to first order; E k is that of normal samples, (1 + 2/s^2 d)^(-d/2)."""
    generator = torch.Generator().manual_seed(7)
    for m, draws in ((16, 300), (64, 100)):
        biased, unbiased = [], []
        for _ in range(draws):
            x, y = torch.randn(2, m, 3, generator=generator, dtype=F64)
            biased.append(hsic(x, y, sigma_x=1.0, sigma_y=1.0).item())
            unbiased.append(hsic(x, y, sigma_x=1.0, sigma_y=1.0, estimator="unbiased").item())
        assert abs(np.mean(unbiased)) < 3 * np.std(unbiased) / draws**0.5
        typical = (1 + 2 / 3) ** -1.5
        assert m * np.mean(biased) == pytest.approx((1 - typical) ** 2, rel=1.5 / m + 0.05)


def test_what_is_above_chance_is_the_normalised_hsic_less_its_mean_over_permutations():
    x, y = pair(8, 30, 5, 3)
    for kernel, gram in (KERNELS["gaussian"], KERNELS["linear"]):
        K, L = gram(x.numpy()), gram(y.numpy())
        found = above_chance(x, y, epsilon=1e-2, kernel_x=kernel, kernel_y=kernel)
        R, S = naive_smoother(K, 1e-2), naive_smoother(L, 1e-2)
        orders = [np.random.default_rng(seed).permutation(30) for seed in range(200)]
        shuffled = [(R * S[order][:, order]).sum() for order in orders]
        spread = np.std(shuffled)
        assert found.item() == pytest.approx(naive_above_chance(K, L, 1e-2), rel=1e-6)
        assert found.item() == pytest.approx((R * S).sum() - np.mean(shuffled), abs=4 * spread / 200**0.5)
        assert found > 2 * spread
    independent = [above_chance(*torch.randn(2, 30, 20, generator=torch.Generator().manual_seed(s))).item() for s in range(30)]
    assert abs(np.mean(independent)) < 3 * np.std(independent) / 30**0.5
    assert max(map(abs, independent)) < 0.1 * nhsic(*torch.randn(2, 30, 20, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("kernels", list(itertools.combinations(KERNELS, 2)), ids=" and ".join)
@pytest.mark.parametrize("name", MEASURES)
def test_neither_the_order_of_the_two_nor_that_of_the_samples_matters(name, kernels):
    measure = MEASURES[name][0]
    (a, _), (b, _) = (KERNELS[one] for one in kernels)
    x, y = pair(9, 11, 4, 15)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    value = measure(x, y, kernel_x=a, kernel_y=b)
    close(measure(y, x, kernel_x=b, kernel_y=a), value, rtol=1e-8)
    close(measure(x[order], y[order], kernel_x=a, kernel_y=b), value, rtol=1e-8)


def test_what_leaves_distances_or_angles_alone_changes_nothing():
    x, y = pair(10, 18, 6, 4)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=F64))
    linear, cosine = ({"kernel_x": kernel, "kernel_y": kernel} for kernel in (Linear(), Cosine()))
    for estimator in ("biased", "unbiased"):
        close(cka(3 * x @ rotation + 5, y, estimator=estimator, **linear), cka(x, y, estimator=estimator, **linear))
        close(hsic(x @ rotation - 7, y, estimator=estimator), hsic(x, y, estimator=estimator))
        close(hsic(4 * x, y, sigma_x=None, estimator=estimator), hsic(x, y, sigma_x=None, estimator=estimator))
        close(hsic(x * torch.rand(18, 1) + x, y, estimator=estimator, **cosine), hsic(x, y, estimator=estimator, **cosine))
    close(nhsic(x @ rotation, y), nhsic(x, y), rtol=1e-7)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_alignment_does_not_depend_on_the_scale_in_float32(estimator, scale):
    x, y = pair(11, 40, 10, 10, F32)
    for both in ((x, y), (x.repeat(1, 5), y.repeat(1, 5))):
        one, other = (
            cka(*(k * one for one in both), kernel_x=Linear(), kernel_y=Linear(), estimator=estimator) for k in (1, scale)
        )
        close(other, one, rtol=1e-3, atol=1e-4)


# ---- gradients -----------------------------------------------------------------------------------------------------------------

ALL = {**KERNELS, **GROUPED, **APPROXIMATE}


@pytest.mark.parametrize("wide", [False, True], ids=["d below m", "d above m"])
@pytest.mark.parametrize("kernel", ALL)
@pytest.mark.parametrize("name", MEASURES)
def test_gradients_are_those_of_the_naive_formula(name, kernel, wide):
    """Of both sides, of which the second has another kernel; the median of the bandwidth counts as a constant."""
    measure, naive = MEASURES[name]
    x, y = pair(12, 8, 11 if wide else 5, 6)
    (one, gram_x), (other, gram_y) = ALL[kernel], KERNELS["linear" if "gaussian" in kernel else "gaussian"]
    wanted, found = [], []
    for values, function in ((wanted, None), (found, measure)):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        value = function(a, b, kernel_x=one, kernel_y=other) if function else naive(gram_x(a), gram_y(b))
        values.extend([value.detach(), *torch.autograd.grad(value, (a, b))])
    assert wanted[1].abs().max() > 1e-6
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    if kernel != "median":
        assert torch.autograd.gradcheck(
            lambda a, b: measure(a, b, kernel_x=one, kernel_y=other), (a, b), fast_mode=True, atol=1e-6, eps=1e-7
        )


@pytest.mark.parametrize("kernel", ["gaussian", "linear", "cosine", "fourier"])
def test_blocks_and_what_is_above_chance_have_gradients(kernel):
    (kernel, _), (x, y) = ALL[kernel], pair(13, 9, 3, 4)
    both = {"kernel_x": kernel, "kernel_y": kernel}
    leaves = [x.requires_grad_(), y.requires_grad_()]
    for function in (
        lambda a, b: hsic(a, b, block_size=4, **both),
        lambda a, b: nhsic(a, b, block_size=4, epsilon=1e-3, **both),
        lambda a, b: above_chance(a, b, epsilon=1e-3, **both),
    ):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-6, eps=1e-7)


def test_gradients_come_in_the_precision_of_the_samples():
    x, y = pair(14, 10, 4, 4, torch.bfloat16)
    for kernel in (Gaussian(1.0), Linear()):
        half, single = x.clone().requires_grad_(), x.float().requires_grad_()
        for leaf in (half, single):
            hsic(leaf, y, kernel_x=kernel, kernel_y=kernel).backward()
        assert half.grad.dtype == torch.bfloat16
        assert torch.equal(half.grad, single.grad.bfloat16())


# ---- the bottleneck's objectives -----------------------------------------------------------------------------------------------


def naive_plausible(K, L):
    return ((K - K.mean()) * L).mean()


OBJECTIVES = {
    "normalised": (
        NormalisedHSIC(balance=3.0, epsilon=1e-3),
        lambda K, X, Y: naive_nhsic(K, X, 1e-3) - 3 * naive_nhsic(K, Y, 1e-3),
        lambda X, Y: naive_smoother(X, 1e-3) - 3 * naive_smoother(Y, 1e-3),
    ),
    "plain": (
        PlainHSIC(balance=3.0),
        lambda K, X, Y: naive_biased(K, X) - 3 * naive_biased(K, Y),
        lambda X, Y: centring(X) @ (X - 3 * Y) @ centring(X) / (len(X) - 1) ** 2,
    ),
    "plausible": (
        PlausibleHSIC(balance=3.0),
        lambda K, X, Y: naive_plausible(K, K) - 3 * naive_plausible(K, Y),
        lambda X, Y: -3 * (Y - Y.mean()) / len(X) ** 2,
    ),
}


@pytest.mark.parametrize("wide", [False, True], ids=["d below m", "d above m"])
@pytest.mark.parametrize("kernel", ALL)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_knows_its_gradient(name, kernel, wide):
    """That of plain autograd through the naive formula; going against it lowers the objective at the rate |gradient|^2."""
    objective, naive, naive_constants = OBJECTIVES[name]
    kernel, gram = ALL[kernel]
    z, x = pair(15, 10, 13 if wide else 6, 7)
    y = F.one_hot(torch.arange(10) % 3).to(F64)
    X, Y = naive_gaussian(1.0)(x), naive_cosine(y)
    seen = (X, Y) if name == "plausible" else (Gaussian(1.0).contrast(x), Cosine().contrast(y))
    constants = objective.constants(*seen)
    close(constants, naive_constants(X, Y), rtol=1e-8, atol=1e-11)

    before = constants.clone()
    found = objective.gradient(kernel, z, constants)
    leaf = z.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(naive(gram(leaf), X, Y), leaf)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    assert torch.equal(constants, before)  # other blocks need them, too
    assert not found.requires_grad

    slope = found.square().sum()
    step = 1e-6 / slope.sqrt()
    if kernel != Gaussian(None):  # whose bandwidth moves with the samples
        lower, higher = (naive(gram(z + sign * step * found), X, Y) for sign in (-1, 1))
        assert lower < naive(gram(z), X, Y) < higher
        close((higher - lower) / (2 * step), slope, rtol=1e-4, atol=0)


@pytest.mark.parametrize("make", [NormalisedHSIC, PlainHSIC, PlausibleHSIC])
def test_a_balance_of_zero_ignores_the_targets_and_less_is_refused(make):
    x, y = (naive_gaussian(1.0)(one) for one in pair(16, 8, 3, 3))
    assert torch.equal(make(balance=0.0).constants(x, y), make(balance=0.0).constants(x, x))
    for balance in (-1.0, math.nan):
        with pytest.raises(ValueError, match="give 0 or more"):
            make(balance=balance)


@pytest.mark.parametrize("kernel", [Gaussian(5.0), Linear(), Cosine()], ids=lambda kernel: type(kernel).__name__)
@pytest.mark.parametrize("d", [20, 100])
def test_the_gradient_in_float32_is_near_that_in_float64(kernel, d):
    """At the usual ridge and balance, in primal and dual form: the weights' rows sum to 0, and what rounding adds must not count."""
    y, found = F.one_hot(torch.arange(64) % 10), {}
    for dtype in (F32, F64):
        z, x = (one.to(dtype) for one in pair(17, 64, d, 30))
        objective = NormalisedHSIC(balance=100.0)
        constants = objective.constants(Gaussian().contrast(x), Gaussian().contrast(y.to(dtype)))
        found[dtype] = objective.gradient(kernel, z, constants).double()
    assert (found[F32] - found[F64]).norm() < 5e-3 * found[F64].norm()


# ---- approximate kernels -------------------------------------------------------------------------------------------------------


def test_the_error_of_random_features_falls_as_one_over_the_root_of_their_number():
    """One product of features has the variance 1 + k^4 / 2 - k^2: u = a w + b, v = c w + b give 2 cos u cos v."""
    x, _ = pair(18, 12, 4, 1)
    exact = Gaussian(1.0).gram(x)
    variance = (1 + exact**4 / 2 - exact**2).mean()
    errors = []
    for count in (16, 64, 256, 1024):
        found = [Fourier(1.0, count=count, seed=seed).gram(x) - exact for seed in range(40)]
        errors.append(torch.stack(found).square().mean().sqrt() * count**0.5)
        assert torch.stack(found).mean(0).abs().mean() < 3 * (variance / count / 40).sqrt()
    for error in errors:
        close(error, variance.sqrt(), rtol=0.15)


@pytest.mark.parametrize("kernel", [Gaussian(1.0), Linear(), Cosine()], ids=lambda kernel: type(kernel).__name__)
def test_landmarks_see_a_kernel_by_what_they_share_with_the_samples(kernel):
    """K_ml K_ll^-1 K_lm; the landmarks are the samples whose own k is exact."""
    x, _ = pair(19, 15, 9, 1)
    K = kernel.gram(x)
    found = Nystrom(kernel, count=6, seed=3, jitter=1e-13).gram(x)
    chosen = (found - K).diagonal().abs().argsort()[:6]
    close(found, K[:, chosen] @ torch.linalg.inv(K[chosen][:, chosen]) @ K[chosen], rtol=1e-6, atol=1e-9)
    errors = [(Nystrom(kernel, count=count, jitter=1e-13).gram(x) - K).norm() for count in (2, 4, 8, 15)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kernel", [*KERNELS, *GROUPED])
def test_all_samples_as_landmarks_give_the_kernel_itself(kernel):
    kernel, naive = {**KERNELS, **GROUPED}[kernel]
    x, y = pair(20, 8, 9, 4)
    approximate = Nystrom(kernel, count=20, jitter=1e-11)
    assert approximate.features(x).shape == (8, 8)
    close(approximate.gram(x), naive(x.numpy()), rtol=1e-6, atol=1e-7)
    close(hsic(x, y, kernel_x=approximate), naive_biased(naive(x.numpy()), naive_gaussian(5.0)(y.numpy())), rtol=1e-5)


@pytest.mark.parametrize("kernel", [Linear(), Cosine(), Gaussian(5.0)], ids=lambda kernel: type(kernel).__name__)
@pytest.mark.parametrize("d", [1, 2, 20])
def test_landmarks_can_be_many_more_than_the_directions_in_float32(kernel, d):
    x, y = pair(21, 600, d, 3, F32)
    K, L = kernel.gram(x.double()), Linear().gram(y.double())
    exact = naive_biased(K, L)
    close(hsic(x, y, kernel_x=Nystrom(kernel), kernel_y=Nystrom(Linear())), exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("make", [lambda seed: Fourier(count=6, seed=seed), lambda seed: Nystrom(count=4, seed=seed)])
def test_approximations_are_drawn_by_their_seed_alone(make):
    x, y = pair(22, 10, 3, 3)
    first = []
    for ambient in (0, 1):
        torch.manual_seed(ambient)
        state = torch.get_rng_state()
        first.append(make(5).features(x))
        hsic(x, y, kernel_x=make(5), kernel_y=make(6))
        above_chance(x, y)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*first)
    assert not torch.allclose(make(6).features(x), first[0])
    close(make(5).features(x.float()), first[0].float(), rtol=1e-3, atol=1e-3)  # the same numbers in any precision
    assert torch.autograd.gradcheck(make(5).features, x.requires_grad_())


# ---- precision -----------------------------------------------------------------------------------------------------------------

SURROUNDINGS = [(True, "highest"), (False, "high"), (False, "medium"), (True, "medium")]


@pytest.fixture
def _ambient():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def surrounded(function, low, precision):
    torch.set_float32_matmul_precision(precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        found = function()
        assert torch.is_autocast_enabled("cpu") == low
    assert torch.get_float32_matmul_precision() == precision
    return found


@pytest.mark.usefixtures("_ambient")
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("kernel", ["gaussian", "linear", "cosine", "grouped cosine", "fourier", "nystrom"])
def test_values_and_gradients_do_not_depend_on_the_surrounding_precision(kernel, inside):
    """Bit for bit, wherever the gradient is asked for: outside of autocast or inside, as `autocast` around a whole step has it."""
    (kernel, _), (x, y) = ALL[kernel], pair(23, 48, 32, 32, F32)
    for measure in [measure for measure, _ in MEASURES.values()] + [above_chance]:

        def value(leaf, measure=measure):
            return measure(leaf, y, kernel_x=kernel, kernel_y=kernel)

        def both(around, value=value):
            leaf = x.clone().requires_grad_()
            if inside:
                return surrounded(lambda: (found := value(leaf), *torch.autograd.grad(found, leaf)), *around)
            found = surrounded(lambda: value(leaf), *around)
            torch.set_float32_matmul_precision("highest")
            return found, *torch.autograd.grad(found, leaf)

        plain = both((False, "highest"))
        for around in SURROUNDINGS:
            assert all(map(torch.equal, both(around), plain))


@pytest.mark.usefixtures("_ambient")
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kernel", ["gaussian", "linear", "grouped cosine", "fourier"])
def test_an_objective_can_be_kept_from_the_surrounding_precision(name, kernel):
    objective = OBJECTIVES[name][0]
    z, x = pair(24, 48, 32, 32, F32)

    def gradient():
        with exact_products("cpu"):
            constants = objective.constants(Gaussian().gram(x), Gaussian().gram(z))
            return objective.gradient(ALL[kernel][0], z, constants)

    plain = surrounded(gradient, False, "highest")
    for around in SURROUNDINGS:
        assert torch.equal(surrounded(gradient, *around), plain)


def fp32_settings():
    return [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


@pytest.mark.usefixtures("_ambient")
def test_the_surrounding_precision_is_restored_after_an_error():
    torch.set_float32_matmul_precision("medium")
    before = fp32_settings()
    x, y = pair(25, 6, 3, 3)
    for bad, message in ((x * math.nan, "not finite"), (torch.zeros_like(x), "does not vary")):
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(ValueError, match=message):
                cka(bad, y)
            assert torch.is_autocast_enabled("cpu")
        assert fp32_settings() == before
        assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.usefixtures("_ambient")
def test_the_surrounding_precision_is_restored_when_two_threads_overlap():
    """The settings are the process's, so that who leaves last, not who came first, has to restore them."""
    torch.set_float32_matmul_precision("medium")
    before = fp32_settings()
    one, other = exact_products("cpu"), exact_products("cpu")
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    inside = fp32_settings()
    other.__exit__(None, None, None)
    after = fp32_settings()
    torch.set_float32_matmul_precision("highest")
    assert inside == ["ieee", "ieee"]
    assert after == before


# ---- known numbers -------------------------------------------------------------------------------------------------------------


def relu_normal(m, d, seed=0):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=F64).relu()


def test_the_usual_sigma_makes_the_gaussian_a_linear_kernel():
    z, labels = relu_normal(128, 256), F.one_hot(torch.arange(128) % 10).to(F64)
    off = ~torch.eye(128, dtype=torch.bool)
    assert Gaussian(5.0).gram(z)[off].mean().item() == pytest.approx(0.985, abs=2e-3)
    assert Gaussian(5.0).gram(labels)[off].min().item() == pytest.approx(math.exp(-2 / 500), rel=1e-9)  # .996
    ridged = (1 - math.exp(-2 / 500)) / 10 / ((1 - math.exp(-2 / 500)) / 10 + 1e-5)  # nine directions, each K / (K + ridge)
    close(nhsic(labels[:120], labels[:120]), 9 * ridged**2, rtol=1e-6)
    for sigma, least in ((5.0, 0.9999), (1.0, 0.99)):
        found = naive_cka(naive_gaussian(sigma)(z.numpy()), (z @ z.T).numpy())
        close(cka(z, z, sigma_x=sigma, kernel_y=Linear()), found)
        assert least < found < 1


@pytest.mark.parametrize(
    ("m", "d", "chance"),
    [(128, 64, 4.27), (128, 256, 7.55), (128, 1024, 7.93), (256, 64, 2.22), (256, 256, 5.71), (512, 64, 1.2)],
)
def test_chance_levels_of_the_normalised_hsic(m, d, chance):
    """Ten classes, features that know nothing of them: between 0 and 9, and most of it where features are not few."""
    z, labels = relu_normal(m, d), F.one_hot(torch.arange(m) % 10).to(F64)
    assert nhsic(z, labels).item() == pytest.approx(chance, rel=0.05)
    assert abs(above_chance(z, labels).item()) < 0.1 * chance


# ---- what is given -------------------------------------------------------------------------------------------------------------

GOOD = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
FUNCTIONS = [hsic, nhsic, cka, above_chance]


def spoilt(value):
    x = GOOD.clone()
    x[2, 1] = value
    return x


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (spoilt(math.nan), "not finite"),
        (spoilt(math.inf), "not finite"),
        (spoilt(-math.inf).half(), "not finite"),
        (GOOD.to_sparse(), "to_dense"),
        (GOOD + 1j, "view_as_real"),
        (torch.zeros(6, 0), r"shape \(6, 0\)"),
    ],
    ids=["nan", "inf", "half inf", "sparse", "complex", "no features"],
)
def test_samples_that_cannot_be_measured_are_refused_on_either_side(bad, message, function):
    for both in ((bad, GOOD), (GOOD, bad)):
        with pytest.raises(ValueError, match=message):
            function(*both)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: hsic(x[:1], x[:1]), "2 or more"),
        (lambda x: nhsic(x[:1], x[:1]), "2 or more"),
        (lambda x: cka(x[:0], x[:0]), "2 or more"),
        (lambda x: above_chance(x[:1], x[:1]), "2 or more"),
        (lambda x: hsic(x[:3], x[:3], estimator="unbiased"), "4 or more"),
        (lambda x: cka(x[:3], x[:3], estimator="unbiased"), "4 or more"),
        (lambda x: hsic(x, x, block_size=1), "block_size=1: give 2 to"),
        (lambda x: hsic(x, x, block_size=0), "block_size=0: give 2 to"),
        (lambda x: hsic(x, x, block_size=3, estimator="unbiased"), "block_size=3: give 4 to"),
        (lambda x: hsic(x, x, block_size=7), "block_size"),
        (lambda x: nhsic(x, x, block_size=-2), "block_size"),
        (lambda x: hsic(x, x, sigma_x=0.0), "sigma=0.0: .*positive"),
        (lambda x: cka(x, x, sigma_y=-1.0), "sigma=-1.0: .*positive"),
        (lambda x: nhsic(x, x, sigma_y=math.nan), "sigma=nan: .*positive"),
        (lambda x: nhsic(x, x, epsilon=0.0), "epsilon=0.0: .*positive"),
        (lambda x: above_chance(x, x, epsilon=-1e-5), "epsilon=-1e-05: .*positive"),
        (lambda x: NormalisedHSIC(balance=1.0, epsilon=0.0), "epsilon=0.0: .*positive"),
        (lambda x: Fourier(0.0), "sigma=0.0: .*positive"),
        (lambda x: Fourier(count=0), "count=0: give 1 or more features"),
        (lambda x: Nystrom(count=0), "count=0: give 1 or more landmarks"),
        (lambda x: Nystrom(jitter=0.0), "jitter=0.0: .*above 0"),
        (lambda x: Grouped(groups=0), "groups=0: give 1 or more groups"),
        (lambda x: Grouped(power=0.0), "power=0.0: .*above 0"),
        (lambda x: Grouped(delta=-1.0), "delta=-1.0: .*above 0"),
        (lambda x: hsic(x, x, kernel_x=Grouped(groups=2)), "3 features make no 2 groups"),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(GOOD)


def test_what_the_type_checker_of_these_tests_would_catch_is_refused_without_it_too(monkeypatch):
    spec = importlib.util.spec_from_file_location("unchecked", lockfree.hsic.estimators.__file__)
    unchecked = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "unchecked", unchecked)
    spec.loader.exec_module(unchecked)
    for function in (unchecked.hsic, unchecked.cka):
        with pytest.raises(ValueError, match="estimator 'unbiassed': did you mean 'unbiased'"):
            function(GOOD, GOOD, estimator="unbiassed")
        with pytest.raises(ValueError, match="x holds 6 samples and y 5"):
            function(GOOD, GOOD[:5])
    with pytest.raises(ValueError, match="samples along the first dimension"):
        unchecked.hsic(torch.tensor(1.0), GOOD)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kernel", [*KERNELS, "grouped cosine"])
@pytest.mark.parametrize(("m", "d"), [(7, 4), (13, 60), (40, 4), (40, 60)])
def test_constant_features_depend_on_nothing(m, d, kernel, dtype):
    """Though their mean is rounded, and they do not vanish when it is taken off."""
    kernel = {**KERNELS, **GROUPED}[kernel][0]
    _, y = pair(26, m, d, 3, dtype)
    for value in (0.1, 1 / 3, 7.7):
        x = torch.linspace(value, 1, d, dtype=dtype).repeat(m, 1)
        for estimator in ("biased", "unbiased"):
            assert abs(hsic(x, y, kernel_x=kernel, estimator=estimator).item()) < 1e-8
            for both in ((x, y), (y, x)):
                sides = {"kernel_x": kernel} if both[0] is x else {"kernel_y": kernel}
                with pytest.raises(ValueError, match="does not vary"):
                    cka(*both, estimator=estimator, **sides)
        assert abs(nhsic(x, y, kernel_x=kernel).item()) < 1e-3
        assert abs(above_chance(x, y, kernel_x=kernel).item()) < 1e-3


def test_one_class_only_and_whole_numbers_are_right():
    labels = F.one_hot(torch.zeros(6, dtype=torch.int64), 4)
    for function in (hsic, nhsic, above_chance):
        assert abs(function(GOOD, labels).item()) < 1e-5
    with pytest.raises(ValueError, match="y does not vary"):
        cka(GOOD, labels)
    leaf = GOOD.clone().requires_grad_()
    (hsic(leaf, labels) + nhsic(leaf, labels)).backward()
    assert leaf.grad.abs().max() < 1e-4
    classes = torch.tensor([0, 2, 1, 2, 0, 1])  # one feature, a number
    K, L = naive_gaussian(5.0)(GOOD.double().numpy()), naive_gaussian(5.0)(classes.double().numpy()[:, None])
    close(hsic(GOOD, classes), naive_biased(K, L), rtol=1e-4)
    close(nhsic(GOOD, classes), naive_nhsic(K, L), rtol=1e-3)


def test_all_zero_samples_have_no_angle():
    x = GOOD.double()
    x[1] = 0
    K = Cosine().gram(x)
    assert K[1].eq(0).all()
    assert K[0, 2].item() == pytest.approx((x[0] @ x[2] / x[0].norm() / x[2].norm()).item())
    leaf = x.clone().requires_grad_()
    nhsic(leaf, GOOD.double(), kernel_x=Cosine()).backward()
    assert leaf.grad.isfinite().all()


def test_landmarks_of_samples_that_are_all_zero_give_the_kernel_0():
    assert hsic(torch.zeros(6, 3), GOOD, kernel_x=Nystrom(Linear())) == 0


@pytest.mark.parametrize("far", [1e4, 1e5])
def test_a_few_samples_far_from_the_rest_are_seen_in_float64(far):
    """The digits of the distances between the others are lost in float32, and with them the kernel's positiveness."""
    x, y = (one.float() for one in pair(0, 64, 8, 3))
    x[:4] += far
    with pytest.raises(IndefiniteError):
        ridged_factor(centred(Gaussian(1.0).contrast(x)), 64e-5)
    found = nhsic(x, y, sigma_x=1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), nhsic(x.double(), y.double(), sigma_x=1.0), rtol=1e-5, atol=0)
    objective, kernel = NormalisedHSIC(balance=3.0), Gaussian(1.0)
    constants = objective.constants(*(kernel.contrast(y.double()),) * 2)
    gradient = objective.gradient(kernel, x, constants.float())
    assert gradient.dtype == torch.float32
    exact = objective.gradient(kernel, x.double(), constants)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-2, atol=1e-4 * float(exact.abs().max()))
