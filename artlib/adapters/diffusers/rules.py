r"""What the schedulers of diffusers do with noise levels, and which can be given them.

Read off the release 0.42 by running it. A scheduler steps through its array ``sigmas``
and has the network told ``timesteps``; what filled them does not matter to its steps.
So it lets itself be set: it counts its own steps, and a schedule's levels, with the
fractional times that belong to them, are put in their place.

The raw ``arguments`` of ``set_timesteps`` are what a pipeline can be given instead.
Four schedulers take noise levels there, once what they do to them is undone:

| scheduler | takes | what it does to it |
| --- | --- | --- |
| EulerDiscrete | K + 1 sigmas with the 0 | silently drops the last if it is not 0 |
| EDMEuler | a ramp r in [0, 1] | :math:`(s_{max}^{1/\rho} + r\,\Delta)^\rho` |
| FlowMatchEuler | K sigmas without the 0 | shift :math:`s = a r / (1 + (a - 1) r)` |
| Heun | K fractional timesteps | interpolates sigma, doubles all but the first |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._common.errors import ExportError
from ..levels import Coordinate
from .arrays import (
    Arrays,
    fresh_noise,
    heun,
    kdpm2,
    kdpm2_ancestral,
    ltx_ancestral,
    once,
    reverse_sde,
)
from .times import config_of, is_edm, is_flow, table_levels, tells_log


@dataclass(frozen=True)
class Rule:
    r"""How one scheduler class is set.

    Attributes:
        arrays: Maps (levels [K + 1] down to 0, scheduler) to what it keeps of them.
        check: Raises `ExportError` where an option of the scheduler stands in the way.
        scaled: Whether its state is :math:`x = \alpha y`, not y itself.
        needs_mu: Whether its ``set_timesteps`` insists on ``mu`` if it shifts by one.
        arguments: Maps (scheduler, levels [K] without the 0, mu) to exact keyword
            arguments of its ``set_timesteps``, where there are any.
    """

    arrays: Callable[[Tensor, Any], Arrays] = once
    check: Callable[[Any], None] = lambda scheduler: None
    scaled: bool = False
    needs_mu: bool = False
    arguments: Callable[[Any, np.ndarray, float | None], dict[str, Any]] | None = None


def rule_for(scheduler: Any) -> Rule:
    """The rule of a scheduler.

    Raises:
        TypeError: If it is no diffusers scheduler.
        ExportError: If there is none; the message gives the reason.
    """
    config_of(scheduler)
    reason = "its steps are not known here"
    for kind in type(scheduler).__mro__:
        if kind.__module__.startswith("diffusers."):
            if kind.__name__ in RULES:
                return RULES[kind.__name__]
            if kind.__name__ in REFUSED:
                reason = REFUSED[kind.__name__]
                break
    name = type(scheduler).__name__
    remedy = (
        "FlowMatchEulerDiscreteScheduler"
        if "Flow" in name
        else "EDMEulerScheduler"
        if is_edm(scheduler)
        else "EulerDiscreteScheduler"
    )
    raise ExportError(
        f"scheduler: {name} cannot be given noise levels, {reason}; use {remedy}"
        ".from_config(pipe.scheduler.config), or sample with artlib.sample"
    )


def coordinate(scheduler: Any) -> Coordinate:
    """The coordinate in which a scheduler counts noise."""
    return "flow" if is_flow(scheduler) else "level"


def check_range(scheduler: Any, levels: np.ndarray) -> None:
    """Refuse noise that the network was never shown (1e-4 for round-off).

    Args:
        scheduler: The scheduler, which knows how the network was trained.
        levels: Noise levels [K], descending, without the 0.

    Raises:
        ExportError: If they leave the range; the message gives both.
    """
    if is_flow(scheduler) or tells_log(scheduler):
        return
    if is_edm(scheduler):
        config = scheduler.config
        low, high, whose = config.sigma_min, config.sigma_max, "the scheduler"
    else:
        table = table_levels(scheduler)
        low, high, whose = float(table[0]), float(table[-1]), "the network"
    if levels[0] > high * (1 + 1e-4) or levels[-1] < low * (1 - 1e-4):
        raise ExportError(
            f"schedule: its noise levels run from {levels[0]:.6g} to {levels[-1]:.6g}, "
            f"but {whose} knows {high:.6g} to {low:.6g} and would be told a wrong one; "
            "learn the schedule on the denoiser of artlib.adapters.diffusers.denoiser, "
            "whose process has that range"
        )


def shift_of(
    scheduler: Any, mu: float | None, fixed: float
) -> tuple[float, float | None]:
    """The factor a of a scheduler's shift, and the ``mu`` that makes it.

    Raises:
        ExportError: If it takes no ``mu``, or this one makes no positive factor.
    """
    dynamic = getattr(scheduler.config, "use_dynamic_shifting", None)
    if mu is not None and dynamic is None:
        raise ExportError(
            f"mu: got {mu}, but {type(scheduler).__name__} knows none; leave it out"
        )
    if not dynamic:
        if mu is not None:
            raise ExportError(
                f"mu: got {mu}, but the scheduler has use_dynamic_shifting=False; "
                "leave it out"
            )
        return fixed, None
    linear = getattr(scheduler.config, "time_shift_type", "exponential") == "linear"
    if mu is None:
        mu = 1.0 if linear else 0.0
    a = mu if linear else math.exp(mu)
    if not (math.isfinite(a) and a > 0):
        raise ExportError(f"mu: {mu} makes a shift of {a}, expected a positive one")
    return a, mu


def _ends_at_zero(scheduler: Any) -> None:
    kind = scheduler.config.final_sigmas_type
    if kind != "zero":
        raise ExportError(
            f"scheduler: final_sigmas_type={kind!r} is for steps that end at the last "
            "noise level instead of 0; make it with final_sigmas_type='zero'"
        )


def _refuse_flags(scheduler: Any, *names: str) -> None:
    for name in names:
        if getattr(scheduler.config, name, None):
            raise ExportError(
                f"scheduler: {name}={getattr(scheduler.config, name)!r} overrides the "
                f"noise levels it is given; make it with "
                f"{type(scheduler).__name__}.from_config(config, {name}=None)"
            )


def _unipc_check(scheduler: Any) -> None:
    _ends_at_zero(scheduler)
    _refuse_flags(scheduler, "solver_p")


def _forward_check(scheduler: Any) -> None:
    _refuse_flags(scheduler, "invert_sigmas")


_RESPACING = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def _euler(scheduler: Any, levels: np.ndarray, mu: float | None) -> dict[str, Any]:
    return {"sigmas": [*levels.tolist(), 0.0]}


def _edm(scheduler: Any, levels: np.ndarray, mu: float | None) -> dict[str, Any]:
    config = scheduler.config
    if config.sigma_schedule != "karras":
        raise ExportError(
            f"scheduler: sigma_schedule={config.sigma_schedule!r} ignores the values "
            "it is given; make it with sigma_schedule='karras', or use "
            "schedule.to_diffusers(scheduler, K)"
        )
    top, bottom = (
        config.sigma_max ** (1 / config.rho),
        config.sigma_min ** (1 / config.rho),
    )
    ramp = (levels ** (1 / config.rho) - top) / (bottom - top)
    return {"num_inference_steps": len(levels), "sigmas": torch.from_numpy(ramp)}


def _flow_match(scheduler: Any, levels: np.ndarray, mu: float | None) -> dict[str, Any]:
    _refuse_flags(scheduler, *_RESPACING, "shift_terminal")
    a, _ = shift_of(scheduler, mu, float(scheduler.shift))
    # The inverse of s = a r / (1 + (a - 1) r).
    return {"sigmas": (levels / (a - (a - 1) * levels)).tolist()}


def _heun(scheduler: Any, levels: np.ndarray, mu: float | None) -> dict[str, Any]:
    _refuse_flags(scheduler, *_RESPACING)
    table = table_levels(scheduler).astype(np.float64)
    times = np.interp(levels, table, np.arange(len(table)))
    return {"timesteps": times.tolist()}


def _noise_of_dpm(levels: Tensor, scheduler: Any) -> Arrays:
    noisy = str(scheduler.config.algorithm_type).startswith("sde-")
    return (reverse_sde if noisy else once)(levels, scheduler)


def _below_one(levels: Tensor, scheduler: Any) -> Arrays:
    # Where it divides by 1 - t; so UniPC itself does it.
    return once(levels.clamp(max=1 - 1e-6) if is_flow(scheduler) else levels, scheduler)


def _noise_of_flow(levels: Tensor, scheduler: Any) -> Arrays:
    noisy = getattr(scheduler.config, "stochastic_sampling", False)
    return (fresh_noise if noisy else once)(levels, scheduler)


RULES: dict[str, Rule] = {
    "DPMSolverMultistepScheduler": Rule(_noise_of_dpm, _ends_at_zero, scaled=True),
    "DPMSolverSinglestepScheduler": Rule(_noise_of_dpm, _ends_at_zero, scaled=True),
    "EDMDPMSolverMultistepScheduler": Rule(_noise_of_dpm, _ends_at_zero),
    "EDMEulerScheduler": Rule(check=_ends_at_zero, arguments=_edm),
    "EulerAncestralDiscreteScheduler": Rule(reverse_sde),
    "EulerDiscreteScheduler": Rule(arguments=_euler),
    "FlowMatchEulerDiscreteScheduler": Rule(
        _noise_of_flow, _forward_check, needs_mu=True, arguments=_flow_match
    ),
    "FlowMatchHeunDiscreteScheduler": Rule(heun),
    "FlowMatchLCMScheduler": Rule(fresh_noise, _forward_check, needs_mu=True),
    "HeunDiscreteScheduler": Rule(heun, arguments=_heun),
    "KDPM2AncestralDiscreteScheduler": Rule(kdpm2_ancestral),
    "KDPM2DiscreteScheduler": Rule(kdpm2),
    "LMSDiscreteScheduler": Rule(),
    "LTXEulerAncestralRFScheduler": Rule(ltx_ancestral),
    "UniPCMultistepScheduler": Rule(
        _below_one, _unipc_check, scaled=True, needs_mu=True
    ),
}
"""The schedulers that can be set."""

_TABLE = "which it looks up in a table by integer training steps"
_DISTILLED = "since it is for networks distilled to steps of their own"
_NOT_AT_ZERO = "since its formula has no value at noise 0, where a schedule ends"
_NO_TRIAL = "since it needs the package torchsde and was not tried"
_FORWARD = "since it runs from data to noise"
_TOKENS = "since it samples tokens"
REFUSED: dict[str, str] = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "CMStochasticIterativeScheduler": _DISTILLED,
    "CogVideoXDDIMScheduler": _TABLE,
    "CogVideoXDPMScheduler": _TABLE,
    "CosineDPMSolverMultistepScheduler": _NO_TRIAL,
    "DDIMInverseScheduler": _FORWARD,
    "DDIMParallelScheduler": _TABLE,
    "DDIMScheduler": _TABLE + " (Euler takes the same steps)",
    "DDPMParallelScheduler": _TABLE,
    "DDPMScheduler": _TABLE + " (EulerAncestralDiscreteScheduler is like it)",
    "DDPMWuerstchenScheduler": "since it has a noise schedule of its own",
    "DEISMultistepScheduler": _NOT_AT_ZERO,
    "DPMSolverMultistepInverseScheduler": _FORWARD,
    "DPMSolverSDEScheduler": _NO_TRIAL,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "FlowMapEulerDiscreteScheduler": _DISTILLED,
    "HeliosDMDScheduler": _DISTILLED,
    "HeliosScheduler": "since it steps through stages of growing resolution",
    "IPNDMScheduler": "since it has a noise schedule of its own",
    "KarrasVeScheduler": "since it has a noise schedule of its own",
    "LCMScheduler": _TABLE,
    "MiniMaxH3Scheduler": "since its time and its velocity run the other way",
    "PNDMScheduler": _TABLE,
    "PiflowScheduler": _DISTILLED,
    "RFD4ProteinaScheduler": "since it has a noise schedule of its own",
    "RePaintScheduler": _TABLE,
    "SASolverScheduler": _NOT_AT_ZERO,
    "SCMScheduler": _DISTILLED,
    "ScoreSdeVeScheduler": "since it has a noise schedule of its own",
    "TCDScheduler": _TABLE,
    "UnCLIPScheduler": _TABLE,
    "VQDiffusionScheduler": _TOKENS,
}
"""The others, and why."""


def schedulers() -> dict[str, str]:
    """The schedulers of diffusers 0.42 by name, and why some cannot hold a schedule.

    Returns:
        Names in order; an empty reason for those that `to_diffusers` sets.
    """
    reasons = {**dict.fromkeys(RULES, ""), **REFUSED}
    return {name: reasons[name] for name in sorted(reasons)}
