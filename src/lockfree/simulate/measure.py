"""Taking the costs of blocks from a model of one's own, on one's own machine."""

import copy
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lockfree.convert import OptimizerFactory, convert
from lockfree.executors import Stopwatch
from lockfree.memory import ActivationMeter
from lockfree.objective import Loss
from lockfree.rng import undisturbed
from lockfree.rule import Rule
from lockfree.schedule import Kind
from lockfree.simulate.costs import Costs
from lockfree.values import Values, carriers, tensors


def measure(
    model: nn.Module,
    rule: Rule,
    x: Values,
    y: Any,
    *,
    loss: Loss,
    optimizer: OptimizerFactory,
    blocks: int | Sequence[str] | None = None,
    rounds: int = 20,
    warm_up: int = 5,
) -> Costs:
    """Measures what a batch costs each block of a model under a rule; the model itself is left as it is.

    Blocks run one after the other under lockstep, each with its own update and every border cut. What late links cost besides, the
    copies of weights, is not in it.

    Args:
        model: As for `lockfree.convert`, where the arguments that follow are explained.
        rule: How blocks get their credit.
        x: A batch of the size that is to be trained with.
        y: Its targets.
        loss: Maps (output, targets) to a scalar.
        optimizer: Maps parameters to an optimizer.
        blocks: Where to cut.
        rounds: Batches that are timed, 1 or more; medians are taken over them.
        warm_up: Batches before them, 0 or more.

    Returns:
        The costs, one cell for each block.

    Raises:
        ValueError: If the rule cannot serve the model, or there is nothing to time.

    Example:
        >>> import lockfree as lf
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.randn(16, 8), torch.randint(0, 3, (16,))
        >>> sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
        >>> costs = measure(model, lf.rules.get("dni"), x, y, loss=nn.functional.cross_entropy, optimizer=sgd, rounds=2)
        >>> costs.cells, costs.up_bytes[0], costs.auxiliary[0] > 0
        (2, 512.0, True)
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: time 1 batch or more")
    watch = Stopwatch()
    with undisturbed(model):
        learner = convert(
            copy.deepcopy(model),
            _with_every_border_cut(rule),
            loss=loss,
            optimizer=optimizer,
            blocks=blocks,
            example_input=x,
            executor=watch,
        )
        cells = len(learner.cells)
        for _ in range(warm_up):
            learner.step(x, y)
        watch.seconds.clear()
        for _ in range(rounds):
            learner.step(x, y)
        seconds = {
            kind: [statistics.median(watch.seconds[cell, kind] or [0.0]) for cell in range(cells)]
            for kind in (Kind.FORWARD, Kind.LEARN, Kind.AUXILIARY, Kind.INPUT)
        }
        watch.meter = ActivationMeter(learner.model, *learner.auxiliaries)
        with watch.meter.watch():
            learner.step(x, y)
        handed = learner.chain.rehearse(x, [True] * cells)
    return Costs(
        forward=seconds[Kind.FORWARD],
        learn=seconds[Kind.LEARN],
        auxiliary=seconds[Kind.AUXILIARY],
        inputs=seconds[Kind.INPUT],
        up_bytes=[_bytes(tensors(values)) for values in handed],
        down_bytes=[0.0, *(_bytes(carriers(values)) for values in handed[:-1])],
        error_bytes=_bytes(carriers(handed[-1])),
        activation_bytes=[float(watch.held.get(cell, 0)) for cell in range(cells)],
        parameter_bytes=[_bytes(tuple(block.parameters())) for block in learner.chain.blocks],
    )


def _with_every_border_cut(rule: Rule) -> Rule:
    """Returns the rule without the engine's licence to run several blocks as one graph, so that each can be timed by itself."""
    kind = type(rule)
    cut = copy.copy(rule)
    object.__setattr__(cut, "__class__", type(kind.__name__, (kind,), {"passes_on": lambda self, place: False}))
    return cut


def _bytes(held: Sequence[torch.Tensor]) -> float:
    return float(sum(tensor.nbytes for tensor in held))
