"""The comparisons of "Asynchronous stochastic gradient descent with delay compensation" (Zheng et al. 2017), and a fairer one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockfree.choose import choose
from lockfree.recipes.findings import Recovery
from lockfree.recipes.recipe import Key, Recipe, seeds
from lockfree.recipes.server_trial import ServerTrial

REFERENCE = "Zheng, Meng, Wang, Chen, Yu, Ma, Liu 2017, Asynchronous stochastic gradient descent with delay compensation, arXiv 1609.08326"
SOURCE = (
    "test errors; 8.65 (sequential), 9.27 (ASGD, 4 workers) and 8.19 (DC-a, 4 workers) confirmed by two summaries of the paper, the others "
    "as remembered, not checked"
)

METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"workers": 1},
    "SSGD": {"consistency": "bsp"},
    "ASGD": {},
    "rate / delay": {"correction": "scale"},
    "DC-c": {"correction": "dc-constant"},
    "DC-a": {"correction": "dc-adaptive"},
}
"""What sets a method's trials apart; without a word about it, workers do not wait and gradients are not repaired."""


# ---- ResNet-20 on CIFAR-10 ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Images:
    """What a budget means for the comparison on images.

    Attributes:
        panel: What is trained on what.
        seeds: How many.
        training: Fields of each trial.
    """

    panel: str
    seeds: int
    training: Mapping[str, Any]


_IMAGES = {
    "smoke": _Images(
        panel="digits, 64-64-64-10",
        seeds=1,
        training={"data": "digits", "samples": 320, "batch_size": 32, "epochs": 2, "learning_rate": 0.1},
    ),
    "small": _Images(
        panel="Fashion-MNIST sample, small CNN",
        seeds=3,
        training={
            "data": "fashion-mnist-sample", "network": "cnn", "samples": 3000, "batch_size": 32, "epochs": 8,
            "learning_rate": 0.125,  # the paper's for each sample of a batch: 0.5 * 32 / 128
        },
    ),
    "full": _Images(
        panel="CIFAR-10, ResNet-20",
        seeds=3,
        training={
            "data": "cifar10", "network": "resnet20", "augment": True, "batch_size": 128, "epochs": 160, "learning_rate": 0.5,
        },
    ),
}  # fmt: skip

# The paper's own, without the cap that it does not have; each worker's mean square is its own, as in the authors' code.
_PAPER_FIELDS: dict[str, dict[str, Any]] = {
    "DC-c": {"fields": {"strength": 0.04, "cap": None}},
    "DC-a": {"fields": {"strength": 2.0, "decay": 0.95, "eps": 1e-7, "cap": None}, "memory_per_worker": True},
}

_PAPER_ERRORS = {
    ("sequential", 1): 8.65,
    ("ASGD", 4): 9.27,
    ("SSGD", 4): 9.17,
    ("DC-c", 4): 8.67,
    ("DC-a", 4): 8.19,
    ("ASGD", 8): 10.26,
    ("SSGD", 8): 10.10,
    ("DC-c", 8): 9.27,
    ("DC-a", 8): 8.57,
}


def dc_asgd_cifar(budget: str) -> Recipe:
    """Test error by the number of workers: sequential SGD, with a barrier, without, and with delay compensation.

    Args:
        budget: smoke, small, or full (the paper's network and settings; wants an accelerator).
    """
    size = choose(_IMAGES, budget, "budget")
    trials = [
        trial_of(method, workers, panel=size.panel, seed=seed, **_PAPER_FIELDS.get(method, {}), **size.training)
        for method in ("sequential", "SSGD", "ASGD", "DC-c", "DC-a")
        for workers in ((1,) if method == "sequential" else (4, 8))
        for seed in seeds(size.seeds)
    ]
    paper: dict[Key, float] = {(size.panel, workers, method): error for (method, workers), error in _PAPER_ERRORS.items()}
    training = size.training
    return Recipe(
        name="dc-asgd-cifar",
        title="Delay compensation",
        reference=f"{REFERENCE}, table 1",
        budget=budget,
        scope=f"{size.panel}, {training['epochs']} epochs of batches of {training['batch_size']} a worker, plain SGD at "
        f"{training['learning_rate']:g} for all, a tenth after half and three quarters; {size.seeds} seed(s)",
        trials=trials,
        x_label="workers",
        paper=paper if budget != "smoke" else {},
        source=SOURCE,
        findings=[_recovery(size.panel, workers, ("SSGD", "DC-c", "DC-a")) for workers in (4, 8)],
    )


# ---- any number of workers, at the same rate and at each method's own ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """What a budget means for the sweep.

    Attributes:
        workers: Numbers of workers.
        seeds: How many.
        training: Fields of each trial.
    """

    workers: Sequence[int]
    seeds: int
    training: Mapping[str, Any]


_SWEEP = {
    "smoke": _Sweep(workers=(4,), seeds=2, training={"data": "digits", "samples": 320, "epochs": 2}),
    "small": _Sweep(workers=(4, 8, 16, 32), seeds=5, training={"data": "digits", "epochs": 30}),
    "full": _Sweep(workers=(4, 8, 16, 32), seeds=20, training={"data": "digits", "epochs": 30}),
}


SHARED_RATE = 0.2
"""Of the panel with one rate for all: the smallest with which sequential SGD is as good as at its best."""

# (rate, λ0) of each method by the number of workers; λ0 is None where there is none.
_Chosen = dict[str, dict[int, tuple[float, float | None]]]
CHOSEN: dict[str, _Chosen] = {
    "same rate": {
        "sequential": {1: (0.2, None)},
        "SSGD": {4: (0.2, None), 8: (0.2, None), 16: (0.2, None), 32: (0.2, None)},
        "ASGD": {4: (0.2, None), 8: (0.2, None), 16: (0.2, None), 32: (0.2, None)},
        "rate / delay": {4: (0.2, None), 8: (0.2, None), 16: (0.2, None), 32: (0.2, None)},
        "DC-c": {4: (0.2, 10.0), 8: (0.2, 10.0), 16: (0.2, 1.0), 32: (0.2, 10.0)},
        "DC-a": {4: (0.2, 8.0), 8: (0.2, 8.0), 16: (0.2, 8.0), 32: (0.2, 32.0)},
    },
    "own rate": {
        "sequential": {1: (0.2, None)},
        "SSGD": {4: (0.4, None), 8: (0.4, None), 16: (0.8, None), 32: (0.4, None)},
        "ASGD": {4: (0.2, None), 8: (0.05, None), 16: (0.05, None), 32: (0.0125, None)},
        "rate / delay": {4: (0.4, None), 8: (0.4, None), 16: (0.8, None), 32: (0.4, None)},
        "DC-c": {4: (0.2, 10.0), 8: (0.1, 1.0), 16: (0.05, 10.0), 32: (0.0125, 1.0)},
        "DC-a": {4: (0.4, 8.0), 8: (0.1, 2.0), 16: (0.1, 32.0), 32: (0.05, 32.0)},
    },
}
"""What held-out images chose, by panel: `benchmarks/delay_rates.py`. A test compares."""


def dc_asgd_sweep(budget: str) -> Recipe:
    """Test error by the number of workers, at sequential SGD's learning rate and at each method's own.

    Args:
        budget: smoke, small or full (more seeds).
    """
    size = choose(_SWEEP, budget, "budget")
    trials = [
        sweep_trial(method, workers, CHOSEN[panel][method][workers], panel=panel, seed=seed, **size.training)
        for panel in CHOSEN
        for method in METHODS
        for workers in ((1,) if method == "sequential" else size.workers)
        for seed in seeds(size.seeds)
    ]
    return Recipe(
        name="dc-asgd-sweep",
        title="Delay compensation by the number of workers",
        reference=f"{REFERENCE}; a comparison of our own",
        budget=budget,
        scope=f"digits, 64-64-64-10, {size.training['epochs']} epochs of batches of 32 a worker, {size.seeds} seed(s); same rate: "
        f"{SHARED_RATE:g}, what suits sequential SGD; own rate: each method's best; rates and λ0 chosen on held-out images",
        trials=trials,
        x_label="workers",
        log_x=True,
        findings=[
            _recovery(panel, workers, [method for method in METHODS if method not in ("sequential", "ASGD")])
            for panel in CHOSEN
            for workers in size.workers
        ],
    )


def _recovery(panel: str, workers: int, series: Sequence[str]) -> Recovery:
    return Recovery(panel=panel, x=workers, reference="sequential", reference_x=1, baseline="ASGD", series=series)


def sweep_trial(method: str, workers: int, chosen: tuple[float, float | None], **more: Any) -> ServerTrial:
    """Makes a trial of the sweep.

    Args:
        method: One of `METHODS`.
        workers: M.
        chosen: Learning rate, and λ0 if the method has one.
        more: Other fields.
    """
    rate, strength = chosen
    return trial_of(
        method, workers, learning_rate=rate, fields={} if strength is None else {"strength": strength}, **more
    )  # fmt: skip


def trial_of(method: str, workers: int, **more: Any) -> ServerTrial:
    """Makes a trial of a method with so many workers, unless the method says how many, and other fields."""
    own: dict[str, Any] = {"series": method, "x": workers, "workers": workers} | METHODS[method]
    return ServerTrial(**own | more)
