"""A trial of a linear or deep linear model on an artificial task, with a synthesiser between its output and the loss."""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree import rules
from lockfree.choose import choose
from lockfree.convert import convert
from lockfree.objective import Diverged
from lockfree.recipes.trial import Point, Trial
from lockfree.run import Run

OPTIMUM = "optimum"
"""The method that minimises the loss of the linear model by L-BFGS: a deep linear model is the same family of functions."""

_FLIPPED = 0.1  # share of labels of the noisy task that are wrong
SAMPLES = 500


def _linear(x: Tensor, generator: torch.Generator) -> Tensor:
    return x[:, 0] + x[:, 1] > 0


def _noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return _linear(x, generator) ^ (torch.rand(len(x), generator=generator) < _FLIPPED)


def _xor(x: Tensor, generator: torch.Generator) -> Tensor:
    return x[:, 0] * x[:, 1] > 0


def _random(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(len(x), generator=generator) < 0.5


TASKS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "linear": _linear,
    "noisy": _noisy,
    "xor": _xor,
    "random": _random,
}
"""Two classes of standard normal inputs: told apart by a plane; the same with a tenth of the labels wrong; by the signs of two features;
by nothing."""


def _squared(scores: Tensor, label: Tensor) -> Tensor:
    return (scores - label).square().mean() / 2


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "MSE": _squared,
    "log loss": F.binary_cross_entropy_with_logits,
}
"""Losses of one score against a label of 0 or 1."""


@dataclass(frozen=True, kw_only=True)
class LinearTrial(Trial):
    """A model of linear layers that learns from all samples at once, by gradient descent; equal trials give equal numbers.

    Attributes:
        data: Not a data set: "artificial".
        task: One of `TASKS`.
        features: Inputs, 2 or more.
        hidden: Hidden layers, as wide as the input, without activations; orthogonal at first.
        loss: One of `LOSSES`.
        rule: Command-line name of a rule, or "optimum".
        fields: Its hyperparameters.
        steps: Gradient steps.
        learning_rate: Of the model.

    Raises:
        ValueError: If a name is misspelt.

    Example:
        >>> trial = LinearTrial(panel="linear, MSE", series="backprop", x=0, seed=0, task="xor", features=2, rule="backprop", steps=1)
        >>> trial.name
        'linear--mse-backprop-0-seed-0'
    """

    data: str = "artificial"
    task: str
    features: int
    hidden: int = 0
    loss: str = "MSE"
    rule: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    steps: int
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        choose(TASKS, self.task, "task")
        choose(LOSSES, self.loss, "loss")

    @property
    def points(self) -> list[Point]:
        """One."""
        assert self.x is not None
        return [Point(self.panel, self.x)]

    def reading(self, result: Mapping[str, Any], point: Point) -> float | None:
        """Returns the loss in the end, if there is one."""
        return result["loss"]

    def told(self, result: Mapping[str, Any]) -> str:
        """Says the loss in the end."""
        return "diverged" if result["loss"] is None else f"loss {result['loss']:.5f}"

    def load(self) -> None:
        """Needs nothing."""

    def task_data(self) -> tuple[Tensor, Tensor]:
        """Draws inputs and labels, shapes (m, features) and (m, 1)."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(SAMPLES, self.features, generator=generator)
        return x, TASKS[self.task](x, generator)[:, None].float()

    def network(self) -> nn.Sequential:
        """Makes the model as two blocks: all of its layers, and one above that does nothing."""
        torch.manual_seed(self.seed)
        layers = [nn.Linear(self.features, self.features) for _ in range(self.hidden)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight)
        return nn.Sequential(nn.Sequential(*layers, nn.Linear(self.features, 1)), nn.Identity())

    def train(self, run: Run, device: str, *, resume: bool) -> dict[str, Any]:
        """Trains from the start, in seconds; returns the loss, or ``None`` if it broke, and the norm of the true gradient there."""
        torch.set_num_threads(1)
        x, label = (one.to(device) for one in self.task_data())
        network, loss = self.network().to(device), LOSSES[self.loss]
        started = time.perf_counter()
        if self.rule == OPTIMUM:
            _minimise(network, lambda: loss(network(x), label))
        else:
            learner = convert(
                network,
                rules.get(self.rule, **self.fields),
                loss=loss,
                optimizer=lambda parameters: torch.optim.SGD(parameters, lr=self.learning_rate),
                blocks=["1"],
                example_input=x[:2],
            )
            try:
                for _ in range(self.steps):
                    learner.step(x, label)
            except Diverged as error:  # a result like others: this method does not train this model at this rate
                return {"loss": None, "seconds": time.perf_counter() - started, "diverged": str(error)}
        seconds = time.perf_counter() - started
        final = loss(network(x), label)
        gradient = torch.autograd.grad(final, list(network.parameters()))
        norm = torch.cat([one.flatten() for one in gradient]).norm()
        wrong = (network(x) > (0.5 if self.loss == "MSE" else 0)) != label.bool()
        return {
            "loss": final.item(),
            "gradient_norm": norm.item(),
            "diverged": None,
            "train_error": 100 * wrong.double().mean().item(),
            "seconds": seconds,
        }


def _minimise(network: nn.Module, loss: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=1000, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def places() -> dict[int, tuple[str, int]]:
    """Numbers the tasks in 2 and in 100 dimensions."""
    return dict(enumerate(itertools.product(TASKS, (2, 100))))
