"""Hyperparameters as text: `--set` assignments for the fields of a dataclass, each value by the field's type."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lockfree.choose import choose, unknown

T = TypeVar("T")


def parse_fields(
    settings: type, assignments: Sequence[str], *, prefix: str, of: str, given: Sequence[str] = ()
) -> dict[str, Any]:
    """Reads ``PREFIX.FIELD=VALUE`` assignments for a dataclass; one in a field that is a dataclass itself is ``PREFIX.FIELD.FIELD=VALUE``.

    Args:
        settings: The dataclass.
        assignments: As the command line has them.
        prefix: What they begin with.
        of: What messages call it, such as "rule 'dni'".
        given: Fields that are told in another way, and are not known here.

    Returns:
        Values by name; those of a field that is a dataclass as another such mapping.

    Raises:
        ValueError: If an assignment has another form, there is no such field, or the value is of another type.

    Example:
        >>> import lockfree as lf
        >>> parse_fields(lf.rules.SyntheticGradients, ["rule.hidden_layers=2", "rule.borders=0,2"], prefix="rule", of="dni")
        {'hidden_layers': 2, 'borders': (0, 2)}
    """
    parsed: dict[str, Any] = {}
    for assignment in assignments:
        left, equals, value = assignment.partition("=")
        path = left.removeprefix(f"{prefix}.")
        if not equals or path == left:
            names = ", ".join(_fields(settings, given)) or "none: it has no fields"
            raise ValueError(f"--set {assignment!r}: write {prefix}.FIELD=VALUE, FIELD one of {names}")
        *above, name = path.split(".")
        kind, inner, known = settings, parsed, _fields(settings, given)
        for step in above:
            kind = _known(known, step, of)
            if not dataclasses.is_dataclass(kind):
                raise ValueError(f"--set {assignment!r}: {step} has no fields of its own")
            inner, known = inner.setdefault(step, {}), _fields(kind, ())
        asked = _known(known, name, of)
        try:
            inner[name] = _parse(value, asked)
        except (ValueError, TypeError):
            raise ValueError(f"--set {assignment!r}: {name} is {_describe(asked)}, not {value!r}") from None
    return parsed


def written_fields(prefix: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Writes fields as the assignments that `parse_fields` reads.

    Example:
        >>> written_fields("rule", {"borders": (0, 2), "inner": {"seed": 1}})
        ('rule.borders=0,2', 'rule.inner.seed=1')
    """
    found: list[str] = []
    for name, value in values.items():
        here = f"{prefix}.{name}"
        if isinstance(value, Mapping):
            found += written_fields(here, value)
        else:
            found.append(f"{here}={','.join(map(str, value)) if isinstance(value, tuple | list) else value}")
    return tuple(found)


def build(settings: type[T], values: Mapping[str, Any]) -> T:
    """Makes a dataclass of what `parse_fields` returned, or of the same read from JSON, which has lists for tuples.

    Example:
        >>> import lockfree as lf
        >>> build(lf.rules.SyntheticGradients, {"borders": [0, 2]}).borders
        (0, 2)

    Raises:
        ValueError: If there is no such field, or a value is out of range.
    """
    kinds = _fields(settings, ())
    made: dict[str, Any] = {}
    for name, value in values.items():
        kind = _known(kinds, name, settings.__name__)
        nested = isinstance(value, Mapping) and dataclasses.is_dataclass(kind)
        made[name] = build(kind, value) if nested else tuple(value) if isinstance(value, list) else value
    return settings(**made)


def _fields(settings: type, without: Sequence[str]) -> dict[str, Any]:
    """The types of the fields that can be given, by name."""
    hints = typing.get_type_hints(settings)
    return {one.name: hints[one.name] for one in dataclasses.fields(settings) if one.init and one.name not in without}


def _known(fields: Mapping[str, Any], name: str, of: str) -> Any:
    if name not in fields:
        raise unknown(f"field of {of}", name, fields or ["(it has none)"])
    return fields[name]


def _parse(text: str, kind: Any) -> Any:
    """Reads a value as a bool, int, float, str, one of several words, tuple of them (with commas), or None where the type allows it."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if types.NoneType in options and text.lower() == "none":
        return None
    *others, kind = sorted((option for option in options if option is not types.NoneType), key=_is_tuple)
    if others and not (_is_tuple(kind) and "," in text):  # one, or several with commas
        kind = others[0]
    if kind is bool:
        return choose({"true": True, "1": True, "false": False, "0": False}, text.lower(), "truth value")
    if typing.get_origin(kind) is typing.Literal:
        return choose({str(word): word for word in typing.get_args(kind)}, text, "word")
    if _is_tuple(kind):
        return tuple(typing.get_args(kind)[0](part) for part in text.split(",") if part)
    return kind(text)


def _is_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) else str(kind)
