"""What chapter 14 shows and does not run: its tabs, and the cell for Colab.

Run here with small networks in the place of a reader's.
"""

import itertools
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from pipelines import noise
from run_chapter import code_cells, find, run_cell
from safetensors.torch import load_file
from test_adapters_pipelines import BETAS, stable_diffusion, stable_diffusion_3
from test_adapters_sigmas import EDMNetwork
from torch import Tensor

import artlib
from artlib import adapters
from artlib.cli.parser import main

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
CELLS = code_cells(find("14"))
(FIRST,) = (i for i, s in enumerate(CELLS) if "StableDiffusionPipeline" in s)
# The pipeline, the schedule, and both judged.
CELL = "\n\n\n".join(CELLS[FIRST : FIRST + 3])


def quick(source: str) -> str:
    """The cell, with fewer paths and times and a coarser reference."""
    less = {
        "range(16)": "range(2)",
        "points=24": "points=7",
        "images(100,": "images(9,",
    }
    for old, new in less.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    return source


def scope(device: object) -> dict[str, Any]:
    return {
        "EulerDiscreteScheduler": diffusers.EulerDiscreteScheduler,
        "adapters": adapters,
        "artlib": artlib,
        "device": device,
        "sys": sys,
        "time": time,
        "torch": torch,
    }


def on_colab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))


def test_noise_and_prompts_are_judged_that_were_not_learned_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1)
    pipe = stable_diffusion(scheduler)
    learned: list[Tensor] = []
    judged: list[Tensor] = []
    prompts: list[tuple[str, ...]] = []

    def encode(words: list[str], *_: object, **__: object) -> tuple[Tensor, Tensor]:
        prompts.append(tuple(words))
        rng = torch.Generator().manual_seed(len(prompts[-1][0]))
        return torch.randn(4, 6, 12, generator=rng), torch.zeros(4, 6, 12)

    table, call = artlib.stiffness_table, type(pipe).__call__

    def watched_table(flow: Any, x_T: Tensor, **options: Any) -> Any:
        learned.append(x_T / flow.process.t_max)
        return table(flow, x_T, **options)

    def watched_call(self: Any, *words: Any, latents: Tensor, **options: Any) -> Any:
        judged.append(latents)
        return call(self, *words, latents=latents, **options)

    monkeypatch.setattr(pipe, "encode_prompt", encode)
    monkeypatch.setattr(artlib, "stiffness_table", watched_table)
    monkeypatch.setattr(type(pipe), "__call__", watched_call)
    monkeypatch.setattr(type(pipe), "from_pretrained", lambda *_, **__: pipe)
    on_colab(monkeypatch)  # after the import of what looks where it is
    # A CPU in the place of the GPU that the cell asks for.
    asked = CELL.replace('device.type == "cuda"', 'device.type == "cpu"')
    assert asked != CELL
    run_cell(quick(asked), "cell", scope(torch.device("cpu")))
    old, new = (torch.cat(x).flatten(1).double() for x in (learned, judged))
    assert len(old) == 8
    assert torch.cdist(old, new).min() > 1
    assert torch.pdist(old).min() > 1, "no path counts twice"
    known, *others = set(prompts)
    (other,) = others
    assert not set(known) & set(other)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("8 paths in ")
    assert float(lines[1].removeprefix("cost on paths it was not learned from: ")) >= 1
    judged_on = [line.split(",")[0] for line in lines[2:]]
    assert judged_on == ["its own", "ART"]


def test_without_a_gpu_a_sentence_says_what_to_choose(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_colab(monkeypatch)
    run_cell(CELL, "cell", scope(torch.device("cpu")))
    assert "Change runtime type" in capsys.readouterr().out


def test_elsewhere_nothing_is_downloaded(capsys: pytest.CaptureFixture[str]) -> None:
    run_cell(CELL, "cell", scope(torch.device("cuda")))
    assert capsys.readouterr().out == ""


# The tabs, one for each framework: every block runs as it stands.


def tabs() -> dict[str, list[tuple[str, str]]]:
    """Label -> blocks in order, each a language and its text."""
    cells = nbformat.read(find("14"), as_version=4).cells
    (text,) = (c.source for c in cells if "{tab-set}" in c.source)
    found: dict[str, list[tuple[str, str]]] = {}
    for part in text.split("::::{tab-item} ")[1:]:
        label, _, body = part.partition("\n")
        body = body.partition("\n::::")[0]
        found[label] = re.findall(r"```(\w+)\n(.*?)```", body, re.DOTALL)
    return found


TABS = tabs()


def run_blocks(label: str, names: dict[str, Any]) -> dict[str, Any]:
    for language, code in TABS[label]:
        assert language == "python"
        exec(compile(code, label, "exec"), names)
    return names


def given() -> dict[str, Any]:
    """What stands above: the packages, prompts, and a schedule."""
    schedule = artlib.kl_optimal(artlib.VE(0.03, 14.0))
    return {
        "artlib": artlib,
        "torch": torch,
        "text": noise(2, 6, 12, seed=1),
        "empty": noise(2, 6, 12, seed=2),
        "schedule": schedule,
        "plan": artlib.Plan.honest(schedule, 4, solver="euler"),
    }


def small_pipe() -> Any:
    pipe = stable_diffusion(diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1))
    pipe.set_progress_bar_config(disable=True)
    pair = noise(1, 6, 12, seed=1), noise(1, 6, 12, seed=2)
    pipe.encode_prompt = lambda *_, **__: pair
    return pipe


def test_all_tabs_are_run_here() -> None:
    assert list(TABS) == [
        "diffusers",
        "flow matching",
        "a plan",
        "ComfyUI",
        "k-diffusion",
        "EDM",
        "your network",
        "no program",
        "the Hub",
    ]


def test_tab_of_diffusers() -> None:
    names = run_blocks("diffusers", {**given(), "pipe": small_pipe()})
    assert len(names["images"]) == 1
    levels = names["schedule"].grid(10)
    assert names["given"]["sigmas"] == pytest.approx(levels.tolist())
    names["pipe"].scheduler.set_timesteps(10)
    assert not torch.allclose(names["pipe"].scheduler.sigmas.double(), levels)


def test_tab_of_flow_matching() -> None:
    pipe = stable_diffusion_3(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.vae.register_to_config(shift_factor=0.0)
    pipe.set_progress_bar_config(disable=True)
    words = noise(1, 6, 12, seed=1), noise(1, 6, 12, seed=2)
    pooled = noise(1, 10, seed=3), noise(1, 10, seed=4)
    pipe.encode_prompt = lambda *_, **__: (*words, *pooled)
    names = {**given(), "pipe": pipe, "pooled": noise(2, 10, seed=3)}
    names["no_pooled"] = noise(2, 10, seed=4)
    run_blocks("flow matching", names)
    assert len(names["images"]) == 1
    levels = names["schedule"].grid(10)
    assert torch.allclose(pipe.scheduler.sigmas.double(), levels, rtol=1e-5)


def test_tab_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = small_pipe()
    process = adapters.diffusers.scheduler_process(pipe.scheduler)
    nodes = artlib.kl_optimal(process).grid(4)
    artlib.Plan(process, nodes, 0.9 * nodes[:-1], "dpmpp_2m").save(tmp_path / "p.json")
    monkeypatch.chdir(tmp_path)
    names = run_blocks("a plan", {**given(), "pipe": pipe})
    assert len(names["images"]) == 1
    assert torch.allclose(pipe.scheduler.sigmas.double(), nodes, rtol=1e-5)


def test_tab_of_k_diffusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sampler, as the formula of Euler's steps."""

    def sample_euler(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        for now, after in itertools.pairwise(sigmas):
            denoised = model(x, now * x.new_ones(len(x)))
            x = x + (after - now) / now * (x - denoised)
        return x

    module = types.ModuleType("k_diffusion.sampling")
    module.sample_euler = sample_euler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "k_diffusion", types.ModuleType("k_diffusion"))
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", module)
    names = given()
    process = names["schedule"].process
    exact = artlib.Gaussian([0.5, -1.0], torch.eye(2) / 4).denoiser(process)
    names["noise"] = noise(3, 2)
    names["model"] = lambda x, sigma: exact(x, sigma[0])
    run_blocks("k-diffusion", names)
    flow = artlib.ProbabilityFlow(process, exact)
    ours = artlib.sample(flow, names["noise"] * process.t_max, names["plan"])
    torch.testing.assert_close(names["x"], ours, rtol=1e-4, atol=1e-4)


def test_tab_of_edm() -> None:
    names = {**given(), "network": EDMNetwork(), "labels": torch.eye(3)}
    names["noise"] = noise(3, 2)
    names = run_blocks("EDM", names)
    assert names["images"].shape == (3, 2)


def test_tab_of_your_network() -> None:
    names = {**given(), "noise": noise(3, 2, 4, 4), "labels": torch.tensor([0, 1, 2])}
    names["no_labels"] = torch.tensor([3])
    names["alphas_cumprod"] = diffusers.DDPMScheduler(**BETAS).alphas_cumprod
    names["network"] = lambda x, step, label: 0.1 * x + label[:, None, None, None]
    names = run_blocks("your network", names)
    assert names["images"].shape == (3, 2, 4, 4)


def test_tabs_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mymodule.py").write_text(
        "import artlib\n\n\ndef make():\n"
        "    process = artlib.VE(0.01, 30.0)\n"
        "    exact = artlib.Gaussian([0.5, -1.0], [[0.3, 0.0], [0.0, 1.0]])\n"
        "    net = exact.denoiser(process)\n"
        "    net.process, net.sample_shape = process, (2,)\n"
        "    return net\n"
    )
    for label in ("no program", "ComfyUI"):
        ((language, lines),) = TABS[label]
        assert language == "console"
        for line in lines.splitlines():
            program, *arguments = line.split()
            assert program == "artlib"
            assert main(arguments) == 0, capsys.readouterr().err
        schedule = artlib.Schedule.load(tmp_path / "s.json")
        artlib.Plan.honest(schedule, 4, solver="euler").save(tmp_path / "p.json")
    assert len(load_file(tmp_path / "x.safetensors")["x_0"]) == 16
    node = tmp_path / "ComfyUI" / "custom_nodes" / "artlib_node"
    assert sorted(path.name for path in node.glob("*.json")) == ["p.json", "s.json"]


def test_tab_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = given()
    names = run_blocks("the Hub", dict(before))
    assert names["schedule"] == before["schedule"]
    assert names["plan"].to_json() == before["plan"].to_json()
