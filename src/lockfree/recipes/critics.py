"""Value-form synthesisers beside gradient-form ones."""

from collections.abc import Mapping
from typing import Any

from lockfree.choose import choose
from lockfree.recipes.recipe import Recipe, seeds
from lockfree.recipes.rule_trial import FROZEN, RuleTrial

_TRAINING: dict[str, Mapping[str, Any]] = {
    "smoke": {"steps": 20, "samples": 2000, "batch_size": 128, "units": 32},
    "small": {"steps": 1175, "units": 256},
    "full": {"steps": 50_000, "units": 256},
}

_DATA = {
    "smoke": {"MNIST FCN": "mnist"},
    "small": {"MNIST FCN": "mnist"},
    "full": {"MNIST FCN": "mnist", "CIFAR-10 FCN": "cifar10"},
}

_HIDDEN = {"conditioned": True, "hidden_layers": 1}
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "no backprop": (FROZEN, {}),
    "backprop": ("backprop", {}),
    "gradient": ("dni", _HIDDEN | {"form": "gradient"}),
    "critic": ("dni", _HIDDEN | {"form": "critic"}),
    "Sobolev": ("dni", _HIDDEN | {"form": "sobolev"}),
}


def sobolev_critics(budget: str) -> Recipe:
    """Test error by form: gradient, critic of the loss, critic with Sobolev training; FCN on MNIST (full: and CIFAR-10).

    Args:
        budget: smoke, small or full.
    """
    training = choose(_TRAINING, budget, "budget")
    trials = [
        RuleTrial(panel=panel, series=method, x=4, seed=seed, data=data, layers=4, rule=rule, fields=fields, **training)
        for panel, data in _DATA[budget].items()
        for method, (rule, fields) in _METHODS.items()
        for seed in seeds(1 if budget == "smoke" else 3)
    ]
    return Recipe(
        name="sobolev-critics",
        title="Gradient, critic, Sobolev critic",
        reference="Czarnecki, Osindero, Jaderberg, Swirszcz, Pascanu 2017, Sobolev training for neural networks, arXiv 1706.04859; "
        "its table 3 is on deep convolutional networks, which these are not",
        budget=budget,
        scope=f"4 layers of {training['units']}, one hidden layer in each synthesiser",
        trials=trials,
        x_label="layers",
    )
