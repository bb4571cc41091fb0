r"""Dependence between representations: HSIC, its normalised form and CKA, with kernels, fast forms and analytic gradients.

| form | when | cost of m samples of d features |
|---|---|---|
| exact (dual) | `Gaussian`, or more features than samples | $m^2d$, normalised $+ m^3$ |
| exact (primal) | `Linear`, `Cosine` with d < m | $md^2$, normalised $+ d^3$ |
| `Fourier` | Gaussian, m above some thousands | $mdD + mD^2$, normalised $+ D^3$ |
| `Nystrom` | any kernel, m above some thousands | $mld + ml^2 + l^3$ |
| ``block_size`` b | a running estimate over many samples | $mbd$, normalised $+ mb^2$ |
"""

from lockfree.hsic.bottleneck import Bottleneck, NormalisedHSIC, PlainHSIC, PlausibleHSIC
from lockfree.hsic.estimators import above_chance, cka, hsic, nhsic
from lockfree.hsic.kernels import Cosine, Fourier, Gaussian, Grouped, Kernel, Linear, Nystrom, ProductKernel

__all__ = [
    "Bottleneck",
    "Cosine",
    "Fourier",
    "Gaussian",
    "Grouped",
    "Kernel",
    "Linear",
    "NormalisedHSIC",
    "Nystrom",
    "PlainHSIC",
    "PlausibleHSIC",
    "ProductKernel",
    "above_chance",
    "cka",
    "hsic",
    "nhsic",
]
