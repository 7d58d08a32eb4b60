"""Rivals of few steps: DMN's bound, OSS's ways, LD3's numbers, AYS's lists."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from problems import mixture_16d
from scipy.integrate import quad
from scipy.optimize import minimize
from torch import Tensor

import artlib
from artlib.flow.flow import ProbabilityFlow
from artlib.flow.processes import VE, VP, RectifiedFlow
from artlib.rivals import (
    AYS,
    ays,
    decoupled_times,
    multistep_bound,
    multistep_optimal,
    student_steps,
    student_ways,
    trained_plan,
)

F64 = torch.float64
PROCESSES = [VE(), VP(), RectifiedFlow()]


# DMN.


def bound_by_quadrature(levels: np.ndarray, power: int) -> float:
    """F from the module's formula, its integrals by quadrature."""
    K = len(levels) - 1
    sigma = (1 + np.exp(2 * levels)) ** -0.5
    error = sigma**power / np.sqrt(1 - sigma**2)
    apart, together = 0.0, np.zeros(K)
    for s in range(K):
        degree = min(s, K - 1 - s, 2)
        used = range(s - degree, s + 1)
        row = np.zeros(K)
        for j in used:

            def integrand(v: float, j: int = j, used: range = used) -> float:
                others = [i for i in used if i != j]
                ratios = [(v - levels[i]) / (levels[j] - levels[i]) for i in others]
                return math.exp(v) * math.prod(ratios)

            row[j] = error[j] * quad(integrand, levels[s], levels[s + 1])[0]
        if degree == 0 or (K <= 7 and s < 3):
            apart += float(np.linalg.norm(row))
        else:
            together += row
    return apart + float(np.abs(together).sum())


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("K", [1, 2, 3, 4, 7, 8, 11])
def test_bound_is_the_sum_of_its_integrals(K: int, power: int) -> None:
    process = VP()
    grid = artlib.edm(process, pinned=False).grid(K)
    places = torch.cat([grid[:-1], torch.tensor([process.t_min], dtype=F64)])
    levels = (process.log_snr(places) / 2).numpy()
    found = multistep_bound(process, grid, power=power)
    assert found == pytest.approx(bound_by_quadrature(levels, power), rel=1e-7)


@pytest.mark.parametrize(
    ("K", "theirs"),
    [(3, 916.5431081947713), (5, 428.5785029034234), (8, 62.11856710690216),
     (10, 31.955166790507206), (20, 12.387118438489388)],
)  # fmt: skip
def test_bound_is_that_of_the_code_beside(K: int, theirs: float) -> None:
    """Even steps in log-SNR in VE, p = 1: numbers that their code gave."""
    grid = artlib.log_snr(VE(), pinned=False).grid(K)
    assert multistep_bound(VE(), grid) == pytest.approx(theirs, rel=1e-12)


def test_three_steps_of_least_bound_are_those_of_a_search() -> None:
    process = VE()
    found = multistep_optimal(process, 3).grid(3)
    least = multistep_bound(process, found)
    span = torch.logspace(math.log10(0.0021), math.log10(79), 60, dtype=F64).flip(0)
    values = {
        (float(a), float(b)): multistep_bound(process, [80.0, float(a), float(b), 0.0])
        for i, a in enumerate(span[:-1])
        for b in span[i + 1 :]
    }
    best = min(values, key=lambda pair: values[pair])
    assert least <= values[best]
    polished = minimize(
        lambda z: multistep_bound(process, [80.0, *np.exp(z).tolist(), 0.0]),
        np.log(best),
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-9},
    )
    assert least == pytest.approx(polished.fun, rel=1e-7)
    np.testing.assert_allclose(found[1:3].log().numpy(), polished.x, atol=1e-4)


def test_five_steps_are_those_of_the_code_beside() -> None:
    theirs = [80.0, 3.0628, 1.1135, 0.3737, 0.0723]
    schedule = multistep_optimal(VE(), 5)
    found = schedule.grid(5)
    np.testing.assert_allclose(found[:-1].numpy(), theirs, rtol=1e-3)
    bound = schedule.provenance["bound"]
    assert bound == pytest.approx(102.2262624858285, rel=1e-9)
    assert bound == pytest.approx(multistep_bound(VE(), found), rel=1e-9)


def test_least_bound_of_eight_steps_is_a_list_of_no_use() -> None:
    """Why the start and the search are the published ones."""
    start = [67.2147, 0.1376, 0.0262, 0.0073, 0.0034, 0.0028, 0.0022]

    def bound(z: np.ndarray) -> float:
        nodes = [80.0, *np.exp(z).tolist(), 0.0]
        inside = nodes[-2] > VE().t_min and all(
            a > b for a, b in itertools.pairwise(nodes)
        )
        return multistep_bound(VE(), nodes) if inside else 1e9

    options = {"maxfev": 4000, "xatol": 1e-12, "fatol": 1e-9, "adaptive": True}
    done = minimize(bound, np.log(start), method="Nelder-Mead", options=options)
    assert done.fun < 5
    deep = [80.0, *np.exp(done.x).tolist(), 0.0]
    flow = mixture_16d(VE(), n=16)
    ends = flow.exact(flow.x_T, VE().t_max, 0.0)
    errors = [
        float((artlib.sample(flow.flow(), flow.x_T, g, solver="unipc3") - ends).norm())
        for g in (torch.tensor(deep), artlib.log_snr(VE(), pinned=False).grid(8))
    ]
    assert errors[0] > 2 * errors[1]


def test_bound_belongs_to_the_log_snr_not_to_the_process() -> None:
    vp = VP()
    ends = [float(vp.noise_level(t)) for t in (vp.t_min, vp.t_max)]
    ve = VE(*ends)
    grids = [multistep_optimal(p, 4).grid(4) for p in (vp, ve)]
    levels = vp.noise_level(grids[0][1:-1])
    torch.testing.assert_close(levels, grids[1][1:-1], rtol=1e-4, atol=0)
    assert multistep_optimal(RectifiedFlow(), 1).grid(1).tolist() == [1.0, 0.0]
    assert len(multistep_optimal(RectifiedFlow(), 3).grid(3)) == 4


def test_bound_refuses() -> None:
    with pytest.raises(ValueError, match=r"grid: its last but one node .* t_min"):
        multistep_bound(VE(), artlib.edm(VE()).grid(5))
    with pytest.raises(ValueError, match="power: expected 1 or 2, got 3"):
        multistep_optimal(VE(), 5, power=3)
    with pytest.raises(ValueError, match="K: expected at least 1"):
        multistep_optimal(VE(), 0)


# OSS.


def final_error(flow: ProbabilityFlow, x: Tensor, times: Tensor, way: Any) -> float:
    """Squared distance to a teacher that visits all candidates."""
    teacher = artlib.sample(flow, x, times, solver="euler")
    student = artlib.sample(flow, x, times[list(way)], solver="euler")
    return float((student - teacher).square().mean())


@pytest.mark.parametrize("K", [1, 2, 3, 5])
@pytest.mark.parametrize("variance", [0.1, 0.7, 4.0])
def test_in_one_dimension_no_way_ends_nearer(variance: float, K: int) -> None:
    """Euler's steps on a Gaussian in VE all err to one side, and keep their order."""
    process = VE()
    target = artlib.Gaussian([0.0], [[variance]])
    flow = ProbabilityFlow(process, target.denoiser(process))
    x = target.sample_prior(process, 1, seed=1)
    times = artlib.edm(process, pinned=False).grid(9)
    way = student_ways(flow, x, times, K)[0].tolist()
    best = min(
        final_error(flow, x, times, (0, *inner, 9))
        for inner in itertools.combinations(range(1, 9), K - 1)
    )
    assert final_error(flow, x, times, way) == pytest.approx(best, rel=1e-9)
    assert way[0] == 0
    assert way[-1] == 9


def way_by_hand(flow: ProbabilityFlow, x: Tensor, times: Tensor, K: int) -> list[int]:
    """The recursion of the module for one noise, candidate by candidate."""
    n = len(times) - 1
    teacher = [x]
    for i in range(n):
        step = times[i + 1] - times[i]
        teacher.append(teacher[-1] + step * flow.velocity(teacher[-1], times[i]))
    state, apart, parents = {0: x}, {0: 0.0}, []
    parent = dict.fromkeys(range(n + 1), 0)
    for _ in range(K):
        parent, new = dict(parent), dict(state)
        for j in range(1, n + 1):
            for i in sorted(state):
                if i >= j:
                    continue
                step = times[j] - times[i]
                landed = state[i] + step * flow.velocity(state[i], times[i])
                found = float((landed - teacher[j]).square().mean())
                if found < apart.get(j, math.inf):
                    apart[j], parent[j], new[j] = found, i, landed
        state = new
        parents.append(parent)
    way = [n]
    for parent in reversed(parents):
        way.append(parent[way[-1]])
    return way[::-1]


@pytest.mark.parametrize("K", [2, 3, 5])
def test_ways_follow_the_recursion(K: int) -> None:
    problem = mixture_16d(VE(), n=5)
    flow, times = problem.flow(), artlib.log_snr(VE(), pinned=False).grid(10)
    found = student_ways(flow, problem.x_T, times, K)
    for way, x in zip(found, problem.x_T, strict=True):
        assert way.tolist() == way_by_hand(flow, x[None], times, K)
    # One state at a time is kept: on several dimensions that is no search.
    assert bool((found.diff(dim=1) >= 0).all())


def test_median_of_the_ways_serves_all() -> None:
    problem = mixture_16d(VE(), n=9)
    flow, counter = problem.counted()
    schedule = student_steps(flow, problem.x_T, 4, points=16)
    # The teacher's steps, one from the start, and then one from each candidate.
    assert schedule.provenance["nfe"] == counter.nfe == 16 + 1 + 3 * 16
    times = artlib.edm(VE(), pinned=False).grid(16)
    ways = student_ways(flow, problem.x_T, times, 4).sort(0).values[4]
    assert schedule.grid(4).tolist() == times[ways].tolist()
    parts = student_steps(flow, problem.x_T, 4, points=16, batch=4)
    assert torch.equal(parts.grid(4), schedule.grid(4))
    every = student_steps(flow, problem.x_T, 16, points=16).grid(16)
    assert every.tolist() == times.tolist()
    with pytest.raises(ValueError, match="K: 17 steps need at least 17 candidates"):
        student_steps(flow, problem.x_T, 17, points=16)
    with pytest.raises(ValueError, match="schedule: it belongs to"):
        student_steps(flow, problem.x_T, 4, candidates=artlib.edm(VP()))


# LD3.


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_numbers_of_nothing_are_even_steps(process: Any) -> None:
    zero = torch.zeros(6, dtype=F64)
    nodes, told = decoupled_times(process, zero, zero)
    expected = artlib.log_snr(process, pinned=False).grid(6)
    if float(process.alpha(process.t_max)) > 0:
        torch.testing.assert_close(nodes, expected, rtol=1e-9, atol=0)
    levels = process.log_snr(nodes[1:-1])
    torch.testing.assert_close(levels.diff(), levels.diff().mean().expand(4))
    assert torch.equal(told, nodes[:-1])
    nodes, _ = decoupled_times(process, zero, zero, coordinate="time")
    even = torch.linspace(process.t_max, process.t_min, 7, dtype=F64)
    torch.testing.assert_close(nodes[:-1], even[:-1])
    assert float(nodes[-1]) == 0


@pytest.mark.parametrize("coordinate", ["log-snr", "time"])
def test_a_told_level_stays_within_half_the_least_gap(coordinate: Any) -> None:
    process = VP()
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(5, generator=rng, dtype=F64, requires_grad=True)
    b = 100 * torch.randn(5, generator=rng, dtype=F64)
    nodes, told = decoupled_times(process, a, b, coordinate=coordinate)

    def place(t: Tensor) -> Tensor:
        return process.log_snr(t) / 2 if coordinate == "log-snr" else t

    end = nodes.new_tensor([process.t_min])
    gaps = place(torch.cat([nodes[:-1], end])).diff().abs().detach()
    away = (place(told) - place(nodes[:-1])).detach()
    half = float(gaps.min()) / 2
    torch.testing.assert_close(away[1:], half * b[1:].sign(), rtol=1e-6, atol=1e-9)
    assert float(away[0]) == 0
    # Gaps are shares of the range, and the gradient is that of differences.
    shares = torch.softmax(a.detach(), 0)
    torch.testing.assert_close(gaps / gaps.sum(), shares)
    (slope,) = torch.autograd.grad(nodes[2], a)
    for k, e in enumerate(torch.eye(5, dtype=F64)):
        up, down = (
            decoupled_times(process, a.detach() + h * e, b, coordinate=coordinate)[0][2]
            for h in (1e-5, -1e-5)
        )
        assert float(slope[k]) == pytest.approx(float(up - down) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("solver", ["euler", "unipc3"])
def test_training_is_worth_it(solver: str) -> None:
    problem = mixture_16d(VE(), n=96)
    flow, K = problem.flow(), 5
    ends = problem.exact(problem.x_T, VE().t_max, 0.0)
    plan = trained_plan(
        flow, problem.x_T[:48], K, solver=solver, reference=ends[:48], batch=4
    )
    notes = plan.provenance
    assert notes["error_after"] < notes["error_before"]
    assert not plan.is_honest
    start = artlib.log_snr(VE(), pinned=False).grid(K)
    judged = artlib.sample(flow, problem.x_T[24:48], plan) - ends[24:48]
    assert float(judged.square().mean().sqrt()) == pytest.approx(notes["error_after"])
    before, after = (
        float((x - ends[48:]).square().mean())
        for x in (
            artlib.sample(flow, problem.x_T[48:], start, solver=solver),
            artlib.sample(flow, problem.x_T[48:], plan),
        )
    )
    assert after < 0.7 * before
    again = trained_plan(
        flow, problem.x_T[:48], K, solver=solver, reference=ends[:48], batch=4
    )
    assert torch.equal(again.nodes, plan.nodes)


def test_levels_rest_in_the_first_rounds() -> None:
    problem = mixture_16d(VE(), n=12)
    options: dict[str, Any] = {"solver": "euler", "batch": 3}
    first = trained_plan(problem.flow(), problem.x_T, 4, rounds=(2, 0), **options)
    assert first.is_honest
    none = trained_plan(problem.flow(), problem.x_T, 4, rounds=(0, 0), **options)
    start = artlib.log_snr(VE(), pinned=False).grid(4)
    torch.testing.assert_close(none.nodes, start, rtol=1e-9, atol=0)


def test_noise_moves_within_its_ball() -> None:
    """At the first node the network sees how far each has gone."""
    problem = mixture_16d(VE(), n=8)
    seen: list[Tensor] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        if float(t.detach().max()) == VE().t_max and len(x) == 4:
            seen.append(x.detach() / VE().t_max)
        return problem.denoiser(x, t)

    flow = ProbabilityFlow(VE(), watched)
    ends = problem.exact(problem.x_T, VE().t_max, 0.0)
    drawn = problem.x_T / VE().t_max
    for radius in (0.0, 0.01):
        seen.clear()
        trained_plan(
            flow, problem.x_T, 4, batch=4, radius=radius, reference=ends, solver="euler"
        )
        # Rows of a batch come in any order: their nearest drawn noise is meant.
        away = [float(torch.cdist(x, drawn).min(1).values.max()) for x in seen]
        assert max(away) <= radius * (1 + 1e-6) + 1e-7
        assert (max(away) > 1e-6) == (radius > 0)


@pytest.mark.usefixtures("as_a_user")
def test_trained_plan_refuses() -> None:
    problem = mixture_16d(VE(), n=4)
    flow, x_T = problem.flow(), problem.x_T
    with pytest.raises(ValueError, match="K: expected at least 2"):
        trained_plan(flow, x_T, 1)
    with pytest.raises(ValueError, match="solver: heun makes several evaluations"):
        trained_plan(flow, x_T, 4, solver="heun")
    with pytest.raises(ValueError, match="coordinate: expected 'log-snr' or 'time'"):
        trained_plan(flow, x_T, 4, coordinate="lambda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="radius: expected a number >= 0, got -1"):
        trained_plan(flow, x_T, 4, radius=-1.0)
    with pytest.raises(ValueError, match="held_out_share"):
        trained_plan(flow, x_T, 4, held_out_share=1.0)

    def no_gradient(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return problem.denoiser(x.detach(), t.detach())

    blind = ProbabilityFlow(VE(), no_gradient)
    with pytest.raises(RuntimeError, match="denoiser: it passes no gradient on"):
        trained_plan(blind, x_T, 4)


# AYS, stretched.


@pytest.mark.parametrize("model", AYS)
def test_a_stretched_list_keeps_its_shares_of_the_log_range(model: str) -> None:
    process = VE()
    grid = ays(model, process, stretched=True).grid(10)
    levels = torch.tensor(AYS[model], dtype=F64)

    def shares(v: Tensor) -> Tensor:
        return (v / v[0]).log() / (v[-1] / v[0]).log()

    found = torch.cat([grid[:-1], torch.tensor([process.t_min], dtype=F64)])
    torch.testing.assert_close(shares(found), shares(levels), rtol=1e-9, atol=1e-12)
    assert float(grid[0]) == process.t_max
    # Over its own range nothing is stretched.
    own = VE(float(levels[-1]), float(levels[0]))
    torch.testing.assert_close(
        ays(model, own, stretched=True).grid(7), ays(model).grid(7), rtol=1e-9, atol=0
    )


def test_no_list_is_stretched_to_infinity() -> None:
    with pytest.raises(ValueError, match="process: its noise level at t_max is inf"):
        ays("sdxl", RectifiedFlow(), stretched=True)
    with pytest.raises(ValueError, match="stretched=True stretches this one"):
        ays("sdxl", VE())
