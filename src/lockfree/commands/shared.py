"""What commands have in common."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockfree.choose import unknown
from lockfree.console import human_bytes, print_table
from lockfree.rules import RULES
from lockfree.run import Run


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


def conclude(results: Sequence[dict[str, Any]], out: Path | None, whole: dict[str, Any] | None) -> None:
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


def names_in(written: str) -> list[str]:
    """Reads names with commas."""
    return [name.strip() for name in written.split(",") if name.strip()]
