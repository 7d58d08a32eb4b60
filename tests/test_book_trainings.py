"""Prices of clocks of K steps, and what is kept of a training."""

import json
import math

import numpy as np
import pytest
import torch

import artlib
from artlib import book

VE = artlib.VE(sigma_min=0.002, sigma_max=80.0)
PATHS = 3


@pytest.fixture(scope="module")
def table() -> artlib.StiffnessTable:
    """|Q| = |z| (sigma^2 + 1)^(-3/2) on paths with |z| = 1, 2 and 3."""
    times = torch.linspace(math.asinh(80.0), math.asinh(0.002), 400).double().sinh()
    times[0], times[-1] = VE.t_max, VE.t_min
    stiffness = torch.arange(1.0, PATHS + 1).double()[:, None]
    return artlib.StiffnessTable(VE, times, stiffness * (times**2 + 1) ** -1.5)


def same(times: torch.Tensor) -> torch.Tensor:
    return times.expand(PATHS, -1)


def test_true_cost_of_two_steps_is_their_integral(table: artlib.StiffnessTable) -> None:
    # The integral of (s^2 + 1)^(-3/2) is s / sqrt(s^2 + 1); |z| is 2 on average.
    nodes = torch.tensor([80.0, 1.5, 0.002], dtype=torch.float64)
    passed = -np.diff(nodes / (nodes**2 + 1).sqrt())
    speeds = -np.diff(nodes) * 2 / table.span
    truth = 2 * (speeds * passed).sum() / table.lower_bound()
    _, found = book.clock_prices(table, same(nodes))
    assert abs(found / truth - 1) < 1e-4
    # One that stops short pays for the way to the end in its last step.
    short = nodes.clone()
    short[-1] = 1.0
    assert book.clock_prices(table, same(short))[1] == found


def test_charge_of_a_jump_is_proportional_to_the_number_of_steps(
    table: artlib.StiffnessTable,
) -> None:
    charged = []
    for K in (10, 40):
        nodes = torch.cat([torch.tensor([80.0]), torch.linspace(0.002001, 0.002, K)])
        price, truth = book.clock_prices(table, same(nodes.double()))
        # The first step takes it all: |Q| at 80, speed K, for the time T / K.
        assert price == pytest.approx(
            2 * (80.0**2 + 1) ** -1.5 * K * table.span / table.lower_bound(), rel=1e-3
        )
        assert truth > 100 * price
        charged.append(price)
    assert charged[1] / charged[0] == pytest.approx(4, rel=1e-3)


def test_both_prices_of_the_best_clock_come_to_the_bound(
    table: artlib.StiffnessTable,
) -> None:
    best = table.art()
    gaps = []
    for K in (100, 400):
        nodes = book.even_times(best, K)
        assert nodes[0] == VE.t_max
        assert nodes[-1] == pytest.approx(VE.t_min)
        charged, truth = book.clock_prices(table, same(nodes))
        assert charged < 1 < truth  # the one is not a cost, and the other is
        gaps.append((1 - charged, truth - 1))
    for first, second in zip(*gaps, strict=True):
        assert second < 0.5 * first


def test_one_clock_for_many_paths_is_refused(table: artlib.StiffnessTable) -> None:
    nodes = book.even_times(table.art(), 5)
    with pytest.raises(ValueError, match=r"a clock for each of 3 paths.*expand"):
        book.clock_prices(table, nodes)


def test_notes_of_a_training_give_its_clock_again() -> None:
    normal = artlib.Gaussian([0.0], [[1.0]])
    flow = artlib.ProbabilityFlow(VE, normal.denoiser(VE))
    x_T = normal.sample_prior(VE, 8, seed=0)
    options = {"steps": 4, "seed": 0, "batch": 8, "warm_up": 2}
    notes, trainer = book.train_and_note(
        flow, x_T, 6, every=2, priced=True, clocks=3, **options
    )
    assert json.loads(json.dumps(notes)) == notes
    assert notes["curve"]["iteration"] == [1, 2, 4, 6]
    last = book.clock_prices(trainer.table, trainer.clocks())
    for key, price in zip(("charged", "true"), last, strict=True):
        assert notes["curve"][key][-1] == pytest.approx(price, rel=1e-3)
    noted = torch.tensor(notes["clocks"], dtype=torch.float64)
    assert ((noted / trainer.clocks()[:3] - 1).abs() < 1e-5).all()
    again = book.learned_clock(VE, notes["times"])
    assert again.name == "ART-RL"
    gap = book.even_times(again, 4) / book.even_times(trainer.distill(), 4) - 1
    assert gap.abs().max() < 1e-6
