"""Plans in pipelines of diffusers: exactly `artlib.sample`, or refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

import artlib
from artlib.adapters import diffusers as adapter

diffusers = pytest.importorskip("diffusers", reason="no diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def unet() -> Any:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return network.eval().double()


def run(scheduler: Any, network: Any, x: Tensor, flow: bool) -> Tensor:
    """A pipeline's loop, from noise of standard deviation 1."""
    x = x * (1.0 if flow else float(scheduler.init_noise_sigma))
    for t in scheduler.timesteps:
        given = x
        if hasattr(scheduler, "scale_model_input"):
            given = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            output = network(given, t.double(), return_dict=False)[0]
        x = scheduler.step(output, t, x, return_dict=False)[0].double()
    return x


CASES = [
    ("EulerDiscreteScheduler", {}, "euler"),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, "euler"),
    ("EulerDiscreteScheduler", {"prediction_type": "sample"}, "euler"),
    ("DPMSolverMultistepScheduler", {}, "dpmpp_2m"),
    ("UniPCMultistepScheduler", {}, "unipc"),
    ("FlowMatchEulerDiscreteScheduler", {}, "euler"),
]


@pytest.mark.parametrize(("name", "options", "solver"), CASES)
def test_a_told_plan_is_our_sample(
    name: str, options: dict[str, Any], solver: str
) -> None:
    scheduler, network = getattr(diffusers, name)(**options), unet()
    is_flow = name.startswith("Flow")
    own = adapter.denoiser(network, scheduler)
    process = own.process
    schedule = artlib.uniform(process) if is_flow else artlib.kl_optimal(process)
    nodes = schedule.grid(5)
    told = nodes[:-1].clone()
    told[1:] *= 0.85
    plan = artlib.Plan(process, nodes, told, solver)
    noise = torch.randn(
        3, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    start = noise * float(process.sigma(nodes[0]))
    flow = artlib.ProbabilityFlow(process, own, acceleration="difference")
    ours = artlib.sample(flow, start, plan)
    honest = artlib.sample(flow, start, nodes, solver=solver)
    hooks = plan.to_diffusers(scheduler, network)
    theirs = run(scheduler, network, start if is_flow else noise, is_flow)
    scale = ours.norm()
    assert float((theirs - ours).norm() / scale) < 2e-5
    assert float((honest - ours).norm() / scale) > 1e-3  # the levels do matter
    hooks.remove()
    scheduler.set_timesteps(5)
    back = run(scheduler, network, start if is_flow else noise, is_flow)
    assert float((back - honest).norm() / scale) < 2e-5


def test_an_honest_plan_needs_no_network() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    schedule = artlib.kl_optimal(adapter.scheduler_process(scheduler))
    plan = artlib.Plan.honest(schedule, 6, solver="euler")
    assert plan.to_diffusers(scheduler) is None
    assert torch.allclose(scheduler.sigmas.double(), plan.nodes, rtol=1e-5)


def test_what_cannot_be_told_is_refused_and_nothing_changed() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    process = adapter.scheduler_process(scheduler)
    nodes = artlib.kl_optimal(process).grid(4)
    plan = artlib.Plan(process, nodes, 0.9 * nodes[:-1], "euler")
    scheduler.set_timesteps(4)
    before = scheduler.sigmas.clone()
    with pytest.raises(artlib.ExportError, match="network"):
        plan.to_diffusers(scheduler)
    assert torch.equal(scheduler.sigmas, before)
    with pytest.raises(TypeError, match="network"):
        plan.to_diffusers(scheduler, lambda x, t: x)
    scheduler.set_timesteps(4)
    assert torch.equal(scheduler.sigmas, before)


def test_another_number_of_steps_is_noticed_at_the_first_call() -> None:
    scheduler, network = diffusers.EulerDiscreteScheduler(), unet()
    process = adapter.scheduler_process(scheduler)
    nodes = artlib.kl_optimal(process).grid(4)
    plan = artlib.Plan(process, nodes, 0.9 * nodes[:-1], "euler")
    hooks = plan.to_diffusers(scheduler, network)
    adapter.release(scheduler)
    scheduler.set_timesteps(7)
    noise = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    with pytest.raises(artlib.ExportError, match="none of the plan's"):
        run(scheduler, network, noise, False)
    hooks.remove()
    scheduler.set_timesteps(7)
    run(scheduler, network, noise, False)
