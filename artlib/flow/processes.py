r"""Noising processes: the laws :math:`x_t = \alpha(t) x_0 + \sigma(t) \epsilon`.

A process is two scalar functions of time with exact derivatives and inverses. The
forward equation (1) of the paper, :math:`dx = -f(t) x\, dt + g(t)\, dW`, has

.. math::
    f = -\frac{\dot\alpha}{\alpha}, \qquad
    g^2 = 2\sigma\dot\sigma - 2\frac{\dot\alpha}{\alpha}\sigma^2 .

Time runs from 0 (data) to ``t_max`` (noise); sampling walks it backwards. A learned
clock lives on ``[t_min, t_max]``; the last step of a grid goes on to 0.

| class | :math:`\alpha` | :math:`\sigma` | used by |
| --- | --- | --- | --- |
| `VE` | 1 | t | EDM, k-diffusion |
| `VP` | :math:`e^{-B(t)/2}` | :math:`\sqrt{1 - e^{-B(t)}}` | DDPM, score SDE |
| `RectifiedFlow` | 1 - t | t | flow matching |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._common.checks import finite_float
from .._common.types import TimeLike
from .process import Process, as_time, check_process
from .process import to_time as _time
from .registry import process_from_dict, register_process

__all__ = [
    "VE",
    "VP",
    "Process",
    "RectifiedFlow",
    "as_time",
    "check_process",
    "process_from_dict",
    "register_process",
]


@register_process
@dataclass(frozen=True)
class VE(Process):
    r"""Variance exploding in EDM's parametrisation: :math:`\alpha = 1, \sigma = t`.

    Args:
        sigma_min: Smallest noise level, equal to ``t_min``; in units of the data.
        sigma_max: Largest noise level, equal to ``t_max``; in units of the data.

    Raises:
        TypeError: If one is no real number (text, a boolean, complex).
        ValueError: Unless 0 < sigma_min < sigma_max < infinity.

    References:
        Karras et al., https://arxiv.org/abs/2206.00364, Table 1, column "Ours".
    """

    name: ClassVar[str] = "ve"
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        self._check_range("sigma_min", "sigma_max")

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """Smallest time of a learned clock, equal to ``sigma_min``."""
        return self.sigma_min

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """Time at which sampling starts, equal to ``sigma_max``."""
        return self.sigma_max

    def alpha(self, t: TimeLike) -> Tensor:
        return torch.ones_like(_time(t))

    def sigma(self, t: TimeLike) -> Tensor:
        return _time(t)

    def alpha_dot(self, t: TimeLike) -> Tensor:
        return torch.zeros_like(_time(t))

    def sigma_dot(self, t: TimeLike) -> Tensor:
        return torch.ones_like(_time(t))

    def alpha_ddot(self, t: TimeLike) -> Tensor:
        return torch.zeros_like(_time(t))

    def sigma_ddot(self, t: TimeLike) -> Tensor:
        return torch.zeros_like(_time(t))

    def inverse_noise_level(self, level: TimeLike) -> Tensor:
        return _time(level, "level")


@register_process
@dataclass(frozen=True)
class VP(Process):
    r"""Variance preserving with linear beta: :math:`\alpha^2 + \sigma^2 = 1`.

    With :math:`B(t) = \beta_{min} t + (\beta_{max} - \beta_{min}) t^2 / 2`:
    :math:`\alpha = e^{-B/2}`, :math:`\sigma = \sqrt{1 - e^{-B}}`.

    Near t = 0 the noise goes as the square root of time, so one Euler step in VP time
    from t to 0 leaves half of the noise in. Samplers in use step in
    :math:`\sigma/\alpha` instead (`ProbabilityFlow.to_ve`).

    Args:
        beta_min: Rate at t = 0, per unit time.
        beta_max: Rate at t = 1, per unit time.
        t_min: Smallest time of a learned clock.
        t_max: Time at which sampling starts.

    Raises:
        TypeError: If one is no real number.
        ValueError: Unless 0 < beta_min <= beta_max and 0 < t_min < t_max, all finite.

    References:
        Song et al., https://arxiv.org/abs/2011.13456, Appendix C.
    """

    name: ClassVar[str] = "vp"
    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        low = finite_float(self.beta_min, "beta_min", positive=True)
        high = finite_float(self.beta_max, "beta_max", positive=True)
        if high < low:
            raise ValueError(
                f"beta_max: expected at least beta_min = {low}, got {high}; noise is "
                "added faster and faster"
            )
        object.__setattr__(self, "beta_min", low)
        object.__setattr__(self, "beta_max", high)

    def _integral(self, t: TimeLike) -> Tensor:
        """B(t), the integral of beta from 0 to t."""
        t = _time(t)
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def _beta(self, t: TimeLike) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * _time(t)

    def alpha(self, t: TimeLike) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: TimeLike) -> Tensor:
        # expm1 keeps full precision where 1 - alpha^2 would cancel.
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def alpha_dot(self, t: TimeLike) -> Tensor:
        return -0.5 * self._beta(t) * self.alpha(t)

    def sigma_dot(self, t: TimeLike) -> Tensor:
        return 0.5 * self._beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def alpha_ddot(self, t: TimeLike) -> Tensor:
        curvature = 0.25 * self._beta(t) ** 2 - 0.5 * (self.beta_max - self.beta_min)
        return curvature * self.alpha(t)

    def sigma_ddot(self, t: TimeLike) -> Tensor:
        # alpha^2 + sigma^2 = 1, differentiated twice.
        rest = self.alpha_dot(t) ** 2 + self.alpha(t) * self.alpha_ddot(t)
        return -(rest + self.sigma_dot(t) ** 2) / self.sigma(t)

    def drift(self, t: TimeLike) -> Tensor:
        return 0.5 * self._beta(t)

    def diffusion_squared(self, t: TimeLike) -> Tensor:
        # beta itself: the general formula is 0 * infinity at t = 0.
        return self._beta(t)

    def noise_level(self, t: TimeLike) -> Tensor:
        return torch.sqrt(torch.expm1(self._integral(t)))

    def inverse_noise_level(self, level: TimeLike) -> Tensor:
        integral = torch.log1p(_time(level, "level") ** 2)
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 + 2 * slope * integral)
        # The other form of the quadratic's root: no cancellation, and slope may be 0.
        return 2 * integral / (self.beta_min + root)


@register_process
@dataclass(frozen=True)
class RectifiedFlow(Process):
    r"""Straight interpolation of flow matching: :math:`\alpha = 1 - t, \sigma = t`.

    At ``t_max = 1`` no signal is left: the noise level is infinite and the drift
    :math:`f` is too, while the velocity of the flow stays finite.

    Args:
        t_min: Smallest time of a learned clock.
        t_max: Time at which sampling starts; at most 1.

    Raises:
        TypeError: If one is no real number.
        ValueError: Unless 0 < t_min < t_max <= 1.

    References:
        Liu et al., https://arxiv.org/abs/2209.03003; Lipman et al.,
        https://arxiv.org/abs/2210.02747.
    """

    name: ClassVar[str] = "rectified-flow"
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        if self.t_max > 1:
            raise ValueError(
                f"t_max: expected at most 1, where only noise is left, got {self.t_max}"
            )

    def alpha(self, t: TimeLike) -> Tensor:
        return 1 - _time(t)

    def sigma(self, t: TimeLike) -> Tensor:
        return _time(t)

    def alpha_dot(self, t: TimeLike) -> Tensor:
        return -torch.ones_like(_time(t))

    def sigma_dot(self, t: TimeLike) -> Tensor:
        return torch.ones_like(_time(t))

    def alpha_ddot(self, t: TimeLike) -> Tensor:
        return torch.zeros_like(_time(t))

    def sigma_ddot(self, t: TimeLike) -> Tensor:
        return torch.zeros_like(_time(t))

    def inverse_noise_level(self, level: TimeLike) -> Tensor:
        level = _time(level, "level")
        return torch.where(torch.isinf(level), 1.0, level / (1 + level))
