"""One step of a fixed-step method: Euler, Heun, and Kutta's 3/8 rule.

torchdiffeq has the same methods, but it compares the time with the end of the grid on
the state's device after every step, and so waits for that device. Times are on the CPU
here: a step is launched while the one before is still being computed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Slope = Callable[[Tensor, Tensor], Tensor]
"""The velocity ``v(x, t)``."""


def _euler(v: Slope, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return x + (s - t) * v(x, t)


def _heun(v: Slope, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    h = s - t
    first = v(x, t)
    second = v(x + h * first, s)
    return x + h * (first * 0.5 + second * 0.5)


def _three_eighths(v: Slope, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    h, third = s - t, 1 / 3
    k1 = v(x, t)
    k2 = v(x + h * k1 * third, t + h * third)
    k3 = v(x + h * (k2 - k1 * third), t + h * (2 / 3))
    k4 = v(x + h * (k1 - k2 + k3), s)
    return x + (k1 + 3 * (k2 + k3) + k4) * h * 0.125


STEPS: dict[str, Callable[[Slope, Tensor, Tensor, Tensor], Tensor]] = {
    "euler": _euler,
    "heun2": _heun,
    "rk4": _three_eighths,
}
"""``step(v, x, t, s)`` from time t to s, by torchdiffeq's name of the method."""
