"""The diagnostics of the HSIC bottleneck paper, as probes: what layers know along training, and what a single unit tells.

First: nHSIC of the last hidden layer with targets and input while backpropagation trains, for several activations and depths. Second: a
tanh network that narrows 784-64-32-16-8-4-2-1 before its classifier, by backpropagation and by HSIC; the distribution of its one last
unit, class by class. Figures 2 and 3 of Ma, Lewis, Kleijn 2019, arXiv 1908.01580.

    python examples/hsic_diagnostics.py --data mnist --epochs 5 --out runs/hsic-diagnostics
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import lockfree as lf
from lockfree.probes import Activations, Information, Probe

NARROWING = (64, 32, 16, 8, 4, 2, 1)


def watch(
    dataset: lf.data.Dataset, rule: lf.Rule | str, probe: Probe, epochs: int, *, rate: float = 1e-3, **network: Any
) -> list[dict[str, Any]]:
    """Trains a network by Adam and returns what the probe saw."""
    torch.manual_seed(0)
    model = lf.models.normalised_mlp(dataset.input_shape, len(dataset.classes), **network)
    learner = lf.convert(
        model,
        rule,
        loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=rate),
        example_input=dataset.train.inputs[:2],
    )
    seen: list[dict[str, Any]] = []

    def keep(kind: str, values: dict[str, Any]) -> None:
        if kind == "probe":
            seen.append(values)

    sample = (dataset.test.inputs[:512], dataset.test.targets[:512])
    trainer = lf.Trainer(learner, probes=[probe], probe_data=sample, sinks=[keep])
    trainer.fit(lf.data.TensorLoader(*dataset.train, batch_size=256), epochs=epochs)
    return seen


def information(dataset: lf.data.Dataset, epochs: int) -> dict[str, list[dict[str, Any]]]:
    """Returns what the probe saw under backpropagation, for three activations and two depths."""
    return {
        f"{activation}, {depth} layers": watch(
            dataset, "backprop", Information(), epochs, hidden=(256,) * depth, activation=activation, batch_norm=False
        )
        for activation in ("relu", "tanh", "sigmoid")
        for depth in (3, 8)
    }


def one_unit(dataset: lf.data.Dataset, epochs: int) -> dict[str, list[dict[str, Any]]]:
    """Returns what the last unit of the narrowing network does under two rules."""
    rules = {"backprop": "backprop", "HSIC": lf.rules.HSICBottleneck()}
    return {
        name: watch(
            dataset, rule, Activations(block=-2), epochs, rate=3e-4, hidden=NARROWING, activation="tanh", batch_norm=False
        )
        for name, rule in rules.items()
    }


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs both and writes their pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/hsic-diagnostics"))
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # small networks are no faster with more
    dataset = lf.data.load(given.data)
    seen = information(dataset, given.epochs), one_unit(dataset, given.epochs)
    for name, probe, records in zip(("information", "one-unit"), (Information, Activations), seen, strict=True):
        probe.draw(records).savefig(given.out / f"{name}.png", dpi=110)
        print(given.out / f"{name}.png")
    for title, records in seen[0].items():
        print(
            f"{title}: nHSIC(Y, Z) above chance of the last hidden layer",
            [f"{one['above_chance_y'][-2]:.2f}" for one in records],
        )
    return seen


if __name__ == "__main__":
    main()
