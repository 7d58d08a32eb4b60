"""More families of diffusers end to end, and masks: pipelines equal `artlib.sample`."""

from typing import Any

import pytest
import torch
from pipelines import BETAS, diffusers, noise, ours, small_vae
from torch import Tensor, nn

import artlib
from artlib.adapters import inpainting
from artlib.adapters.diffusers import denoiser

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
NEAR = {"rtol": 1e-4, "atol": 1e-4}
"""States are of size 1 to 15; networks compute in float32."""


def made(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lively(network: nn.Module) -> nn.Module:
    """Random weights where a new network has zeros, so that its answer counts."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in network.parameters():
            if not bool(weight.any()):
                weight.add_(0.2 * torch.randn(weight.shape, generator=rng))
    return network.eval()


def unet(**options: Any) -> Any:
    torch.manual_seed(1)
    return lively(
        diffusers.UNet2DConditionModel(
            **{
                "sample_size": 8,
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": (8, 16),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "attention_head_dim": 4,
                "cross_attention_dim": 12,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                **options,
            }
        )
    )


# Transformers with a table of training steps.


@pytest.mark.parametrize(
    ("kind", "solver"), [("EulerDiscrete", "euler"), ("DPMSolverMultistep", "dpmpp_2m")]
)
def test_pixart_end_to_end(kind: str, solver: str) -> None:
    torch.manual_seed(0)
    transformer = lively(
        diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=12,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,  # and a variance
        )
    )
    pipe = made(
        diffusers.PixArtAlphaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=small_vae(),
            transformer=transformer,
            scheduler=getattr(diffusers, f"{kind}Scheduler")(),
        )
    )
    words, empty = noise(1, 6, 12, seed=1), noise(1, 6, 12, seed=2)
    seen = torch.tensor([[1, 1, 1, 1, 0, 0]])
    more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    net = denoiser(
        pipe.transformer,
        pipe.scheduler,
        condition={
            "encoder_hidden_states": words,
            "encoder_attention_mask": seen,
            **more,
        },
        unconditional={
            "encoder_hidden_states": empty,
            "encoder_attention_mask": torch.ones_like(seen),
            **more,
        },
        guidance=3.0,
    )
    x = noise(2, 4, 8, 8)
    schedule = artlib.log_snr(net.process, pinned=False)
    schedule.to_diffusers(pipe.scheduler, 6)
    found = pipe(
        prompt_embeds=words,
        prompt_attention_mask=seen,
        negative_prompt=None,
        negative_prompt_embeds=empty,
        negative_prompt_attention_mask=torch.ones_like(seen),
        num_images_per_prompt=2,
        guidance_scale=3.0,
        height=8,
        width=8,
        use_resolution_binning=False,
        latents=x,
        num_inference_steps=6,
        output_type="latent",
    ).images
    expected = ours(net, schedule, x, 6, solver)
    torch.testing.assert_close(found, expected, **NEAR)
    assert float((expected - x * float(expected.std())).std()) > 0.1  # not noise alone


def test_dit_end_to_end() -> None:
    """Its pipeline starts from noise of size 1, in the coordinate of the table."""
    torch.manual_seed(0)
    transformer = lively(
        diffusers.DiTTransformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            num_embeds_ada_norm=1000,
            in_channels=4,
            out_channels=8,
        )
    )
    pipe = made(
        diffusers.DiTPipeline(
            transformer=transformer,
            vae=small_vae(),
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )
    )
    labels = torch.tensor([3, 7])
    net = denoiser(
        pipe.transformer,
        pipe.scheduler,
        condition={"class_labels": labels},
        unconditional={"class_labels": torch.tensor([1000])},
        guidance=2.5,
    )
    schedule = artlib.edm(net.process, pinned=False)
    schedule.to_diffusers(pipe.scheduler, 5)
    found = pipe(
        labels.tolist(),
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(9),
        num_inference_steps=5,
        output_type="pt",
    ).images
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    first = float(schedule.grid(5)[0])
    latents = ours(net, schedule, x * (1 + first**-2) ** 0.5, 5, "dpmpp_2m")
    with torch.no_grad():
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    expected = (image / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(torch.as_tensor(found), expected, **NEAR)
    assert float(((expected > 0) & (expected < 1)).double().mean()) > 0.01


# Video.


@pytest.mark.parametrize("together", [True, False])
def test_wan_video_end_to_end(together: bool) -> None:
    torch.manual_seed(0)
    transformer = lively(
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=12,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
    )
    pipe = made(
        diffusers.WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        )
    )
    words, empty = noise(1, 6, 12, seed=1), noise(1, 6, 12, seed=2)
    net = denoiser(
        pipe.transformer,
        pipe.scheduler,
        condition={"encoder_hidden_states": words},
        unconditional={"encoder_hidden_states": empty},
        guidance=3.0,
        together=together,
    )
    x = noise(2, 4, 2, 4, 4)  # channels, frames, height, width
    schedule = artlib.beta(net.process)
    schedule.to_diffusers(pipe.scheduler, 5)
    found = pipe(
        prompt_embeds=words,
        negative_prompt_embeds=empty,
        num_videos_per_prompt=2,
        guidance_scale=3.0,
        height=32,
        width=32,
        num_frames=5,
        latents=x,
        num_inference_steps=5,
        output_type="latent",
    ).frames
    torch.testing.assert_close(found, ours(net, schedule, x, 5, "euler"), **NEAR)


# Masks.


@pytest.mark.parametrize("together", [True, False])
def test_inpainting_network_end_to_end(together: bool) -> None:
    """Mask and masked image as channels behind the state."""
    pipe = made(
        diffusers.StableDiffusionInpaintPipeline(
            vae=small_vae(),
            text_encoder=None,
            tokenizer=None,
            unet=unet(in_channels=9),
            scheduler=diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )
    words, empty = noise(1, 6, 12, seed=1), noise(1, 6, 12, seed=2)
    mask = (noise(1, 1, 8, 8, seed=3) > 0).float()
    masked = noise(1, 4, 8, 8, seed=4)
    beside = {"concatenated": torch.cat([mask, masked], 1)}
    net = denoiser(
        pipe.unet,
        pipe.scheduler,
        condition={"encoder_hidden_states": words, **beside},
        unconditional={"encoder_hidden_states": empty, **beside},
        guidance=3.0,
        together=together,
    )
    x = noise(2, 4, 8, 8)
    schedule = artlib.log_snr(net.process, pinned=False)
    schedule.to_diffusers(pipe.scheduler, 6)
    found = pipe(
        prompt_embeds=words,
        negative_prompt_embeds=empty,
        image=noise(1, 3, 8, 8).clamp(0, 1),
        mask_image=mask,
        masked_image_latents=masked,
        num_images_per_prompt=2,
        guidance_scale=3.0,
        height=8,
        width=8,
        latents=x,
        num_inference_steps=6,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, ours(net, schedule, x, 6, "euler"), **NEAR)


def test_concatenated_channels_belong_to_their_samples() -> None:
    network = unet(in_channels=9)
    beside = noise(3, 5, 8, 8)
    words = noise(1, 6, 12)
    net = denoiser(
        network,
        diffusers.DDIMScheduler(**BETAS),
        condition={"encoder_hidden_states": words, "concatenated": beside},
    )
    x, t = noise(3, 4, 8, 8).double(), torch.tensor(2.0, dtype=torch.float64)
    with torch.no_grad():
        whole = net(x, t)
        for k in range(3):
            part = net.rows(slice(k, k + 1))(x[k : k + 1], t)
            torch.testing.assert_close(part, whole[k : k + 1], **NEAR)
        other = net.rows(torch.tensor([2]))(x[:1], t)
    assert not torch.allclose(other, whole[:1], atol=1e-2)
    net = denoiser(
        network,
        diffusers.DDIMScheduler(**BETAS),
        condition={"encoder_hidden_states": words, "concatenated": beside[:, :, :4]},
    )
    with pytest.raises(ValueError, match=r"condition: 'concatenated' .* resize masks"):
        net(x, t)


def test_frames_first_networks_have_their_channels_third() -> None:
    class UNetSpatioTemporalConditionModel(nn.Module):
        def forward(
            self, sample: Tensor, timestep: Tensor, return_dict: bool = True
        ) -> tuple[Tensor]:
            assert sample.shape == (2, 3, 6, 5, 5)
            return (sample[:, :, 4:].repeat(1, 1, 2, 1, 1),)

    frames = noise(1, 3, 2, 5, 5)
    net = denoiser(
        UNetSpatioTemporalConditionModel(),
        diffusers.DDIMScheduler(**BETAS, prediction_type="sample"),
        condition={"concatenated": frames},
    )
    found = net(noise(2, 3, 4, 5, 5), torch.tensor(1.0))
    assert torch.equal(found, frames.repeat(2, 1, 2, 1, 1))


def test_blended_inpainting_end_to_end() -> None:
    """A plain network: the pipeline blends the known in after every step."""
    pipe = made(
        diffusers.StableDiffusionInpaintPipeline(
            vae=small_vae(),
            text_encoder=None,
            tokenizer=None,
            unet=unet(),
            scheduler=diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )
    words, known = noise(1, 6, 12, seed=1), noise(1, 4, 8, 8, seed=4)
    mask = (noise(1, 1, 8, 8, seed=3) > 0).float()
    net = inpainting(
        denoiser(pipe.unet, pipe.scheduler, condition={"encoder_hidden_states": words}),
        known,
        mask,
    )
    schedule = artlib.log_snr(net.process, pinned=False)
    schedule.to_diffusers(pipe.scheduler, 8)
    found = pipe(
        prompt_embeds=words,
        image=known,
        mask_image=mask,
        masked_image_latents=known,
        guidance_scale=1.0,
        strength=0.5,
        height=8,
        width=8,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(9),
        output_type="latent",
    ).images
    grid = schedule.grid(8)[4:]
    added = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    flow = artlib.ProbabilityFlow(net.process, net)
    expected = artlib.sample(flow, known + float(grid[0]) * added, grid)
    torch.testing.assert_close(found, expected, **NEAR)
    kept = mask.expand_as(known) == 0
    torch.testing.assert_close(expected[kept], known[kept], **NEAR)
    assert float((expected - known)[~kept].abs().mean()) > 0.1


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
def test_inpainting_is_the_conditional_law_where_nothing_is_correlated(
    solver: str,
) -> None:
    """And a schedule is learned on its flow, batch by batch."""
    process = artlib.VE(0.01, 20.0)
    target = artlib.Gaussian([1.0, -2.0, 0.0], torch.diag(torch.tensor([1.0, 4.0, 9])))
    exact = target.denoiser(process)
    known = torch.tensor([[7.0, 0.0, 3.0]]).repeat(4, 1)
    known[:, 0] += torch.arange(4)
    mask = torch.tensor([[False, True, False]])
    net = inpainting(exact, known, mask, process=process)
    flow = artlib.ProbabilityFlow(process, net)
    draws = noise(4, 3).double()
    x_T = net.start(draws)
    assert torch.equal(x_T[:, 1], 20.0 * draws[:, 1])
    assert torch.equal(x_T[:, 0], 20.0 * draws[:, 0] + known[:, 0])
    schedule = artlib.art(flow, x_T, batch=3)
    found = artlib.sample(flow, x_T, schedule.grid(6), solver=solver)
    free = artlib.sample(
        artlib.ProbabilityFlow(process, exact),
        20 * draws,
        schedule.grid(6),
        solver=solver,
    )
    torch.testing.assert_close(found[:, 1], free[:, 1])
    torch.testing.assert_close(
        found[:, [0, 2]], known[:, [0, 2]].double(), rtol=0, atol=1e-10
    )
    parts = artlib.sample(flow, x_T, schedule.grid(6), solver=solver, batch=3)
    torch.testing.assert_close(parts, found)


def test_inpainting_refused() -> None:
    process = artlib.VE()

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return x

    known, mask = torch.zeros(2, 3), torch.zeros(1, 3)
    with pytest.raises(TypeError, match="process: the denoiser does not say"):
        inpainting(exact, known, mask)
    with pytest.raises(ValueError, match="mask: expected known and mask with rows"):
        inpainting(exact, known, mask[0], process=process)
    with pytest.raises(ValueError, match=r"mask: expected 1 where .* got values in"):
        inpainting(exact, known, mask + 2, process=process)
    with pytest.raises(ValueError, match=r"known: contains NaN|known: .*finite"):
        inpainting(exact, known / 0, mask, process=process)
    net = inpainting(exact, known, mask, process=process)
    with pytest.raises(ValueError, match=r"known: \[2, 3\] does not fit states \[4, 3"):
        net(torch.zeros(4, 3), torch.tensor(1.0))
    flow = artlib.ProbabilityFlow(process, net)
    with pytest.raises(ValueError, match="known: 2 rows for 4 samples"):
        artlib.art(flow, torch.ones(4, 3), batch=2)


def test_inpainting_on_an_accelerator(accelerator: torch.device) -> None:
    """What is known comes from the CPU."""
    process = artlib.VE(0.01, 20.0)
    exact = artlib.Gaussian([1.0, -2.0], torch.eye(2)).denoiser(process)
    net = inpainting(exact, noise(3, 2), torch.tensor([[True, False]]), process=process)
    flow = artlib.ProbabilityFlow(process, net)
    grid = artlib.edm(process).grid(5)
    found = [
        artlib.sample(flow, net.start(noise(3, 2).to(device)), grid).cpu()
        for device in (torch.device("cpu"), accelerator)
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
