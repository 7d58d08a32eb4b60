r"""The coordinate in which |Q| is tabulated, and the times of a table.

:math:`\phi(t) = \log\sigma - \log(\alpha + 0.01)`: the log noise level, kept finite
where no signal is left. |Q| follows power laws of the noise level at both ends of the
range, so it is smooth in :math:`\phi` where it is anything but smooth in t.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .._common.types import TimeLike
from .processes import Process

_ALPHA_OFFSET = 0.01


def log_level(process: Process, t: TimeLike) -> Tensor:
    r"""The coordinate :math:`\phi(t)` of tables; in `VE` log t up to a constant.

    Args:
        process: The noising process.
        t: Process times > 0.
    """
    return torch.log(process.sigma(t)) - torch.log(process.alpha(t) + _ALPHA_OFFSET)


def log_level_dot(process: Process, t: TimeLike) -> Tensor:
    """Derivative of `log_level` in t."""
    signal = process.alpha_dot(t) / (process.alpha(t) + _ALPHA_OFFSET)
    return process.sigma_dot(t) / process.sigma(t) - signal


def table_times(process: Process, points: int) -> Tensor:
    """Times descending from t_max to t_min, spaced evenly in `log_level`.

    Args:
        process: Gives the range.
        points: Number of times, at least 2.

    Returns:
        float64 tensor [points]; the ends are exact, the spacing even to round-off.
    """
    ends = math.log(process.t_min), math.log(process.t_max)
    fine = torch.linspace(*ends, 20_001, dtype=torch.float64, device="cpu").exp()
    levels = log_level(process, fine).numpy()
    wanted = np.linspace(levels[-1], levels[0], points)
    times = torch.from_numpy(np.interp(wanted, levels, fine.numpy()))
    for _ in range(3):  # Newton
        excess = log_level(process, times) - torch.from_numpy(wanted)
        times = times - excess / log_level_dot(process, times)
    times[0], times[-1] = process.t_max, process.t_min
    return times
