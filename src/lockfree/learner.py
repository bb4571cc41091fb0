"""The learner: a model and a rule that take one batch at a time."""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lockfree.cell import Cell
from lockfree.chain import Chain
from lockfree.executors import Assembly, Executor, Outcome, Stopwatch
from lockfree.flight import Flight
from lockfree.restore import Undo, same_tensors
from lockfree.rng import Streams, get_rng, set_rng, undisturbed
from lockfree.rule import LOCKS, Rule, Trained, locks
from lockfree.schedule import Schedule
from lockfree.update import Update
from lockfree.values import Values, batch_size, detach, tensors

_RUNNING = re.compile(r"(^|\.)(running_\w+|num_batches_tracked)$")
"""Names of buffers that training changes, as PyTorch names them."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step brought to light.

    Attributes:
        batch: Number of the batch that reached the loss, or ``None`` while a pipeline fills.
    """

    batch: int | None
    _outcome: Outcome = field(repr=False)

    @property
    def awaited(self) -> bool:
        """Whether the loss arises in another process, so that looking at it means waiting for it."""
        return self._outcome.awaited

    @property
    def auxiliary(self) -> dict[int, Tensor]:
        """Loss of each auxiliary network that learnt, by cell."""
        return self._outcome.auxiliary_by_cell()

    @property
    def inputs(self) -> dict[int, Tensor]:
        """Loss of each network that predicts a block's input and learnt, by cell."""
        return {cell: loss for (cell, _), loss in self._outcome.inputs.items()}

    @property
    def loss(self) -> float:
        """Loss of that batch before the update; ``nan`` while a pipeline fills."""
        return math.nan if self.batch is None else self._outcome.losses[self.batch].item()


class Learner:
    """A model that learns without the locks. Made by `convert`.

    Attributes:
        model: The user's own object, trained in place.
        rule: How its blocks get their credit.
        chain: The model cut into blocks.
        steps: Batches taken in so far.
    """

    def __init__(
        self, chain: Chain, rule: Rule, phases: Sequence["Phase"], executor: Executor, assembly: Assembly, same: dict[str, str]
    ) -> None:
        self.model, self.chain, self.rule = chain.model, chain, rule
        self.steps = 0
        self._phases, self._phase = list(phases), phases[0]
        self._executor, self._assembly, self._same = executor, assembly, same
        # Of auxiliary networks running statistics alone: other buffers there are fixed random numbers.
        moving = [buffer for network in self.auxiliaries for name, buffer in network.named_buffers() if _RUNNING.search(name)]
        self._undo = Undo([*self.model.buffers(), *moving])
        self._trained = Trained(self.model, tuple(chain.blocks), tuple(cell.auxiliary for cell in assembly.cells))
        self._first = 0  # batches before this one have been drained
        self._seen: set[tuple] = set()

    def __repr__(self) -> str:
        return f"Learner({self.chain}, {self.rule}, schedule={self.schedule.name!r}, steps={self.steps})"

    # ---- learning ------------------------------------------------------------------------------------------------------------

    def step(self, x: Values, y: Any) -> StepResult:
        """Takes one batch in; under ``lockstep`` it is learnt whole.

        Args:
            x: What the model takes, first dimension the batch.
            y: What the loss takes as targets.

        Returns:
            The loss before the update, and those of the auxiliary networks.

        Raises:
            ValueError: If the batch is empty or its targets do not fit the model; nothing has been learnt then.
            Diverged: If the loss is not finite; the message names the cell and the step.
        """
        self._check_batch(x, y)
        self._executor.prepare(self._assembly, self.steps - 1, lambda: self._seconds(x, y))
        self._enter(self._phase_of(self.steps))
        tick = self.steps
        fed = detach(self._phase.rule.feed(self._trained, x, y, tick))
        self._assembly.enter(tick, fed, y)
        try:
            outcome = self._all_or_nothing(self._executor.run, self._phase.schedule.tick(tick, self._first, tick))
        except (RuntimeError, IndexError):
            self._try_on_the_loss(x, y)  # gives a clearer reason, if the targets are to blame
            raise
        self.steps += 1
        return _result(outcome)

    def step_block(self, block: int, x: Values, y: Any) -> StepResult:
        """Lets one block alone learn from a batch, in whatever order and on whatever batch; nobody waits for anybody.

        The block runs on its synthetic input and learns from its own credit. On the same batch learns whatever predicts for its
        sake: the input of the block above from the output that was just made; the credit of the block below from dL/dx, at the
        synthetic input, which stands for an output that the block below need not have made.

        Args:
            block: Number of the block, 0 at the bottom.
            x: The *network's* input.
            y: The targets.

        Returns:
            The loss, if it is the top block; and those of the auxiliary networks.

        Raises:
            ValueError: If the rule keeps a lock, batches are in flight, or the batch does not fit; nothing has been learnt then.
            Diverged: If the loss is not finite.
        """
        self._check_batch(x, y)
        self._enter(self._phase_of(self.steps))
        if self.locks:
            held = ", ".join(sorted(self.locks, key=LOCKS.index))
            raise ValueError(
                f"a block cannot be stepped alone under {self.rule.title}, which keeps the locks {held}: take them off, with "
                "SyntheticGradients(conditioned=True, synthetic_inputs=True), or use step"
            )
        self._executor.settle(self._assembly)
        if self._assembly.flights:
            raise ValueError("a block cannot be stepped alone with batches in flight: call drain first")
        if not 0 <= block < len(self.cells):
            raise ValueError(f"block {block}: this model has blocks 0 to {len(self.cells) - 1}")
        outcome = self._all_or_nothing(self._executor.run_alone, block, self.steps, Flight(detach(x), y, 0))
        self.steps += 1
        return _result(outcome)

    def drain(self) -> None:
        """Finishes the batches in flight; the next step starts with an empty pipeline.

        Where several processes train together, each knows the weights of all blocks afterwards.
        """
        for tick in range(self.steps, self.steps + self.schedule.depth):
            self._all_or_nothing(self._executor.run, self.schedule.tick(tick, self._first, self.steps - 1))
        self._first = self.steps
        assert not self._assembly.flights, "a drained learner has nothing in flight"
        self._executor.spread(self._assembly)

    def _all_or_nothing(self, run: Callable[..., Outcome], *what: Any) -> Outcome:
        """After an error nothing half-learnt stays: weights have not changed yet, and running statistics are put back."""
        self._undo.note()
        try:
            with self._assembly.apart():
                return run(self._assembly, *what)
        except BaseException:
            self._clear()
            self._undo.restore()
            raise

    def _clear(self) -> None:
        self._first = self.steps
        self._assembly.clear()
        self._executor.forget()

    def _phase_of(self, batch: int) -> "Phase":
        return [phase for phase in self._phases if phase.start <= batch][-1]

    def _enter(self, phase: "Phase") -> None:
        """Puts a phase of the rule in force, once the batches of the one before are finished."""
        if phase is self._phase:
            return
        self.drain()
        self._force(phase)

    def _force(self, phase: "Phase") -> None:
        self._phase = phase
        self._assembly.schedule = phase.schedule
        for cell in self.cells:
            cell.follow(phase.rule)

    def _check_batch(self, x: Values, y: Any) -> None:
        """Refuses what cannot be learnt from before anything is; targets of a new kind are tried on the loss first."""
        samples = batch_size(x)
        if not samples:
            raise ValueError("the batch is empty: the loader gave a tensor with no samples")
        if samples == 1 and self.model.training:
            self._refuse_single_sample(x)
        kind = (_signature(x), _signature(y))
        if kind not in self._seen:
            self._try_on_the_loss(x, y)
            self._seen.add(kind)

    def _try_on_the_loss(self, x: Values, y: Any) -> None:
        with undisturbed(self.model), torch.no_grad():
            outputs = self.model(x)  # in its present modes: some models give more in training, and the loss counts on it
        self._assembly.objective.check(outputs, y)

    def _refuse_single_sample(self, x: Values) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                try:
                    with undisturbed(self.model), torch.no_grad():
                        self.model(x)
                except ValueError as error:
                    raise ValueError(
                        f"a batch of one sample cannot be normalised by BatchNorm ('{name}'): pass two or more, or drop the last "
                        "batch of an epoch (drop_last=True)"
                    ) from error
                return

    def gradients(self, x: Values, y: Any) -> dict[str, Tensor]:
        """Returns what one step on a batch would hand to the optimizer, and changes nothing.

        Args:
            x: As for `step`.
            y: As for `step`.

        Returns:
            The rule's gradient of each parameter of the model that would be given one, by name; batches in flight play no part.

        Raises:
            ValueError: As for `step`.

        Example:
            >>> import torch, lockfree as lf
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
            >>> learner = lf.convert(model, "backprop", loss=torch.nn.functional.cross_entropy, optimizer=torch.optim.SGD)
            >>> sorted(learner.gradients(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])))
            ['0.bias', '0.weight', '2.bias', '2.weight']
        """
        state, assembly = self.state_dict(), self._assembly
        kept = assembly.blocks, assembly.auxiliaries
        collector = _Collector(kept[0].optimizer)
        assembly.blocks, assembly.auxiliaries = Update(collector), kept[1] and Update(_Collector(kept[1].optimizer))
        try:
            self._clear()
            self.step(x, y)
            self.drain()
        finally:
            assembly.blocks, assembly.auxiliaries = kept
            self.load_state_dict(state)
        return self._executor.union(
            {name: collector.found[id(p)] for name, p in self.model.named_parameters() if id(p) in collector.found}
        )

    def _seconds(self, x: Values, y: Any, rounds: int = 3) -> list[float]:
        """Measures how long each cell takes on a batch, where no graph spans several of them; changes nothing."""
        state, kept = self.state_dict(), self._executor
        self._executor = watch = Stopwatch()
        try:
            self._clear()
            for turn in range(rounds + 1):
                self.step(x, y)
                self.drain()
                if not turn:  # what is made once is not timed
                    watch.seconds.clear()
        finally:
            self._executor = kept
            self.load_state_dict(state)
        found = [0.0] * len(self.cells)
        for (cell, _), times in watch.seconds.items():
            found[cell] += statistics.median(times)
        return found

    # ---- looking -------------------------------------------------------------------------------------------------------------

    def predict(self, x: Values) -> Values:
        """Returns the model's output (class scores) in evaluation mode; nothing is changed."""
        self._executor.spread(self._assembly)
        with ExitStack() as stack, torch.no_grad():
            for module in (self.model, *self.auxiliaries):
                stack.enter_context(undisturbed(module))
                module.eval()
            return self._phase.rule.predict(self._trained, x)

    def loss(self, outputs: Values, y: Any) -> Tensor:
        """Returns the user's loss of a model output.

        Raises:
            ValueError: If the targets do not fit.
        """
        return self._assembly.objective.evaluate(outputs, y)

    def sample_losses(self, outputs: Values, y: Any) -> Tensor:
        """Returns the user's loss of each sample of a model output, shape (batch,); 0 for a sample that the loss ignores.

        Args:
            outputs: Of the model, shape (batch, ...), or a tree of such tensors.
            y: The batch's targets.

        Raises:
            ValueError: If the targets do not fit, or the loss cannot be taken sample by sample at once (`torch.func.vmap`).
        """
        return self._assembly.objective.sample_losses(outputs, y)

    @property
    def schedule(self) -> Schedule:
        """When things happen, in the present phase of the rule."""
        return self._phase.schedule

    @property
    def locks(self) -> frozenset[str]:
        """The locks that training keeps in the present phase of the rule, derived from what its blocks need and run on."""
        return locks(self.schedule.needs, self.schedule.synthetic)

    @property
    def cells(self) -> list[Cell]:
        """The cells, bottom to top."""
        return self._assembly.cells

    @property
    def auxiliaries(self) -> list[nn.Module]:
        """The auxiliary networks, whatever they are for."""
        networks = (network for cell in self.cells for network in (cell.auxiliary, cell.inputs))
        return [network for network in networks if network is not None]

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints, where several train together: one of them does, and one that trains alone."""
        return self._executor.leads

    def stops(self, wanted: bool) -> bool:
        """Whether training is to end now, the same in all processes that train together: soon after the one that leads wants it."""
        return self._executor.stops(wanted, self.steps)

    def agrees(self, wanted: bool) -> bool:
        """Whether the process that leads wants something; where several train together, all must ask."""
        return self._executor.agrees(wanted)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What the user's factory made; attach a learning-rate scheduler here."""
        return self._assembly.blocks.optimizer

    @property
    def auxiliary_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of the auxiliary networks, if any learn."""
        auxiliaries = self._assembly.auxiliaries
        return None if auxiliaries is None else auxiliaries.optimizer

    def schedule_at(self, batch: int) -> Schedule:
        """Returns when things happen in the phase of the rule that a batch belongs to."""
        return self._phase_of(batch).schedule

    def trace(self) -> list[dict[str, Any]]:
        """Returns what the processes that train together have done since this was asked last, as lines of a trace.

        `lockfree.trace` says what is in it. What is done before this is asked for the first time is not taken down. All processes
        must ask; one that trains alone has nothing to tell.
        """
        return self._executor.trace(self._assembly, self.steps)

    # ---- keeping -------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns a snapshot of everything that a bit-identical resume needs: plain data and copies of tensors.

        Model, auxiliary networks, optimizers, batches and messages in flight, and the states of the random generators.
        """
        self._executor.settle(self._assembly)
        flights = {
            batch: {
                "inputs": flight.inputs,
                "target": flight.target,
                "remaining": flight.remaining,
                "error": flight.error,
                "scores": flight.scores,
            }
            for batch, flight in self._assembly.flights.items()
        }
        state = {
            "of": self._same,
            "steps": self.steps,
            "first": self._first,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "auxiliary_optimizer": self.auxiliary_optimizer and self.auxiliary_optimizer.state_dict(),
            "updates": [update and update.state_dict() for update in (self._assembly.blocks, self._assembly.auxiliaries)],
            "cells": [cell.state_dict() for cell in self._assembly.cells],
            "links": [link.state_dict() for link in self._assembly.links],
            "flights": flights,
            "rng": get_rng(),
            "streams": self._assembly.streams.seed,
        }
        return self._executor.gather(self.model, self._assembly, _snapshot(state))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts everything back as `state_dict` found it, the global random generators included.

        Raises:
            ValueError: If the state is of another model, rule or schedule; nothing is changed then.
        """
        self._check_state(state)
        state = _snapshot(state)  # optimizers and links keep what they are given
        self.model.load_state_dict(state["model"])
        self._clear()
        self.optimizer.load_state_dict(state["optimizer"])
        if self.auxiliary_optimizer is not None:
            self.auxiliary_optimizer.load_state_dict(state["auxiliary_optimizer"])
        self.steps, self._first = state["steps"], state["first"]
        self._force(self._phase_of(max(self.steps - 1, 0)))  # batches in flight are of the phase of the last one
        # A checkpoint gives tensors on the CPU; what is in flight has to be where the model is.
        device = next(self.model.parameters()).device
        flying = {name: _to(state[name], device) for name in ("cells", "links", "flights", "updates")}
        for update, saved in zip((self._assembly.blocks, self._assembly.auxiliaries), flying["updates"], strict=True):
            if update is not None:
                update.load_state_dict(saved)
        for batch, flight in flying["flights"].items():
            self._assembly.flights[int(batch)] = Flight(**flight)
        for cell, saved in zip(self._assembly.cells, flying["cells"], strict=True):
            cell.load_state_dict(saved, self._assembly.flights)
        for link, saved in zip(self._assembly.links, flying["links"], strict=True):
            link.load_state_dict(saved)
        self._executor.adopt(self._assembly, self.steps - 1)
        set_rng(state["rng"])
        self._assembly.streams = Streams(state["streams"])

    def _check_state(self, state: dict[str, Any]) -> None:
        missing = {"of", "model", "optimizer", "updates", "cells", "links", "flights", "rng", "streams"} - set(state)
        if missing:
            raise ValueError(f"this is not a learner's state: it lacks {', '.join(sorted(missing))}")
        same_tensors("model", state["model"], self.model.state_dict())
        for what, mine in self._same.items():
            theirs = state["of"].get(what)
            if theirs != mine:
                raise ValueError(f"the state is of another {what}: it was saved with {theirs}, this learner has {mine}")
        for saved, cell in zip(state["cells"], self.cells, strict=True):
            for name, network in (("auxiliary", cell.auxiliary), ("inputs", cell.inputs)):
                if network is not None:
                    same_tensors(f"auxiliary network of cell {cell.place.index}", saved.get(name, {}), network.state_dict())


class _Collector(torch.optim.Optimizer):
    """Takes gradients down instead of a step; ``like`` is the optimizer that it stands for."""

    def __init__(self, like: torch.optim.Optimizer) -> None:
        super().__init__([parameter for group in like.param_groups for parameter in group["params"]], {})
        self.found: dict[int, Tensor] = {}

    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        """Takes the gradients down."""
        for group in self.param_groups:
            self.found |= {id(p): p.grad.detach().clone() for p in group["params"] if p.grad is not None}


@dataclass(frozen=True, slots=True)
class Phase:
    """A rule in force from one batch on.

    Attributes:
        start: The first batch.
        rule: The rule.
        schedule: What follows from it.
    """

    start: int
    rule: Rule
    schedule: Schedule


def _result(outcome: Outcome) -> StepResult:
    return StepResult(next(iter(outcome.losses), None), outcome)


def _signature(values: Any) -> tuple:
    if isinstance(values, Tensor):
        return (values.dtype, values.shape[1:])
    return tuple((tensor.dtype, tensor.shape[1:]) for tensor in tensors(values)) or (type(values),)


def _to(state: Any, device: torch.device) -> Any:
    """Moves the tensors of a tree to a device."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), state)


def _snapshot(state: Any) -> Any:
    """Copies a tree of plain data and tensors."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), state)
