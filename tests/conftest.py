"""What every test runs under: shapes checked, no GPU assumed.

The mathematics is in the test modules, the problems with exact answers in problems.py.
"""

import os
from collections.abc import Iterator

import jaxtyping
import pytest

# `make test` checks every annotation at every call; it has to be asked for before
# artlib is imported. A plain `pytest` sees the library as a user does.
if os.environ.get("ARTLIB_TYPECHECK") == "1":
    jaxtyping.install_import_hook("artlib", "_typecheck.checked")

import torch

try:
    from simulated_device import simulated_device
except ImportError:  # a torch without what the simulation rests on
    simulated_device = None


@pytest.fixture
def as_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the run-time type checks, so that the library's own refusals are seen."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def accelerator() -> Iterator[torch.device]:
    """A GPU; where there is none, one that is simulated."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    if simulated_device is None:
        pytest.skip("no GPU, and this torch cannot simulate one")
    with simulated_device() as device:
        yield device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Test refusals as a user meets them."""
    for item in items:
        if "refused" in item.name:
            item.fixturenames.append("as_a_user")
