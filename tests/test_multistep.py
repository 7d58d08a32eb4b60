"""Multistep solvers: their orders, the formulas of others, gradients, a user's own.

The orders are measured on a Gaussian, whose flow scales every coordinate by a known
number; the published forms are those of diffusers' schedulers (UniPC, DPM-Solver++(3M))
and, for iPNDM, the textbook constants of Adams and Bashforth written out below.
"""

from typing import Any

import numpy as np
import pytest
import torch
from problems import mixture_16d
from torch import Tensor

import artlib
from artlib.solvers import SOLVERS, Position, Solver, multistep
from artlib.solvers.integrate import integrate

F64 = torch.float64
MULTISTEP = [name for name, kind in SOLVERS.items() if kind.history]
PROCESSES = [artlib.VE(sigma_max=20.0), artlib.VP(), artlib.RectifiedFlow(t_max=0.9)]


def smooth(process: artlib.Process, K: int) -> Tensor:
    """Steps of a smooth family that end above 0: even in the cube root of time."""
    ends = torch.tensor([process.t_max, 0.05 * process.t_max], dtype=F64) ** (1 / 3)
    weights = torch.linspace(0, 1, K + 1, dtype=F64)
    grid = torch.lerp(ends[0], ends[1], weights) ** 3
    grid[0] = process.t_max
    return grid


VARIANCES = torch.tensor([0.05, 0.4, 1.0, 3.0], dtype=F64)


def left(process: artlib.Process, nodes: Tensor, solver: Any) -> float:
    """What a solver leaves on N(0, diag(VARIANCES)), from nodes that end above 0."""
    target = artlib.Gaussian(torch.zeros(4, dtype=F64), torch.diag(VARIANCES))
    flow = artlib.ProbabilityFlow(process, target.denoiser(process))
    x = artlib.sample(flow, torch.ones(1, 4, dtype=F64), nodes, solver=solver)
    first, last = (
        process.alpha(t) ** 2 * VARIANCES + process.sigma(t) ** 2
        for t in nodes[[0, -1]]
    )
    return float((x / (last / first).sqrt() - 1).norm())


def slope(errors: list[float]) -> float:
    """Order of errors, from one number of steps to twice as many."""
    return float(np.log2(errors[0] / errors[-1])) / (len(errors) - 1)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
@pytest.mark.parametrize("solver", MULTISTEP)
def test_order_is_the_one_that_is_stated(process: Any, solver: str) -> None:
    errors = [left(process, smooth(process, K), solver) for K in (40, 80, 160)]
    # Of these the error of the first step is left, which is at most of third order.
    order = min(SOLVERS[solver].order, 3)
    assert order - 0.4 < slope(errors), errors


def twice_as_bent(position: Position) -> Tensor:
    """DPM-Solver++(3M) with twice the published weight of the second difference."""
    return 2 * multistep.dpmpp_3m(position) - without_bend(position)


def without_bend(position: Position) -> Tensor:
    """What is left of it where the second difference has no weight."""
    if len(position.past) < 2:
        return multistep.dpmpp_3m(position)
    one, two = position.past
    now, d = position.node.log_ratio, position.denoised
    h = position.next.log_ratio - now
    h0, h1 = now - one.node.log_ratio, one.node.log_ratio - two.node.log_ratio
    first, second = (d - one.denoised) / h0, (one.denoised - two.denoised) / h1
    slope_now = h * (first + h0 / (h0 + h1) * (first - second))
    weight = torch.expm1(-h) / h + 1
    return multistep.ddim(position) + position.next.alpha * weight * slope_now


THIRD = Solver("third", 3, 1, twice_as_bent, 2, data_form=True)


@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [("dpmpp_3m", 1.7, 2.5), (THIRD, 2.7, 3.5), ("unipc3", 3.5, 5.0)],
    ids=["published", "twice the weight", "unipc3"],
)
def test_the_order_without_the_error_of_the_start(
    solver: Any, low: float, high: float
) -> None:
    process, errors = PROCESSES[0], []
    for K in (40, 80, 160):
        grid = smooth(process, K)
        # First steps so short that their orders do not count.
        shares = torch.tensor([2e-5, 1e-4, 5e-4, 3e-3, 0.02, 0.1, 0.4], dtype=F64)
        short = torch.lerp(grid[0], grid[1], shares)
        errors.append(left(process, torch.cat([grid[:1], short, grid[1:]]), solver))
    assert low < slope(errors) < high, errors


def adams_bashforth(
    flow: artlib.ProbabilityFlow, x: Tensor, grid: Tensor, m: int
) -> Tensor:
    """iPNDM in VE as it is published: the noise by constants, D at the end."""
    constants = [
        [1],
        [1.5, -0.5],
        [23 / 12, -4 / 3, 5 / 12],
        [55 / 24, -59 / 24, 37 / 24, -3 / 8],
    ]
    seen: list[Tensor] = []
    for k in range(len(grid) - 1):
        t, s = grid[k], grid[k + 1]
        denoised = flow.denoise(x, t)
        seen.insert(0, (x - denoised) / t)
        row = constants[min(m, len(seen)) - 1]
        if s == 0:
            return denoised
        x = x + (s - t) * sum(c * d for c, d in zip(row, seen, strict=False))
    return x


@pytest.mark.parametrize(("solver", "m"), [("ipndm2", 2), ("ipndm3", 3), ("ipndm", 4)])
def test_ipndm_is_adams_and_bashforth_on_the_noise(solver: str, m: int) -> None:
    process = artlib.VE(sigma_max=20.0)
    problem = mixture_16d(process, 8)
    grid = artlib.edm(process).grid(9)
    ours = artlib.sample(problem.flow(), problem.x_T, grid, solver=solver)
    theirs = adams_bashforth(problem.flow(), problem.x_T, grid, m)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", MULTISTEP)
def test_the_answer_does_not_depend_on_the_scale_of_the_state(solver: str) -> None:
    # The same noise levels in VP and in VE: the data form knows only sigma / alpha.
    vp = artlib.VP()
    problem = mixture_16d(vp, 8)
    flow = problem.flow()
    ve = flow.to_ve()
    grid = artlib.log_snr(vp, pinned=False).grid(7)
    levels = vp.noise_level(grid)
    x_ve = problem.x_T / vp.alpha(grid[0])
    a = artlib.sample(flow, problem.x_T, grid, solver=solver)
    b = artlib.sample(ve, x_ve, levels, solver=solver)
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("solver", ["euler", *MULTISTEP])
def test_gradients_are_the_differences(solver: str, told: bool) -> None:
    process = artlib.VE(sigma_max=20.0)
    problem = mixture_16d(process, 4)
    nodes = artlib.edm(process, pinned=False).grid(6)
    levels = 0.9 * nodes[:-1]

    def value(inner: Tensor) -> Tensor:
        grid = torch.cat([nodes[:1], inner[:5], nodes[-1:]])
        y = integrate(
            problem.flow(), problem.x_T, grid, solver, told=inner[5:] if told else None
        )
        return y.square().mean()

    at = (
        torch.cat([nodes[1:-1], levels]).requires_grad_()
        if told
        else nodes[1:-1].clone().requires_grad_()
    )
    (gradient,) = torch.autograd.grad(value(at), at)
    for k in range(len(at)):
        step = torch.zeros_like(at)
        step[k] = 1e-5 * at[k].detach()
        with torch.no_grad():
            difference = (value(at + step) - value(at - step)) / (2 * step[k])
        assert torch.isclose(gradient[k], difference, rtol=1e-4, atol=1e-8), k


@pytest.mark.parametrize("solver", MULTISTEP)
def test_the_exact_error_and_the_oracle_know_it(solver: str) -> None:
    process = artlib.VE()
    variances = torch.logspace(-3, 0, 6, dtype=F64)
    oracle = artlib.oracle_grid(process, variances, 3, solver=solver)
    best = float(artlib.gaussian_w2(process, variances, oracle, solver=solver))
    for schedule in (
        artlib.edm(process, pinned=False),
        artlib.log_snr(process, pinned=False),
    ):
        grid = schedule.grid(3)
        exact = float(artlib.gaussian_w2(process, variances, grid, solver=solver))
        assert best < exact
    # Samples say the same: on the flow of this law every coordinate is scaled.
    target = artlib.Gaussian(torch.zeros(6, dtype=F64), torch.diag(variances))
    flow = artlib.ProbabilityFlow(process, target.denoiser(process))
    one = torch.ones(1, 6, dtype=F64)
    std = artlib.sample(flow, one, grid, solver=solver)[0].abs()
    std = std * torch.sqrt(variances + process.t_max**2)
    expected = artlib.gaussian_output_std(process, variances, grid, solver=solver)
    assert torch.allclose(std, expected, rtol=1e-9)


def test_each_step_is_one_evaluation() -> None:
    problem = mixture_16d(PROCESSES[0], 4)
    flow, counter = problem.counted()
    grid = artlib.edm(problem.process).grid(8)
    for solver in MULTISTEP:
        before = counter.nfe
        artlib.sample(flow, problem.x_T, grid, solver=solver)
        assert counter.nfe - before == artlib.nfe(grid, solver=solver) == 8


def two_step(position: Position) -> Tensor:
    """Adams and Bashforth of order 2 on the velocity, at unequal steps."""
    flow = position.flow
    v = flow.velocity_from(position.denoised, position.x, position.t)
    h = position.s - position.t
    if not position.past:
        return position.x + h * v
    old = position.past[0]
    before = flow.velocity_from(old.denoised, old.x, old.t)
    return position.x + h * (v + h / (2 * (position.t - old.t)) * (v - before))


MINE = Solver("mine", 2, 1, two_step, history=1, tellable=True)


def test_a_solver_of_ones_own_goes_wherever_a_name_does() -> None:
    process = artlib.VE(sigma_max=20.0)
    assert slope([left(process, smooth(process, K), MINE) for K in (40, 80)]) > 1.7
    problem = mixture_16d(process, 8)
    flow, x = problem.flow(), problem.x_T
    matched = artlib.art(flow, x, solver=MINE, weight="local", points=24)
    assert artlib.nfe(matched.grid(6), solver=MINE) == 6
    refined = artlib.refine(matched, flow, x, 4, solver=MINE, iterations=3)
    assert refined.provenance["solver"] == "mine"
    ends = artlib.references(flow, [x])
    table = artlib.compare(flow, {"ART": matched}, [x], {MINE: [4]}, ends=ends)
    assert "mine 4" in table.cells


def test_the_error_of_a_multistep_solver_is_not_that_of_its_start() -> None:
    # Measured by its own history: of order 2 it falls by 8 where Euler's falls by 4.
    problem = mixture_16d(artlib.VE(sigma_max=20.0), 4)
    flow, x = problem.flow(), problem.x_T
    for solver in ("dpmpp_2m", MINE):
        table = artlib.error_table(flow, x, solver=solver, points=24)
        assert table.order == 2
        euler = artlib.error_table(flow, x, solver="euler", points=24)
        shapes = [t.mean() / t.mean().max() for t in (table, euler)]
        assert float((shapes[0] - shapes[1]).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "two words"}, "name"),
        ({"order": 0}, "order"),
        ({"evaluations": True}, "evaluations"),
        ({"history": -1}, "history"),
        ({"evaluations": 2, "tellable": True}, "tellable"),
    ],
)
def test_what_cannot_run_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"name": "mine", "order": 2, "evaluations": 1, "advance": two_step}
    with pytest.raises(ValueError, match=message):
        Solver(**{**given, **options})


def test_a_solver_without_a_step_is_refused() -> None:
    with pytest.raises(TypeError, match="advance"):
        Solver("mine", 1, 1)


def test_two_evaluations_cannot_be_told() -> None:
    problem = mixture_16d(PROCESSES[0], 2)
    grid = artlib.edm(problem.process).grid(3)
    with pytest.raises(ValueError, match="told: heun"):
        integrate(problem.flow(), problem.x_T, grid, "heun", told=grid[:-1])
