"""Goal-oriented weights: against the exact Jacobian of Gaussian flows."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import mixture_1d, mixture_16d
from torch import Tensor, nn

import artlib
from artlib.flow.flow import ProbabilityFlow
from artlib.flow.processes import VE, VP, Process, RectifiedFlow
from artlib.flow.targets import Gaussian

F64 = torch.float64
SPECTRUM = torch.tensor([4.0, 0.25, 0.01, 1.0], dtype=F64)


@cache
def gaussian(
    process: Process, isotropic: float = 0.0
) -> tuple[ProbabilityFlow, Tensor]:
    lam = torch.full((4,), isotropic**2, dtype=F64) if isotropic else SPECTRUM
    target = Gaussian(torch.zeros(4, dtype=F64), torch.diag(lam))
    flow = ProbabilityFlow(process, target.denoiser(process))
    return flow, target.sample_prior(process, 16, seed=0)


@pytest.mark.parametrize("c", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("weight", ["terminal", "dual"])
def test_gaussian_data_gives_the_arctan_schedule(c: float, weight: str) -> None:
    """KL-optimal for data of standard deviation c: density 1 / (t^2 + c^2)."""
    process = VE()
    schedule = artlib.art(*gaussian(process, c), weight=weight)
    start, end = math.atan(process.t_max / c), math.atan(process.t_min / c)
    for K in (2, 5, 10, 18):
        angles = np.linspace(start, end, K + 1)[:-1]
        expected = torch.from_numpy(c * np.tan(angles))
        nodes = schedule.grid(K)[:-1]
        torch.testing.assert_close(nodes, expected, rtol=1e-2, atol=0)
    if c == 1.0:  # and this is what the library calls KL-optimal
        usual = artlib.kl_optimal(process).grid(10)
        torch.testing.assert_close(schedule.grid(10), usual, rtol=1e-2, atol=1e-12)


def exact_sizes(process: Process, x_T: Tensor, times: Tensor) -> Tensor:
    """|J Q| / 2 on N(0, diag(SPECTRUM)), Q by differences of the exact path [N, n]."""

    def std(t: Tensor) -> Tensor:
        t = t[:, None]
        return torch.sqrt(process.alpha(t) ** 2 * SPECTRUM + process.sigma(t) ** 2)

    h = 1e-4 * times * (1 - 0.999 * times if process.t_max == 1 else 1)
    bend = (std(times + h) - 2 * std(times) + std(times - h)) / h[:, None] ** 2
    arrives = bend * std(times[-1:]) / std(times)
    z = x_T / std(times[:1])
    return (z[:, None, :] * arrives).norm(dim=2) / 2


@pytest.mark.parametrize("process", [VE(), RectifiedFlow()], ids=lambda p: p.name)
def test_norm_is_exact_with_as_many_probes_as_dimensions(process: Process) -> None:
    flow, x_T = gaussian(process)
    table = artlib.error_table(flow, x_T, weight="terminal", probes=4)
    times = table.times
    expected = exact_sizes(process, x_T, times)[:, 2:-2]
    found = table.values[:, 2:-2]
    torch.testing.assert_close(found, expected, rtol=0.04, atol=0)


def test_few_probes_estimate_the_norm_without_bias() -> None:
    flow, x_T = gaussian(VE())
    many = x_T.repeat(40, 1)
    exact = artlib.error_table(flow, x_T, weight="terminal", points=16).mean()
    tables = [
        artlib.error_table(flow, many, weight="terminal", points=16, probes=r, seed=1)
        for r in (1, 2)
    ]
    for table, scatter in zip(tables, (0.75, 0.5), strict=True):
        gap = (table.mean() / exact - 1).abs().max()
        assert float(gap) < 4 * scatter / math.sqrt(len(many))
    again = artlib.error_table(
        flow, many, weight="terminal", points=16, probes=1, seed=1
    )
    assert torch.equal(again.values, tables[0].values)


def test_dual_counts_what_lies_along_the_error_that_arrives() -> None:
    """Never more than the norm; equal where only one direction errs."""
    for problem in (mixture_16d(VE(), n=16), mixture_1d(VE(), n=16)):
        flow, x_T = problem.flow(), problem.x_T
        norm = artlib.error_table(flow, x_T, weight="terminal", probes=16)
        dual = artlib.error_table(flow, x_T, weight="dual")
        assert bool((dual.values <= norm.values * 1.03).all())
        if x_T.shape[1] == 1:
            torch.testing.assert_close(dual.values, norm.values, rtol=1e-6, atol=1e-14)
        else:
            assert float((dual.mean() / norm.mean()).min()) < 0.9


def test_dual_schedule_is_next_to_the_oracle_for_euler() -> None:
    process = VE()
    lam = torch.logspace(1, -4, 32, dtype=F64)
    flow = ProbabilityFlow(process, lambda x, t: lam / (lam + t**2) * x)
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(64, 32, generator=rng, dtype=F64)
    x_T = torch.sqrt(lam + process.t_max**2) * z
    dual = artlib.art(flow, x_T, weight="dual")
    plain = artlib.art(flow, x_T)
    for K in (5, 12):
        oracle = artlib.oracle_grid(process, lam, K)
        best, found, usual = (
            float(artlib.gaussian_w2(process, lam, g))
            for g in (oracle, dual.grid(K), plain.grid(K))
        )
        assert best <= found < 1.02 * best
        assert usual > 1.07 * best


class Small(nn.Module):
    """A network without a forward derivative, like those with attention kernels."""

    def __init__(self, *, detached: bool = False) -> None:
        super().__init__()
        self.detached = detached

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = NoForwardMode.apply(x)
        y = y.detach() if self.detached else y
        return 0.2 * x / (1 + t**2) + y / (1 + t**2)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return 2.8 * torch.tanh(x / 4)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return grad * 0.7 * (1 - torch.tanh(x / 4) ** 2)


def test_networks_without_forward_mode_are_served() -> None:
    rng = torch.Generator().manual_seed(0)
    x_T = 80 * torch.randn(8, 3, generator=rng, dtype=F64)
    table = artlib.error_table(
        ProbabilityFlow(VE(), Small()), x_T, weight="terminal", probes=3
    )
    # Against neighbouring paths: what a push along Q becomes.
    flow = ProbabilityFlow(VE(), Small(), acceleration="difference")
    for k in (10, 32, 48):
        t, nodes = table.times[k], table.times[k:]
        x = flow.trajectory(x_T, table.times[: k + 1]).states[-1]
        q = flow.acceleration(x, t)
        push = 1e-4 * t * q / q.norm(dim=1, keepdim=True)
        ends = [flow.trajectory(x + s * push, nodes).states[-1] for s in (1, -1)]
        arrives = (ends[0] - ends[1]).norm(dim=1) / (2e-4 * t) * q.norm(dim=1) / 2
        torch.testing.assert_close(table.values[:, k], arrives, rtol=0.05, atol=0)


def test_a_denoiser_that_cuts_the_gradient_is_refused() -> None:
    x_T = gaussian(VE())[1]
    exact = gaussian(VE())[0].denoiser

    @torch.no_grad()
    def silent(x: Tensor, t: Tensor) -> Tensor:
        return exact(x, t)

    for denoiser in (silent, Small(detached=True)):
        flow = ProbabilityFlow(VE(), denoiser, acceleration="difference")
        with pytest.raises(RuntimeError, match=r"weight: .*no_grad"):
            artlib.art(flow, x_T, weight="terminal")
        artlib.art(
            flow, x_T, solver="heun", weight="local"
        )  # the local error needs no gradient


def test_weights_go_with_every_solver_and_leave_no_graph() -> None:
    problem = mixture_16d(VP(), n=8)
    for solver in ("heun", "rk4", "dpmpp_2m"):
        schedule = artlib.art(
            problem.flow(), problem.x_T, solver=solver, weight="dual", points=24
        )
        assert schedule.name == f"ART ({solver}, dual)"
        assert schedule.provenance["weight"] == "dual"
        assert artlib.Schedule.from_json(schedule.to_json()) == schedule
    table = artlib.error_table(
        problem.flow(), problem.x_T, solver="heun", weight="terminal", points=24
    )
    assert not table.values.requires_grad
    with torch.inference_mode():
        inside = artlib.art(
            problem.flow(), problem.x_T.clone(), weight="terminal", points=24
        )
    assert inside == artlib.art(
        problem.flow(), problem.x_T, weight="terminal", points=24
    )


def test_dual_is_the_part_along_the_error_that_arrives_at_t_min() -> None:
    """Every part in closed form, on a range that ends well above 0."""
    process = VE(sigma_min=0.3, sigma_max=20.0)
    flow, x_T = gaussian(process)
    nodes = artlib.error_table(flow, x_T, points=48).art().grid(20)
    nodes[-1] = process.t_min

    def std(t: Tensor) -> Tensor:
        return torch.sqrt(SPECTRUM + t[:, None] ** 2)

    x = x_T
    for t, s in pairwise(nodes):
        x = x + (s - t) * t / (SPECTRUM + t**2) * x
    error = x - x_T * std(nodes[-1:]) / std(nodes[:1])
    table = artlib.error_table(flow, x_T, weight="dual", points=48)
    times, h = table.times, 1e-4 * table.times
    bend = (std(times + h) - 2 * std(times) + std(times - h)) / h[:, None] ** 2
    arrives = bend / 2 * std(times[-1:]) / std(times)
    z, direction = x_T / std(times[:1]), error / error.norm(dim=1, keepdim=True)
    expected = (z[:, None] * arrives * direction[:, None]).sum(2).abs()
    gap = (table.values - expected).abs() / expected.amax(1, keepdim=True)
    assert float(gap.max()) < 0.02
