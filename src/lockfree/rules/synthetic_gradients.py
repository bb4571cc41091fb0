"""Synthetic gradients (decoupled neural interfaces): each block predicts its own credit."""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lockfree.choose import choose
from lockfree.objective import Objective, describe
from lockfree.rule import Card, Clock, Context, Needs, Pace, Place, Rule, Site
from lockfree.stacking import CreditStack
from lockfree.synthesisers import (
    FORMS,
    Design,
    InputSynthesiser,
    LinearCredits,
    LinearSynthesiser,
    ModuleSynthesiser,
    Prediction,
    Synthesiser,
)
from lockfree.values import Credit


@dataclass(frozen=True, kw_only=True)
class SyntheticGradients(Rule):
    r"""A synthesiser M predicts the credit from the block's own output, and learns from what the block above reports.

    $$\hat\delta_i = M_i(y_i[, c]), \qquad
    L_{M_i} = \frac{1}{2m}\sum_{n=1}^m \lVert \hat\delta_{i,n} - m\,\delta_{i,n} \rVert^2, \qquad
    \delta_i = (\partial y_{i+1}/\partial y_i)^T\, \hat\delta_{i+1}/m$$

    The target is bootstrapped: it is made of the next block's synthetic credit (at the top, of the loss). The synthesiser works
    on the scale of one sample's loss, m being the batch size, so that what it learns does not move with the batch size. It sees
    detached outputs, and its last layer starts at zero, so that training starts as if the blocks below were frozen.

    Attributes:
        conditioned: Whether M also sees the label c (then the block needs TARGET, else NOTHING): class numbers as one-hot rows,
            real-valued targets of the model's output's shape (bits, a regression) as they are.
        per_class: Whether each class has a synthesiser of its own, instead of the label among its inputs.
        form: What M is: "gradient", a network that puts the gradient out; "line-search", the same without hidden layers, by steps of
            the best length; "sigmoid", a sigmoid of an affine map; "gaussian", a network that puts out mean and scale; "critic", one
            that predicts the loss and is differentiated; "sobolev", a critic whose derivative is fitted, too.
        hidden_layers: Hidden layers of M, 0 (linear) or more; each is affine, batch normalisation, ReLU. A critic needs 1.
        hidden_units: Width of a hidden layer (channels where the block's output is an image).
        kernel_size: Odd width of M's convolutions where the block's output is an image.
        matching: Weight, 0 or more, of a Sobolev critic's derivative against its value; squared gradients are much smaller numbers
            than squared losses.
        synthesiser: Your own M instead: a module, copied for each border, or a function of (an example of the output, number of
            classes to condition on, 0 for none) that returns one. It maps y, or (y, one-hot label), to a tensor of y's shape.
        borders: Blocks that get a synthesiser, 0 at the bottom; ``None`` for all but the last. The others wait for the block
            above, as in backpropagation; so ``(k,)`` makes two big blocks.
        learning_rate: Of the synthesisers' Adam, above 0 (form "line-search": parts of the best step); ``None``: a default by form
            and conditioning, found on held-out images.
        update_probability: Probability that a block learns from a batch, above 0 to 1, drawn for each block and batch. A block
            that does not learn runs forward only; the synthesiser below it has then nothing to learn from.
        block_every: Blocks learn from every so-manieth batch, 1 or more. In between they report to the synthesisers below.
        synthesiser_every: Synthesisers learn from every so-manieth batch, 1 or more.
        warm_up: Batches, 0 or more, in which the blocks learn from true gradients while the synthesisers learn and are not used.
        mix: Share of the true gradient in the credit, 0 to 1; above 0 the block waits for the one above.
        noise: Standard deviation of Gaussian noise in the credit, 0 or more, in units of the credit's root mean square over the
            batch (form "gaussian": of the predicted standard deviation; 1 samples from the prediction).
        noise_decay: Exponent with which the noise's variance falls, 0 or more: it is divided by (1 + batch)^noise_decay.
        synthetic_inputs: Whether each block but the first is trained on a prediction of its input, made from the network's by a
            model with the same hidden layers (complete unlock). `Learner.predict` uses real activations.
        seed: Of the draws of ``update_probability`` and ``noise``.

    Raises:
        ValueError: If a field is out of range, or a label-conditioned synthesiser meets a model without class scores.

    Example:
        >>> import lockfree as lf
        >>> rule = lf.rules.SyntheticGradients(conditioned=True)
        >>> rule.needs(lf.Place(0, 4)).name, rule.auxiliary_needs(lf.Place(0, 4)).name
        ('TARGET', 'ABOVE')

    Reference:
        Jaderberg et al. 2016, "Decoupled neural interfaces using synthetic gradients", arXiv 1608.05343, section 2 and
        appendix; M is $M_{i+1}$ and $\delta$ is $\delta_i$ there. Line search, sigmoid: Czarnecki et al. 2017, "Understanding
        synthetic gradients and decoupled neural interfaces", arXiv 1703.00522. Critics: Czarnecki et al. 2017, "Sobolev training for
        neural networks", arXiv 1706.04859. Annealed noise: Neelakantan et al. 2015, arXiv 1511.06807, equation 1.
    """

    conditioned: bool = False
    per_class: bool = False
    form: str = "gradient"
    hidden_layers: int = 0
    hidden_units: int = 256
    kernel_size: int = 5
    matching: float = 100.0
    synthesiser: nn.Module | Callable[[Tensor, int], nn.Module] | None = field(default=None, repr=False, compare=False)
    borders: tuple[int, ...] | None = None
    learning_rate: float | None = None
    update_probability: float = 1.0
    block_every: int = 1
    synthesiser_every: int = 1
    warm_up: int = 0
    mix: float = 0.0
    noise: float = 0.0
    noise_decay: float = 0.55
    synthetic_inputs: bool = False
    seed: int = 0

    card: ClassVar[Card] = Card(
        title="Synthetic gradients",
        summary="A small network at each block predicts the block's credit from its output (cdni: and the label).",
        reference="Jaderberg, Czarnecki, Osindero, Vinyals, Graves, Silver, Kavukcuoglu 2016, Decoupled neural interfaces using "
        "synthetic gradients, arXiv 1608.05343",
        bibtex=(
            "@inproceedings{jaderberg2017decoupled, title={Decoupled neural interfaces using synthetic gradients}, "
            "author={Jaderberg, Max and Czarnecki, Wojciech Marian and Osindero, Simon and Vinyals, Oriol and Graves, Alex and "
            "Silver, David and Kavukcuoglu, Koray}, booktitle={International Conference on Machine Learning}, year={2017}}"
        ),
    )

    def __post_init__(self) -> None:
        choose(FORMS, self.form, "form of synthesiser")
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd, so that a synthetic gradient has its output's size")
        if self.borders is not None and not self.borders:
            raise ValueError("borders=() leaves no synthesiser: name some, or leave borders out for all of them")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0")
        if not 0 < self.update_probability <= 1:
            raise ValueError(f"update_probability={self.update_probability} must be above 0 and at most 1")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix={self.mix} must be from 0 (synthetic) to 1 (true gradient)")
        if self.per_class and not self.conditioned:
            raise ValueError("per_class=True is a form of label conditioning: give conditioned=True, too")
        if self.synthesiser is not None and (self.form != "gradient" or self.per_class):
            raise ValueError('a synthesiser of your own puts gradients out: leave form at "gradient" and per_class out')
        least, most = FORMS[self.form].hidden_layers
        if self.hidden_layers < least:
            raise ValueError(
                f"form={self.form!r} needs a hidden layer, hidden_layers=1: an affine critic has one gradient for all"
            )
        if most is not None and self.hidden_layers > most:
            raise ValueError(f"form={self.form!r} has no hidden layers, not hidden_layers={self.hidden_layers}: leave them out")

    @property
    def title(self) -> str:
        parts = [self.card.title]
        parts += ["label-conditioned"] if self.conditioned else []
        parts += [f"{self.form} form"] if self.form != "gradient" else []
        parts += ["synthetic inputs"] if self.synthetic_inputs else []
        return ", ".join(parts)

    # ---- who waits for what --------------------------------------------------------------------------------------------------

    def needs(self, place: Place) -> Needs:
        if not self._synthesises(place) or self.mix > 0:
            return Needs.ABOVE
        return Needs.TARGET if self.conditioned else Needs.NOTHING

    def passes_on(self, place: Place) -> bool:
        return not self._synthesises(place) and self.block_every == 1

    def auxiliary_needs(self, place: Place) -> Needs | None:
        return FORMS[self.form].needs if self._synthesises(place) else None

    def wants_sample_losses(self) -> bool:
        return FORMS[self.form].values

    def synthesises_inputs(self, place: Place) -> bool:
        return self.synthetic_inputs and place.index > 0 and self._synthesises(Place(place.index - 1, place.count))

    def _synthesises(self, place: Place) -> bool:
        """The block under the loss has the true gradient at hand; it never gets a synthesiser."""
        for border in self.borders or ():
            if not 0 <= border < place.count - 1:
                raise ValueError(
                    f"borders={self.borders}: {place.count} blocks have borders 0 to {place.count - 2}, not {border}"
                )
        return not place.top and (self.borders is None or place.index in self.borders)

    def phases(self) -> tuple[tuple[int, Rule], ...]:
        if not self.warm_up:
            return ((0, self),)
        return ((0, replace(self, warm_up=0, mix=1.0, noise=0.0)), (self.warm_up, replace(self, warm_up=0)))

    def clock(self, cells: int) -> Clock | None:
        if self.update_probability == 1 and self.block_every == 1 and self.synthesiser_every == 1:
            return None
        # Blocks that hand credit down to each other learn together or not at all: they are one block of the paper.
        decides = [next(i for i in range(cell, cells) if self._decides(Place(i, cells))) for cell in range(cells)]

        def pace(cell: int, batch: int) -> Pace:
            if self.update_probability < 1 and self._draws(decides[cell], batch).random() >= self.update_probability:
                return Pace.REST
            return Pace.REPORT if batch % self.block_every else Pace.LEARN

        return Clock(pace, lambda _, batch: batch % self.synthesiser_every == 0)

    def _decides(self, place: Place) -> bool:
        return place.top or self.needs(place) < Needs.ABOVE

    def _draws(self, cell: int, batch: int) -> random.Random:
        """Random numbers of one cell and batch, the same wherever and whenever they are drawn."""
        return random.Random(f"{self.seed} {cell} {batch}")

    # ---- the networks --------------------------------------------------------------------------------------------------------

    def build(self, site: Site) -> nn.Module | None:
        if not self._synthesises(site.place):
            return None
        design = self._design(self._classes(site))
        return nn.ModuleList(self._synthesiser(y, design) for y in site.outputs)

    def build_inputs(self, site: Site) -> nn.Module:
        return InputSynthesiser(site.example, site.inputs, self._design(0))

    def _synthesiser(self, y: Tensor, design: Design) -> Synthesiser:
        if self.synthesiser is None:
            return FORMS[self.form].build(y, design)
        given = self.synthesiser
        made = copy.deepcopy(given) if isinstance(given, nn.Module) else given(y, design.classes)
        if not isinstance(made, nn.Module):
            raise ValueError(f"synthesiser must return a torch.nn.Module for an output and a number of classes, got {made!r}")
        return made if isinstance(made, Synthesiser) else ModuleSynthesiser(made, y, design.classes)

    def _design(self, classes: int) -> Design:
        return Design(
            classes=classes,
            per_class=self.per_class,
            hidden_layers=self.hidden_layers,
            hidden_units=self.hidden_units,
            kernel_size=self.kernel_size,
            matching=self.matching,
        )

    def _classes(self, site: Site) -> int:
        if not self.conditioned:
            return 0
        if site.scores.dim() != 2:
            shape = tuple(site.scores.shape)
            raise ValueError(f"a label-conditioned synthesiser needs class scores (batch, classes), this model gives {shape}")
        return site.scores.shape[1]

    def auxiliary_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        form, rate = FORMS[self.form], self.learning_rate
        if rate is None:
            rate = form.learning_rate or (1e-3 if self.conditioned else 3e-2)
        return form.optimizer(parameters, rate)

    # ---- learning ------------------------------------------------------------------------------------------------------------

    def credit(self, context: Context) -> Credit | None:
        if not self._synthesises(context.place):
            return context.above
        if not context.outputs:  # frozen up to here: there is nothing to have a gradient
            return ()
        context.memo = self._predict(context)
        if self.mix == 1:
            return context.above
        credit = tuple(self._consumed(context, index, prediction) for index, prediction in enumerate(context.memo))
        if self.mix == 0 or context.above is None:
            return credit
        return tuple(
            (1 - self.mix) * synthetic + (0 if true is None else self.mix * true)
            for synthetic, true in zip(credit, context.above, strict=True)
        )

    def credit_stack(self, auxiliaries: Sequence[nn.Module | None], objective: Objective) -> CreditStack | None:
        networks = [network for auxiliary in auxiliaries for network in cast("nn.ModuleList", auxiliary or [])]
        linear = len(networks) == len(auxiliaries) and all(type(network) is LinearSynthesiser for network in networks)
        if self.noise or self.mix or not linear:
            return None
        return LinearCredits(cast("list[LinearSynthesiser]", networks), _labels if self.conditioned else None)

    def keeps_plain_memos(self, auxiliary: nn.Module | None) -> bool:
        return isinstance(auxiliary, nn.ModuleList) and all(isinstance(one, Synthesiser) and one.plain for one in auxiliary)

    def memo_state(self, auxiliary: nn.Module | None, memo: list[Prediction]) -> Any:
        networks = cast("nn.ModuleList", auxiliary)
        return [cast("Synthesiser", network).store(one) for network, one in zip(networks, memo, strict=True)]

    def memo_from(self, auxiliary: nn.Module | None, state: Any) -> list[Prediction]:
        networks = cast("nn.ModuleList", auxiliary)
        return [cast("Synthesiser", network).restore(one) for network, one in zip(networks, state, strict=True)]

    def learn(self, context: Context) -> Tensor | None:
        if not context.outputs:
            return None
        # A block at rest has predicted nothing yet.
        predictions = self._predict(context) if context.memo is None else context.memo
        truths = context.above or (None,) * len(predictions)
        loss = None
        for network, prediction, truth in zip(_synthesisers(context), predictions, truths, strict=True):
            one = network.learn(prediction, truth, context.samples, context.sample_losses)
            if one is not None:
                loss = one if loss is None else loss + one
        return loss

    def _predict(self, context: Context) -> list[Prediction]:
        pairs = list(zip(_synthesisers(context), context.outputs, strict=True))
        label = _labels(context.shared, context.target, pairs[0][1], pairs[0][0].classes) if self.conditioned else None
        return [network.predict(y, label, context.samples) for network, y in pairs]

    def _consumed(self, context: Context, index: int, prediction: Prediction) -> Tensor:
        """Returns the credit that the block learns from: the prediction, with noise if there is to be any."""
        credit = prediction.credit
        if not self.noise:
            return credit
        generator = torch.Generator(credit.device)
        generator.manual_seed(self._draws(context.place.index, context.batch).getrandbits(62) + index)
        noise = torch.randn(credit.shape, generator=generator, dtype=credit.dtype, device=credit.device)
        scale = credit.square().mean().sqrt() if prediction.scale is None else prediction.scale
        return credit + noise * scale * (self.noise * (1 + context.batch) ** (-self.noise_decay / 2))


_LEAST = {
    "hidden_layers": 0,
    "hidden_units": 1,
    "kernel_size": 1,
    "matching": 0,
    "block_every": 1,
    "synthesiser_every": 1,
    "warm_up": 0,
    "noise": 0,
    "noise_decay": 0,
}


def _synthesisers(context: Context) -> list[Synthesiser]:
    """Returns the synthesisers of the cell, one for each tensor that crosses its border and carries credit."""
    return list(cast("nn.ModuleList", context.auxiliary))  # pyrefly: ignore[bad-return]


def _labels(shared: dict[str, Any], target: Any, y: Tensor, width: int) -> Tensor:
    """Returns what conditioning shows of the batch's targets, made once for all cells: one-hot rows, or real-valued targets."""
    if "labels" not in shared:
        if isinstance(target, Tensor) and target.is_floating_point() and target.shape == (len(y), width):
            shared["labels"] = target
        elif isinstance(target, Tensor) and not target.is_floating_point() and target.dim() == 1:
            number = target.long()[:, None]
            zeros = y.new_zeros(len(number), width)
            # A negative number is one that the loss ignores; it has no class.
            shared["labels"] = zeros.scatter_(1, number.clamp_min(0), (number >= 0).to(zeros.dtype))
        else:
            raise ValueError(
                f"a label-conditioned synthesiser needs class numbers of shape (batch,), or targets like the model's output "
                f"(batch, {width}), the targets are {describe(target)}"
            )
    return shared["labels"]
