"""A model by name, or the user's own from a file or an installed module."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from torch import nn

from lockfree import models

_HOW = "a function that returns the model, given nothing or (input_shape, classes)"


def make_model(name: str, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Makes a model; its weights are drawn from torch's global generator.

    Args:
        name: One of `lockfree.models.names()`, or where a function is that returns a model, given nothing or (input_shape,
            classes): ``path/to/file.py:function`` or ``package.module:function``.
        input_shape: (channels, height, width) of a sample.
        classes: How many there are.

    Raises:
        ValueError: If there is no such model, or the user's code does not give one.

    Example:
        >>> len(make_model("mlp", (1, 8, 8), 10))
        4
    """
    where, colon, function = name.rpartition(":")
    if name.endswith(".py"):
        _refuse(name, f"name the function in it, {name}:FUNCTION, {_HOW}")
    if not colon:
        return models.build(name, input_shape=input_shape, classes=classes)
    with _importable(Path(where).parent if where.endswith(".py") else Path.cwd()):
        make = _function(_imported(where, name), function, name)
        arguments = _arguments(make, input_shape, classes, name)
        try:
            made = make(*arguments)
        except Exception as error:  # whatever the user's code raises
            raise ValueError(f"{name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        _refuse(name, f"it returned a {type(made).__name__}; give {_HOW}")
    return made


def _refuse(name: str, why: str) -> NoReturn:
    raise ValueError(f"{name}: {why}")


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Lets the user's code import what lies beside it, as a script may."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def _imported(where: str, name: str) -> ModuleType:
    try:
        return _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"lockfree_model_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _function(module: ModuleType, function: str, name: str) -> Callable[..., Any]:
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and value.__module__ == module.__name__]
        _refuse(name, f"there is no function {function!r} in it; it has {', '.join(known) or 'none'}")
    return found


def _arguments(make: Callable[..., Any], input_shape: tuple[int, int, int], classes: int, name: str) -> tuple[Any, ...]:
    """Returns what a function is to be called with, by the arguments that it cannot do without."""
    taken = inspect.signature(make).parameters.values()
    wanted = [one for one in taken if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    if len(wanted) not in (0, 2) or any(one.kind is one.KEYWORD_ONLY for one in wanted):
        _refuse(name, f"it takes ({', '.join(one.name for one in wanted)}); give {_HOW}")
    return (input_shape, classes) if wanted else ()
