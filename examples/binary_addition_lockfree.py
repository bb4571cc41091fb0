"""The lesson of `binary_addition.py` again, in ten lines of lockfree: backpropagation against synthetic gradients.

The model is a plain `torch.nn.Sequential`, whose children are the blocks. The targets are not classes but the eight bits of a
sum: `conditioned=True` shows them to the synthesisers as they are.

    python examples/binary_addition_lockfree.py
"""

import argparse

import numpy as np
import torch
from binary_addition import BITS, make_task  # the file beside this one
from torch import nn
from torch.nn import functional as F

import lockfree as lf


def layer(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with the lesson's wide initial weights."""
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight, gain=4)
    return linear


def main(seed: int = 0, epochs: int = 120) -> dict[str, float]:
    """Trains by both rules, prints and returns the share of held-out bits that come out right."""
    x, target, held_out_x, held_out_target = (
        torch.from_numpy(array).float() for array in make_task(np.random.default_rng([seed, 0]))
    )
    rules = {
        "backpropagation": lf.rules.Backprop(),
        "synthetic, from output and true bits": lf.rules.SyntheticGradients(conditioned=True, learning_rate=0.01),
    }
    found = {}
    for name, rule in rules.items():
        torch.manual_seed(seed)
        # The ten lines. The last block ends before its sigmoid, which is part of the loss.
        model = nn.Sequential(
            nn.Sequential(layer(2 * BITS, 128), nn.Sigmoid()), nn.Sequential(layer(128, 64), nn.Sigmoid()), layer(64, BITS)
        )
        learner = lf.convert(
            model,
            rule,
            loss=F.binary_cross_entropy_with_logits,
            optimizer=lambda params: torch.optim.Adam(params, lr=0.01),
            example_input=x[:2],
        )
        lf.Trainer(learner).fit(lf.data.TensorLoader(x, target, batch_size=20, seed=seed), epochs=epochs)
        right = (learner.predict(held_out_x) > 0) == (held_out_target > 0.5)
        found[name] = right.float().mean().item()
        print(f"{name:36}  bits right {found[name]:.3f}  locks kept: {', '.join(sorted(learner.locks))}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learn to add binary numbers by two rules of lockfree.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=120)
    arguments = parser.parse_args()
    main(arguments.seed, arguments.epochs)
