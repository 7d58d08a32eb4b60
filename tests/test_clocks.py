"""Clocks per sample: equal to grids where they should be, and what they can save."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from problems import mixture_1d, mixture_16d
from torch import Tensor

import artlib
from artlib.clocks import ExactClock, PredictedClock
from artlib.control.stiffness import feedback_grids
from artlib.flow.denoisers import CountNFE
from artlib.flow.flow import ProbabilityFlow
from artlib.flow.processes import VE, VP, RectifiedFlow
from artlib.solvers.clocked import Clock

F64 = torch.float64


class Fixed(Clock):
    """The same list of times for all samples, or a list for each."""

    def __init__(self, times: Tensor) -> None:
        self.times = times if times.ndim == 2 else times[None]
        self.steps = self.times.shape[1] - 1

    def advance(self, k: int, t: Tensor, x: Tensor, denoised: Tensor) -> Tensor:
        return self.times[:, k + 1].expand(len(t))


@cache
def table(process: Any) -> artlib.StiffnessTable:
    problem = mixture_16d(process, n=64)
    return artlib.stiffness_table(problem.flow(), problem.x_T)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("process", [VE(), VP(), RectifiedFlow()], ids=lambda p: p.name)
def test_one_list_for_all_is_the_grid(process: Any, solver: str) -> None:
    problem = mixture_16d(process, n=8)
    grid = artlib.edm(process, pinned=False).grid(6)
    flow, counter = problem.counted()
    found = artlib.sample(flow, problem.x_T, clock=Fixed(grid), solver=solver)
    assert counter.nfe == artlib.nfe(grid, solver=solver)
    expected = artlib.sample(problem.flow(), problem.x_T, grid, solver=solver)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_list_per_sample_is_each_samples_own_run(solver: str) -> None:
    problem = mixture_16d(VE(), n=6)
    flow = problem.flow()
    grids = torch.stack(
        [
            artlib.edm(VE(), rho=rho, pinned=False).grid(7)
            for rho in (2, 3, 4, 5, 6, 7.0)
        ]
    )
    found = artlib.sample(flow, problem.x_T, clock=Fixed(grids), solver=solver)
    alone = [
        artlib.sample(flow, x[None], grid, solver=solver)
        for x, grid in zip(problem.x_T, grids, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-10, atol=1e-12)


def test_exact_clock_equalises_each_paths_own_cost() -> None:
    """Between its nodes every path has the same length, the integral of sqrt|Q|."""
    t = table(VE())
    grids = feedback_grids(t, 9)
    length = t.cumulative(t.fine_values.sqrt())
    for grid, row in zip(grids[::16], length[::16], strict=True):
        place = torch.from_numpy(
            np.interp(-grid[:-1].log(), -t.fine_times.log().numpy(), row.numpy())
        )
        pieces = torch.diff(torch.cat([place, row[-1:]]))
        assert float((pieces / pieces.mean() - 1).abs().max()) < 0.02


def test_exact_clock_is_the_bound_in_cost() -> None:
    """On its own grid each path pays L^2 / T, and that is the feedback bound."""
    t = table(VE())
    grids = feedback_grids(t, 400)
    steps = grids[:, :-1] - torch.cat([grids[:, 1:-1], t.times[-1].expand(64, 1)], 1)
    integral = t.cumulative(t.fine_values)
    paid = []
    for row, grid, step in zip(integral, grids, steps, strict=True):
        knots = torch.cat([grid[:-1], t.times[-1:]])
        at = np.interp(-knots.log(), -t.fine_times.log().numpy(), row.numpy())
        speed = step * 400 / t.span
        paid.append(float((speed * torch.from_numpy(at).diff()).sum()))
    bound = t.lower_bound("feedback")
    assert sum(paid) / 64 == pytest.approx(bound, rel=0.01)


def test_value_of_information_is_between_zero_and_one() -> None:
    assert 0.5 < artlib.value_of_information(table(VE())) < 0.999
    # Gaussian paths are multiples of one another: nothing to know.
    target = artlib.Gaussian(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64))
    flow = ProbabilityFlow(VE(), target.denoiser(VE()))
    same = artlib.stiffness_table(flow, target.sample_prior(VE(), 32, seed=0))
    assert artlib.value_of_information(same) == pytest.approx(1.0, rel=1e-6)


def test_exact_clock_beats_the_open_loop_where_paths_differ() -> None:
    problem = mixture_1d(VE(), n=256)
    flow = problem.flow()
    exact = problem.exact(problem.x_T, 80.0, 1e-9)
    t = artlib.stiffness_table(flow, problem.x_T)
    errors = {}
    for name, run in {
        "open": {"grid": t.art().grid(20)},
        "exact": {"clock": ExactClock(20)},
    }.items():
        y = artlib.sample(flow, problem.x_T, **run)  # type: ignore[arg-type]
        errors[name] = artlib.terminal_error(y, exact)
    assert errors["exact"] < 0.98 * errors["open"]


@pytest.mark.parametrize("process", [VE(), VP(), RectifiedFlow()], ids=lambda p: p.name)
def test_predicted_clock_without_trust_is_the_open_loop(process: Any) -> None:
    problem = mixture_16d(process, n=8)
    t = table(process)
    for K in (2, 5, 12):
        seen: list[float] = []
        artlib.sample(
            problem.flow(),
            problem.x_T,
            clock=PredictedClock(t, K, trust=0.0),
            callback=lambda k, now, x, seen=seen: seen.append(now),
        )
        expected = t.art().grid(K)
        torch.testing.assert_close(
            torch.tensor(seen, dtype=F64), expected, rtol=0.02, atol=1e-9
        )


def test_predicted_clock_leans_towards_each_paths_own() -> None:
    """The nodes it gives are closer to the paths' own than the open loop's are."""
    problem = mixture_1d(VE(), n=256)
    flow, K = problem.flow(), 24
    t = artlib.stiffness_table(flow, mixture_1d(VE(), n=300).x_T)
    own = feedback_grids(artlib.stiffness_table(flow, problem.x_T), K)
    nodes: list[Tensor] = []

    class Watched(PredictedClock):
        def advance(self, k: int, now: Tensor, x: Tensor, d: Tensor) -> Tensor:
            after = super().advance(k, now, x, d)
            nodes.append(after)
            return after

    clock = Watched(t, K, trust=1.0)
    counter = CountNFE(problem.denoiser)
    artlib.sample(ProbabilityFlow(VE(), counter), problem.x_T, clock=clock)
    assert counter.nfe == K  # nothing beyond the solver's own evaluations
    found = torch.stack(nodes[:-1], 1).log() - own[:, 1:-1].log()
    usual = t.art().grid(K)[1:-1].log() - own[:, 1:-1].log()
    late = slice(K // 2, None)
    assert float(found[:, late].square().mean()) < float(usual[:, late].square().mean())


def test_actor_clock_is_the_learned_clock_on_new_samples() -> None:
    problem = mixture_1d(VE(), n=96)
    flow = problem.flow()
    trainer = artlib.ActorCritic(flow, problem.x_T[:64], steps=10, seed=0)
    for _ in trainer.train(150):
        pass
    nodes: list[Tensor] = []

    class Watched(artlib.ActorClock):
        def advance(self, k: int, now: Tensor, x: Tensor, d: Tensor) -> Tensor:
            after = super().advance(k, now, x, d)
            nodes.append(after)
            return after

    # Along the paths that it learned on it is what `clocks` says, up to the error of
    # the sampler's own path.
    fine = Watched(trainer)
    y = artlib.sample(flow, problem.x_T[:64], clock=fine, solver="heun")
    learned = trainer.clocks()[:, 1:-1]
    gap = (torch.stack(nodes[:-1], 1).log() - learned.log()).abs()
    assert float(gap.median()) < 0.05
    assert bool(torch.isfinite(y).all())
    other = artlib.sample(flow, problem.x_T[64:], clock=artlib.ActorClock(trainer, 6))
    assert (
        artlib.terminal_error(other, problem.exact(problem.x_T[64:], 80.0, 1e-9)) < 0.5
    )


GRID = artlib.edm(VE(), pinned=False).grid(4)
PROBLEM = mixture_16d(VE(), n=4)


def run(clock: Any, **options: Any) -> Tensor:
    return artlib.sample(PROBLEM.flow(), PROBLEM.x_T, clock=clock, **options)


def changed(index: int, value: float) -> Fixed:
    times = GRID.clone()
    times[index] = value
    return Fixed(times)


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (GRID, {}, TypeError, "clock: .*Tensor.*grid"),
    (Fixed(GRID), {"grid": GRID}, ValueError, "clock: .*not both"),
    (Fixed(GRID), {"solver": "rk4"}, ValueError, "solver: .*'rk4'"),
    (
        changed(2, float(GRID[1])),
        {},
        ValueError,
        "clock: 4 of 4 samples stall in step 2",
    ),
    (changed(2, -1.0), {}, ValueError, "clock: .*past the end in step 2"),
    (changed(4, -1.0), {}, ValueError, "clock: .*past the end in step 4"),
    (changed(4, 0.001), {}, ValueError, "clock: .*not arrived at 0 after 4"),
    (changed(2, 0.0), {}, ValueError, "clock: .*arrived at 0 in step 2"),
    (changed(1, math.nan), {}, ValueError, "clock: .*not finite, in step 1"),
    (Fixed(GRID.expand(3, 5)), {}, Exception, "3|clock"),
    (PredictedClock(table(VP()), 4), {}, ValueError, "clock: .*VP"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_clocks_are_refused(case: int) -> None:
    clock, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        run(clock, **options)


def test_bad_options_are_refused() -> None:
    for steps in (0, 2.5):
        with pytest.raises((ValueError, TypeError), match="steps"):
            ExactClock(steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trust"):
        PredictedClock(table(VE()), 4, trust=1.5)
    with pytest.raises(TypeError, match="trainer"):
        artlib.ActorClock(table(VE()))  # type: ignore[arg-type]


@pytest.mark.parametrize("bend", [0.05, 1e9])
@pytest.mark.parametrize("trust", [1.0, 0.5])
def test_the_prediction_is_the_regression_at_the_middle_of_the_step(
    bend: float, trust: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    r"""Written out: |Q| = |dD/dt| / t at the middle, its deviation cut at 3 in log.

    The prediction is the mean times exp(trust beta deviation), with beta the slope of
    the regression of log |Q| at other times on that at the middle.
    """
    process = VE()
    problem = mixture_1d(process, 32)
    table = artlib.stiffness_table(problem.flow(), problem.x_T)
    clock = PredictedClock(table, 6, trust=trust)
    clock.start(problem.flow(), problem.x_T[:1])
    asked: list[Tensor] = []
    usual = clock._quantile

    def quantile(log_density: Tensor, t: Tensor, share: float) -> Tensor:
        asked.append(log_density)
        return usual(log_density, t, share)

    monkeypatch.setattr(clock, "_quantile", quantile)
    x, one = problem.x_T[:1], torch.ones(1, 1, dtype=torch.float64)
    before, now = (torch.tensor([t], dtype=torch.float64) for t in (8.0, 1.0))
    clock.advance(0, before, x, 0 * one)
    clock.advance(1, now, x, bend * one)

    times = table.fine_times[::8]
    logs = table.fine_values[:, ::8]
    mean = logs.mean(0)
    logs = logs.clamp_min(1e-3 * mean).clamp_min(1e-8 * float(logs.max())).log()
    middle = int((times.log() - math.log(4.5)).abs().argmin())
    spread = logs - logs.mean(0)
    beta = (spread * spread[:, middle, None]).mean(0) / spread[:, middle].var(
        correction=0
    )
    size = math.log(bend / 7 / 4.5) - float(logs.mean(0)[middle])
    deviation = min(max(size, -3.0), 3.0)
    assert (abs(deviation) == 3) == (bend > 1)
    expected = 0.5 * (mean.log() + trust * beta * deviation)
    busy = mean > 1e-6 * mean.max()  # below there is a floor
    torch.testing.assert_close(
        asked[1][0][busy], expected[busy], rtol=0.02, atol=0.02 * abs(deviation)
    )
