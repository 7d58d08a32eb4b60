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

import numpy as np
import torch
from torch import Tensor

from ._common.checks import finite_float, positive_int
from ._common.precision import at_least_single, holds_double
from .control.closed_form import stiffness_table
from .control.stiffness import (
    FLOOR,
    StiffnessTable,
    check_table,
    cumulative,
    feedback_grids,
)
from .flow.flow import ProbabilityFlow
from .solvers.clocked import Clock

__all__ = ["ExactClock", "PredictedClock"]

_KNOTS = 257  # times at which a predicted density is integrated


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
        check_table(table)
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
