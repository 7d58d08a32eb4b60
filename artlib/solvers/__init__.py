"""Solvers: how one step is taken, on a grid, on a clock, or with noise; eq. (3)."""

from .clocked import Clock
from .position import Evaluated, Node, Position
from .sample import GridLike, nfe, sample
from .solver import SOLVERS, Solver, SolverLike, Step
from .stochastic import gaussian_stochastic_std, sample_stochastic

__all__ = [
    "SOLVERS",
    "Clock",
    "Evaluated",
    "GridLike",
    "Node",
    "Position",
    "Solver",
    "SolverLike",
    "Step",
    "gaussian_stochastic_std",
    "nfe",
    "sample",
    "sample_stochastic",
]
