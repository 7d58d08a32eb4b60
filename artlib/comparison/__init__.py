"""Tables of schedules against each other, with intervals over samples."""

from .bootstrap import Interval
from .compare import Budgets, ClockFor, Measure, baselines, compare, references
from .quality import nfe_ratio, nfe_to_quality
from .table import Cell, Comparison, HasGrid, Verdict

__all__ = [
    "Budgets",
    "Cell",
    "ClockFor",
    "Comparison",
    "HasGrid",
    "Interval",
    "Measure",
    "Verdict",
    "baselines",
    "compare",
    "nfe_ratio",
    "nfe_to_quality",
    "references",
]
