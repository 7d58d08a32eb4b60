"""Other people's ways to a schedule, to be compared with.

| module | what |
| --- | --- |
| `artlib.rivals.rebuilt` | GITS and Align Your Steps, learned again on a flow |
| `artlib.rivals.published` | the lists of Align Your Steps for four models |
"""

from .published import AYS, ays
from .rebuilt import JumpCosts, euler_jumps, girsanov, girsanov_bound

__all__ = ["AYS", "JumpCosts", "ays", "euler_jumps", "girsanov", "girsanov_bound"]
