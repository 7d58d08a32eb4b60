"""Sampling on a clock: every sample of a batch at its own times."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .._common.checks import check_samples, positive_int
from .._common.precision import holds_double
from ..flow.flow import ProbabilityFlow
from .integrate import StepCallback
from .solver import SolverLike, solver_of, take_step


class Clock(ABC):
    """Says where each sample's next node lies.

    Attributes:
        steps: K, the number of steps; the K-th has to end at 0.
    """

    steps: int

    def start(self, flow: ProbabilityFlow, x_T: Tensor) -> None:
        """Called once before the first step; the default remembers the flow.

        Args:
            flow: The flow that is sampled.
            x_T: States at t_max [N, *shape].
        """
        self._flow = flow

    @abstractmethod
    def advance(self, k: int, t: Tensor, x: Tensor, denoised: Tensor) -> Tensor:
        """The next times.

        Args:
            k: Index of the step, 0 ... K - 1.
            t: Process times of the samples [N], float64.
            x: Their states [N, *shape].
            denoised: D(x, t) [N, *shape].

        Returns:
            Times [N] strictly below ``t``, above 0 before the last step and 0 at it.
        """


def integrate_with(
    flow: ProbabilityFlow,
    x: Tensor,
    clock: Clock,
    solver: SolverLike,
    callback: StepCallback | None,
) -> Tensor:
    """`artlib.sample` with a clock: per-sample times in one batch.

    Args:
        flow: The flow.
        x: States at t_max.
        clock: The clock.
        solver: ``"euler"``, ``"heun"`` or a step, which gets its times as columns
            [N, 1, ..., 1] and is charged one evaluation more, that of the clock; the
            step to 0 is Euler's.
        callback: Gets the mean time of the samples.

    Raises:
        TypeError: If ``clock`` is no `Clock`.
        ValueError: If the solver is another one, or the clock stalls, runs past the
            end or does not arrive.
    """
    if not isinstance(clock, Clock):
        raise TypeError(
            f"clock: expected an artlib Clock, got {type(clock).__name__}; a plain "
            "list of times is passed as grid"
        )
    kind = solver_of(solver, adaptive=True)
    if kind.step is None and solver not in ("euler", "heun"):
        raise ValueError(
            "solver: a clock per sample goes with 'euler', 'heun' or a callable "
            f"step(flow, x, t, s), got {solver!r}"
        )
    x = check_samples(x)
    K, n = positive_int(clock.steps, "clock.steps"), len(x)
    clock.start(flow, x)
    home = x.device if holds_double(x.device) else torch.device("cpu")
    t = torch.full((n,), flow.process.t_max, dtype=torch.float64, device=home)
    column = (n, *[1] * (x.ndim - 1))
    for k in range(K):
        if callback is not None:
            callback(k, float(t.mean()), x)
        denoised = flow.denoise(x, t.reshape(column))
        after = _checked(clock.advance(k, t, x, denoised), t, k, K)
        now, then = t.reshape(column), after.reshape(column)
        if kind.step is not None and k < K - 1:
            y = take_step(kind.step, flow, x, now, then)
        else:
            velocity = flow.velocity_from(denoised, x, now)
            step = (then - now).to(x.dtype).to(x.device)
            y = x + step * velocity
            if solver == "heun" and k < K - 1:
                ahead = flow.velocity(y, then)
                y = x + step / 2 * (velocity + ahead)
        x, t = y, after
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"the state became NaN or infinite in step {k + 1} of {K}; check the "
                "denoiser, or take more steps"
            )
    if callback is not None:
        callback(K, 0.0, x)
    return x


def _checked(after: Tensor, t: Tensor, k: int, K: int) -> Tensor:
    """A clock's answer, or what is wrong with it."""
    if not isinstance(after, Tensor) or after.shape != t.shape:
        got = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
        raise ValueError(
            f"clock: expected next times of shape {tuple(t.shape)}, one per sample, "
            f"got {got}"
        )
    after = after.to(t)
    where = f"in step {k + 1} of {K}"
    if not bool(torch.isfinite(after).all()):
        raise ValueError(f"clock: it gave a time that is not finite, {where}")
    stalled, past = after >= t, after < 0
    if bool(past.any()):
        raise ValueError(
            f"clock: {int(past.sum())} of {len(t)} samples run past the end {where}, "
            f"to t = {float(after.min()):.3g}; data is at t = 0"
        )
    if bool(stalled.any()):
        raise ValueError(
            f"clock: {int(stalled.sum())} of {len(t)} samples stall {where}, at t = "
            f"{float(t[stalled][0]):.3g}; every step has to go down"
        )
    early, late = bool((after == 0).any()), bool((after > 0).any())
    if k < K - 1 and early:
        raise ValueError(
            f"clock: it arrived at 0 {where}; only the last step may end there"
        )
    if k == K - 1 and late:
        raise ValueError(
            f"clock: {int((after > 0).sum())} of {len(t)} samples have not arrived at "
            f"0 after {K} steps; the last step has to end there"
        )
    return after
