"""What a push must be like before it is let near the weights."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from lockfree.server.descent import all_finite
from lockfree.server.messages import NotFinite, Push, Refused
from lockfree.server.roster import Member


class Shapes:
    """Shapes and types of the weights and buffers of a run.

    Args:
        weights: The first ones.
        buffers: The first ones. One that is not finite from the start, a mask perhaps, need not be later.
    """

    def __init__(self, weights: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        self._weights = [(weight.shape, weight.dtype, weight.device) for weight in weights]
        self._buffers = [(buffer.shape, buffer.dtype, buffer.device) for buffer in buffers]
        self._finite = [
            place
            for place, buffer in enumerate(buffers)
            if (buffer.is_floating_point() or buffer.is_complex()) and buffer.numel() and all_finite([buffer])
        ]

    def check_turn(self, push: Push, member: Member, now: int) -> None:
        """Refuses a push that does not answer the worker's last pull.

        Raises:
            Refused: In one line.
        """
        who = f"worker {push.worker}"
        if not 0 <= push.version <= now:
            raise Refused(f"{who} pushed for version {push.version}, which there is not: the server is at version {now}")
        if member.version is None:
            raise Refused(f"{who} pushed without a pull that is still to be answered: let it pull first")
        if push.sequence != member.sequence:
            raise Refused(
                f"{who} pushed for its pull {push.sequence}, its last one was {member.sequence}: push what was pulled last"
            )
        if push.version != member.version:
            raise Refused(f"{who} pushed for version {push.version}, it had pulled {member.version}: push for what was pulled")
        if push.ticket != member.ticket:
            raise Refused(f"{who} pushed for batch {push.ticket}, it had been given {member.ticket}: push for what was pulled")

    def check(self, push: Push) -> None:
        """Refuses a push that does not fit the weights, or is not finite.

        Raises:
            Refused: In one line.
        """
        who = f"worker {push.worker} pushed"
        self._fit(who, "gradient", push.gradients, self._weights)
        self._fit(who, "buffer", push.buffers, self._buffers)
        if isinstance(push.samples, bool) or not isinstance(push.samples, int) or push.samples < 1:
            raise Refused(f"{who} samples={push.samples!r}: give how many samples the batch had, 1 or more")
        if isinstance(push.loss, bool) or not isinstance(push.loss, Real):
            raise Refused(f"{who} loss={push.loss!r}: give a number")
        if not math.isfinite(push.loss):
            raise NotFinite(f"{who} a loss of {push.loss}")
        if not all_finite([gradient for gradient in push.gradients if gradient is not None]):
            raise NotFinite(f"{who} a gradient that is not finite")
        if not all_finite([push.buffers[place] for place in self._finite]):
            raise NotFinite(f"{who} a buffer that is not finite")

    def check_snapshot(self, weights: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        """Refuses the weights and buffers of another model.

        Raises:
            ValueError: In one line.
        """
        for what, tensors, wanted in (("weights", weights, self._weights), ("buffers", buffers, self._buffers)):
            if [(tensor.shape, tensor.dtype) for tensor in tensors] != [(shape, dtype) for shape, dtype, _ in wanted]:
                raise ValueError(f"the snapshot's {what} are not those of this model: restore it with the model of the run")

    def _fit(
        self,
        who: str,
        what: str,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[tuple[torch.Size, torch.dtype, torch.device]],
    ) -> None:
        if len(tensors) != len(wanted):
            raise Refused(f"{who} {len(tensors)} {what}s, the model has {len(wanted)}: push one for each, in the model's order")
        for place, (tensor, (shape, dtype, device)) in enumerate(zip(tensors, wanted, strict=True)):
            if tensor is None and what == "gradient":
                continue
            if not isinstance(tensor, Tensor):
                raise Refused(f"{who} a {type(tensor).__name__} as {what} {place}: push a tensor")
            if tensor.shape != shape:
                raise Refused(f"{who} {what} {place} of the shape {tuple(tensor.shape)}, wanted is {tuple(shape)}")
            if tensor.dtype != dtype:
                raise Refused(f"{who} {what} {place} as {tensor.dtype}, wanted is {dtype}")
            if tensor.layout != torch.strided:
                raise Refused(f"{who} {what} {place} as {tensor.layout}: push a dense tensor")
            if tensor.device != device:
                raise Refused(f"{who} {what} {place} on {tensor.device}, the server is on {device}: move it there")
