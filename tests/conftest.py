"""What every test runs under: shapes checked, no CUDA assumed.

The mathematics is in the test modules, the problems with exact answers in problems.py.
"""

import os

import jaxtyping
import pytest

# `make test` checks every annotation at every call; it has to be asked for before
# artlib is imported. A plain `pytest` sees the library as a user does.
if os.environ.get("ARTLIB_TYPECHECK") == "1":
    jaxtyping.install_import_hook("artlib", "_typecheck.checked")

import torch


@pytest.fixture
def as_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the run-time type checks, so that the library's own refusals are seen."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none; test refusals as a user meets them."""
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(skip)
        if "refused" in item.name:
            item.fixturenames.append("as_a_user")
