"""Schedules carried to another process by their noise levels."""

import math

import pytest
import torch

import artlib
from artlib import VE, VP, RectifiedFlow

VE_RANGE = VE()


def same_range(kind, **more):
    """A process whose noise levels run over those of VE()."""
    whole = kind()
    ends = (float(whole.inverse_noise_level(x)) for x in (0.002, 80.0))
    return kind(**dict(zip(("t_min", "t_max"), ends, strict=True)), **more)


@pytest.mark.parametrize("process", [same_range(VP), same_range(RectifiedFlow)])
@pytest.mark.parametrize(
    "schedule",
    [
        artlib.edm(VE_RANGE),
        artlib.edm(VE_RANGE, pinned=False),
        artlib.kl_optimal(VE_RANGE),
    ],
)
def test_the_same_noise_levels_are_visited(process, schedule):
    carried = artlib.convert(schedule, process)
    for K in (2, 5, 17):
        found = process.noise_level(carried.grid(K)[:-1])
        torch.testing.assert_close(found, schedule.grid(K)[:-1], rtol=2e-4, atol=0)
    assert carried.last_step == schedule.last_step


def test_there_and_back_is_the_same_schedule():
    schedule = artlib.log_snr(VE_RANGE, pinned=False)
    back = artlib.convert(artlib.convert(schedule, same_range(VP)), VE_RANGE)
    torch.testing.assert_close(back.grid(9), schedule.grid(9), rtol=2e-4, atol=0)


def test_euler_in_rectified_flow_at_carried_levels_is_ddim():
    # Euler in rectified flow and in VE take the same steps at the same noise levels.
    process = same_range(RectifiedFlow)
    law = artlib.GaussianMixture([[-1.0], [1.0]], [0.3, 0.4], [0.3, 0.7])
    schedule = artlib.edm(VE_RANGE, pinned=False)
    x = law.sample_prior(VE_RANGE, 20, seed=0).double()
    ve = artlib.ProbabilityFlow(VE_RANGE, law.denoiser(VE_RANGE))
    rf = artlib.ProbabilityFlow(process, law.denoiser(process))
    grid = schedule.grid(6)
    levels = process.inverse_noise_level(grid)
    start = x * process.alpha(levels[0])
    torch.testing.assert_close(
        artlib.sample(rf, start, levels),
        artlib.sample(ve, x, grid),
        rtol=1e-9,
        atol=1e-9,
    )
    carried = artlib.convert(schedule, process).grid(6)
    torch.testing.assert_close(carried, levels, rtol=2e-4, atol=1e-9)


def test_a_wider_range_is_cut_and_a_narrower_one_extended():
    schedule = artlib.edm(VE(sigma_min=0.01, sigma_max=10.0), pinned=False)
    wide = artlib.convert(schedule, VE_RANGE)
    assert wide.grid(4)[0] == 80.0
    narrow_process = VE(sigma_min=0.1, sigma_max=5.0)
    narrow = artlib.convert(schedule, narrow_process)
    assert float(narrow.grid(4)[0]) == 5.0
    middle = narrow.time(torch.tensor(0.5 * narrow.horizon, dtype=torch.float64))
    expected = schedule.time(torch.tensor(0.5 * schedule.horizon, dtype=torch.float64))
    assert math.isclose(float(middle), float(expected), rel_tol=1e-3)


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="schedule: expected a Schedule"):
        artlib.convert([1.0, 0.0], VE_RANGE)
    with pytest.raises(TypeError, match="process: expected an artlib process"):
        artlib.convert(artlib.edm(VE_RANGE), "vp")
    with pytest.raises(ValueError, match="goes to t = 0 by itself"):
        artlib.convert(artlib.uniform(VE_RANGE), VP())
    far = VE(sigma_min=1e-9, sigma_max=0.003)
    with pytest.raises(ValueError, match="too little in common"):
        artlib.convert(artlib.log_snr(VE(sigma_min=0.0029, sigma_max=80.0)), far)
