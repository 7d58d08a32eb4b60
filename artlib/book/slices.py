"""Full runs of a chapter in slices of time: ``make full CHAPTER=17 SECONDS=480``.

A slice that stops has its finished results in ``notebooks/results`` already. Their
names are in a file of the run, with what the run is known by, the commit and the cells
of the chapter: the next slice of the same run takes these results as they are, any
other run makes them again.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from .._common.errors import PausedError
from .._common.files import write_bytes
from .surroundings import commit

_START = time.monotonic()
_ENOUGH = 1.0
"""Seconds in which something can still be done."""


def seconds_left() -> float | None:
    """What is left of the time of this run; None if it may take all that it needs.

    Raises:
        PausedError: If that is nothing.
    """
    if not (limit := os.environ.get("ARTLIB_SECONDS")):
        return None
    left = float(limit) - (time.monotonic() - _START)
    if left < _ENOUGH:
        raise PausedError(
            f"ARTLIB_SECONDS: {limit} are over; the same command goes on from here"
        )
    return left


def is_made(name: str) -> bool:
    """Whether an earlier slice of this run has made these results."""
    return name in _read()


def remember(name: str) -> None:
    """Tell the next slice of this run that these results are made."""
    if (run := _file()) is not None:
        names = sorted({*_read(), name})
        run.parent.mkdir(parents=True, exist_ok=True)
        content = {"of": _identity(), "made": names}
        write_bytes(run, json.dumps(content, indent=1).encode())


def _file() -> Path | None:
    path = os.environ.get("ARTLIB_RUN")
    return Path(path) if path else None


def _identity() -> list[str]:
    return [commit(), os.environ.get("ARTLIB_RUN_OF", "")]


def _read() -> list[str]:
    run = _file()
    if run is None or not run.is_file():
        return []
    try:
        content = json.loads(run.read_text("utf-8"))
        return content["made"] if content["of"] == _identity() else []
    except (KeyError, TypeError, ValueError):
        return []  # of a run that was killed while it wrote, or of another form
