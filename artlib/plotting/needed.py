"""The figure of evaluations at equal quality; see `plotting`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from .axes import legend_below, number
from .style import DOTTED, SOFT, Panel, looks, style

_TICKS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 50, 80, 100, 150, 200, 300, 500)
_ROOM = 1.35  # factor from the largest number to the edge, where the arrows are


def plot_needed(
    needed: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    goals: Mapping[str, float] | None = None,
) -> Figure:
    """Evaluations that each row takes to reach goals, with their intervals.

    Args:
        needed: Row -> goal -> (evaluations, low, high), as `artlib.nfe_needed` gives
            them. Evaluations of NaN are of a row that does not come down to the goal:
            an arrow at the right edge, with the lower end of its interval if that is
            finite. An upper end that is infinite is drawn to the edge.
        goals: Goal -> evaluations that it takes itself, drawn as a dotted line in the
            goal's colour.

    Returns:
        The figure: a line of the picture a row, NFE to the right on a log axis.

    Raises:
        ValueError: If there is no row or no goal, rows differ in their goals, or a
            number is not positive.
    """
    names = list(next(iter(needed.values()), {}))
    if not names:
        raise ValueError("needed: expected row -> goal -> (evaluations, low, high)")
    for row, found in needed.items():
        if set(found) != set(names):
            raise ValueError(
                f"needed[{row!r}]: expected the goals {names}, got {list(found)}"
            )
        for goal, triple in found.items():
            if len(triple) != 3 or any(v <= 0 for v in triple):
                raise ValueError(
                    f"needed[{row!r}][{goal!r}]: expected three positive numbers, got "
                    f"{tuple(triple)}"
                )
    own = {goal: float(v) for goal, v in (goals or {}).items()}
    if unknown := [goal for goal in own if goal not in names]:
        raise ValueError(f"goals: expected some of {names}, got {unknown}")
    finite = [float(v) for found in needed.values() for t in found.values() for v in t]
    finite = [v for v in [*finite, *own.values()] if math.isfinite(v)]
    edge = _ROOM * max(finite, default=10.0)
    left = min(finite, default=1.0) / 1.15
    # Goals are no schedules: names that some schedule has must not lend their look.
    goal_looks = looks([f"goal: {name}" for name in names])
    with style():
        figure = Panel(1.4 + 0.34 * len(needed) + 0.22 * ((len(names) + 1) // 2))
        axes = figure.subplots()
        for i, (name, look) in enumerate(zip(names, goal_looks, strict=True)):
            shift = 0.22 * (i - (len(names) - 1) / 2)
            places = np.arange(len(needed)) + shift
            values = [found[name] for found in needed.values()]
            for y, (value, low, high) in zip(places, values, strict=True):
                start = low if math.isfinite(low) else edge
                end = high if math.isfinite(high) else edge
                axes.plot([start, end], [y, y], color=look.color, linewidth=1.6)
                if not (math.isfinite(high) and math.isfinite(value)):
                    axes.plot([edge], [y], color=look.color, marker=">", clip_on=False)
            axes.plot(
                [v[0] for v in values],
                places,
                label=name,
                zorder=3,
                **{**look.dot(), "marker": "os^Dv"[i % 5]},
            )
            if name in own:
                axes.axvline(own[name], color=look.color, linestyle=DOTTED, zorder=1)
        axes.set_xscale("log")
        axes.set_xlim(left, edge)
        axes.set_ylim(len(needed) - 0.5, -0.5)
        axes.set_yticks(range(len(needed)), list(needed))
        inside = [t for t in _TICKS if left <= t <= edge]
        axes.xaxis.set_major_locator(FixedLocator(inside))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: number(float(value)))
        )
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", length=0)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.axvline(edge, color=SOFT, linewidth=0.9, zorder=0)
        axes.set_xlabel("NFE for the same error; an arrow: not reached")
        legend_below(figure, axes)
    return figure
