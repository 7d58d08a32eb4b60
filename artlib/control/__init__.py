"""The control problem: |Q| along paths, its closed form, and few steps by gradient.

Equations (7), (9) and (10) of https://arxiv.org/abs/2607.02137.
"""

from .closed_form import art, cost, error_table, lower_bound, stiffness_table
from .few_steps import refine
from .stiffness import StiffnessTable, feedback_grids, value_of_information
from .told import tell, told_levels

__all__ = [
    "StiffnessTable",
    "art",
    "cost",
    "error_table",
    "feedback_grids",
    "lower_bound",
    "refine",
    "stiffness_table",
    "tell",
    "told_levels",
    "value_of_information",
]
