"""What a `Schedule` checks: the ends of its range, arguments in it, its provenance."""

from __future__ import annotations

import json
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from .._common.checks import got, printable
from .._common.types import TimeLike
from .._common.version import __version__
from ..flow.processes import Process, as_time, check_process
from .time_change import ROUND_OFF

LastStep: TypeAlias = Literal["free", "pinned", "zero"]


def end_of_range(process: Process, last_step: str) -> float:
    """Where the time change ends: t_min, or 0 for the last step "zero".

    Raises:
        TypeError: If ``process`` is none.
        ValueError: If the last step is unknown.
    """
    check_process(process)
    if not isinstance(last_step, str) or last_step not in get_args(LastStep):
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
    if not isinstance(more, dict | None):
        raise TypeError(
            f"provenance: expected a dict of strings, finite numbers and lists, got "
            f"{got(more)}"
        )
    version = __version__
    origin = {"library": "artlib", "version": version, "made_by": made_by}
    try:
        return json.dumps(origin | (more or {}), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"provenance: {error}; give a dict of strings, finite numbers and lists"
        ) from error


def check_labels(name: Any, provenance: Any) -> None:
    """Check the labels of a schedule: its name, and its provenance as JSON text.

    Raises:
        TypeError: If they are no text.
        ValueError: If the name or a key of the provenance holds control characters.
    """
    printable(name, "name")
    if not isinstance(provenance, str) or not provenance.startswith("{"):
        raise TypeError(
            f"provenance: expected the JSON text of an object, got {got(provenance)}"
        )

    def check_keys(pairs: list[tuple[str, Any]]) -> None:
        for key, _ in pairs:
            printable(key, "provenance")

    json.loads(provenance, object_pairs_hook=check_keys)


def within(value: TimeLike, name: str, low: float, high: float, whose: str) -> Tensor:
    """A float64 tensor clamped to a range that it may leave by round-off only.

    Raises:
        TypeError: If it is no number and no tensor of them.
        ValueError: If a value is outside, or NaN.
    """
    x = as_time(value, name=name)
    slack = ROUND_OFF * low if low > 0 else 1e-9 * high
    inside = (x >= low - slack) & (x <= high * (1 + ROUND_OFF))
    if not bool(inside.all()):
        bad = float(x.detach()[~inside].flatten()[0])
        hint = "; the step from t_min to 0 is taken by the grid" if bad < low else ""
        raise ValueError(
            f"{name}: {bad!r} is outside {whose} range [{low!r}, {high!r}]{hint}"
        )
    return x.clamp(low, high)
