"""The nodes inside ComfyUI's own execution and samplers, on small models.

It needs a folder of ComfyUI's sources, with what its ``requirements.txt`` asks for,
and is skipped elsewhere (`test_comfyui` stands in)::

    ARTLIB_COMFYUI=path/to/ComfyUI pytest tests/test_comfyui_host.py

Its modules have names like ``nodes`` and ``utils``, so it is run alone. Tried on the
sources of autumn 2024, the oldest ones with ``comfy_execution``.
"""

import importlib
import itertools
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import artlib
from artlib.adapters import comfyui

SOURCES = os.environ.get("ARTLIB_COMFYUI")
pytestmark = [
    pytest.mark.skipif(SOURCES is None, reason="ARTLIB_COMFYUI names no ComfyUI"),
    pytest.mark.filterwarnings("ignore"),  # of the host and what it imports
]
SHAPE = (3, 4, 4, 4)
K = 6


class Exact(torch.nn.Module):
    """A network of the host, exact for one normal law that its context moves.

    It is told the host's timestep, and answers with noise, v or velocity. Latents keep
    four channels; the context's first number is the mean.
    """

    def __init__(self, kind: str, device: Any = None, operations: Any = None) -> None:
        super().__init__()
        self.kind, self.dtype = kind, torch.float32
        self.asked: list[float] = []
        self.sampling: Any = None

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, **_: Any
    ) -> Tensor:
        self.asked.append(float(timesteps[0]))
        shape = (-1, 1, 1, 1)
        mean = context[:, 0, 0].double().reshape(shape)
        x = x.double()
        if self.kind in ("FLUX", "FLOW"):
            scale = 1000.0 if self.kind == "FLOW" else 1.0
            t = (timesteps.double() / scale).reshape(shape)
            return ((x - denoised(x, t, 1 - t, mean)) / t).float()
        logs = self.sampling.log_sigmas.double()
        s = logs[timesteps.long()].exp().reshape(shape)
        root = (1 + s * s).sqrt()
        y = x * root
        clean = denoised(y, s, torch.ones_like(s), mean)
        noise = (y - clean) / s
        if self.kind == "V_PREDICTION":
            return ((noise - s * clean) / root).float()
        return noise.float()


def denoised(x: Tensor, sigma: Tensor, alpha: Tensor, mean: Tensor) -> Tensor:
    """The mean of the data given x, for N(mean, 0.49) and some of a cubic in x."""
    share = alpha * 0.49 / (0.49 * alpha**2 + sigma**2)
    return mean + share * (x - alpha * mean) + 0.1 * torch.tanh(x / (alpha + sigma))


class Host:
    """ComfyUI: its nodes, its execution, and a graph around the node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sys.path.insert(0, str(SOURCES))
        args = importlib.import_module("comfy.cli_args").args
        args.cpu = True
        self.nodes: Any = importlib.import_module("nodes")
        extra = importlib.import_module("comfy_extras.nodes_custom_sampler")
        self.execution: Any = importlib.import_module("execution")
        self.base: Any = importlib.import_module("comfy.model_base")
        self.patcher: Any = importlib.import_module("comfy.model_patcher")
        self.formats: Any = importlib.import_module("comfy.latent_formats")
        self.nodes.NODE_CLASS_MAPPINGS.update(extra.NODE_CLASS_MAPPINGS)
        assert self.nodes.load_custom_node(str(folder))
        self.model: Any = None
        self.which = 0
        self.ran: list[str] = []
        self._own_nodes()
        for name in comfyui.NODE_CLASS_MAPPINGS:
            self._count(name)
        server = types.SimpleNamespace(
            client_id=None, last_node_id=None, send_sync=lambda *a: None
        )
        self.executor = self.execution.PromptExecutor(server)

    def _own_nodes(self) -> None:
        host = self

        class Loader:
            RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT")
            FUNCTION = "load"
            CATEGORY = "test"

            @classmethod
            def INPUT_TYPES(cls) -> Any:
                return {"required": {"which": ("INT", {"default": 0})}}

            def load(self, which: int) -> Any:
                words = [torch.full((1, 2, 3), v) for v in (0.8, -0.3)]
                latent = {"samples": torch.zeros(SHAPE)}
                return host.model, [[words[0], {}]], [[words[1], {}]], latent

        class Sink:
            RETURN_TYPES = ()
            FUNCTION = "keep"
            CATEGORY = "test"
            OUTPUT_NODE = True

            @classmethod
            def INPUT_TYPES(cls) -> Any:
                return {"required": {"latent": ("LATENT",)}}

            def keep(self, latent: Any) -> Any:
                return {}

        self.nodes.NODE_CLASS_MAPPINGS |= {"TestLoader": Loader, "TestSink": Sink}

    def _count(self, name: str) -> None:
        kind, host = self.nodes.NODE_CLASS_MAPPINGS[name], self
        own: Callable[..., Any] = getattr(kind, kind.FUNCTION)

        def counted(self: Any, **inputs: Any) -> Any:
            host.ran.append(name)
            return own(self, **inputs)

        setattr(kind, kind.FUNCTION, counted)

    def make(self, kind: str) -> Exact:
        config = types.SimpleNamespace(
            unet_config={"kind": kind},
            latent_format=self.formats.LatentFormat(),
            manual_cast_dtype=None,
            custom_operations=object(),
            optimizations={},
            sampling_settings={},
            memory_usage_factor=1.0,
        )
        kind_of = getattr(self.base.ModelType, kind)
        cpu = torch.device("cpu")
        base = self.base.BaseModel(config, kind_of, device=cpu, unet_model=Exact)
        base.diffusion_model.sampling = base.model_sampling
        self.model = self.patcher.ModelPatcher(base, cpu, cpu)
        self.which += 1
        network: Exact = base.diffusion_model
        return network

    def run(self, node: dict[str, Any], sampler: str, *, wired: bool = True) -> Tensor:
        """Run a graph; whatever fails there is raised."""
        plan = node["class_type"] == "ARTPlan"
        inputs = {**node["inputs"], **({"model": ["1", 0]} if wired or plan else {})}
        prompt = {
            "1": {"class_type": "TestLoader", "inputs": {"which": self.which}},
            "2": {"class_type": node["class_type"], "inputs": inputs},
            "3": {
                "class_type": "KSamplerSelect",
                "inputs": {"sampler_name": sampler},
            },
            "4": {
                "class_type": "SamplerCustom",
                "inputs": {
                    "model": ["2", 0] if plan else ["1", 0],
                    "add_noise": True,
                    "noise_seed": 7,
                    "cfg": 3.0,
                    "positive": ["1", 1],
                    "negative": ["1", 2],
                    "sampler": ["3", 0],
                    "sigmas": ["2", 1 if plan else 0],
                    "latent_image": ["1", 3],
                },
            },
            "5": {"class_type": "TestSink", "inputs": {"latent": ["4", 0]}},
        }
        valid, error, outputs, errors = self.execution.validate_prompt(prompt)
        if not valid:
            raise AssertionError(str((error, errors)))
        self.executor.execute(prompt, "test", {}, outputs)
        for event, data in self.executor.status_messages:
            if event == "execution_error":
                raise RuntimeError(data["exception_message"])
        found: Tensor = self.executor.caches.outputs.get("4")[0][0]["samples"]
        return found

    def denoiser(self, cfg: float) -> Callable[[Tensor, Tensor], Tensor]:
        """D(x, sigma) of the model with guidance, by the host's own ``apply_model``."""

        def one(x: Tensor, sigma: Tensor, mean: float) -> Tensor:
            words = torch.full((len(x), 2, 3), mean)
            level = sigma.float().expand(len(x))
            answer: Tensor = self.model.model.apply_model(
                x.float(), level, c_crossattn=words
            )
            return answer.to(x.dtype)

        def both(x: Tensor, sigma: Tensor) -> Tensor:
            empty = one(x, sigma, -0.3)
            return empty + cfg * (one(x, sigma, 0.8) - empty)

        return both


def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.manual_seed(7))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    folder = tmp_path_factory.mktemp("custom_nodes") / "artlib_node"
    comfyui.install(artlib.edm(artlib.VE()), folder, "other")
    return Host(folder)


def own_process(host: Host) -> artlib.Process:
    sampling = host.model.get_model_object("model_sampling")
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    return artlib.RectifiedFlow() if high == 1 else artlib.VE(low, high)


def started(process: artlib.Process) -> Tensor:
    """The host's first state: of size sqrt(1 + sigma^2) at a model's highest level."""
    t = process.t_max
    return noise().double() * ((1 + t * t) ** 0.5 if t > 1 else t)


def sigmas_node(schedule: str, **inputs: Any) -> dict[str, Any]:
    widgets = {"steps": K, "denoise": 1.0, "coordinate": "of the schedule"}
    inputs = {"schedule": schedule, **widgets, **inputs}
    return {"class_type": "ARTSigmas", "inputs": inputs}


def plan_node(plan: str) -> dict[str, Any]:
    return {"class_type": "ARTPlan", "inputs": {"plan": plan}}


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


KINDS = ["EPS", "V_PREDICTION", "FLUX", "FLOW"]


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_hosts_samplers_are_ours(host: Host, kind: str, solver: str) -> None:
    host.make(kind)
    process = own_process(host)
    flow = artlib.ProbabilityFlow(process, host.denoiser(3.0))
    schedule = artlib.beta(process) if kind[0] == "F" else artlib.kl_optimal(process)
    comfyui.install(schedule, host.folder, "own")
    found = host.run(sigmas_node("own.json"), solver)
    ours = artlib.sample(flow, started(process), schedule.grid(K), solver=solver)
    if solver == "dpmpp_2m" and kind[0] == "F":  # steps in log(sigma): another solver
        assert 1e-3 < apart(found, ours) < 0.2
    else:
        assert apart(found, ours) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_is_told(host: Host, kind: str) -> None:
    network = host.make(kind)
    process = own_process(host)
    flow = artlib.ProbabilityFlow(process, host.denoiser(3.0))
    schedule = artlib.beta(process) if kind[0] == "F" else artlib.kl_optimal(process)
    nodes = schedule.grid(K)
    told = nodes[:-1].clone()
    told[1:] *= 0.9
    for solver in ("euler", "dpmpp_2m"):
        plan = artlib.Plan(process, nodes, told, solver)
        comfyui.install(plan, host.folder, "plan")
        if solver == "dpmpp_2m" and kind[0] == "F":
            with pytest.raises(RuntimeError, match="measures its steps in log"):
                host.run(plan_node("plan.json"), solver)
            continue
        network.asked.clear()
        found = host.run(plan_node("plan.json"), solver)
        calls = len(network.asked)
        assert calls == K  # both prompts in one batch
        assert apart(found, artlib.sample(flow, started(process), plan)) < 1e-6
        honest = artlib.sample(flow, started(process), nodes, solver=solver)
        assert apart(found, honest) > 1e-2
        # The model itself is as it was.
        comfyui.install(schedule, host.folder, "own")
        found = host.run(sigmas_node("own.json"), solver)
        assert apart(found, honest) < 1e-6


def test_the_tail_is_what_is_left_of_the_way(host: Host) -> None:
    host.make("EPS")
    process = own_process(host)
    schedule = artlib.kl_optimal(process)
    comfyui.install(schedule, host.folder, "own")
    found = host.run(sigmas_node("own.json", denoise=0.5), "euler")
    grid = schedule.grid(2 * K)[K:]
    x, exact = noise().double() * float(grid[0]), host.denoiser(3.0)
    for now, after in itertools.pairwise(grid):
        x = x + (after - now) / now * (x - exact(x, now))
    assert apart(found, x) < 1e-6


def test_what_does_not_fit_is_refused_in_the_graph(host: Host) -> None:
    host.make("EPS")
    with pytest.raises(RuntimeError, match="visits sigmas from 80"):
        host.run(sigmas_node("other.json"), "euler")
    host.run(sigmas_node("other.json"), "euler", wired=False)  # as the node says
    with pytest.raises(AssertionError, match="not in list"):
        host.run(sigmas_node("none.json"), "euler")
    nodes = artlib.edm(artlib.VE()).grid(K)
    comfyui.install(
        artlib.Plan(artlib.VE(), nodes, 0.9 * nodes[:-1], "euler"), host.folder, "far"
    )
    with pytest.raises(RuntimeError, match=r"plan: far.json visits sigmas from 80"):
        host.run(plan_node("far.json"), "euler")
    with pytest.raises(AssertionError, match="not in list"):
        host.run(sigmas_node("far.json"), "euler")  # a plan is no schedule


def test_results_are_kept_until_a_file_changes(host: Host) -> None:
    host.make("EPS")
    process = own_process(host)
    first, second = artlib.kl_optimal(process), artlib.log_snr(process)
    for make in (
        lambda s: (s, sigmas_node("kept.json"), "ARTSigmas"),
        lambda s: (
            artlib.Plan.honest(s, K, solver="euler"),
            plan_node("keptplan.json"),
            "ARTPlan",
        ),
    ):
        results = []
        for schedule, runs in ((first, 1), (first, 1), (second, 2), (second, 2)):
            what, node, name = make(schedule)
            key = "schedule" if name == "ARTSigmas" else "plan"
            comfyui.install(what, host.folder, node["inputs"][key].split(".")[0])
            if not results:
                host.ran.clear()
            results.append(host.run(node, "euler"))
            assert host.ran == [name] * runs
        assert results[0] is results[1]
        assert apart(results[2], results[0].double()) > 1e-3
