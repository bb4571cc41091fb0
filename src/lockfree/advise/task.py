"""What is to be learnt, the same for every candidate: the model, its samples, and the scores on those held out."""

import dataclasses
import gc
import math
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lockfree.convert import OptimizerFactory, convert
from lockfree.learner import Learner
from lockfree.objective import Diverged, Loss, Objective, describe
from lockfree.rng import seed_of, undisturbed
from lockfree.rule import Rule
from lockfree.rules import RULES, Backprop, Checkpointing
from lockfree.values import Values, batch_size, tensors

Blocks = int | Sequence[str] | None
_LEAST_SAMPLES, _MOST_HELD_OUT, _PARTS = 10, 5000, 50


def is_exact(rule: Rule) -> bool:
    """Whether a rule's numbers are backprop's, bit for bit."""
    return type(rule) in (Backprop, Checkpointing)


@dataclass(frozen=True)
class Candidate:
    """A way to train the model, before it is measured.

    Attributes:
        rule: How blocks get their credit.
        blocks: Where the model is cut, as `lockfree.convert` takes it.
        recompute: Whether blocks run again instead of keeping their activations.
    """

    rule: Rule
    blocks: Blocks
    recompute: bool = False

    @property
    def name(self) -> str:
        """What it is called in tables."""
        details = [f"{self.blocks} blocks"] * isinstance(self.blocks, int) + ["recompute"] * self.recompute
        return label(self.rule) + (f" ({', '.join(details)})" if details else "")

    @property
    def numbers(self) -> str:
        """Equal for candidates whose training gives the same numbers."""
        return "exact" if is_exact(self.rule) else f"{label(self.rule)} {self.blocks}"


def label(rule: Rule) -> str:
    """Names a rule: its command-line name, or else its class and what differs from the defaults.

    Example:
        >>> label(Backprop()), label(RULES["dni"](conditioned=True, warm_up=3))
        ('backprop', 'SyntheticGradients(conditioned=True, warm_up=3)')
    """
    for name, make in RULES.items():
        if make() == rule:
            return name
    given = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    changed = [field.name for field in dataclasses.fields(rule) if field.default != given[field.name]]
    return f"{type(rule).__name__}({', '.join(f'{name}={given[name]!r}' for name in changed)})"


@dataclass(frozen=True)
class Samples:
    """Inputs and targets, trees of tensors with a first dimension of samples; other tensors belong to every batch.

    Raises:
        ValueError: If there is not a target for each input.
    """

    inputs: Values
    targets: Any

    def __post_init__(self) -> None:
        found = {len(tensor) for tensor in tensors(self.targets) if tensor.dim()}
        if found != {len(self)}:
            counts = " and ".join(map(str, sorted(found))) or f"a {type(self.targets).__name__} without a tensor of them"
            raise ValueError(f"expected {len(self)} targets, one for each input, got {counts}: pass x and y of the same length")

    def __len__(self) -> int:
        return batch_size(self.inputs)

    def take(self, numbers: Int64[Tensor, " m"], device: torch.device) -> tuple[Values, Any]:
        """Returns the samples of these numbers, on a device."""

        def pick(tensor: Tensor) -> Tensor:
            of_samples = tensor.dim() and len(tensor) == len(self)
            return (tensor.index_select(0, numbers.to(tensor.device)) if of_samples else tensor).to(device)

        return pytree.tree_map_only(Tensor, pick, (self.inputs, self.targets))

    def halves(self, seed: int) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " held"]]:
        """Returns the numbers of the samples to train on, and of those held out: one in five, 5,000 at most.

        Raises:
            ValueError: If there are too few.
        """
        if len(self) < _LEAST_SAMPLES:
            raise ValueError(f"{len(self)} samples are too few to hold some out: pass ten or more, or validation=(x, y)")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed_of(seed, -1)))
        held = min(len(self) // 5, _MOST_HELD_OUT)
        return order[held:], order[:held]


class Scores(NamedTuple):
    """How good a learner is on each part of the held-out samples.

    Attributes:
        accuracies: Shares of targets that are the highest score; ``None`` where targets are no class numbers.
        losses: Mean losses.
        weights: Each part's share of the samples.
    """

    accuracies: Float64[Tensor, " parts"] | None
    losses: Float64[Tensor, " parts"]
    weights: Float64[Tensor, " parts"]

    @property
    def values(self) -> Float64[Tensor, " parts"]:
        """The higher the better: accuracies, or else losses with their sign turned."""
        return -self.losses if self.accuracies is None else self.accuracies

    @property
    def accuracy(self) -> float | None:
        """Over all held-out samples."""
        return None if self.accuracies is None else float((self.accuracies * self.weights).sum())

    @property
    def loss(self) -> float:
        """Over all held-out samples."""
        return float((self.losses * self.weights).sum())

    @property
    def mean(self) -> float:
        """The accuracy, or else the loss with its sign turned."""
        return float((self.values * self.weights).sum())

    def error(self, over: "Scores | None" = None) -> float:
        """Returns the standard error of the mean, or of its difference to another one's on the same samples."""
        values = self.values if over is None else self.values - over.values
        apart = self.weights * (values - (self.weights * values).sum())
        return float((apart.square().sum() * len(values) / max(len(values) - 1, 1)).sqrt())


def evaluate(learner: Learner, parts: Sequence[tuple[Values, Any]]) -> Scores:
    """Scores a learner's predictions, part by part.

    Args:
        learner: What `lockfree.convert` made; it is not changed.
        parts: Inputs and targets.

    Raises:
        Diverged: If a loss is not finite.
    """
    shares, losses = [], []
    for x, y in parts:
        scores = learner.predict(x)
        shares.append(share_right(scores, y))
        losses.append(learner.loss(scores, y).item())
        if not math.isfinite(losses[-1]):
            raise Diverged(f"the loss of held-out samples is {losses[-1]} after {learner.steps} steps")
    sizes = torch.tensor([batch_size(x) for x, _ in parts], dtype=torch.float64)
    known = [share for share in shares if share is not None]
    accuracies = torch.tensor(known, dtype=torch.float64) if len(known) == len(parts) else None
    return Scores(accuracies, torch.tensor(losses, dtype=torch.float64), sizes / sizes.sum())


def share_right(scores: Any, y: Any) -> float | None:
    """Returns the share of class numbers that are the highest score; ``None`` if these are no scores of classes.

    Classes are the last dimension of the scores, or the second, as `cross_entropy` has it; -100 is nobody's class.

    Example:
        >>> share_right(torch.eye(3), torch.tensor([0, 2, -100]))
        0.5
    """
    if not (isinstance(scores, Tensor) and isinstance(y, Tensor)) or y.dtype != torch.int64 or scores.dim() != y.dim() + 1:
        return None
    if scores.shape[:-1] != y.shape:
        scores = scores.movedim(1, -1)
    if scores.shape[:-1] != y.shape or scores.shape[-1] < 2 or int(y.max()) >= scores.shape[-1]:
        return None
    known = y != -100
    return float((scores.argmax(-1) == y)[known].double().mean()) if bool(known.any()) else 0.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be learnt: everything that is the same for all candidates.

    Attributes:
        model: The user's own, which is not changed.
        loss: The user's.
        optimizer: Makes the model's optimizer.
        samples: Of these batches are made.
        chosen: Numbers of the samples to train on.
        parts: The held-out samples.
        size: Samples in a batch.
        seed: Decides batches, dropout and auxiliary networks.
        device: Where the model is.
    """

    model: nn.Module
    loss: Loss
    optimizer: OptimizerFactory
    samples: Samples
    chosen: Int64[Tensor, " n"]
    parts: list[tuple[Values, Any]]
    size: int
    seed: int
    device: torch.device

    @classmethod
    def of(
        cls,
        model: nn.Module,
        samples: Samples,
        validation: Samples | None,
        *,
        loss: Loss,
        optimizer: OptimizerFactory,
        size: int,
        seed: int,
    ) -> "Task":
        """Puts together what is to be learnt.

        Raises:
            ValueError: If the model has nothing to train, or the loss does not accept these targets.
            TypeError: If the model is none.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise ValueError(f"{type(model).__name__} has no parameters: there is nothing to train")
        if validation is None:
            held_out, (chosen, held) = samples, samples.halves(seed)
        elif not len(validation):
            raise ValueError("validation is empty: pass one sample or more, or leave it out")
        else:  # shuffled, since scores may be taken on the first of them alone
            held_out, chosen = validation, torch.arange(len(samples))
            held = _shuffled(len(validation), seed_of(seed, -1))
        task = cls(
            model=model,
            loss=loss,
            optimizer=optimizer,
            samples=samples,
            chosen=chosen,
            parts=[held_out.take(part, parameter.device) for part in held.tensor_split(min(_PARTS, len(held)))],
            size=min(size, len(chosen)),
            seed=seed,
            device=parameter.device,
        )
        task._check()
        return task

    def _check(self) -> None:
        x, y = self.samples.take(self.chosen[: self.size], self.device)
        with undisturbed(self.model), torch.no_grad():
            self.model.train()
            try:
                outputs = self.model(x)
            except Exception as error:  # whatever the user's model raises
                reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
                raise ValueError(f"{type(self.model).__name__} does not take these inputs, {describe(x)}: {reason}") from error
            Objective(self.loss).check(outputs, y)

    @property
    def held_out(self) -> int:
        """How many samples scores are taken on."""
        return sum(batch_size(x) for x, _ in self.parts)

    @cached_property
    def example(self) -> Values:
        """Two samples."""
        return self.samples.take(self.chosen[:2], self.device)[0]

    def learner(self, candidate: Candidate) -> Learner:
        """Makes a learner of a copy of the model."""
        self.forget_learners()
        torch.manual_seed(self.seed)
        return convert(
            deepcopy(self.model).train(),
            candidate.rule,
            loss=self.loss,
            optimizer=self.optimizer,
            blocks=candidate.blocks,
            example_input=self.example,
            recompute=candidate.recompute,
        )

    def forget_learners(self) -> None:
        """Frees the learners that nobody holds any more; they hold themselves, in circles, with all their weights."""
        gc.collect()

    def batch(self, step: int, order: int = 0) -> tuple[Values, Any]:
        """Returns the batch of a step, numbered from 0; each pass over the samples is in an order of its own."""
        epoch, place = divmod(step, len(self.chosen) // self.size)
        shuffled = self.chosen[_shuffled(len(self.chosen), seed_of(self.seed, order, epoch))]
        return self.samples.take(shuffled[place * self.size : (place + 1) * self.size], self.device)

    def train(self, candidate: Candidate, marks: Collection[int], order: int = 0) -> dict[int, Scores]:
        """Trains a copy of the model from its present weights, for several numbers of steps.

        In the last fifth of the steps learning rates fall to 0, in a straight line: at a rate that stays up, the last batches
        change scores by more than rules differ. After it training goes on from where the fall began, up to the next mark.

        Args:
            candidate: How.
            marks: The numbers of steps.
            order: Which order of the batches.

        Returns:
            The scores after so many steps each.

        Raises:
            Diverged: If a loss is not finite.
        """
        learner, found, done = self.learner(candidate), {}, 0
        torch.manual_seed(seed_of(self.seed, order))
        for mark in sorted(set(marks)):
            fall = falls_at(mark)
            for step in range(done, fall):
                learner.step(*self.batch(step, order))
            done, state = fall, learner.state_dict() if mark < max(marks) else None
            rates = _rates(learner)
            for step in range(fall, mark):
                for group, rate in rates:
                    group["lr"] = rate * (mark - step) / (mark - fall + 1)
                learner.step(*self.batch(step, order))
            found[mark] = evaluate(learner, self.parts)
            if state is not None:
                learner.load_state_dict(state)
        return found


def falls_at(steps: int) -> int:
    """Returns after how many of these steps learning rates begin to fall."""
    return steps - steps // 5


def _rates(learner: Learner) -> list[tuple[dict[str, Any], Any]]:
    """Returns the optimizers' groups of parameters, each with its learning rate."""
    optimizers = (learner.optimizer, learner.auxiliary_optimizer)
    every = [group for optimizer in optimizers if optimizer is not None for group in optimizer.param_groups]
    return [(group, group["lr"]) for group in every if "lr" in group]


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int) -> Int64[Tensor, " count"]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
