"""One training run of a recipe, whatever trains it."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lockfree.data import Dataset, Split
from lockfree.experiment import load_once
from lockfree.run import Run


class Point(NamedTuple):
    """A point of a recipe's plot, a row of its table.

    Attributes:
        panel: Part of the table and plot.
        x: Point on the horizontal axis.
    """

    panel: str
    x: float | int


@dataclass(frozen=True, kw_only=True)
class Trial(ABC):
    """What one run trains on, by what, and for how long; equal trials give equal numbers.

    Attributes:
        panel: Part of the recipe's table and plot that it belongs to.
        series: Method, as the table calls it.
        x: Point on the horizontal axis; ``None``: it has something to show at several.
        seed: Decides whatever is drawn at random.
        data: Data set.
        samples: Training images to use, from the first; ``None`` for all.
        held_out: Training images, the last, that are kept back and tested on in place of the test set; for choosing settings.
    """

    panel: str
    series: str
    x: float | int | None
    seed: int
    data: str
    samples: int | None = None
    held_out: int = 0

    @property
    def name(self) -> str:
        """A name that no other trial of the recipe has and that a folder may have."""
        place = "" if self.x is None else f" {self.x:g}"
        words = f"{self.panel} {self.series}{place} seed {self.seed}".lower()
        return "".join(c if c.isalnum() or c in ".-" else "-" for c in words)

    @property
    @abstractmethod
    def points(self) -> Sequence[Point]:
        """Where it has something to show."""

    @abstractmethod
    def reading(self, result: Mapping[str, Any], point: Point) -> float | None:
        """Returns the figure that a result holds for one of the `points`: a test error in per cent, or what the recipe shows.

        ``None``: the method has none there.
        """

    def told(self, result: Mapping[str, Any]) -> str:
        """Says in a few words what came out."""
        return f"error {result['test_error']:.2f} %"

    def load(self) -> None:
        """Loads what it is trained on, so that what is missing is known before anything is written.

        Raises:
            ValueError: If it is not there.
        """
        load_once(self.data, "cpu")

    @abstractmethod
    def train(self, run: Run, device: str, *, resume: bool) -> dict[str, Any]:
        """Trains.

        Args:
            run: Its run folder.
            device: Where to train.
            resume: Whether the folder is that of a run that was stopped.

        Returns:
            JSON values: at least ``seconds``, and what `reading` and `told` read.

        Raises:
            KeyboardInterrupt: If it was stopped; the same call may follow.
        """

    def run(self, folder: Path, device: str = "cpu") -> dict[str, Any]:
        """Trains, unless that has been done, and returns what came out.

        Args:
            folder: Run folder of the trial.
            device: Where to train.

        Raises:
            ValueError: If the folder holds a trial with other settings.
        """
        settings = json.loads(json.dumps(asdict(self)))
        resume = (folder / "config.json").exists()
        run = Run.open(folder) if resume else Run.create(folder, settings)
        for name, value in settings.items():
            if run.config.get(name) != value:
                raise ValueError(
                    f"{folder} holds a trial with {name}={run.config.get(name)}, not {value}: choose another --out, or delete it"
                )
        if run.result is not None:
            return run.result
        result = self.train(run, device, resume=resume)
        run.finish(result)
        return result

    def part(self, dataset: Dataset) -> Dataset:
        """Returns the part of a data set that it is trained and tested on."""
        dataset = held_out(dataset, self.held_out) if self.held_out else dataset
        return replace(dataset, train=Split(*(part[: self.samples] for part in dataset.train)))


def as_pixels(dataset: Dataset) -> Dataset:
    """Returns a data set with images from 0 to 1 in each channel, undoing its standardisation."""
    darkest = dataset.train.inputs.amin((0, 2, 3), keepdim=True)
    range_ = (dataset.train.inputs.amax((0, 2, 3), keepdim=True) - darkest).clamp_min(1e-12)
    train, test = (Split((split.inputs - darkest) / range_, split.targets) for split in (dataset.train, dataset.test))
    return replace(dataset, train=train, test=test)


def held_out(dataset: Dataset, count: int) -> Dataset:
    """Returns a data set whose test images are the last so many of the training images, which are no longer trained on."""
    train, test = (Split(*(part[which] for part in dataset.train)) for which in (slice(-count), slice(-count, None)))
    return replace(dataset, train=train, test=test)
