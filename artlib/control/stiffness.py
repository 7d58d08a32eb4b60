r"""|Q| along reference trajectories, and the closed form that follows from it.

The mathematics is in `artlib.control`. Integrals over time are trapezoids on a fine
grid, even in the log noise level, on which |Q| of every trajectory is interpolated.

A table of **order** p (`artlib.error_table`) holds the coefficient of a solver's own
local error :math:`|Q_p| h^{p+1}` instead; everything below is for general p, and p = 1
with :math:`|Q|` is the paper's. By Hoelder's inequality

.. math::
    C = E\int |Q_p|\,\theta^{p}\,d\psi
      \ge \frac{1}{T^p}\Bigl(\int (E|Q_p|)^{1/(p+1)}\,d\psi\Bigr)^{p+1},
    \qquad \text{density} \propto (E|Q_p|)^{1/(p+1)} .
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .._common.checks import finite_float, got, positive_int, require_finite
from .._common.interpolation import pchip
from .._common.types import TimeLike
from ..flow.noise_coordinate import log_level, table_times
from ..flow.processes import Process, as_time
from ..flow.processes import check_process as process_of
from ..schedules.constructors import Schedule, from_time_change

Average = Literal["open_loop", "paper"]
ClockKind = Literal["open_loop", "feedback"]

FINE = 2049
"""Quadrature points; trapezoids there are exact to 1e-6 of a cost."""

KNOTS = 513
"""Knots of a learned time change: half of them follow the clock, half the log noise
level, for ranges that the clock crosses in a tick."""

FLOOR = 1e-4
"""Least density of steps, relative to its mean over the range: real |Q| underflows to
0 in places, and a clock has to be strictly monotone."""


PATH_FLOOR = 0.1
"""Least |Q| of one trajectory in the paper's average, relative to E|Q| at that time.
The speed of a feedback clock goes as 1/sqrt|Q|; where one path has come to rest and
others have not, it grows without bound, and the mean of the speeds with it (digits:
2.4 times the optimal cost without a floor, 1.06 with it; mixtures do not notice)."""


@dataclass(frozen=True, eq=False)
class StiffnessTable:
    """|Q| along reference trajectories, and all that follows from it.

    Attributes:
        process: The noising process.
        times: Process times [n], descending from t_max to t_min, float64.
        values: |Q| per trajectory and time [N, n], float64, >= 0.
        nfe: Network evaluations (batched calls) spent on the table.
        acceleration: The method that gave it, ``"jvp"``, ``"difference"`` or, for a
            solver's own error, ``"step doubling"``.
        order: p, the order of the solver whose error it is; 1 for |Q| itself.

    Raises:
        ValueError: If shapes do not fit or a value is negative or not finite.
    """

    process: Process
    times: Tensor
    values: Tensor
    nfe: int = 0
    acceleration: str = "given"
    order: int = 1

    def __post_init__(self) -> None:
        process_of(self.process)
        for name in ("times", "values"):
            given = getattr(self, name)
            if not isinstance(given, Tensor) or not given.is_floating_point():
                raise TypeError(
                    f"{name}: expected a tensor in float64, got {got(given)}; "
                    "artlib.stiffness_table makes the whole table"
                )
        n = self.times.numel()
        positive_int(self.order, "order")
        if self.times.ndim != 1 or n < 2 or self.values.shape[1:] != (n,):
            raise ValueError(
                "StiffnessTable: expected times [n] and values [N, n] with n >= 2, got "
                f"shapes {tuple(self.times.shape)} and {tuple(self.values.shape)}"
            )
        require_finite(self.values, "values", "check the denoiser near t_min and t_max")
        if bool((self.values < 0).any()):
            raise ValueError("values: |Q| is a norm, expected >= 0")
        if not bool((self.times[1:] < self.times[:-1]).all()):
            raise ValueError("times: expected strictly descending process times")
        ends, found = (self.process.t_max, self.process.t_min), self.times[[0, -1]]
        if not np.allclose(found, ends, rtol=1e-6, atol=0):
            raise ValueError(
                f"times: expected them to run from t_max = {ends[0]:.6g} to t_min = "
                f"{ends[1]:.6g}, got {float(found[0]):.6g} ... {float(found[1]):.6g}"
            )

    @property
    def span(self) -> float:
        """T = t_max - t_min, the length of the clock."""
        return float(self.times[0] - self.times[-1])

    def mean(self) -> Tensor:
        """E|Q| at the table's times, [n]."""
        return self.values.mean(0)

    @cached_property
    def fine_times(self) -> Tensor:
        """Quadrature times [FINE], descending, spaced evenly in `log_level`."""
        return table_times(self.process, FINE)

    @cached_property
    def fine_values(self) -> Tensor:
        """|Q| per trajectory at the quadrature times, [N, FINE].

        Monotone cubics through log |Q| over `log_level`: exact for the power laws that
        |Q| follows at both ends. So that the logarithm exists, values below 1e-24 of a
        trajectory's peak are raised to that; a straight trajectory stays at 0.
        """
        values = self.values.cpu().numpy()
        peak = values.max(axis=1, keepdims=True)
        scale = np.where(peak > 0, peak, 1.0)
        log_q = np.log(np.maximum(values / scale, 1e-24))
        # scipy wants ascending abscissae; times descend.
        level = log_level(self.process, self.times).numpy()
        cubic = pchip(level[::-1], log_q[:, ::-1], axis=1)
        fine = log_level(self.process, self.fine_times).numpy()
        inside = np.clip(fine, level[-1], level[0])
        return torch.from_numpy(peak * np.exp(cubic(inside)))

    @cached_property
    def fine_mean(self) -> Tensor:
        """E|Q| at the quadrature times, [FINE]."""
        return self.fine_values.mean(0)

    def cost(self, schedule: Schedule) -> float:
        r"""Cost :math:`C = E\int |Q_p|\,\theta^{p+1}\, ds` of a schedule, eq. (9).

        Args:
            schedule: Any schedule of the same process; a pinned one is judged by its
                continuous clock down to t_min (its last step is not in C).

        Returns:
            C >= 0 in units of x, [length], for p = 1; compare with `lower_bound`.

        Raises:
            ValueError: If the schedule belongs to another process.
        """
        check_process(schedule, self.process)
        speed = schedule.speed(schedule.clock(self.fine_times))
        return float(self._integral(self.fine_mean * speed**self.order))

    def lower_bound(self, clock: ClockKind = "open_loop") -> float:
        r"""Cauchy-Schwarz bound on `cost`.

        Args:
            clock: ``"open_loop"``: :math:`(\int\sqrt{E|Q|}\,d\psi)^2 / T`, attained by
                `art`; ``"feedback"``: :math:`E(\int\sqrt{|Q|}\,d\psi)^2 / T`, what a
                clock per sample could reach (both for p = 1; see the module).

        Raises:
            ValueError: If ``clock`` is neither.
        """
        power = self.order + 1
        if clock == "open_loop":
            length = self._integral(self.fine_mean ** (1 / power))
            return float(length**power) / self.span**self.order
        if clock == "feedback":
            lengths = self._integral(self.fine_values ** (1 / power))
            return float((lengths**power).mean()) / self.span**self.order
        raise ValueError(f"clock: expected 'open_loop' or 'feedback', got {clock!r}")

    def held_out(self, folds: int = 8) -> float:
        r"""How well the closed form fits paths that it was not learned from.

        Cross-validation: the paths are dealt out into ``folds`` parts, and each part is
        charged to the schedule that is learned from all others. The mean cost is given
        in units of `lower_bound`. No network evaluation is needed. Ours.

        It cannot know of a kind of path that none of these is: where one path in a
        hundred bends alone, dozens of paths may be too few and still agree.

        Args:
            folds: Parts, at least 2 and at most the number of paths.

        Returns:
            The ratio, >= 1 up to quadrature; well above 1 there are too few paths.
            Infinite if all paths but those of one part are straight.

        Raises:
            ValueError: If there are fewer paths than parts, or all are straight.
        """
        folds, paths = positive_int(folds, "folds", minimum=2), len(self.values)
        if paths < folds:
            raise ValueError(
                f"folds: {folds} parts of {paths} trajectories; take more of those, or "
                "fewer parts"
            )
        if not bool((self.values > 0).any()):
            raise ValueError("values: all paths are straight, any schedule fits them")
        part, total = torch.arange(paths, device="cpu") % folds, 0.0
        for k in range(folds):
            known, new = (
                replace(self, values=self.values[rows])
                for rows in (part != k, part == k)
            )
            if not bool((known.values > 0).any()):
                return math.inf  # nothing to learn from
            total += len(new.values) * new.cost(known.art())
        return total / paths / self.lower_bound()

    def art(
        self,
        average: Average = "open_loop",
        *,
        exponent: float | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> Schedule:
        r"""The closed-form schedule, whose speed is the optimal control of eq. (18).

        Args:
            average: ``"open_loop"``, density :math:`(E|Q|)^{1/2}`, optimal among
                schedules that depend on time alone; ``"paper"``, the mean over
                trajectories of the feedback clocks, as the paper distils, each |Q|
                kept above `PATH_FLOOR` times the mean (ours).
            exponent: Power of |Q| in the density; by default the optimum, 1/(p+1).
                Others are there to show that they are not.
            provenance: Stored with the schedule beside what is known here.

        Raises:
            ValueError: If ``average`` is neither, or ``exponent`` is not positive.
        """
        if not isinstance(average, str) or average not in get_args(Average):
            raise ValueError(
                f"average: expected 'open_loop' or 'paper', got {average!r}"
            )
        if exponent is None:
            exponent = 1 / (self.order + 1)
        exponent = finite_float(exponent, "exponent", positive=True)
        notes = {
            "method": "closed form",
            "average": average,
            "exponent": exponent,
            "trajectories": self.values.shape[0],
            "points": self.times.numel(),
            "nfe": self.nfe,
            "acceleration": self.acceleration,
            **({} if self.order == 1 else {"order": self.order}),
            **(provenance or {}),
        }
        if average == "open_loop":
            density, name = self.fine_mean[None] ** exponent, "ART"
        else:
            floored = torch.maximum(self.fine_values, PATH_FLOOR * self.fine_mean)
            density, name = floored**exponent, "ART (paper average)"
        # Times at equal readings of the clocks: one row per clock, then their mean. The
        # mean of the psi of all paths is what the mean of their theta integrates to.
        clocks = self._clock(density).numpy()
        clock, level = clocks.mean(0), np.linspace(0, 1, FINE)
        ticks = np.interp(np.linspace(0, 1, KNOTS), (clock + level) / 2, clock)
        log_t = self.fine_times.log().numpy()
        rows = [np.interp(ticks, c, log_t) for c in clocks]
        times = np.exp(np.stack(rows)).mean(0)
        times[0], times[-1] = self.times[0], self.times[-1]
        return from_time_change(
            self.process, ticks * self.span, times, name=name, provenance=notes
        )

    def value(self, clock: TimeLike, t: TimeLike) -> Tensor:
        r"""Value function :math:`V = -G^2 / (T - s)` of the mean problem, eq. (10).

        For order p it is :math:`-G^{p+1} / (T - s)^p` with
        :math:`G = \int_\psi^T (E|Q_p|)^{1/(p+1)}`. With :math:`\lambda t`
        added it solves the randomised equation, eq. (16), which is what eq. (17) says.

        Args:
            clock: Clock s in [0, T).
            t: Process time in [t_min, t_max]; broadcasts against ``clock``.

        Returns:
            V <= 0; minus the cost still to come on the optimal clock.
        """
        power = self.order + 1
        length = self.cumulative(self.fine_mean[None] ** (1 / power))[0]
        to_go = np.interp(
            np.log(as_time(t).detach().cpu().numpy()),
            self.fine_times.log().numpy()[::-1],
            (length[-1] - length).numpy()[::-1],
        )
        left = self.span - as_time(clock, name="clock").cpu()
        return -(torch.as_tensor(to_go, device="cpu") ** power) / left**self.order

    def cumulative(self, integrand: Tensor) -> Tensor:
        """Trapezoids of rows [N, FINE] from t_max down, starting at 0."""
        steps = self.fine_times[:-1] - self.fine_times[1:]
        pieces = 0.5 * (integrand[:, 1:] + integrand[:, :-1]) * steps
        return torch.nn.functional.pad(pieces.cumsum(1), (1, 0))

    def _integral(self, integrand: Tensor) -> Tensor:
        return torch.trapezoid(integrand, -self.fine_times)

    def _clock(self, density: Tensor) -> Tensor:
        """Cumulative floored density of rows [N, FINE], from 0 to 1."""
        mean = self._integral(density)[:, None] / self.span
        if not bool((mean > 0).any()):
            raise ValueError(
                "stiffness: |Q| is 0 everywhere: the paths are straight, one step is "
                "exact, and there is nothing to learn"
            )
        total = self.cumulative(torch.maximum(density, FLOOR * mean))
        return total / total[:, -1:]


def check_process(schedule: Schedule, process: Process) -> None:
    """Raise a ``ValueError`` if a schedule was made for another process."""
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule: expected a Schedule, got {got(schedule)}; artlib.from_grid or "
            "artlib.from_density makes one"
        )
    if schedule.process != process:
        raise ValueError(
            f"schedule: it belongs to {schedule.process}, the flow to {process}; "
            "make it for the same process and range"
        )


def value_of_information(table: StiffnessTable) -> float:
    r"""What a clock per sample could ever save: :math:`C_{feedback} / C_{open}` <= 1.

    Args:
        table: From `artlib.stiffness_table` or `artlib.error_table`.

    Returns:
        The ratio of the two lower bounds; 1 where all paths want the same clock.
    """
    return check_table(table).lower_bound("feedback") / table.lower_bound("open_loop")


def check_table(table: StiffnessTable) -> StiffnessTable:
    """Raise a ``TypeError`` for something else than a table."""
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
