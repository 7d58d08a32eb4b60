"""ART-RL: its moments against their theory, its clocks against the closed form.

Two trained runs (a mixture on the line, a mixture in 16 dimensions) are made once;
everything else is short or needs no training at all.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import mixture_1d, mixture_16d
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import artlib
from artlib._common import files as _files
from artlib._common.errors import TrainingError
from artlib.control.closed_form import stiffness_path
from artlib.flow.denoisers import CountNFE
from artlib.flow.flow import ProbabilityFlow
from artlib.flow.processes import VE, VP, RectifiedFlow
from artlib.flow.targets import Gaussian
from artlib.rl.actor_critic import (
    ActorCritic,
    CheckpointError,
    DivergenceWarning,
    TrainingRecord,
)
from artlib.rl.checkpoint import fingerprint
from artlib.rl.environment import TableEnvironment
from artlib.rl.episodes import Episodes, play
from artlib.rl.policy import (
    CUT,
    CUT_VARIANCE,
    critic_value,
    cut_normal,
    mean_share,
    share_slope,
)
from artlib.schedules.constructors import edm, from_time_change

F64 = torch.float64
PROCESS = VE(sigma_min=0.002, sigma_max=80.0)
ITERATIONS, TRAJECTORIES = 300, 128
SMALL: dict[str, Any] = {
    "steps": 6,
    "batch": 8,
    "warm_up": 5,
    "hidden": 16,
    "critic_updates": 1,
    "points": 24,
}
"""Of runs that only have to run."""


def gaussian_1d(n: int) -> tuple[ProbabilityFlow, Tensor]:
    target = Gaussian(torch.tensor([0.3], dtype=F64), torch.tensor([[0.25]], dtype=F64))
    flow = ProbabilityFlow(PROCESS, target.denoiser(PROCESS))
    return flow, target.sample_prior(PROCESS, n, seed=0)


def mixture(n: int = 12) -> tuple[ProbabilityFlow, Tensor]:
    problem = mixture_1d(PROCESS, n)
    return problem.flow(), problem.x_T


def mixture_16(n: int) -> tuple[ProbabilityFlow, Tensor]:
    problem = mixture_16d(PROCESS, n)
    return problem.flow(), problem.x_T


def small(seed: int = 0, **options: Any) -> ActorCritic:
    return ActorCritic(*mixture(), seed=seed, **{**SMALL, **options})


def weights(trainer: ActorCritic) -> Tensor:
    networks = (trainer.actor, trainer.critic)
    return torch.cat([p.detach().flatten() for n in networks for p in n.parameters()])


def state(trainer: ActorCritic) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer._tensors().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# The policy.


def test_cut_normal_has_the_stated_variance_and_bounds() -> None:
    draws = cut_normal((400_000,), torch.Generator().manual_seed(0))
    assert float(draws.abs().max()) <= CUT
    # Its kurtosis is below 3, so 3 bounds the variance of the square.
    assert abs(float(draws.mean())) < 4 / 400_000**0.5
    assert abs(float(draws.square().mean()) - CUT_VARIANCE) < 4 * (2 / 400_000) ** 0.5
    z = torch.linspace(-CUT, CUT, 100_001, dtype=F64)
    density = torch.exp(-(z**2) / 2)
    variance = torch.trapezoid(z**2 * density, z) / torch.trapezoid(density, z)
    assert math.isclose(float(variance), CUT_VARIANCE, rel_tol=1e-8)


@pytest.mark.parametrize("constraint", ["hard", "multiplier"])
def test_share_slope_is_the_derivative(constraint: Any) -> None:
    output = torch.linspace(-3, 3, 25, dtype=F64, requires_grad=True)
    rho = torch.linspace(0.02, 1, 25, dtype=F64)
    h = torch.tensor(1 / 7, dtype=F64)
    share = mean_share(output, rho, h, constraint)
    (by_autograd,) = torch.autograd.grad(share.sum(), output)
    slope = share_slope(output.detach(), rho, h, constraint)
    assert torch.allclose(slope, by_autograd, rtol=1e-9)
    assert bool((share > 0).all())
    assert bool((share <= rho).all())


def test_the_last_step_of_the_hard_constraint_arrives() -> None:
    output = torch.tensor([-5.0, 0.0, 5.0], dtype=F64)
    rho = torch.tensor([0.3, 0.3, 0.9], dtype=F64)
    assert torch.equal(mean_share(output, rho, torch.ones((), dtype=F64), "hard"), rho)


def test_critic_is_zero_at_the_end() -> None:
    c, tau = torch.tensor([-1.0, 2.0]), torch.tensor(0.7, dtype=F64)
    end = torch.zeros(2, dtype=F64)
    assert torch.equal(critic_value(c, end, tau, "hard"), -end)
    late = critic_value(c, end, torch.tensor(1.0, dtype=F64), "multiplier")
    assert torch.equal(late, end)


@pytest.mark.parametrize("process", [PROCESS, VP(), RectifiedFlow()])
def test_untrained_policy_is_the_dpm_schedule(process: Any) -> None:
    problem = mixture_1d(process, 6)
    trainer = ActorCritic(problem.flow(), problem.x_T, steps=9, warm_up=0)
    with torch.no_grad():
        for parameter in trainer._loop.learner.average:
            parameter.zero_()
    # Evenly spaced in the environment's coordinate; in VE that is log sigma.
    position = trainer.environment.position(trainer.clocks())
    assert torch.allclose(position, torch.linspace(1, 0, 10, dtype=F64), atol=2e-5)
    if process == PROCESS:
        dpm = torch.linspace(math.log(80), math.log(0.002), 10, dtype=F64).exp()
        assert torch.allclose(trainer.clocks(), dpm, rtol=1e-6)


@pytest.mark.parametrize("constraint", ["hard", "multiplier"])
def test_score_is_the_derivative_of_the_log_density(constraint: Any) -> None:
    steps, temperature = 5, 0.05
    environment = one_path()
    outputs: list[Tensor] = []
    generator = torch.Generator().manual_seed(3)

    def actor(rho: Tensor, tau: Tensor, features: Tensor) -> Tensor:
        outputs.append(torch.randn(rho.shape, generator=generator, dtype=F64) / 3)
        return outputs[-1]

    rows = torch.zeros(7, dtype=torch.long)
    noise = 0.3 * cut_normal((steps, 7), generator)
    episodes = play(
        environment,
        actor,
        rows,
        steps=steps,
        temperature=temperature,
        constraint=constraint,
        step_cost="exact",
        noise=noise,
    )
    assert len(episodes.score) == (steps - 1 if constraint == "hard" else steps)
    dt = environment.span / steps
    for k, score in enumerate(episodes.score):
        output = outputs[k].requires_grad_()
        rho, t = episodes.rho[k], episodes.time[k]
        h = torch.tensor(1 / (steps - k if constraint == "hard" else steps), dtype=F64)
        target = rho - mean_share(output, rho, h, constraint)
        # VE: log t is linear in rho.
        planned = torch.exp(
            math.log(PROCESS.t_min) + target * math.log(PROCESS.t_max / PROCESS.t_min)
        )
        mean = (t - planned) / dt
        drawn = (t - episodes.time[k + 1]) / dt
        q = torch.maximum(
            environment.at(rows, rho).log_floored,
            environment.log_floored_at(rows, target.detach()),
        ).exp()
        unit = (environment.length / environment.span) ** 2
        variance = temperature * unit / q
        log_density = -((drawn - mean) ** 2) / (2 * variance)
        (expected,) = torch.autograd.grad(log_density.sum(), output)
        # Not held back at the start of the step, nor before its end.
        least = PROCESS.t_min + 1.01e-3 * (t - PROCESS.t_min)
        free = (episodes.time[k + 1] < t) & (episodes.time[k + 1] > least)
        assert bool(free.any())
        assert torch.allclose(score[free], expected[free], rtol=1e-4, atol=1e-7)


# Costs of steps.


def one_path(process: Any = PROCESS) -> TableEnvironment:
    problem = mixture_1d(process, 4)
    table, path = stiffness_path(problem.flow(), problem.x_T[:1])
    return TableEnvironment(table, path, floor=1.0, seed=0, device=torch.device("cpu"))


def test_exact_cost_is_the_integral_of_the_step() -> None:
    environment = one_path()
    table, rows = environment.table, torch.zeros(1, dtype=torch.long)
    ends = [(80.0, 20.0), (3.0, 0.4), (0.05, 0.002)]
    for start, end in ends:
        here, there = (
            environment.at(rows, environment.position(torch.tensor([t], dtype=F64)))
            for t in (start, end)
        )
        t = torch.linspace(math.log(end), math.log(start), 4001, dtype=F64).exp()
        log_q = np.interp(
            t.log().numpy(),
            table.fine_times.log().numpy()[::-1],
            table.fine_values[0].log().numpy()[::-1],
        )
        integral = float(torch.trapezoid(torch.from_numpy(np.exp(log_q)), t))
        theta = (start - end) / (table.span / 18)
        in_units = theta * integral / (environment.length**2 / table.span)
        cost = float(environment.exact_cost(here, there, 18))
        assert math.isclose(cost, in_units, rel_tol=2e-3)


def test_costs_of_an_episode_add_up_to_the_cost_of_its_schedule() -> None:
    environment = one_path()
    episodes = play(
        environment,
        lambda rho, tau, features: 0.5 * torch.sin(7 * rho),
        torch.zeros(1, dtype=torch.long),
        steps=18,
        temperature=0.05,
        constraint="hard",
        step_cost="exact",
        noise=None,
    )
    times = episodes.time[:, 0].clone()
    times[0], times[-1] = PROCESS.t_max, PROCESS.t_min
    clock = torch.linspace(0, environment.span, 19, dtype=F64)
    schedule = from_time_change(PROCESS, clock, times, interpolation="linear")
    expected = environment.table.cost(schedule) / environment.table.lower_bound()
    assert math.isclose(float(episodes.exact.sum()), expected, rel_tol=5e-3)
    assert float(episodes.exact.sum()) > 1
    assert math.isclose(float(episodes.last.walked), 1, abs_tol=1e-9)


def test_left_cost_calls_one_big_jump_almost_free() -> None:
    environment = one_path()
    rows = torch.zeros(1, dtype=torch.long)
    start = environment.start(rows)
    jump = environment.at(rows, torch.tensor([0.5], dtype=F64))  # sigma 80 to 0.4
    left = float(environment.left_cost(start, jump, 18))
    exact = float(environment.exact_cost(start, jump, 18))
    assert left < 0.5  # below the optimum of the whole way, which is 1
    assert exact > 10
    # Steps that are small agree.
    near = environment.at(rows, torch.tensor([0.999], dtype=F64))
    left, exact = (
        float(f(start, near, 18))
        for f in (environment.left_cost, environment.exact_cost)
    )
    assert math.isclose(left, exact, rel_tol=0.05)


# Theorem 3: martingale moment conditions of the true value function.


def exact_policy(
    environment: TableEnvironment, steps: int
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The optimal mean as an actor, and the share of the length walked at rho."""
    nodes = torch.linspace(1, 0, 5001, dtype=F64)
    table = environment.at(torch.zeros(5001, dtype=torch.long), nodes).walked.numpy()
    progress = 1 - nodes.numpy()

    def walked(rho: Tensor) -> Tensor:
        return torch.from_numpy(np.interp(1 - rho.numpy(), progress, table))

    def actor(rho: Tensor, tau: Tensor, features: Tensor) -> Tensor:
        h = 1 / torch.round((1 - tau) * steps)
        so_far = walked(rho)
        wanted = so_far + (1 - so_far) * h
        target = 1 - torch.from_numpy(np.interp(wanted.numpy(), table, progress))
        share = ((rho - target) / rho).clamp(1e-12, 1 - 1e-12)
        return torch.logit(share) - torch.log(h) + torch.log1p(-h)

    return actor, walked


def dpm_policy(rho: Tensor, tau: Tensor, features: Tensor) -> Tensor:
    return torch.zeros_like(rho)


@cache
def increments(
    steps: int, *, optimal: bool = True, factor: float = 1.0
) -> tuple[Episodes, Tensor, Tensor]:
    """Episodes on one path with V = -factor G^2 / (1 - tau): them, V and delta."""
    temperature, n = 0.05, 2000
    environment = one_path()
    best, walked = exact_policy(environment, steps)
    episodes = play(
        environment,
        best if optimal else dpm_policy,
        torch.zeros(n, dtype=torch.long),
        steps=steps,
        temperature=temperature,
        constraint="hard",
        step_cost="exact",
        noise=cut_normal((steps, n), torch.Generator().manual_seed(0)),
    )
    tau = torch.arange(steps, dtype=F64)[:, None] / steps
    left = 1 - torch.stack([walked(rho) for rho in episodes.rho[:-1]])
    value = -factor * left**2 / (1 - tau)
    following = torch.cat([value[1:], torch.zeros_like(value[:1])])
    reward = -episodes.exact.clone()
    reward[:-1] += temperature * CUT_VARIANCE / steps
    return episodes, value, following - value + reward


TEST_FUNCTIONS: dict[str, Callable[[Episodes, Tensor], Tensor]] = {
    "one": lambda episodes, value: torch.ones_like(value),
    "value": lambda episodes, value: value,
    "position": lambda episodes, value: episodes.rho[:-1],
}


@pytest.mark.parametrize("name", TEST_FUNCTIONS)
def test_martingale_moments_vanish_for_the_true_value(name: str) -> None:
    def moment(steps: int, factor: float = 1.0) -> tuple[float, float]:
        episodes, value, delta = increments(steps, factor=factor)
        sums = (TEST_FUNCTIONS[name](episodes, value) * delta).sum(0)
        return abs(float(sums.mean())), float(sums.std() / len(sums) ** 0.5)

    # Constant speed within a step is not quite optimal: first order in 1/K.
    coarse, _ = moment(60)
    fine, error = moment(180)
    assert fine < coarse / 2 + 4 * error
    assert fine < 0.006 + 4 * error
    wrong, error = moment(180, factor=1.2)
    assert wrong > 0.05 + 4 * error


def test_policy_gradient_vanishes_at_the_optimum_only() -> None:
    def gradient(optimal: bool) -> Tensor:
        episodes, _, delta = increments(180, optimal=optimal)
        quarters = (episodes.score * delta[:-1]).chunk(4)
        return torch.stack([q.sum(0).mean() for q in quarters])

    assert float(gradient(True).abs().max()) < 0.01
    # DPM spends its clock where sigma is small: it jumps too far where sigma is large.
    assert float(gradient(False).min()) < -1


# Trained runs.


@pytest.fixture(scope="module", params=[mixture, mixture_16])
def trained(
    request: pytest.FixtureRequest,
) -> tuple[ActorCritic, list[TrainingRecord]]:
    trainer = ActorCritic(*request.param(TRAJECTORIES), steps=18, seed=0)
    return trainer, list(trainer.train(ITERATIONS))


def test_training_finds_the_closed_form(
    trained: tuple[ActorCritic, list[TrainingRecord]],
) -> None:
    trainer, records = trained
    table, schedule = trainer.table, trainer.distill()
    cost = table.cost(schedule)
    assert 1 - 1e-6 < cost / table.lower_bound() < 1.03
    assert cost < 1.01 * table.cost(table.art("paper"))
    assert records[-1].end_residual < 0.01
    assert [r.iteration for r in records] == list(range(1, ITERATIONS + 1))
    assert all(r.multiplier == 0 for r in records)
    # From the DPM schedule, which is not optimal, to less exploration cost above 1.
    assert records[0].cost > 1.4
    assert 1 < records[-1].cost < 1.15
    assert records[-1].martingale_error < 0.4 * records[0].martingale_error


def test_learned_clocks_follow_their_paths(
    trained: tuple[ActorCritic, list[TrainingRecord]],
) -> None:
    trainer, _ = trained
    clocks, table = trainer.clocks(), trainer.table
    assert clocks.shape == (TRAJECTORIES, 19)
    assert bool((clocks[:, 1:] < clocks[:, :-1]).all())
    ends = torch.tensor([PROCESS.t_max, PROCESS.t_min], dtype=F64)
    assert torch.allclose(clocks[:, [0, -1]], ends)
    # On average over the paths they are no worse than the best single clock is.
    rows = torch.arange(TRAJECTORIES)
    actor = trainer.averaged_actor()
    exact = float(trainer._loop.play(rows, actor=actor).exact.sum(0).mean())
    feedback = table.lower_bound("feedback") / table.lower_bound()
    assert feedback < exact < 1.04


def test_learned_clocks_suit_new_paths(
    trained: tuple[ActorCritic, list[TrainingRecord]],
) -> None:
    """On noise that was never seen: near the best single clock of *that* noise."""
    trainer, _ = trained
    width = trainer.environment.width - 1  # the state, and beside it |Q|
    rng = torch.Generator().manual_seed(7)
    x_T = PROCESS.t_max * torch.randn(100, width, generator=rng, dtype=F64)
    nfe = trainer.nfe
    clocks = trainer.clocks(x_T)
    assert trainer.nfe == nfe
    assert clocks.shape == (100, 19)
    assert bool((clocks[:, 1:] < clocks[:, :-1]).all())
    environment = trainer._on(x_T)
    rows = torch.arange(100)
    actor = trainer.averaged_actor()
    episodes = trainer._loop.play(rows, actor=actor, environment=environment)
    assert torch.equal(episodes.time.T, clocks)
    table = environment.table
    unit = trainer.table.lower_bound()  # of the costs of episodes
    cost = float(episodes.exact.sum(0).mean()) * unit
    assert cost < 1.06 * table.lower_bound()
    assert cost > table.lower_bound("feedback")


def test_clocks_of_given_paths_do_not_depend_on_their_company() -> None:
    """Whitening, units and floor are the training's: a part gives a part."""
    _, x_T = mixture()
    for options in ({}, {"environment": "model"}):
        trainer = small(**options)
        list(trainer.train(8))
        before, own = state(trainer), trainer.clocks()
        nfe = trainer.nfe
        assert torch.equal(trainer.clocks(x_T), own)
        torch.testing.assert_close(
            trainer.clocks(x_T[[5, 2]]), own[[5, 2]], rtol=1e-6, atol=0
        )
        assert not torch.allclose(trainer.clocks(0.5 * x_T), own, rtol=1e-6)
        assert trainer.nfe == nfe  # these were no evaluations of the training
        assert same(state(trainer), before)
        assert torch.equal(trainer.clocks(), own)  # nothing was overwritten


def test_few_steps_train_at_the_default_temperature() -> None:
    """At K = 5 within one step |Q| changes by decades; 0.05 diverges there."""
    for steps, expected in ((18, 0.02), (40, 0.02), (8, 0.01)):
        assert small(steps=steps).options.temperature == pytest.approx(expected)
    flow, x_T = mixture(64)
    trainer = ActorCritic(flow, x_T, steps=5, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DivergenceWarning)
        list(trainer.train(150))
    rows, environment = torch.arange(64), trainer.environment
    actor = trainer.averaged_actor()
    learned = float(trainer._loop.play(rows, actor=actor).exact.sum(0).mean())
    # The closed form's six nodes: optimal for many steps, not for five.
    ticks = torch.linspace(0, trainer.table.span, 6, dtype=F64)
    places = [
        environment.at(rows, environment.position(t.expand(64)))
        for t in trainer.table.art().time(ticks)
    ]
    closed = sum(
        float(environment.exact_cost(here, there, 5).mean())
        for here, there in pairwise(places)
    )
    assert 1 < learned < closed


def test_distilled_schedule_says_where_it_comes_from(
    trained: tuple[ActorCritic, list[TrainingRecord]], tmp_path: Path
) -> None:
    trainer, _ = trained
    schedule = trainer.distill()
    notes = schedule.provenance
    assert notes["method"] == "ART-RL"
    assert notes["iterations"] == ITERATIONS
    assert notes["nfe"] == trainer.nfe == trainer.table.nfe
    assert notes["temperature"] == 0.02
    schedule.save(tmp_path / "s.json")
    loaded = artlib.Schedule.load(tmp_path / "s.json")
    assert torch.equal(loaded.grid(18), schedule.grid(18))
    grid = schedule.grid(18)[:-1]
    assert torch.allclose(grid, trainer.clocks().mean(0)[:-1])


# Options.


def test_multiplier_becomes_negative_where_the_clock_ends_early() -> None:
    trainer = small(constraint="multiplier", batch=12)
    records = list(trainer.train(15))
    # Every clock ends early, which calls for a reward of speed: gamma < 0 (30).
    assert records[0].multiplier < 0
    assert all(b.multiplier < a.multiplier for a, b in pairwise(records))
    assert records[-1].multiplier == trainer.multiplier
    episodes = trainer._loop.play(torch.arange(12))
    residual = 1 - float(episodes.last.walked.mean())
    assert 0 < residual < 1
    assert all(0 < r.end_residual < 1 for r in records)
    assert math.isclose(records[-1].end_residual, residual, rel_tol=0.5)
    # The distilled schedule goes to the end all the same.
    assert float(trainer.distill().time(trainer.table.span)) == PROCESS.t_min


def test_what_the_multiplier_leaves_open_is_closed_by_scaling_or_by_a_jump() -> None:
    trainer = small(constraint="multiplier", batch=12)
    list(trainer.train(15))
    mean = trainer.clocks().mean(0)
    assert mean[-1] > 2 * PROCESS.t_min
    readings = torch.linspace(0, trainer.table.span, len(mean), dtype=torch.float64)
    scaled = trainer.distill().time(readings)
    # The increments of the paper's mean theta-curve, in proportion, sum to T.
    increments, own = -torch.diff(scaled), -torch.diff(mean)
    assert torch.allclose(increments / increments.sum(), own / own.sum(), rtol=1e-9)
    assert math.isclose(float(increments.sum()), trainer.table.span, rel_tol=1e-12)
    jumped = trainer.distill(close="jump").time(readings)
    assert torch.allclose(jumped[:-1], mean[:-1])
    assert float(jumped[-1]) == PROCESS.t_min


def test_another_way_to_close_a_clock_is_refused() -> None:
    with pytest.raises(ValueError, match=r"close: expected one of .*got 'leap'"):
        small().distill(close="leap")  # type: ignore[arg-type]


def test_with_a_hard_end_there_is_nothing_to_close() -> None:
    trainer = small(batch=12)
    list(trainer.train(8))
    scaled, jumped = (trainer.distill(close=c).grid(5) for c in ("normalise", "jump"))
    assert torch.equal(scaled, jumped)


def test_fourier_modes_are_inputs_of_the_networks() -> None:
    with_modes, without = small(), small(fourier_modes=0)
    widths = [t.actor.layers[0].in_features for t in (with_modes, without)]
    assert widths[0] - widths[1] == 10


def test_older_checkpoints_know_no_fourier_modes_and_are_the_same_problem() -> None:
    trainer = small()
    options = asdict(trainer.options)
    own = fingerprint(trainer.table, options)
    del options["fourier_modes"]
    assert fingerprint(trainer.table, options) == own
    assert fingerprint(trainer.table, {**options, "fourier_modes": 0}) != own


def test_multiplier_starts_where_it_is_told() -> None:
    options = {"constraint": "multiplier", "batch": 12, "warm_up": 0}
    at_zero, below = (small(**options, multiplier=m) for m in (0.0, -2.0))
    assert (at_zero.multiplier, below.multiplier) == (0.0, -2.0)
    first, other = (next(trainer.train(15)) for trainer in (at_zero, below))
    # The first episodes are the same, and so is the step of gamma by (30) ...
    assert first.cost == other.cost
    assert other.multiplier + 2 == pytest.approx(first.multiplier, rel=1e-9)
    # ... but not what they teach: every increment holds -gamma times the way walked.
    assert other.martingale_error > first.martingale_error + 0.1
    assert not torch.equal(weights(at_zero), weights(below))


def test_model_in_the_loop_charges_another_cost_and_counts_it() -> None:
    flow, x_T = mixture()
    counter = CountNFE(flow.denoiser)
    trainer = ActorCritic(
        flow.with_denoiser(counter), x_T, **SMALL, environment="model"
    )
    assert trainer.options.step_cost == "left"
    assert trainer.nfe == trainer.table.nfe == counter.nfe
    records = list(trainer.train(8))
    assert trainer.nfe == counter.nfe >= trainer.table.nfe + 8 * 2 * 6
    assert all(math.isfinite(r.cost) for r in records)
    episodes = trainer._loop.play(torch.arange(12))
    assert not torch.allclose(episodes.exact, episodes.charged, rtol=0.1)
    assert trainer.distill().provenance["nfe"] == trainer.nfe == counter.nfe


def test_model_and_table_see_the_same_start() -> None:
    by_table, by_model = small(), small(environment="model")
    rows = torch.arange(12)
    a, b = (trainer.environment.start(rows) for trainer in (by_table, by_model))
    assert torch.allclose(a.stiffness, b.stiffness, rtol=1e-3)
    assert torch.allclose(a.log_floored, b.log_floored, atol=1e-3)
    assert torch.allclose(a.features, b.features, atol=1e-3)


def test_floor_below_the_mean_is_kept_in_both_environments() -> None:
    low, high = small(floor=0.1, environment="model"), small(floor=0.1)
    rows = torch.arange(12)
    middle = torch.full((12,), 0.6, dtype=F64)
    still = torch.zeros(12, dtype=F64)
    x = torch.zeros(12, low.environment.width - 1, dtype=F64)
    floor = low.environment.features_at(middle, x, still)[1][0]
    place = high.environment.at(rows, middle)
    assert math.isclose(float(floor), float(place.log_floored.min()), abs_tol=0.02)
    mean = place.stiffness.mean().log()
    assert math.isclose(float(floor), float(mean) + math.log(0.1), abs_tol=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"test_function": "gradient"},
        {"step_cost": "left"},
        {"constraint": "multiplier", "test_function": "gradient"},
        {"steps": 2},
        {"batch": 12},
    ],
    ids=str,
)
def test_every_option_trains(options: dict[str, Any]) -> None:
    trainer = small(**options)
    before = weights(trainer)
    records = list(trainer.train(10))
    assert len(records) == 10
    assert all(math.isfinite(r.cost) for r in records)
    assert not torch.equal(weights(trainer), before)


def test_one_trajectory_and_float32_states_train() -> None:
    flow, x_T = mixture()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single = ActorCritic(flow, x_T[:1], **{**SMALL, "batch": 1})
        assert all(math.isfinite(r.cost) for r in single.train(8))
    for environment in ("table", "model"):
        trainer = ActorCritic(flow, x_T.float(), **SMALL, environment=environment)
        assert all(math.isfinite(r.cost) for r in trainer.train(8))


# Determinism.


def test_same_seed_same_bits() -> None:
    first, second, other = small(), small(), small(seed=1)
    records = [list(trainer.train(12)) for trainer in (first, second, other)]
    assert records[0] == records[1] != records[2]
    assert same(state(first), state(second))
    assert not torch.equal(weights(first), weights(other))
    assert torch.equal(first.clocks(), second.clocks())


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    trainer = small()
    list(trainer.train(6))
    trainer.distill()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_default_dtype_does_not_matter() -> None:
    expected = small()
    list(expected.train(8))
    torch.set_default_dtype(F64)
    try:
        trainer = small()
        list(trainer.train(8))
        clocks = trainer.clocks()
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(state(trainer), state(expected))
    assert torch.equal(clocks, expected.clocks())


def test_progress_bar_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    list(small().train(6))
    assert capsys.readouterr() == ("", "")
    list(small().train(6, progress=True))
    out, err = capsys.readouterr()
    assert out == ""
    assert "ART-RL" in err
    assert "6/6" in err


# Checkpoints.


@pytest.mark.parametrize(
    "options",
    [{}, {"constraint": "multiplier"}, {"environment": "model"}],
    ids=["hard", "multiplier", "model"],
)
def test_a_killed_run_continues_bit_for_bit(
    options: dict[str, Any], tmp_path: Path
) -> None:
    straight = small(**options)
    expected = list(straight.train(12))
    file = tmp_path / "run.safetensors"
    killed = small(**options)
    for record in killed.train(12, checkpoint=file, every=3):
        if record.iteration == 8:
            break
    again = small(**options)
    records = list(again.train(12, checkpoint=file, every=3))
    assert records == expected[6:]
    assert same(state(again), state(straight))
    assert again.multiplier == straight.multiplier
    assert torch.equal(again.distill().grid(18), straight.distill().grid(18))
    # A finished run is loaded, and there is nothing left to do.
    finished = small(**options)
    assert list(finished.train(12, checkpoint=file)) == []
    assert same(state(finished), state(straight))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    file = tmp_path / "run.safetensors"
    trainer = small()
    for record in trainer.train(20, checkpoint=file, every=8):
        if record.iteration == 8:
            break
    return file


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def text(file: Path) -> None:
    file.write_text("not a checkpoint, but long enough to look like one")


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def foreign(file: Path) -> None:
    save_file({"weight": torch.zeros(3)}, file)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-500] ^= 1
    file.write_bytes(bytes(data))


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change tensors, and make the check sums fit again."""
    from artlib._common import tensor_file as _state_file

    with safe_open(str(file), framework="pt") as handle:
        header = json.loads(handle.metadata()["state"])
    tensors = load_file(file)
    change(tensors)
    _state_file.write_state(file, tensors, header, kind="artlib-actor-critic")


def put_nan(file: Path) -> None:
    rewrite(file, lambda t: t["actor.layers.0.weight"].fill_(math.nan))


def drop(file: Path) -> None:
    rewrite(file, lambda t: t.pop("critic.layers.2.bias"))


def other_device(file: Path) -> None:
    rewrite(file, lambda t: t.update(rng=torch.zeros(16, dtype=torch.uint8)))


def other_version(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"version":"1"', b'"version":"9"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated"),
        (empty, "truncated"),
        (text, "truncated or no safetensors"),
        (folder, "no safetensors file"),
        (foreign, "not a file of the kind"),
        (flip, "check sum"),
        (put_nan, "NaN"),
        (drop, "missing"),
        (other_device, "device"),
        (other_version, "version"),
    ],
)
def test_damaged_checkpoints_are_refused(
    damage: Callable[[Path], None], message: str, checkpoint: Path
) -> None:
    damage(checkpoint)
    trainer = small()
    before = state(trainer)
    with pytest.raises(CheckpointError, match=message) as caught:
        trainer.train(20, checkpoint=checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert same(state(trainer), before)
    assert trainer.iteration == 0


def test_checkpoints_of_another_problem_are_refused(checkpoint: Path) -> None:
    flow, x_T = mixture()
    others = [
        small(temperature=0.1),
        small(seed=1),
        small(hidden=17),
        ActorCritic(flow, x_T.flip(0), **SMALL),
        ActorCritic(flow, 1.01 * x_T, **SMALL),
        ActorCritic(*gaussian_1d(12), **SMALL),
    ]
    for trainer in others:
        before = state(trainer)
        with pytest.raises(CheckpointError, match="another problem"):
            trainer.load(checkpoint)
        assert same(state(trainer), before)
    # Round-off of another machine is the same problem.
    ActorCritic(flow, x_T * (1 + 1e-7), **SMALL).load(checkpoint)


def test_a_missing_checkpoint_or_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        small().load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="folder"):
        small().train(20, checkpoint=tmp_path / "none" / "run")


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_checkpoint(
    call: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = checkpoint.read_bytes()
    trainer = small()
    run = trainer.train(20, checkpoint=checkpoint, every=4)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, call, fail)
    with pytest.raises(OSError, match="No space"):
        list(run)
    monkeypatch.undo()
    assert checkpoint.read_bytes() == old
    assert os.listdir(checkpoint.parent) == [checkpoint.name]
    resumed = small()
    resumed.load(checkpoint)
    assert resumed.iteration == 8


# Bad input.


def bad_states(kind: str) -> Any:
    _, x_T = mixture()
    return {
        "1-D": x_T[:, 0],
        "nan": x_T.clone().index_fill_(0, torch.tensor([3]), math.nan),
        "int": x_T.long(),
        "list": x_T.tolist(),
        "none": x_T[:0],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("1-D", ValueError, r"x_T: expected shape \[n, \*sample_shape\]"),
        ("nan", ValueError, "x_T: 1 of 12 values are NaN"),
        ("int", TypeError, "x_T: expected a floating-point tensor"),
        ("list", TypeError, "x_T: expected a torch.Tensor"),
        ("none", ValueError, "no sample"),
    ],
)
def test_bad_states_are_refused(
    kind: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ActorCritic(mixture()[0], bad_states(kind))
    with pytest.raises(error, match=message):
        small().clocks(bad_states(kind))


def test_states_of_another_shape_are_refused_by_clocks() -> None:
    with pytest.raises(ValueError, match=r"x_T: samples of shape \(2,\), expected \(1"):
        small().clocks(torch.ones(3, 2, dtype=F64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"steps": 1}, "steps: expected at least 2"),
        ({"seed": -1}, "seed"),
        ({"floor": 0.0}, "floor"),
        ({"hidden": 0}, "hidden"),
        ({"actor_rate": math.nan}, "actor_rate"),
        ({"critic_rate": 0.0}, "critic_rate"),
        ({"multiplier_rate": -1.0}, "multiplier_rate"),
        ({"multiplier": -1.0}, "multiplier: -1.0 has no meaning"),
        ({"constraint": "multiplier", "multiplier": math.nan}, "multiplier"),
        ({"critic_updates": 0}, "critic_updates"),
        ({"warm_up": -1}, "warm_up"),
        ({"batch": 0}, "batch"),
        ({"batch": 13}, "batch: 13 exceeds the 12 trajectories"),
        ({"constraint": "soft"}, "constraint: expected one of"),
        ({"environment": "real"}, "environment: expected one of"),
        ({"step_cost": "right"}, "step_cost: expected one of"),
        ({"step_cost": ""}, "step_cost: expected one of"),
        ({"test_function": "none"}, "test_function: expected one of"),
        ({"environment": "model", "step_cost": "exact"}, "needs the table"),
        ({"points": 2}, "points"),
        ({"method": "euler"}, "method"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_lengths_of_a_run_are_refused(checkpoint: Path) -> None:
    for bad in (0, -3):
        with pytest.raises(ValueError, match="iterations"):
            small().train(bad)
    with pytest.raises(TypeError, match="iterations"):
        small().train(10.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every"):
        small().train(10, every=0)
    with pytest.raises(ValueError, match="warm-up of 5, and the actor would never"):
        small().train(5)
    with pytest.raises(ValueError, match="planned for 20, got 30"):
        small().train(30, checkpoint=checkpoint)


def test_something_else_than_a_flow_is_refused() -> None:
    with pytest.raises(TypeError, match="ProbabilityFlow"):
        ActorCritic(lambda x, t: x, mixture()[1])  # type: ignore[arg-type]


def test_a_flow_that_returns_nan_half_way_is_refused() -> None:
    flow, x_T = mixture()

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t > 0.1, flow.denoise(x, t), math.nan)

    with pytest.raises(ValueError, match="NaN"):
        ActorCritic(ProbabilityFlow(PROCESS, broken), x_T, **SMALL)


def test_straight_paths_are_refused() -> None:
    process = RectifiedFlow()
    # Rectified flow to a point: x moves at constant velocity.
    flow = ProbabilityFlow(process, lambda x, t: torch.zeros_like(x))
    table = artlib.stiffness_table(flow, torch.ones(3, 2, dtype=F64))
    if float(table.values.max()) > 0:
        pytest.skip("round-off left some acceleration")
    with pytest.raises(ValueError, match="straight"):
        ActorCritic(flow, torch.ones(3, 2, dtype=F64), **{**SMALL, "batch": 3})


def test_nan_in_training_stops_it_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    flow, x_T = mixture()
    healthy = [True]

    def fragile(x: Tensor, t: Tensor) -> Tensor:
        return flow.denoise(x, t) * (1.0 if healthy[0] else math.nan)

    options = {**SMALL, "environment": "model"}
    trainer = ActorCritic(ProbabilityFlow(PROCESS, fragile), x_T, **options)
    file = tmp_path / "run"
    run = trainer.train(30, checkpoint=file, every=4)
    for record in run:
        if record.iteration == 10:
            break
    before = state(trainer)
    healthy[0] = False
    run = trainer.train(30)
    with pytest.raises(TrainingError, match=r"iteration 11: .*NaN.*check the denoiser"):
        next(run)
    assert same(state(trainer), before)  # the draws of the lost iteration too
    assert trainer.iteration == 10
    with pytest.raises(TrainingError, match="NaN"):
        trainer.distill()
    healthy[0] = True
    resumed = ActorCritic(ProbabilityFlow(PROCESS, fragile), x_T, **options)
    resumed.load(file)
    assert resumed.iteration == 8
    assert next(trainer.train(30)).iteration == 11


def test_an_interrupted_iteration_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, expected = small(), small()
    list(expected.train(12))
    run = trainer.train(12)
    for _ in range(7):
        next(run)
    before = state(trainer)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # Between the critic's update and the actor's.
    monkeypatch.setattr(trainer._loop.learner, "update_actor", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(run)
    monkeypatch.undo()
    assert same(state(trainer), before)
    list(trainer.train(12))
    assert same(state(trainer), state(expected))


def test_broken_weights_are_reported() -> None:
    trainer = small()
    run = trainer.train(20)
    next(run)
    with torch.no_grad():
        trainer.critic.layers[4].bias.fill_(1e4)  # V = exp of that
    with pytest.raises(TrainingError, match=r"iteration 2: .*lower\s+critic_rate"):
        next(run)


# Warnings.


def test_divergence_is_reported_with_a_remedy() -> None:
    trainer = small(actor_rate=1.0, warm_up=20, steps=18, batch=12)
    with pytest.warns(DivergenceWarning, match="lower actor_rate") as caught:
        list(trainer.train(60))
    assert len(caught) == 1  # once
    # It points past artlib (here, at what checks types around the iterator).
    assert not caught[0].filename.startswith(str(Path(artlib.__file__).parent))


def test_the_naive_cost_diverges_and_is_reported() -> None:
    # At the default temperature the loophole is not found within 400 iterations.
    trainer = small(
        step_cost="left",
        test_function="gradient",
        temperature=0.05,
        steps=18,
        batch=12,
    )
    run = trainer.train(400)
    with pytest.warns(DivergenceWarning, match="step_cost='exact'"):
        next(record for record in run if trainer._watch.warned)


def test_an_open_end_is_reported() -> None:
    trainer = small(constraint="multiplier", multiplier_rate=1e-6, steps=4)
    with torch.no_grad():
        trainer.actor.layers[4].bias.fill_(-3.0)
    with pytest.warns(DivergenceWarning, match="raise multiplier_rate"):
        list(trainer.train(110))


def test_a_good_run_warns_of_nothing(
    trained: tuple[ActorCritic, list[TrainingRecord]],
) -> None:
    assert not trained[0]._watch.warned


def test_edm_is_beaten(trained: tuple[ActorCritic, list[TrainingRecord]]) -> None:
    trainer, _ = trained
    table = trainer.table
    assert table.cost(trainer.distill()) < 0.9 * table.cost(edm(PROCESS, pinned=False))


def test_training_runs_on_another_device(
    tmp_path: Path, accelerator: torch.device
) -> None:
    # With the model in the loop; on the table: tests/test_other_device.py.
    flow, x_T = mixture()
    options = {**SMALL, "environment": "model", "steps": 3, "warm_up": 2}
    trainer = ActorCritic(flow, x_T.to(accelerator), **options)
    file = tmp_path / "run"
    records = list(trainer.train(3, checkpoint=file))
    assert all(math.isfinite(r.cost) for r in records)
    assert trainer.clocks().device.type == "cpu"
    again = ActorCritic(flow, x_T.to(accelerator), **options)
    again.load(file)
    assert torch.equal(again.clocks(), trainer.clocks())
    # States on the CPU, training on the device.
    apart = ActorCritic(flow, x_T, **options, device=accelerator)
    assert math.isfinite(next(apart.train(3)).cost)
    if accelerator.type == "cuda":  # the simulated one draws the CPU's numbers
        with pytest.raises(CheckpointError, match="device"):
            ActorCritic(flow, x_T, **options).load(file)


# What an iteration is taught with.


@pytest.mark.parametrize("constraint", ["hard", "multiplier"])
def test_exploring_is_paid_for_the_steps_that_are_drawn(constraint: Any) -> None:
    r"""r = -cost + lambda E[z^2] dt, with E[z^2] = 0.774 of draws cut at 2."""
    problem = mixture_1d(PROCESS, 6)
    K, temperature = 5, 0.01
    trainer = ActorCritic(
        problem.flow(),
        problem.x_T,
        steps=K,
        temperature=temperature,
        constraint=constraint,
        points=16,
        warm_up=0,
    )
    seen: list[tuple[Episodes, Tensor]] = []
    learner = trainer._loop.learner
    usual = learner.update_critic

    def update(episodes: Episodes, reward: Tensor, *rest: Any) -> Tensor:
        seen.append((episodes, reward))
        return usual(episodes, reward, *rest)

    learner.update_critic = update  # type: ignore[method-assign]
    next(iter(trainer.train(2)))
    episodes, reward = seen[0]
    bonus = reward + episodes.charged
    expected = torch.full_like(bonus, temperature * 0.7737 / K)
    if constraint == "hard":
        expected[-1] = 0  # that step is forced, not drawn
    torch.testing.assert_close(bonus, expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("test_function", ["relative", "gradient"])
def test_the_actor_weighs_its_steps_by_the_time_that_is_left(
    test_function: Any,
) -> None:
    """(29b) with the test function 1 / (1 - tau), tau = k / K; or 1."""
    problem = mixture_1d(PROCESS, 6)
    K = 5
    trainer = ActorCritic(
        problem.flow(),
        problem.x_T,
        steps=K,
        points=16,
        test_function=test_function,
    )
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(K, 6, generator=rng, dtype=torch.float64)
    episodes = trainer._loop.play(torch.arange(6), noise=noise.clamp(-2, 2))
    increment = torch.randn(K - 1, 6, generator=rng, dtype=torch.float64)
    found = trainer._loop.learner.actor_objective(episodes, increment)
    total = torch.zeros(6, dtype=torch.float64)
    for k in range(K - 1):
        tau = torch.full((6,), k / K, dtype=torch.float64)
        output = trainer.actor(episodes.rho[k], tau, episodes.features[k])
        weight = K / (K - k) if test_function == "relative" else 1.0
        total = total + weight * output * episodes.score[k] * increment[k]
    torch.testing.assert_close(found, total.mean(), rtol=1e-5, atol=1e-9)


def test_nothing_trained_is_not_distilled_and_said() -> None:
    trainer = small()
    with pytest.raises(TrainingError, match=r"distill: nothing was trained.*fit"):
        trainer.distill()
    with pytest.warns(UserWarning, match=r"train: nothing was trained.*trainer\.fit"):
        trainer.train(6)
    assert trainer.iteration == 0
    last = trainer.fit(6)
    assert last is not None
    assert last.iteration == trainer.iteration == 6
    looped = small()
    assert list(looped.train(6))[-1] == last
    assert torch.equal(trainer.distill().grid(9), looped.distill().grid(9))
