"""A trial of a rule whose layers are looked at, too."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lockfree.choose import choose
from lockfree.probes import GradientQuality, ImpliedLoss, Probe, Representation
from lockfree.recipes.rule_trial import RuleTrial
from lockfree.recipes.trial import Point
from lockfree.run import Run

Record = Mapping[str, Any]
"""What a probe has seen at one time."""


class Measure(NamedTuple):
    """A figure for each layer, or for each two neighbours.

    Attributes:
        probe: The name of the probe that sees it.
        read: Takes the figures out of what the probe has seen; by block, ``None`` where there is no figure.
        ends: How many layers, from the top, have none.
    """

    probe: str
    read: Callable[[Record], list[float | None]]
    ends: int = 0


def _of_synthesisers(record: Record) -> list[float | None]:
    by_block = dict(zip(record["block"], record["correlation"], strict=True))
    return [by_block.get(block) for block in range(max(by_block) + 1)]


MEASURES: dict[str, Measure] = {
    # The block under the loss has the truth at hand.
    "cosine": Measure("gradient-quality", lambda seen: seen["cosine"][:-1], 1),
    "neighbours": Measure("representation", lambda seen: [row[i + 1] for i, row in enumerate(seen["cka"][:-1])], 1),
    "classes": Measure("representation", lambda seen: seen["class_cka"]),
    "readout": Measure("representation", lambda seen: [100 * value for value in seen["probe_accuracy"]]),
    "implied": Measure("implied-loss", _of_synthesisers, 1),
}
"""Figures by layer: cosine of the credit with the true gradient, linear CKA with the layer above and with the classes, accuracy of a
linear probe in per cent, correlation of implied and true loss."""

_PROBES: dict[str, Callable[[], Probe]] = {
    "gradient-quality": GradientQuality,
    "representation": lambda: Representation(pictured=60),
    "implied-loss": ImpliedLoss,
}


@dataclass(frozen=True, kw_only=True)
class LayerTrial(RuleTrial):
    """A network of which figures of each layer are shown besides, in panels of their own.

    Attributes:
        measures: One of `MEASURES` by the panel that shows it: against the layer's number, from 1 at the bottom.
        averaged: Whether a figure is the mean over looks after every epoch, not that of the last.
    """

    measures: Mapping[str, str] = field(default_factory=dict)
    averaged: bool = False

    def __post_init__(self) -> None:
        for measure in self.measures.values():
            choose(MEASURES, measure, "measure")

    @property
    def probes(self) -> list[Probe]:
        """Those that see the measures."""
        return [_PROBES[name]() for name in dict.fromkeys(MEASURES[measure].probe for measure in self.measures.values())]

    @property
    def points(self) -> list[Point]:
        """Where the error stands, and every layer in the panels of the measures."""
        layers = [
            Point(panel, layer)
            for panel, measure in self.measures.items()
            for layer in range(1, self.layers + 1 - MEASURES[measure].ends)
        ]
        return super().points + layers

    def reading(self, result: Mapping[str, Any], point: Point) -> float | None:
        """Returns the test error, or a layer's figure, if it has one."""
        if point.panel not in self.measures:
            return super().reading(result, point)
        figures = result["layers"][self.measures[point.panel]]
        return figures[int(point.x) - 1] if point.x <= len(figures) else None

    def train(self, run: Run, device: str, *, resume: bool) -> dict[str, Any]:
        """Trains; what comes out has the figures by measure, ``layers``, and what the probes saw last, ``seen``, besides."""
        result = super().train(run, device, resume=resume)
        records: dict[str, list[Record]] = {}
        for line in run.metrics("probe"):
            records.setdefault(line["probe"], []).append(line)
        found = {}
        for measure in self.measures.values():
            seen = records[MEASURES[measure].probe]
            looks = [MEASURES[measure].read(one) for one in (seen[1:] if self.averaged else seen[-1:])]
            found[measure] = [_mean(values) for values in zip(*looks, strict=True)]
        return result | {"layers": found, "seen": {name: seen[-1] for name, seen in records.items()}}


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
