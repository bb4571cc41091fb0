"""Where a stack's credit comes from: a rule's own stacked form, its cells one by one, or the loss."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lockfree.cell import Cell
from lockfree.executors import finite
from lockfree.executors.base import Assembly, Outcome
from lockfree.executors.sequential import act
from lockfree.rule import Needs
from lockfree.schedule import Action, Kind
from lockfree.stacking import CreditStack, Descent, ParameterStack


class Credits(ABC):
    """The credit of neighbouring cells.

    Args:
        cells: The cells, bottom to top.

    Attributes:
        parameters: What is learnt here and stepped by `descend`.
    """

    parameters: Sequence[ParameterStack] = ()

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = list(cells)

    def enter(self, assembly: Assembly, tick: int) -> None:
        """Takes over what the cells have in flight, before a tick."""
        del assembly, tick

    def leave(self, assembly: Assembly, tick: int) -> None:
        """Gives back what the cells have in flight, after a tick."""
        del assembly, tick

    @abstractmethod
    def take(self, assembly: Assembly, batches: Sequence[int], inputs: Tensor, outputs: Tensor, outcome: Outcome) -> Tensor:
        """Returns the credit of the outputs, of their shape (n, m, ...); batch by cell."""

    def learn(self, assembly: Assembly, tick: int, messages: Tensor | None, outcome: Outcome) -> Tensor | None:
        """Lets the auxiliary networks learn; returns a number that is finite if all their losses are.

        Args:
            assembly: What is worked on.
            tick: Number of the tick.
            messages: dL/dx of the cells, if anybody wants it, shape (n + 1, m, ...): there is room for the one from above.
            outcome: Is told of the losses.
        """
        return None

    def descend(self, descent: Descent) -> None:
        """Hands over the gradients of what learns here."""
        del descent


class Together(Credits):
    """All cells at once, as their rule says how.

    Args:
        cells: The cells.
        stack: The rule's stacked form.
    """

    def __init__(self, cells: Sequence[Cell], stack: CreditStack) -> None:
        super().__init__(cells)
        self._stack = stack
        self.parameters = stack.parameters
        self._first, self._last = cells[0].place.index, cells[-1].place.index
        self._outputs = torch.empty(0)

    def enter(self, assembly: Assembly, tick: int) -> None:
        if self._stack.waits:
            self._stack.enter([cell.memo_of(batch) for cell, batch in zip(self.cells, self._waiting(assembly, tick), strict=True)])

    def leave(self, assembly: Assembly, tick: int) -> None:
        if not self._stack.waits:
            return
        batches = self._waiting(assembly, tick + 1)
        for cell, batch, outputs, memo in zip(self.cells, batches, self._outputs, self._stack.leave(), strict=True):
            cell.remember(batch, outputs.clone(), memo, assembly.flights[batch])

    def _waiting(self, assembly: Assembly, tick: int) -> list[int]:
        """Returns for each cell the batch that its auxiliary network learns from in a tick."""
        return [tick - (assembly.schedule.age(cell.place.index, Kind.AUXILIARY) or 0) for cell in self.cells]

    def take(self, assembly: Assembly, batches: Sequence[int], inputs: Tensor, outputs: Tensor, outcome: Outcome) -> Tensor:
        self._outputs = outputs
        return self._stack.credit(outputs, [assembly.flights[batch] for batch in batches])

    def learn(self, assembly: Assembly, tick: int, messages: Tensor | None, outcome: Outcome) -> Tensor | None:
        batches = self._waiting(assembly, tick)
        losses = self._stack.learn(self._truths(assembly, batches[-1], messages) if self._stack.waits else None)
        indices = range(self._first, self._last + 1)
        outcome.auxiliary.update(zip(zip(indices, batches, strict=True), losses.unbind(), strict=True))
        return losses.sum()

    def _truths(self, assembly: Assembly, batch: int, messages: Tensor | None) -> Tensor:
        """Returns what each cell is told: by the next one of the stack, and the last one by its link."""
        (from_above,) = assembly.links[self._last].receive(batch) or (None,)
        assert from_above is not None, "who learns from messages is sent some"
        if len(self.cells) == 1:
            return from_above[None]
        assert messages is not None, "who learns from messages is sent some"
        messages[-1].copy_(from_above)
        return messages[1:]

    def descend(self, descent: Descent) -> None:
        self._stack.descend(descent)


class OneByOne(Credits):
    """Each cell by itself, as its rule says for one: any rule, and any way of learning late."""

    def take(self, assembly: Assembly, batches: Sequence[int], inputs: Tensor, outputs: Tensor, outcome: Outcome) -> Tensor:
        credits = []
        for cell, batch, x, y in zip(self.cells, batches, inputs, outputs, strict=True):
            kinds = assembly.schedule.kinds(cell.place.index, batch)
            cell.receive(batch, x.detach(), y, assembly.flights[batch], kinds)
            credit = cell.take_credit(batch)
            if not credit or credit[0] is None:
                raise ValueError(
                    f"{cell.rule.title} has no credit for block {cell.place.index} where every block must have one: leave out "
                    'executor="stacked"'
                )
            credits.append(credit[0])
        return torch.stack(credits)

    def learn(self, assembly: Assembly, tick: int, messages: Tensor | None, outcome: Outcome) -> Tensor | None:
        for cell, message in zip(self.cells[1:], () if messages is None else messages[1:], strict=False):
            index = cell.place.index
            assembly.links[index - 1].send(tick - (assembly.schedule.age(index, Kind.LEARN) or 0), (message.clone(),))
        for cell in self.cells:
            age = assembly.schedule.age(cell.place.index, Kind.AUXILIARY)
            if age is not None:
                act(assembly, Action(cell.place.index, Kind.AUXILIARY, tick - age), outcome)
        return None


class FromLoss(Credits):
    """The top cell: the loss's own gradient."""

    def take(self, assembly: Assembly, batches: Sequence[int], inputs: Tensor, outputs: Tensor, outcome: Outcome) -> Tensor:
        (batch,) = batches
        flight = assembly.flights[batch]
        loss, (error,) = assembly.objective(outputs[0].requires_grad_(), flight.target)
        outcome.losses[batch] = finite.at_the_top(assembly, batch, loss)
        assert error is not None, "a loss of the scores has a gradient for them"
        return error[None]


def credits_for(cells: Sequence[Cell], assembly: Assembly) -> Credits | None:
    """Returns where these cells' credit comes from; ``None`` if they cannot take it the moment that they have run."""
    schedule, rule = assembly.schedule, cells[0].rule
    indices = [cell.place.index for cell in cells]
    if any(schedule.age(i, Kind.LEARN) != schedule.age(i, Kind.FORWARD) for i in indices):
        return None
    if cells[-1].place.top:
        return FromLoss(cells) if cells[-1].joined_above and len(cells) == 1 else None
    if any(cell.joined_above or cell.joined_below or cell.needs > Needs.TARGET for cell in cells):
        return None
    stack = rule.credit_stack([cell.auxiliary for cell in cells])
    if stack is not None:
        ages = [((schedule.age(i, Kind.AUXILIARY) or 0) - (schedule.age(i, Kind.FORWARD) or 0)) for i in indices]
        if all(age == int(stack.waits) for age in ages):
            return Together(cells, stack)
    return OneByOne(cells)
