"""`lockfree train`."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from lockfree import rules
from lockfree.commands.shared import RunOptions, check_same, command_line, conclude, known_rule, tensorboard
from lockfree.console import progress
from lockfree.experiment import Experiment, RuleSettings, entry, write_report
from lockfree.fields import parse_fields, written_fields
from lockfree.launch import launch
from lockfree.processes import first
from lockfree.run import Run


@dataclass(frozen=True, kw_only=True)
class Train(RunOptions, RuleSettings):
    """Train one network by one rule; with --task, a recurrent one (see lockfree train --task TASK --help).

    Attributes:
        set: Hyperparameters of the rule, as rule.FIELD=VALUE.
    """

    set: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()

    @classmethod
    def of(cls, config: dict[str, Any], out: Path) -> "Train":
        """Returns the command that a run folder was made by."""
        known = Experiment.from_config(config).config()
        fields = known.pop("fields")
        return cls(
            **known,
            set=(written_fields("rule", fields),) if fields else (),
            out=out,
            resume=True,
        )

    def run(self, argv: Sequence[str]) -> None:
        """Trains, writes the run folder, prints the result."""
        known_rule(self.rule)
        settings = {name: value for name, value in vars(self).items() if name not in _NOT_SETTINGS}
        experiment = Experiment(**settings, fields=self._fields())
        if self.resume:
            check_same(experiment.config(), self.out, free=("epochs", "processes"))
        if experiment.processes > 1 and "RANK" not in os.environ:
            raise SystemExit(launch(argv, experiment.processes))
        with progress(experiment.epochs, quiet=self.json) as show:
            result = experiment.run(self.out, resume=self.resume, sinks=[show, *tensorboard(self.tensorboard, self.out)])
        if not first():
            return
        if self.out is not None:
            title = experiment.title
            write_report(self.out / "report.html", title, [entry(experiment, result, Run.open(self.out))], command_line(argv))
        conclude([result], self.out, result if self.json else None)

    def _fields(self) -> dict[str, Any]:
        rule = type(rules.get(self.rule))
        return parse_fields(rule, list(itertools.chain(*self.set)), prefix="rule", of=f"rule {self.rule!r}")


_NOT_SETTINGS = ("set", "out", "resume", "tensorboard", "json")
