"""What a batch costs: seconds and bytes of each cell, and of what goes over the links."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lockfree.schedule import Kind


@dataclass(frozen=True, kw_only=True)
class Transport:
    r"""How long a link takes to carry something: the model of latency and bandwidth (Hockney 1994).

    $$\mathrm{seconds}(n) = \mathrm{latency} + n / \mathrm{bandwidth}$$

    Each direction of a link carries one thing at a time for ``n / bandwidth``, while workers go on computing; latencies overlap.

    Attributes:
        latency: Seconds from the sending of a byte to its arrival, 0 or more.
        bandwidth: Bytes a second, above 0; infinite for a link that takes no time but its latency.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> Transport(latency=0.5, bandwidth=100.0).seconds(25.0)
        0.75

    Reference:
        Hockney 1994, "The communication challenge for MPP", Parallel Computing 20.
    """

    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"a link's latency is 0 seconds or more, got {self.latency}")
        if not self.bandwidth > 0:
            raise ValueError(f"a link's bandwidth is above 0 bytes a second, got {self.bandwidth}")

    def seconds(self, size: float) -> float:
        """Returns how long so many bytes are on their way."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one batch costs each cell, bottom to top. A list that is left out is a list of zeros.

    Attributes:
        forward: Seconds of a forward pass.
        learn: Seconds to take the credit, differentiate and update: what the schedule calls L.
        auxiliary: Seconds for the auxiliary network to learn once the truth is there: A.
        inputs: Seconds for the network that predicts the input to learn: I.
        up_bytes: What a cell hands up, the activations; the top one's entry does not count.
        down_bytes: What a cell sends down, the message; the bottom one's entry does not count.
        error_bytes: The gradient of the loss at the model's output, for rules that broadcast it.
        activation_bytes: What is held of a batch between its forward pass and its learning.
        parameter_bytes: One version of the weights, for links that are late.

    Raises:
        ValueError: If lists differ in length, or a number is negative or not finite.

    Example:
        >>> Costs(forward=[1.0, 1.0], learn=[2.0, 3.0]).plain_step
        7.0
    """

    forward: Sequence[float]
    learn: Sequence[float]
    auxiliary: Sequence[float] = ()
    inputs: Sequence[float] = ()
    up_bytes: Sequence[float] = ()
    down_bytes: Sequence[float] = ()
    activation_bytes: Sequence[float] = ()
    parameter_bytes: Sequence[float] = ()
    error_bytes: float = 0.0

    def __post_init__(self) -> None:
        if not self.cells:
            raise ValueError("there are no cells: give the forward seconds of one or more")
        for name in _LISTS:
            given = tuple(float(value) for value in getattr(self, name)) or (0.0,) * self.cells
            if len(given) != self.cells:
                raise ValueError(f"{name} has {len(given)} entries, forward has {self.cells}: give one for each cell")
            if not all(0 <= value < math.inf for value in given):
                bad = next(value for value in given if not 0 <= value < math.inf)
                raise ValueError(f"{name} has the entry {bad}: seconds and bytes are finite and 0 or more")
            object.__setattr__(self, name, given)

    @classmethod
    def equal(cls, cells: int, *, forward: float, learn: float, error_bytes: float = 0.0, **others: float) -> "Costs":
        """Returns the costs of so many equal cells.

        Args:
            cells: How many, 1 or more.
            forward: Seconds of one forward pass.
            learn: Seconds of one cell's learning.
            error_bytes: As in the class.
            **others: Further fields of the class, each for one cell.

        Raises:
            ValueError: If a number is out of range.

        Example:
            >>> Costs.equal(3, forward=1.0, learn=2.0, auxiliary=0.5).auxiliary
            (0.5, 0.5, 0.5)
        """
        if cells < 1:
            raise ValueError(f"cells={cells}: give 1 or more")
        lists = {"forward": forward, "learn": learn, **others}
        return cls(**{name: (value,) * cells for name, value in lists.items()}, error_bytes=error_bytes)  # pyrefly: ignore

    @property
    def cells(self) -> int:
        """Number of cells."""
        return len(self.forward)

    @property
    def plain_step(self) -> float:
        """Seconds of a step of backpropagation on one worker: every forward pass and every learning in turn."""
        return sum(self.forward) + sum(self.learn)

    @property
    def seconds(self) -> Mapping[Kind, Sequence[float]]:
        """The seconds of each cell, by kind of action."""
        return {
            Kind.FORWARD: self.forward,
            Kind.LEARN: self.learn,
            Kind.AUXILIARY: self.auxiliary,
            Kind.INPUT: self.inputs,
        }

    def repeated(self, cells: int) -> "Costs":
        """Returns the costs of a longer, or shorter, network of the same make.

        Args:
            cells: How many cells it has, 1 or more; its first and last are this one's, those between are this one's in turn.

        Raises:
            ValueError: If this one has no cell between first and last where one is needed.

        Example:
            >>> Costs(forward=[1.0, 2.0, 3.0, 4.0], learn=[0.0] * 4).repeated(6).forward
            (1.0, 2.0, 3.0, 2.0, 3.0, 4.0)
        """
        if cells < 1:
            raise ValueError(f"cells={cells}: give 1 or more")
        if cells > max(self.cells, 2) and self.cells < 3:
            raise ValueError(f"{self.cells} cells have none between first and last to repeat: measure 3 or more")
        between = itertools.islice(itertools.cycle(range(1, max(self.cells - 1, 2))), max(cells - 2, 0))
        chosen = [*([0] * (cells > 1)), *between, self.cells - 1]
        lists = {name: tuple(getattr(self, name)[cell] for cell in chosen) for name in _LISTS}
        return dataclasses.replace(self, **lists)

    def merged(self, workers: Sequence[int]) -> "Costs":
        """Returns the costs of the cells of each worker taken as one; what a worker hands up is what its top cell does.

        Args:
            workers: The worker of each cell, bottom to top: 0, and at each further cell the same or the next one.

        Raises:
            ValueError: If they are not in that order.

        Example:
            >>> Costs(forward=[1.0, 2.0, 3.0], learn=[2.0, 2.0, 2.0]).merged([0, 0, 1]).forward
            (3.0, 3.0)
        """
        steps = [after - before for before, after in itertools.pairwise([0, *workers])]
        if len(workers) != self.cells or set(steps) - {0, 1} or workers[0] != 0:
            raise ValueError(
                f"workers {list(workers)}: give one for each of {self.cells} cells, 0 first, each the same or the next"
            )
        groups = [[cell for cell, _ in group] for _, group in itertools.groupby(enumerate(workers), key=lambda pair: pair[1])]
        lists = {name: tuple(math.fsum(getattr(self, name)[cell] for cell in group) for group in groups) for name in _LISTS}
        lists["up_bytes"] = tuple(self.up_bytes[group[-1]] for group in groups)
        lists["down_bytes"] = tuple(self.down_bytes[group[0]] for group in groups)
        return dataclasses.replace(self, **lists)


DIRECT = Transport()
"""A link that takes no time."""

_LISTS = ("forward", "learn", "auxiliary", "inputs", "up_bytes", "down_bytes", "activation_bytes", "parameter_bytes")
