r"""A schedule's grid in the coordinate in which a framework counts noise.

Two are in use. With :math:`x = \alpha x_0 + \sigma\epsilon`:

| coordinate | value | used by |
| --- | --- | --- |
| ``"level"`` | :math:`\sigma / \alpha` | EDM, k-diffusion, diffusers' Euler and Heun |
| ``"flow"`` | :math:`\sigma / (\alpha + \sigma)` | flow matching |

Both are monotone in the log-SNR, so a grid made under one process names the same noise
under another: what changes is the scale of the state, not the place of the steps.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from .._common.errors import ExportError
from ..flow.processes import Process, RectifiedFlow

Coordinate: TypeAlias = Literal["level", "flow"]


@runtime_checkable
class ScheduleLike(Protocol):
    """What can be exported: `artlib.Schedule`, and whatever gives grids as it does."""

    @property
    def process(self) -> Process:
        """The process whose times the grids are."""

    def grid(self, K: int) -> Tensor:
        """Process times [K + 1] from t_max down to 0, float64."""


def own_coordinate(schedule: ScheduleLike) -> Coordinate:
    """The coordinate that samplers of a schedule's own process use."""
    return "flow" if isinstance(schedule.process, RectifiedFlow) else "level"


def noise_levels(schedule: ScheduleLike, K: int, coordinate: Coordinate) -> Tensor:
    r"""The K-step grid in a framework's coordinate.

    Args:
        schedule: Any schedule.
        K: Number of steps, at least 1.
        coordinate: ``"level"`` or ``"flow"``, see the module.

    Returns:
        float64 [K + 1], strictly descending also in float32, the last one 0.

    Raises:
        TypeError: If ``schedule`` is no schedule or ``K`` no integer.
        ValueError: If ``K`` < 1 or the coordinate is unknown.
        ExportError: If the first noise level is infinite, or two nodes are one in
            float32, which samplers count in.
    """
    known = isinstance(getattr(schedule, "process", None), Process)
    if not known or not callable(getattr(schedule, "grid", None)):
        raise TypeError(
            f"schedule: expected an artlib.Schedule, got {type(schedule).__name__}; "
            "artlib.from_grid(process, nodes) makes one of a list"
        )
    grid = schedule.grid(K)
    alpha, sigma = schedule.process.alpha(grid), schedule.process.sigma(grid)
    if coordinate == "level":
        levels = sigma / alpha
    elif coordinate == "flow":
        levels = sigma / (alpha + sigma)
    else:
        raise ValueError(f"coordinate: expected 'level' or 'flow', got {coordinate!r}")
    if not bool(torch.isfinite(levels).all()):
        raise ExportError(
            f"schedule: no signal is left at t_max = {schedule.process.t_max}, so its "
            "first noise level sigma/alpha is infinite; learn it on "
            "RectifiedFlow(t_max=0.99) or another finite range"
        )
    rounded = levels.float()
    stalled = (rounded[1:] >= rounded[:-1]).nonzero()
    if len(stalled):
        k = int(stalled[0])
        raise ExportError(
            f"K: with {K} steps nodes {k} and {k + 1} ({float(levels[k])!r}, "
            f"{float(levels[k + 1])!r}) are one number in float32; take fewer steps"
        )
    return levels
