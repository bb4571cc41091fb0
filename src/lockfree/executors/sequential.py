"""The reference: one action after the other, in one process."""

from collections.abc import Callable, Sequence

from torch import Tensor

from lockfree.cell import Cell
from lockfree.executors import finite
from lockfree.executors.base import Assembly, Executor, Outcome
from lockfree.flight import Flight
from lockfree.precision import full_precision
from lockfree.rule import Needs
from lockfree.schedule import Action, Kind
from lockfree.values import Credit, Values, detach


class Sequential(Executor):
    """Runs the actions in the order in which they are listed."""

    def run(self, assembly: Assembly, actions: Sequence[Action]) -> Outcome:
        """Runs the actions of one tick, then the update."""
        if actions and all(cell.keeps_nothing for cell in assembly.cells):
            return _run_as_one_graph(assembly, actions[0].batch)
        outcome = Outcome()
        run_in_order(assembly, actions, lambda action: act(assembly, action, outcome))
        return outcome

    def run_alone(self, assembly: Assembly, cell: int, batch: int, flight: Flight) -> Outcome:
        """Runs F and L of the cell, then what its neighbours' auxiliary networks can learn from them, then the update."""
        outcome, alone = Outcome(), assembly.cells[cell]
        assembly.flights[batch] = flight
        outputs = _forward(assembly, alone, batch, outcome, frozenset({Kind.FORWARD, Kind.LEARN}))
        finite.refuse(alone, batch, outputs)
        stand_in = alone.input_of(batch)
        _learn(assembly, alone, batch, outcome)
        if not alone.place.top:
            made = assembly.links[cell].take(batch)
            above = assembly.cells[cell + 1]
            outcome.inputs[cell + 1, batch] = finite.beside(
                assembly, above, batch, above.learn_inputs_from(flight.inputs, made)
            )
        if cell and assembly.cells[cell - 1].auxiliary_needs is not None:
            message = assembly.links[cell - 1].receive(batch) if alone.reports else None
            below, sample_losses = assembly.cells[cell - 1], assembly.sample_losses(batch)
            loss = below.learn_credit_at(batch, stand_in, flight, message, flight.error, sample_losses)
            if loss is not None:
                outcome.auxiliary[cell - 1, batch] = finite.beside(assembly, below, batch, loss)
        assembly.end(batch)
        assembly.update()
        return outcome


def run_in_order(assembly: Assembly, actions: Sequence[Action], act: Callable[[Action], None]) -> None:
    """Runs actions one after the other, then the update; or each cell's update once it is done, where weights change at once."""
    for index, action in enumerate(actions):
        act(action)
        if assembly.at_once and action.cell != actions[min(index + 1, len(actions) - 1)].cell:
            assembly.update()
    assembly.finish(actions)
    assembly.update()


def act(assembly: Assembly, action: Action, outcome: Outcome) -> None:
    """Runs one action; weights have not changed when it returns."""
    if assembly.schedule.overlapping:
        assembly.streams.begin(*action)
    _ACTIONS[action.kind](assembly, assembly.cells[action.cell], action.batch, outcome)


def _run_as_one_graph(assembly: Assembly, batch: int) -> Outcome:
    """All actions of a batch where exact credit crosses every border: up, the loss, and autograd's own way down."""
    flight = assembly.flights[batch]
    values = flight.inputs
    for cell in assembly.cells:
        values = cell.run_through(batch, values, flight)
    loss = assembly.objective.evaluate(values, flight.target)
    outcome = Outcome({batch: finite.at_the_top(assembly, batch, loss)})
    _differentiate(loss)
    del assembly.flights[batch]
    assembly.blocks.take()
    return outcome


def _differentiate(loss: Tensor) -> None:
    if loss.requires_grad:
        with full_precision(loss.device.type):
            loss.backward()


def _forward(assembly: Assembly, cell: Cell, batch: int, outcome: Outcome, kinds: frozenset[Kind] | None = None) -> Values:
    flight, index = assembly.flights[batch], cell.place.index
    kinds = kinds or assembly.schedule.kinds(index, batch)
    inputs = flight.inputs if not index or cell.synthetic else assembly.links[index - 1].take(batch)
    outputs = cell.forward(batch, inputs, flight, kinds)
    if cell.learns_early:
        finite.refuse(cell, batch, outputs)
    if index != len(assembly.cells) - 1:
        assembly.links[index].lift(batch, outputs)
        return outputs
    if cell.joined_above:
        # Nobody will differentiate the loss if the top block is at rest.
        flight.loss = assembly.objective.evaluate(outputs if Kind.LEARN in kinds else detach(outputs), flight.target)
    else:
        flight.loss, flight.error = assembly.objective(outputs, flight.target)
        flight.scores = detach(outputs)
    outcome.losses[batch] = finite.at_the_top(assembly, batch, flight.loss)
    return outputs


def _learn(assembly: Assembly, cell: Cell, batch: int, outcome: Outcome, kind: Kind = Kind.LEARN) -> None:
    above = error = None
    if not cell.joined_above:
        above, error = _credit_for(assembly, cell, cell.needs, batch)
    elif cell.place.top:
        flight = assembly.flights[batch]
        assert flight.loss is not None, "the top cell runs forward before it learns"
        _differentiate(flight.loss)
        flight.loss = None
    try:
        message = cell.learn(batch, above, error, kind)
    except ValueError:
        finite.refuse(cell, batch, cell.outputs_of(batch))  # a clearer reason, if that is what it was
        raise
    if cell.reports:
        assembly.links[cell.place.index - 1].send(batch, message)


def _message(assembly: Assembly, cell: Cell, batch: int, outcome: Outcome) -> None:
    _learn(assembly, cell, batch, outcome, Kind.MESSAGE)


def _learn_auxiliary(assembly: Assembly, cell: Cell, batch: int, outcome: Outcome) -> None:
    # A block that needs the message itself has taken it, and has it at hand.
    needs = cell.auxiliary_needs if cell.needs < Needs.ABOVE else min(cell.auxiliary_needs or Needs.NOTHING, Needs.ERROR)
    above, error = _credit_for(assembly, cell, needs, batch)
    loss = cell.learn_auxiliary(batch, above, error, assembly.sample_losses(batch) if cell.rule.wants_sample_losses() else None)
    if loss is not None:
        outcome.auxiliary[cell.place.index, batch] = finite.beside(assembly, cell, batch, loss)


def _learn_inputs(assembly: Assembly, cell: Cell, batch: int, outcome: Outcome) -> None:
    loss = cell.learn_inputs(batch, assembly.links[cell.place.index - 1].take(batch))
    outcome.inputs[cell.place.index, batch] = finite.beside(assembly, cell, batch, loss)


_ACTIONS = {
    Kind.FORWARD: _forward,
    Kind.LEARN: _learn,
    Kind.MESSAGE: _message,
    Kind.AUXILIARY: _learn_auxiliary,
    Kind.INPUT: _learn_inputs,
}


def _credit_for(assembly: Assembly, cell: Cell, needs: Needs | None, batch: int) -> tuple[Credit | None, Credit | None]:
    """Returns (above, error) as far as they are needed; what is not needed is withheld."""
    flight, place = assembly.flights[batch], cell.place
    above = error = None
    if needs == Needs.ABOVE:
        above = flight.error if place.top else assembly.links[place.index].receive(batch)
    if needs is not None and needs >= Needs.ERROR:
        error = flight.error
    return above, error
