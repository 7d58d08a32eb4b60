"""Playing episodes: K steps of the stochastic policy on a batch of trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .environment import Place, TableEnvironment
from .policy import Constraint, Head, mean_share, share_slope

_LEAST_LEFT = 1e-3
"""Share of the remaining time that a step other than the last leaves, at least."""


@dataclass(frozen=True)
class Episodes:
    """What was played; first axis K steps (or K + 1 places), second axis n paths.

    Attributes:
        rho: Positions [K + 1, n].
        time: Process times [K + 1, n].
        features: State features [K, n, m].
        score: Derivative of log pi in the actor's output [drawn, n]; with the hard
            constraint the last step is forced, not drawn.
        exact: Exact step costs [K, n], natural units.
        charged: The step costs that are learned from [K, n].
        last: The places at the end.
    """

    rho: Tensor
    time: Tensor
    features: Tensor
    score: Tensor
    exact: Tensor
    charged: Tensor
    last: Place


@torch.no_grad()
def play(
    environment: TableEnvironment,
    actor: Callable[[Tensor, Tensor, Tensor], Tensor] | Head,
    rows: Tensor,
    *,
    steps: int,
    temperature: float,
    constraint: Constraint,
    step_cost: Literal["exact", "left"],
    noise: Tensor | None,
) -> Episodes:
    r"""Walk trajectories with the policy :math:`N(\mu_\phi, \lambda/|Q|)`, eq. (11).

    Over many short steps the draws average out and the mean moves the state, eq. (12).

    Args:
        environment: Look-ups or model.
        actor: Output a(rho, tau, features).
        rows: Which trajectories [n].
        steps: K.
        temperature: lambda in natural units.
        constraint: ``"hard"`` or ``"multiplier"``.
        step_cost: Which cost is charged.
        noise: Standard (cut) normal draws [K, n], or None for the mean policy.

    Returns:
        The `Episodes`.
    """
    env = environment
    per_step = env.span / steps
    spread = math.sqrt(temperature) * env.length / env.span
    charge = env.exact_cost if step_cost == "exact" else env.left_cost
    here = env.start(rows)
    places, scores, exact, charged = [here], [], [], []
    for k in range(steps):
        if constraint == "hard" and k == steps - 1:
            t = torch.full_like(here.t, env.process.t_min)
        else:
            h = torch.as_tensor(1 / (steps - k), dtype=torch.float64)
            if constraint == "multiplier":
                h = torch.as_tensor(1 / steps, dtype=torch.float64)
            output = actor(
                here.rho, torch.full_like(here.rho, k / steps), here.features
            )
            target = here.rho - mean_share(output, here.rho, h, constraint)
            planned = env.time(target)
            t = planned
            if noise is not None:
                log_q = torch.maximum(
                    here.log_floored, env.log_floored_at(rows, target)
                )
                sd = spread * torch.exp(-0.5 * log_q)
                slope = share_slope(output, here.rho, h, constraint)
                mean_slope = slope * env.time_per_position(planned) / per_step
                scores.append(noise[k] / sd * mean_slope)
                t = planned - noise[k] * sd * per_step
                t_min = env.process.t_min
                t = torch.maximum(t, t_min + _LEAST_LEFT * (here.t - t_min))
                t = torch.minimum(t, here.t)
        there = env.advance(here, rows, t)
        exact.append(env.exact_cost(here, there, steps))
        charged.append(charge(here, there, steps))
        places.append(there)
        here = there
    return Episodes(
        rho=torch.stack([p.rho for p in places]),
        time=torch.stack([p.t for p in places]),
        features=torch.stack([p.features for p in places[:-1]]),
        score=torch.stack(scores) if scores else torch.zeros(0, len(rows)),
        exact=torch.stack(exact),
        charged=torch.stack(charged),
        last=here,
    )
