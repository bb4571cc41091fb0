"""The executor that gives each process a group of neighbouring blocks."""

import contextlib
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from lockfree.cell import Cell
from lockfree.executors.base import Assembly, Executor, Outcome
from lockfree.executors.pipeline import groups as grouping
from lockfree.executors.pipeline import news, state
from lockfree.executors.pipeline.crossing import Crossing, Word
from lockfree.executors.pipeline.news import News
from lockfree.executors.pipeline.wire import Channel
from lockfree.executors.pipeline.world import World
from lockfree.executors.sequential import Sequential, act, run_in_order
from lockfree.flight import Flight
from lockfree.objective import Diverged
from lockfree.rng import Streams, get_rng
from lockfree.rule import Needs, Rule
from lockfree.schedule import Action, Kind, Tick
from lockfree.trace import Line, Recorder, fingerprints
from lockfree.values import tensors

_logger = logging.getLogger(__name__)

_UP, _DOWN, _NEWS = 0, 1, 2
_RISING, _FALLING, _CONTROL = map(attrgetter, ("up", "down", "control"))
_CPU = torch.device("cpu")


class Pipeline(Executor):
    """Runs neighbouring blocks in a process each group, so that they learn at the same time.

    Every process makes the same learner and takes the same steps on the same batches; of each tick it does the actions of its own
    blocks. What crosses a border between two processes is sent while both go on computing, and a process waits only for what an
    action of its own depends on. So under the pipelined schedule, rules whose blocks wait for nobody keep all processes at work.

    What every process must do together, as it does steps: `Learner.drain`, `predict`, `state_dict`, `load_state_dict`, `gradients`.

    Args:
        groups: Number of blocks of each process, bottom to top; by measured times if left out.
        ahead: Batches that a process may be ahead of a neighbour before it waits, 1 or more.
        timeout: Seconds after which a process that does not answer counts as gone.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import torch, lockfree as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        >>> learner = lf.convert(model, "pred", loss=torch.nn.functional.cross_entropy, optimizer=torch.optim.SGD,
        ...                      example_input=torch.zeros(2, 4), schedule="pipelined", executor="pipeline")  # under torchrun: in each
        >>> learner.step(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])).batch is None
        True

    Reference:
        Narayanan et al. 2019, "PipeDream", SOSP, for the pipeline; Jaderberg et al. 2016, arXiv 1608.05343, section 2 for doing
        without its waits.
    """

    def __init__(self, *, groups: Sequence[int] | None = None, ahead: int = 4, timeout: float = 1800.0) -> None:
        if ahead < 1:
            raise ValueError(f"ahead={ahead}: a process is 1 batch ahead or more")
        if not timeout > 0:
            raise ValueError(f"timeout={timeout}: give a number of seconds above 0")
        self._given, self._ahead, self._timeout = groups, ahead, timeout
        self._reference = Sequential()
        self._world: World | None = None
        self._groups: list[range] = []
        self._crossings: list[Crossing] = []
        self._news: News | None = None  # from the top, if that is elsewhere
        self._listeners: list[tuple[Channel, bool, bool]] = []  # whom the top tells what: channel, errors, scores
        self._kinds: dict[int, Hashable] = {}
        self._word = Word()
        self._filled = 0  # the step from which on every process is at most one batch behind the one below
        self._recorder: Recorder | None = None  # once somebody asks for a trace
        self._told, self._start = False, 0.0  # whether the trace has been begun; when this process joined the others
        self._whole = True  # whether this process knows the present weights of every block

    # ---- setting up ----------------------------------------------------------------------------------------------------------

    @property
    def world(self) -> World:
        """The processes."""
        assert self._world is not None, "checked first"
        return self._world

    @property
    def leads(self) -> bool:
        return self._world is None or self._world.rank == 0

    def joins_blocks(self, device: torch.device) -> bool:
        if self._world is None:
            self._world = World(device, self._timeout)
        return self._world.size == 1

    def check(self, assembly: Assembly) -> None:
        """Refuses what cannot be taken apart.

        Raises:
            ValueError: If there are fewer blocks than processes, or something would need all of them.
        """
        processes, cells = self.world.size, assembly.cells
        if self._given is not None:
            grouping.check(self._given, cells, processes)
        if processes == 1:
            return
        if len(cells) < processes:
            raise ValueError(
                f"{len(cells)} blocks cannot be shared among {processes} processes: start fewer processes, or cut the model into "
                "more blocks"
            )
        if assembly.blocks.clips and not assembly.at_once:
            raise ValueError(
                "clip_norm measures the gradient of all blocks, which no process has: let each block be clipped by itself with "
                'update="block", leave clip_norm out, or use executor="sequential"'
            )
        worst = max(cell.needs for cell in cells[:-1])
        if type(cells[0].rule).feed is not Rule.feed and worst >= Needs.ERROR:
            raise ValueError(
                f"{cells[0].rule.title} needs {worst.name} to make what enters the chain, which takes all of the model, and no process "
                'has that: use executor="sequential"'
            )

    def prepare(self, assembly: Assembly, tick: int, seconds: Callable[[], Sequence[float]]) -> None:
        """Shares the blocks out, before the first step."""
        if self._groups:
            return
        world, cells = self.world, assembly.cells
        if world.size == 1:
            self._groups = [range(len(cells))]
            return

        def times() -> Sequence[float]:
            try:
                return seconds()
            except Diverged:  # training will say so with the batch that it happens on
                return [1.0] * len(cells)

        sizes = list(self._given) if self._given else world.from_first(lambda: grouping.balanced(times(), world.size))
        grouping.check(sizes, cells, world.size)
        self._groups = grouping.ranges(sizes)
        _logger.info("blocks of each process: %s", sizes)
        assembly.own = self._groups[world.rank]
        world.spread(state.tensors_of(assembly, range(len(cells))), source=0)
        assembly.streams = Streams(world.from_first(lambda: assembly.streams.seed))
        self._connect(assembly)
        self.adopt(assembly, tick)
        self._start = time.perf_counter()

    def _connect(self, assembly: Assembly) -> None:
        """Puts crossings in the place of the links between processes."""
        world, own, cells = self.world, self._groups[self.world.rank], assembly.cells
        device = next(assembly.cells[0].block.parameters(), torch.empty(0)).device
        if own.start:
            reports = cells[own.start].reports
            self._crossings.append(self._crossing(assembly, own.start - 1, device, above=True, reports=reports))
        if own.stop < len(cells):
            reports = cells[own.stop].reports
            self._crossings.append(self._crossing(assembly, own.stop - 1, device, above=False, reports=reports))
        for crossing in self._crossings:
            assembly.links[crossing.cell] = crossing
        last = world.size - 1
        if world.rank < last:
            channel = Channel(world, last, _CONTROL, _NEWS, _CPU, self._ahead)
            self._news = News(channel, self._kinds.__getitem__, assembly.flights, device)
            return
        for peer in range(last):
            errors = not cells[-1].joined_above  # else the error never comes to light, since nobody needs it, in any phase
            scores = errors and cells[0].rule.wants_sample_losses()
            channel = Channel(world, peer, _CONTROL, _NEWS, _CPU, ahead=2 * news.AT_A_TIME)
            self._listeners.append((channel, errors, scores))

    def _crossing(self, assembly: Assembly, index: int, device: torch.device, *, above: bool, reports: bool) -> Crossing:
        world, link = self.world, assembly.links[index]
        peer = world.rank - 1 if above else world.rank + 1
        # Who sends messages must not wait for one that is taken as late as the link says.
        falls = Channel(world, peer, _FALLING, _DOWN, device, self._ahead + link.delay + len(assembly.cells))
        return Crossing(
            link,
            index,
            above=above,
            up=Channel(world, peer, _RISING, _UP, device, self._ahead),
            down=falls if reports else None,
            kind_of=self._kinds.__getitem__,
            word=self._word,
        )

    # ---- a tick --------------------------------------------------------------------------------------------------------------

    def run(self, assembly: Assembly, actions: Sequence[Action]) -> Outcome:
        """Runs this process's actions of one tick, then the update of its blocks."""
        if self.world.size == 1:
            return self._reference.run(assembly, actions)
        assert isinstance(actions, Tick), "who runs actions in several processes must know their tick"
        self.world.refuse_broken()
        try:
            return self._run(assembly, actions)
        except Exception as error:
            self.world.break_off(error)
            raise

    def _run(self, assembly: Assembly, tick: Tick) -> Outcome:
        outcome = Outcome()
        self._whole = False
        began, waited = time.perf_counter(), self.world.waited
        self._expect(assembly, tick, outcome)
        own = [action for action in tick if action.cell in self._own]
        run_in_order(assembly, own, lambda action: self._act(assembly, action, outcome))
        seconds = time.perf_counter() - began
        if self._recorder is not None:
            self._recorder.note(tick, own, began=began - self._start, seconds=seconds, waited=self.world.waited - waited)
        return outcome

    def trace(self, assembly: Assembly, step: int) -> list[Line]:
        """Returns what the processes have done since this was asked last."""
        world = self.world
        if world.size > 1 and self._recorder is None:
            self._recorder = Recorder(world.rank)
        if not self._crossings or self._recorder is None:
            return []
        prints = {"kind": "weights", "process": world.rank, "step": step, "cells": fingerprints(assembly.own_cells)}
        header = [] if self._told else [self._header(assembly)]
        self._told = True
        return header + [line for lines in world.from_each([*self._recorder.take(), prints]) for line in lines]

    def _header(self, assembly: Assembly) -> Line:
        groups = [[group.start, group.stop] for group in self._groups]
        how = {"schedule": assembly.schedule.name, "links": list(map(repr, assembly.links)), "threads": torch.get_num_threads()}
        return {"kind": "header", "processes": self.world.size, "groups": groups, **how}

    @property
    def _own(self) -> range:
        return self._groups[self.world.rank]

    def _expect(self, assembly: Assembly, tick: Tick, outcome: Outcome) -> None:
        """Makes room for all that the other processes send in a tick."""
        schedule = assembly.schedule
        self._kinds.pop(tick.number - schedule.depth - 1, None)
        if tick.number in assembly.flights:
            self._kinds[tick.number] = _kind(assembly.flights[tick.number])
        for crossing in self._crossings:
            crossing.expect(schedule, tick.number, tick.first, tick.last)
        rise = schedule.age(len(assembly.cells) - 1, Kind.FORWARD) or 0
        if tick.first > tick.number - schedule.depth:
            self._filled = tick.first + rise + 1
        reached = tick.number - rise
        if self._news is not None and tick.first <= reached <= tick.last:
            outcome.losses[reached] = self._news.expect(reached)
            outcome.awaited = True

    def _act(self, assembly: Assembly, action: Action, outcome: Outcome) -> None:
        cell, batch = assembly.cells[action.cell], action.batch
        if self._news is not None and _looks_at_the_error(cell, action.kind):
            self._news.fetch(batch)
        if assembly.schedule.overlapping:
            act(assembly, action, outcome)
        else:
            with _nothing_drawn(cell):
                act(assembly, action, outcome)
        if cell.place.top and action.kind is Kind.FORWARD:
            flight, loss = assembly.flights[batch], outcome.losses[batch]
            for channel, error, scores in self._listeners:
                channel.send((self._kinds[batch], error), batch, news.of(flight, loss.item(), error=error, scores=scores))

    def run_alone(self, assembly: Assembly, cell: int, batch: int, flight: Flight) -> Outcome:
        """Lets one cell learn alone, as the reference does, where there is one process.

        Raises:
            ValueError: If there are more.
        """
        if self.world.size > 1:
            raise ValueError('a block cannot be stepped alone in several processes: use step, or executor="sequential"')
        return self._reference.run_alone(assembly, cell, batch, flight)

    # ---- between ticks -------------------------------------------------------------------------------------------------------

    def settle(self, assembly: Assembly) -> None:
        """Takes in all that has been sent to this process."""
        for crossing in self._crossings:
            crossing.catch_up()
        if self._news is not None:
            self._news.catch_up()

    def adopt(self, assembly: Assembly, tick: int) -> None:
        """Keeps, of a state that has been loaded whole, what belongs to this process."""
        if not self._crossings:
            return
        own = self._own
        for index, cell in enumerate(assembly.cells):
            if index not in own:
                cell.clear()
        for index, link in enumerate(assembly.links):
            link.keep(up=index + 1 in own, down=index in own)
        for batch, flight in list(assembly.flights.items()):
            self._kinds[batch] = _kind(flight)
            flight.remaining = assembly.schedule.remaining(batch, tick, own)
            if not flight.remaining:
                del assembly.flights[batch]
        self._whole = True

    def gather(self, model: nn.Module, assembly: Assembly, known: dict[str, Any]) -> dict[str, Any]:
        """Puts a learner's state together from what each process knows."""
        if not self._crossings:
            return known
        self.world.refuse_broken()
        return state.whole(known, self.world.from_each(state.part(model, assembly, known, self._own)))

    def union(self, mine: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the entries of all processes."""
        if not self._crossings:
            return dict(mine)
        return {name: value for part in self.world.from_each(dict(mine)) for name, value in part.items()}

    def spread(self, assembly: Assembly) -> None:
        """Lets every process know the present weights of every block."""
        if self._whole:
            return
        self.world.refuse_broken()
        for source, group in enumerate(self._groups):
            self.world.spread(state.tensors_of(assembly, group), source)
        self._whole = True

    def forget(self) -> None:
        """Takes in all that has been sent, and drops it, so that nothing of it turns up later."""
        if self._world is None or self._world.broken:
            return
        for crossing in self._crossings:
            crossing.catch_up()
            crossing.clear()
        if self._news is not None:
            self._news.catch_up()

    # ---- when to stop --------------------------------------------------------------------------------------------------------

    def stops(self, wanted: bool, step: int) -> bool:
        """Whether training ends after a step: once the first process wants it and every other has been told on the way."""
        if self.world.size == 1:
            return wanted
        if self.leads and wanted:
            self._word.say(max(step, self._filled) + self.world.size)
        return self._word.is_due(step)

    def agrees(self, wanted: bool) -> bool:
        """Whether the first process wants something; all wait for its answer."""
        agreed = self.world.from_first(lambda: wanted)
        if agreed:
            self._word.is_due(self._word.said)  # whatever is still on its way has been heeded
        return agreed


def _kind(flight: Flight) -> Hashable:
    """Returns what decides how everything that crosses a border for a batch is laid out."""
    return tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors((flight.inputs, flight.target)))


def _looks_at_the_error(cell: Cell, kind: Kind) -> bool:
    """Whether an action looks at the gradient of the loss at the model's output."""
    if kind in (Kind.LEARN, Kind.MESSAGE):
        return cell.needs >= Needs.ERROR
    if kind is Kind.AUXILIARY:
        return (cell.auxiliary_needs or Needs.NOTHING) >= Needs.ERROR or cell.rule.wants_sample_losses()
    return False


@contextlib.contextmanager
def _nothing_drawn(cell: Cell) -> Iterator[None]:
    """Refuses a block that draws random numbers where the order of all blocks decides which ones.

    Raises:
        ValueError: If it does.
    """
    before = get_rng()
    yield
    if any(not torch.equal(one, other) for one, other in zip(before.values(), get_rng().values(), strict=True)):
        raise ValueError(
            f"block {cell.place.index} draws random numbers (dropout, say), which under lockstep without delay come from one generator in "
            'the order of the blocks (the forward lock): use schedule="pipelined" or links=Link(delay=1), under which each block and '
            "batch has its own"
        )
