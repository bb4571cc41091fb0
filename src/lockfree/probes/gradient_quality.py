"""How good a rule's credit is as an estimate of the true gradient."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lockfree.probes.base import Probe, View, blue, some_of
from lockfree.probes.gradients import flat
from lockfree.rng import undisturbed
from lockfree.values import batch_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class GradientQuality(Probe):
    r"""Cosine, relative error and sign agreement of each block's credit, and bias and variance of its parameters' gradient.

    With $\hat\delta$ the rule's credit at a block's output and $\delta$ the true one, on all samples at once:

    $$\cos = \frac{\hat\delta\cdot\delta}{\lVert\hat\delta\rVert\lVert\delta\rVert}, \qquad
    \mathrm{error} = \frac{\lVert\hat\delta - \delta\rVert}{\lVert\delta\rVert}$$

    and with $\hat g_j$ the rule's gradient of the block's parameters on the j-th of k minibatches, $g$ the true one on all samples:

    $$\mathrm{bias} = \frac{\lVert\bar g - g\rVert}{\lVert g\rVert}, \qquad
    \mathrm{variance} = \frac{1}{k-1}\sum_j\frac{\lVert\hat g_j - \bar g\rVert^2}{\lVert g\rVert^2}, \qquad
    \bar g = \frac1k\sum_j\hat g_j$$

    Credit is ``None`` where a block takes none that can be seen (nothing is differentiated, or its samples are not the batch's), and
    so is what would be divided by 0.

    Attributes:
        minibatches: k, 2 or more; they are parts of the probe's samples, of equal size.

    Raises:
        ValueError: If ``minibatches`` is below 2.

    Reference:
        Czarnecki et al. 2017, arXiv 1703.00522; Jaderberg et al. 2016, arXiv 1608.05343.
    """

    name = "gradient-quality"
    said = (
        "Each block's credit (the gradient of its output) against the true one: cosine, relative error, share of equal signs; and bias "
        "and variance of the gradient of its parameters over minibatches, against the true one of all samples. On held-out samples, in "
        "training mode; a cosine of 1 is backpropagation."
    )
    minibatches: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minibatches < 2:
            raise ValueError(f"minibatches={self.minibatches}: a variance takes 2 or more")

    def look(self, view: View) -> dict[str, Any]:
        learner, x, y = view.learner, view.inputs, view.targets
        size = batch_size(x) // self.minibatches
        if size < 2:
            raise ValueError(
                f"{batch_size(x)} samples make no {self.minibatches} minibatches of 2 or more: pass more probe_data"
            )
        (credits, _), (true, gradients) = view.gradients
        with undisturbed(learner.model):
            learner.model.train()
            parts = [learner.gradients(*some_of((x, y), slice(j * size, (j + 1) * size))) for j in range(self.minibatches)]
        found: dict[str, list[float | None]] = {key: [] for key in _COLUMNS}
        for estimate, truth in zip(credits, true, strict=True):
            for key, value in compare(estimate, truth).items():
                found[key].append(value)
        names = {id(parameter): name for name, parameter in learner.model.named_parameters()}
        for block in learner.chain.blocks:
            mine = [name for p in block.parameters() if (name := names[id(p)]) in gradients and name in parts[0]]
            bias, variance = bias_and_variance([flat(part[name] for name in mine) for part in parts],
                                               flat(gradients[name] for name in mine))  # fmt: skip
            found["bias"].append(bias)
            found["variance"].append(variance)
        return dict(found)

    @classmethod
    def draw(cls, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.2, 2.4 * len(runs)), layout="constrained")
        axes = figure.subplots(len(runs), len(_COLUMNS), squeeze=False)
        for row, (title, records) in zip(axes, runs.items(), strict=True):
            steps = [record["step"] for record in records]
            for axis, (key, label) in zip(row, _COLUMNS.items(), strict=True):
                count = len(records[0][key])
                for block in range(count):
                    values = [math.nan if record[key][block] is None else record[key][block] for record in records]
                    shade = blue((block + 1) / count)
                    axis.plot(steps, values, color=shade, marker=".")
                axis.set_title(label, fontsize=9)
                axis.set_xlabel("step")
                axis.grid(alpha=0.25)
            row[0].set_ylabel(f"{title}\n(dark: top)", fontsize=8)
        return figure


_COLUMNS = {
    "cosine": "cosine",
    "relative_error": "relative error",
    "sign_agreement": "equal signs",
    "bias": "bias",
    "variance": "variance",
}


def compare(estimate: Tensor | None, truth: Tensor | None) -> dict[str, float | None]:
    """Returns cosine, relative error and sign agreement of an estimated gradient; ``None`` where they are not defined.

    Signs are compared where the truth is not 0.
    """
    nothing = dict.fromkeys(("cosine", "relative_error", "sign_agreement"))
    if estimate is None or truth is None or estimate.shape != truth.shape or not (size := float(truth.norm())) > 0:
        return nothing
    other, signed = float(estimate.norm()), truth != 0
    return {
        "cosine": float(estimate @ truth) / (size * other) if other > 0 else None,
        "relative_error": float((estimate - truth).norm()) / size,
        "sign_agreement": int(((estimate.sign() == truth.sign()) & signed).sum()) / int(signed.sum()),
    }


def bias_and_variance(estimates: Sequence[Tensor], truth: Tensor) -> tuple[float | None, float | None]:
    """Returns bias and variance of estimates of a vector, relative to its length and the square of it."""
    size = float(truth.norm())
    if not size > 0:
        return None, None
    stacked = torch.stack(list(estimates))
    mean = stacked.mean(0)
    spread = float((stacked - mean).square().sum()) / (len(stacked) - 1)
    return float((mean - truth).norm()) / size, spread / size**2
