"""A training step under feedback alignment and its kin, ours and biotorch's, over a plain PyTorch loop: MLP 3 x 256 and LeNet.

biotorch is an optional peer: without it the table has our rows alone. All things of a model are timed in turn; ratios are medians of
rounds, and medians over three repeats.

    pip install --no-deps biotorch==0.0.16
    python benchmarks/biotorch_step.py [--out benchmarks/results/biotorch_step.json]        (a few minutes, on an idle machine)
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

import lockfree as lf
from lockfree.bench.step import STEP_OPTIMIZERS, batches, learner_step, machine, plain_step
from lockfree.bench.timing import interleaved, ratio

MODELS, RULES, ROUNDS, REPEATS = ["mlp", "lenet"], ["backprop", "fa", "dfa", "usf", "brsf", "frsf"], 60, 3


def peer_step(name: str, rule: str) -> Callable[[], object]:
    """Returns a function that does one step with biotorch's layers."""
    from biotorch.module.biomodule import BioModule  # pyrefly: ignore[missing-import]

    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells at length what it has converted
        model = BioModule(lf.models.build(name, input_shape=(1, 28, 28), classes=10), mode=rule, output_dim=10)
    batch, optimizer = batches("cpu"), STEP_OPTIMIZERS["fused"](list(model.parameters()))
    broadcast = (lambda y: (y, F.cross_entropy)) if rule == "dfa" else (lambda y: ())

    def run() -> float:
        x, y = batch()
        loss = F.cross_entropy(model(x, *broadcast(y)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def peers() -> list[str]:
    """Returns the rules that biotorch serves here, none if it is not installed or does not run."""
    found = []
    for rule in RULES[1:]:
        try:
            peer_step("mlp", rule)()
        except Exception as error:  # an old package under a new PyTorch
            print(f"biotorch's {rule} is left out: {type(error).__name__}: {error}")
        else:
            found.append(rule)
    return found


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "biotorch_step.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known, make = peers(), STEP_OPTIMIZERS["fused"]
    found: dict[str, list[float]] = {}
    for _, model, rule in itertools.product(range(REPEATS), MODELS, RULES):
        things = {"plain": plain_step(model, "cpu", make), "lockfree": learner_step(model, rule, "cpu", make)}
        if rule in known:
            things["biotorch"] = peer_step(model, rule)
        seconds = interleaved(things, rounds=ROUNDS)
        for who in list(things)[1:]:
            found.setdefault(f"{who}_{rule}_over_plain_{model}", []).append(ratio(seconds, who, "plain"))
    table = {name: {"ratio": statistics.median(values), "range": [min(values), max(values)]} for name, values in found.items()}
    about = {"command": "python benchmarks/biotorch_step.py", "rounds": ROUNDS, "repeats": REPEATS, "lockfree": lf.__version__}
    for name, row in table.items():
        print(f"{name:38s} {row['ratio']:.3f}  {row['range'][0]:.3f} to {row['range'][1]:.3f}")
    arguments.out.write_text(json.dumps({"about": about | machine("cpu"), "steps": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
