"""Tables of the chapters: made in a full run, shown and checked otherwise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..comparison.bootstrap import statistic
from ..comparison.compare import (
    Budgets,
    Comparison,
    HasGrid,
    Measure,
    compare,
)
from ..comparison.file import Origin, grid_key
from ..comparison.references import origin_of, references
from ..control.closed_form import art
from ..flow.flow import ProbabilityFlow
from ..schedules.constructors import Schedule
from .slices import is_made, seconds_left

if TYPE_CHECKING:
    from ..zoo import ZooDenoiser

_AGREE = 0.02
"""Relative. A network in single precision on another processor differs by less."""

_AGREE_ONE = 0.05
"""Of the error of one sample. The samples of a reference share their steps, so that it
differs a little with their number; an edited number is found by the digest."""

_ROUNDED = 6e-4
"""Relative. The errors of samples are stored to four digits."""

_CHECKED_TO = 1e-5
"""Tolerance of a reference that stored errors are checked by, relative."""

_AGAIN = "make it again (ARTLIB_FULL=1) or find out what changed"

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
    few: int = 2,
    rtol: float = 1e-5,
    shared: str | None = None,
) -> Comparison:
    """A table of a full run, of which a part is computed again.

    With ``ARTLIB_FULL=1`` the whole table is computed (a stopped run goes on where it
    stopped, and one of limited time stops by itself) and stored as
    ``notebooks/results/NAME.json``. Otherwise it is read, its origin is printed, and it
    is checked: the errors of ``part`` from the first ``few`` noises of the first seed
    are computed anew, sample by sample; the numbers of every cell must be those of its
    samples; the grids, the noise and the network must be those that made it; and no
    number may have been changed by hand.

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
        shared: A name for the references of a full run, which are kept then for other
            tables of the same flow, noise and tolerance; by default its own, deleted
            when the table is done.

    Returns:
        The table. Its measure ``"error"`` is the distance to the reference.

    Raises:
        AssertionError: If the code of today gives other numbers than the stored ones,
            or they do not fit each other.
        FileNotFoundError: If there are no results yet.
        ValueError: If a stopped run was one of another flow or noise.
        PausedError: If the time of a full run is over, see `made`.
    """
    from .. import book

    part = part or {}
    if book.full() and not is_made(name):
        noises = [noise(count, seed) for seed in seeds]
        partial = book.scratch(f"{name}.partial.json")
        kept = book.scratch(f"{shared or name}.references.safetensors")
        ends = references(
            flow, noises, rtol=rtol, file=kept, seconds=seconds_left(), progress=True
        )
        table = compare(
            flow,
            schedules,
            noises,
            budgets,
            ends=ends,
            measure=measure,
            file=partial,
            seconds=seconds_left(),
            progress=True,
        )
        table = _only(table, schedules, budgets)
        origin = json.loads(partial.read_text("utf-8"))["origin"]
        origin["cells"] = {
            key: {label: origin["cells"][key][label]["grid"] for label in row}
            for key, row in table.cells.items()
        }
        results = {"table": table.to_dict(), "origin": origin}
        results["sha256"] = _digest(results)
        book.save_results(name, results, seed=seeds[0])
        partial.unlink()
        if shared is None:
            kept.unlink()
        return table
    stored = book.load_results(name)
    results = stored["results"]
    table = Comparison.from_dict(results["table"])
    print(describe(stored["made"], table.count, len(seeds)))
    noises = [noise(table.count, seed) for seed in seeds]
    fresh = _measured(flow, schedules, noises[0][:few], part, rtol)
    _assert_samples_agree(fresh, table, name, max(rtol, _CHECKED_TO))
    _assert_consistent(table, len(seeds), name)
    _assert_origin(results["origin"], flow, schedules, noises, name)
    assert results["sha256"] == _digest(results), (
        f"{name}: a stored number was changed by hand; {_AGAIN}"
    )
    return table


class Listed:
    """A schedule by its stored grids, one for each number of steps.

    Args:
        grids: Number of steps, as text, -> timesteps [K + 1]; as results hold them.
    """

    def __init__(self, grids: Mapping[str, Sequence[float]]) -> None:
        self._grids = grids

    def grid(self, K: int) -> Tensor:
        """Timesteps [K + 1].

        Raises:
            ValueError: If there is no list for that many steps.
        """
        if str(K) not in self._grids:
            raise ValueError(f"K: no list of {K} steps, there are {list(self._grids)}")
        return torch.tensor(self._grids[str(K)], dtype=torch.float64, device="cpu")


def learned(
    name: str, net: ZooDenoiser, *, solver: str | None = None, seed: int = 1000
) -> Schedule:
    """ART in closed form on 32 paths of a network: made in a full run, read otherwise.

    The table has 64 times; with a ``solver`` it is that of the solver's own error.

    Args:
        name: Of the results.
        net: A score network of the zoo.
        solver: The solver to match, see `artlib.art`.
        seed: Of the noise.

    Raises:
        AssertionError: If the stored one was made from another network or noise, or
            for another solver.
        FileNotFoundError: If there are no results yet.
    """
    from .. import book

    flow, x_T = ProbabilityFlow(net.process, net), net.sample_prior(32, seed=seed)
    now = {**asdict(origin_of(flow, [x_T])), "solver": solver}
    if book.full() and not is_made(name):
        seconds_left()
        made_now = art(flow, x_T, solver=solver, weight="local", points=64)
        learned_now = json.loads(made_now.to_json())
        book.save_results(name, {"schedule": learned_now, "origin": now}, seed=seed)
    results = book.load_results(name)["results"]
    then = results["origin"]
    other = Origin(**_without(now, "solver")).difference(
        Origin(**_without(then, "solver"))
    )
    if other is None and now["solver"] != then["solver"]:
        other = "solver"
    assert other is None, f"{name}: {other} differed in the full run; {_AGAIN}"
    return Schedule.from_json(json.dumps(results["schedule"]), source=name)


def describe(made: Mapping[str, Any], count: int, seeds: int) -> str:
    """Where a table comes from, in two lines."""
    torch_version = made["versions"]["torch"]
    times = "" if seeds == 1 else f" for each of {seeds} seeds"
    return (
        f"{count} samples{times}; made {made['date']}\n"
        f"on {made['device']} with torch {torch_version} at {made['commit']}"
    )


def _only(
    table: Comparison, schedules: Mapping[str, HasGrid], budgets: Budgets
) -> Comparison:
    """The table without what a stopped run measured and is not asked for any more."""
    keys = [f"{solver} {K}" for solver, steps in budgets.items() for K in steps]
    return Comparison(
        cells={k: {x: table.cells[k][x] for x in schedules} for k in keys},
        nfe={k: table.nfe[k] for k in keys},
        count=table.count,
        samples={k: {x: table.samples[k][x] for x in schedules} for k in keys},
    )


def _measured(
    flow: ProbabilityFlow,
    schedules: Mapping[str, HasGrid],
    noise: Tensor,
    part: Budgets,
    rtol: float,
) -> Comparison:
    """A part of the table with the code of today."""
    if not part:
        return Comparison()
    ends = reference_again(flow, noise, rtol)
    return compare(flow, schedules, [noise], part, ends=[ends])


_known: dict[str, Tensor] = {}


def reference_again(flow: ProbabilityFlow, noise: Tensor, rtol: float) -> Tensor:
    """Accurate x_0 of a few noises, to check stored errors by.

    Errors are compared to a few per cent, for which a tolerance of 1e-5 will do (with
    1e-4 the least errors of ten evaluations are off by more). The tables of one flow
    and noise share it.
    """
    rtol = max(rtol, _CHECKED_TO)
    key = json.dumps([origin_json(flow, [noise]), rtol])
    if key not in _known:
        _known[key] = references(flow, [noise], rtol=rtol)[0]
    return _known[key]


def origin_json(flow: ProbabilityFlow, noises: Sequence[Tensor]) -> dict[str, Any]:
    """What flow and noises are known by, JSON-able."""
    return json.loads(json.dumps(asdict(origin_of(flow, noises))))


def _without(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != key}


def _digest(results: Mapping[str, Any]) -> str:
    """Of the table and its origin as JSON, in which a number is written one way."""
    content = json.dumps([results["table"], results["origin"]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _assert_samples_agree(
    fresh: Comparison, stored: Comparison, name: str, rtol: float
) -> None:
    """The errors of the first samples are those that the table itself holds.

    Below the tolerance of the reference an error is that of the reference.
    """
    for key, row in fresh.samples.items():
        for label, (now,) in row.items():
            then = stored.samples[key][label][0][: len(now)]
            what = f"{name}: {label}, {key}: the error"
            rms = statistic(np.array([now, then]), "error").tolist()
            assert abs(rms[0] - rms[1]) < _AGREE * max(rms[1], rtol), (
                f"{what} is {rms[0]:.4g} now and was {rms[1]:.4g} in the full run; "
                f"{_AGAIN}"
            )
            least = max(float(np.median(then)) / 4, rtol)
            for i, (a, b) in enumerate(zip(now, then, strict=True)):
                # Far below the others, an error is mostly that of the reference.
                assert abs(a - b) < _AGREE_ONE * max(b, least), (
                    f"{what} of sample {i} is {a:.4g} now and was {b:.4g} in the full "
                    f"run; {_AGAIN}"
                )


def _assert_consistent(table: Comparison, seeds: int, name: str) -> None:
    """The numbers of every cell are those of the errors of its samples."""
    for key, row in table.cells.items():
        for label, numbers in row.items():
            errors = np.array(table.samples[key][label])
            assert errors.shape == (seeds, table.count), (
                f"{name}: {label}, {key}: expected {seeds} seeds of {table.count} "
                f"samples, the table holds {errors.shape}; {_AGAIN}"
            )
            for measure in ("error", "median"):
                made = statistic(errors, measure)
                assert np.allclose(numbers[measure], made, rtol=_ROUNDED, atol=0), (
                    f"{name}: {label}, {key}: the {measure} of the table is not that "
                    f"of its samples: {numbers[measure]} and {made.tolist()}; {_AGAIN}"
                )


def _assert_origin(
    made: Mapping[str, Any],
    flow: ProbabilityFlow,
    schedules: Mapping[str, HasGrid],
    noises: Sequence[Tensor],
    name: str,
) -> None:
    """Flow, noises and every grid are still those that made the table."""
    for key, row in made["cells"].items():
        for label, grid in row.items():
            K = int(key.split()[1])
            now = grid_key(schedules[label], K) if label in schedules else None
            assert now == grid, (
                f"{name}: {label}, {key}: the schedule was another in the full run; "
                f"{_AGAIN}"
            )
    other = origin_of(flow, noises).difference(Origin(**_without(made, "cells")))
    assert other is None, f"{name}: {other} differed in the full run; {_AGAIN}"
