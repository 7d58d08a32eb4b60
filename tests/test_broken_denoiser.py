"""A denoiser that gives NaN on the way: the best plan so far is kept, and said so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import mixture_16d
from torch import Tensor

import artlib
from artlib.solvers import Solver

VE = artlib.VE()
PROBLEM = mixture_16d(VE, n=18)
ENDS = PROBLEM.exact(PROBLEM.x_T, VE.t_max, 0.0)
START = artlib.edm(VE, pinned=False)


def sound_for(calls: int) -> artlib.ProbabilityFlow:
    """A flow whose denoiser gives NaN after so many calls."""
    made = 0

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        nonlocal made
        made += 1
        found = PROBLEM.denoiser(x, t)
        return found if made <= calls else found * float("nan")

    return artlib.ProbabilityFlow(VE, denoiser)


def errors(plan: Any, **options: Any) -> Tensor:
    """On noise that nobody saw, with a denoiser that is sound."""
    fresh = mixture_16d(VE, n=60)
    x_T, flow = fresh.x_T[18:], fresh.flow()
    found = artlib.sample(flow, x_T, plan, **options)
    return (found - fresh.exact(x_T, VE.t_max, 0.0)).norm(dim=1)


@pytest.mark.parametrize("told", [False, True])
def test_refine_keeps_the_best_before(told: bool) -> None:
    whole = artlib.refine(
        START, PROBLEM.flow(), PROBLEM.x_T, 4, reference=ENDS, told=told
    )
    spent = whole.provenance["nfe"]
    for share, kept in ((0.1, "the start"), (0.4, "the best before it")):
        with pytest.warns(UserWarning, match=f"gave NaN or infinity.*{kept} is ret"):
            found = artlib.refine(
                START,
                sound_for(round(share * spent)),
                PROBLEM.x_T,
                4,
                reference=ENDS,
                told=told,
            )
        notes = found.provenance
        assert (notes["error_after"] < notes["error_before"]) == (share > 0.2)
        if share > 0.2:
            plan = found if isinstance(found, artlib.Plan) else found.grid(4)
            options = {} if told else {"solver": "euler"}
            before = errors(START.grid(4), solver="euler")
            assert float(errors(plan, **options).mean()) < float(before.mean())


def test_tell_stays_honest() -> None:
    with pytest.warns(UserWarning, match="tell: a run .* the honest plan is returned"):
        plan = artlib.tell(START, sound_for(40), PROBLEM.x_T, 4, reference=ENDS)
    assert plan.is_honest
    assert math.isfinite(plan.provenance["honest"]["rms"])
    with pytest.raises(ValueError, match="its own grid of 4 steps gives NaN"):
        artlib.tell(START, sound_for(0), PROBLEM.x_T, 4, reference=ENDS)


def tuned(flow: artlib.ProbabilityFlow) -> artlib.Plan:
    return artlib.tune(
        flow,
        PROBLEM.x_T,
        nfe=4,
        solvers=["euler", "dpmpp_2m"],
        schedules={"EDM": START, "KL-optimal": artlib.kl_optimal(VE)},
        reference=ENDS,
        evaluations=120,
    )


def calls_of(run: Callable[[artlib.ProbabilityFlow], Any]) -> int:
    flow, counter = PROBLEM.counted()
    run(flow)
    return counter.nfe


def test_tune_returns_what_it_knows() -> None:
    calls = calls_of(tuned)
    reference = 4 * 47 + 1  # of the check at the end, which comes after all
    for sound, lost in ((calls // 2, True), (calls - reference - 10, False)):
        with pytest.warns(UserWarning, match=r"tune: .* gave NaN .* is returned"):
            plan = tuned(sound_for(sound))
        assert (plan.provenance["lead"] is None) == lost
        best = min(row["rms"] for row in plan.provenance["tried"])
        assert 0 < best < 1
        assert float(errors(plan).mean()) <= 1.05 * float(
            errors(START.grid(4), solver="euler").mean()
        )
    with pytest.raises(ValueError, match=r"flow: all 4 runs of 4 evaluations gave NaN"):
        tuned(sound_for(0))


def test_tune_refuses_before_anything_is_spent() -> None:
    flow, counter = PROBLEM.counted()
    for bad, message in (
        ({"nfe": 1}, "nfe: expected at least 2, got 1"),
        ({"nfe": 0}, "nfe: expected at least 2, got 0"),
        ({"nfe": [5, 1]}, "nfe: expected at least 2, got 1"),
        ({"nfe": 4, "solvers": "euler"}, r"solvers: .* pass \['euler'\]"),
        ({"nfe": 4, "solvers": [lambda x, t: x]}, "solver: expected a callable step"),
        (
            {"nfe": 4, "schedules": {"a": artlib.edm(artlib.VP())}},
            "schedule: it belongs to VP",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            artlib.tune(flow, PROBLEM.x_T, **bad)
    assert counter.nfe == 0


def test_a_solver_of_the_wrong_form_is_named() -> None:
    for wrong in (lambda: 0, lambda p, q: p.x):
        with pytest.raises(TypeError, match="advance: expected a function of one arg"):
            Solver("mine", 1, 1, wrong)  # type: ignore[arg-type]
    grid = START.grid(3)
    for result, error, message in (
        (lambda p: None, TypeError, r"advance\(position\) .* got NoneType"),
        (lambda p: p.x[:1], ValueError, r"advance\(position\) .* shape \(18, 16\)"),
    ):
        kind = Solver("mine", 1, 1, result)  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            artlib.sample(PROBLEM.flow(), PROBLEM.x_T, grid, solver=kind)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0, 100.0])
def test_levels_told_are_checked(bad: float) -> None:
    nodes = START.grid(4)
    told = nodes[:-1].clone()
    told[1] = bad
    with pytest.raises(ValueError, match=r"told: level 1 is .* within \(0, t_max"):
        artlib.Plan(VE, nodes, told, "euler")


def test_a_plan_of_another_process_is_refused() -> None:
    other = artlib.Plan.honest(artlib.edm(artlib.VP()), 4, solver="euler")
    with pytest.raises(ValueError, match="the plan belongs to VP"):
        artlib.sample(PROBLEM.flow(), PROBLEM.x_T, other)
    with pytest.raises(ValueError, match="the plan belongs to VP"):
        artlib.gaussian_w2(VE, torch.ones(2), other)
    with pytest.raises(ValueError, match="was made for VP"):
        artlib.compare(
            PROBLEM.flow(), {"a": other}, [PROBLEM.x_T], {"euler": [4]}, ends=[ENDS]
        )
