"""The figure of one-dimensional paths, with the laws at both ends; see `plotting`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..flow.processes import Process
from .axes import Array, finite_array, log_time_axis, time_label
from .style import INK, PANEL, Panel, style

Density: TypeAlias = Callable[[np.ndarray], np.ndarray]

# Blue, purple, vermilion: ordered in hue and never paler than 3 : 1 on the panel.
_BY_END = LinearSegmentedColormap.from_list("by_end", ["#0b62a0", "#8b3f8f", "#b34700"])


def plot_paths(
    times: Array,
    states: Array,
    *,
    densities: tuple[Density | None, Density | None] = (None, None),
    coarse: tuple[Array, Array] | None = None,
    process: Process | None = None,
    scale: str = "linear",
    max_paths: int = 60,
    labels: tuple[str, str] = ("start", "end"),
) -> Figure:
    r"""One-dimensional trajectories over time, with the laws at both ends.

    Paths take their colour from where they end, so that the eye can follow them; the
    paths of an ODE in one dimension never cross.

    Args:
        times: Times [n], descending.
        states: States [n, N] or [n, N, 1] at those times, in data units.
        densities: Exact densities at the first and at the last time, functions of an
            array of x in 1 / data unit; None leaves the histogram alone.
        coarse: Times [K + 1] and states [K + 1, M] or [K + 1, M, 1] of a coarse solver,
            drawn over the paths as straight steps between nodes.
        process: For the label of the time axis.
        scale: ``"linear"`` or ``"log"``; on a log time axis 0 stands behind a break.
        max_paths: At most so many paths are drawn, evenly chosen by where they end; the
            histograms use all.
        labels: Titles of the two side panels.

    Returns:
        The figure: law at the first time, paths, law at the last time, sharing x.

    Raises:
        ValueError: If shapes do not fit, times do not descend, or a value is not
            finite.
    """
    t, x = _paths(times, states, "times", "states")
    if not isinstance(scale, str) or scale not in ("linear", "log"):
        raise ValueError(f"scale: expected 'linear' or 'log', got {scale!r}")
    order = np.argsort(x[-1])
    count = min(max_paths, order.size)
    drawn = order[((np.arange(count) + 0.5) / count * order.size).astype(int)]
    with style():
        figure = Panel(3.6)
        left, middle, right = figure.subplots(
            1, 3, sharey=True, width_ratios=(1.0, 4.6, 1.0)
        )
        place = _time_axis(middle, t, scale)
        rank = np.empty(order.size)
        rank[order] = np.linspace(0, 1, order.size)
        segments = [np.column_stack([place(t), x[:, i]]) for i in drawn]
        lines = LineCollection(
            segments, colors=_BY_END(rank[drawn]), linewidths=0.9, alpha=0.75
        )
        middle.add_collection(lines)
        if coarse is not None:
            nodes, at_nodes = _paths(*coarse, "coarse[0]", "coarse[1]")
            middle.plot(
                place(nodes),
                at_nodes,
                color=INK,
                marker="o",
                ms=6.5,
                mec=PANEL,
                linewidth=1.5,
            )
        # A few outliers must not flatten everything else.
        seen = np.concatenate([x[:, drawn].ravel(), np.quantile(x, (0.002, 0.998))])
        margin = 0.04 * float(np.ptp(seen)) or 1.0
        middle.set_ylim(seen.min() - margin, seen.max() + margin)
        middle.grid()
        middle.set_xlabel("time t" if process is None else time_label(process))
        left.set_ylabel("state x (data units)")
        for axes, end, density, label in (
            (left, x[0], densities[0], labels[0]),
            (right, x[-1], densities[1], labels[1]),
        ):
            _law(axes, end, density, middle.get_ylim())
            axes.set_title(label, weight="normal", loc="center")
        # The time axis lies between the two laws: each stands on its own end of it.
        left.invert_xaxis()
        left.spines["left"].set_visible(False)
        left.spines["right"].set_visible(True)
        middle.spines["left"].set_visible(False)
        for axes in (left, middle, right):
            axes.tick_params(axis="y", length=0)
    return figure


def _paths(
    times: Array, states: Array, times_name: str, states_name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Times [n] and states [n, N], checked."""
    t, x = finite_array(times, times_name), finite_array(states, states_name)
    if x.ndim == 3 and x.shape[2] == 1:
        x = x[:, :, 0]
    if t.ndim != 1 or t.size < 2 or x.ndim != 2 or x.shape[0] != t.size or not x.size:
        raise ValueError(
            f"{states_name}: expected {times_name} [n] and {states_name} [n, N] or "
            f"[n, N, 1] with n >= 2, got shapes {t.shape} and {x.shape}"
        )
    if not (np.diff(t) < 0).all() or t[-1] < 0:
        raise ValueError(f"{times_name}: expected times descending to 0 or above")
    return t, x


def _time_axis(
    axes: Axes, t: np.ndarray, scale: str
) -> Callable[[np.ndarray], np.ndarray]:
    """Set up the time axis and return the map from times to coordinates."""
    if scale == "linear":
        pad = 0.03 * (t[0] - t[-1])
        axes.set_xlim(t[0] + pad, t[-1] - pad)
        return lambda values: values
    positive = t[t > 0]
    t_zero = log_time_axis(axes, t[0], positive[-1], zero=bool(t[-1] == 0))
    return lambda values: np.where(values > 0, values, t_zero)


def _law(
    axes: Axes, x: np.ndarray, density: Density | None, limits: tuple[float, float]
) -> None:
    """Histogram of a state and its exact density, sideways."""
    bins = int(np.clip(np.sqrt(x.size), 8, 60))
    axes.hist(
        x,
        bins=bins,
        density=True,
        orientation="horizontal",
        histtype="stepfilled",
        color="#c4bcaa",
    )
    if density is not None:
        y = np.linspace(*limits, 400)
        axes.plot(density(y), y, color=INK, linewidth=1.6)
    axes.set_xticks([])
    axes.set_xlabel("density")
    axes.spines["bottom"].set_visible(False)
