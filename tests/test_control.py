"""The closed form: against the analytic grid, its bounds, the HJB equation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from problems import PROCESSES, Problem, mixture_1d, mixture_16d
from scipy import integrate, optimize
from torch import Tensor

import artlib
from artlib.control.closed_form import (
    StiffnessTable,
    art,
    cost,
    lower_bound,
    stiffness_table,
)
from artlib.control.stiffness import PATH_FLOOR
from artlib.flow.denoisers import CountNFE
from artlib.flow.flow import ProbabilityFlow
from artlib.flow.processes import VE, VP, Process, RectifiedFlow
from artlib.flow.targets import Empirical, Gaussian
from artlib.schedules.constructors import (
    Schedule,
    beta,
    edm,
    from_density,
    kl_optimal,
    log_snr,
    uniform,
)

F64 = torch.float64
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)


@cache
def round_gaussian(c: float, process: Process) -> tuple[ProbabilityFlow, Tensor]:
    """The flow of N(0, c^2 I) in four dimensions, and draws of x_T."""
    target = Gaussian(torch.zeros(4, dtype=F64), c**2 * torch.eye(4, dtype=F64))
    flow = ProbabilityFlow(process, target.denoiser(process))
    return flow, target.sample_prior(process, 16, seed=0)


@cache
def mixture_table(process: Process, points: int = 64) -> StiffnessTable:
    problem = mixture_16d(process, n=32)
    return stiffness_table(problem.flow(), problem.x_T, points=points)


def table_of(process: Process, rows: Callable[[Tensor], Tensor]) -> StiffnessTable:
    """A table of a given |Q|(t) [N, n] instead of a flow's."""
    times = mixture_table(process).times
    return StiffnessTable(process, times, rows(times))


def wiggly(process: Process) -> StiffnessTable:
    """Trajectories that disagree about where it is stiff."""

    def rows(t: Tensor) -> Tensor:
        place = torch.linspace(0, 1, len(t), dtype=F64)
        bumps = [torch.exp(-(((place - c) / 0.15) ** 2)) for c in (0.2, 0.5, 0.9)]
        return torch.stack(bumps) / t + 1e-3

    return table_of(process, rows)


# Against the analytic answer.


@pytest.mark.parametrize(
    ("process", "c"),
    [(VE(), 0.5), (VE(), 3.0), (VE(), 1e-3), (RectifiedFlow(), 0.5)],
    ids=str,
)
def test_grid_of_a_gaussian_is_the_analytic_one(process: Process, c: float) -> None:
    # The path is z sqrt(r) with r = alpha^2 c^2 + sigma^2, a quadratic in t both here
    # and in RectifiedFlow, so |Q| = |z| c^2 r^(-3/2) and the density is r^(-3/4).
    schedule = art(*round_gaussian(c, process), points=64)

    def density(log_t: float) -> float:
        t = math.exp(log_t)
        alpha = 1.0 if isinstance(process, VE) else 1 - t
        return t * (alpha**2 * c**2 + t**2) ** -0.75

    low, high = math.log(process.t_min), math.log(process.t_max)

    @cache
    def share(log_t: float) -> float:
        return integrate.quad(density, log_t, high, epsabs=0, epsrel=1e-11)[0]

    for K in (2, 3, 5, 10, 18, 37, 64):
        grid = schedule.grid(K)
        assert (float(grid[0]), float(grid[-1])) == (process.t_max, 0.0)
        for k in range(1, K):
            wanted = k / K * share(low)
            node = math.exp(
                optimize.brentq(lambda u, w=wanted: share(u) - w, low, high, rtol=1e-10)
            )
            assert float(grid[k]) == pytest.approx(node, rel=1e-3), (K, k)


@pytest.mark.parametrize("c", [0.5, 3.0])
def test_speed_equalises_the_error(c: float) -> None:
    # |Q| theta^2 is constant in time where the schedule is optimal.
    flow, x_T = round_gaussian(c, VE())
    schedule = art(flow, x_T, points=64)
    t = torch.logspace(math.log10(0.0021), math.log10(79.9), 300, dtype=F64)
    product = (t**2 + c**2) ** -1.5 * schedule.speed(schedule.clock(t)) ** 2
    assert float((product / product.median() - 1).abs().max()) < 1e-2


def test_lower_bound_of_a_gaussian_by_quadrature() -> None:
    c, process = 0.5, VE()
    flow, x_T = round_gaussian(c, process)
    z = x_T / math.sqrt(80.0**2 + c**2)
    low, high = math.log(process.t_min), math.log(process.t_max)
    length, _ = integrate.quad(
        lambda u: math.exp(u) * c * (math.exp(2 * u) + c**2) ** -0.75, low, high
    )
    expected = float(z.norm(dim=1).mean()) * length**2 / (80.0 - 0.002)
    # Trajectories are proportional to each other: both bounds are the same number.
    for clock in ("open_loop", "feedback"):
        assert lower_bound(flow, x_T, clock=clock) == pytest.approx(expected, rel=1e-4)


# Optimality.


@each_process
@pytest.mark.parametrize("kind", ["mixture", "wiggly"])
def test_art_attains_the_bound(process: Process, kind: str) -> None:
    table = mixture_table(process) if kind == "mixture" else wiggly(process)
    bound = table.lower_bound()
    # Slopes between stored knots cost a little where |Q| has bumps.
    assert table.cost(table.art()) == pytest.approx(bound, rel=1e-4)
    assert table.cost(table.art()) >= bound * (1 - 2e-5)


@each_process
@pytest.mark.parametrize("kind", ["mixture", "wiggly"])
def test_everything_else_costs_more(process: Process, kind: str) -> None:
    table = mixture_table(process) if kind == "mixture" else wiggly(process)
    bound = table.lower_bound()
    others: dict[str, Schedule] = {
        "uniform": uniform(process),
        "edm": edm(process),
        "log_snr": log_snr(process),
        "kl": kl_optimal(process),
        "beta": beta(process),
        # The traps: the statistic is |Q| to the power 1/2.
        "exponent 1": table.art(exponent=1.0),
        "exponent 1/4": table.art(exponent=0.25),
    }
    rng = np.random.default_rng(0)
    times = table.fine_times[::8]
    place = np.linspace(0, 1, len(times))
    best = table.fine_mean[::8].sqrt().numpy()
    for k in range(6):
        phase, waves = rng.uniform(0, 6), rng.integers(1, 6)
        wave = np.exp(0.3 * np.sin(phase + 2 * np.pi * waves * place))
        others[f"perturbed {k}"] = from_density(process, times, best * wave)
        walk = np.exp(np.interp(place, np.linspace(0, 1, 8), rng.normal(0, 1.5, 8)))
        others[f"random {k}"] = from_density(process, times, walk)
    for name, schedule in others.items():
        assert table.cost(schedule) > bound * 1.005, name


@each_process
def test_cost_is_quadratic_about_the_optimum(process: Process) -> None:
    # q (1 + e w) costs C (1 + O(e^2)): half the perturbation, a quarter of the excess.
    table = mixture_table(process)
    times, best = table.fine_times[::4], table.fine_mean[::4].sqrt()
    wave = torch.sin(torch.linspace(0, 9, len(times), dtype=F64))
    excess = [
        table.cost(from_density(process, times, best * (1 + e * wave)))
        / table.lower_bound()
        - 1
        for e in (0.4, 0.2)
    ]
    assert excess[0] / excess[1] == pytest.approx(4, rel=0.2)


@each_process
def test_cost_of_uniform_is_the_integral_of_q(process: Process) -> None:
    table = mixture_table(process)
    integral = torch.trapezoid(table.fine_mean, -table.fine_times)
    assert table.cost(uniform(process)) == pytest.approx(float(integral), rel=1e-12)
    # In the log noise level quad sees the same: E|Q| by another rule and grid.
    coarse = torch.trapezoid(table.fine_mean[::4], -table.fine_times[::4])
    assert float(coarse) == pytest.approx(float(integral), rel=1e-4)


# Bounds and averages.


@each_process
def test_feedback_bound_is_below_the_open_loop_one(process: Process) -> None:
    # Jensen; equal if and only if the trajectories are proportional.
    for table, least in ((mixture_table(process), 1e-4), (wiggly(process), 0.1)):
        ratio = table.lower_bound("feedback") / table.lower_bound("open_loop")
        assert ratio < 1 - least

    def proportional(t: Tensor) -> Tensor:
        return torch.outer(
            torch.tensor([0.1, 1.0, 30.0], dtype=F64), 1 / (0.1 + t) ** 2
        )

    table = table_of(process, proportional)
    assert table.lower_bound("feedback") == pytest.approx(
        table.lower_bound(), rel=1e-12
    )


@each_process
def test_paper_average_equals_open_loop_on_like_trajectories(process: Process) -> None:
    def proportional(t: Tensor) -> Tensor:
        return torch.outer(
            torch.tensor([0.1, 1.0, 30.0], dtype=F64), 1 / (0.1 + t) ** 2
        )

    table = table_of(process, proportional)
    for K in (3, 10, 40):
        torch.testing.assert_close(
            table.art("paper").grid(K), table.art().grid(K), rtol=1e-9, atol=0
        )


@each_process
def test_paper_average_is_the_mean_of_the_feedback_clocks(process: Process) -> None:
    # Built here from scratch: a schedule per trajectory, psi averaged at equal clocks.
    table = wiggly(process)
    floored = torch.maximum(table.fine_values, PATH_FLOOR * table.fine_mean)
    times = table.fine_times
    alone = [StiffnessTable(process, times, row[None]).art() for row in floored]
    clock = torch.linspace(0, table.span, 40, dtype=F64)[1:-1]
    mean = torch.stack([s.time(clock) for s in alone]).mean(0)
    paper = table.art("paper")
    torch.testing.assert_close(paper.time(clock), mean, rtol=2e-4, atol=0)
    assert paper.name != table.art().name
    # It is no optimum, and cannot be better than one.
    assert table.cost(paper) > table.lower_bound() * 1.01
    mild = mixture_table(process)
    ratio = mild.cost(mild.art("paper")) / mild.lower_bound()
    assert 1 - 1e-6 < ratio < 1.1


# Invariance.


@each_process
@pytest.mark.parametrize("factor", [1e-12, 7.3, 1e9])
def test_units_of_q_do_not_matter(process: Process, factor: float) -> None:
    table = wiggly(process)
    scaled = StiffnessTable(process, table.times, factor * table.values)
    for average in ("open_loop", "paper"):
        torch.testing.assert_close(
            scaled.art(average).grid(12), table.art(average).grid(12), rtol=1e-9, atol=0
        )
    bound = factor * table.lower_bound()
    assert scaled.lower_bound() == pytest.approx(bound, rel=1e-9)


def test_units_of_space_scale_the_grid() -> None:
    # x -> a x, sigma -> a sigma is the same problem with every time a times as large.
    a = 7.3
    grids = []
    for scale in (1.0, a):
        process = VE(sigma_min=0.01 * scale, sigma_max=20.0 * scale)
        means = scale * torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=F64)
        stds = scale * torch.tensor([0.1, 0.4], dtype=F64)
        target = artlib.GaussianMixture(means, stds, [1.0, 2.0])
        flow = ProbabilityFlow(process, target.denoiser(process))
        grids.append(art(flow, target.sample_prior(process, 32)).grid(15))
    torch.testing.assert_close(grids[1], a * grids[0], rtol=1e-8, atol=0)


# The value function.


@each_process
def test_value_solves_the_hjb_equation(process: Process) -> None:
    # V_s + sup_theta (theta V_psi - |Q| theta^2) = V_s + V_psi^2 / (4 |Q|) = 0, with
    # psi = t_max - t, at points on and off the optimal path.
    table = table_of(process, lambda t: (0.3 / (t**2 + 0.09) ** 1.5)[None])
    span = table.span
    for t in (0.7 * process.t_max, 0.2 * process.t_max, 0.02 * process.t_max):
        for s in (0.1 * span, 0.5 * span, 0.95 * span):
            q = 0.3 / (t**2 + 0.09) ** 1.5
            h, k = 1e-4 * (span - s), 0.02 * t
            v_s = (table.value(s + h, t) - table.value(s - h, t)) / (2 * h)
            v_psi = -(table.value(s, t + k) - table.value(s, t - k)) / (2 * k)
            residual = float(v_s + v_psi**2 / (4 * q)) / abs(float(v_s))
            assert abs(residual) < 3e-3, (t, s)


@each_process
def test_value_is_minus_the_cost_to_go(process: Process) -> None:
    table = wiggly(process)
    single = StiffnessTable(process, table.times, table.mean()[None])
    start = table.value(0.0, process.t_max)
    assert float(start) == pytest.approx(-single.lower_bound(), rel=1e-3)
    # Along the optimal path what has been spent and what is to come add up to it.
    schedule = single.art()
    clock = schedule.clock(single.fine_times)
    rate = single.fine_mean * schedule.speed(clock)
    spent = torch.cumulative_trapezoid(rate, -single.fine_times)
    keep = slice(200, 1800, 200)
    to_come = -single.value(clock[1:][keep], single.fine_times[1:][keep])
    total = single.lower_bound()
    torch.testing.assert_close(
        spent[keep] + to_come, torch.full_like(to_come, total), rtol=2e-3, atol=0
    )
    assert table.value(torch.zeros(3, 1), torch.tensor([0.5, 0.7])).shape == (3, 2)


# |Q| is what an Euler step costs.


@each_process
@pytest.mark.parametrize("build", [mixture_1d, mixture_16d])
def test_one_euler_step_leaves_half_h_squared_q(
    process: Process, build: Callable[..., Problem]
) -> None:
    # Eq. (7) against the exact flow map: slope 2, and the constant.
    problem = build(process, n=16)
    flow = problem.flow()
    for share in (0.6, 0.15, 0.04):
        t = share * process.t_max
        x = problem.exact(problem.x_T, process.t_max, t)
        q = float(flow.stiffness(x, t).mean())
        steps = [t * r for r in (4e-2, 2e-2, 1e-2, 5e-3)]
        errors = [
            float(
                (x - h * flow.velocity(x, t) - problem.exact(x, t, t - h))
                .norm(dim=1)
                .mean()
            )
            for h in steps
        ]
        slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
        assert slope == pytest.approx(2, abs=0.1)
        assert errors[-1] == pytest.approx(steps[-1] ** 2 / 2 * q, rel=0.05)


def test_many_euler_steps_prefer_art() -> None:
    # Not the asymptotic cost but the error itself, at the same noise.
    process = PROCESSES[0]
    problem = mixture_1d(process, n=256)
    flow = problem.flow()
    exact = problem.exact(problem.x_T, process.t_max, 0.0)

    def error(schedule: Schedule) -> float:
        x = artlib.sample(flow, problem.x_T, schedule.grid(40))
        return artlib.terminal_error(x, exact)

    learned = error(art(flow, problem.x_T))
    for other in (uniform(process), edm(process), edm(process, pinned=False)):
        assert learned < 0.95 * error(other), other


# What |Q| does in practice.


@pytest.mark.parametrize("average", ["open_loop", "paper"])
def test_underflowing_q_stays_monotone(average: str) -> None:
    # Real digits: below sigma 0.07 each path has met its point and |Q| is exactly 0.
    digits = pytest.importorskip("sklearn.datasets").load_digits().images[:200]
    data = Empirical(torch.from_numpy(digits / 8 - 1)[:, None])
    process = VE()
    flow = ProbabilityFlow(process, data.denoiser(process))
    table = stiffness_table(flow, data.sample_prior(process, 8))
    assert bool((table.values[:, -8:] == 0).all())
    schedule = table.art(average)  # type: ignore[arg-type]
    for K in (1, 2, 3, 10, 50, 200):
        grid = schedule.grid(K)
        assert grid.shape == (K + 1,)
        assert bool((grid[1:] < grid[:-1]).all())
    assert bool((schedule.speed(torch.linspace(0, table.span, 999)) > 0).all())
    # The floor diverts next to nothing: the bound is attained all the same.
    if average == "open_loop":
        assert table.cost(schedule) == pytest.approx(table.lower_bound(), rel=1e-4)
    else:
        assert table.cost(schedule) < 1.2 * table.lower_bound()


@each_process
def test_zero_over_a_range_and_on_whole_paths(process: Process) -> None:
    def rows(t: Tensor) -> Tensor:
        active = (t < 0.5 * process.t_max) & (t > 0.05 * process.t_max)
        return torch.stack([active / t, torch.zeros_like(t), 2 * active / t])

    table = table_of(process, rows)
    for schedule in (table.art(), table.art("paper"), table.art(exponent=2.0)):
        grid = schedule.grid(200)
        assert bool((grid[1:] < grid[:-1]).all())
    assert table.cost(table.art()) == pytest.approx(table.lower_bound(), rel=1e-2)


def test_held_out_is_learning_on_some_and_judging_on_others() -> None:
    problem = mixture_16d(VE(), n=11)
    table = stiffness_table(problem.flow(), problem.x_T)
    expected = 0.0
    for k in range(3):
        theirs = [row for row in range(11) if row % 3 == k]
        others = [row for row in range(11) if row % 3 != k]
        known = StiffnessTable(VE(), table.times, table.values[others]).art()
        new = StiffnessTable(VE(), table.times, table.values[theirs])
        expected += new.cost(known) * len(theirs) / 11
    expected /= table.lower_bound()
    assert table.held_out(3) == pytest.approx(expected, rel=1e-12)


def test_held_out_falls_to_1_with_the_number_of_paths() -> None:
    problem = mixture_16d(VE(), n=512)
    table = stiffness_table(problem.flow(), problem.x_T)
    found = [
        StiffnessTable(VE(), table.times, table.values[:n]).held_out(4)
        for n in (4, 32, 512)
    ]
    assert found[0] > found[1] > found[2] > 1 - 1e-6
    assert found[2] < 1.002
    # It foretells what new paths cost.
    few, new = (
        StiffnessTable(VE(), table.times, table.values[rows])
        for rows in (slice(0, 16), slice(16, None))
    )
    ratio = new.cost(few.art()) / new.lower_bound()
    assert few.held_out() == pytest.approx(ratio, abs=0.03)


def test_held_out_of_straight_paths() -> None:
    times = torch.logspace(math.log10(80), math.log10(0.002), 9, dtype=torch.float64)
    bent = StiffnessTable(VE(), times, torch.ones(4, 9, dtype=torch.float64))
    assert bent.held_out(4) == pytest.approx(1, abs=1e-6)
    one = torch.zeros(4, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match="all paths are straight"):
        StiffnessTable(VE(), times, one).held_out(2)
    one[0] = 1
    assert StiffnessTable(VE(), times, one).held_out(4) == math.inf
    with pytest.raises(ValueError, match="folds: 5 parts of 4 trajectories"):
        bent.held_out(5)
    with pytest.raises(ValueError, match="folds: expected at least 2"):
        bent.held_out(1)


def test_straight_paths_have_nothing_to_learn() -> None:
    flow = ProbabilityFlow(VE(), lambda x, t: torch.full_like(x, 0.3))
    for average in ("open_loop", "paper"):
        with pytest.raises(ValueError, match="straight"):
            art(flow, torch.ones(3, 2, dtype=F64), average=average, points=9)


def test_a_table_of_64_times_resolves_rectified_flow() -> None:
    # |Q| of a rectified flow is anything but smooth in t near both ends; in the log
    # noise level it is, and a quarter of the points gives the same bound.
    process = RectifiedFlow()
    coarse, fine = mixture_table(process, 64), mixture_table(process, 256)
    assert coarse.lower_bound() == pytest.approx(fine.lower_bound(), rel=5e-3)
    assert fine.cost(coarse.art()) == pytest.approx(fine.lower_bound(), rel=1e-3)


@each_process
def test_methods_agree(process: Process) -> None:
    problem = mixture_16d(process, n=16)
    exact = stiffness_table(problem.flow(), problem.x_T, method="dopri5", rtol=1e-6)
    assert exact.acceleration == "jvp"
    flow = ProbabilityFlow(process, problem.denoiser, acceleration="difference")
    for f, method in ((problem.flow(), "heun"), (flow, "rk4")):
        table = stiffness_table(f, problem.x_T, method=method)
        assert table.lower_bound() == pytest.approx(exact.lower_bound(), rel=1e-2)
        assert exact.cost(table.art()) == pytest.approx(exact.lower_bound(), rel=1e-3)
    assert table.acceleration == "difference"


def test_table_counts_what_it_spent() -> None:
    problem = mixture_16d(VE())
    counter = CountNFE(problem.denoiser)
    table = stiffness_table(ProbabilityFlow(VE(), counter), problem.x_T, points=20)
    assert table.nfe == counter.nfe
    difference = ProbabilityFlow(VE(), problem.denoiser, acceleration="difference")
    table = stiffness_table(difference, problem.x_T, points=20)
    assert table.nfe == 19 * 4 + 1  # the path and D at its end, nothing more
    notes = table.art().provenance
    assert (notes["nfe"], notes["points"], notes["trajectories"]) == (77, 20, 8)
    assert (notes["method"], notes["acceleration"]) == ("closed form", "difference")


def test_top_level_calls_are_the_tables() -> None:
    problem = mixture_16d(VP(), n=8)
    flow, x_T, n = problem.flow(), problem.x_T, 12
    table = stiffness_table(flow, x_T, points=n)
    assert art(flow, x_T, points=n) == table.art()
    assert art(flow, x_T, average="paper", points=n) == table.art("paper")
    assert cost(flow, edm(VP()), x_T, points=n) == table.cost(edm(VP()))
    for clock in ("open_loop", "feedback"):
        bound = lower_bound(flow, x_T, clock=clock, points=n)
        assert bound == table.lower_bound(clock)
    with torch.inference_mode():
        assert art(flow, x_T.clone(), points=n) == table.art()
    single = art(flow, x_T.float(), points=n).grid(5)
    torch.testing.assert_close(single, table.art().grid(5), rtol=1e-4, atol=0)


# Errors.


def nan_below_one(x: Tensor, t: Tensor) -> Tensor:
    return torch.where(t < 1, torch.full_like(x, math.nan), x / (1 + t))


FLOW = ProbabilityFlow(VE(), mixture_16d(VE()).denoiser)
X_T = mixture_16d(VE()).x_T


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: art(ProbabilityFlow(VE(), nan_below_one), X_T), "denoiser"),
        (lambda: art(FLOW, torch.full((3, 16), math.nan)), "x_T: .*NaN"),
        (lambda: art(FLOW, torch.ones(3, 5)), r"x: .*\(16,\).*\(3, 5\)"),
        (lambda: art(FLOW, torch.ones(16)), r"x_T: .*\[n, \*sample_shape\]"),
        (lambda: art(FLOW, torch.ones(0, 16)), "x_T: .*no sample"),
        (lambda: art(FLOW, X_T, points=4), "points: .*at least 5"),
        (lambda: art(FLOW, X_T, average="mean"), "average: .*'mean'"),
        (lambda: art(FLOW, X_T, method="euler"), "method: .*'euler'"),
        (lambda: lower_bound(FLOW, X_T, clock="closed"), "clock: .*'closed'"),
        (lambda: cost(FLOW, edm(VP()), X_T), r"schedule: .*VP\(.*VE\("),
        (lambda: cost(FLOW, edm(VE(sigma_max=50.0)), X_T), "schedule: .*same process"),
        (lambda: mixture_table(VP()).art("mean"), "average: .*'mean'"),
        (lambda: mixture_table(VP()).art(exponent=0.0), "exponent: .*0"),
        (lambda: mixture_table(VP()).art(exponent=math.nan), "exponent: .*nan"),
        (lambda: mixture_table(VP()).lower_bound("closed"), "clock: .*'closed'"),
        (lambda: table_of(VP(), lambda t: -t[None]), r"values: \|Q\| is a norm"),
        (lambda: table_of(VP(), lambda t: t[None] / 0), "values: 64 of 64"),
        (lambda: table_of(VP(), lambda t: t), r"values \[N, n\]"),
        (
            lambda: StiffnessTable(VP(), torch.ones(3), torch.ones(2, 3)),
            "times: .*desc",
        ),
        (
            lambda: StiffnessTable(
                VP(), torch.tensor([1.0, 0.5], dtype=F64), torch.ones(2, 2)
            ),
            "times: .*t_min",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], named: str) -> None:
    # Under the test suite's type checks a wrong literal is refused even earlier.
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    if not type(caught.value).__module__.startswith("jaxtyping"):
        assert caught.match(named)
    else:
        assert named.split(":")[0] in str(caught.value)


def test_wrong_arguments_cost_no_evaluation() -> None:
    counter = CountNFE(mixture_16d(VE()).denoiser)
    flow = ProbabilityFlow(VE(), counter)
    with pytest.raises(ValueError, match="schedule"):
        cost(flow, edm(VP()), X_T)
    for call in (
        lambda: art(flow, X_T, average="mean"),  # type: ignore[arg-type]
        lambda: lower_bound(flow, X_T, clock="closed"),  # type: ignore[arg-type]
    ):
        with pytest.raises((ValueError, TypeError)):
            call()
    assert counter.nfe == 0


def test_bad_types_are_named() -> None:
    with pytest.raises(TypeError, match=r"x_T: .*int64"):
        art(FLOW, torch.ones(3, 16, dtype=torch.int64))
    with pytest.raises(TypeError, match="points"):
        art(FLOW, X_T, points=64.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="flow"):
        art(mixture_16d(VE()).denoiser, X_T)  # type: ignore[arg-type]


def test_table_on_another_device(accelerator: torch.device) -> None:
    expected = stiffness_table(FLOW, X_T, points=17)
    there = stiffness_table(FLOW, X_T.to(accelerator), points=17)
    torch.testing.assert_close(there.values, expected.values, rtol=1e-6, atol=1e-12)
    assert there.art().grid(5).device.type == "cpu"


@pytest.mark.parametrize("least", [0.15, 0.0])
def test_the_paper_average_floors_a_path_at_a_tenth_of_the_mean(least: float) -> None:
    """Two paths: one bends alike everywhere, the other hardly below t = 5."""
    process = VE(sigma_min=0.1, sigma_max=10.0)
    times = torch.logspace(1, -1, 513, dtype=torch.float64)
    times[0], times[-1] = process.t_max, process.t_min
    other = torch.where(times > 5, 1.0, least)
    table = StiffnessTable(process, times, torch.stack([torch.ones(513), other]))
    fine, knots = table.fine_times, torch.linspace(0, 1, 65, dtype=torch.float64)
    low = fine < 5
    floored = max(least, 0.1 * (1 + least) / 2)
    rows = []
    for q in (torch.ones(len(fine)), torch.where(low, floored, 1.0)):
        density = q.double().sqrt()
        pieces = 0.5 * (density[1:] + density[:-1]) * (fine[:-1] - fine[1:])
        clock = torch.cat([torch.zeros(1), pieces.cumsum(0)])
        rows.append(np.interp(knots * clock[-1], clock, fine))
    schedule = table.art("paper")
    found = schedule.time(knots * schedule.horizon)
    torch.testing.assert_close(
        found, torch.from_numpy(np.mean(rows, axis=0)), rtol=0.02, atol=0
    )


def test_a_power_law_is_kept_over_sixteen_decades() -> None:
    process = VE(sigma_min=1e-3, sigma_max=10.0)
    times = torch.logspace(1, -3, 33, dtype=torch.float64)
    times[0], times[-1] = process.t_max, process.t_min
    table = StiffnessTable(process, times, (times**4)[None])
    torch.testing.assert_close(
        table.fine_values[0], table.fine_times**4, rtol=1e-6, atol=0
    )
