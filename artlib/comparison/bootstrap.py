r"""How far a number measured on some samples may be off: the bootstrap over samples.

The n samples of a measurement stand for all that could have been drawn. Drawing n of
them again, with replacement, shows how the number moves from one set to another
(Efron); the interval holds the middle of what it does then. Two schedules that start
from the same noise are measured on the same samples, so each draw takes **the same
samples for both**: what is hard for both cancels in their ratio.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
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
    n = errors.shape[-1]
    if n < 2:
        raise ValueError("samples: expected at least 2 to draw from, got 1")
    resamples = positive_int(resamples, "resamples")
    seed = positive_int(seed, "seed", 0)
    # Tables ask for the same cell again and again, beside one rival and another.
    rows = [np.ascontiguousarray(row, dtype=np.float64).tobytes() for row in errors]
    return np.stack([_of_one_cell(row, measure, resamples, seed) for row in rows])


@functools.lru_cache(maxsize=512)
def _of_one_cell(row: bytes, measure: str, resamples: int, seed: int) -> np.ndarray:
    """The statistic on samples drawn again [resamples], by how often each is drawn."""
    errors = np.frombuffer(row)
    n = len(errors)
    statistic(errors[None], measure)  # refuses what the errors do not determine
    order = np.argsort(errors, kind="stable")
    found = []
    for times in _drawn(n, resamples, seed):
        if measure == "error":
            squares = np.square(errors)
            if np.isfinite(squares).all():
                total = squares @ times
            else:  # an infinite error counts in the draws that hold it
                weighted = squares[:, None] * np.maximum(times, 1)
                total = np.where(times > 0, weighted, 0).sum(axis=0)
            found.append(np.sqrt(total / n))
        else:
            passed = np.cumsum(times[order], axis=0) > (n - 1) // 2
            found.append(errors[order][passed.argmax(axis=0)])
    draws = np.concatenate(found)
    draws.flags.writeable = False
    return draws


def _drawn(n: int, resamples: int, seed: int) -> Iterable[np.ndarray]:
    """How often each of n samples is in each draw of n [n, block], in blocks."""
    if resamples * n <= _NUMBERS:
        return _drawn_at_once(n, resamples, seed)
    return _draw(n, resamples, seed)


@functools.lru_cache(maxsize=2)
def _drawn_at_once(n: int, resamples: int, seed: int) -> tuple[np.ndarray, ...]:
    return tuple(_draw(n, resamples, seed))


def _draw(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    block = max(1, _NUMBERS // n)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        rows = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        times = np.bincount(rows.ravel(), minlength=size * n)
        yield times.reshape(size, n).T.astype(np.float64, order="C")


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
