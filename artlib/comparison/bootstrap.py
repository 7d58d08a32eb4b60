r"""How far a number measured on some samples may be off: the bootstrap over samples.

The n samples of a measurement stand for all that could have been drawn. Drawing n of
them again, with replacement, shows how the number moves from one set to another
(Efron); the interval holds the middle of what it does then. Two schedules that start
from the same noise are measured on the same samples, so each draw takes **the same
samples for both**: what is hard for both cancels in their ratio.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .._common.checks import positive_int

_NUMBERS = 2**21
"""Held at a time: 16 MiB."""


class Interval(NamedTuple):
    """A measured number, and where it would be on other samples of the same law.

    Attributes:
        value: The number on the samples that were drawn.
        low: Lower end of the percentile interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def statistic(errors: np.ndarray, measure: str) -> np.ndarray:
    """The number that a cell of a comparison holds, from the errors of its samples.

    Args:
        errors: Distances [..., n].
        measure: ``"error"``, the root of the mean square, or ``"median"`` (of an even
            number the lower of the two in the middle, as torch takes it).

    Returns:
        The number [...].

    Raises:
        ValueError: If the measure is another, which the errors do not determine.
    """
    if measure == "error":
        found: np.ndarray = np.sqrt(np.square(errors).mean(axis=-1))
        return found
    if measure == "median":
        middle = (errors.shape[-1] - 1) // 2
        return np.partition(errors, middle, axis=-1)[..., middle]
    raise ValueError(
        f'measure: expected "error" or "median", got {measure!r}; only these follow '
        "from the errors of single samples"
    )


def resample(
    errors: np.ndarray, measure: str, *, resamples: int, seed: int
) -> np.ndarray:
    """The statistic of several cells on samples drawn again, the same for all cells.

    Args:
        errors: Distances [cells, n], of the same n >= 2 samples in every cell.
        measure: See `statistic`.
        resamples: How many draws of n samples.
        seed: Of the draws.

    Returns:
        The statistics [cells, resamples].

    Raises:
        ValueError: If there are fewer than two samples, or an argument is out of range.
    """
    cells, n = errors.shape
    if n < 2:
        raise ValueError("samples: expected at least 2 to draw from, got 1")
    resamples = positive_int(resamples, "resamples")
    rng = np.random.default_rng(positive_int(seed, "seed", 0))
    found = np.empty((cells, resamples))
    block = max(1, _NUMBERS // (cells * n))
    for start in range(0, resamples, block):
        rows = rng.integers(n, size=(min(block, resamples - start), n))
        found[:, start : start + len(rows)] = statistic(errors[:, rows], measure)
    return found


def percentiles(value: float, draws: np.ndarray, level: float) -> Interval:
    """The middle of what the draws do.

    Its ends are draws, and as many lie below as above, so the interval of the inverse
    of a positive number is the inverse of its interval.

    Args:
        value: The number on the samples themselves.
        draws: The number on samples drawn again [resamples]; may be infinite.
        level: Share of the draws inside, between 0 and 1.

    Raises:
        ValueError: If the level is out of its range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: expected a share between 0 and 1, got {level!r}")
    ordered = np.sort(draws)
    left_out = int((1 - level) / 2 * (len(ordered) - 1))
    low, high = ordered[left_out], ordered[len(ordered) - 1 - left_out]
    return Interval(float(value), float(low), float(high))
