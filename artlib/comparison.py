r"""Several schedules on one flow: what each is worth at each number of evaluations.

All schedules start from the same noise (**matched noise**), so that their differences
are not those of the draws; the spread over seeds is kept, not only the mean. The error
is the distance to where the path really leads,

.. math:: \sqrt{\tfrac1{Nd}\sum_i \lVert x_i - x_i^{ref}\rVert^2} ,

with the reference solved by dopri5 from the same noise. A few samples that end at
another image make most of that mean, so the **median** of the distances of the samples
stands beside it. Other measures can be added. Evaluations (NFE) are counted at the
network.

Whether two schedules differ is a question to **pairs** of samples, not to the spread
over seeds: `Comparison.ratio` and `nfe_ratio` draw the same samples again for both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

from ._bootstrap import Interval
from ._checks import check_samples, positive_int
from ._comparison_table import Cell, Comparison, rounded
from ._files import write_bytes
from ._precision import full_precision
from ._quality import nfe_ratio, nfe_to_quality
from .denoisers import CountNFE
from .flow import ProbabilityFlow
from .metrics import terminal_error
from .processes import Process
from .schedules import Schedule, edm, kl_optimal, log_snr, uniform
from .solvers import sample

__all__ = [
    "Budgets",
    "Cell",
    "Comparison",
    "HasGrid",
    "Interval",
    "Measure",
    "baselines",
    "compare",
    "nfe_ratio",
    "nfe_to_quality",
    "references",
]

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
            ``"median"`` (over the samples) are distances to them, per coordinate. The
            distance of every sample is kept, for `Comparison.ratio`.
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
        samples: list[list[float]] = []
        for seed, noise in enumerate(noises):
            counter.reset()
            parts = noise.split(batch)
            x = torch.cat([sample(counted, p, grid, solver=solver) for p in parts])
            table.nfe[f"{solver} {K}"] = counter.nfe // len(parts)
            numbers = dict(measure(x)) if measure is not None else {}
            if ends is not None:
                numbers["error"] = terminal_error(x, ends[seed])
                gap = (x - ends[seed]).double().flatten(1)
                distances = gap.square().mean(1).sqrt()
                numbers["median"] = float(distances.median())
                samples.append(rounded(distances.tolist()))
            for name, value in numbers.items():
                found.setdefault(name, []).append(float(value))
        table.cells.setdefault(f"{solver} {K}", {})[label] = found
        if samples:
            table.samples.setdefault(f"{solver} {K}", {})[label] = samples
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
