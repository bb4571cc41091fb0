"""What an executor works on and what it must do."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lockfree.cell import Cell
from lockfree.link import Link
from lockfree.objective import Objective
from lockfree.schedule import Action
from lockfree.values import Credit, Values


@dataclass(slots=True)
class Flight:
    """A batch between its entry and its last action.

    Attributes:
        inputs: The batch, until the bottom cell has taken it.
        target: Its targets.
        remaining: Actions still to come.
        error: dL/d(model output), once the top cell has run forward.
        loss: The loss, once the top cell has run forward.
    """

    inputs: Values
    target: Any
    remaining: int
    error: Credit | None = None
    loss: Tensor | None = None


@dataclass(slots=True)
class Assembly:
    """Everything that events act upon.

    Attributes:
        cells: Bottom to top.
        links: Link i joins cell i and cell i + 1.
        objective: The loss above the top cell.
        flights: The batches in flight, by number.
    """

    cells: list[Cell]
    links: list[Link]
    objective: Objective
    flights: dict[int, Flight] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What a run of actions brought to light.

    Attributes:
        losses: The loss of each batch that reached the top, by batch.
        auxiliary: The loss of each auxiliary network that learnt, by (cell, batch).
    """

    losses: dict[int, Tensor] = field(default_factory=dict)
    auxiliary: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class Executor(ABC):
    """Runs actions. Whatever it does to be fast, the parameters come out as under `Sequential`."""

    @abstractmethod
    def run(self, assembly: Assembly, actions: Sequence[Action]) -> Outcome:
        """Runs the actions and returns what they brought to light.

        Raises:
            Diverged: If a loss is not finite; blocks that had not learnt yet are unchanged.
        """
