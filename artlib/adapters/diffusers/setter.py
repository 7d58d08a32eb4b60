"""Putting noise levels into a scheduler of diffusers, and running it once to see.

Nothing is taken for granted of another release: a small state is sent through a copy of
the scheduler, with a network whose denoised sample is always 0, and has to shrink as
the levels say at every call (`artlib.adapters.diffusers.arrays`).
"""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._common.errors import ExportError
from .arrays import Arrays
from .rules import Rule, check_range, shift_of
from .times import is_edm, is_flow, told

TOLERANCE = 1e-5
"""Relative difference between a wanted noise level and the one kept, at most."""

_SIZE = 1e25
"""State of the dry run, so large that what noise a scheduler adds is nothing to it."""


def set_levels(
    scheduler: Any,
    plain: type,
    rule: Rule,
    levels: Tensor,
    mu: float | None,
    device: torch.device | str | None,
) -> None:
    """Set a scheduler to noise levels and verify it, or leave it as it was.

    Args:
        scheduler: The scheduler.
        plain: Its own class, whose ``set_timesteps`` is called.
        rule: Its rule.
        levels: Noise levels [K + 1] in its coordinate, float64, descending to 0.
        mu: What the pipeline shifts by; it changes nothing.
        device: Where its timesteps go.

    Raises:
        ExportError: If it cannot visit the levels; the message says why.
    """
    held, before = type(scheduler), dict(vars(scheduler))
    # Its own methods must not meet what a held schedule changes.
    scheduler.__class__ = plain
    try:
        _set(scheduler, rule, levels, mu, device)
    except BaseException as error:
        vars(scheduler).clear()
        vars(scheduler).update(before)
        if isinstance(error, ExportError) or not isinstance(error, Exception):
            raise
        raise ExportError(
            f"scheduler: {plain.__name__} refused {len(levels) - 1} steps: {error}; "
            "use another number of steps or another scheduler, such as "
            "EulerDiscreteScheduler.from_config(pipe.scheduler.config)"
        ) from error
    finally:
        scheduler.__class__ = held


def _set(
    scheduler: Any,
    rule: Rule,
    levels: Tensor,
    mu: float | None,
    device: torch.device | str | None,
) -> None:
    rule.check(scheduler)
    check_range(scheduler, levels[:-1].numpy())
    _, neutral = shift_of(scheduler, mu, 1.0)
    arrays = rule.arrays(levels, scheduler)
    more = {"mu": neutral} if rule.needs_mu and neutral is not None else {}
    with np.errstate(divide="ignore", invalid="ignore"):  # its own, of one step
        scheduler.set_timesteps(len(levels) - 1, device=device, **more)
    scheduler.num_inference_steps = len(levels) - 1
    times = told(scheduler)(arrays.calls)
    scheduler.timesteps = times.float().to(scheduler.timesteps.device)
    for name, values in {"sigmas": arrays.sigmas, **arrays.further}.items():
        placed = values.to(getattr(scheduler, name))
        if not torch.allclose(placed.cpu().double(), values.double(), rtol=TOLERANCE):
            raise ExportError(
                f"scheduler: its {name} are kept in {placed.dtype}, which cannot hold "
                f"these numbers to {TOLERANCE:g}; sample with artlib.sample"
            )
        setattr(scheduler, name, placed)
    _verify(scheduler, rule, arrays)


def _verify(scheduler: Any, rule: Rule, arrays: Arrays) -> None:
    """Run a copy of the scheduler and compare what it visits with what it should.

    Raises:
        ExportError: If it visits something else.
    """
    probe = object.__new__(type(scheduler))
    vars(probe).update(
        (name, value.detach().cpu().clone())
        if isinstance(value, Tensor)
        else (name, copy.deepcopy(value))
        for name, value in vars(scheduler).items()
    )
    step: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(probe.step).parameters:
        step["generator"] = torch.Generator().manual_seed(0)
    calls, states = arrays.calls.tolist(), [*arrays.states.tolist(), 0.0]
    ratio = [b / a if a else 0.0 for a, b in itertools.pairwise(states)]
    x = torch.full((1, 1, 1, 1), _SIZE)
    for k, t in enumerate(probe.timesteps):
        s = calls[k]
        if hasattr(probe, "scale_model_input"):
            probe.scale_model_input(x, t)
        output = _denoises_to_zero(probe, rule, x, s)
        found = probe.step(output, t, x, **step)[0].float()
        alpha = _alpha(probe, rule, s)
        after = calls[k + 1] if k + 1 < len(calls) else 0.0
        wanted = ratio[k] * _alpha(probe, rule, after) / alpha * float(x)
        size = abs(float(x))
        # What float32 leaves of a denoised sample of 0, and of a state that went down
        # by more digits than it has.
        fall = (calls[max(k - 1, 0)] / s) ** 2
        allowed = 1e-3 * abs(wanted) + (1e-4 + 1e-6 / alpha + 2e-7 * fall) * size
        if not abs(float(found) - wanted) <= allowed + 1e-20 * _SIZE:
            raise ExportError(
                f"scheduler: {type(scheduler).__name__} was set to the noise levels "
                f"{arrays.sigmas.tolist()} and leaves call {k + 1} of "
                f"{len(calls)}, at {s:.6g}, with {float(found) / float(x):.6g} of its "
                f"state instead of {wanted / float(x):.6g}; its options, or this "
                "release of diffusers, do something to the steps that is not known "
                "here; use another scheduler, or sample with artlib.sample"
            )
        x = found
        if float(x) == 0:
            x = torch.full_like(x, 1e-20 * _SIZE)


def _alpha(scheduler: Any, rule: Rule, s: float) -> float:
    """Factor of the data in the state a scheduler keeps, at a noise level."""
    if not rule.scaled or is_flow(scheduler):
        return 1.0
    return float((1 + s * s) ** -0.5)


def _denoises_to_zero(scheduler: Any, rule: Rule, x: Tensor, s: float) -> Tensor:
    """What a network says whose denoised sample is 0, at state x and noise level s."""
    config = scheduler.config
    prediction = getattr(config, "prediction_type", "flow_prediction")
    if is_edm(scheduler):
        data = float(config.sigma_data)
        sign = -1.0 if prediction == "epsilon" else 1.0
        return sign * data / (s * (s * s + data * data) ** 0.5) * x
    if prediction == "sample":
        return torch.zeros_like(x)
    if is_flow(scheduler):
        return x / s
    alpha = _alpha(scheduler, rule, s)
    if prediction == "v_prediction":
        # alpha y = y / sqrt(1 + s^2), whichever of the two the scheduler keeps.
        return x / alpha * (1 + s * s) ** -0.5 / s
    return x / alpha / s
