r"""Trainings of the actor-critic: run and noted down, read again, and priced.

A clock of :math:`K` steps goes through :math:`\psi_0 > \dots > \psi_K` at constant
speeds :math:`\theta_k = K (\psi_k - \psi_{k+1}) / T`, in units of the clock. It has two
prices. A recipe that takes the stiffness at the start of each step *charges*

.. math:: \sum_k |Q(\psi_k)|\, \theta_k^2\, \frac{T}{K} ,

and what the clock costs in *truth* is

.. math:: \sum_k \theta_k \int_{\psi_{k+1}}^{\psi_k} |Q|\, d\psi ,

its last step going to the end wherever the clock has stopped.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..control.stiffness import StiffnessTable
from ..flow.flow import ProbabilityFlow
from ..flow.processes import Process
from ..rl import ActorCritic, TrainingError
from ..schedules.constructors import Schedule, from_time_change


def clock_prices(table: StiffnessTable, times: Tensor) -> tuple[float, float]:
    """What clocks of K steps cost: as charged at the start of each step, and in truth.

    Args:
        table: Stiffness along N paths, in VE.
        times: Timesteps of a clock for each path [N, K + 1], falling from ``t_max``.

    Returns:
        Both in units of the open-loop bound, mean over the paths.

    Raises:
        ValueError: If there are not as many clocks as paths.
    """
    if times.ndim != 2 or len(times) != len(table.values):
        raise ValueError(
            f"times: expected a clock for each of {len(table.values)} paths, "
            f"[{len(table.values)}, K + 1], got {list(times.shape)}; "
            "expand one clock for all"
        )
    steps = times.shape[1] - 1
    level = table.fine_times.log().numpy()[::-1]
    stiff = table.fine_values.numpy()[:, ::-1]
    spent = table.cumulative(table.fine_values).numpy()[:, ::-1]
    charged, true = 0.0, 0.0
    for row, clock in enumerate(times.numpy()):
        speed = -np.diff(clock) * steps / table.span
        at_start = np.interp(np.log(clock[:-1]), level, stiff[row])
        charged += float((at_start * speed**2).sum()) * table.span / steps
        arrived = np.append(clock[:-1], table.process.t_min)
        speed = -np.diff(arrived) * steps / table.span
        passed = np.diff(np.interp(np.log(arrived), level, spent[row]))
        true += float((speed * passed).sum())
    scale = table.lower_bound() * len(times)
    return charged / scale, true / scale


def even_times(schedule: Schedule, K: int) -> Tensor:
    """Timesteps of a schedule at K + 1 even readings of its clock, both ends included.

    Unlike `Schedule.grid` it ends at ``t_min``, where the clock does.
    """
    readings = torch.linspace(0, schedule.horizon, K + 1, dtype=torch.float64)
    return schedule.time(readings)


def learned_clock(process: Process, times: Sequence[float]) -> Schedule:
    """The schedule "ART-RL" through timesteps at even readings of the clock."""
    clock = np.linspace(0, process.t_max - process.t_min, len(times))
    return from_time_change(process, clock, times, name="ART-RL")


def train_and_note(
    flow: ProbabilityFlow,
    x_T: Tensor,
    iterations: int,
    *,
    every: int = 10,
    priced: bool = False,
    clocks: int = 0,
    **options: Any,
) -> tuple[dict[str, Any], ActorCritic]:
    """Train once; what is kept of it is small enough for a file.

    Args:
        flow: The flow.
        x_T: States at ``t_max`` [n, *shape].
        iterations: Of the training.
        every: Iterations from one entry of the learning curve to the next.
        priced: Whether the mean policy is priced at each of them, see `clock_prices`.
        clocks: Of how many paths the mean policy's clock is noted, to six digits.
        options: Of `artlib.ActorCritic`.

    Returns:
        Notes, JSON-able: the learning curve, seconds of the training, evaluations, its
        first warning, the times of the distilled clock at even readings (None if the
        mean clock stands still), and clocks if asked for. And the trainer.
    """
    trainer = ActorCritic(flow, x_T, **options)
    curve, seconds = [], 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer.train(iterations)
        for now in range(1, iterations + 1):
            start = time.process_time()
            record = next(run)
            seconds += time.process_time() - start
            if now % every == 0 or now == 1:
                row = [now, record.cost, record.martingale_error, record.end_residual]
                if priced:
                    row += [record.multiplier]
                    row += clock_prices(trainer.table, trainer.clocks())
                curve.append(row)
    columns = ["iteration", "cost", "martingale_error", "end_residual"]
    columns += ["multiplier", "charged", "true"] if priced else []
    notes: dict[str, Any] = {
        "curve": {
            key: compact(column)
            for key, column in zip(columns, zip(*curve, strict=True), strict=True)
        },
        "seconds": round(seconds, 1),
        "nfe": trainer.nfe,
        "warning": str(caught[0].message).split(";")[0] if caught else "",
        "times": None,
    }
    try:
        distilled = trainer.distill()
        notes["times"] = compact(even_times(distilled, trainer.options.steps), 8)
    except TrainingError:  # the mean clock stands still
        pass
    if clocks:
        notes["clocks"] = [compact(row, 6) for row in trainer.clocks()[:clocks]]
    return notes, trainer


def compact(values: Any, digits: int = 4) -> list[float]:
    """Numbers with so many significant digits, as a file keeps them."""
    return [float(f"{float(value):.{digits}g}") for value in values]
