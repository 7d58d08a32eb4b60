r"""Reference paths of the probability flow: accurate states at given times.

Between neighbouring times one step of a fixed-step method, or dopri5, the adaptive
pair of Dormand and Prince. The latter runs in :math:`\log t`, which suits a range of
several decades, and never beyond the last time.

``"multistep"`` makes a single evaluation a time. With :math:`\lambda =
\log(\alpha/\sigma)` the solution is

.. math::
    x_t = \frac{\sigma_t}{\sigma_s} x_s
        + \sigma_t \int_{\lambda_s}^{\lambda_t} e^\lambda D\, d\lambda ,

and D is the polynomial through its last three values: first the three behind the step
(the predictor), and once D is known at its end, two of them and that one (the
corrector). Both weights are exact for parabolas (exponential Adams methods, order 3),
and the first step is one of Heun's. With four values or more it is less stable, and at
a few dozen times |Q| from it is worse (measured: thrice to ten times the excess cost).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .._common.adaptive import Guarded, dopri5
from .._common.checks import as_grid, finite_float, require_finite
from .._common.precision import as_double
from .._common.runge_kutta import STEPS
from .._common.types import TimeLike
from .processes import Process

_FIXED_STEP = {"heun": "heun2", "rk4": "rk4"}

_VALUES = 3  # of D behind a step of the multistep method

_QUADRATURE = np.polynomial.legendre.leggauss(12)


@dataclass(frozen=True)
class Trajectory:
    """Reference paths of the flow at given times.

    Attributes:
        times: Descending process times [n], float64.
        states: x at those times [n, N, *sample_shape], float64.
        denoised: D(x, t) there, in the same shape.
        velocities: dx/dt there, in the same shape.
    """

    times: Tensor
    states: Tensor
    denoised: Tensor
    velocities: Tensor


@runtime_checkable
class _Flow(Protocol):
    """What of a `ProbabilityFlow` is needed here."""

    process: Process

    def denoise(self, x: Tensor, t: TimeLike) -> Tensor: ...

    def velocity(self, x: Tensor, t: TimeLike) -> Tensor: ...

    def velocity_from(self, denoised: Tensor, x: Tensor, t: TimeLike) -> Tensor: ...


def integrate(
    flow: _Flow, x_T: Tensor, times: Tensor | Sequence[float], method: str, rtol: float
) -> Trajectory:
    """Reference paths; see `ProbabilityFlow.trajectory`.

    Args:
        flow: The flow.
        x_T: States at ``times[0]``, [N, *shape].
        times: Descending process times [n] in (0, t_max].
        method: ``"heun"``, ``"rk4"``, ``"multistep"`` or ``"dopri5"``.
        rtol: Relative (and absolute) tolerance of dopri5.

    Raises:
        TypeError: If ``x_T`` is on a device without float64.
        ValueError: If the method is unknown, the times are out of their range, or a
            state becomes non-finite.
        RuntimeError: If dopri5 cannot reach its tolerance.
    """
    known_methods = (*_FIXED_STEP, "multistep", "dopri5")
    if not isinstance(method, str) or method not in known_methods:
        raise ValueError(
            f"method: expected 'heun', 'rk4', 'multistep' or 'dopri5', got {method!r}"
        )
    x_T = as_double(x_T, "x_T")
    # Times stay on the CPU, so that no step waits for the device.
    times = as_grid(times, "times")
    if not (float(times[-1]) > 0 and float(times[0]) <= flow.process.t_max):
        raise ValueError(
            f"times: expected a range within (0, t_max = {flow.process.t_max}], got "
            f"{float(times[0]):.6g} ... {float(times[-1]):.6g}; the velocity is not "
            "defined at t = 0"
        )
    with torch.no_grad():
        known: dict[int, Tensor] = {}
        if method == "dopri5":
            states = _adaptive(
                flow, x_T, times, finite_float(rtol, "rtol", positive=True)
            )
        elif method == "multistep":
            states = _multistep(flow, x_T, times, known)
        else:
            states = _fixed_step(flow, x_T, times, _FIXED_STEP[method], known)
        require_finite(
            states,
            "reference trajectory",
            "the denoiser returned NaN or overflowed; check it at t_max and t_min, and "
            "that its input scaling fits the process",
        )
        denoised = torch.stack(
            [
                known[k] if k in known else flow.denoise(x, t)
                for k, (t, x) in enumerate(zip(times, states, strict=True))
            ]
        )
        require_finite(denoised, "denoiser", "check it near t_min")
        there = times.to(x_T.device)
        column = there.reshape(-1, *[1] * (states.ndim - 1))
        velocities = flow.velocity_from(denoised, states, column)
    return Trajectory(there, states, denoised, velocities)


def _fixed_step(
    flow: _Flow, x: Tensor, times: Tensor, method: str, known: dict[int, Tensor]
) -> Tensor:
    """States [n, N, *shape]; leaves D at all nodes but the last in ``known``."""
    states = [x]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        denoised = flow.denoise(x, t)
        # The first stage of a step is at its node.
        known.setdefault(len(states) - 1, denoised)
        return flow.velocity_from(denoised, x, t)

    for t, s in pairwise(times.unbind()):
        states.append(STEPS[method](velocity, states[-1], t, s))
    return torch.stack(states)


def _multistep(
    flow: _Flow, x: Tensor, times: Tensor, known: dict[int, Tensor]
) -> Tensor:
    """The same by one evaluation a time; see the module."""
    process, n = flow.process, len(times)
    alpha, sigma = process.alpha(times).numpy(), process.sigma(times).numpy()
    with np.errstate(divide="ignore"):
        level = np.log(alpha) - np.log(sigma)
    # Without signal lambda is infinite, and what is seen there no part of a polynomial.
    first = 0 if np.isfinite(level[0]) else 1
    states = [x]

    def step(k: int, values: list[int]) -> Tensor:
        """From time k to the next, with D through its values at some times."""
        half = (level[k + 1] - level[k]) / 2
        at = level[k] + half * (1 + _QUADRATURE[0])
        weight = half * _QUADRATURE[1] * np.exp(at) * sigma[k + 1]
        y = sigma[k + 1] / sigma[k] * states[k]
        for i in values:
            others = [level[j] for j in values if j != i]
            basis = np.prod([(at - o) / (level[i] - o) for o in others], axis=0)
            y = y + float((weight * basis).sum()) * known[i]
        return y

    for k in range(n - 1):
        if k not in known:
            known[k] = flow.denoise(states[k], times[k])
        if not k:
            t, s = times[0], times[1]
            slope = flow.velocity_from(known[0], x, t)
            there = x + (s - t) * slope
            known[1] = flow.denoise(there, s)
            mean = (slope + flow.velocity_from(known[1], there, s)) / 2
            states.append(x + (s - t) * mean)
            continue
        behind = list(range(max(first, k - _VALUES + 1), k + 1))
        states.append(step(k, behind))
        known[k + 1] = flow.denoise(states[k + 1], times[k + 1])
        states[k + 1] = step(k, [*behind[1 - _VALUES :], k + 1])
    return torch.stack(states)


def _adaptive(flow: _Flow, x_T: Tensor, times: Tensor, rtol: float) -> Tensor:
    """States [n, N, *shape] by dopri5 in log time."""

    def velocity(log_t: Tensor, x: Tensor) -> Tensor:
        t = log_t.exp()
        return t * flow.velocity(x, t)

    log_times = times.log().to(x_T.device)
    return dopri5(Guarded(velocity, math.exp), x_T, log_times, rtol=rtol, atol=rtol)
