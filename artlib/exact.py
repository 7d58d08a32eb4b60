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
from torch import Tensor

from ._common.checks import as_grid, as_variances, positive_int
from ._common.types import TimeLike
from .flow.flow import ProbabilityFlow
from .flow.processes import VE, Process, as_time, check_process
from .schedules.constructors import edm, kl_optimal, log_snr
from .schedules.plan import Plan
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


def _arguments(
    process: Process,
    grid: Tensor | Sequence[float] | np.ndarray | Plan,
    solver: SolverLike | None,
) -> tuple[Tensor, SolverLike, Tensor | None]:
    """Checked nodes, the solver, and the levels told, if they are not the nodes'."""
    if not isinstance(grid, Plan):
        solver = "euler" if solver is None else solver
        return _nodes(process, grid, solver), solver, None
    if grid.process != process:
        raise ValueError(
            f"grid: the plan belongs to {grid.process}, got the process {process}"
        )
    if solver is not None and solver_of(solver) != solver_of(grid.solver):
        raise ValueError(
            f"solver: the plan was made for {solver_of(grid.solver).name}; leave the "
            "solver out, or pass plan.nodes as a grid"
        )
    return grid.nodes, grid.solver, None if grid.is_honest else grid.told


def gaussian_output_std(
    process: Process,
    variances: Tensor | Sequence[float],
    grid: Tensor | Sequence[float] | np.ndarray | Plan,
    *,
    solver: SolverLike | None = None,
) -> Tensor:
    r"""Exact standard deviations :math:`|m_j| s_{T,j}` of a sampler's output.

    Args:
        process: The noising process.
        variances: Eigenvalues of the data's covariance [d], >= 0.
        grid: K + 1 descending times from t_max; usually ``schedule.grid(K)``. Or a
            `Plan`, with its own solver and the levels that it tells.
        solver: A name, a `Solver`, or a step as in `artlib.sample` that treats
            coordinates alike and apart, and is linear. By default ``"euler"``, or that
            of the plan.

    Returns:
        float64 [d], along the eigenvectors; differentiable in a float64 ``grid``.

    Raises:
        TypeError: If ``solver`` is neither a name nor a step.
        ValueError: If an argument is out of its range, or a step is not linear in
            every coordinate.
    """
    lam = as_variances(variances)
    nodes, solver, told = _arguments(process, grid, solver)
    std = _output_std(process, lam, nodes, solver, told)
    if not isinstance(solver, str):
        _check_linear(process, lam, nodes, solver, std.detach())
    return std


def _output_std(
    process: Process,
    lam: Tensor,
    nodes: Tensor,
    solver: SolverLike,
    told: Tensor | None = None,
) -> Tensor:
    """`gaussian_output_std` of checked arguments."""
    with torch.set_grad_enabled(nodes.requires_grad):
        start = lam.new_ones(1, lam.numel())
        factor = integrate(_flow(process, lam), start, nodes, solver, told=told)[0]
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
    grid: Tensor | Sequence[float] | np.ndarray | Plan,
    *,
    solver: SolverLike | None = None,
) -> Tensor:
    r"""Exact W2 between a sampler's output and its data :math:`N(0, C)`.

    Its square is the Frechet distance. A grid that ends at t > 0 is compared with the
    exact law at that t, so that orders of convergence can be read off.

    Args:
        process: The noising process.
        variances: Eigenvalues of C [d].
        grid: K + 1 descending times from t_max, or a `Plan`.
        solver: A name, a `Solver`, or a step as in `artlib.sample` that treats
            coordinates alike and apart, and is linear. By default ``"euler"``, or that
            of the plan.

    Returns:
        0-d float64 tensor, in units of the data; differentiable in ``grid``.

    Raises:
        TypeError: If ``solver`` is neither a name nor a step.
        ValueError: If an argument is out of its range, or a step is not linear in
            every coordinate.
    """
    lam = as_variances(variances)
    nodes, _, _ = _arguments(process, grid, solver)
    given = grid if isinstance(grid, Plan) else nodes
    std = gaussian_output_std(process, lam, given, solver=solver)
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
        solver: A name, a `Solver`, or a step as in `artlib.sample` that treats
            coordinates alike and apart, and is linear.
        seed: Of the random starts.

    Returns:
        float64 [K + 1], t_max ... 0.

    Raises:
        TypeError: If ``solver`` is neither a name nor a step.
        ValueError: If an argument is out of its range, or a step is not linear in
            every coordinate.
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


def oracle_plan(
    process: Process,
    variances: Tensor | Sequence[float],
    K: int,
    *,
    solver: SolverLike = "euler",
    seed: int = 0,
) -> Plan:
    r"""Nodes and told levels with the least exact W2 on :math:`N(0, C)`.

    In `VE` an Euler sampler that is told levels multiplies an eigendirection of
    variance l by the rational function

    .. math:: r(l) = \prod_k \frac{l + \rho_k s_k^2}{l + s_k^2} , \qquad
              \rho_k = t_{k+1}/t_k ,

    an approximant of :math:`\sqrt{l/(l + T^2)}` with 2K - 1 free numbers, where honest
    levels leave K - 1. The best of that degree is Zolotarev's (`zolotarev_nodes`): its
    error falls exponentially in K. The search starts there, at the best honest grid
    and at c = 1/4 on it, and moves everything by BFGS.

    The levels are those of a Gaussian. On a trained network they are *worse* than
    honest ones; there, use `artlib.tell` or `artlib.refine`.

    Args:
        process: The noising process.
        variances: Eigenvalues of C [d].
        K: Number of steps, >= 1.
        solver: One that can be told levels.
        seed: Of the random starts of the honest grid.

    Returns:
        The plan.

    Raises:
        TypeError: If ``solver`` is neither a name nor a step.
        ValueError: If an argument is out of its range, or the solver cannot be told.
    """
    kind = solver_of(solver)
    if not kind.tellable:
        raise ValueError(
            f"solver: {kind.name} makes several evaluations a step and cannot be told "
            "levels; use euler or a multistep solver"
        )
    lam = as_variances(variances)
    grid = oracle_grid(process, lam, K, solver=solver, seed=seed)
    distinct, counts = _distinct(lam)
    weight = counts.double().sqrt()

    def unpacked(z: Tensor) -> tuple[Tensor, Tensor]:
        nodes = _from_logits(process, z[: K - 1])
        start = nodes[:-1]
        level = process.noise_level(start.detach())
        signal = torch.isfinite(level)
        here = torch.where(signal, start, 0.5 * process.t_max)
        moved = process.noise_level(here) * torch.exp(-torch.exp(z[K - 1 :]))
        return nodes, torch.where(signal, process.inverse_noise_level(moved), start)

    def residuals(z: Tensor) -> Tensor:
        nodes, told = unpacked(z)
        std = _output_std(process, distinct, nodes, solver, told)
        return weight * (std - distinct.sqrt())

    def packed(nodes: Tensor, ratio: Tensor) -> np.ndarray:
        """Parameters of nodes, and of told levels over the nodes'."""
        below = torch.log(-ratio.clamp(1e-6, 1 - 1e-6).log())
        return np.concatenate([_to_logits(process, nodes), below.numpy()])

    rho = grid[1:] / grid[:-1]
    starts = [
        packed(grid, torch.full((K,), 1 - 1e-3, dtype=torch.float64)),
        packed(grid, torch.sqrt(1 - 0.5 * (1 - rho))),
    ]
    positive = distinct[distinct > 0]
    if isinstance(process, VE) and kind.name == "euler" and len(positive) > 1:
        nodes, told = zolotarev_nodes(
            process.t_max, float(positive.min()), float(positive.max()), K
        )
        starts.append(packed(nodes, told / nodes[:-1]))
    ends = [_descend(residuals, z, maxiter=400, gtol=1e-10) for z in starts]
    best = min(ends, key=lambda z: float(residuals(torch.from_numpy(z)).norm()))
    nodes, told = unpacked(torch.from_numpy(best))
    honest = float(gaussian_w2(process, lam, grid, solver=solver))
    if float(residuals(torch.from_numpy(best)).norm()) >= honest:
        nodes, told = grid, grid[:-1]
    return Plan.made(
        process,
        nodes,
        told,
        solver,
        name=f"oracle, {kind.name}, told",
        method="oracle_plan",
        provenance={"variances": len(lam), "honest": honest},
    )


def zolotarev_nodes(
    t_max: float, smallest: float, largest: float, K: int
) -> tuple[Tensor, Tensor]:
    r"""Nodes and told levels in VE of Zolotarev's rational function.

    With :math:`w = l/(l + T^2)` the target is :math:`\sqrt w` on an interval. Its best
    approximant of degree K in relative error has poles and zeros at
    :math:`-c_i`, odd and even i,

    .. math:: c_i = w_{min} \frac{\mathrm{sn}^2}{\mathrm{cn}^2}
              \Bigl(\frac{i\,K(k')}{2K}\Bigr), \qquad
              k'^2 = 1 - w_{min}/w_{max} ;

    a pole is the level told, :math:`s^2 = c T^2/(1 + c)`, and the zero below it is
    :math:`\rho s^2`. The constant factor of the approximant is not a sampler's to
    choose: one more number is missing, and the optimum lies near, not at, this point.

    Args:
        t_max: T.
        smallest: Least variance, > 0.
        largest: Greatest variance.
        K: Number of steps.

    Returns:
        Nodes [K + 1] and levels [K], float64, in VE time.
    """
    low, high = (v / (v + t_max**2) for v in (smallest, largest))
    m = 1 - low / high
    index = np.arange(1, 2 * K)
    from scipy.special import ellipj, ellipk

    sn, cn, _, _ = ellipj(index * ellipk(m) / (2 * K), m)
    c = low * (sn / cn) ** 2
    squares = (c * t_max**2 / (1 + c))[::-1]  # the largest first: pole, zero, pole ...
    poles, zeros = squares[0::2], np.append(squares[1::2], 0.0)
    nodes = t_max * np.concatenate([[1.0], np.cumprod(zeros / poles)])
    return torch.from_numpy(nodes), torch.from_numpy(np.sqrt(poles))


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
    from scipy.optimize import least_squares

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

    from scipy.optimize import minimize

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
