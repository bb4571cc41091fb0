"""The reference: one action after the other, in one process."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lockfree.cell import Cell, full_precision
from lockfree.executors.base import Assembly, Executor, Outcome
from lockfree.objective import Diverged, is_finite
from lockfree.rule import Needs
from lockfree.schedule import Action, Kind
from lockfree.values import Credit, tensors


class Sequential(Executor):
    """Runs the actions in the order in which they are listed."""

    def run(self, assembly: Assembly, actions: Sequence[Action]) -> Outcome:
        """Runs the actions of one tick, then the update."""
        outcome = Outcome()
        for index, kind, batch in actions:
            cell, flight = assembly.cells[index], assembly.flights[batch]
            if kind is Kind.FORWARD:
                _forward(assembly, cell, batch, outcome)
            elif kind is Kind.LEARN:
                _learn(assembly, cell, batch)
            else:
                loss = cell.learn_auxiliary(batch, *_credit_for(assembly, cell, cell.auxiliary_needs, batch))
                if loss is not None:
                    outcome.auxiliary[index, batch] = loss
            flight.remaining -= 1
            if not flight.remaining:
                del assembly.flights[batch]
        assembly.update()
        return outcome


def _forward(assembly: Assembly, cell: Cell, batch: int, outcome: Outcome) -> None:
    flight, index = assembly.flights[batch], cell.place.index
    inputs = assembly.links[index - 1].take(batch) if index else flight.inputs
    outputs = cell.forward(batch, inputs, flight.target, flight.shared)
    if cell.learns_early and not all(bool(tensor.isfinite().all()) for tensor in tensors(outputs)):
        raise Diverged(
            f"training broke at step {batch + 1}: cell {index} ('{cell.block.name}') gave the first output that is not finite; look for "
            "bad values in the data, lower the learning rate, or go on from the last checkpoint"
        )
    if not cell.place.top:
        assembly.links[index].lift(batch, outputs)
        return
    if cell.joined_above:
        flight.loss = assembly.objective.evaluate(outputs, flight.target)
    else:
        flight.loss, flight.error = assembly.objective(outputs, flight.target)
    outcome.losses[batch] = flight.loss.detach()
    if not is_finite(outcome.losses[batch]):
        raise Diverged(_where_it_broke(assembly, batch, flight.loss))


def _learn(assembly: Assembly, cell: Cell, batch: int) -> None:
    above = error = None
    if not cell.joined_above:
        above, error = _credit_for(assembly, cell, cell.needs, batch)
    elif cell.place.top:
        flight = assembly.flights[batch]
        assert flight.loss is not None, "the top cell runs forward before it learns"
        if flight.loss.requires_grad:
            with full_precision(flight.loss.device.type):
                flight.loss.backward()
        flight.loss = None
    message = cell.learn(batch, above, error)
    if cell.reports:
        assembly.links[cell.place.index - 1].send(batch, message)


def _credit_for(assembly: Assembly, cell: Cell, needs: Needs | None, batch: int) -> tuple[Credit | None, Credit | None]:
    """Returns (above, error) as far as they are needed; what is not needed is withheld."""
    flight, place = assembly.flights[batch], cell.place
    above = error = None
    if needs == Needs.ABOVE:
        above = flight.error if place.top else assembly.links[place.index].receive(batch)
    if needs is not None and needs >= Needs.ERROR:
        error = flight.error
    return above, error


def _where_it_broke(assembly: Assembly, batch: int, loss: Tensor) -> str:
    """Names the lowest cell whose output is not finite; the batch is run once more for that."""
    where = f"cell {assembly.cells[-1].place.index} (the top one) gave finite scores, the loss itself is not finite"
    values = assembly.flights[batch].inputs
    with torch.no_grad():
        for cell in assembly.cells:
            values = cell.block(values)
            if not all(bool(tensor.isfinite().all()) for tensor in tensors(values)):
                where = f"cell {cell.place.index} ('{cell.block.name}') gave the first output that is not finite"
                break
    return (
        f"the loss is {loss.item()} at step {batch + 1}: {where}; look for bad values in the data, lower the learning rate, "
        "or go on from the last checkpoint"
    )
