"""`lockfree data`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lockfree import data
from lockfree.choose import unknown
from lockfree.console import download, print_table


@dataclass(frozen=True, kw_only=True)
class Data:
    """List the data sets and texts, or fetch one from its official place.

    Args:
        action: list or fetch.
        name: Data set or text to fetch.
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
            known = (*data.names(), *data.text_names())
            if self.name is None:
                raise ValueError(f"which set? lockfree data fetch NAME, NAME one of {', '.join(known)}")
            if self.name not in known:
                raise unknown("data set", self.name, known)
            with download() as show:
                where = data.fetch(self.name, root=self.root, progress=show)
            print(json.dumps({"name": self.name, "path": str(where)}) if self.json else f"{self.name} is in {where}")
            return
        lines, texts = data.available(self.root), data.available_texts(self.root)
        if self.json:
            print(json.dumps({"data": [line._asdict() for line in lines], "texts": [text._asdict() for text in texts]}))
            return
        print_table(
            ["name", "status", "training", "test", "licence", "where"],
            [[line.name, line.status, f"{line.n_train:,}", f"{line.n_test:,}", line.licence, line.where] for line in lines],
        )
        print_table(
            ["text", "status", "bytes", "licence", "where"],
            [[text.name, text.status, _size(text.size), text.licence, text.where] for text in texts],
        )


def _size(size: int | None) -> str:
    return "?" if size is None else f"{size:,}"
