"""What a `Schedule` checks: the ends of its range, arguments in it, its provenance."""

from __future__ import annotations

import json
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from . import _schedule_io
from ._types import TimeLike
from .processes import Process

LastStep: TypeAlias = Literal["free", "pinned", "zero"]

# What counts as round-off where a number has to equal an end of a range: enough for
# values that went through float32.
ROUND_OFF = 1e-6


def end_of_range(process: Process, last_step: str) -> float:
    """Where the time change ends: t_min, or 0 for the last step "zero".

    Raises:
        ValueError: If the last step is unknown.
    """
    if last_step not in get_args(LastStep):
        raise ValueError(
            f"last_step: expected one of {get_args(LastStep)}, got {last_step!r}"
        )
    return 0.0 if last_step == "zero" else process.t_min


def describe_origin(made_by: str, more: dict[str, Any] | None = None) -> str:
    """Provenance as JSON text: library, version, how made, and what the caller adds.

    Raises:
        TypeError: If what the caller adds has no JSON form.
        ValueError: If it holds a NaN or an infinity.
    """
    version = _schedule_io.library_version()
    origin = {"library": "artlib", "version": version, "made_by": made_by}
    try:
        return json.dumps(origin | (more or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"provenance: {error}; give a dict of strings, finite numbers and lists"
        ) from error


def within(value: TimeLike, name: str, low: float, high: float, whose: str) -> Tensor:
    """A float64 tensor clamped to a range that it may leave by round-off only.

    Raises:
        ValueError: If a value is outside, or NaN.
    """
    x = torch.as_tensor(value, dtype=torch.float64)
    slack = ROUND_OFF * low if low > 0 else 1e-9 * high
    inside = (x >= low - slack) & (x <= high * (1 + ROUND_OFF))
    if not bool(inside.all()):
        bad = float(x.detach()[~inside].flatten()[0])
        hint = "; the step from t_min to 0 is taken by the grid" if bad < low else ""
        raise ValueError(
            f"{name}: {bad!r} is outside {whose} range [{low!r}, {high!r}]{hint}"
        )
    return x.clamp(low, high)
