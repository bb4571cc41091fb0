"""Shapes in signatures are checked while the tests run; torch stays on one thread, since tests run side by side."""

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

# Before anything imports the package: what is imported inside is checked by beartype from then on.
install_import_hook("lockfree", "beartype.beartype").__enter__()
torch.set_num_threads(1)


@pytest.fixture
def unchecked(monkeypatch):
    """Lets arguments of the wrong type through to the library's own checks, as they come outside of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
