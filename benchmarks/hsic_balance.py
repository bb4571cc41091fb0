"""What the default of the HSIC bottleneck's balance was chosen by: Fashion-MNIST, 10,000 held-out training images, one seed.

The network and all the rest are those of the foundation's accuracy table, `fashion_mnist.py`; three epochs.

    python benchmarks/hsic_balance.py [--out benchmarks/results/hsic_balance.json]        (needs the full set; CPU-minutes: 5)
"""

import argparse
import json
from pathlib import Path

import torch
from fashion_mnist import SEEDS, SHARED, accuracy, full_set, held_out

import lockfree as lf

BALANCES = (1.0, 5.0, 20.0, 50.0, 100.0, 200.0, 500.0)
EPOCHS = 3


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "hsic_balance.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fitting, kept = held_out(full_set())
    rules = {"backprop": "backprop"} | {f"{balance:g}": lf.rules.HSICBottleneck(balance=balance) for balance in BALANCES}
    found = {name: accuracy(rule, SHARED, SEEDS[0], fitting, kept, epochs=EPOCHS) for name, rule in rules.items()}
    about = {
        "command": "python benchmarks/hsic_balance.py",
        "epochs": EPOCHS,
        "rate": SHARED,
        "seed": SEEDS[0],
        "lockfree": lf.__version__,
    }
    arguments.out.write_text(json.dumps({"about": about, "held_out_accuracy": found}, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
