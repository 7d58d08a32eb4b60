"""Setting a scheduler of diffusers, for now and for the pipeline that calls it again.

A pipeline calls ``scheduler.set_timesteps(num_inference_steps)`` itself, which would
put back the scheduler's own steps. So a scheduler that has been set **holds** its
schedule: until `release`, that call gives the schedule's grid for the number of steps
it asks for. What else it passes (a pipeline's default sigmas, a ``mu`` for the image
size) changes nothing. A copy of the scheduler holds the schedule on its own; one that
is made from its configuration, or saved and loaded, does not, and there is a warning.
"""

from __future__ import annotations

from typing import Any

import torch

from ..._common.checks import positive_int
from ..._common.errors import ExportError
from ..levels import ScheduleLike, noise_levels
from .held import hold, let_go, plain_class
from .rules import check_range, coordinate, rule_for, shift_of
from .setter import set_levels


def to_diffusers(
    schedule: ScheduleLike,
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
    image-to-image pipeline cuts the grid by its ``strength`` as usual. It starts from
    noise times ``scheduler.init_noise_sigma``, which becomes that of the first level.

    Solvers stay what they are: Euler's is `artlib.sample`'s ``"euler"``, Heun's its
    ``"heun"`` and DPMSolverMultistep's of order 2 its ``"dpmpp_2m"``.

    Args:
        schedule: Any schedule; its process is converted to the scheduler's coordinate.
        scheduler: EulerDiscrete, EulerAncestralDiscrete, HeunDiscrete, LMSDiscrete,
            KDPM2Discrete, KDPM2AncestralDiscrete, DPMSolverMultistep and -Singlestep
            (also with noise), UniPCMultistep; EDMEuler, EDMDPMSolverMultistep;
            FlowMatchEulerDiscrete, -HeunDiscrete, -LCM, LTXEulerAncestralRF. What it
            would do to its own steps (``use_karras_sigmas``, shifts, ...) is without
            effect.
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
    levels = noise_levels(schedule, positive_int(K, "K"), coordinate(scheduler))
    set_levels(scheduler, plain_class(scheduler), rule, levels, mu, device)
    hold(scheduler, schedule)


def release(scheduler: Any) -> None:
    """Let go of a schedule: ``set_timesteps`` is the scheduler's own again.

    A scheduler that holds none is left alone.
    """
    let_go(scheduler)


def pipeline_arguments(
    schedule: ScheduleLike, scheduler: Any, K: int, *, mu: float | None = None
) -> dict[str, Any]:
    """What to pass to a pipeline instead, ``pipe(prompt, **pipeline_arguments(...))``.

    For schedulers that should hold nothing; the scheduler is not changed. The lists are
    the scheduler's raw arguments: with or without the final 0, as a ramp, with the
    shift undone, or as fractional timesteps.

    Args:
        schedule: Any schedule.
        scheduler: EulerDiscrete, EDMEuler, FlowMatchEulerDiscrete or HeunDiscrete. The
            others take no exact list; `to_diffusers` sets them.
        K: Number of steps.
        mu: With dynamic shifting, the value that the pipeline will compute.

    Returns:
        ``{"sigmas": ...}`` or ``{"timesteps": ...}``.

    Raises:
        ExportError: If it cannot be done; also if ``mu`` is needed and missing.
    """
    rule = rule_for(scheduler)
    if rule.arguments is None:
        raise ExportError(
            f"scheduler: {type(scheduler).__name__} takes no list of noise levels, "
            "or truncates the network's times; use schedule.to_diffusers(scheduler, "
            "K), which sets them"
        )
    if mu is None and getattr(scheduler.config, "use_dynamic_shifting", False):
        raise ExportError(
            "mu: the scheduler shifts by the mu that the pipeline computes, and it has "
            "to be known to be undone; pass it, or use schedule.to_diffusers(...)"
        )
    shift_of(scheduler, mu, 1.0)
    rule.check(scheduler)
    levels = noise_levels(schedule, K, coordinate(scheduler))[:-1].numpy()
    check_range(scheduler, levels)
    found = rule.arguments(scheduler, levels, mu)
    return {name: v for name, v in found.items() if name in ("sigmas", "timesteps")}
