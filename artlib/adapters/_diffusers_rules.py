r"""How each scheduler of diffusers has to be told its noise levels, and whether it can.

Read off the release 0.42 by running it. Every rule turns wanted noise levels into the
arguments of ``set_timesteps``, undoing in advance what the scheduler does to them:

| scheduler | takes | what it does to it |
| --- | --- | --- |
| EulerDiscrete | K + 1 sigmas with the 0 | silently drops the last if it is not 0 |
| EDMEuler | a ramp r in [0, 1] | :math:`(s_{max}^{1/\rho} + r\,\Delta)^\rho` |
| FlowMatchEuler | K sigmas without the 0 | shift :math:`s = a r / (1 + (a - 1) r)` |
| UniPC | the same as an array, flow only | the same; truncates the network's times |
| Heun | K fractional timesteps | interpolates sigma, doubles all but the first |
| DPMSolverMultistep | K timesteps | truncates them to integers |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._schedule_io import ExportError
from ._levels import Coordinate


@dataclass(frozen=True)
class Rule:
    """How one scheduler class is set.

    Attributes:
        coordinate: Maps the scheduler to the coordinate it counts noise in.
        arguments: Maps (scheduler, levels [K] without the 0, mu) to the keyword
            arguments of its ``set_timesteps``.
        repeats: How often it lists each noise level after the first.
        takes_mu: Whether its ``set_timesteps`` knows ``mu``.
        float_times: Whether its truncated timesteps are to be replaced by the exact
            ones (``num_train_timesteps`` times sigma).
    """

    coordinate: Callable[[Any], Coordinate]
    arguments: Callable[[Any, np.ndarray, float | None], dict[str, Any]]
    repeats: int = 1
    takes_mu: bool = False
    float_times: bool = False


def table_levels(scheduler: Any) -> np.ndarray:
    """Noise levels sigma/alpha of a scheduler's training timesteps, ascending [T]."""
    # In the scheduler's own float32, so that what it interpolates is inverted.
    product = scheduler.alphas_cumprod.cpu().numpy()
    levels: np.ndarray = ((1 - product) / product) ** 0.5
    return levels


def rule_for(scheduler: Any) -> Rule:
    """The rule of a scheduler.

    Raises:
        TypeError: If it is no diffusers scheduler.
        ExportError: If there is none; the message gives the reason.
    """
    if not callable(getattr(scheduler, "set_timesteps", None)) or not hasattr(
        scheduler, "config"
    ):
        raise TypeError(
            "scheduler: expected a scheduler of diffusers such as pipe.scheduler, got "
            f"{type(scheduler).__name__}"
        )
    for kind in type(scheduler).__mro__:
        if kind.__name__ in _RULES and kind.__module__.startswith("diffusers."):
            return _RULES[kind.__name__]
    name = type(scheduler).__name__
    remedy = (
        "FlowMatchEulerDiscreteScheduler"
        if "FlowM" in name
        else "EDMEulerScheduler"
        if name.startswith("EDM")
        else "EulerDiscreteScheduler"
    )
    raise ExportError(
        f"scheduler: {name} cannot be given noise levels without damage (its steps "
        f"come from a count or integers, or it is not known here); use {remedy}"
        ".from_config(pipe.scheduler.config), or sample with artlib.sample"
    )


def _require_end_at_zero(config: Any) -> None:
    if config.final_sigmas_type != "zero":
        raise ExportError(
            f"scheduler: final_sigmas_type={config.final_sigmas_type!r} ends at the "
            "last noise level instead of 0; make it with final_sigmas_type='zero'"
        )


def _level(scheduler: Any) -> Coordinate:
    return "level"


def _flow(scheduler: Any) -> Coordinate:
    return "flow"


def _refuse_flags(scheduler: Any, *names: str) -> None:
    for name in names:
        if getattr(scheduler.config, name, None):
            raise ExportError(
                f"scheduler: {name}={getattr(scheduler.config, name)!r} overrides the "
                f"noise levels it is given; make it with "
                f"{type(scheduler).__name__}.from_config(config, {name}=None)"
            )


_RESPACING = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def _check_range(levels: np.ndarray, low: float, high: float, whose: str) -> None:
    """Refuse noise that the network was never shown (1e-4 for round-off)."""
    if levels[0] > high * (1 + 1e-4) or levels[-1] < low * (1 - 1e-4):
        raise ExportError(
            f"schedule: its noise levels run from {levels[0]:.6g} to {levels[-1]:.6g}, "
            f"but {whose} knows {high:.6g} to {low:.6g} and would be told a wrong one; "
            "learn the schedule on the denoiser of artlib.adapters.diffusers.denoiser, "
            "whose process has that range"
        )


def _euler(scheduler: Any, levels: np.ndarray, mu: float | None) -> dict[str, Any]:
    config = scheduler.config
    continuous = (
        config.timestep_type == "continuous"
        and config.prediction_type == "v_prediction"
    )
    if not continuous:  # otherwise the network is told log(sigma) / 4, of any sigma
        table = table_levels(scheduler)
        _check_range(levels, float(table[0]), float(table[-1]), "the network")
    return {"sigmas": [*levels.tolist(), 0.0]}


def _edm(scheduler: Any, levels: np.ndarray, mu: float | None) -> dict[str, Any]:
    import torch

    config = scheduler.config
    if config.sigma_schedule != "karras":
        raise ExportError(
            f"scheduler: sigma_schedule={config.sigma_schedule!r} ignores the values "
            "it is given; make it with sigma_schedule='karras'"
        )
    _require_end_at_zero(config)
    low, high = config.sigma_min, config.sigma_max
    _check_range(levels, low, high, "the scheduler")
    top, bottom = high ** (1 / config.rho), low ** (1 / config.rho)
    ramp = (levels ** (1 / config.rho) - top) / (bottom - top)
    return {"num_inference_steps": len(levels), "sigmas": torch.from_numpy(ramp)}


def _unshift(levels: np.ndarray, a: float) -> np.ndarray:
    """Inverse of s = a r / (1 + (a - 1) r)."""
    return np.asarray(levels / (a - (a - 1) * levels))


def _shift(
    scheduler: Any, mu: float | None, fixed: float
) -> tuple[float, float | None]:
    """The factor a of the shift, and the ``mu`` to pass: undone, so any will do."""
    if not scheduler.config.use_dynamic_shifting:
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


def _flow_match(scheduler: Any, levels: np.ndarray, mu: float | None) -> dict[str, Any]:
    _refuse_flags(scheduler, *_RESPACING, "invert_sigmas", "shift_terminal")
    a, mu = _shift(scheduler, mu, float(scheduler.shift))
    return {"sigmas": _unshift(levels, a).tolist(), "mu": mu}


def _unipc(scheduler: Any, levels: np.ndarray, mu: float | None) -> dict[str, Any]:
    config = scheduler.config
    if not config.use_flow_sigmas:
        raise ExportError(
            "scheduler: UniPCMultistepScheduler takes noise levels only with "
            "use_flow_sigmas=True; for other models use EulerDiscreteScheduler"
            ".from_config(pipe.scheduler.config)"
        )
    _refuse_flags(scheduler, *_RESPACING, "shift_terminal", "solver_p")
    _require_end_at_zero(config)
    a, mu = _shift(scheduler, mu, float(config.flow_shift))
    return {"sigmas": _unshift(levels, a), "mu": mu}


def _heun(scheduler: Any, levels: np.ndarray, mu: float | None) -> dict[str, Any]:
    _refuse_flags(scheduler, *_RESPACING)
    table = table_levels(scheduler).astype(np.float64)
    _check_range(levels, float(table[0]), float(table[-1]), "the network")
    times = np.interp(levels, table, np.arange(len(table)))
    return {"timesteps": times.tolist()}


def _dpm(scheduler: Any, levels: np.ndarray, mu: float | None) -> dict[str, Any]:
    config = scheduler.config
    flags = ("use_lu_lambdas", "use_flow_sigmas")
    _refuse_flags(scheduler, *_RESPACING, *flags, "use_dynamic_shifting")
    _require_end_at_zero(config)
    table = table_levels(scheduler).astype(np.float64)
    _check_range(levels, float(table[0]), float(table[-1]), "the network")
    times = np.interp(levels, table, np.arange(len(table))).round().astype(np.int64)
    error = np.abs(table[times] / levels - 1)
    if error.max() > 1e-5:
        k = int(error.argmax())
        raise ExportError(
            "scheduler: DPMSolverMultistepScheduler takes integer timesteps only, and "
            f"noise level {k} of the schedule, {levels[k]:.6g}, would become "
            f"{table[times[k]]:.6g}; use EulerDiscreteScheduler.from_config("
            "pipe.scheduler.config), HeunDiscreteScheduler, or "
            "artlib.sample(..., solver='dpmpp_2m')"
        )
    return {"timesteps": times.tolist()}


_RULES: dict[str, Rule] = {
    "EulerDiscreteScheduler": Rule(_level, _euler),
    "EDMEulerScheduler": Rule(_level, _edm),
    "FlowMatchEulerDiscreteScheduler": Rule(_flow, _flow_match, takes_mu=True),
    "UniPCMultistepScheduler": Rule(_flow, _unipc, takes_mu=True, float_times=True),
    "HeunDiscreteScheduler": Rule(_level, _heun, repeats=2),
    "DPMSolverMultistepScheduler": Rule(_level, _dpm),
}
