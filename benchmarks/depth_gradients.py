"""How block gradients differ in size over 50 layers without skips, in the first step: backpropagation and the HSIC bottleneck.

The ratio of the largest to the smallest norm of a block's weight gradient, over all blocks but the classifier, in float32; by network,
initial weights and bandwidth, 3 seeds.

    python benchmarks/depth_gradients.py [--out benchmarks/results/depth_gradients.json]        (about a minute)
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import lockfree as lf

DEPTH, WIDTH, BATCH, CLASSES, SEEDS, BALANCE = 50, 64, 128, 10, (0, 1, 2), 100.0


def network(activation: str, init: str, *, batch_norm: bool) -> nn.Sequential:
    """Makes 50 blocks and a classifier."""
    model = lf.models.normalised_mlp((1, 8, 8), CLASSES, hidden=(WIDTH,) * DEPTH, activation=activation, batch_norm=batch_norm)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and init == "scaled":
            if activation == "tanh":
                nn.init.xavier_normal_(layer.weight, gain=nn.init.calculate_gain("tanh"))
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model


def ratio(activation: str, init: str, rule: lf.Rule | str, seed: int, *, batch_norm: bool) -> float:
    """Takes one step of plain descent and returns the largest over the smallest gradient, read off the weights."""
    torch.manual_seed(seed)
    prototypes = torch.randn(CLASSES, 1, 8, 8)
    y = torch.arange(BATCH) % CLASSES
    x = prototypes[y] + torch.randn(BATCH, 1, 8, 8)
    model = network(activation, init, batch_norm=batch_norm)
    found = {}

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            found.update({name: p.grad.double().norm().item() for name, p in model.named_parameters() if p.grad is not None})

    learner = lf.convert(model, rule, loss=F.cross_entropy, optimizer=lambda p: Watching(p, lr=1e-3), example_input=x[:2])
    learner.step(x, y)
    norms = [found[f"{block}.{'1' if block == 0 else '0'}.weight"] for block in range(DEPTH)]
    return max(norms) / min(norms) if min(norms) else float("inf")


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "depth_gradients.json")
    arguments = parser.parse_args()
    rules = {
        "backprop": "backprop",
        "hsic sigma 5": lf.rules.HSICBottleneck(balance=BALANCE),
        "hsic median": lf.rules.HSICBottleneck(balance=BALANCE, sigma=None),
    }
    rows = []
    for activation in ("tanh", "relu"):
        for batch_norm in (True, False):
            for init in ("default", "scaled"):
                found = {
                    name: [ratio(activation, init, rule, seed, batch_norm=batch_norm) for seed in SEEDS]
                    for name, rule in rules.items()
                }
                rows.append({"activation": activation, "batch_norm": batch_norm, "init": init, "largest_over_smallest": found})
                print(json.dumps(rows[-1]), flush=True)
    about = {
        "command": "python benchmarks/depth_gradients.py",
        "layers": DEPTH,
        "units": WIDTH,
        "batch": BATCH,
        "balance": BALANCE,
        "seeds": SEEDS,
        "torch": torch.__version__,
        "lockfree": lf.__version__,
    }
    arguments.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
