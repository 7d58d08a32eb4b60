"""Networks of real diffusers pipelines as denoisers, and schedules back into them.

The parts are small and random. What a pipeline computes with a held schedule has to be
what `artlib.sample` computes with the denoiser of its network on the schedule's grid.
"""

import math
import warnings
from typing import Any

import pytest
import torch
from pipelines import BETAS, diffusers, noise, ours, small_vae
from torch import Tensor

import artlib
from artlib.adapters.diffusers import denoiser, release, scheduler_process

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def small_unet(**options: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **options,
    ).eval()


def text_unet() -> Any:
    torch.manual_seed(1)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def art(net: Any, x: Tensor) -> artlib.Schedule:
    """The schedule of a network, learned from the noise it would start from."""
    flow = artlib.ProbabilityFlow(net.process, net, acceleration="difference")
    x_T = x.double() * float(net.process.sigma(net.process.t_max))
    return artlib.art(flow, x_T, points=12, method="heun")


# The formulas, on networks whose answer is known exactly.


class ExactNetwork(torch.nn.Module):
    """What a perfect network for N(0, 1/4) predicts, called as diffusers does."""

    def __init__(self, scheduler: Any, prediction: str) -> None:
        super().__init__()
        self.scheduler, self.prediction = scheduler, prediction
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.seen: list[float] = []

    def forward(
        self, sample: Tensor, timestep: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        assert not return_dict
        self.seen = timestep.tolist()
        t = timestep.double().reshape(-1, *[1] * (sample.ndim - 1))
        if self.prediction == "flow":
            t = t / 1000
            mean = (1 - t) / 4 / ((1 - t) ** 2 / 4 + t**2) * sample
            return ((sample - mean) / t,)
        product = self.scheduler.alphas_cumprod.double()
        logs = ((1 - product) / product).sqrt().log()
        low = t.long().clamp(max=len(logs) - 2)
        s = torch.lerp(logs[low], logs[low + 1], t - low).exp()
        alpha, sigma = 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()
        x0 = alpha / 4 / (alpha**2 / 4 + sigma**2) * sample
        eps = (sample - alpha * x0) / sigma
        return (
            {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[
                self.prediction
            ],
        )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_every_prediction_gives_the_exact_denoiser(
    prediction: str, per_sample: bool
) -> None:
    scheduler = (
        diffusers.FlowMatchEulerDiscreteScheduler()
        if prediction == "flow"
        else diffusers.DDIMScheduler(**BETAS, prediction_type=prediction)
    )
    network = ExactNetwork(scheduler, prediction)
    net = denoiser(network, scheduler)
    target = artlib.Gaussian([0.0, 0.0, 0.0], (torch.eye(3) / 4).tolist())
    exact = target.denoiser(net.process)
    x = noise(4, 3).double()
    times = torch.tensor([0.04, 0.3, 0.61, 0.9], dtype=torch.float64)[:, None]
    times = net.process.t_min + times * (net.process.t_max - net.process.t_min)
    for t in [times] if per_sample else list(times[:, 0]):
        found = net(x, t)
        # The network is told float32 times: 1e-5 of a level.
        torch.testing.assert_close(found, exact(x, t), rtol=2e-4, atol=1e-5)
    flow = artlib.ProbabilityFlow(net.process, net)
    q = flow.stiffness(x, float(times[1]))
    q_exact = artlib.ProbabilityFlow(net.process, exact).stiffness(x, float(times[1]))
    assert flow.acceleration_method == "jvp"  # the time's derivative is there too
    torch.testing.assert_close(q, q_exact, rtol=2e-2, atol=0)


def test_edm_preconditioning_is_undone() -> None:
    scheduler = diffusers.EDMEulerScheduler()

    class Network(torch.nn.Module):
        def forward(
            self, sample: Tensor, timestep: Tensor, return_dict: bool = True
        ) -> tuple[Tensor]:
            s = (4 * timestep.double()).exp()[:, None]
            y = sample * (s**2 + 0.25).sqrt()
            x0 = 1 / (1 + s**2) * y  # of N(0, 1)
            skip, out = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt()
            return ((x0 - skip * y) / out,)

    net = denoiser(Network(), scheduler)
    assert net.process == artlib.VE(0.002, 80.0)
    x = noise(5, 2).double()
    for s in (0.01, 0.5, 20.0):
        expected = x / (1 + s**2)
        # The network answers in float32, the only dtype a parameterless one is given.
        torch.testing.assert_close(
            net(x, torch.tensor(s)), expected, rtol=1e-4, atol=1e-6
        )


# Whole pipelines.


def test_ddpm_pipeline() -> None:
    pipe = diffusers.DDPMPipeline(small_unet(), diffusers.DDPMScheduler())
    net = denoiser(pipe.unet, pipe.scheduler)
    x = noise(3, 2, 8, 8)
    schedule = art(net, x)
    # The pipeline itself takes integer steps of DDPM; Euler has the same table.
    with pytest.raises(artlib.ExportError, match="use EulerDiscreteScheduler"):
        schedule.to_diffusers(pipe.scheduler, 6)
    euler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    schedule.to_diffusers(euler, 6)
    state = x * euler.init_noise_sigma
    with torch.no_grad():
        for t in euler.timesteps:
            output = pipe.unet(euler.scale_model_input(state, t), t).sample
            state = euler.step(output, t, state).prev_sample
    torch.testing.assert_close(
        state, ours(net, schedule, x, 6, "euler"), rtol=1e-4, atol=1e-4
    )


def test_class_conditions_and_guidance() -> None:
    unet = small_unet(num_class_embeds=5)
    scheduler = diffusers.DDIMScheduler(**BETAS)
    labels, none = (
        {"class_labels": torch.tensor([3])},
        {"class_labels": torch.tensor([4])},
    )
    x = noise(2, 2, 8, 8)
    t = torch.tensor(1.7)
    with torch.no_grad():
        c = denoiser(unet, scheduler, condition=labels)(x, t)
        u = denoiser(unet, scheduler, condition=none)(x, t)
        guided = artlib.CountNFE(
            denoiser(
                unet, scheduler, condition=labels, unconditional=none, guidance=3.0
            )
        )
        found = guided(x, t)
        each = denoiser(
            unet, scheduler, condition={"class_labels": torch.tensor([3, 4])}
        )(x, t)
    assert not torch.allclose(c, u, atol=1e-3)
    torch.testing.assert_close(found, u + 3 * (c - u), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(each, torch.stack([c[0], u[1]]), rtol=1e-4, atol=1e-4)
    assert guided.nfe == 1


def test_a_predicted_variance_is_cut_off() -> None:
    class Both(torch.nn.Module):
        def forward(
            self, sample: Tensor, timestep: Tensor, return_dict: bool = True
        ) -> tuple[Tensor]:
            return (torch.cat([sample, 100 + sample], dim=1),)

    scheduler = diffusers.DDIMScheduler(**BETAS, prediction_type="sample")
    x = noise(2, 3, 4, 4)
    found = denoiser(Both(), scheduler)(x, torch.tensor(2.0))
    torch.testing.assert_close(found, x / math.sqrt(5))


def test_other_channels_than_a_variance_are_refused() -> None:
    class Three(torch.nn.Module):
        def forward(
            self, sample: Tensor, timestep: Tensor, return_dict: bool = True
        ) -> tuple[Tensor]:
            return (torch.cat([sample, sample, sample], dim=1),)

    net = denoiser(Three(), diffusers.DDIMScheduler(**BETAS, prediction_type="sample"))
    flow = artlib.ProbabilityFlow(net.process, net)
    with pytest.raises((ValueError, RuntimeError)):
        flow.denoise(noise(2, 3, 4, 4), 2.0)


def stable_diffusion(scheduler: Any, kind: str = "StableDiffusionPipeline") -> Any:
    return getattr(diffusers, kind)(
        vae=small_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=text_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize("kind", ["Euler", "Heun"])
def test_stable_diffusion_with_text_and_guidance(kind: str) -> None:
    make = getattr(diffusers, f"{kind}DiscreteScheduler")
    pipe = stable_diffusion(make(**BETAS, steps_offset=1))
    pipe.set_progress_bar_config(disable=True)
    prompt, empty = noise(1, 6, 12, seed=1), noise(1, 6, 12, seed=2)
    net = denoiser(
        pipe.unet,
        pipe.scheduler,
        condition={"encoder_hidden_states": prompt},
        unconditional={"encoder_hidden_states": empty},
        guidance=4.0,
    )
    x = noise(2, 4, 8, 8)
    schedule = art(net, x)
    schedule.to_diffusers(pipe.scheduler, 5)

    def image(K: int) -> Tensor:
        return pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=empty,
            num_images_per_prompt=2,
            guidance_scale=4.0,
            latents=x,
            num_inference_steps=K,
            output_type="latent",
        ).images

    solver = kind.lower()
    for K in (5, 3):  # held: any number of steps
        torch.testing.assert_close(
            image(K), ours(net, schedule, x, K, solver), rtol=1e-4, atol=1e-4
        )
    held = image(5)
    release(pipe.scheduler)
    assert not torch.allclose(image(5), held, atol=0.05)


def test_image_to_image_strength_cuts_the_schedule() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1)
    pipe = stable_diffusion(scheduler, "StableDiffusionImg2ImgPipeline")
    pipe.set_progress_bar_config(disable=True)
    prompt = noise(1, 6, 12, seed=1)
    net = denoiser(pipe.unet, scheduler, condition={"encoder_hidden_states": prompt})
    schedule = art(net, noise(2, 4, 8, 8))
    schedule.to_diffusers(scheduler, 8)
    latents = noise(1, 4, 8, 8, seed=3)
    found = pipe(
        prompt_embeds=prompt,
        image=latents,
        strength=0.5,
        num_inference_steps=8,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(9),
        output_type="latent",
    ).images
    grid = schedule.grid(8)[4:]  # the last four of eight steps
    torch.testing.assert_close(scheduler.sigmas[4:].double(), grid, rtol=1e-5, atol=0)
    added = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    start = latents + float(grid[0]) * added
    flow = artlib.ProbabilityFlow(net.process, net)
    expected = artlib.sample(flow, start, grid)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def stable_diffusion_3(scheduler: Any) -> Any:
    torch.manual_seed(4)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
    ).eval()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=small_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


@pytest.mark.parametrize("options", [{"shift": 3.0}, {"use_dynamic_shifting": True}])
def test_flow_matching_pipeline(options: dict[str, Any]) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    pipe = stable_diffusion_3(scheduler)
    pipe.set_progress_bar_config(disable=True)
    prompt, pooled = noise(1, 6, 12, seed=1), noise(1, 10, seed=2)
    net = denoiser(
        pipe.transformer,
        pipe.scheduler,
        condition={"encoder_hidden_states": prompt, "pooled_projections": pooled},
    )
    assert net.process == artlib.RectifiedFlow()
    x = noise(2, 4, 8, 8)
    schedule = art(net, x)
    schedule.to_diffusers(pipe.scheduler, 6)
    for K in (6, 4):
        found = pipe(
            prompt_embeds=prompt,
            pooled_prompt_embeds=pooled,
            num_images_per_prompt=2,
            guidance_scale=1.0,
            height=8,
            width=8,
            latents=x,
            num_inference_steps=K,
            output_type="latent",
        ).images
        torch.testing.assert_close(
            found, ours(net, schedule, x, K, "euler"), rtol=1e-4, atol=1e-4
        )


# What is refused.


def test_bad_arguments_are_refused() -> None:
    unet = small_unet()
    scheduler = diffusers.DDIMScheduler(**BETAS)
    with pytest.raises(TypeError, match="network: expected a torch module"):
        denoiser(scheduler, unet)
    with pytest.raises(TypeError, match="scheduler: expected a scheduler"):
        denoiser(unet, object())
    with pytest.raises(ValueError, match="needs both condition"):
        denoiser(unet, scheduler, guidance=3.0)
    with pytest.raises(ValueError, match="guidance: expected a finite"):
        denoiser(unet, scheduler, guidance=math.nan)
    with pytest.raises(TypeError, match="condition: expected a mapping"):
        denoiser(unet, scheduler, condition=torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unconditional: expected the names"):
        denoiser(
            unet,
            scheduler,
            condition={"class_labels": torch.tensor([1])},
            unconditional={"labels": torch.tensor([1])},
            guidance=2.0,
        )
    three = denoiser(
        unet, scheduler, condition={"class_labels": torch.tensor([1, 2, 3])}
    )
    with pytest.raises(ValueError, match="expected one row or as many"):
        three(noise(2, 2, 8, 8), torch.tensor(1.0))
    with pytest.raises(ValueError, match="prediction_type='other'"):
        denoiser(unet, diffusers.DDIMScheduler(prediction_type="other"))
    with pytest.raises(ValueError, match="neither alphas_cumprod nor"):
        scheduler_process(diffusers.ScoreSdeVeScheduler())


def test_half_precision_networks_get_float32_times() -> None:
    seen: list[torch.dtype] = []

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.bfloat16))

        def forward(
            self, sample: Tensor, timestep: Tensor, return_dict: bool = True
        ) -> tuple[Tensor]:
            seen.extend([sample.dtype, timestep.dtype])
            return (sample,)

    net = denoiser(Network(), diffusers.DDIMScheduler(**BETAS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = net(noise(2, 3).double(), torch.tensor(2.0, dtype=torch.float64))
    assert seen == [torch.bfloat16, torch.float32]
    assert found.dtype == torch.float64
