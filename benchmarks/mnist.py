"""MNIST after 5 epochs, MLP 784-256-256-256-10 with BatchNorm, as `lockfree train` does it by default; mean of 3 seeds.

Each rule at batch sizes 256 and 64 (the same number of samples, four times the updates), with the learning rate along half a cosine,
and at 256 with a constant one. "dni, hidden" has one hidden layer of 256 in each synthesiser.

    python benchmarks/mnist.py [--out benchmarks/results/mnist.json]        (needs the full set; about 10 minutes)
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

import torch

import lockfree as lf
from lockfree.experiment import Experiment

RULES = {
    "backprop": ("backprop", {}),
    "cdni": ("cdni", {}),
    "dni": ("dni", {}),
    "dni, hidden": ("dni", {"hidden_layers": 1}),
}
SETTINGS = [(256, "cosine"), (64, "cosine"), (256, "constant")]
SEEDS, EPOCHS = [0, 1, 2], 5


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mnist.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if len(lf.data.load("mnist").train.inputs) != 60_000:
        sys.exit("this table needs the full set: lockfree data fetch mnist")
    rows = []
    for (batch_size, decay), (name, (rule, fields)) in itertools.product(SETTINGS, RULES.items()):
        settings = {"data": "mnist", "epochs": EPOCHS, "batch_size": batch_size, "decay": decay, "rule": rule, "fields": fields}
        found = [100 * Experiment(seed=seed, **settings).run()["test_accuracy"] for seed in SEEDS]
        row = {"rule": name, "batch_size": batch_size, "decay": decay, "test": found}
        rows.append(row | {"mean": statistics.mean(found), "sd": statistics.stdev(found)})
        print(json.dumps(rows[-1]), flush=True)
    about = {"command": "python benchmarks/mnist.py", "seeds": SEEDS, "epochs": EPOCHS, "torch": torch.__version__}
    arguments.out.write_text(json.dumps({"about": about | {"lockfree": lf.__version__}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
