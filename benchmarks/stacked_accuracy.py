"""Whether the stacked executor learns what the sequential one learns: Fashion-MNIST, a deep chain of equal blocks, 3 seeds."""

import json
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

import lockfree as lf

UNITS, BLOCKS, EPOCHS, SEEDS = 128, 8, 3, (0, 1, 2)
RULES = {"cdni": lf.rules.SyntheticGradients(conditioned=True), "pred": lf.rules.get("pred")}


def network(seed: int) -> nn.Module:
    """Makes the chain."""
    torch.manual_seed(seed)
    below = nn.Sequential(nn.Flatten(), nn.Linear(784, UNITS), nn.ReLU())
    return nn.Sequential(
        below, *(nn.Sequential(nn.Linear(UNITS, UNITS), nn.ReLU()) for _ in range(BLOCKS)), nn.Linear(UNITS, 10)
    )


def trained(rule: lf.Rule, executor: str, seed: int) -> tuple[float, float]:
    """Trains it; returns test accuracy and seconds."""
    dataset = lf.data.load("fashion-mnist")
    learner = lf.convert(
        network(seed),
        rule,
        loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        example_input=dataset.train.inputs[:2],
        schedule="pipelined",
        executor=executor,
    )
    loader = lf.data.TensorLoader(*dataset.train, batch_size=100, seed=seed)
    started = time.perf_counter()
    lf.Trainer(learner).fit(loader, epochs=EPOCHS)
    seconds = time.perf_counter() - started
    scores = learner.predict(dataset.test.inputs)
    return (scores.argmax(1) == dataset.test.targets).float().mean().item(), seconds


def main() -> None:
    """Prints accuracies and times as JSON."""
    found = {}
    for name, rule in RULES.items():
        for executor in ("sequential", "stacked"):
            runs = [trained(rule, executor, seed) for seed in SEEDS]
            accuracies = [100 * accuracy for accuracy, _ in runs]
            found[f"{name}_{executor}"] = {
                "test_accuracy": accuracies,
                "mean": statistics.mean(accuracies),
                "sd": statistics.stdev(accuracies),
                "seconds": statistics.median(seconds for _, seconds in runs),
            }
            print(name, executor, found[f"{name}_{executor}"], file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
