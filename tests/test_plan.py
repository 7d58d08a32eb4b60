"""Plans: their files, what refuses them, and that they are sampled as they stand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import mixture_16d
from torch import Tensor

import artlib
from artlib.solvers import SOLVERS, Solver

F64 = torch.float64
PROCESS = artlib.VE(sigma_max=20.0)


def plan(K: int = 4, solver: Any = "dpmpp_2m", share: float = 0.9) -> artlib.Plan:
    nodes = artlib.edm(PROCESS, pinned=False).grid(K)
    return artlib.Plan(PROCESS, nodes, share * nodes[:-1], solver, "mine")


def told_by_hand(flow: artlib.ProbabilityFlow, x: Tensor, p: artlib.Plan) -> Tensor:
    """Euler in VE, its network told other levels, written out."""
    for t, s, level in zip(p.nodes[:-1], p.nodes[1:], p.told, strict=True):
        rho = s / t
        x = rho * x + (1 - rho) * flow.denoiser(x, level)
    return x


def test_euler_tells_the_network_the_levels() -> None:
    problem = mixture_16d(PROCESS, 8)
    p = plan(solver="euler")
    ours = artlib.sample(problem.flow(), problem.x_T, p)
    assert torch.allclose(
        ours, told_by_hand(problem.flow(), problem.x_T, p), rtol=1e-12
    )


@pytest.mark.parametrize("solver", [n for n, k in SOLVERS.items() if not k.adaptive])
def test_an_honest_plan_is_the_grid(solver: str) -> None:
    problem = mixture_16d(PROCESS, 4)
    schedule = artlib.edm(PROCESS)
    p = artlib.Plan.honest(schedule, 5, solver=solver)
    flow, x, grid = problem.flow(), problem.x_T, schedule.grid(5)
    a, b = artlib.sample(flow, x, p), artlib.sample(flow, x, grid, solver=solver)
    assert torch.equal(a, b)
    assert p.is_honest
    assert torch.equal(p.grid(5), grid)
    assert p.nfe == artlib.nfe(grid, solver=solver) == artlib.nfe(p)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "ipndm"])
def test_told_levels_are_noise_levels_in_every_process(solver: str) -> None:
    vp = artlib.VP()
    problem = mixture_16d(vp, 6)
    nodes = artlib.log_snr(vp, pinned=False).grid(5)
    told = 0.95 * nodes[:-1]
    a = artlib.sample(problem.flow(), problem.x_T, artlib.Plan(vp, nodes, told, solver))
    ve = problem.flow().to_ve()
    levels = vp.noise_level(nodes)
    q = artlib.Plan(ve.process, levels, vp.noise_level(told), solver)
    b = artlib.sample(ve, problem.x_T / vp.alpha(nodes[0]), q)
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_without_signal_there_is_no_level_to_tell() -> None:
    process = artlib.RectifiedFlow()
    problem = mixture_16d(process, 4)
    nodes = artlib.uniform(process).grid(4)
    told = nodes[:-1].clone()
    told[1:] *= 0.95
    a = artlib.sample(
        problem.flow(), problem.x_T, artlib.Plan(process, nodes, told, "unipc")
    )
    told[0] *= 0.5
    b = artlib.sample(
        problem.flow(), problem.x_T, artlib.Plan(process, nodes, told, "unipc")
    )
    assert bool(torch.isfinite(a).all())
    assert torch.equal(a, b)


def test_batches_change_nothing() -> None:
    problem = mixture_16d(PROCESS, 8)
    whole = artlib.sample(problem.flow(), problem.x_T, plan())
    parts = artlib.sample(problem.flow(), problem.x_T, plan(), batch=3)
    assert torch.allclose(whole, parts, rtol=1e-12)


def test_files_give_the_same_plan_to_the_bit(tmp_path: Path) -> None:
    p = plan()
    p.save(tmp_path / "p.json")
    q = artlib.Plan.load(tmp_path / "p.json")
    assert torch.equal(p.nodes, q.nodes)
    assert torch.equal(p.told, q.told)
    assert (q.solver, q.process, q.name) == (p.solver, p.process, p.name)
    assert q.to_dict() == p.to_dict()
    assert json.loads(p.to_json())["format"] == "artlib-plan"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "artlib-schedule"}, "no plan"),
        ({"version": 2}, "version 2"),
        ({"told": [1.0]}, "told"),
        ({"told": [1.0, 1.0, 1.0, -1.0]}, "told"),
        ({"nodes": [20.0, 1.0, 2.0, 0.5, 0.0]}, "nodes"),
        ({"solver": "huen"}, "huen"),
        ({"solver": "heun"}, "told"),
        ({"process": {"name": "nothing"}}, "nothing"),
    ],
)
def test_a_changed_file_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    data = {**json.loads(plan().to_json()), **change}
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(artlib.ScheduleFormatError, match=message):
        artlib.Plan.load(tmp_path / "p.json")


def test_a_schedule_is_no_plan_and_the_other_way_round(tmp_path: Path) -> None:
    plan().save(tmp_path / "p.json")
    artlib.edm(PROCESS).save(tmp_path / "s.json")
    with pytest.raises(artlib.ScheduleFormatError, match="no schedule"):
        artlib.Schedule.load(tmp_path / "p.json")
    with pytest.raises(artlib.ScheduleFormatError, match="no plan"):
        artlib.Plan.load(tmp_path / "s.json")


@pytest.mark.parametrize("bad", [float("nan"), 0.0, -1.0, 21.0])
def test_levels_out_of_range_are_refused(bad: float) -> None:
    nodes = artlib.edm(PROCESS).grid(3)
    told = nodes[:-1].clone()
    told[1] = bad
    with pytest.raises(ValueError, match="told: level 1"):
        artlib.Plan(PROCESS, nodes, told, "euler")


def test_what_a_plan_does_not_fit_is_refused() -> None:
    problem = mixture_16d(PROCESS, 2)
    flow, x, p = problem.flow(), problem.x_T, plan()
    other = mixture_16d(artlib.VE(), 2)
    with pytest.raises(ValueError, match="plan belongs to"):
        artlib.sample(other.flow(), other.x_T, p)
    with pytest.raises(ValueError, match="made for dpmpp_2m"):
        artlib.sample(flow, x, p, solver="euler")
    with pytest.raises(ValueError, match="clock"):
        artlib.sample(flow, x, p, clock=artlib.ExactClock(3))
    with pytest.raises(ValueError, match="has 4 steps"):
        p.grid(5)
    with pytest.raises(ValueError, match="tells the network other"):
        p.grid(4)
    with pytest.raises(ValueError, match="run from"):
        artlib.Plan(PROCESS, p.nodes[1:], p.told[1:], "euler")
    with pytest.raises(ValueError, match="heun cannot be told"):
        artlib.Plan(PROCESS, p.nodes, p.told, "heun")


def test_a_solver_of_ones_own_is_sampled_but_not_saved(tmp_path: Path) -> None:
    euler = SOLVERS["euler"]
    mine = Solver("mine", 1, 1, euler.advance, tellable=True)
    problem = mixture_16d(PROCESS, 4)
    p = plan(solver=mine)
    same = artlib.sample(problem.flow(), problem.x_T, plan(solver="euler"))
    assert torch.equal(artlib.sample(problem.flow(), problem.x_T, p), same)
    with pytest.raises(ValueError, match="mine is your own"):
        p.save(tmp_path / "p.json")
    assert not list(tmp_path.iterdir())
