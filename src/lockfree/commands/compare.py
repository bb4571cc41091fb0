"""`lockfree compare`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockfree.commands.shared import command_line, conclude, finished, known_rule
from lockfree.console import progress
from lockfree.experiment import Experiment, Settings, entry, load_once, write_report
from lockfree.run import Run


@dataclass(frozen=True, kw_only=True)
class Compare(Settings):
    """Train the same network by several rules, and write a table and a report.

    Attributes:
        rules: Names of rules, with commas.
        out: Folder to make; each rule's run is a folder in it.
        resume: Go on with the comparison in --out.
        json: End with one JSON object on standard output.
    """

    rules: str = "backprop,dni,cdni,dfa"
    out: Path = Path("runs/compare")
    resume: bool = False
    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Trains by each rule in turn, writes the report, prints the table."""
        names = [name.strip() for name in self.rules.split(",") if name.strip()]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"--rules {self.rules!r}: give each rule once, with commas, such as backprop,dni")
        settings = {name: value for name, value in vars(self).items() if name not in ("rules", "out", "resume", "json")}
        for name in names:
            known_rule(name)
        experiments = [Experiment(rule=name, **settings) for name in names]
        if not self.resume:
            Run.refuse_taken(self.out)
        load_once(self.data, self.device)  # refuses what is misspelt or missing before anything is written
        for experiment in experiments:
            experiment.check_probes()  # so that none is refused when others have been trained
        whole = self._open({"rules": names, **settings})
        entries = []
        for experiment in experiments:
            folder = self.out / experiment.rule
            with progress(experiment.epochs, quiet=self.json, label=experiment.rule) as show:
                result = finished(folder, experiment.epochs) or experiment.run(
                    folder, resume=(folder / "config.json").exists(), sinks=[show]
                )
            entries.append(entry(experiment, result, Run.open(folder)))
        write_report(self.out / "report.html", f"{', '.join(names)} on {self.data}", entries, command_line(argv))
        results = [dict(one.result) for one in entries]
        whole.finish({"results": results})
        conclude(results, self.out, {"results": results} if self.json else None)

    def _open(self, config: dict[str, Any]) -> Run:
        if not self.resume:
            return Run.create(self.out, config)
        run = Run.open(self.out)
        for name, value in config.items():
            if json.dumps(run.config.get(name)) != json.dumps(value):
                raise ValueError(
                    f"{self.out} was started with {name}={run.config.get(name)}, not {value}: choose another --out"
                )
        return run
