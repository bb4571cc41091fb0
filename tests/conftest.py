"""Shapes in signatures are checked while the tests run; torch stays on one thread, since tests run side by side.

Large products of cases are thinned out: ``@pytest.mark.thinned(k)`` leaves every k-th case of a test fast and marks the others slow. With k
prime to the number of values of the innermost parameter, every value of each of the others keeps meeting all values of it in turn.
"""

import itertools

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

# Before anything imports the package: what is imported inside is checked by beartype from then on.
install_import_hook("lockfree", "beartype.beartype").__enter__()
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before cases are left out by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for _, cases in itertools.groupby(items, key=lambda item: item.nodeid.partition("[")[0]):
        for number, case in enumerate(cases):
            thinned = case.get_closest_marker("thinned")
            if thinned is not None and number % thinned.args[0]:
                case.add_marker("slow")


@pytest.fixture
def unchecked(monkeypatch):
    """Lets arguments of the wrong type through to the library's own checks, as they come outside of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
