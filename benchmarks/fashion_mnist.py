"""The foundation's accuracy table: Fashion-MNIST, MLP 784-256-256-256-10 with BatchNorm, 5 epochs, batch 256, mean of 3 seeds.

Each rule is shown at the shared learning rate (the command line's default) and at its own best one, which is chosen on 10,000 held
out training images with one seed; the test set decides nothing. "frozen" trains the last layer alone, on random features below.

    python benchmarks/fashion_mnist.py [--out benchmarks/results/fashion_mnist.json]        (needs the full set; about 10 minutes)
    python benchmarks/fashion_mnist.py --rules hsic                                         (one rule anew; the others' rows stay)
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

import lockfree as lf
from lockfree.experiment import OPTIMIZERS

RULES = [
    "backprop",
    "checkpoint",
    "cdni",
    "dni",
    "fa",
    "usf",
    "brsf",
    "frsf",
    "dfa",
    "drtp",
    "predsim",
    "pred",
    "sim",
    "mono",
    "dgl",
    "infopro",
    "auglocal",
    "ff",
    "hsic",
    "frozen",
]
RATES = [3e-4, 1e-3, 3e-3]
SHARED, SEEDS, EPOCHS, BATCH, HELD_OUT = 1e-3, [0, 1, 2], 5, 256, 10_000


def full_set() -> lf.data.Dataset:
    """Returns Fashion-MNIST, or ends the program where only a sample of it is there."""
    dataset = lf.data.load("fashion-mnist")
    if len(dataset.train.inputs) != 60_000:
        sys.exit("this table needs the full set: lockfree data fetch fashion-mnist")
    return dataset


def held_out(dataset: lf.data.Dataset) -> tuple[lf.data.Split, lf.data.Split]:
    """Returns training images to fit, and those that are held out to choose by."""
    fitting = lf.data.Split(*(part[:-HELD_OUT] for part in dataset.train))
    return fitting, lf.data.Split(*(part[-HELD_OUT:] for part in dataset.train))


def accuracy(
    rule: str | lf.Rule, rate: float, seed: int, train: lf.data.Split, test: lf.data.Split, *, epochs: int = EPOCHS
) -> float:
    """Trains once and returns the accuracy in per cent."""
    torch.manual_seed(seed)
    model = lf.models.build("mlp", input_shape=tuple(train.inputs.shape[1:]), classes=10)
    if rule == "frozen":
        for block in list(model)[:-1]:
            block.requires_grad_(False)
    learner = lf.convert(
        model,
        "backprop" if rule == "frozen" else rule,
        loss=F.cross_entropy,
        optimizer=lambda parameters: OPTIMIZERS["adam"](parameters, lr=rate),
        example_input=train.inputs[:2],
    )
    lf.Trainer(learner).fit(lf.data.TensorLoader(*train, batch_size=BATCH, seed=seed), epochs=epochs)
    found = lf.evaluate(learner, lf.data.TensorLoader(*test, batch_size=1000, shuffle=False))
    return 100 * found.accuracy


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fashion_mnist.json")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = full_set()
    fitting, kept = held_out(dataset)
    table = json.loads(arguments.out.read_text())["rules"] if arguments.out.exists() else {}
    for rule in arguments.rules:
        chosen = {rate: accuracy(rule, rate, SEEDS[0], fitting, kept) for rate in RATES}
        best = max(chosen, key=chosen.__getitem__)
        row = {"held_out_by_rate": chosen, "best_rate": best}
        for name, rate in (("shared", SHARED), ("best", best)):
            found = [accuracy(rule, rate, seed, dataset.train, dataset.test) for seed in SEEDS]
            row[name] = {"rate": rate, "test": found, "mean": statistics.mean(found), "sd": statistics.stdev(found)}
        table[rule] = row
        print(rule, json.dumps(row), flush=True)
    about = {
        "command": "python benchmarks/fashion_mnist.py",
        "data": "Fashion-MNIST, the full set",
        "seeds": SEEDS,
        "epochs": EPOCHS,
        "torch": torch.__version__,
        "lockfree": lf.__version__,
    }
    arguments.out.write_text(
        json.dumps({"about": about, "rules": {rule: table[rule] for rule in RULES if rule in table}}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
