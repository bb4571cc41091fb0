"""Shapes in signatures are checked while the tests run; torch stays on one thread, since tests run side by side.

Large products of cases are thinned out: of a test with more than ``MANY`` cases about ``FAST`` stay in the fast suite, spread evenly,
and the others are slow (`make test-slow`). ``@pytest.mark.thinned(k)`` says how many to leave: every k-th, or a little fewer. The step
is prime to the number of cases, and so to the number of values of each parameter: every value of each meets all values of the others
in turn, and none is left out for good because there are now more rules.
"""

import itertools
import math

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

# Before anything imports the package: what is imported inside is checked by beartype from then on.
install_import_hook("lockfree", "beartype.beartype").__enter__()
torch.set_num_threads(1)

MANY, FAST = 12, 6


def step_of(cases: list[pytest.Item]) -> int:
    """Every which of these cases of one test stays fast: what the test says, or what leaves about ``FAST`` of many."""
    thinned = cases[0].get_closest_marker("thinned")
    few = 1 if len(cases) <= MANY else -(-len(cases) // FAST)
    least = few if thinned is None else thinned.args[0]
    return next(step for step in itertools.count(least) if math.gcd(step, len(cases)) == 1)


@pytest.hookimpl(tryfirst=True)  # before cases are left out by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for _, group in itertools.groupby(items, key=lambda item: item.nodeid.partition("[")[0]):
        cases = list(group)
        step = step_of(cases)
        for case in (case for number, case in enumerate(cases) if number % step):
            case.add_marker("slow")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuses to start where tests of one group would be dealt to several processes, each with a cluster of its own."""
    if getattr(session.config.option, "loadgroup", False):
        ungrouped = [item for item in session.items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid]
        assert not ungrouped, "this pytest and this pytest-xdist do not agree on groups of tests: see pyproject.toml"


@pytest.fixture
def unchecked(monkeypatch):
    """Lets arguments of the wrong type through to the library's own checks, as they come outside of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
