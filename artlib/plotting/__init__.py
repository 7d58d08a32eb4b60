r"""Figures: one function a picture, one style and one palette for all of them.

| function | shows |
| --- | --- |
| `plot_clock` | the time change :math:`\psi` and the time t over the clock, eq. (4) |
| `plot_speed` | its derivative, the control :math:`\theta = \psi'` |
| `plot_stiffness` | :math:`\lvert Q\rvert` of eq. (8) over time |
| `plot_steps` | where the K steps of each schedule fall |
| `plot_error` | error against NFE |
| `plot_needed` | NFE that each row takes for the same error |
| `plot_paths` | one-dimensional trajectories and the laws at their ends |
| `plot_samples` | images from the same noise, a row per schedule |

Each returns a matplotlib ``Figure`` and shows nothing: it belongs to no pyplot
window, displays itself once as the last line of a notebook cell, and saves with
``savefig``. Time axes run in the direction of sampling, from t_max at the left to 0 at
the right. Schedules come as one `Schedule`, a list, or a dict from label to schedule;
names known to `LOOKS` are recognised in any spelling and look the same in every figure.

References:
    Huang, Tang, Zhou, https://arxiv.org/abs/2607.02137, for the equation numbers.
"""

from __future__ import annotations

from .curves import plot_error, plot_stiffness
from .needed import plot_needed
from .paths import plot_paths
from .samples import plot_samples
from .schedules import plot_clock, plot_speed, plot_steps
from .style import INK, LOOKS, PANEL, Look, looks, style

__all__ = [
    "INK",
    "LOOKS",
    "PANEL",
    "Look",
    "looks",
    "plot_clock",
    "plot_error",
    "plot_needed",
    "plot_paths",
    "plot_samples",
    "plot_speed",
    "plot_steps",
    "plot_stiffness",
    "style",
]
