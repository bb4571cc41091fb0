"""The experiments of "Understanding synthetic gradients and decoupled neural interfaces" (Czarnecki et al. 2017)."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lockfree import rules
from lockfree.choose import choose
from lockfree.recipes.findings import ChangeAbove, Farthest, Finding, Rise
from lockfree.recipes.layer_trial import LayerTrial
from lockfree.recipes.linear_trial import LOSSES, OPTIMUM, LinearTrial, places
from lockfree.recipes.recipe import Recipe, seeds
from lockfree.recipes.rule_trial import RuleTrial
from lockfree.rule import LOCKS, Needs, Place, locks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = (
    "Czarnecki, Świrszcz, Jaderberg, Osindero, Vinyals, Kavukcuoglu 2017, Understanding synthetic gradients and decoupled neural "
    "interfaces, arXiv 1703.00522"
)
_Method = tuple[str, Mapping[str, Any]]
"""Command-line name of a rule, and its hyperparameters."""


@dataclass(frozen=True, kw_only=True)
class _Size:
    """What a budget means for an experiment on MNIST.

    Attributes:
        seeds: How many.
        hidden: Hidden layers of each network.
        units: Their width.
        training: Further fields of each trial.
    """

    seeds: int
    hidden: Sequence[int]
    units: int
    training: Mapping[str, Any]


# ---- table 1: one interface ---------------------------------------------------------------------------------------------------

_TABLE: dict[str, _Method] = {
    "noise": ("noise", {}),
    "kickback": ("kickback", {}),
    "feedback alignment": ("fa", {}),
    "direct feedback alignment": ("dfa", {}),
    "local classifier": ("pred", {}),
    "loss critic": ("cdni", {"form": "critic", "hidden_layers": 1}),
    "synthetic gradient": ("dni", {}),
    "synthetic gradient, label": ("cdni", {}),
    "true gradient": ("backprop", {}),
}
_TABLE_SIZES = {
    "smoke": _Size(seeds=1, hidden=(2,), units=32, training={"epochs": 2, "samples": 2000, "batch_size": 128}),
    "small": _Size(seeds=3, hidden=(4,), units=256, training={"epochs": 5}),
    "full": _Size(seeds=5, hidden=(4,), units=256, training={"epochs": 50}),
}
_INFORMATION = {
    Needs.NOTHING: "h",
    Needs.TARGET: "h, y",
    Needs.ERROR: "h, y, error at the output",
    Needs.ABOVE: "h, y, error at the output, error of the layer above",
}


def sg_table(budget: str) -> Recipe:
    """What can stand for a layer's gradient: what each needs, which locks that leaves, how near the truth it is, how far it trains.

    Args:
        budget: smoke, small or full.
    """
    size = choose(_TABLE_SIZES, budget, "budget")
    (hidden,) = size.hidden
    cosine = "Cosine with the true gradient"
    trials = [
        LayerTrial(
            panel="MNIST FCN",
            series=method,
            x=hidden + 1,
            seed=seed,
            data="mnist",
            layers=hidden + 1,
            units=size.units,
            rule=rule,
            fields=dict(fields),
            loss="one-vs-all",
            measures={cosine: "cosine"},
            averaged=True,
            **size.training,
        )
        for method, (rule, fields) in _TABLE.items()
        for seed in seeds(size.seeds)
    ]
    return Recipe(
        name="sg-table",
        title="What can stand for a layer's gradient",
        reference=f"{REFERENCE}, table 1",
        budget=budget,
        scope=f"{hidden + 1} layers of {size.units}, {trials[0].epochs} epochs, Adam 0.001, a logistic loss for each class; "
        f"cosines on held-out images, means over epochs; {size.seeds} seed(s)",
        trials=trials,
        x_label="layers",
        x_labels={cosine: "layer"},
        y_labels={cosine: "cosine"},
        from_zero=False,
        derived={method: _derived(*how) for method, how in _TABLE.items()},
    )


def _derived(name: str, fields: Mapping[str, Any]) -> dict[str, str]:
    """Says what follows from a rule's needs."""
    rule = rules.get(name, **fields)
    places = [Place(index, 4) for index in range(4)]
    held = locks([rule.needs(place) for place in places])
    auxiliary = rule.auxiliary_needs(places[0])
    return {
        "rule": name,
        "credit needs": _INFORMATION[rule.needs(places[0])],
        "what estimates it learns from": "-" if auxiliary is None else _INFORMATION[auxiliary],
        "update locked": "yes" if "update" in held else "no",
        "backward locked": "yes" if "backward" in held else "no",
        "locks kept": ", ".join(sorted(held, key=LOCKS.index)),
    }


# ---- artificial data ----------------------------------------------------------------------------------------------------------

_SG, _SG_SIGMOID = "SG, linear", "SG, sigmoid"
_LINEAR_METHODS: dict[str, _Method] = {
    OPTIMUM: (OPTIMUM, {}),
    "backprop": ("backprop", {}),
    _SG: ("cdni", {"form": "line-search"}),
    _SG_SIGMOID: ("cdni", {"form": "sigmoid", "learning_rate": 0.01}),
}
_DEPTHS = {"linear": (0, 0.1), "deep linear": (10, 0.01)}
"""Hidden layers and learning rate."""

_LINEAR_SIZES = {"smoke": (1, 10), "small": (3, 1500), "full": (5, 10_000)}
"""Seeds and steps by budget."""


def sg_artificial(budget: str) -> Recipe:
    """Training loss of linear and deep linear models by backpropagation and by a synthetic gradient at their output.

    Args:
        budget: smoke, small or full.
    """
    count, steps = choose(_LINEAR_SIZES, budget, "budget")
    panels = [(f"{depth}, {loss}", depth, loss) for depth in _DEPTHS for loss in LOSSES]
    trials = [
        LinearTrial(
            panel=panel,
            series=method,
            x=x,
            seed=seed,
            task=task,
            features=features,
            hidden=0 if rule == OPTIMUM else _DEPTHS[depth][0],
            loss=loss,
            rule=rule,
            fields=fields,
            steps=steps,
            learning_rate=_DEPTHS[depth][1],
        )
        for panel, depth, loss in panels
        for x, (task, features) in places().items()
        for method, (rule, fields) in _LINEAR_METHODS.items()
        if loss != "MSE" or method != _SG_SIGMOID
        for seed in seeds(count)
    ]
    findings: list[Finding] = [
        Farthest(
            panel=panel,
            series=[_SG] if loss == "MSE" else [_SG, _SG_SIGMOID],
            xs=list(places()),
            reference="backprop",
            shown="training loss",
        )
        for panel, _, loss in panels
    ]
    names: dict[float | int, str] = {x: f"{task} {features}" for x, (task, features) in places().items()}
    return Recipe(
        name="sg-artificial",
        title="Linear models through a synthetic gradient",
        reference=f"{REFERENCE}, section 4",
        budget=budget,
        scope=f"{steps} steps of gradient descent on 500 samples; linear synthesisers by line search, those with a "
        f"sigmoid by Adam; {count} seed(s)",
        trials=trials,
        x_label="task, dimensions",
        x_names={panel: names for panel, _, _ in panels},
        y_label="training loss",
        digits=4,
        findings=findings,
    )


# ---- deep networks ------------------------------------------------------------------------------------------------------------

_DEEP_SIZES = {
    "smoke": _Size(seeds=1, hidden=(5,), units=16, training={"epochs": 1, "samples": 1000, "batch_size": 100}),
    "small": _Size(seeds=3, hidden=(5, 10, 20, 50), units=128, training={"epochs": 8}),
    "full": _Size(seeds=3, hidden=(5, 10, 20, 50), units=256, training={"epochs": 100}),
}
_ACTIVATIONS = ("relu", "sigmoid")
_MIDDLE = "SG in the middle"
DEEP_METHODS = {"backprop": "backprop", _MIDDLE: "cdni", f"{_MIDDLE}, no label": "dni"}
"""Rules of `sg_deep` by method."""

DEEP_RATES: dict[str, Mapping[str, float]] = {
    "relu": {"backprop": 1e-3, _MIDDLE: 3e-3, f"{_MIDDLE}, no label": 1e-3},
    "sigmoid": {"backprop": 3e-4, _MIDDLE: 1e-4, f"{_MIDDLE}, no label": 3e-5},
}
"""Rates by activation and method that held-out images chose with 20 hidden layers: `benchmarks/deep_rates.py`. A test compares."""


def sg_deep(budget: str) -> Recipe:
    """Test error of deep networks with batch normalisation by depth: backpropagation, and a synthetic gradient half-way.

    Args:
        budget: smoke, small or full.
    """
    size = choose(_DEEP_SIZES, budget, "budget")
    trials = [
        RuleTrial(
            panel=f"MNIST, {activation}",
            series=method,
            x=hidden,
            seed=seed,
            data="mnist",
            network="normalised",
            network_fields={"activation": activation},
            layers=hidden + 1,
            units=size.units,
            rule=rule,
            fields={} if rule == "backprop" else {"borders": (hidden // 2 - 1,)},
            learning_rate=DEEP_RATES[activation][method],
            **size.training,
        )
        for activation in _ACTIVATIONS
        for method, rule in DEEP_METHODS.items()
        for hidden in size.hidden
        for seed in seeds(size.seeds)
    ]
    return Recipe(
        name="sg-deep",
        title="A synthetic gradient in the middle of a deep network",
        reference=f"{REFERENCE}, section 4",
        budget=budget,
        scope=f"hidden layers of {size.units} with batch normalisation, linear synthesisers, Adam at the best of six rates for each "
        f"method and activation, {trials[0].epochs} epoch(s), "
        f"{size.seeds} seed(s)",
        trials=trials,
        x_label="hidden layers",
        log_x=True,
    )


# ---- representations ----------------------------------------------------------------------------------------------------------


_LAYER_SIZES = {
    "smoke": _Size(seeds=1, hidden=(6,), units=16, training={"epochs": 1, "samples": 1000, "batch_size": 100}),
    "small": _Size(seeds=3, hidden=(20,), units=256, training={"epochs": 10, "batch_size": 128, "learning_rate": 1e-4}),
    "full": _Size(seeds=3, hidden=(20,), units=256, training={"epochs": 200, "batch_size": 128, "learning_rate": 1e-4}),
}
_NEIGHBOURS, _CLASSES, _IMPLIED = "CKA with the layer above", "CKA with the classes", "Implied against true loss"


_TOO_FAST_RATE = 1e-3
_TOO_FAST = f"SG everywhere, rate {_TOO_FAST_RATE:g}"
"""At ten times the rate the blocks move faster than estimates of estimates can follow."""


def sg_representations(budget: str) -> Recipe:
    """What synthetic gradients do to the layers of a deep network: where on the way up they change, and what the estimates believe.

    Args:
        budget: smoke, small or full.
    """
    size = choose(_LAYER_SIZES, budget, "budget")
    (hidden,) = size.hidden
    middle = hidden // 2
    one = f"SG between {middle + 1} and {middle + 2}"
    methods: dict[str, _Method] = {
        "backprop": ("backprop", {}),
        one: ("cdni", {"borders": (middle,)}),
        "SG everywhere": ("cdni", {}),
        _TOO_FAST: ("cdni", {}),
    }
    faster: dict[str, dict[str, Any]] = {_TOO_FAST: {"learning_rate": _TOO_FAST_RATE}}
    trials = [
        LayerTrial(
            panel="MNIST FCN",
            series=method,
            x=hidden,
            seed=seed,
            data="mnist",
            layers=hidden + 1,
            units=size.units,
            rule=rule,
            fields=dict(fields),
            measures={_NEIGHBOURS: "neighbours", _CLASSES: "classes"} | ({} if rule == "backprop" else {_IMPLIED: "implied"}),
            **{**size.training, **faster.get(method, {})},
        )
        for method, (rule, fields) in methods.items()
        for seed in seeds(size.seeds)
    ]
    last = max(3, hidden // 6)
    stops = [1, middle // 2 + 1, middle + 1, middle + middle // 2 + 1, hidden]
    return Recipe(
        name="sg-representations",
        title="Layers under synthetic gradients",
        reference=f"{REFERENCE}, section 5",
        budget=budget,
        scope=f"{hidden} hidden layers of {size.units} with batch normalisation and ReLU, linear synthesisers that see the label, "
        f"Adam {trials[0].learning_rate:g} where nothing else is said, {trials[0].epochs} epoch(s), {size.seeds} seed(s); layers of 500 "
        "test images",
        trials=trials,
        x_label="hidden layers",
        x_labels=dict.fromkeys((_NEIGHBOURS, _CLASSES, _IMPLIED), "layer"),
        y_labels={_NEIGHBOURS: "linear CKA", _CLASSES: "linear CKA", _IMPLIED: "correlation"},
        from_zero=False,
        findings=[
            ChangeAbove(panel=_NEIGHBOURS, series=list(methods), layers=hidden, last=last),
            *(
                Rise(panel=_CLASSES, series=list(methods), x=lower, to=upper, shown="CKA with the classes")
                for lower, upper in itertools.pairwise(stops)
            ),
        ],
        pictures={"dissimilarities": _drawing(trials)},
    )  # fmt: skip


def _drawing(trials: Sequence[LayerTrial]) -> Callable[[Mapping[str, Mapping[str, Any]]], "Figure"]:
    """Returns what draws the dissimilarity matrices of the first seed, a row for each method."""
    first = [trial for trial in trials if trial.seed == 0]

    def draw(results: Mapping[str, Mapping[str, Any]]) -> "Figure":
        from matplotlib.figure import Figure

        matrices = {
            trial.series: results[trial.name]["seen"]["representation"]["rdm"] for trial in first if trial.name in results
        }
        count = min(len(rows) for rows in matrices.values()) - 1  # without the classifier
        shown = list(range(0, count, max(1, count // 10)))
        figure = Figure(figsize=(1.15 * len(shown) + 1, 1.35 * len(matrices) + 0.3), layout="constrained")
        axes = figure.subplots(len(matrices), len(shown), squeeze=False)
        for row, (series, layers) in zip(axes, matrices.items(), strict=True):
            for axis, layer in zip(row, shown, strict=True):
                axis.imshow(layers[layer], vmin=0, vmax=1.2, cmap="viridis", interpolation="nearest")
                axis.set(xticks=(), yticks=())
                axis.set_title(f"layer {layer + 1}", fontsize=7)
            row[0].set_ylabel(series, fontsize=7)
        figure.suptitle("1 - correlation of each two test images, ordered by class (dark: alike)", fontsize=8)
        return figure

    return draw
