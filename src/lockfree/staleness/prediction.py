"""A gradient that is not late: taken where the weights will be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lockfree.staleness.base import Correction, Late, in_range


@dataclass(frozen=True, kw_only=True)
class WeightPrediction(Correction):
    r"""Has the gradient taken at the weights as they are likely to be when it comes, and then leaves it as it is.

    $$\hat w_{t+s} = w_t + s\,(w_t - w_{t-1}), \qquad \tilde g = \nabla L(\hat w_{t+s})$$

    The last step of the weights is that of the optimizer, whichever it is: with momentum $-\eta v_t$, with Adam
    $-\eta\,\hat m_t/(\sqrt{\hat v_t} + \epsilon)$. Unless told otherwise, s is the delay of the worker's last gradient, 0 before its first.
    It works where weights are handed out, on a parameter server; a delayed link hands out none.

    Attributes:
        steps: s, 0 or more; ``None``: the delay of the worker's last gradient.

    Raises:
        ValueError: If it is no whole number, 0 or more.

    Example:
        >>> WeightPrediction().ahead([torch.tensor([1.0])], [torch.tensor([0.5])], delay=2)
        [tensor([2.])]

    Reference:
        Chen, Yang, Cheng 2018, "Efficient and robust parallel DNN training through model parallelism on multi-GPU platform"
        (SpecTrain), arXiv 1809.02839, for momentum; Guan, Yin, Li, Lu 2019, "XPipe", arXiv 1911.04610, for Adam. As remembered, not
        checked.
    """

    steps: int | None = None

    looks_ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps is not None:
            in_range(self, "steps", lambda steps: steps == int(steps) >= 0, "a whole number of updates, 0 or more, or None")

    def ahead(self, weights: Sequence[Tensor], step: Sequence[Tensor], *, delay: int) -> list[Tensor]:
        steps = delay if self.steps is None else self.steps
        return list(torch._foreach_add(list(weights), list(step), alpha=steps)) if steps else list(weights)

    def correct(self, gradients: Sequence[Tensor | None], late: Late, memory: dict[str, Any]) -> list[Tensor | None]:
        return list(gradients)
