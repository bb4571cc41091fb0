"""Ticks of a full pipeline as captured graphs: on a CUDA device the work of a tick is launched at once, not operation by operation."""

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

Replay = Callable[[], Any]
"""Does once more what has been captured, on the same memory."""

Capture = Callable[[Callable[[], Any]], Replay]
"""Notes the operations of a function, which reads and writes memory that stays; nothing is computed before the first replay."""

Shown = Sequence[Sequence[Tensor]]
"""What each stack sees of the batches in a tick."""

WARM_UP = 3
"""Ticks that run before one is captured: libraries make their workspaces in the first."""

_MOST_CAPTURES = 8


class Cuda:
    """Captures as `torch.cuda.CUDAGraph` does; all graphs share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> Replay:
        """Captures a function.

        Raises:
            RuntimeError: If it does what a graph cannot hold, such as waiting for the device.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        return graph.replay


CAPTURES: dict[str, Callable[[], Capture]] = {"cuda": Cuda}
"""What captures on a type of device; on others ticks run operation by operation."""


class Ticks:
    """The device's work of equal ticks, in two graphs: all up to the check that it is finite, and the step of the weights.

    Args:
        capture: Notes the operations of a function.
        carried: Returns the tensors that hold what is in flight between two ticks.
        carry: Lets other memory of the same contents stand for these.
        compute: Runs and learns, given what is shown of the batches; returns a number that is finite if everything is.
        descend: Steps the weights.
        settings: Returns the numbers that are part of the operations, such as a learning rate. When they change, ticks are captured anew.
    """

    def __init__(
        self,
        capture: Capture,
        *,
        carried: Callable[[], list[Tensor]],
        carry: Callable[[Sequence[Tensor]], None],
        compute: Callable[[Shown], Tensor],
        descend: Callable[[], None],
        settings: Callable[[], object],
    ) -> None:
        self._capture, self._carried, self._carry = capture, carried, carry
        self._compute, self._descend, self._settings = compute, descend, settings
        self._ticks, self._captures = itertools.count(), 0
        self._captured: object = None
        self._replays: list[Replay] = []
        self._shown: list[list[Tensor]] = []
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []
        self._check = torch.empty(0)

    def compute(self, shown: Shown) -> Tensor:
        """Runs and learns; no weight has changed."""
        if not self._ready(shown):
            self._replays = []
            return self._compute(shown)
        for memory, value in zip([*self._before, *_flat(self._shown)], [*self._after, *_flat(shown)], strict=True):
            memory.copy_(value)
        self._replays[0]()
        return self._check

    def descend(self) -> None:
        """Steps the weights, after `compute`."""
        if self._replays:
            self._replays[1]()
        else:
            self._descend()

    def _ready(self, shown: Shown) -> bool:
        if next(self._ticks) < WARM_UP or self._captures > _MOST_CAPTURES:
            return False
        if not self._replays or self._settings() != self._captured or not _alike(shown, self._shown):
            self._capture_anew(shown)
        return bool(self._replays)

    def _capture_anew(self, shown: Shown) -> None:
        """Captures a tick that reads its own copy of what is carried and shown, and leaves what it makes where it made it."""
        self._captures += 1
        if self._captures > _MOST_CAPTURES:
            _logger.warning(
                "settings of the optimizer have changed in %d of the captured ticks, so operations are launched one by one from now "
                "on: change the learning rate less often, once an epoch say",
                _MOST_CAPTURES,
            )
            self._replays = []
            return
        held = self._carried()
        self._before, self._shown = [one.clone() for one in held], [[one.clone() for one in part] for part in shown]
        self._carry(self._before)

        def compute() -> None:
            self._check = self._compute(self._shown)

        try:
            self._replays = [self._capture(compute), self._capture(self._descend)]
        except (RuntimeError, ValueError) as error:  # a loss that waits for the device is told of as unfit for its targets
            self._carry(held)
            self._replays, self._captures = [], _MOST_CAPTURES + 1
            _logger.warning(
                "a tick could not be captured, so operations are launched one by one: %s", str(error).splitlines()[0]
            )
            return
        self._captured, self._after = self._settings(), self._carried()
        torch._foreach_copy_(self._after, held)  # what the first replay begins with


def _flat(shown: Shown) -> list[Tensor]:
    return [one for part in shown for one in part]


def _alike(some: Shown, others: Shown) -> bool:
    return [(one.shape, one.dtype) for one in _flat(some)] == [(one.shape, one.dtype) for one in _flat(others)]
