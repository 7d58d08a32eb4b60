"""What every noising process is: the class `Process`, its times and its checks."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from .._common.checks import finite_float, got, real_tensor
from .._common.types import TimeLike


def as_time(
    t: TimeLike, device: torch.device | None = None, *, name: str = "t"
) -> Tensor:
    """A time in float64; a tensor keeps its graph, and its device if none is given.

    Args:
        t: A number, or a tensor of any shape. A number goes to the CPU where no device
            is given, whatever torch's default device is.
        device: Where the result goes.
        name: The argument's name, for the message.

    Raises:
        TypeError: If it is text, a boolean, complex or no number at all.
    """
    if isinstance(t, Tensor) and not (t.is_complex() or t.dtype == torch.bool):
        return t.to(device=device, dtype=torch.float64)
    if type(t) is not float:
        numbers = real_tensor(t, name, "a number or a tensor of numbers")
        return numbers.to(device, copy=True)  # never the caller's own memory
    # Not as_tensor(t): it would round to torch's default dtype.
    return torch.tensor(t, dtype=torch.float64, device=device or "cpu")


def to_time(t: TimeLike, name: str = "t") -> Tensor:
    """A time as a floating tensor: floating tensors keep their dtype."""
    if isinstance(t, Tensor) and t.is_floating_point():
        return t
    return as_time(t, name=name)


def check_process(process: Any, name: str = "process") -> Process:
    """Refuse what is no process.

    Raises:
        TypeError: Saying what to pass.
    """
    if isinstance(process, Process):
        return process
    remedy = "pass artlib.VE(), artlib.VP(), artlib.RectifiedFlow() or your own Process"
    if isinstance(process, type) and issubclass(process, Process):
        remedy = f"call it: {process.__name__}()"
    raise TypeError(f"{name}: expected an artlib process, got {got(process)}; {remedy}")


class Process(ABC):
    """A law of noising; concrete ones are frozen, comparable dataclasses.

    One of your own derives from this class, is decorated with
    ``@dataclass(frozen=True)``, and has fields that JSON can hold. Its schedules can be
    saved; `register_process` lets them be loaded as well.

    Attributes:
        t_min: Smallest time of a learned clock; the last step goes from there or
            from above it straight to 0.
        t_max: Time at which sampling starts.
        name: The key under which `process_from_dict` finds the class.

    Raises:
        TypeError: If ``t_min``, ``t_max`` or another field that a number is expected
            in is something else.
        ValueError: Unless 0 < t_min < t_max < infinity.
    """

    name: ClassVar[str]
    t_min: float
    t_max: float

    @abstractmethod
    def alpha(self, t: TimeLike) -> Tensor:
        r"""Signal factor :math:`\alpha(t)`, elementwise, in the shape of ``t``."""

    @abstractmethod
    def sigma(self, t: TimeLike) -> Tensor:
        r"""Noise standard deviation :math:`\sigma(t)`, elementwise."""

    @abstractmethod
    def alpha_dot(self, t: TimeLike) -> Tensor:
        r"""Derivative :math:`\dot\alpha(t)`, elementwise."""

    @abstractmethod
    def sigma_dot(self, t: TimeLike) -> Tensor:
        r"""Derivative :math:`\dot\sigma(t)`, elementwise."""

    @abstractmethod
    def alpha_ddot(self, t: TimeLike) -> Tensor:
        r"""Second derivative :math:`\ddot\alpha(t)`, elementwise."""

    @abstractmethod
    def sigma_ddot(self, t: TimeLike) -> Tensor:
        r"""Second derivative :math:`\ddot\sigma(t)`, elementwise."""

    @abstractmethod
    def inverse_noise_level(self, level: TimeLike) -> Tensor:
        r"""The time t at which :math:`\sigma(t) / \alpha(t)` equals ``level``."""

    def noise_level(self, t: TimeLike) -> Tensor:
        r"""Noise-to-signal ratio :math:`\sigma(t) / \alpha(t)`.

        The :math:`\sigma` of EDM and k-diffusion; infinite where :math:`\alpha` is 0.
        """
        return self.sigma(t) / self.alpha(t)

    def log_snr(self, t: TimeLike) -> Tensor:
        r"""Log signal-to-noise ratio :math:`2 \log(\alpha / \sigma)`."""
        return -2 * torch.log(self.noise_level(t))

    def inverse_log_snr(self, log_snr: TimeLike) -> Tensor:
        r"""The time t at which the log signal-to-noise ratio equals ``log_snr``."""
        return self.inverse_noise_level(torch.exp(-to_time(log_snr, "log_snr") / 2))

    def drift(self, t: TimeLike) -> Tensor:
        r"""The coefficient :math:`f(t)` of :math:`dx = -f x\,dt + g\,dW`, eq. (1)."""
        return -self.alpha_dot(t) / self.alpha(t)

    def diffusion_squared(self, t: TimeLike) -> Tensor:
        r"""The square :math:`g(t)^2` of the noise coefficient of eq. (1)."""
        sigma = self.sigma(t)
        return 2 * sigma * self.sigma_dot(t) + 2 * self.drift(t) * sigma**2

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters, ready for JSON; `process_from_dict` inverts it.

        Raises:
            TypeError: If the class has no name, or is no dataclass and has no
                ``to_dict`` of its own.
        """
        if not dataclasses.is_dataclass(type(self)):
            raise TypeError(
                f"process: {type(self).__name__} is no dataclass, so its parameters "
                "are not known; decorate it with @dataclass(frozen=True)"
            )
        if not isinstance(getattr(self, "name", None), str):
            raise TypeError(
                f"process: {type(self).__name__} has no name to be found by; give the "
                'class one, name: ClassVar[str] = "..."'
            )
        parameters: dict[str, Any] = dataclasses.asdict(cast(Any, self))
        return {"name": self.name, **parameters}

    def __post_init__(self) -> None:
        """Make the fields plain numbers and check the range of times."""
        self._check_range()

    def _check_range(self, low: str = "t_min", high: str = "t_max") -> None:
        """Make numbers plain floats, and check those that bound the time, by name.

        A number of NumPy or a 0-d tensor becomes a Python float, so that processes
        which are equal hash alike and can be saved. A range that is no field, but a
        property or an attribute of the class, is only checked.
        """
        names = _fields(self)
        plain: dict[str, float] = {}
        for name in names:
            value = getattr(self, name)
            if isinstance(value, Tensor | np.ndarray | np.generic):
                plain[name] = finite_float(value, name)
        t_min = finite_float(getattr(self, low), low, positive=True)
        t_max = finite_float(getattr(self, high), high, positive=True)
        if t_min >= t_max:
            raise ValueError(
                f"{low}: expected {low} < {high}, got {t_min} >= {t_max}; sampling "
                f"runs from {high} down"
            )
        ends = {low: t_min, high: t_max}
        plain |= {name: ends[name] for name in names if name in ends}
        for name, number in plain.items():
            object.__setattr__(self, name, number)


def _fields(process: Any) -> list[str]:
    """Names of the fields of a process, none if it is no dataclass."""
    if not dataclasses.is_dataclass(process):
        return []
    return [field.name for field in dataclasses.fields(process)]
