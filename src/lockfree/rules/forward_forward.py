"""Forward-Forward: each block tells samples with their right label apart from samples with a wrong one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.chain import Block
from lockfree.choose import choose
from lockfree.objective import describe
from lockfree.rng import seed_of
from lockfree.rule import Card, Context, Needs, Place, Rule, Site, Trained
from lockfree.values import Credit, Values

_NEGATIVES = ("hard", "uniform")


class _Activity(nn.Module):
    """How active the units of a block have been lately, on samples with their right label.

    Args:
        y: An example of what the block hands up, shape (m, units, ...).
        classes: Number of labels.
    """

    def __init__(self, y: Tensor, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.running_mean: Tensor
        self.running_count: Tensor
        self.register_buffer("running_mean", y.new_zeros(_units(y).shape[1], dtype=_at_least_float32(y)))
        self.register_buffer("running_count", y.new_zeros((), dtype=_at_least_float32(y)))

    def unevenness(self, z: Tensor, momentum: float) -> Tensor:
        """Takes a batch in, and returns the variance over units of their mean activity."""
        mean = self.running_mean.lerp(_units(z).to(self.running_mean.dtype).mean(0), 1 - momentum)
        with torch.no_grad():
            self.running_mean.copy_(mean)
            self.running_count += 1
        unbiased = mean / (1 - momentum**self.running_count)  # the first mean was zero, and nobody's
        return (unbiased - unbiased.mean()).square().mean()


def _at_least_float32(y: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, torch.float32)


def _units(z: Tensor) -> Tensor:
    """Returns a row for each sample and place, a column for each unit: channels of images, features of all else."""
    return z.movedim(1, -1).flatten(0, -2) if z.dim() == 4 else z.flatten(0, -2)


@dataclass(frozen=True, kw_only=True)
class ForwardForward(Rule):
    r"""Each block descends $\log(1+e^{-l})$ on samples with their right label written in, and $\log(1+e^{l})$ on ones with a wrong label.

    $l = (\lVert z\rVert^2/d - \theta)\sqrt d$ for an output z of d numbers; what the next block is given has its length taken off,
    so that it cannot read the verdict. A label is written over the first numbers of the input. The top block learns from
    the user's loss, on samples with a neutral label. Classes are read off as $\sum_i l_i$ under each label, without the first
    block if there are others: `Learner.predict` runs the network once for each class.

    Attributes:
        threshold: $\theta$, above 0.
        peers: Weight of the peer normalisation, the variance over units of their mean activity; 0 or more.
        momentum: Of that mean, 0 to below 1.
        label: What is written for the label, above 0; zeros for the others, $1/\mathrm{classes}$ of it for all if it is neutral.
        negatives: "uniform": wrong labels are drawn all alike; "hard": by the odds that the network gives them, which blocks wait for.
        seed: What wrong labels are drawn from, with the number of the batch.

    Raises:
        ValueError: If a number is out of range or the name misspelt; if input, borders or output are not one tensor each, or the
            input has fewer numbers than there are classes; in a step, if targets are not class numbers.

    Example:
        >>> import lockfree as lf
        >>> lf.rules.ForwardForward().needs(lf.Place(0, 4)).name
        'NOTHING'

    Reference:
        Hinton 2022, "The forward-forward algorithm: some preliminary investigations", arXiv 2212.13345, sections 2 and 3.
    """

    threshold: float = 1.0
    peers: float = 0.03
    momentum: float = 0.9
    label: float = 5.0
    negatives: str = "uniform"
    seed: int = 0

    card: ClassVar[Card] = Card(
        title="Forward-Forward",
        summary="Each block tells samples with their right label apart from samples with a wrong one.",
        reference="Hinton 2022, The forward-forward algorithm: some preliminary investigations, arXiv 2212.13345",
        bibtex=(
            "@article{hinton2022forward, title={The Forward-Forward Algorithm: Some Preliminary Investigations}, author={Hinton, "
            "Geoffrey}, journal={arXiv preprint arXiv:2212.13345}, year={2022}}"
        ),
    )

    def __post_init__(self) -> None:
        for name in ("threshold", "label"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0")
        if not 0 <= self.peers < math.inf:
            raise ValueError(f"peers={self.peers}: give a number, 0 or more")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: give a number from 0 to below 1")
        choose(dict.fromkeys(_NEGATIVES), self.negatives, "negatives")

    def needs(self, place: Place) -> Needs:
        if place.top:
            return Needs.ABOVE
        # What makes a wrong label hard is the whole network's opinion, which every block has to wait for.
        return Needs.ERROR if self.negatives == "hard" else Needs.NOTHING

    def passes_on(self, place: Place) -> bool:
        return place.top

    def auxiliary_needs(self, place: Place) -> Needs | None:
        return None if place.top else self.needs(place)

    def build(self, site: Site) -> nn.Module | None:
        if site.place.top:
            return None
        scores, source, y = site.scores, site.example, site.handed_up
        if scores.dim() != 2:
            raise ValueError(f"Forward-Forward wants a model that gives (batch, classes), this one gives {describe(scores)}")
        if not isinstance(source, Tensor) or not source.is_floating_point() or source[0].numel() < scores.shape[1]:
            raise ValueError(
                f"Forward-Forward writes the label over the first {scores.shape[1]} numbers of the input, which is {describe(source)}: "
                "give it one tensor of at least so many real numbers a sample"
            )
        if not isinstance(y, Tensor) or y.dim() < 2 or not y.is_floating_point():
            raise ValueError(
                f"Forward-Forward wants blocks that hand up one tensor of real numbers, block {site.place.index} hands up "
                f"{describe(y)}: cut the model elsewhere"
            )
        return _Activity(y, scores.shape[1])

    # ---- what is told apart --------------------------------------------------------------------------------------------------

    def feed(self, trained: Trained, inputs: Values, target: Any, batch: int) -> Values:
        if len(trained.blocks) == 1:
            return inputs
        activity = trained.auxiliaries[0]
        assert isinstance(activity, _Activity)
        right = _one_hot(target, activity.classes, inputs)
        neutral = self._labelled(inputs, torch.full_like(right, 1 / activity.classes))
        wrong = self._wrong_labels(trained, neutral, right, batch)
        return torch.cat([self._labelled(inputs, right), self._labelled(inputs, wrong), neutral])

    def _wrong_labels(self, trained: Trained, neutral: Tensor, right: Tensor, batch: int) -> Float[Tensor, "m classes"]:
        odds = torch.ones_like(right)
        if self.negatives == "hard":
            first = trained.blocks[0]
            assert isinstance(first, Block)
            with torch.no_grad(), first.evaluating():
                *_, scores = _outputs(trained, neutral)
            odds = scores.to(right.dtype).softmax(1) + 1e-6  # so that some label is left, however sure the right one is
        generator = torch.Generator(right.device).manual_seed(seed_of(self.seed, batch))
        drawn = torch.multinomial(odds.nan_to_num(1.0).masked_fill_(right.bool(), 0), 1, generator=generator)
        return torch.zeros_like(right).scatter_(1, drawn, 1)

    def _labelled(self, x: Tensor, labels: Float[Tensor, "m classes"]) -> Tensor:
        written = x.flatten(1).clone()
        written[:, : labels.shape[1]] = self.label * labels
        return written.view_as(x)

    # ---- a block's part ------------------------------------------------------------------------------------------------------

    def run(self, block: nn.Module, context: Context) -> Values:
        x, place = context.inputs, context.place
        if place.count == 1:
            return block(x)
        if place.index:
            x = _without_length(x)
        told_apart, neutral = _split(x)
        if place.top:
            return block(neutral)
        assert isinstance(block, Block)
        made = block(told_apart)
        with torch.no_grad(), block.evaluating():  # nothing is learnt from these
            beside = block(neutral)
        return torch.cat([made, beside])

    def credit(self, context: Context) -> Credit | None:
        if context.place.top:
            return context.above
        if not context.outputs:  # frozen up to here: there is nothing to have a gradient
            return ()
        told_apart, neutral = _split(context.outputs[0])
        assert isinstance(context.auxiliary, _Activity)
        with torch.enable_grad():
            z = told_apart.detach().requires_grad_()
            loss = self.local_loss(z, context.auxiliary)
            (gradient,) = torch.autograd.grad(loss, z)
        context.memo = loss.detach()
        return (torch.cat([gradient, torch.zeros_like(neutral)]),)

    def learn(self, context: Context) -> Tensor | None:
        return context.memo

    def local_loss(self, z: Float[Tensor, "m ..."], activity: _Activity) -> Tensor:
        """Returns what a block descends: samples with their right label first, the same number with a wrong one after."""
        right, wrong = self.logits(z).chunk(2)
        loss = F.softplus(torch.cat([-right, wrong])).mean()
        if self.peers:
            loss = loss + self.peers * activity.unevenness(z[: len(right)], self.momentum)
        return loss

    def logits(self, z: Float[Tensor, "m ..."]) -> Float[Tensor, " m"]:
        """Returns l, by which each sample's label is taken for right."""
        z = z.flatten(1).to(_at_least_float32(z))
        return (z.square().mean(1) - self.threshold) * math.sqrt(z.shape[1])

    def predict(self, trained: Trained, inputs: Values) -> Values:
        if len(trained.blocks) == 1:
            return trained.model(inputs)
        activity = trained.auxiliaries[0]
        assert isinstance(activity, _Activity)
        by_label = []
        for label in torch.eye(activity.classes, dtype=inputs.dtype, device=inputs.device):
            *hidden, _ = _outputs(trained, self._labelled(inputs, label.expand(len(inputs), -1)))
            by_label.append(torch.stack([self.logits(y) for y in hidden[1:] or hidden]).sum(0))
        return torch.stack(by_label, 1)


def _outputs(trained: Trained, x: Tensor) -> Iterator[Tensor]:
    """Yields what each block hands up."""
    for index, block in enumerate(trained.blocks):
        x = block(_without_length(x) if index else x)
        yield x


def _without_length(x: Tensor) -> Tensor:
    """Returns each sample divided by the root of its mean square."""
    size = x.flatten(1).to(_at_least_float32(x)).square().mean(1).sqrt().clamp_min(1e-4).to(x.dtype)
    return x / size.view(-1, *[1] * (x.dim() - 1))


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the samples with their right and with a wrong label, and those with a neutral one."""
    told_apart = 2 * (len(rows) // 3)
    return rows[:told_apart], rows[told_apart:]


def _one_hot(target: Any, classes: int, like: Tensor) -> Tensor:
    if not isinstance(target, Tensor) or target.dim() != 1 or target.is_floating_point():
        raise ValueError(f"Forward-Forward wants a class number for each sample, the targets are {describe(target)}")
    if len(target) != len(like) or int(target.min()) < 0 or int(target.max()) >= classes:
        raise ValueError(
            f"Forward-Forward wants class numbers from 0 to {classes - 1}, one a sample, the targets are {describe(target)}"
        )
    return F.one_hot(target.long(), classes).to(like.dtype)
