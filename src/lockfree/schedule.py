"""When is data: a schedule is the list of events of a training run, and it alone decides the mathematics.

An event is an `Action`: cell 2 runs forward on batch 7 (``2F7``), learns on it (``2L7``), or its auxiliary network does
(``2A7``). A schedule is derived from what the blocks need and from the delays of the links; nothing in it is written by hand.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, partial
from typing import NamedTuple, overload

from lockfree.rule import Clock, Needs, Pace, Place, Rule


class Kind(StrEnum):
    """What happens in an action.

    F the block runs forward; L it learns; M it takes its credit and sends its message, but does not learn; A its auxiliary
    network learns; I the network that predicts its input learns.
    """

    FORWARD = "F"
    LEARN = "L"
    MESSAGE = "M"
    AUXILIARY = "A"
    INPUT = "I"


class Action(NamedTuple):
    """One event: a cell does something on a batch.

    Example:
        >>> str(Action(2, Kind.FORWARD, 7))
        '2F7'
    """

    cell: int
    kind: Kind
    batch: int

    def __str__(self) -> str:
        return f"{self.cell}{self.kind}{self.batch}"


_action: Callable[[tuple[int, Kind, int]], Action] = partial(tuple.__new__, Action)  # as `Action._make`, and no call of Python


@dataclass(frozen=True)
class Schedule:
    r"""The events of a chain of cells, tick by tick; batch t enters in tick t.

    With `hop` the ticks that activations take from one cell to the next, and $d_i$ the delay of the link above cell i, cell i
    works on batch t in the ticks

    $$f_i = \begin{cases} t & \text{synthetic input} \\ f_{i-1} + \mathrm{hop} & \text{else} \end{cases}, \qquad
    l_i = \begin{cases} f_i & \text{needs} \le \text{TARGET} \\ f_{n-1} + \sum_{j \ge i} d_j & \text{ERROR} \\
    l_{i+1} + d_i & \text{ABOVE} \end{cases}$$

    and its auxiliary network likewise; the network that predicts its input learns once the real one is there. Within a tick a
    cell runs forward first, then learns, then its auxiliary networks learn; so nothing in the tick reads weights that learnt in
    it, and they are all stepped at its end. A `Clock` leaves events out: of blocks that rest, and of what would wait for them.

    Args:
        name: What the user calls it.
        needs: What each block needs, bottom to top.
        auxiliary: What each auxiliary network needs, ``None`` where nothing learns.
        delays: One for each link, bottom to top.
        hop: Ticks from one cell to the next, 0 or 1.
        synthetic: For each cell, whether it runs on a synthetic input.
        clock: Which cells work on which batch; all on all if left out.
        losses: Whether auxiliary networks learn from the losses of samples, and so wait for the batch to reach the top as well.
    """

    name: str
    needs: tuple[Needs, ...]
    auxiliary: tuple[Needs | None, ...]
    delays: tuple[int, ...]
    hop: int
    synthetic: tuple[bool, ...] = ()
    clock: Clock | None = None
    losses: bool = False

    @cached_property
    def _offset(self) -> dict[tuple[int, Kind], int]:
        return _offsets(self.needs, self.auxiliary, self.delays, self.hop, self.synthetic, self.losses)

    @cached_property
    def _all_kinds(self) -> list[frozenset[Kind]]:
        kinds: list[set[Kind]] = [set() for _ in range(self.cells)]
        for cell, kind in self._offset:
            kinds[cell].add(kind)
        return list(map(frozenset, kinds))

    @cached_property
    def _orders(self) -> dict[tuple[int, int], list[tuple[int, Kind, int]]]:
        return {}  # ticks differ only by which batches are in flight; each order is worked out once

    @property
    def cells(self) -> int:
        """Number of cells."""
        return len(self.needs)

    @property
    def depth(self) -> int:
        """Ticks between a batch's entry and its last action."""
        return max(self._offset.values())

    def age(self, cell: int, kind: Kind) -> int | None:
        """Returns how many ticks after a batch's entry a cell does this to it; ``None``: it never does."""
        return self._offset.get((cell, kind))

    @property
    def overlapping(self) -> bool:
        """Whether blocks need not run in the order of a plain loop: they are at work on several batches, or on synthetic inputs."""
        unlocked = bool(self.synthetic) and all(self.synthetic[1:])
        return self.cells > 1 and (self.hop > 0 or self.depth > 0 or unlocked)

    def remaining(self, batch: int, tick: int, cells: range | None = None) -> int:
        """Returns the number of actions of a batch that are to come once those of a tick are done.

        Args:
            batch: Number of the batch.
            tick: Number of the tick.
            cells: Whose actions count; those of all cells if left out.
        """
        kinds = self._kinds(batch)
        asked = range(self.cells) if cells is None else cells
        return sum(
            offset > tick - batch and (kind in kinds[cell] or (kind is Kind.LEARN and Kind.MESSAGE in kinds[cell]))
            for (cell, kind), offset in self._offset.items()
            if cell in asked
        )

    def kinds(self, cell: int, batch: int) -> frozenset[Kind]:
        """Returns everything that a cell does on a batch."""
        return self._all_kinds[cell] if self.clock is None else self._kinds(batch)[cell]

    def _kinds(self, batch: int) -> list[frozenset[Kind]]:
        """Returns, for each cell, everything that it does on a batch."""
        if self.clock is None:
            return self._all_kinds
        if batch not in self._clocked:
            if len(self._clocked) > _BATCHES_REMEMBERED:
                self._clocked.clear()
            self._clocked[batch] = self._read_the_clock(self.clock, batch)
        return self._clocked[batch]

    @cached_property
    def _clocked(self) -> dict[int, list[frozenset[Kind]]]:
        return {}

    def _read_the_clock(self, clock: Clock, batch: int) -> list[frozenset[Kind]]:
        kinds: list[frozenset[Kind]] = [frozenset()] * self.cells
        silence = False  # whether nothing comes from above
        for cell in range(self.cells - 1, -1, -1):
            pace = Pace.REST if silence and self.needs[cell] == Needs.ABOVE else clock.pace(cell, batch)
            kept = {Kind.FORWARD, *_KINDS_OF[pace]}
            if clock.auxiliary(cell, batch):
                kept |= {Kind.INPUT} if silence and self.auxiliary[cell] == Needs.ABOVE else {Kind.INPUT, Kind.AUXILIARY}
            kinds[cell] = (self._all_kinds[cell] | {Kind.MESSAGE}) & kept
            silence = not _KINDS_OF[pace]
        return kinds

    def actions_of(self, batch: int, cells: range | None = None) -> int:
        """Returns the number of actions that a batch takes from entry to end, those of some cells or of all."""
        if self.clock is None and cells is None:
            return len(self._offset)
        return sum(map(len, self._kinds(batch) if cells is None else self._kinds(batch)[cells.start : cells.stop]))

    def tick(self, tick: int, first: int, last: int) -> "Tick":
        """Returns the actions of one tick in the order of the sequential reference.

        Args:
            tick: Number of the tick.
            first: Earliest batch that may take part (a drain ended all before it).
            last: Latest batch that has entered or enters now.
        """
        return Tick(self, tick, max(first - tick, -self.depth), min(last - tick, 0))

    def _listed(self, tick: int, low: int, high: int) -> list[Action]:
        """Lists the actions of one tick, of batches that entered from ``-low`` to ``-high`` ticks ago."""
        if (low, high) not in self._orders:
            self._orders[low, high] = self._order(low, high)
        actions = [_action((cell, kind, tick + shift)) for cell, kind, shift in self._orders[low, high]]
        return actions if self.clock is None else list(self._on_the_clock(actions))

    def _on_the_clock(self, actions: Sequence[Action]) -> Iterator[Action]:
        """Leaves out what a resting cell does not do, and learning where there is only a message."""
        for action in actions:
            kinds = self.kinds(action.cell, action.batch)
            if action.kind in kinds:
                yield action
            elif action.kind is Kind.LEARN and Kind.MESSAGE in kinds:
                yield action._replace(kind=Kind.MESSAGE)

    def actions(self, batches: int) -> list[Action]:
        """Returns all actions of so many batches, drained at the end.

        Example:
            >>> from lockfree.rule import Needs
            >>> plan = lockstep((Needs.TARGET, Needs.ABOVE), (None, None), (0,))
            >>> " ".join(map(str, plan.actions(2)))
            '0F0 0L0 1F0 1L0 0F1 0L1 1F1 1L1'
        """
        ticks = range(batches + self.depth)
        return [action for tick in ticks for action in self.tick(tick, 0, batches - 1)]

    def waits_for(self, action: Action) -> Iterator[Action]:
        """Yields the actions of *other* cells that an action depends on; the timeline and every executor go by it."""
        cell, kind, batch = action
        top = self.cells - 1
        if kind is Kind.INPUT or (kind is Kind.FORWARD and cell and not self._synthetic(cell)):
            yield Action(cell - 1, Kind.FORWARD, batch)
        if kind in (Kind.FORWARD, Kind.INPUT):
            return
        needs = self.auxiliary[cell] if kind is Kind.AUXILIARY else self.needs[cell]
        if cell != top and (needs == Needs.ERROR or (kind is Kind.AUXILIARY and self.losses)):
            yield Action(top, Kind.FORWARD, batch)
        if cell != top and needs == Needs.ABOVE:
            yield Action(cell + 1, Kind.MESSAGE if Kind.MESSAGE in self.kinds(cell + 1, batch) else Kind.LEARN, batch)

    def _synthetic(self, cell: int) -> bool:
        return bool(self.synthetic) and self.synthetic[cell]

    def joins(self, cell: int) -> bool:
        """Whether a block learns in the tick in which it and the one above run, so that one graph can span both."""
        above = cell + 1 < self.cells and self.needs[cell] == Needs.ABOVE and not self.overlaps(cell, Kind.LEARN)
        return above and self._offset[cell, Kind.LEARN] == self._offset[cell + 1, Kind.LEARN]

    def learns_early(self, cell: int) -> bool:
        """Whether a block learns in an earlier tick than that in which the batch reaches the loss."""
        return self._offset[cell, Kind.LEARN] < self._offset[self.cells - 1, Kind.FORWARD]

    def overlaps(self, cell: int, kind: Kind) -> bool:
        """Whether weights may change between a call and its use: of the block before L, of auxiliary networks before A and I."""
        before = _BEFORE[kind]
        return (cell, kind) in self._offset and self._offset[cell, kind] > self._offset[cell, before]

    def _order(self, low: int, high: int) -> list[tuple[int, Kind, int]]:
        """Orders the actions of one tick: up the chain, and after each forward everything that has become possible."""
        unclocked = replace(self, clock=None)  # what a clock leaves out of the order changes nothing in it
        pending = {(cell, kind, -offset) for (cell, kind), offset in self._offset.items() if low <= -offset <= high}
        order: list[tuple[int, Kind, int]] = []

        def ready(cell: int, kind: Kind, shift: int) -> bool:
            others = unclocked.waits_for(Action(cell, kind, shift))
            return not any(wait in pending for wait in [(cell, _BEFORE[kind], shift), *others])

        def emit(cell: int, kind: Kind) -> bool:
            shift = -self._offset.get((cell, kind), never)
            possible = (cell, kind, shift) in pending and (kind is Kind.FORWARD or ready(cell, kind, shift))
            if possible:
                pending.remove((cell, kind, shift))
                order.append((cell, kind, shift))
            return possible

        never = self.depth + 1
        for cell in range(self.cells):
            emit(cell, Kind.FORWARD)
            emit(cell, Kind.INPUT)
            for below in range(cell, -1, -1):
                emitted = [emit(below, Kind.LEARN), emit(below, Kind.AUXILIARY)]
                # Further down waits for the next cell or for the top one; so a long chain takes no square of its length.
                if below < cell < self.cells - 1 and not any(emitted):
                    break
        assert not pending, f"actions that wait for each other: {pending}"
        return order


class Tick(Sequence[Action]):
    """The actions of one tick; they are worked out when somebody looks, since an executor may know them by heart.

    Args:
        schedule: Whose tick it is.
        number: Its number.
        low: Minus the age, in ticks, of the oldest batch that takes part.
        high: Likewise of the youngest.
    """

    __slots__ = ("_actions", "_high", "_low", "_schedule", "number")

    def __init__(self, schedule: Schedule, number: int, low: int, high: int) -> None:
        self._schedule, self.number, self._low, self._high = schedule, number, low, high
        self._actions: list[Action] | None = None

    @property
    def first(self) -> int:
        """The earliest batch that takes part."""
        return self.number + self._low

    @property
    def last(self) -> int:
        """The latest batch that takes part."""
        return self.number + self._high

    @property
    def whole(self) -> bool:
        """Whether every cell does all that it ever does: the pipeline is full, and no clock lets a cell rest."""
        return self._high == 0 and self._low == -self._schedule.depth and self._schedule.clock is None

    @property
    def _list(self) -> list[Action]:
        if self._actions is None:
            self._actions = self._schedule._listed(self.number, self._low, self._high)
        return self._actions

    @overload
    def __getitem__(self, index: int) -> Action: ...
    @overload
    def __getitem__(self, index: slice) -> list[Action]: ...
    def __getitem__(self, index: int | slice) -> Action | list[Action]:
        return self._list[index]

    def __len__(self) -> int:
        return len(self._list)

    def __iter__(self) -> Iterator[Action]:
        return iter(self._list)

    def __eq__(self, other: object) -> bool:
        return self._list == (other._list if isinstance(other, Tick) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Tick({self.number}: {' '.join(map(str, self._list))})"


_BEFORE = {Kind.LEARN: Kind.FORWARD, Kind.AUXILIARY: Kind.LEARN, Kind.INPUT: Kind.FORWARD}
"""What a cell must have done itself before an action; of a cell with a clock, as far as it does it."""

_BATCHES_REMEMBERED = 64

_KINDS_OF = {Pace.LEARN: (Kind.LEARN,), Pace.REPORT: (Kind.MESSAGE,), Pace.REST: (), Pace.FREEZE: ()}


def _offsets(
    needs: Sequence[Needs],
    auxiliary: Sequence[Needs | None],
    delays: Sequence[int],
    hop: int,
    synthetic: Sequence[bool],
    losses: bool,
) -> dict[tuple[int, Kind], int]:
    """Works out the tick, counted from a batch's entry, of each of its actions (the equation in `Schedule`)."""
    count = len(needs)
    forward = [0] * count
    for cell in range(1, count):
        forward[cell] = 0 if synthetic and synthetic[cell] else forward[cell - 1] + hop
    learn = list(forward)
    offsets: dict[tuple[int, Kind], int] = {}
    error = forward[-1]
    for cell in range(count - 1, -1, -1):
        error += delays[cell] if cell < count - 1 else 0
        arrival = {Needs.NOTHING: 0, Needs.TARGET: 0, Needs.ERROR: error, Needs.ABOVE: 0}
        if cell < count - 1:
            arrival[Needs.ABOVE] = learn[cell + 1] + delays[cell]
        learn[cell] = max(forward[cell], arrival[needs[cell]])
        offsets[cell, Kind.FORWARD] = forward[cell]
        offsets[cell, Kind.LEARN] = learn[cell]
        after = auxiliary[cell]
        if after is not None:
            reached = arrival[Needs.ERROR] if losses else 0
            offsets[cell, Kind.AUXILIARY] = max(learn[cell], arrival[after], reached)
        if synthetic and synthetic[cell]:
            offsets[cell, Kind.INPUT] = max(forward[cell], forward[cell - 1])
    return offsets


def lockstep(
    needs: tuple[Needs, ...],
    auxiliary: tuple[Needs | None, ...],
    delays: tuple[int, ...],
    *,
    synthetic: tuple[bool, ...] = (),
    clock: Clock | None = None,
    losses: bool = False,
) -> Schedule:
    """One batch at a time: it enters and, unless a link delays a message, everything is learnt before the next one."""
    return Schedule("lockstep", needs, auxiliary, delays, hop=0, synthetic=synthetic, clock=clock, losses=losses)


def pipelined(
    needs: tuple[Needs, ...],
    auxiliary: tuple[Needs | None, ...],
    delays: tuple[int, ...],
    *,
    synthetic: tuple[bool, ...] = (),
    clock: Clock | None = None,
    losses: bool = False,
) -> Schedule:
    """Cell i works on batch t - i in tick t, or on batch t if its input is synthetic, so that all cells can work at once.

    Raises:
        ValueError: If a block needs ERROR or ABOVE and its links are direct: it would have to stop and wait. Late messages are
            legal, but they must be asked for by links with a delay.
    """
    for cell, (need, delay) in enumerate(zip(needs[:-1], delays, strict=True)):
        if need >= Needs.ERROR and delay < 1:
            raise ValueError(
                f"the pipelined schedule cannot serve block {cell}, which needs {need.name}: it would wait for those above; "
                'accept late credit with links=Link(delay=1), choose a rule that needs TARGET at most, or schedule="lockstep"'
            )
    return Schedule("pipelined", needs, auxiliary, delays, hop=1, synthetic=synthetic, clock=clock, losses=losses)


SCHEDULES = {"lockstep": lockstep, "pipelined": pipelined}
"""Every schedule by the name that `lockfree.convert` takes."""


def schedule_of(rule: Rule, make: Callable[..., Schedule], delays: Sequence[int]) -> Schedule:
    """Derives a schedule from what a rule needs at each place.

    Args:
        rule: How blocks get their credit; one phase of it.
        make: `lockstep` or `pipelined`.
        delays: One for each link, bottom to top.

    Raises:
        ValueError: If the rule's blocks would have to wait where nobody may.

    Example:
        >>> from lockfree import rules
        >>> " ".join(map(str, schedule_of(rules.get("backprop"), lockstep, [0]).actions(1)))
        '0F0 1F0 1L0 0L0'
    """
    cells = len(delays) + 1
    places = [Place(index, cells) for index in range(cells)]
    return make(
        tuple(rule.needs(place) for place in places),
        tuple(rule.auxiliary_needs(place) for place in places),
        tuple(delays),
        synthetic=tuple(rule.synthesises_inputs(place) for place in places),
        clock=rule.clock(cells),
        losses=rule.wants_sample_losses(),
    )
