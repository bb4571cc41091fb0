"""What the command line shows: tables, progress, units."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; on a pipe, without colours and folding."""
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width of its own: rows must not be folded there.
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def human_bytes(count: int | None) -> str:
    """Writes a number of bytes for people."""
    if count is None:
        return "-"
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def short(value: Any) -> str:
    """Writes a number with three decimals, anything else as it is."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _accuracy(values: dict[str, Any]) -> str:
    accuracy = values.get("val_accuracy")
    return f", accuracy {100 * accuracy:.2f} %" if accuracy is not None else ""


@contextlib.contextmanager
def progress(
    epochs: int, *, quiet: bool, label: str = "training", told: Callable[[dict[str, Any]], str] = _accuracy
) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Shows training: a bar on a terminal, a line an epoch when piped, nothing on standard output with --json.

    Args:
        epochs: How many there will be.
        quiet: Whether standard output is left to --json.
        label: What is going on.
        told: Writes what an epoch's line says after its loss.
    """
    stream = sys.stderr if quiet else sys.stdout
    if not stream.isatty():

        def line(kind: str, values: dict[str, Any]) -> None:
            if kind == "epoch":
                loss = short(values["train_loss"])
                print(f"{label}: epoch {values['epoch']}/{epochs}, loss {loss}{told(values)}", file=stream, flush=True)

        yield line
        return
    with _counting(stream) as bar:
        task = bar.add_task(label, total=epochs, now="")

        def advance(kind: str, values: dict[str, Any]) -> None:
            if kind == "epoch":
                bar.update(task, completed=values["epoch"])
            elif values["step"] % 10 == 0:
                bar.update(task, now=f"step {values['step']}, loss {values['loss']:.3f}")

        yield advance


@contextlib.contextmanager
def download() -> Iterator[Callable[[str, int, int | None], None]]:
    """Shows a bar for each file on its way."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    bar = Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=Console(file=sys.stderr))
    tasks: dict[str, Any] = {}

    def show(name: str, so_far: int, total: int | None) -> None:
        if name not in tasks:
            bar.start()  # not before there is something to show: an empty bar leaves an empty line
            tasks[name] = bar.add_task(name, total=total)
        bar.update(tasks[name], completed=so_far)

    try:
        yield show
    finally:
        if tasks:
            bar.stop()


@contextlib.contextmanager
def trials(count: int, *, quiet: bool, label: str) -> Iterator[Callable[[Any, dict[str, Any]], None]]:
    """Shows the trials of a recipe as they end: a bar on a terminal, a line each when piped, standard output left to --json."""
    stream = sys.stderr if quiet else sys.stdout
    if not stream.isatty():
        done = itertools.count(1)

        def line(trial: Any, result: dict[str, Any]) -> None:
            print(f"{next(done)}/{count} {_told(trial, result)}", file=stream, flush=True)

        yield line
        return
    with _counting(stream) as bar:
        task = bar.add_task(label, total=count, now="")
        yield lambda trial, result: bar.update(task, advance=1, now=_told(trial, result))


@contextlib.contextmanager
def candidates(*, quiet: bool) -> Iterator[Callable[[str, int, int, str], None]]:
    """Shows what an advice is measuring: a bar on a terminal, a line each when piped, standard output left to --json."""
    stream = sys.stderr if quiet else sys.stdout
    if not stream.isatty():
        yield lambda stage, number, count, name: print(f"{stage} {number}/{count}: {name}", file=stream, flush=True)
        return
    with _counting(stream) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, number: int, count: int, name: str) -> None:
            for other, task in tasks.items():
                if other != stage:  # what was begun before is done
                    bar.update(task, completed=bar.tasks[task].total, now="")
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=count, now="")
            bar.update(tasks[stage], completed=number - 1, total=count, now=name)

        yield show
        for task in tasks.values():
            bar.update(task, completed=bar.tasks[task].total, now="")


def _counting(stream: TextIO) -> "Progress":
    """Makes a bar whose tasks count up, each with the time it took, the time it still needs, and a word of what is ``now``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    return Progress(*columns, console=Console(file=stream))


def _told(trial: Any, result: dict[str, Any]) -> str:
    place = "" if trial.x is None else f" {trial.x:g},"
    what = f"{trial.panel}, {trial.series},{place} seed {trial.seed}"
    return f"{what}: {trial.told(result)} ({result['seconds']:.0f} s)"
