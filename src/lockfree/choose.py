"""Picking one of several things by name, with a helpful answer to a misspelt one."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def unknown(what: str, name: object, names: Iterable[str]) -> ValueError:
    """Makes the error for a name that does not exist; it gives the nearest one and the whole list.

    Example:
        >>> str(unknown("rule", "dnl", ["backprop", "dni"]))
        "unknown rule 'dnl': did you mean 'dni'? Choose from backprop, dni"
    """
    names = list(names)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {what} {name!r}: {hint}{'Choose' if hint else 'choose'} from {', '.join(names)}")


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """Returns ``table[name]``.

    Raises:
        ValueError: If there is no such name.
    """
    if name not in table:
        raise unknown(what, name, table)
    return table[name]
