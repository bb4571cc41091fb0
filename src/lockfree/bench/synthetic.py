"""What synthetic gradients cost: by synthesiser, and how much less when blocks update only now and then."""

import itertools
import statistics
from typing import Any

from lockfree.bench.step import STEP_OPTIMIZERS, learner_step, machine
from lockfree.bench.timing import interleaved, ratio
from lockfree.rules import SyntheticGradients

_VARIANTS: dict[str, SyntheticGradients] = {
    "cdni_linear": SyntheticGradients(conditioned=True),
    "dni_linear": SyntheticGradients(),
    "cdni_hidden": SyntheticGradients(conditioned=True, hidden_layers=1),
    "dni_hidden": SyntheticGradients(hidden_layers=1),
    "cdni_middle": SyntheticGradients(conditioned=True, borders=(1,)),
    "cdni_unlocked": SyntheticGradients(conditioned=True, synthetic_inputs=True),
}

_SPARSE = (1.0, 0.5, 0.2, 0.05)


def synthetic(rounds: int = 100, repeats: int = 3, device: str = "cpu") -> dict[str, Any]:
    """Times steps of the MLP 784-256-256-256-10 with BatchNorm on batches of 256 random images, by fused Adam.

    Each variant is timed in turn with backpropagation under the same engine. Counting products, a linear synthesiser on every
    border makes 1.49 times backpropagation's multiplications, one with a hidden layer of 256 makes 2.25 times.

    For sparse updates the cost of a step is $c_0 + p c_1$: all blocks run forward, and learn with probability p. Reported is each
    p's step over that of p = 1 (the mean, since steps differ), and the part $c_1/(c_0 + c_1)$ that p scales, from a line through them.

    Args:
        rounds: Steps of each thing in a repeat.
        repeats: How often everything is measured; the medians over the repeats are returned.
        device: Where to train.

    Returns:
        Ratios by name, the range of each, and what the machine was.
    """
    found: dict[str, list[float]] = {}
    for _, (name, rule) in itertools.product(range(repeats), _VARIANTS.items()):
        things = {
            "over": learner_step("mlp", rule, device, STEP_OPTIMIZERS["fused"]),
            "under": learner_step("mlp", "backprop", device, STEP_OPTIMIZERS["fused"]),
        }
        seconds = interleaved(things, rounds=rounds)
        found.setdefault(f"{name}_over_backprop", []).append(ratio(seconds, "over", "under"))
    for _ in range(repeats):
        sparse = {
            f"{p:g}": learner_step(
                "mlp", SyntheticGradients(conditioned=True, update_probability=p), device, STEP_OPTIMIZERS["fused"]
            )
            for p in _SPARSE
        }
        seconds = interleaved(sparse, rounds=2 * rounds)
        mean = {name: statistics.fmean(times) for name, times in seconds.items()}
        for name in sparse:
            found.setdefault(f"cdni_updates_{name}_over_1", []).append(mean[name] / mean["1"])
        line = statistics.linear_regression(_SPARSE, [mean[f"{p:g}"] for p in _SPARSE])
        found.setdefault("part_of_a_step_that_scales_with_p", []).append(line.slope / (line.slope + line.intercept))
    return {
        **{name: statistics.median(values) for name, values in found.items()},
        **{f"{name}_range": [min(values), max(values)] for name, values in found.items()},
        "rounds": rounds,
        "repeats": repeats,
        **machine(device),
    }
