"""Figures of schedules: clock, speed, and where the steps fall; see `plotting`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .._common.checks import as_grid, positive_int
from ..control.closed_form import StiffnessTable
from ..flow.processes import Process
from ..schedules.constructors import Schedule
from ..solvers.sample import nfe
from .axes import legend_below, log_time_axis, log_values, one_process, time_label
from .style import INK, PANEL, SOFT, Look, Panel, looks, style

Schedules: TypeAlias = Schedule | Sequence[Schedule] | Mapping[str, Schedule]
Grid: TypeAlias = Schedule | Sequence[Any] | np.ndarray | Tensor

# Points of a smooth curve, evenly spaced in the clock, and as many in log t.
_POINTS = 400


def plot_clock(
    schedules: Schedules, *, panels: Literal["both", "psi", "time"] = "both"
) -> Figure:
    r"""The clock: how far sampling has come after each share of the steps.

    K steps are K equal steps of the clock; the step of a pinned schedule from t_min to
    0 comes after it. Above, :math:`\psi / T`, the share of the diffusion time undone:
    uniform steps are a straight line. Below, the time t itself on a log axis, which
    shows what the first panel squeezes into its upper edge.

    Args:
        schedules: One schedule, a list, or a dict label -> schedule; one process.
        panels: ``"both"``, or one of them: ``"psi"`` or ``"time"``.

    Returns:
        The figure; both panels share the clock in shares of T as their x axis.

    Raises:
        ValueError: If there is no schedule, they differ in process, or ``panels`` is
            none of the three.
    """
    named = _named(schedules)
    if not isinstance(panels, str) or panels not in ("both", "psi", "time"):
        raise ValueError(f"panels: expected 'both', 'psi' or 'time', got {panels!r}")
    process = named[0][1].process
    shown = ["psi", "time"] if panels == "both" else [panels]
    with style():
        figure = Panel(0.9 + 2.3 * len(shown) + 0.22 * len(named) / 2)
        rows = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, kind in zip(rows, shown, strict=True):
            for i, (look, schedule) in enumerate(named):
                clock, t = _curve(schedule)
                y = (process.t_max - t) / (process.t_max - schedule.time_change.t_end)
                axes.plot(
                    clock / schedule.horizon,
                    y if kind == "psi" else t,
                    label=look.label,
                    markevery=_marks(clock / schedule.horizon, i, len(named)),
                    **look.line(),
                )
            if kind == "psi":
                axes.set_ylabel(r"time undone $\psi / T$")
                axes.set_ylim(-0.03, 1.04)
            else:
                axes.set_ylabel(time_label(process))
                log_values(axes)
            axes.set_xlim(-0.01, 1.01)
            axes.grid()
        rows[-1].set_xlabel("clock (share of T)")
        legend_below(figure, rows[0])
    return figure


def plot_speed(schedules: Schedules) -> Figure:
    r"""The control :math:`\theta = \psi'` of eq. (4) over the clock.

    Args:
        schedules: One schedule, a list, or a dict label -> schedule; one process.

    Returns:
        The figure: :math:`\theta` (dimensionless, log axis) over the clock in shares
        of T. 1 is the speed of uniform steps; 10 means steps ten times as long.

    Raises:
        ValueError: If there is no schedule or they differ in process.
    """
    named = _named(schedules)
    with style():
        figure = Panel(3.6 + 0.22 * len(named) / 2)
        axes = figure.subplots()
        axes.axhline(1.0, color=SOFT, linewidth=0.9, zorder=1)
        for i, (look, schedule) in enumerate(named):
            clock, _ = _curve(schedule)
            axes.plot(
                clock / schedule.horizon,
                schedule.speed(torch.from_numpy(clock)).numpy(),
                label=look.label,
                markevery=_marks(clock / schedule.horizon, i, len(named)),
                **look.line(),
            )
        log_values(axes)
        axes.set_xlim(-0.01, 1.01)
        axes.grid()
        axes.set_xlabel("clock (share of T)")
        axes.set_ylabel(r"speed $\theta = \psi'$ (uniform = 1)")
        legend_below(figure, axes)
    return figure


def plot_steps(
    schedules: Schedules | Mapping[str, Grid],
    K: int | None = None,
    *,
    solver: str = "euler",
    process: Process | None = None,
    table: StiffnessTable | None = None,
) -> Figure:
    r"""Where the steps fall: a row of ticks per schedule on a log time axis.

    The last node, 0, has no place on a log axis and stands behind a break, as a ring.
    A step from t_min to 0 (a pinned schedule) is hatched: it is a step that the
    schedule had no choice about.

    With a table, a panel above shows where steps belong: the closed form's density,
    proportional to :math:`(E|Q|)^{1/2}`, as the share of steps per decade of t. Areas
    under it are shares, as distances between ticks are below.

    Args:
        schedules: One schedule, a list, or a dict label -> schedule or grid [K + 1].
        K: Steps, for those that are schedules.
        solver: For the NFE at the right of each row, see `artlib.nfe`.
        process: Gives t_min and the axis label where only grids are passed.
        table: Stiffness of the flow, for the panel above.

    Returns:
        The figure, a row per schedule in the order given.

    Raises:
        TypeError: If ``K`` is missing while a schedule is passed.
        ValueError: If there is no schedule, they differ in process, or a grid does
            not descend strictly to 0.
    """
    if table is not None:
        process = one_process([table.process, process or table.process], "process")
    named, process = _named_grids(schedules, K, process)
    t_max = max(float(grid[0]) for _, grid in named)
    t_low = min(float(grid[-2]) for _, grid in named)
    t_low = min(t_low if process is None else process.t_min, t_low, t_max / 2)
    with style():
        height = 0.85 + 0.56 * len(named)
        if table is None:
            figure = Panel(height)
            axes = figure.subplots()
        else:
            figure = Panel(height + 1.7)
            upper, axes = figure.subplots(
                2, 1, sharex=True, height_ratios=(1.7, height - 0.6)
            )
            _share_per_decade(upper, table)
        t_zero = log_time_axis(axes, t_max, t_low, zero=True)
        for row, (look, nodes) in enumerate(named):
            y, grid = -float(row), nodes.numpy()
            last = float(grid[-2])
            pinned = process is not None and len(grid) > 2 and _is_pin(last, process)
            axes.plot([t_max, t_low], [y, y], color=SOFT, linewidth=0.8, zorder=1)
            axes.plot([t_low, t_zero], [y, y], color=SOFT, lw=0.8, ls=":", zorder=1)
            if pinned:
                axes.fill_between(
                    [last, t_zero],
                    y - 0.17,
                    y + 0.17,
                    facecolor="none",
                    edgecolor=look.color,
                    hatch="/////",
                    linewidth=0,
                    label=f"{look.label}, pinned",
                )
            common: dict[str, Any] = {"color": look.color, "linestyle": "none"}
            ticks: dict[str, Any] = {**common, "marker": "|", "ms": 15, "mew": 2.2}
            ring: dict[str, Any] = {**common, "marker": "o", "ms": 8, "mew": 2.0}
            level = np.full(len(grid) - 1, y)
            axes.plot(grid[:-1], level, label=look.label, **ticks)
            axes.plot([t_zero], [y], label=f"{look.label}, 0", mfc=PANEL, **ring)
            note = f"{len(grid) - 1} steps{' (last pinned)' if pinned else ''}"
            note += f", NFE {nfe(nodes, solver=solver)}"
            place = axes.get_yaxis_transform()
            axes.text(0, y + 0.27, look.label, weight="bold", transform=place)
            axes.text(1, y + 0.27, note, ha="right", transform=place)
        axes.set_ylim(0.55 - len(named), 0.75)
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
        label = "time t" if process is None else time_label(process)
        axes.set_xlabel(label + ", sampling runs to the right")
    return figure


def _share_per_decade(axes: Axes, table: StiffnessTable) -> None:
    r"""Share of the closed form's steps per decade: ln(10) t q(t), q their density."""
    t, q = table.fine_times.numpy(), table.fine_mean.sqrt().numpy()
    share = np.log(10) * t * q / np.trapezoid(q, -t)
    axes.fill_between(t, 100 * share, color=SOFT, alpha=0.25, linewidth=0)
    axes.plot(t, 100 * share, color=INK, linewidth=1.8)
    axes.set_ylim(0.0, None)
    axes.set_ylabel("share of steps\nper decade (%)")
    axes.tick_params(axis="x", length=0, labelbottom=False)
    axes.spines["bottom"].set_visible(False)
    axes.grid(axis="y")


def _is_pin(t: float, process: Process) -> bool:
    """Whether a last free node is t_min, up to round-off."""
    return t <= process.t_min * (1 + 1e-6)


def _pairs(schedules: Schedules | Mapping[str, Grid]) -> list[tuple[str, Grid]]:
    """Names and schedules or grids, in the order given; names may repeat."""
    if isinstance(schedules, Mapping):
        pairs: list[tuple[str, Grid]] = list(schedules.items())
    else:
        found = [schedules] if isinstance(schedules, Schedule) else list(schedules)
        for entry in found:
            if not isinstance(entry, Schedule):
                raise TypeError(
                    "schedules: expected Schedule objects in the list, got "
                    f"{type(entry).__name__}; make one with artlib.from_grid"
                )
        pairs = [(schedule.name, schedule) for schedule in found]
    if not pairs:
        raise ValueError("schedules: got none; pass at least one Schedule")
    return pairs


def _named(schedules: Schedules) -> list[tuple[Look, Schedule]]:
    """Schedules with their looks."""
    found: list[Schedule] = []
    for name, entry in (pairs := _pairs(schedules)):
        if not isinstance(entry, Schedule):
            raise TypeError(
                f"schedules[{name!r}]: expected a Schedule, got "
                f"{type(entry).__name__}; make one with artlib.from_grid"
            )
        found.append(entry)
    one_process([schedule.process for schedule in found], "schedules")
    return list(zip(looks(name for name, _ in pairs), found, strict=True))


def _named_grids(
    schedules: Schedules | Mapping[str, Grid], K: int | None, process: Process | None
) -> tuple[list[tuple[Look, Tensor]], Process | None]:
    """Grids with their looks, and the process that they share, if one is known."""
    pairs = _pairs(schedules)
    owners = [entry.process for _, entry in pairs if isinstance(entry, Schedule)]
    if owners or process is not None:
        process = one_process([*owners, *([process] if process else [])], "schedules")
    grids = []
    for name, entry in pairs:
        if isinstance(entry, Schedule):
            if K is None:
                raise TypeError("K: needed to lay out a Schedule; pass the step count")
            grids.append(entry.grid(positive_int(K, "K")))
        else:
            grids.append(as_grid(entry, f"schedules[{name!r}]"))
        if float(grids[-1][-1]) != 0:
            raise ValueError(
                f"schedules[{name!r}]: the last node is {float(grids[-1][-1])}, "
                "expected 0; append it"
            )
    return list(zip(looks(name for name, _ in pairs), grids, strict=True)), process


def _curve(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """Clock and time of a schedule, dense in both, from t_max to t_min."""
    process = schedule.process
    log_times = np.geomspace(process.t_max, process.t_min, _POINTS)
    log_times[[0, -1]] = process.t_max, process.t_min
    clock = schedule.clock(torch.from_numpy(log_times)).numpy()
    even = np.linspace(0.0, clock[-1], _POINTS)
    clock = np.unique(np.concatenate([clock, even]))
    return clock, schedule.time(torch.from_numpy(clock)).numpy()


def _marks(x: np.ndarray, i: int, count: int, marks: int = 5) -> list[int]:
    """Indices of markers evenly spaced in x, shifted from curve to curve."""
    places = (np.arange(marks) + (i + 0.5) / count) / marks
    return sorted({int(np.abs(x - place).argmin()) for place in places})
