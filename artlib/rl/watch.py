"""An early warning where ART-RL diverges, with a remedy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .options import TrainingRecord

_KEEP = 0.95
"""Of the running mean of the cost."""

_EPISODES = 256
"""After so many episodes (or 20 iterations) the running mean means something."""

_COST_UP = 2.0
"""Cost relative to the best so far that is called divergence."""

_END_OPEN = 0.2
"""Share of the path not walked, late in a run, that is."""


@dataclass
class Watch:
    """What has been seen so far.

    Attributes:
        recent: Running mean of the cost, NaN before the first iteration.
        best: The least of it.
        warned: Whether the warning has been given; it is given once.
    """

    recent: float = math.nan
    best: float = math.inf
    warned: bool = False

    def message(self, record: TrainingRecord, batch: int, iterations: int) -> str:
        """Take a record in; what to warn of, empty if nothing.

        Args:
            record: Of the iteration that is over.
            batch: Trajectories per iteration.
            iterations: Of the whole run.
        """
        cost, done = record.cost, record.iteration
        first = math.isnan(self.recent)
        self.recent = cost if first else _KEEP * self.recent + (1 - _KEEP) * cost
        if done >= 20 or done * batch >= _EPISODES:
            self.best = min(self.recent, self.best)
        cost_up = self.recent > _COST_UP * self.best
        late = done > max(100, iterations // 2)
        end_open = late and record.end_residual > _END_OPEN
        if self.warned or not (cost_up or end_open):
            return ""
        self.warned = True
        if cost_up:
            return (
                f"ART-RL, iteration {done}: the cost rose to {self.recent:.3g} from "
                f"{self.best:.3g} (1 is the optimum); lower actor_rate and "
                "critic_rate, raise batch and critic_updates, or charge "
                "step_cost='exact'"
            )
        return (
            f"ART-RL, iteration {done}: the clock ends {record.end_residual:.0%} of "
            "its length early; use constraint='hard', or raise multiplier_rate and "
            "iterations"
        )
