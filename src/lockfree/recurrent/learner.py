"""The recurrent learner: a core and a readout that learn every T steps, with what is known of the time beyond."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lockfree.objective import Diverged, Objective, describe
from lockfree.recurrent.auxiliary import Auxiliary
from lockfree.recurrent.bootstrap import Bootstrap, Site
from lockfree.recurrent.cores import understand
from lockfree.recurrent.horizon import Horizon, Past
from lockfree.recurrent.network import Chunk, Network, Piece
from lockfree.recurrent.state import State
from lockfree.recurrent.stretch import Stretch, joined
from lockfree.restore import Undo, same_tensors
from lockfree.rng import generators_apart, get_rng, set_rng, undisturbed
from lockfree.rule import locks
from lockfree.update import Update
from lockfree.values import Values, detach, tensors


@dataclass(frozen=True, slots=True)
class Learnt:
    """What was learnt.

    Attributes:
        steps: How many steps.
        updates: How many chunks they were.
    """

    steps: int
    updates: int
    _losses: Sequence[Tensor] = field(repr=False)  # each chunk's, summed over its steps
    _synthetic: Sequence[Tensor] = field(repr=False)
    _auxiliary: Sequence[Tensor] = field(repr=False)

    @property
    def loss(self) -> float:
        """Mean loss of a step, each chunk's before its update."""
        return torch.stack(list(self._losses)).sum().item() / self.steps

    @property
    def synthetic(self) -> float | None:
        """Mean loss of what estimates the time beyond the horizon; ``None`` if it has learnt nothing."""
        return _mean(self._synthetic)

    @property
    def auxiliary(self) -> float | None:
        """Mean loss of the auxiliary task; ``None`` if it had nothing to learn."""
        return _mean(self._auxiliary)


def _mean(losses: Sequence[Tensor]) -> float | None:
    return torch.stack(list(losses)).mean().item() if losses else None


class RecurrentLearner:
    """A recurrent network that learns every T steps. Made by `convert`.

    The state is carried from call to call until `reset`; a sample's begins anew after a step at which it is ``done``.

    Attributes:
        core: The user's own module.
        readout: Likewise.
        horizon: T.
        bootstrap: What stands for the gradient from beyond it.
        updates: How many chunks have been learnt.
    """

    def __init__(
        self,
        core: nn.Module,
        readout: nn.Module,
        *,
        horizon: int,
        bootstrap: Bootstrap,
        objective: Objective,
        update: Update,
        auxiliary: bool,
    ) -> None:
        self.core, self.readout, self.horizon, self.bootstrap = core, readout, horizon, bootstrap
        self.updates = 0
        self._objective, self._update, self._wants_auxiliary = objective, update, auxiliary
        self._like: Tensor | None = None  # two samples of an input: what the networks were built for
        self._horizon: Horizon | None = None
        self._auxiliary: Auxiliary | None = None
        self._forget()

    def __repr__(self) -> str:
        return f"RecurrentLearner({type(self.core).__name__}, {self.bootstrap}, horizon={self.horizon}, updates={self.updates})"

    # ---- learning ------------------------------------------------------------------------------------------------------------

    def step(self, inputs: Tensor, targets: Any, done: Tensor | None = None) -> Learnt:
        """Takes in a stretch of any length and learns it whole, every T steps; what remains at its end is a shorter chunk.

        A chunk descends the mean loss of its steps; a shorter one at the end of a longer stretch descends its part of that, so that
        every step of a stretch counts alike.

        Args:
            inputs: (steps, m, ...), one step or more.
            targets: A tensor (steps, m, ...) or a tree of them; the loss is given it with the first two dimensions joined.
            done: (steps, m), true at the last step of a sample's sequence: its state then begins anew, and nothing lies beyond.

        Raises:
            ValueError: If something does not fit; nothing has been learnt then, but the chunks before the one whose targets the loss
                does not accept.
            Diverged: If a loss or a state is not finite; its chunk has not been learnt, those before it have.
        """
        if self._chunk is not None:
            raise ValueError(f"{self._chunk.steps} observed steps wait to be learnt: call drain() before step")
        stretch = Stretch(inputs, targets, done)
        self._enter(stretch)
        if done is not None and not done.any():  # nobody's end need be heeded, chunk by chunk
            stretch = stretch._replace(done=None)
        whole = min(self.horizon, len(inputs))
        learnt = []
        for start in range(0, len(inputs), self.horizon):
            end = start + self.horizon
            self._advance(stretch.cut(start, end))
            learnt.append(self._learn(whole, stretch.cut(end, len(inputs))))
        return _together(learnt)

    def observe(self, inputs: Tensor, targets: Any, done: Tensor | None = None) -> tuple[Values, Learnt | None]:
        """Takes in one step of a stream, and learns when T have come together.

        Args:
            inputs: The step's, (m, ...).
            targets: (m, ...).
            done: (m,).

        Returns:
            The scores of this step, (m, ...), detached, before anything is learnt from it; and what was learnt, if anything.

        Raises:
            ValueError: If something does not fit; if it is the loss that says so, its chunk is given up as when it diverges.
            Diverged: If a loss or a state is not finite; the chunk has not been learnt, and the stream goes on after the one
                before it.
        """
        stretch = Stretch(*pytree.tree_map_only(Tensor, lambda tensor: tensor.unsqueeze(0), (inputs, targets, done)))
        self._enter(stretch)
        scores = detach(self._advance(stretch))
        assert self._chunk is not None
        return scores, self._learn(self.horizon, None) if self._chunk.steps == self.horizon else None

    def drain(self) -> Learnt | None:
        """Learns the steps of a stream that have not come together to a chunk, if there are any, as a shorter one."""
        return None if self._chunk is None else self._learn(self.horizon, None)

    def reset(self) -> None:
        """Begins all sequences anew; observed steps that have not been learnt are forgotten."""
        self._forget()
        if self._horizon is not None:
            self._horizon.forget()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of core and readout."""
        return self._update.optimizer

    @property
    def auxiliaries(self) -> list[nn.Module]:
        """What is trained beside core and readout."""
        found = [None if self._horizon is None else self._horizon.estimator, self._auxiliary]
        return [module for module in found if module is not None]

    @property
    def locks(self) -> frozenset[str]:
        """The locks between chunks; within one, T steps keep them all.

        Chunks are the blocks, later ones above: each runs on the state that the one before it leaves, so the forward lock stays; it
        learns without waiting for those after it, unless the bootstrap looks at them.
        """
        return locks([self.bootstrap.needs] * 2)

    # ---- one chunk -----------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._state: State = None  # before the chunk on its way
        self._fresh: Tensor | None = None
        self._last: Piece | None = None
        self._drop()

    def _drop(self) -> None:
        self._chunk: Chunk | None = None
        self._pieces: list[Stretch] = []
        self._randoms: list[dict[str, Tensor]] = []  # before each: a stream's owner may draw in between

    def _enter(self, stretch: Stretch) -> None:
        """Refuses what cannot be learnt from, and begins where nothing has been seen yet."""
        _check(stretch)
        self._build(stretch.inputs)
        samples, layout = stretch.inputs.shape[1], self._network.layout
        if self._state is None:
            self._state = detach(self._network.core.initial(stretch.inputs))
            self._fresh = torch.ones(samples, dtype=torch.bool, device=stretch.inputs.device)
        elif (carried := layout.samples(self._state)) != samples:
            raise ValueError(
                f"inputs hold {samples} samples, but the state that is carried is of {carried}: call reset() to begin new sequences"
            )

    def _build(self, inputs: Tensor) -> None:
        """Makes what depends on the shape of an input, once it is known."""
        if self._like is not None:
            if inputs.shape[2:] != self._like.shape[2:] or inputs.dtype != self._like.dtype:
                raise ValueError(f"inputs are {describe(inputs)}, but have been {describe(self._like)} so far")
            return
        like = inputs.new_zeros(1, 2, *inputs.shape[2:])
        core, layout = understand(self.core, like)
        self._network = Network(core, layout, self.readout)
        self._learns_start = self._network.learns_start(like)
        with undisturbed(self.core), generators_apart():
            with torch.no_grad():
                outputs, state = core.run(like, core.initial(like))
            site = Site(layout, layout.rows(state), outputs[-1].flatten(1), self.horizon)
            estimator = self.bootstrap.estimator(site)
            self._horizon = None if estimator is None else Horizon(self._network, self._objective, estimator)
            self._auxiliary = Auxiliary(site) if self._wants_auxiliary else None
        self._undo = Undo([*self.core.buffers(), *self.readout.buffers()])  # running statistics
        self._like = like

    def _advance(self, stretch: Stretch) -> Values:
        """Runs the chunk on its way, or a new one, over some steps; returns the scores of the last ones."""
        if self._chunk is None:
            self._undo.note()
            self._chunk = Chunk(self._network, self._state, self._fresh if self._learns_start else None, stretch.inputs)
        self._pieces.append(stretch)
        self._randoms.append(get_rng())
        steps = len(stretch.inputs)
        # The last step runs by itself if the auxiliary task will want to run it again.
        border = steps - 1 if self._auxiliary is not None and steps > 1 else 0
        try:
            if border:
                self._chunk.advance(stretch.cut(0, border), self._objective)
            return self._chunk.advance(stretch.cut(border, steps), self._objective)
        except BaseException:
            self._drop()
            self._undo.restore()
            raise

    def _learn(self, whole: int, rest: Stretch | None) -> Learnt:
        """Learns the chunk on its way.

        Args:
            whole: Steps whose summed loss counts as a mean.
            rest: What is still to come of the stretch; ``None`` in a stream.
        """
        chunk, pieces = self._chunk, self._pieces
        assert chunk is not None
        try:
            loss = chunk.loss / whole
            self._refuse_divergence(chunk, loss.detach())
            following, ended = chunk.after(pieces[0].inputs)
            synthetic, auxiliary = self._descend(chunk, loss, joined(pieces), whole, following, rest)
        except BaseException:
            self._undo.restore()
            raise
        finally:
            self._drop()
        self._state, self._fresh = following, ended
        # A copy: a view would keep the whole stretch alive.
        self._last = None if self._auxiliary is None else pytree.tree_map_only(Tensor, torch.clone, chunk.last)
        self.updates += 1
        return Learnt(
            chunk.steps, 1, [chunk.loss.detach()], *([one] if one is not None else [] for one in (synthetic, auxiliary))
        )

    def _refuse_divergence(self, chunk: Chunk, loss: Tensor) -> None:
        # The state too, since a loss may leave out the step that broke it; one look at the device for both.
        numbers = torch.stack([loss, *(leaf.detach().sum() for leaf in self._network.layout.leaves(chunk.state))])
        if not torch.isfinite(numbers).all():
            found = f"the loss is {loss.item()}" if not torch.isfinite(loss) else "the state is not finite"
            raise Diverged(
                f"{found} at update {self.updates}: lower the learning rate, clip gradients (clip_norm=), or look at the inputs"
            )

    def _descend(
        self, chunk: Chunk, loss: Tensor, stretch: Stretch, whole: int, following: State, rest: Stretch | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Takes the step of the optimizer, then those of what estimates; returns the losses of these."""
        horizon, layout = self._horizon, self._network.layout
        if horizon is None:
            chunk.backward([loss], None)
            self._update.take()
            return None, None
        border = horizon.border_after(chunk, following, rest, whole)
        estimate = horizon.estimate(border)
        scale, gamma = horizon.estimator.scale(self.updates), horizon.estimator.gamma(self.updates)

        def parted(part: float) -> list[Tensor] | None:
            return layout.parted(estimate * (part / chunk.samples)) if part else None

        auxiliary = self._auxiliary_loss(chunk, estimate)
        begins = horizon.border is not None
        jacobian = chunk.jacobian() if begins and horizon.estimator.wants_jacobian else None
        apart = begins and horizon.estimator.chunks == 1 and gamma != scale
        truth = chunk.gradient(loss, parted(gamma), keep=True) if apart else None
        carried = chunk.backward([loss] if auxiliary is None else [loss, auxiliary], parted(scale))
        truth = layout.joined(carried if truth is None else truth) * chunk.samples
        self._update.take()
        if auxiliary is not None:
            assert self._auxiliary is not None
            self._auxiliary.optimizer.step()
            self._auxiliary.zero_grad()
        past = Past(horizon.border, self._state, stretch, whole)
        return horizon.hear(
            truth, jacobian, past, border, estimate, self.updates
        ), None if auxiliary is None else auxiliary.detach()

    def _auxiliary_loss(self, chunk: Chunk, estimate: Tensor) -> Tensor | None:
        """Returns the loss of the auxiliary task, over samples that have come from the last chunk and not ended in this one."""
        if self._auxiliary is None or self._last is None:
            return None
        ends = [self._fresh, *(piece.done.any(0) for piece in self._pieces if piece.done is not None)]
        ended = [one for one in ends if one is not None]
        known = ~torch.stack(ended).any(0) if ended else None
        return self._auxiliary.loss(self._network, self._last, known, estimate)

    # ---- using ---------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, inputs: Tensor, *, done: Tensor | None = None, state: State = None) -> tuple[Values, State]:
        """Returns scores (steps, m, ...) in evaluation mode, and the state after the last step; nothing is changed.

        Args:
            inputs: (steps, m, ...), one step or more.
            done: (steps, m): a sample's state begins anew after a step at which it is done.
            state: To begin with; that of new sequences if ``None``.

        Raises:
            ValueError: If something does not fit.
        """
        _check(Stretch(inputs, (), done))
        self._build(inputs)
        network, (steps, samples) = self._network, inputs.shape[:2]
        with undisturbed(self.core), undisturbed(self.readout):
            self.core.eval()
            self.readout.eval()
            if state is None:
                state = network.core.initial(inputs)
            network.layout.check(state, samples)
            outputs, after = network.run(inputs, state, done)
            scores = network.read(outputs)
            after = network.renewed(after, None if done is None else done[-1], inputs)
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.unflatten(0, (steps, samples)), scores), after

    def gradients(self, inputs: Tensor, targets: Any, done: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the sum of what the chunks of a stretch would hand to the optimizer if no weight changed; changes nothing.

        With the `Oracle` it is that of full backpropagation through time.

        Args:
            inputs: As for `step`; sequences begin here.
            targets: As for `step`.
            done: As for `step`.

        Returns:
            The gradient of each parameter that would be given one, named as ``core.…`` or ``readout.…``.

        Raises:
            ValueError: As for `step`.
        """
        stretch = Stretch(inputs, targets, done)
        _check(stretch)
        self._build(inputs)
        network, whole = self._network, min(self.horizon, len(inputs))
        horizon = None
        if self._horizon is not None and (scale := self._horizon.estimator.scale(self.updates)):
            # A copy, because an estimator may remember what it has seen.
            horizon = Horizon(network, self._objective, copy.deepcopy(self._horizon.estimator))
            horizon.forget()
        named = [(f"{part}.{name}", p) for part in ("core", "readout") for name, p in getattr(self, part).named_parameters()]
        trained = [(name, p) for name, p in named if p.requires_grad]
        total: dict[str, Tensor] = {}
        fresh = torch.ones(inputs.shape[1], dtype=torch.bool, device=inputs.device) if self._learns_start else None
        with undisturbed(self.core), undisturbed(self.readout):
            state = detach(network.core.initial(inputs))
            for start in range(0, len(inputs), self.horizon):
                end = start + self.horizon
                chunk = Chunk(network, state, fresh, inputs)
                chunk.advance(stretch.cut(start, end), self._objective)
                state, ended = chunk.after(inputs)
                credit = None
                if horizon is not None:
                    border = horizon.border_after(chunk, state, stretch.cut(end, len(inputs)), whole)
                    credit = network.layout.parted(horizon.estimate(border) * (scale / chunk.samples))
                found = chunk.gradient_of([p for _, p in trained], chunk.loss / whole, credit)
                for (name, _), one in zip(trained, found, strict=True):
                    if one is not None:
                        total[name] = total[name] + one if name in total else one
                fresh = ended if self._learns_start else None
        return total

    # ---- keeping -------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns a snapshot of everything that a bit-identical resume needs: plain data and copies of tensors.

        Steps of a stream that wait to be learnt are among it, and the states of the random generators.
        """
        state: dict[str, Any] = {
            "of": self._of(),
            "updates": self.updates,
            "core": dict(self.core.state_dict()),
            "readout": dict(self.readout.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "update": self._update.state_dict(),
            "like": self._like,
            "rng": get_rng(),
        }
        if self._like is not None:
            state |= {
                "state": self._state,
                "fresh": self._fresh,
                "last": self._last and list(self._last),
                "pieces": [list(piece) for piece in self._pieces],
                "randoms": self._randoms,
                "buffers": self._undo.state_dict() if self._pieces else [],  # before them
                "horizon": self._horizon and self._horizon.state_dict(),
                "auxiliary": self._auxiliary and dict(self._auxiliary.state_dict()),
                "auxiliary_optimizer": self._auxiliary and self._auxiliary.optimizer.state_dict(),
            }
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts everything back as `state_dict` found it, the global random generators included.

        Raises:
            ValueError: If the state is of another network or bootstrap; nothing is changed then.
        """
        self._refuse_another(state)
        state = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), state)
        self.core.load_state_dict(state["core"])
        self.readout.load_state_dict(state["readout"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
        self._forget()
        self._like, self._horizon, self._auxiliary = None, None, None
        if state["like"] is not None:
            place = next(parameter for group in self.optimizer.param_groups for parameter in group["params"])
            state |= pytree.tree_map_only(Tensor, lambda tensor: tensor.to(place.device), {n: state[n] for n in _MOVED})
            self._build(state["like"])
            self._state, self._fresh, self._last = state["state"], state["fresh"], state["last"] and Piece(*state["last"])
            if self._horizon is not None:
                self._horizon.load_state_dict(state["horizon"])
            if self._auxiliary is not None:
                self._auxiliary.load_state_dict(state["auxiliary"])
                self._auxiliary.optimizer.load_state_dict(state["auxiliary_optimizer"])
            if state["pieces"]:
                self._undo.load_state_dict(state["buffers"])
                self._undo.restore()
            for piece, random in zip(state["pieces"], state["randoms"], strict=True):
                set_rng(random)
                self._advance(Stretch(*piece))
        self._update.load_state_dict(state["update"])
        set_rng(state["rng"])

    def _of(self) -> dict[str, str]:
        return {
            "core": repr(self.core),
            "readout": repr(self.readout),
            "bootstrap": repr(self.bootstrap),
            "horizon": str(self.horizon),
            "auxiliary task": str(self._wants_auxiliary),
            "optimizer": type(self.optimizer).__name__,
        }

    def _refuse_another(self, state: dict[str, Any]) -> None:
        missing = {"of", "updates", "core", "readout", "optimizer", "update", "like", "rng"} - set(state)
        if missing:
            raise ValueError(f"this is not a recurrent learner's state: it lacks {', '.join(sorted(missing))}")
        for what, mine in self._of().items():
            theirs = state["of"].get(what)
            if theirs != mine:
                raise ValueError(f"the state is of another {what}: it was saved with {theirs}, this learner has {mine}")
        for part in ("core", "readout"):
            same_tensors(part, state[part], getattr(self, part).state_dict())


_MOVED = ("like", "state", "fresh", "last", "pieces", "horizon", "update")
"""What a checkpoint gives on the CPU and has to be where the network is."""


def _check(stretch: Stretch) -> None:
    """Refuses what is no stretch.

    Raises:
        ValueError: With what was given and what was wanted.
    """
    inputs, targets, done = stretch
    if not isinstance(inputs, Tensor) or inputs.dim() < 2 or not inputs.shape[0] or not inputs.shape[1]:
        raise ValueError(f"inputs are {describe(inputs)}: give a tensor (steps, samples, ...), one step and one sample or more")
    for tensor in tensors(targets):
        if tensor.shape[:2] != inputs.shape[:2]:
            raise ValueError(
                f"targets are {describe(targets)} for inputs {tuple(inputs.shape)}: give one for each step and sample"
            )
    if done is not None and (not isinstance(done, Tensor) or done.dtype != torch.bool or done.shape != inputs.shape[:2]):
        raise ValueError(f"done is {describe(done)} for inputs {tuple(inputs.shape)}: give a bool for each step and sample")


def _together(learnt: Sequence[Learnt]) -> Learnt:
    """Joins what was learnt chunk by chunk."""
    parts = [[loss for one in learnt for loss in getattr(one, name)] for name in ("_losses", "_synthetic", "_auxiliary")]
    return Learnt(sum(one.steps for one in learnt), len(learnt), *parts)
