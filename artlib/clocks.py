r"""A clock per sample: each trajectory of a batch on its own times.

A schedule is open loop: one list of times for all. A clock looks at each sample and
says where its next node lies, so that K steps fall differently for every sample. Two
kinds, from the closed form of `artlib.control` (ours):

* **exact**: each path's own feedback clock, :math:`\theta^* = G / ((T-s)\sqrt{|Q|})`,
  read off a pass along the very path that is then sampled. It costs more than it can
  win; it is the upper bound of what a clock per sample can buy.
* **predicted**: on line, with no further evaluation. With one node behind it, |Q| of
  the sample follows from the change of its denoised state over the last step; its
  deviation from the mean, in logarithms, predicts the deviation later by a linear
  regression over reference paths,
  :math:`\widehat{\log|Q|}(t') = m(t') + \beta(t, t')(\log|Q|(t) - m(t))`, and the next
  node takes 1/(K-k) of the predicted length that is left.

What such clocks could save is `value_of_information`, the ratio of the two
Cauchy-Schwarz bounds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from ._checks import check_samples, finite_float, got, positive_int
from ._integrators import StepCallback
from ._precision import at_least_single, holds_double
from ._solver_choice import Step, solver_of, take_step
from ._stiffness import FLOOR, StiffnessTable
from .flow import ProbabilityFlow

__all__ = [
    "Clock",
    "ExactClock",
    "PredictedClock",
    "integrate_with",
    "value_of_information",
]

_KNOTS = 257  # times at which a predicted density is integrated


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


class ExactClock(Clock):
    """Every sample on the feedback clock of its own path; see the module.

    Args:
        steps: K.
        points: Times of the stiffness table.
        method: Integrator of the paths.
        batch: Paths integrated together, which bounds the memory; by default all.
    """

    def __init__(
        self,
        steps: int,
        *,
        points: int = 64,
        method: str = "rk4",
        batch: int | None = None,
    ) -> None:
        self.steps = positive_int(steps, "steps")
        self._options = {"points": points, "method": method, "batch": batch}
        self._grids = torch.zeros(0, 0, device="cpu")

    def start(self, flow: ProbabilityFlow, x_T: Tensor) -> None:
        from .control import stiffness_table  # control imports schedules and tables

        table = stiffness_table(flow, x_T, **self._options)  # type: ignore[arg-type]
        self._grids = feedback_grids(table, self.steps)

    def advance(self, k: int, t: Tensor, x: Tensor, denoised: Tensor) -> Tensor:
        return self._grids[:, k + 1]


class PredictedClock(Clock):
    """On line, from the past of each sample; see the module.

    Args:
        table: |Q| along reference paths, `artlib.stiffness_table`; other noise than
            that which is sampled.
        steps: K.
        trust: Factor on the regression, within [0, 1]; 0 is the open-loop clock. The
            slope is fitted on exact |Q|, the estimate on line is rougher.

    Raises:
        ValueError: If ``steps`` < 1 or ``trust`` is outside [0, 1].
    """

    def __init__(
        self, table: StiffnessTable, steps: int, *, trust: float = 0.5
    ) -> None:
        self.steps = positive_int(steps, "steps")
        _check_table(table)
        trust = finite_float(trust, "trust")
        if not 0 <= trust <= 1:
            raise ValueError(f"trust: expected a number within [0, 1], got {trust}")
        stride = (table.fine_times.numel() - 1) // (_KNOTS - 1)
        self.process = table.process
        self._times = table.fine_times[::stride]
        values = table.fine_values[:, ::stride]
        mean = values.mean(0)
        floor = FLOOR**2 * float(values.max())
        logs = values.clamp_min(1e-3 * mean.clamp_min(floor)).clamp_min(floor).log()
        spread = logs - logs.mean(0)
        covariance = spread.T @ spread / len(logs)
        variance = covariance.diagonal()
        self._slope = trust * covariance / variance.clamp_min(1e-12)[:, None]
        self._log_mean = logs.mean(0)
        self._base = mean.clamp_min(floor).log()
        self._last: tuple[Tensor, Tensor] | None = None

    def start(self, flow: ProbabilityFlow, x_T: Tensor) -> None:
        if flow.process != self.process:
            raise ValueError(
                f"clock: its table belongs to {self.process}, the flow to "
                f"{flow.process}; make the table with this flow"
            )
        self._flow = flow
        self._last = None

    def advance(self, k: int, t: Tensor, x: Tensor, denoised: Tensor) -> Tensor:
        if k == self.steps - 1:
            return torch.zeros_like(t)
        shift = torch.zeros(len(t), 1, dtype=torch.float64, device="cpu")
        place = torch.zeros(len(t), dtype=torch.long, device="cpu")
        if self._last is not None:
            before, old = self._last
            column = (t + before).reshape(-1, *[1] * (x.ndim - 1)) / 2
            span = (t - before).reshape(column.shape).to(x.dtype).to(x.device)
            rate = (denoised - old) / span
            wide = torch.float64 if holds_double(x.device) else at_least_single(x.dtype)
            middle = (x.to(wide), denoised.to(wide), rate.to(wide))
            q = self._flow.acceleration_from(middle[0], column, middle[1], middle[2])
            size = q.flatten(1).norm(dim=1).cpu().double()
            place = self._index((t + before).cpu() / 2)
            own = size.clamp_min(1e-300).log() - self._log_mean[place]
            shift = own.clamp(-3, 3)[:, None]
        self._last = (t, denoised)
        log_q = self._base + self._slope[place] * shift
        return self._quantile(0.5 * log_q, t.cpu(), 1 / (self.steps - k)).to(t.device)

    def _index(self, t: Tensor) -> Tensor:
        """Nearest of the tabulated times."""
        log_times = -self._times.log()
        found = torch.searchsorted(log_times, -t.log().contiguous())
        return found.clamp(0, len(log_times) - 1)

    def _quantile(self, log_density: Tensor, t: Tensor, share: float) -> Tensor:
        """Times that leave 1 - share of the length between t and t_min to go."""
        density = (log_density - log_density.amax(1, keepdim=True)).exp()
        density = density.clamp_min(FLOOR * density.mean(1, keepdim=True))
        length = cumulative(self._times, density)
        log_times = self._times.log()
        rows = []
        for row, now in zip(
            length, t, strict=True
        ):  # numpy interpolates one row a time
            here = np.interp(-float(now.log()), -log_times.numpy(), row.numpy())
            wanted = here + share * (float(row[-1]) - here)
            rows.append(np.interp(wanted, row.numpy(), log_times.numpy()))
        return torch.from_numpy(np.exp(np.array(rows)))


def value_of_information(table: StiffnessTable) -> float:
    r"""What a clock per sample could ever save: :math:`C_{feedback} / C_{open}` <= 1.

    Args:
        table: From `artlib.stiffness_table` or `artlib.error_table`.

    Returns:
        The ratio of the two lower bounds; 1 where all paths want the same clock.
    """
    return _check_table(table).lower_bound("feedback") / table.lower_bound("open_loop")


def _check_table(table: StiffnessTable) -> StiffnessTable:
    if not isinstance(table, StiffnessTable):
        raise TypeError(
            f"table: expected a StiffnessTable, got {got(table)}; "
            "artlib.stiffness_table(flow, x_T) makes one"
        )
    return table


def cumulative(times: Tensor, density: Tensor) -> Tensor:
    """Trapezoids of rows [N, n] from the first time down, starting at 0."""
    pieces = 0.5 * (density[:, 1:] + density[:, :-1]) * (times[:-1] - times[1:])
    return torch.nn.functional.pad(pieces.cumsum(1), (1, 0))


def feedback_grids(table: StiffnessTable, K: int) -> Tensor:
    """The K-step grid of every path's own closed-form clock [N, K + 1]."""
    density = table.fine_values ** (1 / (table.order + 1))
    mean = density.mean(1, keepdim=True).clamp_min(1e-300)
    length = table.cumulative(torch.maximum(density, FLOOR * mean))
    log_times = table.fine_times.log().numpy()
    shares = np.linspace(0, 1, K + 1)
    rows = [np.interp(shares * row[-1], row, log_times) for row in length.numpy()]
    grids = torch.from_numpy(np.exp(np.stack(rows)))
    grids[:, 0], grids[:, -1] = table.process.t_max, 0.0
    return grids


def integrate_with(
    flow: ProbabilityFlow,
    x: Tensor,
    clock: Clock,
    solver: str | Step,
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
