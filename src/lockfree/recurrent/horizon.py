"""What is known of the time beyond the horizon, and how it comes to be known."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lockfree.objective import Objective
from lockfree.recurrent.bootstrap import Border, Estimator, Report
from lockfree.recurrent.network import Chunk, Network
from lockfree.recurrent.state import State
from lockfree.recurrent.stretch import Stretch
from lockfree.rng import undisturbed


class Past(NamedTuple):
    """A chunk that has been learnt, kept for a target that looks further ahead.

    Attributes:
        border: Where it began, as the estimator has seen it; ``None`` at the beginning of everything.
        state: The state there.
        stretch: Its steps.
        whole: Steps whose summed loss counts as a mean.
    """

    border: Border | None
    state: State
    stretch: Stretch
    whole: int


class Horizon:
    """An estimator, and what it has said and waits to hear about.

    Args:
        network: The recurrent network.
        objective: Its loss.
        estimator: What estimates.

    Attributes:
        border: The last one, whose truth the next chunk will tell.
        past: The last chunks, if targets look ahead by several.
    """

    def __init__(self, network: Network, objective: Objective, estimator: Estimator) -> None:
        self.network, self._objective, self.estimator = network, objective, estimator
        self.border: Border | None = None
        self.past: deque[Past] = deque()

    def forget(self) -> None:
        """Forgets all sequences."""
        self.border = None
        self.past.clear()
        self.estimator.reset()

    def estimate(self, border: Border) -> Tensor:
        """Returns the gradient of what comes after a border for each sample, (m, width); zero for those that end there."""
        estimate = self.estimator.estimate(border)
        return estimate if border.ended is None else estimate.masked_fill(border.ended.unsqueeze(1), 0.0)

    def border_after(self, chunk: Chunk, following: State, rest: Stretch | None, whole: int) -> Border:
        """Returns the border in which a chunk ends.

        Args:
            chunk: It.
            following: The state with which the next one begins.
            rest: What is still to come of the stretch; ``None`` in a stream.
            whole: Steps whose summed loss counts as a mean.
        """
        assert chunk.outputs is not None
        rows = self.network.layout.rows(chunk.state).detach()
        ahead: Callable[[], Tensor] | None = None
        if rest is not None and len(rest.inputs):
            ahead = lambda: self._gradient([Past(None, following, rest, whole)], None, 1.0)  # noqa: E731
        elif rest is not None:
            ahead = lambda: torch.zeros_like(rows)  # noqa: E731
        return Border(rows, chunk.outputs.detach().flatten(1), chunk.ended, ahead, chunk.begun)

    def hear(
        self, truth: Tensor, jacobian: Tensor | None, chunk: Past, border: Border, estimate: Tensor, update: int
    ) -> Tensor | None:
        """Is told what the last chunk said about the state that it began with; returns the estimator's loss.

        Args:
            truth: The gradient there, (m, width).
            jacobian: Of the chunk, if it is wanted.
            chunk: It.
            border: Where it ends.
            estimate: What was said about that, (m, width).
            update: The number of the update.
        """
        self.border = border._replace(ahead=None)
        chunks = self.estimator.chunks
        if chunks == 1:
            return None if chunk.border is None else self.estimator.learn(_report(chunk.border, truth, jacobian))
        self.past.append(chunk)
        if len(self.past) < chunks:
            return None
        past = list(self.past)
        first = self.past.popleft().border
        if first is None:
            return None
        return self.estimator.learn(_report(first, self._gradient(past, estimate, self.estimator.gamma(update)), None))

    def _gradient(self, past: Sequence[Past], beyond: Tensor | None, gamma: float) -> Tensor:
        """Returns the gradient at the beginning of chunks that follow each other, at the present weights, (m, width).

        Args:
            past: They.
            beyond: That of each sample at their end, (m, width).
            gamma: What every border between two of them, and the one at their end, leaves of what comes from beyond.
        """
        network, layout, state = self.network, self.network.layout, past[0].state
        chunks = []
        with undisturbed(network.core.module), undisturbed(network.readout), torch.enable_grad():
            for one in past:
                chunk = Chunk(network, state, None, one.stretch.inputs)
                chunk.advance(one.stretch, self._objective)
                state, ended = chunk.after(one.stretch.inputs)
                chunks.append((chunk, one.whole, ended))
        for chunk, whole, ended in reversed(chunks):
            carried = None if beyond is None else beyond if ended is None else beyond.masked_fill(ended.unsqueeze(1), 0.0)
            credit = None if carried is None else layout.parted(carried * (gamma / chunk.samples))
            beyond = chunk.samples * layout.joined(chunk.gradient(chunk.loss / whole, credit))
        assert beyond is not None
        return beyond

    def state_dict(self) -> dict[str, Any]:
        """Returns plain data and tensors that put everything back."""
        return {
            "estimator": dict(self.estimator.state_dict()),
            "optimizer": self.estimator.optimizer_state(),
            "border": _stored(self.border),
            "past": [[_stored(p.border), p.state, list(p.stretch), p.whole] for p in self.past],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self.estimator.load_state_dict(state["estimator"])
        self.estimator.load_optimizer_state(state["optimizer"])
        self.border = _restored(state["border"])
        self.past = deque(Past(_restored(b), s, Stretch(*stretch), whole) for b, s, stretch, whole in state["past"])


def _report(border: Border, truth: Tensor, jacobian: Tensor | None) -> Report:
    """Returns the report; what became of samples that had ended there is that of the sequences after them, which does not count."""
    if border.ended is None:
        return Report(border, truth, jacobian)
    ended = border.ended[:, None]
    return Report(
        border, truth.masked_fill(ended, 0.0), None if jacobian is None else jacobian.masked_fill(ended[..., None], 0.0)
    )


def _stored(border: Border | None) -> list[Any] | None:
    return None if border is None else [border.rows, border.outputs, border.ended, border.begun]


def _restored(state: list[Any] | None) -> Border | None:
    return None if state is None else Border(rows=state[0], outputs=state[1], ended=state[2], ahead=None, begun=state[3])
