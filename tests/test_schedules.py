"""Schedules against independent formulas, quadrature, and damaged files."""

import copy
import dataclasses
import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

from artlib._common.errors import ScheduleFormatError
from artlib.flow.processes import VE, VP, RectifiedFlow
from artlib.schedules import file
from artlib.schedules.constructors import (
    Schedule,
    beta,
    edm,
    from_density,
    from_grid,
    from_time_change,
    kl_optimal,
    log_snr,
    uniform,
)
from artlib.schedules.convert import convert
from artlib.schedules.table import Table, invert_increasing
from artlib.schedules.time_change import BetaQuantiles

PROCESSES = [VE(), VP(), RectifiedFlow()]
FORMULAS = {
    "uniform": uniform,
    "edm": edm,
    "edm-unpinned": lambda p: edm(p, pinned=False),
    "edm-rho-1": lambda p: edm(p, 1.0),
    "log_snr": log_snr,
    "log_snr-unpinned": lambda p: log_snr(p, pinned=False),
    "kl_optimal": kl_optimal,
    "kl_optimal-pinned": lambda p: kl_optimal(p, pinned=True),
    "beta": beta,
    "beta-skew": lambda p: beta(p, 0.8, 1.0),
}


def random_table(process, seed, interpolation="pchip", last_step="free"):
    """A rough monotone table: knots and increments spread over three decades."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 40))
    end = 0.0 if last_step == "zero" else process.t_min
    clock = np.cumsum(np.append(0, rng.lognormal(0, 1, n)))
    times = np.cumsum(np.append(0, rng.lognormal(0, 2, n)))
    clock *= (process.t_max - end) / clock[-1]
    times = process.t_max - (process.t_max - end) * times / times[-1]
    times[-1] = end
    return from_time_change(
        process, clock, times, interpolation=interpolation, last_step=last_step
    )


def power_density(process, n=64, c=0.5, power=-0.75):
    times = np.geomspace(process.t_max, process.t_min, n)
    times[0], times[-1] = process.t_max, process.t_min
    return from_density(process, times, (times**2 + c**2) ** power)


ALL = {
    **FORMULAS,
    "density": power_density,
    "resampled": lambda p: edm(p).resample(9),
    "linear": lambda p: edm(p, pinned=False).resample(9, interpolation="linear"),
    "log-linear": lambda p: edm(p).resample(9, interpolation="log-linear"),
    "table": lambda p: random_table(p, 5),
    "table-to-zero": lambda p: random_table(p, 6, last_step="zero"),
}

each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
each_schedule = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())


# ---------------------------------------------------------------- formulas


def karras(low, high, n, rho=7.0):
    """Equation (5) of Karras et al., written out."""
    i = np.arange(n)
    return (
        high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))
    ) ** rho


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0, 20.0])
@pytest.mark.parametrize("K", [2, 5, 18, 256])
def test_edm_is_the_published_formula_on_ve(rho, K):
    process = VE()
    pinned = edm(process, rho).grid(K).numpy()
    # Its last node is t_min exactly, which the formula reaches up to cancellation.
    expected = karras(0.002, 80.0, K, rho)
    np.testing.assert_allclose(pinned[:-2], expected[:-1], rtol=1e-12)
    assert pinned[-2] == 0.002 == pytest.approx(expected[-1], rel=1e-11)
    assert pinned[-1] == 0
    free = edm(process, rho, pinned=False).grid(K).numpy()
    expected = karras(0.002, 80.0, K + 1, rho)
    np.testing.assert_allclose(free[:-1], expected[:-1], rtol=1e-12)
    assert free[-1] == 0


def test_edm_on_vp_is_the_formula_in_the_noise_level():
    # Noise level of VP with beta from 0.1 to 20, written out.
    def level(t):
        return np.sqrt(np.expm1(0.1 * t + 0.5 * 19.9 * t**2))

    expected = karras(level(1e-3), level(1.0), 12)
    grid = edm(VP()).grid(12).numpy()
    np.testing.assert_allclose(level(grid[:-1]), expected, rtol=1e-11)


@pytest.mark.parametrize(
    ("make", "warp"),
    [
        (edm, lambda s: s ** (1 / 7)),
        (log_snr, np.log),
        (lambda p: kl_optimal(p, pinned=True), np.arctan),
    ],
)
def test_infinite_noise_level_starts_finite_and_is_stretched(make, warp):
    process = RectifiedFlow(t_min=0.01)
    grid = make(process).grid(9).numpy()
    assert grid[0] == 1
    # Undo the documented stretch: from [0.01, 1] to [0.01, 0.99], then warp s.
    t = 0.01 + (grid[:-1] - 0.01) * (1 - 2 * 0.01) / (1 - 0.01)
    warped = warp(t / (1 - t))
    np.testing.assert_allclose(np.diff(warped), np.diff(warped).mean(), rtol=1e-9)
    assert t[0] / (1 - t[0]) == pytest.approx(99.0, rel=1e-12)


def test_finite_noise_level_of_a_flow_is_not_stretched():
    process = RectifiedFlow(t_min=0.01, t_max=0.98)
    t = edm(process).grid(9).numpy()[:-1]
    np.testing.assert_allclose(t / (1 - t), karras(0.01 / 0.99, 49.0, 9), rtol=1e-12)


def test_infinite_noise_level_without_room_is_refused():
    with pytest.raises(ValueError, match=r"t_min = 0\.6 leaves no finite noise"):
        edm(RectifiedFlow(t_min=0.6))


def test_log_snr_is_geometric_on_ve_and_linear_in_log_snr_elsewhere():
    grid = log_snr(VE()).grid(18).numpy()
    np.testing.assert_allclose(grid[:-1], np.geomspace(80, 0.002, 18), rtol=1e-13)
    process = VP()
    steps = process.log_snr(log_snr(process).grid(18)[:-1]).diff().numpy()
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-10)


def test_kl_optimal_is_the_arctan_formula():
    u = np.arange(11) / 10
    expected = np.tan(u * np.arctan(0.002) + (1 - u) * np.arctan(80.0))
    grid = kl_optimal(VE()).grid(10).numpy()
    np.testing.assert_allclose(grid[:-1], expected[:-1], rtol=1e-11)


def test_kl_optimal_density_is_the_gaussian_one():
    # theory: goal-oriented density 1 / (sigma^2 + c^2) with c = 1.
    t = torch.logspace(-2.5, 1.5, 50, dtype=torch.float64)
    shape = kl_optimal(VE()).density(t) * (1 + t**2)
    torch.testing.assert_close(shape, shape.mean().expand_as(t), rtol=1e-10, atol=0)


@each_process
@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.0, 1.0), (0.3, 0.9), (2.0, 0.5)])
def test_beta_grid_is_the_quantiles_of_scipy(process, a, b):
    u = 1 - np.arange(21) / 20
    law = stats.beta(a, b, loc=process.t_min, scale=process.t_max - process.t_min)
    grid = beta(process, a, b).grid(20).numpy()
    np.testing.assert_allclose(grid[:-1], law.ppf(u)[:-1], rtol=1e-9)
    middle = np.linspace(0.1, 0.9, 9) * process.t_max
    density = beta(process, a, b).density(torch.tensor(middle)).numpy()
    np.testing.assert_allclose(density, law.pdf(middle), rtol=1e-9)


@each_process
def test_limits_of_edm(process):
    grid = edm(process, 1e7, pinned=False).grid(30)
    limit = log_snr(process, pinned=False).grid(30)
    torch.testing.assert_close(grid, limit, rtol=1e-5, atol=0)
    if process.name == "ve":
        linear = torch.linspace(80.0, 0.002, 31, dtype=torch.float64)
        grid = edm(process, 1.0, pinned=False).grid(30)
        torch.testing.assert_close(grid[:-1], linear[:-1], rtol=1e-12, atol=0)


@each_process
def test_uniform_is_linspace_with_unit_speed(process):
    for K in (1, 2, 7, 1000):
        expected = torch.linspace(process.t_max, 0, K + 1, dtype=torch.float64)
        assert uniform(process).grid(K).equal(expected)
    clock = torch.linspace(0, process.t_max, 5, dtype=torch.float64)
    assert uniform(process).speed(clock).equal(torch.ones_like(clock))
    assert uniform(process).horizon == process.t_max


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_exponents_are_refused(bad):
    with pytest.raises(ValueError, match="rho"):
        edm(VE(), bad)
    with pytest.raises(ValueError, match="a: expected"):
        beta(VE(), bad, 0.6)
    with pytest.raises(ValueError, match="b: expected"):
        beta(VE(), 0.6, bad)


@pytest.mark.parametrize("rho", [1e-3, 1e18])
def test_exponents_that_float64_cannot_resolve_are_refused(rho):
    with pytest.raises(ValueError, match="float64 resolves"):
        edm(VE(), rho)


# ---------------------------------------------------------------- grids


@each_schedule
@each_process
def test_grids_descend_from_t_max_to_zero(process, make):
    schedule = make(process)
    for K in (1, 2, 3, 18, 1000):
        grid = schedule.grid(K)
        assert grid.dtype == torch.float64
        assert grid.shape == (K + 1,)
        assert grid[0] == process.t_max
        assert grid[-1] == 0
        assert (grid.diff() < 0).all()
        if schedule.last_step == "pinned" and K > 1:
            assert grid[-2] == process.t_min
        if schedule.last_step == "free":
            assert grid[-2] > process.t_min


def test_one_and_two_pinned_steps():
    assert edm(VE()).grid(1).tolist() == [80.0, 0.0]
    # At K = 2 the published EDM and DPM grids are one.
    assert edm(VE()).grid(2).tolist() == [80.0, 0.002, 0.0]
    assert log_snr(VE()).grid(2).equal(edm(VE()).grid(2))


@pytest.mark.parametrize("K", [True, 2.0, "3", None])
def test_step_counts_that_are_no_integer_are_refused(K):
    with pytest.raises(TypeError, match="K"):
        edm(VE()).grid(K)


@pytest.mark.parametrize("K", [0, -1])
def test_step_counts_below_one_are_refused(K):
    with pytest.raises(ValueError, match="K: expected at least 1"):
        edm(VE()).grid(K)


def test_nodes_that_coincide_are_refused():
    # A Beta law with a = 0.05 puts most of its mass within float64's resolution.
    with pytest.raises(ValueError, match=r"nodes \d+ and \d+ .*fewer steps"):
        beta(VE(), 0.05, 0.05).grid(100)


def test_numpy_integers_count_steps(as_a_user):
    assert edm(VE()).grid(np.int64(3)).equal(edm(VE()).grid(3))


# ---------------------------------------------------------------- time changes


@each_schedule
@each_process
def test_inverse_and_speed(process, make):
    schedule = make(process)
    T, end = schedule.horizon, schedule.time_change.t_end
    assert process.t_max - end == T
    clock = torch.linspace(0, T, 1001, dtype=torch.float64).requires_grad_()
    t = schedule.time(clock)
    assert t[0] == process.t_max
    assert t[-1] == end
    assert (t.diff() < 0).all()
    (slope,) = torch.autograd.grad(t.sum(), clock)
    speed = schedule.speed(clock.detach())
    torch.testing.assert_close(-slope, speed, rtol=1e-8, atol=1e-300)
    back = schedule.clock(t.detach())
    assert (back - clock.detach()).abs().max() <= 1e-9 * T
    times = torch.logspace(
        math.log10(max(end, 1e-3 * process.t_max)),
        math.log10(process.t_max),
        500,
        dtype=torch.float64,
    ).clamp(end, process.t_max)
    again = schedule.time(schedule.clock(times))
    torch.testing.assert_close(again, times, rtol=1e-9, atol=0)


@each_schedule
def test_speed_is_the_difference_quotient_and_clock_has_its_inverse(make):
    schedule = make(VE())
    # Strictly inside: away from the knots of a piecewise linear table, and ends.
    clock = schedule.horizon * torch.tensor([0.113, 0.377, 0.641, 0.893]).double()
    h = 1e-6 * schedule.horizon
    quotient = (schedule.time(clock - h) - schedule.time(clock + h)) / (2 * h)
    torch.testing.assert_close(schedule.speed(clock), quotient, rtol=2e-5, atol=1e-9)
    t = schedule.time(clock).requires_grad_()
    (slope,) = torch.autograd.grad(schedule.clock(t).sum(), t)
    torch.testing.assert_close(slope, -1 / schedule.speed(clock), rtol=1e-8, atol=0)


@each_schedule
@each_process
def test_speed_integrates_to_the_horizon_and_density_to_one(process, make):
    schedule = make(process)
    T = schedule.horizon
    # Gauss-Legendre between the knots, so that no kink is inside an interval.
    knots = getattr(schedule.time_change, "knots_clock", ())
    edges = np.unique(np.append(np.linspace(0, T, 401), knots))
    x, weights = np.polynomial.legendre.leggauss(6)
    half = 0.5 * np.diff(edges)[:, None]
    clock = torch.tensor(edges[:-1, None] + half * (1 + x))
    psi = float((schedule.speed(clock).numpy() * half * weights).sum())
    assert psi == pytest.approx(T, rel=3e-4)
    # Midpoint rule in time, on intervals that are short wherever the density is high.
    edges = np.unique(np.append(np.linspace(0, T, 2001), knots))
    t = schedule.time(torch.tensor(edges))
    middle = schedule.time(torch.tensor(0.5 * (edges[1:] + edges[:-1])))
    share = float(schedule.density(middle) @ -t.diff())
    assert share == pytest.approx(1, rel=5e-4)


@pytest.mark.parametrize("interpolation", ["pchip", "linear", "log-linear"])
@pytest.mark.parametrize("seed", range(12))
def test_random_tables_are_exact_at_knots_monotone_and_inverted(seed, interpolation):
    process = PROCESSES[seed % 3]
    schedule = random_table(process, seed, interpolation)
    change = schedule.time_change
    knots = torch.tensor(change.knots_clock, dtype=torch.float64)
    times = torch.tensor(change.knots_time, dtype=torch.float64)
    assert schedule.time(knots).equal(times)
    clock = torch.linspace(0, schedule.horizon, 2001, dtype=torch.float64)
    t = schedule.time(clock)
    assert (t.diff() < 0).all()
    speed = schedule.speed(clock)
    assert (speed > 0).all()
    # What rounding t to float64 does to the clock is not the inverse's fault.
    rounding = 2e-16 * t / speed
    error = (schedule.clock(t) - clock).abs()
    assert (error <= 1e-9 * schedule.horizon + 4 * rounding).all()


@pytest.mark.parametrize("seed", range(5))
def test_pchip_is_scipys_between_the_outer_knots(seed):
    schedule = random_table(VE(), seed)
    change = schedule.time_change
    knots = np.array(change.knots_clock)
    reference = PchipInterpolator(knots, np.array(change.knots_time))
    if len(knots) < 4:
        pytest.skip("only outer intervals")
    clock = np.linspace(knots[1], knots[-2], 300)
    found = schedule.time(torch.tensor(clock)).numpy()
    np.testing.assert_allclose(found, reference(clock), rtol=1e-11)


def test_inversion_survives_a_newton_iteration_that_creeps():
    # On x^99 Newton shrinks x by 1 % a step: 390 steps from 0.5 to 0.01.
    root = torch.tensor([1e-2, 0.3, 0.999], dtype=torch.float64)
    found = invert_increasing(
        lambda x: (x**99, 99 * x**98), root**99, root * 0, root * 0 + 1
    )
    torch.testing.assert_close(found, root, rtol=1e-13, atol=0)


def test_linear_tables_are_numpys_interpolation():
    clock = np.array([0.0, 0.2, 0.7, 0.999])
    times = np.array([1.0, 0.9, 0.01, 0.001])
    at = np.linspace(0, 0.999, 37)
    process = VP()
    linear = from_time_change(process, clock, times, interpolation="linear")
    found = linear.time(torch.tensor(at)).numpy()
    np.testing.assert_allclose(found, np.interp(at, clock, times), rtol=1e-12)
    log = from_time_change(process, clock, times, interpolation="log-linear")
    found = log.time(torch.tensor(at)).numpy()
    expected = np.exp(np.interp(at, clock, np.log(times)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_end_of_a_wide_range_keeps_its_digits():
    # One interval from 80 to 0.002: t_max - psi would be good to 1e-11 at best.
    schedule = from_grid(VE(), [80.0, 0.0])
    t = torch.tensor([0.002, 0.00200001, 0.0021, 0.01], dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.clock(t)), t, rtol=2e-11, atol=0)
    tight = power_density(VE())
    torch.testing.assert_close(tight.time(tight.clock(t)), t, rtol=1e-13, atol=0)


def test_shapes_numbers_and_float32():
    schedule = edm(VE())
    assert schedule.time(0.0).shape == ()
    assert float(schedule.time(0.0)) == 80.0
    for shape in [(), (1,), (2, 3), (2, 1, 1)]:
        clock = torch.full(shape, 10.0)
        for result in (
            schedule.time(clock),
            schedule.clock(clock),
            schedule.speed(clock),
            schedule.density(clock),
            power_density(VE()).clock(clock),
            beta(VE()).time(clock),
        ):
            assert result.shape == shape
            assert result.dtype == torch.float64
    # float32 rounds the ends outwards; that is round-off, not an error.
    ends = torch.tensor([0.002, 80.0], dtype=torch.float32)
    process = VE(sigma_min=0.0200000005, sigma_max=80.0)
    low = torch.tensor(0.02, dtype=torch.float32)
    assert float(low) < process.t_min
    assert float(edm(process).clock(low)) == pytest.approx(edm(process).horizon)
    assert schedule.clock(ends).tolist() == pytest.approx([schedule.horizon, 0.0])
    for each in (schedule, power_density(VE()), uniform(VE())):
        beyond = torch.tensor([-1e-9, each.horizon * (1 + 5e-7)], dtype=torch.float64)
        exactly = torch.tensor([0.0, each.horizon], dtype=torch.float64)
        assert each.time(beyond).equal(each.time(exactly))
        assert each.speed(beyond).equal(each.speed(exactly))


@pytest.mark.parametrize("bad", [-0.01, 80.01, math.nan, math.inf])
def test_readings_outside_the_clock_are_refused(bad):
    for schedule in (edm(VE()), power_density(VE())):
        for method in (schedule.time, schedule.speed):
            with pytest.raises(ValueError, match=r"clock: .* outside"):
                method(torch.tensor([1.0, bad], dtype=torch.float64))


@pytest.mark.parametrize("bad", [0.0, 0.00199, 80.01, math.nan])
def test_times_outside_the_range_are_refused(bad):
    for schedule in (edm(VE()), power_density(VE())):
        for method in (schedule.clock, schedule.density):
            with pytest.raises(ValueError, match=r"t: .* outside .*\[0\.002, 80\.0\]"):
                method(bad)
    assert float(uniform(VE()).clock(0.0)) == 80.0


@each_schedule
def test_schedules_evaluate_on_another_device(make, accelerator):
    schedule = make(VE())
    clock = torch.linspace(0, schedule.horizon, 99, dtype=torch.float64)
    for method in (schedule.time, schedule.speed):
        found = method(clock.to(accelerator))
        assert found.device.type == accelerator.type
        torch.testing.assert_close(found.cpu(), method(clock), rtol=1e-11, atol=1e-13)
    t = schedule.time(clock)
    torch.testing.assert_close(
        schedule.clock(t.to(accelerator)).cpu(), schedule.clock(t), rtol=1e-9, atol=1e-9
    )


# ---------------------------------------------------------------- densities


def nodes_by_quadrature(density, process, K):
    """Interior nodes of the K-step grid of a density, by quad and brentq."""

    def share(t):
        return quad(
            lambda x: density(math.exp(x)) * math.exp(x),
            math.log(process.t_min),
            math.log(t),
            epsabs=1e-13,
            epsrel=1e-12,
            limit=400,
        )[0]

    total = share(process.t_max)
    return [
        brentq(
            lambda t, k=k: share(t) - (1 - k / K) * total,
            process.t_min,
            process.t_max,
            xtol=1e-14,
            rtol=1e-13,
        )
        for k in range(1, K)
    ]


@each_process
@pytest.mark.parametrize(("n", "bound"), [(64, 3e-4), (257, 5e-6)])
@pytest.mark.parametrize("c", [0.1, 0.5])
def test_density_of_gaussian_data(process, n, bound, c):
    expected = nodes_by_quadrature(lambda s: (s * s + c * c) ** -0.75, process, 10)
    grid = power_density(process, n, c).grid(10).numpy()
    np.testing.assert_allclose(grid[1:-1], expected, rtol=bound)


def test_density_is_returned():
    c = 0.5
    schedule = power_density(VE(), 257)
    t = torch.logspace(-2.5, 1.85, 60, dtype=torch.float64)
    exact = (t**2 + c**2) ** -0.75
    total = quad(lambda x: (x * x + c * c) ** -0.75, 0.002, 80.0, limit=400)[0]
    torch.testing.assert_close(schedule.density(t), exact / total, rtol=5e-3, atol=0)


@each_process
def test_uniform_density_gives_linear_nodes(process):
    for times in (
        torch.linspace(process.t_max, process.t_min, 17, dtype=torch.float64),
        torch.tensor([process.t_max, process.t_min], dtype=torch.float64),
    ):
        schedule = from_density(process, times, torch.full_like(times, 3.7))
        expected = process.t_max - schedule.horizon * torch.arange(12).double() / 11
        torch.testing.assert_close(
            schedule.grid(11)[:-1], expected[:-1], rtol=1e-12, atol=0
        )
        assert schedule.last_step == "free"
        coarse = from_density(process, times, torch.ones_like(times), knots=2)
        torch.testing.assert_close(
            coarse.grid(11), schedule.grid(11), rtol=1e-12, atol=0
        )


def test_density_has_no_unit():
    times = np.geomspace(80, 0.002, 30)
    density = 1 / (1 + times)
    one = from_density(VE(), times, density).grid(9)
    for factor in (1e-310, 1.5e308):
        other = from_density(VE(), times, density * factor).grid(9)
        torch.testing.assert_close(other, one, rtol=1e-9, atol=0)


@each_process
@pytest.mark.parametrize(
    "vanishes",
    [
        lambda u: u < 0.5,
        lambda u: u > 0.5,
        lambda u: (u > 0.2) & (u < 0.8),
        lambda u: np.abs(u - 0.5) > 0.02,
        lambda u: u != u[0],
        lambda u: u != u[-1],
    ],
)
def test_densities_that_vanish_stay_strictly_monotone(process, vanishes):
    times = np.geomspace(process.t_max, process.t_min, 64)
    times[0], times[-1] = process.t_max, process.t_min
    u = np.linspace(0, 1, 64)
    density = np.where(vanishes(u), 0.0, 1 / times)
    schedule = from_density(process, times, density)
    for K in (1, 2, 18, 1000):
        assert (schedule.grid(K).diff() < 0).all()
    clock = torch.linspace(0, schedule.horizon, 3000, dtype=torch.float64)
    assert (schedule.speed(clock) > 0).all()
    assert (schedule.time(clock).diff() < 0).all()


def test_floor_is_relative_to_the_mean_and_sets_the_share_it_takes():
    # All of the density in the upper half: the floor pays for the lower one.
    process = VP(t_min=1e-3, t_max=1.0)
    times = np.linspace(1.0, 1e-3, 2001)
    density = (times > 0.5).astype(float)
    schedule = from_density(process, times, density, floor=0.1, knots=4097)
    # mean = 1/2, so the floor is 0.05 against 1: 0.05 / 1.05 of the steps.
    share = 1 - float(schedule.clock(0.5)) / schedule.horizon
    assert share == pytest.approx(0.05 / 1.05, rel=2e-2)


@pytest.mark.parametrize(
    ("times", "density", "message"),
    [
        ([80.0, 1.0, 0.002], [1.0, math.nan, 1.0], "density: value 1 is nan"),
        ([80.0, 1.0, 0.002], [1.0, 1.0, math.inf], "density: value 2 is inf"),
        ([80.0, 1.0, 0.002], [1.0, -2.0, 1.0], r"density: value 1 is .*-2\.0"),
        ([80.0, 1.0, 0.002], [0.0, 0.0, 0.0], "density: zero everywhere"),
        ([80.0, 1.0, 0.002], [1.0, 1.0], "one value per time, got 2 for 3"),
        ([80.0, 1.0, 0.002], [[1.0, 1.0, 1.0]], r"density: .* shape \(1, 3\)"),
        ([0.002, 1.0, 80.0], [1.0, 1.0, 1.0], "times: expected strictly descending"),
        ([80.0, 1.0, 0.0], [1.0, 1.0, 1.0], "times: the last value is 0.0.*t_min"),
        ([40.0, 1.0, 0.002], [1.0, 1.0, 1.0], "times: the first value is 40.0.*t_max"),
    ],
)
def test_bad_densities_are_refused(times, density, message):
    with pytest.raises(ValueError, match=message):
        from_density(VE(), times, density)


def test_bad_floor_and_knots_are_refused():
    times = np.geomspace(80, 0.002, 5)
    with pytest.raises(ValueError, match="floor: expected a positive"):
        from_density(VE(), times, times, floor=0.0)
    with pytest.raises(ValueError, match="knots: expected at least 2"):
        from_density(VE(), times, times, knots=1)


# ---------------------------------------------------------------- tables and grids


@pytest.mark.parametrize(
    ("clock", "times", "message"),
    [
        ([0, 0.5, 0.4, 0.999], [1, 0.5, 0.4, 0.001], "clock: .*increasing.*knot 1 ="),
        ([0, 0.4, 0.5, 0.999], [1, 0.4, 0.5, 0.001], r"decreasing.*knot 1 = 0\.4"),
        ([0, 0.4, 0.5, 0.999], [1, 0.5, 0.5, 0.001], "decreasing.*knot 1"),
        ([0, 0.4, 0.999], [1, math.nan, 0.001], "times: value 1 is nan"),
        ([0, 0.4, 0.999], [0.9, 0.5, 0.001], "times: the first value is 0.9"),
        ([0, 0.4, 0.999], [1, 0.5, 0.1], "times: the last value is 0.1"),
        ([0, 0.4, 1.5], [1, 0.5, 0.001], "clock: the last value is 1.5.*T = 0.999"),
        ([0, 0.999], [1, 0.5, 0.001], "one length"),
    ],
)
def test_tables_that_are_no_time_change_are_refused(clock, times, message):
    with pytest.raises(ValueError, match=message):
        from_time_change(VP(), clock, times)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="last_step: expected one of"):
        from_time_change(VP(), [0, 0.999], [1, 0.001], last_step="ends")
    with pytest.raises(ValueError, match="interpolation: expected one of"):
        from_grid(VP(), [1.0, 0.5, 0.0], interpolation="cubic")
    with pytest.raises(TypeError, match="unexpected keyword"):
        edm(VP(), pined=False)
    with pytest.raises(TypeError, match="pinned"):
        edm(VP(), pinned=1)


ALIGN_YOUR_STEPS = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]  # fmt: skip # noqa: E501


@pytest.mark.parametrize("interpolation", ["pchip", "linear", "log-linear"])
def test_a_published_list_is_reproduced_and_resampled(interpolation):
    process = VE(sigma_min=0.0292, sigma_max=14.615)
    schedule = from_grid(process, ALIGN_YOUR_STEPS, interpolation=interpolation)
    assert schedule.last_step == "free"
    assert schedule.grid(10).tolist() == ALIGN_YOUR_STEPS
    if interpolation == "log-linear":
        x = np.log([*ALIGN_YOUR_STEPS[:-1], 0.0292])
        expected = np.exp(np.interp(np.arange(26) / 25 * 10, np.arange(11), x))
        found = schedule.grid(25).numpy()[:-1]
        np.testing.assert_allclose(found, expected[:-1], rtol=1e-12)


def test_pinned_lists_are_recognised_through_float32():
    for grid in (edm(VE()).grid(10), edm(VE()).grid(10).float().tolist()):
        schedule = from_grid(VE(), grid)
        assert schedule.last_step == "pinned"
        assert schedule.grid(10)[-2] == 0.002
        torch.testing.assert_close(
            schedule.grid(10), edm(VE()).grid(10), rtol=1e-6, atol=0
        )
    assert from_grid(VE(), edm(VE(), pinned=False).grid(10)).last_step == "free"
    assert from_grid(VE(), [80.0, 0.0]).last_step == "free"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([80.0, 1.0], "grid: the last node is 1.0.*append"),
        ([40.0, 1.0, 0.0], "grid: the first value is 40.0.*t_max"),
        ([80.0, 0.001, 0.0], "grid: node 1 is 0.001.*above"),
        ([80.0, 1.0, 2.0, 0.0], "strictly descending"),
        ([80.0, math.nan, 0.0], "not finite"),
    ],
)
def test_lists_that_are_no_grid_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        from_grid(VE(), grid)


@each_schedule
@each_process
def test_resampling_keeps_its_grid_to_the_bit(process, make):
    schedule = make(process)
    for K in (1, 2, 3, 10, 77):
        for interpolation in ("pchip", "linear", "log-linear"):
            if schedule.last_step == "zero" and interpolation == "log-linear":
                continue
            again = schedule.resample(K, interpolation=interpolation)
            assert again.grid(K).equal(schedule.grid(K))
            assert again.last_step == schedule.last_step
            assert again.name == schedule.name


def test_resampling_uniform_is_uniform_and_log_linear_refused():
    again = uniform(VE()).resample(6)
    torch.testing.assert_close(
        again.grid(25), uniform(VE()).grid(25), rtol=0, atol=1e-12
    )
    with pytest.raises(ValueError, match="'log-linear' cannot interpolate"):
        uniform(VE()).resample(6, interpolation="log-linear")


def test_pchip_resampling_loses_least():
    schedule = edm(VE(), pinned=False)
    exact = schedule.grid(36)[1:-1]

    def error(interpolation):
        found = schedule.resample(18, interpolation=interpolation).grid(36)[1:-1]
        return float((found / exact - 1).abs().mean())

    assert error("pchip") < 0.003
    assert error("pchip") < 0.5 * error("log-linear") < 0.2 * error("linear")


# ---------------------------------------------------------------- values and files


def test_schedules_are_immutable_values():
    schedule = power_density(VE())
    with pytest.raises(AttributeError):
        schedule.name = "other"
    with pytest.raises(AttributeError):
        schedule.time_change.interpolation = "linear"
    before = schedule.grid(5)
    schedule.grid(5).zero_()
    schedule.provenance["made_by"] = "nobody"
    assert schedule.grid(5).equal(before)
    assert schedule.provenance["made_by"].startswith("from_density(64 times")
    assert schedule == power_density(VE())
    assert hash(schedule) == hash(power_density(VE()))
    assert copy.deepcopy(schedule) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert edm(VE()) == edm(VE(), rho=7.0)
    others = [edm(VE(), 6.9), edm(VE(), pinned=False), edm(VE(sigma_max=79.0))]
    assert all(edm(VE()) != other for other in others)
    assert edm(VE()) != "edm"
    named = [from_grid(VE(), [80.0, 1.0, 0.0], name=name) for name in ("a", "b")]
    assert named[0] == named[1]


def test_names_and_representation():
    assert [s.name for s in (edm(VE()), edm(VE(), pinned=False))] == [
        "edm",
        "edm-unpinned",
    ]
    assert kl_optimal(VE()).name == "kl_optimal"
    assert kl_optimal(VE(), pinned=True).name == "kl_optimal-pinned"
    assert repr(edm(VE())) == (
        "Schedule('edm', VE(sigma_min=0.002, sigma_max=80.0), power, rho=7, "
        "last step pinned)"
    )
    assert "513 knots, pchip, last step free" in repr(power_density(VP()))


def test_text_is_a_plain_list():
    text = edm(VE()).to_text(7)
    assert json.loads(text) == edm(VE()).grid(7).tolist()
    assert from_grid(VE(), json.loads(text)).grid(7).equal(edm(VE()).grid(7))


@each_schedule
@each_process
def test_files_round_trip_to_the_bit(process, make, tmp_path):
    schedule = make(process)
    path = tmp_path / "s.json"
    schedule.save(path)
    again = Schedule.load(path)
    assert again == schedule
    assert again.name == schedule.name
    assert again.provenance == schedule.provenance
    assert again.to_json() == schedule.to_json() == path.read_text()
    assert again.grid(37).equal(schedule.grid(37))
    clock = torch.linspace(0, schedule.horizon, 100, dtype=torch.float64)
    assert again.time(clock).equal(schedule.time(clock))
    assert Schedule.from_json(schedule.to_json()) == schedule
    data = json.loads(path.read_text())
    assert data["format"] == "artlib-schedule"
    assert data["version"] == 1
    assert data["provenance"]["library"] == "artlib"
    assert data["provenance"]["version"]
    assert data["provenance"]["made_by"]


def test_evenly_spaced_clocks_are_not_stored():
    data = json.loads(power_density(VE()).to_json())
    assert set(data["time_change"]) == {"kind", "interpolation", "times"}
    assert "clock" in json.loads(random_table(VE(), 3).to_json())["time_change"]


def test_provenance_is_kept_and_refused_unless_json():
    times = np.geomspace(80, 0.002, 5)
    schedule = from_density(VE(), times, times, provenance={"data": "digits"})
    assert Schedule.from_json(schedule.to_json()).provenance["data"] == "digits"
    source = schedule.resample(4).provenance["source"]
    assert source["data"] == "digits"
    for bad, error in ((object(), TypeError), (math.nan, ValueError)):
        with pytest.raises(error, match="provenance"):
            from_density(VE(), times, times, provenance={"data": bad})
    with pytest.raises(ValueError, match="not JSON compliant"):
        file.dumps({"times": [math.inf]})


def damaged(change):
    """The text of a small valid file after ``change`` of its object."""
    data = json.loads(edm(VE()).resample(4).to_json())
    change(data)
    return json.dumps(data)


def drop(*keys):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return damaged(change)


def put(value, *keys):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return damaged(change)


TIMES = ("time_change", "times")
BAD_FILES = {
    "empty": ("", "not valid JSON"),
    "truncated": (edm(VE()).to_json()[:-30], "not valid JSON"),
    "no JSON": ("80.0 2.5 0.0\n", "not valid JSON"),
    "deep inside": (put(7, "provenance", "x").replace("7}", "[" * 50000), "deep|JSON"),
    "deep": ("[" * 100000, "nested too deep|not valid JSON"),
    "list": ("[80.0, 2.5, 0.0]", "no schedule .*from_grid"),
    "number": ("3", "no schedule"),
    "foreign": ('{"format": "safetensors"}', "no schedule"),
    "config": ('{"_class_name": "EulerDiscreteScheduler"}', "no schedule"),
    "newer": (put(2, "version"), "version 2 .*upgrade"),
    "version text": (put("1", "version"), "version is '1'"),
    "version bool": (put(True, "version"), "version is True"),
    "version 0": (put(0, "version"), "version is 0, expected an integer from 1"),
    "version missing": (drop("version"), "version is None"),
    **{
        f"no {key}": (drop(key), f"lacks {key}")
        for key in ("name", "process", "time_change", "last_step", "provenance")
    },
    "no kind": (drop("time_change", "kind"), "lacks 'kind'"),
    "no times": (drop(*TIMES), "lacks 'times'"),
    "kind": (put("spline", "time_change", "kind"), "unknown kind 'spline'"),
    "process": (put("edm", "process", "name"), "unknown name 'edm'"),
    "process text": (put("ve", "process"), "process: expected an object"),
    "range": (put(-1.0, "process", "sigma_min"), "sigma_min: expected a positive"),
    "other range": (put(70.0, "process", "sigma_max"), r"runs from 80\.0 to 0\.002"),
    "last step": (put("open", "last_step"), "last_step: expected one of"),
    "wrong last step": (put("zero", "last_step"), "last step 'zero'"),
    "name": (put(3, "name"), "name: expected a str"),
    "provenance": (put("me", "provenance"), "provenance: expected an object"),
    "NaN": (put([80.0, math.nan, 0.002], *TIMES), "holds NaN"),
    "infinity": (put([80.0, math.inf, 0.002], *TIMES), "holds Infinity"),
    "NaN elsewhere": (put(math.nan, "provenance", "x"), "holds NaN"),
    "overflow": (put([80.0, 9.0, 0.002], *TIMES).replace("9.0", "1e999"), "1e999"),
    "huge integer": (put([80.0, 10**400, 0.002], *TIMES), "too large"),
    "NaN text": (put([80.0, "nan", 0.002], *TIMES), r"times\[1\].*'nan' of type str"),
    "not monotone": (put([80.0, 1.0, 2.0, 0.002], *TIMES), r"knot 1 = 1\.0.*2\.0"),
    "repeated": (put([80.0, 1.0, 1.0, 0.002], *TIMES), "strictly decreasing"),
    "short": (put([80.0], *TIMES), "at least 2"),
    "empty times": (put([], *TIMES), "at least 2"),
    "times null": (put(None, *TIMES), "times: expected a list"),
    "nested times": (put([[80.0, 0.002]], *TIMES), "damaged"),
    "clock": (put([0.0, 1.0, 0.5, 79.998], "time_change", "clock"), "increasing"),
    **{
        f"clock {how}": (put(clock, "time_change", "clock"), rf"clock: the {what} knot")
        for how, what, clock in (
            ("doubled", "last", [0.0, 40.0, 80.0, 2 * 79.998]),
            ("halved", "last", [0.0, 10.0, 20.0, 79.998 / 2]),
            ("shifted", "first", [-1.0, 10.0, 20.0, 78.998]),
            ("late", "last", [0.0, 10.0, 20.0, 85.0]),
        )
    },
    "clock of text": (put(["0", 79.998], "time_change", "clock"), r"clock\[0\]"),
    "clock null": (put(None, "time_change", "clock"), "clock: expected a list"),
    "clock misspelt": (put([0.0], "time_change", "clok"), "'table' has no 'clok'"),
    "bool time": (put([80.0, True, 0.002], *TIMES), r"times\[1\]: .*True of type bool"),
    "text parameter": (put("80.0", "process", "sigma_max"), "sigma_max: .*'80.0'"),
    "bool parameter": (put(True, "process", "sigma_max"), "sigma_max: .*True"),
    "null parameter": (put(None, "process", "sigma_max"), "sigma_max: .*None"),
    "no parameter": (drop("process", "sigma_max"), "process: lacks sigma_max"),
    "other parameter": (put(1.0, "process", "sigma"), "sigma"),
    "kind list": (put(["table"], "time_change", "kind"), "unknown kind"),
    "version 1.0": (put(1.0, "version"), r"version is 1\.0"),
    "version huge": (put(10**4000, "version"), "in version 100000000 of .*upgrade"),
    "endless": (put(7, "provenance", "x").replace("7}", "7" * 9999), "not valid JSON"),
    "key twice": (put(1, "provenance", "a").replace('"a"', '"a": 2, "a"'), "'a' twice"),
    "name twice": (damaged(len).replace("{", '{"name": "me", ', 1), "'name' twice"),
    "escape": (put("a\x1b[2J", "name"), r"name: holds '\\x1b'"),
    "bell": (put("a\x07", "name"), r"name: holds '\\x07'"),
    "CSI": (put("a\x9b2J", "name"), r"name: holds '\\x9b'"),
    "line break": (put("a\nb", "name"), r"name: holds '\\n'"),
    "turned": (put("a\u202egnp.", "name"), r"name: holds '\\u202e'"),
    "half a pair": (put("a\ud800", "name"), r"name: holds '\\ud800'"),
    "escape in a key": (put(1, "provenance", "\x1b]0;t\x07"), "provenance: holds"),
    "rho text": (json.dumps({**json.loads(edm(VE()).to_json()), "time_change":
        {"kind": "noise-warp", "warp": "power", "rho": "7"}}), "rho: expected a real"),
    "rho bool": (json.dumps({**json.loads(edm(VE()).to_json()), "time_change":
        {"kind": "noise-warp", "warp": "power", "rho": True}}), "rho: expected a real"),
    "b text": (json.dumps({**json.loads(beta(VE()).to_json()), "time_change":
        {"kind": "beta", "a": 0.6, "b": "0.6"}}), "b: expected a real"),
    "time change text": (put("edm", "time_change"), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_damaged_files_are_named_and_refused(text, message, tmp_path):
    path = tmp_path / "learned.json"
    path.write_text(text)
    with pytest.raises(ScheduleFormatError, match=message) as info:
        Schedule.load(path)
    assert str(path) in str(info.value)
    assert isinstance(info.value, ValueError)


def mutations(value):
    """Other values of a field, of every kind that JSON has."""
    yield from (None, True, False, [], {}, "", "x", [value], {"x": value}, str(value))
    yield from (0, -1, 1, 1e-300, 1e300, 10**400, 0.5, 1e-9, 80.0)
    if isinstance(value, float):
        yield from (
            -value,
            2 * value,
            value / 2,
            value * (1 + 1e-3),
            value * (1 - 1e-3),
        )
    if isinstance(value, list):
        yield from (value[1:], value[:-1], value[::-1], value + value)


def paths(value, before=()):
    """Where every field of an object is."""
    items = {list: enumerate, dict: dict.items}.get(type(value), lambda _: ())(value)
    for key, inner in items:
        yield (*before, key)
        yield from paths(inner, (*before, key))


@pytest.mark.parametrize("name", ["edm", "kl_optimal", "beta", "uniform", "table"])
def test_a_changed_file_is_refused_or_a_schedule(name):
    schedule = ALL[name](VE())
    whole = json.loads(schedule.to_json())
    if name == "table":
        knots = whole["time_change"]
        assert len(knots["clock"]) == len(knots["times"]) < 40
    loaded, refused, steep = 0, 0, []
    for path in paths(whole):
        if isinstance(path[-1], int) and path[-1] % 7 > 1:
            continue  # of many knots, some
        parent = whole
        for key in path[:-1]:
            parent = parent[key]
        before = parent[path[-1]]
        for other in mutations(before):
            parent[path[-1]] = other
            try:
                found = Schedule.from_json(json.dumps(whole))
            except ScheduleFormatError:
                refused += 1
                continue
            loaded += 1
            try:
                grid = found.grid(10)
            except ValueError as error:
                # Honest: the curve is so steep that float64 has no ten steps on it.
                steep.append(str(error))
                continue
            assert grid[0] == found.process.t_max
            assert grid[-1] == 0
            assert (grid.diff() < 0).all()
            assert Schedule.from_json(found.to_json()) == found
        parent[path[-1]] = before
    assert all("fewer steps" in message for message in steep)
    assert refused > loaded > 0
    assert Schedule.from_json(json.dumps(whole)) == schedule


def test_a_byte_order_mark_is_no_damage(tmp_path):
    path = tmp_path / "s.json"
    path.write_text("\ufeff" + edm(VE()).to_json(), encoding="utf-8")
    assert Schedule.load(path) == edm(VE())
    path.write_text(edm(VE()).to_json(), encoding="utf-16")
    with pytest.raises(ScheduleFormatError, match="UTF-8"):
        Schedule.load(path)


def test_values_check_what_their_makers_check_and_are_refused():
    process, text = VE(), edm(VE())._provenance
    table = Table((0.0, 10.0, 79.998), (80.0, 1.0, 0.002))
    made = Schedule(process, table, "free", "mine", text)
    assert made.grid(2).tolist() == [80.0, float(made.time(79.998 / 2)), 0.0]
    for clock in ((0.0, 10.0, 80.0), (1.0, 10.0, 79.998), (0.0, 10.0, 159.0)):
        with pytest.raises(
            ValueError, match=r"clock: the (first|last) knot .*expected"
        ):
            Table(clock, (80.0, 1.0, 0.002))
    # Through float32 the ends are the ends, exactly.
    rounded = torch.tensor([0.0, 10.0, 79.998]).tolist()
    assert Table(rounded, [80.0, 1.0, 0.002]) == table
    assert hash(Table(np.array(rounded), (80.0, 1.0, 0.002))) == hash(table)
    with pytest.raises(ValueError, match="no slope"):
        Table((0.0, 1e-310, 79.998), (80.0, 1.0, 0.002))
    with pytest.raises(ValueError, match="time_change: made for VE"):
        Schedule(
            VP(t_min=0.002, t_max=80.0), edm(process).time_change, "free", "", text
        )
    with pytest.raises(TypeError, match="time_change: expected a TimeChange"):
        Schedule(process, [80.0, 0.0], "free", "", text)
    with pytest.raises(TypeError, match=r"process: expected an artlib process.*VE\(\)"):
        Schedule(VE, table, "free", "", text)
    for name in ("edm\x1b]0;title\x07", "a\nb", "\x9b31m", "\u2028"):
        with pytest.raises(ValueError, match="name: holds"):
            dataclasses.replace(made, name=name)
        with pytest.raises(ValueError, match="name: holds"):
            from_grid(process, [80.0, 1.0, 0.0], name=name)
    for name in ("Größe, 10 steps", "时间表", "👩\u200d🔬", "a\u00a0b"):
        assert (
            Schedule.from_json(dataclasses.replace(made, name=name).to_json()).name
            == name
        )
    for bad in (True, "7", 7j, None, torch.tensor([1.0, 2.0])):
        with pytest.raises(TypeError, match="rho: expected"):
            edm(process, bad)
        with pytest.raises(TypeError, match="a: expected"):
            BetaQuantiles(process, bad, 0.6)
    assert hash(edm(process, np.float32(7)).time_change) == hash(
        edm(process).time_change
    )
    assert edm(process, torch.tensor(7.0)).to_json() == edm(process).to_json()


BAD_CALLS = {
    "uniform": (lambda: uniform("ve"), "process"),
    "edm": (lambda: edm(None), "process"),
    "log_snr": (lambda: log_snr(VE), r"process: .*the class VE; call it: VE\(\)"),
    "kl_optimal": (lambda: kl_optimal(80.0), "process"),
    "beta": (lambda: beta([80.0, 0.002]), "process"),
    "from_grid": (lambda: from_grid(80.0, [80.0, 0.0]), "process"),
    "from_density": (lambda: from_density("ve", [80, 1], [1, 1]), "process"),
    "from_time_change": (lambda: from_time_change(None, [0], [1]), "process"),
    "grid text": (lambda: from_grid(VE(), "80 1 0"), "grid: .*'80 1 0' of type str"),
    "grid texts": (lambda: from_grid(VE(), [80.0, "1", 0.0]), r"grid\[1\]: .*'1'"),
    "grid bool": (lambda: from_grid(VE(), [80.0, True, 0.0]), r"grid\[1\]: .*True"),
    "grid complex": (lambda: from_grid(VE(), np.array([80, 1j, 0])), "grid: .*complex"),
    "grid None": (lambda: from_grid(VE(), None), "grid: .*got None"),
    "grid ragged": (lambda: from_grid(VE(), [[80.0], 0.0]), "grid: .*lengths"),
    "grid generator": (lambda: from_grid(VE(), iter([80.0, 0.0])), "grid: .*iterator"),
    "grid mask": (lambda: from_grid(VE(), torch.tensor([True, False])), "grid: .*bool"),
    "grid meta": (
        lambda: from_grid(VE(), torch.ones(2, device="meta")),
        "grid: .*meta",
    ),
    "times text": (lambda: from_time_change(VE(), [0, 1], "ab"), "times: .*'ab'"),
    "clock None": (
        lambda: from_time_change(VE(), [0, None], [80, 0.002]),
        r"clock\[1\]",
    ),
    "density date": (
        lambda: from_density(VE(), [80, 0.002], np.array(["2026-01-01"] * 2, "M8[D]")),
        "density: .*datetime64",
    ),
    "floor text": (lambda: from_density(VE(), [80, 0.002], [1, 1], floor="1"), "floor"),
    "knots bool": (
        lambda: from_density(VE(), [80, 0.002], [1, 1], knots=True),
        "knots",
    ),
    "provenance": (
        lambda: from_grid(VE(), [80.0, 0.0], provenance=["a"]),
        "provenance: expected a dict.*'a'",
    ),
    "name": (
        lambda: from_grid(VE(), [80.0, 0.0], name=3),
        "name: expected a str, got 3",
    ),
    "K tensor": (lambda: edm(VE()).grid(torch.tensor(5)), "K: expected an integer"),
    "K float": (
        lambda: edm(VE()).resample(5.0),
        r"K: .*5\.0 of type float; pass an int",
    ),
    "clock text": (lambda: edm(VE()).time("1"), "clock: expected a number"),
    "clock bool": (lambda: edm(VE()).speed(True), "clock: expected a number"),
    "time complex": (lambda: edm(VE()).clock(1j), "t: expected a number"),
    "time None": (lambda: edm(VE()).density(None), "t: expected a number .*got None"),
    "path": (lambda: Schedule.load(3), "path: expected a str .*got 3"),
    "text": (lambda: Schedule.from_json(b"{}"), "text: expected the JSON text"),
    "process": (lambda: Schedule.from_json("{}", process="ve"), "process|no schedule"),
    "convert": (
        lambda: convert("edm", VP()),
        "schedule: expected a Schedule, got 'edm'",
    ),
    "convert to": (lambda: convert(edm(VE()), VP), r"call it: VP\(\)"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_arguments_that_make_no_sense_are_refused_by_name(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_lists_of_every_layout_make_the_same_grid(as_a_user):
    values = [80.0, 5.0, 1.0, 0.0]
    expected = from_grid(VE(), values)
    whole = np.array(values)
    read_only = whole.copy()
    read_only.flags.writeable = False
    for same in (
        tuple(values),
        [torch.tensor(v) for v in values],
        [np.float32(v) for v in values],
        whole[::-1].copy()[::-1],
        whole.astype(">f8"),
        whole.astype(np.longdouble),
        whole.astype(np.int64),
        whole.astype(object),
        read_only,
        torch.tensor(values, requires_grad=True),
    ):
        assert from_grid(VE(), same) == expected
    assert whole.tolist() == values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@each_schedule
def test_schedules_do_not_follow_the_default_device_or_dtype(make, dtype):
    def use(process):
        schedule = make(process)
        times = [schedule.time(1.0), schedule.clock(1.0), schedule.speed(1.0)]
        more = [schedule.density(1.0), schedule.grid(1), schedule.resample(3).grid(5)]
        if schedule.last_step != "zero":
            more.append(convert(schedule, VE(0.01, 70.0)).grid(4))
        return [schedule.grid(9), *times, *more]

    expected = use(VE())
    torch.set_default_device("meta")
    torch.set_default_dtype(dtype)
    try:
        found = use(VE())
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cpu"
        assert a.equal(b)


def test_a_grid_without_numbers_is_refused(monkeypatch):
    # Whatever the reason: NaN is not ascending, and yet no grid.
    schedule = beta(VE())
    nan = torch.full((4,), math.nan, dtype=torch.float64)
    monkeypatch.setattr(BetaQuantiles, "time", lambda *_: nan)
    with pytest.raises(ValueError, match=r"nan.*not descending"):
        schedule.grid(3)


def test_any_truncation_is_refused():
    text = edm(VE()).resample(3).to_json().rstrip()
    for n in range(0, len(text), 5):
        with pytest.raises(ScheduleFormatError):
            Schedule.from_json(text[:n])


def test_binary_files_are_refused_unread(tmp_path):
    path = tmp_path / "s.json"
    torch.save({"x": torch.zeros(2)}, path)
    with pytest.raises(ScheduleFormatError, match="not a text file"):
        Schedule.load(path)
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(ScheduleFormatError):
        Schedule.load(path)


def test_text_with_a_byte_order_mark_is_read():
    schedule = edm(VE())
    assert Schedule.from_json("\ufeff" + schedule.to_json()) == schedule


def test_knots_at_one_reading_of_the_clock_are_refused_by_name():
    clock, times = [0.0, 20.0, 20.0, 79.998], [80.0, 50.0, 30.0, 0.002]
    with pytest.raises(ValueError, match="clock: expected strictly increasing knots"):
        from_time_change(VE(), clock, times)


def test_no_finite_noise_level_to_start_from_is_refused():
    with pytest.raises(ValueError, match=r"process: t_min = 0\.5 leaves no finite"):
        edm(RectifiedFlow(t_min=0.5))


def test_a_beta_quantile_is_precise_at_both_ends():
    """Where 1 - x rounds to 1: the law of 1 - (1 - x)^2 and of x^2 in closed form."""
    process = VE(1e-6, 80.0)
    horizon = process.t_max - process.t_min
    u = torch.tensor([1e-24, 1e-20, 1e-9], dtype=torch.float64)
    start = BetaQuantiles(process, 1.0, 2.0)  # 1 - x = sqrt(u)
    torch.testing.assert_close(
        start.speed(horizon * u), 0.5 / u.sqrt(), rtol=1e-9, atol=0
    )
    t = process.t_max - horizon * 1e-6
    y = (process.t_max - t) / horizon  # as far as t resolves it
    found = start.clock(torch.tensor(t, dtype=torch.float64))
    assert float(found) == pytest.approx(horizon * y**2, rel=1e-9, abs=0)
    end = BetaQuantiles(process, 0.5, 1.0)  # x = (1 - u)^2
    clock = horizon * torch.tensor([1 - 1e-5, 1 - 1e-4], dtype=torch.float64)
    x = (1 - clock / horizon) ** 2
    torch.testing.assert_close(
        end.time(clock), process.t_min + horizon * x, rtol=1e-10, atol=0
    )


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Schedule.load(tmp_path / "none.json")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_save_leaves_the_old_file(step, error, tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    edm(VE()).save(path)
    before = path.read_bytes()

    def fail(*_):
        raise error("disk full")

    monkeypatch.setattr(file.os, step, fail)
    with pytest.raises(error, match="disk full"):
        log_snr(VE()).save(path)
    with pytest.raises(error, match="disk full"):
        log_snr(VE()).save(tmp_path / "new.json")
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["s.json"]
    log_snr(VE()).save(path)
    assert Schedule.load(path) == log_snr(VE())


def test_the_target_is_never_opened_for_writing(tmp_path, monkeypatch):
    # A reader sees the old file until the replacement, and the new one is complete.
    path = tmp_path / "s.json"
    edm(VE()).save(path)
    replace, seen = os.replace, []

    def watch(source, target):
        seen.append((Schedule.load(source), Schedule.load(target)))
        assert Path(source).parent == Path(target).parent
        replace(source, target)

    monkeypatch.setattr(file.os, "replace", watch)
    log_snr(VE()).save(path)
    assert seen == [(log_snr(VE()), edm(VE()))]
    assert os.listdir(tmp_path) == ["s.json"]


def test_saving_follows_links_and_keeps_usual_permissions(tmp_path):
    real, link, plain = (tmp_path / n for n in ("real.json", "link.json", "plain"))
    edm(VE()).save(real)
    link.symlink_to(real)
    log_snr(VE()).save(link)
    assert link.is_symlink()
    assert Schedule.load(real) == log_snr(VE())
    plain.touch()
    assert real.stat().st_mode == plain.stat().st_mode


def test_saving_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        edm(VE()).save(tmp_path / "none" / "s.json")
