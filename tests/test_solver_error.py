"""A solver's own local error: against its amplification factor in fifty digits."""

from __future__ import annotations

from functools import cache
from typing import Any

import mpmath as mp
import pytest
import torch
from problems import mixture_16d
from torch import Tensor

import artlib
from artlib.flow.flow import ProbabilityFlow
from artlib.flow.noise_coordinate import log_level_dot
from artlib.flow.processes import VE, VP, Process, RectifiedFlow
from artlib.flow.targets import Gaussian

F64 = torch.float64
SOLVERS = {"euler": 1, "heun": 2, "rk4": 4, "dpmpp_2m": 2}
VARIANCE = 0.25
mp.mp.dps = 50


@cache
def round_gaussian(process: Process) -> tuple[ProbabilityFlow, Tensor]:
    target = Gaussian(torch.zeros(4, dtype=F64), VARIANCE * torch.eye(4, dtype=F64))
    flow = ProbabilityFlow(process, target.denoiser(process))
    return flow, target.sample_prior(process, 8, seed=0)


def alpha_sigma(process: Process, t: Any) -> tuple[Any, Any]:
    if isinstance(process, VE):
        return mp.mpf(1), t
    if isinstance(process, RectifiedFlow):
        return 1 - t, t
    assert isinstance(process, VP)
    half_slope = (mp.mpf(process.beta_max) - mp.mpf(process.beta_min)) / 2
    integral = process.beta_min * t + half_slope * t**2
    return mp.exp(-integral / 2), mp.sqrt(1 - mp.exp(-integral))


def factor_error(process: Process, solver: str, t: float) -> float:
    """(m_solver - m_exact) / h^(p+1) about t, as the step vanishes."""
    middle = mp.mpf(t)
    h = middle * mp.mpf(10) ** -6 * (1 - middle if process.t_max == 1 else 1)

    def std(u: Any) -> Any:
        a, s = alpha_sigma(process, u)
        return mp.sqrt(a**2 * VARIANCE + s**2)

    def rate(u: Any) -> Any:
        a = alpha_sigma(process, u)[0]
        if isinstance(process, VP):
            low, high = mp.mpf(process.beta_min), mp.mpf(process.beta_max)
            half = (low + (high - low) * u) / 2
            return half * a**2 * (1 - VARIANCE) / std(u) ** 2
        return (u - (1 - u) * VARIANCE * (process.t_max == 1)) / std(u) ** 2

    if solver == "dpmpp_2m":

        def snr(u: Any) -> Any:
            a, s = alpha_sigma(process, u)
            return mp.log(mp.re(a) / mp.re(s))

        def shrink(u: Any) -> Any:
            a, s = alpha_sigma(process, u)
            return a * VARIANCE / (a**2 * VARIANCE + s**2) * std(u)

        ahead = middle - h
        before = mp.findroot(
            lambda u: snr(u) - 2 * snr(middle) + snr(ahead),
            (middle + h * mp.mpf("0.9"), middle + h * mp.mpf("1.1")),
            solver="anderson",
        )
        (a0, s0), (a1, s1) = (alpha_sigma(process, u) for u in (middle, ahead))
        drive = 1.5 * shrink(middle) - 0.5 * shrink(before)
        found = s1 / s0 * std(middle) + (a1 - a0 * s1 / s0) * drive
        return float((found - std(ahead)) / h**3 / std(middle))
    a, b = middle + h / 2, middle - h / 2
    k1 = rate(a)
    if solver == "euler":
        found = 1 - h * k1
    elif solver == "heun":
        found = 1 - h / 2 * (k1 + rate(b) * (1 - h * k1))
    else:  # Kutta's 3/8 rule
        k2 = rate(a - h / 3) * (1 - h * k1 / 3)
        k3 = rate(a - 2 * h / 3) * (1 - h * (k2 - k1 / 3))
        k4 = rate(b) * (1 - h * (k1 - k2 + k3))
        found = 1 - h * (k1 + 3 * k2 + 3 * k3 + k4) / 8
    return float((found - std(b) / std(a)) / h ** (SOLVERS[solver] + 1))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("process", [VE(), VP(), RectifiedFlow()], ids=lambda p: p.name)
def test_error_is_that_of_the_amplification_factor(
    process: Process, solver: str
) -> None:
    flow, x_T = round_gaussian(process)
    table = artlib.error_table(flow, x_T, solver=solver)
    assert table.order == SOLVERS[solver]
    start = x_T.norm(dim=1) / torch.sqrt(
        process.alpha(table.times[0]) ** 2 * VARIANCE
        + process.sigma(table.times[0]) ** 2
    )
    times = table.times[2:-1:3]
    alpha, sigma = process.alpha(times), process.sigma(times)
    along = torch.sqrt(alpha**2 * VARIANCE + sigma**2)
    signed = torch.tensor(
        [factor_error(process, solver, float(t)) for t in times], dtype=F64
    )
    exact = signed.abs() * along
    found = table.values[0, 2:-1:3] / start[0]
    # What the density sees: elsewhere rounding hides what next to nothing leaves. And
    # away from zeros of Q_p, beside which no percentage means anything.
    share = exact ** (1 / (table.order + 1)) * times
    seen = share > 0.05 * share.max()
    for k in (signed[1:] * signed[:-1] < 0).nonzero()[:, 0].tolist():
        seen[max(k - 1, 0) : k + 3] = False
    length = 0.05 / log_level_dot(process, times)
    seen &= length ** (table.order + 1) * exact > 1e-14  # more than float64's rounding
    assert int(seen.sum()) >= 3
    assert float((found / exact - 1).abs()[seen].max()) < 0.05


@pytest.mark.parametrize("process", [VE(), VP(), RectifiedFlow()], ids=lambda p: p.name)
def test_eulers_own_error_is_half_the_acceleration(process: Process) -> None:
    problem = mixture_16d(process, n=16)
    own = artlib.error_table(problem.flow(), problem.x_T, points=48)
    plain = artlib.stiffness_table(problem.flow(), problem.x_T, points=48)
    assert own.order == 1
    torch.testing.assert_close(own.mean(), plain.mean() / 2, rtol=0.06, atol=1e-12)
    nodes, usual = own.art().grid(12)[:-1], plain.art().grid(12)[:-1]
    torch.testing.assert_close(nodes, usual, rtol=0.01, atol=0)


def midpoint(flow: ProbabilityFlow, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    half = x + (s - t) / 2 * flow.velocity(x, t)
    return x + (s - t) * flow.velocity(half, (t + s) / 2)


def heun(flow: ProbabilityFlow, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    v = flow.velocity(x, t)
    return x + (s - t) / 2 * (v + flow.velocity(x + (s - t) * v, s))


def test_a_callable_is_measured_like_a_name() -> None:
    flow, x_T = round_gaussian(VE())
    named = artlib.error_table(flow, x_T, solver="heun")
    own = artlib.error_table(flow, x_T, solver=heun, order=2)
    torch.testing.assert_close(own.values, named.values, rtol=1e-6, atol=1e-12)
    # The order is found where it is not given; on this law the midpoint rule happens
    # to be of order three, on others it is not.
    assert artlib.error_table(flow, x_T, solver=heun).order == 2
    assert artlib.error_table(flow, x_T, solver=midpoint).order == 3
    problem = mixture_16d(VE(), n=8)
    other = artlib.error_table(problem.flow(), problem.x_T, solver=midpoint, order=2)
    same = artlib.error_table(problem.flow(), problem.x_T, solver="heun")
    assert not torch.allclose(other.art().grid(5), same.art().grid(5), rtol=0.05)


@pytest.mark.parametrize("solver", ["heun", "rk4", "dpmpp_2m"])
def test_matched_density_is_the_cheapest_in_its_own_error(solver: str) -> None:
    problem = mixture_16d(VE(), n=16)
    table = artlib.error_table(problem.flow(), problem.x_T, solver=solver)
    p, bound = table.order, table.lower_bound()
    assert bound * (1 - 1e-4) < table.cost(table.art()) < bound * 1.002
    for exponent in (0.5, 1 / p, 0.7 / (p + 1)):
        assert table.cost(table.art(exponent=exponent)) > bound * 1.005
    for schedule in (artlib.edm(VE()), artlib.log_snr(VE()), artlib.kl_optimal(VE())):
        assert table.cost(schedule) > bound * 1.01
    assert table.lower_bound("feedback") <= bound * (1 + 1e-9)
    # Holder's bound is met because |Q_p| theta^(p+1) is the same everywhere.
    times = table.fine_times[40:-40:40]
    speed = table.art().speed(table.art().clock(times))
    paid = table.fine_mean[40:-40:40] * speed ** (p + 1)
    seen = table.fine_mean[40:-40:40] ** (1 / (p + 1)) * times
    paid = paid[seen > 0.05 * seen.max()]
    assert float((paid / paid.median() - 1).abs().max()) < 0.15


def test_value_of_higher_order_is_minus_the_cost_to_go() -> None:
    table = artlib.error_table(*round_gaussian(VE()), solver="heun")
    value = float(table.value(0.0, 80.0))
    assert -value == pytest.approx(table.lower_bound(), rel=1e-6)


def test_error_of_a_step_is_what_the_table_says() -> None:
    """Heun's error on a mixture, from an accurate path, is |Q_2| h^3."""
    problem = mixture_16d(VE(), n=4)
    flow = problem.flow()
    table = artlib.error_table(flow, problem.x_T, solver="heun")
    times = table.fine_times
    for t in (5.0, 1.0, 0.4, 0.15):
        k = int((times - t).abs().argmin())
        middle, h = float(times[k]), 0.02 * t
        x = problem.exact(problem.x_T, 80.0, middle + h / 2)
        found = artlib.sample(flow, x, [middle + h / 2, middle - h / 2], solver="heun")
        left = found - problem.exact(x, middle + h / 2, middle - h / 2)
        expected = table.fine_values[:, k] * h**3
        torch.testing.assert_close(left.norm(dim=1), expected, rtol=0.05, atol=0)


def test_rounding_of_a_float32_network_is_no_error() -> None:
    """Below the resolution a density does not follow the noise of the digits."""
    target = Gaussian(torch.zeros(4, dtype=F64), VARIANCE * torch.eye(4, dtype=F64))
    exact = target.denoiser(VE())

    def single(x: Tensor, t: Tensor) -> Tensor:
        return exact(x.double(), t.double()).float()

    flow = ProbabilityFlow(VE(), single, dtype=torch.float32)
    x_T = target.sample_prior(VE(), 32, seed=0)
    for solver in ("euler", "heun"):
        options = {"solver": solver, "weight": "local"}
        rough = artlib.art(flow, x_T, **options).grid(8)[1:-1]
        smooth = artlib.art(ProbabilityFlow(VE(), exact), x_T, **options).grid(8)[1:-1]
        torch.testing.assert_close(rough, smooth, rtol=0.06, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_cost_is_within_six_plain_closed_forms(solver: str) -> None:
    """Counted in evaluations; a forward-mode product counts two."""
    problem = mixture_16d(VE(), n=4)
    plain = artlib.stiffness_table(problem.flow(), problem.x_T)
    assert (
        plain.nfe
        < artlib.error_table(problem.flow(), problem.x_T, solver=solver).nfe
        < 6 * (plain.nfe + 64)
    )
    schedule = artlib.art(problem.flow(), problem.x_T, solver=solver, weight="local")
    assert schedule.provenance.get("order", 1) == SOLVERS[solver]
    assert schedule.provenance["solver"] == solver


def test_without_a_solver_it_is_the_stiffness() -> None:
    problem = mixture_16d(VE(), n=8)
    schedule = artlib.art(problem.flow(), problem.x_T, points=64)
    assert schedule == artlib.stiffness_table(problem.flow(), problem.x_T).art()
    assert schedule.name == "ART"
    assert not {"solver", "weight", "order"} & set(schedule.provenance)


FLOW, X_T = round_gaussian(VE())
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": ({"solver": "ddim"}, ValueError, "solver: .*'ddim'"),
    "adaptive": ({"solver": "dopri5"}, ValueError, "solver: .*'dopri5'"),
    "number": ({"solver": 2}, TypeError, "solver: .*int"),
    "signature": ({"solver": lambda x, t: x}, TypeError, r"solver: .*step\(flow, x, t"),
    "no tensor": (
        {"solver": lambda f, x, t, s: 1.0, "order": 1},
        TypeError,
        "solver: .*float",
    ),
    "shape": (
        {"solver": lambda f, x, t, s: x[:1], "order": 1},
        ValueError,
        r"solver: .*\(\d, 4\)",
    ),
    "nan": (
        {"solver": lambda f, x, t, s: x / 0 * 0, "order": 1},
        ValueError,
        "solver: ",
    ),
    "order of a name": ({"solver": "heun", "order": 3}, ValueError, "order: .*3"),
    "order": ({"solver": heun, "order": 0}, ValueError, "order: .*0"),
    "order alone": ({"order": 2}, ValueError, "order: .*solver"),
    "exact": (
        {"solver": lambda f, x, t, s: x * torch.sqrt((s**2 + 0.25) / (t**2 + 0.25))},
        ValueError,
        "order: ",
    ),
    "weight": ({"weight": "global"}, ValueError, "weight: .*'global'"),
    "average": ({"solver": "heun", "average": "mean"}, ValueError, "average: "),
    "probes": ({"weight": "terminal", "probes": 0}, ValueError, "probes: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case: str) -> None:
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        artlib.art(FLOW, X_T, **options)
