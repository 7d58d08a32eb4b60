"""Mixtures of densities: the family, what is least in it, what it does for `art`."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from problems import mixture_16d
from torch import Tensor

import artlib
from artlib.control.matched import Size
from artlib.control.mixture import (
    DENSITIES,
    Candidate,
    Judge,
    best_mixture,
    coordinate_of,
    mixed,
)
from artlib.flow.noise_coordinate import table_times

F64 = torch.float64
WIDE = artlib.VE(sigma_min=0.002, sigma_max=80.0)
ALL = torch.ones(1, dtype=torch.bool)
TIMES = table_times(WIDE, 65)
Z = coordinate_of(WIDE, TIMES)


def power(exponent: float) -> Candidate:
    """Density proportional to a power of time, of mean 1."""
    found = TIMES**exponent
    return lambda asked: found / found.mean()


def size(value: float) -> Size:
    return Size(value, value, value)


def test_the_family_holds_what_it_is_made_of() -> None:
    several = {"one": power(-0.5), "two": power(0.25)}
    for exponents, expected in (
        ((1, 0, 0, 0), power(-0.5)),
        ((0, 1, 0, 0), power(0.25)),
        ((0.5, 0.5, 0, 0), power(-0.125)),  # the geometric mean
        ((2, 0, 0, 0), power(-1.0)),  # a sharper one
    ):
        found = mixed(several, exponents, Z)(ALL)
        torch.testing.assert_close(found, expected(ALL), rtol=1e-12, atol=0)


def test_tilt_and_bend_are_those_of_the_log_noise_level() -> None:
    """The times of a table are even in it, so that a tilt is a power of time."""
    spread = float(TIMES.log().std())
    several = {"flat": power(0.0)}
    tilted = mixed(several, (1, 0.7, 0), Z)(ALL)
    torch.testing.assert_close(tilted, power(0.7 / spread)(ALL), rtol=1e-9, atol=0)
    bent = mixed(several, (1, 0, 0.4), Z)(ALL).log()
    second = bent.diff().diff() / Z.diff()[:-1] ** 2
    torch.testing.assert_close(second, torch.full_like(second, 0.8))
    assert float(Z.mean()) == pytest.approx(0, abs=1e-12)
    assert float(Z.std()) == pytest.approx(1)


def test_a_clock_moves_everywhere_whatever_the_exponents() -> None:
    for exponents in ((90.0, 0.0, 0.0), (-90.0, 0.0, 0.0), (0.0, 80.0, -80.0)):
        found = mixed({"one": power(-1.0)}, exponents, Z)(ALL)
        assert torch.isfinite(found).all()
        assert float(found.min()) > 1e-7
        assert float(found.mean()) == pytest.approx(1)


def test_what_is_least_is_the_worst_measure() -> None:
    judge = Judge([[Size(2.0, 9, 4.0)], [Size(4.0, 9, 1.0)]])
    assert judge.score([Size(2.0, 0, 1.0)]) == pytest.approx(0, abs=1e-5)
    found = judge.score([Size(4.0, 0, 3.0)])
    assert found == pytest.approx(math.log(3), abs=1e-4)
    below = judge.score([Size(1.0, 0, 0.2)])
    assert below == pytest.approx(-math.log(2), abs=1e-4)


def test_what_is_least_does_not_know_the_unit() -> None:
    rows = [[Size(2.0, 9, 4.0), Size(1, 1, 1)], [Size(4.0, 9, 1.0), Size(2, 2, 0.5)]]
    asked = [Size(3.0, 3, 2.0), Size(1.5, 1, 0.7)]

    def scaled(sizes: list[Size], by: float) -> list[Size]:
        return [Size(s.rms * by, s.mean * by, s.median * by) for s in sizes]

    found = Judge([scaled(row, 1e-3) for row in rows]).score(scaled(asked, 1e-3))
    assert found == pytest.approx(Judge(rows).score(asked))


def test_rounding_is_not_told_apart_and_infinity_is_hopeless() -> None:
    """On a finite data set most samples end on a point, exactly."""
    judge = Judge([[Size(1.0, 1, 1e-15)], [Size(1.1, 1, 1e-9)]])
    assert judge.score([Size(1.0, 1, 1e-9)]) < 0.01
    assert judge.score([Size(1.0, 1, 0.0)]) < 0.01
    exact = Judge([[Size(0.0, 0, 0.0)]])
    assert exact.score([Size(0.0, 0, 0.0)]) == pytest.approx(0)
    lost = Size(math.inf, math.inf, math.inf)
    assert judge.score([lost]) == 100
    assert Judge([[lost], [lost]]).score([Size(1.0, 1, 1.0)]) < -10


def distance(candidate: Candidate, goal: Candidate) -> float:
    return float((candidate(ALL) - goal(ALL)).abs().max())


def test_it_finds_a_density_between_the_candidates() -> None:
    several = {"one": power(-1.0), "two": power(0.5), "three": power(1.0)}
    goal, asked = power(-0.2), list[Candidate]()

    def run(candidate: Candidate) -> list[Size]:
        asked.append(candidate)
        return [size(1e-3 + distance(candidate, goal))]

    sizes = {label: run(candidate) for label, candidate in several.items()}
    asked.clear()
    mixture = best_mixture(several, sizes, run, Z, runs=300)
    before = min(distance(candidate, goal) for candidate in several.values())
    assert distance(mixture.candidate, goal) < 0.05 * before
    assert mixture.runs == len(asked) <= 300
    again = mixed(
        {label: several[label] for label in mixture.labels}, mixture.exponents, Z
    )
    assert torch.equal(again(ALL), mixture.candidate(ALL))


@pytest.mark.parametrize("runs", [1, 7])
def test_no_candidate_is_better_however_few_the_runs(runs: int) -> None:
    several = {str(p): power(p) for p in (-1.0, -0.5, 0.0, 0.3, 0.5, 1.0)}
    sizes = {label: [size(1.0 + float(label) ** 2)] for label in several}
    asked = []

    def run(candidate: Candidate) -> list[Size]:
        asked.append(candidate)
        return [size(math.nan if len(asked) % 2 else 2.0)]

    mixture = best_mixture(several, sizes, run, Z, runs=runs)
    assert len(asked) == mixture.runs == runs
    assert len(mixture.labels) == DENSITIES
    assert mixture.labels[0] == "0.0"
    assert mixture.score == pytest.approx(0, abs=1e-4)
    assert torch.equal(mixture.candidate(ALL), several["0.0"](ALL))


def test_it_reaches_the_optimum_of_a_gaussian() -> None:
    """W2 of Euler's method on one variance: the numerical optimum over all grids."""
    variance = torch.full((4,), 0.3, dtype=F64)
    target = artlib.Gaussian(torch.zeros(4, dtype=F64), variance.diag())
    flow = artlib.ProbabilityFlow(WIDE, target.denoiser(WIDE))
    x = target.sample_prior(WIDE, 32, seed=5)
    for K in (4, 7):
        schedule = artlib.art(flow, x, solver="euler", steps=K)
        found = float(artlib.gaussian_w2(WIDE, variance, schedule.grid(K)))
        best = artlib.oracle_grid(WIDE, variance, K)
        least = float(artlib.gaussian_w2(WIDE, variance, best))
        assert least * (1 - 1e-9) <= found < 1.01 * least


@functools.cache
def unseen() -> tuple[Tensor, Tensor]:
    """States that nothing was learned from, and where they end."""
    problem = mixture_16d(WIDE, 348)
    x = problem.x_T[48:]
    return x, problem.exact(x, WIDE.t_max, 0.0)


def unseen_errors(schedule: artlib.Schedule, solver: str, K: int) -> Tensor:
    x, exact = unseen()
    found = artlib.sample(mixture_16d(WIDE).flow(), x, schedule.grid(K), solver=solver)
    return (found - exact).flatten(1).norm(dim=1)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc3", "ipndm3"])
def test_on_unseen_noise_the_worse_of_two_measures_is_better(solver: str) -> None:
    """In units of the best formula of each measure, as tables judge."""
    problem = mixture_16d(WIDE, 48)
    formulas = (
        artlib.edm(WIDE),
        artlib.edm(WIDE, pinned=False),
        artlib.log_snr(WIDE, pinned=False),
        artlib.kl_optimal(WIDE),
    )
    gains = []
    for K in (5, 8, 10):
        flow, x = problem.flow(), problem.x_T
        schedules = [
            artlib.art(flow, x, solver=solver, steps=K, runs=0),
            artlib.art(flow, x, solver=solver, steps=K),
            *formulas,
        ]
        errors = [unseen_errors(schedule, solver, K) for schedule in schedules]
        both = np.array([[e.square().mean().sqrt(), e.median()] for e in errors])
        plain, searched = (both[:2] / both[2:].min(axis=0)).max(axis=1)
        gains.append(searched / plain)
    assert max(gains) < 1.1
    assert np.exp(np.mean(np.log(gains))) < 0.9


def test_what_it_did_is_known_and_kept() -> None:
    problem, rows = mixture_16d(WIDE, 24), []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return problem.denoiser(x, t)

    flow = artlib.ProbabilityFlow(WIDE, denoiser)
    ways: dict[str, Any] = {"solver": "ipndm3"}
    schedule = artlib.art(flow, problem.x_T, steps=[4, 6], runs=9, **ways)
    made = schedule.provenance
    assert made["runs"] == 9
    assert made["steps"] == [4, 6]
    assert 0 <= sum(rows) / 24 - made["nfe"] <= 2  # probes
    assert set(made["mixed"]) <= set(made["disadvantage"])
    assert len(made["exponents"]) == len(made["mixed"]) + 2
    assert made["density"].startswith("mixture: ")
    assert artlib.Schedule.from_json(schedule.to_json()) == schedule
    assert artlib.art(flow, problem.x_T, steps=[4, 6], runs=9, **ways) == schedule
    halves = artlib.art(flow, problem.x_T, steps=[4, 6], runs=9, batch=7, **ways)
    torch.testing.assert_close(halves.grid(6), schedule.grid(6), rtol=1e-6, atol=0)
    plain = artlib.art(flow, problem.x_T, steps=[4, 6], runs=0, **ways)
    assert "mixed" not in plain.provenance
    assert made["nfe"] - plain.provenance["nfe"] == pytest.approx(96 + 9 * 10, abs=40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "heun", "runs": 5}, "runs: .*pass steps"),
        ({"runs": 5}, "runs: .*pass steps"),
        ({"solver": "heun", "steps": 5, "runs": -1}, "runs: .*-1"),
        ({"solver": "heun", "steps": 5, "weight": "dual", "runs": 1}, "steps: .*no we"),
    ],
)
def test_what_makes_no_sense_is_refused(options: Any, message: str) -> None:
    problem = mixture_16d(WIDE, 8)
    with pytest.raises(ValueError, match=message):
        artlib.art(problem.flow(), problem.x_T, **options)
