"""A step of one's own as the solver: against the solver that it copies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import artlib
from artlib.flow.denoisers import CountNFE
from artlib.flow.flow import ProbabilityFlow
from artlib.flow.targets import Gaussian

F64 = torch.float64
PROCESS = artlib.VE(sigma_max=20.0)
VARIANCES = torch.tensor([1.0, 0.09], dtype=F64)
TARGET = Gaussian(torch.zeros(2, dtype=F64), torch.diag(VARIANCES))
GRID = artlib.edm(PROCESS).grid(6)


def flow() -> ProbabilityFlow:
    return ProbabilityFlow(PROCESS, TARGET.denoiser(PROCESS))


def noise(n: int = 12) -> Tensor:
    return TARGET.sample_prior(PROCESS, n, seed=0)


def heun(flow: ProbabilityFlow, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    slope = flow.velocity(x, t)
    return x + (s - t) / 2 * (slope + flow.velocity(x + (s - t) * slope, s))


def clumsy(flow: ProbabilityFlow, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Euler's step, written over all that it was given."""
    x += (s - t) * flow.velocity(x, t)
    t.zero_()
    s.zero_()
    return x


class Told:
    """Euler with a number of evaluations that a count would not find."""

    evaluations = 5

    def __call__(
        self, flow: ProbabilityFlow, x: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        return x + (s - t) * flow.velocity(x, t)


@pytest.mark.parametrize("grid", [GRID, GRID[:-1], GRID[-2:]])
def test_a_copy_of_heun_samples_as_heun(grid: Tensor) -> None:
    """Grids to 0 (the last step is Euler's), above 0, and of one step."""
    visited: list[tuple[int, float]] = []
    found = artlib.sample(
        flow(),
        noise(),
        grid,
        solver=heun,
        callback=lambda k, t, x: visited.append((k, t)),
    )
    expected = artlib.sample(flow(), noise(), grid, solver="heun")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert visited == list(enumerate(grid.tolist()))


def test_the_dtype_of_the_state_stays() -> None:
    x = noise().float()
    found = artlib.sample(flow(), x, GRID, solver=lambda f, x, t, s: x.double())
    assert found.dtype == torch.float32


def test_what_a_step_does_in_place_is_its_own() -> None:
    x, grid = noise(), GRID.clone()
    found = artlib.sample(flow(), x, grid, solver=clumsy)
    expected = artlib.sample(flow(), noise(), GRID, solver="euler")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(x, noise())
    assert torch.equal(grid, GRID)
    table = artlib.error_table(flow(), noise(), solver=clumsy, points=9)
    usual = artlib.error_table(flow(), noise(), solver="euler", points=9)
    torch.testing.assert_close(table.values, usual.values, rtol=1e-6, atol=1e-12)
    assert table.order == 1


@pytest.mark.parametrize("solver", [heun, clumsy, functools.partial(heun)])
@pytest.mark.parametrize("grid", [GRID, GRID[:-1]])
def test_evaluations_are_counted(solver: Any, grid: Tensor) -> None:
    counter = CountNFE(flow().denoiser)
    artlib.sample(flow().with_denoiser(counter), noise(), grid, solver=solver)
    assert artlib.nfe(grid, solver=solver) == counter.nfe


def test_evaluations_that_are_told_are_believed() -> None:
    assert artlib.nfe(GRID, solver=Told()) == 5 * 5 + 1
    assert artlib.nfe(GRID[:-1], solver=Told()) == 5 * 5


def test_refine_moves_the_nodes_as_for_heun() -> None:
    start = artlib.edm(PROCESS, pinned=False)
    options: dict[str, Any] = {"iterations": 4}
    own = artlib.refine(start, flow(), noise(), 4, solver=heun, **options)
    usual = artlib.refine(start, flow(), noise(), 4, solver="heun", **options)
    torch.testing.assert_close(own.grid(4), usual.grid(4), rtol=1e-6, atol=0)
    assert own.provenance["solver"] == "heun"
    assert not torch.equal(own.grid(4), start.grid(4))


def test_compare_has_a_row_of_its_own_for_a_step() -> None:
    x = [noise()]
    schedules = {"EDM": artlib.edm(PROCESS)}

    def mine(flow: ProbabilityFlow, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return heun(flow, x, t, s)

    budgets: dict[Any, list[int]] = {"heun": [4], mine: [4], "euler": [4]}
    found = artlib.compare(
        flow(), schedules, x, budgets, ends=artlib.references(flow(), x)
    )
    assert found.nfe == {"heun 4": 7, "mine 4": 7, "euler 4": 4}
    expected = found.mean("heun", 4, "EDM", "error")
    assert found.mean("mine", 4, "EDM", "error") == pytest.approx(expected, rel=1e-9)


def test_a_step_is_called_by_its_name_without_blanks() -> None:
    """The key of a row is solver and K, with a blank between."""

    def mine(flow: ProbabilityFlow, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return heun(flow, x, t, s)

    mine.__name__ = "my own step"
    x, budgets = [noise()], {mine: [4], functools.partial(heun): [3], Told(): [2]}
    found = artlib.compare(flow(), {"EDM": artlib.edm(PROCESS)}, x, budgets, ends=x)
    assert list(found.nfe) == ["my-own-step 4", "heun 3", "Told 2"]
    assert found.steps("my-own-step") == [4]


def test_two_steps_of_one_name_are_refused() -> None:
    x = [noise()]
    budgets: dict[Any, list[int]] = {heun: [4], "heun": [4]}
    with pytest.raises(ValueError, match=r"budgets: two solvers are called 'heun'"):
        artlib.compare(flow(), {"EDM": artlib.edm(PROCESS)}, x, budgets, ends=x)


def test_a_file_that_knows_a_step_by_its_name_only_is_refused(tmp_path: Path) -> None:
    x = [noise()]
    with pytest.raises(ValueError, match="file: the step 'heun' cannot be told"):
        artlib.compare(
            flow(),
            {"EDM": artlib.edm(PROCESS)},
            x,
            {heun: [4]},
            ends=x,
            file=tmp_path / "table.json",
        )


def test_a_clock_per_sample_gives_a_step_columns_of_times() -> None:
    clock = artlib.ExactClock(5, points=17)
    for x in (noise(), noise().float()):
        found = artlib.sample(flow(), x, clock=clock, solver=heun)
        expected = artlib.sample(flow(), x, clock=clock, solver="heun")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert found.dtype == x.dtype


def test_exact_error_of_a_copy_of_heun() -> None:
    found = artlib.gaussian_w2(PROCESS, VARIANCES, GRID, solver=heun)
    expected = artlib.gaussian_w2(PROCESS, VARIANCES, GRID, solver="heun")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    spectrum = torch.logspace(-2, 1, 7, dtype=F64)
    oracle = artlib.oracle_grid(PROCESS, spectrum, 3, solver=heun)
    usual = artlib.oracle_grid(PROCESS, spectrum, 3, solver="heun")
    torch.testing.assert_close(oracle, usual, rtol=1e-4, atol=0)


def shrinking(flow: ProbabilityFlow, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return torch.tanh(x + (s - t) * flow.velocity(x, t))


def mixing(flow: ProbabilityFlow, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return x + (s - t) * (flow.velocity(x, t) + 0.1 * x.flip(1))


@pytest.mark.parametrize("step", [shrinking, mixing])
def test_a_step_that_leaves_no_gaussian_is_refused(step: Any) -> None:
    for call in (
        lambda: artlib.gaussian_w2(PROCESS, VARIANCES, GRID, solver=step),
        lambda: artlib.oracle_grid(PROCESS, VARIANCES, 3, solver=step),
    ):
        with pytest.raises(ValueError, match="solver: its step is not linear"):
            call()


CALLS: dict[str, Callable[[Any], object]] = {
    "sample": lambda s: artlib.sample(flow(), noise(), GRID, solver=s),
    "clock": lambda s: artlib.sample(
        flow(), noise(), clock=artlib.ExactClock(3, points=9), solver=s
    ),
    "nfe": lambda s: artlib.nfe(GRID, solver=s),
    "art": lambda s: artlib.art(flow(), noise(), solver=s, points=9),
    "error_table": lambda s: artlib.error_table(flow(), noise(), solver=s, points=9),
    "refine": lambda s: artlib.refine(
        artlib.edm(PROCESS), flow(), noise(), 3, solver=s
    ),
    "compare": lambda s: artlib.compare(
        flow(), {"EDM": artlib.edm(PROCESS)}, [noise()], {s: [3]}, ends=[noise()]
    ),
    "gaussian_w2": lambda s: artlib.gaussian_w2(PROCESS, VARIANCES, GRID, solver=s),
    "oracle_grid": lambda s: artlib.oracle_grid(PROCESS, VARIANCES, 3, solver=s),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("solver", "error", "message"),
    [
        ("huen", ValueError, "solver: unknown 'huen'; the solvers are euler, heun"),
        (7, TypeError, "solver: expected a name, a Solver or a callable.*got int"),
        (lambda x, t: x, TypeError, "does not take these four arguments"),
    ],
)
def test_what_is_no_solver_is_refused(
    call: str, solver: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CALLS[call](solver)


@pytest.mark.parametrize("call", sorted(set(CALLS) - {"nfe"}))
@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (lambda f, x, t, s: None, TypeError, "states at s as a tensor, got NoneType"),
        (lambda f, x, t, s: x[:, :1], ValueError, "solver: .* return the shape"),
    ],
)
def test_what_is_no_state_is_refused(
    call: str, step: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CALLS[call](step)


def test_a_step_whose_evaluations_cannot_be_counted_is_refused() -> None:
    class Wrong(Told):
        evaluations = 0

    class Yes(Told):
        evaluations = True

    for step, message in (
        (Yes(), "integer of at least 1"),
        (lambda f, x, t, s: x @ torch.ones(5, 5), "its attribute evaluations"),
        (lambda f, x, t, s: x, "evaluates no network"),
        (Wrong(), "integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            artlib.nfe(GRID, solver=step)
