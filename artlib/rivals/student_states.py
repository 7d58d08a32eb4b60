r"""A list found from the states that a sampler of few steps itself would have.

After Pei et al. ("Optimal Stepsize for Diffusion Sampling", OSS). A teacher takes N
Euler steps through a list of candidates. A student may visit some of them: with
:math:`z_k(j)` its state at candidate j after k steps,

.. math::
    z_{k+1}(j) = z_k(i^*) + (t_j - t_{i^*})\, F(z_k(i^*), t_{i^*}), \qquad
    i^* = \arg\min_{i} \lVert z_k(i) + (t_j - t_i) F(z_k(i), t_i) - x^{teacher}_j
    \rVert ,

from all candidates i before j, so that each step starts from what the student has
there, and not from the teacher's path as in GITS. The way to t = 0 after K steps is the
list. Only the nearest state is kept at each candidate, so that it is a dynamic
programme where nearer states stay nearer (in one dimension they do), and a heuristic
elsewhere. Where no further step brings a state nearer, the one of fewer steps stays.

A **reconstruction** of ours. In the published code the noise counts as a state at
every candidate, so that a first step may start below t_max, with the network told of
less noise than there is; here it starts at t_max. Beside that code with this one change
the ways of 12 noises are the same, node for node (a mixture in VE, 24 candidates even
in log-SNR and after EDM, K = 2, 4, 6).

References:
    Pei et al., https://arxiv.org/abs/2503.21774.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._common.checks import check_samples, positive_int
from .._common.precision import full_precision
from ..control.stiffness import check_process
from ..flow.denoisers import CountNFE
from ..flow.flow import ProbabilityFlow, check_flow
from ..flow.rows import in_batches
from ..schedules.constructors import Schedule, edm, from_grid

__all__ = ["student_steps", "student_ways"]


@full_precision()
@torch.no_grad()
def student_ways(
    flow: ProbabilityFlow, x_T: Tensor, candidates: Tensor, K: int
) -> Tensor:
    """The way of each noise through the candidates.

    Args:
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape].
        candidates: Process times [n + 1] from t_max down to 0, float64.
        K: Number of steps, at most n.

    Returns:
        Candidates visited [N, K + 1], from 0 to n, int64; where fewer steps come
        nearer, 0 is repeated at the start.

    Raises:
        ValueError: If there are not so many candidates.
    """
    check_flow(flow)
    x, K = check_samples(x_T).double(), positive_int(K, "K")
    n = len(candidates) - 1
    if n < K:
        raise ValueError(
            f"K: {K} steps need at least {K} candidates after the first, there are "
            f"{n}; pass more points"
        )
    times, shape = candidates.to(x), (-1, *[1] * x.ndim)
    teacher = [x]
    for now, step in zip(candidates[:-1], times.diff(), strict=True):
        teacher.append(teacher[-1] + step * flow.velocity(teacher[-1], now))
    wanted = torch.stack(teacher)
    # [n + 1, N, *shape]: where the student is, and how far from the teacher.
    state = torch.stack([x] * (n + 1))
    apart = torch.full((n + 1, len(x)), torch.inf, dtype=x.dtype, device=x.device)
    apart[0] = 0.0
    parent = torch.zeros(n + 1, len(x), dtype=torch.int64, device=x.device)
    came_from = []
    for k in range(K):
        reached, parent = state.clone(), parent.clone()
        for i in range(n if k else 1):  # the first step starts at the start
            steps = (times[i + 1 :] - times[i]).reshape(shape)
            landed = state[i] + steps * flow.velocity(state[i], candidates[i])
            found = (landed - wanted[i + 1 :]).flatten(2).square().mean(2)
            nearer = found < apart[i + 1 :]
            apart[i + 1 :] = torch.where(nearer, found, apart[i + 1 :])
            parent[i + 1 :] = torch.where(nearer, i, parent[i + 1 :])
            here = nearer.reshape(*nearer.shape, *[1] * (x.ndim - 1))
            reached[i + 1 :] = torch.where(here, landed, reached[i + 1 :])
        state = reached
        came_from.append(parent)
    way = [torch.full((len(x),), n, dtype=torch.int64, device=x.device)]
    for parent in reversed(came_from):
        way.append(parent.gather(0, way[-1][None])[0])
    return torch.stack(way[::-1], 1).cpu()


def student_steps(
    flow: ProbabilityFlow,
    x_T: Tensor,
    K: int,
    *,
    candidates: Schedule | None = None,
    points: int = 64,
    batch: int | None = None,
) -> Schedule:
    """The K steps that are the median of the ways of some noises.

    Args:
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape].
        K: Number of steps, at most ``points``.
        candidates: The schedule of the teacher, whose steps are the candidates; by
            default EDM's, unpinned. Published are even steps of a model's own time.
        points: Steps of the teacher; 200 as published.
        batch: Noises computed together, which bounds the memory; by default all.

    Returns:
        A `Schedule` whose ``grid(K)`` is the list. The median of an even number of
        candidates is the lower of the two in the middle; where two medians are the
        same candidate, the longest gap is halved instead.

    Raises:
        ValueError: If there are fewer candidates than steps, or ``x_T`` or the denoiser
            holds NaN or the wrong shape.
    """
    check_flow(flow)
    x_T, points = check_samples(x_T), positive_int(points, "points", minimum=2)
    batch = None if batch is None else positive_int(batch, "batch")
    schedule = edm(flow.process, pinned=False) if candidates is None else candidates
    check_process(schedule, flow.process)
    times, counter = schedule.grid(points), CountNFE(flow.denoiser)
    ways = []
    parts = in_batches(flow.with_denoiser(counter), [x_T], batch, counter=counter)
    for part, (x,) in parts:
        ways.append(student_ways(part, x, times, K))
    found = _without_ties(torch.cat(ways).median(0).values.tolist())
    notes: dict[str, Any] = {"method": "student states", "points": points}
    notes |= {"noises": len(x_T), "nfe": counter.nfe}
    return from_grid(flow.process, times[found], name="OSS", provenance=notes)


def _without_ties(way: list[int]) -> list[int]:
    """Candidates in order without repetition, as many as before."""
    found = sorted(set(way))
    while len(found) < len(way):
        gaps = [b - a for a, b in pairwise(found)]
        k = gaps.index(max(gaps))
        found.insert(k + 1, found[k] + gaps[k] // 2)
    return found
