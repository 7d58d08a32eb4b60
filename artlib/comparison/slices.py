"""A long measurement in slices of time: each stops by itself, and the next goes on."""

from __future__ import annotations

import os
import time

from .._common.checks import finite_float
from .._common.errors import PausedError


class Slice:
    """The time that one call may take.

    Args:
        seconds: From now on; None for all that it needs.
        file: Where what is done is kept.

    Raises:
        TypeError: If ``seconds`` is no number.
        ValueError: If it is not finite and positive, or there is no file.
    """

    def __init__(
        self, seconds: float | None, file: str | os.PathLike[str] | None
    ) -> None:
        self._end: float | None = None
        self._file = None if file is None else os.fspath(file)
        if seconds is None:
            return
        self._end = time.monotonic() + finite_float(seconds, "seconds", positive=True)
        if file is None:
            raise ValueError(
                "seconds: what is done in that time would be lost; pass file=..., from "
                "which the same call goes on"
            )

    def check(self, done: int, of: int, what: str) -> None:
        """Stop, if the time is over and something is left to do.

        Args:
            done: How much of it this call has done.
            of: How much it found to be done.
            what: Of which things.

        Raises:
            PausedError: Then.
        """
        if self._end is not None and done < of and time.monotonic() >= self._end:
            raise PausedError(
                f"seconds: over after {done} of {of} {what}, which are in "
                f"{self._file}; the same call goes on from there"
            )
