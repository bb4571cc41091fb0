"""A run of cells of equal structure, which go through their ticks as one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lockfree.cell import Cell
from lockfree.executors import finite
from lockfree.executors.base import Assembly, Outcome
from lockfree.executors.stacked.blocks import BlockStack
from lockfree.executors.stacked.credit import Credits
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
        self._below = assembly.links[bottom.index - 1] if bottom.index else None
        self._above = None if top.top else assembly.links[top.index]
        self._reports, self._sends = any(cell.reports for cell in cells), cells[0].reports
        # What a tick makes is what the next one takes, one cell further up: they work on two pieces of memory in turn.
        self._now: _Memory | None = None
        self._following: _Memory | None = None
        self._outputs = torch.empty(0)

    def batches(self, tick: int) -> list[int]:
        """Returns the batch that each cell works on in a tick."""
        return [tick - age for age in self._ages]

    # ---- what is in flight -------------------------------------------------------------------------------------------------

    def enter(self, tick: int) -> None:
        """Takes over what links and cells keep, before a tick."""
        links = [self._assembly.links[cell.place.index - 1] for cell in self.cells[1:]]
        taken = [link.take(batch).detach() for link, batch in zip(links, self.batches(tick)[1:], strict=True)]
        if taken:
            # The bottom cell's input and the top cell's output are not there yet.
            one = torch.stack([torch.empty_like(taken[0]), *taken, torch.empty_like(taken[0])])
            other = torch.empty_like(one)
            self._now, self._following = _memory(one[:-1], other[1:]), _memory(other[:-1], one[1:])
        self.credits.enter(self._assembly, tick)

    def leave(self, tick: int) -> None:
        """Gives back what links and cells keep, after a tick."""
        for cell, batch, outputs in zip(self.cells[:-1], self.batches(tick)[:-1], self._outputs, strict=False):
            self._assembly.links[cell.place.index].lift(batch, outputs.clone().requires_grad_())
        self.credits.leave(self._assembly, tick)

    # ---- a tick --------------------------------------------------------------------------------------------------------------

    def run(self, tick: int, outcome: Outcome) -> Tensor:
        """F and L of every cell; returns a number that is finite if all that they made is. No weight has changed."""
        batch = tick - self._ages[0]
        bottom = self._assembly.flights[batch].inputs if self._below is None else self._below.take(batch)
        now = self._shift(bottom.detach())
        self.blocks.forward(now.inputs, now.outputs)
        credit = self.credits.take(self._assembly, tick, now.inputs, now.outputs, outcome)
        self.blocks.backward(credit, reports=self._reports)
        if self._above is not None:
            self._above.lift(tick - self._ages[-1], now.top.clone().requires_grad_())
        if self._sends:
            assert self._below is not None, "who reports has a cell below"
            message = bottom.new_empty(bottom.shape)
            self.blocks.report(message[None])
            self._below.send(batch, (message,))
        self._outputs = now.outputs
        return (now.lowest if self.credits.shows_what_is_above else now.outputs).sum()

    def _shift(self, bottom: Tensor) -> _Memory:
        """Returns the memory of a tick, with its inputs."""
        if self._now is None or self._following is None:
            inputs = bottom[None]
            return _memory(inputs, self.blocks.room(inputs))
        now, self._now, self._following = self._now, self._following, self._now
        now.bottom.copy_(bottom)
        return now

    def learn(self, tick: int, outcome: Outcome) -> Tensor | None:
        """A of every cell; returns a number that is finite if all their losses are. No weight has changed."""
        return self.credits.learn(self._assembly, tick, self.blocks, outcome)

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
