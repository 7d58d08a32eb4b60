"""The node within a small ComfyUI: loading, links, caching, models, sampling.

`Host` does with a node what ComfyUI's own execution does, no more: it imports the
folder of a custom node, checks widgets against what the node declares, keeps results by
the signature of inputs, links and IS_CHANGED (which is asked with None for what is
linked, and whose failure means "changed"), and hands over what is linked when it runs.
"""

import ast
import importlib.util
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import artlib
from artlib.adapters import comfyui

LATENT = artlib.VE(0.02916, 14.6146)


class EPS:
    def denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - sigma * output


class V_PREDICTION(EPS):
    pass


class CONST:
    def denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - sigma * output


class IMG_TO_IMG(EPS):
    pass


class ModelSamplingDiscrete(torch.nn.Module):
    """Sigmas of a table, as tensors of float32, and nothing below or above."""

    def __init__(self, low: float = 0.02916, high: float = 14.6146) -> None:
        super().__init__()
        self.low, self.high = low, high

    @property
    def sigma_min(self) -> Tensor:
        return torch.tensor(self.low)

    @property
    def sigma_max(self) -> Tensor:
        return torch.tensor(self.high)


class Model:
    """A MODEL: its sampling is a class made of a table and a prediction."""

    def __init__(self, prediction: type, **limits: float) -> None:
        kind = type("ModelSampling", (ModelSamplingDiscrete, prediction), {})
        self.sampling = kind(**limits)

    def get_model_object(self, name: str) -> Any:
        return {"model_sampling": self.sampling}[name]


class Host:
    """What of ComfyUI's execution a node meets."""

    def __init__(self, folder: Path) -> None:
        spec = importlib.util.spec_from_file_location(
            "custom_nodes_art", folder / "__init__.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.kinds = module.NODE_CLASS_MAPPINGS
        self.cache: dict[Any, Any] = {}
        self.ran = 0

    def signature(self, kind: Any, inputs: dict[str, Any]) -> Any:
        links = {k for k, v in inputs.items() if isinstance(v, list)}
        known = {k: None if k in links else v for k, v in inputs.items()}
        try:
            changed = kind.IS_CHANGED(**known)
        except Exception:
            changed = math.nan
        return changed, *((k, str(v)) for k, v in sorted(inputs.items()))

    def run(self, name: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> Any:
        """Run a node; [node, socket] in the inputs is a link into the outputs."""
        kind = self.kinds[name]
        declared = kind.INPUT_TYPES()
        for key, (what, *more) in declared["required"].items():
            value = inputs[key]  # a required input may not be missing
            if isinstance(value, list):
                continue
            if isinstance(what, list):
                assert value in what, f"{key}: {value} not in {what}"
            else:
                value = {"INT": int, "FLOAT": float}[what](value)
                assert more[0]["min"] <= value <= more[0]["max"]
        for key in inputs:
            assert key in {**declared["required"], **declared.get("optional", {})}
        key = self.signature(kind, inputs)
        if key not in self.cache:
            given = {
                k: outputs[v[0]] if isinstance(v, list) else v
                for k, v in inputs.items()
            }
            result = getattr(kind(), kind.FUNCTION)(**given)
            assert isinstance(result, tuple)
            assert len(result) == len(kind.RETURN_TYPES)
            self.cache[key] = result
            self.ran += 1
        return self.cache[key]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    comfyui.install(artlib.kl_optimal(LATENT), tmp_path / "art", "sd")
    comfyui.install(artlib.beta(artlib.RectifiedFlow()), tmp_path / "art", "flow")
    return tmp_path / "art"


WIDGETS = {"steps": 6, "denoise": 1.0, "coordinate": "of the schedule"}


def sigmas(host: Host, model: Any = None, **inputs: Any) -> Tensor:
    link = {} if model is None else {"model": ["loader", 0]}
    asked = {**WIDGETS, **link, **inputs}
    (found,) = host.run("ARTSigmas", asked, {"loader": model})
    return found


def test_the_file_imports_public_names_only() -> None:
    """And nothing but artlib, torch and what Python brings."""
    source = Path(comfyui.comfyui_node.__file__).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert {a.name for a in node.names} <= sys.stdlib_module_names
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            root, *rest = str(node.module).split(".")
            assert root in {"artlib", "torch", *sys.stdlib_module_names}
            if root == "artlib":
                module = importlib.import_module(str(node.module))
                assert not any(part.startswith("_") for part in rest)
                assert {a.name for a in node.names} <= set(module.__all__)


def test_it_runs_without_diffusers_and_matplotlib(folder: Path) -> None:
    program = (
        "import sys, runpy\n"
        "for name in ('diffusers', 'transformers', 'matplotlib', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
        f"node = runpy.run_path({str(folder / '__init__.py')!r})\n"
        "print(node['ARTSigmas']().get_sigmas('sd.json', 3)[0].tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.stderr == ""
    expected = artlib.kl_optimal(LATENT).to_k_diffusion(3)
    assert torch.equal(torch.tensor(ast.literal_eval(done.stdout)), expected)


def test_sigmas_follow_denoise_as_the_hosts_own_schedulers_do(folder: Path) -> None:
    host, schedule = Host(folder), artlib.kl_optimal(LATENT)
    for steps, share in ((6, 1.0), (6, 0.5), (7, 0.3), (10, 0.1), (1, 0.01)):
        total = int(steps / share + 1e-9)
        found = sigmas(host, schedule="sd.json", steps=steps, denoise=share)
        assert torch.equal(found, schedule.to_k_diffusion(total)[-(steps + 1) :])
        assert found.device.type == "cpu"
        assert found.dtype == torch.float32
    assert sigmas(host, schedule="sd.json", denoise=0.0).shape == (0,)


def test_results_are_kept_until_something_changes(folder: Path) -> None:
    host = Host(folder)
    model = Model(EPS)
    for _ in range(2):
        first = sigmas(host, model, schedule="sd.json")
    assert host.ran == 1
    sigmas(host, model, schedule="sd.json", steps=7)
    assert host.ran == 2
    comfyui.install(artlib.kl_optimal(LATENT), folder, "sd")  # the same
    assert sigmas(host, model, schedule="sd.json") is first
    comfyui.install(artlib.log_snr(LATENT), folder, "sd")
    second = sigmas(host, model, schedule="sd.json")
    assert host.ran == 3
    assert torch.equal(second, artlib.log_snr(LATENT).to_k_diffusion(6))
    # The name may come from another node: then any of the files counts.
    link = {"schedule": ["name", 0]}

    def linked() -> Tensor:
        outputs = {"name": "sd.json"}
        (found,) = host.run("ARTSigmas", {**WIDGETS, **link}, outputs)
        return found

    assert torch.equal(linked(), second)
    assert host.ran == 4
    linked()
    assert host.ran == 4
    comfyui.install(artlib.kl_optimal(LATENT), folder, "sd")
    assert torch.equal(linked(), first)
    assert host.ran == 5


def test_plans_and_schedules_have_lists_of_their_own(folder: Path) -> None:
    schedule = artlib.kl_optimal(LATENT)
    comfyui.install(artlib.Plan.honest(schedule, 4, solver="euler"), folder, "four")
    kinds = Host(folder).kinds
    assert kinds["ARTPlan"].INPUT_TYPES()["required"]["plan"] == (["four.json"],)
    asked = kinds["ARTSigmas"].INPUT_TYPES()["required"]
    assert asked["schedule"] == (["flow.json", "sd.json"],)
    # A result is kept by the plan's content; by that of all where it is not known.
    first = kinds["ARTPlan"].IS_CHANGED(model=None, plan="four.json")
    linked = kinds["ARTPlan"].IS_CHANGED(model=None, plan=None)
    assert first == kinds["ARTPlan"].IS_CHANGED(plan="four.json") != linked
    assert kinds["ARTPlan"].IS_CHANGED(plan="sd.json") == "missing"
    comfyui.install(artlib.Plan.honest(schedule, 5, solver="euler"), folder, "four")
    assert kinds["ARTPlan"].IS_CHANGED(plan="four.json") != first
    assert kinds["ARTPlan"].IS_CHANGED() != linked


@pytest.mark.parametrize("prediction", [EPS, V_PREDICTION, CONST])
def test_the_coordinate_is_the_models(folder: Path, prediction: type) -> None:
    host = Host(folder)
    if prediction is CONST:
        model = Model(CONST, low=0.003, high=1.0)
        schedule = artlib.kl_optimal(LATENT)
        found = sigmas(host, model, schedule="sd.json")
        level = schedule.grid(6)
        wanted = (level / (1 + level)).float()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    else:
        model = Model(prediction, low=0.02916, high=14.6146)
        part = artlib.RectifiedFlow(t_min=0.03, t_max=0.93)
        schedule = artlib.beta(part)
        comfyui.install(schedule, folder, "part")
        found = sigmas(host, model, schedule="part.json")
        t = schedule.grid(6)
        torch.testing.assert_close(found, (t / (1 - t)).float(), rtol=1e-6, atol=0)


def test_it_samples_as_artlib_does(folder: Path) -> None:
    """Euler's loop over the sigmas, with the host's way to a denoised sample."""
    host, target = Host(folder), artlib.Gaussian([0.5, -1.0], torch.eye(2) / 4)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    for process, name, model in (
        (LATENT, "sd.json", Model(EPS)),
        (artlib.RectifiedFlow(), "flow.json", Model(CONST, low=0.003, high=1.0)),
    ):
        exact = target.denoiser(process)
        steps = sigmas(host, model, schedule=name)
        state = x * steps[0]
        for now, after in itertools.pairwise(steps):
            output = (state - exact(state, now)) / now
            denoised = model.sampling.denoised(now, output, state)
            state = state + (state - denoised) / now * (after - now)
        schedule = artlib.Schedule.load(folder / name)
        grid = schedule.grid(6)
        flow = artlib.ProbabilityFlow(process, exact)
        expected = artlib.sample(flow, x * float(grid[0]), grid)
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (Model(EPS, high=10.0), {}, r"visits sigmas from 14.6146 .* knows 0.02916 to 10"),
    (Model(EPS, low=0.5), {}, r"down to .* and the model knows 0.5 to 14.6"),
    (Model(CONST, high=0.9), {}, r"visits sigmas from 0.93.* knows 0 to 0.9"),
    (Model(EPS), {"coordinate": "flow"}, "'flow' is not that of the model"),
    (Model(CONST), {"coordinate": "sigma / alpha"}, "is not that of the model"),
    (Model(EPS), {"schedule": "flow.json"}, "no signal is left at t_max"),
    (Model(IMG_TO_IMG), {}, "not known what the sigmas of ModelSampling,"),
    (Model(object), {}, "not known what the sigmas"),
    (object(), {}, "model: expected a MODEL of ComfyUI, got object"),
]


@pytest.mark.parametrize(("model", "inputs", "message"), REFUSED)
def test_models_that_do_not_fit_are_refused(
    folder: Path, model: Any, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises((artlib.ExportError, TypeError), match=message):
        sigmas(Host(folder), model, **{"schedule": "sd.json", **inputs})


def test_a_tail_within_the_range_is_enough(folder: Path) -> None:
    """Image-to-image may stay where the model knows the noise."""
    host, model = Host(folder), Model(EPS, high=10.0)
    found = sigmas(host, model, schedule="sd.json", denoise=0.5)
    assert float(found[0]) < 10.0
    # Round-off is no noise of its own.
    sigmas(host, Model(EPS, high=14.6146 * (1 - 5e-5)), schedule="sd.json")
    # A flow's list may go below the host's table, which has no part in it.
    comfyui.install(artlib.uniform(artlib.RectifiedFlow()), folder, "fine")
    many = sigmas(host, Model(CONST, low=0.3, high=1.0), schedule="fine.json", steps=50)
    assert float(many[-2]) == pytest.approx(0.02)
