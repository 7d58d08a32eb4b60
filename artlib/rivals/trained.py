r"""Nodes and told levels trained through the solver, from noise that may move.

After Tong et al. ("Learning to Discretize Denoising Diffusion ODEs", LD3). With
:math:`\lambda = \log(\alpha/\sigma)` (or with the time itself) the nodes are

.. math:: \lambda_k = \lambda_0 + (\lambda_K - \lambda_0)
          \sum_{i \le k} \operatorname{softmax}(a)_i , \qquad a \in R^K ,

from even steps on, a = 0, and at the inner nodes the network is told another level,

.. math:: \lambda_k + \operatorname{clip}(b_k, -w\,\delta, w\,\delta), \qquad
          \delta = \min_i (\lambda_{i+1} - \lambda_i), \quad w = 1/2, \quad b = 0.

Both are moved by the gradient of the mean squared distance to a teacher's samples, and
so is each noise that is trained on, within a ball around where it was drawn: that the
student has the teacher's sample within reach is asked for, not that it has it exactly.
Rounds go through the noise in batches; a moves by RMSprop, from the third round on b by
plain gradient descent, each with its norm clipped to 1. After each batch the noise that
is held out judges; five batches without a gain bring the best numbers so far back and
lower both rates by a fifth.

A **reconstruction** of ours, with the published numbers (rates, radius, rounds, sizes).
Ours are: the last node is 0 and not t_min; the network is told a level as a whole
(`artlib.sample`), which for data prediction is theirs; the noise that judges does not
move, so that what is returned is no worse there than the start; errors are mean
squares, not LPIPS. In the published code for :math:`\lambda` the bound
:math:`\delta` is the least difference of the numbers a, which are equal at first, so
that b hardly moves; here it is that of the nodes, as in their code for the time. Beside
that code, which is in float32: nodes and levels of drawn numbers agree to 2e-8 in the
time, nodes to 8e-8 in :math:`\lambda`; after seven rounds of one batch (Euler, VE down
to 1e-6, b and noise at rest) the nodes agree to 8e-7 in :math:`\lambda`, the loss to 6
digits.

References:
    Tong et al., https://arxiv.org/abs/2405.15506.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .._common.checks import check_samples, finite_float, generator, positive_int
from .._common.precision import full_precision
from .._common.types import SeedLike
from ..control.matched import Noise, check_share, halves, matched_noise
from ..flow.flow import ProbabilityFlow, check_flow
from ..flow.processes import Process
from ..schedules.plan import Plan
from ..solvers.solver import SolverLike, solver_of

__all__ = ["decoupled_times", "trained_plan"]

Coordinate = Literal["log-snr", "time"]

RATES = (0.005, 0.1)
"""Of RMSprop on a, and of gradient descent on b, the latter over K."""

WINDOW = 0.5
"""w, the share of the least gap by which a told level may leave its node."""

PATIENCE = 5
"""Batches without a gain until the best numbers come back."""

_DECAY, _LEAST_RATES = 0.8, (5e-5, 1e-6)
_LATE = 5  # times that the least rate of b is met until training ends


def decoupled_times(
    process: Process, a: Tensor, b: Tensor, *, coordinate: Coordinate = "log-snr"
) -> tuple[Tensor, Tensor]:
    """Nodes and told levels of the module for its numbers; differentiable in both.

    Args:
        process: The noising process.
        a: Logits of the gaps [K], float64.
        b: Distances of the told levels from the nodes [K]; the first has no effect.
        coordinate: ``"log-snr"``, as published for pixels, or ``"time"``, for latents.

    Returns:
        Nodes [K + 1] from t_max to 0, and levels [K], process times.
    """
    ends = torch.tensor([process.t_max, process.t_min], dtype=a.dtype, device="cpu")
    if coordinate == "log-snr":
        if float(process.alpha(ends[0])) == 0:
            ends[0] = process.t_max - process.t_min
        ends = process.log_snr(ends) / 2
    whole = ends[0] + (ends[1] - ends[0]) * torch.softmax(a, 0).cumsum(0)
    inner = whole[:-1]
    gaps = torch.cat([ends[:1], whole]).diff()
    most = WINDOW * float(gaps.detach().abs().min())
    told = inner + b[1:].clamp(-most, most)
    if coordinate == "log-snr":
        inner, told = (process.inverse_log_snr(2 * v) for v in (inner, told))
    first = a.new_tensor([process.t_max])
    return torch.cat([first, inner, a.new_zeros(1)]), torch.cat([first, told])


@full_precision()
def trained_plan(
    flow: ProbabilityFlow,
    x_T: Tensor,
    K: int,
    *,
    solver: SolverLike = "unipc3",
    coordinate: Coordinate = "log-snr",
    rounds: tuple[int, int] = (2, 5),
    batch: int = 2,
    radius: float | None = None,
    reference: Tensor | None = None,
    held_out_share: float = 0.5,
    seed: SeedLike = 0,
) -> Plan:
    r"""The plan that LD3's training finds.

    Args:
        flow: The flow; its denoiser passes gradients on.
        x_T: States at ``t_max`` [N, *shape]; 100 as published.
        K: Number of steps, >= 2.
        solver: One that can be told levels; UniPC-3 as published for pixels.
        coordinate: See `decoupled_times`.
        rounds: Through the noise, with b at rest and with both.
        batch: Noises of a gradient.
        radius: Of the ball of each noise, in units of the standard deviation of a
            coordinate of x at t_max, as a norm over all coordinates; by default the
            published :math:`d / (1000 K^2)` with d coordinates. 0 keeps noise at rest.
        reference: Accurate x_0 of the same ``x_T``; by default integrated here.
        held_out_share: Share of ``x_T`` that judges.
        seed: Of the order of the noises.

    Returns:
        A `Plan`; its provenance has the errors on the noise that judges, before and
        after, and the evaluations spent (those of a batch).

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its range, or the solver cannot be told levels.
        RuntimeError: If the denoiser passes no gradient on.
    """
    check_flow(flow)
    if positive_int(K, "K") < 2:
        raise ValueError(f"K: expected at least 2, got {K}; one step has no inner node")
    kind = solver_of(solver)
    if not kind.tellable:
        raise ValueError(
            f"solver: {kind.name} makes several evaluations a step, which are told "
            "their own levels; use euler or a multistep solver"
        )
    if coordinate not in ("log-snr", "time"):
        raise ValueError(
            f"coordinate: expected 'log-snr' or 'time', got {coordinate!r}"
        )
    apart, both = (positive_int(r, "rounds", minimum=0) for r in rounds)
    batch, rng = positive_int(batch, "batch"), generator(seed)
    check_share(held_out_share, len(check_samples(x_T)))
    if radius is None:
        radius = 0.001 * x_T[0].numel() / K**2
    elif finite_float(radius, "radius") < 0:
        raise ValueError(f"radius: expected a number >= 0, got {radius}")
    noise = matched_noise(flow, x_T, reference, None)
    learn, judge = halves(noise, held_out_share)
    _check_gradient(learn)
    training = _Training(learn, judge, solver, K, coordinate)
    order = [
        torch.randperm(len(learn.x), generator=rng, device=rng.device)
        for _ in range(apart + both)
    ]
    for k, rows in enumerate(order):
        if not training.round(rows.split(batch), radius, levels=k >= apart):
            break
    nodes, told = training.times(*training.best)
    return Plan.made(
        flow.process,
        nodes,
        told,
        solver,
        name=f"LD3, {kind.name}",
        method="trained nodes and levels",
        provenance={
            "rounds": [apart, both],
            "radius": radius,
            "noises": [len(learn.x), len(judge.x)],
            "error_before": math.sqrt(training.first),
            "error_after": math.sqrt(training.least),
            "batches": training.batches,
            "nfe": noise.counter.nfe,
        },
    )


def _check_gradient(noise: Noise) -> None:
    """Refuse a denoiser without a gradient; its zeros would look like one."""
    one = noise.rows(slice(1))
    with torch.enable_grad():
        x = one.x.clone().requires_grad_()
        found = one.flow.denoise(x, one.flow.process.t_max)
    if not found.requires_grad:
        raise RuntimeError(
            "denoiser: it passes no gradient on (does it run under torch.no_grad?), "
            "and training needs one; artlib.refine takes differences there"
        )


class _Training:
    """The numbers a and b, and the best of them on the noise that judges."""

    def __init__(
        self,
        learn: Noise,
        judge: Noise,
        solver: SolverLike,
        K: int,
        coordinate: Coordinate,
    ) -> None:
        self.learn, self.judge, self.solver = learn, judge, solver
        self.coordinate, self.steps = coordinate, K
        self.a, self.b = (
            torch.zeros(K, dtype=torch.float64, device="cpu", requires_grad=True)
            for _ in range(2)
        )
        self.rates = list(RATES)
        self.rates[1] /= K
        self.by_a = torch.optim.RMSprop([self.a], lr=self.rates[0], momentum=0.9)
        self.by_b = torch.optim.SGD([self.b], lr=self.rates[1])
        process = learn.flow.process
        self.scale = float(process.sigma(process.t_max))
        self.drawn = learn.x / self.scale
        self.moved = self.drawn.clone()
        self.batches = self.waited = self.met = 0
        self.best = self.a.detach().clone(), self.b.detach().clone()
        self.first = self.least = self.judged()

    def times(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        process = self.learn.flow.process
        return decoupled_times(process, a, b, coordinate=self.coordinate)

    def squares(self, noise: Noise, x: Tensor) -> Tensor:
        """Mean squared errors [n] from states x, of which a graph is kept."""
        times = self.times(self.a, self.b)
        return replace(noise, x=x).squares(times[0], self.solver, times[1])

    def judged(self) -> float:
        """The mean on the noise that judges."""
        with torch.no_grad():
            found = float(self.squares(self.judge, self.judge.x).mean())
        return found if math.isfinite(found) else math.inf

    def round(
        self, batches: tuple[Tensor, ...], radius: float, *, levels: bool
    ) -> bool:
        """Once through the noise; whether training goes on."""
        self.restore()
        for rows in batches:
            self.batch(rows.to(self.drawn.device), radius, levels=levels)
            found = self.judged()
            self.batches += 1
            self.waited += 1
            if found < self.least:
                self.least, self.waited = found, 0
                self.best = self.a.detach().clone(), self.b.detach().clone()
            if self.waited >= PATIENCE:
                self.restore()
                self.slower(levels=levels)
            if self.met >= _LATE:
                return False
        return True

    def restore(self) -> None:
        """The best numbers so far."""
        self.waited = 0
        with torch.no_grad():
            for number, best in zip((self.a, self.b), self.best, strict=True):
                number.copy_(best)

    def slower(self, *, levels: bool) -> None:
        """Lower the rates of what is trained."""
        steps = (self.by_a, self.by_b) if levels else (self.by_a,)
        for i, step in enumerate(steps):
            self.rates[i] = max(_DECAY * self.rates[i], _LEAST_RATES[i])
            step.param_groups[0]["lr"] = self.rates[i]
        self.met += int(levels and self.rates[1] <= _LEAST_RATES[1])

    def batch(self, rows: Tensor, radius: float, *, levels: bool) -> None:
        """A step of the numbers, and then of the noise of a batch."""
        flow = self.learn.flow.rows(rows, len(self.learn.x))
        noise = replace(self.learn, flow=flow, ends=self.learn.ends[rows])
        at = self.moved[rows].requires_grad_()
        with torch.enable_grad():
            before = self.squares(noise, at * self.scale)
            if not bool(torch.isfinite(before).all()):
                return  # judged as no gain
            wanted = [self.a, self.b, at]
            slopes = torch.autograd.grad(before.mean(), wanted, allow_unused=True)
        for number, slope, step in zip(
            (self.a, self.b), slopes[:2], (self.by_a, self.by_b), strict=True
        ):
            if slope is not None and (levels or number is self.a):
                number.grad = slope.clone()
                torch.nn.utils.clip_grad_norm_(number, 1.0)
                step.step()
        if not radius or slopes[2] is None:
            return
        with torch.no_grad():
            # The published rate of the noise.
            away = at - 12 / self.steps * slopes[2] - self.drawn[rows]
            norm = away.flatten(1).norm(dim=1).clamp_min(1e-300)
            share = (radius / norm).clamp_max(1).reshape(-1, *[1] * (at.ndim - 1))
            moved = self.drawn[rows] + share * away
            nearer = self.squares(noise, moved * self.scale) < before.detach()
            here = nearer.reshape(share.shape)
            self.moved[rows] = torch.where(here, moved, self.moved[rows])
