r"""The second control: the noise level that the network is told.

One Euler step of VE from t to t' = rho t with a denoiser that is told the level s,

.. math:: x' = \rho x + (1 - \rho) D(x, s) ,

leaves :math:`-(h^2/2t) D'` where it is honest, s = t, h = t - t' (D' is the derivative
along the path). Telling :math:`s = t - c h` adds :math:`-(h/t) c h\, \partial_t D`. On
Gaussian data :math:`\partial_t D = 2 D'` in every direction, so that c = 1/4 makes the
step of second order; on others c takes away the part of the error that lies along
:math:`\partial_t D`. It costs no evaluation and no training.

At the large steps of a few evaluations two numbers do (measured, see chapter 16):

* Euler: :math:`s = t \sqrt{1 - 2 c (1 - \rho)}` at every step, the last with a number
  of its own, :math:`s = t \sqrt{1 - 2 c_{last}}`;
* multistep solvers: :math:`s = t \exp(-\min(0.35, \kappa \eta^2))`,
  :math:`\eta = \log(t/t')`, at the steps between (a fixed c would cost them their
  order), the first one honest, the last as above.

All of this is ours; that a network may be told other times than it is run at was seen
before, by learning both (LD3, https://arxiv.org/abs/2405.15506).
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from tqdm import tqdm

from .._common.checks import check_samples, positive_int
from .._common.precision import full_precision
from ..flow.flow import ProbabilityFlow, check_flow
from ..flow.processes import Process
from ..schedules.plan import Plan
from ..schedules.schedule import Schedule
from ..solvers.solver import Solver, SolverLike, solver_of
from .matched import (
    Noise,
    Size,
    check_reference,
    check_share,
    halves,
    matched_noise,
)
from .stiffness import check_process

INNER = {
    "one step": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35),
    "multistep": (0.0, -0.1, -0.05, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25),
}
"""Numbers of the inner steps that are tried: c of Euler, kappa of multistep solvers."""

LAST = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Numbers of the last step that are tried."""

_MOST = 0.35  # of kappa eta^2


def told_levels(
    process: Process, nodes: Tensor, solver: SolverLike, inner: float, last: float
) -> Tensor:
    r"""The levels of the two-number rule; see the module.

    Args:
        process: The process; the rule holds in its :math:`\sigma/\alpha`.
        nodes: Process times [K + 1] that end at 0.
        solver: One that can be told.
        inner: c for Euler, kappa for a multistep solver.
        last: c of the last step, below 1/2.

    Returns:
        Process times [K], float64.
    """
    start = nodes[:-1]
    t = process.sigma(start) / process.alpha(start)
    factor = torch.ones_like(t)
    rho = t[1:] / t[:-1]
    if solver_of(solver).history:
        exponent = (inner * rho[1:].log().square()).clamp(-_MOST, _MOST)
        factor[1:-1] = torch.exp(-exponent)
    else:
        factor[:-1] = torch.sqrt(1 - 2 * inner * (1 - rho))
    factor[-1] = math.sqrt(1 - 2 * last)
    signal = torch.isfinite(t)  # where there is none, no level is higher or lower
    levels = process.inverse_noise_level(torch.where(signal, t * factor, 1.0))
    levels = torch.minimum(levels, nodes[0])
    return torch.where(signal & (factor != 1), levels, start)


@full_precision()
def tell(
    schedule: Schedule,
    flow: ProbabilityFlow,
    x_T: Tensor,
    K: int,
    *,
    solver: SolverLike = "euler",
    reference: Tensor | None = None,
    held_out_share: float = 0.5,
    batch: int | None = None,
    progress: bool = False,
) -> Plan:
    r"""Levels to tell the network at the nodes of a schedule, without a gradient.

    Two numbers (see the module) are calibrated on one part of the noise, by the mean of
    the errors' norms; what is found is kept only if on the other part, **held out**, it
    is better in rms *and* in the mean of the norms *and* no worse in the median.
    Otherwise the plan is honest. At most 40 runs of K steps, and the reference.

    Args:
        schedule: Gives the nodes.
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape]; 64 are enough, below 16 the numbers are
            noise.
        K: Number of steps.
        solver: ``"euler"`` or a multistep solver.
        reference: Accurate x_0 of the same ``x_T`` [N, *shape]; by default integrated
            here, by RK4 on 96 times.
        held_out_share: Share of ``x_T`` that is held out, within (0, 1).
        batch: Samples computed together; by default all.
        progress: Whether to show a progress bar (on stderr).

    Returns:
        A `Plan`; its provenance has the two numbers and the errors on the held-out
        noise, per coordinate, honest and told.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its range, ``schedule`` belongs to another process,
            its own grid gives NaN, or the solver cannot be told levels.

    Warns:
        UserWarning: If the reference is too coarse to judge by, or the levels found
            give NaN.
    """
    check_flow(flow)
    check_process(schedule, flow.process)
    kind = solver_of(solver)
    if not kind.tellable:
        raise ValueError(
            f"solver: {kind.name} makes several evaluations a step, which are told "
            "their own levels; use euler or a multistep solver"
        )
    nodes = schedule.grid(positive_int(K, "K"))
    batch = None if batch is None else positive_int(batch, "batch")
    check_share(held_out_share, len(check_samples(x_T)))
    noise = matched_noise(flow, x_T, reference, batch)
    learn, judge = halves(noise, held_out_share)
    honest = judge.size(nodes, kind)
    if not math.isfinite(honest.mean):
        raise ValueError(
            f"schedule: its own grid of {K} steps gives NaN or infinity with "
            f"{kind.name}; check the denoiser, or take another schedule"
        )
    bar = tqdm(desc="tell", unit="run", disable=not progress)
    with bar:
        inner, last = _calibrated(flow.process, nodes, kind, learn, bar)
    told = told_levels(flow.process, nodes, kind, inner, last)
    after = judge.size(nodes, kind, told)
    if math.isfinite(after.mean):
        check_reference(judge, after.mean)
    else:
        warnings.warn(
            "tell: a run with the levels found gave NaN or infinity, though the honest "
            "one did not, and the honest plan is returned; check the denoiser at "
            "levels between the nodes",
            stacklevel=2,
        )
    accepted = after.no_worse_than(honest) and after.mean < honest.mean
    if not accepted:
        told, inner, last, after = nodes[:-1], 0.0, 0.0, honest
    name = f"{schedule.name}, {kind.name}" + (", told" if accepted else "")
    return Plan.made(
        flow.process,
        nodes,
        told,
        solver,
        name=name,
        method="tell",
        provenance={
            "schedule": schedule.provenance,
            "inner": inner,
            "last": last,
            "noises": [len(learn.x), len(judge.x)],
            "honest": {"rms": honest.rms, "median": honest.median},
            "told": {"rms": after.rms, "median": after.median},
            "nfe": noise.counter.nfe,
        },
    )


def _calibrated(
    process: Process, nodes: Tensor, kind: Solver, noise: Noise, bar: tqdm[None]
) -> tuple[float, float]:
    """The two numbers with the least mean error: one, the other, and again."""
    seen: dict[tuple[float, float], Size] = {}

    def value(pair: tuple[float, float]) -> float:
        if pair not in seen:
            told = told_levels(process, nodes, kind, *pair)
            seen[pair] = noise.size(nodes, kind, told)
            bar.update()
        return seen[pair].mean

    best = (0.0, 0.0)
    numbers = INNER["multistep" if kind.history else "one step"]
    for _ in range(2):
        before = best
        best = min([best, *((best[0], last) for last in LAST)], key=value)
        best = min([best, *((inner, best[1]) for inner in numbers)], key=value)
        if best == before:
            break
    return best


def calibrated_levels(noise: Noise, nodes: Tensor, solver: Solver) -> Tensor:
    """The levels [K] of the two-number rule that err least on some noise.

    Args:
        noise: The noise.
        nodes: Process times [K + 1] that end at 0.
        solver: One that can be told.
    """
    process = noise.flow.process
    with tqdm(disable=True) as bar:
        inner, last = _calibrated(process, nodes, solver, noise, bar)
    return told_levels(process, nodes, solver, inner, last)
