r"""What of each local error arrives: weights by the Jacobian of the flow.

An error e made at time t arrives at t_min as J(t) e, with
:math:`J(t) = \partial x(t_{min}) / \partial x(t)`. Two goal-oriented sizes of it:

* **terminal**: the norm :math:`|J Q_p|`;
* **dual**: :math:`|\langle J^T \hat e, Q_p\rangle|`, the part along the direction
  :math:`\hat e` of the error that arrives in all, measured by a run of the solver, so
  that what goes elsewhere, or cancels, does not count.

Both need :math:`J^T u` only, one vector-Jacobian product a step from the end of the
path backwards (the adjoint), which every network that was trained by back-propagation
has. For the norm, u runs over R orthonormal random directions per sample,
:math:`|w|^2 \approx (d/R) \sum_r \langle u_r, w\rangle^2`, exact where R = d.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .._common.checks import generator
from .._common.precision import full_precision
from .._common.types import SeedLike
from ..flow.denoisers import CountNFE
from ..flow.flow import ProbabilityFlow
from ..flow.noise_coordinate import log_level
from ..flow.reference_path import Trajectory
from ..flow.rows import in_batches
from ..solvers.integrate import integrate
from ..solvers.solver import SolverLike
from .solver_error import SolverErrors, at_times, below, measure, step_of
from .stiffness import StiffnessTable

Weight = Literal["local", "terminal", "dual"]

_STEPS = 20
"""Steps of the run whose error gives the direction of the dual weight."""


def check_weight(weight: object) -> None:
    """Refuse what is no `Weight`.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(weight, str) or weight not in get_args(Weight):
        raise ValueError(f"weight: expected one of {get_args(Weight)}, got {weight!r}")


@full_precision()
def measure_errors(
    flow: ProbabilityFlow,
    x_T: Tensor,
    times: Tensor,
    *,
    solver: SolverLike,
    order: int | None,
    weight: Weight,
    method: str,
    probes: int,
    seed: SeedLike,
    batch: int | None,
) -> tuple[Tensor, int, int]:
    """Weighted sizes of a solver's errors at the times of a table.

    Args:
        flow: The flow.
        x_T: States at t_max [N, *shape].
        times: Times of the table [n], from t_max to t_min.
        solver: A name, or a one-step solver ``step(flow, x, t, s)``, as in
            `artlib.error_table`.
        order: p of a callable; None to measure it.
        weight: ``"local"``, ``"terminal"`` or ``"dual"``: the error where it is made,
            at t_min, or its part along the error that arrives.
        method: Integrator of the reference paths, see `artlib.stiffness_table`.
        probes: Random directions per sample for ``"terminal"``; exact from the number
            of dimensions on.
        seed: Of the probes.
        batch: Trajectories computed together, which bounds the memory; None for all.

    Returns:
        Values [N, n], the order p, and the network evaluations.

    Raises:
        ValueError: If the weight is unknown, and as in `artlib.error_table`.
    """
    check_weight(weight)
    step_of(solver, order)  # before anything is spent
    # The last step has to end at t_min, below which a network may know nothing: it
    # starts at a time of its own, a little above.
    level = log_level(flow.process, times)
    gap = min(float(level[-2] - level[-1]), 0.04)
    above = below(flow, times[-1], (-gap,))[0]
    inner = times[:-1] if float(level[-2] - level[-1]) > 0.05 else times[:-2]
    stations = torch.cat([inner, above[None], times[-1:]])
    counter = CountNFE(flow.denoiser)
    counted = flow.with_denoiser(counter)
    # Drawn at once, so that the batches do not decide which directions are drawn.
    n, d = len(x_T), x_T[0].numel()
    count = min(probes, d) if weight == "terminal" else 0
    rng = generator(seed, x_T.device)
    random = torch.randn(
        n, d, count, generator=rng, dtype=torch.float64, device=rng.device
    )
    found = order

    def parts() -> Iterator[tuple[ProbabilityFlow, Trajectory, SolverErrors, Tensor]]:
        nonlocal found
        split = in_batches(counted, [x_T, random], batch, counter=counter)
        for part, (x, probe) in split:
            path = part.trajectory(x, stations, method=method)
            errors = measure(part, path, solver, found)
            found = errors.order  # of a step: measured on the first batch
            yield part, path, errors, probe
            del path, errors  # before the next are made

    def at_the_times(errors: SolverErrors, norms: Tensor) -> Tensor:
        return at_times(flow, errors.times, norms, times)

    measured: Iterable[tuple[ProbabilityFlow, Trajectory, SolverErrors, Tensor]]
    measured, rows = parts(), []
    if weight == "dual":
        if batch is None or batch >= n:
            measured = list(measured)  # a single batch is not measured again
        local = [at_the_times(e, e.norms()) for _, _, e, _ in measured]
        assert found is not None
        table = StiffnessTable(flow.process, times, torch.cat(local), order=found)
        nodes = table.art().grid(_STEPS)
        nodes[-1] = flow.process.t_min
        measured = measured if isinstance(measured, list) else parts()
    for part, path, errors, probe in measured:
        norms = errors.norms()
        if weight == "dual":
            error = arriving(part, path, nodes, solver)
            gains = _dual_gains(part, path, errors.vectors, error)
            norms = norms.to(gains) * gains
        elif weight == "terminal":
            gains = _norm_gains(part, path, errors.vectors, probe)
            norms = norms.to(gains) * gains
        rows.append(at_the_times(errors, norms))
    assert found is not None
    return torch.cat(rows), found, counter.nfe


def _norm_gains(
    flow: ProbabilityFlow, path: Trajectory, vectors: Tensor, random: Tensor
) -> Tensor:
    """|J Q| / |Q| per sample and step [N, n], by random directions [N, d, count]."""
    n, shape = path.states.shape[1], path.states.shape[2:]
    d, count = random.shape[1:]
    directions = torch.linalg.qr(random)[0].to(path.states)
    end = directions.permute(2, 0, 1).reshape(count, n, *shape)
    unit = _normalised(vectors)
    squares = vectors.new_zeros(vectors.shape[:2])
    for k, adjoint in _adjoints(flow, path, end):
        squares[k] = ((adjoint * unit[k]).flatten(2).sum(2) ** 2).sum(0)
    # The mean of this root over directions is |w|, not only that of its square.
    log_bias = (
        0.5 * math.log(d / count)
        + math.lgamma((count + 1) / 2)
        - math.lgamma(count / 2)
        + math.lgamma(d / 2)
        - math.lgamma((d + 1) / 2)
    )
    return (d / count * squares).sqrt().T / math.exp(log_bias)


def _dual_gains(
    flow: ProbabilityFlow, path: Trajectory, vectors: Tensor, error: Tensor
) -> Tensor:
    r"""|<J^T e, Q>| / |Q| per sample and step [N, n], e the direction of ``error``."""
    unit = _normalised(vectors)
    gains = vectors.new_zeros(vectors.shape[:2])
    for k, adjoint in _adjoints(flow, path, _normalised(error[None])):
        gains[k] = (adjoint[0] * unit[k]).flatten(1).sum(1).abs()
    return gains.T


def arriving(
    flow: ProbabilityFlow, path: Trajectory, nodes: Tensor, solver: SolverLike
) -> Tensor:
    """Error at t_min of a run of the solver on a schedule."""
    nodes = nodes.to(path.states.device)
    with torch.no_grad():
        x = integrate(flow, path.states[0], nodes, solver)
    return x - path.states[-1]


def _normalised(vectors: Tensor) -> Tensor:
    """Unit vectors of [n, N, *shape]; zeros stay."""
    size = vectors.flatten(2).norm(dim=2).clamp_min(1e-300)
    return vectors / size.reshape(*size.shape, *[1] * (vectors.ndim - 2))


def _adjoints(
    flow: ProbabilityFlow, path: Trajectory, end: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """J^T u at the start of every step, from the last one back.

    Args:
        flow: The flow.
        path: Reference paths; one RK4 step between neighbouring times.
        end: Directions u at the last time [R, N, *shape].

    Yields:
        The step's index and J^T u there [R, N, *shape].

    Raises:
        RuntimeError: If the denoiser passes no gradient, or a wrong one.
    """
    steps = len(path.times) - 1
    adjoint = end
    for k in reversed(range(steps)):
        with torch.inference_mode(False), torch.enable_grad():
            x = path.states[k].clone().requires_grad_()
            if k == steps // 2:
                _check_gradient(flow, x, path.times[k], end[0])
            y = integrate(flow, x, path.times[k : k + 2], "rk4")
            # The forward pass is shared; only the backward one is made for each u.
            rows = [
                torch.autograd.grad(y, x, u, retain_graph=r < len(adjoint) - 1)[0]
                for r, u in enumerate(adjoint)
            ]
        adjoint = torch.stack(rows)
        yield k, adjoint


def dual_gains_at_nodes(
    flow: ProbabilityFlow, path: Trajectory, vectors: Sequence[Tensor], error: Tensor
) -> list[Tensor]:
    r"""`_dual_gains` by one vector-Jacobian product a time of the path.

    The adjoint q of :math:`x/\sigma` obeys :math:`dq/d\lambda = -\alpha\,(\partial_x
    D)^T q`, which is integrated from the end of the path by the second-order method of
    Adams and Bashforth; that of x is :math:`q/\sigma`. Weights enter a density with the
    power 1/(p + 1), and need no more.

    Args:
        flow: The flow.
        path: Reference paths at times close to each other, [n].
        vectors: Errors of steps that start at the first n - 1 of them, of one solver or
            of several, which share the adjoint.
        error: What arrives at the last one [N, *shape]; its direction counts.

    Returns:
        :math:`|\langle J^T \hat e, Q\rangle| / |Q|`, [N, n - 1], for each of them.

    Raises:
        RuntimeError: If the denoiser passes no gradient, or a wrong one.
    """
    times = path.times.cpu()
    alpha, sigma = flow.process.alpha(times), flow.process.sigma(times)
    level = flow.process.log_snr(times) / 2
    units, end = [_normalised(v) for v in vectors], _normalised(error[None])[0]
    adjoint, before = end * float(sigma[-1]), None
    gains = [v.new_zeros(v.shape[:2]) for v in vectors]
    for k in reversed(range(1, len(times))):
        with torch.inference_mode(False), torch.enable_grad():
            x = path.states[k].clone().requires_grad_()
            if k == len(times) // 2:
                _check_gradient(flow, x, path.times[k], end)
            denoised = flow.denoise(x, path.times[k])
            if not denoised.requires_grad:
                raise RuntimeError(_NO_GRADIENT)
            (product,) = torch.autograd.grad(denoised, x, adjoint)
        rate = float(alpha[k]) * product
        step = float(level[k] - level[k - 1])
        if math.isfinite(step):  # without signal the last one stands for it
            slope = rate if before is None else 1.5 * rate - 0.5 * before
            adjoint = adjoint + step * slope
        before = rate
        for gain, unit in zip(gains, units, strict=True):
            along = (adjoint / float(sigma[k - 1])) * unit[k - 1]
            gain[k - 1] = along.flatten(1).sum(1).abs()
    return [gain.T for gain in gains]


_REMEDY = (
    "take torch.no_grad, torch.inference_mode and detach out of its forward pass, "
    "or use weight='local'"
)
_NO_GRADIENT = f"weight: the denoiser passes no gradient on; {_REMEDY}"


def _check_gradient(flow: ProbabilityFlow, x: Tensor, t: Tensor, u: Tensor) -> None:
    """Compare one product with the denoiser's Jacobian with a difference.

    Args:
        flow: The flow.
        x: States [N, *shape] that require a gradient.
        t: Their time.
        u: Directions [N, *shape].

    Raises:
        RuntimeError: If there is no gradient, or they do not agree: part of the
            network is cut off from the graph, which changes gradients without a word.
    """
    denoised = flow.denoise(x, t)
    if not denoised.requires_grad:
        raise RuntimeError(_NO_GRADIENT)
    found = (torch.autograd.grad(denoised, x, u)[0] * u).flatten(1).sum(1)
    eps = torch.finfo(flow.dtype or torch.float64).eps ** (1 / 3)
    with torch.no_grad():
        wanted, doubted = (
            ((flow.denoise(x + far * u, t) - flow.denoise(x - far * u, t)) / (2 * far))
            .mul(u)
            .flatten(1)
            .sum(1)
            for far in (eps * flow.process.sigma(t), 2 * eps * flow.process.sigma(t))
        )
    size, doubt = wanted.norm(), 4 * (wanted - doubted).norm()
    if bool((found - wanted).norm() > 0.2 * size + doubt):
        raise RuntimeError(
            f"weight: the denoiser's gradient ({float(found.norm()):.3g}) disagrees "
            f"with a difference ({float(size):.3g}); {_REMEDY}"
        )
