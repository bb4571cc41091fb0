"""What loss, and what label, a synthesiser believes in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.learner import Learner
from lockfree.probes.base import Probe, View, blue, some_of
from lockfree.rng import undisturbed
from lockfree.synthesisers import Synthesiser
from lockfree.synthesisers.critic import CriticSynthesiser

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def along_path(
    gradient: Callable[[Tensor], Tensor], start: Float[Tensor, "m ..."], end: Float[Tensor, "m ..."], *, points: int = 8
) -> Float[Tensor, " m"]:
    r"""Integrates a gradient along straight paths, $\int_0^1 g(h + t(p-h))\cdot(p-h)\,dt$, by the midpoint rule.

    It is exact for an affine gradient: that of a quadratic loss.

    Args:
        gradient: Returns the gradient of each sample's loss, shape of h.
        start: h.
        end: p.
        points: Midpoints, 1 or more.

    Returns:
        How much the loss rises from start to end, for each sample.

    Example:
        >>> along_path(lambda h: h, torch.zeros(1, 2), torch.ones(1, 2)).item()
        1.0
    """
    step = end - start
    total = start.new_zeros(len(start))
    for index in range(points):
        total += (gradient(start + (index + 0.5) / points * step) * step).flatten(1).sum(1)
    return total / points


@dataclass(frozen=True, kw_only=True)
class ImpliedLoss(Probe):
    r"""The loss that each synthesiser implies on the way from a sample's output to the mean of each class, against the true loss.

    With $h$ a block's output, $p_c$ its mean over class c, $S$ the synthesiser on the scale of one sample's loss and $y$ the label:

    $$\hat L_c(h, y) = \int_0^1 S(h + t(p_c - h), y)\cdot(p_c - h)\,dt, \qquad L_c(h, y) = L(p_c, y) - L(h, y)$$

    A critic's own values take the integral's place. ``correlation`` is that of $\hat L$ and $L$ over samples and classes; the
    implied label is the c of the smallest $\hat L_c$, and ``implied_label`` the share of samples where it is the true one, as
    ``true_label`` is for $L_c$. ``implied`` and ``true`` are means over samples by (label, class).

    Attributes:
        samples: Samples that paths begin at, 2 or more, from the first; class means are taken over all.
        points: Midpoints of the integral, 1 or more; an affine synthesiser needs one alone.

    Raises:
        ValueError: If a number is out of range; when attached, if a rule has no synthesiser.

    Reference:
        Czarnecki et al. 2017, arXiv 1703.00522, section 5.
    """

    name = "implied-loss"
    said = (
        "What each synthesiser believes the loss to be from a sample's output to the mean of each class (its gradient integrated, or a "
        "critic's value), against the true loss: their correlation, and how often the class of the smallest loss is the sample's label. "
        "In evaluation mode, on held-out samples."
    )
    samples: int = 64
    points: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2 or self.points < 1:
            raise ValueError(f"samples={self.samples}, points={self.points}: give 2 or more samples and 1 or more points")

    def check(self, learner: Learner) -> None:
        if not _synthesisers(learner):
            raise ValueError(
                f"rule {type(learner.rule).__name__} has no synthesiser, which the probe {self.name} looks into: take a rule with "
                "one, such as dni or cdni, or another probe"
            )

    def look(self, view: View) -> dict[str, Any]:
        learner, targets = view.learner, view.targets
        self.check(learner)
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dim() != 1:
            raise ValueError("class means need class numbers of shape (batch,) as targets")
        found: dict[str, list[Any]] = {name: [] for name in _KEYS}
        with undisturbed(learner.model), torch.no_grad():
            learner.model.eval()
            for index, synthesiser in _synthesisers(learner).items():
                if isinstance(view.outputs[index], Tensor):
                    found["block"].append(index)
                    for name, value in self._of_one(learner, index, synthesiser, view.outputs[index], targets).items():
                        found[name].append(value)
        if not found["block"]:
            raise ValueError("no block with a synthesiser hands up one tensor alone: cut the model where nothing skips over")
        return dict(found)

    def _of_one(self, learner: Learner, index: int, synthesiser: Synthesiser, y: Tensor, targets: Tensor) -> dict[str, Any]:
        h, labels = y[: self.samples], targets[: self.samples]
        there = [c for c in range(int(targets.max()) + 1) if bool((targets == c).any())]
        prototypes = torch.stack([y[targets == c].mean(0) for c in there])
        belief = _belief(synthesiser, labels, h)
        true = _true_rises(learner, index, h, prototypes, labels).double()
        with undisturbed(synthesiser):
            synthesiser.eval()
            points = 1 if synthesiser.is_affine else self.points  # the midpoint rule is exact then
            implied = torch.stack([belief(h, p.expand_as(h), points) for p in prototypes], 1).double()
        numbers = torch.tensor(there, device=labels.device)
        both = torch.stack([implied.flatten(), true.flatten()])
        correlation = float(torch.corrcoef(both)[0, 1])
        return {
            "correlation": None if correlation != correlation else correlation,
            "implied_label": float((numbers[implied.argmin(1)] == labels).double().mean()) if implied.any() else None,
            "true_label": float((numbers[true.argmin(1)] == labels).double().mean()),
            "implied": [_mean_of(implied, labels == c) for c in there],
            "true": [_mean_of(true, labels == c) for c in there],
        }

    @classmethod
    def draw(cls, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.2, 2.8 * len(runs)), layout="constrained")
        axes = figure.subplots(len(runs), 4, squeeze=False)
        for row, (title, records) in zip(axes, runs.items(), strict=True):
            steps, last = [record["step"] for record in records], records[-1]
            count = len(last["block"])
            for place in range(count):
                shade = blue((place + 1) / count)
                for axis, key in zip(row, ("correlation", "implied_label"), strict=False):
                    values = [float("nan") if record[key][place] is None else record[key][place] for record in records]
                    axis.plot(steps, values, color=shade, marker=".", label=f"block {last['block'][place]}")
            for axis, name in zip(row, ("correlation of implied and true loss", "implied label is the true one"), strict=False):
                axis.set_title(name, fontsize=8)
                axis.set_xlabel("step")
                axis.grid(alpha=0.25)
            row[0].legend(frameon=False, fontsize=6)
            row[0].set_ylabel(title, fontsize=8)
            for axis, key in zip(row[2:], ("implied", "true"), strict=True):
                rows = [one if one else [float("nan")] * len(last[key][-1]) for one in last[key][-1]]
                axis.imshow(rows, cmap="viridis", interpolation="nearest")
                axis.set_title(f"{key} rise of the loss, block {last['block'][-1]}", fontsize=8)
                axis.set(xlabel="towards class", ylabel="label")
        return figure


_KEYS = ("block", "correlation", "implied_label", "true_label", "implied", "true")


def _synthesisers(learner: Learner) -> dict[int, Synthesiser]:
    """Returns the synthesisers of blocks that hand up one tensor with credit, by block."""
    found = {}
    for cell in learner.cells:
        networks = list(cell.auxiliary) if isinstance(cell.auxiliary, nn.ModuleList) else []
        if len(networks) == 1 and isinstance(networks[0], Synthesiser):
            found[cell.place.index] = networks[0]
    return found


def _belief(synthesiser: Synthesiser, labels: Tensor, like: Tensor) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Returns what says how much the synthesiser believes the loss of each sample to rise between two places."""
    shown = F.one_hot(labels.clamp_min(0), synthesiser.classes).to(like.dtype) if synthesiser.classes else None
    if isinstance(synthesiser, CriticSynthesiser):
        return lambda start, end, points: synthesiser(end, shown) - synthesiser(start, shown)
    # For a batch of one sample's loss each, the credit of the mean is that of the sample.
    return lambda start, end, points: along_path(
        lambda h: cast("Tensor", synthesiser.predict(h, shown, 1).credit).detach(), start, end, points=points
    )


def _true_rises(learner: Learner, index: int, h: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """Returns how much each sample's loss rises if the block of that number puts out each prototype instead, a column for each."""
    values: Any = torch.cat([h, prototypes])  # what is above runs once on a prototype, whatever the label that judges it
    for block in learner.chain.blocks[index + 1 :]:
        values = block(values)
    samples, count = len(h), len(prototypes)
    rows = torch.arange(samples + count, device=h.device)
    rows = torch.cat([rows[:samples], rows[samples:].repeat_interleave(samples)])
    losses = _losses(learner, some_of(values, rows), labels.repeat(1 + count)).view(1 + count, samples)
    return (losses[1:] - losses[0]).T


def _losses(learner: Learner, scores: Any, labels: Tensor) -> Tensor:
    try:
        return learner.sample_losses(scores, labels)
    except ValueError:  # a loss that is no function of tensors alone is taken one by one
        return torch.stack([learner.loss(some_of(scores, slice(i, i + 1)), labels[i : i + 1]) for i in range(len(labels))])


def _mean_of(values: Tensor, mine: Tensor) -> list[float]:
    return values[mine].mean(0).tolist() if bool(mine.any()) else []
