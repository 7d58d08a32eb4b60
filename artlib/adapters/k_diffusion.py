r"""Lists of sigmas for k-diffusion, ComfyUI, A1111 and all that is written after them.

The convention: one-dimensional, float32, on the CPU, K + 1 values descending to an
explicit 0, and the state is started as ``x = sigmas[0] * noise``.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from .._common.checks import finite_float, positive_int
from .._common.errors import ExportError
from .levels import Coordinate, ScheduleLike, noise_levels, own_coordinate

__all__ = ["ExportError", "to_k_diffusion", "to_text"]


def to_k_diffusion(
    schedule: ScheduleLike,
    K: int,
    *,
    denoise: float = 1.0,
    coordinate: Coordinate | None = None,
) -> Tensor:
    r"""Sigmas for ``k_diffusion.sampling.sample_*(model, x, sigmas)``.

    Args:
        schedule: Any schedule.
        K: Number of steps that are taken.
        denoise: Share of the way from noise to data, in (0, 1]. Below 1, for
            image-to-image, a grid of floor(K / denoise) steps is made and its last K
            are kept, as ComfyUI does it; start from ``image + sigmas[0] * noise``.
        coordinate: ``"level"`` (:math:`\sigma/\alpha`) or ``"flow"``
            (:math:`\sigma/(\alpha+\sigma)`); by default that of the schedule's process.

    Returns:
        float32 [K + 1] on the CPU, strictly descending to 0.

    Raises:
        ExportError: If the first noise level is infinite or two nodes are one number
            in float32.
        TypeError: If ``schedule`` or ``K`` is something else.
        ValueError: If ``K`` < 1 or ``denoise`` is outside of (0, 1].
    """
    K = positive_int(K, "K")
    denoise = finite_float(denoise, "denoise", positive=True)
    if denoise > 1:
        raise ValueError(f"denoise: expected a share in (0, 1], got {denoise}")
    # 1e-9: ten steps of 0.1 are 100, not 99.
    total = max(K, int(K / denoise + 1e-9))
    levels = noise_levels(schedule, total, coordinate or own_coordinate(schedule))
    return levels[-(K + 1) :].to(torch.float32).contiguous()


def to_text(
    schedule: ScheduleLike,
    K: int,
    *,
    denoise: float = 1.0,
    coordinate: Coordinate | None = None,
) -> str:
    r"""The same list as text, ``[80.0, ..., 0.0]``: Python, JSON, and most else.

    Args:
        schedule: Any schedule.
        K: Number of steps that are taken.
        denoise: Share of the way from noise to data, in (0, 1]; below 1, for
            image-to-image, the last K steps of floor(K / denoise).
        coordinate: ``"level"`` (:math:`\sigma/\alpha`) or ``"flow"``
            (:math:`\sigma/(\alpha+\sigma)`); by default that of the schedule's process.

    Raises:
        ExportError: If the first noise level is infinite or two nodes are one number
            in float32.
        TypeError: If ``schedule`` or ``K`` is something else.
        ValueError: If ``K`` < 1 or ``denoise`` is outside of (0, 1].
    """
    sigmas = to_k_diffusion(schedule, K, denoise=denoise, coordinate=coordinate)
    # The shortest digits that give the float32 back.
    return "[" + ", ".join(json.dumps(float(f"{v:.9g}")) for v in sigmas.tolist()) + "]"
