r"""Stochastic samplers on any grid, and their exact covariance on Gaussian data.

Both mix the flow with fresh noise, in the coordinates :math:`y = x/\alpha` and
:math:`s = \sigma/\alpha` in which the process is `VE`:

* **churn** (EDM): from s, noise of variance :math:`\hat s^2 - s^2` raises the level to
  :math:`\hat s = (1 + \gamma) s`, then one Euler or Heun step goes from there down to
  the next node. :math:`\gamma = \min(S_{churn}/K, \sqrt 2 - 1)` for levels within
  [s_min, s_max], and no level above that of t_max is ever visited (ours: a network may
  not know it).
* **ancestral**: an Euler step goes below the next node s', to
  :math:`s_{down}^2 = s'^2 - s_{up}^2` with
  :math:`s_{up} = \min\bigl(s', \eta\, s' \sqrt{1 - s'^2/s^2}\bigr)`, and noise of
  standard deviation :math:`s_{up}` lifts the sample back.

For :math:`x_0 \sim N(0, \lambda)` each step multiplies y by a number m and adds
independent noise, so the variance obeys :math:`v' = m^2 (v + n_{before}) + n_{after}`,
exactly. `artlib.control`'s theory is of the deterministic flow: with noise, an error
made early is partly forgotten, and what is charged per step is no longer paid at the
end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .._common.adaptive import not_finite
from .._common.checks import (
    as_grid,
    as_variances,
    check_samples,
    finite_float,
    generator,
    positive_int,
    real_number,
    require_finite,
)
from .._common.precision import at_least_single, holds_double
from .._common.types import SeedLike
from ..flow.flow import ProbabilityFlow, check_flow
from ..flow.processes import VE, Process, check_process
from ..flow.rows import in_batches
from .integrate import integrate

__all__ = ["gaussian_stochastic_std", "sample_stochastic"]

Method = Literal["churn", "ancestral"]


@dataclass(frozen=True)
class _Plan:
    """Noise levels of every step, float64 [K] each.

    Attributes:
        level: Where the step starts.
        raised: Where the solver starts.
        lowered: Where the solver ends.
        next: Where the step ends, after its noise.
    """

    level: Tensor
    raised: Tensor
    lowered: Tensor
    next: Tensor
    scale: float
    solver: str


def sample_stochastic(
    flow: ProbabilityFlow,
    x_T: Tensor,
    grid: Sequence[float] | np.ndarray | Tensor,
    *,
    method: Method = "ancestral",
    solver: Literal["euler", "heun"] | None = None,
    eta: float = 1.0,
    churn: float = 40.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    seed: SeedLike | None = None,
    batch: int | None = None,
) -> Tensor:
    r"""Sample with fresh noise on the way.

    Args:
        flow: The flow.
        x_T: States at the first node [N, *shape].
        grid: K + 1 strictly descending process times, the last 0 or above.
        method: ``"churn"`` or ``"ancestral"``, see the module.
        solver: Of churn: ``"heun"`` (default) or ``"euler"``; ancestral is Euler's.
        eta: Of ancestral: share of the noise, within [0, 1]; 0 is plain Euler.
        churn: :math:`S_{churn}` >= 0; 0 is the plain solver.
        s_min: Least noise level at which churn acts.
        s_max: Largest such level.
        s_noise: Factor on the standard deviation of all fresh noise, > 0.
        seed: A seed or a generator of the fresh noise, which repeats it; by default
            every call draws other noise, from the operating system's randomness.
        batch: Samples computed together, which bounds the memory; by default all. The
            noise of a sample does not depend on it. Conditions go with their samples
            (`ProbabilityFlow.rows`).

    Returns:
        States at the last node [N, *shape], in the dtype of ``x_T``; half precision is
        raised to float32, as by `artlib.sample`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its range, the noise level is infinite at the first
            node, or the state became NaN or infinite.

    References:
        Karras et al., https://arxiv.org/abs/2206.00364, algorithm 2 (churn); the
        ancestral step is DDPM's, https://arxiv.org/abs/2006.11239, in these units.
    """
    check_flow(flow)
    x = check_samples(x_T).detach()
    x = x.to(at_least_single(x.dtype))
    process = flow.process
    nodes = as_grid(grid)
    batch = None if batch is None else positive_int(batch, "batch")
    plan = _plan(process, nodes, method, solver, eta, (churn, s_min, s_max), s_noise)
    if seed is None:
        rng = torch.Generator(x.device)
        rng.seed()
    else:
        rng = generator(seed, x.device)
    drawn_in = torch.float64 if holds_double(rng.device) else torch.float32
    plain = flow if isinstance(process, VE) else flow.to_ve()
    y = x / process.alpha(nodes[0]).to(x.dtype)

    def add(y: Tensor, low: Tensor, high: Tensor) -> Tensor:
        if not bool(high > low):
            return y
        noise = torch.randn(y.shape, generator=rng, dtype=drawn_in, device=rng.device)
        # To the dtype before the device, which may have no float64.
        noise = noise.to(y.dtype).to(y.device)
        return y + plan.scale * (high**2 - low**2).sqrt().to(y.dtype) * noise

    with torch.no_grad(), flow.watched(x, nodes[0]):
        for k in range(len(plan.level)):
            y = add(y, plan.level[k], plan.raised[k])
            pair = torch.stack([plan.raised[k], plan.lowered[k]])
            try:
                parts = in_batches(plain, [y], batch)
                ends = [integrate(part, z, pair, plan.solver) for part, (z,) in parts]
            except ValueError as error:
                if "became NaN or infinite" in str(error):
                    where = f"at step {k + 1} of {len(plan.level)}, from t = "
                    raise not_finite(f"{where}{float(nodes[k]):.6g}") from error
                raise
            y = add(torch.cat(ends), plan.lowered[k], plan.next[k])
    require_finite(y, "sample_stochastic", "check the denoiser, or lower churn")
    return y * process.alpha(nodes[-1]).to(y.dtype)


def gaussian_stochastic_std(
    process: Process,
    variances: Tensor | Sequence[float],
    grid: Sequence[float] | np.ndarray | Tensor,
    *,
    method: Method = "ancestral",
    solver: Literal["euler", "heun"] | None = None,
    eta: float = 1.0,
    churn: float = 40.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    r"""Exact standard deviations of `sample_stochastic` on :math:`N(0, C)`.

    Started from the exact prior at the first node; the output is Gaussian with the
    eigenvectors of C, so :math:`W_2^2 = \sum_j (std_j - \sqrt{\lambda_j})^2`.

    Args:
        process: The noising process.
        variances: Eigenvalues of C [d], >= 0.
        grid: K + 1 strictly descending process times, the last 0 or above.
        method: ``"churn"`` or ``"ancestral"``, see the module.
        solver: Of churn: ``"heun"`` (default) or ``"euler"``; ancestral is Euler's.
        eta: Of ancestral: share of the noise, within [0, 1]; 0 is plain Euler.
        churn: :math:`S_{churn}` >= 0; 0 is the plain solver.
        s_min: Least noise level at which churn acts.
        s_max: Largest such level.
        s_noise: Factor on the standard deviation of all fresh noise, > 0.

    Returns:
        float64 [d], at the last node.

    Raises:
        ValueError: If an argument is out of its range.
    """
    check_process(process)
    lam = as_variances(variances)
    nodes = as_grid(grid)
    plan = _plan(process, nodes, method, solver, eta, (churn, s_min, s_max), s_noise)
    top = float(plan.raised.max())
    ve = VE(sigma_min=min(1e-3 * top, process.t_min), sigma_max=top)
    flow = ProbabilityFlow(ve, lambda y, s: lam / (lam + s.double() ** 2) * y)
    variance = lam + plan.level[0] ** 2
    one = torch.ones(1, len(lam), dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for k in range(len(plan.level)):
            low, high = plan.level[k], plan.raised[k]
            variance = variance + plan.scale**2 * (high**2 - low**2)
            pair = torch.stack([high, plan.lowered[k]])
            variance = integrate(flow, one, pair, plan.solver)[0] ** 2 * variance
            added = plan.next[k] ** 2 - plan.lowered[k] ** 2
            variance = variance + plan.scale**2 * added
    return variance.sqrt() * process.alpha(nodes[-1])


def _plan(
    process: Process,
    nodes: Tensor,
    method: Method,
    solver: str | None,
    eta: float,
    churning: tuple[float, float, float],
    s_noise: float,
) -> _Plan:
    """The noise levels that a method visits, its options checked."""
    if not isinstance(method, str) or method not in get_args(Method):
        raise ValueError(f"method: expected one of {get_args(Method)}, got {method!r}")
    allowed = ("euler", "heun") if method == "churn" else ("euler",)
    solver = allowed[-1] if solver is None else solver
    if not isinstance(solver, str) or solver not in allowed:
        raise ValueError(f"solver: {method} goes with one of {allowed}, got {solver!r}")
    scale = finite_float(s_noise, "s_noise", positive=True)
    eta = finite_float(eta, "eta")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a number within [0, 1], got {eta}")
    amount = finite_float(churning[0], "churn")
    if amount < 0:
        raise ValueError(f"churn: expected a number >= 0, got {amount}")
    s_min, s_max = finite_float(churning[1], "s_min"), real_number(churning[2], "s_max")
    if not 0 <= s_min <= s_max:
        raise ValueError(f"s_min: expected 0 <= s_min <= s_max, got {s_min}, {s_max}")
    if float(nodes[0]) > process.t_max * (1 + 1e-6):
        raise ValueError(
            f"grid: the first node is {float(nodes[0]):.6g}, expected at most t_max = "
            f"{process.t_max:.6g}"
        )
    levels = process.noise_level(nodes)
    if not bool(torch.isfinite(levels).all()):
        raise ValueError(
            "grid: the noise level is infinite at its first node, and noise cannot be "
            "added there; use RectifiedFlow(t_max=0.999)"
        )
    level, after = levels[:-1], levels[1:]
    if method == "ancestral":
        up = torch.minimum(after, eta * after * (1 - (after / level) ** 2).sqrt())
        lowered = (after**2 - up**2).clamp_min(0).sqrt()
        return _Plan(level, level, lowered, after, scale, solver)
    gamma = min(amount / len(level), math.sqrt(2) - 1)
    acts = (level >= s_min) & (level <= s_max)
    top = process.noise_level(process.t_max)
    raised = torch.where(acts, torch.minimum((1 + gamma) * level, top), level)
    return _Plan(level, torch.maximum(raised, level), after, after, scale, solver)
