"""A trial whose network is recurrent and is trained on a task, chunk by chunk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lockfree.recipes.trial import Point, Trial
from lockfree.recurrent.experiment import TaskExperiment
from lockfree.run import Run


@dataclass(frozen=True, kw_only=True)
class RecurrentTrial(Trial):
    """What one run of a recurrent network learns, and by what; equal trials give equal numbers.

    Attributes:
        x: Point on the horizontal axis; ``None``: a measure after each epoch, against epochs.
        data: The task's name, or that of what it takes its sequences from.
        settings: Those of a `TaskExperiment` but seed and device, as JSON values.
        measure: The figure that is shown, as the result calls it, such as ``"length_solved"`` or ``"test_bits_per_character"``.
        curve: A panel that shows it after each epoch besides, where it has an x.

    Raises:
        ValueError: If a setting is misspelt or out of range, or the data are not the task's.

    Example:
        >>> trial = RecurrentTrial(panel="copy", series="DNI", x=3, seed=0, data="copy", measure="length_solved",
        ...                        settings={"task": "copy", "horizon": 3, "bootstrap": "dni"})
        >>> trial.name
        'copy-dni-3-seed-0'
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    measure: str
    curve: str | None = None

    def __post_init__(self) -> None:
        experiment = self.experiment()
        if self.data not in (experiment.task, experiment.data):
            raise ValueError(f"data={self.data!r}: the task {experiment.task} takes its sequences from {experiment.data!r}")

    def experiment(self, device: str = "cpu") -> TaskExperiment:
        """Makes the experiment that it runs.

        Args:
            device: Where to train.
        """
        settings: dict[str, Any] = {**self.settings, "seed": self.seed, "device": device}
        return TaskExperiment(**settings)

    @property
    def points(self) -> list[Point]:
        """A horizon, a length, ..., and all epochs in the panel of curves."""
        end = [] if self.x is None else [Point(self.panel, self.x)]
        if self._curve is None:
            return end
        return end + [Point(self._curve, epoch) for epoch in range(1, self.experiment().epochs + 1)]

    @property
    def _curve(self) -> str | None:
        """The panel of curves, if there is one."""
        return self.panel if self.x is None else self.curve

    def reading(self, result: Mapping[str, Any], point: Point) -> float:
        """Returns the measure at the end, or after an epoch; that of the last one where training broke before it."""
        if point.panel != self._curve:
            return result[self.measure]
        return result["curve"][min(int(point.x), len(result["curve"])) - 1]

    def told(self, result: Mapping[str, Any]) -> str:
        """Says the measure in the end."""
        return f"{self.measure.replace('_', ' ')} {result[self.measure]:.4g}"

    def load(self) -> None:
        """Draws the task's first stretch."""
        self.experiment().make_task().stretch(0)

    def train(self, run: Run, device: str, *, resume: bool) -> dict[str, Any]:
        """Trains, or goes on from the last checkpoint; returns the experiment's result, and the measure's ``curve`` by epoch.

        Training that breaks with a value that is not finite counts with the weights that it broke at.
        """
        result = self.experiment(device).train(run, resume=resume, tolerant=True)
        curve = [line[self.measure] for line in run.metrics("epoch") if self.measure in line]
        # Broken training has no epoch more: it stays where it broke.
        broken = [result[self.measure]] if result["diverged"] is not None else []
        return result | {"curve": curve + broken}
