"""Stochastic samplers: hand loops, limits, exact covariance against samples."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import mixture_16d
from torch import Tensor

import artlib
from artlib.flow.processes import VE, VP, Process, RectifiedFlow
from artlib.solvers.stochastic import gaussian_stochastic_std, sample_stochastic

F64 = torch.float64
SPECTRUM = torch.tensor([4.0, 1.0, 0.3, 0.05, 1e-3], dtype=F64)
NARROW = VE(sigma_min=0.01, sigma_max=10.0)
PROCESSES = [NARROW, VP(), RectifiedFlow(t_max=0.99)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"eta": 0.5, "s_noise": 1.1},
    {"method": "churn"},
    {"method": "churn", "solver": "euler", "churn": 2.0, "s_min": 0.1, "s_max": 3.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_covariance_is_that_of_samples(process: Process, options: Any) -> None:
    count, d = 20_000, len(SPECTRUM)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(4)).double()
    basis = torch.linalg.qr(mixing).Q
    cov = basis @ torch.diag(SPECTRUM) @ basis.T
    target = artlib.Gaussian(torch.zeros(d, dtype=F64), (cov + cov.T) / 2)
    flow = artlib.ProbabilityFlow(process, target.denoiser(process))
    grid = artlib.edm(process, pinned=False).grid(6)
    noise = target.sample_prior(process, count, seed=5)
    along = sample_stochastic(flow, noise, grid, seed=6, **options) @ basis
    exact = gaussian_stochastic_std(process, SPECTRUM, grid, **options)
    assert float((along.std(0) / exact - 1).abs().max()) < 4.5 / math.sqrt(2 * count)
    correlation = torch.corrcoef(along.T) - torch.eye(d)
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(count)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_without_noise_they_are_the_plain_solvers(process: Process) -> None:
    problem = mixture_16d(process, n=4)
    flow, grid = problem.flow(), artlib.edm(process, pinned=False).grid(5)
    plain, start = flow, problem.x_T
    nodes = grid
    if process.name != "ve":  # the samplers step in x / alpha and sigma / alpha
        plain, nodes = flow.to_ve(), process.noise_level(grid)
        start = start / process.alpha(grid[0])
    for options, solver in (
        ({"eta": 0.0}, "euler"),
        ({"method": "churn", "churn": 0.0}, "heun"),
    ):
        found = sample_stochastic(flow, problem.x_T, grid, **options)  # type: ignore[arg-type]
        expected = artlib.sample(plain, start, nodes, solver=solver)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        std = gaussian_stochastic_std(process, SPECTRUM, grid, **options)  # type: ignore[arg-type]
        if process.name == "ve":
            usual = artlib.gaussian_output_std(process, SPECTRUM, grid, solver=solver)
            torch.testing.assert_close(std, usual, rtol=1e-10, atol=0)


def test_churn_is_the_published_algorithm() -> None:
    """Algorithm 2 of Karras et al., written out, draw by draw."""
    problem = mixture_16d(VE(), n=5)
    flow, grid = problem.flow(), artlib.edm(VE()).grid(7)
    options = {"churn": 1.5, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}
    found = sample_stochastic(
        flow,
        problem.x_T,
        grid,
        method="churn",
        seed=3,
        **options,  # type: ignore[arg-type]
    )
    rng = torch.Generator().manual_seed(3)
    x, gamma = problem.x_T, min(1.5 / 7, math.sqrt(2) - 1)
    for t, after in pairwise(grid):
        raised = t * (1 + gamma) if 0.05 <= t <= 50 else t
        if raised > t:
            noise = torch.randn(x.shape, generator=rng, dtype=F64)
            x = x + 1.003 * (raised**2 - t**2).sqrt() * noise
        slope = (x - problem.denoiser(x, raised)) / raised
        y = x + (after - raised) * slope
        if after > 0:
            again = (y - problem.denoiser(y, after)) / after
            y = x + (after - raised) * (slope + again) / 2
        x = y
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-11)


def test_full_ancestral_step_is_the_posterior_given_the_denoised() -> None:
    r"""With eta = 1, x' ~ N(D + r (x - D), s'^2 (1 - r)), r = s'^2 / s^2 (DDPM)."""
    problem = mixture_16d(VE(), n=3)
    x, s, after = problem.x_T[:1].expand(40_000, 16), 80.0, 30.0
    y = sample_stochastic(problem.flow(), x, [s, after], seed=1)
    denoised = problem.denoiser(x[:1], torch.tensor(s, dtype=F64))
    r = after**2 / s**2
    mean, std = denoised + r * (x[:1] - denoised), after * math.sqrt(1 - r)
    gap = (y.mean(0) - mean[0]).abs().max() / (std / math.sqrt(len(y)))
    assert float(gap) < 4.5
    scatter = (y.std(0) / std - 1).abs().max() * math.sqrt(2 * len(y))
    assert float(scatter) < 4.5


@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[2:3], ids=str)
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_many_steps_give_the_data(process: Process, options: Any) -> None:
    def gap(K: int) -> float:
        grid = artlib.edm(process).grid(K)[:-1]  # the step to 0 would hide the order
        std = gaussian_stochastic_std(process, SPECTRUM, grid, **options)
        alpha, sigma = process.alpha(grid[-1]), process.sigma(grid[-1])
        return float((std - torch.sqrt(alpha**2 * SPECTRUM + sigma**2)).norm())

    # At least first order, in the standard deviations.
    assert gap(400) < 0.6 * gap(200) < 0.6 * 0.6 * gap(100) < 0.1


def test_noise_is_the_seeds_alone() -> None:
    problem = mixture_16d(VP(), n=3)
    flow, grid = problem.flow(), artlib.edm(VP()).grid(4)
    state = torch.random.get_rng_state()
    first, same, other = (
        sample_stochastic(flow, problem.x_T, grid, seed=s)
        for s in (1, torch.Generator().manual_seed(1), 2)
    )
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sample_stochastic(flow, problem.x_T.float(), grid).dtype == torch.float32


def test_without_a_seed_the_noise_is_fresh() -> None:
    problem = mixture_16d(VP(), n=3)
    grid = artlib.edm(VP()).grid(4)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    a, b = (sample_stochastic(problem.flow(), problem.x_T, grid) for _ in range(2))
    assert not torch.allclose(a, b)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(half: torch.dtype) -> None:
    problem = mixture_16d(VE(), n=300)
    flow, grid, x = problem.flow(), artlib.edm(VE()).grid(5), problem.x_T.abs().to(half)
    found = sample_stochastic(flow, x, grid, seed=1)
    assert found.dtype == torch.float32
    assert torch.equal(found, sample_stochastic(flow, x.float(), grid, seed=1))


def test_no_level_above_the_first_is_visited() -> None:
    problem = mixture_16d(VE(), n=2)
    seen: list[float] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t))
        return problem.denoiser(x, t)

    flow = artlib.ProbabilityFlow(VE(), denoiser)
    sample_stochastic(flow, problem.x_T, artlib.edm(VE()).grid(5), method="churn")
    assert max(seen) == 80.0
    assert len(seen) == 9  # Heun's evaluations; noise costs none


PROBLEM = mixture_16d(VE(), n=2)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "langevin"}, "method: .*'langevin'"),
    ({"solver": "heun"}, "solver: .*'heun'"),
    ({"method": "churn", "solver": "rk4"}, "solver: .*'rk4'"),
    ({"eta": 1.5}, "eta: .*1.5"),
    ({"eta": math.nan}, "eta: .*nan"),
    ({"method": "churn", "churn": -1.0}, "churn: .*-1"),
    ({"s_min": 2.0, "s_max": 1.0}, "s_min: "),
    ({"s_noise": 0.0}, "s_noise: .*0"),
    ({"grid": [100.0, 1.0, 0.0]}, "grid: .*100"),
    ({"grid": [1.0, 2.0, 0.0]}, "grid: .*descending"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_refused(case: int) -> None:
    options, message = BAD[case]
    options = {"grid": [80.0, 1.0, 0.0], **options}
    grid = options.pop("grid")
    with pytest.raises(ValueError, match=message):
        sample_stochastic(PROBLEM.flow(), PROBLEM.x_T, grid, **options)
    with pytest.raises(ValueError, match=message):
        gaussian_stochastic_std(VE(), SPECTRUM, grid, **options)


def test_impossible_laws_and_flows_are_refused() -> None:
    with pytest.raises(ValueError, match="variances"):
        gaussian_stochastic_std(VE(), [-1.0], [80.0, 0.0])
    with pytest.raises(TypeError, match="flow"):
        sample_stochastic(PROBLEM.denoiser, PROBLEM.x_T, [80.0, 0.0])  # type: ignore[arg-type]
    process = RectifiedFlow()
    problem = mixture_16d(process, n=2)
    with pytest.raises(ValueError, match=r"grid: .*infinite.*0\.999"):
        sample_stochastic(problem.flow(), problem.x_T, [1.0, 0.5, 0.0])


def test_churn_acts_between_s_min_and_s_max_only() -> None:
    """Noise above s_max changes nothing; between the two it is the step's own."""
    process, lam = VE(), [1.0, 0.1]
    grid = artlib.edm(process).grid(8)
    usual = artlib.gaussian_output_std(process, lam, grid, solver="heun")
    level = float(process.noise_level(grid[5]))
    options: dict[str, Any] = {"method": "churn", "churn": 2.0}

    def std(**bounds: float) -> Tensor:
        return gaussian_stochastic_std(process, lam, grid, **options, **bounds)

    below = std(s_max=0.5 * process.t_min)
    torch.testing.assert_close(below, usual, rtol=1e-7, atol=0)
    alone = std(s_min=0.99 * level, s_max=1.01 * level)
    assert float((alone / usual - 1).abs().max()) > 1e-4  # one step, and not none
    assert float((std() / alone - 1).abs().max()) > 1e-4  # nor all


def test_churn_raises_the_noise_by_at_most_root_two() -> None:
    process, lam, K = VE(), [1.0, 0.1], 8
    grid = artlib.edm(process).grid(K)

    def std(churn: float) -> Tensor:
        return gaussian_stochastic_std(process, lam, grid, method="churn", churn=churn)

    cap = K * (math.sqrt(2) - 1)
    torch.testing.assert_close(std(100 * cap), std(cap), rtol=1e-12, atol=0)
    assert not torch.allclose(std(0.9 * cap), std(cap), rtol=1e-4)
