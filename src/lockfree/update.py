"""When gathered gradients become a step of an optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Update:
    r"""Steps an optimizer with the mean of n gathered gradients, $g = \frac1n\sum_{k=1}^n g_k$, shortened to $\lVert g\rVert \le c$.

    Args:
        optimizer: What is stepped.
        every: n, how many gradients make a step, 1 or more.
        clip_norm: c, above 0; ``None``: whatever its norm.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> update = Update(torch.optim.SGD([weight], lr=1.0), every=2)
        >>> for gradient in ([2.0, 0.0], [0.0, 4.0]):
        ...     weight.grad = torch.tensor(gradient)
        ...     update.take()
        >>> weight.tolist()
        [-1.0, -2.0]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, every: int = 1, clip_norm: float | None = None) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"accumulate={every!r}: give a whole number of batches, 1 or more")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm={clip_norm}: give a number above 0, or None")
        self.optimizer = optimizer
        self._every, self._clip_norm = every, clip_norm
        # Kept beside the parameters' own gradients, so that a batch that fails has no part in the mean.
        self._gathered: list[Tensor | None] = []
        self._count = 0

    @property
    def plain(self) -> bool:
        """Whether each parameter is stepped with each of its gradients as it is."""
        return self._every == 1 and self._clip_norm is None

    @property
    def gathers(self) -> bool:
        """Whether it takes several gradients to make a step."""
        return self._every > 1

    @property
    def clips(self) -> bool:
        """Whether the gradient of all parameters together is shortened."""
        return self._clip_norm is not None

    def take(self, correct: Callable[[], None] | None = None) -> None:
        """Takes the gradients that lie on the parameters; steps if that makes n of them.

        Args:
            correct: Repairs what is late of them: after clipping, before weight decay and momentum.
        """
        if self._every > 1:
            self._gather()
        if self._count < self._every - 1:
            self._count += 1
        else:
            self._count = 0
            self._step(correct)
        self.drop()

    def _gather(self) -> None:
        parameters = self._parameters()
        known = self._gathered or [None] * len(parameters)
        last = self._count == self._every - 1
        self._gathered = []
        for parameter, before in zip(parameters, known, strict=True):
            share = None if parameter.grad is None else parameter.grad / self._every
            total = share if before is None else before if share is None else before.add_(share)
            if last:
                parameter.grad = total
            else:
                self._gathered.append(total)

    def _step(self, correct: Callable[[], None] | None) -> None:
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters(), self._clip_norm)
        if correct is not None:
            correct()
        self.optimizer.step()

    def drop(self) -> None:
        """Does what ``zero_grad`` does, without its bookkeeping."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Returns what has been gathered towards the next step; the optimizer keeps its own state."""
        return {"gathered": list(self._gathered), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self._gathered, self._count = list(state["gathered"]), state["count"]
