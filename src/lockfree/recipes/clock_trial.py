"""A trial of two recurrent networks that count digits on different clocks."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lockfree.choose import choose
from lockfree.data import Dataset
from lockfree.experiment import load_once
from lockfree.objective import Diverged
from lockfree.recipes.trial import Point, Trial
from lockfree.recurrent.clocks import TwoClocks
from lockfree.recurrent.cores import Encoded
from lockfree.recurrent.couplings import Coupled, Coupling, Decoupled, Severed
from lockfree.recurrent.synthetic import SyntheticGradient
from lockfree.recurrent.tasks.counting import HELD_OUT, Counted, Counting
from lockfree.run import Run

PANELS = ("A: odd digits", "B: threes")
"""What the networks count: a panel each; a line of the curve holds an error of each, in this order."""


@dataclass(frozen=True, kw_only=True)
class ClockTrial(Trial):
    """How the two networks are coupled and for how long they learn; equal trials give equal numbers.

    A is an encoder of fully connected layers (BatchNorm, ReLU) and an LSTM; its message is affine and normalised; B is an LSTM. All are
    of the same width. Trials of one seed begin with the same weights and see the same images.

    Attributes:
        x: ``None``: errors of both networks, a panel each, at several numbers of steps.
        coupling: coupled, decoupled or severed.
        period: T, 2 or more; a stretch is T² steps.
        units: Width.
        hidden_layers: Of the encoder.
        batch_size: Sequences side by side.
        stretches: How many are learnt.
        readings: How often along training there are errors, a divisor of ``stretches``.
        evaluated: Sequences they are of.
        learning_rate: Of both networks' Adam.
        scale: How much of the synthetic gradient A is given.
        synthesiser_rate: Of the synthesiser's Adam, whose one hidden layer is as wide as the rest.
    """

    coupling: str
    period: int = 5
    units: int = 64
    hidden_layers: int = 2
    batch_size: int = 32
    stretches: int = 1
    readings: int = 1
    evaluated: int = 512
    learning_rate: float = 1e-3
    scale: float = 1.0
    synthesiser_rate: float = 1e-3

    @property
    def every(self) -> int:
        """Stretches from reading to reading."""
        return self.stretches // self.readings

    @property
    def steps(self) -> list[int]:
        """Steps of the image streams at which there are errors."""
        return [number * self.every * self.period**2 for number in range(1, self.readings + 1)]

    @property
    def points(self) -> Sequence[Point]:
        """Either network at all those steps."""
        return [Point(panel, steps) for panel in PANELS for steps in self.steps]

    def reading(self, result: Mapping[str, Any], point: Point) -> float:
        """Returns the error of a network in per cent after so many steps; of training that broke, the last one."""
        known = [line for line in result["curve"] if line[0] <= point.x]
        return known[-1][1 + PANELS.index(point.panel)]

    def told(self, result: Mapping[str, Any]) -> str:
        """Says the errors of both."""
        return "errors {1:.2f} % and {2:.2f} %".format(*result["curve"][-1])

    def coupled(self) -> Coupling:
        """Makes the coupling."""
        synthetic = SyntheticGradient(
            scale=self.scale, reads="state", hidden_layers=1, hidden_units=self.units, learning_rate=self.synthesiser_rate
        )
        known = {"coupled": Coupled(), "decoupled": Decoupled(bootstrap=synthetic), "severed": Severed()}
        return choose(known, self.coupling, "coupling")

    def learner(self, dataset: Dataset) -> TwoClocks:
        """Makes the networks."""
        torch.manual_seed(self.seed)
        into, units, layers = dataset.train.inputs[0].numel(), self.units, list[nn.Module]()
        for _ in range(self.hidden_layers):
            layers += [nn.Linear(into, units), nn.BatchNorm1d(units), nn.ReLU()]
            into = units
        device = dataset.train.inputs.device
        return TwoClocks(
            a=Encoded(nn.Sequential(nn.Flatten(), *layers), nn.LSTM(into, units)).to(device),
            a_readout=nn.Linear(units, self.period + 1).to(device),
            message=nn.Sequential(nn.Linear(units, units), nn.BatchNorm1d(units)).to(device),
            b=nn.LSTM(units, units).to(device),
            b_readout=nn.Linear(units, self.period**2 + 1).to(device),
            horizon=self.period,
            coupling=self.coupled(),
            loss=F.cross_entropy,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=self.learning_rate, fused=True),
        )

    def train(self, run: Run, device: str, *, resume: bool) -> dict[str, Any]:
        """Trains, or goes on from the last reading, and returns errors in per cent, updates and seconds.

        Training that breaks with a value that is not finite counts with the weights that it broke at.
        """
        dataset = self.part(load_once(self.data, device))
        learner = self.learner(dataset)
        task = Counting(period=self.period, batch=self.batch_size, seed=self.seed, data=self.data)
        held_out = task.draw(dataset.test, HELD_OUT, self.evaluated)
        first, diverged, spent = 0, None, 0.0
        found = run.load_checkpoint() if resume else None
        if found is not None:
            first, kept = found
            spent = kept["seconds"]
            learner.load_state_dict(kept["learner"])
        run.rewind(first if found is not None else -1)
        started = time.perf_counter()
        if found is None:
            self._read(run, learner, held_out, 0)
        try:
            for number in range(first, self.stretches):
                counted = task.draw(dataset.train, number, self.batch_size)
                learner.step(counted.images, counted.odd, counted.threes[self.period - 1 :: self.period])
                if (number + 1) % self.every == 0:
                    self._read(run, learner, held_out, number + 1)
                    seconds = spent + time.perf_counter() - started
                    run.save_checkpoint(number + 1, {"learner": learner.state_dict(), "seconds": seconds})
        except Diverged as error:  # a result like others: this method does not train these networks at this rate
            diverged = str(error)
        seen = self._errors(learner, task.draw(dataset.train, HELD_OUT, self.evaluated))
        lines = run.metrics("reading")
        return {
            "test_error": self._errors(learner, held_out)[1],
            "train_error": seen[1],
            "curve": [[line["step"] * self.period**2, *line["errors"]] for line in lines],
            "updates": list(learner.updates),
            "seconds": spent + time.perf_counter() - started,
            "diverged": diverged,
        }

    def _read(self, run: Run, learner: TwoClocks, asked: Counted, step: int) -> None:
        run.log("reading", step=step, errors=self._errors(learner, asked))

    def _errors(self, learner: TwoClocks, asked: Counted) -> list[float]:
        """Returns the share of counts of A and of B that are wrong, in per cent."""
        fast, slow = learner.predict(asked.images)
        task = Counting(period=self.period, data=self.data)
        figures = task.figures(fast, slow.repeat_interleave(self.period, dim=0), asked)
        return [100 * (1 - figures["accuracy_odd"]), 100 * (1 - figures["accuracy_threes"])]
