"""Schedules that the command line knows by name; nothing is loaded before one is made.

``artlib --help`` lists them, and is there before torch would be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..flow.processes import Process
    from ..schedules.schedule import Schedule

_OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "edm": ("edm", {}),
    "edm-unpinned": ("edm", {"pinned": False}),
    "log-snr": ("log_snr", {}),
    "log-snr-unpinned": ("log_snr", {"pinned": False}),
    "kl-optimal": ("kl_optimal", {}),
    "beta": ("beta", {}),
}
_AYS = {f"ays-{model}": model for model in ("sd-1.5", "sdxl", "deepfloyd-if-1", "svd")}

FORMULAS = (*_OWN, *_AYS)
"""Their names."""


def formula(name: str, process: Process) -> Schedule:
    """A schedule by its name.

    Args:
        name: One of `FORMULAS`.
        process: For which it is made.

    Raises:
        ValueError: If it is a published list for other noise levels.
    """
    from .. import rivals, schedules

    if name in _AYS:
        return rivals.ays(_AYS[name], process)
    function, options = _OWN[name]
    made: Schedule = getattr(schedules, function)(process, **options)
    return made
