r"""Few steps: nodes and told levels moved to where the sampler's own error is least.

A density is optimal as K grows. At a handful of steps the error is that of the K steps
themselves, and K - 1 inner nodes are few enough to be moved one by one, and with them
the K levels that the network is told (`artlib.tell`): from the same noise, against a
fine reference,

.. math:: \min\; E\,e \cdot \sqrt{E\,e^2}, \qquad
          e = \lVert x_0(t_1, \dots, t_{K-1}; s_0, \dots, s_{K-1}) - x_0^{ref} \rVert ,

by BFGS on the logarithm of the error, with the gradient through the solver. The nodes
split the range of log time into K gaps, each a least gap plus a softmax share of the
rest, so they keep their order and their distance, and stay above t_min. The levels told
stay within a factor of two of the nodes'. A network that passes no gradient, or a wrong
one (part of it runs under ``torch.no_grad``), is noticed at the start; then differences
take the gradient's place.

**What is minimised.** The mean square alone is :math:`W_2^2` on Gaussian data, where
the limit is `artlib.oracle_grid`; but on images a few noises carry most of it, and with
dozens of them it is their luck that is learned. The mean of the norms alone lets those
few go. Their product weighs both (measured on mixtures: with the mean of the norms the
rms on fresh noise may rise by half while the median falls).

**What is returned.** One part of the noise moves the nodes. Another, **held out**,
decides which grid is returned: one whose rms *and* median there are no worse than the
start's, and whose mean is least (with ``"mean square"``, whose rms is least). If there
is none, the start comes back, with a warning
that says so. All of this is ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .._common.checks import check_samples, got, positive_int
from .._common.precision import full_precision
from ..flow.flow import ProbabilityFlow, check_flow
from ..flow.processes import Process
from ..schedules.constructors import Schedule, from_grid
from ..schedules.plan import Plan
from ..solvers.solver import SolverLike, solver_of
from .matched import (
    Noise,
    Size,
    check_reference,
    check_share,
    halves,
    matched_noise,
)
from .stiffness import check_process
from .told import calibrated_levels

__all__ = ["Objective", "refine"]

Objective = Literal["balanced", "mean norm", "mean square"]

LEAST_GAP = 1e-3
"""Least distance of neighbouring nodes in log time, as far as the range has room."""

PATIENCE = 10
"""Iterations without a gain on the held-out noise after which the search stops."""

_STEP = 1e-3  # of differences, in the parameters: float32 networks resolve it
_HOPELESS = 100.0  # log error of a grid on which the run is not finite
_FACTOR = math.log(2)  # of the levels told to the nodes', at most


@overload
def refine(
    schedule: Schedule | Sequence[Schedule],
    flow: ProbabilityFlow,
    x_T: Tensor,
    K: int,
    *,
    solver: SolverLike = ...,
    told: Literal[False] = ...,
    objective: Objective = ...,
    iterations: int = ...,
    evaluations: int | None = ...,
    reference: Tensor | None = ...,
    held_out_share: float = ...,
    batch: int | None = ...,
    progress: bool = ...,
) -> Schedule: ...


@overload
def refine(
    schedule: Schedule | Sequence[Schedule],
    flow: ProbabilityFlow,
    x_T: Tensor,
    K: int,
    *,
    solver: SolverLike = ...,
    told: Literal[True],
    objective: Objective = ...,
    iterations: int = ...,
    evaluations: int | None = ...,
    reference: Tensor | None = ...,
    held_out_share: float = ...,
    batch: int | None = ...,
    progress: bool = ...,
) -> Plan: ...


@overload
def refine(
    schedule: Schedule | Sequence[Schedule],
    flow: ProbabilityFlow,
    x_T: Tensor,
    K: int,
    *,
    solver: SolverLike = ...,
    told: bool,
    objective: Objective = ...,
    iterations: int = ...,
    evaluations: int | None = ...,
    reference: Tensor | None = ...,
    held_out_share: float = ...,
    batch: int | None = ...,
    progress: bool = ...,
) -> Schedule | Plan: ...


def refine(
    schedule: Schedule | Sequence[Schedule],
    flow: ProbabilityFlow,
    x_T: Tensor,
    K: int,
    *,
    solver: SolverLike = "euler",
    told: bool = False,
    objective: Objective = "balanced",
    iterations: int = 100,
    evaluations: int | None = None,
    reference: Tensor | None = None,
    held_out_share: float = 1 / 3,
    batch: int | None = None,
    progress: bool = False,
) -> Schedule | Plan:
    r"""The K-step grid of a schedule, its nodes moved for one solver on one flow.

    Args:
        schedule: Where to start; `artlib.art` is a good place. Of several, the one
            whose grid errs least is taken.
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape], N >= 2; a few dozen will do.
        K: Number of steps, >= 2 (>= 1 with ``told``); the result is made for this
            number.
        solver: As in `artlib.sample`; differentiable in its states and times.
        told: Whether to move the levels that the network is told, too. Only with a
            solver of one evaluation a step; the result is a `Plan` then.
        objective: ``"mean norm"``, ``"mean square"`` (on Gaussian data, W2 squared), or
            ``"balanced"``, the mean norm times the root mean square.
        iterations: BFGS iterations at most; it usually stops before thirty.
        evaluations: Evaluations of the network, those of one batch, after which no
            further iteration begins (a gradient counts as its forward pass); by
            default no limit.
        reference: Accurate x_0 of the same ``x_T`` [N, *shape]; by default integrated
            here, by RK4 on 96 times.
        held_out_share: Share of ``x_T`` that is held out, within (0, 1). A denoiser's
            conditions go with their samples (`ProbabilityFlow.rows`).
        batch: Samples computed together, which bounds the memory (the gradient holds
            all K steps of them, the reference 96 states of each); by default all. The
            grid is the same to round-off, and so are the counted evaluations.
        progress: Whether to show a progress bar (on stderr).

    Returns:
        A `Schedule` whose ``grid(K)`` is the refined nodes, or with ``told`` a `Plan`.
        Its provenance has the errors on the held-out noise, per coordinate, before and
        after.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its range, ``schedule`` belongs to another process,
            its own grid already gives NaN, or the solver cannot be told levels.

    Warns:
        UserWarning: If nothing better than the start was found, the search ended on a
            run that gave NaN or infinity (the best before it is returned), or the
            reference is too coarse to judge by.
    """
    with full_precision():
        problem, start = _problem(
            schedule,
            flow,
            x_T,
            K,
            solver,
            told,
            objective,
            reference,
            held_out_share,
            batch,
        )
        best = _search(problem, start, iterations, evaluations, progress)
    if not problem.finite:
        kept = "the start" if best.size is best.start else "the best before it"
        warnings.warn(
            f"refine: the search ended on a run that gave NaN or infinity, though the "
            f"start ({start.name}) did not; {kept} is returned. Check the denoiser at "
            "times and levels other than the start's, or pass a smaller evaluations",
            stacklevel=2,
        )
    elif best.size is best.start:
        warnings.warn(
            f"refine: nothing better than the start ({start.name}) was found on the "
            f"{len(problem.judging.x)} held-out noises, so it is returned; pass more "
            f"noise than {len(problem.moving.x) + len(problem.judging.x)} states, "
            "another objective, or another schedule to start from",
            stacklevel=2,
        )
    else:
        check_reference(problem.judging, best.size.mean)
    notes = {
        "solver": solver_of(solver).name,
        "start": start.provenance,
        "objective": problem.objective,
        "error_before": best.start.rms,
        "error_after": best.size.rms,
        "median_before": best.start.median,
        "median_after": best.size.median,
        "nfe": problem.moving.counter.nfe,
        "gradient": problem.gradient,
    }
    process, name = flow.process, f"{start.name} refined"
    if not told:
        notes = {"method": "refined", **notes}
        return from_grid(process, best.nodes, name=name, provenance=notes)
    assert best.told is not None
    name = f"{name}, {solver_of(solver).name}"
    return Plan.made(
        process,
        best.nodes,
        best.told,
        solver,
        name=name,
        method="refine",
        provenance=notes,
    )


def _search(
    problem: _Problem,
    start: Schedule,
    iterations: int,
    evaluations: int | None,
    progress: bool,
) -> _Best:
    """BFGS from a schedule, judged on the held-out noise after each iteration."""
    iterations = positive_int(iterations, "iterations")
    limit = (
        math.inf if evaluations is None else positive_int(evaluations, "evaluations")
    )
    nodes = start.grid(problem.steps)
    levels = nodes[:-1] if problem.told else None
    before = problem.judging.size(nodes, problem.solver)
    if not math.isfinite(before.mean) or not math.isfinite(problem.value(nodes, None)):
        raise ValueError(
            f"schedule: its own grid of {problem.steps} steps gives NaN or infinity "
            f"with {solver_of(problem.solver).name}; check the denoiser, or start from "
            "another schedule"
        )
    best = _Best(nodes, levels, before, before, problem.objective == "mean square")
    free = _free(start, problem, nodes)
    if problem.told:
        levels = calibrated_levels(problem.moving, free, solver_of(problem.solver))
        best.offer(free, levels, problem.judged(free, levels))
    z = problem.parameters(free, levels)
    if not len(z):
        return best
    objective = problem.with_gradient(z)
    bar = tqdm(total=iterations, desc="refine", unit="it", disable=not progress)

    def after_iteration(intermediate_result: Any) -> None:
        moved, told = problem.unpacked(torch.from_numpy(intermediate_result.x))
        size = problem.judged(moved, told)
        best.offer(moved, told, size)
        bar.update()
        spent = problem.moving.counter.nfe >= limit
        if best.waited >= PATIENCE or spent:
            raise StopIteration

    from scipy.optimize import minimize

    options: dict[str, Any] = {"maxiter": iterations, "gtol": 1e-5}
    with bar:
        if problem.moving.counter.nfe < limit:
            minimize(
                objective,
                z.numpy(),
                jac=True,
                method="BFGS",
                callback=after_iteration,
                options=options,
            )
    return best


def _free(schedule: Schedule, problem: _Problem, start: Tensor) -> Tensor:
    """The start, or its unpinned variant where that is better.

    From a node at t_min no gradient leads back: the gap behind it is nothing.
    """
    clock = torch.linspace(
        0, schedule.horizon, len(start), dtype=torch.float64, device="cpu"
    )
    unpinned = schedule.time(clock)
    unpinned[-1] = 0.0
    return min((start, unpinned), key=lambda nodes: problem.value(nodes, None))


@dataclass
class _Best:
    """The best grid so far on the held-out noise, and what it has to beat."""

    nodes: Tensor
    told: Tensor | None
    size: Size
    start: Size
    by_square: bool
    waited: int = 0

    def offer(self, nodes: Tensor, told: Tensor | None, size: Size) -> None:
        self.waited += 1
        if self.by_square:
            better, now, before = True, size.rms, self.size.rms
        else:
            better = size.no_worse_than(self.start)
            now, before = size.mean, self.size.mean
        if better and now < before:
            if now < before * (1 - 1e-4):
                self.waited = 0
            self.nodes, self.told, self.size = nodes.detach(), told, size
            if told is not None:
                self.told = told.detach()


@dataclass
class _Problem:
    """A solver's error on grids, from the same noise as the reference."""

    process: Process
    solver: SolverLike
    steps: int
    told: bool
    objective: Objective
    moving: Noise  # what moves the nodes
    judging: Noise  # and what is held out
    gradient: str = field(default="autograd")
    finite: bool = field(default=True)  # the last run

    def parameters(self, nodes: Tensor, told: Tensor | None) -> Tensor:
        """Numbers without bounds: K - 1 of the nodes, and K of the levels told."""
        z = _to_logits(self.process, nodes)
        if told is None:
            return z
        level = self.process.noise_level
        ratio = (level(told) / level(nodes[:-1])).log()
        ratio = torch.where(torch.isfinite(ratio), ratio, 0.0)
        return torch.cat([z, torch.atanh((ratio / _FACTOR).clamp(-0.99, 0.99))])

    def unpacked(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """The nodes and the levels told."""
        if not self.told:
            return _from_logits(self.process, z), None
        cut = self.steps - 1
        nodes = _from_logits(self.process, z[:cut])
        start = nodes[:-1]
        level = self.process.noise_level(start.detach())
        here = torch.where(torch.isfinite(level), start, start.detach().new_tensor(0.5))
        moved = self.process.noise_level(here) * torch.exp(
            _FACTOR * torch.tanh(z[cut:])
        )
        told = torch.minimum(self.process.inverse_noise_level(moved), nodes[0])
        return nodes, torch.where(torch.isfinite(level), told, start)

    @property
    def powers(self) -> tuple[float, float]:
        """Exponents of the mean norm and of the mean square in what is minimised."""
        exponents = {
            "mean norm": (1.0, 0.0),
            "mean square": (0.0, 1.0),
            "balanced": (1.0, 0.5),
        }
        return exponents[self.objective]

    def judged(self, nodes: Tensor, told: Tensor | None) -> Size:
        """The size of the errors on the held-out noise."""
        size = self.judging.size(nodes, self.solver, told)
        self.finite = math.isfinite(size.rms)
        return size

    def value(self, nodes: Tensor, told: Tensor | None) -> float:
        """Log of the error that is minimised."""
        size = self.moving.size(nodes, self.solver, told)
        norm, square = self.powers
        self.finite = math.isfinite(size.rms)
        if not self.finite:
            return _HOPELESS
        return norm * _log(size.mean) + square * _log(size.rms**2)

    def by_autograd(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        """The value and its gradient, batch by batch: one graph at a time."""
        means, slopes = np.zeros(2), np.zeros((2, len(z)))
        for noise in self.moving.parts():
            share = len(noise.x) / len(self.moving.x)
            with torch.enable_grad():
                at = torch.tensor(z, requires_grad=True, device="cpu")
                nodes, told = self.unpacked(at)
                squares = noise.squares(nodes, self.solver, told)
                both = torch.stack([(squares + 1e-300).sqrt().mean(), squares.mean()])
                self.finite = bool(torch.isfinite(both).all())
                if not self.finite:
                    return _HOPELESS, np.zeros_like(z)
                means += share * both.detach().cpu().numpy()
                wanted = [i for i, power in enumerate(self.powers) if power]
                for i in wanted:
                    last = i == wanted[-1]
                    (slope,) = torch.autograd.grad(both[i], at, retain_graph=not last)
                    slopes[i] += share * slope.numpy()
        means += 1e-300
        value = float(np.dot(self.powers, np.log(means)))
        return min(value, _HOPELESS), np.dot(self.powers, slopes / means[:, None])

    def by_differences(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        value = self.value_at(z)
        moved = [self.value_at(z + _STEP * e) for e in np.eye(len(z))]
        return value, (np.array(moved) - value) / _STEP

    def value_at(self, z: np.ndarray) -> float:
        return self.value(*self.unpacked(torch.from_numpy(z)))

    def with_gradient(
        self, start: Tensor
    ) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        """The objective with autograd's gradient if that is right at the start."""
        z = start.numpy()
        try:
            gradient = self.by_autograd(z)[1]
        except RuntimeError:  # a network under inference mode, or with its own kernels
            gradient = np.zeros_like(z)
        direction = np.ones_like(z)
        direction[1::2] = -1.0
        near, far = (
            (self.value_at(z + h * direction) - self.value_at(z - h * direction))
            / (2 * h)
            for h in (_STEP, 2 * _STEP)
        )
        gap, doubt = abs(gradient @ direction - near), 4 * abs(near - far)
        if gap <= 0.1 * abs(near) + doubt + 1e-6:
            return self.by_autograd
        self.gradient = "differences"
        return self.by_differences


def _log(error: float) -> float:
    return min(math.log(error + 1e-300), _HOPELESS) if error == error else _HOPELESS


def _least_gap(process: Process, K: int) -> tuple[float, float]:
    """Range of log time, and the least gap of K nodes in it."""
    length = math.log(process.t_max / process.t_min)
    return length, min(LEAST_GAP, 0.1 * length / K)


def _from_logits(process: Process, z: Tensor) -> Tensor:
    """Grid from K - 1 logits of the gaps in log time; the last gap has the logit 0."""
    length, least = _least_gap(process, len(z) + 1)
    share = torch.softmax(torch.cat([z, z.new_zeros(1)]), 0)
    gaps = least + (length - (len(z) + 1) * least) * share
    inner = process.t_max * torch.exp(-torch.cumsum(gaps[:-1], 0))
    return torch.cat([z.new_tensor([process.t_max]), inner, z.new_zeros(1)])


def _to_logits(process: Process, grid: Tensor) -> Tensor:
    length, least = _least_gap(process, len(grid) - 1)
    stations = torch.cat([grid[:-1], grid.new_tensor([process.t_min])]).log()
    share = (stations[:-1] - stations[1:] - least) / length
    logits = share.clamp_min(0.01).log()  # a pinned node starts free, too
    return logits[:-1] - logits[-1]


def _problem(
    schedule: Schedule | Sequence[Schedule],
    flow: ProbabilityFlow,
    x_T: Tensor,
    K: int,
    solver: SolverLike,
    told: bool,
    objective: Objective,
    reference: Tensor | None,
    held_out_share: float,
    batch: int | None,
) -> tuple[_Problem, Schedule]:
    """The arguments, checked, the noise, split, and the best of the starts."""
    starts = [schedule] if not isinstance(schedule, Sequence) else list(schedule)
    check_flow(flow)
    for start in starts:
        if not isinstance(start, Schedule):
            raise TypeError(
                f"schedule: expected a Schedule to start from, or several, got "
                f"{got(start)}; artlib.art(flow, x_T) makes one"
            )
        check_process(start, flow.process)
    if not starts:
        raise ValueError("schedule: got none to start from; artlib.art makes one")
    if not isinstance(told, bool):
        raise TypeError(f"told: expected True or False, got {got(told)}")
    if positive_int(K, "K") < 2 and not told:
        raise ValueError(f"K: expected at least 2, got {K}; one step has no inner node")
    if not isinstance(objective, str) or objective not in get_args(Objective):
        raise ValueError(
            f"objective: expected one of {get_args(Objective)}, got {objective!r}"
        )
    kind = solver_of(solver)
    if told and not kind.tellable:
        raise ValueError(
            f"told: {kind.name} makes several evaluations a step, which are told their "
            "own levels; use euler or a multistep solver"
        )
    check_share(held_out_share, len(check_samples(x_T)))
    batch = None if batch is None else positive_int(batch, "batch")
    noise = matched_noise(flow, x_T, reference, batch)
    moving, judging = halves(noise, held_out_share)
    problem = _Problem(flow.process, solver, K, told, objective, moving, judging)
    if len(starts) == 1:
        return problem, starts[0]
    return problem, min(starts, key=lambda s: problem.value(s.grid(K), None))
