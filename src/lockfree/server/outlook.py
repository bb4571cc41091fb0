"""Weights handed out as they are likely to be when the gradient comes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lockfree.staleness import Correction


class Outlook:
    """What a correction that looks ahead (`Correction.looks_ahead`) has workers compute at; for others, the weights themselves.

    Args:
        correction: The correction.
    """

    def __init__(self, correction: Correction) -> None:
        self._correction = correction
        self._step: list[Tensor] | None = None
        self._delays: dict[int, int] = {}
        self._ahead: dict[int, list[Tensor]] = {}

    def of(self, worker: int, weights: list[Tensor]) -> list[Tensor]:
        """Returns what a worker is to compute at, the same until its push has come.

        Args:
            worker: Its number.
            weights: Those of the version that it pulls.
        """
        if not self._correction.looks_ahead:
            return weights
        if worker not in self._ahead:
            step, delay = self._step, self._delays.get(worker, 0)
            self._ahead[worker] = weights if step is None else self._correction.ahead(weights, step, delay=delay)
        return self._ahead[worker]

    def forget(self, worker: int) -> None:
        """Forgets what a worker computes at."""
        self._ahead.pop(worker, None)

    def learn(self, worker: int, delay: int) -> None:
        """Takes down how late a worker's gradient was."""
        if self._correction.looks_ahead:
            self._delays[worker] = delay

    def before(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """Returns a copy of the weights before an update, if it will be asked for."""
        return [weight.clone() for weight in weights] if self._correction.looks_ahead else None

    def after(self, before: list[Tensor] | None, weights: Sequence[Tensor]) -> None:
        """Takes down the step that an update has made."""
        if before is not None:
            self._step = list(torch._foreach_sub(list(weights), before))

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of all of it."""
        copied = {worker: [one.clone() for one in ahead] for worker, ahead in self._ahead.items()}
        step = None if self._step is None else [one.clone() for one in self._step]
        return {"step": step, "delays": dict(self._delays), "ahead": copied}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self._step = None if state["step"] is None else [one.clone() for one in state["step"]]
        self._delays = dict(state["delays"])
        self._ahead = {worker: [one.clone() for one in ahead] for worker, ahead in state["ahead"].items()}
