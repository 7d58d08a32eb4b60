"""From the clocks that ART-RL learned, one per trajectory, to one schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._rl_options import TrainingError
from .processes import Process
from .schedules import Schedule, from_time_change


def mean_schedule(process: Process, clocks: Tensor, notes: dict[str, Any]) -> Schedule:
    """The mean clock over the trajectories.

    Knots are the K + 1 mean times; between them the schedule is a monotone cubic.

    Args:
        process: Whose times these are.
        clocks: float64 [n, K + 1]: process times of each trajectory at even readings.
        notes: For the provenance.

    Raises:
        TrainingError: If the mean clock is not strictly monotone.
    """
    times = clocks.mean(0)
    # The ends are known, and interpolation left round-off there; with the multiplier
    # this is the jump that closes what it left open.
    times[0], times[-1] = process.t_max, process.t_min
    if not bool((times[1:] < times[:-1]).all()):
        raise TrainingError(
            "distill: the mean clock stands still or runs backwards; train longer, or "
            "use constraint='hard'"
        )
    clock = torch.linspace(0, 1, len(times), dtype=torch.float64)
    return from_time_change(
        process,
        clock * (process.t_max - process.t_min),
        times,
        name="ART-RL",
        provenance={"method": "ART-RL", **notes},
    )
