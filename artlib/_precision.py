"""Full single precision where nearly equal numbers are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """While it lasts, no TensorFloat-32, neither in convolutions nor in products.

    From the A100 on, convolutions round their inputs to 10 bits by default. Samples
    hardly suffer; but an adaptive solver that is asked for 1e-6 takes the rounding for
    an error and shrinks its steps, and a difference of nearly equal velocities is
    mostly rounding. So reference solutions, |Q| and distances to a reference are
    computed without it. The settings of before return at the end; on other devices
    nothing changes.
    """
    with ExitStack() as after:
        for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
            after.callback(_set, backend, _set(backend, False))
        yield


def _set(backend: Any, allow: bool | None) -> bool | None:
    """Allow TF32 or not; returns whether it was, or None where it is left as it is."""
    try:
        before = bool(backend.allow_tf32)
    except RuntimeError:  # the caller uses torch's newer switches, which exclude these
        return None
    if allow is not None:
        backend.allow_tf32 = allow
    return before
