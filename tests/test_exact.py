"""The exact Gaussian error of a solver on a grid, and the grid that minimises it."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from problems import PROCESSES
from torch import Tensor

import artlib
from artlib.flow.processes import VE, VP, Process, RectifiedFlow
from artlib.solvers.sample import SOLVERS

SPECTRUM = torch.tensor([4.0, 1.0, 0.3, 0.05, 1e-3], dtype=torch.float64)
# The other multistep solvers: tests/test_multistep.py.
GRIDDED = ("euler", "heun", "rk4", "dpmpp_2m")
NARROW = VE(sigma_min=0.01, sigma_max=10.0)

solvers = pytest.mark.parametrize("solver", GRIDDED)
processes = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)


def w2(process: Process, grid: Tensor, solver: str = "euler") -> float:
    return float(artlib.gaussian_w2(process, SPECTRUM, grid, solver=solver))


def cube_root_grid(process: Process, steps: int, end: float) -> Tensor:
    ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    nodes = (process.t_max ** (1 / 3) * (1 - ramp) + end ** (1 / 3) * ramp) ** 3
    nodes[0], nodes[-1] = process.t_max, end
    return nodes


@pytest.mark.parametrize("solver", [*GRIDDED, "unipc"])
@processes
def test_output_is_that_of_samples(process: Process, solver: str) -> None:
    """Any covariance: the sampled one has the eigenvalues that the function says."""
    count, d = 40_000, len(SPECTRUM)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(4)).double()
    basis = torch.linalg.qr(mixing).Q
    cov = basis @ torch.diag(SPECTRUM) @ basis.T
    target = artlib.Gaussian(torch.zeros(d, dtype=torch.float64), (cov + cov.T) / 2)
    flow = artlib.ProbabilityFlow(process, target.denoiser(process))
    grid = cube_root_grid(process, 4, 0.0)
    noise = target.sample_prior(process, count, seed=5)
    along = artlib.sample(flow, noise, grid, solver=solver) @ basis

    exact = artlib.gaussian_output_std(process, SPECTRUM, grid, solver=solver)
    # The sample std of N normal draws scatters by 1 / sqrt(2 N).
    scatter = along.std(0) / exact - 1
    assert scatter.abs().max() < 4.5 / math.sqrt(2 * count)
    # No correlation between eigenvectors: entries scatter by 1 / sqrt(N).
    correlation = torch.corrcoef(along.T) - torch.eye(d)
    assert correlation.abs().max() < 4.5 / math.sqrt(count)
    # And without scatter: on the same noise the factor is exact, draw by draw.
    start = torch.sqrt(
        process.alpha(grid[0]) ** 2 * SPECTRUM + process.sigma(grid[0]) ** 2
    )
    torch.testing.assert_close(
        along.abs(), (noise @ basis).abs() * exact / start, rtol=1e-7, atol=1e-9
    )


def test_one_dpmpp_step_to_zero_returns_the_denoised_prior() -> None:
    for process in PROCESSES:
        time = torch.tensor(process.t_max, dtype=torch.float64)
        alpha, sigma = process.alpha(time), process.sigma(time)
        expected = alpha * SPECTRUM / torch.sqrt(alpha**2 * SPECTRUM + sigma**2)
        found = artlib.gaussian_output_std(
            process, SPECTRUM, [process.t_max, 0.0], solver="dpmpp_2m"
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("solver", [*GRIDDED, "unipc"])
@processes
def test_differentiable_in_the_grid(process: Process, solver: str) -> None:
    grid = cube_root_grid(process, 4, 0.0)
    inner = grid[1:-1].clone().requires_grad_(True)

    def distance(inner: Tensor) -> Tensor:
        nodes = torch.cat([grid[:1], inner, grid[-1:]])
        return artlib.gaussian_w2(process, SPECTRUM, nodes, solver=solver)

    assert torch.autograd.gradcheck(distance, (inner,), eps=1e-6 * process.t_min**0.5)


@solvers
@processes
def test_order_of_convergence(process: Process, solver: str) -> None:
    """On grids that end above zero; the last step to 0 is Euler's for every solver."""
    without_signal = process.name == "rectified-flow"
    if SOLVERS[solver].history and (without_signal or solver != "dpmpp_2m"):
        pytest.skip("by their own starts, and from starts with signal: test_multistep")
    end = 0.05 * process.t_max
    steps = np.array([64, 96, 128, 192] if solver != "rk4" else [32, 48, 64, 96])
    errors = [w2(process, cube_root_grid(process, K, end), solver) for K in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(SOLVERS[solver].order, abs=0.2)


@solvers
@processes
def test_vanishes_with_the_step(process: Process, solver: str) -> None:
    coarse, fine = (
        w2(process, cube_root_grid(process, K, 0.0), solver) for K in (50, 1000)
    )
    assert fine < min(0.2 * coarse, 0.01)


@processes
def test_is_the_gaussian_distance_of_the_metrics(process: Process) -> None:
    grid, zero = cube_root_grid(process, 5, 0.0), torch.zeros(len(SPECTRUM))
    std = artlib.gaussian_output_std(process, SPECTRUM, grid, solver="heun")
    found = w2(process, grid, "heun")
    laws = (zero, torch.diag(std**2), zero, torch.diag(SPECTRUM))
    assert found == pytest.approx(artlib.wasserstein2_gaussian(*laws), rel=1e-7)
    assert found**2 == pytest.approx(artlib.frechet_distance(*laws), rel=1e-7)


def test_grid_above_zero_is_compared_with_the_law_there() -> None:
    """In VE a perfect sampler stopped at t has the variances lam + t^2."""
    grid = artlib.edm(NARROW).grid(2000)[:1500]
    std = artlib.gaussian_output_std(NARROW, SPECTRUM, grid, solver="rk4")
    expected = torch.sqrt(SPECTRUM + grid[-1] ** 2)
    torch.testing.assert_close(std, expected, rtol=1e-6, atol=0)
    assert w2(NARROW, grid, "rk4") < 1e-5


def test_order_and_number_of_the_variances() -> None:
    grid = artlib.edm(NARROW).grid(6)
    shuffled = SPECTRUM[[3, 0, 4, 1, 2]]
    once = w2(NARROW, grid, "heun")
    again = artlib.gaussian_w2(NARROW, shuffled, grid, solver="heun")
    twice = artlib.gaussian_w2(NARROW, SPECTRUM.repeat(2), grid, solver="heun")
    assert float(again) == pytest.approx(once, rel=1e-13)
    assert float(twice) == pytest.approx(math.sqrt(2) * once, rel=1e-13)
    # A direction without variance is a point: its output is pure error.
    point = artlib.gaussian_output_std(NARROW, [0.0], [10.0, 1.0, 0.0])
    assert float(point[0]) == 0.0  # Euler's last step to 0 returns D = 0


# The oracle.


@cache
def oracle(K: int, solver: str = "euler", seed: int = 0) -> Tensor:
    return artlib.oracle_grid(NARROW, SPECTRUM, K, solver=solver, seed=seed)


def test_oracle_of_one_step_has_no_choice() -> None:
    assert oracle(1).tolist() == [10.0, 0.0]


def by_hand(
    nodes: Sequence[Tensor], solver: str = "euler", lam: Tensor = SPECTRUM
) -> Tensor:
    """W2 in VE, x' = t x / (lam + t^2), for many grids at once: nodes [..., 1]."""
    std = torch.sqrt(lam + nodes[0] ** 2)
    for now, after in pairwise(nodes):
        rate, next_rate = now / (lam + now**2), after / (lam + after**2)
        factor = 1 + (after - now) * rate
        # The last step to 0 is Euler's.
        if solver == "heun" and bool((after > 0).all()):
            factor = 1 + (after - now) / 2 * (rate + next_rate * factor)
        std = std * factor
    return (std.abs() - lam.sqrt()).norm(dim=-1)


def as_nodes(*values: Tensor | float) -> list[Tensor]:
    return [torch.as_tensor(v, dtype=torch.float64)[..., None] for v in values]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_factors_by_hand(solver: str) -> None:
    for grid in ([10.0, 0.0], [10.0, 3.0, 0.7, 0.1, 0.0], [10.0, 2.0, 0.01]):
        if grid[-1] == 0:
            expected = float(by_hand(as_nodes(*grid), solver))
            assert w2(NARROW, torch.tensor(grid), solver) == pytest.approx(expected)
    # One Euler step from t to t' multiplies by (lam + t t') / (lam + t^2).
    grid = [10.0, 2.0, 0.01]
    factor = torch.ones_like(SPECTRUM)
    for now, after in pairwise(grid):
        factor = factor * (SPECTRUM + now * after) / (SPECTRUM + now * now)
    found = artlib.gaussian_output_std(NARROW, SPECTRUM, grid)
    torch.testing.assert_close(found, factor * torch.sqrt(SPECTRUM + 100.0))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_oracle_of_two_steps_is_that_of_a_search(solver: str) -> None:
    """One free node: every place for it is tried, then the best one's neighbours."""
    low, high = 1e-3, 10 * (1 - 1e-3)
    for _ in range(3):
        nodes = torch.logspace(math.log10(low), math.log10(high), 2000).double()
        found = by_hand(as_nodes(10.0, nodes, 0.0), solver)
        best = int(found.argmin())
        low, high = float(nodes[max(best - 1, 0)]), float(nodes[min(best + 1, 1999)])
    least = w2(NARROW, oracle(2, solver), solver)
    assert least == pytest.approx(float(found[best]), rel=1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("lam", [SPECTRUM, SPECTRUM[[0, 3]]], ids=["five", "two"])
def test_oracle_of_three_steps_is_that_of_a_search(lam: Tensor, solver: str) -> None:
    """Two free nodes, tried on a lattice, then on finer ones around the best pair."""
    centre, width = torch.tensor([0.3, 0.3]).log10().double(), 1.5
    for _ in range(5):
        lines = [
            torch.linspace(float(c) - width, float(c) + width, 301).double()
            for c in centre
        ]
        first, second = torch.meshgrid(*(10**line for line in lines), indexing="ij")
        found = by_hand(as_nodes(10.0, first, second, 0.0), solver, lam)
        found[(second >= first) | (first >= 10)] = math.inf
        best = np.unravel_index(int(found.argmin()), found.shape)
        centre = torch.tensor([first[best], second[best]]).log10()
        width /= 30
    grid = artlib.oracle_grid(NARROW, lam, 3, solver=solver)
    least = float(artlib.gaussian_w2(NARROW, lam, grid, solver=solver))
    assert least == pytest.approx(float(found[best]), rel=1e-4)


def reached(lam: Any, K: int, solver: str, seed: int = 0) -> float:
    """W2 of the oracle in units of the data's width."""
    grid = artlib.oracle_grid(NARROW, lam, K, solver=solver, seed=seed)
    assert bool((grid.diff() < 0).all())
    least = artlib.gaussian_w2(NARROW, lam, grid, solver=solver)
    return float(least) / math.sqrt(float(torch.as_tensor(lam).sum()))


@pytest.mark.parametrize("K", [2, 3, 5, 10])
@pytest.mark.parametrize("variance", [1.0, 0.04])
def test_oracle_hits_a_single_variance_with_heun(variance: float, K: int) -> None:
    """Some grids end too wide and some too narrow, so some are exact."""
    if K == 2:  # there is a root, seen without the oracle
        lam = torch.tensor([variance], dtype=torch.float64)
        nodes = torch.logspace(-3, 0.99, 4000).double()
        assert float(by_hand(as_nodes(10.0, nodes, 0.0), "heun", lam).min()) < 5e-3
    for seed in (0, 1):
        assert reached([variance], K, "heun", seed) < 1e-9


@pytest.mark.parametrize("solver", ["rk4", "dpmpp_2m"])
def test_oracle_hits_two_variances_with_enough_steps(solver: str) -> None:
    for seed in (0, 1):
        assert reached([4.0, 0.01], 5, solver, seed) < 1e-9


@pytest.mark.parametrize("K", [2, 7])
def test_oracle_of_a_single_variance_with_euler_is_known(K: int) -> None:
    """A product of cosines, largest for equal angles: it never reaches 0."""
    angle = math.atan(10.0 / 0.5)
    expected = 1 - math.cos(angle / K) ** K
    assert reached([0.25], K, "euler") == pytest.approx(expected, rel=1e-7)
    grid = artlib.oracle_grid(NARROW, [0.25], K)
    equal = 0.5 * torch.tan(angle * (1 - torch.arange(K + 1).double() / K))
    torch.testing.assert_close(grid, equal, rtol=1e-4, atol=1e-9)


def test_oracle_takes_round_off_for_what_it_is() -> None:
    """Eigenvalues of the identity are not all 1 to the last bit, nor is 0 exact."""
    rng = torch.Generator().manual_seed(0)
    noisy = 1 + 1e-14 * torch.randn(50, generator=rng, dtype=torch.float64)
    assert reached(noisy, 2, "heun") < 1e-9
    assert reached([1.0, 0.0, 1e-22], 3, "heun") < 1e-9


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_oracle_of_a_spectrum_is_the_same_grid_from_every_seed(solver: str) -> None:
    lam = torch.logspace(1, -4, 40, dtype=torch.float64)
    first, *others = (
        artlib.oracle_grid(NARROW, lam, 6, solver=solver, seed=seed) for seed in (0, 1)
    )
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("solver", "K"), [("euler", 2), ("euler", 8), ("heun", 2), ("heun", 5)]
)
def test_nothing_beats_the_oracle(solver: str, K: int) -> None:
    grid = oracle(K, solver)
    least = w2(NARROW, grid, solver)
    assert len(grid) == K + 1
    assert bool((grid.diff() < 0).all())
    known = [
        make(NARROW, pinned=pinned)
        for make in (artlib.edm, artlib.log_snr, artlib.kl_optimal)
        for pinned in (True, False)
    ]
    target = artlib.Gaussian(torch.zeros(5).double(), torch.diag(SPECTRUM))
    flow = artlib.ProbabilityFlow(NARROW, target.denoiser(NARROW))
    known += [
        artlib.uniform(NARROW),
        artlib.art(flow, target.sample_prior(NARROW, 64, seed=0)),
    ]
    rivals = [schedule.grid(K) for schedule in known]
    rng = np.random.default_rng(1)
    for scale in (1e-3, 1e-2, 0.1):
        for _ in range(10):
            factors = torch.from_numpy(np.exp(scale * rng.normal(size=K - 1)))
            moved = grid[1:-1] * factors
            rivals.append(torch.cat([grid[:1], moved.sort().values.flip(0), grid[-1:]]))
    for _ in range(30):
        inner = np.sort(np.exp(rng.uniform(np.log(1e-3), np.log(9.99), K - 1)))[::-1]
        rivals.append(torch.tensor([10.0, *inner, 0.0]))
    rivals = [r for r in rivals if bool((r.diff() < 0).all())]
    assert min(w2(NARROW, rival, solver) for rival in rivals) > least * (1 - 1e-9)


@pytest.mark.parametrize(("solver", "K"), [("euler", 4), ("heun", 3)])
def test_oracle_does_not_depend_on_the_seed(solver: str, K: int) -> None:
    grids = [oracle(K, solver, seed) for seed in (0, 1)]
    first, second = (w2(NARROW, grid, solver) for grid in grids)
    assert second == pytest.approx(first, rel=1e-4)
    # The same seed gives the same grid to the last bit.
    assert torch.equal(grids[0], oracle.__wrapped__(K, solver, 0))


def test_oracle_sees_the_law_and_not_its_listing() -> None:
    """Order does not matter, and doubling every variance's count changes nothing."""
    listed = torch.cat([SPECTRUM, SPECTRUM]).flip(0)
    doubled = artlib.oracle_grid(NARROW, listed, 4)
    torch.testing.assert_close(doubled, oracle(4), rtol=1e-3, atol=0)
    assert w2(NARROW, doubled) == pytest.approx(w2(NARROW, oracle(4)), rel=1e-6)


@pytest.mark.parametrize("process", [VP(), RectifiedFlow()], ids=lambda p: p.name)
def test_oracle_in_other_processes(process: Process) -> None:
    grid = artlib.oracle_grid(process, SPECTRUM, 3)
    least = w2(process, grid)
    for schedule in (artlib.uniform(process), artlib.edm(process, pinned=False)):
        assert least < w2(process, schedule.grid(3))


BAD: dict[str, list[tuple[Any, Any, Any]]] = {
    "variances": [
        ([[1.0]], [10.0, 0.0], {}),
        ([], [10.0, 0.0], {}),
        ([-1.0], [10.0, 0.0], {}),
        ([math.nan], [10.0, 0.0], {}),
    ],
    "grid": [
        ([1.0], [5.0, 0.0], {}),
        ([1.0], [10.0, 11.0, 0.0], {}),
        ([1.0], [10.0], {}),
    ],
    "solver": [
        ([1.0], [10.0, 0.0], {"solver": "dopri5"}),
        ([1.0], [10.0, 0.0], {"solver": "ddim"}),
    ],
}


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in BAD.items() for case in cases]
)
def test_bad_arguments_are_refused(name: str, case: tuple[Any, Any, Any]) -> None:
    variances, grid, options = case
    for function in (artlib.gaussian_w2, artlib.gaussian_output_std):
        with pytest.raises(ValueError, match=name):
            function(NARROW, variances, grid, **options)
    if name != "grid":
        with pytest.raises(ValueError, match=name):
            artlib.oracle_grid(NARROW, variances, 2, **options)


@pytest.mark.parametrize("bad", [0, 2.5])
def test_a_bad_number_of_steps_or_seed_is_refused(bad: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="K"):
        artlib.oracle_grid(NARROW, [1.0], bad)
    with pytest.raises((ValueError, TypeError), match="seed"):
        artlib.oracle_grid(NARROW, [1.0], 2, seed=bad - 1)


def test_a_list_of_variances_is_not_rounded(as_a_user: None) -> None:
    # 0.1 in float32 is 0.1 (1 + 1.5e-8).
    lam, grid = [0.1, 0.7], artlib.edm(NARROW).grid(5)
    exact = torch.tensor(lam, dtype=torch.float64)
    for form in (lam, tuple(lam), np.array(lam), np.array(lam)[::-1]):
        found = artlib.gaussian_w2(NARROW, form, grid)
        torch.testing.assert_close(
            found, artlib.gaussian_w2(NARROW, exact, grid), rtol=1e-13, atol=0
        )
        assert not math.isclose(
            float(found),
            float(artlib.gaussian_w2(NARROW, exact.float(), grid)),
            rel_tol=1e-10,
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: artlib.gaussian_w2(NARROW, "1", [10.0, 0.0]), "variances: .*'1'"),
        (lambda: artlib.gaussian_w2(NARROW, ["1"], [10.0, 0.0]), r"variances\[0\]"),
        (lambda: artlib.gaussian_w2(NARROW, [1j], [10.0, 0.0]), r"variances\[0\]"),
        (lambda: artlib.gaussian_w2(NARROW, [True], [10.0, 0.0]), r"variances\[0\]"),
        (lambda: artlib.gaussian_w2(NARROW, None, [10.0, 0.0]), "variances: .*None"),
        (lambda: artlib.gaussian_w2("ve", [1.0], [10.0, 0.0]), "process: expected"),
        (lambda: artlib.gaussian_w2(NARROW, [1.0], "10"), "grid: expected"),
        (
            lambda: artlib.gaussian_w2(NARROW, [1.0], artlib.edm(NARROW)),
            r"grid: .*call .grid\(K\)",
        ),
        (
            lambda: artlib.gaussian_w2(NARROW, [1.0], [10.0, 0.0], solver=["euler"]),
            "solver: expected a name",
        ),
        (lambda: artlib.oracle_grid(type(NARROW), [1.0], 1), "process: .*call it"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_the_oracle_does_not_follow_the_default_device_or_dtype() -> None:
    def use() -> list[torch.Tensor]:
        grid = artlib.edm(NARROW).grid(4)
        return [
            artlib.gaussian_output_std(NARROW, [0.1, 0.7], grid),
            artlib.gaussian_w2(NARROW, [0.1, 0.7], grid, solver="heun"),
            artlib.oracle_grid(NARROW, [0.1, 0.7], 2),
        ]

    expected = use()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = use()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cpu"
        assert a.equal(b)
