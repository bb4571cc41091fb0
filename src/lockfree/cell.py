"""One block with everything that it learns with."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lockfree.chain import Block
from lockfree.rule import Context, Needs, Place, Rule
from lockfree.stash import Call, Stash, call_from, call_state
from lockfree.values import Credit, Values, as_leaves, batch_size, carriers, carrying, detach, mark


@dataclass(slots=True)
class _Visit:
    """One batch in one cell, from its forward to its last action."""

    context: Context
    target: Any = None  # kept from the rule until block or auxiliary network may see it
    made: tuple[Tensor, ...] = ()  # the outputs that carry credit, with the block's graph; empty once learnt
    block_call: Call | None = None
    auxiliary_call: Call | None = None
    learnt: bool = False


class Cell:
    """A block, its auxiliary network, and the batches that it is working on.

    Args:
        place: Where the cell stands.
        block: The piece of the user's model.
        rule: How the block gets its credit.
        auxiliary: What `Rule.build` made, or ``None``.
        joined: Whether the borders (below, above) are left uncut, because exact credit crosses them within the tick. Above the top
            cell this is the border to the loss.
        reports: Whether the cell below wants dL/dx as a message.
        overlaps: Whether the weights (of the block, of the auxiliary network) may change between a call and its gradient.
        learns_early: Whether the block's weights change before the batch has reached the loss, which would tell if it is sound.

    Attributes:
        learnt: Whether (the block, the auxiliary network) has gathered gradients in this tick.
    """

    def __init__(
        self,
        *,
        place: Place,
        block: Block,
        rule: Rule,
        auxiliary: nn.Module | None,
        joined: tuple[bool, bool],
        reports: bool,
        overlaps: tuple[bool, bool],
        learns_early: bool,
    ) -> None:
        self.place, self.block, self.rule, self.auxiliary, self.reports = place, block, rule, auxiliary, reports
        self.joined_below, self.joined_above = joined
        self.needs = rule.needs(place)
        self.auxiliary_needs = rule.auxiliary_needs(place)
        self.learns_early = learns_early
        self.learnt = [False, False]
        self._block_stash = Stash(block) if overlaps[0] else None
        self._auxiliary_stash = Stash(auxiliary) if overlaps[1] and auxiliary else None
        self._visits: dict[int, _Visit] = {}

    def __repr__(self) -> str:
        return f"Cell({self.place.index}, {self.block.name!r}, {self.rule})"

    # ---- the three actions -------------------------------------------------------------------------------------------------

    def forward(self, batch: int, inputs: Values, target: Any, shared: dict[str, Any]) -> Values:
        """F: runs the block on one batch and returns what crosses its upper border, detached unless it is joined."""
        if not (self.reports or self.joined_below):
            inputs = detach(inputs)  # nobody asks for dL/dx, so autograd need not compute it
        context = Context(self.place, self.auxiliary, inputs, (), batch_size(inputs), shared=shared)
        if self.needs >= Needs.TARGET:
            context.target = target
        visit = self._visits[batch] = _Visit(context, target=target)
        return self._run_block(visit, None)

    def _run_block(self, visit: _Visit, replayed: Call | None) -> Values:
        context = visit.context

        def run() -> Values:
            return self.rule.run(self.block, self.auxiliary, context.inputs)

        if self._block_stash is None:
            made = run()
        elif replayed is not None:
            made = self._block_stash.replay(replayed, run)
            visit.block_call = replayed
        else:
            with self._block_stash.record() as visit.block_call:
                made = run()
        visit.made = carriers(made)
        context.outputs = tuple(tensor.detach() for tensor in visit.made)
        if self.joined_above:
            return made
        # Whoever is above reads values that are cut off this graph, marked where they carry credit.
        return as_leaves(detach(made), made)

    def learn(self, batch: int, above: Credit | None, error: Credit | None) -> Credit | None:
        """L: takes the credit of one batch, gathers the block's gradients, and returns dL/dx (``None``: not yet)."""
        visit = self._visits[batch]
        visit.context.above, visit.context.error = above, error
        if self.joined_above:  # whoever is above has differentiated through this block
            self.learnt[0] = True
        else:
            with full_precision(_device_type(visit.made)):
                credit = self._credit(visit, None)
                if credit is not None:
                    _backward(visit.made, credit)
            self.learnt[0] = credit is not None
        message = tuple(x.grad for x in carriers(visit.context.inputs)) if self.reports else None
        visit.made, visit.learnt = (), True
        if self.auxiliary_needs is None:
            self._close(batch)
        else:
            visit.context.inputs = None
        return message

    def _credit(self, visit: _Visit, replayed: Call | None) -> Credit | None:
        def run() -> Credit | None:
            return self.rule.credit(visit.context)

        if self._auxiliary_stash is None:
            return run()
        if replayed is not None:
            visit.auxiliary_call = replayed
            return self._auxiliary_stash.replay(replayed, run)
        with self._auxiliary_stash.record() as visit.auxiliary_call:
            return run()

    def learn_auxiliary(self, batch: int, above: Credit | None, error: Credit | None) -> Tensor | None:
        """A: the truth about one batch has arrived; the auxiliary network learns from it and returns its own loss."""
        visit = self._visits[batch]
        context = visit.context
        context.target, context.above, context.error = visit.target, above, error
        loss = None
        if context.memo is not None:
            with full_precision(_device_type(context.outputs)):
                loss = self.rule.learn(context)
            self.learnt[1] = True
        self._close(batch)
        return loss

    def before_update(self) -> None:
        """Keeps, before weights change at the end of a tick, those that calls in flight ran with.

        Another cell's learning moves the weights that it shares with this one, so it does not matter who has learnt.
        """
        for stash in (self._block_stash, self._auxiliary_stash):
            if stash is not None:
                stash.before_update()
        self.learnt = [False, False]

    # ---- what is in flight -------------------------------------------------------------------------------------------------

    def _close(self, batch: int) -> None:
        visit = self._visits.pop(batch)
        if self._block_stash is not None and visit.block_call is not None:
            self._block_stash.release(visit.block_call)
        if self._auxiliary_stash is not None and visit.auxiliary_call is not None:
            self._auxiliary_stash.release(visit.auxiliary_call)

    def clear(self) -> None:
        """Forgets every batch in flight."""
        self._visits.clear()
        self.learnt = [False, False]
        for stash in (self._block_stash, self._auxiliary_stash):
            if stash is not None:
                stash.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns what the user's model does not hold: the auxiliary network and the batches in flight."""
        parts = {
            "auxiliary": self.auxiliary,
            "block_stash": self._block_stash,
            "auxiliary_stash": self._auxiliary_stash,
        }
        state = {name: dict(part.state_dict()) for name, part in parts.items() if part is not None}
        return state | {"visits": {batch: _visit_state(visit) for batch, visit in self._visits.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned; the block's weights must have been put back before.

        Calls in flight are made again: autograd's graphs cannot be stored.
        """
        self.clear()
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(state["auxiliary"])
        if self._block_stash is not None:
            self._block_stash.load_state_dict(state["block_stash"])
        if self._auxiliary_stash is not None:
            self._auxiliary_stash.load_state_dict(state["auxiliary_stash"])
        for batch, visit in state["visits"].items():
            self._visits[int(batch)] = self._revisit(visit)

    def _revisit(self, state: dict[str, Any]) -> _Visit:
        context = Context(self.place, self.auxiliary, state["inputs"], tuple(state["outputs"]), state["samples"])
        context.target = state["target"] if self.needs >= Needs.TARGET else None
        visit = _Visit(context, target=state["target"], learnt=state["learnt"])
        if not visit.learnt:
            mark(context.inputs, state["carrying"])
            self._run_block(visit, call_from(state["block_call"]))
        else:
            context.above, context.error = state["above"], state["error"]
            self._credit(visit, call_from(state["auxiliary_call"]))
        return visit


def _backward(made: tuple[Tensor, ...], credit: Credit) -> None:
    """Takes the gradients of parameters and inputs, where there is credit."""
    pairs = [(y, given) for y, given in zip(made, credit, strict=True) if given is not None]
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [given.to(y.dtype) for y, given in pairs])


def _visit_state(visit: _Visit) -> dict[str, Any]:
    context = visit.context
    inputs = None if visit.learnt else context.inputs
    return {
        "learnt": visit.learnt,
        "inputs": detach(inputs),
        "carrying": carrying(inputs),
        "outputs": list(context.outputs) if visit.learnt else [],
        "samples": context.samples,
        "target": visit.target,
        "above": context.above,
        "error": context.error,
        "block_call": visit.block_call and call_state(visit.block_call),
        "auxiliary_call": visit.auxiliary_call and call_state(visit.auxiliary_call),
    }


def full_precision(device_type: str) -> AbstractContextManager:
    """Leaves the ambient autocast: gradients are taken, and auxiliary networks run, in the precision of their tensors."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    # Weights change below, so autocast's copies of them in low precision are stale from here on.
    torch.clear_autocast_cache()
    return torch.autocast(device_type, enabled=False)


def _device_type(tensors: tuple[Tensor, ...]) -> str:
    return tensors[0].device.type if tensors else "cpu"
