r"""From whatever a network predicts to one denoiser :math:`D(x, t) \approx E[x_0|x_t]`.

With :math:`x = \alpha x_0 + \sigma\epsilon`, every common output is linear in D:

| the network predicts | :math:`D` |
| --- | --- |
| :math:`\epsilon` | :math:`(x - \sigma\epsilon) / \alpha` |
| the score s | :math:`(x + \sigma^2 s) / \alpha` |
| the velocity v | :math:`(\sigma v - \dot\sigma x) / w` |
| :math:`x_0` | itself |
| EDM's raw F | :math:`c_{skip} x + c_{out} F(c_{in} x, c_{noise})` |

with :math:`v = \dot\alpha x_0 + \dot\sigma\epsilon` and
:math:`w = \sigma\dot\alpha - \alpha\dot\sigma`.

A denoiser is any callable ``D(x, t)``; these functions return one, that can be copied
and pickled if the network can. Only the network works in its own dtype; the sums are
done in that of the state, in float32 at least. At small noise x and D agree in all the
digits that half precision has, and their difference is what counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from .._common.checks import finite_float
from .._common.precision import at_least_single
from .._common.types import DenoiserFn
from .ask import Ask, check_rows, exact_time, network_dtypes, unwrap
from .processes import Process
from .rows import Part, Rows, rows_of

Prediction = Callable[[Tensor, Tensor], Tensor]
"""A network's raw call ``net(x, t)``."""


D = TypeVar("D", bound="Denoiser")


class Denoiser(nn.Module):
    """A network's output turned into a denoiser ``D(x, t)``.

    It is an ``nn.Module``, so ``.to(device)`` and ``.eval()`` reach the network, which
    is called in the dtype of its parameters and is told the time in float32 at least;
    the result has the dtype of ``x``.

    Args:
        network: The raw network, ``network(x, t)``.
        process: The process it was trained under.
        convert: Maps (x, prediction, t) to the denoised sample.

    Raises:
        TypeError: If ``process`` is no process or ``network`` not callable.
    """

    def __init__(
        self,
        network: Prediction,
        process: Process,
        convert: Callable[[Tensor, Prediction, Tensor], Tensor],
    ) -> None:
        super().__init__()
        if not isinstance(process, Process):
            raise TypeError(
                "process: expected an artlib process such as artlib.VE(), got "
                f"{type(process).__name__}; the process comes before the network"
            )
        if not callable(network):
            raise TypeError(
                f"network: expected a callable, got {type(network).__name__}"
            )
        self.network = network
        self.process = process
        self._convert = convert
        self._ask_network = Ask()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Denoise: x [n, *shape] at time t -> [n, *shape]."""
        wide = x.to(at_least_single(x.dtype))
        predict = self._predict
        if wide.dtype != x.dtype and not network_dtypes(self.network):
            predict = partial(self._narrow, x.dtype)
        return self._convert(wide, predict, t).to(x.dtype)

    def rows(self, index: Rows) -> Denoiser:
        """The same denoiser for some of the samples; a network's ``rows`` are asked.

        Args:
            index: Which samples, a slice or row numbers [n].
        """
        network = rows_of(self.network, index)
        if network is self.network:
            return self
        part = self._twin()
        del part.network  # a child module gives way to a plain callable only so
        part.network = network
        return part

    def check_rows(self, count: int) -> None:
        """Refuse a number of samples that does not fit what the network holds.

        Args:
            count: How many samples there are.
        """
        check_rows(self.network, count)

    def _twin(self: D) -> D:
        """A shallow copy, of which children and buffers can be replaced."""
        twin = copy.copy(self)
        twin._modules, twin._buffers = dict(self._modules), dict(self._buffers)
        return twin

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        dtypes = network_dtypes(self.network) or [x.dtype]
        return self._ask_network(self.network, x, t, dtypes).to(x.dtype)

    def _narrow(self, dtype: torch.dtype, x: Tensor, t: Tensor) -> Tensor:
        """Of a network whose dtype cannot be seen, the answer in that of the state."""
        return self._predict(x.to(dtype), t).to(x.dtype)


def network_dtype(denoiser: Callable[..., Tensor]) -> torch.dtype | None:
    """The dtype that a network computes in, also behind a `CountNFE` or a wrapper.

    That of its parameters; where they differ, the one that the network itself declares
    (``network.dtype``), else that of most of its weights. What weights are only stored
    in, float8 or integers, is no dtype to compute in.

    Returns:
        The dtype, or None where there is no parameter.
    """
    return next(iter(network_dtypes(denoiser)), None)


def casts_itself(denoiser: DenoiserFn) -> bool:
    """Whether a denoiser takes care of its network's dtype, as a `Denoiser` does."""
    return any(isinstance(layer, Denoiser) for layer in unwrap(denoiser))


def uncounted(denoiser: DenoiserFn) -> DenoiserFn:
    """What is inside of the counters around a denoiser, or around a part of one."""
    if isinstance(denoiser, CountNFE | _CountedPart):
        return uncounted(denoiser.denoiser)
    if isinstance(denoiser, Part):
        return denoiser.around(uncounted(denoiser.denoiser))
    return denoiser


def _coefficient(value: Tensor, x: Tensor) -> Tensor:
    """A process coefficient, computed in float64, in the dtype of the state."""
    # In this order: the device may have no float64.
    return value.to(x.dtype).to(x.device)


@dataclass(frozen=True)
class _FromEpsilon:
    process: Process

    def __call__(self, x: Tensor, net: Prediction, t: Tensor) -> Tensor:
        s = exact_time(t, x)
        alpha, sigma = (
            _coefficient(c, x) for c in (self.process.alpha(s), self.process.sigma(s))
        )
        return (x - sigma * net(x, t)) / alpha


@dataclass(frozen=True)
class _FromScore:
    process: Process

    def __call__(self, x: Tensor, net: Prediction, t: Tensor) -> Tensor:
        s = exact_time(t, x)
        alpha, sigma = (
            _coefficient(c, x) for c in (self.process.alpha(s), self.process.sigma(s))
        )
        return (x + sigma**2 * net(x, t)) / alpha


@dataclass(frozen=True)
class _FromVelocity:
    process: Process

    def __call__(self, x: Tensor, net: Prediction, t: Tensor) -> Tensor:
        s, process = exact_time(t, x), self.process
        sigma, sigma_dot = process.sigma(s), process.sigma_dot(s)
        wronskian = sigma * process.alpha_dot(s) - process.alpha(s) * sigma_dot
        on_v = _coefficient(sigma / wronskian, x)
        on_x = _coefficient(sigma_dot / wronskian, x)
        return on_v * net(x, t) - on_x * x


def itself(x: Tensor, net: Prediction, t: Tensor) -> Tensor:
    """Of a network that answers with the denoised sample."""
    return net(x, t)


@dataclass(frozen=True)
class _FromEDM:
    process: Process
    sigma_data: float

    def __call__(self, x: Tensor, net: Prediction, t: Tensor) -> Tensor:
        s, process = exact_time(t, x), self.process
        level = process.noise_level(s)
        total = level**2 + self.sigma_data**2
        skip = _coefficient(self.sigma_data**2 / total, x)
        out = _coefficient(level * self.sigma_data / total.sqrt(), x)
        scale = _coefficient(1 / total.sqrt(), x)
        noise = _coefficient(level.log() / 4, x)
        y = x / _coefficient(process.alpha(s), x)
        return skip * y + out * net(scale * y, noise)


def from_epsilon(process: Process, network: Prediction) -> Denoiser:
    r"""Denoiser from a noise prediction: :math:`D = (x - \sigma\epsilon) / \alpha`.

    Args:
        process: The process it was trained under; with alpha = 0 at ``t_max``
            (`RectifiedFlow`) a noise prediction says nothing about x_0 there.
        network: ``network(x, t) -> epsilon``, same shape as ``x``.
    """
    return Denoiser(network, process, _FromEpsilon(process))


def from_score(process: Process, network: Prediction) -> Denoiser:
    r"""Denoiser from a score network (Tweedie): :math:`D = (x + \sigma^2 s)/\alpha`.

    Args:
        process: The process it was trained under.
        network: ``network(x, t) -> score``, same shape as ``x``.
    """
    return Denoiser(network, process, _FromScore(process))


def from_velocity(process: Process, network: Prediction) -> Denoiser:
    r"""Denoiser from a prediction of :math:`\dot\alpha x_0 + \dot\sigma\epsilon`.

    In `RectifiedFlow` that is flow matching's :math:`\epsilon - x_0`. It is the
    velocity in the process's own time; the "v-prediction" of diffusion models,
    :math:`\alpha\epsilon - \sigma x_0`, is another thing.

    Args:
        process: The process it was trained under.
        network: ``network(x, t) -> velocity``, same shape as ``x``.
    """
    return Denoiser(network, process, _FromVelocity(process))


def from_x0(process: Process, network: Prediction) -> Denoiser:
    """Denoiser from a network that predicts the clean sample: itself.

    Args:
        process: The process it was trained under.
        network: ``network(x, t) -> x0_hat``, same shape as ``x``.
    """
    return Denoiser(network, process, itself)


def from_edm(
    process: Process, network: Prediction, *, sigma_data: float = 0.5
) -> Denoiser:
    r"""Denoiser from EDM's raw network F, with its preconditioning.

    .. math::
        D = c_{skip} y + c_{out} F(c_{in} y,\ \tfrac14 \log\sigma), \quad
        c_{skip} = \tfrac{\sigma_d^2}{\sigma^2 + \sigma_d^2},\
        c_{out} = \tfrac{\sigma\sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}},\
        c_{in} = \tfrac{1}{\sqrt{\sigma^2 + \sigma_d^2}}

    with :math:`y = x/\alpha` and :math:`\sigma` the noise level :math:`\sigma/\alpha`.

    Args:
        process: The process to sample under; its noise level must stay finite.
        network: ``network(c_in * y, c_noise) -> F``.
        sigma_data: Standard deviation of the data.

    References:
        Karras et al., https://arxiv.org/abs/2206.00364, eq. (7) and Table 1.
    """
    sigma_data = finite_float(sigma_data, "sigma_data", positive=True)
    return Denoiser(network, process, _FromEDM(process, sigma_data))


class CountNFE:
    """A denoiser that counts its network evaluations (NFE).

    One call on a batch is one evaluation, as in the literature.

    Args:
        denoiser: Any callable ``D(x, t)``.

    Attributes:
        nfe: Evaluations since the start or the last `reset`.
    """

    def __init__(self, denoiser: DenoiserFn) -> None:
        if not callable(denoiser):
            raise TypeError(
                f"denoiser: expected a callable D(x, t), got {type(denoiser).__name__}"
            )
        self.denoiser = denoiser
        self.nfe = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Count one evaluation and hand the call on."""
        self.nfe += 1
        return self.denoiser(x, t)

    def reset(self) -> None:
        """Set the count to 0."""
        self.nfe = 0

    def rows(self, index: Rows) -> DenoiserFn:
        """The denoiser for some of the samples; what it does is counted here.

        Args:
            index: Which samples, a slice or row numbers [n].
        """
        return _CountedPart(self, rows_of(self.denoiser, index))


class _CountedPart:
    """A part of a counted denoiser: it counts into the whole."""

    def __init__(self, whole: CountNFE, denoiser: DenoiserFn) -> None:
        self.denoiser = denoiser
        self._whole = whole

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self._whole.nfe += 1
        return self.denoiser(x, t)

    def rows(self, index: Rows) -> _CountedPart:
        return _CountedPart(self._whole, rows_of(self.denoiser, index))
