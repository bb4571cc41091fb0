"""How far what a rule does points away from what backpropagation would do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lockfree.feedback import FeedbackWeights
from lockfree.learner import Learner
from lockfree.probes.base import Probe, View, blue

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Alignment(Probe):
    r"""The angle between each block's gradient under the rule and the true one, $\arccos(g\cdot g^*/|g||g^*|)$, in degrees.

    Below 90 degrees a small enough step along the rule's gradient descends the loss. Under feedback alignment and sign symmetry the
    angle between each layer's weights and what stands for them is taken, too: it is what falls when a network learns to align.

    Reference:
        Lillicrap et al. 2016, arXiv 1411.0247, figure 2; Nøkland 2016, arXiv 1609.01596, section 3.
    """

    name = "alignment"
    said = (
        "The angle between each block's gradient under the rule and the gradient of backpropagation, on held-out samples in training "
        "mode; below 90 degrees a small step descends the loss."
    )

    def look(self, view: View) -> dict[str, Any]:
        learner = view.learner
        (_, found), (_, true) = view.gradients
        names = {id(parameter): name for name, parameter in learner.model.named_parameters()}
        angles = []
        for block in learner.chain.blocks:
            mine = [name for parameter in block.parameters() if (name := names[id(parameter)]) in found and name in true]
            angles.append(_angle([found[name] for name in mine], [true[name] for name in mine]))
        return {"angles": angles, "weights": _weight_angles(learner)}

    @classmethod
    def draw(cls, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.2, 2.6 * len(runs)), layout="constrained")
        axes = figure.subplots(len(runs), 2, squeeze=False, sharey=True)
        for row, (title, records) in zip(axes, runs.items(), strict=True):
            steps = [record["step"] for record in records]
            for axis, key, label in zip(row, ("angles", "weights"), ("block", "weight"), strict=True):
                count = len(records[0][key])
                named = range(0, max(count, 1), max(-(-count // 8), 1))
                for index in range(count):
                    values = [math.nan if record[key][index] is None else record[key][index] for record in records]
                    shade = blue((index + 1) / count)
                    axis.plot(steps, values, color=shade, marker=".", label=f"{label} {index}" if index in named else None)
                axis.axhline(90, color="#adb5bd", lw=1, ls="--")
                axis.set(ylim=(0, 180), yticks=(0, 45, 90, 135, 180), xlabel="step")
                axis.grid(alpha=0.25)
                if count:
                    axis.legend(frameon=False, fontsize=7, ncols=2)
            row[0].set_ylabel(title)
        axes[0][0].set_title("gradient against backpropagation's, degrees", fontsize=10)
        axes[0][1].set_title("feedback against forward weights, degrees", fontsize=10)
        return figure


def _weight_angles(learner: Learner) -> list[float | None]:
    pairs = [pair for cell in learner.cells if isinstance(cell.auxiliary, FeedbackWeights) for pair in cell.auxiliary.pairs()]
    angles = []
    for weight, feedback in pairs:
        weight = weight.detach()
        kept = feedback.keep(weight, torch.Generator(weight.device))
        angles.append(_angle([weight], [feedback.matrix(*kept)]))
    return angles


def _angle(one: Sequence[Tensor], other: Sequence[Tensor]) -> float | None:
    """Returns the angle between two vectors given in parts, in degrees; ``None`` if one of them is 0."""
    product = sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))
    sizes = [math.sqrt(sum(float(part.double().square().sum()) for part in parts)) for parts in (one, other)]
    if not min(sizes) > 0:
        return None
    return math.degrees(math.acos(max(-1.0, min(1.0, product / (sizes[0] * sizes[1])))))
