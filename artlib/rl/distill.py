"""From the clocks that ART-RL learned, one per trajectory, to one schedule."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .._common.errors import TrainingError
from ..flow.processes import Process
from ..schedules.constructors import Schedule, from_time_change

Close = Literal["normalise", "jump"]
"""What is done about a mean clock that does not end at t_min."""


def mean_schedule(
    process: Process, clocks: Tensor, close: Close, notes: dict[str, Any]
) -> Schedule:
    """The mean clock over the trajectories.

    Knots are the K + 1 mean times; between them the schedule is a monotone cubic.

    Args:
        process: Whose times these are.
        clocks: float64 [n, K + 1]: process times of each trajectory at even readings.
        close: See `artlib.ActorCritic.distill`.
        notes: For the provenance.

    Raises:
        TrainingError: If the mean clock is not strictly monotone.
        ValueError: If there is no such way to close a clock.
    """
    if not isinstance(close, str) or close not in get_args(Close):
        raise ValueError(f"close: expected one of {get_args(Close)}, got {close!r}")
    times = clocks.mean(0)
    left_open = float(times[-1]) > process.t_min * (1 + 1e-9)
    if close == "normalise" and left_open:
        walked = times[0] - times
        if not bool(walked[-1] > 0):
            raise TrainingError(
                "distill: the mean clock stands still; train longer, or use "
                "constraint='hard'"
            )
        times = process.t_max - (process.t_max - process.t_min) * walked / walked[-1]
    # The ends are known, and interpolation left round-off there; to "jump" is to close
    # here, within the last step, what the clock left open.
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
