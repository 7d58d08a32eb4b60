"""Schedules in real schedulers of diffusers: what they visit is what was asked for.

A model that records is run through each scheduler's own loop. On a Gaussian its
denoiser is exact, so the loop's result can be compared with `artlib.sample` too.
"""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import artlib
from artlib.adapters import diffusers as adapter
from artlib.adapters.diffusers.rules import REFUSED, RULES

diffusers = pytest.importorskip("diffusers", reason="no diffusers")

# diffusers' own, under the current numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

STD = 0.7  # of the data


def close(found: Tensor, expected: Tensor, rtol: float = 1e-5) -> bool:
    # Relative to each level, not to the largest one.
    found, expected = found.double(), expected.double()
    return found.shape == expected.shape and torch.allclose(
        found, expected, rtol=rtol, atol=0
    )


def table_process(scheduler: Any) -> artlib.VE:
    process = adapter.scheduler_process(scheduler)
    assert isinstance(process, artlib.VE)
    return process


def uneven(process: artlib.Process) -> artlib.Schedule:
    """A schedule like no formula's, so that no scheduler hits it by chance."""
    times = torch.logspace(
        math.log10(process.t_max), math.log10(process.t_min), 40, dtype=torch.float64
    )
    density = (1 + 0.8 * torch.sin(3 * times.log())) / times
    return artlib.from_density(process, times, density)


def wanted_levels(schedule: artlib.Schedule, K: int, flow: bool) -> Tensor:
    grid = schedule.grid(K)
    alpha, sigma = schedule.process.alpha(grid), schedule.process.sigma(grid)
    return sigma / (alpha + sigma) if flow else sigma / alpha


class Recorder:
    """The exact network for N(0, STD^2); notes noise level and time of every call."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.levels: list[float] = []
        self.times: list[float] = []

    def __call__(self, scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
        s = float(scheduler.sigmas[scheduler.step_index or 0])
        self.levels.append(s)
        self.times.append(float(t))
        if self.kind == "flow":  # velocity eps - x0
            var = (1 - s) ** 2 * STD**2 + s**2
            return (s - (1 - s) * STD**2) / var * x
        denoised = STD**2 / (STD**2 + s**2) * x
        if self.kind == "edm":
            d = scheduler.config.sigma_data
            skip, out = d**2 / (s**2 + d**2), s * d / math.sqrt(s**2 + d**2)
            return (denoised - skip * x) / out
        return (x - denoised) / s


def run(scheduler: Any, x: Tensor, kind: str) -> tuple[Tensor, Recorder]:
    recorder = Recorder(kind)
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)  # sets the step index, as pipelines do
        if scheduler.step_index is None:
            scheduler._init_step_index(t)
        output = recorder(scheduler, x, t)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x, recorder


def exact_flow(process: artlib.Process) -> artlib.ProbabilityFlow:
    target = artlib.Gaussian([0.0], [[STD**2]])
    return artlib.ProbabilityFlow(process, target.denoiser(process))


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVEL = [
    ("euler", diffusers.EulerDiscreteScheduler, BETAS, "epsilon"),
    (
        "euler",
        diffusers.EulerDiscreteScheduler,
        {**BETAS, "timestep_spacing": "leading", "use_karras_sigmas": True},
        "epsilon",
    ),
    ("euler", diffusers.EDMEulerScheduler, {}, "edm"),
    ("euler", diffusers.EDMEulerScheduler, {"rho": 3.0, "sigma_max": 40.0}, "edm"),
    ("heun", diffusers.HeunDiscreteScheduler, BETAS, "epsilon"),
]
FLOW = [
    ({}, None),
    ({"shift": 3.0}, None),
    ({"use_dynamic_shifting": True}, None),
    ({"use_dynamic_shifting": True}, 1.15),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.5),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, None),
]


@pytest.mark.parametrize("K", [1, 2, 7, 50])
@pytest.mark.parametrize(("solver", "kind", "options", "output"), LEVEL)
def test_visits_the_schedules_levels(
    solver: str, kind: Any, options: dict[str, Any], output: str, K: int
) -> None:
    scheduler = kind(**options)
    process = table_process(scheduler)
    schedule = uneven(process)
    schedule.to_diffusers(scheduler, K)
    wanted = wanted_levels(schedule, K, flow=False)
    x = torch.full((1, 1), 1.3)  # a step adds: relative, the state hardly matters
    result, recorder = run(scheduler, x, output)
    visited = torch.tensor(recorder.levels, dtype=torch.float64)
    if solver == "heun":
        # Each inner node is seen twice: as the end of a step and the start of the next.
        assert len(visited) == artlib.nfe(schedule.grid(K), solver="heun")
        assert close(visited[0::2], wanted[:-1])
        assert close(scheduler.sigmas[1:-1:2], wanted[1:-1])
        assert close(scheduler.sigmas[2:-1:2], wanted[1:-1])
    else:
        assert close(visited, wanted[:-1])
    assert float(scheduler.sigmas[-1]) == 0.0
    ours = artlib.sample(
        exact_flow(process), x.double(), schedule.grid(K), solver=solver
    )
    # EDM's preconditioning cancels in float32 where the whole way is one step.
    assert torch.allclose(result.double(), ours, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("K", [1, 2, 7, 50])
@pytest.mark.parametrize(("options", "mu"), FLOW)
def test_flow_shift_is_not_applied_twice(
    options: dict[str, Any], mu: float | None, K: int
) -> None:
    process = artlib.RectifiedFlow()
    schedule = uneven(process)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    schedule.to_diffusers(scheduler, K, mu=mu)
    x = torch.full((1, 1), 1.3)
    result, recorder = run(scheduler, x, "flow")
    assert close(torch.tensor(recorder.levels), schedule.grid(K)[:-1])
    assert close(torch.tensor(recorder.times) / 1000, schedule.grid(K)[:-1])
    ours = artlib.sample(exact_flow(process), x.double(), schedule.grid(K))
    assert close(result, ours, rtol=5e-5)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_unipc_visits_levels_and_tells_the_network_exact_times(shift: float) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    schedule = uneven(artlib.RectifiedFlow())
    schedule.to_diffusers(scheduler, 9)
    _, recorder = run(scheduler, torch.full((1, 1), 1.3), "flow")
    grid = schedule.grid(9)
    assert close(torch.tensor(recorder.levels), grid[:-1])
    assert close(torch.tensor(recorder.times) / 1000, grid[:-1])


@pytest.mark.parametrize(
    ("process", "flow"),
    [
        (artlib.VP(t_min=2e-3), False),
        (artlib.RectifiedFlow(t_min=0.04, t_max=0.93), False),
        (artlib.VE(0.05, 12.0), False),
        (artlib.VP(), True),
        (artlib.VE(0.05, 12.0), True),
    ],
)
def test_other_processes_are_converted(process: artlib.Process, flow: bool) -> None:
    # Betas like those of artlib.VP, so that its range is the scheduler's.
    scheduler = (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
        if flow
        else diffusers.EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02)
    )
    schedule = artlib.beta(process)
    schedule.to_diffusers(scheduler, 8)
    wanted = wanted_levels(schedule, 8, flow)
    assert close(scheduler.sigmas, wanted)


def test_vp_euler_is_ddim() -> None:
    # diffusers' DDIM walks the levels that a schedule through its own timesteps gives
    # Euler. (8 divides 1000: otherwise DDIM steps beside its own list.)
    ddim = diffusers.DDIMScheduler(
        **BETAS, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    ddim.set_timesteps(8)
    product = ddim.alphas_cumprod[ddim.timesteps].double()
    levels = ((1 - product) / product).sqrt()
    euler = diffusers.EulerDiscreteScheduler(**BETAS)
    process = artlib.VE(float(levels[-1]) / 2, float(levels[0]))
    schedule = artlib.from_grid(process, [*levels.tolist(), 0.0])
    schedule.to_diffusers(euler, 8)
    x = torch.full((1, 1), 0.9)
    result, _ = run(euler, x * (1 + float(levels[0]) ** 2) ** 0.5, "epsilon")
    state = x
    for t in ddim.timesteps:
        a = ddim.alphas_cumprod[t]
        noise = (1 - a).sqrt() / (a * STD**2 + 1 - a) * state
        state = ddim.step(noise, t, state).prev_sample
    assert close(result, state, rtol=1e-4)


def state_of(scheduler: Any) -> dict[str, Any]:
    return {
        name: copy.deepcopy(value)
        for name, value in vars(scheduler).items()
        if name != "set_timesteps"
    }


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, (Tensor, np.ndarray)):  # some hold NaN from the start
        return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def untouched(scheduler: Any, before: dict[str, Any]) -> bool:
    after = state_of(scheduler)
    return after.keys() == before.keys() and all(
        same(after[k], before[k]) for k in after
    )


def schedulers() -> dict[str, Any]:
    """Every scheduler of the installed diffusers, by name."""
    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    return {n: getattr(diffusers, n) for n in names}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_every_other_scheduler_is_refused_and_left_alone(name: str) -> None:
    try:
        scheduler = getattr(diffusers, name)()
    except Exception as error:
        pytest.skip(f"cannot be made without arguments here: {error}")
    before = state_of(scheduler)
    with pytest.raises(artlib.ExportError, match=r"scheduler: .*(since|table).*; use"):
        uneven(artlib.VE(0.05, 12.0)).to_diffusers(scheduler, 6)
    assert untouched(scheduler, before)
    assert type(scheduler) is getattr(diffusers, name)


def test_the_list_of_schedulers_is_that_of_the_release() -> None:
    assert schedulers().keys() == RULES.keys() | REFUSED.keys()
    assert not RULES.keys() & REFUSED.keys()
    known = artlib.adapters.diffusers.schedulers()
    assert list(known) == sorted(known)
    assert {name for name, reason in known.items() if not reason} == RULES.keys()
    assert {name: reason for name, reason in known.items() if reason} == REFUSED


@pytest.mark.parametrize(
    ("make", "process", "match"),
    [
        (
            lambda: diffusers.EulerDiscreteScheduler(),
            artlib.VE(),
            "would be told a wrong",
        ),
        (
            lambda: diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min"),
            artlib.VE(),
            "final_sigmas_type",
        ),
        (
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            artlib.RectifiedFlow(),
            "invert_sigmas",
        ),
        (
            lambda: diffusers.DPMSolverMultistepScheduler(
                final_sigmas_type="sigma_min"
            ),
            artlib.VE(0.05, 12.0),
            "final_sigmas_type",
        ),
        (
            # Its formula multiplies infinity by 0 in the step to noise 0.
            lambda: diffusers.UniPCMultistepScheduler(solver_type="bh1"),
            artlib.VE(0.05, 12.0),
            "with nan of its state",
        ),
        (
            lambda: diffusers.EulerDiscreteScheduler(),
            artlib.RectifiedFlow(),
            "no signal is left",
        ),
    ],
)
def test_refused_with_a_reason_and_untouched(
    make: Any, process: artlib.Process, match: str
) -> None:
    scheduler = make()
    before = state_of(scheduler)
    with pytest.raises(artlib.ExportError, match=match):
        artlib.edm(process).to_diffusers(scheduler, 12)
    assert untouched(scheduler, before)
    assert type(scheduler).__mro__[1].__name__ == "SchedulerMixin"


def test_refused_after_a_release_that_changed_its_meaning_is_rolled_back() -> None:
    class Damaged(diffusers.EulerDiscreteScheduler):
        def set_timesteps(self, *args: Any, **options: Any) -> None:
            super().set_timesteps(*args, **options)
            self.of_this_release = True

        def step(self, output: Tensor, t: Tensor, x: Tensor, **options: Any) -> Any:
            if self.step_index == 3:
                self.sigmas[4] *= 1.01
            return super().step(output, t, x, **options)

    scheduler = Damaged(**BETAS)
    before = state_of(scheduler)
    with pytest.raises(artlib.ExportError, match="leaves call 4 of 6"):
        uneven(table_process(scheduler)).to_diffusers(scheduler, 6)
    assert untouched(scheduler, before)
    assert not hasattr(scheduler, "of_this_release")


def test_arguments_that_are_refused() -> None:
    schedule = uneven(artlib.VE(0.05, 12.0))
    euler = diffusers.EulerDiscreteScheduler(**BETAS)
    with pytest.raises(TypeError, match="K: expected an integer"):
        schedule.to_diffusers(euler, 6.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="K: expected at least 1"):
        schedule.to_diffusers(euler, 0)
    with pytest.raises(TypeError, match="scheduler: expected a scheduler"):
        schedule.to_diffusers(object(), 6)
    with pytest.raises(TypeError, match="schedule: expected an artlib"):
        adapter.to_diffusers([3.0, 0.0], euler, 1)  # type: ignore[arg-type]
    with pytest.raises(artlib.ExportError, match="mu: got 1"):
        schedule.to_diffusers(euler, 6, mu=1.0)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(artlib.ExportError, match="use_dynamic_shifting=False"):
        schedule.to_diffusers(flow, 6, mu=1.0)
    close_nodes = artlib.from_grid(artlib.VE(0.05, 12.0), [12.0, 12.0 - 1e-8, 1.0, 0.0])
    with pytest.raises(artlib.ExportError, match="one number in float32"):
        close_nodes.to_diffusers(euler, 3)


def test_timesteps_go_where_they_are_asked_to(accelerator: torch.device) -> None:
    for scheduler in (
        diffusers.EulerDiscreteScheduler(**BETAS),
        diffusers.FlowMatchEulerDiscreteScheduler(),
    ):
        schedule = uneven(adapter.scheduler_process(scheduler))
        schedule.to_diffusers(scheduler, 4, device=accelerator)
        assert scheduler.timesteps.device.type == accelerator.type


def test_held_schedule_survives_the_pipelines_own_call() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    schedule = uneven(table_process(scheduler))
    fresh = diffusers.EulerDiscreteScheduler(**BETAS)
    schedule.to_diffusers(scheduler, 6)
    for K in (6, 3, 11):
        scheduler.set_timesteps(K, device="cpu")
        assert close(scheduler.sigmas, wanted_levels(schedule, K, False))
    scheduler.set_timesteps(sigmas=[14.0, 3.0, 1.0, 0.0])  # three steps
    assert close(scheduler.sigmas, wanted_levels(schedule, 3, False))
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert close(scheduler.sigmas, wanted_levels(schedule, 3, False))
    with pytest.raises(ValueError, match="num_inference_steps: got None"):
        scheduler.set_timesteps()
    twin = copy.deepcopy(scheduler)
    twin.set_timesteps(4)
    assert len(scheduler.sigmas) == 4
    assert close(twin.sigmas, wanted_levels(schedule, 4, False))
    adapter.release(scheduler)
    adapter.release(scheduler)
    scheduler.set_timesteps(5)
    fresh.set_timesteps(5)
    assert torch.equal(scheduler.sigmas, fresh.sigmas)
    assert torch.equal(scheduler.timesteps, fresh.timesteps)


@pytest.mark.parametrize(
    "make",
    [
        lambda: diffusers.EulerDiscreteScheduler(**BETAS),
        lambda: diffusers.HeunDiscreteScheduler(**BETAS),
        lambda: diffusers.EDMEulerScheduler(),
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
)
def test_pipeline_arguments_through_retrieve_timesteps(make: Any) -> None:
    from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

    scheduler, held = make(), make()
    schedule = uneven(adapter.scheduler_process(scheduler))
    arguments = adapter.pipeline_arguments(schedule, scheduler, 6)
    if "timesteps" in arguments:
        scheduler.set_timesteps(**arguments)
    else:
        retrieve_timesteps(scheduler, device="cpu", **arguments)
    schedule.to_diffusers(held, 6)
    assert close(scheduler.sigmas, held.sigmas)
    # Heun interpolates sigma where the others interpolate its logarithm.
    if not isinstance(scheduler, diffusers.HeunDiscreteScheduler):
        assert close(scheduler.timesteps, held.timesteps)


def test_pipeline_arguments_undo_mu_or_are_refused() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    schedule = uneven(artlib.RectifiedFlow())
    with pytest.raises(artlib.ExportError, match="mu: the scheduler shifts"):
        adapter.pipeline_arguments(schedule, scheduler, 6)
    arguments = adapter.pipeline_arguments(schedule, scheduler, 6, mu=0.8)
    scheduler.set_timesteps(**arguments, mu=0.8)
    assert close(scheduler.sigmas, schedule.grid(6))
    unipc = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    with pytest.raises(artlib.ExportError, match="truncates the network's times"):
        adapter.pipeline_arguments(schedule, unipc, 6)
    edm = diffusers.EDMEulerScheduler(sigma_schedule="exponential")
    with pytest.raises(artlib.ExportError, match="sigma_schedule"):
        adapter.pipeline_arguments(uneven(artlib.VE()), edm, 6)
    karras = diffusers.HeunDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    with pytest.raises(artlib.ExportError, match="use_karras_sigmas=True overrides"):
        adapter.pipeline_arguments(uneven(table_process(karras)), karras, 6)
