"""A recurrent network run chunk by chunk, with sequences that end where they like."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lockfree.objective import Objective
from lockfree.recurrent.cores import Core
from lockfree.recurrent.state import Layout, State
from lockfree.recurrent.stretch import Stretch
from lockfree.values import Values, detach


class Network:
    """A core and a readout; the core's outputs are read out step by step.

    Args:
        core: How the core is run.
        layout: How its state is built.
        readout: Maps outputs (n, features) to scores (n, ...).
    """

    def __init__(self, core: Core, layout: Layout, readout: nn.Module) -> None:
        self.core, self.layout, self.readout = core, layout, readout

    def learns_start(self, inputs: Tensor) -> bool:
        """Whether the state in which sequences begin has parameters."""
        with torch.enable_grad():
            return any(leaf.requires_grad for leaf in self.layout.leaves(self.core.initial(inputs)))

    def read(self, outputs: Tensor) -> Values:
        """Reads out outputs (steps, m, features): scores (steps * m, ...)."""
        return self.readout(outputs.flatten(0, 1))

    def run(self, inputs: Tensor, state: State, done: Tensor | None) -> tuple[Tensor, State]:
        """Runs over inputs (steps, m, ...), where each sample's state begins anew after a step at which it is done.

        Returns:
            Outputs (steps, m, features) and the state after the last step, before anything begins anew.
        """
        if done is None or len(inputs) == 1 or not done[:-1].any():
            return self.core.run(inputs, state)
        parts, start = [], 0
        for end in [*(done[:-1].any(1).nonzero().flatten() + 1).tolist(), len(inputs)]:
            if start:
                state = self.renewed(state, done[start - 1], inputs)
            outputs, state = self.core.run(inputs[start:end], state)
            parts.append(outputs)
            start = end
        return torch.cat(parts), state

    def renewed(self, state: State, ended: Tensor | None, inputs: Tensor) -> State:
        """Returns the state with that of the samples that have ended begun anew."""
        return state if ended is None else self.layout.where(ended, self.core.initial(inputs), state)


class Piece(NamedTuple):
    """What it takes to run over some steps again.

    Attributes:
        state: Before them, detached.
        inputs: (steps, m, ...).
        done: (steps, m), or ``None``.
    """

    state: State
    inputs: Tensor
    done: Tensor | None


class Chunk:
    """Up to T steps on their way to be learnt: their graph begins at a copy of the state of their own.

    Args:
        network: What runs.
        state: The state before it, detached.
        fresh: Samples whose sequence begins here, (m,), in a state that has parameters, which learn. ``None``: none.
        inputs: An example of its inputs.

    Attributes:
        samples: m.
        start: The leaves that stand for the state before it.
        state: After the steps so far, in the graph; before anything begins anew.
        ended: Samples that ended at the last step, (m,), or ``None``.
        begun: Samples that ended at a step before that, and began anew, (m,), or ``None``.
        steps: How many so far.
        loss: Sum over them of the mean loss of each, in the graph.
        outputs: What the core gave at the last step, (m, features), in the graph.
        last: State before, inputs and ends of the piece that it was run over last; detached.
    """

    def __init__(self, network: Network, state: State, fresh: Tensor | None, inputs: Tensor) -> None:
        self._network = network
        self.samples = inputs.shape[1]
        own = detach(state)
        self.start = [leaf.requires_grad_() for leaf in network.layout.leaves(own)]
        self.state = network.renewed(own, fresh, inputs)
        self.ended: Tensor | None = None
        self.begun: Tensor | None = None
        self.steps = 0
        self.loss: Tensor = torch.zeros(())
        self.outputs: Tensor | None = None
        self.last: Piece | None = None

    def advance(self, stretch: Stretch, objective: Objective) -> Values:
        """Goes on by some steps, and returns their scores (steps * m, ...)."""
        inputs, targets, done = stretch
        state = self._network.renewed(self.state, self.ended, inputs)
        self.last = Piece(detach(state), inputs, done)
        outputs, self.state = self._network.run(inputs, state, done)
        scores = self._network.read(outputs)
        loss = len(inputs) * objective.evaluate(scores, pytree.tree_map_only(Tensor, _joined, targets))
        self.loss = self.loss + loss if self.steps else loss
        self.outputs, self.steps = outputs[-1], self.steps + len(inputs)
        self.begun = _any(self.begun, self.ended, None if done is None else done[:-1].any(0))
        self.ended = None if done is None else done[-1]
        return scores

    def after(self, inputs: Tensor) -> tuple[State, Tensor | None]:
        """Returns what the next chunk begins with: the state, detached, and who begins anew."""
        with torch.no_grad():
            return detach(self._network.renewed(self.state, self.ended, inputs)), self.ended

    def gradient(self, loss: Tensor, credit: list[Tensor] | None, *, keep: bool = False) -> list[Tensor]:
        """Returns the gradient of the loss, and of a credit for the state at the end, at the beginning; parameters get none.

        Args:
            loss: Scalar, in the graph.
            credit: Gradients of the shapes of the state.
            keep: Whether the graph is still needed.
        """
        roots, gradients = self._roots(loss, credit)
        found = torch.autograd.grad(roots, self.start, gradients, retain_graph=keep, allow_unused=True)
        return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(self.start, found, strict=True)]

    def gradient_of(self, parameters: Sequence[Tensor], loss: Tensor, credit: list[Tensor] | None) -> Sequence[Tensor | None]:
        """Returns the gradient of the loss, and of a credit for the state at the end, with respect to parameters."""
        roots, gradients = self._roots(loss, credit)
        return torch.autograd.grad(roots, parameters, gradients, allow_unused=True)

    def backward(self, losses: list[Tensor], credit: list[Tensor] | None) -> list[Tensor]:
        """Leaves the gradients of losses, and of a credit for the state at the end, on the parameters; returns that at the beginning."""
        roots, gradients = self._roots(losses[0], credit)
        more = losses[1:]
        torch.autograd.backward([*roots, *more], [*gradients, *[None] * len(more)])
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.start]

    def _roots(self, loss: Tensor, credit: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor | None]]:
        pairs: list[tuple[Tensor, Tensor | None]] = [(loss, None)] if loss.requires_grad else []
        if credit is not None:
            ends = zip(self._network.layout.leaves(self.state), credit, strict=True)
            pairs += [(end, one) for end, one in ends if end.requires_grad]
        return [root for root, _ in pairs], [one for _, one in pairs]

    def jacobian(self) -> Tensor:
        """Returns the derivative of each sample's state at the end by that at the beginning, (m, width, width); keeps the graph."""
        layout, rows = self._network.layout, []
        for unit in torch.eye(layout.width, dtype=self.start[0].dtype, device=self.start[0].device):
            credit = layout.parted(unit.expand(self.samples, -1))
            rows.append(layout.joined(self.gradient(torch.zeros(()), credit, keep=True)))
        return torch.stack(rows, dim=1)


def _any(*groups: Tensor | None) -> Tensor | None:
    """Returns the samples that are in any group; ``None`` is one of nobody."""
    known = [group for group in groups if group is not None]
    return functools.reduce(torch.logical_or, known) if known else None


def _joined(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, 1)
