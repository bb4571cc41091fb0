"""One block with everything that it learns with."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lockfree.chain import Block
from lockfree.flight import Flight
from lockfree.objective import Objective
from lockfree.precision import full_precision
from lockfree.rng import undisturbed
from lockfree.rule import Context, Needs, Pace, Place, Rule
from lockfree.schedule import Kind
from lockfree.staleness import Correction, Late
from lockfree.stash import Call, Stash, call_from, call_state
from lockfree.values import Credit, Values, as_leaves, batch_size, carriers, carrying, detach, mark, tensors


class _Part:
    """A module of a cell; its calls can be differentiated late and made again if its weights may change in between."""

    def __init__(self, module: nn.Module | None, *, overlaps: bool, keep: bool = True, exact: bool = True) -> None:
        self.module = module
        self.stash = Stash(module, keep=keep, exact=exact) if overlaps and module is not None else None

    def call(self, run: Callable[[], Any], again: Call | None = None) -> tuple[Any, Call | None]:
        """Makes a call, or makes a recorded one again; returns its result and its record."""
        if self.stash is None:
            return run(), None
        if again is not None:
            return self.stash.replay(again, run), again
        with self.stash.record() as call:
            return run(), call

    def release(self, call: Call | None) -> None:
        """Ends a call, if there is one to be ended."""
        if self.stash is not None and call is not None:
            self.stash.release(call)

    def weights_of(self, call: Call | None) -> list[Tensor]:
        """Returns the weights that a call ran with, as far as they are kept."""
        return [] if self.stash is None or call is None else self.stash.weights_of(call)


@dataclass(slots=True)
class _Visit:
    """One batch in one cell, from its forward to its last action."""

    context: Context
    flight: Flight  # what the rule is shown of it depends on what block and auxiliary network need
    made: tuple[Tensor, ...] = ()  # the outputs that carry credit, with the block's graph; empty once learnt
    guess: tuple[Tensor, ...] = ()  # the synthetic input, with the graph of what made it; empty once the real one was there
    pending: set[Kind] = field(default_factory=set)  # actions still to come
    block_call: Call | None = None
    auxiliary_call: Call | None = None
    input_call: Call | None = None
    read: int = 0  # updates that the block had seen when it ran forward


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """How a cell is joined to its neighbours, the same in all phases of a rule.

    Attributes:
        joined: Whether the borders (below, above) are left uncut, because exact credit crosses them within the tick. Above the
            top cell this is the border to the loss.
        reports: Whether the cell below wants dL/dx as a message.
        overlaps: The kinds of action (L, A, I) whose weights may change between a call and its gradient.
        learns_early: Whether the block's weights change before the batch has reached the loss, which would tell if it is sound.
        stash: Whether a late gradient is taken at the weights of its own forward pass.
        correction: Repairs it.
    """

    joined: tuple[bool, bool] = (False, False)
    reports: bool = False
    overlaps: frozenset[Kind] = frozenset()
    learns_early: bool = False
    stash: bool = True
    correction: Correction | None = None


class Cell:
    """A block, its auxiliary networks, and the batches that it is working on.

    Args:
        place: Where the cell stands.
        block: The piece of the user's model.
        rule: How the block gets its credit; `follow` puts another phase of it in force.
        objective: The loss, for rules that take it of scores of their own.
        auxiliary: What `Rule.build` made, or ``None``.
        inputs: What `Rule.build_inputs` made, if the block runs on synthetic inputs, with `carrying` of a real one.
        wiring: How it is joined to its neighbours.

    Attributes:
        learnt: Whether (the block, an auxiliary network) has gathered gradients in this tick.
        keeps_nothing: Whether a batch leaves nothing here between its forward and its learning.
        outputs_carry: `carrying` of an output, as the last one had it (or a rehearsal); ``None`` before there was any.
    """

    def __init__(
        self,
        *,
        place: Place,
        block: Block,
        rule: Rule,
        objective: Objective,
        auxiliary: nn.Module | None,
        inputs: tuple[nn.Module, list[bool]] | None = None,
        wiring: Wiring,
    ) -> None:
        self.place, self.block, self.auxiliary = place, block, auxiliary
        self._objective = objective
        self.inputs, self._carrying = inputs or (None, [])
        self.joined_below, self.joined_above = wiring.joined
        self.reports, self.learns_early = wiring.reports, wiring.learns_early
        self.learnt = [False, False]
        self.outputs_carry: list[bool] | None = None
        late = Kind.LEARN in wiring.overlaps
        self._correction = wiring.correction if late else None
        keep = wiring.stash or (self._correction is not None and self._correction.wants_weights)
        self._learning = [parameter for parameter in block.parameters() if parameter.requires_grad]
        self._memory = {} if self._correction is None else self._correction.memory(self._learning)
        self._late: Late | None = None  # how late the gradients are that lie on the parameters
        self._updates = 0  # of the block's weights
        self._plain_memos = rule.keeps_plain_memos(auxiliary)
        self._parts = {
            "block": _Part(block, overlaps=late, keep=keep, exact=wiring.stash),
            "auxiliary": _Part(auxiliary, overlaps=Kind.AUXILIARY in wiring.overlaps and not self._plain_memos),
            "inputs": _Part(self.inputs, overlaps=Kind.INPUT in wiring.overlaps),
        }
        self._stashes = [part.stash for part in self._parts.values() if part.stash is not None]
        self._visits: dict[int, _Visit] = {}
        self.follow(rule)

    def follow(self, rule: Rule) -> None:
        """Puts a phase of the rule in force; nothing is in flight then."""
        self.rule = rule
        self.needs = rule.needs(self.place)
        self.auxiliary_needs = rule.auxiliary_needs(self.place)
        self._clock = rule.clock(self.place.count)
        self._runs_as_it_is = type(rule).run is Rule.run
        # Exact credit crosses both borders inside of one graph: between forward and learning there is nothing to remember.
        below_asks = self.reports or self.inputs is not None
        self.keeps_nothing = not (
            below_asks or not self.joined_above or self._stashes or self._clock or self.auxiliary_needs is not None
        )

    @property
    def synthetic(self) -> bool:
        """Whether the block runs on synthetic inputs."""
        return self.inputs is not None

    def __repr__(self) -> str:
        return f"Cell({self.place.index}, {self.block.name!r}, {self.rule})"

    # ---- the actions ---------------------------------------------------------------------------------------------------------

    def forward(self, batch: int, inputs: Values, flight: Flight, kinds: frozenset[Kind]) -> Values:
        """F: runs the block on one batch and returns what crosses its upper border, detached unless it is joined.

        Args:
            batch: Number of the batch.
            inputs: What crosses the lower border; the network's input if the cell runs on synthetic inputs.
            flight: The batch itself.
            kinds: What the cell will do on this batch.
        """
        if self.keeps_nothing:
            return self.run_through(batch, inputs if self.joined_below else detach(inputs), flight)
        visit = self._open(batch, batch_size(inputs), flight, kinds)
        if self.inputs is not None:
            inputs = self._imagine(visit, inputs, None)
        if self.inputs is not None and Kind.INPUT not in kinds:
            visit.guess = ()
            self._parts["inputs"].release(visit.input_call)
            visit.input_call = None
        if not (self.reports or self.joined_below):
            inputs = detach(inputs)  # nobody asks for dL/dx, so autograd need not compute it
        visit.context.inputs = inputs
        asked = Kind.LEARN in kinds or (Kind.MESSAGE in kinds and self.reports)
        with self.block.evaluating() if self._frozen(batch) else nullcontext():
            outputs = self._run_block(visit, None) if asked or self.outputs_carry is None else self._run_at_rest(visit)
        self._done(batch, Kind.FORWARD)
        return outputs

    def run_through(self, batch: int, inputs: Values, flight: Flight) -> Values:
        """Runs the block in the graph of whoever is below, where the cell has nothing to remember.

        Args:
            batch: Number of the batch.
            inputs: What crosses the lower border.
            flight: The batch itself.
        """
        if self._runs_as_it_is:
            return self.block.forward(inputs)  # a view of the model has no hooks that a call would look for
        context = self._context(batch, batch_size(inputs), flight)
        context.inputs = inputs
        return self.rule.run(self.block, context)

    def _frozen(self, batch: int) -> bool:
        return self._clock is not None and self._clock.pace(self.place.index, batch) is Pace.FREEZE

    def _open(self, batch: int, samples: int, flight: Flight, kinds: frozenset[Kind]) -> _Visit:
        context = self._context(batch, samples, flight)
        visit = self._visits[batch] = _Visit(context, flight, pending=set(kinds), read=self._updates)
        return visit

    def _context(self, batch: int, samples: int, flight: Flight) -> Context:
        context = Context(self.place, self.auxiliary, None, (), samples, shared=flight.shared, batch=batch)
        if self.needs >= Needs.TARGET:
            self._show_targets(context, flight)
        return context

    def _show_targets(self, context: Context, flight: Flight) -> None:
        """Shows the rule what is known from the start: targets, the network's input, and the loss of any scores."""
        context.target, context.source = flight.target, flight.inputs
        context.scores_shape = self._objective.scores_shape
        context.loss = lambda scores: self._objective.evaluate(scores, flight.target)

    def _imagine(self, visit: _Visit, source: Values, again: Call | None) -> Values:
        """Predicts the block's input from the network's."""
        imagine = self.inputs
        assert imagine is not None
        with full_precision(_device_type(tensors(source))):
            guess, visit.input_call = self._parts["inputs"].call(lambda: imagine(source), again)
        visit.guess = tensors(guess)
        return mark(detach(guess), self._carrying)

    def _run_block(self, visit: _Visit, again: Call | None) -> Values:
        context = visit.context
        made, visit.block_call = self._parts["block"].call(lambda: self.rule.run(self.block, context), again)
        visit.made, self.outputs_carry = carriers(made), carrying(made)
        context.outputs = tuple(tensor.detach() for tensor in visit.made)
        if self.joined_above:
            return made
        # Whoever is above reads values that are cut off this graph, marked where they carry credit.
        return as_leaves(detach(made), made)

    def _run_at_rest(self, visit: _Visit) -> Values:
        """Runs the block where nobody will ask for a gradient, so that none of its graph need be kept."""
        context = visit.context
        with torch.no_grad():
            made = self.rule.run(self.block, context)
        outputs = mark(detach(made), self.outputs_carry or [])
        context.outputs = tuple(tensor.detach() for tensor in carriers(outputs))
        context.inputs = None
        return outputs

    def learn(self, batch: int, above: Credit | None, error: Credit | None, kind: Kind = Kind.LEARN) -> Credit | None:
        """L or M: takes the credit of one batch, and returns dL/dx (``None``: not yet). In L the block gathers its gradients."""
        if self.keeps_nothing:
            self.learnt[0] = kind is Kind.LEARN
            return None
        visit = self._visits[batch]
        context = visit.context
        context.above, context.error = above, error
        if self.joined_above:  # whoever is above has differentiated through this block
            credit = above
            learnt = True
        else:
            with full_precision(_device_type(context.outputs)):
                credit, visit.auxiliary_call = self._credit(visit, None)
                learnt = credit is not None
                if credit is not None and visit.made:
                    given, credit = list(credit), None
                    _backward(visit.made, given, None if kind is Kind.LEARN else carriers(context.inputs))
        self.learnt[0] = learnt and kind is Kind.LEARN
        if self._correction is not None and self.learnt[0]:
            self._late = self._lateness(visit)
        message = tuple(x.grad for x in carriers(context.inputs)) if self.reports else None
        visit.made, context.inputs = (), None
        self._parts["block"].release(visit.block_call)
        visit.block_call = None
        if Kind.AUXILIARY not in visit.pending:  # the auxiliary network will not learn from this batch
            self._parts["auxiliary"].release(visit.auxiliary_call)
            visit.auxiliary_call = None
        self._done(batch, kind)
        return message

    def _lateness(self, visit: _Visit) -> Late:
        block = self._parts["block"]
        then = dict(zip(map(id, self.block.parameters()), block.weights_of(visit.block_call), strict=False))
        weights = [then[id(parameter)].detach() for parameter in self._learning if id(parameter) in then]
        now = [parameter.detach() for parameter in self._learning]
        return Late(read=visit.read, applied=self._updates, then=weights, now=now)

    def correct(self) -> None:
        """Repairs the late gradient that lies on the block's parameters, just before it is stepped."""
        if self._late is None:
            return
        assert self._correction is not None, "who is late is repaired"
        gradients = [parameter.grad for parameter in self._learning]
        repaired = self._correction.correct(gradients, self._late, self._memory)
        for parameter, gradient in zip(self._learning, repaired, strict=True):
            parameter.grad = gradient
        self._late = None

    def _credit(self, visit: _Visit, again: Call | None) -> tuple[Credit | None, Call | None]:
        return self._parts["auxiliary"].call(lambda: self.rule.credit(visit.context), again)

    def learn_auxiliary(
        self, batch: int, above: Credit | None, error: Credit | None, sample_losses: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        """A: the truth about one batch has arrived; the auxiliary network learns from it and returns its own loss."""
        visit = self._visits[batch]
        context = visit.context
        if self.auxiliary_needs is not None and self.auxiliary_needs >= Needs.TARGET:
            self._show_targets(context, visit.flight)
        context.error, context.sample_losses = error, sample_losses
        context.above = above if above is not None else context.above
        with full_precision(_device_type(context.outputs)):
            loss = self.rule.learn(context)
        self.learnt[1] |= loss is not None
        self._parts["auxiliary"].release(visit.auxiliary_call)
        visit.auxiliary_call = None
        self._done(batch, Kind.AUXILIARY)
        return loss

    def learn_inputs(self, batch: int, real: Values) -> Tensor:
        """I: the real input has arrived; what predicts it descends half its squared error, a sum over units, a mean over samples."""
        visit = self._visits[batch]
        loss = self._regress_inputs(visit.guess, real)
        visit.guess = ()
        self._parts["inputs"].release(visit.input_call)
        visit.input_call = None
        self._done(batch, Kind.INPUT)
        return loss

    def _regress_inputs(self, guess: tuple[Tensor, ...], real: Values) -> Tensor:
        with full_precision(_device_type(guess)):
            pairs = zip(guess, tensors(real), strict=True)
            loss = sum((g - h.detach().to(g.dtype)).square().sum() / (2 * len(g)) for g, h in pairs)
            assert isinstance(loss, Tensor)
            loss.backward()
        self.learnt[1] = True
        return loss.detach()

    # ---- the parts of an action, for an executor that runs several cells as one ------------------------------------------------

    def receive(self, batch: int, inputs: Tensor, outputs: Tensor, flight: Flight, kinds: frozenset[Kind]) -> None:
        """The block has run forward on a batch elsewhere; both tensors are cut off every graph."""
        visit = self._open(batch, len(inputs), flight, kinds)
        visit.context.inputs, visit.context.outputs = inputs, (outputs,)
        self._done(batch, Kind.FORWARD)

    def take_credit(self, batch: int) -> Credit | None:
        """Returns the credit of a batch; the block's own gradients are taken elsewhere."""
        visit = self._visits[batch]
        with full_precision(_device_type(visit.context.outputs)):
            credit, visit.auxiliary_call = self._credit(visit, None)
        visit.context.inputs = None
        self._done(batch, Kind.LEARN)
        return credit

    def rehearse(self, batch: int, inputs: Tensor, flight: Flight) -> Context:
        """Returns what the rule would see of a batch once the block has run on it; nothing changes."""
        context = self._context(batch, len(inputs), flight)
        context.inputs, context.shared = inputs.detach(), {}
        with undisturbed(self.block), torch.no_grad():
            context.outputs = (self.block(context.inputs),)
        return context

    def memo_of(self, batch: int) -> Any:
        """Returns what the rule remembers of a batch for the auxiliary network; the batch leaves the cell."""
        return self._visits.pop(batch).context.memo

    def remember(self, batch: int, outputs: Tensor, memo: Any, flight: Flight) -> None:
        """A batch comes back of which only the auxiliary network has yet to learn."""
        visit = self._open(batch, len(outputs), flight, frozenset({Kind.AUXILIARY}))
        visit.context.outputs, visit.context.memo = (outputs,), memo

    # ---- without a forward of its own: what a neighbour's step teaches the auxiliary networks here ----------------------------

    def input_of(self, batch: int) -> Values:
        """Returns what the block ran on, between its forward and its learning."""
        return self._visits[batch].context.inputs

    def outputs_of(self, batch: int) -> tuple[Tensor, ...]:
        """Returns what the block has made that carries credit, detached."""
        return self._visits[batch].context.outputs

    def learn_credit_at(
        self,
        batch: int,
        outputs: Values,
        flight: Flight,
        above: Credit | None,
        error: Credit | None,
        sample_losses: Callable[[], Tensor] | None,
    ) -> Tensor | None:
        """The auxiliary network learns from a batch on which the block itself has not run; ``outputs`` stand for its own."""
        visit = self._open(batch, batch_size(outputs), flight, frozenset({Kind.AUXILIARY}))
        stand_in = mark(detach(outputs), self.outputs_carry or carrying(outputs))
        visit.context.outputs = tuple(tensor.detach() for tensor in carriers(stand_in))
        return self.learn_auxiliary(batch, above, error, sample_losses)

    def learn_inputs_from(self, source: Values, real: Values) -> Tensor:
        """What predicts the block's input learns from a batch on which the block itself has not run."""
        assert self.inputs is not None
        with full_precision(_device_type(tensors(source))):
            guess = tensors(self.inputs(source))
        return self._regress_inputs(guess, real)

    def before_update(self) -> None:
        """Keeps, before weights change at the end of a tick, those that calls in flight ran with.

        Another cell's learning moves the weights that it shares with this one, so it does not matter who has learnt.
        """
        for stash in self._stashes:
            stash.before_update()
        self._updates += self.learnt[0]
        self.learnt = [False, False]

    # ---- what is in flight -------------------------------------------------------------------------------------------------

    def _done(self, batch: int, kind: Kind) -> None:
        """Ends one action; with the last one, the visit."""
        visit = self._visits[batch]
        visit.pending.discard(kind)
        if not visit.pending:
            del self._visits[batch]

    def clear(self) -> None:
        """Forgets every batch in flight."""
        self._visits.clear()
        self.learnt = [False, False]
        self._late = None
        for stash in self._stashes:
            stash.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns what the user's model does not hold: the auxiliary networks and the batches in flight."""
        networks = {"auxiliary": self.auxiliary, "inputs": self.inputs}
        state: dict[str, Any] = {name: dict(one.state_dict()) for name, one in networks.items() if one is not None}
        for name, part in self._parts.items():
            if part.stash is not None:
                state[f"{name}_stash"] = part.stash.state_dict()
        visits = {batch: self._visit_state(visit) for batch, visit in self._visits.items()}
        return state | {"visits": visits, "updates": self._updates, "correction": self._memory}

    def load_state_dict(self, state: dict[str, Any], flights: Mapping[int, Flight]) -> None:
        """Puts back what `state_dict` returned; the block's weights must have been put back before, and so must the flights.

        Calls in flight are made again: autograd's graphs cannot be stored.
        """
        self.clear()
        for name, network in (("auxiliary", self.auxiliary), ("inputs", self.inputs)):
            if network is not None:
                network.load_state_dict(state[name])
        for name, part in self._parts.items():
            if part.stash is not None:
                part.stash.load_state_dict(state[f"{name}_stash"])
        self._updates, self._memory = state["updates"], state["correction"]
        for batch, visit in state["visits"].items():
            self._visits[int(batch)] = self._revisit(int(batch), visit, flights[int(batch)])

    def _revisit(self, batch: int, state: dict[str, Any], flight: Flight) -> _Visit:
        kinds = frozenset(Kind(kind) for kind in state["pending"])
        visit = self._open(batch, state["samples"], flight, kinds)
        visit.read = state["read"]
        context = visit.context
        context.inputs, context.outputs = state["inputs"], tuple(state["outputs"])
        context.above, context.error = state["above"], state["error"]
        if Kind.INPUT in kinds:
            self._imagine(visit, flight.inputs, call_from(state["input_call"]))
        if visit.pending & {Kind.LEARN, Kind.MESSAGE} and context.inputs is not None:
            mark(context.inputs, state["carrying"])
            self._run_block(visit, call_from(state["block_call"]))
        elif state["memo"] is not None:
            context.memo = self.rule.memo_from(self.auxiliary, state["memo"])
        elif state["auxiliary_call"]:
            _, visit.auxiliary_call = self._credit(visit, call_from(state["auxiliary_call"]))
        return visit

    def _visit_state(self, visit: _Visit) -> dict[str, Any]:
        context = visit.context
        calls = {"block": visit.block_call, "auxiliary": visit.auxiliary_call, "input": visit.input_call}
        plain = self._plain_memos and context.memo is not None
        return {
            "pending": sorted(str(kind) for kind in visit.pending),
            "inputs": detach(context.inputs),
            "carrying": carrying(context.inputs),
            "outputs": list(context.outputs),
            "samples": context.samples,
            "read": visit.read,
            "above": context.above,
            "error": context.error,
            "memo": self.rule.memo_state(self.auxiliary, context.memo) if plain else None,
            **{f"{name}_call": call and call_state(call) for name, call in calls.items()},
        }


def _backward(made: tuple[Tensor, ...], credit: list[Tensor | None], inputs: tuple[Tensor, ...] | None) -> None:
    """Takes the gradients of parameters and inputs, or of these inputs alone, where there is credit; empties the list of it."""
    pairs = [(y, given) for y, given in zip(made, credit, strict=True) if given is not None]
    if not pairs or inputs == ():
        return
    if sum(given.nbytes for _, given in pairs) < _WORTH_DELIVERING:
        torch.autograd.backward([y for y, _ in pairs], [given.to(y.dtype) for y, given in pairs], inputs=inputs)
        return
    wanted = [y for y, _ in pairs]
    pairs.clear()
    _Delivery.apply(credit, *wanted).backward(inputs=inputs)


_WORTH_DELIVERING = 2**20
"""Bytes of credit from which on holding it for a moment longer costs more than a call of Python."""


class _Delivery(torch.autograd.Function):
    """A number whose gradient for each tensor is its credit.

    Autograd keeps the gradients that it is called with until it is done; of these it keeps none, which is a tensor less at the peak.
    """

    @staticmethod
    def forward(ctx: Any, credit: list[Tensor | None], *made: Tensor) -> Tensor:
        ctx.credit, ctx.types = credit, [y.dtype for y in made]
        return made[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        given = [given for given in ctx.credit if given is not None]
        ctx.credit.clear()
        return None, *(part.to(kind) for part, kind in zip(given, ctx.types, strict=True))


def _device_type(tensors: tuple[Tensor, ...]) -> str:
    return tensors[0].device.type if tensors else "cpu"
