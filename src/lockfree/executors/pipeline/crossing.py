"""A link whose two cells are in different processes."""

from collections.abc import Callable, Hashable

from lockfree.executors.pipeline.wire import Channel, Layout
from lockfree.link import Link
from lockfree.schedule import Kind, Schedule
from lockfree.values import Credit, Values


class Crossing(Link):
    """Carries activations up and messages down between this process and a neighbour.

    What is sent starts at once and is taken when it is needed, so that both processes compute meanwhile. Each end knows from the
    schedule what the other one sends in a tick, and keeps what has come until a cell takes it, as any `Link` does.

    Args:
        link: The link that it stands for.
        cell: The number of the cell below.
        above: Whether the cell above is the one in this process.
        up: What carries activations.
        down: What carries messages, if the cell below wants any.
        kind_of: Returns what decides how a batch is laid out.
        word: What travels up along with activations.

    Attributes:
        cell: The number of the cell below.
        above: Whether the cell above is the one in this process.
    """

    def __init__(
        self,
        link: Link,
        cell: int,
        *,
        above: bool,
        up: Channel,
        down: Channel | None,
        kind_of: Callable[[int], Hashable],
        word: "Word",
    ) -> None:
        super().__init__(delay=link.delay, stash=link.stash, correction=link.correction)
        self._up.update(link._up if above else {})
        self._down.update({} if above else link._down)
        self.cell, self.above = cell, above
        self._rising, self._falling, self._kind_of, self._word = up, down, kind_of, word

    # ---- before a tick -------------------------------------------------------------------------------------------------------

    def expect(self, schedule: Schedule, tick: int, first: int, last: int) -> None:
        """Makes room for what the other process sends in a tick.

        Args:
            schedule: When is data.
            tick: Number of the tick.
            first: Earliest batch that takes part.
            last: Latest batch that does.
        """
        if self.above:
            batch = tick - (schedule.age(self.cell, Kind.FORWARD) or 0)
            if first <= batch <= last:
                self._rising.expect(self._kind_of(batch), batch)
        elif self._falling is not None:
            batch = tick - (schedule.age(self.cell + 1, Kind.LEARN) or 0)
            if first <= batch <= last and self._is_wanted(schedule, batch):
                self._falling.expect(self._kind_of(batch), batch)

    def _is_wanted(self, schedule: Schedule, batch: int) -> bool:
        return bool(schedule.kinds(self.cell + 1, batch) & {Kind.LEARN, Kind.MESSAGE})

    # ---- after it ------------------------------------------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Takes in all that has been sent."""
        if self.above:
            while self._rising.expected is not None:
                self._come_up()
        elif self._falling is not None:
            while self._falling.expected is not None:
                self._come_down()

    def _come_up(self) -> int:
        batch, word, values = self._rising.receive()
        self._word.hear(word)
        self._up[batch] = values
        return batch

    def _come_down(self) -> int:
        assert self._falling is not None, "messages are wanted"
        batch, _, message = self._falling.receive()
        self._down[batch] = message
        return batch

    # ---- what cells do -------------------------------------------------------------------------------------------------------

    def lift(self, batch: int, values: Values) -> None:
        kind = self._kind_of(batch)
        self._rising.send(kind, batch, values, self._word.said)
        if self._falling is not None:
            self._falling.agree(kind, self._layout(kind).carriers())

    def take(self, batch: int) -> Values:
        while batch not in self._up:
            came = self._come_up()
            for missed in [one for one in self._up if one < came]:
                del self._up[missed]  # its cell had no use for it
        return self._up.pop(batch)

    def send(self, batch: int, message: Credit | None) -> None:
        assert self._falling is not None, "messages are wanted"
        kind = self._kind_of(batch)
        while self._rising.layout(kind) is None:  # a block on a synthetic input may be ahead of the real one
            self._come_up()
        self._falling.agree(kind, self._layout(kind).carriers())
        self._falling.send(kind, batch, message)

    def receive(self, batch: int) -> Credit | None:
        while batch not in self._down:
            self._come_down()
        return self._down.pop(batch)

    def _layout(self, kind: Hashable) -> Layout:
        layout = self._rising.layout(kind)
        assert layout is not None, "activations have gone up"
        return layout


class Word:
    """A number that travels up the chain along with activations: the step after which training is to stop, -1 for none.

    Attributes:
        said: What is sent further up.
    """

    def __init__(self) -> None:
        self.said = -1
        self._heeded = -1

    def say(self, step: int) -> None:
        """Begins to send a step, unless one is on its way."""
        self.said = step if self.said < 0 else self.said

    def hear(self, word: int) -> None:
        """Takes in what has come from below."""
        if word > self._heeded:
            self.said = word

    def is_due(self, step: int) -> bool:
        """Whether it is time to stop after so many steps; what has been heeded is not repeated."""
        due = 0 <= self.said <= step
        if due:
            self._heeded, self.said = self.said, -1
        return due
