"""What each block's output has to do with the input and with the targets, along training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lockfree.hsic import above_chance, nhsic
from lockfree.probes.base import Probe, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Information(Probe):
    r"""$\mathrm{nHSIC}(X, Z_i)$ and $\mathrm{nHSIC}(Y, Z_i)$ of every block, as they are and above chance, and the accuracy.

    As they are, these numbers are mostly about how many features fit how few samples; above chance they are about dependence.

    Attributes:
        sigma: Bandwidth of the Gaussian kernels, in units of one feature; ``None``: the median heuristic.
        epsilon: Ridge, above 0.

    Reference:
        Ma, Lewis, Kleijn 2019, arXiv 1908.01580, figure 2 (without the correction for chance).
    """

    name = "information"
    said = (
        "How much each block's output depends on the targets and on the input, as normalised HSIC above what shuffled samples give; "
        "on held-out samples, in evaluation mode."
    )
    sigma: float | None = 5.0
    epsilon: float = 1e-5

    def look(self, view: View) -> dict[str, Any]:
        targets = _rows_of(view.targets)
        fields = {"sigma_x": self.sigma, "sigma_y": self.sigma, "epsilon": self.epsilon}
        found: dict[str, Any] = {
            f"{name}_{side}": [float(measure(z, given, **fields)) for z in view.representations]
            for name, measure in (("nhsic", nhsic), ("above_chance", above_chance))
            for side, given in (("x", view.source), ("y", targets))
        }
        scores = view.learner.predict(view.inputs)
        if isinstance(scores, Tensor) and scores.dim() == 2 and view.targets.dtype == torch.int64:
            found["accuracy"] = float((scores.argmax(1) == view.targets).double().mean())
        return found

    @classmethod
    def draw(cls, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.2, 2.6 * len(runs)), layout="constrained")
        axes = figure.subplots(len(runs), 3, squeeze=False, sharex="row", sharey="col")
        for row, (title, records) in zip(axes, runs.items(), strict=True):
            steps = [record["step"] for record in records]
            count = len(records[0]["nhsic_y"])
            named = range(0, count, -(-count // 8))
            for axis, side in zip(row, "yx", strict=False):
                for block in range(count):
                    values = [record[f"above_chance_{side}"][block] for record in records]
                    shade = (block + 1) / count
                    axis.plot(
                        steps,
                        values,
                        color=(0.15, 0.39, 0.92, 0.2 + 0.8 * shade),
                        lw=1.6,
                        marker=".",
                        label=f"block {block}" if block in named else None,
                    )
            row[0].set_ylabel(title)
            if "accuracy" in records[0]:
                row[2].plot(steps, [100 * record["accuracy"] for record in records], color="#d9480f", lw=1.6, marker=".")
        for axis, name in zip(axes[0], ("nHSIC(Y, Z) above chance", "nHSIC(X, Z) above chance", "accuracy, %"), strict=True):
            axis.set_title(name, fontsize=10)
        for axis in axes[-1]:
            axis.set_xlabel("step")
        for axis in axes.flat:
            axis.grid(alpha=0.25)
        axes[0][0].legend(frameon=False, fontsize=7, ncols=2)
        return figure


def _rows_of(targets: Tensor) -> Tensor:
    """Returns one-hot rows of class numbers, other targets as they are."""
    if targets.is_floating_point():
        return targets
    return F.one_hot(targets.clamp_min(0)).flatten(1).float()
