"""Other people's ways to a schedule, to be compared with.

| module | what |
| --- | --- |
| `artlib.rivals.rebuilt` | GITS and Align Your Steps, learned again on a flow |
| `artlib.rivals.student_states` | OSS, lists from the states that a student has |
| `artlib.rivals.without_model` | DMN, lists of a bound that knows no model |
| `artlib.rivals.trained` | LD3, nodes and told levels trained through the solver |
| `artlib.rivals.published` | the lists of Align Your Steps for four models |
"""

from .published import AYS, ays
from .rebuilt import JumpCosts, euler_jumps, girsanov, girsanov_bound
from .student_states import student_steps, student_ways
from .trained import decoupled_times, trained_plan
from .without_model import multistep_bound, multistep_optimal

__all__ = [
    "AYS",
    "JumpCosts",
    "ays",
    "decoupled_times",
    "euler_jumps",
    "girsanov",
    "girsanov_bound",
    "multistep_bound",
    "multistep_optimal",
    "student_steps",
    "student_ways",
    "trained_plan",
]
