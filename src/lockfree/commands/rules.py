"""`lockfree rules` and `lockfree cite`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from lockfree.console import print_table
from lockfree.rule import LOCKS, Place, locks
from lockfree.rules import RULES, get


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
