"""A trial whose network is trained by many workers, in the simulator."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree import models
from lockfree.choose import choose
from lockfree.data import Split
from lockfree.experiment import load_once
from lockfree.objective import Diverged
from lockfree.recipes.trial import Point, Trial
from lockfree.rng import undisturbed
from lockfree.run import Run
from lockfree.server import Entry, Gamma, Simulator, Straggler, train
from lockfree.server.core import trained
from lockfree.server.tickets import Tickets
from lockfree.staleness import CORRECTIONS, Correction, consistency_from

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": lambda shape, classes: models.mlp(shape, classes, hidden=(64, 64, 64), batch_norm=False),
    "cnn": lambda shape, classes: models.pooled_cnn(shape, classes, channels=(8, 16)),
    "resnet20": models.resnet20,
}
"""Networks by name: 64-64-64-10 without normalisation, two small normalised convolutions, ResNet-20."""


@dataclass(frozen=True, kw_only=True)
class ServerTrial(Trial):
    """What many workers train, how they wait, and what repairs their gradients. Plain SGD; equal trials give equal numbers.

    Whatever the method, as many samples are seen: behind a barrier of M workers there are M times fewer updates.

    A trial that was stopped begins anew: going on with fresh batches, as a server does, would be another run.

    Attributes:
        x: Number of workers, or the like; ``None``: test errors at simulated times.
        network: One of `NETWORKS`.
        workers: M, 1 or more.
        consistency: When a worker may go on, as on the command line: bsp, ssp:3, asp.
        correction: Command-line name of what repairs late gradients.
        fields: Its hyperparameters.
        memory_per_worker: Whether the correction remembers each worker apart.
        augment: Whether training images are padded by 4 pixels, cropped and mirrored at random, as is usual for CIFAR-10.
        batch_size: Samples of a worker's batch.
        epochs: How often each training image is seen.
        learning_rate: Of plain SGD.
        drops: Parts of the updates, 0 to 1, after which the learning rate is divided by ten.
        shape: k of the gamma distribution of the time of a batch, whose mean is one second.
        slower: How many times as long the first worker takes.
        times: Simulated seconds at which there are test errors to show, where x is ``None``.
        readings: How often along training there is a test error, at equal numbers of updates; ``0``: at the end alone.
    """

    network: str = "mlp"
    workers: int = 1
    consistency: str = "asp"
    correction: str = "none"
    fields: dict[str, Any] = field(default_factory=dict)
    memory_per_worker: bool = False
    augment: bool = False
    batch_size: int = 32
    epochs: int = 1
    learning_rate: float = 0.1
    drops: tuple[float, ...] = (0.5, 0.75)
    shape: float = 16.0
    slower: float = 1.0
    times: tuple[float, ...] = ()
    readings: int = 0

    @property
    def points(self) -> Sequence[Point]:
        """A number of workers, or all times that are shown."""
        return [Point(self.panel, x) for x in (self.times if self.x is None else [self.x])]

    def reading(self, result: Mapping[str, Any], point: Point) -> float:
        """Returns the test error at the end, or the last one that was known at a simulated time."""
        if self.x is not None:
            return result["test_error"]
        return [error for when, error in result["curve"] if when <= point.x][-1]

    def model(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Makes the network; trials of one seed begin with the same weights."""
        torch.manual_seed(self.seed)
        return choose(NETWORKS, self.network, "network")(shape, classes)

    def updates(self, samples: int) -> int:
        """Returns how many updates show each of so many samples ``epochs`` times; the last round may be cut off."""
        batches = self.epochs * Tickets(seed=self.seed, length=samples, batch_size=self.batch_size).per_epoch
        return max(1, batches // self.workers) if consistency_from(self.consistency).barrier else batches

    def repair(self) -> Correction:
        """Makes the correction."""
        return choose(CORRECTIONS, self.correction, "correction")(**self.fields)

    def train(self, run: Run, device: str, *, resume: bool) -> dict[str, Any]:
        """Trains and returns errors in per cent, delays, and seconds, of the wall and simulated.

        Training that breaks with a value that is not finite counts with the weights that it began with.
        """
        if resume:
            run.rewind(-1)
        dataset = self.part(load_once(self.data, device))
        model = self.model(dataset.input_shape, len(dataset.classes)).to(device)
        updates = self.updates(len(dataset.train.targets))
        spy = _Spy(model, run, dataset.test)
        history: list[Entry] = []
        started, diverged = time.perf_counter(), None
        try:
            train(
                model,
                Augmented(dataset.train) if self.augment else tuple(dataset.train),
                loss=F.cross_entropy,
                optimizer=lambda weights: torch.optim.SGD(weights, lr=self.learning_rate),
                schedule=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(
                    optimizer, [round(part * updates) for part in self.drops], gamma=0.1
                ),
                workers=self.workers,
                batch_size=self.batch_size,
                updates=updates,
                consistency=consistency_from(self.consistency),
                correction=self.repair(),
                memory_per_worker=self.memory_per_worker,
                engine=Simulator(
                    speeds=Gamma(shape=self.shape),
                    stragglers=[Straggler(worker=0, factor=self.slower)] if self.slower != 1 else [],
                ),
                seed=self.seed,
                fingerprints=updates,
                progress=history.append,
                watch=spy if self.readings else None,
                watch_every=max(1, updates // (self.readings or 1)),
            )
        except Diverged as error:  # a result like others: this method does not train this network at this rate
            diverged = str(error)
        result: dict[str, Any] = {
            "test_error": error_of(model, dataset.test),
            "train_error": error_of(model, Split(*(part[:10_000] for part in dataset.train))),
            "updates": history[-1].update if history else 0,
            "delay": sum(one.delay for one in history) / max(1, len(history)),
            "simulated_seconds": history[-1].time if history else 0.0,
            "seconds": time.perf_counter() - started,
            "diverged": diverged,
        }
        if self.readings:
            ends = {
                one.update: one.time for one in history
            }  # behind a barrier a version is there with the last push of its round
            result["curve"] = [[ends.get(line["step"], 0.0), line["test_error"]] for line in run.metrics("reading")]
        return result


class Augmented(torch.utils.data.Dataset):
    """Images that are padded by zeros, cropped to their size and mirrored at random, anew each time. A worker seeds what is drawn.

    Args:
        split: Images and targets.
        padding: Pixels on each side.
    """

    def __init__(self, split: Split, *, padding: int = 4) -> None:
        self._split, self._padding = split, padding

    def __len__(self) -> int:
        return len(self._split.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self._split.inputs[index], self._split.targets[index]
        height, width = image.shape[1:]
        down, right = torch.randint(2 * self._padding + 1, (2,)).tolist()
        mirrored = torch.rand(()) < 0.5
        cropped = F.pad(image, [self._padding] * 4)[:, down : down + height, right : right + width]
        return (cropped.flip(2) if mirrored else cropped), target


class _Spy:
    """Logs test errors along training, on a model of its own."""

    def __init__(self, model: nn.Module, run: Run, split: Split) -> None:
        self._model, self._run, self._split = copy.deepcopy(model), run, split

    def __call__(self, version: int, weights: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](trained(self._model)), list(weights))
            for buffer, value in zip(self._model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        self._run.log("reading", step=version, test_error=error_of(self._model, self._split))


def error_of(model: nn.Module, split: Split) -> float:
    """Returns the error of a classifier in per cent."""
    with undisturbed(model), torch.no_grad():
        model.eval()
        found = torch.cat([model(x).argmax(1) for x in split.inputs.split(1000)])
    return 100 * (found != split.targets).double().mean().item()
