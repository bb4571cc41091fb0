"""Several networks of equal structure worked on as one: the language in which a rule says how, for the stacked executor.

A *stack* is a tensor whose first dimension counts cells. Parameters are stacked once, and from then on are views of the stack, so
that the user's own modules and optimizers hold what is learnt at any time.
"""

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lockfree.flight import Flight
from lockfree.layerwise import Layerwise
from lockfree.rng import undisturbed

if TYPE_CHECKING:
    from lockfree.rule import Context


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

    def __init__(self, members: Sequence[Tensor]) -> None:
        self.members = list(members)
        self.value = torch.stack([member.detach() for member in self.members])
        for member, view in zip(self.members, self.value.unbind(), strict=True):
            member.data = view
        self._addresses = list(map(Tensor.data_ptr, self.members))

    @property
    def holds(self) -> bool:
        """Whether the parameters still are views of it: whoever moves a model to another device gives it new memory."""
        return list(map(Tensor.data_ptr, self.members)) == self._addresses


class Descent(ABC):
    """An optimizer's step for stacked parameters."""

    @abstractmethod
    def follow(self, stack: ParameterStack, gradient: Tensor) -> None:
        """Takes the gradients of a stack, shape of its value."""

    def follow_product(self, stack: ParameterStack, left: Tensor, right: Tensor) -> None:
        """Takes the gradients as the products of two stacks of matrices, which a plain step can be made of at once."""
        self.follow(stack, torch.bmm(left, right))


class ModuleStack:
    """Modules of equal structure as one: the first serves as the template, which is run with the weights of all.

    `Layerwise` does so where it knows every layer, `torch.func.vmap` elsewhere.

    Args:
        modules: The modules, bottom to top.

    Attributes:
        parameters: Those that learn.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._template, self._modules = modules[0], list(modules)
        names = [name for name, _ in self._template.named_parameters()]
        columns = zip(*(module.parameters() for module in modules), strict=True)
        self._stacks = {name: ParameterStack(column) for name, column in zip(names, columns, strict=True)}
        self._learning = [name for name, parameter in self._template.named_parameters() if parameter.requires_grad]
        self.parameters = [self._stacks[name] for name in self._learning]
        names = [name for name, _ in self._template.named_buffers()]
        self._buffers = dict(zip(names, zip(*(module.buffers() for module in modules), strict=True), strict=True))
        self._modes = self._training()
        layerwise = Layerwise.of(self._template)
        self._ways = ([layerwise] if layerwise else []) + [torch.func.vmap(self._one, randomness="error")]
        self._run = self._ways[0]
        self._moved: dict[str, Tensor] = {}
        self._leaves: list[Tensor] = []
        self._found: Sequence[Tensor | None] = ()

    def _training(self) -> list[bool]:
        return [part.training for module in self._modules for part in module.modules()]

    @property
    def holds(self) -> bool:
        """Whether it still stands for the modules: parameters are views of its own, and modes are those that it was made in."""
        return all(stack.holds for stack in self._stacks.values()) and self._training() == self._modes

    def _one(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], values: Sequence[Tensor]) -> Tensor:
        return torch.func.functional_call(self._template, (parameters, buffers), tuple(values))

    def run(self, *values: Tensor) -> Tensor:
        """Runs module i on slice i of each value, and returns what comes out, shape (n, ...), with its graph.

        Buffers that the modules move do so when the step is taken, in `descend`.
        """
        parameters = {name: stack.value.detach() for name, stack in self._stacks.items()}
        self._leaves = [parameters[name].requires_grad_() for name in self._learning]
        self._moved = {name: torch.stack(column) for name, column in self._buffers.items()}
        with torch.enable_grad():
            return self._run(parameters, self._moved, values)

    def gives(self, alone: Callable[[], Sequence[Any]], *values: Tensor) -> bool:
        """Whether `run` gives on an example what the modules give one by one; nothing changes.

        A module may hold numbers that tell it from its likes, may draw random ones, branch on what it is given, or use an operation
        that `torch.func.vmap` has no rule for.

        Args:
            alone: Runs the modules one by one.
            *values: What `run` takes.
        """
        with contextlib.ExitStack() as unchanged:
            for module in self._modules:
                unchanged.enter_context(undisturbed(module))
            with torch.no_grad():
                wanted = alone()
            return any(self._gives_by(way, wanted, values) for way in self._ways)

    def _gives_by(self, way: Callable[..., Tensor], wanted: Sequence[Any], values: Sequence[Tensor]) -> bool:
        self._run = way
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # such as that an operation will be run in a loop
                together = self.run(*values).detach()
        except (RuntimeError, ValueError, TypeError, IndexError, Warning):
            return False
        pairs = zip(wanted, together, strict=True)
        return all(isinstance(one, Tensor) and _close(one, other) for one, other in pairs)

    def differentiate(self, made: Tensor, credit: Tensor, wanted: Sequence[Tensor]) -> Sequence[Tensor]:
        """Takes the gradients of what `run` made, keeps those of the parameters, and returns those wanted, zero without a path."""
        found = torch.autograd.grad(made, [*self._leaves, *wanted], credit, allow_unused=True)
        count = len(self._leaves)
        self._found, self._leaves = found[:count], []
        return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found[count:], strict=True)]

    def descend(self, descent: Descent) -> None:
        """Hands over the gradients of the parameters, and puts the buffers where they have moved to."""
        for stack, gradient in zip(self.parameters, self._found, strict=True):
            if gradient is not None:
                descent.follow(stack, gradient)
        self._found = ()
        for name, column in self._buffers.items():
            torch._foreach_copy_(column, self._moved[name].unbind())


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool((one - other).norm() <= _AGREEMENT * one.norm())


_AGREEMENT = 1e-3
"""Largest relative difference between a network and its stacked form: rounding stays far below it, another function far above."""


class CreditStack(ABC):
    """How n cells of equal structure take their credit, and their auxiliary networks learn, in one operation each.

    Attributes:
        parameters: What the auxiliary networks learn.
        waits: Whether they learn from the message that arrives one tick after the credit was taken, not in the same tick.
        awaiting: Of those that wait, the credit that was taken one tick ago, shape of the outputs. The messages from above are
            subtracted from it before they learn, so that what remains is what they missed the truth by.
    """

    parameters: Sequence[ParameterStack] = ()
    waits: bool = False
    awaiting: Tensor = torch.empty(0)

    @property
    def holds(self) -> bool:
        """Whether it still stands for the auxiliary networks."""
        return all(stack.holds for stack in self.parameters)

    def enter(self, memos: Sequence[Any]) -> None:  # noqa: B027  (who does not wait has nothing in flight)
        """Takes over what each cell remembers of the batch whose message is to come."""

    def leave(self) -> Sequence[Any]:
        """Returns what each cell has to remember of that batch, as the rule's own `Context.memo`."""
        return ()

    def agrees(self, contexts: "Sequence[Context]") -> bool:
        """Whether each cell's credit is the one that it would take alone, as far as an example can tell.

        Args:
            contexts: What each cell sees of a batch.
        """
        return True

    def shown(self, flights: Sequence[Flight], outputs: Tensor) -> list[Tensor]:
        """Returns what credit depends on besides the outputs: labels, say.

        Args:
            flights: The batch that each cell works on.
            outputs: Memory for what the cells will make of them, shape (n, m, ...).
        """
        return []

    @abstractmethod
    def credit(self, outputs: Tensor, shown: Sequence[Tensor]) -> Tensor:
        """Returns the credit of each cell's output.

        Args:
            outputs: Shape (n, m, ...).
            shown: What `shown` returned.
        """

    def carried(self) -> list[Tensor]:
        """Returns what is kept from this tick for the next."""
        return []

    def carry(self, kept: Sequence[Tensor]) -> None:  # noqa: B027  (who keeps nothing has nothing to replace)
        """Replaces what is kept by other memory of the same contents."""

    @abstractmethod
    def learn(self) -> Tensor:
        """Works out what the auxiliary networks learn, and returns a number that is finite if their losses are."""

    @abstractmethod
    def losses(self) -> Tensor:
        """Returns the loss of each auxiliary network that has learnt last, shape (n,); asked before the next `credit`, if at all."""

    @abstractmethod
    def descend(self, descent: Descent) -> None:
        """Hands over the gradients of what was learnt; no weight has changed before."""
