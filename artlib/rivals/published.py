r"""The noise levels that were published for well-known models.

Align Your Steps searches, for ten steps of one model, the levels :math:`\sigma/\alpha`
with the least Kullback-Leibler bound; the code was not published, the results were
(their Table 3). For other numbers of steps its authors interpolate the list in the
logarithm, and for sampling the last level becomes 0. As facts about four models they
are baselines on these models, and on no other.

References:
    Sabour et al., https://arxiv.org/abs/2404.14507, Table 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch

from .._common.checks import got
from ..flow.processes import VE, Process, check_process
from ..schedules.constructors import Schedule, from_time_change

__all__ = ["AYS", "ays"]

AYS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "sd-1.5": (
            *(14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399),
            *(0.152, 0.029),
        ),
        "sdxl": (
            *(14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234),
            *(0.113, 0.029),
        ),
        "deepfloyd-if-1": (
            *(160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186),
            *(0.030, 0.006),
        ),
        "svd": (
            *(700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173),
            *(0.034, 0.002),
        ),
    }
)
"""Noise levels of ten steps and their end, by model: Stable Diffusion 1.5, SDXL, stage
1 of DeepFloyd IF, Stable Video Diffusion."""

_NEAR = 0.02
"""Relative difference between a model's range and that of its list: published levels
are rounded to three decimals."""
_BETWEEN = 100
"""Knots between two published levels, for processes whose time is not the level."""


def ays(
    model: str, process: Process | None = None, *, stretched: bool = False
) -> Schedule:
    r"""The list of Align Your Steps for a model, for any number of steps.

    ``ays(model).grid(10)`` is the list with 0 for its last level; for other numbers of
    steps it is interpolated linearly in the log noise level.

    Args:
        model: ``"sd-1.5"``, ``"sdxl"``, ``"deepfloyd-if-1"`` or ``"svd"``.
        process: Where it is used, over the model's own range of noise levels (to 2 %,
            for the list is rounded; its ends become those of the process); by default
            `VE` over the list.
        stretched: Whether the process may have another range. The list's log noise
            levels are stretched to it then, linearly. The authors publish no such use;
            as a start, or a rival on another model, it is worth a run.

    Returns:
        A `Schedule`.

    Raises:
        TypeError: If ``process`` is no process.
        ValueError: If there is no list for the model, or the process has another range
            and the list is not stretched, or the range has an infinite noise level.
    """
    if not isinstance(model, str) or model not in AYS:
        raise ValueError(
            f"model: expected one of {', '.join(map(repr, AYS))}, got {got(model)}; no "
            "other lists were published: artlib.rivals.girsanov learns one"
        )
    levels = np.array(AYS[model])
    if process is None:
        process = VE(float(levels[-1]), float(levels[0]))
    check_process(process)
    ends = [float(process.noise_level(t)) for t in _range(process)]
    if stretched:
        levels = _stretched(levels, ends)
    elif not np.allclose(levels[[0, -1]], ends, rtol=_NEAR, atol=0):
        raise ValueError(
            f"process: its noise levels run from {ends[0]:.6g} to {ends[1]:.6g}, and "
            f"the list of {model} from {levels[0]:.6g} to {levels[-1]:.6g}; it is for "
            "that model alone: artlib.rivals.girsanov learns one for another, and "
            "stretched=True stretches this one"
        )
    levels[[0, -1]] = ends
    place = np.linspace(0, len(levels) - 1, (len(levels) - 1) * _BETWEEN + 1)
    fine = np.exp(np.interp(place, np.arange(len(levels)), np.log(levels)))
    times = process.inverse_noise_level(torch.from_numpy(fine)).numpy().copy()
    times[[0, -1]] = _range(process)
    span = times[0] - times[-1]
    return from_time_change(
        process,
        place / place[-1] * span,
        times,
        name=f"AYS ({model}{', stretched' if stretched else ''})",
        interpolation="log-linear",
        provenance={
            "published": "arXiv:2404.14507, Table 3",
            "model": model,
            "stretched": stretched,
        },
    )


def _stretched(levels: np.ndarray, ends: list[float]) -> np.ndarray:
    """Levels whose logarithms run linearly from one end to the other."""
    if not math.isfinite(ends[0]):
        raise ValueError(
            "process: its noise level at t_max is infinite, and no list stretches so "
            "far; give it a t_max with some signal left"
        )
    place = np.log(levels / levels[0]) / math.log(levels[-1] / levels[0])
    return np.asarray(ends[0] * (ends[1] / ends[0]) ** place)


def _range(process: Process) -> tuple[float, float]:
    return process.t_max, process.t_min
