"""Two networks on different clocks: A takes every step and tells B something every T steps; B takes a step each time it hears."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lockfree.choose import choose
from lockfree.convert import OptimizerFactory
from lockfree.objective import Loss, Objective, describe
from lockfree.recurrent.bootstrap import Estimator
from lockfree.recurrent.couplings import COUPLINGS, Coupling
from lockfree.recurrent.pair import Asked, Pair, Parts
from lockfree.rng import get_rng, set_rng
from lockfree.update import Update
from lockfree.values import Values, tensors


@dataclass(frozen=True, slots=True)
class Ticked:
    """What a stretch has taught two networks.

    Attributes:
        ticks: How often B has heard from A in it.
    """

    ticks: int
    _fast: Sequence[Tensor] = field(repr=False)
    _slow: Tensor = field(repr=False)
    _synthetic: Sequence[Tensor] = field(repr=False)

    @property
    def fast(self) -> float:
        """A's loss, mean of the ticks, each before its update."""
        return torch.stack(list(self._fast)).sum().item() / self.ticks

    @property
    def slow(self) -> float:
        """B's loss."""
        return self._slow.item()

    @property
    def synthetic(self) -> float | None:
        """Mean loss of what guesses the gradient of messages; ``None`` if nothing has been descended."""
        return torch.stack(list(self._synthetic)).mean().item() if self._synthetic else None


class TwoClocks:
    r"""Trains two recurrent networks in place: A ticks every step, B every T steps, on what A tells it.

    Of a stretch of S T steps, A's loss at tick k is $L^A_k$, the mean of T steps, and its message $\mu_k$; B's loss $L^B$ is the mean of
    S ticks. Coupled, both learn once a stretch, $\sum_k L^A_k + L^B$. Decoupled, A learns at each tick,
    $L^A_k + \beta\,\langle G(\mu_k), \mu_k\rangle$, where G guesses $\partial L^B/\partial\mu_k$, and B at the end, who reports the true
    gradients that the guess is learnt from. Severed, A learns $L^A_k$ alone. Every stretch begins sequences anew.

    Args:
        a: A's core: anything that `lockfree.recurrent.convert` takes.
        a_readout: Maps its outputs (n, features) to what the loss takes.
        message: Maps its outputs at a tick, (m, features), to what B is told, (m, ...); it learns as a part of A.
        b: B's core, whose steps are messages.
        b_readout: Maps its outputs to what the loss takes.
        horizon: T, steps of A from tick to tick, 1 or more.
        slow: S, ticks in a stretch, 2 or more; T if ``None``.
        coupling: A `Coupling`, or its name: coupled, decoupled, severed.
        loss: Maps scores (n, ...) and targets (n, ...) to a scalar, a mean over n, or over what is asked.
        b_loss: Likewise for B; the same if ``None``.
        optimizer: Maps a list of parameters to an optimizer; called for A's and for B's.
        clip_norm: Longest gradient of either network, its 2-norm, above 0; any if ``None``.

    Attributes:
        updates: How often A and B have been updated.

    Raises:
        ValueError: If a number is out of range, there is nothing to train, or a parameter belongs to both networks.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import lockfree as lf
        >>> two = TwoClocks(
        ...     a=nn.LSTM(5, 8), a_readout=nn.Linear(8, 3), message=nn.Linear(8, 4), b=nn.GRU(4, 8), b_readout=nn.Linear(8, 7),
        ...     horizon=2, slow=3, coupling="decoupled", loss=nn.functional.cross_entropy, optimizer=torch.optim.Adam,
        ... )
        >>> learnt = two.step(torch.randn(6, 16, 5), torch.randint(3, (6, 16)), torch.randint(7, (3, 16)))
        >>> two.updates, learnt.ticks
        ((3, 1), 3)

    Reference:
        Jaderberg et al. 2016, arXiv 1608.05343, section on training a system of two networks.
    """

    def __init__(
        self,
        *,
        a: nn.Module,
        a_readout: nn.Module,
        message: nn.Module,
        b: nn.Module,
        b_readout: nn.Module,
        horizon: int,
        slow: int | None = None,
        coupling: Coupling | str = "decoupled",
        loss: Loss,
        b_loss: Loss | None = None,
        optimizer: OptimizerFactory,
        clip_norm: float | None = None,
    ) -> None:
        parts = Parts(a, a_readout, message, b, b_readout)
        for name, module in zip(Parts._fields, parts, strict=True):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        self.horizon = _whole("horizon", horizon, 1)
        self.slow = _whole("slow", horizon if slow is None else slow, 2)
        found = choose(COUPLINGS, coupling, "coupling")() if isinstance(coupling, str) else coupling
        if not isinstance(found, Coupling):
            raise TypeError(f"coupling must be one such as lockfree.recurrent.Decoupled(), or its name, got {coupling!r}")
        if not callable(optimizer):
            kind = type(optimizer).__name__
            raise TypeError(
                f"optimizer must be a function such as lambda params: torch.optim.Adam(params, lr=1e-3), got {kind}"
            )
        self.parts, self.coupling = parts, found
        self._objectives = Objective(loss), Objective(loss if b_loss is None else b_loss)
        fast, slow_ = _trained(parts)
        self._updates = Update(optimizer(fast), clip_norm=clip_norm), Update(optimizer(slow_), clip_norm=clip_norm)
        self._like: Tensor | None = None  # two samples of an input: what the networks were built for

    def __repr__(self) -> str:
        cores = f"{type(self.parts.a).__name__}, {type(self.parts.b).__name__}"
        return f"TwoClocks({cores}, {self.coupling}, horizon={self.horizon}, slow={self.slow}, updates={self.updates})"

    @property
    def updates(self) -> tuple[int, int]:
        """How often A and B have been updated."""
        return (0, 0) if self._like is None else (self._pair.updated[0], self._pair.updated[1])

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """A's, which is its message's too, and B's."""
        return self._updates[0].optimizer, self._updates[1].optimizer

    @property
    def auxiliaries(self) -> list[Estimator]:
        """What is trained beside the two networks."""
        return [] if self._like is None or self._pair.estimator is None else [self._pair.estimator]

    # ---- learning and using --------------------------------------------------------------------------------------------------

    def step(self, inputs: Tensor, fast: Any, slow: Any) -> Ticked:
        """Learns a stretch, in which sequences begin.

        Args:
            inputs: (S * T, m, ...).
            fast: What A is asked: a tensor (S * T, m, ...) or a tree of them. A loss that ignores some, as cross entropy does -100, may
                leave steps out, but not all of T.
            slow: What B is asked: a tensor (S, m, ...) or a tree of them; likewise.

        Raises:
            ValueError: If something does not fit; nothing has been learnt then.
            Diverged: If a loss is not finite; neither has been updated by it, what was updated before stays so.
        """
        self._check(inputs, self.slow)
        for name, targets, steps in (("fast", fast, self.slow * self.horizon), ("slow", slow, self.slow)):
            if any(tensor.shape[:2] != (steps, inputs.shape[1]) for tensor in tensors(targets)):
                raise ValueError(
                    f"{name} targets are {describe(targets)} for inputs {tuple(inputs.shape)}: give ({steps}, {inputs.shape[1]}, ...)"
                )
        heard = self.coupling.learn(self._built(inputs), Asked(inputs, fast, slow))
        return Ticked(self.slow, heard.fast, heard.slow, heard.synthetic)

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> tuple[Values, Values]:
        """Returns A's scores (steps, m, ...) and B's (ticks, m, ...) in evaluation mode, of new sequences; nothing is changed.

        Args:
            inputs: (ticks * T, m, ...), one tick or more.

        Raises:
            ValueError: If something does not fit.
        """
        self._check(inputs, None)
        pair, samples = self._built(inputs), inputs.shape[1]
        with self.parts.undisturbed(evaluate=True):
            outputs, _ = pair.a.core.run(inputs, pair.a.core.initial(inputs))
            told = outputs[self.horizon - 1 :: self.horizon]
            messages = self.parts.message(told.flatten(0, 1)).unflatten(0, (len(told), samples))
            heard, _ = pair.b.core.run(messages, pair.b.core.initial(messages))
            scores = pair.a.read(outputs), pair.b.read(heard)
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.unflatten(0, (-1, samples)), scores)

    def _check(self, inputs: Tensor, ticks: int | None) -> None:
        """Refuses inputs that are not so many ticks long; any whole number of them if ``None``."""
        if not isinstance(inputs, Tensor) or inputs.dim() < 2 or not inputs.shape[0] or not inputs.shape[1]:
            raise ValueError(
                f"inputs are {describe(inputs)}: give a tensor (steps, samples, ...), one tick and one sample or more"
            )
        if len(inputs) % self.horizon:
            raise ValueError(f"{len(inputs)} steps of inputs: give a multiple of the horizon, {self.horizon}")
        if ticks is not None and len(inputs) != ticks * self.horizon:
            raise ValueError(
                f"{len(inputs)} steps of inputs: give {ticks * self.horizon}, {ticks} ticks of B every {self.horizon} steps"
            )

    def _built(self, inputs: Tensor) -> Pair:
        """Returns the two networks at work, made once the shape of an input is known."""
        if self._like is None:
            like = inputs.new_zeros(1, 2, *inputs.shape[2:])
            self._pair = Pair(
                self.parts,
                like,
                objectives=self._objectives,
                updates=self._updates,
                bootstrap=self.coupling.estimates,
                horizon=self.horizon,
            )
            self._like = like
        elif inputs.shape[2:] != self._like.shape[2:] or inputs.dtype != self._like.dtype:
            raise ValueError(f"inputs are {describe(inputs)}, but have been {describe(self._like)} so far")
        return self._pair

    # ---- keeping -------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns a snapshot of everything that a bit-identical resume needs: plain data and copies of tensors.

        The states of the random generators are among it.
        """
        state: dict[str, Any] = {
            "of": self._of(),
            "updates": list(self.updates),
            "parts": {name: dict(module.state_dict()) for name, module in self.parts._asdict().items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "like": self._like,
            "rng": get_rng(),
        }
        for estimator in self.auxiliaries:
            state["estimator"] = dict(estimator.state_dict())
            state["estimator_optimizer"] = estimator.optimizer_state()
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts everything back as `state_dict` found it, the global random generators included.

        Raises:
            ValueError: If the state is of other networks or another coupling; nothing is changed then.
        """
        self._refuse_another(state)
        state = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), state)
        for name, module in self.parts._asdict().items():
            module.load_state_dict(state["parts"][name])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self._like = None
        if state["like"] is not None:
            place = next(parameter for group in self.optimizers[0].param_groups for parameter in group["params"])
            pair = self._built(state["like"].to(place.device))
            pair.updated = list(state["updates"])
            if pair.estimator is not None:
                pair.estimator.load_state_dict(state["estimator"])
                pair.estimator.load_optimizer_state(state["estimator_optimizer"])
        set_rng(state["rng"])

    def _of(self) -> dict[str, str]:
        parts = {name: repr(module) for name, module in self.parts._asdict().items()}
        settings = {"coupling": repr(self.coupling), "horizon": str(self.horizon), "slow": str(self.slow)}
        return parts | settings | {"optimizer": type(self.optimizers[0]).__name__}

    def _refuse_another(self, state: dict[str, Any]) -> None:
        missing = {"of", "updates", "parts", "optimizers", "like", "rng"} - set(state)
        if missing:
            raise ValueError(f"this is not a state of two clocks: it lacks {', '.join(sorted(missing))}")
        for what, mine in self._of().items():
            theirs = state["of"].get(what)
            if theirs != mine:
                raise ValueError(f"the state is of another {what}: it was saved with {theirs}, this learner has {mine}")


def _whole(name: str, value: int, least: int) -> int:
    """Returns a whole number that is not too small.

    Raises:
        ValueError: If it is.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number, {least} or more")
    return value


def _trained(parts: Parts) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns the trainable parameters of A and of B, each once.

    Raises:
        ValueError: If one has none, or both have the same.
    """
    both = []
    for name, modules in (("A", parts.fast), ("B", parts.slow)):
        found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        if not found:
            raise ValueError(f"{name} has no parameter that requires a gradient: there is nothing to train")
        both.append(found)
    if both[0].keys() & both[1].keys():
        raise ValueError("A and B share a parameter, which would be updated on two clocks: give each its own")
    return list(both[0].values()), list(both[1].values())
