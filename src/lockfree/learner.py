"""`convert`: a model and a rule become a learner that takes one batch at a time."""

import itertools
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

from lockfree import rules
from lockfree.cell import Cell, Wiring
from lockfree.chain import Chain
from lockfree.choose import choose
from lockfree.executors import EXECUTORS, Assembly, Executor, Outcome, Stopwatch
from lockfree.flight import Flight
from lockfree.link import Link, links_between
from lockfree.objective import Loss, Objective, describe
from lockfree.rng import Streams, get_rng, set_rng, undisturbed
from lockfree.rule import LOCKS, Needs, Place, Rule, Site, Trained, locks
from lockfree.schedule import SCHEDULES, Kind, Schedule, schedule_of
from lockfree.update import Update
from lockfree.values import Values, batch_size, carrying, detach, tensors

_RUNNING = re.compile(r"(^|\.)(running_\w+|num_batches_tracked)$")
"""Names of buffers that training changes, as PyTorch names them."""

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


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
        self._undo = _Undo([*self.model.buffers(), *moving])
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
        _same_tensors("model", state["model"], self.model.state_dict())
        for what, mine in self._same.items():
            theirs = state["of"].get(what)
            if theirs != mine:
                raise ValueError(f"the state is of another {what}: it was saved with {theirs}, this learner has {mine}")
        for saved, cell in zip(state["cells"], self.cells, strict=True):
            for name, network in (("auxiliary", cell.auxiliary), ("inputs", cell.inputs)):
                if network is not None:
                    _same_tensors(f"auxiliary network of cell {cell.place.index}", saved.get(name, {}), network.state_dict())


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


def _same_tensors(what: str, theirs: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    for name in sorted(theirs.keys() | mine.keys()):
        there, here = (describe(tensors[name]) if name in tensors else "missing" for tensors in (theirs, mine))
        if there != here:
            raise ValueError(f"the state is of another {what}: '{name}' is {there} there and {here} here")


def _signature(values: Any) -> tuple:
    if isinstance(values, Tensor):
        return (values.dtype, values.shape[1:])
    return tuple((tensor.dtype, tensor.shape[1:]) for tensor in tensors(values)) or (type(values),)


class _Undo:
    """Remembers the values of tensors; of each type and device in one piece, since they are many and small.

    Args:
        tensors: What is to be remembered, time and again.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        alike: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.is_contiguous():
                alike.setdefault((tensor.dtype, tensor.device), []).append(tensor.view(-1))
            else:
                alike[id(tensor)] = [tensor]
        self._pieces = [(parts, torch.cat(parts)) for parts in alike.values()]

    def note(self) -> None:
        """Remembers the present values."""
        for parts, whole in self._pieces:
            torch.cat(parts, out=whole)

    def restore(self) -> None:
        """Puts back what was remembered last."""
        for parts, whole in self._pieces:
            torch._foreach_copy_(parts, whole.split([len(part) for part in parts]))


def _to(state: Any, device: torch.device) -> Any:
    """Moves the tensors of a tree to a device."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), state)


def _snapshot(state: Any) -> Any:
    """Copies a tree of plain data and tensors."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), state)


def convert(
    model: nn.Module,
    rule: Rule | str,
    *,
    loss: Loss,
    optimizer: OptimizerFactory,
    blocks: int | Sequence[str] | None = None,
    example_input: Values | None = None,
    schedule: str = "lockstep",
    executor: str | Executor = "sequential",
    links: Link | Sequence[Link] | None = None,
    auxiliary_optimizer: OptimizerFactory | None = None,
    recompute: bool = False,
    accumulate: int = 1,
    clip_norm: float | None = None,
    update: str = "tick",
) -> Learner:
    """Makes a learner out of any model and a rule; the model stays the user's own and is trained in place.

    Move the model to its device and dtype first. Autocast around `Learner.step` holds for the blocks' forward passes.

    Args:
        model: Its forward takes one object, a tensor or a tree of tensors whose first dimension is the batch.
        rule: How blocks get their credit: a `Rule`, or its command-line name.
        loss: Maps (output, targets) to a scalar, a mean over the batch.
        optimizer: Maps the list of the model's trainable parameters to an optimizer.
        blocks: ``None``: the children. A number K: K pieces of about equal activation memory. A list of names: a new block
            begins at each of these modules.
        example_input: A small batch, such as ``x[:2]``; needed by rules with auxiliary networks and for a number of blocks.
        schedule: ``"lockstep"`` or ``"pipelined"``.
        executor: ``"sequential"``, one block after the other; ``"stacked"``, which runs neighbouring blocks of equal structure as one
            batched operation and needs the pipelined schedule; or an `Executor` of your own.
        links: One `Link` for all borders, or a list bottom to top; direct ones if left out.
        auxiliary_optimizer: Like ``optimizer``, for the auxiliary networks; the rule's own choice if left out.
        recompute: Whether each block runs again, part by part, when it learns, instead of keeping its activations (gradient
            checkpointing inside of blocks): the same numbers, less memory, up to one more forward pass.
        accumulate: How many batches make a step of the optimizers, which is taken with the mean of their gradients; 1 or more.
        clip_norm: Longest gradient of the model's parameters, their 2-norm; above 0. ``None``: none is too long.
        update: When weights change: ``"tick"``, all together, after every block has learnt; ``"block"``, a block's as soon as it has
            learnt, which needs the memory of one block's gradients instead of all, has each block's gradient clipped by itself, and
            leaves the blocks below changed should a batch fail further up.

    Returns:
        The learner.

    Raises:
        ValueError: If the model cannot be cut there, has nothing to train, or the
            rule cannot serve this model or schedule.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import torch, lockfree as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
        >>> learner = lf.convert(
        ...     model, lf.rules.SyntheticGradients(), loss=torch.nn.functional.cross_entropy,
        ...     optimizer=lambda params: torch.optim.SGD(params, lr=0.1), example_input=x,
        ... )
        >>> learner.step(x, y).loss > 0
        True
        >>> sorted(learner.locks)
        ['forward']
    """
    rule = rules.get(rule) if isinstance(rule, str) else rule
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a rule such as lockfree.rules.SyntheticGradients(), or its name, got {rule!r}")
    if not callable(optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a function such as lambda params: torch.optim.SGD(params, lr=0.1), got {kind}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    chain = Chain(model, blocks, example_input=example_input, recompute=recompute)
    trained = _trained(model)
    if not trained:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: there is nothing to train")
    all_links = links_between(len(chain), links)
    make_schedule = choose(SCHEDULES, schedule, "schedule")
    phases = [
        Phase(start, one, schedule_of(one, make_schedule, [link.delay for link in all_links])) for start, one in rule.phases()
    ]
    if recompute and any(type(phase.rule).run is not Rule.run for phase in phases):
        raise ValueError(f"{rule.title} runs blocks in a way of its own, which recompute would not repeat: leave recompute out")
    objective = Objective(loss)
    running = executor if isinstance(executor, Executor) else choose(EXECUTORS, executor, "executor")()
    joins = running.joins_blocks(trained[0].device)
    cells = _make_cells(chain, rule, objective, phases, all_links, example_input, joins)
    networks = [network for cell in cells for network in (cell.auxiliary, cell.inputs) if network is not None]
    helping = [parameter for network in networks for parameter in _trained(network)]
    make_auxiliary = auxiliary_optimizer or rule.auxiliary_optimizer
    stepping, helper = optimizer(trained), make_auxiliary(helping) if helping else None
    plan = phases[-1].schedule
    same = {
        "rule": repr(rule),
        "cut": repr(chain),
        "schedule": f"{plan.name}, {_in_short(all_links)}",
        "optimizer": " and ".join(type(one).__name__ for one in (stepping, helper) if one is not None),
    }
    if any(link.correction is not None for link in all_links):
        _refuse_mixed_gradients(cells, accumulate)
    at_once = choose(_AT_ONCE, update, "update")
    if at_once:
        _refuse_what_lasts(cells, accumulate)
    changes = Update(stepping, every=accumulate, clip_norm=clip_norm)
    beside = None if helper is None else Update(helper, every=accumulate)
    assembly = Assembly(cells, all_links, phases[0].schedule, objective, changes, beside, at_once)
    running.check(assembly)
    return Learner(chain, rule, phases, running, assembly, same)


def _in_short(links: Sequence[Link]) -> str:
    """Describes links, equal neighbours once."""
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(map(repr, links))]
    return ", ".join(f"{count} x {kind}" for kind, count in runs) or "no links"


_AT_ONCE = {"tick": False, "block": True}


def _refuse_what_lasts(cells: Sequence[Cell], accumulate: int) -> None:
    """Refuses what needs gradients for longer than a block's turn."""
    if accumulate > 1:
        raise ValueError(f'accumulate={accumulate} keeps the gradients of all blocks: leave it out, or update="block"')
    shared = _shared(cells)
    if shared:
        raise ValueError(
            f"blocks {shared[0]} and {shared[1]} share a parameter, whose gradients must be summed before it changes: leave out "
            'update="block"'
        )


def _refuse_mixed_gradients(cells: Sequence[Cell], accumulate: int) -> None:
    """Refuses to correct gradients that are sums of some that are late by different times."""
    if accumulate > 1:
        raise ValueError(
            f"accumulate={accumulate} sums gradients of different ages, which no correction can repair: leave one out"
        )
    shared = _shared(cells)
    if shared:
        raise ValueError(
            f"blocks {shared[0]} and {shared[1]} share a parameter, whose gradient is a sum of some of different ages that no "
            "correction can repair: leave the link's correction out"
        )


def _shared(cells: Sequence[Cell]) -> tuple[int, int] | None:
    """Returns the first two cells whose blocks share a parameter."""
    owners: dict[int, int] = {}
    for cell in cells:
        for parameter in cell.block.parameters():
            owner = owners.setdefault(id(parameter), cell.place.index)
            if owner != cell.place.index:
                return owner, cell.place.index
    return None


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _make_cells(
    chain: Chain,
    rule: Rule,
    objective: Objective,
    phases: Sequence[Phase],
    links: Sequence[Link],
    example_input: Values | None,
    joins_blocks: bool,
) -> list[Cell]:
    """Builds the auxiliary networks and puts the cells together."""
    count, plans = len(chain), [phase.schedule for phase in phases]
    places = [Place(index, count) for index in range(count)]
    # Exact credit needs no cut; the loss joins the top block unless its error is broadcast as well.
    broadcast = rule.wants_sample_losses() or any(Needs.ERROR in (*plan.needs, *plan.auxiliary) for plan in plans)
    joins = [
        all(phase.rule.passes_on(place) and (place.top or phase.schedule.joins(place.index)) for phase in phases)
        and not (place.top and broadcast)
        and (place.top or joins_blocks)
        for place in places
    ]
    # Whether anybody wants dL/dx of the block above i.
    wanted = [any(Needs.ABOVE in (plan.needs[i], plan.auxiliary[i]) for plan in plans) for i in range(count)]
    below_wants = [False, *wanted[:-1]]
    rehearsal = None if example_input is None else chain.rehearse(example_input, below_wants)
    if rehearsal is not None:
        objective.see(rehearsal[-1])
    cells = []
    for i, (place, block) in enumerate(zip(places, chain.blocks, strict=True)):
        overlapping = (Kind.LEARN, Kind.AUXILIARY, Kind.INPUT)
        overlaps = frozenset(kind for kind in overlapping if any(plan.overlaps(i, kind) for plan in plans))
        above, late = chain.blocks[i + 1 :], Kind.LEARN in overlaps
        if chain.recompute and late:
            raise ValueError(
                "recompute runs blocks again with their present weights, which late links would have changed: use links without delay"
            )
        site = Site(place=place, block=block, above=above, rehearsal=rehearsal, example=example_input, late=late)
        wiring = Wiring(
            joined=(i > 0 and joins[i - 1], joins[i]),
            reports=below_wants[i] and not joins[i - 1],
            overlaps=overlaps,
            learns_early=any(plan.learns_early(i) for plan in plans),
            stash=place.top or links[i].stash,
            correction=None if place.top else links[i].correction,
        )
        inputs = (rule.build_inputs(site), carrying(site.inputs)) if rule.synthesises_inputs(place) else None
        auxiliary = rule.build(site)
        cell = Cell(
            place=place,
            block=block,
            rule=phases[0].rule,
            objective=objective,
            auxiliary=auxiliary,
            inputs=inputs,
            wiring=wiring,
        )
        cell.outputs_carry = None if rehearsal is None else carrying(rehearsal[i])
        cells.append(cell)
    return cells
