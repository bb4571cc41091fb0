"""Several networks of equal structure worked on as one: the language in which a rule says how, for the stacked executor.

A *stack* is a tensor whose first dimension counts cells. Parameters are stacked once, and from then on are views of the stack, so
that the user's own modules and optimizers hold what is learnt at any time.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lockfree.flight import Flight


class ParameterStack:
    """The same parameter of n cells as one tensor, of which the parameters become views.

    Args:
        members: The parameters, bottom to top, of one shape, dtype and device.

    Attributes:
        value: The stack, shape (n, ...).
        members: The parameters.

    Example:
        >>> layers = [nn.Linear(2, 2) for _ in range(3)]
        >>> stack = ParameterStack([layer.bias for layer in layers])
        >>> _ = stack.value.fill_(7.0)
        >>> layers[1].bias.tolist()
        [7.0, 7.0]
    """

    def __init__(self, members: Sequence[nn.Parameter]) -> None:
        self.members = list(members)
        self.value = torch.stack([member.detach() for member in self.members])
        for member, view in zip(self.members, self.value.unbind(), strict=True):
            member.data = view
        self._addresses = [member.data_ptr() for member in self.members]

    @property
    def holds(self) -> bool:
        """Whether the parameters still are views of it: whoever moves a model to another device gives it new memory."""
        return [member.data_ptr() for member in self.members] == self._addresses


class Descent(ABC):
    """An optimizer's step for stacked parameters."""

    @abstractmethod
    def follow(self, stack: ParameterStack, gradient: Tensor) -> None:
        """Takes the gradients of a stack, shape of its value."""

    def follow_product(self, stack: ParameterStack, left: Tensor, right: Tensor) -> None:
        """Takes the gradients as the products of two stacks of matrices, which a plain step can be made of at once."""
        self.follow(stack, torch.bmm(left, right))


class CreditStack(ABC):
    """How n cells of equal structure take their credit, and their auxiliary networks learn, in one operation each.

    Attributes:
        parameters: What the auxiliary networks learn.
        waits: Whether they learn from the message that arrives one tick after the credit was taken, not in the same tick.
    """

    parameters: Sequence[ParameterStack] = ()
    waits: bool = False

    def enter(self, memos: Sequence[Any]) -> None:
        """Takes over what each cell remembers of the batch whose message is to come."""

    def leave(self) -> Sequence[Any]:
        """Returns what each cell has to remember of that batch, as the rule's own `Context.memo`."""
        return ()

    @abstractmethod
    def credit(self, outputs: Tensor, flights: Sequence[Flight]) -> Tensor:
        """Returns the credit of each cell's output.

        Args:
            outputs: Shape (n, m, ...).
            flights: The batch that each cell works on.
        """

    @abstractmethod
    def learn(self, truth: Tensor | None) -> Tensor:
        """Works out what the auxiliary networks learn, and returns the loss of each, shape (n,).

        Args:
            truth: The messages from above, shape of the outputs; ``None`` unless it waits for them.
        """

    @abstractmethod
    def descend(self, descent: Descent) -> None:
        """Hands over the gradients of what was learnt; no weight has changed before."""
