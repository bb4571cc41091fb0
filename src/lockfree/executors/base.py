"""What an executor works on and what it must do."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lockfree.cell import Cell
from lockfree.flight import Flight
from lockfree.link import Link
from lockfree.objective import Objective
from lockfree.rng import Streams
from lockfree.schedule import Action, Schedule
from lockfree.update import Update
from lockfree.values import Values


@dataclass(slots=True)
class Assembly:
    """Everything that events act upon.

    Attributes:
        cells: Bottom to top.
        links: Link i joins cell i and cell i + 1.
        schedule: What happens when, in the present phase of the rule.
        objective: The loss above the top cell.
        blocks: Changes the weights of the blocks.
        auxiliaries: Changes the weights of the auxiliary networks, if any learn.
        at_once: Whether weights change as soon as a cell is done, not at the end of the tick.
        flights: The batches in flight, by number.
        own: The cells that are worked on in this process; all of them if left out.
        streams: The random numbers of each action by itself, where batches overlap.
    """

    cells: list[Cell]
    links: list[Link]
    schedule: Schedule
    objective: Objective
    blocks: Update
    auxiliaries: Update | None
    at_once: bool = False
    flights: dict[int, Flight] = field(default_factory=dict)
    own: range | None = None
    streams: Streams = field(default_factory=lambda: Streams(torch.initial_seed()))

    @property
    def own_cells(self) -> list[Cell]:
        """The cells that are worked on in this process."""
        return self.cells if self.own is None else self.cells[self.own.start : self.own.stop]

    def enter(self, batch: int, inputs: Values, target: Any) -> None:
        """Lets a batch enter the chain."""
        self.flights[batch] = Flight(inputs, target, self.schedule.actions_of(batch, self.own))

    def apart(self) -> AbstractContextManager[None]:
        """Leaves the global generators as they are, where actions draw from streams of their own."""
        return self.streams.apart() if self.schedule.overlapping else nullcontext()

    def sample_losses(self, batch: int) -> Callable[[], Tensor] | None:
        """Returns what gives the loss of each sample of a batch, worked out once; ``None`` if it has not reached the top."""
        flight = self.flights[batch]
        if flight.error is None:
            return None

        def evaluate() -> Tensor:
            if "sample_losses" not in flight.shared:
                flight.shared["sample_losses"] = self.objective.sample_losses(flight.scores, flight.target)
            return flight.shared["sample_losses"]

        return evaluate

    def finish(self, actions: Sequence[Action]) -> None:
        """Ends the actions of a tick; with its last action ends a batch's flight."""
        flights = self.flights
        for action in actions:
            flight = flights[action.batch]
            flight.remaining -= 1
            if not flight.remaining:
                self.end(action.batch)

    def end(self, batch: int) -> None:
        """Ends the flight of a batch, and forgets whatever of it nobody has taken from a link."""
        del self.flights[batch]
        for link in self.links:
            link.forget(batch)

    def update(self) -> None:
        """Lets what has learnt change its weights.

        No action reads weights that learnt earlier in the same tick, so once at its end equals after each cell; it costs one
        optimizer call instead of one a cell, it serves parameters that blocks share, and a tick that fails has changed nothing.
        After each cell there are the gradients of one cell at a time.
        """
        block_learnt = auxiliary_learnt = False
        own = self.own_cells
        for cell in own:
            block_learnt, auxiliary_learnt = block_learnt or cell.learnt[0], auxiliary_learnt or cell.learnt[1]
        if block_learnt or auxiliary_learnt:
            for cell in own:
                cell.before_update()
        if block_learnt:
            self.blocks.take(self._correct)
        if auxiliary_learnt and self.auxiliaries is not None:
            self.auxiliaries.take()

    def _correct(self) -> None:
        """Repairs the late gradients of this tick."""
        for cell in self.own_cells:
            cell.correct()

    def clear(self) -> None:
        """Forgets everything in flight, and gradients that a failed tick left behind."""
        self.flights.clear()
        for part in [*self.cells, *self.links]:
            part.clear()
        for update in (self.blocks, self.auxiliaries):
            if update is not None:
                update.drop()


@runtime_checkable
class Number(Protocol):
    """A loss: a tensor with one number, or what will be."""

    def item(self) -> float:
        """Returns the number."""
        ...


class Losses:
    """Losses of the auxiliary networks of neighbouring cells, worked out when somebody looks.

    Args:
        evaluate: Works them out, shape (n,).
    """

    def __init__(self, evaluate: Callable[[], Tensor]) -> None:
        self._evaluate = evaluate
        self._values: Tensor | None = None

    def read(self) -> Tensor:
        """Returns them, from now on the same."""
        if self._values is None:
            self._values = self._evaluate()
        return self._values


@dataclass(slots=True)
class Outcome:
    """What a run of actions brought to light.

    Attributes:
        losses: The loss of each batch that reached the top, by batch; one that arose elsewhere is waited for when it is looked at.
        auxiliary: The loss of each auxiliary network that learnt, by (cell, batch).
        inputs: The loss of each network that predicts an input and learnt, by (cell, batch).
        stacked: Losses of auxiliary networks of neighbouring cells, with the first cell's number.
        awaited: Whether the losses arise in another process.
    """

    losses: dict[int, Number] = field(default_factory=dict)
    auxiliary: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    inputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    stacked: list[tuple[int, Losses]] = field(default_factory=list)
    awaited: bool = False

    def auxiliary_by_cell(self) -> dict[int, Tensor]:
        """Returns the loss of each auxiliary network that learnt, by cell."""
        found = {cell: loss for (cell, _), loss in self.auxiliary.items()}
        for first, losses in self.stacked:
            found |= enumerate(losses.read().unbind(), start=first)
        return found


class Executor(ABC):
    """Runs actions. Whatever it does to be fast, the parameters come out as under `Sequential`."""

    @abstractmethod
    def run(self, assembly: Assembly, actions: Sequence[Action]) -> Outcome:
        """Runs the actions of one tick, updates the weights at its end, and returns what came to light.

        Raises:
            Diverged: If a loss is not finite; no weight has changed then.
        """

    def check(self, assembly: Assembly) -> None:  # noqa: B027  (most executors serve everything)
        """Refuses what it cannot run.

        Raises:
            ValueError: With what is in the way, and the way out.
        """

    # ---- several processes ---------------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints, where several train together."""
        return True

    def joins_blocks(self, device: torch.device) -> bool:
        """Whether one graph may span several blocks: not if they might be in different processes.

        Args:
            device: Where the model is.
        """
        return True

    def prepare(self, assembly: Assembly, tick: int, seconds: Callable[[], Sequence[float]]) -> None:  # noqa: B027
        """Gets ready for the first step, or the first one after a state was loaded.

        Args:
            assembly: What will be worked on, the same in each process.
            tick: The last one that was run, -1 if none was.
            seconds: Measures how long each cell takes on a batch.
        """

    def adopt(self, assembly: Assembly, tick: int) -> None:  # noqa: B027
        """Takes in a state that has been loaded, of after a tick."""

    def gather(self, model: nn.Module, assembly: Assembly, known: dict[str, Any]) -> dict[str, Any]:
        """Returns a learner's state, of which this process knows a part.

        Args:
            model: The user's own.
            assembly: What is worked on.
            known: What `Learner.state_dict` says here.
        """
        return known

    def union(self, mine: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the entries that any process has."""
        return dict(mine)

    def spread(self, assembly: Assembly) -> None:  # noqa: B027
        """Lets this process know the present weights of all blocks."""

    def trace(self, assembly: Assembly, step: int) -> list[dict[str, Any]]:
        """Returns what the processes have done since this was asked last, as lines of a trace; one alone has nothing to tell.

        Args:
            assembly: What is worked on.
            step: Steps taken.
        """
        return []

    def stops(self, wanted: bool, step: int) -> bool:
        """Whether training is to end after so many steps, the same in all processes.

        Args:
            wanted: Whether this process has been asked to end it.
            step: Steps taken.
        """
        return wanted

    def agrees(self, wanted: bool) -> bool:
        """Whether the process that leads wants something."""
        return wanted

    # ---- what is in flight ---------------------------------------------------------------------------------------------------

    def settle(self, assembly: Assembly) -> None:  # noqa: B027  (most keep nothing to themselves)
        """Puts what is in flight where cells, links and flights keep it, for whoever wants to look at them or act on them."""

    def forget(self) -> None:  # noqa: B027
        """Forgets what is in flight: whoever calls this has cleared cells, links and flights."""

    @abstractmethod
    def run_alone(self, assembly: Assembly, cell: int, batch: int, flight: Flight) -> Outcome:
        """Lets one cell learn on a batch with nobody waiting, and with it what the neighbours predict for its sake.

        Raises:
            Diverged: If the loss is not finite; no weight has changed then.
        """
