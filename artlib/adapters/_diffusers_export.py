"""Setting a scheduler of diffusers, for now and for the pipeline that calls it again.

A pipeline calls ``scheduler.set_timesteps(num_inference_steps)`` itself, which would
put back the scheduler's own steps. So a scheduler that has been set **holds** its
schedule: until `release`, that call gives the schedule's grid for the number of steps
it asks for. What else it passes (a pipeline's default sigmas, a ``mu`` for the image
size) is taken into account only so far as the scheduler would undo the grid with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .._checks import positive_int
from .._schedule import Schedule
from .._schedule_io import ExportError
from ._diffusers_rules import Rule, rule_for
from ._levels import noise_levels

TOLERANCE = 1e-5
"""Relative difference between a wanted and a visited noise level that is accepted."""


def to_diffusers(
    schedule: Schedule,
    scheduler: Any,
    K: int,
    *,
    mu: float | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Set a scheduler to the K-step grid of a schedule, and let it hold the schedule.

    Afterwards ``scheduler.sigmas`` are the schedule's noise levels in the scheduler's
    own coordinate, and stay so when a pipeline calls ``set_timesteps``: run it as
    ``pipe(..., num_inference_steps=K)`` with any K, without sigmas or timesteps. An
    image-to-image pipeline cuts the grid by its ``strength`` as usual.

    Args:
        schedule: Any schedule; its process is converted to the scheduler's coordinate.
        scheduler: EulerDiscrete, EDMEuler, FlowMatchEulerDiscrete, UniPCMultistep with
            flow sigmas, HeunDiscrete or DPMSolverMultistep (integer grids only).
        K: Number of steps.
        mu: Of a scheduler with dynamic shifting. It is undone, so that any value, or
            none, gives the same noise levels.
        device: Where its timesteps go.

    Raises:
        ExportError: If the scheduler cannot visit these noise levels to 1e-5 relative;
            it is then as it was.
        TypeError: If ``schedule``, ``scheduler`` or ``K`` is something else.
        ValueError: If ``K`` < 1.
    """
    rule = rule_for(scheduler)
    _set(schedule, scheduler, rule, positive_int(K, "K"), mu, device)
    scheduler.set_timesteps = _Held(scheduler, schedule, rule)


def release(scheduler: Any) -> None:
    """Let go of a schedule: ``set_timesteps`` is the scheduler's own again.

    A scheduler that holds none is left alone.
    """
    vars(scheduler).pop("set_timesteps", None)


def pipeline_arguments(
    schedule: Schedule, scheduler: Any, K: int, *, mu: float | None = None
) -> dict[str, Any]:
    """What to pass to a pipeline instead, ``pipe(prompt, **pipeline_arguments(...))``.

    For schedulers that should hold nothing; the scheduler is not changed. The lists are
    the scheduler's raw arguments: with or without the final 0, as a ramp, with the
    shift undone, or as fractional timesteps.

    Args:
        schedule: Any schedule.
        scheduler: As in `to_diffusers`, except UniPC, which truncates the times that
            its network is told.
        K: Number of steps.
        mu: With dynamic shifting, the value that the pipeline will compute.

    Returns:
        ``{"sigmas": ...}`` or ``{"timesteps": ...}``.

    Raises:
        ExportError: If it cannot be done; also if ``mu`` is needed and missing.
    """
    rule = rule_for(scheduler)
    if rule.float_times:
        raise ExportError(
            f"scheduler: {type(scheduler).__name__} truncates the network's times to "
            "integers; use schedule.to_diffusers(scheduler, K), which sets them"
        )
    if mu is None and getattr(scheduler.config, "use_dynamic_shifting", False):
        raise ExportError(
            "mu: the scheduler shifts by the mu that the pipeline computes, and it has "
            "to be known to be undone; pass it, or use schedule.to_diffusers(...)"
        )
    levels = noise_levels(schedule, K, rule.coordinate(scheduler))
    found = rule.arguments(scheduler, levels[:-1].numpy(), mu)
    return {name: v for name, v in found.items() if name in ("sigmas", "timesteps")}


class _Held:
    """The ``set_timesteps`` of a scheduler that holds a schedule."""

    def __init__(self, scheduler: Any, schedule: Schedule, rule: Rule) -> None:
        self._scheduler, self.schedule, self._rule = scheduler, schedule, rule

    def __call__(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | np.ndarray | torch.Tensor | None = None,
        sigmas: Sequence[float] | np.ndarray | torch.Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Set the grid of the schedule; only the number of steps is the caller's.

        Raises:
            ExportError: If the schedule cannot be visited with that many steps.
            ValueError: If neither a number of steps nor a list is given.
        """
        if num_inference_steps is None:
            given = timesteps if timesteps is not None else sigmas
            if given is None:
                raise ValueError(
                    "num_inference_steps: got None; say how many steps to take"
                )
            num_inference_steps = len(given)
            # Euler's lists carry the final 0, which is no step.
            if sigmas is not None and timesteps is None and float(given[-1]) == 0:
                num_inference_steps -= 1
        K = positive_int(num_inference_steps, "num_inference_steps")
        dynamic = getattr(self._scheduler.config, "use_dynamic_shifting", False)
        mu = mu if dynamic else None
        _set(self.schedule, self._scheduler, self._rule, K, mu, device)


def _set(
    schedule: Schedule,
    scheduler: Any,
    rule: Rule,
    K: int,
    mu: float | None,
    device: torch.device | str | None,
) -> None:
    """Set and verify, or put everything back."""
    if mu is not None and not rule.takes_mu:
        raise ExportError(
            f"mu: got {mu}, but {type(scheduler).__name__} knows none; leave it out"
        )
    wanted = noise_levels(schedule, K, rule.coordinate(scheduler))
    arguments = rule.arguments(scheduler, wanted[:-1].numpy(), mu)
    if arguments.get("mu", mu) is None:
        arguments.pop("mu", None)
    before = dict(vars(scheduler))
    try:
        type(scheduler).set_timesteps(scheduler, device=device, **arguments)
        if rule.float_times:
            times = (
                scheduler.sigmas[:-1].double() * scheduler.config.num_train_timesteps
            )
            scheduler.timesteps = times.float().to(device)
        _verify(scheduler, rule, wanted)
    except BaseException as error:
        vars(scheduler).clear()
        vars(scheduler).update(before)
        if isinstance(error, ExportError) or not isinstance(error, Exception):
            raise
        raise ExportError(
            f"scheduler: {type(scheduler).__name__}.set_timesteps refused the grid: "
            f"{error}"
        ) from error


def _verify(scheduler: Any, rule: Rule, wanted: torch.Tensor) -> None:
    """Compare what the scheduler will visit with what it should."""
    inner = wanted[1:-1].repeat_interleave(rule.repeats)
    expected = torch.cat([wanted[:1], inner, wanted[-1:]])
    visited = torch.as_tensor(scheduler.sigmas).double().cpu()
    if visited.shape != expected.shape or not torch.allclose(
        visited, expected, rtol=TOLERANCE, atol=0
    ):
        raise ExportError(
            f"scheduler: {type(scheduler).__name__} would visit {visited.tolist()} "
            f"instead of {expected.tolist()}; this release of diffusers does something "
            "to its sigmas that is not known here"
        )
