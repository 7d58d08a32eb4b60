r"""Several schedules on one flow: what each is worth at each number of evaluations.

All schedules start from the same noise (**matched noise**), so that their differences
are not those of the draws; the spread over seeds is kept, not only the mean. The error
is the distance to where the path really leads,

.. math:: \sqrt{\tfrac1{Nd}\sum_i \lVert x_i - x_i^{ref}\rVert^2} ,

with the reference solved by dopri5 from the same noise. A few samples that end at
another image make most of that mean, so the **median** of the distances of the samples
stands beside it. Other measures can be added. Evaluations (NFE) are counted at the
network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ._checks import check_samples, positive_int
from ._files import write_bytes
from ._precision import full_precision
from .denoisers import CountNFE
from .flow import ProbabilityFlow
from .metrics import terminal_error
from .processes import Process
from .schedules import Schedule, edm, kl_optimal, log_snr, uniform
from .solvers import sample

Measure = Callable[[Tensor], Mapping[str, float]]
"""Samples [N, *shape] -> named numbers, for example distances in features."""

Budgets = Mapping[str, Sequence[int]]
"""Solver -> numbers of steps K."""


@runtime_checkable
class HasGrid(Protocol):
    """What a comparison asks of a schedule: its timesteps for a number of steps."""

    def grid(self, K: int) -> Tensor:
        """Timesteps [K + 1], descending from t_max to 0."""
        ...


def baselines(process: Process) -> dict[str, Schedule]:
    """The hand-made schedules that every comparison should show.

    Args:
        process: The noising process.

    Returns:
        Uniform, DPM and EDM as published (pinned at t_min) and unpinned, KL-optimal.
    """
    return {
        "Uniform": uniform(process),
        "DPM": log_snr(process),
        "DPM unpinned": log_snr(process, pinned=False),
        "EDM": edm(process),
        "EDM unpinned": edm(process, pinned=False),
        "KL-optimal": kl_optimal(process),
    }


@dataclass
class Comparison:
    """Measured numbers by solver, K, schedule and measure, one per seed.

    Attributes:
        cells: ``"solver K"`` -> schedule -> measure -> one number per seed.
        nfe: ``"solver K"`` -> evaluations.
        count: Samples per seed.
    """

    cells: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    nfe: dict[str, int] = field(default_factory=dict)
    count: int = 0

    def steps(self, solver: str) -> list[int]:
        """Numbers of steps that were measured with a solver, ascending."""
        keys = (key.split() for key in self.cells)
        return sorted(int(K) for name, K in keys if name == solver)

    def evaluations(self, solver: str) -> list[int]:
        """Their NFE."""
        return [self.nfe[f"{solver} {K}"] for K in self.steps(solver)]

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
        except KeyError:
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

    def text(self, solver: str, measure: str, *, digits: int = 3) -> str:
        """A table: schedules down, NFE across, mean ± standard deviation over seeds.

        Args:
            solver: Which solver.
            measure: Which number.
            digits: Significant digits of the mean.
        """
        steps = self.steps(solver)
        rows = [["NFE", *map(str, self.evaluations(solver))]]
        for label in self.labels(solver):
            row = [label]
            for K in steps:
                if label not in self.cells[f"{solver} {K}"]:
                    row.append("-")
                    continue
                mean = self.mean(solver, K, label, measure)
                spread = self.spread(solver, K, label, measure)
                error = f"{spread:.1g}" if spread < 1 else f"{spread:.0f}"
                row.append(f"{mean:.{digits}g}±{error}")
            rows.append(row)
        widths = [max(map(len, column)) + 1 for column in zip(*rows, strict=True)]
        return "\n".join(
            row[0].ljust(widths[0])
            + "".join(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `from_dict`."""
        return {"cells": self.cells, "nfe": self.nfe, "count": self.count}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Comparison:
        """Inverse of `to_dict`.

        Args:
            data: What `to_dict` returned, possibly through JSON.

        Raises:
            ValueError: If it is something else.
        """
        try:
            return Comparison(
                cells=dict(data["cells"]), nfe=dict(data["nfe"]), count=data["count"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "data: expected what Comparison.to_dict returns, with cells, nfe and "
                f"count; got {type(data).__name__}"
            ) from error


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
    above = np.flatnonzero(errors > goal * (1 + 1e-12))
    if not len(above):
        return float(counts[0])
    last = int(above[-1])
    if last == len(counts) - 1:
        return float("nan")
    share = np.log(errors[last] / goal) / np.log(errors[last] / errors[last + 1])
    return float(counts[last] * (counts[last + 1] / counts[last]) ** share)


def references(
    flow: ProbabilityFlow,
    noises: Sequence[Tensor],
    *,
    rtol: float = 1e-5,
    batch: int = 256,
) -> list[Tensor]:
    """Where the paths from each noise really lead, by dopri5.

    Args:
        flow: The flow.
        noises: States at ``t_max``, one tensor [N, *shape] per seed.
        rtol: Relative and absolute tolerance.
        batch: Samples solved together (they share their steps).

    Returns:
        float64 tensors of the same shapes.
    """
    return [
        torch.cat(
            [
                sample(flow, part, solver="dopri5", rtol=rtol, atol=rtol)
                for part in noise.split(batch)
            ]
        )
        for noise in noises
    ]


@full_precision()
def compare(
    flow: ProbabilityFlow,
    schedules: Mapping[str, HasGrid],
    noises: Sequence[Tensor],
    budgets: Budgets,
    *,
    ends: Sequence[Tensor] | None = None,
    measure: Measure | None = None,
    batch: int = 256,
    file: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Comparison:
    """Sample with every schedule, solver and budget from the same noise, and measure.

    Args:
        flow: The flow.
        schedules: Label -> schedule, or anything else with a ``grid(K)``.
        noises: States at ``t_max``, one tensor [N, *shape] per seed.
        budgets: Solver -> numbers of steps.
        ends: From `references`; the measures ``"error"`` (root mean square) and
            ``"median"`` (over the samples) are distances to them, per coordinate.
        measure: Further measures of a seed's samples.
        batch: Samples computed together.
        file: A JSON file; what is in it already is not computed again, and it is
            rewritten after every cell, so that a long run can be stopped and
            continued.
        progress: Whether to show a progress bar (on stderr).

    Returns:
        A `Comparison`.

    Raises:
        ValueError: If there is nothing to measure, shapes do not fit, the file is of
            another comparison, or samples become NaN.
    """
    noises = [check_samples(noise, "noises") for noise in noises]
    if not noises or not schedules or not budgets:
        raise ValueError("noises, schedules, budgets: each needs at least one entry")
    if ends is None and measure is None:
        raise ValueError(
            "ends: nothing to measure; pass ends=references(flow, noises), a measure, "
            "or both"
        )
    if ends is not None and [e.shape for e in ends] != [n.shape for n in noises]:
        raise ValueError(
            "ends: expected one tensor per seed, of the shape of its noise; make them "
            "with references(flow, noises)"
        )
    batch = positive_int(batch, "batch")
    table = _resume(file, len(noises[0]))
    counter = CountNFE(flow.denoiser)
    counted = flow.with_denoiser(counter)
    todo = [
        (solver, K, label)
        for solver, steps in budgets.items()
        for K in steps
        for label in schedules
        if label not in table.cells.get(f"{solver} {K}", {})
    ]
    for solver, K, label in tqdm(todo, desc="compare", disable=not progress):
        grid = schedules[label].grid(K)
        found: dict[str, list[float]] = {}
        for seed, noise in enumerate(noises):
            counter.reset()
            parts = noise.split(batch)
            x = torch.cat([sample(counted, p, grid, solver=solver) for p in parts])
            table.nfe[f"{solver} {K}"] = counter.nfe // len(parts)
            numbers = dict(measure(x)) if measure is not None else {}
            if ends is not None:
                numbers["error"] = terminal_error(x, ends[seed])
                gap = (x - ends[seed]).double().flatten(1)
                numbers["median"] = float(gap.square().mean(1).sqrt().median())
            for name, value in numbers.items():
                found.setdefault(name, []).append(float(value))
        table.cells.setdefault(f"{solver} {K}", {})[label] = found
        if file is not None:
            write_bytes(file, json.dumps(table.to_dict()).encode())
    return table


def _resume(file: str | os.PathLike[str] | None, count: int) -> Comparison:
    """The comparison in a file, or an empty one."""
    if file is None or not Path(file).is_file():
        return Comparison(count=count)
    try:
        table = Comparison.from_dict(json.loads(Path(file).read_text("utf-8")))
    except ValueError as error:
        raise ValueError(
            f"file: {os.fspath(file)} is no comparison; delete it or give another name"
        ) from error
    if table.count != count:
        raise ValueError(
            f"file: {os.fspath(file)} was made with {table.count} samples per seed, "
            f"now there are {count}; delete it or give another name"
        )
    return table
