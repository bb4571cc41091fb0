"""What one block's units do for which class."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lockfree.learner import Learner
from lockfree.probes.base import Probe, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Activations(Probe):
    """The mean of each unit for each class, and the distribution of the first unit by class.

    Attributes:
        block: Which block, 0 at the bottom; negative numbers count from the top.
        units: Units to look at, from the first, 1 or more.
        bins: Of the distribution, 2 or more.

    Raises:
        ValueError: If a number is out of range.

    Reference:
        Ma, Lewis, Kleijn 2019, arXiv 1908.01580, figures 3 (distribution in a network that narrows to one unit) and 4 (units by class).
    """

    name = "activations"
    said = "What a block's units do for each class at the end: the distribution of the first, and the mean of each, on held-out samples."
    block: int = -1
    units: int = 16
    bins: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.units < 1 or self.bins < 2:
            raise ValueError(f"units={self.units}, bins={self.bins}: give 1 or more units and 2 or more bins")

    def check(self, learner: Learner) -> None:
        count = len(learner.chain.blocks)
        if not -count <= self.block < count:
            raise ValueError(f"block={self.block}: this model has blocks 0 to {count - 1}")

    def look(self, view: View) -> dict[str, Any]:
        self.check(view.learner)
        found = view.representations
        if view.targets.is_floating_point() or view.targets.dim() != 1:
            raise ValueError("activations are shown by class: this probe wants class numbers of shape (batch,)")
        z = found[self.block][:, : self.units].double()
        classes = range(int(view.targets.max()) + 1)
        members = [z[view.targets == label] for label in classes]
        low, high = float(z[:, 0].min()), float(z[:, 0].max())
        high = high if high > low else low + 1.0
        return {
            "block": range(len(found))[self.block],
            "class_means": [[] if not len(one) else one.mean(0).tolist() for one in members],
            "low": low,
            "high": high,
            "counts": [torch.histc(one[:, 0], self.bins, low, high).int().tolist() for one in members],
        }

    @classmethod
    def draw(cls, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.2, 2.6 * len(runs)), layout="constrained")
        axes = figure.subplots(len(runs), 2, squeeze=False, width_ratios=(2, 1))
        for (left, right), (title, records) in zip(axes, runs.items(), strict=True):
            last = records[-1]
            low, high, counts = last["low"], last["high"], last["counts"]
            width = (high - low) / len(counts[0])
            middles = [low + width * (index + 0.5) for index in range(len(counts[0]))]
            for label, one in enumerate(counts):
                total = sum(one) or 1
                left.fill_between(
                    middles, [value / total / width for value in one], alpha=0.35, step="mid", label=f"class {label}"
                )
            left.set_ylabel(title)
            left.set_xlabel(f"first unit of block {last['block']}, after step {last['step']}")
            units = max(len(one) for one in last["class_means"])
            means = [one or [math.nan] * units for one in last["class_means"]]
            image = right.imshow(means, aspect="auto", cmap="viridis", interpolation="nearest")
            right.set(xlabel="unit", ylabel="class")
            right.set_xticks(range(0, units, -(-units // 10)))
            right.set_yticks(range(0, len(means), -(-len(means) // 10)))
            figure.colorbar(image, ax=right)
        axes[0][0].set_title("distribution by class", fontsize=10)
        axes[0][1].set_title("mean by class", fontsize=10)
        axes[0][0].legend(frameon=False, fontsize=7, ncols=2)
        return figure
