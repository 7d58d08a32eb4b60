"""What the figures share beside their style: axes, ticks, labels, the legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
)
from torch import Tensor

from ..flow.processes import Process
from .style import INK, PANEL

Array: TypeAlias = Sequence[Any] | np.ndarray | Tensor
"""What a figure accepts: tensors on any device, arrays, nested lists of numbers."""


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """One legend for the figure, under it, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, len(labels))
    )


def number(value: float) -> str:
    """A tick label: plain between 0.001 and 9999, a power of ten outside."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}"
    exponent = int(np.floor(np.log10(abs(value)) + 1e-9))
    mantissa = value / 10.0**exponent
    power = f"10^{{{exponent}}}"
    if abs(mantissa - 1) < 1e-6:
        return f"${power}$"
    return rf"${mantissa:.3g} \times {power}$"


def log_time_axis(axes: Axes, t_max: float, t_low: float, *, zero: bool) -> float:
    """Make x a log time axis in the direction of sampling, with 0 behind a break.

    Args:
        axes: The axes.
        t_max: Largest time, at the left.
        t_low: Smallest positive time.
        zero: Whether 0 gets a place of its own at the right.

    Returns:
        The coordinate at which 0 is drawn, or ``t_low`` if it is not.
    """
    span = np.log10(t_max / t_low)
    t_zero = float(t_low * 10 ** (-0.15 * span)) if zero else t_low
    axes.set_xscale("log")
    margin = 10 ** (0.035 * span)
    axes.set_xlim(t_max * margin, t_zero / margin)
    decades = 10.0 ** np.arange(np.ceil(np.log10(t_low)), np.floor(np.log10(t_max)) + 1)
    ends = [t_max, t_low]
    # A decade that would run into an end's label is left to the eye.
    inner = [
        d for d in decades if min(abs(np.log10(d / e)) for e in ends) > 0.11 * span
    ]
    if len(inner) > 5:
        inner = inner[:: len(inner) // 4]
    labels = {value: number(float(f"{value:.3g}")) for value in [*ends, *inner]}
    if zero:
        labels[t_zero] = "0"
        _break(axes, (t_low * t_zero) ** 0.5)
    axes.xaxis.set_major_locator(FixedLocator(list(labels)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _nearest(labels, x)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    return t_zero


def _nearest(labels: Mapping[float, str], x: float) -> str:
    return labels[min(labels, key=lambda value: abs(np.log(value / x)))]


def _break(axes: Axes, x: float) -> None:
    """Two strokes across the bottom axis, which is interrupted between them."""
    transform = axes.get_xaxis_transform()
    keywords: dict[str, Any] = {
        "transform": transform,
        "linestyle": "none",
        "clip_on": False,
    }
    axes.plot([x], [0], marker="s", ms=6, mec=PANEL, mfc=PANEL, zorder=9, **keywords)
    slash = [(-0.7, -1.0), (0.1, 1.0)], [(-0.1, -1.0), (0.7, 1.0)]
    for stroke in slash:
        axes.plot([x], [0], marker=stroke, ms=11, mec=INK, zorder=10, **keywords)


def time_label(process: Process) -> str:
    """Axis label of a process's time, with its unit."""
    if process.name == "ve":
        return r"noise level $\sigma = t$ (data units)"
    return "time t (dimensionless)"


def log_values(axes: Axes, limits: tuple[float, float] | None = None) -> None:
    """A log y axis with a label every decade, every few, or at 1, 2, 5.

    Args:
        axes: The axes, their data drawn.
        limits: Smallest and largest value to show; by default those of the data.
    """
    axes.set_yscale("log")
    low, high = limits or axes.get_ylim()
    # Less than a decade would leave no or one label.
    middle = (low * high) ** 0.5
    low, high = min(low, middle / 10**0.5), max(high, middle * 10**0.5)
    axes.set_ylim(low, high)
    subs = (1.0,) if high / low > 30 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def one_process(processes: Sequence[Process], name: str) -> Process:
    """The process that all share, whose times one axis can then show.

    Raises:
        ValueError: If two differ.
    """
    for other in processes[1:]:
        if other != processes[0]:
            raise ValueError(
                f"{name}: expected one process, got {processes[0]} and {other}; their "
                "times are not comparable, draw a figure for each"
            )
    return processes[0]


def finite_array(values: Array, name: str) -> np.ndarray:
    """Tensor, array or nested list as a float64 array.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: holds NaN or infinite values; check the solver")
    return array
