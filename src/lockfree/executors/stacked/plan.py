"""What of a full pipeline runs as one: which cells make up a stack, and what a tick does with the stacks."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lockfree.cell import Cell
from lockfree.executors.base import Assembly, Outcome
from lockfree.executors.sequential import act
from lockfree.executors.stacked.alike import anatomy, held_alone
from lockfree.executors.stacked.blocks import AffineBlocks, BlockStack, ModuleBlocks, affine
from lockfree.executors.stacked.captured import CAPTURES, Shown, Ticks
from lockfree.executors.stacked.credit import Credits, OneByOne, credits_for
from lockfree.executors.stacked.stack import Stack
from lockfree.executors.stacked.update import StackedUpdate, stacked_update
from lockfree.link import Link
from lockfree.rule import Rule
from lockfree.schedule import Action, Kind, Tick
from lockfree.values import Values, tensors


@dataclass(slots=True)
class Plan:
    """What runs as one in a full pipeline.

    Attributes:
        stacks: The runs of cells, bottom to top.
        others: The actions of all other cells, as (cell, kind, batch less the tick).
        alone: The other cells, and those whose auxiliary networks learn one by one.
        shape: Shape of a batch.
        device: Type of the device.
        blocks: Steps the weights of the blocks.
        auxiliaries: Steps those of auxiliary networks; ``None`` if no stack has any.
        ticks: The work of a tick as captured graphs, once there are any.
    """

    stacks: list[Stack]
    others: list[tuple[int, Kind, int]]
    alone: list[Cell]
    shape: Any
    device: str
    blocks: StackedUpdate
    auxiliaries: StackedUpdate | None
    ticks: Ticks | None = None

    def compute(self, assembly: Assembly, tick: int, shown: Shown, outcome: Outcome) -> Tensor:
        """F, L and A of all cells; returns a number that is finite if all that the stacks made is. No weight has changed."""
        checks = [stack.run(tick, one) for stack, one in zip(self.stacks, shown, strict=True)]
        for cell, kind, shift in self.others:
            act(assembly, Action(cell, kind, tick + shift), outcome)
        for stack in self.stacks:
            stack.hand_up()
        checks += [check for stack in self.stacks if (check := stack.learn(tick, outcome)) is not None]
        return sum(checks[1:], start=checks[0])

    def descend(self, block_learnt: bool = False, auxiliary_learnt: bool = False) -> None:
        """Steps all weights.

        Args:
            block_learnt: Whether gradients lie on blocks that are in no stack.
            auxiliary_learnt: The same of auxiliary networks.
        """
        for stack in self.stacks:
            stack.blocks.descend(self.blocks)
            if self.auxiliaries is not None:
                stack.credits.descend(self.auxiliaries)
        self.blocks.finish(block_learnt)
        if self.auxiliaries is not None:
            self.auxiliaries.finish(auxiliary_learnt)

    def captured(self, assembly: Assembly) -> Ticks | None:
        """Returns the ticks as captured graphs, where the device has them and each tick is the same work."""
        capture = CAPTURES.get(self.device)
        updates = [self.blocks] + ([self.auxiliaries] if self.auxiliaries else [])
        alike = all(stack.self_contained for stack in self.stacks) and not self.others and not self.alone
        if capture is None or not alike or any(update.settings is None for update in updates):
            return None
        if self.ticks is None:
            self.ticks = Ticks(
                capture(),
                carried=lambda: [one for stack in self.stacks for one in stack.carried()],
                carry=self._carry,
                compute=lambda shown: self.compute(assembly, 0, shown, Outcome()),  # which tick it is plays no part
                descend=self.descend,
                settings=lambda: [update.settings for update in updates],
            )
        return self.ticks

    def _carry(self, kept: Sequence[Tensor]) -> None:
        left = iter(kept)
        for stack in self.stacks:
            stack.carry([next(left) for _ in stack.carried()])

    @property
    def holds(self) -> bool:
        """Whether models and optimizers are still those that were stacked."""
        updates = [self.blocks] + ([self.auxiliaries] if self.auxiliaries else [])
        return all(stack.blocks.holds and stack.credits.holds for stack in self.stacks) and all(
            update.holds for update in updates
        )


def plan_for(stacks: list[Stack], assembly: Assembly, tick: int) -> Plan | None:
    """Says who runs where; ``None`` if an optimizer has yet to take the first step for some parameter."""
    inside = {cell.place.index for stack in stacks for cell in stack.cells}
    listed = [
        (action.cell, action.kind, action.batch - tick) for action in Tick(assembly.schedule, tick, -assembly.schedule.depth, 0)
    ]
    one_by_one = [cell for stack in stacks if isinstance(stack.credits, OneByOne) for cell in stack.cells]
    alone = [cell for cell in assembly.cells if cell.place.index not in inside] + one_by_one
    learnt = [parameters for stack in stacks for parameters in stack.blocks.parameters]
    beside = [parameters for stack in stacks for parameters in stack.credits.parameters]
    blocks = stacked_update(assembly.blocks, learnt)
    auxiliaries = stacked_update(assembly.auxiliaries, beside) if beside and assembly.auxiliaries is not None else None
    if blocks is None or (beside and auxiliaries is None):
        return None
    return Plan(
        stacks=stacks,
        others=[action for action in listed if action[0] not in inside],
        alone=alone,
        shape=shape_of(assembly.flights[tick].inputs),
        device=stacks[0].blocks.parameters[0].value.device.type,
        blocks=blocks,
        auxiliaries=auxiliaries,
    )


def stacks_of(assembly: Assembly, tick: int) -> Iterator[Stack]:
    """Yields the runs of cells of equal structure."""
    inputs = [_input_of(assembly, cell, tick) for cell in assembly.cells]
    alone = held_alone([cell.block for cell in assembly.cells])
    kinds = [_kind(cell, value) if own else None for cell, value, own in zip(assembly.cells, inputs, alone, strict=True)]
    pairs = zip(assembly.cells, kinds, strict=True)
    for kind, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        cells = [cell for cell, _ in run]
        if kind is None:
            continue
        taken = [inputs[cell.place.index] for cell in cells]
        credits = credits_for(cells, taken, assembly, tick)
        blocks = None if credits is None else _blocks(cells, credits, taken)
        if credits is not None and blocks is not None:
            yield Stack(cells, blocks, credits, assembly)


def _input_of(assembly: Assembly, cell: Cell, tick: int) -> Values:
    """Returns what a cell will run on in a tick."""
    index = cell.place.index
    batch = tick - (assembly.schedule.age(index, Kind.FORWARD) or 0)
    link: Link | None = assembly.links[index - 1] if index else None
    return assembly.flights[batch].inputs if link is None else link.peek(batch)


def _kind(cell: Cell, inputs: Values) -> tuple | None:
    """Describes what cells must have in common to go as one; ``None`` if this one cannot."""
    body = cell.block.body
    served = (
        isinstance(inputs, Tensor)
        and body is not None
        and all(parameter.dtype == inputs.dtype for parameter in body.parameters())
        and type(cell.rule).run is Rule.run
        and not cell.synthetic
        and (cell.outputs_carry == [True] or cell.place.top)
    )
    if not served:
        return None
    shape = (tuple(inputs.shape), inputs.dtype, inputs.device)
    beside = None if cell.auxiliary is None else repr(anatomy(cell.auxiliary))
    return (*shape, repr(anatomy(body)), beside, cell.place.top)


def _blocks(cells: Sequence[Cell], credits: Credits, inputs: Sequence[Tensor]) -> BlockStack | None:
    """Returns the blocks as one, if they are; a single block only where that is done by hand or ticks can be captured."""
    bodies = [body for cell in cells if (body := cell.block.body) is not None]
    found = [affine(body) for body in bodies]
    layers = [one for one in found if one is not None]
    by_hand = len(layers) == len(cells) and all(layer.weight.dtype == inputs[0].dtype for layer, _ in layers)
    gains = by_hand or inputs[0].device.type in CAPTURES
    if len(cells) == 1 and (not gains or isinstance(credits, OneByOne)):
        return None
    if by_hand:
        return AffineBlocks([layer for layer, _ in layers], layers[0][1])
    blocks = ModuleBlocks(bodies)
    return blocks if blocks.agrees(bodies, torch.stack([value.detach() for value in inputs])) else None


def shape_of(values: Values) -> Any:
    """Returns the shape of a batch, of each of its tensors."""
    return values.shape if isinstance(values, Tensor) else [tensor.shape for tensor in tensors(values)]
