"""The experiments of "The HSIC bottleneck: deep learning without back-propagation" (Ma, Lewis, Kleijn 2019)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockfree.choose import choose
from lockfree.recipes.recipe import Key, Recipe, seeds
from lockfree.recipes.rule_trial import RuleTrial

REFERENCE = "Ma, Lewis, Kleijn 2019, The HSIC bottleneck: deep learning without back-propagation, arXiv 1908.01580"
SOURCE = "decoded from the vector curves that the authors published with their code, seed unknown"

_NAMES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
_IMAGES = {"mnist": 60_000, "fashion-mnist": 60_000, "cifar10": 50_000}

# The authors' choices: no shuffling, pixels from 0 to 1, plain descent (momentum never acts in their code) with weight decay.
_PAPER: dict[str, Any] = {"shuffle": False, "pixels": True, "optimizer": "sgd", "weight_decay": 1e-3, "drops": ()}
# Ours: a new order each epoch, standardised images, Adam whose rate was chosen for each method and, unless a block is frozen,
# is divided by ten twice.
_FAIR: dict[str, Any] = {"optimizer": "adam"}


@dataclass(frozen=True, kw_only=True)
class _Size:
    """What a budget means.

    Attributes:
        data: Data sets.
        units: Width, in place of the paper's; ``None`` for that.
        samples: Training images; ``None`` for all.
        epochs: Passes over them.
        seeds: How many.
    """

    data: Sequence[str]
    units: int | None = None
    samples: int | None = None
    epochs: int = 5
    seeds: int = 1

    def of(self, data: str, batch_size: int) -> int:
        """Returns the number of batches in an epoch."""
        return math.ceil((self.samples or _IMAGES[data]) / batch_size)


_ALL = ("mnist", "fashion-mnist", "cifar10")
_SMOKE = _Size(data=("mnist",), units=32, samples=1000, epochs=1)


# Of Adam in the fair setting, for each method the best of three on held-out training images: benchmarks/fair_rates.py. A recipe's
# other variants of the HSIC network have the rate of "HSIC", and data sets that were not tried MNIST's.
_FAIR_RATES: dict[str, dict[str, dict[str, float]]] = {
    "hsic-unformatted": {
        "mnist": {"HSIC": 3e-3, "backprop": 3e-4},
        "fashion-mnist": {"HSIC": 3e-3, "backprop": 3e-4},
        "cifar10": {"HSIC": 3e-3, "backprop": 3e-4},
    },
    "hsic-format": {
        "mnist": {"HSIC": 3e-3, "backprop": 1e-3},
    },
    "hsic-sigma": {
        "mnist": {"HSIC": 3e-3},
    },
    "hsic-resnet": {
        "mnist": {"HSIC": 3e-3, "backprop": 3e-3},
        "fashion-mnist": {"HSIC": 3e-3, "backprop": 3e-3},
        "cifar10": {"HSIC": 3e-3, "backprop": 1e-3},
    },
    "hsic-depth": {
        "mnist": {"HSIC": 1e-3, "HSIC, no BatchNorm": 3e-4, "backprop": 3e-3, "backprop, no BatchNorm": 3e-4},
    },
}


@dataclass(frozen=True)
class _Place:
    """One setting on one data set with one seed, and what its trials have in common."""

    recipe: str
    setting: str
    data: str
    seed: int
    fields: Mapping[str, Any]

    @property
    def paper(self) -> bool:
        """Whether the authors' choices are copied."""
        return self.setting == "paper"

    def rate(self, paper: float, series: str) -> float:
        """Returns the learning rate of a method: the paper's, or the one chosen for it."""
        rates = _FAIR_RATES[self.recipe]
        return paper if self.paper else rates.get(self.data, rates["mnist"])[series]

    def backprop(self, *, rate: float, series: str = "backprop", **more: Any) -> RuleTrial:
        """Makes a trial of backpropagation; ``rate`` is the paper's, whose weights decay less than under HSIC."""
        own: dict[str, Any] = {"series": series, "rule": "backprop", "learning_rate": self.rate(rate, series)}
        if self.paper:
            own["weight_decay"] = 1e-5
        return RuleTrial(**self._common | own | more)

    def unformatted(
        self, *, rate: float, balance: float, series: str = "HSIC", network_fields: dict[str, Any] | None = None
    ) -> RuleTrial:
        """Makes a trial whose top block has a unit for each class and learns by HSIC, too."""
        return RuleTrial(
            series=series,
            rule="hsic",
            fields={"balance": balance, "sigma": 6.0, "readout": "one-hot"},
            network_fields={"classifier": False} | (network_fields or {}),
            learning_rate=self.rate(rate, series),
            order_on_evaluated=self.paper,
            **self._common,
        )

    def formatted(
        self,
        *,
        rate: float,
        top: dict[str, Any],
        balance: float,
        sigma: float | Sequence[float] = 5.0,
        batches: int,
        before: int,
        after: int,
        series: str = "HSIC",
        **more: Any,
    ) -> RuleTrial:
        """Makes a trial of HSIC for so many epochs before, and of a classifier for so many after; an epoch has so many batches."""
        return RuleTrial(
            **self._common
            | {
                "series": series,
                "rule": "hsic",
                "fields": {"balance": balance, "sigma": sigma, "format_after": before * batches},
                "epochs": before + after,
                "hidden_epochs": before,
                "learning_rate": self.rate(rate, "HSIC"),
                "top": top if self.paper else {},
                "drops": (),
            }
            | more
        )

    @property
    def _common(self) -> dict[str, Any]:
        panel = f"{_NAMES[self.data]}, {self.setting}"
        here = {"panel": panel, "x": None, "seed": self.seed, "data": self.data}
        return here | (_PAPER if self.paper else _FAIR) | dict(self.fields)


def _places(recipe: str, size: _Size, **fields: Any) -> Iterator[_Place]:
    """Yields both settings on all data sets with all seeds."""
    for setting in ("paper", "fair"):
        for data in size.data:
            for seed in seeds(size.seeds):
                yield _Place(recipe, setting, data, seed, {"samples": size.samples, "epochs": size.epochs, **fields})


def _paper_numbers(trials: Sequence[RuleTrial], curves: Mapping[tuple[str, str], tuple[float, float]]) -> dict[Key, float]:
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
    for place in _places("hsic-unformatted", size, network="normalised", layers=7, units=size.units or 1024):
        trials += [place.backprop(rate=0.05), place.unformatted(rate=1e-3, balance=_UNFORMATTED_BALANCE[place.data])]
    return Recipe(
        name="hsic-unformatted",
        title="Unformatted: one-hot units without any loss",
        reference=f"{REFERENCE}, figure 4",
        budget=budget,
        scope=f"seven layers of {size.units or 1024}, {size.seeds} seed(s); paper: the authors' choices, units matched to classes on the "
        "test set; fair: shuffled, standardised, tuned Adam for both, matched on the training set",
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
    for place in _places("hsic-format", size, network="normalised", layers=7):
        trials.append(place.backprop(rate=1e-3, units=size.units or 128))
        for series, width, last, before, rate, format_rate in (
            ("HSIC", 128, 128, 5, 1e-4, 0.005),
            ("HSIC 1 epoch", 256, 128, 1, 1e-4, 0.005),
            ("HSIC 5 epochs", 256, 128, 5, 1e-4, 0.005),
            ("HSIC 10 epochs", 256, 128, 10, 1e-4, 0.005),
            ("last 8", 256, 8, 5, 2e-4, 0.01),
            ("last 32", 256, 32, 5, 2e-4, 0.01),
            ("last 64", 256, 64, 5, 2e-4, 0.01),
        ):
            trials.append(
                place.formatted(
                    series=series,
                    rate=rate,
                    top={"lr": format_rate},
                    balance=50.0,
                    batches=size.of(place.data, 256),
                    before=min(before, size.epochs) if budget == "smoke" else before,
                    after=size.epochs,
                    units=size.units or width,
                    network_fields={"last": last},
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
    for place in _places("hsic-sigma", size, layers=7, units=size.units or 128, batch_size=512):
        of_all = {
            "rate": 1e-4,
            "balance": 50.0,
            "batches": size.of(place.data, 512),
            "before": size.epochs,
            "after": size.epochs,
        }
        trials += [
            place.formatted(
                series=f"sigma {sigma:g}",
                sigma=sigma,
                top={"lr": 0.004},
                network="normalised",
                network_fields={"last": 64},
                **of_all,
            )
            for sigma in _SIGMAS
        ]
        trials.append(
            place.formatted(
                series="combined",
                sigma=_SIGMAS,
                top={"lr": 0.004, "momentum": 0.9, "weight_decay": 1e-4},
                network="side-by-side",
                network_fields={"last": 64, "count": len(_SIGMAS)},
                **of_all,
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


_RESNETS = {
    "smoke": _Size(data=("mnist",), units=4, samples=600, epochs=1),
    "small": _Size(data=_ALL),
    "full": _Size(data=_ALL, seeds=3),
}
_RESNET_FAIR = _Size(data=_ALL, units=16, samples=10_000)  # in a small budget
_RESNET_BALANCE = {"mnist": 200.0, "fashion-mnist": 500.0, "cifar10": 500.0}


def hsic_resnet(budget: str) -> Recipe:
    """A residual network trained by HSIC, then a linear classifier on it; beside backpropagation.

    Args:
        budget: smoke, small (the paper's setting; fair with 10,000 images and 16 channels) or full.
    """
    size = choose(_RESNETS, budget, "budget")
    trials = []
    for place in _places("hsic-resnet", size, network="residual", layers=8, drops=()):
        here = size if place.paper or budget != "small" else _RESNET_FAIR
        batch_size = 512 if place.paper and budget != "smoke" else 128
        sizes: dict[str, Any] = {"units": here.units or 64, "samples": here.samples, "batch_size": batch_size}
        trials.append(
            place.formatted(
                rate=0.01,
                top={},
                balance=_RESNET_BALANCE[place.data],
                batches=here.of(place.data, batch_size),
                before=here.epochs,
                after=here.epochs,
                **sizes,
            )
        )
        if here is not _RESNETS["small"]:  # where it takes hours
            trials.append(place.backprop(rate=0.01, **sizes))
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
    "small": "one seed; paper: the authors' network and choices, backpropagation left to full; "
    "fair: shuffled, standardised, tuned Adam for both, 10,000 images, 16 channels, batches of 128; "
    "HSIC's epochs are those of the classifier, five of HSIC come before",
    "full": "the authors' network, 3 seeds; HSIC's epochs are those of the classifier, five of HSIC come before",
}


_DEPTH = {
    "smoke": _SMOKE,
    "small": _Size(data=("mnist",), units=256, epochs=1),
    "full": _Size(data=_ALL, seeds=3),
}
_DEPTH_BALANCE = {"mnist": 2500.0, "fashion-mnist": 1000.0, "cifar10": 500.0}


def hsic_depth(budget: str) -> Recipe:
    """Fifty layers without skips: HSIC, backpropagation, and both without BatchNorm.

    Args:
        budget: smoke, small or full.
    """
    size = choose(_DEPTH, budget, "budget")
    layers = 50 if budget != "smoke" else 10
    trials = []
    for place in _places("hsic-depth", size, network="normalised", layers=layers, units=size.units or 1024):
        for norm in (True, False):
            suffix, network = "" if norm else ", no BatchNorm", {"batch_norm": norm}
            balance = _DEPTH_BALANCE[place.data]
            trials += [
                place.backprop(series=f"backprop{suffix}", rate=0.01, network_fields=network),
                place.unformatted(series=f"HSIC{suffix}", rate=1e-3, balance=balance, network_fields=network),
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
