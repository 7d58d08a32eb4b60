"""What networks of diffusers are given beside the state: conditions and times."""

import ast
import copy
import inspect
import math
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import BETAS, diffusers, noise, ours, small_vae
from torch import Tensor, nn

import artlib
from artlib.adapters.diffusers import denoiser, scheduler_process
from artlib.adapters.diffusers.guidance import Guidance
from artlib.adapters.diffusers.times import TOLD_1000_T, TOLD_T, innermost

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
HALF = torch.tensor(0.5, dtype=torch.float64)


class Echo(nn.Module):
    """A network that notes what it is given; its answer depends on all of it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.given: dict[str, Any] = {}

    def forward(
        self, sample: Tensor, timestep: Tensor, return_dict: bool = True, **given: Any
    ) -> tuple[Tensor]:
        assert not return_dict
        assert timestep.shape == (len(sample),)
        self.given = {"timestep": timestep, **given}
        bias = torch.zeros(len(sample), dtype=sample.dtype)
        for value in leaves(given):
            if value.ndim and len(value) == len(sample):
                bias = bias + value.reshape(len(value), -1).sum(1).to(bias)
        shape = (-1, *[1] * (sample.ndim - 1))
        return (self.weight * (0.5 * sample + 0.1 * bias.reshape(shape)),)


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for v in value for leaf in leaves(v)]
    return [value] if isinstance(value, Tensor) else []


def ddim() -> Any:
    return diffusers.DDIMScheduler(**BETAS)


def test_positions_are_shared_whatever_their_number() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    for n in (1, 2, 5, 16):
        for more in ({}, {"guidance": 2.0}, {"guidance": 2.0, "together": False}):
            network = Echo()
            text = {
                "encoder_hidden_states": noise(1, 5, 8),
                "img_ids": noise(16, 3),
                "txt_ids": noise(5, 3),
                "image_rotary_emb": (noise(n, 4), noise(n, 4)),
                "scale": torch.tensor(2.0),
                "joint_attention_kwargs": {"word": "as it is"},
            }
            net = denoiser(
                network, scheduler, condition=text, unconditional=text, **more
            )
            net(noise(n, 16, 4).double(), HALF)
            calls = 2 if more.get("guidance") and more.get("together", True) else 1
            given = network.given
            assert given["encoder_hidden_states"].shape == (calls * n, 5, 8)
            assert given["img_ids"].shape == (16, 3)
            assert given["txt_ids"].shape == (5, 3)
            assert [v.shape for v in given["image_rotary_emb"]] == [(n, 4)] * 2
            assert given["scale"].shape == ()
            assert given["joint_attention_kwargs"] == {"word": "as it is"}
            # Positions with a batch axis, as Flux 2 makes them, have rows.
            text = {**text, "img_ids": noise(1, 16, 4)}
            net = denoiser(network, scheduler, condition=text)
            net(noise(n, 16, 4).double(), HALF)
            assert network.given["img_ids"].shape == (n, 16, 4)


def test_conditions_go_where_the_states_are(accelerator: torch.device) -> None:
    """Those of samples, nested ones, and those that samples share."""
    condition = {
        "img_ids": torch.ones(5, 3),
        "scale": torch.tensor(2.0),
        "more": {"label": torch.ones(1, 2)},
    }

    def network(x: Tensor, time: Tensor, **given: Any) -> Tensor:
        tensors = (given["img_ids"], given["scale"], given["more"]["label"])
        assert all(value.device.type == accelerator.type for value in tensors)
        return x

    x = torch.ones(3, 2).to(accelerator)
    Guidance(condition, None, 1.0)(network, x, x[:, 0])


def test_only_floating_conditions_take_the_dtype_of_the_network() -> None:
    network = Echo().to(torch.bfloat16)
    condition = {"class_labels": torch.tensor([3]), "embedding": torch.ones(1, 2)}
    x = torch.ones(2, 3, dtype=torch.float64)
    denoiser(network, ddim(), condition=condition)(x, HALF)
    assert network.given["class_labels"].tolist() == [3, 3]
    assert network.given["class_labels"].dtype == torch.int64
    assert network.given["embedding"].dtype == torch.bfloat16


def test_names_can_be_shared() -> None:
    network = Echo()
    given = {"added": {"grid": noise(2, 3), "rows": noise(2, 3)}}
    net = denoiser(network, ddim(), condition=given, shared=("grid",))
    net(noise(2, 3), HALF)
    assert torch.equal(network.given["added"]["grid"], given["added"]["grid"])
    assert net.rows(slice(1, 2))(noise(1, 3), HALF).shape == (1, 3)
    assert network.given["added"]["grid"].shape == (2, 3)
    assert network.given["added"]["rows"].shape == (1, 3)


@pytest.mark.parametrize("guided", [{}, {"guidance": 3.0}])
@pytest.mark.parametrize("together", [True, False])
def test_rows_of_samples_keep_their_conditions(
    guided: dict[str, Any], together: bool
) -> None:
    x = noise(6, 3, 2, 2).double()
    given = {
        "class_labels": torch.arange(6),
        "added_cond_kwargs": {"text_embeds": noise(6, 4), "time_ids": noise(1, 6)},
        "image_embeds": [noise(6, 2), noise(1, 2)],
        "img_ids": noise(7, 3),
    }
    other = {**given, "class_labels": torch.zeros(1, dtype=torch.long)}
    net = denoiser(
        Echo(),
        ddim(),
        condition=given,
        unconditional=other,
        together=together and not guided,
        **guided,
    )
    whole = net(x, HALF)
    near = {"rtol": 1e-5, "atol": 1e-6}  # the network works in float32
    for index in (slice(0, 4), slice(4, 6), slice(5, 6), slice(None, None, 2)):
        part = net.rows(index)
        torch.testing.assert_close(part(x[index], HALF), whole[index], **near)
        assert part.network is net.network
        assert part.process == net.process
    again = net.rows(slice(2, 6)).rows(slice(1, 3))
    torch.testing.assert_close(again(x[3:5], HALF), whole[3:5], **near)
    # Nothing to be cut: the denoiser itself.
    common = denoiser(Echo(), ddim(), condition={"class_labels": torch.tensor([3])})
    assert common.rows(slice(0, 2)) is common
    assert denoiser(Echo(), ddim()).rows(slice(0, 2)) is not None


def test_two_calls_are_one() -> None:
    x = noise(3, 4).double()
    given, other = {"words": noise(3, 5)}, {"words": noise(1, 5, seed=1)}
    found = [
        denoiser(
            Echo(),
            ddim(),
            condition=given,
            unconditional=other,
            guidance=2.5,
            together=together,
        )(x, HALF)
        for together in (True, False)
    ]
    torch.testing.assert_close(*found)
    longer = denoiser(
        Echo(),
        ddim(),
        condition=given,
        unconditional={"words": noise(1, 7)},
        guidance=2.5,
        together=False,
    )
    assert longer(x, HALF).shape == x.shape


def test_rescaled_guidance_is_that_of_the_pipelines() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        rescale_noise_cfg,
    )

    x, s = noise(3, 4, 2, 2).double(), 2.0
    given, none = {"words": noise(3, 5)}, {"words": noise(1, 5, seed=1)}

    def epsilon(**options: Any) -> Tensor:
        return (x - denoiser(Echo(), ddim(), **options)(x, torch.tensor(s))) / s

    text, empty = epsilon(condition=given), epsilon(condition=none)
    wanted = rescale_noise_cfg(empty + 4 * (text - empty), text, 0.7)
    both = {"condition": given, "unconditional": none, "guidance": 4.0}
    found = epsilon(**both, guidance_rescale=0.7)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        epsilon(**both), empty + 4 * (text - empty), rtol=1e-5, atol=1e-6
    )


def test_conditions_that_are_refused() -> None:
    given = {"words": noise(3, 5)}
    net = denoiser(Echo(), ddim(), condition=given)
    with pytest.raises(ValueError, match=r"condition: 'words' .* shared=.*rows\("):
        net(noise(2, 4), HALF)
    with pytest.raises(ValueError, match=r"shared: .* no names of the condition"):
        denoiser(Echo(), ddim(), condition=given, shared=("word",))
    with pytest.raises(TypeError, match="shared: expected a collection"):
        denoiser(Echo(), ddim(), condition=given, shared="words")
    with pytest.raises(ValueError, match="guidance_rescale: expected a share"):
        denoiser(Echo(), ddim(), guidance_rescale=1.5)
    uneven = denoiser(
        Echo(),
        ddim(),
        condition=given,
        unconditional={"words": noise(3, 7)},
        guidance=2.0,
    )
    with pytest.raises(ValueError, match=r"unconditional: 'words' .* together=False"):
        uneven(noise(3, 4), HALF)


# Copies and wrappers of networks.


# One for each formula, and for each way to tell the time.
SCHEDULERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("DDIMScheduler", {"prediction_type": "epsilon", **BETAS}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", **BETAS}),
    ("DDIMScheduler", {"prediction_type": "sample", **BETAS}),
    (
        "EulerDiscreteScheduler",
        {"timestep_type": "continuous", "prediction_type": "v_prediction", **BETAS},
    ),
    ("EDMEulerScheduler", {}),
    ("EDMEulerScheduler", {"prediction_type": "v_prediction"}),
    ("FlowMatchEulerDiscreteScheduler", {}),
)


@pytest.mark.parametrize(("name", "options"), SCHEDULERS)
def test_denoisers_can_be_copied_and_pickled(
    name: str, options: dict[str, Any]
) -> None:
    scheduler = getattr(diffusers, name)(**options)
    net = denoiser(Echo(), scheduler, condition={"label": noise(2, 3)})
    flow = artlib.ProbabilityFlow(net.process, net)
    x = noise(2, 4).double()
    answer = net(x, HALF)
    for twin in (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        pickle.loads(pickle.dumps(flow)).denoise,
    ):
        assert torch.equal(twin(x, HALF), answer)


class Scribbling(Echo):
    """A network that writes over all that it is given."""

    def forward(
        self, sample: Tensor, timestep: Tensor, return_dict: bool = True, **given: Any
    ) -> tuple[Tensor]:
        answer = super().forward(sample, timestep, return_dict, **given)
        for value in [sample, timestep, *leaves(given)]:
            value.mul_(0)
        return answer


@pytest.mark.parametrize("guidance", [{}, {"guidance": 2.0, "together": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), SCHEDULERS)
def test_a_network_that_writes_in_place_gets_copies(
    name: str, options: dict[str, Any], dtype: torch.dtype, guidance: dict[str, Any]
) -> None:
    scheduler = getattr(diffusers, name)(**options)
    x, t = noise(2, 4).to(dtype), torch.tensor(0.5)
    label, ids = noise(2, 3).to(dtype), noise(2, 3).to(dtype)
    kept = [v.clone() for v in (x, t, label, ids)]
    text = {"label": label, "deep": {"img_ids": [ids]}}

    def make(network: nn.Module) -> Any:
        return denoiser(
            network, scheduler, condition=text, unconditional=text, **guidance
        )

    plain = make(Echo(dtype))(x, t)
    scribbling = make(Scribbling(dtype))
    for _ in range(2):
        assert torch.equal(scribbling(x, t), plain)
    assert all(map(torch.equal, (x, t, label, ids), kept))


def test_a_copy_asks_its_own_network() -> None:
    net = denoiser(Echo(), ddim())
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.network.weight.zero_()
    x = noise(2, 3)
    assert torch.equal(twin(x, HALF), x)
    assert not torch.equal(net(x, HALF), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pipelines_in_half_precision(dtype: torch.dtype) -> None:
    x = noise(2, 4, 8, 8).double()
    words = {"words": noise(2, 3)}
    exact = denoiser(Echo(), ddim(), condition=words)(x, HALF)
    net = denoiser(Echo(dtype), ddim(), condition=words)
    found = net(x, HALF)
    assert found.dtype == torch.float64
    assert net.network.given["words"].dtype == dtype
    assert net.network.given["timestep"].dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-2)


def data_parallel(network: nn.Module) -> nn.Module:
    """As it is where no accelerator is, also if one is simulated here."""
    module = sys.modules["torch.nn.parallel.data_parallel"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_get_available_device_type", lambda: None)
        return nn.DataParallel(network)


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).eval()


def test_wrapped_networks() -> None:
    x = noise(2, 2, 8, 8).double()
    plain = denoiser(unet(), ddim())(x, HALF)
    for wrap in (
        data_parallel,
        lambda net: torch.compile(net, backend="eager"),
        lambda net: net.to(memory_format=torch.channels_last),
    ):
        network = wrap(unet())
        found = denoiser(network, ddim())(x, HALF)
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
        assert type(innermost(network)) is diffusers.UNet2DModel


# What a network is told of the time.


def flux() -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def named(name: str) -> nn.Module:
    """A network of a class of that name, that only listens."""
    return type(name, (Echo,), {})()


@pytest.mark.parametrize("steps", [1000, 500])
def test_each_network_is_told_the_time_in_its_unit(steps: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps)
    for names, unit in ((TOLD_T, 1), (TOLD_1000_T, steps)):
        for name in names:
            for wrap in (lambda net: net, data_parallel):
                network = named(name)
                denoiser(wrap(network), scheduler)(noise(2, 3), HALF)
                assert network.given["timestep"].tolist() == [0.5 * unit] * 2
    # One that is not of diffusers is told the scheduler's timesteps; and what is said
    # by hand counts.
    for scale, told in ((None, 0.5 * steps), (1e-3, 0.5e-3 * steps)):
        network = Echo()
        denoiser(network, scheduler, timestep_scale=scale)(noise(2, 3), HALF)
        assert float(network.given["timestep"][0]) == pytest.approx(told)
    # Other schedulers have one convention.
    network = named("FluxTransformer2DModel")
    denoiser(network, ddim())(noise(2, 3), torch.tensor(14.0))
    assert float(network.given["timestep"][0]) > 900


def test_a_network_that_scales_the_time_itself_says_so() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    for scale, told in ((None, 500.0), (0.1, 50.0)):
        network = named("LTXVideoTransformer3DModel")
        network.config = types.SimpleNamespace(timestep_scale=scale)
        denoiser(network, scheduler)(noise(2, 3), HALF)
        assert network.given["timestep"].tolist() == pytest.approx([told] * 2)


def test_a_network_with_an_unknown_unit_is_refused() -> None:
    torch.manual_seed(0)
    network = diffusers.ZImageTransformer2DModel.__new__(
        diffusers.ZImageTransformer2DModel
    )
    nn.Module.__init__(network)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"timestep_scale: .* ZImage.*1.0 if .* 0.001"):
        denoiser(network, scheduler)
    denoiser(network, scheduler, timestep_scale=1.0)
    denoiser(network, ddim())


def test_the_units_are_those_of_the_pipelines() -> None:
    """The pipelines' own source: whose time do they divide?"""
    folder = Path(inspect.getfile(diffusers)).parent / "pipelines"
    divided: dict[str, set[bool]] = {}
    for path in folder.rglob("pipeline_*.py"):
        text = path.read_text(encoding="utf-8")
        if "FlowMatch" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.arg) and node.arg == "transformer":
                names = {
                    n.id
                    for n in ast.walk(node.annotation or node)
                    if isinstance(n, ast.Name)
                }
                halves = "timestep / 1000," in text
                for name in names:
                    divided.setdefault(name, set()).add(halves)
    known = {n: halves for n, halves in divided.items() if n in TOLD_T | TOLD_1000_T}
    assert len(known) >= 15
    for name, halves in known.items():
        if name in TOLD_1000_T:
            assert halves == {False}, name
    for name, halves in divided.items():
        if halves == {True}:
            assert name in TOLD_T, name


@pytest.mark.parametrize("betas", [BETAS, {}])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_table_that_ends_without_signal(name: str, betas: dict[str, Any]) -> None:
    options = {**betas, "rescale_betas_zero_snr": True}
    scheduler = getattr(diffusers, name)(**options, prediction_type="v_prediction")
    process = scheduler_process(scheduler)
    assert isinstance(process, artlib.VE)
    assert 4096 <= process.t_max < 1e5
    seen: list[float] = []

    class Network(nn.Module):
        def forward(
            self, sample: Tensor, timestep: Tensor, return_dict: bool = True
        ) -> tuple[Tensor]:
            seen.append(float(timestep[0]))
            return (-sample,)

    net = denoiser(Network(), scheduler)
    for step in (999, 998, 500):
        product = float(scheduler.alphas_cumprod[step])
        s = process.t_max if step == 999 else math.sqrt((1 - product) / product)
        x = s * torch.ones(1, 1, dtype=torch.float64)
        # v = -x / sqrt(1 + s^2): D = x / (1 + s^2) + s x / (1 + s^2)
        expected = x * (1 + s) / (1 + s**2)
        found = net(x, torch.tensor(s, dtype=torch.float64))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
        assert seen[-1] == pytest.approx(step, abs=0.01)


def test_a_table_that_ends_without_signal_is_refused_with_epsilon() -> None:
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"no signal is left .*v_prediction"):
        denoiser(nn.Identity(), scheduler)
    scheduler = diffusers.DDIMScheduler(trained_betas=[0.0, 0.1, 0.2])
    with pytest.raises(ValueError, match="are not positive, finite and ascending"):
        scheduler_process(scheduler)


# Whole pipelines.


@pytest.mark.parametrize(
    ("kind", "solver"),
    [("FlowMatchEuler", "euler"), ("FlowMatchHeun", "heun")],
)
def test_flux_end_to_end(kind: str, solver: str) -> None:
    scheduler = getattr(diffusers, f"{kind}DiscreteScheduler")(shift=3.0)
    pipe = diffusers.FluxPipeline(
        scheduler=scheduler,
        vae=small_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux(),
    )
    pipe.set_progress_bar_config(disable=True)
    words, pooled = noise(1, 5, 8, seed=1), noise(1, 8, seed=2)
    ids = pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
    net = denoiser(
        pipe.transformer,
        scheduler,
        condition={
            "encoder_hidden_states": words,
            "pooled_projections": pooled,
            "img_ids": ids,
            "txt_ids": torch.zeros(5, 3),
        },
    )
    x = noise(2, 16, 4)
    schedule = artlib.beta(net.process)
    schedule.to_diffusers(scheduler, 5)
    found = pipe(
        prompt_embeds=words,
        pooled_prompt_embeds=pooled,
        num_images_per_prompt=2,
        guidance_scale=1.0,
        height=8,
        width=8,
        latents=x,
        num_inference_steps=5,
        output_type="latent",
    ).images
    expected = ours(net, schedule, x, 5, solver)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def xl(scheduler: Any) -> Any:
    torch.manual_seed(1)
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=small_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=network,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("kind", "options", "solver"),
    [
        ("EulerDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}, "euler"),
        ("DPMSolverMultistep", {"use_karras_sigmas": True}, "dpmpp_2m"),
    ],
)
def test_stable_diffusion_xl_end_to_end(
    kind: str, options: dict[str, Any], solver: str
) -> None:
    pipe = xl(getattr(diffusers, f"{kind}Scheduler")(**BETAS, **options))
    words, empty = noise(1, 6, 12, seed=1), noise(1, 6, 12, seed=2)
    pooled, blank = noise(1, 10, seed=3), noise(1, 10, seed=4)
    sizes = torch.tensor([[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]])

    def given(text: Tensor, pooled: Tensor) -> dict[str, Any]:
        added = {"text_embeds": pooled, "time_ids": sizes}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}

    net = denoiser(
        pipe.unet,
        pipe.scheduler,
        condition=given(words, pooled),
        unconditional=given(empty, blank),
        guidance=3.0,
        guidance_rescale=0.5,
    )
    x = noise(2, 4, 8, 8)
    schedule = artlib.log_snr(net.process, pinned=False)
    schedule.to_diffusers(pipe.scheduler, 6)
    # A second pipeline of the same parts holds it too.
    second = diffusers.StableDiffusionXLPipeline(
        **pipe.components, add_watermarker=False
    )
    second.set_progress_bar_config(disable=True)
    for each in (pipe, second):
        found = each(
            prompt_embeds=words,
            negative_prompt_embeds=empty,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=blank,
            num_images_per_prompt=2,
            guidance_scale=3.0,
            guidance_rescale=0.5,
            height=8,
            width=8,
            latents=x,
            num_inference_steps=6,
            output_type="latent",
        ).images
        expected = ours(net, schedule, x, 6, solver)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
