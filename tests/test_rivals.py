"""Rebuilt rivals: equal to brute force, to analytic grids, and to ART in the limit."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from problems import mixture_16d
from torch import Tensor

import artlib
from artlib.flow.flow import ProbabilityFlow
from artlib.flow.processes import VE, VP, RectifiedFlow
from artlib.rivals import (
    AYS,
    JumpCosts,
    ays,
    euler_jumps,
    girsanov,
    girsanov_bound,
)

F64 = torch.float64
PROCESSES = [VE(), VP(), RectifiedFlow()]


def gaussian_flow(process: Any, variance: float) -> tuple[Any, ProbabilityFlow]:
    target = artlib.Gaussian([0.0], [[variance]])
    return target, ProbabilityFlow(process, target.denoiser(process))


def random_jumps(n: int, seed: int) -> JumpCosts:
    process = VE()
    times = torch.logspace(0, -3, n - 1, dtype=F64) * process.t_max
    times = torch.cat([times, torch.zeros(1, dtype=F64)])
    rng = torch.Generator().manual_seed(seed)
    return JumpCosts(process, times, torch.rand(n, n, generator=rng, dtype=F64))


@pytest.mark.parametrize("K", [1, 2, 3, 5, 7])
def test_dynamic_programming_is_a_search_over_all_grids(K: int) -> None:
    jumps = random_jumps(8, seed=K)
    total = {
        nodes: sum(float(jumps.costs[i, j]) for i, j in itertools.pairwise(nodes))
        for middle in itertools.combinations(range(1, 7), K - 1)
        for nodes in [(0, *middle, 7)]
    }
    best = min(total, key=lambda nodes: total[nodes])
    assert jumps.grid(K).tolist() == jumps.times[list(best)].tolist()
    assert jumps.cost(K) == pytest.approx(total[best], rel=1e-12)


@pytest.mark.parametrize("K", [2, 3, 5])
def test_a_coefficient_weighs_later_steps_more(K: int) -> None:
    plain = random_jumps(8, seed=K)
    jumps = JumpCosts(plain.process, plain.times, plain.costs, coefficient=1.15)
    total = {
        nodes: sum(
            1.15**k * float(jumps.costs[i, j])
            for k, (i, j) in enumerate(itertools.pairwise(nodes))
        )
        for middle in itertools.combinations(range(1, 7), K - 1)
        for nodes in [(0, *middle, 7)]
    }
    best = min(total, key=lambda nodes: total[nodes])
    assert jumps.grid(K).tolist() == jumps.times[list(best)].tolist()
    assert jumps.cost(K) == pytest.approx(total[best], rel=1e-12)


def test_deviation_is_the_distance_from_the_chord() -> None:
    """In one dimension there is none, and no step costs anything."""
    target, flow = gaussian_flow(VE(), 1.0)
    x_T = target.sample_prior(VE(), 4, seed=0)
    jumps = euler_jumps(flow, x_T, points=9, measure="deviation", coefficient=1.15)
    assert float(jumps.costs.abs().max()) < 1e-9
    assert jumps.coefficient == 1.15
    problem = mixture_16d(VE(), n=4)
    flow = problem.flow()
    plain = euler_jumps(flow, problem.x_T, points=9)
    off = euler_jumps(flow, problem.x_T, points=9, measure="deviation")
    # Two points are no further apart off a line than in space.
    assert bool((off.costs <= plain.costs + 1e-9).all())
    with pytest.raises(ValueError, match=r"measure: .*'l3'"):
        euler_jumps(flow, problem.x_T, measure="l3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"coefficient: .*-1"):
        euler_jumps(flow, problem.x_T, coefficient=-1.0)


def test_what_lies_below_the_diagonal_is_not_looked_at() -> None:
    jumps = random_jumps(8, seed=0)
    spoilt = jumps.costs.tril() * float("nan") + jumps.costs.triu(1)
    other = JumpCosts(
        jumps.process,
        jumps.times,
        torch.where(torch.ones(8, 8).triu(1).bool(), jumps.costs, spoilt),
    )
    assert torch.equal(other.grid(4), jumps.grid(4))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_a_jump_is_what_one_euler_step_leaves(process: Any) -> None:
    variance = 0.7
    target, flow = gaussian_flow(process, variance)
    x_T = target.sample_prior(process, 32, seed=0)
    jumps = euler_jumps(flow, x_T, points=24, method="dopri5")
    scale = torch.sqrt(process.alpha(jumps.times) ** 2 * variance
                       + process.sigma(jumps.times) ** 2)  # fmt: skip
    size = float((x_T / scale[0]).abs().mean())
    for i, j in [(0, 1), (0, 24), (5, 9), (20, 23), (11, 24)]:
        x = size * scale[i].reshape(1, 1)
        landed = x + (jumps.times[j] - jumps.times[i]) * flow.velocity(
            x, jumps.times[i]
        )
        end = size * scale[j].reshape(1, 1)
        if j == 24:  # an Euler step from t_min, the same for all that jump to 0
            end = flow.denoise(size * scale[23].reshape(1, 1), jumps.times[23])
        left = float((landed - end).abs())
        assert float(jumps.costs[i, j]) == pytest.approx(left, rel=2e-3, abs=2e-5)


def test_is_arts_problem_on_a_list_of_candidates() -> None:
    """2 K times its least sum tends to T times ART's bound, its grids to ART's."""
    problem = mixture_16d(VE(), n=64)
    jumps = euler_jumps(problem.flow(), problem.x_T, points=300)
    table = artlib.stiffness_table(problem.flow(), problem.x_T)
    bound = table.span * table.lower_bound()
    gaps = [1 - 2 * K * jumps.cost(K) / bound for K in (12, 24)]
    # Below the bound, which is that of many steps, by a share that goes as 1 / K.
    assert 0.05 < gaps[1] < gaps[0] < 0.25
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(1, abs=0.12)
    clock, K = table.art(), 24
    readings = clock.clock(jumps.grid(K)[:-1]) / table.span
    even = torch.linspace(0, 1, K + 1, dtype=F64)[:-1]
    assert float((readings - even).abs().max()) < 1 / K


def test_one_table_serves_all_budgets_and_counts_its_evaluations() -> None:
    problem = mixture_16d(VE(), n=8)
    flow, counter = problem.counted()
    jumps = euler_jumps(flow, problem.x_T, points=20, method="heun")
    spent = counter.nfe
    assert jumps.nfe == spent == 2 * 19 + 1
    costs = [jumps.cost(K) for K in range(1, 21)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(costs))
    assert counter.nfe == spent
    table = artlib.compare(
        flow, {"GITS": jumps}, [problem.x_T], {"euler": [4]}, ends=[problem.x_T]
    )
    assert table.labels("euler") == ["GITS"]


def gaussian_loss(variance: float, level: Tensor) -> Tensor:
    return variance * level**2 / (variance + level**2)


def test_bound_of_a_gaussian_is_the_integral_on_paper() -> None:
    r"""With m = v l^2 / (v + l^2): \int m / l^3 = log(l^2 / (v + l^2)) / 2."""
    process, v = VE(), 0.49
    grid = artlib.edm(process, pinned=False).grid(6)
    levels = torch.cat([grid[:-1], torch.tensor([process.t_min], dtype=F64)])
    upper, lower = levels[:-1], levels[1:]
    frozen = gaussian_loss(v, upper) * (lower**-2 - upper**-2) / 2
    shed = torch.log(upper**2 / (v + upper**2) * (v + lower**2) / lower**2) / 2
    exact = float((frozen - shed).sum())
    found = girsanov_bound(process, grid, lambda m: gaussian_loss(v, m))
    assert found == pytest.approx(exact, rel=1e-4)
    # A pinned list ends at t_min by itself; a list in another process that visits the
    # same noise levels is worth the same.
    pinned = torch.cat([levels, torch.zeros(1, dtype=F64)])
    again = girsanov_bound(process, pinned, lambda m: gaussian_loss(v, m))
    assert again == pytest.approx(found, rel=1e-12)
    vp = VP()
    visited = vp.noise_level(artlib.log_snr(vp).grid(6)[:-1])
    ve = VE(sigma_min=float(visited[-1]), sigma_max=float(visited[0]))
    both = [
        girsanov_bound(p, p_grid, lambda m: gaussian_loss(v, m))
        for p, p_grid in (
            (vp, artlib.log_snr(vp).grid(6)),
            (ve, artlib.log_snr(ve).grid(6)),
        )
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-6)


def test_on_a_gaussian_each_step_gets_the_same_information() -> None:
    """The density is that of log(1 + SNR) / 2, the information about x_0."""
    process, variance = VE(), 0.49
    _, flow = gaussian_flow(process, variance)
    x_0 = variance**0.5 * torch.randn(
        60_000, 1, generator=torch.Generator().manual_seed(1), dtype=F64
    )
    schedule = girsanov(flow, x_0, points=64)

    def information(t: Tensor) -> Tensor:
        return torch.log1p(variance / t**2) / 2

    K = 20
    levels = information(schedule.grid(K)[:-1])
    total = information(torch.tensor(process.t_min, dtype=F64))
    start = information(torch.tensor(process.t_max, dtype=F64))
    even = start + (total - start) * torch.arange(K, dtype=F64) / K
    assert float((levels - even).abs().max()) < 0.01 * float(total)


def test_nothing_has_a_lower_bound() -> None:
    process, variance, K = VE(), 0.49, 16
    target, flow = gaussian_flow(process, variance)
    rng = torch.Generator().manual_seed(1)
    x_0 = variance**0.5 * torch.randn(60_000, 1, generator=rng, dtype=F64)
    x_T = target.sample_prior(process, 256, seed=0)

    def bound(schedule: artlib.Schedule) -> float:
        return girsanov_bound(
            process, schedule.grid(K), lambda m: gaussian_loss(variance, m)
        )

    ours = bound(girsanov(flow, x_0))
    for other in (
        artlib.art(flow, x_T),
        artlib.edm(process, pinned=False),
        artlib.log_snr(process, pinned=False),
        artlib.kl_optimal(process),
    ):
        assert ours < 0.9 * bound(other), other.name


@pytest.mark.parametrize("process", [VP(), RectifiedFlow()], ids=lambda p: p.name)
def test_bound_belongs_to_the_noise_levels_not_to_the_process(process: Any) -> None:
    target = artlib.GaussianMixture(
        torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), torch.tensor([0.2, 0.3]), torch.ones(2)
    )
    x_0 = target.sample(500, seed=3)
    levels = [
        float(process.noise_level(t)) for t in (process.t_min, 0.98 * process.t_max)
    ]
    ve = VE(sigma_min=levels[0], sigma_max=200.0)
    grids = []
    for p in (process, ve):
        schedule = girsanov(ProbabilityFlow(p, target.denoiser(p)), x_0)
        grids.append(p.noise_level(schedule.grid(9)[1:-1]))
    assert float((grids[0] / grids[1]).log().abs().max()) < 0.03


def test_one_evaluation_a_level_and_no_graph() -> None:
    recording: list[bool] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        recording.append(torch.is_grad_enabled())
        return x / (1 + t**2)

    flow = ProbabilityFlow(VE(), denoiser)
    x_0 = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    schedule = girsanov(flow, x_0, points=17)
    assert recording == [False] * 17
    assert schedule.provenance["nfe"] == 17
    euler_jumps(flow, x_0, points=5)
    assert not any(recording)


def test_bad_input_is_named() -> None:
    target, flow = gaussian_flow(VE(), 1.0)
    x_T = target.sample_prior(VE(), 4, seed=0)
    for K in (8, 9):
        with pytest.raises(ValueError, match=f"K: {K} steps need at least {K + 1}"):
            random_jumps(8, seed=0).grid(K)
    with pytest.raises(ValueError, match="expected at least 1"):
        random_jumps(8, seed=0).grid(0)
    with pytest.raises(ValueError, match="points"):
        euler_jumps(flow, x_T, points=1)
    with pytest.raises(ValueError, match="x_T"):
        euler_jumps(flow, x_T * float("nan"))
    with pytest.raises(ValueError, match="x_0"):
        girsanov(flow, x_T * float("inf"))
    with pytest.raises(ValueError, match="points"):
        girsanov(flow, x_T, points=3)
    with pytest.raises(ValueError, match="a constant"):
        girsanov(ProbabilityFlow(VE(), lambda x, t: 0 * x), x_T)
    with pytest.raises(ValueError, match="denoising loss"):
        girsanov(ProbabilityFlow(VE(), lambda x, t: x * float("nan")), x_T)
    jumps = random_jumps(8, seed=0)
    with pytest.raises(ValueError, match=r"costs: .* >= 0"):
        JumpCosts(jumps.process, jumps.times, -jumps.costs)
    for bad in (float("nan"), float("inf")):
        spoilt = jumps.costs.clone()
        spoilt[2, 5] = bad
        with pytest.raises(ValueError, match="costs"):
            JumpCosts(jumps.process, jumps.times, spoilt)
    twice = jumps.times.clone()
    twice[3] = twice[2]
    with pytest.raises(ValueError, match="times: expected candidates descending"):
        JumpCosts(jumps.process, twice, jumps.costs)
    with pytest.raises(ValueError, match="times"):
        JumpCosts(jumps.process, jumps.times.flip(0), jumps.costs)
    with pytest.raises(ValueError, match=r"grid: .* signal left"):
        girsanov_bound(RectifiedFlow(), [1.0, 0.5, 0.0], lambda m: m)
    with pytest.raises(ValueError, match="shapes"):
        JumpCosts(jumps.process, jumps.times[1:], jumps.costs)


def test_more_noise_never_helps_a_loss() -> None:
    """A dip of the measured loss is noise: as if the loss stayed level up to there."""
    process = VE(sigma_min=0.01, sigma_max=10.0)
    x_0 = torch.zeros(4, 1, dtype=torch.float64)

    def flow(loss: Any) -> ProbabilityFlow:
        """A denoiser whose loss on data at 0 is given."""
        return ProbabilityFlow(
            process, lambda x, t: loss(t.log()).sqrt() * torch.ones_like(x)
        )

    def rising(level: Tensor) -> Tensor:
        return 5 + level

    def dipping(level: Tensor) -> Tensor:
        return rising(level) - 2 * ((level > -1) & (level < 0.5))

    def level_there(level: Tensor) -> Tensor:
        before = rising(last_before)
        return torch.where((level > -1) & (level < 0.5), before, rising(level))

    times = torch.logspace(1, -2, 49, dtype=torch.float64)
    last_before = times.log()[times.log() <= -1][0]
    found, expected = (
        girsanov(flow(loss), x_0, points=49) for loss in (dipping, level_there)
    )
    torch.testing.assert_close(found.grid(12), expected.grid(12), rtol=1e-6, atol=0)
    usual = girsanov(flow(rising), x_0, points=49).grid(12)
    assert not torch.allclose(found.grid(12), usual, rtol=1e-2)


# Published lists.


@pytest.mark.parametrize("model", AYS)
def test_a_published_list_is_itself_at_ten_steps(model: str) -> None:
    schedule = ays(model)
    levels = torch.tensor(AYS[model], dtype=F64)
    grid = schedule.grid(10)
    torch.testing.assert_close(grid[:-1], levels[:-1], rtol=1e-12, atol=0)
    assert float(grid[-1]) == 0
    # Others are interpolated in the logarithm: every second level of 20 steps is the
    # list, the rest lies in the middle.
    fine = schedule.grid(20)[:-1]
    torch.testing.assert_close(fine[::2], levels[:-1], rtol=1e-12, atol=0)
    middle = (levels[1:] * levels[:-1]).sqrt()
    torch.testing.assert_close(fine[1::2], middle, rtol=1e-12, atol=0)
    assert schedule.provenance["model"] == model
    assert artlib.Schedule.from_json(schedule.to_json()) == schedule


def test_published_lists_are_those_of_diffusers() -> None:
    schedulers = pytest.importorskip(
        "diffusers.schedulers.scheduling_utils", reason="no diffusers"
    )
    theirs = {
        "sd-1.5": "StableDiffusionSigmas",
        "sdxl": "StableDiffusionXLSigmas",
        "svd": "StableDiffusionVideoSigmas",
    }
    for model, name in theirs.items():
        assert [*AYS[model][:-1], 0.0] == schedulers.AysSchedules[name]


def test_published_lists_in_another_time() -> None:
    flow = RectifiedFlow(t_min=0.029 / 1.029, t_max=14.615 / 15.615)
    level = flow.noise_level(ays("sdxl", flow).grid(7)[:-1])
    expected = ays("sdxl").grid(7)[:-1]
    torch.testing.assert_close(level, expected, rtol=1e-4, atol=0)
    # The range of the model's own table: its ends are exact.
    process = VE(0.0291675, 14.6146)
    grid = ays("sd-1.5", process).grid(10)
    assert float(grid[0]) == 14.6146
    torch.testing.assert_close(grid[1:-1], ays("sd-1.5").grid(10)[1:-1])


def test_published_lists_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected one of 'sd-1\.5'"):
        ays("flux")
    for process in (VE(), RectifiedFlow()):
        with pytest.raises(ValueError, match="process: its noise levels run from"):
            ays("sdxl", process)
    with pytest.raises(TypeError, match="process: expected"):
        ays("sdxl", "ve")  # type: ignore[arg-type]
