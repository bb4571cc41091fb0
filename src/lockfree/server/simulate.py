"""The reference engine: any number of workers in one process, at the times of a simulation."""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lockfree.rng import seed_of
from lockfree.server.durations import Speeds, Straggler, durations
from lockfree.server.failures import Failure, Point, ServerFailure
from lockfree.server.job import Engine, Job, Outcome
from lockfree.server.messages import Gone, NotFinite, Pulled, Push
from lockfree.server.trace import Recorder


@dataclass(frozen=True, kw_only=True)
class Simulator(Engine):
    """Workers as events in a queue. What it does depends on its fields and the job's seed alone.

    A worker pulls, works for a time that is drawn from a generator of its own, pushes, and pulls again at once; messages take no time.
    What falls on the same moment is done in the order of the workers.

    A gradient is computed when its push is due, at the weights of the pull. So nothing is in flight but numbers, and what is kept is what a
    server keeps anyway: one copy of each version that somebody works with. Were it computed at the pull, each worker would hold a
    gradient besides.

    Attributes:
        speeds: How fast workers are: one for all, or one for each. A number is a speed in batches a second; else a `Duration`.
        stragglers: Workers that take longer than that.
        failures: What goes wrong.

    Raises:
        ValueError: In `run`, if the speeds or failures are not of these workers, or all wait for a worker that does not come back.

    Example:
        >>> Simulator(speeds=[1.0, 1.0, 0.5]).speeds
        [1.0, 1.0, 0.5]
    """

    speeds: Speeds = 1.0
    stragglers: Sequence[Straggler] = ()
    failures: Sequence[Failure | ServerFailure] = ()

    def run(self, job: Job, recorder: Recorder) -> Outcome:
        """Trains.

        Args:
            job: What to train.
            recorder: Takes down what happens.
        """
        simulation = _Simulation(self, job, recorder)
        simulation.run()
        return Outcome(simulation.server.weights, simulation.server.buffers)


@dataclass(slots=True)
class _Actor:
    """A simulated worker.

    Attributes:
        number: Its number.
        draw: Draws how long it takes for a batch.
        failures: What it has yet to suffer, by batch and point.
        incarnation: Of its present life.
        batches: How many it has begun.
        life: Counts lives, so that what an earlier one had planned is not done.
        up: Whether it lives.
    """

    number: int
    draw: Callable[[], float]
    failures: dict[tuple[int, Point], Failure] = field(default_factory=dict)
    incarnation: int = 0
    batches: int = 0
    life: int = 0
    up: bool = True


class _Simulation:
    def __init__(self, simulator: Simulator, job: Job, recorder: Recorder) -> None:
        self._job, self._recorder = job, recorder
        self.server = job.server(recorder.note)
        self._worker = job.worker()
        self._now = max((line["time"] for line in recorder.lines), default=0.0)  # more than 0 where a run goes on
        recorder.clock = lambda: self._now
        self._queue: list[tuple[float, int, int, Callable[[], None]]] = []
        self._planned = 0
        self._waiting: set[int] = set()
        self._slowest = self.server.slowest
        self._milestones = job.milestones()
        self._actors = [
            _Actor(number, _drawing(job.seed, number, duration.draw, factor))
            for number, (duration, factor) in enumerate(durations(simulator.speeds, simulator.stragglers, job.workers))
        ]
        self._server_failures = sorted(
            (failure for failure in simulator.failures if isinstance(failure, ServerFailure)),
            key=lambda failure: failure.update,
        )
        self._snapshots: dict[int, dict[str, Any]] = {}
        self._wanted = {failure.snapshot for failure in self._server_failures if failure.snapshot is not None}
        for failure in simulator.failures:
            if isinstance(failure, Failure):
                self._expect(failure)

    def _expect(self, failure: Failure) -> None:
        if failure.worker >= len(self._actors):
            raise ValueError(f"{failure} is of none of the {len(self._actors)} workers, whose numbers begin at 0")
        assert isinstance(failure.point, Point)
        self._actors[failure.worker].failures[failure.batch, failure.point] = failure

    def run(self) -> None:
        """Plays events until all updates are made."""
        self._look()
        for actor in self._actors:
            actor.incarnation = self.server.join(actor.number)
        self._look_after_server()
        for actor in self._actors:
            self._pull(actor)
        self._wake()
        while self.server.version < self._job.updates:
            if not self._queue:
                raise ValueError(
                    f"after {self.server.version} updates all workers wait for one that does not come back: let it come back, or be noticed"
                )
            self._now, _, _, action = heapq.heappop(self._queue)
            action()
            if self.server.version < self._job.updates:
                self._wake()
        self._look(last=True)

    # ---- the life of a worker --------------------------------------------------------------------------------------------------

    def _plan(self, delay: float, actor: _Actor, action: Callable[[], None]) -> None:
        self._planned += 1
        heapq.heappush(self._queue, (self._now + delay, actor.number, self._planned, action))

    def _pull(self, actor: _Actor) -> None:
        if self._fails(actor, actor.batches + 1, Point.BEFORE_PULL):
            return
        pulled = self.server.pull(actor.number, actor.incarnation)
        if pulled is None:
            self._waiting.add(actor.number)
            return
        actor.batches += 1
        if self._fails(actor, actor.batches, Point.AFTER_PULL):
            return
        life = actor.life
        self._plan(actor.draw(), actor, lambda: self._push(actor, life, pulled))

    def _push(self, actor: _Actor, life: int, pulled: Pulled) -> None:
        if life != actor.life or self._fails(actor, actor.batches, Point.BEFORE_PUSH):
            return
        push = self._worker.answer(pulled)
        try:
            self.server.push(push)
        except NotFinite:
            self._pull(actor)
            return
        self._look()
        if self._look_after_server() or self.server.version >= self._job.updates:
            return
        if self._fails(actor, actor.batches, Point.AFTER_PUSH, push):
            return
        lost = actor.failures.pop((actor.batches, Point.ANSWER_LOST), None)
        if lost is None:
            self._pull(actor)
        else:
            assert lost.down is not None
            self._plan(lost.down, actor, lambda: self._push_again(actor, life, push))

    def _push_again(self, actor: _Actor, life: int, push: Push) -> None:
        if life == actor.life:
            self.server.push(push)
            self._pull(actor)

    def _wake(self) -> None:
        """Lets all ask again who had to wait, as soon as that may be of use."""
        while self.server.slowest != self._slowest:  # someone may fail as it asks, which lets others go on
            self._slowest = self.server.slowest
            self._look()
            waiting, self._waiting = sorted(self._waiting), set()
            for number in waiting:
                self._pull(self._actors[number])

    # ---- what goes wrong -------------------------------------------------------------------------------------------------------

    def _fails(self, actor: _Actor, batch: int, point: Point, push: Push | None = None) -> bool:
        failure = actor.failures.pop((batch, point), None)
        if failure is None:
            return False
        actor.up = False
        actor.life += 1
        if failure.noticed:
            self.server.evict(actor.number)
        if failure.down is not None:
            life = actor.life
            self._plan(failure.down, actor, lambda: self._come_back(actor, life, push))
        return True

    def _come_back(self, actor: _Actor, life: int, push: Push | None) -> None:
        if life != actor.life:
            return
        actor.up = True
        actor.incarnation = self.server.join(actor.number)
        if push is not None:
            try:
                self.server.push(push)
            except Gone:
                pass  # as it should be
            else:
                raise AssertionError("a push of an earlier incarnation was taken")
        self._pull(actor)

    def _look_after_server(self) -> bool:
        """Takes snapshots that will be needed, and lets the server die where it should. Returns whether all had to start anew."""
        version = self.server.version
        if version in self._wanted:
            self._wanted.remove(version)
            self._snapshots[version] = self.server.snapshot()
        if not self._server_failures or version < self._server_failures[0].update:
            return False
        failure = self._server_failures.pop(0)
        state = self.server.snapshot() if failure.snapshot is None else self._snapshots[failure.snapshot]
        self.server = self._job.server(self._recorder.note)
        self.server.restore(state)
        if failure.snapshot is None:
            return False  # the workers need not even know, but for what they have pulled
        self._start_anew()
        return True

    def _start_anew(self) -> None:
        known = self.server.clocks
        self._waiting.clear()
        for actor in self._actors:
            if actor.up:
                actor.life += 1
                actor.incarnation = self.server.join(actor.number)
            elif actor.number in known:
                self.server.evict(actor.number)
        self._slowest = self.server.slowest
        for actor in self._actors:
            if actor.up:
                self._pull(actor)

    def _look(self, *, last: bool = False) -> None:
        if self._milestones.look(self.server, last=last):
            self._recorder.keep()


def _drawing(seed: int, worker: int, draw: Callable[[random.Random], float], factor: float) -> Callable[[], float]:
    """Returns a function that draws a worker's times from a generator of its own."""
    generator = random.Random(seed_of(seed, worker, 1))
    return lambda: factor * draw(generator)
