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

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._common.checks import finite_float
from ...flow.ask import exact_time
from ...flow.denoisers import Prediction, network_dtype
from ...flow.processes import VE, Process, RectifiedFlow
from .guidance import Condition, Guidance, GuidedDenoiser, without_variance
from .times import (
    config_of,
    is_edm,
    is_flow,
    network_scale,
    no_signal_left,
    quarter_log,
    table_levels,
    told,
)

_FLOW_T_MIN = 1e-3


def denoiser(
    network: nn.Module,
    scheduler: Any,
    *,
    condition: Condition | None = None,
    unconditional: Condition | None = None,
    guidance: float = 1.0,
    guidance_rescale: float = 0.0,
    together: bool = True,
    shared: Collection[str] = (),
    timestep_scale: float | None = None,
) -> DiffusersDenoiser:
    r"""A denoiser D(x, t) from a UNet or a transformer of diffusers.

    Its ``.process`` is the one to make the flow with, and an ``x_T`` of standard normal
    draws times ``process.sigma(process.t_max)`` is what pipelines start from.

    Args:
        network: Called as ``network(x, timestep=..., return_dict=False, **condition)``
            with one time per sample, and in its own dtype; if it also predicts a
            variance, that half of its channels is cut off.
        scheduler: Any scheduler of diffusers that knows how the network was trained:
            one with ``alphas_cumprod`` (DDPM, DDIM, Euler, ...), of the EDM family, or
            of flow matching.
        condition: Further arguments of the network with one row, or one per sample:
            ``{"class_labels": ...}``, ``{"encoder_hidden_states": ...}``, also nested,
            ``{"added_cond_kwargs": {...}}``, or in lists. Flux's ``img_ids`` and
            ``txt_ids``, rotary embeddings and what is no tensor are shared. The name
            ``"concatenated"`` is for channels that go behind those of the state: mask
            and masked image of a network for inpainting, a depth map, a first frame.
        unconditional: The same for the empty prompt; needed for guidance.
        guidance: Factor of classifier-free guidance, 1 is none; the pipelines'
            ``guidance_scale``. It counts as one evaluation.
        guidance_rescale: Share, in [0, 1], of the guided answer that is brought back to
            the standard deviation of the conditional one; as the pipelines' argument.
        together: Ask for both answers in one call on a doubled batch, as most pipelines
            do. Otherwise in two: it takes half of the memory, and the two conditions
            may differ in length.
        shared: Names of further arguments that all samples share, whatever their shape.
        timestep_scale: Factor on the time that the network is told, on top of the
            scheduler's: 1e-3 where a transformer counts the time of flow matching in
            [0, 1] (Flux) and not in 1000 (Stable Diffusion 3). Known, by default, for
            the transformers of diffusers' flow pipelines.

    Raises:
        TypeError: If ``network`` is no module or ``scheduler`` no scheduler.
        ValueError: If its prediction type is unknown or does not fit, the guidance
            lacks a condition, or it is not known what the network is told of the time.

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
    guide = Guidance(
        condition,
        unconditional,
        guidance,
        rescale=guidance_rescale,
        together=together,
        shared=shared,
    )
    config_of(scheduler)
    scale = (
        network_scale(network, scheduler)
        if timestep_scale is None
        else finite_float(timestep_scale, "timestep_scale", positive=True)
    )
    return DiffusersDenoiser(network, scheduler, guide, scale)


def scheduler_process(scheduler: Any) -> Process:
    """The process, in the coordinate its own Euler steps in, of a scheduler.

    Raises:
        TypeError: If it is no scheduler of diffusers.
        ValueError: If it says nothing about how its network was trained.

    Where no signal is left at the last training step (``rescale_betas_zero_snr``), its
    level is 4096 or more, as in the schedulers of diffusers that step in sigma.
    """
    config = config_of(scheduler)
    if is_flow(scheduler):
        return RectifiedFlow(t_min=_FLOW_T_MIN)
    if is_edm(scheduler):
        return VE(float(config.sigma_min), float(config.sigma_max))
    if hasattr(scheduler, "alphas_cumprod"):
        table = table_levels(scheduler)
        return VE(float(table[0]), float(table[-1]))
    raise ValueError(
        f"scheduler: {type(scheduler).__name__} has neither alphas_cumprod nor "
        "EDM's preconditioning and is not of flow matching; wrap the network with "
        "artlib.from_epsilon and its relatives instead"
    )


class DiffusersDenoiser(GuidedDenoiser):
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
        self.prediction, convert = _formula(scheduler)
        super().__init__(network, process, convert, guide)
        self._scale = timestep_scale

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's answer in the dtype of ``x``; its time stays in float32."""
        time = (self._scale * t).to(torch.float32).to(x.device).reshape(-1)
        dtype = network_dtype(self.network) or torch.float32
        time = time.expand(len(x))
        return self._guide(self._call, x.to(dtype), time).to(x.dtype)

    def _call(self, x: Tensor, time: Tensor, **condition: Any) -> Tensor:
        state, cast = self._given(x, condition)
        network: Any = self.network
        # A copy: a network may scale its time in place.
        answer = network(state, timestep=time.clone(), return_dict=False, **cast)[0]
        return without_variance(answer, x)


def _formula(scheduler: Any) -> tuple[str, Callable[..., Tensor]]:
    """What a network predicts, and how its answer becomes a denoised sample.

    The formula is given (x, ask, t), with ``ask(x, time)`` the network's answer; it can
    be pickled.
    """
    config, time = config_of(scheduler), told(scheduler)
    if is_flow(scheduler):
        prediction = getattr(config, "prediction_type", "flow_prediction")
        if prediction != "flow_prediction":
            raise _unknown(prediction, "a flow")
        return prediction, _OfFlow(time)
    prediction = config.prediction_type
    if is_edm(scheduler):
        sign = {"epsilon": 1.0, "v_prediction": -1.0}.get(prediction)
        if sign is None:
            raise _unknown(prediction, "a scheduler of the EDM family")
        return prediction, _OfEDM(sign, float(config.sigma_data))
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise _unknown(prediction, "a scheduler with alphas_cumprod")
    if prediction == "epsilon" and no_signal_left(scheduler):
        raise ValueError(
            "scheduler: no signal is left at its last training step "
            "(rescale_betas_zero_snr=True), where prediction_type='epsilon' says "
            "nothing about the sample; make it with prediction_type='v_prediction' if "
            "that is what the network predicts, or with rescale_betas_zero_snr=False"
        )
    return prediction, OfTable(prediction, time)


# Classes and not closures, so that a denoiser can be copied and pickled.


@dataclass(frozen=True)
class _OfFlow:
    told: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, ask: Prediction, t: Tensor) -> Tensor:
        time = exact_time(t, x)
        return x - _like(time, x) * ask(x, self.told(time))


@dataclass(frozen=True)
class OfTable:
    """The formula of a network that was trained on a table of steps."""

    prediction: str
    told: Callable[[Tensor], Tensor]

    def __call__(self, y: Tensor, ask: Prediction, s: Tensor) -> Tensor:
        level = exact_time(s, y)
        output = ask(y / _like((1 + level**2).sqrt(), y), self.told(level))
        level = _like(level, y)
        if self.prediction == "epsilon":
            return y - level * output
        if self.prediction == "v_prediction":
            return y / (1 + level**2) - level / (1 + level**2).sqrt() * output
        return output


@dataclass(frozen=True)
class _OfEDM:
    sign: float
    sigma_data: float

    def __call__(self, y: Tensor, ask: Prediction, s: Tensor) -> Tensor:
        level = exact_time(s, y)
        total = level**2 + self.sigma_data**2
        output = ask(y / _like(total.sqrt(), y), quarter_log(level))
        skip = _like(self.sigma_data**2 / total, y)
        out = self.sign * level * self.sigma_data / total.sqrt()
        return skip * y + _like(out, y) * output


def _like(value: Tensor, x: Tensor) -> Tensor:
    # In this order: the device may have no float64.
    return value.to(x.dtype).to(x.device)


def _unknown(prediction: str, of_what: str) -> ValueError:
    return ValueError(
        f"scheduler: prediction_type={prediction!r} is not one that {of_what} can turn "
        "into a denoiser; wrap the network with artlib.from_epsilon and its relatives"
    )
