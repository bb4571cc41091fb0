"""What has come in of a round of gradients, where workers wait for each other, and how it becomes one."""

from collections.abc import Callable, Sequence
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


Mean = Callable[[Sequence[Part]], tuple[list[Tensor | None], list[Tensor]]]
"""Makes gradients and buffers of an update of the shares of a round, in the order of their batches."""


@dataclass(slots=True)
class Round:
    """The gradients of a round so far, by their batches.

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

    @property
    def in_order(self) -> list[Part]:
        """What has come, in the order of the batches, which is that of the workers, whoever came first."""
        return [self.parts[ticket] for ticket in sorted(self.parts)]

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


def mean(parts: Sequence[Part]) -> tuple[list[Tensor | None], list[Tensor]]:
    """Returns gradients and buffers of a round: means, and the largest of each whole number; of one part, that part.

    Args:
        parts: In the order of the batches.
    """
    if len(parts) == 1:
        return list(parts[0].gradients), list(parts[0].buffers)
    gradients = mean_gradients([part.gradients for part in parts], [part.samples for part in parts])
    return gradients, mean_buffers([part.buffers for part in parts])


@torch.no_grad()
def mean_gradients(each: Sequence[Sequence[Tensor | None]], samples: Sequence[int]) -> list[Tensor | None]:
    r"""Returns the gradient of one batch of all samples, $g = \sum_k \frac{n_k}{N} g_k$, summed in the order given.

    Args:
        each: The gradients $g_k$ of 2 or more batches; one that is missing counts as 0, unless all are.
        samples: $n_k$, of N in all.

    Example:
        >>> mean_gradients([[torch.tensor(1.0)], [torch.tensor(5.0)]], samples=[3, 1])
        [tensor(2.)]
    """
    total = sum(samples)
    shares = [count / total for count in samples]
    if any(gradient is None for gradients in each for gradient in gradients):
        return [_weighted(gradients, shares) for gradients in zip(*each, strict=True)]
    found = list(torch._foreach_mul(list(each[0]), shares[0]))  # pyrefly: ignore[no-matching-overload]
    for gradients, share in zip(each[1:], shares[1:], strict=True):
        torch._foreach_add_(found, list(gradients), alpha=share)  # pyrefly: ignore[no-matching-overload]
    return found


@torch.no_grad()
def mean_buffers(each: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Returns the buffers of a round.

    Args:
        each: Those after each batch, of 2 or more.
    """
    return [_one_buffer(buffers) for buffers in zip(*each, strict=True)]


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
