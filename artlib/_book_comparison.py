"""Tables of the chapters: made in a full run, shown and checked otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .comparison import Budgets, Comparison, HasGrid, Measure, compare, references
from .control import art
from .flow import ProbabilityFlow
from .schedules import Schedule

if TYPE_CHECKING:
    from .zoo import ZooDenoiser

_AGREE = 0.02
"""Relative. A network in single precision on another processor differs by less."""

Noise = Callable[[int, int], Tensor]
"""``noise(n, seed)`` -> states at ``t_max`` [n, *shape]."""


def comparison(
    name: str,
    flow: ProbabilityFlow,
    schedules: Mapping[str, HasGrid],
    noise: Noise,
    budgets: Budgets,
    *,
    count: int,
    seeds: Sequence[int] = (0, 1, 2),
    measure: Measure | None = None,
    part: Budgets | None = None,
    few: int = 16,
    rtol: float = 1e-5,
) -> Comparison:
    """A table of a full run, of which a part is computed again.

    With ``ARTLIB_FULL=1`` the whole table is computed (a stopped run goes on where it
    stopped) and stored as ``notebooks/results/NAME.json``. Otherwise it is read, its
    origin is printed, and the errors of ``part`` from ``few`` noises of the first seed
    are computed anew and compared with those that the full run stored for the same
    noises.

    Args:
        name: Of the results.
        flow: The flow.
        schedules: Label -> schedule.
        noise: Draws states at ``t_max``.
        budgets: Solver -> numbers of steps.
        count: Samples per seed of the full run.
        seeds: Its seeds.
        measure: Further measures, see `artlib.compare`.
        part: Solver -> numbers of steps to compute again.
        few: Noises to compute it from.
        rtol: Tolerance of the reference solution.

    Returns:
        The table. Its measure ``"error"`` is the distance to the reference.

    Raises:
        AssertionError: If the code of today gives other numbers than the stored ones.
        FileNotFoundError: If there are no results yet.
    """
    from . import book

    part = part or {}
    first = noise(few, seeds[0])
    ends = references(flow, [first], rtol=rtol)
    fresh = compare(flow, schedules, [first], part, ends=ends) if part else Comparison()
    if book.full():
        noises = [noise(count, seed) for seed in seeds]
        table = compare(
            flow,
            schedules,
            noises,
            budgets,
            ends=references(flow, noises, rtol=rtol),
            measure=measure,
            file=book.scratch(f"{name}.partial.json"),
            progress=True,
        )
        results = {"table": table.to_dict(), "part": fresh.to_dict()}
        book.save_results(name, results, seed=seeds[0])
        return table
    stored = book.load_results(name)
    table = Comparison.from_dict(stored["results"]["table"])
    print(describe(stored["made"], table.count, len(seeds)))
    _assert_agrees(fresh, Comparison.from_dict(stored["results"]["part"]), name)
    return table


def learned(
    name: str, net: ZooDenoiser, *, solver: str | None = None, seed: int = 1000
) -> Schedule:
    """ART in closed form on 32 paths of a network: made in a full run, read otherwise.

    Args:
        name: Of the results.
        net: A score network of the zoo.
        solver: The solver to match, see `artlib.art`.
        seed: Of the noise.

    Raises:
        FileNotFoundError: If there are no results yet.
    """
    from . import book

    if book.full():
        flow = ProbabilityFlow(net.process, net)
        schedule = art(flow, net.sample_prior(32, seed=seed), solver=solver)
        book.save_results(name, json.loads(schedule.to_json()), seed=seed)
    return Schedule.from_json(
        json.dumps(book.load_results(name)["results"]), source=name
    )


def describe(made: Mapping[str, Any], count: int, seeds: int) -> str:
    """Where a table comes from, in two lines."""
    torch_version = made["versions"]["torch"]
    return (
        f"{count} samples for each of {seeds} seeds; made {made['date']}\n"
        f"on {made['device']} with torch {torch_version} at {made['commit']}"
    )


def _assert_agrees(fresh: Comparison, stored: Comparison, name: str) -> None:
    """The errors computed now are those of the full run, for the same noises."""
    for key, row in fresh.cells.items():
        for label, numbers in row.items():
            now, then = (
                torch.tensor(x, dtype=torch.float64)
                for x in (numbers["error"], stored.cells[key][label]["error"])
            )
            gap = float((now / then - 1).abs().max())
            assert gap < _AGREE, (
                f"{name}: {label}, {key}: the error is {float(now[0]):.4g} now and was "
                f"{float(then[0]):.4g} in the full run; make it again "
                "(ARTLIB_FULL=1) or find out what changed"
            )
