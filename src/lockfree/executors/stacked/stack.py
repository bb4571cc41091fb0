"""A run of cells of equal structure, which go through their ticks as one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lockfree.cell import Cell
from lockfree.executors import finite
from lockfree.executors.base import Assembly, Outcome
from lockfree.executors.stacked.blocks import BlockStack
from lockfree.executors.stacked.credit import Credits, OneByOne
from lockfree.schedule import Kind


class _Memory(NamedTuple):
    """What a tick reads and writes: views that are made once, since making one takes as long as a small operation.

    Attributes:
        bottom: The lowest of the inputs.
        inputs: Of all cells.
        outputs: Of all cells.
        lowest: What is looked at to see that outputs are finite.
        top: The uppermost of the outputs.
    """

    bottom: Tensor
    inputs: Tensor
    outputs: Tensor
    lowest: Tensor
    top: Tensor


def _memory(inputs: Tensor, outputs: Tensor) -> _Memory:
    return _Memory(inputs[0], inputs, outputs, outputs[0], outputs[-1])


class Stack:
    """n neighbouring cells, each at work on a batch of its own, that run forward and learn in the same operations.

    Args:
        cells: The cells, bottom to top.
        blocks: Their blocks as one.
        credits: Where their credit comes from.
        assembly: What they are part of.
    """

    def __init__(self, cells: Sequence[Cell], blocks: BlockStack, credits: Credits, assembly: Assembly) -> None:
        self.cells, self.blocks, self.credits = list(cells), blocks, credits
        self._assembly, self._ages = assembly, credits.ages(assembly, Kind.FORWARD)
        bottom, top = cells[0].place, cells[-1].place
        self._link_below = assembly.links[bottom.index - 1] if bottom.index else None
        self._link_above = None if top.top else assembly.links[top.index]
        self.lower: Stack | None = None
        self.upper: Stack | None = None
        self._reports, self._sends = any(cell.reports for cell in cells), cells[0].reports
        # What a tick makes is what the next one takes, one cell further up: they work on two pieces of memory in turn.
        self._pieces: list[Tensor] = []
        self._now: _Memory | None = None
        self._following: _Memory | None = None
        self._outputs = self._top = self._entering = self._message = torch.empty(0)

    def joins(self, lower: "Stack") -> None:
        """Takes a stack for the one right below, if it is, so that they need no link; a cell that learns by itself listens to links."""
        if lower.cells[-1].place.index + 1 == self.cells[0].place.index and not isinstance(lower.credits, OneByOne):
            self.lower, lower.upper = lower, self

    def batches(self, tick: int) -> list[int]:
        """Returns the batch that each cell works on in a tick."""
        return [tick - age for age in self._ages]

    @property
    def self_contained(self) -> bool:
        """Whether a tick is the same operations on tensors as the one before, given what `shown` returns."""
        below, above = self.lower or not self._link_below, self.upper or not self._link_above
        return bool(below and above) and self.credits.repeats

    # ---- what is in flight -------------------------------------------------------------------------------------------------

    def enter(self, tick: int) -> None:
        """Takes over what links and cells keep, before a tick."""
        links = [self._assembly.links[cell.place.index - 1] for cell in self.cells[1:]]
        taken = [link.take(batch).detach() for link, batch in zip(links, self.batches(tick)[1:], strict=True)]
        if taken:
            # The bottom cell's input and the top cell's output are not there yet.
            one = torch.stack([torch.empty_like(taken[0]), *taken, torch.empty_like(taken[0])])
            self._lay(one, torch.empty_like(one))
        if self.lower is not None and self._link_below is not None:
            self._entering = self._link_below.take(self.batches(tick)[0]).detach()
        self.credits.enter(self._assembly, tick)

    def _lay(self, one: Tensor, other: Tensor) -> None:
        self._pieces = [one, other]
        self._now, self._following = _memory(one[:-1], other[1:]), _memory(other[:-1], one[1:])

    def leave(self, tick: int) -> None:
        """Gives back what links and cells keep, after a tick."""
        handed_up = len(self.cells) if self.upper is not None else len(self.cells) - 1
        for cell, batch, outputs in zip(self.cells[:handed_up], self.batches(tick), self._outputs, strict=False):
            self._assembly.links[cell.place.index].lift(batch, outputs.clone().requires_grad_())
        self.credits.leave(self._assembly, tick)

    def carried(self) -> list[Tensor]:
        """Returns the tensors that hold what is in flight between two ticks."""
        between = [self._entering] if self.lower is not None else []
        return [*self._pieces[:1], *between, *self.credits.carried()]

    def carry(self, kept: Sequence[Tensor]) -> None:
        """Lets other memory of the same contents stand for that of `carried`."""
        left = list(kept)
        if self._pieces:
            self._lay(left.pop(0), self._pieces[1])
        if self.lower is not None:
            self._entering = left.pop(0)
        self.credits.carry(left)

    # ---- a tick --------------------------------------------------------------------------------------------------------------

    def shown(self, tick: int) -> list[Tensor]:
        """Returns what the stack sees of the batches in a tick: the input, unless a stack below makes it, and targets or labels."""
        batch, fed = tick - self._ages[0], []
        if self.lower is None:
            inputs = self._assembly.flights[batch].inputs if self._link_below is None else self._link_below.take(batch)
            fed = [inputs.detach()]
        outputs = self._now.outputs if self._now is not None else self.blocks.room((fed or [self._entering])[0][None])
        return fed + self.credits.shown(self._assembly, tick, outputs)

    def run(self, tick: int, shown: Sequence[Tensor]) -> Tensor:
        """F and L of every cell; returns a number that is finite if all that they made is. No weight has changed."""
        fed = int(self.lower is None)
        bottom = shown[0] if fed else self._entering
        now = self._shift(bottom)
        self.blocks.forward(now.inputs, now.outputs)
        credit = self.credits.take(self._assembly, tick, now.inputs, now.outputs, shown[fed:])
        self.blocks.backward(credit, reports=self._reports)
        if self.upper is None and self._link_above is not None:
            self._link_above.lift(tick - self._ages[-1], now.top.clone().requires_grad_())
        if self._sends:
            assert self._link_below is not None, "who reports has a cell below"
            self._message = bottom.new_empty(bottom.shape)
            self.blocks.report(self._message[None])
            if self.lower is None:
                self._link_below.send(tick - self._ages[0], (self._message,))
        self._outputs, self._top = now.outputs, now.top
        return (now.lowest if self.credits.shows_what_is_above else now.outputs).sum()

    def _shift(self, bottom: Tensor) -> _Memory:
        """Returns the memory of a tick, with its inputs."""
        if self._now is None or self._following is None:
            inputs = bottom[None]
            return _memory(inputs, self.blocks.room(inputs))
        now, self._now, self._following = self._now, self._following, self._now
        self._pieces.reverse()
        now.bottom.copy_(bottom)
        return now

    def hand_up(self) -> None:
        """Gives what the top cell has made to the stack right above, for the next tick; that one has run."""
        if self.upper is not None:
            self.upper._entering = self._top

    def learn(self, tick: int, outcome: Outcome) -> Tensor | None:
        """A of every cell; returns a number that is finite if all their losses are. No weight has changed."""
        message = None if self.upper is None else self.upper._message
        return self.credits.learn(self._assembly, tick, self.blocks, message, outcome)

    def refuse_what_is_not_finite(self, tick: int, outcome: Outcome) -> None:
        """Names the first value that is not finite."""
        for cell, batch, outputs in zip(self.cells, self.batches(tick), self._outputs, strict=True):
            finite.refuse(cell, batch, outputs)
            if cell.place.top:
                loss = outcome.losses[batch]
                assert isinstance(loss, Tensor), "it arose here"
                finite.at_the_top(self._assembly, batch, loss)
        losses = outcome.auxiliary_by_cell()
        for cell in self.cells:
            if cell.place.index in losses:
                age = self._assembly.schedule.age(cell.place.index, Kind.AUXILIARY) or 0
                finite.beside(self._assembly, cell, tick - age, losses[cell.place.index])
