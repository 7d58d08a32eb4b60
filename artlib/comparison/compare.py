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

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .._common.checks import got, positive_int
from .._common.files import check_output
from .._common.precision import full_precision
from ..flow.denoisers import CountNFE
from ..flow.flow import ProbabilityFlow, check_flow
from ..flow.processes import Process
from ..metrics.distances import terminal_error
from ..schedules.constructors import Schedule, edm, kl_optimal, log_snr, uniform
from ..solvers.clocked import Clock
from ..solvers.sample import nfe, sample
from ..solvers.solver import SolverLike, solver_of
from .bootstrap import Interval
from .file import ComparisonFile, Origin, probe_grid
from .quality import nfe_ratio, nfe_to_quality
from .references import checked_noises
from .slices import Slice
from .table import Cell, Comparison, HasGrid, rounded

__all__ = [
    "Budgets",
    "Cell",
    "ClockFor",
    "Comparison",
    "HasGrid",
    "Interval",
    "Measure",
    "baselines",
    "compare",
    "nfe_ratio",
    "nfe_to_quality",
]

Measure = Callable[[Tensor], Mapping[str, float]]
"""Samples [N, *shape] -> named numbers, for example distances in features."""

ClockFor = Callable[[int], Clock]
"""Number of steps K -> a clock per sample, for example `artlib.ExactClock`."""

Budgets = Mapping[SolverLike, Sequence[int]]
"""Solver, as in `artlib.sample`, -> numbers of steps K."""


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


@full_precision()
def compare(
    flow: ProbabilityFlow,
    schedules: Mapping[str, HasGrid | ClockFor],
    noises: Sequence[Tensor],
    budgets: Budgets,
    *,
    ends: Sequence[Tensor] | None = None,
    measure: Measure | None = None,
    batch: int = 256,
    file: str | os.PathLike[str] | None = None,
    seconds: float | None = None,
    progress: bool = False,
) -> Comparison:
    """Sample with every schedule, solver and budget from the same noise, and measure.

    Args:
        flow: The flow.
        schedules: Label -> schedule, or anything else with a ``grid(K)``. Or a clock
            per sample, as a function of K that makes it, such as ``lambda K:
            artlib.PredictedClock(table, K)``; it goes with ``"euler"`` and ``"heun"``,
            and what it asks of the network itself is in `Comparison.own_nfe`.
        noises: States at ``t_max``, one tensor [N, *shape] per seed.
        budgets: Solver -> numbers of steps. A step of your own stands in the result
            under the name of its function.
        ends: From `references`; the measures ``"error"`` (root mean square) and
            ``"median"`` (over the samples) are distances to them, per coordinate. The
            distance of every sample is kept, for `Comparison.ratio`.
        measure: Further measures of a seed's samples.
        batch: Samples computed together.
        file: A JSON file; what is in it already is not computed again, and every
            cell is added to it when it is done, so that a long run can be stopped and
            continued, and several can share it. Cells that another grid or measure
            made under the same name are computed again and replaced; what else is in
            the file stays and is returned too. To tell, three steps from the first
            noise and ``measure`` of the references, with some noise added, are
            computed at the start. Not with a clock, which has no grid to know it by.
        seconds: Stop after the cell in which so much time is over, if more are to be
            done; with ``file``, from which the same call goes on.
        progress: Whether to show a progress bar (on stderr).

    Returns:
        A `Comparison`.

    Raises:
        TypeError: If an argument is of another type, such as a schedule without a
            ``grid(K)`` that makes no clock either.
        ValueError: If there is nothing to measure, shapes do not fit, a schedule is
            for another process, samples or a measure become NaN or infinite, or the
            file belongs to another comparison: to another process, denoiser, noise or
            reference. If a clock meets a file, or a solver that takes none.
        TimeoutError: If another run does not let go of the file.
        PausedError: If the seconds are over; what is done is in the file.
    """
    check_flow(flow)
    noises = checked_noises(noises)
    slice_ = Slice(seconds, file)
    for name, given in (("schedules", schedules), ("budgets", budgets)):
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{name}: expected a dict, such as {_EXAMPLES[name]}, got {got(given)}"
            )
    if measure is not None and not callable(measure):
        raise TypeError(
            f"measure: expected a function of samples, got {got(measure)}; pass "
            "lambda x: {'name': number}"
        )
    if not noises or not schedules or not budgets:
        raise ValueError("noises, schedules, budgets: each needs at least one entry")
    if ends is None and measure is None:
        raise ValueError(
            "ends: nothing to measure; pass ends=references(flow, noises), a measure, "
            "or both"
        )
    if ends is not None:
        ends = checked_noises(ends, "ends")
    if ends is not None and [e.shape for e in ends] != [n.shape for n in noises]:
        raise ValueError(
            "ends: expected one tensor per seed, of the shape of its noise; make them "
            "with references(flow, noises)"
        )
    batch = positive_int(batch, "batch")
    _check_processes(schedules, flow.process)
    solvers = _by_name(budgets, file)
    clocks, grids = _sorted_out(schedules, solvers, file)
    if file is not None:
        check_output(file)
    table = Comparison(count=len(noises[0]))
    store = None
    if file is not None:
        probe = sample(flow, noises[0], probe_grid(flow.process), batch=batch)
        origin = Origin.of(flow, noises, ends, probe)
        numbers = _probed(measure, noises[0], ends, flow.process)
        store = ComparisonFile(file, origin, table.count, grids, numbers)
        table = store.table
    counter = CountNFE(flow.denoiser)
    counted = flow.with_denoiser(counter)
    todo = [
        (solver, K, label)
        for solver, key in solvers.items()
        for K in dict.fromkeys(budgets[key])
        for label in schedules
        if store is None
        or not store.holds(f"{solver} {K}", label, errors=ends is not None)
    ]
    bar = tqdm(todo, desc="compare", disable=not progress)
    for number, (solver, K, label) in enumerate(bar, start=1):
        times: dict[str, Any] = (
            {"clock": _made(clocks[label], label, K)}
            if label in clocks
            else {"grid": grids[label].grid(K)}
        )
        found: dict[str, list[float]] = {}
        samples: list[list[float]] = []
        for seed, noise in enumerate(noises):
            counter.reset()
            x = sample(counted, noise, solver=solvers[solver], batch=batch, **times)
            evaluations = counter.nfe // -(-len(noise) // batch)
            numbers = dict(measure(x)) if measure is not None else {}
            if ends is not None:
                numbers["error"] = terminal_error(x, ends[seed])
                gap = (x - ends[seed]).double().flatten(1)
                distances = gap.square().mean(1).sqrt()
                numbers["median"] = float(distances.median())
                samples.append(rounded(distances.tolist()))
            for name, value in numbers.items():
                if not math.isfinite(value):
                    raise ValueError(
                        f"measure: {name!r} of {label!r} with {solver}, K = {K} is "
                        f"{float(value)}; expected a finite number"
                    )
                found.setdefault(name, []).append(float(value))
        key = f"{solver} {K}"
        if store is not None:
            store.add(key, label, evaluations, found, samples)
            slice_.check(number, len(todo), "cells")
            continue
        if label in clocks:
            usual = nfe(torch.linspace(1, 0, K + 1), solver=solver)
            if evaluations != usual:
                table.own_nfe.setdefault(key, {})[label] = evaluations
            evaluations = usual
        table.nfe[key] = evaluations
        table.cells.setdefault(key, {})[label] = found
        if samples:
            table.samples.setdefault(key, {})[label] = samples
    return table


_EXAMPLES = {
    "schedules": "{'EDM': artlib.edm(process)}",
    "budgets": "{'heun': [5, 10]}",
}


def _by_name(
    budgets: Budgets, file: str | os.PathLike[str] | None
) -> dict[str, SolverLike]:
    """The solvers by the names that their rows have in the table."""
    named: dict[str, SolverLike] = {}
    for solver in budgets:
        name = solver_of(solver, adaptive=True).name
        if name in named:
            raise ValueError(
                f"budgets: two solvers are called {name!r}, and one would take the "
                "other's rows; give their functions different names"
            )
        if file is not None and not isinstance(solver, str):
            raise ValueError(
                f"file: the step {name!r} cannot be told from another of that name "
                "when the file is read again; leave file out for a step of your own"
            )
        named[name] = solver
    return named


def _sorted_out(
    schedules: Mapping[str, HasGrid | ClockFor],
    solvers: Mapping[str, SolverLike],
    file: str | os.PathLike[str] | None,
) -> tuple[dict[str, ClockFor], dict[str, HasGrid]]:
    """What makes clocks, and what makes grids."""
    clocks: dict[str, ClockFor] = {}
    grids: dict[str, HasGrid] = {}
    for label, given in schedules.items():
        if isinstance(given, HasGrid):
            grids[label] = given
        elif callable(given):
            clocks[label] = given
        else:
            raise TypeError(
                f"schedules: {label!r}: expected a schedule, or a function of K that "
                f"makes a clock, got {got(given)}"
            )
    others = [name for name, s in solvers.items() if s not in ("euler", "heun")]
    if clocks and others:
        raise ValueError(
            f"budgets: {next(iter(clocks))!r} is a clock per sample, which goes with "
            f"'euler' and 'heun', not with {others[0]!r}; compare it on its own"
        )
    if clocks and file is not None:
        raise ValueError(
            f"file: {next(iter(clocks))!r} is a clock per sample, which has no grid to "
            "know it by when the file is read again; leave file out, or compare it on "
            "its own"
        )
    return clocks, grids


def _made(clock_for: ClockFor, label: str, K: int) -> Clock:
    """The clock of K steps."""
    clock = clock_for(positive_int(K, "K"))
    if not isinstance(clock, Clock):
        raise TypeError(
            f"schedules: {label!r}: expected a function of K that makes a clock, but "
            f"it made {got(clock)}"
        )
    if clock.steps != K:
        raise ValueError(
            f"schedules: {label!r} made a clock of {clock.steps} steps for K = {K}"
        )
    return clock


def _check_processes(schedules: Mapping[str, Any], process: Process) -> None:
    for label, schedule in schedules.items():
        own = getattr(schedule, "process", process)
        if isinstance(own, Process) and own != process:
            raise ValueError(
                f"schedules: {label!r} was made for {own}, but the flow runs under "
                f"{process}; make it for this process, or take it there with "
                "artlib.convert"
            )


def _probed(
    measure: Measure | None,
    noise: Tensor,
    ends: Sequence[Tensor] | None,
    process: Process,
) -> dict[str, float]:
    """What a measure says of an input that is the same each time, to know it again."""
    if measure is None:
        return {}
    x = noise.double() / float(process.sigma(process.t_max))
    if ends is not None:
        x = ends[0].double() + x / 10
    x = x.to(noise.dtype if noise.dtype == torch.float64 else torch.float32)
    try:
        return {name: float(value) for name, value in measure(x).items()}
    except Exception as error:
        error.add_note(
            "file: the measure is called first on the references, or on noise, to know "
            "it again in the file; leave file out for one that cannot be"
        )
        raise
