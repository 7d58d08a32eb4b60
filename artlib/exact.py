r"""Exact error of a sampler on Gaussian data, and the best grid there is.

For :math:`x_0 \sim N(0, C)` the denoiser is linear, so every solver multiplies the
coordinate along an eigenvector of C by a number :math:`m` that depends on its variance
:math:`\lambda` and on the grid alone. Starting from the exact prior, the sampler's
output is :math:`N(0, \mathrm{diag}(m^2 s_T^2))` with
:math:`s_T^2 = \alpha_T^2\lambda + \sigma_T^2`, and its distance to the data is exact in
any dimension, without Monte Carlo:

.. math::
    W_2^2 = \sum_j \bigl( |m_j|\, s_{T,j} - \sqrt{\lambda_j} \bigr)^2 .

The two laws share their eigenvectors, so this is the Frechet distance too. It is
differentiable in the grid; the **oracle** is the grid that minimises it: the limit for
every schedule on that law (all of this is ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares, minimize
from torch import Tensor

from ._common.checks import as_grid, as_variances, positive_int
from ._common.types import TimeLike
from .flow.flow import ProbabilityFlow
from .flow.processes import Process, as_time, check_process
from .schedules.constructors import edm, kl_optimal, log_snr
from .solvers.integrate import integrate
from .solvers.solver import SolverLike, solver_of

_STARTS = 6
_ROUND_OFF = 1e-10
"""W2 relative to the data's width, at or below which it counts as 0."""

_LEAST_STEP = 1e-3
"""Least step of the oracle, in log time: nodes never meet, and the search never ends at
a grid that float32 could not tell from a shorter one."""


def _flow(process: Process, lam: Tensor) -> ProbabilityFlow:
    """The exact flow of N(0, diag(lam)): one coordinate per eigenvalue."""

    def denoiser(x: Tensor, t: TimeLike) -> Tensor:
        time = as_time(t)
        alpha, sigma = process.alpha(time), process.sigma(time)
        return (alpha * lam / (alpha**2 * lam + sigma**2)) * x

    return ProbabilityFlow(process, denoiser)


def _nodes(
    process: Process, grid: Tensor | Sequence[float] | np.ndarray, solver: SolverLike
) -> Tensor:
    """A checked grid; a float64 tensor that carries a graph keeps it."""
    check_process(process)
    solver_of(solver)
    checked = as_grid(grid)
    if abs(float(checked[0]) / process.t_max - 1) > 1e-6:
        raise ValueError(
            f"grid: the first node is {float(checked[0]):.6g}, expected t_max = "
            f"{process.t_max:.6g} of the process, where the exact prior is known"
        )
    if isinstance(grid, Tensor) and grid.requires_grad:
        return grid.to(torch.float64)
    return checked


def gaussian_output_std(
    process: Process,
    variances: Tensor | Sequence[float],
    grid: Tensor | Sequence[float] | np.ndarray,
    *,
    solver: SolverLike = "euler",
) -> Tensor:
    r"""Exact standard deviations :math:`|m_j| s_{T,j}` of a sampler's output.

    Args:
        process: The noising process.
        variances: Eigenvalues of the data's covariance [d], >= 0.
        grid: K + 1 descending times from t_max; usually ``schedule.grid(K)``.
        solver: ``"euler"``, ``"heun"``, ``"rk4"``, ``"dpmpp_2m"`` or a step as in
            `artlib.sample` that treats coordinates alike and apart, and is linear.

    Returns:
        float64 [d], along the eigenvectors; differentiable in a float64 ``grid``.

    Raises:
        TypeError: If ``solver`` is neither a name nor a step.
        ValueError: If an argument is out of its range, or a step is not linear in
            every coordinate.
    """
    lam = as_variances(variances)
    nodes = _nodes(process, grid, solver)
    std = _output_std(process, lam, nodes, solver)
    if not isinstance(solver, str):
        _check_linear(process, lam, nodes, solver, std.detach())
    return std


def _output_std(
    process: Process, lam: Tensor, nodes: Tensor, solver: SolverLike
) -> Tensor:
    """`gaussian_output_std` of checked arguments."""
    with torch.set_grad_enabled(nodes.requires_grad):
        start = lam.new_ones(1, lam.numel())
        factor = integrate(_flow(process, lam), start, nodes, solver)[0]
        alpha, sigma = process.alpha(nodes[0]), process.sigma(nodes[0])
        return factor.abs() * torch.sqrt(alpha**2 * lam + sigma**2)


def _check_linear(
    process: Process, lam: Tensor, nodes: Tensor, solver: SolverLike, std: Tensor
) -> None:
    """Refuse a step that does not multiply every coordinate by a number of its own."""
    alpha, sigma = process.alpha(nodes[0]), process.sigma(nodes[0])
    spread = torch.sqrt(alpha**2 * lam + sigma**2)
    start = torch.linspace(2, 3, len(lam), dtype=torch.float64)
    with torch.no_grad():
        end = integrate(_flow(process, lam), start[None], nodes.detach(), solver)[0]
    found = (end / start).abs() * spread
    if not torch.allclose(found, std, rtol=1e-6, atol=1e-9 * float(spread.max())):
        raise ValueError(
            "solver: its step is not linear in each coordinate apart, so that its "
            "output on a Gaussian is none; take samples with artlib.sample instead"
        )


def gaussian_w2(
    process: Process,
    variances: Tensor | Sequence[float],
    grid: Tensor | Sequence[float] | np.ndarray,
    *,
    solver: SolverLike = "euler",
) -> Tensor:
    r"""Exact W2 between a sampler's output and its data :math:`N(0, C)`.

    Its square is the Frechet distance. A grid that ends at t > 0 is compared with the
    exact law at that t, so that orders of convergence can be read off.

    Args:
        process: The noising process.
        variances: Eigenvalues of C [d].
        grid: K + 1 descending times from t_max.
        solver: As in `gaussian_output_std`.

    Returns:
        0-d float64 tensor, in units of the data; differentiable in ``grid``.

    Raises:
        TypeError: As in `gaussian_output_std`.
        ValueError: As there.
    """
    lam = as_variances(variances)
    nodes = _nodes(process, grid, solver)
    std = gaussian_output_std(process, lam, nodes, solver=solver)
    alpha, sigma = process.alpha(nodes[-1]), process.sigma(nodes[-1])
    return torch.linalg.norm(std - torch.sqrt(alpha**2 * lam + sigma**2))


def oracle_grid(
    process: Process,
    variances: Tensor | Sequence[float],
    K: int,
    *,
    solver: SolverLike = "euler",
    seed: int = 0,
) -> Tensor:
    r"""The K-step grid with the least exact W2 on :math:`N(0, C)`.

    The K - 1 inner nodes are moved in the logits of the steps in log time, from the
    hand-made schedules and from random grids. Where there are at least as many nodes
    as distinct variances, the signed errors :math:`|m_j| s_{T,j} - \sqrt{\lambda_j}`
    may all vanish at once: least squares are tried first, and the first start that
    reaches 0 to round-off ends the search. Otherwise BFGS moves them on log W2 and the
    best end point is polished.

    The grid is a limit worth the name on spectra, where it is the same from every seed.
    An error of 0 on few variances says that their errors were made to cancel, usually
    by many grids; the one that is returned comes from a fixed start if one gets there.

    Args:
        process: The noising process.
        variances: Eigenvalues of C [d]; those that agree to a relative 1e-9 are one.
        K: Number of steps, >= 1.
        solver: As in `gaussian_output_std`.
        seed: Of the random starts.

    Returns:
        float64 [K + 1], t_max ... 0.

    Raises:
        TypeError: As in `gaussian_output_std`.
        ValueError: As there.
    """
    K = positive_int(K, "K")
    seed = positive_int(seed, "seed", minimum=0)
    lam = as_variances(variances)
    first = lam.new_tensor([check_process(process).t_max, 0.0])
    if K == 1:
        return _nodes(process, first, solver)
    distinct, counts = _distinct(lam)
    weight = counts.double().sqrt()

    def residuals(logits: Tensor) -> Tensor:
        nodes = _from_logits(process, logits)
        std = _output_std(process, distinct, nodes, solver)
        return weight * (std - distinct.sqrt())

    starts = _starts(process, K, seed)
    first = _from_logits(process, torch.from_numpy(starts[0]))
    gaussian_output_std(process, distinct, first, solver=solver)  # or it refuses
    # A point (variance 0) is no condition: the last step puts it where it belongs.
    few = int((distinct > 0).sum()) < K
    width = float(lam.sum()) ** 0.5 or 1.0
    found = _zero(residuals, starts, width) if few else None
    if found is None:
        ends = [_descend(residuals, z, maxiter=150, gtol=1e-6) for z in starts]
        ends.sort(key=lambda z: float(residuals(torch.from_numpy(z)).norm()))
        found = _zero(residuals, ends, width) if few else None
        if found is None:
            found = _descend(residuals, ends[0], maxiter=1000, gtol=1e-10)
    return _from_logits(process, torch.from_numpy(found))


def _distinct(lam: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct variances and their counts, round-off of an eigensolver aside."""
    # The largest sets the scale: below 1e-15 of it an eigenvalue is noise anyway.
    level = torch.log(lam.clamp_min(1e-15 * float(lam.max())) + 1e-300)
    _, group, counts = torch.unique(
        (level * 1e9).round(), return_inverse=True, return_counts=True
    )
    total = lam.new_zeros(len(counts)).index_add_(0, group, lam)
    return total / counts, counts


def _starts(process: Process, K: int, seed: int) -> list[np.ndarray]:
    """Logits of the hand-made schedules, then of random grids around their mean."""
    rng = np.random.default_rng(seed)
    schedules = (edm, log_snr, kl_optimal)
    starts = [_to_logits(process, s(process, pinned=False).grid(K)) for s in schedules]
    spread = np.mean(starts, axis=0)
    random = range(_STARTS - len(starts))
    return starts + [spread + rng.normal(size=K - 1) for _ in random]


def _zero(
    residuals: Callable[[Tensor], Tensor], starts: list[np.ndarray], width: float
) -> np.ndarray | None:
    """The first root that least squares reach, errors relative to ``width``; or None.

    Near a root every step squares the error. One that gains less than a part in 1e3
    has met something else, and the search goes on from the next start.
    """

    def value(z: np.ndarray) -> np.ndarray:
        return residuals(torch.from_numpy(z)).numpy() / width

    def jacobian(z: np.ndarray) -> np.ndarray:
        rows = torch.autograd.functional.jacobian(residuals, torch.from_numpy(z))
        return np.asarray(rows) / width

    stop: dict[str, Any] = {"xtol": 1e-14, "ftol": 1e-3, "gtol": 1e-14, "max_nfev": 60}
    for z in starts:
        end = least_squares(value, z, jac=jacobian, **stop)
        if np.linalg.norm(end.fun) <= _ROUND_OFF:
            return np.asarray(end.x)
    return None


def _descend(
    residuals: Callable[[Tensor], Tensor], z: np.ndarray, **options: float
) -> np.ndarray:
    """One local search on log W2, by BFGS."""

    def objective(z: np.ndarray) -> tuple[float, np.ndarray]:
        logits = torch.from_numpy(z).clone().requires_grad_()
        loss = torch.log(torch.linalg.norm(residuals(logits)) + 1e-14)
        (gradient,) = torch.autograd.grad(loss, logits)
        return float(loss.detach()), gradient.numpy()

    end = minimize(objective, z, jac=True, method="BFGS", options=options)
    return np.asarray(end.x)


def _longest(process: Process) -> float:
    """Longest step of the oracle in log time: the whole range."""
    # Without a bound a line search may jump to grids whose nodes underflow.
    return math.log(process.t_max / process.t_min)


def _from_logits(process: Process, z: Tensor) -> Tensor:
    """Grid from K - 1 numbers, the logits of the steps in log time."""
    steps = _LEAST_STEP + _longest(process) * torch.sigmoid(z)
    inner = process.t_max * torch.exp(-torch.cumsum(steps, 0))
    ends = z.new_tensor([process.t_max, 0.0])
    return torch.cat([ends[:1], inner, ends[1:]])


def _to_logits(process: Process, grid: Tensor) -> np.ndarray:
    steps = -torch.diff(grid[:-1].log()) - _LEAST_STEP
    return torch.logit((steps / _longest(process)).clamp(1e-6, 1 - 1e-6)).numpy()
