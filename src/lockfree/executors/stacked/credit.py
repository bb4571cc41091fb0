"""Where a stack's credit comes from: a rule's own stacked form, its cells one by one, or the loss."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lockfree.cell import Cell
from lockfree.executors.base import Assembly, Losses, Outcome
from lockfree.executors.sequential import act
from lockfree.executors.stacked.blocks import BlockStack
from lockfree.rule import Needs
from lockfree.schedule import Action, Kind
from lockfree.stacking import CreditStack, Descent, ParameterStack


class Credits(ABC):
    """The credit of neighbouring cells.

    Args:
        cells: The cells, bottom to top.

    Attributes:
        parameters: What is learnt here and stepped by `descend`.
        shows_what_is_above: Whether the loss of a cell is not finite if the output of the one above it is not.
    """

    parameters: Sequence[ParameterStack] = ()
    shows_what_is_above: bool = False

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = list(cells)

    @property
    def holds(self) -> bool:
        """Whether the auxiliary networks are still those that were stacked."""
        return True

    @property
    def repeats(self) -> bool:
        """Whether `take`, `learn` and `descend` are the same operations on tensors in each tick, given what is shown."""
        return True

    def enter(self, assembly: Assembly, tick: int) -> None:  # noqa: B027  (most keep nothing from tick to tick)
        """Takes over what the cells have in flight, before a tick."""

    def leave(self, assembly: Assembly, tick: int) -> None:  # noqa: B027
        """Gives back what the cells have in flight, after a tick."""

    def shown(self, assembly: Assembly, tick: int, outputs: Tensor) -> list[Tensor]:
        """Returns what credit depends on besides inputs and outputs; ``outputs`` is where these will be."""
        return []

    @abstractmethod
    def take(self, assembly: Assembly, tick: int, inputs: Tensor, outputs: Tensor, shown: Sequence[Tensor]) -> Tensor:
        """Returns the credit of the outputs, of their shape (n, m, ...)."""

    def ages(self, assembly: Assembly, kind: Kind) -> list[int]:
        """Returns for each cell the ticks between a batch's entry and that action."""
        return [assembly.schedule.age(cell.place.index, kind) or 0 for cell in self.cells]

    def learn(
        self, assembly: Assembly, tick: int, blocks: BlockStack, message: Tensor | None, outcome: Outcome
    ) -> Tensor | None:
        """Lets the auxiliary networks learn; returns a number that is finite if all losses are.

        Args:
            assembly: What is worked on.
            tick: Number of the tick.
            blocks: The cells' blocks, which have taken their credit and can report dL/dx.
            message: What the stack right above reports; ``None``: what is above hands its message to the link.
            outcome: Is told of losses that nobody else tells of.
        """
        return None

    def tell(self, assembly: Assembly, tick: int, outcome: Outcome) -> None:  # noqa: B027  (who learns cell by cell has told)
        """Says what losses came to light in a tick."""

    def carried(self) -> list[Tensor]:
        """Returns what is kept from this tick for the next."""
        return []

    def carry(self, kept: Sequence[Tensor]) -> None:  # noqa: B027
        """Replaces what is kept by other memory of the same contents."""

    def descend(self, descent: Descent) -> None:  # noqa: B027  (who learns cell by cell leaves gradients where they belong)
        """Hands over the gradients of what learns here."""


class Together(Credits):
    """All cells at once, as their rule says how.

    Args:
        cells: The cells.
        stack: The rule's stacked form.
    """

    def __init__(self, cells: Sequence[Cell], stack: CreditStack, assembly: Assembly) -> None:
        super().__init__(cells)
        self._stack = stack
        self.parameters, self.shows_what_is_above = stack.parameters, stack.waits
        self._first, self._last = cells[0].place.index, cells[-1].place.index
        self._forward, self._learn = self.ages(assembly, Kind.FORWARD), self.ages(assembly, Kind.AUXILIARY)
        self._outputs = torch.empty(0)
        self._told: Callable[[], Losses | None] = lambda: None

    @property
    def holds(self) -> bool:
        return self._stack.holds

    def enter(self, assembly: Assembly, tick: int) -> None:
        if self._stack.waits:
            self._stack.enter([cell.memo_of(tick - age) for cell, age in zip(self.cells, self._learn, strict=True)])

    def leave(self, assembly: Assembly, tick: int) -> None:
        if not self._stack.waits:
            return
        for cell, age, outputs, memo in zip(self.cells, self._learn, self._outputs, self._stack.leave(), strict=True):
            batch = tick + 1 - age
            cell.remember(batch, outputs.clone(), memo, assembly.flights[batch])

    def shown(self, assembly: Assembly, tick: int, outputs: Tensor) -> list[Tensor]:
        losses = self._told()
        if losses is not None:  # somebody keeps them, and what they are made of is about to be overwritten
            losses.read()
        flights = assembly.flights
        return self._stack.shown([flights[tick - age] for age in self._forward], outputs)

    def take(self, assembly: Assembly, tick: int, inputs: Tensor, outputs: Tensor, shown: Sequence[Tensor]) -> Tensor:
        self._outputs = outputs
        return self._stack.credit(outputs, shown)

    def learn(
        self, assembly: Assembly, tick: int, blocks: BlockStack, message: Tensor | None, outcome: Outcome
    ) -> Tensor | None:
        if self._stack.waits:
            self._hear(self._sent(assembly, tick) if message is None else message, blocks)
        return self._stack.learn()

    def _sent(self, assembly: Assembly, tick: int) -> Tensor:
        (message,) = assembly.links[self._last].receive(tick - self._learn[-1]) or (None,)
        assert message is not None, "who learns from messages is sent some"
        return message

    def _hear(self, from_above: Tensor, blocks: BlockStack) -> None:
        """Subtracts from each prediction the truth: the message of the next cell of the stack; for the last one from above."""
        predicted = self._stack.awaiting
        predicted[-1].sub_(from_above)
        if len(self.cells) > 1:
            blocks.report(predicted[:-1], first=1, beta=1.0, alpha=-1.0)

    def tell(self, assembly: Assembly, tick: int, outcome: Outcome) -> None:
        losses = Losses(self._stack.losses)
        self._told = weakref.ref(losses)
        outcome.stacked.append((self._first, losses))

    def carried(self) -> list[Tensor]:
        return self._stack.carried()

    def carry(self, kept: Sequence[Tensor]) -> None:
        self._stack.carry(kept)

    def descend(self, descent: Descent) -> None:
        self._stack.descend(descent)


class OneByOne(Credits):
    """Each cell by itself, as its rule says for one: any rule, and any way of learning late."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        super().__init__(cells)
        self._inputs = torch.empty(0)

    @property
    def repeats(self) -> bool:
        return False

    def take(self, assembly: Assembly, tick: int, inputs: Tensor, outputs: Tensor, shown: Sequence[Tensor]) -> Tensor:
        credits, self._inputs = [], inputs
        kept = inputs.clone(), outputs.clone()  # a rule may remember them for longer than the stack does
        for cell, age, x, y in zip(self.cells, self.ages(assembly, Kind.FORWARD), *kept, strict=True):
            batch = tick - age
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

    def learn(
        self, assembly: Assembly, tick: int, blocks: BlockStack, message: Tensor | None, outcome: Outcome
    ) -> Tensor | None:
        reporting = [cell.place.index for cell in self.cells[1:] if cell.reports]
        if reporting:
            messages = self._inputs.new_empty(self._inputs[1:].shape)
            blocks.report(messages, first=1)
            for index, message in zip(reporting, messages, strict=True):
                assembly.links[index - 1].send(tick - (assembly.schedule.age(index, Kind.LEARN) or 0), (message,))
        for cell in self.cells:
            age = assembly.schedule.age(cell.place.index, Kind.AUXILIARY)
            if age is not None:
                act(assembly, Action(cell.place.index, Kind.AUXILIARY, tick - age), outcome)
        return None


class FromLoss(Credits):
    """The top cell: the loss's own gradient."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        super().__init__(cells)
        self._loss, self._target = torch.empty(0), None

    @property
    def repeats(self) -> bool:
        return isinstance(self._target, Tensor)

    def shown(self, assembly: Assembly, tick: int, outputs: Tensor) -> list[Tensor]:
        self._target = assembly.flights[self._batch(assembly, tick)].target
        return [self._target] if isinstance(self._target, Tensor) else []

    def _batch(self, assembly: Assembly, tick: int) -> int:
        return tick - (assembly.schedule.age(self.cells[0].place.index, Kind.FORWARD) or 0)

    def take(self, assembly: Assembly, tick: int, inputs: Tensor, outputs: Tensor, shown: Sequence[Tensor]) -> Tensor:
        scores = outputs[0].detach().requires_grad_()
        loss = assembly.objective.evaluate(scores, shown[0] if shown else self._target)
        (error,) = torch.autograd.grad(loss, scores)
        self._loss = loss.detach()
        return error[None]

    def learn(
        self, assembly: Assembly, tick: int, blocks: BlockStack, message: Tensor | None, outcome: Outcome
    ) -> Tensor | None:
        return self._loss

    def tell(self, assembly: Assembly, tick: int, outcome: Outcome) -> None:
        # A copy: where ticks are repeated, the next one writes its loss to the same place.
        outcome.losses[self._batch(assembly, tick)] = self._loss.clone()


def credits_for(cells: Sequence[Cell], inputs: Sequence[Tensor], assembly: Assembly, tick: int) -> Credits | None:
    """Returns where these cells' credit comes from; ``None`` if they cannot take it the moment that they have run.

    Args:
        cells: Of equal structure, their auxiliary networks too, bottom to top.
        inputs: What they are about to run on.
        assembly: What they are part of.
        tick: Number of the tick.
    """
    schedule, rule = assembly.schedule, cells[0].rule
    indices = [cell.place.index for cell in cells]
    if any(schedule.age(i, Kind.LEARN) != schedule.age(i, Kind.FORWARD) for i in indices):
        return None
    if cells[-1].place.top:
        return FromLoss(cells) if cells[-1].joined_above and len(cells) == 1 else None
    if any(cell.joined_above or cell.joined_below or cell.needs > Needs.TARGET for cell in cells):
        return None
    stack = rule.credit_stack([cell.auxiliary for cell in cells], assembly.objective)
    if stack is not None:
        ages = [((schedule.age(i, Kind.AUXILIARY) or 0) - (schedule.age(i, Kind.FORWARD) or 0)) for i in indices]
        batches = [tick - (schedule.age(i, Kind.FORWARD) or 0) for i in indices]
        contexts = [cell.rehearse(t, x, assembly.flights[t]) for cell, t, x in zip(cells, batches, inputs, strict=True)]
        if all(age == int(stack.waits) for age in ages) and stack.agrees(contexts):
            return Together(cells, stack, assembly)
    return OneByOne(cells)
