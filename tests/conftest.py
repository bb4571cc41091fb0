"""Shapes in signatures are checked while the tests run; torch stays on one thread, since tests run side by side.

Large products of cases are thinned out: of a test with more than ``MANY`` cases about ``FAST`` stay in the fast suite, spread evenly,
and the others are slow (`make test-slow`). ``@pytest.mark.thinned(k)`` says how many to leave: every k-th. A step that is prime to the
number of values of each parameter lets every value of each meet all values of the others in turn.
"""

import itertools

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

# Before anything imports the package: what is imported inside is checked by beartype from then on.
install_import_hook("lockfree", "beartype.beartype").__enter__()
torch.set_num_threads(1)

MANY, FAST = 12, 6


def step_of(cases: list[pytest.Item]) -> int:
    """Every which of these cases of one test stays fast: what the test says, or a prime that leaves about ``FAST`` of many."""
    thinned = cases[0].get_closest_marker("thinned")
    if thinned is not None:
        return thinned.args[0]
    if len(cases) <= MANY:
        return 1
    primes = (k for k in itertools.count(2) if all(k % divisor for divisor in range(2, k)))
    # Parameters' numbers of values divide the number of cases, so a prime that does not divide it is prime to them all.
    return next(k for k in primes if k * FAST >= len(cases) and len(cases) % k)


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
