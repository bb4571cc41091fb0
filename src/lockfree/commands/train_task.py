"""`lockfree train --task`."""

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tyro

from lockfree.choose import choose
from lockfree.commands.shared import RunOptions, check_same, command_line, conclude, tensorboard
from lockfree.console import progress, short
from lockfree.experiment import RuleSettings
from lockfree.fields import parse_fields, written_fields
from lockfree.recurrent.convert import BOOTSTRAPS
from lockfree.recurrent.experiment import TOLD, TaskExperiment, TaskSettings, key_of
from lockfree.recurrent.tasks import TASKS, Task
from lockfree.report import Entry, Measure, write
from lockfree.run import Run


@dataclass(frozen=True, kw_only=True)
class TrainTask(RunOptions, TaskSettings):
    """Train a recurrent network on a task, with what stands for the gradient from beyond its horizon.

    Attributes:
        set: Hyperparameters of the bootstrap and of the task, as bootstrap.FIELD=VALUE and task.FIELD=VALUE.
    """

    set: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()

    @classmethod
    def of(cls, config: dict[str, Any], out: Path) -> "TrainTask":
        """Returns the command that a run folder was made by."""
        known = TaskExperiment.from_config(config).config()
        written = [
            *written_fields("bootstrap", known.pop("bootstrap_fields")),
            *written_fields("task", known.pop("task_fields")),
        ]
        return cls(**known, set=(tuple(written),) if written else (), out=out, resume=True)

    @staticmethod
    def refuse(arguments: Sequence[str]) -> None:
        """Refuses flags that only training by a rule has.

        Raises:
            ValueError: With the first of them.
        """
        mine = {one.name for one in fields(TrainTask)}
        others = {one.name for one in fields(RuleSettings)} - mine
        for argument in arguments:
            name = argument.removeprefix("--").removeprefix("no-").partition("=")[0].replace("-", "_")
            if argument.startswith("--") and name in others:
                instead = {"rule": "--bootstrap", "batch_size": "--batch", "model": "--core", "data": "--set task.FIELD=VALUE"}
                hint = f": give {instead[name]}" if name in instead else ""
                raise ValueError(f"--{name.replace('_', '-')} means nothing with --task{hint}")

    def run(self, argv: Sequence[str]) -> None:
        """Trains, writes the run folder, prints the result."""
        settings: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(TaskSettings)}
        experiment = TaskExperiment(**settings | self._fields())
        if self.resume:
            check_same(experiment.config(), self.out, free=("epochs",))
            if self.out is not None and "task" not in Run.open(self.out).config:
                raise ValueError(f"{self.out} holds a run that is not of a task: leave --task out, or choose another --out")
        task = experiment.make_task()
        with progress(experiment.epochs, quiet=self.json, told=lambda values: _told(task, values)) as show:
            result = experiment.run(self.out, resume=self.resume, sinks=[show, *tensorboard(self.tensorboard, self.out)])
        if self.out is not None:
            shown = entry(experiment, result, Run.open(self.out))
            write(self.out / "report.html", experiment.title, [shown], command=command_line(argv), notes=[_NOTE])
        conclude(
            [result],
            self.out,
            result if self.json else None,
            heads=("bootstrap", _tested(task, result).replace("_", " ")),
            judged=lambda one: _written(task, one[_tested(task, one)]),
        )

    def _fields(self) -> dict[str, Any]:
        kinds = {
            "bootstrap": (choose(BOOTSTRAPS, self.bootstrap, "bootstrap"), f"bootstrap {self.bootstrap!r}", ()),
            "task": (choose(TASKS, self.task, "task"), f"task {self.task!r}", TOLD),
        }
        found: dict[str, list[str]] = {prefix: [] for prefix in kinds}
        for assignment in itertools.chain(*self.set):
            prefix, dot, _ = assignment.partition("=")[0].partition(".")
            if not dot or prefix not in kinds:
                raise ValueError(f"--set {assignment!r}: write bootstrap.FIELD=VALUE or task.FIELD=VALUE")
            found[prefix].append(assignment)
        return {
            f"{prefix}_fields": parse_fields(kind, found[prefix], prefix=prefix, of=of, given=given)
            for prefix, (kind, of, given) in kinds.items()
        }


def entry(experiment: TaskExperiment, result: dict[str, Any], run: Run) -> Entry:
    """Collects what the report shows of one run."""
    task, history = experiment.make_task(), run.metrics()
    key = key_of(task.measure)
    measure = None
    if key == "accuracy":  # the report knows that by itself
        history = [line | {"val_accuracy": line[key]} if line["kind"] == "epoch" else line for line in history]
    else:
        measure = Measure(key=_tested(task, result), curve=key, label=task.measure, larger_is_better=task.larger_is_better)
        # The measure says what they say: a language model's is its loss, and an accuracy is that of the level reached.
        result = {name: value for name, value in result.items() if name not in ("test_loss", "test_accuracy")}
    if experiment.data == experiment.task:
        result = {name: value for name, value in result.items() if name != "data"}
    reference = (inspect.getdoc(BOOTSTRAPS[experiment.bootstrap]) or "").partition("Reference:\n")[2]
    return Entry(
        rule=experiment.bootstrap,
        title=experiment.means,
        result=result,
        history=history,
        measure=measure,
        citation=" ".join(reference.split()),
    )


def _told(task: Task, values: dict[str, Any]) -> str:
    return f" bits, {task.measure} {_written(task, values[key_of(task.measure)])}"


def _tested(task: Task, result: Mapping[str, Any]) -> str:
    """Returns the name of the measure in a result: that of the test part, where it is apart."""
    key = key_of(task.measure)
    return f"test_{key}" if f"test_{key}" in result else key


def _written(task: Task, value: float) -> str:
    if task.measure == "accuracy":
        return f"{100 * value:.2f} %"
    return f"{value:g}" if value.is_integer() else short(value)


_NOTE = "Losses of the task are in bits per position asked; those of training are from before each stretch was learnt."
