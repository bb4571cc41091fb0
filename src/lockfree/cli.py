"""The command line: `lockfree train`, `compare`, `advise`, `rules`, `cite`, `data`, `bench`, `replay`, `reproduce`, `simulate`."""

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from lockfree.choose import choose
from lockfree.commands import COMMANDS, Command
from lockfree.commands.train import Train
from lockfree.commands.train_task import TrainTask
from lockfree.executors import ProcessLost
from lockfree.launch import LOST, begin_launched, launched
from lockfree.run import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; the process's own if left out.

    Returns:
        The exit code: 0 done, 2 bad usage or bad input, 3 a process was lost, 130 interrupted (a checkpoint has been written).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    try:
        if launched():
            begin_launched()
        command = _parse(*_named(arguments), arguments[1:])
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
    folder = _out(arguments)
    if folder is None:
        return ""
    if any(folder.rglob("checkpoints/*")):
        return "; a checkpoint was written, go on with the same command and --resume"
    return "; nothing has been learnt yet, start again with the same command"


def _usage() -> str:
    lines = [f"  {name:11s}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "usage: lockfree COMMAND [--help]\n\nTrain neural networks without the locks of backpropagation.\n\n" + "\n".join(
        lines
    )


def _named(arguments: Sequence[str]) -> tuple[str, type[Command]]:
    """Returns the command that is asked for, and its name; training on a task is one of its own."""
    name, folder = arguments[0], _out(arguments)
    command = choose(COMMANDS, name, "command")
    if command is not Train:
        return name, command
    asked = any(argument.partition("=")[0] == "--task" for argument in arguments)
    goes_on = "--resume" in arguments and folder is not None and "task" in Run.open(folder).config
    if not (asked or goes_on):
        return name, command
    TrainTask.refuse(arguments)
    return f"{name} --task TASK", TrainTask


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
    if issubclass(command, Train | TrainTask) and "--resume" in arguments and folder is not None:
        return command.of(Run.open(folder).config, folder)
    return tyro.MISSING_NONPROP


def _out(arguments: Sequence[str]) -> Path | None:
    """Returns what --out names, written in either way."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == "--out" and following is not None:
            return Path(following)
        if argument.startswith("--out="):
            return Path(argument.removeprefix("--out="))
    return None


if __name__ == "__main__":
    sys.exit(main())
