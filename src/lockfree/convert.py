"""From a model and a rule to a learner."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lockfree import rules
from lockfree.cell import Cell, Wiring
from lockfree.chain import Chain
from lockfree.choose import choose
from lockfree.executors import EXECUTORS, Assembly, Executor
from lockfree.learner import Learner, Phase
from lockfree.link import Link, links_between
from lockfree.objective import Loss, Objective
from lockfree.rule import Needs, Place, Rule, Site
from lockfree.schedule import SCHEDULES, Kind, schedule_of
from lockfree.update import Update
from lockfree.values import Values, carrying

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer of parameters."""


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
