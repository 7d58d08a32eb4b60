"""Full single precision where nearly equal numbers are compared; wide enough sums."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_lock = threading.Lock()
_inside = 0
_before: list[tuple[Any, bool]] = []


@contextmanager
def full_precision() -> Iterator[None]:
    """While it lasts, no TensorFloat-32, neither in convolutions nor in products.

    From the A100 on, convolutions round their inputs to 10 bits by default. Samples
    hardly suffer; but an adaptive solver that is asked for 1e-6 takes the rounding for
    an error and shrinks its steps, and a difference of nearly equal velocities is
    mostly rounding. So reference solutions, |Q| and distances to a reference are
    computed without it. The settings of before return at the end; on other devices
    nothing changes.

    torch's switches are the whole process's: while any thread is inside, no thread
    computes in TensorFloat-32. The first one in turns it off, the last one out puts the
    settings back.
    """
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            _before[:] = _turn_off()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for backend, allowed in _before:
                    backend.allow_tf32 = allowed


def _turn_off() -> list[tuple[Any, bool]]:
    """Forbid TF32; returns what was allowed where."""
    found = []
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    for backend in backends:
        try:
            found.append((backend, bool(backend.allow_tf32)))
        except RuntimeError:  # the caller uses torch's newer switches; leave them
            continue
        backend.allow_tf32 = False
    return found


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """float32 for everything below it: the dtype to sum in, and of a network's time."""
    return dtype if dtype == torch.float64 else torch.float32


def holds_double(device: torch.device) -> bool:
    """Whether a device has float64; Apple's GPUs have not."""
    if device.type in ("cpu", "cuda", "meta"):
        return True
    if device.type == "mps":
        return False
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


def as_double(x: Tensor, name: str) -> Tensor:
    """States in float64, for what is defined in it.

    Raises:
        TypeError: If their device has none.
    """
    if not holds_double(x.device):
        raise TypeError(
            f"{name}: it is on {x.device}, which has no float64, and reference paths "
            f"are integrated in float64; move {name} and the network to the CPU, and "
            "sample on the device with the schedule that comes out"
        )
    return x.double()
