r"""Time changes: the strictly decreasing functions :math:`t(c)` behind a schedule.

The clock :math:`c` runs over :math:`[0, T]`, :math:`T = t_{max} - t_{end}`, and
:math:`t(0) = t_{max}`, :math:`t(T) = t_{end}`. The paper's
:math:`\psi(c) = t_{max} - t(c)` is never stored: on [0.002, 80] the last nodes of
:math:`t_{max} - \psi` would have lost five of their sixteen digits.

| class | time change, :math:`u = c / T` |
| --- | --- |
| `Linear` | :math:`t = t_{max} - c`, down to 0 |
| `NoiseWarp` | :math:`w(s(t))` linear in u, noise level :math:`s = \sigma / \alpha` |
| `BetaQuantiles` | :math:`(t - t_{min}) / T` is the Beta quantile at :math:`1 - u` |
| `Table` | monotone interpolation of knots :math:`(c_i, t_i)` |

Each is a frozen dataclass: equal by value, hashable, float64, with its inverse and its
speed :math:`\theta = -dt/dc` in closed form (the inverse of a `Table` by a safeguarded
Newton iteration).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import special
from torch import Tensor

from .._common.checks import finite_float
from ..flow.processes import Process, check_process

# What counts as round-off where a number has to equal an end of a range: enough for
# values that went through float32.
ROUND_OFF = 1e-6


class TimeChange(ABC):
    """A strictly decreasing map from the clock [0, T] onto [t_end, t_max].

    Attributes:
        kind: The key under which `time_change_from_dict` finds it.
        t_end: Where the time change ends; 0 or the process's t_min.
        t_max: Where it starts.
    """

    kind: ClassVar[str]
    t_end: float
    t_max: float

    @property
    def horizon(self) -> float:
        """T, the length of the clock, in units of the process's time."""
        return self.t_max - self.t_end

    @abstractmethod
    def time(self, clock: Tensor) -> Tensor:
        """t(c), elementwise on a float64 tensor within [0, T]; differentiable."""

    @abstractmethod
    def clock(self, t: Tensor) -> Tensor:
        """The inverse c(t), elementwise, within [t_end, t_max]; differentiable."""

    @abstractmethod
    def speed(self, clock: Tensor) -> Tensor:
        """-dt/dc, elementwise, dimensionless."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Kind and parameters, ready for JSON, without the process."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for the representation of a schedule."""


class _WithDerivative(torch.autograd.Function):
    """A value computed outside of torch, with its known derivative attached."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, derivative: Tensor) -> Tensor:
        ctx.save_for_backward(derivative)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return grad_outputs[0] * derivative, None, None


def with_derivative(x: Tensor, value: Tensor, derivative: Tensor) -> Tensor:
    """A value whose derivative is given, for what numpy computes.

    Args:
        x: Where it was computed.
        value: The value there.
        derivative: Its derivative by ``x``, in the same shape.
    """
    # torch leaves the static apply() untyped.
    result: Tensor = _WithDerivative.apply(x, value, derivative)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class Formula(TimeChange):
    """A time change in closed form, on the range of its process."""

    process: Process

    def __post_init__(self) -> None:
        check_process(self.process)

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return self.process.t_max

    @property
    def t_end(self) -> float:  # type: ignore[override]
        return self.process.t_min


@dataclass(frozen=True)
class Linear(Formula):
    """t = t_max - c, all the way to 0: the paper's Uniform, speed 1."""

    kind: ClassVar[str] = "linear"

    @property
    def t_end(self) -> float:  # type: ignore[override]
        return 0.0

    def time(self, clock: Tensor) -> Tensor:
        return self.t_max - clock

    def clock(self, t: Tensor) -> Tensor:
        return self.t_max - t

    def speed(self, clock: Tensor) -> Tensor:
        return torch.ones_like(clock)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def describe(self) -> str:
        return "linear"


@dataclass(frozen=True)
class NoiseWarp(Formula):
    r"""A warp :math:`w(s)` of the noise level :math:`s = \sigma/\alpha`, linear in c.

    ``power``: :math:`w = s^{1/\rho}` (EDM); ``log``: :math:`w = \log s` (DPM);
    ``arctan``: :math:`w = \arctan s` (KL optimal).

    Where s(t_max) is infinite (`RectifiedFlow` at t = 1) the noise level starts at
    its finite value at :math:`t_{max} - t_{min}` instead, 999 by default, and times
    are stretched linearly by :math:`(t_{max} - t_{min}) / (t_{max} - 2 t_{min})`
    about t_min, so that the time change still starts at t_max and is continuous.
    """

    kind: ClassVar[str] = "noise-warp"
    warp: str
    rho: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.warp, str) or self.warp not in (
            "power",
            "log",
            "arctan",
        ):
            raise ValueError(
                f"warp: expected 'power', 'log' or 'arctan', got {self.warp!r}"
            )
        if (self.warp == "power") != (self.rho is not None):
            raise ValueError(
                f"rho: got {self.rho} for the warp {self.warp!r}; 'power' needs one, "
                "the others have none"
            )
        if self.rho is not None:
            rho = finite_float(self.rho, "rho", positive=True)
            object.__setattr__(self, "rho", rho)
        start, end = self._ends
        if not (np.isfinite(start) and start > end):
            raise ValueError(
                f"rho: {self.rho} is outside what float64 resolves on this range; "
                "log_snr is the limit of large rho, and rho = 1 is linear in sigma"
            )

    @cached_property
    def _stretch(self) -> float:
        """Factor of times about t_min; 1 wherever the noise level stays finite."""
        if np.isfinite(float(self.process.noise_level(self.t_max))):
            return 1.0
        if self.t_max <= 2 * self.t_end:
            raise ValueError(
                f"process: t_min = {self.t_end} leaves no finite noise level to start "
                f"from below t_max = {self.t_max}; choose a smaller t_min"
            )
        return self.horizon / (self.horizon - self.t_end)

    @cached_property
    def _ends(self) -> tuple[float, float]:
        ends = torch.tensor([self.t_max, self.t_end], dtype=torch.float64, device="cpu")
        start, end = self._warp(self._level(ends)).tolist()
        return start, end

    def _level(self, t: Tensor) -> Tensor:
        if self._stretch != 1:  # keeps VE exactly sigma = t
            t = self.t_end + (t - self.t_end) / self._stretch
        return self.process.noise_level(t)

    def _warp(self, s: Tensor) -> Tensor:
        if self.rho is not None:
            return s ** (1 / self.rho)
        return torch.log(s) if self.warp == "log" else torch.atan(s)

    def _unwarp(self, w: Tensor) -> Tensor:
        if self.rho is not None:
            return w**self.rho
        return torch.exp(w) if self.warp == "log" else torch.tan(w)

    def time(self, clock: Tensor) -> Tensor:
        start, end = self._ends
        u = clock / self.horizon
        t = self.process.inverse_noise_level(self._unwarp(start + u * (end - start)))
        if self._stretch != 1:
            t = self.t_end + (t - self.t_end) * self._stretch
        return t

    def clock(self, t: Tensor) -> Tensor:
        start, end = self._ends
        return self.horizon * ((start - self._warp(self._level(t))) / (start - end))

    def speed(self, clock: Tensor) -> Tensor:
        # -dt/dc = (w(s_max) - w(s_min)) / (T w'(s) s'(t)).
        start, end = self._ends
        t = self.t_end + (self.time(clock) - self.t_end) / self._stretch
        p, alpha = self.process, self.process.alpha(t)
        s = p.sigma(t) / alpha
        s_dot = (p.sigma_dot(t) * alpha - p.sigma(t) * p.alpha_dot(t)) / alpha**2
        if self.rho is not None:
            slope = s ** (1 / self.rho - 1) / self.rho
        else:
            slope = 1 / s if self.warp == "log" else 1 / (1 + s**2)
        return (start - end) * self._stretch / (self.horizon * slope * s_dot)

    def to_dict(self) -> dict[str, Any]:
        rho = {} if self.rho is None else {"rho": self.rho}
        return {"kind": self.kind, "warp": self.warp, **rho}

    def describe(self) -> str:
        return self.warp if self.rho is None else f"{self.warp}, rho={self.rho:g}"


@dataclass(frozen=True)
class BetaQuantiles(Formula):
    """Times at the quantiles of a Beta(a, b) law on [t_min, t_max].

    Where the Beta density is infinite (a < 1 at t_min, b < 1 at t_max) the speed is
    0, and the inverse is as ill-conditioned there as a root.
    """

    kind: ClassVar[str] = "beta"
    a: float
    b: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("a", "b"):
            value = finite_float(getattr(self, name), name, positive=True)
            object.__setattr__(self, name, value)

    def _quantile(self, clock: Tensor) -> tuple[Tensor, Tensor]:
        """X = (t - t_end) / T and y = 1 - x, each precise where it is small."""
        u = clock.detach().cpu().numpy() / self.horizon
        x = special.betaincinv(self.a, self.b, 1 - u)
        y = special.betaincinv(self.b, self.a, u)
        x, y = np.where(u < 0.5, 1 - y, x), np.where(u < 0.5, y, 1 - x)
        x, y = (torch.from_numpy(np.asarray(v)).to(clock.device) for v in (x, y))
        return x, y

    def _speed_at(self, x: Tensor, y: Tensor) -> Tensor:
        # One over the Beta density. pow, because 0 ** 0 = 1 at the ends.
        factor = float(special.beta(self.a, self.b))
        return factor * x ** (1 - self.a) * y ** (1 - self.b)

    def time(self, clock: Tensor) -> Tensor:
        x, y = self._quantile(clock)
        from_start = self.t_max - self.horizon * y
        t = torch.where(x < 0.5, self.t_end + self.horizon * x, from_start)
        return with_derivative(clock, t, -self._speed_at(x, y))

    def clock(self, t: Tensor) -> Tensor:
        x = (t.detach() - self.t_end) / self.horizon
        y = (self.t_max - t.detach()) / self.horizon
        from_start = special.betainc(self.b, self.a, y.cpu().numpy())
        from_end = special.betainc(self.a, self.b, x.cpu().numpy())
        u = np.where(from_start < 0.5, from_start, 1 - from_end)
        clock = torch.from_numpy(np.asarray(self.horizon * u)).to(t.device)
        return with_derivative(t, clock, -1 / self._speed_at(x, y))

    def speed(self, clock: Tensor) -> Tensor:
        return self._speed_at(*self._quantile(clock))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "a": self.a, "b": self.b}

    def describe(self) -> str:
        return f"Beta({self.a:g}, {self.b:g}) quantiles"
