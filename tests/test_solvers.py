"""Solvers: orders by slope, equality with hand loops and with other libraries."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from problems import (
    PROCESSES,
    Problem,
    all_problems,
    gaussian,
    mixture_1d,
    mixture_16d,
    riccati,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from artlib.flow.flow import ProbabilityFlow
from artlib.flow.processes import VE, VP, RectifiedFlow
from artlib.solvers.integrate import integrate
from artlib.solvers.sample import SOLVERS, nfe, sample

# The other multistep solvers are in test_multistep.py.
FIXED = [n for n, k in SOLVERS.items() if not (k.adaptive or k.history)] + ["dpmpp_2m"]
PROBLEMS = all_problems()
VE_MIXTURE = mixture_1d(PROCESSES[0])


# The problems themselves.


STAGES = {"heun": (0.0, 1.0), "rk4": (0.0, 1 / 3, 2 / 3, 1.0)}
"""Where in a step they evaluate, as fractions of it."""


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_exact_answers_solve_their_ode(problem: Problem) -> None:
    # A five-point derivative of the exact map along time is the velocity there.
    start, flow = problem.process.t_max, problem.flow()
    for fraction in (0.9, 0.3, 0.1):
        t = fraction * start
        h = 1e-3 * t
        at = [problem.exact(problem.x_T, start, t + j * h) for j in (-2, -1, 0, 1, 2)]
        slope = (at[0] - 8 * at[1] + 8 * at[3] - at[4]) / (12 * h)
        torch.testing.assert_close(slope, flow.velocity(at[2], t), rtol=1e-8, atol=1e-9)


# Orders.


def order(
    run: Callable[[int], Tensor], exact: Tensor, counts: tuple[int, ...]
) -> tuple[float, list[float]]:
    """Slope of log error against log K, without what is down at round-off."""
    errors = [float((run(k) - exact).norm() / exact.norm()) for k in counts]
    kept = [(k, e) for k, e in zip(counts, errors, strict=True) if e > 1e-11]
    assert len(kept) >= 4, f"solved exactly, hence no order to measure: {errors}"
    log_k, log_e = np.log(np.array(kept)).T
    return -float(np.polyfit(log_k, log_e, 1)[0]), errors


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize(
    "problem",
    # In 16 dimensions one process will do: the others are there in one and three.
    [p for p in PROBLEMS if "16d" not in p.name or p.process.name == "ve"],
    ids=repr,
)
def test_measured_order(problem: Problem, solver: str) -> None:
    flow, process = problem.flow(), problem.process
    start, end = process.t_max, (0.1 if process.name == "ve" else 0.05)
    x = problem.x_T
    if process.name == "rectified-flow" and solver == "dpmpp_2m":
        # From alpha = 0 its error gains a logarithm; see the next test.
        start, x = 0.9, problem.exact(x, start, 0.9)
    exact = problem.exact(x, start, end)

    def run(steps: int) -> Tensor:
        ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        nodes = (start ** (1 / 3) + ramp * (end ** (1 / 3) - start ** (1 / 3))) ** 3
        nodes[0] = start
        return sample(flow, x, nodes, solver=solver)

    slope, errors = order(run, exact, (48, 64, 96, 128, 192))
    assert abs(slope - SOLVERS[solver].order) < 0.2, (slope, errors)


@pytest.mark.parametrize("build", [gaussian, mixture_1d, mixture_16d])
def test_multistep_from_no_signal_gains_a_logarithm(build) -> None:  # type: ignore[no-untyped-def]
    # At t = 1 of rectified flow lambda is -infinity. The first steps are not short in
    # lambda however many there are, and the error is K^-2 (a + b log K), b > 0: each
    # doubling of K adds the same amount to K^2 error.
    problem = build(RectifiedFlow())
    flow, exact = problem.flow(), problem.exact(problem.x_T, 1.0, 0.05)
    scaled = []
    for steps in (64, 128, 256, 512):
        nodes = problem.grid(steps, 0.05)
        found = sample(flow, problem.x_T, nodes, solver="dpmpp_2m")
        scaled.append(steps**2 * float((found - exact).norm()))
    gains = np.diff(scaled)
    assert gains.min() > 0.05 * scaled[0], scaled
    assert gains.max() / gains.min() < 1.1, scaled


def test_no_solver_is_above_second_order_with_the_step_to_zero() -> None:
    # The Euler step to 0 of length t leaves O(t^2), whatever came before it.
    problem = riccati()
    flow, exact = problem.flow(), problem.exact(problem.x_T, 2.0, 0.0)

    def run(steps: int) -> Tensor:
        grid = torch.linspace(2, 0, steps + 1, dtype=torch.float64)
        return sample(flow, problem.x_T, grid, solver="rk4")

    slope, errors = order(run, exact, (32, 64, 128, 256))
    assert abs(slope - 2) < 0.2, (slope, errors)


# Equality with independent loops.


def euler_loop(flow: ProbabilityFlow, x: Tensor, nodes: Tensor) -> Tensor:
    for t, t_next in pairwise(nodes):
        x = x + (t_next - t) * flow.velocity(x, t)
    return x


def heun_loop(flow: ProbabilityFlow, x: Tensor, nodes: Tensor) -> Tensor:
    for t, t_next in pairwise(nodes):
        h, slope = t_next - t, flow.velocity(x, t)
        if t_next > 0:
            slope = (slope + flow.velocity(x + h * slope, t_next)) / 2
        x = x + h * slope
    return x


def rk4_loop(flow: ProbabilityFlow, x: Tensor, nodes: Tensor) -> Tensor:
    for t, t_next in pairwise(nodes):
        h, k1 = t_next - t, flow.velocity(x, t)
        if t_next == 0:
            x = x + h * k1
            continue
        k2 = flow.velocity(x + h * k1 / 3, t + h / 3)
        k3 = flow.velocity(x + h * (k2 - k1 / 3), t + 2 * h / 3)
        k4 = flow.velocity(x + h * (k1 - k2 + k3), t_next)
        x = x + h * (k1 + 3 * k2 + 3 * k3 + k4) / 8
    return x


def multistep_loop(flow: ProbabilityFlow, x: Tensor, nodes: Tensor) -> Tensor:
    """DPM-Solver++(2M) as k-diffusion writes it, with alpha put back in."""
    process, old = flow.process, None
    for k in range(len(nodes) - 1):
        t, t_next = nodes[k], nodes[k + 1]
        denoised = flow.denoise(x, t)
        lam, lam_next = process.log_snr(t) / 2, process.log_snr(t_next) / 2
        h = lam_next - lam
        mixed = denoised
        if old is not None and t_next > 0:
            r = (lam - process.log_snr(nodes[k - 1]) / 2) / h
            mixed = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        shrink = process.sigma(t_next) / process.sigma(t)
        x = shrink * x - process.alpha(t_next) * torch.expm1(-h) * mixed
        old = denoised
    return x


LOOPS = {
    "euler": euler_loop,
    "heun": heun_loop,
    "rk4": rk4_loop,
    "dpmpp_2m": multistep_loop,
}


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("last", ["zero", "t_min"])
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_equals_a_hand_loop(process, last: str, solver: str) -> None:  # type: ignore[no-untyped-def]
    problem = gaussian(process)
    start, x = process.t_max, problem.x_T
    if solver == "dpmpp_2m" and process.name == "rectified-flow":
        start = 0.9  # the loop above has no answer to lambda = -infinity
    nodes = torch.linspace(
        start, 0.0 if last == "zero" else process.t_min, 8, dtype=torch.float64
    )
    found = sample(problem.flow(), x, nodes, solver=solver)
    expected = LOOPS[solver](problem.flow(), x, nodes)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_equals_a_hand_loop_to_the_last_bit(dtype: torch.dtype) -> None:
    flow, x = VE_MIXTURE.flow(), VE_MIXTURE.x_T.to(dtype)
    nodes = VE_MIXTURE.grid(17, 0.0)
    assert torch.equal(sample(flow, x, nodes), euler_loop(flow, x, nodes))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_multistep_starts_where_there_is_no_signal(steps: int) -> None:
    # alpha = 0 at t = 1: h_prev is infinite, so the second step does not extrapolate;
    # the third does.
    problem = gaussian(RectifiedFlow())
    flow, x = problem.flow(), problem.x_T
    nodes = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    lam = RectifiedFlow().log_snr(nodes) / 2
    outputs: list[Tensor] = []
    for k in range(steps):
        outputs.append(flow.denoise(x, nodes[k]))
        mixed = outputs[k]
        if k == 2 and steps == 4:
            slope = (outputs[2] - outputs[1]) / (lam[2] - lam[1])
            mixed = outputs[2] + (lam[3] - lam[2]) / 2 * slope
        shrink = nodes[k + 1] / nodes[k]
        x = shrink * x + (1 - shrink) * mixed
    found = sample(flow, problem.x_T, nodes, solver="dpmpp_2m")
    torch.testing.assert_close(found, x, rtol=1e-13, atol=1e-13)


def test_multistep_equals_diffusers() -> None:
    # diffusers' own update formulas, fed with our grid as its noise levels.
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers")
    problem = gaussian(VP(t_max=0.99))
    flow, process, x = problem.flow(), problem.process, problem.x_T
    nodes = problem.grid(9, 0.0)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_type="midpoint", solver_order=2
    )
    scheduler.sigmas = process.noise_level(nodes)
    outputs: list[Tensor] = []
    for k in range(len(nodes) - 1):
        scheduler._step_index = k
        outputs = [*outputs[-1:], flow.denoise(x, nodes[k])]
        if k == 0 or k == len(nodes) - 2:  # lower_order_final
            x = scheduler.dpm_solver_first_order_update(outputs[-1], sample=x)
        else:
            x = scheduler.multistep_dpm_solver_second_order_update(outputs, sample=x)
    found = sample(flow, problem.x_T, nodes, solver="dpmpp_2m")
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


# The last step, and the times that the network is asked at.


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_the_step_to_zero(process, solver: str) -> None:  # type: ignore[no-untyped-def]
    problem = gaussian(process)
    flow, nodes = problem.flow(), problem.grid(6, 0.0)
    before = sample(flow, problem.x_T, nodes[:-1], solver=solver)
    found = sample(flow, problem.x_T, nodes, solver=solver)
    t = nodes[-2]
    if solver == "dpmpp_2m":
        assert torch.equal(found, flow.denoise(before, t))
        return
    assert torch.equal(found, before - t * flow.velocity(before, t))
    if process.name != "vp":  # there t is proportional to sigma
        torch.testing.assert_close(found, flow.denoise(before, t))


class Recorder:
    """A denoiser that keeps the times it is called at."""

    def __init__(self, problem: Problem) -> None:
        self.denoiser = problem.denoiser
        self.times: list[float] = []
        self.kinds: set[tuple[torch.dtype, int]] = set()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(float(t))
        self.kinds.add((t.dtype, t.ndim))
        return self.denoiser(x, t)


@pytest.mark.parametrize("solver", FIXED)
def test_float64_times_whatever_the_state(solver: str) -> None:
    # A float32 state, and a network that takes float64: no time may be rounded.
    recorder = Recorder(VE_MIXTURE)
    flow = ProbabilityFlow(VE_MIXTURE.process, recorder, dtype=torch.float64)
    nodes = VE_MIXTURE.grid(5, 0.0)
    sample(flow, VE_MIXTURE.x_T.float(), nodes, solver=solver)
    expected = []
    for t, t_next in pairwise(nodes[:-1]):
        stages = STAGES.get(solver, (0.0,))
        expected += [float(t + c * (t_next - t)) if c < 1 else t_next for c in stages]
    assert recorder.times == [*map(float, expected), float(nodes[-2])]
    assert recorder.kinds == {(torch.float64, 0)}


def test_float32_follows_float64() -> None:
    for solver in FIXED:
        nodes = VE_MIXTURE.grid(20, 0.0)
        single = sample(VE_MIXTURE.flow(), VE_MIXTURE.x_T.float(), nodes, solver=solver)
        double = sample(VE_MIXTURE.flow(), VE_MIXTURE.x_T, nodes, solver=solver)
        assert single.dtype == torch.float32
        assert double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(half: torch.dtype) -> None:
    x = VE_MIXTURE.x_T.to(half)
    for solver in FIXED:
        nodes = VE_MIXTURE.grid(4, 0.0)
        found = sample(VE_MIXTURE.flow(), x, nodes, solver=solver)
        assert found.dtype == torch.float32
        raised = sample(VE_MIXTURE.flow(), x.float(), nodes, solver=solver)
        assert torch.equal(found, raised)


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.Tensor.float])
def test_grids_of_every_kind(kind: Callable) -> None:  # type: ignore[type-arg]
    nodes = [20.0, 3.0, 0.5, 0.0]
    expected = sample(
        VE_MIXTURE.flow(), VE_MIXTURE.x_T, torch.tensor(nodes, dtype=torch.float64)
    )
    grid = torch.tensor(nodes) if kind is torch.Tensor.float else nodes
    assert torch.equal(sample(VE_MIXTURE.flow(), VE_MIXTURE.x_T, kind(grid)), expected)


def test_images_keep_their_shape_and_do_not_mix() -> None:
    # A state of any shape is the same ODE, coordinate by coordinate.
    problem = riccati(n=12)
    nodes = problem.grid(5, 0.0)
    for solver in FIXED:
        flat = sample(problem.flow(), problem.x_T, nodes, solver=solver)
        image = sample(
            problem.flow(), problem.x_T.reshape(2, 1, 3, 2), nodes, solver=solver
        )
        assert torch.equal(image.reshape(12, 1), flat)


# NFE.


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("end", [0.0, 0.5])
def test_nfe_is_what_the_counter_says(solver: str, steps: int, end: float) -> None:
    flow, counter = VE_MIXTURE.counted()
    nodes = VE_MIXTURE.grid(steps, end)
    sample(flow, VE_MIXTURE.x_T, nodes, solver=solver)
    assert counter.nfe == nfe(nodes, solver=solver)
    s = {"euler": 1, "heun": 2, "rk4": 4, "dpmpp_2m": 1}[solver]
    assert counter.nfe == (steps * s - (s - 1) if end == 0 else steps * s)


# dopri5.


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_dopri5_is_the_exact_flow_and_one_euler_step(process) -> None:  # type: ignore[no-untyped-def]
    problem = gaussian(process)
    flow, t = problem.flow(), torch.tensor(process.t_min, dtype=torch.float64)
    there = problem.exact(problem.x_T, process.t_max, process.t_min)
    expected = there - t * flow.velocity(there, t)
    errors = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        found = sample(
            flow, problem.x_T, solver="dopri5", rtol=tolerance, atol=tolerance
        )
        errors.append(float((found - expected).abs().max()))
        assert errors[-1] < 50 * tolerance, (tolerance, errors)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


def test_dopri5_stays_between_its_ends_and_reports_its_nodes() -> None:
    recorder = Recorder(VE_MIXTURE)
    flow = ProbabilityFlow(VE_MIXTURE.process, recorder)
    seen: list[tuple[int, float, Tensor]] = []
    found = sample(
        flow,
        VE_MIXTURE.x_T.float(),
        solver="dopri5",
        callback=lambda k, t, x: seen.append((k, t, x)),
    )
    assert found.dtype == torch.float64
    assert min(recorder.times) >= 0.002
    assert max(recorder.times) <= 20.0
    times = [t for _, t, _ in seen]
    assert [k for k, _, _ in seen] == list(range(len(seen)))
    assert times[0] == 20.0
    assert times[-2:] == [0.002, 0.0]
    assert times == sorted(times, reverse=True)
    assert torch.equal(seen[0][2], VE_MIXTURE.x_T.float().double())
    assert torch.equal(seen[-1][2], found)
    for _, t, x in seen[1:-1]:  # the states belong to their times
        exact = VE_MIXTURE.exact(VE_MIXTURE.x_T.float().double(), 20.0, t)
        torch.testing.assert_close(x, exact, rtol=1e-4, atol=1e-4)


def test_dopri5_says_that_it_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("artlib.solvers.integrate.MAX_TRIALS", 5)
    with pytest.raises(RuntimeError, match=r"cannot reach rtol = 1e-09.*rk4"):
        sample(VE_MIXTURE.flow(), VE_MIXTURE.x_T, solver="dopri5", rtol=1e-9, atol=1e-9)


def test_dopri5_leaves_the_networks_own_assertions_alone() -> None:
    def picky(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("no such class label")

    flow = ProbabilityFlow(VE(), picky)
    with pytest.raises(AssertionError, match="no such class label"):
        sample(flow, torch.ones(2, 2), solver="dopri5")


# Callback, graph, memory.


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("end", [0.0, 0.5])
def test_callback_at_every_node(solver: str, end: float) -> None:
    nodes = VE_MIXTURE.grid(6, end)
    seen: list[tuple[int, float, Tensor]] = []
    found = sample(
        VE_MIXTURE.flow(),
        VE_MIXTURE.x_T,
        nodes,
        solver=solver,
        callback=lambda k, t, x: seen.append((k, t, x)),
    )
    assert [k for k, _, _ in seen] == list(range(7))
    assert [t for _, t, _ in seen] == nodes.tolist()
    assert torch.equal(seen[0][2], VE_MIXTURE.x_T)
    assert torch.equal(seen[-1][2], found)
    for k in range(1, 7):  # the state after k steps is a run of k steps
        part = sample(VE_MIXTURE.flow(), VE_MIXTURE.x_T, nodes[: k + 1], solver=solver)
        # A multistep run knows nothing of where it stops, except at 0.
        torch.testing.assert_close(seen[k][2], part, rtol=1e-13, atol=1e-13)


class TinyNetwork(nn.Module):
    """A trainable denoiser: D = w x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.weight * x


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
def test_no_graph_is_kept(solver: str) -> None:
    graphs = []
    x = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    found = sample(
        ProbabilityFlow(VE(0.01, 2.0), TinyNetwork()),
        x,
        None if solver == "dopri5" else [2.0, 1.0, 0.0],
        solver=solver,
        callback=lambda k, t, state: graphs.append(state.requires_grad),
    )
    assert not found.requires_grad
    assert len(graphs) >= 3
    assert not any(graphs)
    assert torch.is_grad_enabled()


def live_bytes() -> int:
    """Memory of all tensors that Python can reach; of fake ones there is none."""
    gc.collect()
    storages = {
        o.untyped_storage().data_ptr(): o.untyped_storage().nbytes()
        for o in gc.get_objects()
        if issubclass(type(o), Tensor) and not isinstance(o, FakeTensor)
    }
    return sum(storages.values())


@pytest.mark.parametrize("solver", FIXED)
def test_memory_is_flat_in_the_number_of_steps(solver: str) -> None:
    flow = ProbabilityFlow(VE(0.01, 2.0), TinyNetwork())
    x = torch.ones(512, 64, dtype=torch.float64)
    state = x.untyped_storage().nbytes()

    def used(steps: int) -> int:
        states: list[weakref.ref[Tensor]] = []
        peak = 0

        def watch(k: int, t: float, now: Tensor) -> None:
            nonlocal peak
            states.append(weakref.ref(now))
            if k in (steps - 2, steps):
                peak = max(peak, live_bytes())
                assert sum(r() is not None for r in states) <= 4

        sample(
            flow,
            x,
            torch.linspace(2, 0, steps + 1, dtype=torch.float64),
            solver=solver,
            callback=watch,
        )
        return peak

    # What grows is the list of times: a few numbers a step.
    few, many = used(10), used(200)
    assert many - few < state, (many, few, state)


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("end", [0.0, 0.3])
def test_the_steps_are_differentiable(solver: str, end: float) -> None:
    # What refines a grid needs the gradient through the solver, in grid and state.
    problem = riccati(n=2)
    nodes = problem.grid(4, end).requires_grad_()
    inner = nodes.detach()[1:-1].clone().requires_grad_()
    x = problem.x_T.clone().requires_grad_()

    def run(middle: Tensor, state: Tensor) -> Tensor:
        grid = torch.cat([nodes.detach()[:1], middle, nodes.detach()[-1:]])
        return integrate(problem.flow(), state, grid, solver)

    assert torch.autograd.gradcheck(run, (inner, x), eps=1e-6, atol=1e-7)


def test_gradient_of_the_grid_from_no_signal_is_finite() -> None:
    problem = gaussian(RectifiedFlow())
    nodes = problem.grid(4, 0.0).requires_grad_()
    integrate(problem.flow(), problem.x_T, nodes, "dpmpp_2m").sum().backward()
    assert nodes.grad is not None
    assert bool(torch.isfinite(nodes.grad).all())


# What goes wrong on the way.


def failing_at(bad: float, value: float) -> ProbabilityFlow:
    """A network that returns one bad number at times below ``bad``."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        out = 0.5 * x
        if float(t) < bad:
            out = out.clone()
            out[1, 0] = value
        return out

    return ProbabilityFlow(VE(), denoiser)


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_network_that_fails_half_way_is_named(solver: str, value: float) -> None:
    # Evaluated at node 3, t = 20, at the latest: bad after step 4 of 6 (Heun and RK4
    # look ahead, from step 3 on).
    grid = [80.0, 60.0, 40.0, 20.0, 10.0, 5.0, 0.0]
    step, t = (4, 20) if solver in ("euler", "dpmpp_2m") else (3, 40)
    message = rf"NaN or infinite at step {step} of 6, from t = {t};.*denoiser is finite"
    with pytest.raises(ValueError, match=message):
        sample(failing_at(25.0, value), torch.ones(3, 2), grid, solver=solver)


def test_a_last_step_that_fails_is_named() -> None:
    with pytest.raises(ValueError, match="at step 2 of 2, from t = 5;"):
        sample(failing_at(6.0, math.nan), torch.ones(3, 2), [80.0, 5.0, 0.0])


def test_dopri5_stops_at_the_first_nan() -> None:
    with pytest.raises(ValueError, match=r"of dopri5, at t = (24|2[0-4]\.|1|\d\.)"):
        sample(failing_at(25.0, math.nan), torch.ones(3, 2), solver="dopri5")


def test_a_denoiser_of_another_shape_is_refused() -> None:
    flow = ProbabilityFlow(VE(), lambda x, t: x.sum(1))
    for solver in (*FIXED, "dopri5"):
        grid = None if solver == "dopri5" else [80.0, 1.0, 0.0]
        with pytest.raises(ValueError, match="denoiser: expected the shape"):
            sample(flow, torch.ones(3, 1), grid, solver=solver)


class LooksLikeASchedule:
    def grid(self, steps: int) -> list[float]:
        return [80.0, 0.0]


FLOW, X = ProbabilityFlow(VE(), lambda x, t: 0.5 * x), torch.ones(3, 2)
BAD = [
    (lambda: sample(FLOW, X, [80.0, 90.0, 0.0]), ValueError, "strictly descending"),
    (lambda: sample(FLOW, X, [80.0, 1.0, 1.0]), ValueError, "strictly descending"),
    (lambda: sample(FLOW, X, [0.0, 1.0, 80.0]), ValueError, "from t_max down to 0"),
    (lambda: sample(FLOW, X, [80.0, math.nan, 0.0]), ValueError, "node 1 is nan"),
    (lambda: sample(FLOW, X, [80.0, -1.0]), ValueError, "last node is -1"),
    (lambda: sample(FLOW, X, [80.0]), ValueError, "K \\+ 1 >= 2 timesteps"),
    (lambda: sample(FLOW, X, [[80.0, 0.0]]), ValueError, "one dimension"),
    (lambda: sample(FLOW, X, [81.0, 0.0]), ValueError, "first node is 81.*80"),
    (lambda: sample(FLOW, X, "80, 0"), TypeError, "sequence of numbers"),
    (lambda: sample(FLOW, X, LooksLikeASchedule()), TypeError, r"call \.grid\(K\)"),
    (lambda: nfe(LooksLikeASchedule()), TypeError, r"call \.grid\(K\)"),
    (lambda: sample(FLOW, X), ValueError, r"schedule\.grid\(K\)"),
    (lambda: sample(FLOW, X[:, 0], [80.0, 0.0]), ValueError, r"use shape \[n, 1\]"),
    (lambda: sample(FLOW, X[:0], [80.0, 0.0]), ValueError, "holds no sample"),
    (lambda: sample(FLOW, X.long(), [80.0, 0.0]), TypeError, r"x_T\.float\(\)"),
    (lambda: sample(FLOW, X.numpy(), [80.0, 0.0]), TypeError, "x_T: expected a torch"),
    (lambda: sample(FLOW, X * math.nan, [80.0, 0.0]), ValueError, "x_T: 6 of 6"),
    (
        lambda: sample(FLOW, X, [80.0, 0.0], solver="huen"),
        ValueError,
        "unknown 'huen'; the solvers are euler, heun, rk4, dpmpp_2m",
    ),
    (lambda: nfe([80.0, 0.0], solver="midpoint"), ValueError, "unknown 'midpoint'"),
    (lambda: nfe([80.0, 0.0], solver="dopri5"), ValueError, "CountNFE"),
    (
        lambda: sample(FLOW, X, [80.0, 0.0], solver="dopri5"),
        ValueError,
        "pass no grid",
    ),
    (lambda: sample(FLOW, X, solver="dopri5", rtol=0.0), ValueError, "rtol"),
    (lambda: sample(FLOW, X, solver="dopri5", atol=math.nan), ValueError, "atol"),
    (
        lambda: sample(lambda x, t: x, X, [80.0, 0.0]),
        TypeError,
        r"ProbabilityFlow\(process, denoiser\)",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_arguments_are_refused(call, kind, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(kind, match=message):
        call()


def test_a_first_node_off_by_rounding_is_accepted() -> None:
    found = sample(FLOW, X, [80.0 * (1 + 1e-9), 0.0])
    torch.testing.assert_close(found, 0.5 * X)


def test_the_registry_is_read_only() -> None:
    with pytest.raises(TypeError):
        SOLVERS["mine"] = SOLVERS["euler"]  # type: ignore[index]


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_device_equals_the_cpu(
    solver: str, dtype: torch.dtype, accelerator: torch.device
) -> None:
    x = VE_MIXTURE.x_T.to(dtype)
    ways: list[dict[str, Any]] = [{"rtol": 1e-3, "atol": 1e-3}]
    if solver != "dopri5":  # the grid may live on either device
        nodes = VE_MIXTURE.grid(20, 0.0)
        ways = [{"grid": nodes}, {"grid": nodes.to(accelerator)}]
    on_cpu = sample(VE_MIXTURE.flow(), x, **ways[0], solver=solver)
    for way in ways:
        there = sample(VE_MIXTURE.flow(), x.to(accelerator), **way, solver=solver)
        assert there.device.type == accelerator.type
        assert there.dtype == on_cpu.dtype
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(there.cpu(), on_cpu, rtol=tolerance, atol=tolerance)
