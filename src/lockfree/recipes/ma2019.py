"""The experiments of "The HSIC bottleneck: deep learning without back-propagation" (Ma, Lewis, Kleijn 2019)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockfree.choose import choose
from lockfree.recipes.recipe import Key, Recipe, seeds
from lockfree.recipes.trial import Trial

REFERENCE = "Ma, Lewis, Kleijn 2019, The HSIC bottleneck: deep learning without back-propagation, arXiv 1908.01580"
SOURCE = "decoded from the vector curves that the authors published with their code, seed unknown"

_NAMES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
_IMAGES = {"mnist": 60_000, "fashion-mnist": 60_000, "cifar10": 50_000}

# The authors' choices: no shuffling, pixels from 0 to 1, plain descent (momentum never acts in their code) with weight decay.
_PAPER: dict[str, Any] = {"shuffle": False, "pixels": True, "optimizer": "sgd", "weight_decay": 1e-3, "drops": ()}
# Ours: a new order each epoch, standardised images, Adam with the rate divided by ten twice, for both methods.
_FAIR: dict[str, Any] = {"optimizer": "adam"}


@dataclass(frozen=True, kw_only=True)
class _Size:
    """What a budget means.

    Attributes:
        data: Data sets.
        units: Width, in place of the paper's; ``None`` for that.
        samples: Training images; ``None`` for all.
        epochs: Passes over them.
        format_epochs: Passes of format training; as many if ``None``.
        seeds: How many.
    """

    data: Sequence[str]
    units: int | None = None
    samples: int | None = None
    epochs: int = 5
    format_epochs: int | None = None
    seeds: int = 1

    def of(self, data: str, batch_size: int) -> int:
        """Returns the number of batches in an epoch."""
        return math.ceil((self.samples or _IMAGES[data]) / batch_size)


_ALL = ("mnist", "fashion-mnist", "cifar10")
_SMOKE = _Size(data=("mnist",), units=32, samples=1000, epochs=1)


def _settings(size: _Size) -> Iterator[tuple[str, str, int]]:
    """Yields setting, data set and seed."""
    for setting in ("paper", "fair"):
        for data in size.data:
            for seed in seeds(size.seeds):
                yield setting, data, seed


def _shared(size: _Size, setting: str, data: str, seed: int, **more: Any) -> dict[str, Any]:
    """Returns the fields that all trials of one setting, data set and seed have."""
    place = {"panel": f"{_NAMES[data]}, {setting}", "x": None, "seed": seed, "data": data, "samples": size.samples}
    return place | (_PAPER if setting == "paper" else _FAIR) | more


def _paper_numbers(trials: Sequence[Trial], curves: Mapping[tuple[str, str], tuple[float, float]]) -> dict[Key, float]:
    """Returns test errors by key from accuracies by (data, series) after 1 and 5 epochs, for trials on all images that get so far."""
    epochs = {(one.panel, one.series): one.epochs - one.hidden_epochs for one in trials if one.samples is None}
    return {
        (panel, place, series): round(100 - accuracy, 2)
        for (data, series), accuracies in curves.items()
        for place, accuracy in zip((1, 5), accuracies, strict=True)
        if place <= epochs.get((panel := f"{_NAMES[data]}, paper", series), 0)
    }


_UNFORMATTED = {
    "smoke": _SMOKE,
    "small": _Size(data=_ALL),
    "full": _Size(data=_ALL, seeds=5),
}
_UNFORMATTED_BALANCE = {"mnist": 200.0, "fashion-mnist": 1000.0, "cifar10": 2500.0}


def hsic_unformatted(budget: str) -> Recipe:
    """Classes read off the top block's own units: seven layers of 1024 trained by HSIC alone, beside backpropagation.

    Args:
        budget: smoke, small or full.
    """
    size = choose(_UNFORMATTED, budget, "budget")
    trials = []
    for setting, data, seed in _settings(size):
        paper = setting == "paper"
        sizes = {"network": "normalised", "layers": 7, "units": size.units or 1024, "epochs": size.epochs}
        shared = _shared(size, setting, data, seed, **sizes)
        hsic = {"balance": _UNFORMATTED_BALANCE[data], "sigma": 6.0, "readout": "one-hot"}
        trials += [
            Trial(series="backprop", rule="backprop", learning_rate=0.05 if paper else 1e-3, **shared),
            Trial(
                series="HSIC",
                rule="hsic",
                fields=hsic,
                network_fields={"classifier": False},
                learning_rate=1e-3,
                order_on_evaluated=paper,
                **shared,
            ),
        ]
    return Recipe(
        name="hsic-unformatted",
        title="Unformatted: one-hot units without any loss",
        reference=f"{REFERENCE}, figure 4",
        budget=budget,
        scope=f"seven layers of {size.units or 1024}, {size.seeds} seed(s); paper: the authors' choices, units matched to classes on the "
        "test set; fair: shuffled, standardised, Adam for both, matched on the training set",
        trials=trials,
        x_label="epoch",
        paper=_paper_numbers(
            trials,
            {
                ("mnist", "backprop"): (96.61, 97.81),
                ("mnist", "HSIC"): (96.12, 96.89),
                ("fashion-mnist", "backprop"): (83.98, 87.37),
                ("fashion-mnist", "HSIC"): (83.79, 86.48),
                ("cifar10", "backprop"): (45.16, 50.12),
                ("cifar10", "HSIC"): (41.94, 48.77),
            },
        ),
        source=SOURCE,
    )


_FORMAT = {"smoke": _SMOKE, "small": _Size(data=("mnist",)), "full": _Size(data=("mnist",), seeds=5)}


def hsic_format(budget: str) -> Recipe:
    """Format training: a linear classifier on a frozen HSIC network; by HSIC epochs before, and by the width of the last layer.

    Args:
        budget: smoke, small or full.
    """
    size = choose(_FORMAT, budget, "budget")
    trials = []
    for setting, data, seed in _settings(size):
        paper = setting == "paper"
        shared = _shared(size, setting, data, seed, network="normalised", layers=7)
        trials.append(
            Trial(
                series="backprop",
                rule="backprop",
                units=size.units or 128,
                epochs=size.epochs,
                learning_rate=1e-3,
                **shared,
            )
        )
        for series, width, last, before, rate, format_rate in (
            ("HSIC", 128, 128, 5, 1e-4, 0.005),
            ("HSIC 1 epoch", 256, 128, 1, 1e-4, 0.005),
            ("HSIC 5 epochs", 256, 128, 5, 1e-4, 0.005),
            ("HSIC 10 epochs", 256, 128, 10, 1e-4, 0.005),
            ("last 8", 256, 8, 5, 2e-4, 0.01),
            ("last 32", 256, 32, 5, 2e-4, 0.01),
            ("last 64", 256, 64, 5, 2e-4, 0.01),
        ):
            hidden = min(before, size.epochs) if budget == "smoke" else before
            trials.append(
                Trial(
                    series=series,
                    rule="hsic",
                    fields={"balance": 50.0, "sigma": 5.0, "format_after": hidden * size.of(data, 256)},
                    network_fields={"last": last},
                    units=size.units or width,
                    epochs=hidden + size.epochs,
                    hidden_epochs=hidden,
                    learning_rate=rate if paper else 1e-3,
                    top_learning_rate=format_rate if paper else 1e-3,
                    **(shared | {"drops": ()}),
                )
            )
    return Recipe(
        name="hsic-format",
        title="Format training",
        reference=f"{REFERENCE}, figures 3, 5 and 6a",
        budget=budget,
        scope=f"a linear classifier on a frozen network, {size.seeds} seed(s); epochs are those of the classifier, HSIC's come before",
        trials=trials,
        x_label="epoch",
        paper=_paper_numbers(
            trials,
            {
                ("mnist", "backprop"): (49.39, 84.65),
                ("mnist", "HSIC"): (94.00, 94.04),
                ("mnist", "HSIC 1 epoch"): (85.5, 88.0),
                ("mnist", "HSIC 5 epochs"): (94.13, 94.28),
                ("mnist", "HSIC 10 epochs"): (95.44, 95.51),
                ("mnist", "last 8"): (45.97, 87.14),
                ("mnist", "last 32"): (94.09, 94.48),
                ("mnist", "last 64"): (95.31, 95.35),
            },
        ),
        source=SOURCE,
    )


_SIGMA = {"smoke": _SMOKE, "small": _Size(data=("mnist",)), "full": _Size(data=("mnist",), seeds=5)}
_SIGMAS = (1.0, 5.0, 10.0)


def hsic_sigma(budget: str) -> Recipe:
    """Networks of three bandwidths, alone and averaged into one representation, with format training.

    Args:
        budget: smoke, small or full.
    """
    size = choose(_SIGMA, budget, "budget")
    trials = []
    for setting, data, seed in _settings(size):
        paper = setting == "paper"
        shared = _shared(size, setting, data, seed, layers=7, units=size.units or 128, drops=())
        for series, sigmas in (*((f"sigma {sigma:g}", (sigma,)) for sigma in _SIGMAS), ("combined", _SIGMAS)):
            combined = len(sigmas) > 1
            trials.append(
                Trial(
                    series=series,
                    network="side-by-side" if combined else "normalised",
                    network_fields={"last": 64} | ({"count": len(sigmas)} if combined else {}),
                    rule="hsic",
                    fields={"balance": 50.0, "sigma": sigmas, "format_after": size.epochs * size.of(data, 512)},
                    epochs=2 * size.epochs,
                    hidden_epochs=size.epochs,
                    batch_size=512,
                    learning_rate=1e-4 if paper else 1e-3,
                    top_learning_rate=0.004 if paper else 1e-3,
                    **shared,
                )
            )
    return Recipe(
        name="hsic-sigma",
        title="Sigma-combined network",
        reference=f"{REFERENCE}, figure 6b",
        budget=budget,
        scope=f"seven layers, the last of 64, {size.seeds} seed(s); epochs are those of the classifier, as many of HSIC come before",
        trials=trials,
        x_label="epoch",
        paper=_paper_numbers(
            trials,
            {
                ("mnist", "sigma 1"): (30.3, 69.6),
                ("mnist", "sigma 5"): (74.2, 93.5),
                ("mnist", "sigma 10"): (90.5, 93.2),
                ("mnist", "combined"): (93.59, 93.64),
            },
        ),
        source=SOURCE,
    )


_RESNET = {
    "smoke": _Size(data=("mnist",), units=4, samples=600, epochs=1),
    "small": _Size(data=("fashion-mnist", "cifar10"), format_epochs=2),
    "full": _Size(data=_ALL, seeds=3),
}
_RESNET_BALANCE = {"mnist": 200.0, "fashion-mnist": 500.0, "cifar10": 500.0}


def hsic_resnet(budget: str) -> Recipe:
    """A residual network trained by HSIC, then a linear classifier on it; beside backpropagation.

    Args:
        budget: smoke, small (the paper's setting; fair with 10,000 images and 16 channels) or full.
    """
    size = choose(_RESNET, budget, "budget")
    trials = []
    for setting, data, seed in _settings(size):
        paper = setting == "paper"
        here = _Size(data=(data,), units=16, samples=10_000) if budget == "small" and not paper else size
        batch_size = 512 if budget != "smoke" else 128
        sizes = {"network": "residual", "layers": 8, "units": here.units or 64, "batch_size": batch_size}
        shared = _shared(here, setting, data, seed, drops=(), **sizes)
        rate = 0.01 if paper else 1e-3
        lighter: dict[str, Any] = {"weight_decay": 1e-5} if paper else {}
        after = here.epochs * here.of(data, batch_size)
        trials.append(
            Trial(
                series="HSIC",
                rule="hsic",
                fields={"balance": _RESNET_BALANCE[data], "sigma": 5.0, "format_after": after},
                epochs=here.epochs + (here.format_epochs or here.epochs),
                hidden_epochs=here.epochs,
                learning_rate=rate,
                **shared,
            )
        )
        if here.format_epochs is None:  # or there is no time for it
            trials.append(
                Trial(series="backprop", rule="backprop", epochs=here.epochs, learning_rate=rate, **(shared | lighter))
            )
    trials.sort(key=lambda trial: trial.panel.endswith("fair"))  # the longest first
    return Recipe(
        name="hsic-resnet",
        title="ResNet with format training",
        reference=f"{REFERENCE}, figure 7",
        budget=budget,
        scope=_RESNET_SCOPES[budget],
        trials=trials,
        x_label="epoch",
        paper=_paper_numbers(
            trials,
            {
                ("mnist", "backprop"): (96.32, 98.61),
                ("mnist", "HSIC"): (98.89, 98.94),
                ("fashion-mnist", "backprop"): (83.75, 88.60),
                ("fashion-mnist", "HSIC"): (88.64, 89.05),
                ("cifar10", "backprop"): (46.05, 61.09),
                ("cifar10", "HSIC"): (55.53, 60.86),
            },
        ),
        source=SOURCE,
    )


_RESNET_SCOPES = {
    "smoke": "a check that everything runs",
    "small": "one seed; paper: the authors' network and choices, two epochs of the classifier, backpropagation left to full; "
    "fair: shuffled, standardised, Adam for both, 10,000 images, 16 channels; "
    "HSIC's epochs are those of the classifier, five of HSIC come before",
    "full": "the authors' network, 3 seeds; HSIC's epochs are those of the classifier, five of HSIC come before",
}


_DEPTH = {
    "smoke": _SMOKE,
    "small": _Size(data=("mnist",), units=256, epochs=1),
    "full": _Size(data=_ALL, seeds=3),
}
_DEPTH_BALANCE = {"mnist": 500.0, "fashion-mnist": 1000.0, "cifar10": 2500.0}


def hsic_depth(budget: str) -> Recipe:
    """Fifty layers without skips: HSIC, backpropagation, and both without BatchNorm.

    Args:
        budget: smoke, small or full.
    """
    size = choose(_DEPTH, budget, "budget")
    trials = []
    for setting, data, seed in _settings(size):
        paper = setting == "paper"
        hsic = {"balance": _DEPTH_BALANCE[data], "sigma": 6.0, "readout": "one-hot"}
        layers = 50 if budget != "smoke" else 10
        sizes = {"network": "normalised", "layers": layers, "units": size.units or 1024, "epochs": size.epochs}
        shared = _shared(size, setting, data, seed, **sizes)
        for norm in (True, False):
            suffix = "" if norm else ", no BatchNorm"
            trials += [
                Trial(
                    series=f"backprop{suffix}",
                    rule="backprop",
                    network_fields={"batch_norm": norm},
                    learning_rate=0.01 if paper else 1e-3,
                    **shared,
                ),
                Trial(
                    series=f"HSIC{suffix}",
                    rule="hsic",
                    fields=hsic,
                    network_fields={"batch_norm": norm, "classifier": False},
                    learning_rate=1e-3,
                    order_on_evaluated=paper,
                    **shared,
                ),
            ]
    return Recipe(
        name="hsic-depth",
        title="Fifty layers",
        reference=f"{REFERENCE}, section 4",
        budget=budget,
        scope=f"50 layers of {size.units or 1024}, {size.seeds} seed(s); unformatted",
        trials=trials,
        x_label="epoch",
    )
