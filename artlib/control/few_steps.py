r"""Few steps: the K nodes of a grid moved to where the sampler's own error is least.

A density is optimal as K grows. At a handful of steps the error is that of the K steps
themselves, and K - 1 inner nodes are few enough to be moved one by one: from the same
noise, against a fine reference,

.. math:: \min_{t_1 > \dots > t_{K-1}}\; E\,\lVert x_0(t_1, \dots, t_{K-1})
          - x_0^{ref} \rVert^2 ,

by BFGS on the logarithm of the error, with the gradient through the solver. The nodes
split the range of log time into K gaps, each a least gap plus a softmax share of the
rest, so they keep their order and their distance, and stay above t_min. A network that
passes no gradient, or a wrong one (part of it runs under ``torch.no_grad``), is noticed
at the start; then differences take the gradient's place.

One part of the noise moves the nodes, another, **held out**, decides when to stop and
which grid is returned, so the result is never worse there than its start. On Gaussian
data the objective is :math:`W_2^2` itself, and the limit is `artlib.oracle_grid`. All
of this is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor
from tqdm import tqdm

from .._common.checks import check_samples, finite_float, positive_int
from .._common.precision import full_precision
from ..flow.denoisers import CountNFE
from ..flow.flow import ProbabilityFlow, check_flow
from ..flow.noise_coordinate import table_times
from ..flow.processes import Process
from ..flow.rows import in_batches
from ..schedules.constructors import Schedule, from_grid
from ..solvers.integrate import integrate
from ..solvers.solver import SolverLike, solver_of
from .stiffness import check_process

__all__ = ["refine"]

LEAST_GAP = 1e-3
"""Least distance of neighbouring nodes in log time, as far as the range has room."""

PATIENCE = 8
"""Iterations without a gain on the held-out noise after which the search stops."""

_REFERENCE_POINTS = 96
_STEP = 1e-3  # of differences, in the logits: float32 networks resolve it
_HOPELESS = 100.0  # log error of a grid on which the run is not finite


@full_precision()
def refine(
    schedule: Schedule,
    flow: ProbabilityFlow,
    x_T: Tensor,
    K: int,
    *,
    solver: SolverLike = "euler",
    iterations: int = 100,
    reference: Tensor | None = None,
    held_out: float = 0.25,
    batch: int | None = None,
    progress: bool = False,
) -> Schedule:
    r"""The K-step grid of a schedule, its nodes moved for one solver on one flow.

    Args:
        schedule: Where to start; `artlib.art` is a good place.
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape], N >= 2; a few dozen will do.
        K: Number of steps, >= 2; the result is made for this number.
        solver: ``"euler"``, ``"heun"``, ``"rk4"`` or ``"dpmpp_2m"``, or a step as in
            `artlib.sample`, differentiable in its states and times.
        iterations: BFGS iterations at most; it usually stops before thirty.
        reference: Accurate x_0 of the same ``x_T`` [N, *shape]; by default integrated
            here, by RK4 on 96 times.
        held_out: Share of ``x_T`` that is held out, within (0, 1). A denoiser's
            conditions go with their samples (`ProbabilityFlow.rows`).
        batch: Samples computed together, which bounds the memory (the gradient holds
            all K steps of them, the reference 96 states of each); by default all. The
            grid is the same to round-off, and so are the counted evaluations.
        progress: Whether to show a progress bar (on stderr).

    Returns:
        A `Schedule` whose ``grid(K)`` is the refined nodes; its provenance has the
        error on the held-out noise, per coordinate, before and after.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its range, ``schedule`` belongs to another process,
            or its own grid already gives NaN.
    """
    batch = None if batch is None else positive_int(batch, "batch")
    problem = _problem(schedule, flow, x_T, K, solver, reference, held_out, batch)
    iterations = positive_int(iterations, "iterations")
    start = schedule.grid(K)
    before = problem.held_out_error(start)
    if not math.isfinite(before) or not math.isfinite(problem.value(start)):
        raise ValueError(
            f"schedule: its own grid of {K} steps gives NaN or infinity with "
            f"{solver_of(solver).name}; check the denoiser, or start from another "
            "schedule"
        )
    best = _Best(start, before)
    logits = _to_logits(flow.process, _free(schedule, problem, start))
    objective = problem.objective(logits)
    bar = tqdm(total=iterations, desc="refine", unit="it", disable=not progress)

    def after_iteration(intermediate_result: OptimizeResult) -> None:
        nodes = _from_logits(flow.process, torch.from_numpy(intermediate_result.x))
        best.offer(nodes, problem.held_out_error(nodes))
        bar.update()
        if best.waited >= PATIENCE:
            raise StopIteration

    options: dict[str, Any] = {"maxiter": iterations, "gtol": 1e-5}
    with bar:
        minimize(
            objective,
            logits.numpy(),
            jac=True,
            method="BFGS",
            callback=after_iteration,
            options=options,
        )
    notes = {
        "method": "refined",
        "solver": solver_of(solver).name,
        "start": schedule.provenance,
        "error_before": before,
        "error_after": best.error,
        "nfe": problem.counter.nfe,
        "gradient": problem.gradient,
    }
    name = f"{schedule.name} refined"
    return from_grid(flow.process, best.nodes, name=name, provenance=notes)


def _free(schedule: Schedule, problem: _Problem, start: Tensor) -> Tensor:
    """The start, or its unpinned variant where that is better.

    From a node at t_min no gradient leads back: the gap behind it is nothing.
    """
    clock = torch.linspace(
        0, schedule.horizon, len(start), dtype=torch.float64, device="cpu"
    )
    unpinned = schedule.time(clock)
    unpinned[-1] = 0.0
    return min((start, unpinned), key=problem.value)


@dataclass
class _Best:
    """The best grid so far on the held-out noise."""

    nodes: Tensor
    error: float
    waited: int = 0

    def offer(self, nodes: Tensor, error: float) -> None:
        self.waited += 1
        if error < self.error:
            if error < self.error * (1 - 1e-4):
                self.waited = 0
            self.nodes, self.error = nodes, error


@dataclass(frozen=True)
class _Noise:
    """Samples, with the flow that has their conditions."""

    flow: ProbabilityFlow
    x: Tensor
    reference: Tensor


@dataclass
class _Problem:
    """A solver's error on grids, from the same noise as the reference."""

    flow: ProbabilityFlow
    solver: SolverLike
    moving: _Noise  # what moves the nodes
    judging: _Noise  # and what is held out
    counter: CountNFE
    batch: int | None
    gradient: str = field(default="autograd")

    def parts(self, noise: _Noise) -> Iterator[tuple[float, _Noise]]:
        """Batches, each with its share of the samples."""
        tensors = (noise.x, noise.reference)
        split = in_batches(noise.flow, tensors, self.batch, counter=self.counter)
        for flow, (x, reference) in split:
            yield len(x) / len(noise.x), _Noise(flow, x, reference)

    def run(self, nodes: Tensor, noise: _Noise) -> Tensor:
        """Mean squared error per coordinate; infinite where the run is."""
        x, reference = noise.x, noise.reference
        try:
            y = integrate(noise.flow, x, nodes, self.solver)
        except ValueError as error:
            if "NaN or infinite" not in str(error):
                raise
            return torch.tensor(math.inf, dtype=torch.float64, device="cpu")
        return (y - reference).square().mean()

    def mean_error(self, nodes: Tensor, noise: _Noise) -> float:
        with torch.no_grad():
            return sum(s * float(self.run(nodes, n)) for s, n in self.parts(noise))

    def held_out_error(self, nodes: Tensor) -> float:
        return math.sqrt(self.mean_error(nodes, self.judging))

    def value(self, nodes: Tensor) -> float:
        """Log of the error that is minimised."""
        return _log(self.mean_error(nodes, self.moving))

    def by_autograd(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        """The value and its gradient, batch by batch: one graph at a time."""
        total, slopes = 0.0, []
        for share, noise in self.parts(self.moving):
            with torch.enable_grad():
                logits = torch.tensor(z, requires_grad=True, device="cpu")
                error = self.run(_from_logits(self.flow.process, logits), noise)
                size = float(error.detach())
                total += share * size
                if _log(size) >= _HOPELESS:
                    return _HOPELESS, np.zeros_like(z)
                if size > 0:
                    (slope,) = torch.autograd.grad(error.log(), logits)
                    slopes.append((share * size, slope.numpy()))
        gradient = np.zeros_like(z)
        for weight, row in slopes:
            gradient += weight / total * row
        return _log(total), gradient

    def by_differences(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        value = self.value_at(z)
        moved = [self.value_at(z + _STEP * e) for e in np.eye(len(z))]
        return value, (np.array(moved) - value) / _STEP

    def value_at(self, z: np.ndarray) -> float:
        return self.value(_from_logits(self.flow.process, torch.from_numpy(z)))

    def objective(
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
    schedule: Schedule,
    flow: ProbabilityFlow,
    x_T: Tensor,
    K: int,
    solver: SolverLike,
    reference: Tensor | None,
    held_out: float,
    batch: int | None,
) -> _Problem:
    """The arguments, checked, and the noise, split."""
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule: expected a Schedule to start from, got "
            f"{type(schedule).__name__}; artlib.art(flow, x_T) makes one"
        )
    check_flow(flow)
    check_process(schedule, flow.process)
    if positive_int(K, "K") < 2:
        raise ValueError(f"K: expected at least 2, got {K}; one step has no inner node")
    solver_of(solver)
    x = check_samples(x_T).detach().double()
    share = finite_float(held_out, "held_out", positive=True)
    if share >= 1 or len(x) < 2:
        raise ValueError(
            f"held_out: a share of {share} of {len(x)} samples leaves none on one of "
            "the two sides; pass a share within (0, 1) and at least two samples"
        )
    counter = CountNFE(flow.denoiser)
    counted = flow.with_denoiser(counter)
    if reference is None:
        ends, times = [], table_times(flow.process, _REFERENCE_POINTS)
        for part, (start,) in in_batches(counted, [x], batch, counter=counter):
            path = part.trajectory(start, times)
            ends.append(path.states[-1] - path.times[-1] * path.velocities[-1])
        reference = torch.cat(ends)
    reference = check_samples(reference, "reference").detach().double().to(x.device)
    if reference.shape != x.shape:
        raise ValueError(
            f"reference: expected the shape of x_T, {tuple(x.shape)}, got "
            f"{tuple(reference.shape)}; it is x_0 of the same noise, row by row"
        )
    cut = min(max(round((1 - share) * len(x)), 1), len(x) - 1)
    moving, judging = (
        _Noise(counted.rows(s, len(x)), x[s], reference[s])
        for s in (slice(cut), slice(cut, None))
    )
    return _Problem(counted, solver, moving, judging, counter, batch)
