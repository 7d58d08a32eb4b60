"""Figures of measurements: |Q| over time, error against NFE; see `plotting`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter
from torch import Tensor

from ..control.closed_form import StiffnessTable
from .axes import (
    Array,
    legend_below,
    log_time_axis,
    log_values,
    number,
    one_process,
    time_label,
)
from .style import DOTTED, INK, SOFT, Look, Panel, looks, style


def plot_stiffness(
    table: StiffnessTable | Mapping[str, StiffnessTable],
    *,
    quantiles: tuple[float, float] = (0.1, 0.9),
    decades: float = 10.0,
) -> Figure:
    r"""What a step costs where: :math:`\lvert Q\rvert` of eq. (8) over time.

    Args:
        table: A `StiffnessTable`, or a dict label -> table to compare models.
        quantiles: Lower and upper quantile over the trajectories of the band.
        decades: At most so many decades below the largest mean are shown; real
            :math:`\lvert Q\rvert` underflows to 0, which has no place on a log axis.

    Returns:
        The figure: mean and band over trajectories, both axes log.

    Raises:
        ValueError: If there is no table, the tables differ in process, the quantiles
            are not ordered in [0, 1], or every value is 0.
    """
    tables = table if isinstance(table, Mapping) else {"mean": table}
    low, high = quantiles
    if not tables:
        raise ValueError("table: got an empty dict; pass at least one StiffnessTable")
    if not 0 <= low < high <= 1:
        raise ValueError(f"quantiles: expected 0 <= low < high <= 1, got {quantiles}")
    process = one_process([t.process for t in tables.values()], "table")
    top = max(float(t.mean().max()) for t in tables.values())
    if top == 0:
        raise ValueError("table: |Q| is 0 everywhere; there is nothing to draw")
    floor = top * 10.0**-decades
    # A single table is no schedule: it is drawn in ink.
    single = Look("mean over trajectories", INK, "", "solid", width=2.2)
    table_looks = looks(tables) if isinstance(table, Mapping) else [single]
    with style():
        figure = Panel(3.6 + 0.22 * (1 + len(tables) // 2))
        axes = figure.subplots()
        shown: list[np.ndarray] = []
        label: str | None = f"{100 * low:g} to {100 * high:g} % of trajectories"
        for look, entry in zip(table_looks, tables.values(), strict=True):
            times = entry.times.cpu().numpy()
            mean = entry.mean().cpu().numpy()
            ends = torch.tensor(quantiles, dtype=entry.values.dtype)
            band = entry.values.cpu().quantile(ends, dim=0).numpy()
            axes.plot(
                times,
                np.where(mean > 0, mean, np.nan),
                label=look.label,
                markevery=max(times.size // 8, 1),
                **look.line(),
            )
            axes.fill_between(
                times,
                *np.maximum(band, floor / 10),
                color=look.color,
                alpha=0.2,
                linewidth=0,
                label=label,
            )
            label = None
            shown += [mean, band[0], band[1]]
        seen = np.concatenate(shown)
        log_values(axes, (float(seen[seen > floor].min()) / 2, float(seen.max()) * 2))
        log_time_axis(axes, process.t_max, process.t_min, zero=False)
        axes.grid()
        axes.set_xlabel(time_label(process) + ", sampling runs to the right")
        axes.set_ylabel(r"stiffness $|Q|$ (data unit / time unit$^2$)")
        legend_below(figure, axes)
    return figure


def plot_error(
    results: Mapping[str, tuple[Array, Array]],
    *,
    ylabel: str = "error (data units)",
    floors: float | Mapping[str, float] | None = None,
) -> Figure:
    """Error against the number of network evaluations, both axes log.

    Args:
        results: Label -> (nfe [n], errors [seeds, n] or [n]); errors > 0.
        ylabel: Label of the y axis, with the unit.
        floors: Levels below which no schedule can come (Monte Carlo noise, the error
            of the reference): a number, or a dict label -> number.

    Returns:
        The figure: mean over seeds, and a band from the least to the largest seed.

    Raises:
        ValueError: If there is no result, shapes do not fit, or a number is not
            finite and positive.
    """
    if not results:
        raise ValueError("results: got an empty dict; expected label -> (nfe, errors)")
    levels = floors if isinstance(floors, Mapping) else {"floor": floors}
    with style():
        figure = Panel(3.5 + 0.22 * ((len(results) + 1) // 2))
        axes = figure.subplots()
        seen: set[float] = set()
        for look, (name, (counts, errors)) in zip(
            looks(results), results.items(), strict=True
        ):
            x, y = _error_curve(counts, errors, f"results[{name!r}]")
            seen.update(x.tolist())
            if y.shape[0] > 1:
                axes.fill_between(
                    x, y.min(0), y.max(0), color=look.color, alpha=0.2, linewidth=0
                )
            axes.plot(x, y.mean(0), label=look.label, **look.line())
        for name, level in levels.items():
            if level is not None:
                value = float(_positive([level], f"floors[{name!r}]")[0])
                axes.axhline(value, color=SOFT, linestyle=DOTTED, zorder=1)
                axes.annotate(
                    f"{name} {number(float(f'{value:.2g}'))}",
                    (0.0, value),
                    xycoords=axes.get_yaxis_transform(),
                    xytext=(4, 2),
                    textcoords="offset points",
                    color=SOFT,
                    va="bottom",
                )
        axes.set_xscale("log")
        ticks = _spaced(sorted(seen))
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", length=0)
        log_values(axes)
        axes.grid()
        axes.set_xlabel("NFE")
        axes.set_ylabel(ylabel)
        legend_below(figure, axes)
    return figure


def _error_curve(
    counts: Array, errors: Array, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """NFE [n] and errors [seeds, n], checked."""
    x = _positive(counts, f"{name}, nfe")
    y = np.atleast_2d(_positive(errors, f"{name}, errors"))
    if x.ndim != 1 or y.ndim != 2 or y.shape[1:] != x.shape:
        raise ValueError(
            f"{name}: expected nfe [n] and errors [seeds, n], got shapes {x.shape} and "
            f"{y.shape}"
        )
    return x, y


def _positive(values: Array, name: str) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(f"{name}: expected finite positive numbers, got {array}")
    return array


def _spaced(values: Sequence[float]) -> list[float]:
    """Those values that leave room for their labels on a log axis."""
    gap = 0.08 * np.log(values[-1] / values[0]) if len(values) > 1 else 0.0
    kept = [values[0]]
    for value in values[1:]:
        if np.log(value / kept[-1]) >= gap:
            kept.append(value)
    return kept
