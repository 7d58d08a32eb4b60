"""What tables of verdicts share: a row beside the best rivals, and shares saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ..comparison.bootstrap import Interval
from ..comparison.table import Comparison
from .display import SOLVER_NAMES


def spelt(label: str) -> str:
    """A row's label as the pages spell it; behind its last comma stands the solver."""
    schedule, comma, solver = label.rpartition(", ")
    return f"{schedule}{comma}{SOLVER_NAMES.get(solver, solver)}"


def in_words(numbers: Iterable[object]) -> str:
    """Several as a sentence names them: "2, 5 and 9"; "none" if there are none."""
    texts = [str(n) for n in numbers]
    if len(texts) < 2:
        return texts[0] if texts else "none"
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def beside_best(
    table: Comparison,
    solver: str,
    K: int,
    label: str,
    others: Sequence[str],
    *,
    called: Callable[[str], str] = spelt,
) -> list[Interval | str]:
    """A cell in units of the best of some others, as a row of a table.

    Args:
        table: Of the samples.
        solver: Which solver.
        K: Number of steps.
        label: Which schedule.
        others: Its rivals. The best is chosen on these samples and for each measure
            apart, which favours them.
        called: How a rival is spelt.

    Returns:
        The ratio of the root mean square and that rival, the ratio of the median and
        that rival, and the verdict over all of them.
    """
    row: list[Interval | str] = []
    for measure in ("error", "median"):
        rival = table.least(solver, K, others, measure)
        row += [table.ratio(solver, K, label, rival, measure=measure), called(rival)]
    return [*row, table.verdict(solver, K, label, list(others))]


def seed_ratio(a: ArrayLike, b: ArrayLike) -> Interval:
    """Ratio of two positive measures over seeds, with its 95 % interval.

    The geometric mean of the ratios, seed by seed, and Student's t interval of their
    logarithms: for what is one number a seed, such as a Frechet distance, so that no
    samples can be drawn again.

    Args:
        a: One number for each seed [S], S >= 2.
        b: The same of the other, from the same noise.
    """
    from scipy import stats  # loaded late

    logs = np.log(np.asarray(a, dtype=float) / np.asarray(b, dtype=float))
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    ends = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])
    return Interval(*map(float, ends))


def whole_evaluations(saved: float, of: int, *, each: int = 1) -> int | None:
    """Evaluations in whole steps that are enough, from a share that is saved.

    Args:
        saved: Per cent, at the unfavourable end of its interval.
        of: The evaluations of which they are saved.
        each: Evaluations of a step, of which the last step takes one.

    Returns:
        The fewest of K steps, ``each (K - 1) + 1``; None if the share is not finite.
    """
    if not math.isfinite(saved):
        return None
    needed = (1 - saved / 100) * of
    return each * (math.ceil((needed - 1) / each - 1e-9)) + 1


def is_saved(
    intervals: Iterable[Sequence[float]], goal: float
) -> Literal["yes", "no", "open"]:
    """Whether a share is saved, by the worst of several measures.

    Args:
        intervals: (low, high) of the share by each measure.
        goal: The share.

    Returns:
        ``"no"`` if an interval lies below the goal, ``"yes"`` if all lie above it, and
        else ``"open"``.
    """
    ends = [tuple(interval) for interval in intervals]
    if any(high < goal for _, high in ends):
        return "no"
    return "yes" if all(low > goal for low, _ in ends) else "open"
