"""An open question: does noise in the synthetic gradient help generalisation?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockfree.choose import choose
from lockfree.recipes.recipe import Recipe, seeds
from lockfree.recipes.rule_trial import RuleTrial


@dataclass(frozen=True, kw_only=True)
class _Size:
    layers: int
    units: int
    seeds: int
    noise: Sequence[float]
    training: Mapping[str, Any]


_SIZES = {
    "smoke": _Size(layers=2, units=32, seeds=1, noise=(0.0, 1.0), training={"steps": 20, "samples": 1000, "batch_size": 128}),
    "small": _Size(
        layers=4,
        units=256,
        seeds=5,
        noise=(0.0, 0.3, 1.0, 3.0, 10.0),
        training={"steps": 800, "samples": 5000, "batch_size": 128},
    ),
    "full": _Size(layers=4, units=256, seeds=10, noise=(0.0, 0.1, 0.3, 1.0, 3.0, 10.0), training={"steps": 20_000}),
}

_METHODS: dict[str, dict[str, Any]] = {
    "constant": {"noise_decay": 0.0},
    "annealed": {"noise_decay": 0.55},
    "learnt scale": {"noise_decay": 0.0, "form": "gaussian"},
}


def dni_noise(budget: str) -> Recipe:
    """Test error against the amount of Gaussian noise in the synthetic gradient; few training images, so that there is a gap.

    The noise is constant or annealed, in units of the credit's root mean square; or it is sampled from a synthesiser that
    predicts mean and scale (1: from its own distribution).

    Args:
        budget: smoke, small or full.
    """
    size = choose(_SIZES, budget, "budget")
    trials = [
        RuleTrial(
            panel="MNIST FCN, cDNI",
            series=method,
            x=noise,
            seed=seed,
            data="mnist",
            layers=size.layers,
            units=size.units,
            rule="cdni",
            fields={**fields, "noise": noise, "seed": seed},
            **size.training,
        )
        for method, fields in _METHODS.items()
        for noise in size.noise
        for seed in seeds(size.seeds)
    ]
    return Recipe(
        name="dni-noise",
        title="Noise in the synthetic gradient",
        reference="ours; annealing as in Neelakantan et al. 2015, Adding gradient noise improves learning for very deep networks, "
        "arXiv 1511.06807",
        budget=budget,
        scope=f"{size.layers} layers of {size.units}, {size.training.get('samples', 60_000):,} training images, {size.seeds} seed(s)",
        trials=trials,
        x_label="noise",
    )
