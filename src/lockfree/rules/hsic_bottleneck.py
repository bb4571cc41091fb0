"""The HSIC bottleneck: each block keeps what its output has to do with the targets, and forgets the input."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from lockfree.choose import choose
from lockfree.hsic import (
    Bottleneck,
    Cosine,
    Fourier,
    Gaussian,
    Grouped,
    Kernel,
    Linear,
    NormalisedHSIC,
    Nystrom,
    PlainHSIC,
    PlausibleHSIC,
    ProductKernel,
)
from lockfree.objective import describe
from lockfree.precision import exact_products
from lockfree.readouts import Classifier, Heads, OneHot, Readout
from lockfree.rule import Card, Clock, Context, Needs, Place, Rule, Site, Trained
from lockfree.values import Credit, Values, tensors

_OBJECTIVES = {
    "nhsic": lambda rule: NormalisedHSIC(balance=rule.balance, epsilon=rule.epsilon),
    "hsic": lambda rule: PlainHSIC(balance=rule.balance),
    "phsic": lambda rule: PlausibleHSIC(balance=rule.balance),
}
_KERNELS = {"gaussian": Gaussian, "linear": lambda sigma: Linear(), "cosine": lambda sigma: Cosine()}
_READOUTS = {
    "classifier": lambda rule: Classifier(after=rule.format_after),
    "one-hot": lambda rule: OneHot(classes=rule.classes),
    "heads": lambda rule: Heads(head=rule.head),
}


@dataclass(frozen=True, kw_only=True)
class HSICBottleneck(Rule):
    r"""Each block descends $\mathrm{nHSIC}(Z, X) - \lambda\,\mathrm{nHSIC}(Z, Y)$ of its own output Z; no message travels.

    The credit is the objective's analytic gradient: one factorisation of an m x m matrix a block and batch, none of which
    grows with the number of blocks. What concerns the network's input X and the targets Y is made once a batch. A block that
    hands up several tensors descends the sum of their objectives.

    Attributes:
        balance: $\lambda$ (the paper's $\beta$ in the authors' code), how much knowing the targets weighs against forgetting the
            input; 0 or more. Of pHSIC it is $\gamma$, the paper's is 2.
        sigma: $\sigma$ of the Gaussian kernel, in units of one feature; one, or one for each tensor that a block hands up;
            ``None``: the median heuristic.
        sigma_x: Of the input's kernel; as ``sigma`` if ``None``.
        sigma_y: Of the targets' kernel; as ``sigma`` if ``None``.
        epsilon: $\epsilon$, the ridge of nHSIC, above 0.
        objective: "nhsic"; "hsic" (not normalised); "phsic" (no input term, Pogodin and Latham).
        kernel: "gaussian", "linear" or "cosine".
        features: Random Fourier features in place of the blocks' exact Gaussian; 0 for none.
        landmarks: Nyström landmarks in place of the blocks' exact kernel; 0 for none.
        groups: Groups of channels whose deviations the blocks' kernel is taken of; 0 for none.
        power: Power of those deviations.
        block_size: Mean over parts of so many samples instead of the whole batch; 0 for the whole.
        readout: "classifier" (the top block learns from the loss), "one-hot" (unformatted: all blocks learn by HSIC, units are
            matched to classes) or "heads" (a linear head on each block).
        format_after: Batches after which blocks are frozen and the classifier begins (format training); 0: it learns along.
        head: Block whose head is read.
        classes: Number of classes; as many as the model has scores if ``None``.
        learning_rate: Of the heads' Adam.
        seed: What random features are drawn from.

    Raises:
        ValueError: If a number is out of range or a name misspelt.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.HSICBottleneck(balance=100.0).needs(lf.Place(0, 4)).name
        'TARGET'

    Reference:
        Ma, Lewis, Kleijn 2019, "The HSIC bottleneck: deep learning without back-propagation", arXiv 1908.01580, equation 10.
    """

    balance: float = 50.0
    sigma: float | tuple[float, ...] | None = 5.0
    sigma_x: float | None = None
    sigma_y: float | None = None
    epsilon: float = 1e-5
    objective: str = "nhsic"
    kernel: str = "gaussian"
    features: int = 0
    landmarks: int = 0
    groups: int = 0
    power: float = 1.0
    block_size: int = 0
    readout: str = "classifier"
    format_after: int = 0
    head: int = -1
    classes: int | None = None
    learning_rate: float = 1e-3
    seed: int = 0

    card: ClassVar[Card] = Card(
        title="HSIC bottleneck",
        summary="Each block keeps what depends on the targets and forgets the input, by a kernel measure of dependence.",
        reference="Ma, Lewis, Kleijn 2019, The HSIC bottleneck: deep learning without back-propagation, arXiv 1908.01580",
        bibtex=(
            "@inproceedings{ma2020hsic, title={The {HSIC} Bottleneck: Deep Learning without Back-Propagation}, "
            "author={Ma, Wan-Duo Kurt and Lewis, J. P. and Kleijn, W. Bastiaan}, "
            "booktitle={AAAI Conference on Artificial Intelligence}, year={2020}}"
        ),
    )

    def __post_init__(self) -> None:
        for name in ("features", "landmarks", "groups", "block_size", "format_after"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or more")
        if self.block_size == 1:
            raise ValueError("block_size=1: dependence is between samples, give 2 or more, or 0 for the whole batch")
        if self.classes is not None and self.classes < 1:
            raise ValueError(f"classes={self.classes}: give 1 or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: give a number above 0")
        if self.features and self.landmarks:
            raise ValueError("features and landmarks are two ways to approximate a kernel: give one of them")
        if not self._sigmas:
            raise ValueError("sigma=(): give one sigma, or one for each tensor that a block hands up")
        if self.features and (self.kernel != "gaussian" or None in self._sigmas):
            raise ValueError("random features approximate a Gaussian kernel with a given sigma: leave features out")
        if self.format_after and self.readout != "classifier":
            raise ValueError(
                f"format_after={self.format_after} formats a classifier, which readout={self.readout!r} has none of"
            )
        for sigma in (*self._sigmas, self.sigma_x, self.sigma_y):
            Gaussian(sigma)
        choose(_READOUTS, self.readout, "readout")
        _ = self._bottleneck, self._block_kernels  # refuses what is out of range

    # ---- what the fields stand for -------------------------------------------------------------------------------------------

    @cached_property
    def _bottleneck(self) -> Bottleneck:
        return choose(_OBJECTIVES, self.objective, "objective")(self)

    @cached_property
    def _readout(self) -> Readout:
        return _READOUTS[self.readout](self)

    @property
    def _sigmas(self) -> tuple[float | None, ...]:
        return tuple(self.sigma) if isinstance(self.sigma, tuple | list) else (self.sigma,)

    @cached_property
    def _block_kernels(self) -> list[Kernel]:
        """The kernels of a block's tensors, one for each sigma."""
        return [self._block_kernel(sigma) for sigma in self._sigmas]

    def _block_kernel(self, sigma: float | None) -> Kernel:
        kernel: Kernel = self._exact_kernel(sigma)
        if self.features:
            assert sigma is not None
            kernel = Fourier(sigma, count=self.features, seed=self.seed)
        if self.groups:
            kernel = Grouped(kernel, groups=self.groups, power=self.power)
        return Nystrom(kernel, count=self.landmarks, seed=self.seed) if self.landmarks else kernel

    def _exact_kernel(self, sigma: float | None) -> ProductKernel:
        return choose(_KERNELS, self.kernel, "kernel")(sigma)

    # ---- where and when ------------------------------------------------------------------------------------------------------

    def needs(self, place: Place) -> Needs:
        return Needs.ABOVE if self._readout.supervises(place) else Needs.TARGET

    def passes_on(self, place: Place) -> bool:
        return self._readout.supervises(place)

    def auxiliary_needs(self, place: Place) -> Needs | None:
        return self._readout.auxiliary_needs(place)

    def clock(self, cells: int) -> Clock | None:
        if not self._readout.paced:
            return None
        return Clock(lambda cell, batch: self._readout.pace(Place(cell, cells), batch), lambda cell, batch: True)

    # ---- learning ------------------------------------------------------------------------------------------------------------

    def build(self, site: Site) -> nn.Module | None:
        if site.rehearsal is not None and not self._readout.supervises(site.place):
            self._check_sigmas(site.place, len(site.outputs))
        return self._readout.build(site)

    def auxiliary_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.learning_rate, fused=True)

    def learn(self, context: Context) -> Tensor | None:
        return self._readout.learn(context)

    def predict(self, trained: Trained, inputs: Values) -> Values:
        return self._readout.predict(trained, inputs)

    def credit(self, context: Context) -> Credit | None:
        if self._readout.supervises(context.place):
            return context.above
        if not context.outputs:  # frozen up to here: there is nothing to have a gradient
            return ()
        self._check_sigmas(context.place, len(context.outputs))
        each = 1 if len(self._sigmas) > 1 else len(context.outputs)
        kernels, sigmas = self._block_kernels * each, self._sigmas * each
        with exact_products(context.outputs[0].device.type):
            triples = zip(context.outputs, kernels, sigmas, strict=True)
            return tuple(self._gradient(context, y, kernel, sigma) for y, kernel, sigma in triples)

    def _check_sigmas(self, place: Place, outputs: int) -> None:
        if len(self._sigmas) not in (1, outputs):
            raise ValueError(
                f"sigma={self.sigma}: block {place.index} hands up {outputs} tensor(s) to learn; give one sigma, or one for each"
            )

    def _gradient(self, context: Context, y: Tensor, kernel: Kernel, sigma: float | None) -> Tensor:
        rows = _rows(y)
        parts = self._constants(context, sigma)
        found = [self._bottleneck.gradient(kernel, rows[part], constants) for part, constants in parts]
        gradient = found[0] if len(found) == 1 else torch.cat(found).div_(len(found))
        if len(gradient) < len(rows):  # a last part of fewer samples is left out
            gradient = torch.cat([gradient, gradient.new_zeros(len(rows) - len(gradient), rows.shape[1])])
        return gradient.view_as(y)

    def _constants(self, context: Context, sigma: float | None) -> list[tuple[slice, Tensor]]:
        """Returns what X and Y contribute, for each part of the batch; made by the first block, used by all."""
        shared, key = context.shared, f"hsic {sigma}"
        if "hsic products" not in shared:
            dtype = torch.promote_types(context.outputs[0].dtype, torch.float32)
            # The cosine, alone of the kernels, is not the same from elsewhere.
            inputs = _products_of_inputs(context.source, dtype, centred=self.kernel != "cosine")
            shared["hsic products"] = inputs, _products_of_targets(context, dtype)
        if key not in shared:
            kernels = [self._exact_kernel(sigma if own is None else own) for own in (self.sigma_x, self.sigma_y)]
            sides = list(zip(kernels, shared["hsic products"], strict=True))
            shared[key] = [
                (part, self._bottleneck.constants(*(kernel.of_products(p[part, part], d) for kernel, (p, d) in sides)))
                for part in self._parts(context.samples)
            ]
        return shared[key]

    def _parts(self, samples: int) -> Iterator[slice]:
        size = min(self.block_size or samples, samples)
        yield from (slice(start, start + size) for start in range(0, samples - size + 1, size))


def _rows(y: Tensor) -> Tensor:
    """Returns samples as rows of float32 or better."""
    rows = y.flatten(1) if y.dim() > 1 else y[:, None]
    return rows if rows.dtype == torch.float64 else rows.float()


def _products_of_inputs(source: Values, dtype: torch.dtype, *, centred: bool) -> tuple[Tensor, int]:
    """Returns the products of all that the network is given, and the number of its features; word numbers are categories."""
    found = [
        _agreement(x, dtype) if x.dtype in (torch.int32, torch.int64) else _products(x, dtype, centred=centred)
        for x in tensors(source)
    ]
    products, dimension = found[0]
    for more, places in found[1:]:
        products, dimension = products + more, dimension + places
    return products, dimension


def _products_of_targets(context: Context, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Returns the products of centred one-hot rows, or of real-valued targets, and the number of features."""
    target = context.target
    if not isinstance(target, Tensor) or not target.dim() or len(target) != context.samples:
        raise ValueError(
            f"the HSIC bottleneck wants targets along the first dimension, ({context.samples}, ...), they are {describe(target)}"
        )
    if target.is_floating_point():
        return _products(target, dtype, centred=True)
    assert context.scores_shape is not None
    agreement, positions = _agreement(target, dtype)
    classes = max(context.scores_shape.numel() // positions, 1)
    return agreement.sub_(positions / classes), positions * classes


def _products(x: Tensor, dtype: torch.dtype, *, centred: bool) -> tuple[Tensor, int]:
    rows = x.detach().reshape(len(x), -1).to(dtype)
    if centred:
        rows = rows - rows.mean(0)  # takes off what would cancel
    return rows @ rows.T, rows.shape[1]


def _agreement(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Returns at how many places two samples hold the same number, the product of their one-hot rows, and how many places."""
    columns = numbers.reshape(len(numbers), -1).T
    agreeing = columns.new_zeros(len(numbers), len(numbers), dtype=dtype)
    for column in columns:
        agreeing += column[:, None] == column
    return agreeing, len(columns)
