r"""The tabulated time change, and the root finder that inverts it.

Between knots :math:`(c_i, t_i)` of length h, with :math:`s = (c - c_i)/h = 1 - r` and
slopes :math:`d_i` that PCHIP limits so that no overshoot is possible,

.. math::
    t = r^2 (1 + 2s)\, t_i + s^2 (1 + 2r)\, t_{i+1} + h r s (r d_i - s d_{i+1}) .
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from .._common.checks import real_tensor
from .._common.interpolation import pchip
from .time_change import ROUND_OFF, TimeChange, with_derivative

Interpolation: TypeAlias = Literal["pchip", "linear", "log-linear"]
INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)


@dataclass(frozen=True)
class Table(TimeChange):
    """Monotone interpolation of knots (c_i, t_i), exact at the knots.

    ``pchip`` is the cubic Hermite interpolant of t with the slopes of Fritsch and
    Butland, which cannot overshoot; ``linear`` interpolates t, ``log-linear`` log t.
    Evaluated in the Hermite basis, whose values are convex combinations plus slopes:
    the end of the range keeps its relative precision.
    """

    kind: ClassVar[str] = "table"
    knots_clock: tuple[float, ...]
    knots_time: tuple[float, ...]
    interpolation: Interpolation = "pchip"

    def __post_init__(self) -> None:
        if (
            not isinstance(self.interpolation, str)
            or self.interpolation not in INTERPOLATIONS
        ):
            raise ValueError(
                f"interpolation: expected one of {INTERPOLATIONS}, "
                f"got {self.interpolation!r}"
            )
        # Copies: the ends of the clock are set below.
        clock = real_tensor(self.knots_clock, "clock").cpu().numpy().copy()
        times = real_tensor(self.knots_time, "times").cpu().numpy()
        if clock.ndim != 1 or clock.shape != times.shape or clock.size < 2:
            raise ValueError(
                "clock, times: expected two lists of one length of at least 2, got "
                f"shapes {clock.shape} and {times.shape}"
            )
        if not (np.isfinite(clock).all() and np.isfinite(times).all()):
            raise ValueError("clock, times: the knots hold a NaN or an infinity")
        _refuse(np.diff(times) >= 0, times, "times", "decreasing")
        if times[-1] < 0 or (times[-1] == 0 and self.interpolation == "log-linear"):
            raise ValueError(
                f"times: the last knot is {times[-1]}, from which "
                f"{self.interpolation!r} cannot interpolate; end at t_min > 0, or use "
                "interpolation='pchip' down to 0"
            )
        horizon = float(times[0]) - float(times[-1])
        for k, end, what in ((0, 0.0, "first"), (-1, horizon, "last")):
            if not abs(clock[k] - end) <= ROUND_OFF * horizon:
                raise ValueError(
                    f"clock: the {what} knot is {float(clock[k])!r}, expected {end!r}; "
                    "a clock runs from 0 to t_max - t_min of the times: rescale it"
                )
            clock[k] = end
        _refuse(np.diff(clock) <= 0, clock, "clock", "increasing")
        object.__setattr__(self, "knots_clock", tuple(clock.tolist()))
        object.__setattr__(self, "knots_time", tuple(times.tolist()))
        with np.errstate(all="ignore"):
            resolved = bool(np.isfinite(np.diff(times) / np.diff(clock)).all())
            resolved = resolved and bool(torch.isfinite(self._knots[2]).all())
        if not resolved:
            raise ValueError(
                "clock, times: the knots are so close that float64 has no slope "
                "between them; leave some out"
            )

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return self.knots_time[0]

    @property
    def t_end(self) -> float:  # type: ignore[override]
        return self.knots_time[-1]

    @cached_property
    def _knots(self) -> tuple[Tensor, Tensor, Tensor]:
        """Clocks, times and the slopes dt/dc at the knots, float64 [n]."""
        clock, times = np.array(self.knots_clock), np.array(self.knots_time)
        cubic = pchip(clock, times)
        slopes = np.append(cubic.c[2], cubic.derivative()(clock[-1]))
        secants = np.diff(times) / np.diff(clock)
        # At an end PCHIP may choose slope 0, where the inverse would lose half of its
        # digits and the density be infinite: keep a tenth of the secant.
        slopes[0] = min(slopes[0], 0.1 * secants[0])
        slopes[-1] = min(slopes[-1], 0.1 * secants[-1])
        return (
            torch.from_numpy(clock),
            torch.from_numpy(times),
            torch.from_numpy(slopes),
        )

    def _interval(self, index: Tensor) -> tuple[Tensor, ...]:
        """Start, length, times at both ends, slopes at both ends of the intervals."""
        clock, times, slopes = (k.to(index.device) for k in self._knots)
        return (
            clock[index],
            clock[index + 1] - clock[index],
            times[index],
            times[index + 1],
            slopes[index],
            slopes[index + 1],
        )

    def _locate(self, clock: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        knots = self._knots[0].to(clock.device)
        index = torch.searchsorted(knots, clock.detach().contiguous(), right=True) - 1
        interval = self._interval(index.clamp(0, knots.numel() - 2))
        start, length = interval[:2]
        end = knots[index.clamp(0, knots.numel() - 2) + 1]
        return interval, (clock - start) / length, (end - clock) / length

    def _value(self, interval: tuple[Tensor, ...], s: Tensor, r: Tensor) -> Tensor:
        """Time at the fraction s = 1 - r of each interval."""
        _, length, y0, y1, d0, d1 = interval
        if self.interpolation == "linear":
            return r * y0 + s * y1
        if self.interpolation == "log-linear":
            return y0 * (y1 / y0) ** s
        cubic = length * r * s * (r * d0 - s * d1)
        return r * r * (1 + 2 * s) * y0 + s * s * (1 + 2 * r) * y1 + cubic

    def _slope(self, interval: tuple[Tensor, ...], s: Tensor, r: Tensor) -> Tensor:
        """dt/dc at the fraction s = 1 - r of each interval, negative."""
        _, length, y0, y1, d0, d1 = interval
        secant = (y1 - y0) / length
        if self.interpolation == "linear":
            return secant + 0 * s
        if self.interpolation == "log-linear":
            return y0 * (y1 / y0) ** s * torch.log(y1 / y0) / length
        both = r * s
        return 6 * both * secant + (r * r - 2 * both) * d0 + (s * s - 2 * both) * d1

    def time(self, clock: Tensor) -> Tensor:
        return self._value(*self._locate(clock))

    def speed(self, clock: Tensor) -> Tensor:
        return -self._slope(*self._locate(clock))

    def clock(self, t: Tensor) -> Tensor:
        with torch.no_grad():
            target = t.detach().contiguous()
            rising = self._knots[1].to(t.device).flip(0).contiguous()
            last = rising.numel() - 2
            # Ascending search, read backwards: index of the knot just above t.
            index = last - (torch.searchsorted(rising, target, right=True) - 1).clamp(
                0, last
            )
            interval = self._interval(index)
            start, length, y0, y1 = interval[:4]

            def rise(s: Tensor) -> tuple[Tensor, Tensor]:
                slope = self._slope(interval, s, 1 - s)
                return -self._value(interval, s, 1 - s), -slope * length

            if self.interpolation == "linear":
                s = (y0 - target) / (y0 - y1)
            elif self.interpolation == "log-linear":
                s = torch.log(target / y0) / torch.log(y1 / y0)
            else:
                zero = torch.zeros_like(target)
                s = invert_increasing(rise, -target, zero, zero + 1)
            clock = start + s * length
            derivative = 1 / self._slope(interval, s, 1 - s)
        return with_derivative(t, clock, derivative)

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"kind": self.kind, "interpolation": self.interpolation}
        if self.knots_clock != uniform_clock(self.horizon, len(self.knots_time)):
            data["clock"] = list(self.knots_clock)
        return data | {"times": list(self.knots_time)}

    def describe(self) -> str:
        return f"{len(self.knots_time)} knots, {self.interpolation}"


def invert_increasing(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    target: Tensor,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    """Solve f(x) = target elementwise, f increasing, by safeguarded Newton steps.

    A Newton step that leaves the bracket is replaced by a bisection, and so is every
    fourth of the first 160 steps: the bracket shrinks by 2^-40 at the worst.

    Args:
        function: Returns f(x) and f'(x).
        target: Wanted values, any shape.
        low: Lower ends of the brackets, same shape.
        high: Upper ends, same shape.

    Returns:
        The solutions, float64, same shape.
    """
    x = 0.5 * (low + high)
    width = high - low
    done = torch.zeros_like(x, dtype=torch.bool)
    for iteration in range(200):
        value, slope = function(x)
        above = value > target
        high, low = torch.where(above, x, high), torch.where(above, low, x)
        newton = x - (value - target) / slope
        resolution = 4e-16 * x.abs() + 1e-16 * width
        # A slope of 0 gives a NaN here, which is neither inside nor close.
        inside = (newton >= low) & (newton <= high)
        if iteration < 160 and iteration % 4 == 3:
            inside = torch.zeros_like(inside)
        close = (newton - x).abs() <= resolution
        step = torch.where(inside, newton, 0.5 * (low + high))
        x = torch.where(done | close, x, step)
        done = done | close | (high - low <= resolution)
        if bool(done.all()):
            break
    return x


def quantiles(t: np.ndarray, q: np.ndarray, shares: np.ndarray) -> Tensor:
    """Times below which the given shares of a density lie.

    The density is the PCHIP interpolant of its values, integrated exactly. Shares are
    counted from the smallest time, where relative precision matters.

    Args:
        t: [n] ascending times.
        q: [n] positive density at these times, in any unit.
        shares: [m] shares in (0, 1).

    Returns:
        float64 tensor [m].
    """
    density = pchip(t, q)
    cumulated = density.antiderivative()
    at_knots = cumulated(t)
    wanted = shares * at_knots[-1]
    cell = np.clip(np.searchsorted(at_knots, wanted, side="right"), 1, t.size - 1)

    def share_of(x: Tensor) -> tuple[Tensor, Tensor]:
        x_array = x.numpy()
        value, slope = cumulated(x_array), density(x_array)
        return torch.from_numpy(value), torch.from_numpy(slope)

    low, high = (torch.from_numpy(t[i]) for i in (cell - 1, cell))
    return invert_increasing(share_of, torch.from_numpy(wanted), low, high)


def uniform_clock(horizon: float, n: int) -> tuple[float, ...]:
    """Evenly spaced readings of the clock, n from 0 to the horizon, the ends exact."""
    inner = (horizon * k / (n - 1) for k in range(n - 1))
    return (*inner, horizon)


def _refuse(bad: np.ndarray, values: np.ndarray, name: str, direction: str) -> None:
    if bad.any():
        k = int(np.argmax(bad))
        raise ValueError(
            f"{name}: expected strictly {direction} knots, but knot {k} = "
            f"{float(values[k])!r} is followed by {float(values[k + 1])!r}; a schedule "
            "has to be strictly monotone: drop repeated knots, or give the density a "
            "larger floor"
        )
