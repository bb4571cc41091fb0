"""What one training step costs: the engine over a plain loop, and synthetic gradients over backpropagation."""

import itertools
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lockfree import models
from lockfree.bench.timing import interleaved, ratio
from lockfree.convert import OptimizerFactory, convert
from lockfree.experiment import OPTIMIZERS
from lockfree.rule import Rule
from lockfree.rules import RULES

_BATCH, _CLASSES = 256, 10


def step(rounds: int = 100, repeats: int = 3, device: str = "cpu") -> dict[str, Any]:
    """Times training steps on batches of 256 random images.

    The MLP is 784-256-256-256-10 with BatchNorm; the CNN and LeNet are the package's own, on 28 x 28. Both sides of a pair have the
    command line's own optimizer (fused Adam) unless the name says sgd (with momentum) or adam (PyTorch's default form, slower on
    a CPU). Each pair is timed in turn, so that each is measured beside what it is compared with and nothing else.

    A decoupled step does more arithmetic: counting products, backpropagation takes 802,304 multiplications a sample on this MLP
    and three linear synthesisers add 393,216, a factor of 1.49.

    Args:
        rounds: Steps of each thing in a repeat.
        repeats: How often everything is measured; the medians over the repeats are returned.
        device: Where to train.

    Returns:
        Ratios by name, the spread of each, milliseconds of the plain steps, and what the machine was.
    """
    pairs = {
        "backprop_over_plain_mlp_sgd": ("mlp", "backprop", None, "sgd"),
        "backprop_over_plain_cnn": ("cnn", "backprop", None, "fused"),
        "cdni_over_backprop_mlp": ("mlp", "cdni", "backprop", "fused"),
        "cdni_over_backprop_mlp_sgd": ("mlp", "cdni", "backprop", "sgd"),
        "cdni_over_backprop_mlp_adam": ("mlp", "cdni", "backprop", "adam"),
        "dni_over_backprop_mlp": ("mlp", "dni", "backprop", "fused"),
        **{f"{rule}_over_plain_lenet": ("lenet", rule, None, "fused") for rule in ("fa", "usf", "brsf", "frsf", "dfa")},
        **{f"{rule}_over_plain_mlp": ("mlp", rule, None, "fused") for rule in RULES},
    }
    found: dict[str, list[float]] = {name: [] for name in pairs}
    plain: dict[str, list[float]] = {model: [] for model, *_ in pairs.values()}
    for _, (name, (model, over, under, optimizer)) in itertools.product(range(repeats), pairs.items()):
        make = STEP_OPTIMIZERS[optimizer]
        things = {"over": learner_step(model, over, device, make), "under": _step_of(model, under, device, make)}
        seconds = interleaved(things, rounds=rounds if model == "mlp" else max(rounds // 5, 5))
        found[name].append(ratio(seconds, "over", "under"))
        if under is None and optimizer == "fused":
            plain[model].append(statistics.median(seconds["under"]))
    return {
        **{name: statistics.median(values) for name, values in found.items()},
        **{f"{name}_range": [min(values), max(values)] for name, values in found.items()},
        **{f"plain_{model}_milliseconds": 1e3 * statistics.median(values) for model, values in plain.items()},
        "rounds": rounds,
        "repeats": repeats,
        **machine(device),
    }


def machine(device: str) -> dict[str, object]:
    """Says what a benchmark ran on."""
    return {
        "threads": torch.get_num_threads(),
        "device": device,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }


def batches(device: str) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Many batches, so that none is learnt by heart: vanishing gradients are slow numbers on some processors."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, _BATCH, 1, 28, 28, generator=generator).to(device)
    targets = torch.randint(0, _CLASSES, (20, _BATCH), generator=generator).to(device)
    turns = itertools.cycle(zip(inputs, targets, strict=True))
    return lambda: next(turns)


def _model(name: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    return models.build(name, input_shape=(1, 28, 28), classes=_CLASSES).to(device)


STEP_OPTIMIZERS: dict[str, OptimizerFactory] = {
    "fused": lambda parameters: OPTIMIZERS["adam"](parameters, lr=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "sgd": lambda parameters: OPTIMIZERS["sgd"](parameters, lr=1e-3),
}


def _step_of(model: str, rule: str | None, device: str, make: OptimizerFactory) -> Callable[[], object]:
    return plain_step(model, device, make) if rule is None else learner_step(model, rule, device, make)


def plain_step(name: str, device: str, make: OptimizerFactory) -> Callable[[], object]:
    """Returns a function that does one step of a plain PyTorch loop on the next batch."""
    model, batch = _model(name, device), batches(device)
    optimizer = make(list(model.parameters()))

    def run() -> float:
        x, y = batch()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def learner_step(name: str, rule: Rule | str, device: str, make: OptimizerFactory) -> Callable[[], object]:
    """Returns a function that does one step of a learner on the next batch."""
    batch = batches(device)
    learner = convert(_model(name, device), rule, loss=F.cross_entropy, optimizer=make, example_input=batch()[0][:2])
    return lambda: learner.step(*batch()).loss
