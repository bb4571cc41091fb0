"""How the faster of two networks learns what its messages were worth to the slower one, and when."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch

from lockfree.recurrent.bootstrap import Bootstrap, Border, NoBootstrap, Report
from lockfree.recurrent.network import Chunk
from lockfree.recurrent.pair import Asked, Heard, Pair
from lockfree.recurrent.synthetic import SyntheticGradient


@dataclass(frozen=True, kw_only=True)
class Coupling(ABC):
    """When two networks that tick differently learn, and what the faster one is told of its messages."""

    @property
    def estimates(self) -> Bootstrap:
        """What stands for the gradient of a message until B reports it."""
        return NoBootstrap()

    @abstractmethod
    def learn(self, pair: Pair, asked: Asked) -> Heard:
        """Learns a stretch.

        Raises:
            Diverged: If a loss is not finite; what has been learnt before that, stays.
        """


@dataclass(frozen=True, kw_only=True)
class Coupled(Coupling):
    r"""One backward pass through both networks and all ticks, then an update of each: $\sum_k L^A_k + L^B$ is descended.

    Attributes:
        truncated: Whether A's memory is cut at every tick, as where A learns every T steps, so that the two ways differ in what A is
            told of its messages alone; B's gradient reaches each message all the same.

    Example:
        >>> Coupled()
        Coupled(truncated=False)
    """

    truncated: bool = False

    def learn(self, pair: Pair, asked: Asked) -> Heard:
        chunks, messages = [pair.begin(pair.a, asked.inputs)], []
        for number, stretch in enumerate(pair.ticks(asked)):
            if self.truncated and number:
                chunks.append(Chunk(pair.a, chunks[-1].after(stretch.inputs)[0], None, stretch.inputs))
            messages.append(pair.advance(chunks[-1], stretch))
        losses = [pair.loss(chunk) for chunk in chunks]
        slow = pair.listen(torch.stack(messages), asked.slow)
        torch.autograd.backward([*losses, slow])
        pair.take(0)
        pair.take(1)
        return Heard([loss.detach() for loss in losses], slow.detach(), [])


@dataclass(frozen=True, kw_only=True)
class Decoupled(Coupling):
    r"""A learns every T steps, without waiting for B: $L^A_k + \beta\,\langle G(\mu_k), \mu_k\rangle$ is descended at tick k.

    $\mu_k$ is the message and G a guess of $\partial L^B/\partial\mu_k$. At the end of the stretch B learns from the messages as
    they were sent, and reports their true gradients, from which the guess is learnt.

    Attributes:
        bootstrap: What guesses, and how much of the guess A is given (its ``scale``, β). It sees the message, or A's output if it
            ``reads="output"``. Those that look ahead by several chunks are refused.

    Example:
        >>> Decoupled(bootstrap=SyntheticGradient(hidden_units=256, scale=10.0)).bootstrap.scale
        10.0

    Reference:
        Jaderberg et al. 2016, arXiv 1608.05343, section on training a system of two networks.
    """

    bootstrap: Bootstrap = field(default_factory=lambda: SyntheticGradient(scale=1.0, reads="state"))

    @property
    def estimates(self) -> Bootstrap:
        return self.bootstrap

    def learn(self, pair: Pair, asked: Asked) -> Heard:
        return _tick_by_tick(pair, asked)


@dataclass(frozen=True, kw_only=True)
class Severed(Coupling):
    """A learns every T steps from what it is asked alone; B makes do with the messages that come. Nothing trains the message.

    Example:
        >>> Severed()
        Severed()
    """

    def learn(self, pair: Pair, asked: Asked) -> Heard:
        return _tick_by_tick(pair, asked)


COUPLINGS: dict[str, type[Coupling]] = {"coupled": Coupled, "decoupled": Decoupled, "severed": Severed}
"""Every coupling by its command-line name."""


def _tick_by_tick(pair: Pair, asked: Asked) -> Heard:
    """Learns A at every tick, then B, then what estimates."""
    estimator, ticks = pair.estimator, pair.ticks(asked)
    losses, messages, synthetic = [], [], []
    borders: list[Border] = []
    chunk = pair.begin(pair.a, asked.inputs)
    for number, stretch in enumerate(ticks):
        message = pair.advance(chunk, stretch)
        loss = pair.loss(chunk)
        following, _ = chunk.after(stretch.inputs)
        messages.append(message.detach())
        descended = [loss]
        if estimator is not None:
            border = pair.border(chunk, messages, following, ticks[number + 1 :], asked.slow)
            estimate = estimator.estimate(border)
            scale = estimator.scale(pair.updated[0])
            if scale:
                (credit,) = pair.layout.parted(estimate * (scale / len(message)))
                descended.append((credit * message).sum())
            borders.append(border._replace(ahead=None))
        chunk.backward(descended, None)
        pair.take(0)
        losses.append(loss.detach())
        chunk = Chunk(pair.a, following, None, stretch.inputs)
    heard = torch.stack(messages).requires_grad_()
    slow = pair.listen(heard, asked.slow)
    slow.backward()
    pair.take(1)
    assert heard.grad is not None
    for border, truth in zip(borders, pair.truth(heard.grad), strict=False):  # no borders: nobody wants to know
        assert estimator is not None
        told = estimator.learn(Report(border, truth, None))
        synthetic += [] if told is None else [told]
    return Heard(losses, slow.detach(), synthetic)
