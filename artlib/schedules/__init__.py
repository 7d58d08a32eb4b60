"""Schedules: where the clock puts its steps; the time change of eq. (4) and (6)."""

from .._common.errors import ExportError, ScheduleFormatError
from .constructors import (
    beta,
    edm,
    from_density,
    from_grid,
    from_time_change,
    kl_optimal,
    log_snr,
    uniform,
)
from .convert import convert
from .plan import Plan
from .schedule import Schedule

__all__ = [
    "ExportError",
    "Plan",
    "Schedule",
    "ScheduleFormatError",
    "beta",
    "convert",
    "edm",
    "from_density",
    "from_grid",
    "from_time_change",
    "kl_optimal",
    "log_snr",
    "uniform",
]
