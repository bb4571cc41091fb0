"""One of the processes of `AllReduce`: a worker, and a server of its own that does what all the others' do."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lockfree.server.check import Shapes
from lockfree.server.descent import all_finite
from lockfree.server.job import Job
from lockfree.server.messages import NotFinite, Pulled, Push
from lockfree.server.reduction import Exchange, Reduction
from lockfree.server.rounds import Part
from lockfree.trace import Line


class DriftedApart(ValueError):  # noqa: N818  (it is what happened)
    """Processes that step alike have come to different weights."""


class _Word(NamedTuple):
    """What all workers are told of a push.

    Attributes:
        loss: The mean loss.
        samples: Of the batch.
        finite: Whether the gradients are.
        sound: Whether the buffers are.
        stop: Whether somebody has asked to stop.
        there: Which gradients there are.
        changed: Which buffers the batch has changed.
    """

    loss: float
    samples: int
    finite: bool
    sound: bool
    stop: bool
    there: list[bool]
    changed: list[bool]


class Replica:
    """A worker with a copy of the weights. What it tells is the same in all processes.

    What a server does depends on the order of the calls alone. So each process has one, and calls it as all the others do, with the
    pushes of all workers; of those it needs no more than a few numbers, since the mean gradient is made by all together.

    Args:
        job: What to train.
        exchange: Connects the workers.
        note: Is told what happens.
    """

    def __init__(self, job: Job, exchange: Exchange, note: Callable[[Line], None]) -> None:
        if exchange.rank:
            job = replace(job, folder=None)  # the first one writes checkpoints
        self._job, self._exchange, self._note = job, exchange, note
        self._reduction: Reduction | None = None
        self._words: dict[int, _Word] = {}
        self._mine: Push | None = None
        self.server = job.server(self._told, self._mean)
        self._shapes = Shapes(self.server.weights, self.server.buffers)
        self._reduction = Reduction(self.server.weights, exchange)
        self._worker, self._milestones = job.worker(), job.milestones()
        self._incarnations: list[int] = []

    def run(self) -> bool:
        """Trains until all updates are made, or somebody asks to stop; returns whether they are.

        Raises:
            Diverged: If values were not finite too often.
            DriftedApart: If the processes have come to different weights.
        """
        self._milestones.look(self.server)
        self._incarnations = [self.server.join(number) for number in range(self._exchange.size)]
        stop = False
        while self.server.version < self._job.updates and not stop:
            stop = self._round()
            self._milestones.look(self.server)
        self._milestones.look(self.server, last=True)
        return self.server.version >= self._job.updates

    def _round(self) -> bool:
        """Makes an update; returns whether somebody has asked to stop."""
        stop = False
        workers = range(self._exchange.size)
        pulled = {number: self._pull(number) for number in workers}
        while pulled:
            words = self._exchanged(self._word(pulled.get(self._exchange.rank)))
            refused, stop = [], stop or any(word.stop for word in words)
            for number, pull in pulled.items():
                self._words[number] = words[number]
                try:
                    self.server.push(self._stand_in(pull, words[number]))
                except NotFinite:
                    refused.append(number)
            pulled = {number: self._pull(number) for number in refused}
        return stop

    def _pull(self, worker: int) -> Pulled:
        pulled = self.server.pull(worker, self._incarnations[worker])
        assert pulled is not None, "in a round everybody may begin"
        return pulled

    def _word(self, pulled: Pulled | None) -> _Word:
        """Works on a batch, if there is one to work on."""
        if pulled is None:
            return _Word(
                0.0, 0, True, True, self._job.stop(), [False] * len(self.server.weights), [False] * len(self.server.buffers)
            )
        push = self._mine = self._worker.answer(pulled)
        finite = sound = True
        try:
            self._shapes.check(push)
        except NotFinite:
            finite = all_finite([gradient for gradient in push.gradients if gradient is not None])
            sound = not finite or not math.isfinite(push.loss)
        there = [gradient is not None for gradient in push.gradients]
        changed = [after is not before for after, before in zip(push.buffers, pulled.buffers, strict=True)]
        return _Word(push.loss, push.samples, finite, sound, self._job.stop(), there, changed)

    def _exchanged(self, word: _Word) -> list[_Word]:
        """Returns everybody's word."""
        plain = [*word[:5], *word.there, *word.changed]
        ends = list(accumulate((len(word.there), len(word.changed)), initial=5))
        found = []
        for row in self._exchange.rows(torch.tensor(plain, dtype=torch.float64)).tolist():
            (loss, samples, finite, sound, stop), (there, changed) = row[:5], (row[start:end] for start, end in pairwise(ends))
            flags = bool(finite), bool(sound), bool(stop)
            found.append(_Word(loss, int(samples), *flags, list(map(bool, there)), list(map(bool, changed))))
        return found

    @staticmethod
    def _stand_in(pulled: Pulled, word: _Word) -> Push:
        """Returns what the server takes as the push: without its gradients, but refused for what it would be refused for."""
        gradients: list[Tensor | None] = [None] * len(pulled.weights)
        buffers = list(pulled.buffers)
        if not word.finite:
            gradients[0] = torch.full_like(pulled.weights[0], math.nan)
        if not word.sound:
            buffers = [torch.full_like(one, math.nan) if one.is_floating_point() else one for one in buffers]
        return Push(
            worker=pulled.worker,
            incarnation=pulled.incarnation,
            sequence=pulled.sequence,
            version=pulled.version,
            ticket=pulled.ticket,
            gradients=gradients,
            buffers=buffers,
            samples=word.samples,
            loss=word.loss,
        )

    def _mean(self, parts: Sequence[Part]) -> tuple[list[Tensor | None], list[Tensor]]:
        """Makes one gradient of all workers', of which this process has its own."""
        assert self._mine is not None
        assert self._reduction is not None
        assert len(parts) == len(self._words), "all workers take part in every round"
        words = [self._words[worker] for worker in range(self._exchange.size)]  # batches are dealt in this order
        mine, self._mine = self._mine, None
        gradients = self._reduction.gradients(mine.gradients, [word.there for word in words], [word.samples for word in words])
        return gradients, self._reduction.buffers(mine.buffers, [word.changed for word in words])

    # ---- what it tells ---------------------------------------------------------------------------------------------------------

    def _told(self, line: Line) -> None:
        self._note(line)
        if line["kind"] == "weights":  # before there is a checkpoint of them
            self._compare(line["version"], bytes.fromhex(line["sha256"]))

    def _compare(self, version: int, digest: bytes) -> None:
        first, *others = self._exchange.rows(torch.tensor(list(digest), dtype=torch.uint8)).tolist()
        other = [number for number, one in enumerate(others, start=1) if one != first]
        if other:
            raise DriftedApart(
                f"after {version} updates the weights of worker {', '.join(map(str, other))} are not those of worker 0, though all have "
                "stepped alike: look for random draws in the optimizer, or a broken machine, and go on from the last checkpoint"
            )
