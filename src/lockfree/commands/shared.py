"""What commands have in common."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockfree.choose import unknown
from lockfree.console import human_bytes, print_table
from lockfree.rules import RULES
from lockfree.run import Run
from lockfree.sinks import TensorBoard
from lockfree.trainer import Sink


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a training run is kept, and what is said of it.

    Attributes:
        out: Run folder to make.
        resume: Go on with the run in --out.
        tensorboard: Write TensorBoard scalars into the run folder, too.
        json: End with one JSON object on standard output.
    """

    out: Path | None = None
    resume: bool = False
    tensorboard: bool = False
    json: bool = False


def known_rule(name: str) -> None:
    """Refuses a rule that there is not.

    Raises:
        ValueError: With the nearest name.
    """
    if name not in RULES:
        raise unknown("rule", name, RULES)


def command_line(argv: Sequence[str]) -> str:
    """Returns what to type to do it again."""
    return shlex.join(["lockfree", *argv])


def finished(folder: Path, epochs: int) -> dict[str, Any] | None:
    """Returns the result of a run that was finished before, if there is one."""
    if not (folder / "config.json").exists():
        return None
    result = Run.open(folder).result
    return result if result and result["epochs"] >= epochs else None


def check_same(settings: Mapping[str, Any], out: Path | None, *, free: Sequence[str]) -> None:
    """Refuses to go on with a run that was started with other settings.

    Args:
        settings: What it would go on with.
        out: Its folder.
        free: Settings that may change.

    Raises:
        ValueError: With the first that differs, or if there is no folder.
    """
    if out is None:
        raise ValueError("--resume needs the folder of the run: give --out")
    before = Run.open(out).config
    for name, value in settings.items():
        same = json.dumps(before.get(name, value), sort_keys=True) == json.dumps(value, sort_keys=True)
        if name not in free and not same:  # an older run lacks newer settings
            raise ValueError(
                f"{out} was started with {name}={before.get(name)}, not {value}: leave it out, or choose another --out"
            )


def tensorboard(wanted: bool, out: Path | None) -> list[Sink]:
    """Returns the sink that --tensorboard asks for, if it does.

    Raises:
        ValueError: If there is no folder to write to.
    """
    if not wanted:
        return []
    if out is None:
        raise ValueError("--tensorboard writes into the run folder: give --out")
    return [TensorBoard(out / "tensorboard")]


def _accuracy(result: Mapping[str, Any]) -> str:
    accuracy = result["test_accuracy"]
    return f"{100 * accuracy:.2f} %" if accuracy is not None else f"loss {result['test_loss']:.4f}"


def conclude(
    results: Sequence[dict[str, Any]],
    out: Path | None,
    whole: dict[str, Any] | None,
    *,
    heads: tuple[str, str] = ("rule", "test accuracy"),
    judged: Callable[[Mapping[str, Any]], str] = _accuracy,
) -> None:
    """Prints the table and where the report is, or the whole as one JSON object.

    Args:
        results: What came out, a row each.
        out: The run folder, if there is one.
        whole: What is printed in place of the table.
        heads: Of the first two columns: what ``rule`` of a result is called, and what it is judged by.
        judged: Writes what a result is judged by.
    """
    if whole is not None:
        print(json.dumps(whole | ({"out": str(out)} if out else {})))
        return
    rows = [
        [
            result["rule"],
            judged(result),
            f"{result['seconds']:.1f}",
            f"{result['samples_per_second']:,.0f}",
            human_bytes(result["peak_activation_bytes"]),
            ", ".join(result["locks"]) or "none",
        ]
        for result in results
    ]
    print_table([*heads, "seconds", "samples/s", "peak activations", "locks kept"], rows)
    if out is not None:
        print(f"report: {out / 'report.html'}")


def names_in(written: str) -> list[str]:
    """Reads names with commas."""
    return [name.strip() for name in written.split(",") if name.strip()]
