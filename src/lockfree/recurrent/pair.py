"""Two recurrent networks, the slower of which hears from the faster every T steps."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lockfree.objective import Diverged, Objective, describe
from lockfree.recurrent.bootstrap import Bootstrap, Border, Estimator, Site
from lockfree.recurrent.cores import understand
from lockfree.recurrent.network import Chunk, Network
from lockfree.recurrent.state import Layout, State
from lockfree.recurrent.stretch import Stretch
from lockfree.rng import generators_apart, undisturbed
from lockfree.update import Update
from lockfree.values import detach


class Parts(NamedTuple):
    """The user's own modules.

    Attributes:
        a: The core that takes a step at a time.
        a_readout: Maps its outputs (n, features) to scores.
        message: Maps its outputs (m, features) at a tick to what B is told, (m, ...).
        b: The core that takes a step each tick.
        b_readout: Maps its outputs to scores.
    """

    a: nn.Module
    a_readout: nn.Module
    message: nn.Module
    b: nn.Module
    b_readout: nn.Module

    @property
    def fast(self) -> list[nn.Module]:
        """What A is made of; its message is."""
        return [self.a, self.a_readout, self.message]

    @property
    def slow(self) -> list[nn.Module]:
        """What B is made of."""
        return [self.b, self.b_readout]

    @contextlib.contextmanager
    def on_other_buffers(self) -> Iterator[None]:
        """Puts copies in the place of all buffers: a graph on its way to be learnt has kept these, which must not change."""
        own = [
            (module, name, buffer)
            for part in self
            for module in part.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        for module, name, buffer in own:
            setattr(module, name, buffer.clone())
        try:
            yield
        finally:
            for module, name, buffer in own:
                setattr(module, name, buffer)

    @contextlib.contextmanager
    def undisturbed(self, *, evaluate: bool = False) -> Iterator[None]:
        """Lets all of them be run for a look, in evaluation mode if wanted."""
        with contextlib.ExitStack() as stack:
            for module in self:
                stack.enter_context(undisturbed(module))
                if evaluate:
                    module.eval()
            yield


class Asked(NamedTuple):
    """A stretch with what both networks are asked.

    Attributes:
        inputs: (slow * T, m, ...).
        fast: What A is asked, (slow * T, m, ...) or a tree of such.
        slow: What B is asked, (slow, m, ...) or a tree of such.
    """

    inputs: Tensor
    fast: Any
    slow: Any


class Heard(NamedTuple):
    """What a stretch has taught.

    Attributes:
        fast: A's losses, whose sum is that over ticks of the mean loss of their T steps.
        slow: B's loss.
        synthetic: Losses of what estimates the gradient of messages; empty if nothing does or it does not descend.
    """

    fast: list[Tensor]
    slow: Tensor
    synthetic: list[Tensor]


class Pair:
    """The two networks at work, every sequence from its beginning.

    Args:
        parts: They.
        inputs: An example, (steps, m, ...); only its shape after these two, its dtype and its device matter.
        objectives: A's loss and B's.
        updates: Of A, its message included, and of B.
        bootstrap: What stands for the gradient of a message.
        horizon: T.

    Attributes:
        estimator: What is alive of the bootstrap; ``None``: nothing stands for the gradient.
        updated: How often A and B have been.

    Raises:
        ValueError: If a part is not what it should be, or the bootstrap asks for more than a message has.
    """

    def __init__(
        self,
        parts: Parts,
        inputs: Tensor,
        *,
        objectives: tuple[Objective, Objective],
        updates: tuple[Update, Update],
        bootstrap: Bootstrap,
        horizon: int,
    ) -> None:
        self.parts, self.horizon = parts, horizon
        self._objectives, self._updates = objectives, updates
        self.updated = [0, 0]
        core, layout = understand(parts.a, inputs)
        with parts.undisturbed(evaluate=True), torch.no_grad():
            outputs = core.run(inputs, core.initial(inputs))[0][-1]
            message = parts.message(outputs)
        if not isinstance(message, Tensor) or not message.is_floating_point() or message.shape[:1] != outputs.shape[:1]:
            raise ValueError(
                f"the message is {describe(message)} for outputs {tuple(outputs.shape)}: give a module that maps outputs (samples, "
                "features) to one tensor (samples, ...) of floating point"
            )
        messages = message.unsqueeze(0)
        self.a = Network(core, layout, parts.a_readout)
        self.b = Network(*understand(parts.b, messages), parts.b_readout)
        self._learns_start = {net: net.learns_start(like) for net, like in ((self.a, inputs), (self.b, messages))}
        self.layout = Layout(message, [0])
        with generators_apart():
            self.estimator = bootstrap.estimator(Site(self.layout, self.layout.rows(message), outputs.flatten(1), horizon))
        _check(self.estimator, bootstrap)

    # ---- running -------------------------------------------------------------------------------------------------------------

    def begin(self, network: Network, inputs: Tensor) -> Chunk:
        """Returns a chunk at the beginning of sequences."""
        fresh = torch.ones(inputs.shape[1], dtype=torch.bool, device=inputs.device) if self._learns_start[network] else None
        return Chunk(network, detach(network.core.initial(inputs)), fresh, inputs)

    def ticks(self, asked: Asked) -> list[Stretch]:
        """Returns the steps from tick to tick, as A takes them."""
        stretch = Stretch(asked.inputs, asked.fast, None)
        return [stretch.cut(start, start + self.horizon) for start in range(0, len(asked.inputs), self.horizon)]

    def advance(self, chunk: Chunk, stretch: Stretch) -> Tensor:
        """Runs A to the next tick; returns its message, in the graph."""
        chunk.advance(stretch, self._objectives[0])
        assert chunk.outputs is not None
        return self.parts.message(chunk.outputs)

    def loss(self, chunk: Chunk) -> Tensor:
        """Returns the loss of A in a chunk of its: the sum over ticks of the mean loss of their T steps, in the graph.

        Raises:
            Diverged: If it is not finite.
        """
        loss = chunk.loss / self.horizon
        self._finite(loss, 0)
        return loss

    def listen(self, messages: Tensor, targets: Any) -> Tensor:
        """Runs B over messages (slow, m, ...) from the beginning; returns its mean loss of a tick, in the graph.

        Raises:
            Diverged: If it is not finite.
        """
        chunk = self.begin(self.b, messages)
        chunk.advance(Stretch(messages, targets, None), self._objectives[1])
        loss = chunk.loss / len(messages)
        self._finite(loss, 1)
        return loss

    def _finite(self, loss: Tensor, which: int) -> None:
        if not torch.isfinite(loss):
            raise Diverged(
                f"the loss of {'AB'[which]} is {loss.item()} at its update {self.updated[which]}: lower the learning rate, clip "
                "gradients (clip_norm=), or look at the inputs"
            )

    def take(self, which: int) -> None:
        """Steps the optimizer of A, 0, or B, 1, by the gradients that lie on its parameters."""
        self._updates[which].take()
        self.updated[which] += 1

    # ---- the gradient of messages --------------------------------------------------------------------------------------------

    def border(
        self, chunk: Chunk, messages: Sequence[Tensor], following: State, rest: Sequence[Stretch], targets: Any
    ) -> Border:
        """Returns the last message as an estimator sees it.

        Args:
            chunk: A's, which ends where the message was sent.
            messages: All so far, detached.
            following: A's state there, detached.
            rest: The steps to come, from tick to tick.
            targets: What B is asked.
        """
        assert chunk.outputs is not None
        rows = self.layout.rows(messages[-1])
        return Border(rows, chunk.outputs.detach().flatten(1), None, self._foreseen(list(messages), following, rest, targets))

    def _foreseen(self, messages: list[Tensor], state: State, rest: Sequence[Stretch], targets: Any) -> Callable[[], Tensor]:
        """Returns what finds the true gradient of the last message, by running both networks to the end at the present weights."""

        def ahead() -> Tensor:
            with self.parts.on_other_buffers(), self.parts.undisturbed():
                later = []
                with torch.no_grad():
                    now = state
                    for stretch in rest:
                        outputs, now = self.a.core.run(stretch.inputs, now)
                        later.append(self.parts.message(outputs[-1]))
                with torch.enable_grad():
                    heard = torch.stack([*messages, *later]).requires_grad_()
                    (gradient,) = torch.autograd.grad(self.listen(heard, targets), heard)
            return self.truth(gradient)[len(messages) - 1]

        return ahead

    def truth(self, gradient: Tensor) -> list[Tensor]:
        """Returns the gradient of each sample's loss with respect to each message, (m, width), given that of the mean loss."""
        return [self.layout.rows(one) * len(one) for one in gradient]


def _check(estimator: Estimator | None, bootstrap: Bootstrap) -> None:
    """Refuses what estimates by a chain of guesses: B reports the truth itself."""
    if estimator is not None and (estimator.chunks != 1 or estimator.wants_jacobian):
        raise ValueError(
            f"{bootstrap} looks ahead by several chunks or asks for a Jacobian: the truth about a message comes from B whole, so leave "
            "steps and traces out"
        )
