"""Schedule files: versioned JSON text, checked when read, written atomically.

A file is one JSON object, ``{"format": "artlib-schedule", "version": 1, ...}``, with
every float at full precision, so reading it back gives the same schedule to the last
bit. It is data only: nothing in it is executed or unpickled.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._common.checks import finite_float, got
from .._common.errors import ScheduleFormatError
from .._common.files import write_bytes
from ..flow.processes import Process
from .table import Table, uniform_clock
from .time_change import BetaQuantiles, Linear, NoiseWarp, TimeChange

VERSION = 1


@dataclass(frozen=True)
class Format:
    """What a kind of file is called, what it has to hold, and what writes it."""

    name: str
    noun: str
    writer: str
    keys: tuple[str, ...]
    remedy: str


SCHEDULE = Format(
    "artlib-schedule",
    "schedule",
    "Schedule.save",
    ("name", "process", "time_change", "last_step", "provenance"),
    "for a plain list of timesteps use from_grid",
)
PLAN = Format(
    "artlib-plan",
    "plan",
    "Plan.save",
    ("name", "process", "solver", "nodes", "told", "provenance"),
    "Schedule.load reads schedules",
)

_PARAMETERS: dict[type[TimeChange], tuple[str, ...]] = {
    Linear: (),
    NoiseWarp: ("warp", "rho"),
    BetaQuantiles: ("a", "b"),
    Table: ("interpolation", "clock", "times"),
}


def dumps(payload: dict[str, Any], kind: Format = SCHEDULE) -> str:
    """The JSON text of a schedule or plan: one key a line, a list on one line.

    Raises:
        ValueError: If a number is NaN or infinite.
        TypeError: If a value has no JSON form.
    """
    data = {"format": kind.name, "version": VERSION, **payload}
    lines = [
        f"  {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in data.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def loads(text: str, source: str, kind: Format = SCHEDULE) -> dict[str, Any]:
    """Parse and check the JSON text of a schedule or plan.

    Args:
        text: The file's content.
        source: The file's name, for the messages.
        kind: What it has to be.

    Returns:
        The object, with all of the format's keys present.

    Raises:
        ScheduleFormatError: If it is not JSON, of another kind, newer, incomplete, has
            a key twice, or holds a number that is not finite.
        TypeError: If ``text`` is no str.
    """
    if not isinstance(text, str):
        raise TypeError(
            f"text: expected the JSON text of a {kind.noun}, got {got(text)}; "
            f"{kind.writer.replace('save', 'load')} reads a file"
        )

    def refuse(token: str) -> float:
        raise ScheduleFormatError(
            f"{source}: holds {token}, which is not a finite number; the file was "
            f"damaged or written by a faulty run: make the {kind.noun} again"
        )

    def finite(token: str) -> float:
        # 1e999 is valid JSON and reads as infinity.
        return number if math.isfinite(number := float(token)) else refuse(token)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ScheduleFormatError(
                f"{source}: has the key {twice!r} twice, and which one counts is not "
                f"known; remove one, or write the file again with {kind.writer}"
            )
        return found

    try:
        data = json.loads(
            # Some editors open a file with a byte-order mark.
            text.removeprefix("\ufeff"),
            parse_constant=refuse,
            parse_float=finite,
            object_pairs_hook=once,
        )
    except ScheduleFormatError:
        raise
    except ValueError as error:
        raise ScheduleFormatError(
            f"{source}: not valid JSON ({error}); the file is truncated or no "
            f"{kind.noun}: write it again with {kind.writer}"
        ) from error
    except RecursionError as error:
        raise ScheduleFormatError(
            f"{source}: nested too deep, no {kind.noun}"
        ) from error
    if not isinstance(data, dict) or data.get("format") != kind.name:
        raise ScheduleFormatError(
            f'{source}: JSON, but no {kind.noun} (expected "format": "{kind.name}"); '
            f"{kind.remedy}"
        )
    version = data.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ScheduleFormatError(
            f"{source}: version is {version!r}, expected an integer from 1 "
            f"to {VERSION}; write the file again with {kind.writer}"
        )
    if version > VERSION:
        raise ScheduleFormatError(
            f"{source}: written in version {version!s:.9} of the format, this library "
            f"reads up to {VERSION}; upgrade it with pip install -U art-diffusion"
        )
    missing = [key for key in kind.keys if key not in data]
    if missing:
        raise ScheduleFormatError(
            f"{source}: lacks {', '.join(missing)}; write it again with {kind.writer}"
        )
    return data


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: If there is none.
        ScheduleFormatError: If it is not UTF-8 text.
        TypeError: If ``path`` is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a str or a pathlib.Path, got {got(path)}")
    try:
        # Some editors begin a file with a byte-order mark.
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ScheduleFormatError(
            f"{os.fspath(path)}: not a text file in UTF-8; a schedule is JSON written "
            "by Schedule.save (pickles and checkpoints are never loaded here)"
        ) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file atomically: after a failure the old one stands, or none.

    Raises:
        OSError: If the folder cannot be written to; nothing half-written remains.
    """
    write_bytes(path, text.encode("utf-8"))


def time_change_from_dict(process: Process, data: dict[str, Any]) -> TimeChange:
    """Rebuild a time change from `TimeChange.to_dict`.

    Raises:
        KeyError: If a parameter is missing.
        ValueError: If the kind is unknown or a parameter does not fit.
        TypeError: If a parameter is of the wrong type.
    """
    if not isinstance(data, dict):
        raise TypeError(f"time_change: expected an object, got {got(data)}")
    kind = data["kind"]
    known = {c.kind: keys for c, keys in _PARAMETERS.items()}
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"time change: unknown kind {kind!r}")
    foreign = [key for key in data if key != "kind" and key not in known[kind]]
    if foreign:
        raise ValueError(f"time change: {kind!r} has no {foreign[0]!r}")
    if kind == Linear.kind:
        return Linear(process)
    if kind == NoiseWarp.kind:
        return NoiseWarp(process, data["warp"], data.get("rho"))
    if kind == BetaQuantiles.kind:
        return BetaQuantiles(process, data["a"], data["b"])
    times = _numbers(data["times"], "times")
    if "clock" in data:
        clock = _numbers(data["clock"], "clock")
    elif len(times) >= 2:
        clock = uniform_clock(times[0] - times[-1], len(times))
    else:
        raise ValueError(f"times: expected at least 2 knots, got {len(times)}")
    return Table(clock, times, data["interpolation"])


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{name}: expected a list of numbers, got {got(value)}")
    return tuple(finite_float(v, f"{name}[{k}]") for k, v in enumerate(value))
