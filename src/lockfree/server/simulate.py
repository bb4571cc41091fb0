"""The reference engine: any number of workers in one process, at the times of a simulation."""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

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


class _Kind(Enum):
    """What is planned for a worker."""

    PUSH = "push"
    PUSH_AGAIN = "push again"
    COME_BACK = "come back"


class _Event(NamedTuple):
    """Something planned. What comes first in the queue is the earliest; then that of the worker with the lowest number.

    Attributes:
        time: When, in simulated seconds.
        worker: Whose.
        order: Counts what was planned.
        kind: What.
        life: Of which life; what an earlier life had planned is not done.
    """

    time: float
    worker: int
    order: int
    kind: str
    life: int


@dataclass(slots=True)
class _Actor:
    """A simulated worker.

    Attributes:
        number: Its number.
        draw: How long a batch takes it.
        generator: Where its times come from.
        factor: How many times as long it takes.
        failures: What it has yet to suffer, by batch and point.
        incarnation: Of its present life.
        batches: How many it has begun.
        life: Counts lives.
        up: Whether it lives.
        pulled: What it works on.
        pushed: The last push whose answer it has not heard, without the gradient.
    """

    number: int
    draw: Callable[[random.Random], float]
    generator: random.Random
    factor: float
    failures: dict[tuple[int, Point], Failure] = field(default_factory=dict)
    incarnation: int = 0
    batches: int = 0
    life: int = 0
    up: bool = True
    pulled: Pulled | None = None
    pushed: Push | None = None

    def state(self) -> dict[str, Any]:
        """Returns what changes, as plain data."""
        plain = {name: getattr(self, name) for name in _CHANGING}
        pushed = None if self.pushed is None else {name: getattr(self.pushed, name) for name in _HEADER}
        failures = [(batch, point.value) for batch, point in self.failures]
        return {**plain, "generator": self.generator.getstate(), "pushed": pushed, "failures": failures}

    def load(self, state: dict[str, Any]) -> None:
        """Puts back what `state` returned."""
        for name in _CHANGING:
            setattr(self, name, state[name])
        self.generator.setstate(state["generator"])
        self.pushed = None if state["pushed"] is None else _without_gradient(**state["pushed"])
        left = {(batch, Point(point)) for batch, point in state["failures"]}
        self.failures = {place: failure for place, failure in self.failures.items() if place in left}


_CHANGING = ("incarnation", "batches", "life", "up")
_HEADER = ("worker", "incarnation", "sequence", "version", "ticket")


def _without_gradient(**header: int) -> Push:
    """Returns a push that is heard a second time, or too late: the server does not look at what is in it."""
    return Push(**header, gradients=[], buffers=[], samples=1, loss=0.0)


class _Simulation:
    def __init__(self, simulator: Simulator, job: Job, recorder: Recorder) -> None:
        self._job, self._recorder = job, recorder
        self.server = job.server(recorder.note)
        self._worker = job.worker()
        self._now = max((line["time"] for line in recorder.lines), default=0.0)  # more than 0 where a run goes on
        recorder.clock = lambda: self._now
        self._queue: list[_Event] = []
        self._planned = 0
        self._waiting: set[int] = set()
        self._slowest = self.server.slowest
        self._milestones = job.milestones()
        self._actors = [
            _Actor(number, duration.draw, random.Random(seed_of(job.seed, number, 1)), factor)
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
        going_on = self._job.engine_state
        if going_on is not None and going_on["engine"] == _NAME and len(going_on["actors"]) == len(self._actors):
            self._go_on(going_on)
        else:
            self._begin()
        while self.server.version < self._job.updates:
            if not self._queue:
                raise ValueError(
                    f"after {self.server.version} updates all workers wait for one that does not come back: let it come back, or be noticed"
                )
            event = heapq.heappop(self._queue)
            self._now = event.time
            self._play(event)
            if self.server.version < self._job.updates:
                self._wake()
                self._look()
            if self._job.stop():
                self._look(last=True)
                raise KeyboardInterrupt
        self._look(last=True)

    def _begin(self) -> None:
        for actor in self._actors:
            actor.incarnation = self.server.join(actor.number)
        self._look_after_server()
        for actor in self._actors:
            self._pull(actor)
        self._wake()
        self._look()

    # ---- stopping and going on -------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """Returns, between two events, all that is not the server's: plain data."""
        return {
            "engine": _NAME,
            "now": self._now,
            "planned": self._planned,
            "slowest": self._slowest,
            "waiting": sorted(self._waiting),
            "queue": [tuple(event) for event in self._queue],
            "actors": [actor.state() for actor in self._actors],
            "server_failures": len(self._server_failures),
            "snapshots": self._snapshots,
            "wanted": sorted(self._wanted),
        }

    def _go_on(self, state: dict[str, Any]) -> None:
        self._now, self._planned, self._slowest = state["now"], state["planned"], state["slowest"]
        self._waiting, self._queue = set(state["waiting"]), [_Event(*event) for event in state["queue"]]
        self._server_failures = self._server_failures[-state["server_failures"] or len(self._server_failures) :]
        self._snapshots, self._wanted = dict(state["snapshots"]), set(state["wanted"])
        for actor, known in zip(self._actors, state["actors"], strict=True):
            actor.load(known)
        busy = set(self._waiting)
        for event in self._queue:
            actor = self._actors[event.worker]
            if event.life == actor.life:
                busy.add(actor.number)
                if _Kind(event.kind) is _Kind.PUSH:
                    actor.pulled = self.server.pull(actor.number, actor.incarnation)  # the same answer again
        for actor in self._actors:
            if actor.up and actor.number not in busy:  # its push was the last one that was wanted
                self._pull(actor)
        self._wake()

    # ---- the life of a worker --------------------------------------------------------------------------------------------------

    def _plan(self, delay: float, actor: _Actor, kind: _Kind) -> None:
        self._planned += 1
        heapq.heappush(self._queue, _Event(self._now + delay, actor.number, self._planned, kind.value, actor.life))

    def _play(self, event: _Event) -> None:
        actor = self._actors[event.worker]
        if event.life != actor.life:
            return
        match _Kind(event.kind):
            case _Kind.PUSH:
                self._push(actor)
            case _Kind.PUSH_AGAIN:
                self._push_again(actor)
            case _Kind.COME_BACK:
                self._come_back(actor)

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
        actor.pulled = pulled
        self._plan(actor.factor * actor.draw(actor.generator), actor, _Kind.PUSH)

    def _push(self, actor: _Actor) -> None:
        if self._fails(actor, actor.batches, Point.BEFORE_PUSH):
            return
        pulled, actor.pulled = actor.pulled, None
        assert pulled is not None, "who pushes has pulled"
        push = self._worker.answer(pulled)
        header = _without_gradient(**{name: getattr(push, name) for name in _HEADER})
        try:
            self.server.push(push)
        except NotFinite:
            self._pull(actor)
            return
        if self._look_after_server() or self.server.version >= self._job.updates:
            return
        if self._fails(actor, actor.batches, Point.AFTER_PUSH, header):
            return
        lost = actor.failures.pop((actor.batches, Point.ANSWER_LOST), None)
        if lost is None:
            self._pull(actor)
        else:
            assert lost.down is not None
            actor.pushed = header
            self._plan(lost.down, actor, _Kind.PUSH_AGAIN)

    def _push_again(self, actor: _Actor) -> None:
        push, actor.pushed = actor.pushed, None
        assert push is not None
        self.server.push(push)
        self._pull(actor)

    def _wake(self) -> None:
        """Lets all ask again who had to wait, as soon as that may be of use."""
        while self.server.slowest != self._slowest:  # someone may fail as it asks, which lets others go on
            self._slowest = self.server.slowest
            waiting, self._waiting = sorted(self._waiting), set()
            for number in waiting:
                self._pull(self._actors[number])

    # ---- what goes wrong -------------------------------------------------------------------------------------------------------

    def _fails(self, actor: _Actor, batch: int, point: Point, push: Push | None = None) -> bool:
        failure = actor.failures.pop((batch, point), None)
        if failure is None:
            return False
        actor.up, actor.pulled, actor.pushed = False, None, push
        actor.life += 1
        if failure.noticed:
            self.server.evict(actor.number)
        if failure.down is not None:
            self._plan(failure.down, actor, _Kind.COME_BACK)
        return True

    def _come_back(self, actor: _Actor) -> None:
        actor.up = True
        actor.incarnation = self.server.join(actor.number)
        push, actor.pushed = actor.pushed, None
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
                actor.pulled = actor.pushed = None
                actor.incarnation = self.server.join(actor.number)
            elif actor.number in known:
                self.server.evict(actor.number)
        self._slowest = self.server.slowest
        for actor in self._actors:
            if actor.up:
                self._pull(actor)

    def _look(self, *, last: bool = False) -> None:
        if self._milestones.look(self.server, last=last, engine=self._state):
            self._recorder.keep()


_NAME = "Simulator"
