"""The cell of chapter 14 that only Colab runs, run here with a small pipeline."""

import sys
import time
import types
from typing import Any

import pytest
import torch
from run_chapter import code_cells, find, run_cell
from test_adapters_pipelines import BETAS, stable_diffusion
from torch import Tensor

import artlib
from artlib import adapters

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
