"""Metrics against cases computed by hand, and against SciPy and POT."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from artlib.metrics.distances import (
    frechet_distance,
    gaussian_statistics,
    sliced_wasserstein2,
    terminal_error,
    wasserstein2,
    wasserstein2_gaussian,
)

ot = pytest.importorskip("ot", reason="POT, the second opinion, is not installed")


def normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def covariance(d: int, rank: int, seed: int) -> Tensor:
    factor = normal(d, rank, seed=seed)
    return factor @ factor.T / rank


# One dimension.


def test_w2_by_hand() -> None:
    # Sorted: 0 1 3 against 2 2 5: (4 + 1 + 4) / 3.
    assert wasserstein2([3.0, 0.0, 1.0], [2.0, 5.0, 2.0]) == pytest.approx(math.sqrt(3))
    # A shift costs its length, whatever the sample.
    x = normal(100)
    assert wasserstein2(x, x + 0.7) == pytest.approx(0.7, rel=1e-14)
    # x -> -x of {0, 1}: each half of the mass moves by 1.
    assert wasserstein2([0.0, 1.0], [0.0, -1.0]) == pytest.approx(1.0)


def test_w2_of_unequal_sizes_by_hand() -> None:
    # Quantiles 0 | 1 split at 1/2 against 0 | 0 | 3 split at 1/3 and 2/3:
    # 1/2 of 0-0, 1/6 of 1-0, 1/3 of 1-3.
    expected = math.sqrt(1 / 6 * 1 + 1 / 3 * 4)
    assert wasserstein2([0.0, 1.0], [3.0, 0.0, 0.0]) == pytest.approx(expected)
    # Each point doubled is the same law.
    x = normal(37)
    assert wasserstein2(x, x.repeat(2)) == 0.0
    assert wasserstein2(x, torch.zeros(1)) == pytest.approx(
        math.sqrt(float((x**2).mean()))
    )


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 20), (97, 64), (1, 13)])
def test_w2_equals_pot(n: int, m: int) -> None:
    a, b = normal(n, seed=1), 0.3 + 2 * normal(m, seed=2)
    squared = ot.emd2_1d(a.numpy(), b.numpy(), metric="sqeuclidean")
    assert wasserstein2(a, b) == pytest.approx(math.sqrt(squared), rel=1e-12)
    assert wasserstein2(a[:, None], b) == wasserstein2(b, a)  # symmetric, [N, 1] too


def test_w2_is_computed_in_float64() -> None:
    # In float32 the squares of these gaps would be rounded at 1e-7.
    a = normal(1000).float()
    b = a + torch.tensor(1e-3)
    expected = math.sqrt(float(((b.double() - a.double()).sort().values ** 2).mean()))
    assert wasserstein2(a, b) == pytest.approx(expected, rel=1e-6)
    assert wasserstein2(a.double(), b.double()) == wasserstein2(a, b)
    assert wasserstein2([0.1], [0.0]) == 0.1  # numbers are not rounded to float32


# Gaussians.


def test_gaussian_w2_by_hand() -> None:
    # In one dimension: (m_a - m_b)^2 + (s_a - s_b)^2.
    assert wasserstein2_gaussian([0.0], [[4.0]], [3.0], [[36.0]]) == pytest.approx(5.0)
    # Commuting covariances: root by root along the common axes.
    turn = torch.linalg.qr(normal(3, 3)).Q
    a = turn @ torch.diag(torch.tensor([1.0, 4.0, 9.0]).double()) @ turn.T
    b = turn @ torch.diag(torch.tensor([4.0, 4.0, 1.0]).double()) @ turn.T
    squared = frechet_distance([0.0, 0.0, 1.0], a, [0.0, 2.0, 1.0], b)
    assert squared == pytest.approx(4 + 1 + 0 + 4, rel=1e-12)
    # Two orthogonal needles share no direction: tr A + tr B.
    assert frechet_distance(
        torch.zeros(2), torch.diag(torch.tensor([2.0, 0.0])), torch.zeros(2), [0.0, 3.0]
    ) == pytest.approx(5.0)


@pytest.mark.parametrize("rank", [6, 3])
def test_frechet_equals_scipy_and_pot(rank: int) -> None:
    mu_a, mu_b = normal(6, seed=1), normal(6, seed=2)
    a, b = covariance(6, 6, seed=3), covariance(6, rank, seed=4)
    root = linalg.sqrtm(a.numpy())
    cross = np.linalg.eigvalsh(root @ b.numpy() @ root).clip(0)
    expected = float((mu_a - mu_b).square().sum() + torch.trace(a + b))
    expected -= 2 * float(np.sqrt(cross).sum())
    found = frechet_distance(mu_a, a, mu_b, b)
    # With a singular b the reference itself is good to sqrt(eps) only.
    assert found == pytest.approx(expected, rel=1e-10 if rank == 6 else 1e-6)
    assert found == pytest.approx(frechet_distance(mu_b, b, mu_a, a), rel=1e-10)
    if rank == 6:
        bures = ot.gaussian.bures_wasserstein_distance(
            mu_a.numpy(), mu_b.numpy(), a.numpy(), b.numpy()
        )
        assert wasserstein2_gaussian(mu_a, a, mu_b, b) == pytest.approx(
            float(bures), rel=1e-8
        )


@pytest.mark.parametrize("rank", [20, 5])
def test_frechet_keeps_its_digits_near_zero(rank: int) -> None:
    # tr(A + B - 2 ...) would leave 1e-15, so a distance of 3e-8, and a wrong sign.
    zero, a = torch.zeros(20), covariance(20, rank, seed=6)
    assert wasserstein2_gaussian(zero, a, zero, a) < 1e-13
    scaled = (1 + 1e-9) ** 2 * a
    expected = 1e-9 * math.sqrt(float(torch.trace(a)))
    assert wasserstein2_gaussian(zero, a, zero, scaled) == pytest.approx(
        expected, rel=1e-4
    )


def test_diagonal_and_full_covariances_agree() -> None:
    mu_a, mu_b = normal(5, seed=1), normal(5, seed=2)
    a, b = normal(5, seed=3) ** 2, normal(5, seed=4) ** 2
    by_hand = float((mu_a - mu_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    for cov_a in (a, torch.diag(a)):
        for cov_b in (b, torch.diag(b)):
            assert frechet_distance(mu_a, cov_a, mu_b, cov_b) == pytest.approx(
                by_hand, rel=1e-12
            )


def test_float32_covariances_are_accepted() -> None:
    x = normal(4000, 40).float()
    centred = x - x.mean(0)
    rough = centred.T @ centred / (len(x) - 1)
    mean, cov = gaussian_statistics(x)
    assert wasserstein2_gaussian(x.mean(0), rough, mean, cov) < 1e-5


def test_statistics_equal_numpy_and_do_not_cancel() -> None:
    x = normal(50, 2, 3)
    mean, cov = gaussian_statistics(x)
    flat = x.reshape(50, 6).numpy()
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-13)
    np.testing.assert_allclose(cov, np.cov(flat, rowvar=False), rtol=1e-12)
    # Far from the origin, in float32: E x^2 - (E x)^2 would lose everything.
    _, far = gaussian_statistics((x + 1000).float())
    np.testing.assert_allclose(far, cov, atol=2e-4)
    assert far.dtype == torch.float64


# Sliced.


def test_sliced_of_point_masses_by_hand() -> None:
    # One point against one point v: the mean of (theta . v)^2, which is |v|^2 / d.
    v = torch.tensor([[3.0, 4.0, 0.0]])
    found = sliced_wasserstein2(torch.zeros(1, 3), v, projections=20_000)
    assert found == pytest.approx(5 / math.sqrt(3), rel=0.01)


def test_sliced_in_one_dimension_is_exact() -> None:
    a, b = normal(30, 1, seed=1), 2 + normal(17, 1, seed=2)
    for seed in range(3):
        assert sliced_wasserstein2(a, b, projections=5, seed=seed) == pytest.approx(
            wasserstein2(a, b), rel=1e-13
        )


@pytest.mark.parametrize(("n", "m"), [(60, 60), (60, 25)])
def test_sliced_equals_pot_on_the_same_directions(n: int, m: int) -> None:
    a, b = normal(n, 4, seed=1), 1 + 0.5 * normal(m, 4, seed=2)
    rng = torch.Generator().manual_seed(7)
    theta = torch.randn(40, 4, generator=rng, dtype=torch.float64)
    theta = theta / theta.norm(dim=1, keepdim=True)
    expected = ot.sliced_wasserstein_distance(
        a.numpy(), b.numpy(), projections=theta.T.numpy(), p=2
    )
    found = sliced_wasserstein2(a, b, projections=40, seed=7)
    assert found == pytest.approx(float(expected), rel=1e-10)


def test_sliced_is_reproducible_and_its_batches_do_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = normal(64, 2, 3, seed=1), normal(48, 2, 3, seed=2)
    first = sliced_wasserstein2(a, b, seed=3)
    assert sliced_wasserstein2(a, b, seed=3) == first
    assert sliced_wasserstein2(a, b, seed=4) != first
    rng = torch.Generator().manual_seed(3)
    assert sliced_wasserstein2(a, b, seed=rng) == first
    monkeypatch.setattr("artlib.metrics.distances._PROJECTED", 700)  # six at a time
    assert sliced_wasserstein2(a, b, seed=3) == pytest.approx(first, rel=1e-13)


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    sliced_wasserstein2(normal(8, 2), normal(8, 2, seed=1))
    assert torch.equal(before, torch.get_rng_state())


# Matched samples.


def test_terminal_error_by_hand() -> None:
    reference = torch.zeros(2, 1, 2, dtype=torch.float64)
    x = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])
    # |x_1|^2 = 25, |x_2|^2 = 0, two coordinates: sqrt((25 + 0) / 2 / 2).
    assert terminal_error(x, reference) == pytest.approx(2.5)
    assert terminal_error(x + 0.1, x) == pytest.approx(0.1, rel=1e-6)


# Arguments.

GAUSSIAN = (torch.zeros(2), torch.eye(2))
BAD = [
    (lambda: wasserstein2([], [1.0]), ValueError, "a: .* empty"),
    (lambda: wasserstein2([1.0], [math.nan]), ValueError, "b: 1 of 1 values are NaN"),
    (lambda: wasserstein2(normal(3, 2), normal(3, 2)), ValueError, "sliced_wass"),
    (lambda: wasserstein2("abc", [1.0]), TypeError, "a: expected a tensor"),
    (
        lambda: frechet_distance(*GAUSSIAN, torch.zeros(3), torch.eye(3)),
        ValueError,
        "mu_b: expected the shape of mu_a",
    ),
    (
        lambda: frechet_distance(torch.zeros(2), torch.eye(3), *GAUSSIAN),
        ValueError,
        r"cov_a: expected mu_a \[d\]",
    ),
    (
        lambda: frechet_distance(torch.zeros(2), [[1.0, 0.5], [0.0, 1.0]], *GAUSSIAN),
        ValueError,
        "cov_a: expected a symmetric matrix.*0.5",
    ),
    (
        lambda: frechet_distance(*GAUSSIAN, torch.zeros(2), [[1.0, 2.0], [2.0, 1.0]]),
        ValueError,
        "cov_b: expected a positive semi-definite.*-1",
    ),
    (
        lambda: frechet_distance(*GAUSSIAN, torch.zeros(2), [1.0, -1.0]),
        ValueError,
        "cov_b: expected a positive semi-definite.*-1",
    ),
    (
        lambda: wasserstein2_gaussian(*GAUSSIAN, [0.0, math.nan], torch.eye(2)),
        ValueError,
        "mu_b: 1 of 2",
    ),
    (lambda: gaussian_statistics(normal(1, 3)), ValueError, "at least 2 samples"),
    (lambda: gaussian_statistics(normal(3)), ValueError, r"shape \[N, 1\]"),
    (
        lambda: sliced_wasserstein2(normal(3, 2), normal(3, 4)),
        ValueError,
        "b: expected samples of the same size",
    ),
    (
        lambda: sliced_wasserstein2(normal(3, 2), normal(3, 2), projections=0),
        ValueError,
        "projections: expected at least 1",
    ),
    (
        lambda: sliced_wasserstein2(normal(3, 2), normal(3, 2), seed=0.5),  # type: ignore[arg-type]
        TypeError,
        "seed",
    ),
    (
        lambda: terminal_error(normal(3, 2), normal(2, 2)),
        ValueError,
        "reference: expected the shape of x",
    ),
    (
        lambda: terminal_error(normal(3, 2) * math.nan, normal(3, 2)),
        ValueError,
        "x: 6 of 6",
    ),
]


BAD += [
    (lambda bad=bad, f=f: f(bad), TypeError, rf"{name}(\[0\])?: expected .*, got")
    for bad in ("12", [True, False], [1j, 0.0], None, torch.tensor([True]), [None])
    for name, f in {
        "a": lambda x: wasserstein2(x, [1.0]),
        "b": lambda x: sliced_wasserstein2(normal(3, 2), x),
        "mu_a": lambda x: frechet_distance(x, torch.eye(2), *GAUSSIAN),
        "cov_b": lambda x: wasserstein2_gaussian(*GAUSSIAN, torch.zeros(2), x),
        "x": gaussian_statistics,
        "reference": lambda x: terminal_error(normal(3, 2), x),
    }.items()
] + [
    (lambda: terminal_error([[1.0], [2.0, 3.0]], [[1.0]]), ValueError, "x: .*lengths"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_arguments_are_refused(call, kind, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_distances_do_not_follow_the_default_device_or_dtype(dtype) -> None:  # type: ignore[no-untyped-def]
    a, b = normal(9, 2), normal(7, 2, seed=1)

    def use() -> list[float]:
        return [
            wasserstein2([0.1, 0.3], [0.7, 0.2, 0.4]),
            frechet_distance(
                [0.1, 0.3], [[1.0, 0.2], [0.2, 0.7]], *gaussian_statistics(a)
            ),
            sliced_wasserstein2(a, b, projections=8),
            terminal_error(a[:7], b),
        ]

    expected = use()
    torch.set_default_device("meta")
    torch.set_default_dtype(dtype)
    try:
        found = use()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert found == expected
