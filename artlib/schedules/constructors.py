r"""Schedules: the clock that says where a sampler puts its steps.

A schedule is a strictly decreasing time change :math:`t(c)` of the clock
:math:`c \in [0, T]`, with :math:`t(0) = t_{max}`. In the paper's symbols

.. math::
    \psi(c) = t_{max} - t(c), \qquad \theta(c) = \psi'(c), \qquad
    \int_0^T \theta\, dc = T \quad (4), (6),

and K steps are K equal steps of the clock. The density of steps per unit time,
normalised to one, is :math:`1 / (T \theta)`.

The last step of a grid goes to t = 0, in one of three ways:

| last step | nodes of K steps |
| --- | --- |
| ``"free"`` | K + 1 nodes of the time change on [t_min, t_max], the last set to 0 |
| ``"pinned"`` | K nodes from t_max down to t_min, then 0, as EDM publishes it |
| ``"zero"`` | the time change itself ends at 0 (uniform) |

References:
    Huang, Tang, Zhou, https://arxiv.org/abs/2607.02137, eqs. (4)-(6). The names of
    the last step are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .._common.checks import as_grid, finite_float, got, positive_int, real_tensor
from .._common.errors import ExportError, ScheduleFormatError
from ..flow.processes import Process, check_process
from .schedule import (
    LastStep,
    Schedule,
    describe_origin,
    end_of_range,
    through_nodes,
)
from .table import Interpolation, Table, quantiles, uniform_clock
from .time_change import ROUND_OFF, BetaQuantiles, Formula, Linear, NoiseWarp

__all__ = [
    "ExportError",
    "Schedule",
    "ScheduleFormatError",
    "beta",
    "edm",
    "from_density",
    "from_grid",
    "from_time_change",
    "kl_optimal",
    "log_snr",
    "uniform",
]

Values: TypeAlias = Sequence[float] | np.ndarray | Tensor


def uniform(process: Process) -> Schedule:
    """Equal steps of the process's own time from t_max to 0.

    ``grid(K)`` is ``linspace(t_max, 0, K + 1)``; the paper's Uniform, speed 1.
    """
    return Schedule(
        process, Linear(process), "zero", "uniform", describe_origin("uniform()")
    )


def edm(process: Process, rho: float = 7.0, *, pinned: bool = True) -> Schedule:
    r"""The schedule of Karras et al., uniform in :math:`s^{1/\rho}`.

    .. math::
        s_i = \Bigl( s_{max}^{1/\rho} + \tfrac{i}{N-1}
        \bigl( s_{min}^{1/\rho} - s_{max}^{1/\rho} \bigr) \Bigr)^{\rho}

    in the noise level :math:`s = \sigma/\alpha`, mapped back to time. Where the noise
    level at t_max is infinite (`RectifiedFlow`), it starts at its value at
    t_max - t_min (999 by default) and times are stretched by a per mille to end at
    t_max exactly.

    Args:
        process: Gives the range; for `VE` s is t itself.
        rho: Exponent, positive; 1 is linear in s, infinity is `log_snr`.
        pinned: As published: N = K nodes down to t_min, then 0. Otherwise N = K + 1
            and the last node is replaced by 0.

    Raises:
        ValueError: If ``rho`` is not positive and finite.

    References:
        Karras et al., https://arxiv.org/abs/2206.00364, eq. (5).
    """
    rho = finite_float(rho, "rho", positive=True)
    return _formula(
        NoiseWarp(process, "power", rho), "edm", pinned, True, f"rho={rho!r}"
    )


def log_snr(process: Process, *, pinned: bool = True) -> Schedule:
    """Uniform in the log signal-to-noise ratio, as in DPM-Solver.

    Geometric in sigma for `VE`. An infinite noise level is treated as in `edm`.

    Args:
        process: Gives the range.
        pinned: K nodes down to t_min, then 0; otherwise K + 1, the last replaced by 0.

    References:
        Lu et al., https://arxiv.org/abs/2206.00927, Section 3.
    """
    return _formula(NoiseWarp(process, "log"), "log_snr", pinned, True)


def kl_optimal(process: Process, *, pinned: bool = False) -> Schedule:
    r"""The arctan schedule, optimal in KL for Gaussian data of unit variance.

    :math:`s = \tan( u \arctan s_{min} + (1 - u) \arctan s_{max} )` in the noise
    level; its density is proportional to :math:`1 / (1 + s^2)`. An infinite noise
    level is treated as in `edm`.

    Args:
        process: Gives the range.
        pinned: K nodes down to t_min, then 0; otherwise K + 1, the last replaced by 0.

    References:
        Sabour, Fidler, Kreis, https://arxiv.org/abs/2404.14507, Section 3.
    """
    return _formula(NoiseWarp(process, "arctan"), "kl_optimal", pinned, False)


def beta(
    process: Process, a: float = 0.6, b: float = 0.6, *, pinned: bool = False
) -> Schedule:
    """Times at the quantiles of a Beta(a, b) law on [t_min, t_max].

    With a, b < 1 steps gather at both ends. Meant for processes whose own time is of
    order one (`VP`, `RectifiedFlow`); on `VE` time is sigma itself.

    Args:
        process: Gives the range.
        a: Exponent at t_min, positive.
        b: Exponent at t_max, positive; a = b = 1 is linear.
        pinned: K nodes down to t_min, then 0; otherwise K + 1, the last replaced by 0.

    Raises:
        ValueError: If ``a`` or ``b`` is not positive and finite.

    References:
        Lee et al., Beta Sampling is All You Need, https://arxiv.org/abs/2407.12173.
    """
    a, b = (finite_float(v, n, positive=True) for v, n in ((a, "a"), (b, "b")))
    change = BetaQuantiles(process, a, b)
    return _formula(change, "beta", pinned, False, f"a={a!r}, b={b!r}")


def from_time_change(
    process: Process,
    clock: Values,
    times: Values,
    *,
    name: str = "table",
    interpolation: Interpolation = "pchip",
    last_step: LastStep = "free",
    provenance: dict[str, Any] | None = None,
) -> Schedule:
    """A schedule through given knots of the time change.

    Args:
        process: Gives the range.
        clock: [n] readings increasing from 0 to T = t_max - t_end.
        times: [n] times decreasing strictly from t_max to t_end, which is t_min, or
            0 if ``last_step`` is ``"zero"``.
        name: A label.
        interpolation: Between knots: ``"pchip"`` (monotone cubic in t), ``"linear"``
            or ``"log-linear"``.
        last_step: See the module.
        provenance: More about how it was made; JSON-able.

    Raises:
        ValueError: If the knots are not finite, not strictly monotone (the message
            says where) or do not start and end where they should.
    """
    t_max, t_end = check_process(process).t_max, end_of_range(process, last_step)
    times_array = _values(times, "times")
    clock_array = _values(clock, "clock")
    horizon = t_max - t_end
    _snap(times_array, 0, t_max, t_max, "times", "t_max")
    _snap(times_array, -1, t_end, t_end or t_max, "times", "the end of the range")
    _snap(clock_array, 0, 0.0, horizon, "clock", "its start")
    _snap(clock_array, -1, horizon, horizon, "clock", "T")
    made_by = f"from_time_change({len(times_array)} knots, {interpolation!r})"
    table = Table(
        tuple(clock_array.tolist()), tuple(times_array.tolist()), interpolation
    )
    return Schedule(
        process, table, last_step, name, describe_origin(made_by, provenance)
    )


def from_density(
    process: Process,
    times: Values,
    density: Values,
    *,
    name: str = "density",
    provenance: dict[str, Any] | None = None,
    floor: float = 1e-6,
    knots: int = 513,
) -> Schedule:
    r"""The schedule whose steps have a given density in time.

    .. math::
        c(t) = T \frac{\int_t^{t_{max}} q}{\int_{t_{min}}^{t_{max}} q}, \qquad
        q = \max(\text{density}, \text{floor} \cdot \text{mean})

    The density is interpolated between the given times by PCHIP in t, integrated
    exactly, and t stored at evenly spaced readings of the clock. On 64 log-spaced
    times over [0.002, 80] the nodes of a smooth power law are good to 3e-4 relative.

    Args:
        process: Gives the range.
        times: [n] times descending from t_max to t_min, n >= 2.
        density: [n] steps per unit time, in any unit; finite, >= 0, not all 0.
        name: A label.
        provenance: More about how it was made; JSON-able.
        floor: Smallest density, relative to the mean over time. Where the density
            vanishes, it keeps the time change strictly monotone; the share of steps
            that it diverts is at most ``floor``.
        knots: Number of stored knots, at least 2.

    Raises:
        ValueError: If times or density do not fit this description; the message says
            which value does not.
    """
    check_process(process)
    floor = finite_float(floor, "floor", positive=True)
    knots = positive_int(knots, "knots", minimum=2)
    descending = as_grid(times, "times")
    t, q = descending.numpy().copy(), _values(density, "density")
    if t.shape != q.shape:
        raise ValueError(
            f"density: expected one value per time, got {q.size} for {t.size} times"
        )
    if (q < 0).any():
        k = int(np.argmax(q < 0))
        raise ValueError(f"density: value {k} is {float(q[k])}, expected >= 0")
    if q.max() == 0:
        raise ValueError("density: zero everywhere; pass ones for equal steps")
    _snap(t, 0, process.t_max, process.t_max, "times", "t_max")
    _snap(t, -1, process.t_min, process.t_min, "times", "t_min")
    t, q = t[::-1], q[::-1] / q.max()
    span = process.t_max - process.t_min
    mean = float(np.sum((q[1:] + q[:-1]) * np.diff(t))) / (2 * span)
    clock = uniform_clock(span, knots)
    remaining = 1 - np.array(clock[1:-1]) / span
    inner = quantiles(t, np.maximum(q, floor * mean), remaining)
    table = Table(clock, (float(t[-1]), *inner.tolist(), float(t[0])))
    made_by = f"from_density({t.size} times, floor={floor!r}, knots={knots})"
    return Schedule(process, table, "free", name, describe_origin(made_by, provenance))


def from_grid(
    process: Process,
    grid: Values,
    *,
    interpolation: Interpolation = "pchip",
    name: str = "grid",
    provenance: dict[str, Any] | None = None,
) -> Schedule:
    """The schedule that passes through a plain list of timesteps.

    Its ``grid(K)`` at the list's own K is the list. If the second last node is t_min
    the last step is taken as pinned, otherwise as free.

    Args:
        process: Gives the range.
        grid: [K + 1] times descending from t_max to 0.
        interpolation: ``"pchip"`` (monotone cubic in t), ``"linear"``, or
            ``"log-linear"`` (straight in log t: the paper's resampling).
        name: A label.
        provenance: More about how it was made; JSON-able.

    Raises:
        ValueError: If the list does not run from t_max to 0, or its second last node
            is below t_min.
    """
    check_process(process)
    nodes = as_grid(grid, "grid").clone()
    values = nodes.numpy()
    _snap(values, 0, process.t_max, process.t_max, "grid", "t_max")
    if values[-1] != 0:
        raise ValueError(
            f"grid: the last node is {float(values[-1])}, expected 0.0; append it "
            "(sampling ends at clean data)"
        )
    pinned = len(values) > 2 and abs(values[-2] / process.t_min - 1) <= ROUND_OFF
    made_by = f"from_grid({len(values)} nodes, {interpolation!r})"
    return through_nodes(
        process,
        nodes,
        "pinned" if pinned else "free",
        interpolation,
        name,
        describe_origin(made_by, provenance),
    )


def _formula(
    change: Formula, name: str, pinned: bool, published: bool, options: str = ""
) -> Schedule:
    """A schedule from a formula; the variant that is not the usual one is named."""
    if not isinstance(pinned, bool):
        raise TypeError(f"pinned: expected True or False, got {got(pinned)}")
    suffix = "" if pinned == published else ("-pinned" if pinned else "-unpinned")
    made_by = f"{name}({options + ', ' if options else ''}pinned={pinned})"
    last_step: LastStep = "pinned" if pinned else "free"
    return Schedule(
        change.process, change, last_step, name + suffix, describe_origin(made_by)
    )


def _values(values: Values, name: str) -> np.ndarray:
    """A copy as a float64 array [n], n >= 2, finite."""
    tensor = real_tensor(values, name, "a sequence of numbers").cpu().clone()
    if tensor.ndim != 1 or tensor.numel() < 2:
        raise ValueError(
            f"{name}: expected at least 2 numbers in one dimension, got shape "
            f"{tuple(tensor.shape)}"
        )
    if not bool(torch.isfinite(tensor).all()):
        k = int((~torch.isfinite(tensor)).nonzero()[0])
        raise ValueError(f"{name}: value {k} is {float(tensor[k])}, not finite")
    array: np.ndarray = tensor.numpy()
    return array


def _snap(
    values: np.ndarray, index: int, end: float, scale: float, name: str, what: str
) -> None:
    """Set a first or last value to the end it equals up to round-off, or refuse it."""
    if not abs(values[index] - end) <= ROUND_OFF * scale:
        which = "first" if index == 0 else "last"
        raise ValueError(
            f"{name}: the {which} value is {float(values[index])!r}, expected {what} = "
            f"{end!r}; make the process with the range of these {name}, or rescale them"
        )
    values[index] = end
