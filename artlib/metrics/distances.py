r"""Distances between laws, and the error of a solver against its reference.

For laws a, b on :math:`R^d` the Wasserstein distance of order 2 is

.. math::
    W_2^2(a, b) = \min_{\gamma} E_{(x, y) \sim \gamma} \lVert x - y \rVert^2,

the minimum over all couplings. What is here is exact wherever a closed form exists:

| function | laws | how |
| --- | --- | --- |
| `wasserstein2` | two sets of numbers | integral of the gap of their quantiles |
| `wasserstein2_gaussian` | two normal laws, any d | alignment of covariance roots |
| `frechet_distance` | the same, squared | FID, once the features are given |
| `sliced_wasserstein2` | two sets of samples, any d | mean over random directions |
| `terminal_error` | matched samples | root mean square, per coordinate |

All of it is computed in float64 whatever comes in, and returned as a Python number in
the units of the data (`frechet_distance`: their square).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._common.checks import generator, positive_int
from .._common.types import SeedLike
from .inputs import ArrayLike, as_double, mean_and_root, numbers, rows

# Numbers held at once by the projections of the sliced distance (128 MiB in float64).
_PROJECTED = 2**24


def wasserstein2(a: ArrayLike, b: ArrayLike) -> float:
    r"""Exact :math:`W_2` between two one-dimensional sets of samples.

    In one dimension the monotone coupling is optimal:
    :math:`W_2^2 = \int_0^1 (F_a^{-1}(u) - F_b^{-1}(u))^2 du`. Both quantile functions
    are steps, so the integral is a finite sum over their merged levels; the two sets
    may differ in size.

    Args:
        a: Samples [N] or [N, 1].
        b: Samples [M] or [M, 1].

    Returns:
        The distance, in the units of the samples.

    Raises:
        ValueError: If a set is empty, not finite, or of more than one dimension.
    """
    x, y = numbers(a, "a"), numbers(b, "b")
    y = y.to(x.device)
    levels = _merged_levels(x.numel(), y.numel(), x.device)
    return math.sqrt(float(_quantile_distance_squared(x[None], y[None], levels)[0]))


def wasserstein2_gaussian(
    mu_a: ArrayLike, cov_a: ArrayLike, mu_b: ArrayLike, cov_b: ArrayLike
) -> float:
    """Exact :math:`W_2` between two Gaussians: the root of `frechet_distance`.

    Args:
        mu_a: Mean [d].
        cov_a: Covariance [d, d], or its diagonal [d]; may be singular.
        mu_b: Mean [d].
        cov_b: Covariance [d, d], or its diagonal [d]; may be singular.

    Returns:
        The distance, in the units of the samples.

    Raises:
        ValueError: If the shapes do not fit, a number is not finite, or a covariance
            is not symmetric positive semi-definite.
    """
    return math.sqrt(frechet_distance(mu_a, cov_a, mu_b, cov_b))


def frechet_distance(
    mu_a: ArrayLike, cov_a: ArrayLike, mu_b: ArrayLike, cov_b: ArrayLike
) -> float:
    r"""Squared Frechet distance of two Gaussians, as FID reports it.

    .. math::
        d^2 = \lVert\mu_a - \mu_b\rVert^2 + \mathrm{tr}\bigl(A + B
              - 2 (A^{1/2} B A^{1/2})^{1/2}\bigr)

    The trace is the difference of nearly equal numbers when A is close to B, which
    costs half of the digits. It is computed here as the square
    :math:`\lVert A^{1/2} - O B^{1/2}\rVert_F^2` that it is, with O the orthogonal
    matrix that aligns the two roots (from the singular vectors of
    :math:`B^{1/2} A^{1/2}`, whose singular values are the eigenvalues of
    :math:`(A^{1/2} B A^{1/2})^{1/2}`): no cancellation, never negative, and singular
    covariances need no regularisation.

    Args:
        mu_a: Mean [d].
        cov_a: Covariance [d, d], or its diagonal [d]; may be singular.
        mu_b: Mean [d].
        cov_b: Covariance [d, d], or its diagonal [d]; may be singular.

    Returns:
        The squared distance, in squared units of the samples.

    Raises:
        ValueError: If the shapes do not fit, a number is not finite, or a covariance
            is not symmetric positive semi-definite.

    References:
        Dowson and Landau, J. Multivariate Anal. 12 (1982) 450; Heusel et al.,
        https://arxiv.org/abs/1706.08500, eq. (6).
    """
    first, root_a = mean_and_root(mu_a, cov_a, "mu_a", "cov_a")
    second, root_b = mean_and_root(mu_b, cov_b, "mu_b", "cov_b")
    if first.shape != second.shape:
        raise ValueError(
            f"mu_b: expected the shape of mu_a, {tuple(first.shape)}, got "
            f"{tuple(second.shape)}; both laws must live in the same space"
        )
    shift = (first - second.to(first.device)).square().sum()
    root_b = root_b.to(first.device)
    if root_a.ndim == 1 and root_b.ndim == 1:
        return float(shift + (root_a - root_b).square().sum())
    root_a, root_b = (torch.diag(r) if r.ndim == 1 else r for r in (root_a, root_b))
    left, _, right = torch.linalg.svd(root_b @ root_a)
    aligned = right.mT @ (left.mT @ root_b)
    return float(shift + (root_a - aligned).square().sum())


def gaussian_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of samples or features, for `frechet_distance`.

    Args:
        x: Samples [N, *shape] with N >= 2; flattened to d numbers each.

    Returns:
        Mean [d] and covariance [d, d], float64, on the device of ``x``. The
        covariance is the unbiased one (division by N - 1), as in FID.

    Raises:
        ValueError: If there are fewer than two samples or one is not finite.
    """
    samples = rows(x, "x")
    if samples.shape[0] < 2:
        raise ValueError("x: expected at least 2 samples for a covariance, got 1")
    mean = samples.mean(0)
    centred = samples - mean
    return mean, centred.mT @ centred / (samples.shape[0] - 1)


def sliced_wasserstein2(
    a: ArrayLike, b: ArrayLike, *, projections: int = 256, seed: SeedLike = 0
) -> float:
    r"""Sliced :math:`W_2`: the root of the mean of :math:`W_2^2` over directions.

    .. math::
        SW_2^2 = E_{\theta \sim U(S^{d-1})}\, W_2^2(\theta^\top a, \theta^\top b)

    Each projected distance is exact; only the directions are random. In one dimension
    it equals `wasserstein2`; a shift by v costs :math:`\lVert v\rVert / \sqrt d`.

    Args:
        a: Samples [N, *shape].
        b: Samples [M, *shape].
        projections: Number of directions.
        seed: A seed or a generator for the directions: the same seed gives the same
            directions, on every device.

    Returns:
        The distance, in the units of the samples.

    Raises:
        ValueError: If the sample shapes differ, or a set is empty or not finite.
    """
    x, y = rows(a, "a"), rows(b, "b")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"b: expected samples of the same size as a's, {x.shape[1]}, got "
            f"{y.shape[1]}"
        )
    y = y.to(x.device)
    count = positive_int(projections, "projections")
    rng = generator(seed)
    # All directions are drawn at once, so that the batches do not change the answer.
    directions = torch.randn(
        count, x.shape[1], generator=rng, dtype=torch.float64, device=rng.device
    )
    directions = torch.nn.functional.normalize(directions, dim=1).to(x.device)
    levels = _merged_levels(x.shape[0], y.shape[0], x.device)
    batch = max(1, _PROJECTED // (x.shape[0] + y.shape[0]))
    total = sum(
        float(_quantile_distance_squared(u @ x.mT, u @ y.mT, levels).sum())
        for u in (directions[k : k + batch] for k in range(0, count, batch))
    )
    return math.sqrt(total / count)


def terminal_error(x: Tensor, reference: Tensor) -> float:
    r"""Root-mean-square distance to a reference that started from the same noise.

    .. math::
        \sqrt{\tfrac1N \sum_i \lVert x_i - x_i^{ref}\rVert^2 / d}

    Per coordinate, so that it can be compared across dimensions: 0.1 means that a
    typical pixel is off by 0.1.

    Args:
        x: Samples [N, *shape].
        reference: Samples of the same shape, in the same order.

    Returns:
        The error, in the units of the samples.

    Raises:
        ValueError: If the shapes differ, or a set is empty or not finite.
    """
    found, expected = as_double(x, "x"), as_double(reference, "reference")
    if found.shape != expected.shape:
        raise ValueError(
            f"reference: expected the shape of x, {tuple(found.shape)}, got "
            f"{tuple(expected.shape)}; samples are compared one by one, so both must "
            "start from the same x_T"
        )
    found, expected = rows(found, "x"), rows(expected, "reference")
    return math.sqrt(float((found - expected.to(found.device)).square().mean()))


def _merged_levels(
    n: int, m: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Common steps of two quantile functions with n and m equal jumps.

    Counted in units of 1 / (n m), so the levels are integers and merge exactly.

    Returns:
        For each piece of [0, 1]: the index of the order statistic in either set, and
        the length of the piece.
    """
    ends_a = torch.arange(1, n + 1, device=device) * m
    ends_b = torch.arange(1, m + 1, device=device) * n
    ends = torch.cat([ends_a, ends_b]).sort().values
    # Levels common to both come twice; the piece between them has length 0.
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).to(torch.float64) / (n * m)
    return (ends - 1) // m, (ends - 1) // n, lengths


def _quantile_distance_squared(
    x: Tensor, y: Tensor, levels: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Squared W2 of each row of x [p, n] and y [p, m] -> [p]."""
    index_x, index_y, lengths = levels
    gap = x.sort(1).values[:, index_x] - y.sort(1).values[:, index_y]
    return gap.square() @ lengths
