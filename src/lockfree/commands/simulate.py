"""`lockfree simulate`: predictions for many stages, as a table, as JSON, as a picture."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lockfree import models, rules
from lockfree.choose import choose
from lockfree.console import human_bytes, print_table
from lockfree.experiment import OPTIMIZERS, check_device
from lockfree.rule import Place
from lockfree.simulate.costs import Costs, Transport
from lockfree.simulate.measure import measure
from lockfree.simulate.predict import METHODS, PIPELINES, Prediction, Setting, plan_for, predict

_MEASURED = 4  # stages of the network that is timed: a first, two between, a last
_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Simulate:
    """Predict step time, bubble, memory and staleness on many workers.

    Attributes:
        stages: Workers, each with one piece of the network, 1 or more.
        rule: What to simulate: a rule, or gpipe, 1f1b (synchronous pipelines of backprop), ddg (delayed backprop).
        compare: Further ones to simulate, with commas.
        width: Units of each hidden layer of the network that is timed.
        batch: Samples in a batch.
        blocks_per_stage: Hidden layers of a stage, 1 or more.
        microbatches: In how many gpipe and 1f1b cut a batch, 1 or more.
        delay: Ticks that messages take under rules whose blocks wait for others; 0 lets them wait.
        latency_us: Microseconds that a link takes however little it carries.
        bandwidth_gb: Gigabytes that a link carries in a second.
        forward_ms: Milliseconds of a stage's forward pass, with --learn-ms instead of timing a network.
        learn_ms: Milliseconds in which a stage differentiates and updates.
        auxiliary_ms: Milliseconds in which a stage's auxiliary network learns, with --forward-ms.
        rounds: Batches that are timed, 1 or more.
        device: Where to time: cpu, cuda, ...
        out: Folder to write timeline.png, timeline.svg and simulate.json into.
        json: End with one JSON object on standard output.
    """

    stages: int
    rule: str = "dni"
    compare: str = "backprop,gpipe,1f1b,ddg"
    width: int = 512
    batch: int = 256
    blocks_per_stage: int = 1
    microbatches: int = 8
    delay: int = 0
    latency_us: float = 20.0
    bandwidth_gb: float = 10.0
    forward_ms: float | None = None
    learn_ms: float | None = None
    auxiliary_ms: float = 0.0
    rounds: int = 20
    device: str = "cpu"
    out: Path | None = None
    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Times, predicts, draws, prints."""
        self._check()
        names = list(dict.fromkeys([*(name.strip() for name in self.compare.split(",") if name.strip()), self.rule]))
        for name in names:
            choose(METHODS, name, "method")
        transport = Transport(latency=1e-6 * self.latency_us, bandwidth=1e9 * self.bandwidth_gb)
        setting = Setting(transport=transport, microbatches=self.microbatches, delay=self.delay)
        costs = self._costs(names)
        plain = costs["backprop"].plain_step
        plans = [plan_for(name, costs[name], setting) for name in names]
        found = [predict(plan, plain_step=plain) for plan in plans]
        if self.out is not None:
            from lockfree.simulate.draw import draw

            self.out.mkdir(parents=True, exist_ok=True)
            whole = self._told() | {
                "costs": {name: dataclasses.asdict(costs[name]) for name in names},
                "methods": [one.to_dict() for one in found],
            }
            (self.out / "simulate.json").write_text(json.dumps(whole, indent=1) + "\n")
            draw(self.out, plans, found)
        if self.json:
            told = self._told() | {"plain_step": plain, "methods": [one.summary() for one in found]}
            print(json.dumps(told | ({"out": str(self.out)} if self.out else {})))
            return
        print_table(_HEADER, [_row(one) for one in found])
        if self.out is not None:
            print(f"timeline: {self.out / 'timeline.png'}, all numbers: {self.out / 'simulate.json'}")

    def _check(self) -> None:
        least = {"stages": 1, "width": 1, "batch": 2, "blocks_per_stage": 1, "microbatches": 1, "delay": 0, "rounds": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: give {smallest} or more")
        if self.stages > _MOST_STAGES:
            raise ValueError(f"--stages {self.stages}: {_MOST_STAGES:,} are the most")
        if not self.bandwidth_gb > 0:
            raise ValueError(f"--bandwidth-gb {self.bandwidth_gb}: give a number above 0")
        if not 0 <= self.latency_us < math.inf:
            raise ValueError(f"--latency-us {self.latency_us}: give 0 or more")
        if (self.forward_ms is None) != (self.learn_ms is None):
            raise ValueError("--forward-ms and --learn-ms belong together: give both, or neither to time a network")
        if self.forward_ms is None and self.auxiliary_ms:
            raise ValueError("--auxiliary-ms belongs to --forward-ms and --learn-ms: give these, too")
        for name in ("forward_ms", "learn_ms", "auxiliary_ms"):
            given = getattr(self, name)
            if given is not None and not 0 <= given < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {given}: give 0 or more")

    def _told(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("out", "json")}

    # ---- costs ---------------------------------------------------------------------------------------------------------------

    def _costs(self, names: Sequence[str]) -> dict[str, Costs]:
        """Returns the costs under each method, and under backprop; pipelines of backprop have backprop's."""
        timed = list(dict.fromkeys(["backprop", *(name for name in names if name not in PIPELINES)]))
        found = {name: self._given(name) if self.forward_ms is not None else self._timed(name) for name in timed}
        return {name: found["backprop" if name in PIPELINES else name].repeated(self.stages) for name in {*names, *timed}}

    def _given(self, name: str) -> Costs:
        """Returns the costs that the user has named; bytes are those of the hidden layers, four for each number."""
        assert self.forward_ms is not None, "times are given"
        assert self.learn_ms is not None, "both of them"
        border = 4.0 * self.batch * self.width
        costs = Costs.equal(
            3,
            forward=1e-3 * self.forward_ms,
            learn=1e-3 * self.learn_ms,
            up_bytes=border,
            down_bytes=border,
            activation_bytes=border * self.blocks_per_stage,
            parameter_bytes=4.0 * self.width**2 * self.blocks_per_stage,
            error_bytes=4.0 * self.batch * _CLASSES,
        )
        rule = rules.get(name)
        learns = [rule.auxiliary_needs(Place(index, 3)) is not None for index in range(3)]
        return dataclasses.replace(costs, auxiliary=[1e-3 * self.auxiliary_ms * one for one in learns])

    def _timed(self, name: str) -> Costs:
        """Times a small network of the same make; a short one stands for a long one, whose stages between repeat."""
        check_device(self.device)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, 1, 1, self.width, generator=generator).to(self.device)
        y = torch.randint(0, _CLASSES, (self.batch,), generator=generator).to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return measure(
                _network(self.width, self.blocks_per_stage, min(self.stages, _MEASURED)).to(self.device),
                rules.get(name),
                x,
                y,
                loss=F.cross_entropy,
                optimizer=lambda parameters: OPTIMIZERS["adam"](parameters, lr=1e-3),
                rounds=self.rounds,
            )


def _network(width: int, layers: int, stages: int) -> nn.Sequential:
    """Makes a perceptron of equal stages; the last one has the classifier as well."""
    *hidden, classifier = models.mlp((1, 1, width), _CLASSES, hidden=(width,) * (layers * stages))
    pieces = [hidden[begin : begin + layers] for begin in range(0, len(hidden), layers)]
    return nn.Sequential(*(nn.Sequential(*piece) for piece in pieces[:-1]), nn.Sequential(*pieces[-1], classifier))


# ---- what is shown -----------------------------------------------------------------------------------------------------------

_MOST_STAGES = 10_000
_HEADER = [
    "method",
    "ms a batch",
    "speed-up",
    "idle",
    "activations a stage",
    "old weights a stage",
    "staleness",
    "of auxiliary",
]


def _row(found: Prediction) -> list[str]:
    return [
        found.method,
        f"{1e3 * found.period:,.3f}",
        f"{found.speedup:,.2f} of {found.stages:,}",
        f"{100 * found.bubble:.1f} %",
        _range(found.activation_bytes),
        _range(found.stash_bytes),
        f"{max(found.staleness):,}",
        f"{max(found.auxiliary_staleness):,}",
    ]


def _range(sizes: Sequence[float]) -> str:
    low, high = human_bytes(round(min(sizes))), human_bytes(round(max(sizes)))
    return high if low == high else f"{low} to {high}"
