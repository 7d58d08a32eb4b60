"""Refinement: against the oracle on Gaussian data, never worse on held-out noise."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import mixture_16d
from torch import Tensor

import artlib
from artlib.control import few_steps
from artlib.control.few_steps import refine
from artlib.flow.flow import ProbabilityFlow
from artlib.flow.processes import VE, VP, RectifiedFlow

F64 = torch.float64
SPECTRUM = torch.logspace(1, -4, 64, dtype=F64)  # the log-uniform law of chapter 09


@cache
def spectrum() -> tuple[ProbabilityFlow, Tensor, Tensor]:
    process = VE()
    flow = ProbabilityFlow(process, lambda x, t: SPECTRUM / (SPECTRUM + t**2) * x)
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(256, 64, generator=rng, dtype=F64)
    return flow, torch.sqrt(SPECTRUM + process.t_max**2) * z, SPECTRUM.sqrt() * z


def w2(grid: Tensor, solver: str) -> float:
    return float(artlib.gaussian_w2(VE(), SPECTRUM, grid, solver=solver))


@pytest.mark.parametrize(
    ("solver", "K"),
    [("euler", K) for K in (2, 5, 20)] + [("heun", K) for K in (2, 3, 5)],
)
def test_reaches_the_oracle_on_gaussian_data(solver: str, K: int) -> None:
    flow, x_T, _ = spectrum()
    start = artlib.art(flow, x_T)
    refined = refine(start, flow, x_T, K, solver=solver)
    best = w2(artlib.oracle_grid(VE(), SPECTRUM, K, solver=solver), solver)
    assert w2(refined.grid(K), solver) < 1.02 * best
    assert w2(start.grid(K), solver) > 1.01 * best  # there was something to gain
    assert refined.provenance["gradient"] == "autograd"


def test_reaches_the_oracle_with_many_heun_steps() -> None:
    # The oracle's own search takes minutes here; its W2 is that of chapter 09.
    flow, x_T, exact = spectrum()
    refined = refine(
        artlib.art(flow, x_T), flow, x_T, 20, solver="heun", reference=exact
    )
    assert w2(refined.grid(20), "heun") == pytest.approx(0.0858, rel=0.02)


def chapter_law(name: str) -> tuple[Tensor, int]:
    """A spectrum of chapter 09, and how many noises it is learned from there."""
    if name == "log-uniform":
        return SPECTRUM, 256
    lam = torch.arange(1, 3073, dtype=F64) ** -1.2
    lam = 0.25 * lam / lam.mean()
    edges = torch.logspace(0, math.log10(3072), 49, dtype=F64).round().long().unique()
    bins = pairwise([0, *edges.tolist()[1:]])
    return torch.cat([lam[a:b].mean().expand(b - a) for a, b in bins]), 32


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("name", ["image-like", "log-uniform"])
def test_reaches_the_stored_oracles_of_chapter_09(name: str, solver: str) -> None:
    path = Path(__file__).parent.parent / "notebooks" / "results" / "ch09-oracles.json"
    oracles = json.loads(path.read_text())["results"][f"{name} {solver}"]
    lam, n = chapter_law(name)
    process = VE()
    flow = ProbabilityFlow(process, lambda x, t: lam / (lam + t**2) * x)
    z = torch.randn(n, len(lam), generator=torch.Generator().manual_seed(0), dtype=F64)
    x_T, exact = torch.sqrt(lam + process.t_max**2) * z, lam.sqrt() * z
    start = artlib.art(flow, x_T)
    for K in (2, 3, 5, 8, 12, 20):
        options = {"solver": solver, "objective": "mean square", "reference": exact}
        grid = refine(start, flow, x_T, K, **options).grid(K)
        found, best = (
            float(artlib.gaussian_w2(process, lam, g, solver=solver))
            for g in (grid, oracles[str(K)])
        )
        assert found < 1.02 * best, K


def test_any_start_leads_to_the_same_grid() -> None:
    flow, x_T, _ = spectrum()
    ends = [
        refine(start, flow, x_T, 5).grid(5)[:-1]
        for start in (artlib.kl_optimal(VE()), artlib.edm(VE()))
    ]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0.03, atol=0)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "dpmpp_2m"])
@pytest.mark.parametrize("process", [VE(), VP(), RectifiedFlow()], ids=lambda p: p.name)
def test_never_worse_on_fresh_noise(process: Any, solver: str) -> None:
    problem = mixture_16d(process, n=96)
    flow, start = problem.flow(), artlib.edm(process, pinned=False)
    refined = refine(start, flow, problem.x_T[:64], 4, solver=solver, iterations=25)
    fresh = problem.x_T[64:]
    exact = problem.exact(fresh, process.t_max, process.t_min)
    before, after = (
        artlib.terminal_error(
            artlib.sample(flow, fresh, schedule.grid(4), solver=solver), exact
        )
        for schedule in (start, refined)
    )
    assert after < before
    notes = refined.provenance
    assert notes["error_after"] < notes["error_before"]


def test_is_a_schedule_with_exactly_these_nodes() -> None:
    problem = mixture_16d(VE(), n=16)
    refined = refine(
        artlib.art(problem.flow(), problem.x_T), problem.flow(), problem.x_T, 6
    )
    grid = refined.grid(6)
    assert (float(grid[0]), float(grid[-1])) == (80.0, 0.0)
    assert bool((-torch.diff(grid[:-1].log()) >= 1e-3).all())
    assert float(grid[-2]) > VE().t_min
    again = artlib.Schedule.from_json(refined.to_json())
    assert torch.equal(again.grid(6), grid)
    assert torch.equal(again.grid(9), refined.grid(9))  # other numbers interpolate


def test_a_start_that_cannot_be_improved_is_returned() -> None:
    flow, x_T, exact = spectrum()
    oracle = artlib.from_grid(VE(), artlib.oracle_grid(VE(), SPECTRUM, 4))
    with pytest.warns(UserWarning, match="nothing better than the start"):
        refined = refine(oracle, flow, x_T, 4, reference=exact, objective="mean norm")
    assert w2(refined.grid(4), "euler") < 1.002 * w2(oracle.grid(4), "euler")
    notes = refined.provenance
    assert notes["error_after"] <= notes["error_before"]


@pytest.mark.parametrize("kind", ["no_grad", "inference", "detached"])
def test_networks_without_a_gradient_are_refined_by_differences(kind: str) -> None:
    problem = mixture_16d(VE(), n=48)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        if kind == "inference":
            with torch.inference_mode():
                return problem.denoiser(x, t)
        if kind == "detached":
            return problem.denoiser(x.detach(), t)
        with torch.no_grad():
            return problem.denoiser(x, t)

    flow = ProbabilityFlow(VE(), denoiser, acceleration="difference")
    start = artlib.edm(VE(), pinned=False)
    refined = refine(start, flow, problem.x_T, 4)
    usual = refine(start, problem.flow(), problem.x_T, 4)
    assert refined.provenance["gradient"] == "differences"
    after = [s.provenance["error_after"] for s in (refined, usual)]
    assert after[0] == pytest.approx(after[1], rel=0.01)


def test_divergence_on_the_way_keeps_the_best() -> None:
    """A denoiser that overflows on some grids: the search goes on without them."""
    problem = mixture_16d(VE(), n=32)
    start = artlib.edm(VE(), pinned=False)
    limit = float(start.grid(3)[1]) * 0.9

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        poison = torch.where((t < limit) & (t > 0.5 * limit), math.nan, 1.0)
        return problem.denoiser(x, t) * poison

    exact = problem.exact(problem.x_T, 80.0, 1e-9)
    flow = ProbabilityFlow(VE(), denoiser)
    with pytest.warns(UserWarning, match="the best before it is returned"):
        refined = refine(start, flow, problem.x_T, 3, reference=exact)
    notes = refined.provenance
    assert notes["error_after"] <= notes["error_before"] < 1


def test_progress_is_silent_unless_asked_for(capsys: Any) -> None:
    problem = mixture_16d(VE(), n=8)
    for progress in (False, True):
        refine(
            artlib.edm(VE()),
            problem.flow(),
            problem.x_T,
            2,
            iterations=2,
            progress=progress,
        )
        assert ("refine" in capsys.readouterr().err) is progress


FLOW, X_T = mixture_16d(VE()).flow(), mixture_16d(VE()).x_T
EDM = artlib.edm(VE())
BROKEN = ProbabilityFlow(VE(), lambda x, t: x / 0 * torch.sign(t - 1e-9))
BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((EDM, FLOW, X_T, 1), {}, ValueError, "K: .*1"),
    ((EDM, FLOW, X_T, 2.0), {}, TypeError, "K: "),
    ((EDM.grid(3), FLOW, X_T, 3), {}, TypeError, "schedule: .*tensor"),
    ((artlib.edm(VP()), FLOW, X_T, 3), {}, ValueError, "schedule: "),
    ((EDM, FLOW.denoiser, X_T, 3), {}, TypeError, "flow: "),
    ((EDM, FLOW, X_T[:1], 3), {}, ValueError, "held_out_share: .*two samples"),
    ((EDM, FLOW, X_T, 3), {"held_out_share": 1.0}, ValueError, "held_out_share: "),
    ((EDM, FLOW, X_T, 3), {"solver": "dopri5"}, ValueError, "solver: .*dopri5"),
    ((EDM, FLOW, X_T, 3), {"iterations": 0}, ValueError, "iterations: "),
    ((EDM, FLOW, X_T, 3), {"reference": X_T[:2]}, ValueError, "reference: .*shape"),
    ((EDM, FLOW, X_T * math.nan, 3), {}, ValueError, "x_T: .*NaN"),
    ((EDM, BROKEN, X_T, 3), {"reference": X_T}, ValueError, "schedule: .*NaN"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_refused(case: int) -> None:
    arguments, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        refine(*arguments, **options)


def problem_of(reference: Tensor | None = None) -> tuple[Any, Tensor]:
    """Refine's own problem on anisotropic Gaussian data, and a start's parameters."""
    process = VE()
    lam = torch.tensor([1.0, 0.04], dtype=torch.float64)
    target = artlib.Gaussian(torch.zeros(2, dtype=torch.float64), torch.diag(lam))
    flow = ProbabilityFlow(process, target.denoiser(process))
    x_T = target.sample_prior(process, 12, seed=0)
    start = artlib.edm(process, pinned=False)
    found, chosen = few_steps._problem(
        start, flow, x_T, 4, "euler", False, "balanced", reference, 0.25, None
    )
    assert chosen is start
    return found, found.parameters(start.grid(4), None)


def test_the_reference_is_accurate() -> None:
    """Against the exact end of the paths, better than any grid of 4 will be."""
    problem, _ = problem_of()
    noise = problem.moving
    lam, t = torch.tensor([1.0, 0.04], dtype=torch.float64), problem.process.t_min
    top = problem.process.t_max
    ends = noise.x * torch.sqrt((lam + t**2) / (lam + top**2)) * lam / (lam + t**2)
    torch.testing.assert_close(noise.ends, ends, rtol=1e-4, atol=1e-9)


def test_held_out_noise_judges_and_moves_nothing() -> None:
    usual, z = problem_of()
    truth = torch.cat([usual.moving.ends, usual.judging.ends])
    assert len(usual.judging.x) == 3
    other = truth.clone()
    other[9:] += 1  # the held-out quarter
    changed, _ = problem_of(other)
    known, _ = problem_of(truth)
    (value, slope), (value_2, slope_2) = (
        p.by_autograd(z.numpy()) for p in (known, changed)
    )
    assert value == value_2
    assert (slope == slope_2).all()
    grid = artlib.edm(VE(), pinned=False).grid(4)
    far, near = (p.judging.size(grid, "euler").rms for p in (changed, known))
    assert far > 2 * near


def test_the_search_stops_after_iterations_without_a_gain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged = []

    def no_gain(self: Any, nodes: Tensor, told: Any, size: Any) -> None:
        judged.append(nodes)
        self.waited += 1

    monkeypatch.setattr(few_steps._Best, "offer", no_gain)
    problem = mixture_16d(VE(), 8)
    start = artlib.uniform(problem.process)
    with pytest.warns(UserWarning, match="nothing better"):
        refine(start, problem.flow(), problem.x_T, 12, iterations=60)
    assert len(judged) == few_steps.PATIENCE


@pytest.mark.parametrize("objective", ["balanced", "mean norm", "mean square"])
@pytest.mark.parametrize("told", [False, True])
def test_the_gradient_is_the_difference(objective: Any, told: bool) -> None:
    problem = mixture_16d(VE(), 8)
    start = artlib.edm(VE(), pinned=False)
    found, _ = few_steps._problem(
        start, problem.flow(), problem.x_T, 4, "unipc", told, objective, None, 0.25, 3
    )
    nodes = start.grid(4)
    z = found.parameters(nodes, 0.9 * nodes[:-1] if told else None).numpy()
    value, slope = found.by_autograd(z)
    assert value == pytest.approx(found.value_at(z), rel=1e-9)
    for k in range(len(z)):
        step = 1e-5 * np.eye(len(z))[k]
        wanted = (found.value_at(z + step) - found.value_at(z - step)) / 2e-5
        assert slope[k] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "unipc", "ipndm"])
def test_told_levels_go_further_than_nodes(solver: str) -> None:
    # Fresh noise of a mixture: no worse than its start in rms and in the median.
    problem = mixture_16d(VE(), 96)
    flow, start = problem.flow(), artlib.art(problem.flow(), problem.x_T[:16])
    learn, fresh = problem.x_T[:48], problem.x_T[48:]
    exact = problem.exact(fresh, 80.0, 1e-9)
    plan = refine(start, flow, learn, 4, solver=solver, told=True)
    found, before = (
        (y - exact).square().mean(1).sqrt()
        for y in (
            artlib.sample(flow, fresh, plan),
            artlib.sample(flow, fresh, start.grid(4), solver=solver),
        )
    )
    assert float(found.median()) < 0.5 * float(before.median())
    assert float(found.square().mean()) < 0.9 * float(before.square().mean())


def test_of_several_starts_the_best_is_taken() -> None:
    problem = mixture_16d(VE(), 48)
    flow, x = problem.flow(), problem.x_T
    starts = [artlib.uniform(VE()), artlib.art(flow, x[:16])]
    several = refine(starts, flow, x, 4, iterations=5)
    alone = refine(starts[1], flow, x, 4, iterations=5)
    assert torch.equal(several.grid(4), alone.grid(4))


def test_a_budget_of_evaluations_ends_it() -> None:
    problem = mixture_16d(VE(), 32)
    flow, start = problem.flow(), artlib.edm(VE(), pinned=False)
    spent = []
    for evaluations in (500, 5000):
        refined = refine(
            start,
            flow,
            problem.x_T,
            6,
            solver="unipc",
            told=True,
            evaluations=evaluations,
        )
        spent.append(refined.provenance["nfe"])
    assert spent[0] < spent[1]
