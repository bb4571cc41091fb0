"""CIFAR-10 (JPEG copy) after 10 epochs of batches of 128: three convolutions of 3 x 3 and a matrix, each a block that learns on its own.

Adam at 0.001 along half a cosine, no augmentation, every rule with its defaults. A run takes 10 to 20 minutes on one core; runs that
the results file holds already are not made again.

    python benchmarks/cifar10.py [--rules predsim auglocal] [--seeds 0 1 2] [--out benchmarks/results/cifar10.json]   (the full set)
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import lockfree as lf

RULES, SEEDS, EPOCHS, BATCH, CHANNELS = ["backprop", "predsim", "auglocal", "dgl"], [0, 1, 2], 10, 128, (3, 32, 64, 128)


def network() -> nn.Sequential:
    """Returns the network."""
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
        for a, b in itertools.pairwise(CHANNELS)
    ]
    return nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(16 * CHANNELS[-1], 10)))


def full_set() -> lf.data.Dataset:
    """Returns CIFAR-10, or ends the program where it is not there."""
    dataset = lf.data.load("cifar10")
    if len(dataset.train.inputs) != 50_000:
        sys.exit("this table needs the full set: lockfree data fetch cifar10")
    return dataset


def accuracy(rule: str | lf.Rule, seed: int, train: lf.data.Split, test: lf.data.Split, *, epochs: int = EPOCHS) -> float:
    """Trains once and returns the accuracy in per cent."""
    torch.manual_seed(seed)
    learner = lf.convert(
        network(),
        rule,
        loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3, fused=True),
        example_input=train.inputs[:2],
    )
    half_cosine = torch.optim.lr_scheduler.LambdaLR(
        learner.optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    )
    loader = lf.data.TensorLoader(*train, batch_size=BATCH, seed=seed)
    lf.Trainer(learner, scheduler=half_cosine).fit(loader, epochs=epochs)
    found = lf.evaluate(learner, lf.data.TensorLoader(*test, batch_size=1000, shuffle=False))
    assert found.accuracy is not None
    return 100 * found.accuracy


def timed(rule: str, seed: int, dataset: lf.data.Dataset) -> dict[str, float]:
    """Trains once, and returns the test accuracy in per cent and the seconds."""
    started = time.process_time()
    return {"test": accuracy(rule, seed, dataset.train, dataset.test), "processor_seconds": time.process_time() - started}


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cifar10.json")
    parser.add_argument("--rules", nargs="+", choices=list(lf.rules.RULES), default=RULES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = full_set()
    about = {
        "command": "python benchmarks/cifar10.py",
        "data": "CIFAR-10, JPEG copy, the full set",
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "torch": torch.__version__,
        "lockfree": lf.__version__,
    }
    for seed in arguments.seeds:
        for rule in arguments.rules:
            table = json.loads(arguments.out.read_text())["rules"] if arguments.out.exists() else {}
            found = table.get(rule, {"by_seed": {}})["by_seed"]
            if str(seed) not in found:
                found[str(seed)] = timed(rule, seed, dataset)
                print(rule, seed, json.dumps(found[str(seed)]), flush=True)
                table = json.loads(arguments.out.read_text())["rules"] if arguments.out.exists() else {}
            table[rule] = {"mean": statistics.mean(run["test"] for run in found.values()), "by_seed": found}
            arguments.out.write_text(json.dumps({"about": about, "rules": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
