"""What has come in of a round of gradients, where workers wait for each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lockfree.server.messages import Push


@dataclass(slots=True)
class Part:
    """One worker's share of a round."""

    gradients: Sequence[Tensor | None]
    buffers: Sequence[Tensor]
    samples: int


@dataclass(slots=True)
class Round:
    r"""The gradients of a round so far, by their batches.

    Their mean, $g = \sum_k \frac{n_k}{N} g_k$ with $n_k$ of the round's N samples in batch k, is that of one batch of all of them. It is
    summed in the order of the batches, which is that of the workers, whoever came first.

    Attributes:
        number: The clock of the workers that have yet to push.
        begun: Whether batches have been dealt.
        parts: What has come, by ticket.
    """

    number: int = 0
    begun: bool = False
    parts: dict[int, Part] = field(default_factory=dict)

    def add(self, push: Push) -> None:
        """Takes in a gradient."""
        self.parts[push.ticket] = Part(push.gradients, push.buffers, push.samples)

    @torch.no_grad()
    def mean(self) -> tuple[list[Tensor | None], list[Tensor]]:
        """Returns gradients and buffers of the round: means, and the largest of each whole number; of one part, that part."""
        parts = [self.parts[ticket] for ticket in sorted(self.parts)]
        if len(parts) == 1:
            return list(parts[0].gradients), list(parts[0].buffers)
        total = sum(part.samples for part in parts)
        shares = [part.samples / total for part in parts]
        every = zip(*(part.gradients for part in parts), strict=True)
        if all(gradient is not None for part in parts for gradient in part.gradients):
            found = list(torch._foreach_mul(list(parts[0].gradients), shares[0]))  # pyrefly: ignore[no-matching-overload]
            for part, share in zip(parts[1:], shares[1:], strict=True):
                torch._foreach_add_(found, list(part.gradients), alpha=share)  # pyrefly: ignore[no-matching-overload]
        else:
            found = [_weighted(gradients, shares) for gradients in every]
        return found, [_one_buffer(buffers) for buffers in zip(*(part.buffers for part in parts), strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of all of it as plain data and tensors."""
        parts = {
            ticket: {
                "gradients": [None if gradient is None else gradient.clone() for gradient in part.gradients],
                "buffers": [buffer.clone() for buffer in part.buffers],
                "samples": part.samples,
            }
            for ticket, part in self.parts.items()
        }
        return {"number": self.number, "begun": self.begun, "parts": parts}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Round":
        """Makes a round of what `state_dict` returned. Its tensors are shared: nobody writes to them."""
        return cls(state["number"], state["begun"], {ticket: Part(**part) for ticket, part in state["parts"].items()})


def _weighted(gradients: Sequence[Tensor | None], shares: Sequence[float]) -> Tensor | None:
    """Returns the mean of one weight's gradients; one that is missing counts as 0, unless all are."""
    found = None
    for gradient, share in zip(gradients, shares, strict=True):
        if gradient is not None:
            found = gradient * share if found is None else found.add_(gradient, alpha=share)
    return found


def _one_buffer(buffers: Sequence[Tensor]) -> Tensor:
    first = buffers[0]
    if all(buffer is first or torch.equal(buffer, first) for buffer in buffers):
        return first  # a mean of equal numbers may be another number
    if not (first.is_floating_point() or first.is_complex()):
        return torch.stack(list(buffers)).amax(0)
    total = first.clone()
    for buffer in buffers[1:]:
        total += buffer
    return total / len(buffers)
