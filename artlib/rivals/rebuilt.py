r"""Other people's ways to learn a schedule, rebuilt on a `ProbabilityFlow`.

They are here to be compared with. Each is a **reconstruction** from the published idea,
in our coordinates and without the authors' code, details and tuning:

* `euler_jumps`, after GITS: what one Euler step between any two of a list of times
  would leave, measured, and the cheapest way through the list by dynamic programming.
  For short steps that cost is :math:`\tfrac12 E|Q| h^2`, ART's: the same problem on a
  list of candidates instead of in closed form. That is our reading of it; with the
  published measure and coefficient it is another problem, see there.
* `girsanov`, after Align Your Steps: the Kullback-Leibler bound between the exact
  reverse diffusion and one whose denoiser is frozen during each step. With
  :math:`\ell = \sigma/\alpha` the noise level and :math:`m(\ell) = E\lVert x_0 -
  D\rVert^2` the denoising loss, D along the diffusion is a martingale, so the bound is

  .. math:: \sum_k \int_{\ell_{k+1}}^{\ell_k} \frac{m(\ell_k) - m(\ell)}{\ell^3}\,
            d\ell, \qquad \text{density} \propto \sqrt{m'(\ell) / \ell^3}

  as the number of steps grows: a loss curve is all that it asks of a model.

References:
    Chen et al., https://arxiv.org/abs/2405.11326 (GITS); Sabour et al.,
    https://arxiv.org/abs/2404.14507 (Align Your Steps).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .._common.checks import (
    as_grid,
    check_samples,
    finite_float,
    generator,
    got,
    positive_int,
    require_finite,
)
from .._common.interpolation import pchip
from .._common.precision import full_precision
from .._common.types import SeedLike
from ..flow.denoisers import CountNFE
from ..flow.flow import ProbabilityFlow, check_flow
from ..flow.noise_coordinate import log_level, log_level_dot, table_times
from ..flow.processes import Process, check_process
from ..flow.rows import in_batches
from ..schedules.constructors import Schedule, from_density

__all__ = ["JumpCosts", "euler_jumps", "girsanov", "girsanov_bound"]


@dataclass(frozen=True, eq=False)
class JumpCosts:
    """What one step between any two candidate times costs, and the cheapest way.

    Attributes:
        process: The noising process.
        times: Candidates [n], descending from t_max to 0, float64.
        costs: [n, n], entry (i, j) for the step from time i down to time j > i, >= 0;
            the rest is not looked at.
        nfe: Network evaluations (batched calls) spent.
        coefficient: What the costs of all later steps are multiplied by at each step,
            so that step k of a way counts ``coefficient ** k`` times. 1 adds them up;
            GITS is published with 1.15.
        signed: Whether costs may be negative, as differences of deviations may.

    Raises:
        ValueError: If shapes do not fit, a cost is not finite, or negative where it may
            not be, or the times do not descend from t_max to 0.
    """

    process: Process
    times: Tensor
    costs: Tensor
    nfe: int = 0
    coefficient: float = 1.0
    signed: bool = False

    def __post_init__(self) -> None:
        n = self.times.numel()
        if self.times.ndim != 1 or n < 2 or self.costs.shape != (n, n):
            raise ValueError(
                "JumpCosts: expected times [n] and costs [n, n] with n >= 2, got "
                f"shapes {tuple(self.times.shape)} and {tuple(self.costs.shape)}"
            )
        ends = float(self.times[0]), float(self.times[-1])
        if ends != (self.process.t_max, 0.0) or bool((self.times.diff() >= 0).any()):
            raise ValueError(
                f"times: expected candidates descending from t_max = "
                f"{self.process.t_max:.6g} to 0, got {ends[0]:.6g} ... {ends[1]:.6g}"
            )
        above = self.costs[torch.ones(n, n, device="cpu").triu(1).bool()]
        require_finite(above, "costs", "check the denoiser near t_min and t_max")
        finite_float(self.coefficient, "coefficient", positive=True)
        if not self.signed and bool((above < 0).any()):
            raise ValueError("costs: expected numbers >= 0 above the diagonal")

    def grid(self, K: int) -> Tensor:
        """The cheapest K steps.

        Args:
            K: Number of steps, at most n - 1.

        Returns:
            float64 [K + 1], a subset of the candidates from t_max to 0.

        Raises:
            ValueError: If there are not so many candidates.
        """
        return self.times[self._nodes(K)[0]]

    def cost(self, K: int) -> float:
        """The sum of the costs of these K steps.

        Args:
            K: Number of steps, at most n - 1.

        Raises:
            ValueError: If there are not so many candidates.
        """
        return self._nodes(K)[1]

    def _nodes(self, K: int) -> tuple[list[int], float]:
        K, n = positive_int(K, "K"), self.times.numel()
        if n <= K:
            raise ValueError(
                f"K: {K} steps need at least {K + 1} candidates, there are {n}; make "
                "them with more points"
            )
        infinite = torch.full_like(self.costs, torch.inf)
        costs = torch.where(
            torch.ones(n, n, device="cpu").triu(1).bool(), self.costs, infinite
        )
        # Least cost of reaching each candidate in k steps, and from where.
        reached, came_from = costs[0], []
        for k in range(1, K):
            weight = self.coefficient**k
            reached, previous = (reached[:, None] + weight * costs).min(0)
            came_from.append(previous)
        nodes = [n - 1]
        for previous in reversed(came_from):
            nodes.append(int(previous[nodes[-1]]))
        return [0, *reversed(nodes)], float(reached[-1])


@full_precision()
def euler_jumps(
    flow: ProbabilityFlow,
    x_T: Tensor,
    *,
    points: int = 64,
    method: str = "rk4",
    batch: int | None = None,
    measure: Literal["l2", "deviation"] = "l2",
    coefficient: float = 1.0,
) -> JumpCosts:
    r"""What single Euler steps between points of reference paths leave.

    .. math:: c_{ij} = E\lVert x_i + (t_j - t_i) F(x_i, t_i) - x_j \rVert

    with x on the reference path from each of ``x_T``, and :math:`x = D` at t = 0. A
    reconstruction of what GITS minimises. The defaults are **our reading**, in which it
    is ART's problem on a list; as published it is ``measure="deviation"`` with
    ``coefficient=1.15``: with :math:`\delta` the distance from the straight line
    between the path's start and its end,

    .. math:: c_{ij} = E\,\delta(x_i + (t_j - t_i) F_i) - E\,\delta(x_j) ,

    whose second term is 0 at the end, and later steps weigh more
    (`JumpCosts.coefficient`). What a step errs along that line costs nothing then.

    Args:
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape].
        points: Candidates between t_max and t_min, evenly spaced in the log noise
            level; 0 is one more.
        method: Integrator of the reference paths, see `artlib.stiffness_table`.
        batch: Paths computed together, which bounds the memory; by default all. The
            costs are the same to round-off, the ``nfe`` those of one batch.
        measure: ``"l2"`` or ``"deviation"``.
        coefficient: See `JumpCosts`.

    Returns:
        A `JumpCosts`; its ``grid(K)`` serves all budgets.

    Raises:
        ValueError: If ``x_T`` or the denoiser holds NaN or the wrong shape.
    """
    check_flow(flow)
    if measure not in ("l2", "deviation"):
        raise ValueError(f"measure: expected 'l2' or 'deviation', got {measure!r}")
    coefficient = finite_float(coefficient, "coefficient", positive=True)
    x_T, points = check_samples(x_T), positive_int(points, "points", minimum=2)
    batch = None if batch is None else positive_int(batch, "batch")
    counter = CountNFE(flow.denoiser)
    counted = flow.with_denoiser(counter)
    times = table_times(flow.process, points)
    nodes = torch.cat([times, times.new_zeros(1)])
    costs = torch.zeros(points + 1, points + 1, dtype=torch.float64, device="cpu")
    for part, (x,) in in_batches(counted, [x_T], batch, counter=counter):
        path, share = part.trajectory(x, times, method=method), len(x) / len(x_T)
        ends = torch.cat([path.states, path.denoised[-1:]])
        for i in range(points):
            # [points - i, n, ...]: where each step from here lands, and should land.
            steps = (nodes[i + 1 :] - nodes[i]).to(x_T.device)
            steps = steps.reshape(-1, *[1] * x_T.ndim)
            landed, wanted = path.states[i] + steps * path.velocities[i], ends[i + 1 :]
            if measure == "deviation":
                norms = _off_line(landed, ends) - _off_line(wanted, ends)
            else:
                missed = landed - wanted
                norms = torch.linalg.vector_norm(missed.flatten(2), dim=2)
            costs[i, i + 1 :] += share * norms.mean(1).cpu()
        del path, ends
    signed = measure == "deviation"
    return JumpCosts(flow.process, nodes, costs, counter.nfe, coefficient, signed)


def _off_line(states: Tensor, path: Tensor) -> Tensor:
    """Distances [m, N] of states [m, N, *shape] from the chord of a path."""
    start, end = path[0].flatten(1), path[-1].flatten(1)
    chord = torch.nn.functional.normalize(start - end, dim=1)
    apart = states.flatten(2) - end
    along = (apart * chord).sum(2, keepdim=True) * chord
    return torch.linalg.vector_norm(apart - along, dim=2)


@full_precision()
@torch.no_grad()
def girsanov(
    flow: ProbabilityFlow,
    x_0: Tensor,
    *,
    points: int = 64,
    seed: SeedLike = 0,
    batch: int | None = None,
) -> Schedule:
    r"""The schedule that minimises the Kullback-Leibler bound of the reverse diffusion.

    The module says which bound. In time its density is
    :math:`(m_\varphi\,\dot\varphi\,\alpha\,w)^{1/2} \sigma^{-3/2}` with
    :math:`m_\varphi` the derivative of the loss in the tabulated log noise level
    :math:`\varphi` and :math:`w = \dot\sigma\alpha - \dot\alpha\sigma`. The last of
    its nodes is replaced by 0. A reconstruction of the objective of Align Your Steps,
    minimised in the limit of many steps; their lists are found by a search at ten.

    Args:
        flow: The flow.
        x_0: Clean samples [N, *shape], of the data or of the model.
        points: Noise levels at which the loss is measured, each with one evaluation
            and the same noise.
        seed: Of the noise.
        batch: Samples computed together, which bounds the memory; by default all. The
            noise of a sample does not depend on it.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: If ``x_0`` or the denoiser holds NaN or the wrong shape, or the loss
            does not depend on the noise level.
    """
    check_flow(flow)
    x_0, points = check_samples(x_0, "x_0"), positive_int(points, "points", minimum=5)
    process, times = flow.process, table_times(flow.process, points)
    rng = generator(seed)
    noise = torch.randn(
        x_0.shape, generator=rng, dtype=torch.float64, device=rng.device
    ).to(x_0.device)
    batch = None if batch is None else positive_int(batch, "batch")
    loss = torch.zeros(points, dtype=torch.float64, device="cpu")
    for part, (clean, eps) in in_batches(flow, [x_0, noise], batch):
        for k, t in enumerate(times):
            a, s = float(process.alpha(t)), float(process.sigma(t))
            denoised = part.denoise(a * clean.double() + s * eps, t)
            missed = (clean - denoised).double().square().sum()
            loss[k] += (missed / len(x_0)).cpu()
    require_finite(loss, "denoising loss", "check the denoiser at t_max and t_min")
    level = log_level(process, times).numpy()[::-1]
    # More noise cannot help: what a finite sample says to the contrary is noise.
    rising = np.maximum.accumulate(loss.numpy()[::-1])
    if rising[-1] == rising[0]:
        raise ValueError(
            "flow: the denoising loss is the same at all noise levels; is the denoiser "
            "a constant?"
        )
    slope = pchip(level, rising).derivative()(level)[::-1]
    alpha, sigma = process.alpha(times), process.sigma(times)
    w = process.sigma_dot(times) * alpha - process.alpha_dot(times) * sigma
    rate = torch.from_numpy(slope.copy()) * log_level_dot(process, times)
    density = (rate * alpha * w).clamp_min(0).sqrt() * sigma**-1.5
    notes = {"method": "girsanov", "samples": len(x_0), "nfe": points}
    return from_density(
        process, times, density, name="Girsanov bound", provenance=notes
    )


def girsanov_bound(
    process: Process,
    grid: Tensor | Sequence[float],
    loss: Callable[[Tensor], Tensor],
    *,
    points: int = 1001,
) -> float:
    r"""The Kullback-Leibler bound of the module for a list of timesteps, in nats.

    Args:
        process: The noising process.
        grid: Timesteps [K + 1] descending to 0; the bound has no end there, so the
            last step is counted down to t_min.
        loss: :math:`m(\ell)`, the denoising loss at noise levels [n] -> [n].
        points: Quadrature points of a step, evenly spaced in the log noise level.

    Returns:
        The sum over the steps, >= 0 where the loss rises with the noise.

    Raises:
        ValueError: If the list is no grid, or starts where no signal is left.
    """
    check_process(process)
    if not callable(loss):
        raise TypeError(
            f"loss: expected a function of noise levels, got {got(loss)}; pass one "
            "that gives the denoising loss at levels [n]"
        )
    nodes, points = as_grid(grid), positive_int(points, "points", minimum=2)
    levels = process.noise_level(nodes[nodes > process.t_min])
    end = process.noise_level(process.t_min).reshape(1)
    log_levels = torch.cat([levels, end]).log()
    require_finite(log_levels, "grid", "start it where there is signal left")
    total = 0.0
    for upper, lower in pairwise(log_levels.tolist()):
        log_level = torch.linspace(
            lower, upper, points, dtype=torch.float64, device="cpu"
        )
        level = log_level.exp()
        m = loss(level)
        total += float(torch.trapezoid((m[-1] - m) / level**2, log_level))
    return total
