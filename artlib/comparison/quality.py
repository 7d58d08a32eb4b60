r"""Evaluations at equal quality: how many one schedule takes for another's error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .bootstrap import Interval, percentiles, resample, statistic
from .table import Cell, Comparison


def nfe_to_quality(
    nfe: Sequence[float] | np.ndarray, error: Sequence[float] | np.ndarray, goal: float
) -> float:
    """Network evaluations that are needed for an error to come down to a goal.

    Between two measured points the error is a power of the NFE (a straight line on log
    axes). Where it is not monotone, what counts is from when on it *stays* at the goal
    or below.

    Args:
        nfe: Evaluations [n], ascending.
        error: Error at each of them [n], > 0.
        goal: The error to reach, > 0.

    Returns:
        The NFE, fractional; that of the first point if the goal is met everywhere
        (then it is an upper bound), and NaN if it is not met at the last.

    Raises:
        ValueError: If the lists differ in length, do not ascend, or a number is not
            finite and positive.
    """
    counts, errors = np.asarray(nfe, dtype=float), np.asarray(error, dtype=float)
    if counts.ndim != 1 or counts.shape != errors.shape or not len(counts):
        raise ValueError(
            f"nfe, error: expected two lists of one length, got {counts.shape} and "
            f"{errors.shape}"
        )
    numbers = np.concatenate([counts, errors, [goal]])
    if not (np.isfinite(numbers).all() and (numbers > 0).all()):
        raise ValueError("nfe, error, goal: expected finite numbers above 0")
    if (np.diff(counts) <= 0).any():
        raise ValueError(f"nfe: expected ascending numbers, got {counts.tolist()}")
    return float(_crossing(counts, errors[None], np.array([goal]))[0])


def nfe_ratio(
    table: Comparison,
    solver: str,
    label: str,
    goal: Cell,
    *,
    measure: str = "median",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    r"""Evaluations for another cell's error, in units of those that it takes itself.

    The number is :math:`n / n_{goal}` with n from `nfe_to_quality`, on the samples of
    all seeds; a share :math:`1 - n / n_{goal}` of the evaluations is saved. The
    interval is a bootstrap over samples: each draw takes the same samples for all
    points of the curve and for the goal.

    Args:
        table: Measured with references, see `compare`.
        solver: Of the curve.
        label: The schedule whose curve it is.
        goal: ``(solver, K, label)`` of the error to reach, for example
            ``("heun", 10, "EDM")``.
        measure: ``"median"`` or ``"error"`` (root mean square).
        level: Share of the draws inside of the interval.
        resamples: How often the samples are drawn again.
        seed: Of those draws.

    Returns:
        The ratio and its percentile interval. Where the curve does not come down to
        the goal, the ratio is NaN; draws in which it does not are infinite, so that an
        end of the interval may be. Where all of the curve is below, the first point of
        the curve is an upper bound.

    Raises:
        KeyError: If nothing was measured, or no errors of single samples.
        ValueError: If an argument is out of its range or an error is 0.
    """
    steps = [K for K in table.steps(solver) if label in table.cells[f"{solver} {K}"]]
    if not steps:
        raise KeyError(
            f"label: nothing measured for {solver!r}, {label!r}; there is "
            f"{table.labels(solver)}"
        )
    counts = np.array([table.spent(solver, K, label) for K in steps], dtype=float)
    errors = table.paired([*((solver, K, label) for K in steps), goal])
    draws = resample(errors, measure, resamples=resamples, seed=seed)
    found = statistic(errors, measure)
    if not found.all() or not draws.all():
        raise ValueError(
            f"table: the {measure} is 0 in some cell; no power law goes through it"
        )
    goal_nfe = table.spent(*goal)
    ratio = nfe_to_quality(counts, found[:-1], float(found[-1])) / goal_nfe
    ratios = _crossing(counts, draws[:-1].T, draws[-1]) / goal_nfe
    return percentiles(ratio, np.nan_to_num(ratios, nan=np.inf, posinf=np.inf), level)


def nfe_needed(
    table: Comparison,
    solver: str,
    goals: Mapping[str, Cell],
    *,
    labels: Sequence[str] | None = None,
    measure: str = "median",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """Evaluations that each row of a table takes for the quality of other cells.

    `nfe_ratio` for every row and goal, in evaluations: for `plotting.plot_needed`.

    Args:
        table: Measured with references, see `compare`.
        solver: Of the rows.
        goals: Label -> cell whose error is to be reached, for example ``{"EDM with
            Heun, 35 evaluations": ("heun", 18, "EDM")}``.
        labels: The rows, by default all of the solver.
        measure: See `nfe_ratio`.
        level: See `nfe_ratio`.
        resamples: See `nfe_ratio`.
        seed: See `nfe_ratio`.

    Returns:
        Row -> goal -> evaluations with their interval; NaN where the row does not come
        down to the goal, its ends infinite where draws do not. Where all of the row is
        below, its first point is an upper bound.

    Raises:
        KeyError: If a cell was not measured, or no errors of single samples.
        ValueError: If an argument is out of its range, no goal or no row is given, or
            an error is 0.
    """
    rows = table.labels(solver) if labels is None else list(labels)
    if not goals or not rows:
        raise ValueError(
            f"goals, labels: expected at least one each, got {len(goals)} and "
            f"{len(rows)}"
        )
    options: dict[str, Any] = {"measure": measure, "level": level}
    options |= {"resamples": resamples, "seed": seed}
    return {
        label: {
            name: Interval(
                *(
                    ratio * table.spent(*goal)
                    for ratio in nfe_ratio(table, solver, label, goal, **options)
                )
            )
            for name, goal in goals.items()
        }
        for label in rows
    }


def _crossing(counts: np.ndarray, errors: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """`nfe_to_quality` of several curves [curves, n] for a goal each [curves]."""
    above = errors > goals[:, None] * (1 + 1e-12)
    points = len(counts)
    # The last point above the goal; the curve crosses between it and the next one.
    last = np.where(above.any(1), points - 1 - above[:, ::-1].argmax(1), -1)
    inside = (last >= 0) & (last < points - 1)
    found = np.where(last < 0, counts[0], np.nan)
    rows, left = np.flatnonzero(inside), last[inside]
    before, after = errors[rows, left], errors[rows, left + 1]
    share = np.log(before / goals[rows]) / np.log(before / after)
    found[rows] = counts[left] * (counts[left + 1] / counts[left]) ** share
    return found
