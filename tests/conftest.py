"""What every test runs under: shapes checked, no GPU assumed.

The mathematics is in the test modules, the problems with exact answers in problems.py.
"""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

# `make test` checks every annotation, see _typecheck.py; it has to be asked for before
# artlib is imported. A plain `pytest` sees the library as a user does.
TYPECHECK = os.environ.get("ARTLIB_TYPECHECK") == "1"
if TYPECHECK:
    import _typecheck

    _typecheck.install()

try:
    from simulated_device import simulated_device
except ImportError:  # a GPU, or a torch without what the simulation rests on
    simulated_device = None


def pytest_runtest_setup() -> None:
    if TYPECHECK:
        _typecheck.start_over()


@pytest.fixture
def as_a_user() -> Iterator[None]:
    """Without the run-time type checks, so that the library's own refusals are seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def simulated() -> Iterator[torch.device]:
    """A simulated accelerator, where that is possible."""
    if simulated_device is None:
        pytest.skip("there is a GPU, or this torch cannot simulate one")
    with simulated_device() as device:
        yield device


@pytest.fixture
def accelerator(request: pytest.FixtureRequest) -> torch.device:
    """A GPU; where there is none, one that is simulated."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    device: torch.device = request.getfixturevalue("simulated")
    return device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Test refusals as a user meets them."""
    for item in items:
        if "refused" in item.name:
            item.fixturenames.append("as_a_user")
