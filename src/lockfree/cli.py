"""The command line: `lockfree train`, `compare`, `advise`, `rules`, `cite`, `data`, `bench`, `replay`, `reproduce`, `simulate`."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import tyro
from torch.nn import functional as F

from lockfree import data, recipes
from lockfree.advise import advise, parse_memory
from lockfree.advise.own_model import make_model
from lockfree.bench import BENCHMARKS
from lockfree.choose import choose, unknown
from lockfree.console import candidates, download, human_bytes, print_table, progress, short, trials
from lockfree.executors import ProcessLost
from lockfree.experiment import (
    OPTIMIZERS,
    Experiment,
    RuleSettings,
    Settings,
    check_device,
    entry,
    load_once,
    parse_fields,
    write_report,
)
from lockfree.launch import LOST, end_with_launcher, launch, launched
from lockfree.processes import first
from lockfree.recipes.findings import rows as finding_rows
from lockfree.rule import LOCKS, Place, locks
from lockfree.rules import RULES, get
from lockfree.run import Run
from lockfree.simulate.command import Simulate
from lockfree.sinks import TensorBoard
from lockfree.trace import read


@runtime_checkable
class Command(Protocol):
    """One command, its arguments parsed."""

    def run(self, argv: Sequence[str]) -> None:
        """Does it; raises ValueError or OSError for what the user can mend."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; the process's own if left out.

    Returns:
        The exit code: 0 done, 2 bad usage or bad input, 3 a process was lost, 130 interrupted (a checkpoint has been written).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = _commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(commands))
        return 0 if arguments else 2
    if launched():
        end_with_launcher()
    try:
        command = _parse(arguments[0], choose(commands, arguments[0], "command"), arguments[1:])
        command.run(arguments)
    except BrokenPipeError:  # whoever read our output has gone
        return 0
    except (ValueError, OSError, ImportError, TypeError) as error:
        print(f"lockfree {arguments[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ProcessLost as error:
        if not launched():  # else whoever has launched this process says which one has died
            print(f"lockfree {arguments[0]}: {error}{_how_to_go_on(arguments)}", file=sys.stderr)
        return LOST
    except KeyboardInterrupt:
        hint = _how_to_go_on(arguments)
        print(f"interrupted{hint}", file=sys.stderr)
        return 130
    except SystemExit as done:  # --help
        return int(done.code or 0)
    return 0


def _how_to_go_on(arguments: Sequence[str]) -> str:
    if arguments[0] == "reproduce":
        return "; checkpoints were written, go on with the same command"
    return "; a checkpoint was written, go on with the same command and --resume" if _out(arguments) else ""


def _commands() -> dict[str, type[Command]]:
    return {
        "train": Train,
        "compare": Compare,
        "advise": Advise,
        "rules": Rules,
        "cite": Cite,
        "data": Data,
        "bench": Bench,
        "replay": Replay,
        "reproduce": Reproduce,
        "simulate": Simulate,
    }


def _usage(commands: dict[str, type[Command]]) -> str:
    lines = [f"  {name:11s}{(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items()]
    return "usage: lockfree COMMAND [--help]\n\nTrain neural networks without the locks of backpropagation.\n\n" + "\n".join(
        lines
    )


def _parse(name: str, command: type[Command], arguments: Sequence[str]) -> Command:
    """Parses a command's arguments; tyro's framed complaint becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(command, prog=f"lockfree {name}", args=list(arguments), default=_defaults(command, arguments))
    except SystemExit as done:
        if not done.code:
            raise
        raise ValueError(f"{_first_words(said.getvalue())} (see lockfree {name} --help)") from None


def _first_words(framed: str) -> str:
    """Returns what a framed message says, on one line."""
    words = [line.strip(" │┃") for line in framed.splitlines() if not set(line) & set("─━")]
    told = " ".join(itertools.takewhile(lambda line: not line.startswith(("For full helptext", "Argument helptext")), words))
    return re.sub(r"\s+", " ", told).strip() or "bad usage"


def _defaults(command: type[Command], arguments: Sequence[str]) -> Any:
    """With --resume, what is left out means what the run was started with, not the command's defaults."""
    folder = _out(arguments)
    if command is Train and "--resume" in arguments and folder is not None:
        return Train.of(Run.open(folder).config, folder)
    return tyro.MISSING_NONPROP


def _out(arguments: Sequence[str]) -> Path | None:
    """Returns what --out names, written in either way."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == "--out" and following is not None:
            return Path(following)
        if argument.startswith("--out="):
            return Path(argument.removeprefix("--out="))
    return None


# ---- commands ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Train(RuleSettings):
    """Train one network by one rule.

    Attributes:
        set: Hyperparameters of the rule, as rule.FIELD=VALUE.
        out: Run folder to make.
        resume: Go on with the run in --out.
        tensorboard: Write TensorBoard scalars into the run folder, too.
        json: End with one JSON object on standard output.
    """

    set: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    out: Path | None = None
    resume: bool = False
    tensorboard: bool = False
    json: bool = False

    @classmethod
    def of(cls, config: dict[str, Any], out: Path) -> "Train":
        """Returns the command that a run folder was made by."""
        known = Experiment.from_config(config).config()
        fields = known.pop("fields")
        return cls(
            **known,
            set=(tuple(f"rule.{name}={_written(value)}" for name, value in fields.items()),) if fields else (),
            out=out,
            resume=True,
        )

    def run(self, argv: Sequence[str]) -> None:
        """Trains, writes the run folder, prints the result."""
        _known_rule(self.rule)
        settings = {name: value for name, value in vars(self).items() if name not in _NOT_SETTINGS}
        experiment = Experiment(**settings, fields=parse_fields(self.rule, list(itertools.chain(*self.set))))
        if self.resume:
            self._check_same(experiment)
        if experiment.processes > 1 and "RANK" not in os.environ:
            raise SystemExit(launch(argv, experiment.processes))
        with progress(experiment.epochs, quiet=self.json) as show:
            result = experiment.run(self.out, resume=self.resume, sinks=[show, *self._tensorboard()])
        if not first():
            return
        if self.out is not None:
            title = f"{experiment.rule} on {experiment.data}"
            write_report(self.out / "report.html", title, [entry(experiment, result, Run.open(self.out))], _command(argv))
        _conclude([result], self.out, result if self.json else None)

    def _check_same(self, experiment: Any) -> None:
        if self.out is None:
            raise ValueError("--resume needs the folder of the run: give --out")
        before = Run.open(self.out).config
        for name, value in experiment.config().items():
            if name not in ("epochs", "processes") and json.dumps(before.get(name, value)) != json.dumps(
                value
            ):  # an older run lacks newer settings
                raise ValueError(
                    f"{self.out} was started with {name}={before.get(name)}, not {value}: leave it out, or choose another --out"
                )

    def _tensorboard(self) -> list[Any]:
        if not self.tensorboard:
            return []
        if self.out is None:
            raise ValueError("--tensorboard writes into the run folder: give --out")
        return [TensorBoard(self.out / "tensorboard")]


_NOT_SETTINGS = ("set", "out", "resume", "tensorboard", "json")


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
            _known_rule(name)
        experiments = [Experiment(rule=name, **settings) for name in names]
        if not self.resume:
            Run.refuse_taken(self.out)
        load_once(self.data, self.device)  # refuses what is misspelt or missing before anything is written
        whole = self._open({"rules": names, **settings})
        entries = []
        for experiment in experiments:
            folder = self.out / experiment.rule
            with progress(experiment.epochs, quiet=self.json, label=experiment.rule) as show:
                result = _finished(folder, experiment.epochs) or experiment.run(
                    folder, resume=(folder / "config.json").exists(), sinks=[show]
                )
            entries.append(entry(experiment, result, Run.open(folder)))
        write_report(self.out / "report.html", f"{', '.join(names)} on {self.data}", entries, _command(argv))
        results = [dict(one.result) for one in entries]
        whole.finish({"results": results})
        _conclude(results, self.out, {"results": results} if self.json else None)

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


@dataclass(frozen=True, kw_only=True)
class Advise:
    """Measure what could replace backprop for a model of your own, and say whether anything should.

    Attributes:
        model: Your model, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION: a function that returns it, given nothing or
            (input_shape, classes); or one of the package's: mlp, cnn, lenet, vgg8b, resnet20, vit.
        memory: What training may take, such as 2GB or 512MiB; no limit if left out.
        data: Data set; `lockfree data list` lists them. One in five of its training samples, 5,000 at most, is held out to score on.
        rules: Names of rules to measure beside backprop and checkpoint, with commas; all of them if left out.
        blocks: Where to cut: auto (the children, and other cuts where that is deep or memory is tight), children, a number of
            blocks, or names of modules to begin at, with commas.
        batch_size: Samples in a step, 1 or more.
        optimizer: adam, or sgd (with momentum 0.9).
        learning_rate: Of the blocks' optimizer, above 0.
        seconds: About how long all of it may take.
        steps: How many steps to train each rule for instead, however long that takes.
        seed: Decides initial weights, what is held out, the order of the data and dropout.
        device: Where to measure: cpu, cuda, cuda:1, ...
        json: Print one JSON object.
    """

    model: tyro.conf.Positional[str]
    memory: str | None = None
    data: str = "fashion-mnist"
    rules: str | None = None
    blocks: str = "auto"
    batch_size: int = 256
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    seconds: float = 150.0
    steps: int | None = None
    seed: int = 0
    device: str = "cpu"
    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Measures, and prints the advice."""
        rules = None if self.rules is None else _names(self.rules)
        for name in rules or ():
            _known_rule(name)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: give a number above 0")
        make = choose(OPTIMIZERS, self.optimizer, "optimizer")
        memory = None if self.memory is None else parse_memory(self.memory)
        check_device(self.device)
        dataset = load_once(self.data, self.device)
        torch.manual_seed(self.seed)
        model = make_model(self.model, dataset.input_shape, len(dataset.classes)).to(self.device)
        with candidates(quiet=self.json) as show:
            advice = advise(
                model,
                *dataset.train,
                F.cross_entropy,
                optimizer=lambda parameters: make(parameters, lr=self.learning_rate),
                memory=memory,
                rules=rules,
                blocks=_blocks(self.blocks),
                batch_size=self.batch_size,
                seconds=self.seconds,
                steps=self.steps,
                seed=self.seed,
                progress=show,
            )
        if self.json:
            print(json.dumps({"model": self.model, "data": self.data, "device": self.device} | advice.to_dict()))
            return
        print(advice)


def _blocks(written: str) -> str | int | list[str] | None:
    """Reads where to cut."""
    if written in ("auto", "children"):
        return None if written == "children" else written
    return int(written) if written.isdecimal() else _names(written)


def _names(written: str) -> list[str]:
    return [name.strip() for name in written.split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """List the rules: what a block needs, and which locks that leaves.

    Args:
        json: Print one JSON object instead of a table.
    """

    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Prints the list."""
        rows: list[dict[str, Any]] = []
        for name in RULES:
            rule = get(name)
            needs = rule.needs(Place(0, 3))
            held = locks([rule.needs(Place(index, 3)) for index in range(3)])
            rows.append(
                {
                    "rule": name,
                    "title": rule.title,
                    "needs": needs.name,
                    "locks": sorted(held, key=LOCKS.index),
                    "what": rule.card.summary,
                }
            )
        if self.json:
            print(json.dumps({"rules": rows}))
            return
        print_table(
            ["rule", "a block needs", "locks kept", "where the credit comes from"],
            [[row["rule"], row["needs"].lower(), ", ".join(row["locks"]), row["what"]] for row in rows],
        )


@dataclass(frozen=True, kw_only=True)
class Cite:
    """Print the reference of a rule, with a BibTeX entry.

    Args:
        rule: Command-line name of the rule.
    """

    rule: tyro.conf.Positional[str]

    def run(self, argv: Sequence[str]) -> None:
        """Prints the reference."""
        card = get(self.rule).card
        print(f"{card.reference}\n\n{card.bibtex}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """List the data sets, or fetch one from its official place.

    Args:
        action: list or fetch.
        name: Data set to fetch.
        root: Data folder; LOCKFREE_DATA or a per-user cache if left out.
        json: Print one JSON object.
    """

    action: tyro.conf.Positional[Literal["list", "fetch"]]
    name: tyro.conf.Positional[str | None] = None
    root: Path | None = None
    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Prints the list, or fetches."""
        if self.action == "fetch":
            if self.name is None:
                raise ValueError(f"which set? lockfree data fetch NAME, NAME one of {', '.join(data.names())}")
            if self.name not in data.names():
                raise unknown("data set", self.name, data.names())
            with download() as show:
                where = data.fetch(self.name, root=self.root, progress=show)
            print(json.dumps({"name": self.name, "path": str(where)}) if self.json else f"{self.name} is in {where}")
            return
        lines = data.available(self.root)
        if self.json:
            print(json.dumps({"data": [line._asdict() for line in lines]}))
            return
        print_table(
            ["name", "status", "training", "test", "licence", "where"],
            [[line.name, line.status, f"{line.n_train:,}", f"{line.n_test:,}", line.licence, line.where] for line in lines],
        )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed or memory, as ratios of things measured in turn on this machine.

    Args:
        name: Which benchmark: step, synthetic, hsic, memory, depth or pipeline.
        json: Print one JSON object.
    """

    name: tyro.conf.Positional[str]
    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Measures and prints."""
        found = choose(BENCHMARKS, self.name, "benchmark")()
        if self.json:
            print(json.dumps(found))
            return
        print_table(["what", "value"], [[name, short(value)] for name, value in found.items()])


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Repeat a paper's experiment and print its numbers beside ours; the same command goes on where it stopped.

    Args:
        name: Which experiment: dni-table1, dni-sparse-updates, dni-unlocked, dni-noise, sobolev-critics, hsic-unformatted,
            hsic-format, hsic-sigma, hsic-resnet, hsic-depth, dc-asgd-cifar, dc-asgd-sweep or stragglers.
        budget: smoke (a minute), small (tens of minutes on 2 cores) or full (the paper's own).
        out: Folder for results.json, plot.png and the trials; runs/NAME-BUDGET if left out.
        workers: Trials that run at a time, each in one thread; one for each core if left out.
        device: Where to train: cpu, cuda, ...
        json: End with one JSON object on standard output.
    """

    name: tyro.conf.Positional[str]
    budget: Literal["smoke", "small", "full"] = "small"
    out: Path | None = None
    workers: int | None = None
    device: str = "cpu"
    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Runs what has not been run, writes results and plot, prints the table."""
        recipe = choose(recipes.RECIPES, self.name, "recipe")(self.budget)
        out = self.out or Path("runs") / f"{self.name}-{self.budget}"
        workers = (os.cpu_count() or 1) if self.workers is None else self.workers
        if workers < 1:
            raise ValueError(f"--workers {workers}: give 1 or more")
        check_device(self.device)
        for name in dict.fromkeys(trial.data for trial in recipe.trials):
            load_once(name, "cpu")  # refuses what is missing before anything is written
        folder = recipe.open(out)
        with trials(len(recipe.trials), quiet=self.json, label=self.name) as told:
            results = recipes.run(recipe, out, workers=min(workers, len(recipe.trials)), device=self.device, told=told)
        summary = recipe.write(out, results)
        folder.finish({"entries": summary["entries"]})
        if self.json:
            print(json.dumps(summary | {"out": str(out)}))
            return
        print_table(*recipe.rows(summary))
        if summary["findings"]:
            print_table(*finding_rows(summary["findings"]))
        ours = f"test error in per cent, mean ± standard deviation over seeds; {recipe.scope}"
        print(ours + (f"\nin brackets the paper's: {recipe.source}" if recipe.paper else ""))
        print(f"{recipe.reference}\nresults: {out / 'results.json'}, plot: {out / 'plot.png'}")


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Repeat a run of several processes in one, and say whether the weights are the same, bit for bit.

    Args:
        trace: The run's folder, or the trace.jsonl in it.
        json: Print one JSON object.
    """

    trace: tyro.conf.Positional[Path]
    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Replays; the exit code is 1 if weights differ."""
        lines = read(self.trace)
        folder = self.trace if self.trace.is_dir() else self.trace.parent
        experiment = Experiment.from_config(Run.open(folder).config | {"executor": "sequential", "processes": 1})
        torch.set_num_threads(lines[0]["threads"])
        found = experiment.replay(lines)
        if self.json:
            print(json.dumps({**dataclasses.asdict(found), "identical": found.identical}))
        elif found.identical:
            print(
                f"{found.steps} steps of {found.processes} processes, repeated in one: all weights are the same, bit for bit, at each "
                f"of {len(found.compared)} places"
            )
        elif not found.compared:
            print("the trace tells of no weights: nothing could be compared")
        else:
            cell, step = min(found.differing.items(), key=lambda pair: (pair[1], pair[0]))
            print(f"the weights differ: first those of cell {cell}, after {step} steps")
        if not found.identical:
            raise SystemExit(1)


# ---- what commands share -----------------------------------------------------------------------------------------------------


def _known_rule(name: str) -> None:
    if name not in RULES:
        raise unknown("rule", name, RULES)


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _command(argv: Sequence[str]) -> str:
    return shlex.join(["lockfree", *argv])


def _finished(folder: Path, epochs: int) -> dict[str, Any] | None:
    """Returns the result of a run that was finished before, if there is one."""
    if not (folder / "config.json").exists():
        return None
    result = Run.open(folder).result
    return result if result and result["epochs"] >= epochs else None


def _conclude(results: Sequence[dict[str, Any]], out: Path | None, whole: dict[str, Any] | None) -> None:
    """Prints the table and where the report is, or the whole as one JSON object."""
    if whole is not None:
        print(json.dumps(whole | ({"out": str(out)} if out else {})))
        return
    rows = [
        [
            result["rule"],
            f"{100 * result['test_accuracy']:.2f} %"
            if result["test_accuracy"] is not None
            else f"loss {result['test_loss']:.4f}",
            f"{result['seconds']:.1f}",
            f"{result['samples_per_second']:,.0f}",
            human_bytes(result["peak_activation_bytes"]),
            ", ".join(result["locks"]) or "none",
        ]
        for result in results
    ]
    print_table(["rule", "test accuracy", "seconds", "samples/s", "peak activations", "locks kept"], rows)
    if out is not None:
        print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
