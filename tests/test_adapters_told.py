"""A plan's told levels in the samplers of k-diffusion, EDM, ComfyUI: as we sample."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import mixture_16d
from torch import Tensor

import artlib
from artlib import adapters
from artlib.adapters import comfyui_node

F64 = torch.float64


def plan_of(process: artlib.Process, solver: str, K: int = 5) -> artlib.Plan:
    nodes = artlib.edm(process, pinned=False).grid(K)
    told = nodes[:-1] * torch.linspace(0.97, 0.75, K, dtype=F64)
    return artlib.Plan(process, nodes, told, solver)


def k_euler(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """sample_euler of k-diffusion, as its formula: sigma of shape [N]."""
    for t, s in pairwise(sigmas.double()):
        x = x + (s - t) / t * (x - model(x, t.expand(len(x))))
    return x


def k_dpmpp_2m(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """sample_dpmpp_2m, as its formula."""
    old, before = None, None
    for t, s in pairwise(sigmas.double()):
        denoised = model(x, t.expand(len(x)))
        h = (t / s).log()
        mixed = denoised
        if old is not None and s > 0:
            r = before / h
            mixed = (1 + 1 / (2 * r)) * denoised - old / (2 * r)
        x = s / t * x - torch.expm1(-h) * mixed
        old, before = denoised, h
    return x


@pytest.mark.parametrize(
    ("solver", "run"), [("euler", k_euler), ("dpmpp_2m", k_dpmpp_2m)]
)
@pytest.mark.parametrize("process", [artlib.VE(sigma_max=20.0), artlib.VP()])
def test_k_diffusion_samples_as_we_do(
    solver: str, run: Any, process: artlib.Process
) -> None:
    problem = mixture_16d(process, 6)
    flow, plan = problem.flow(), plan_of(process, solver)
    if solver == "euler" and isinstance(process, artlib.VP):
        with pytest.raises(artlib.ExportError, match=r"plan: euler.*to_ve"):
            adapters.told(plan, lambda x, sigma: x)
        return
    ours = artlib.sample(flow, problem.x_T, plan)

    def network(x: Tensor, sigma: Tensor, scale: float = 1.0) -> Tensor:
        t = process.inverse_noise_level(sigma[0])
        return scale * flow.denoise(process.alpha(t) * x, t)

    model = adapters.told(plan, network)
    assert model.sigmas.dtype == torch.float32
    start = problem.x_T / process.alpha(plan.nodes[0])
    found = run(model, start, model.sigmas)
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=2e-6)
    honest = artlib.Plan(process, plan.nodes, plan.nodes[:-1], solver)
    plain = run(network, start, model.sigmas)
    same = run(adapters.told(honest, network), start, model.sigmas)
    torch.testing.assert_close(same, plain, rtol=1e-5, atol=2e-6)
    assert (found - plain).norm() > 1e-2


def test_edm_networks_keep_their_labels_and_attributes() -> None:
    process = artlib.VE(sigma_max=20.0)
    plan = plan_of(process, "euler")

    class Network:
        sigma_min = 0.25

        def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
            return x * labels + sigma

    model = adapters.told(plan, Network())
    assert model.sigma_min == 0.25
    x = torch.ones(2, 3, dtype=F64)
    found = model(x, model.sigmas[2].double(), 2.0)
    torch.testing.assert_close(found, 2 * x + plan.told[2])
    with pytest.raises(ValueError, match=r"sigma: .*3\.3.*no node of the plan"):
        model(x, torch.tensor(3.3), 2.0)
    with pytest.raises(TypeError, match="plan: expected"):
        adapters.told(artlib.edm(process), Network())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected"):
        adapters.told(plan, 3)


def test_flow_matching_moves_the_states_too() -> None:
    process = artlib.RectifiedFlow(t_max=0.999)
    problem = mixture_16d(process, 6)
    flow, plan = problem.flow(), plan_of(process, "euler")
    ours = artlib.sample(flow, problem.x_T, plan)
    model = adapters.told(plan, lambda x, sigma: flow.denoise(x, sigma[0]))
    found = k_euler(model, problem.x_T, model.sigmas)
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=2e-6)


class EPS:
    """The host's name for sigmas that are noise per signal."""

    sigma_min, sigma_max = 0.002, 20.0


class CONST:
    """The host's name for flow matching."""

    sigma_min, sigma_max = 0.001, 1.0


class Patcher:
    """What of ComfyUI's MODEL the node uses."""

    def __init__(self, apply: Any, sampling: type = EPS) -> None:
        self.apply, self.model_options = apply, {}
        self.sampling = sampling

    def get_model_object(self, name: str) -> Any:
        return {"model_sampling": self.sampling()}[name]

    def clone(self) -> Patcher:
        twin = Patcher(self.apply, self.sampling)
        twin.model_options = dict(self.model_options)
        return twin

    def set_model_unet_function_wrapper(self, wrapper: Any) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        given = {"input": x, "timestep": sigma, "c": {}, "cond_or_uncond": [0]}
        wrapper = self.model_options.get("model_function_wrapper")
        return self.apply(x, sigma) if wrapper is None else wrapper(self.apply, given)


def test_the_node_of_comfyui_gives_a_told_model(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = artlib.VE(sigma_max=20.0)
    problem = mixture_16d(process, 6)
    flow, plan = problem.flow(), plan_of(process, "dpmpp_2m")
    plan.save(tmp_path / "p.json")
    monkeypatch.setattr(comfyui_node.ARTPlan, "FOLDER", tmp_path)
    assert comfyui_node.ARTPlan.INPUT_TYPES()["required"]["plan"] == (["p.json"],)
    model = Patcher(lambda x, sigma: flow.denoise(x, sigma[0]))
    seen = []

    def earlier(apply: Any, given: Any) -> Any:
        seen.append(float(given["timestep"][0]))
        return apply(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(earlier)
    patched, sigmas, solver = comfyui_node.ARTPlan().get_model(model, "p.json")
    assert solver == "dpmpp_2m"
    found = k_dpmpp_2m(patched, problem.x_T, sigmas)
    ours = artlib.sample(flow, problem.x_T, plan)
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=2e-6)
    assert seen == pytest.approx(plan.told.tolist(), rel=1e-6)
    assert model.model_options["model_function_wrapper"] is earlier
    with pytest.raises(ValueError, match=r"plan: expected the name of a file"):
        comfyui_node.ARTPlan().get_model(model, "q.json")


def test_plans_that_no_sampler_of_the_host_takes_are_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps, its coordinate and its range of noise have to be the plan's."""
    monkeypatch.setattr(comfyui_node.ARTPlan, "FOLDER", tmp_path)
    level, flow = artlib.VE(sigma_max=20.0), artlib.RectifiedFlow()
    on_flow = artlib.uniform(flow).grid(4)
    low = plan_of(level, "euler")
    small = torch.cat([low.nodes[:-2], torch.tensor([0.001], dtype=F64)])
    low = artlib.Plan(level, low.nodes, small, "euler")
    cases = [
        (plan_of(level, "unipc"), EPS, r"no sampler of ComfyUI takes the steps of uni"),
        (plan_of(artlib.VE(), "euler"), EPS, r"p.json visits sigmas from 80"),
        (low, EPS, r"down to 0.001, and the model knows 0.002"),
        (plan_of(level, "euler"), CONST, r"counts its sigmas as 'flow'"),
        (
            artlib.Plan(flow, on_flow, 0.9 * on_flow[:-1], "dpmpp_2m"),
            CONST,
            r"measures its steps in log\(sigma / alpha\)",
        ),
        (plan_of(level, "euler"), object, "not known what the sigmas"),
    ]
    for plan, sampling, message in cases:
        plan.save(tmp_path / "p.json")
        model = Patcher(lambda x, sigma: x, sampling)
        with pytest.raises(artlib.ExportError, match=message):
            comfyui_node.ARTPlan().get_model(model, "p.json")
        assert model.model_options == {}
    artlib.Plan(flow, on_flow, 0.9 * on_flow[:-1], "euler").save(tmp_path / "p.json")
    comfyui_node.ARTPlan().get_model(Patcher(lambda x, s: x, CONST), "p.json")
    with pytest.raises(TypeError, match="model: expected a MODEL"):
        comfyui_node.ARTPlan().get_model(object(), "p.json")


def test_multistep_in_flow_matching_is_refused() -> None:
    """k-diffusion's dpmpp_2m weighs by log t there, the plan's by log t / (1 - t)."""
    process = artlib.RectifiedFlow(t_max=0.99)
    grid = artlib.uniform(process).grid(5)
    problem = mixture_16d(process, 6)
    flow = problem.flow()
    ours = artlib.sample(flow, problem.x_T, grid, solver="dpmpp_2m")
    found = k_dpmpp_2m(lambda x, s: flow.denoise(x, s[0]), problem.x_T, grid)
    assert float((found - ours).norm() / ours.norm()) > 1e-3
    plan = artlib.Plan(process, grid, 0.9 * grid[:-1], "dpmpp_2m")
    with pytest.raises(artlib.ExportError, match=r"which in flow matching is not"):
        adapters.told(plan, lambda x, s: x)
    adapters.told(plan, lambda x, s: x, coordinate="level")
