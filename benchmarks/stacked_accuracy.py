"""Whether the stacked executor learns what the sequential one learns: Fashion-MNIST, chains of equal blocks, 3 seeds.

Synthetic gradients get a shorter chain and a lower rate: a long one without normalisation hardly learns under them.
"""

import json
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

import lockfree as lf

UNITS, EPOCHS, SEEDS = 128, 3, (0, 1, 2)
CHAINS = {"cdni": (4, 3e-4), "pred": (8, 1e-3)}
"""By rule: number of blocks between the first and the last, and the learning rate."""


def network(blocks: int, seed: int) -> nn.Module:
    """Makes the chain."""
    torch.manual_seed(seed)
    below = nn.Sequential(nn.Flatten(), nn.Linear(784, UNITS), nn.ReLU())
    return nn.Sequential(
        below, *(nn.Sequential(nn.Linear(UNITS, UNITS), nn.ReLU()) for _ in range(blocks)), nn.Linear(UNITS, 10)
    )


def trained(rule: str, executor: str, seed: int) -> tuple[float, float]:
    """Trains it; returns test accuracy and seconds."""
    blocks, rate = CHAINS[rule]
    dataset = lf.data.load("fashion-mnist")
    learner = lf.convert(
        network(blocks, seed),
        rule,
        loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=rate),
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
    for name in CHAINS:
        for executor in ("sequential", "stacked"):
            runs = [trained(name, executor, seed) for seed in SEEDS]
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
