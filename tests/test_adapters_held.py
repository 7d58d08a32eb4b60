"""Schedulers of diffusers that hold a schedule: their steps, and their copies.

The network of these tests knows nothing but what it is told: it reads the noise level
off the timestep and answers with the exact denoiser of a Gaussian, of which the exact
trajectory is known.
"""

import copy
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import artlib
from artlib.adapters import diffusers as adapter
from artlib.adapters.diffusers.rules import RULES
from artlib.adapters.diffusers.times import is_edm, is_flow

diffusers = pytest.importorskip("diffusers", reason="no diffusers")

# diffusers' own, under the current numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MEAN, STD = 0.4, 1.5  # of the data
FLOW: dict[str, Any] = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
}


def target() -> artlib.Gaussian:
    return artlib.Gaussian([MEAN], [[STD**2]])


def flow_of(process: artlib.Process) -> artlib.ProbabilityFlow:
    return artlib.ProbabilityFlow(process, target().denoiser(process))


def alone(x: Tensor, s: float, flow: bool) -> Tensor:
    """The denoised sample, in closed form."""
    a = 1 - s if flow else 1.0
    return MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)


def answer(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
    """What an exact network says, in float64, of its scaled input at a timestep."""
    x = x.double()
    config = scheduler.config
    if is_flow(scheduler):
        s = float(t) / config.num_train_timesteps
        return ((x - alone(x, s, True)) / s).float()
    if is_edm(scheduler):
        s, d = math.exp(4 * float(t)), config.sigma_data
        y = x * math.sqrt(s**2 + d**2)
        skip, out = d**2 / (s**2 + d**2), s * d / math.sqrt(s**2 + d**2)
        return ((alone(y, s, False) - skip * y) / out).float()
    product = scheduler.alphas_cumprod.double().numpy()
    logs = np.log(np.sqrt((1 - product) / product))
    s = math.exp(np.interp(float(t), np.arange(len(logs)), logs))
    y = x * math.sqrt(1 + s**2)
    x0 = alone(y, s, False)
    eps = (y - x0) / s
    v = (eps - s * x0) / math.sqrt(1 + s**2)
    return {"epsilon": eps, "sample": x0, "v_prediction": v}[
        config.prediction_type
    ].float()


def run(scheduler: Any, y: Tensor, seed: int = 0) -> Tensor:
    """The scheduler's own loop, from a state y at its first noise level."""
    flow, first = is_flow(scheduler), float(scheduler.sigmas[0])
    vp = RULES[type(scheduler).__name__].scaled and not flow
    x = (y / math.sqrt(1 + first**2) if vp else y).float()
    options: dict[str, Any] = {}
    if "generator" in scheduler.step.__code__.co_varnames:
        options["generator"] = torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps:
        given = (
            scheduler.scale_model_input(x, t)
            if hasattr(scheduler, "scale_model_input")
            else x
        )
        output = answer(scheduler, given, t)
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x.double()


def prior(process: artlib.Process, n: int) -> Tensor:
    return target().sample_prior(process, n, seed=0)


DPM = [
    ("DPMSolverMultistepScheduler", BETAS),
    ("DPMSolverMultistepScheduler", {**BETAS, "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {**BETAS, "prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {**BETAS, "timestep_spacing": "leading"}),
    ("DPMSolverMultistepScheduler", {**BETAS, "timestep_spacing": "trailing"}),
    ("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential"}),
]


@pytest.mark.parametrize("K", [1, 2, 6, 24])
@pytest.mark.parametrize(("name", "options"), DPM)
def test_dpm_multistep_is_our_2m(name: str, options: dict[str, Any], K: int) -> None:
    scheduler = getattr(diffusers, name)(**options)
    process = adapter.scheduler_process(scheduler)
    schedule = artlib.kl_optimal(process)
    schedule.to_diffusers(scheduler, K)
    z = prior(process, 32)
    ours = artlib.sample(flow_of(process), z, schedule.grid(K), solver="dpmpp_2m")
    # The preconditioning of EDM cancels in float32 at its high noise.
    rtol = 3e-4 if is_edm(scheduler) else 1e-5
    assert float((run(scheduler, z) - ours).norm() / ours.norm()) < rtol


@pytest.mark.parametrize("K", [2, 3, 6, 24])
@pytest.mark.parametrize(
    ("name", "order", "solver"),
    [
        ("UniPCMultistepScheduler", 2, "unipc"),
        ("UniPCMultistepScheduler", 3, "unipc3"),
        ("DPMSolverMultistepScheduler", 3, "dpmpp_3m"),
    ],
)
def test_multistep_solvers_are_ours(name: str, order: int, solver: str, K: int) -> None:
    scheduler = getattr(diffusers, name)(**BETAS, solver_order=order)
    process = adapter.scheduler_process(scheduler)
    schedule = artlib.kl_optimal(process)
    schedule.to_diffusers(scheduler, K)
    z = prior(process, 32)
    ours = artlib.sample(flow_of(process), z, schedule.grid(K), solver=solver)
    # diffusers computes in float32.
    assert float((run(scheduler, z) - ours).norm() / ours.norm()) < 1e-6


@pytest.mark.parametrize(
    ("name", "options", "solver"),
    [
        ("HeunDiscreteScheduler", {**BETAS, "use_karras_sigmas": True}, "heun"),
        ("EDMEulerScheduler", {"sigma_schedule": "exponential"}, "euler"),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "heun"),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}, "euler"),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler"),
        ("DPMSolverMultistepScheduler", FLOW, "dpmpp_2m"),
    ],
)
def test_what_a_scheduler_does_to_its_own_steps_is_without_effect(
    name: str, options: dict[str, Any], solver: str
) -> None:
    scheduler = getattr(diffusers, name)(**options)
    process = adapter.scheduler_process(scheduler)
    schedule = artlib.uniform(process) if is_flow(scheduler) else artlib.edm(process)
    z = prior(process, 32)
    for K in (1, 2, 9):
        schedule.to_diffusers(scheduler, K)
        ours = artlib.sample(flow_of(process), z, schedule.grid(K), solver=solver)
        assert float((run(scheduler, z) - ours).norm() / ours.norm()) < 3e-4


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, 2),
        ("DPMSolverSinglestepScheduler", {}, 2),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}, 2),
        ("KDPM2DiscreteScheduler", {}, 2),
        ("LMSDiscreteScheduler", {}, 2),
        ("UniPCMultistepScheduler", {}, 2),
        ("UniPCMultistepScheduler", {"prediction_type": "v_prediction"}, 2),
        ("UniPCMultistepScheduler", {"solver_order": 3, "predict_x0": True}, 2),
    ],
)
def test_other_solvers_converge_by_their_order(
    name: str, options: dict[str, Any], order: int
) -> None:
    scheduler = getattr(diffusers, name)(**BETAS, **options)
    process = adapter.scheduler_process(scheduler)
    schedule = artlib.log_snr(process, pinned=False)
    z = prior(process, 8)
    errors, counts = [], (8, 16, 32)
    for K in counts:
        schedule.to_diffusers(scheduler, K)
        last = float(schedule.grid(K)[-2])
        # Exact down to the last node, from where one step takes the denoised sample.
        shrink = math.sqrt((STD**2 + last**2) / (STD**2 + process.t_max**2))
        exact = alone(MEAN + (z - MEAN) * shrink, last, False)
        errors.append(float((run(scheduler, z) - exact).norm() / exact.norm()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope > order - 0.35
    euler = artlib.sample(flow_of(process), z, schedule.grid(32))
    assert errors[-1] < float((euler - exact).norm() / exact.norm()) / 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerAncestralDiscreteScheduler", BETAS),
        ("KDPM2AncestralDiscreteScheduler", BETAS),
        ("DPMSolverMultistepScheduler", {**BETAS, "algorithm_type": "sde-dpmsolver++"}),
        (
            "DPMSolverSinglestepScheduler",
            {**BETAS, "algorithm_type": "sde-dpmsolver++"},
        ),
        ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("LTXEulerAncestralRFScheduler", {}),
    ],
)
def test_noisy_solvers_keep_the_variance(name: str, options: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**options)
    process = adapter.scheduler_process(scheduler)
    schedule = artlib.uniform(process) if is_flow(scheduler) else artlib.edm(process)
    x = prior(process, 4000)
    deviations = []
    for K in (40, 160):
        schedule.to_diffusers(scheduler, K)
        found = run(scheduler, x)
        deviations.append(abs(float(found.std()) / STD - 1))
        assert abs(float(found.mean()) - MEAN) < 0.1
    # 4000 draws know a standard deviation to 1 %; the rest goes as the step.
    assert deviations[1] < 0.3 * deviations[0] + 0.02
    assert deviations[1] < 0.05


def make(name: str) -> Any:
    return getattr(diffusers, name)()


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_scheduler_of_the_list_holds(name: str, tmp_path: Path) -> None:
    scheduler = make(name)
    plain = type(scheduler)
    process = adapter.scheduler_process(scheduler)
    schedule = artlib.uniform(process) if is_flow(scheduler) else artlib.edm(process)
    for K in (1, 2, 3, 17):
        schedule.to_diffusers(scheduler, K)
        assert scheduler.num_inference_steps == K
        inner = torch.unique_consecutive(scheduler.sigmas).double()
        torch.testing.assert_close(inner, schedule.grid(K), rtol=1e-5, atol=1e-9)
    assert isinstance(scheduler, plain)
    assert (type(scheduler).__name__, type(scheduler).__module__) == (
        plain.__name__,
        plain.__module__,
    )
    # Copies are their own, and whole.
    for duplicate in (
        copy.copy(scheduler),
        copy.deepcopy(scheduler),
        pickle.loads(pickle.dumps(scheduler)),
    ):
        duplicate.set_timesteps(5)
        first = torch.unique_consecutive(duplicate.sigmas).double()
        torch.testing.assert_close(first, schedule.grid(5), rtol=1e-5, atol=1e-9)
        adapter.release(duplicate)
        assert type(duplicate) is plain
        assert scheduler.num_inference_steps == 17
        scheduler.set_timesteps(17)
        assert len(torch.unique_consecutive(scheduler.sigmas)) == 18
    # What is made of its configuration holds nothing, and one is told.
    with pytest.warns(UserWarning, match="schedule: .* from_config"):
        fresh = plain.from_config(scheduler.config)
    with pytest.warns(UserWarning, match="schedule: .* from_config"):
        other = type(scheduler).from_config(scheduler.config)
    assert type(fresh) is plain
    assert type(other) is plain
    with pytest.warns(UserWarning, match=r"schedule: .* schedule\.save"):
        scheduler.save_pretrained(tmp_path)
    assert type(plain.from_pretrained(tmp_path)) is plain
    adapter.release(scheduler)
    plain.from_config(scheduler.config)  # no warning: it holds nothing
    scheduler.set_timesteps(6)


def test_the_configuration_is_read_and_written_without_a_word() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    artlib.edm(adapter.scheduler_process(scheduler)).to_diffusers(scheduler, 5)
    config = scheduler.config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.beta_end == config["beta_end"] == 0.012
        assert config.get("missing", 3) == 3
        assert "beta_start" in config
        assert not hasattr(config, "missing")
        assert "0.012" in repr(config)
        assert "0.012" in repr(scheduler)
        scheduler.register_to_config(steps_offset=1)
        config.flow_shift = 2.0
        assert scheduler.config.steps_offset == 1
    for whole in (dict, list, copy.copy, lambda c: {**c}, lambda c: c.copy()):
        with pytest.warns(UserWarning, match="configuration copied"):
            whole(scheduler.config)


def test_the_first_state_is_that_of_the_first_level() -> None:
    # diffusers starts leading steps from sqrt(sigma^2 + 1): 14.6488 for 14.6146.
    for name, options in (
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
        ("LMSDiscreteScheduler", {}),
        ("EDMEulerScheduler", {}),
    ):
        betas = {} if name.startswith("EDM") else BETAS
        scheduler = getattr(diffusers, name)(**betas, **options)
        process = adapter.scheduler_process(scheduler)
        artlib.edm(process).to_diffusers(scheduler, 5)
        assert float(scheduler.init_noise_sigma) == pytest.approx(process.t_max)
        adapter.release(scheduler)
        fresh = getattr(diffusers, name)(**betas, **options)
        for own in (scheduler, fresh):
            own.set_timesteps(5)
        assert float(scheduler.init_noise_sigma) == float(fresh.init_noise_sigma)
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS)
    process = adapter.scheduler_process(scheduler)
    artlib.edm(process).to_diffusers(scheduler, 5)
    t = process.t_max
    assert float(scheduler.init_noise_sigma) == pytest.approx(t / math.sqrt(1 + t**2))
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    artlib.uniform(artlib.RectifiedFlow()).to_diffusers(flow, 5)
    assert not hasattr(flow, "init_noise_sigma")


def test_another_schedule_takes_the_place_of_the_one_held() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS)
    process = adapter.scheduler_process(scheduler)
    artlib.edm(process).to_diffusers(scheduler, 5)
    second = artlib.log_snr(process)
    second.to_diffusers(scheduler, 4)
    scheduler.set_timesteps(9)
    torch.testing.assert_close(
        scheduler.sigmas.double(), second.grid(9), rtol=1e-5, atol=0
    )
    # What is refused changes nothing of what it holds.
    with pytest.raises(artlib.ExportError, match="noise levels run from"):
        artlib.edm(artlib.VE()).to_diffusers(scheduler, 4)
    scheduler.set_timesteps(9)
    torch.testing.assert_close(
        scheduler.sigmas.double(), second.grid(9), rtol=1e-5, atol=0
    )


def test_levels_that_are_not_kept_to_the_tolerance_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    before = {name: str(value) for name, value in vars(scheduler).items()}
    schedule = artlib.kl_optimal(adapter.scheduler_process(scheduler))
    schedule.to_diffusers(copy.deepcopy(scheduler), 5)  # float32 holds them to 1e-5 ...
    monkeypatch.setattr("artlib.adapters.diffusers.setter.TOLERANCE", 1e-10)
    with pytest.raises(
        artlib.ExportError, match=r"its sigmas are kept in torch.float32"
    ):
        schedule.to_diffusers(scheduler, 5)  # ... and not to ten digits
    assert {name: str(value) for name, value in vars(scheduler).items()} == before
