"""The second control: its order on a Gaussian, its calibration, and the oracle."""

import math
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ellipk
from torch import Tensor

import artlib
from artlib.control.told import told_levels
from artlib.exact import zolotarev_nodes
from artlib.solvers.integrate import integrate

F64 = torch.float64
PROCESS = artlib.VE()


def mixture(process: artlib.Process = PROCESS) -> tuple[artlib.ProbabilityFlow, Any]:
    rng = torch.Generator().manual_seed(3)
    means = 1.2 * torch.randn(6, 8, generator=rng).double()
    stds = 0.1 + 0.4 * torch.rand(6, generator=rng).double()
    target = artlib.GaussianMixture(means, stds, torch.full((6,), 1 / 6, dtype=F64))
    return artlib.ProbabilityFlow(process, target.denoiser(process)), target


def errors(flow: artlib.ProbabilityFlow, x: Tensor, run: Any) -> np.ndarray:
    ends = artlib.references(flow, [x])[0]
    return (run - ends).flatten(1).square().mean(1).sqrt().numpy()


@pytest.mark.parametrize(("c", "order"), [(0.0, 1), (0.25, 2), (0.1, 1)])
def test_a_quarter_is_second_order_on_any_spectrum(c: float, order: int) -> None:
    variances = torch.tensor([0.05, 0.7, 4.0], dtype=F64)
    target = artlib.Gaussian(torch.zeros(3, dtype=F64), torch.diag(variances))
    flow = artlib.ProbabilityFlow(PROCESS, target.denoiser(PROCESS))
    left, counts = [], (64, 128, 256)
    for K in counts:
        ends = torch.tensor([80.0, 0.1], dtype=F64) ** (1 / 7)
        ramp = torch.linspace(0, 1, K + 1, dtype=F64)
        nodes = torch.lerp(ends[0], ends[1], ramp) ** 7
        told = nodes[:-1] * torch.sqrt(1 - 2 * c * (1 - nodes[1:] / nodes[:-1]))
        x = integrate(flow, torch.ones(1, 3, dtype=F64), nodes, "euler", told=told)
        exact = torch.sqrt((variances + nodes[-1] ** 2) / (variances + nodes[0] ** 2))
        left.append(float((x / exact - 1).norm()))
    slope = -np.polyfit(np.log(counts), np.log(left), 1)[0]
    assert abs(slope - order) < 0.1


def test_one_variance_is_exact_at_its_level() -> None:
    # s^2 = l (1 - R) / (R - rho), R = sqrt((l + t'^2)/(l + t^2)); its limits are the
    # arithmetic, geometric and harmonic means.
    t, s = 3.0, 1.2
    for variance, mean in (
        (1e6, t * (t + s) / 2),
        (t * s, t * math.sqrt(t * s)),
        (1e-9, t * 2 * t * s / (t + s)),
    ):
        ratio = math.sqrt((variance + s**2) / (variance + t**2))
        square = variance * (1 - ratio) / (ratio - s / t)
        assert square == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "unipc"])
def test_never_worse_than_honest_on_the_noise_that_is_held_out(solver: str) -> None:
    flow, target = mixture()
    x = target.sample_prior(PROCESS, 64, seed=0)
    schedule = artlib.art(flow, x[:16])
    plan = artlib.tell(schedule, flow, x, 5, solver=solver)
    judged = x[32:]
    honest = artlib.sample(flow, judged, schedule.grid(5), solver=solver)
    before = errors(flow, judged, honest)
    after = errors(flow, judged, artlib.sample(flow, judged, plan))
    assert np.sqrt((after**2).mean()) <= np.sqrt((before**2).mean()) * (1 + 1e-9)
    assert np.median(after) <= np.median(before) * (1 + 1e-9)
    notes = plan.provenance
    assert notes["noises"] == [32, 32]
    assert notes["told"]["rms"] == pytest.approx(np.sqrt((after**2).mean()), rel=1e-3)
    assert plan.is_honest == (notes["inner"] == notes["last"] == 0)


def test_telling_helps_euler_on_a_mixture() -> None:
    flow, target = mixture()
    x = target.sample_prior(PROCESS, 128, seed=0)
    schedule = artlib.art(flow, x[:16])
    plan = artlib.tell(schedule, flow, x, 5)
    assert not plan.is_honest
    fresh = target.sample_prior(PROCESS, 128, seed=9)
    before = errors(flow, fresh, artlib.sample(flow, fresh, schedule.grid(5)))
    after = errors(flow, fresh, artlib.sample(flow, fresh, plan))
    assert np.median(after) < 0.7 * np.median(before)
    assert after.mean() < 0.85 * before.mean()


@pytest.mark.parametrize(
    "process", [artlib.VP(), artlib.RectifiedFlow()], ids=lambda p: p.name
)
def test_levels_stay_in_range_and_in_the_coordinate_of_noise(process: Any) -> None:
    nodes = (
        artlib.log_snr(process, pinned=False).grid(6)
        if process.name == "vp"
        else artlib.uniform(process).grid(6)
    )
    told = told_levels(process, nodes, "dpmpp_2m", 0.1, 0.2)
    assert bool(((told > 0) & (told <= nodes[0])).all())
    level = process.noise_level
    last = float((level(told[-1]) / level(nodes[-2])) ** 2)
    assert last == pytest.approx(1 - 0.4)
    assert torch.equal(told[:1], nodes[:1])  # the first step is honest


def test_refusals_name_the_argument() -> None:
    flow, target = mixture()
    x = target.sample_prior(PROCESS, 8, seed=0)
    schedule = artlib.edm(PROCESS)
    with pytest.raises(ValueError, match="solver: heun"):
        artlib.tell(schedule, flow, x, 5, solver="heun")
    with pytest.raises(ValueError, match="held_out_share"):
        artlib.tell(schedule, flow, x[:1], 5)
    with pytest.raises(ValueError, match="reference"):
        artlib.tell(schedule, flow, x, 5, reference=x[:2])
    with pytest.raises(ValueError, match="belongs to"):
        artlib.tell(artlib.edm(artlib.VE(sigma_max=20.0)), flow, x, 5)


def test_a_coarse_reference_is_noticed() -> None:
    flow, target = mixture()
    x = target.sample_prior(PROCESS, 16, seed=0)
    schedule = artlib.art(flow, x)
    coarse = artlib.sample(flow, x, schedule.grid(9), solver="heun")
    with pytest.warns(UserWarning, match="reference"):
        artlib.tell(schedule, flow, x, 30, solver="unipc3", reference=coarse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        artlib.tell(schedule, flow, x, 5, reference=artlib.references(flow, [x])[0])


# The exact limit.

SPECTRUM = torch.logspace(-3, 1, 30, dtype=F64)


def test_the_sampler_is_the_rational_function() -> None:
    nodes = artlib.edm(PROCESS, pinned=False).grid(4)
    told = 0.8 * nodes[:-1]
    plan = artlib.Plan(PROCESS, nodes, told, "euler")
    r = torch.ones_like(SPECTRUM)
    for t, s, level in zip(nodes[:-1], nodes[1:], told, strict=True):
        r = r * (SPECTRUM + s / t * level**2) / (SPECTRUM + level**2)
    exact = r.abs() * torch.sqrt(SPECTRUM + 80.0**2)
    assert torch.allclose(
        artlib.gaussian_output_std(PROCESS, SPECTRUM, plan), exact, rtol=1e-10
    )


def test_told_oracles_fall_exponentially_and_honest_ones_do_not() -> None:
    honest, told = [], []
    for K in (2, 3, 4):
        grid = artlib.oracle_grid(PROCESS, SPECTRUM, K)
        honest.append(float(artlib.gaussian_w2(PROCESS, SPECTRUM, grid)))
        plan = artlib.oracle_plan(PROCESS, SPECTRUM, K)
        told.append(float(artlib.gaussian_w2(PROCESS, SPECTRUM, plan)))
    assert told[0] < honest[0] / 5
    assert all(b < a / 3.5 for a, b in pairwise(told))
    assert all(b > a / 1.7 for a, b in pairwise(honest))


def test_zolotarev_is_the_optimum_up_to_its_constant() -> None:
    # r(l) times a constant: its relative error equioscillates at 4 q^K.
    low, high, T = 1e-3, 10.0, 80.0
    law = torch.logspace(-3, 1, 4001, dtype=F64)
    w_low, w_high = low / (low + T**2), high / (high + T**2)
    m = w_low / w_high
    q = math.exp(-2 * math.pi * ellipk(m) / ellipk(1 - m))
    for K in (2, 3, 5):
        nodes, told = zolotarev_nodes(T, low, high, K)
        r = torch.ones_like(law)
        for t, s, level in zip(nodes[:-1], nodes[1:], told, strict=True):
            r = r * (law + s / t * level**2) / (law + level**2)
        ratio = r / torch.sqrt(law / (law + T**2))
        spread = float((ratio.max() - ratio.min()) / (ratio.max() + ratio.min()))
        assert spread == pytest.approx(4 * q**K, rel=0.01)
        signs = torch.sign(ratio / ((ratio.max() + ratio.min()) / 2) - 1)
        changes = int((signs[1:] != signs[:-1]).sum())
        assert changes == 2 * K


@pytest.mark.parametrize("solver", ["heun", "rk4"])
def test_oracles_of_solvers_that_cannot_be_told_are_refused(solver: str) -> None:
    with pytest.raises(ValueError, match="cannot be told"):
        artlib.oracle_plan(PROCESS, SPECTRUM, 3, solver=solver)
