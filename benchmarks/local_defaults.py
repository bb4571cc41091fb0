"""What defaults of local rules were chosen by, on held-out training images, one seed; the test sets decide nothing.

`predsim`'s balance: CIFAR-10 with the network of `cifar10.py`, 10,000 training images, five epochs, 5,000 held out. Forward-Forward's
fields, one at a time: Fashion-MNIST as in `fashion_mnist.py`, 10,000 held out.

    python benchmarks/local_defaults.py [--out benchmarks/results/local_defaults.json]     (needs the full sets; CPU-minutes: 15)
"""

import argparse
import json
from pathlib import Path

import cifar10
import fashion_mnist
import torch

import lockfree as lf

BALANCES, TRAINED, HELD_OUT, EPOCHS = (0.5, 0.9, 0.99), 10_000, 5_000, 5
FORWARD_FORWARD = {
    "label": (2.0, 10.0),
    "threshold": (0.5, 2.0),
    "peers": (0.0, 0.3),
    "negatives": ("hard",),
}


def predsim_by_balance() -> dict[str, float]:
    """Returns held-out accuracies in per cent, backpropagation's among them."""
    whole = cifar10.full_set().train
    train = lf.data.Split(*(part[:TRAINED] for part in whole))
    kept = lf.data.Split(*(part[-HELD_OUT:] for part in whole))
    rules = {"backprop": "backprop"} | {f"{balance:g}": lf.rules.LocalLoss(balance=balance) for balance in BALANCES}
    return {name: cifar10.accuracy(rule, cifar10.SEEDS[0], train, kept, epochs=EPOCHS) for name, rule in rules.items()}


def forward_forward_by_field() -> dict[str, float]:
    """Returns held-out accuracies in per cent, the defaults' and those of one field changed."""
    fitting, kept = fashion_mnist.held_out(fashion_mnist.full_set())
    rules = {"defaults": lf.rules.ForwardForward()} | {
        f"{name}={value}": lf.rules.ForwardForward(**{name: value})
        for name, values in FORWARD_FORWARD.items()
        for value in values
    }
    rate, seed = fashion_mnist.SHARED, fashion_mnist.SEEDS[0]
    return {name: fashion_mnist.accuracy(rule, rate, seed, fitting, kept) for name, rule in rules.items()}


def main() -> None:
    """Measures and writes both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "local_defaults.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "about": {"command": "python benchmarks/local_defaults.py", "torch": torch.__version__, "lockfree": lf.__version__},
        "predsim_by_balance": predsim_by_balance(),
        "forward_forward_by_field": forward_forward_by_field(),
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
