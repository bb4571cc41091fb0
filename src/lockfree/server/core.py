"""The server: the weights, and the rules by which workers read and change them. No I/O, no threads, no clock on the wall."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lockfree.server.check import Shapes
from lockfree.server.descent import Descent, OptimizerDescent, OptimizerFactory
from lockfree.server.fused import CompensatedDescent
from lockfree.server.memories import Memories
from lockfree.server.messages import Answer, Applied, Dropped, Gone, NotFinite, Pulled, Push, Refused
from lockfree.server.outlook import Outlook
from lockfree.server.patience import Patience
from lockfree.server.roster import Member, Roster
from lockfree.server.rounds import Mean, Round, mean
from lockfree.server.tickets import Deck
from lockfree.server.versions import Versions
from lockfree.staleness import ASP, Consistency, Correction, Late, NoCorrection
from lockfree.trace import Line, fingerprint


class Server:
    r"""Owns weights, buffers and optimizer of a training run that any number of workers take part in.

    A worker joins, then pulls (weights, and the number of a batch) and pushes (the gradient), in turn. Whoever calls these methods is
    an engine; it calls them one at a time. What the server does depends on the order of the calls alone.

    Where workers do not wait for each other each push makes an update: the pushed gradient $g = \nabla L(w_{t-\tau})$ is clipped,
    corrected and handed to the optimizer, which adds weight decay and momentum and makes $w_{t+1}$. Behind a barrier the update
    is made with the mean gradient of the round when its last push has come.

    Args:
        model: Its trainable parameters and its buffers are copied.
        optimizer: Makes an optimizer of the server's parameters. Any of PyTorch's that steps on gradients does.
        consistency: When a worker may go on.
        correction: Repairs gradients that come late.
        clip: Norm that gradients are shortened to before they are corrected; ``None``: none.
        schedule: Makes a learning-rate schedule of the optimizer, stepped after each update.
        memory_per_worker: Whether the correction remembers each worker apart, where updates are made of one gradient. It costs as
            many times its memory.
        patience: For how many gradients in a row the correction may be out of hand before the server goes on without.
        every: Gap and size of the repair are measured at every so many-th push, 1 or more.
        refusals: How often in a row, or of one batch, values may not be finite, 1 or more, before training ends.
        note: Is told what happens, a line of the trace at a time.
        mean: Makes one gradient of those of a round; another way to the same numbers, where they are not all in one place.

    Attributes:
        consistency: When a worker may go on.
        descent: How a gradient makes the next version.

    Raises:
        ValueError: If the model has nothing to train, or a number is out of range.

    Example:
        >>> server = Server(nn.Linear(1, 1, bias=False), optimizer=lambda weights: torch.optim.SGD(weights, lr=1.0))
        >>> incarnation = server.join(0)
        >>> p = server.pull(0, incarnation)
        >>> push = Push(0, incarnation, p.sequence, p.version, p.ticket, [torch.ones(1, 1)], [], samples=8, loss=0.5)
        >>> server.push(push).version, server.version
        (1, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerFactory,
        consistency: Consistency | None = None,
        correction: Correction | None = None,
        clip: float | None = None,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        memory_per_worker: bool = False,
        patience: int = 20,
        every: int = 10,
        refusals: int = 10,
        note: Callable[[Line], None] | None = None,
        mean: Mean = mean,
    ) -> None:
        for name, value in (("every", every), ("refusals", refusals)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number of pushes, 1 or more")
        weights = [weight.detach().clone() for weight in trained(model)]
        buffers = [buffer.detach().clone() for buffer in model.buffers()]
        self.consistency = ASP() if consistency is None else consistency
        correction = NoCorrection() if correction is None else correction
        self._versions = Versions(weights, buffers)
        general = OptimizerDescent(
            weights, optimizer=optimizer, correction=correction, clip=clip, schedule=schedule, patience=patience
        )
        self.descent: Descent = CompensatedDescent.of(general, weights, correction, clip)
        self._roster, self._deck, self._round, self._mean = Roster(), Deck(), Round(), mean
        self._shapes, self._outlook = Shapes(weights, buffers), Outlook(correction)
        apart = memory_per_worker and not self.consistency.barrier  # behind a barrier an update is everybody's
        self._memories = Memories(self.descent.memory(weights), apart=apart)
        self._patience = Patience(refusals)
        self._every, self._note = every, note
        self._pushes = self._snapshots = 0

    # ---- what an engine looks at -----------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of updates so far."""
        return self._versions.now

    @property
    def weights(self) -> list[Tensor]:
        """The present weights, to look at before the next push."""
        return self._versions.weights(self.version)

    @property
    def buffers(self) -> list[Tensor]:
        """The present buffers, to look at before the next push."""
        return self._versions.buffers(self.version)

    @property
    def slowest(self) -> int:
        """The smallest clock of the workers at work. Whoever was told to wait need not ask again before it has changed."""
        return self._roster.slowest

    @property
    def clocks(self) -> dict[int, int]:
        """The clock of each worker at work: how many of its gradients count."""
        return self._roster.clocks()

    @property
    def versions(self) -> int:
        """How many versions of the weights are kept: the present one, and those that somebody works with."""
        return len(self._versions)

    @torch.no_grad()
    def write_to(self, model: nn.Module) -> None:
        """Copies the present weights and buffers into the model that the server was made of, or one like it."""
        torch._foreach_copy_(list[Tensor](trained(model)), self.weights)
        for buffer, value in zip(model.buffers(), self.buffers, strict=True):
            buffer.copy_(value)

    # ---- what workers do -------------------------------------------------------------------------------------------------------

    def join(self, worker: int) -> int:
        """Takes a worker in, or in again; what its earlier incarnation was working on goes out again.

        Its clock starts at that of the slowest. Behind a barrier it takes part in the present round if that has not begun, or a batch
        of it has come back; else from the next round on.

        Args:
            worker: Its number, 0 or more.

        Returns:
            Its incarnation, 1 or more.

        Raises:
            Refused: If it has no such number.
        """
        if isinstance(worker, bool) or not isinstance(worker, int) or worker < 0:
            raise Refused(f"worker {worker!r}: give a whole number, 0 or more")
        known = self._roster.known(worker)
        replaced = known is not None and known.live
        if known is not None and replaced:
            self._take_out(worker, known)
        clock, takes_part = self._roster.slowest, False
        if self.consistency.barrier and self._round.begun:
            takes_part = self._deck.came_back
            clock = self._round.number + (not takes_part)
        member = self._roster.enter(worker, clock)
        if takes_part:
            member.ticket = self._deck.deal()
        self._tell("join", worker=worker, incarnation=member.incarnation, clock=clock, replaced=replaced)
        self._end_round_if_complete()
        return member.incarnation

    def evict(self, worker: int) -> None:
        """Takes a worker out: nobody waits for it any more, and what it was working on goes out again.

        Args:
            worker: Its number.

        Raises:
            Gone: If it is not at work.
        """
        known = self._roster.known(worker)
        if known is None or not known.live:
            raise Gone(f"worker {worker} is not at work: there is nothing to take out")
        self._take_out(worker, known)
        self._tell("evict", worker=worker, incarnation=known.incarnation)
        self._end_round_if_complete()

    def pull(self, worker: int, incarnation: int) -> Pulled | None:
        """Hands out the present weights and a batch. Asked again before the push, it gives the same answer again.

        Args:
            worker: Number of the worker.
            incarnation: As `join` returned it.

        Returns:
            What to work on; ``None``: it has to wait until `slowest` has changed.

        Raises:
            Gone: If the worker is not at work in this incarnation.
        """
        member = self._roster.member(worker, incarnation)
        if member.version is None:
            if not self.consistency.may_pull(member.clock, self._roster.slowest):
                return None
            if self.consistency.barrier and not self._round.begun:
                self._begin_round()
            if member.ticket is None:
                member.ticket = self._deck.deal()
            member.version = self._versions.hold()
            member.sequence += 1
            which = {"sequence": member.sequence, "version": member.version, "ticket": member.ticket}
            self._tell("pull", worker=worker, incarnation=incarnation, **which)
        assert member.ticket is not None
        weights = self._outlook.of(worker, self._versions.weights(member.version))
        buffers = self._versions.buffers(member.version)
        return Pulled(worker, incarnation, member.sequence, member.version, member.ticket, weights, buffers)

    def push(self, push: Push) -> Answer:
        """Takes a gradient. One that comes a second time gets the first answer again, and changes nothing.

        Args:
            push: The gradient, and the pull that it answers.

        Returns:
            What became of it.

        Raises:
            Refused: If it is not the answer to the worker's last pull, does not fit the weights, or is not finite (`NotFinite`). The
                weights are unchanged.
            Diverged: If values were not finite too often.
        """
        member = self._member(push)
        try:
            if push.sequence == member.answered and member.answer is not None:
                self._tell("push", **_which(push), outcome="duplicate")
                return member.answer
            self._shapes.check_turn(push, member, self.version)
            self._shapes.check(push)
        except NotFinite as refusal:
            self._tell("push", **_which(push), outcome="not finite", why=str(refusal))
            self._set_back(push, member, refusal)
            raise
        except Refused as refusal:
            self._tell("push", **_which(push), outcome="refused", why=str(refusal))
            raise
        self._patience.renew(push.ticket)
        answer = self._gather(push) if self.consistency.barrier else self._take(push)
        self._outlook.learn(push.worker, answer.delay)
        self._outlook.forget(push.worker)
        member.version = member.ticket = None
        member.answered, member.answer = push.sequence, answer
        if self._note is not None:
            self._tell_taken(push, answer)
        self._roster.tick(push.worker)
        self._end_round_if_complete()
        return answer

    # ---- how it does it --------------------------------------------------------------------------------------------------------

    def _member(self, push: Push) -> Member:
        try:
            return self._roster.member(push.worker, push.incarnation)
        except Gone as refusal:
            self._tell("push", **_which(push), outcome="refused", why=str(refusal))
            raise

    def _take(self, push: Push) -> Answer:
        """Makes an update of one gradient."""
        late = self._late(push.worker, push.version)
        return self._update(push.gradients, push.buffers, late, self._memories.of(push.worker))

    def _gather(self, push: Push) -> Answer:
        """Puts a gradient to those of the round."""
        self._round.add(push)
        self._versions.let_go(push.version)
        return Applied(self.version + 1, 0)

    def _late(self, worker: int, read: int) -> Late:
        """Lets go of a version, whose memory stays as it is until the next version is written."""
        late = Late(read, self.version, self._outlook.of(worker, self._versions.weights(read)), self.weights)
        self._versions.let_go(read)
        return late

    def _update(
        self, gradients: Sequence[Tensor | None], buffers: Sequence[Tensor], late: Late, memory: dict[str, Any]
    ) -> Answer:
        measure = self._pushes % self._every == 0
        self._pushes += 1
        before = self._outlook.before(self.weights)
        effect = self.descent.apply(gradients, late, memory, self._versions.room, measure=measure)
        if effect.weights is None:
            return Dropped(self.version, late.delay)
        self._versions.advance(effect.weights, buffers)
        self._outlook.after(before, self.weights)
        if effect.fell_back:
            self._tell("fallback", version=self.version)
        return Applied(self.version, late.delay, effect.gap, effect.ratio)

    def _begin_round(self) -> None:
        """Deals the batches of a round by the numbers of the workers, so that it does not matter who comes first."""
        self._round.begun = True
        for worker in self._roster.live:
            member = self._roster.known(worker)
            assert member is not None
            if member.clock == self._roster.slowest and member.ticket is None:
                member.ticket = self._deck.deal()

    def _end_round_if_complete(self) -> None:
        if not self._round.begun or self._roster.slowest <= self._round.number:
            return
        if self._round.parts:
            gradients, buffers = self._mean(self._round.in_order)
            late = Late(self.version, self.version, self.weights, self.weights)
            self._update(gradients, buffers, late, self._memories.of(0))  # they are not apart
        self._round = Round(number=self._roster.slowest)

    def _take_out(self, worker: int, member: Member) -> None:
        if member.ticket is not None:
            self._deck.put_back(member.ticket)
        if member.version is not None:
            self._versions.let_go(member.version)
        self._outlook.forget(worker)
        member.version = member.ticket = None
        self._roster.leave(worker)

    def _set_back(self, push: Push, member: Member, refusal: NotFinite) -> None:
        """Gives a worker its place back whose values were not finite, unless that has happened too often."""
        self._versions.let_go(push.version)
        self._outlook.forget(push.worker)
        member.version = None
        if not self.consistency.barrier:  # behind a barrier the batch remains this worker's
            self._deck.put_back(push.ticket)
            member.ticket = None
        self._patience.bear(push.ticket, self.version, refusal)

    # ---- what it tells ---------------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the present weights and buffers, and notes it in the trace."""
        digest = fingerprint([*self.weights, *self.buffers])
        self._tell("weights", version=self.version, sha256=digest)
        return digest

    def _tell(self, kind: str, **values: Any) -> None:
        if self._note is not None:
            self._note({"kind": kind, **values})

    def _tell_taken(self, push: Push, answer: Answer) -> None:
        applied = isinstance(answer, Applied)
        values: dict[str, Any] = {"version": answer.version, "delay": answer.delay, "loss": push.loss}
        if isinstance(answer, Applied):
            values |= {"gap": answer.gap, "ratio": answer.ratio}
        self._tell("push", **_which(push), outcome="applied" if applied else "dropped", **values)

    # ---- coming back -----------------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Returns a copy of all that the server is: plain data and tensors, ready for ``torch.save`` and ``weights_only=True``.

        Going on from it is bit for bit what going on without a break would have been.
        """
        self._snapshots += 1
        self._tell("snapshot", version=self.version, number=self._snapshots)
        return {
            "number": self._snapshots,
            "versions": self._versions.state_dict(),
            "descent": self.descent.state_dict(),
            "outlook": self._outlook.state_dict(),
            "roster": self._roster.state_dict(),
            "deck": self._deck.state_dict(),
            "round": self._round.state_dict(),
            "memories": self._memories.state_dict(),
            "patience": self._patience.state_dict(),
            "pushes": self._pushes,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Puts back what `snapshot` returned, on this server or one made with the same arguments.

        Args:
            state: The snapshot, which is copied.

        Raises:
            ValueError: If it is of another model, or of other arguments.
        """
        kept = state["versions"]["kept"][state["versions"]["now"]]
        self._shapes.check_snapshot(kept["weights"], kept["buffers"])
        self._memories.load_state_dict(state["memories"])
        self._versions.load_state_dict(state["versions"])
        self.descent.load_state_dict(state["descent"])
        self._outlook.load_state_dict(state["outlook"])
        self._roster.load_state_dict(state["roster"])
        self._deck.load_state_dict(state["deck"])
        self._round = Round.from_state_dict(state["round"])
        self._patience.load_state_dict(state["patience"])
        self._pushes = state["pushes"]
        self._snapshots = max(self._snapshots, state["number"])
        self._tell("restore", version=self.version, of=state["number"])


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of a model that are trained, in its order.

    Raises:
        ValueError: If there are none.
    """
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ValueError("the model has no parameters to train: give one with parameters that require a gradient")
    return found


def _which(push: Push) -> dict[str, int]:
    names = ("worker", "incarnation", "sequence", "ticket")
    return {**{name: getattr(push, name) for name in names}, "read": push.version}
