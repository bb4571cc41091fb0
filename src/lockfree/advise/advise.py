"""Asking for advice: the dry pass, the training pass, and what comes of them."""

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lockfree.advise.advice import Advice
from lockfree.advise.memory import parse_memory
from lockfree.advise.option import Option
from lockfree.advise.survey import Cuts, Progress, Survey
from lockfree.advise.task import Candidate, Samples, Task, evaluate, is_exact, label
from lockfree.advise.training import Plan, groups, plan, train
from lockfree.convert import OptimizerFactory
from lockfree.objective import Loss
from lockfree.rng import get_rng, set_rng
from lockfree.rule import Needs, Place, Rule
from lockfree.rules import RULES, Backprop, get
from lockfree.values import Values


def advise(
    model: nn.Module,
    x: Values,
    y: Any,
    loss: Loss,
    *,
    optimizer: OptimizerFactory | None = None,
    memory: int | float | str | None = None,
    rules: Sequence[Rule | str] | None = None,
    blocks: int | Sequence[str] | None = "auto",
    validation: tuple[Values, Any] | None = None,
    batch_size: int = 256,
    seconds: float = 150.0,
    steps: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Advice:
    """Measures on a model and its data what could replace backpropagation, and says whether anything should.

    Every rule is trained from the model's present weights on the same batches, beside backprop and gradient checkpointing. The
    model and the random generators are left as they were. A rule that cannot serve the model is listed with the reason.

    Args:
        model: As `lockfree.convert` takes it, on the device to measure on; each candidate trains a copy.
        x: Inputs of many samples: a tensor, or a tree of tensors, first dimension the sample.
        y: Their targets, likewise.
        loss: Maps (output, target) to a scalar, a mean over the batch.
        optimizer: Maps the list of the model's trainable parameters to an optimizer; Adam at 1e-3 if left out.
        memory: What training may take: bytes, or a string such as "2GB" or "512MiB"; no limit if left out.
        rules: Names or rules to measure beside backprop and checkpointing; all that the package has if left out.
        blocks: Where to cut, as `lockfree.convert` takes it; "auto": the model's children, and K balanced pieces where the
            model is deep or memory is tight.
        validation: Held-out (inputs, targets) to score on; one sample in five, 5,000 at most, is held out if left out.
        batch_size: Samples in a step, 1 or more; no more than there are.
        seconds: About how long all of it may take; the number of steps follows from it.
        steps: How many steps to train each option for instead, 1 or more, however long that takes.
        seed: Decides what is held out, the order of the batches, dropout and the auxiliary networks.
        progress: Is told what begins: "measuring" or "training", its number, of how many, the option's name.

    Returns:
        What was measured: print it, or look at `Advice.recommended`.

    Raises:
        ValueError: If samples, targets, the cut or a number do not fit, or a rule is misspelt.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import torch, lockfree as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(60, 4), torch.randint(0, 3, (60,))
        >>> advice = lf.advise(model, x, y, torch.nn.functional.cross_entropy, rules=["dfa"], batch_size=16, steps=3)
        >>> sorted({option.label for option in advice.options})
        ['backprop', 'checkpoint', 'dfa']
    """
    started, told, before = time.perf_counter(), progress or _silent, get_rng()
    limit = None if memory is None else parse_memory(memory)
    _check_numbers(batch_size, seconds, steps)
    wanted = _wanted(rules)
    held_out = None if validation is None else Samples(*validation)
    try:
        task = Task.of(model, Samples(x, y), held_out, loss=loss, optimizer=optimizer or _adam, size=batch_size, seed=seed)
        cuts = Cuts.of(task, blocks)
        share = None if steps is not None else 0.4 * seconds
        survey = Survey(task, limit=limit, seconds=share, expected=len(wanted) + 4, progress=told)
        survey.baselines(cuts)
        for measure, rule in itertools.product((survey.rule, survey.coarser), wanted):
            measure(rule, cuts)
        found = survey.end()
        if steps is not None:
            todo = Plan(task, groups(found), steps, {})
        else:
            todo = plan(task, groups(found), given=seconds, spent=time.perf_counter() - started, asked=rules is not None)
        start = evaluate(todo.task.learner(Candidate(Backprop(), ())), todo.task.parts)
        trained = train(todo, told)
    finally:
        set_rng(before)
    return Advice(
        options=tuple(sorted((trained.score(option) for _, option in found), key=_rank)),
        refused=survey.refused | todo.dropped | trained.refused,
        limit=limit,
        metric="loss" if start.accuracies is None else "accuracy",
        start=start.mean,
        steps=todo.steps if trained.scores else 0,
        batch_size=task.size,
        samples=len(task.chosen),
        held_out=todo.task.held_out,
        spread=trained.spread,
        seconds=time.perf_counter() - started,
        seed=seed,
    )


def _rank(option: Option) -> tuple[bool, float, float]:
    return option.score is None, -(option.score or 0.0), option.milliseconds or math.inf


def _silent(stage: str, number: int, count: int, name: str) -> None:
    """Tells nobody."""


def _adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


def _check_numbers(batch_size: int, seconds: float, steps: int | None) -> None:
    for name, given in (("batch_size", batch_size), ("steps", steps)):
        if given is not None and given < 1:
            raise ValueError(f"{name}={given}: give 1 or more")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds={seconds}: give a number above 0")


def _wanted(rules: Sequence[Rule | str] | None) -> list[Rule]:
    """Returns the rules to measure beside those that always are, each once.

    Unless they were named, those whose blocks learn at once come first, the youngest before the others: time may be short.
    """
    if isinstance(rules, str):
        raise TypeError(f"rules={rules!r} is one name: pass a list of names, rules=[{rules!r}]")
    named = [name for name in RULES if name != "noise"] if rules is None else rules  # nobody is advised to learn nothing
    made = [get(rule) if isinstance(rule, str) else rule for rule in named]
    for rule in made:
        if not isinstance(rule, Rule):
            raise TypeError(f"rules are names such as 'dfa', or rules such as lockfree.rules.LocalLoss(), got {rule!r}")
    if rules is None:
        made.reverse()
        made.sort(key=lambda rule: rule.needs(Place(0, 3)) > Needs.TARGET)
    return list({label(rule): rule for rule in made if not is_exact(rule)}.values())
