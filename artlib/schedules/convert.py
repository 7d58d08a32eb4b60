r"""A schedule carried from one process to another by its noise levels.

A network knows one thing about time: the noise level :math:`\sigma/\alpha`. In another
process the same levels are reached at other times, so a schedule can be carried over,
step by step. It need not be the best one there: the solver steps in another time and
leaves other errors.
"""

from __future__ import annotations

import torch

from .._common.checks import got
from ..flow.processes import Process, check_process
from .constructors import Schedule, from_time_change

_KNOTS = 1025


def convert(schedule: Schedule, process: Process) -> Schedule:
    r"""The schedule that visits the same noise levels in another process (ours).

    Where the ranges of the two processes differ, levels outside of the new range are
    left out, and the schedule runs from its ``t_max`` to its ``t_min``.

    Args:
        schedule: With last step ``"free"`` or ``"pinned"``.
        process: Where it is to be used.

    Returns:
        A `Schedule` of ``process``.

    Raises:
        TypeError: If ``schedule`` is no schedule or ``process`` no process.
        ValueError: If the ranges have hardly a level in common, or the schedule goes
            to 0 by itself (``uniform``), where the noise level is 0.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule: expected a Schedule, got {got(schedule)}; "
            "from_grid(process, grid) makes one from a list of times"
        )
    check_process(process)
    if schedule.last_step == "zero":
        raise ValueError(
            "schedule: it goes to t = 0 by itself and has no last noise level to "
            "carry; use resample and from_grid, or make it anew in the other process"
        )
    clock = torch.linspace(
        0, schedule.horizon, _KNOTS, dtype=torch.float64, device="cpu"
    )
    level = schedule.process.noise_level(schedule.time(clock))
    low, high = (process.noise_level(t) for t in (process.t_min, process.t_max))
    # A margin, so that no knot falls on an end that is set below.
    margin = 1 + 1e-9
    inside = (level > low * margin) & (level < high / margin)
    inside[0] = inside[-1] = False
    times = process.inverse_noise_level(level[inside])
    if len(times) < _KNOTS // 10:
        raise ValueError(
            f"process: its noise levels {float(low):.3g} ... {float(high):.3g} have "
            f"too little in common with {float(level[-1]):.3g} ... "
            f"{float(level[0]):.3g} of the schedule; give it a range that fits"
        )
    horizon = process.t_max - process.t_min
    first, last = (times.new_tensor([t]) for t in (process.t_max, process.t_min))
    start, end = times.new_zeros(1), times.new_tensor([horizon])
    return from_time_change(
        process,
        torch.cat([start, clock[inside] / schedule.horizon * horizon, end]),
        torch.cat([first, times, last]),
        name=schedule.name,
        last_step=schedule.last_step,
        provenance={"converted_from": schedule.process.to_dict()},
    )
