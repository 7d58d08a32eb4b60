"""Tables of schedules against each other, with intervals over samples."""

from .._common.errors import PausedError
from .bootstrap import Interval
from .compare import Budgets, ClockFor, Measure, baselines, compare
from .quality import nfe_needed, nfe_ratio, nfe_to_quality
from .references import references
from .table import Cell, Comparison, HasGrid, Verdict

__all__ = [
    "Budgets",
    "Cell",
    "ClockFor",
    "Comparison",
    "HasGrid",
    "Interval",
    "Measure",
    "PausedError",
    "Verdict",
    "baselines",
    "compare",
    "nfe_needed",
    "nfe_ratio",
    "nfe_to_quality",
    "references",
]
