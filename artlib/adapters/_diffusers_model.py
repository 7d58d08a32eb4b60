r"""A network of diffusers as a denoiser, in the coordinate its schedulers step in.

A scheduler's table :math:`\bar\alpha_i` of training steps gives the noise level
:math:`s_i = \sqrt{(1 - \bar\alpha_i) / \bar\alpha_i}`. Euler, Heun and DDIM step in s
on :math:`y = x / \sqrt{\bar\alpha}`, so that is where ART has to look: the process is
`VE` from the last s to the first, the network is called on :math:`y / \sqrt{1 + s^2}`,
at the fractional step that interpolates log s, and, with its output o,

| prediction_type | :math:`D(y, s)` |
| --- | --- |
| ``epsilon`` | :math:`y - s\,o` |
| ``v_prediction`` | :math:`y / (1 + s^2) - s\,o / \sqrt{1 + s^2}` |
| ``sample`` | o |
| ``flow_prediction`` | :math:`x - t\,o`, on `RectifiedFlow` |

Schedulers of the EDM family (`VE`, with its preconditioning) are known too.

References:
    Salimans and Ho, https://arxiv.org/abs/2202.00512 (v); Karras et al.,
    https://arxiv.org/abs/2206.00364, Table 1; Lipman et al.,
    https://arxiv.org/abs/2210.02747.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import finite_float
from .._rows import Rows
from ..denoisers import Denoiser, Prediction, network_dtype
from ..processes import VE, Process, RectifiedFlow, as_time
from ._diffusers_rules import table_levels
from ._guidance import Condition, Guidance

_FLOW_T_MIN = 1e-3


def denoiser(
    network: nn.Module,
    scheduler: Any,
    *,
    condition: Condition | None = None,
    unconditional: Condition | None = None,
    guidance: float = 1.0,
    timestep_scale: float = 1.0,
) -> DiffusersDenoiser:
    r"""A denoiser D(x, t) from a UNet or a transformer of diffusers.

    Its ``.process`` is the one to make the flow with, and an ``x_T`` of standard normal
    draws times ``process.sigma(process.t_max)`` is what pipelines start from.

    Args:
        network: Called as ``network(x, timestep=..., return_dict=False, **condition)``;
            if it also predicts a variance, that half of its channels is cut off.
        scheduler: Any scheduler of diffusers that knows how the network was trained:
            one with ``alphas_cumprod`` (DDPM, DDIM, Euler, ...), of the EDM family, or
            of flow matching.
        condition: Further arguments of the network with one row, or one per sample:
            ``{"class_labels": ...}``, ``{"encoder_hidden_states": ...}``,
            ``{"added_cond_kwargs": {...}}``.
        unconditional: The same for the empty prompt; needed for guidance.
        guidance: Factor of classifier-free guidance, 1 is none; the pipelines'
            ``guidance_scale``. The doubled batch counts as one evaluation.
        timestep_scale: Factor on the time that the network is told; a few
            transformers count it in [0, 1] (1e-3).

    Raises:
        TypeError: If ``network`` is no module or ``scheduler`` no scheduler.
        ValueError: If its prediction type is unknown or does not fit, or the guidance
            lacks a condition.

    Example:
        >>> import artlib                                            # doctest: +SKIP
        >>> net = artlib.adapters.diffusers.denoiser(pipe.unet, pipe.scheduler)
        >>> flow = artlib.ProbabilityFlow(net.process, net)          # doctest: +SKIP
    """
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"network: expected a torch module such as pipe.unet, got "
            f"{type(network).__name__}; the network comes before the scheduler"
        )
    guide = Guidance(condition, unconditional, guidance)
    scale = finite_float(timestep_scale, "timestep_scale", positive=True)
    return DiffusersDenoiser(network, scheduler, guide, scale)


def scheduler_process(scheduler: Any) -> Process:
    """The process, in the coordinate its own Euler steps in, of a scheduler.

    Raises:
        TypeError: If it is no scheduler of diffusers.
        ValueError: If it says nothing about how its network was trained.
    """
    config = _config(scheduler)
    if _is_flow(scheduler):
        return RectifiedFlow(t_min=_FLOW_T_MIN)
    if _is_edm(scheduler):
        return VE(float(config.sigma_min), float(config.sigma_max))
    if hasattr(scheduler, "alphas_cumprod"):
        table = table_levels(scheduler).astype(np.float64)
        return VE(float(table[0]), float(table[-1]))
    raise ValueError(
        f"scheduler: {type(scheduler).__name__} has neither alphas_cumprod nor "
        "EDM's preconditioning and is not of flow matching; wrap the network with "
        "artlib.from_epsilon and its relatives instead"
    )


class DiffusersDenoiser(Denoiser):
    """What `denoiser` returns: a module ``D(x, t)`` in float64 around the network.

    Args:
        network: As in `denoiser`.
        scheduler: As in `denoiser`.
        guide: How the network is called under its condition.
        timestep_scale: As in `denoiser`.

    Attributes:
        process: The process to sample under.
        prediction: What the network predicts, in diffusers' words.
    """

    def __init__(
        self, network: nn.Module, scheduler: Any, guide: Guidance, timestep_scale: float
    ) -> None:
        process = scheduler_process(scheduler)
        convert = self._formula(scheduler)
        super().__init__(network, process, convert)
        self._guide = guide
        self._scale = timestep_scale

    def rows(self, index: Rows, count: int) -> DiffusersDenoiser:
        """The same with the conditions of some of the samples.

        Args:
            index: Which samples, a slice or row numbers [n].
            count: How many there are in all.

        Raises:
            ValueError: If a condition has neither one row nor ``count``.
        """
        part = self._twin()
        part._guide = self._guide.rows(index, count)
        return part

    def _formula(self, scheduler: Any) -> Callable[..., Tensor]:
        config = _config(scheduler)
        if _is_flow(scheduler):
            self.prediction = getattr(config, "prediction_type", "flow_prediction")
            steps = float(config.num_train_timesteps)
            if self.prediction != "flow_prediction":
                raise _unknown(self.prediction, "a flow")
            return lambda x, net, t: x - _like(t, x) * net(x, steps * t)
        self.prediction = config.prediction_type
        if _is_edm(scheduler):
            return self._edm(float(config.sigma_data))
        convert = _FROM_LEVEL.get(self.prediction)
        if convert is None:
            raise _unknown(self.prediction, "a scheduler with alphas_cumprod")
        continuous = getattr(config, "timestep_type", "discrete") == "continuous"
        if continuous and self.prediction == "v_prediction":
            time: Callable[[Tensor], Tensor] = _quarter_log
        else:
            time = _Steps(table_levels(scheduler))

        def denoise(y: Tensor, net: Prediction, s: Tensor) -> Tensor:
            level = as_time(s)
            scaled = y / _like((1 + level**2).sqrt(), y)
            return convert(y, _like(level, y), net(scaled, time(level)))

        return denoise

    def _edm(self, data: float) -> Callable[..., Tensor]:
        sign = {"epsilon": 1.0, "v_prediction": -1.0}.get(self.prediction)
        if sign is None:
            raise _unknown(self.prediction, "a scheduler of the EDM family")

        def denoise(y: Tensor, net: Prediction, s: Tensor) -> Tensor:
            level = as_time(s)
            total = level**2 + data**2
            output = net(y / _like(total.sqrt(), y), _quarter_log(level))
            skip = _like(data**2 / total, y)
            return skip * y + _like(sign * level * data / total.sqrt(), y) * output

        return denoise

    def _predict(self, x: Tensor, time: Tensor) -> Tensor:
        """The network's answer in the dtype of ``x``; its time stays in float32."""
        told = (self._scale * time).to(torch.float32).reshape(-1).expand(len(x))
        dtype = network_dtype(self.network) or torch.float32
        return self._guide(self._call, x.to(dtype), told).to(x.dtype)

    def _call(self, x: Tensor, time: Tensor, **condition: Any) -> Tensor:
        cast = {k: _cast(v, x.dtype) for k, v in condition.items()}
        network: Any = self.network
        answer = network(x, timestep=time, return_dict=False, **cast)[0]
        if answer.ndim > 1 and answer.shape[1] == 2 * x.shape[1]:
            answer = answer[:, : x.shape[1]]  # the other half is a variance
        return answer


class _Steps:
    """Fractional training step of a noise level, linear in its logarithm."""

    def __init__(self, table: np.ndarray) -> None:
        self._logs = torch.from_numpy(np.log(table.astype(np.float64)))

    def __call__(self, level: Tensor) -> Tensor:
        logs = self._logs.to(level.device)
        x = torch.log(level.double())
        low = torch.searchsorted(logs, x.detach().contiguous(), right=True) - 1
        low = low.clamp(0, len(logs) - 2)
        step = low + (x - logs[low]) / (logs[low + 1] - logs[low])
        return step.clamp(0, len(logs) - 1)


_FROM_LEVEL: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda y, s, o: y - s * o,
    "v_prediction": lambda y, s, o: y / (1 + s**2) - s / (1 + s**2).sqrt() * o,
    "sample": lambda y, s, o: o,
}


def _quarter_log(level: Tensor) -> Tensor:
    return torch.log(level) / 4


def _like(value: Tensor, x: Tensor) -> Tensor:
    return value.to(dtype=x.dtype, device=x.device)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of a condition in the network's dtype."""
    if isinstance(value, dict):
        return {name: _cast(inner, dtype) for name, inner in value.items()}
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def _config(scheduler: Any) -> Any:
    config = getattr(scheduler, "config", None)
    if config is None or not hasattr(scheduler, "set_timesteps"):
        raise TypeError(
            "scheduler: expected a scheduler of diffusers such as pipe.scheduler, got "
            f"{type(scheduler).__name__}"
        )
    return config


def _is_flow(scheduler: Any) -> bool:
    name = type(scheduler).__name__
    return name.startswith("FlowMatch") or bool(
        getattr(scheduler.config, "use_flow_sigmas", False)
    )


def _is_edm(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("EDM")


def _unknown(prediction: str, of_what: str) -> ValueError:
    return ValueError(
        f"scheduler: prediction_type={prediction!r} is not one that {of_what} can turn "
        "into a denoiser; wrap the network with artlib.from_epsilon and its relatives"
    )
