"""The class `Comparison`: measured numbers, as a table, as curves, with intervals.

Filled by `artlib.compare`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from torch import Tensor

from .._common.checks import got
from .bootstrap import Interval, percentiles, resample, statistic


@runtime_checkable
class HasGrid(Protocol):
    """What a comparison asks of a schedule: its timesteps for a number of steps."""

    def grid(self, K: int) -> Tensor:
        """Timesteps [K + 1], descending from t_max to 0."""
        ...


Cell: TypeAlias = tuple[str, int, str]
"""Solver, number of steps K, label of the schedule."""

Verdict: TypeAlias = Literal["ahead", "open", "behind"]
"""What paired samples say of two cells, see `Comparison.verdict`."""

_DIGITS = 4
"""Significant digits of the error of one sample."""


@dataclass
class Comparison:
    """Measured numbers by solver, K, schedule and measure, one per seed.

    Where distances to references were measured, the error of every sample is kept too.
    All cells are measured on the same samples, so `ratio` compares them in pairs.

    Attributes:
        cells: ``"solver K"`` -> schedule -> measure -> one number per seed.
        nfe: ``"solver K"`` -> evaluations on a grid.
        own_nfe: ``"solver K"`` -> schedule -> evaluations, where a clock per sample
            asks the network more than that.
        count: Samples per seed.
        samples: ``"solver K"`` -> schedule -> for each seed the root-mean-square
            distance of every sample to its reference, per coordinate, to 4 digits.
            The measures ``"error"`` and ``"median"`` are those of these numbers.
    """

    cells: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    nfe: dict[str, int] = field(default_factory=dict)
    count: int = 0
    samples: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    own_nfe: dict[str, dict[str, int]] = field(default_factory=dict)

    def steps(self, solver: str) -> list[int]:
        """Numbers of steps that were measured with a solver, ascending."""
        keys = (key.split() for key in self.cells)
        return sorted(int(K) for name, K in keys if name == solver)

    def evaluations(self, solver: str) -> list[int]:
        """Their NFE on a grid."""
        return [self.nfe[f"{solver} {K}"] for K in self.steps(solver)]

    def spent(self, solver: str, K: int, label: str) -> int:
        """Evaluations of one cell, a clock's own ones included."""
        key = f"{solver} {K}"
        return self.own_nfe.get(key, {}).get(label, self.nfe[key])

    def labels(self, solver: str) -> list[str]:
        """Schedules that were measured with a solver, in order."""
        found: dict[str, None] = {}
        for K in self.steps(solver):
            found |= dict.fromkeys(self.cells[f"{solver} {K}"])
        return list(found)

    def values(self, solver: str, K: int, label: str, measure: str) -> np.ndarray:
        """One number per seed [seeds].

        Raises:
            KeyError: If that was not measured; the message says what was.
        """
        try:
            return np.array(self.cells[f"{solver} {K}"][label][measure])
        except (KeyError, TypeError):  # a key of another type
            raise KeyError(
                f"nothing measured for {solver!r}, K = {K}, {label!r}, {measure!r}; "
                f"there is {list(self.cells)} with {self.labels(solver)}"
            ) from None

    def mean(self, solver: str, K: int, label: str, measure: str) -> float:
        """Mean over the seeds."""
        return float(self.values(solver, K, label, measure).mean())

    def spread(self, solver: str, K: int, label: str, measure: str) -> float:
        """Standard deviation over the seeds (0 for a single one)."""
        values = self.values(solver, K, label, measure)
        return float(values.std(ddof=1)) if len(values) > 1 else 0.0

    def curve(self, solver: str, label: str, measure: str) -> np.ndarray:
        """[seeds, K's], for `plotting.plot_error`."""
        columns = [self.values(solver, K, label, measure) for K in self.steps(solver)]
        return np.stack(columns, axis=1)

    def sample_errors(self, solver: str, K: int, label: str) -> np.ndarray:
        """Distance of every sample to its reference, per coordinate.

        Returns:
            The distances [seeds * count], one seed after the other.

        Raises:
            KeyError: If there are none: the cell was not measured, or without
                references, or by a version of artlib that did not keep them.
        """
        try:
            return np.concatenate(self.samples[f"{solver} {K}"][label])
        except (KeyError, TypeError):  # a key of another type
            raise KeyError(
                f"no errors of single samples for {solver!r}, K = {K}, {label!r}; "
                "measure it again with compare(..., ends=references(flow, noises))"
            ) from None

    def least(
        self, solver: str, K: int, labels: Iterable[str], measure: str = "median"
    ) -> str:
        """Which of some schedules has the least error over the samples of all seeds.

        It is chosen on the samples that it is then compared on, which favours it: a
        fair choice for rivals.

        Args:
            solver: Which solver.
            K: Number of steps.
            labels: The schedules to choose from.
            measure: ``"median"`` or ``"error"`` (root mean square).

        Raises:
            KeyError: If there are no errors of single samples.
            ValueError: If there is no label, or the measure is another.
        """
        sizes = {
            label: float(
                statistic(self.sample_errors(solver, K, label)[None], measure)[0]
            )
            for label in labels
        }
        if not sizes:
            raise ValueError("labels: expected at least one schedule, got none")
        return min(sizes, key=lambda label: sizes[label])

    def interval(
        self,
        solver: str,
        K: int,
        label: str,
        *,
        measure: str = "median",
        level: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
    ) -> Interval:
        """One cell's number over the samples of all seeds, with a bootstrap interval.

        Args:
            solver: Which solver.
            K: Number of steps.
            label: Which schedule.
            measure: ``"median"`` or ``"error"`` (root mean square).
            level: Share of the draws inside of the interval.
            resamples: How often the samples are drawn again.
            seed: Of those draws.

        Returns:
            The number and its percentile interval.

        Raises:
            KeyError: If there are no errors of single samples.
            ValueError: If an argument is out of its range.

        References:
            Efron, Ann. Statist. 7 (1979) 1.
        """
        errors = self.sample_errors(solver, K, label)[None]
        draws = resample(errors, measure, resamples=resamples, seed=seed)
        return percentiles(float(statistic(errors, measure)[0]), draws[0], level)

    def ratio(
        self,
        solver: str,
        K: int,
        label: str,
        other: str | Cell,
        *,
        measure: str = "median",
        level: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
    ) -> Interval:
        """One cell's number in units of another's, with a paired bootstrap interval.

        Every draw takes the same samples for both cells. The interval says whether two
        schedules differ; those of the two numbers, which the samples that are hard for
        both make wide, do not.

        Args:
            solver: Which solver.
            K: Number of steps.
            label: Which schedule.
            other: The schedule to compare it with, or for another solver or number of
                steps ``(solver, K, label)``.
            measure: ``"median"`` or ``"error"`` (root mean square).
            level: Share of the draws inside of the interval.
            resamples: How often the samples are drawn again.
            seed: Of those draws.

        Returns:
            The ratio and its percentile interval; below 1 the first is better. With
            the two cells exchanged, the inverse of each.

        Raises:
            KeyError: If there are no errors of single samples.
            ValueError: If an argument is out of its range, the cells hold different
                numbers of samples, or the other's number is 0.
        """
        against = (solver, K, other) if isinstance(other, str) else other
        if not isinstance(against, tuple) or len(against) != 3:
            raise TypeError(
                "other: expected the label of a schedule, or (solver, K, label), got "
                f"{got(other)}"
            )
        errors = self.paired([(solver, K, label), against])
        draws = resample(errors, measure, resamples=resamples, seed=seed)
        found = statistic(errors, measure)
        if not found[1] or not draws[1].all():
            raise ValueError(
                f"other: {against} has {measure} 0 on these samples or some of them; "
                "there is no ratio to it"
            )
        return percentiles(found[0] / found[1], draws[0] / draws[1], level)

    def verdict(
        self,
        solver: str,
        K: int,
        label: str,
        other: str | Cell | list[str],
        *,
        measures: Sequence[str] = ("error", "median"),
        level: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
    ) -> Verdict:
        """Whether one cell has a smaller error than others, by the worse measure.

        By one measure it is ``"ahead"`` if the interval of `ratio` lies below 1,
        ``"behind"`` if it lies above, and else ``"open"``. Root mean square and median
        may disagree: the few samples that end far from their reference make the one
        and not the other. The verdict is the worse, and of several rivals the worst: to
        be ahead is to be ahead of each.

        Args:
            solver: Which solver.
            K: Number of steps.
            label: Which schedule.
            other: The schedule to compare it with, or ``(solver, K, label)``; or a list
                of schedules.
            measures: Those that it has to be ahead in.
            level: Share of the draws inside of the intervals.
            resamples: How often the samples are drawn again.
            seed: Of those draws.

        Raises:
            KeyError: If there are no errors of single samples.
            ValueError: If an argument is out of its range, see `ratio`.
        """
        if isinstance(measures, str) or not measures:
            raise ValueError(
                'measures: expected names such as ("error", "median"), got '
                f"{got(measures)}"
            )
        rivals: Sequence[str | Cell] = other if isinstance(other, list) else [other]
        if not rivals:
            raise ValueError("other: expected at least one schedule, got []")
        found = [
            self.ratio(
                solver,
                K,
                label,
                rival,
                measure=measure,
                level=level,
                resamples=resamples,
                seed=seed,
            )
            for rival in rivals
            for measure in measures
        ]
        if any(ratio.low > 1 for ratio in found):
            return "behind"
        return "ahead" if all(ratio.high < 1 for ratio in found) else "open"

    def paired(self, cells: Sequence[Cell]) -> np.ndarray:
        """The errors of the same samples in several cells [cells, seeds * count].

        Args:
            cells: Addresses ``(solver, K, label)``.

        Raises:
            KeyError: If a cell has no errors of single samples.
            ValueError: If they hold different numbers of samples.
        """
        rows = [self.sample_errors(*cell) for cell in cells]
        if len({len(row) for row in rows}) > 1:
            counts = {cell: len(row) for cell, row in zip(cells, rows, strict=True)}
            raise ValueError(f"samples: expected as many in every cell, got {counts}")
        return np.stack(rows)

    def text(self, solver: str, measure: str, *, digits: int = 3) -> str:
        """A table: schedules down, NFE across, mean and standard deviation over seeds.

        Where a clock asks the network more than its column says, its NFE stand behind.
        Between mean and deviation stands a plus-minus sign, or ``+-`` where the
        encoding of the standard output has none. Letters of a label that it lacks are
        escaped.

        Args:
            solver: Which solver.
            measure: Which number.
            digits: Significant digits of the mean.
        """
        steps = self.steps(solver)
        between = "\N{PLUS-MINUS SIGN}"
        between = between if _writable(between) == between else "+-"
        rows = [["NFE", *map(str, self.evaluations(solver))]]
        for label in self.labels(solver):
            row = [_writable(label)]
            for K in steps:
                if label not in self.cells[f"{solver} {K}"]:
                    row.append("-")
                    continue
                mean = self.mean(solver, K, label, measure)
                spread = self.spread(solver, K, label, measure)
                error = f"{spread:.1g}" if spread < 1 else f"{spread:.0f}"
                own = self.own_nfe.get(f"{solver} {K}", {}).get(label)
                more = "" if own is None else f" (NFE {own})"
                row.append(f"{mean:.{digits}g}{between}{error}{more}")
            rows.append(row)
        widths = [max(map(len, column)) + 1 for column in zip(*rows, strict=True)]
        return "\n".join(
            row[0].ljust(widths[0])
            + "".join(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `from_dict`."""
        samples = {
            key: {
                label: [_joined(row) for row in seeds] for label, seeds in row.items()
            }
            for key, row in self.samples.items()
        }
        data = {
            "cells": self.cells,
            "nfe": self.nfe,
            "count": self.count,
            "samples": samples,
        }
        return data | ({"own_nfe": self.own_nfe} if self.own_nfe else {})

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Comparison:
        """Inverse of `to_dict`.

        Args:
            data: What `to_dict` returned, possibly through JSON, now or before there
                were ``samples``.

        Raises:
            ValueError: If it is something else.
        """
        try:
            return Comparison(
                cells=dict(data["cells"]),
                nfe=dict(data["nfe"]),
                count=data["count"],
                samples={
                    key: {
                        label: [[float(e) for e in seed.split()] for seed in seeds]
                        for label, seeds in row.items()
                    }
                    for key, row in data.get("samples", {}).items()
                },
                own_nfe=dict(data.get("own_nfe", {})),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "data: expected what Comparison.to_dict returns, with cells, nfe and "
                f"count; got {type(data).__name__}"
            ) from error


def rounded(errors: Iterable[float]) -> list[float]:
    """Errors of single samples as a comparison keeps them, to 4 significant digits."""
    return [float(f"{error:.{_DIGITS}g}") for error in errors]


def _joined(errors: Iterable[float]) -> str:
    """Errors as one string, which takes a third of the room of a list in a file."""
    written = (f"{error:.{_DIGITS}g}" for error in errors)
    return " ".join(text if text == "0" else text.removeprefix("0") for text in written)


def _writable(text: str) -> str:
    """The text, with what the standard output has no code for as escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
