"""What goes into an ART-RL run and what comes out: options, records, warnings."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._common.checks import finite_float, positive_int
from .._common.files import check_output
from .policy import Constraint

_KEEP = 0.95
"""Of the running mean of the cost."""

_EPISODES = 256
"""After so many episodes (or 20 iterations) the running mean means something."""

_COST_UP = 2.0
"""Cost relative to the best so far that is called divergence."""

_END_OPEN = 0.2
"""Share of the path not walked, late in a run, that is."""


def default_temperature(steps: int) -> float:
    r"""Temperature whose bias is small and whose noise is short beside a step.

    Bias: a noisy step of finite length is not quite its mean step, which moves the
    learned clock by an amount proportional to :math:`\lambda`. On a Gaussian with
    K = 18 the distilled clock costs 0.5 % above the bound without noise (it is optimal
    for 18 steps, not for many), 0.7 % at 0.02 and 1.0 % at 0.05. Hence 0.02.

    Noise: in the position :math:`\int\sqrt{|Q|}\,d\psi / L` a step of the optimal
    clock has the length 1/K and noise of the standard deviation

    .. math:: \frac{\sqrt{|Q|}}{L}\,\sqrt{\frac{\lambda}{|Q|}}\,\frac{T}{K}
              = \frac{\sqrt{\lambda}}{K} \quad (\lambda \text{ in natural units}).

    The policy takes |Q| as constant over it. That fails for a long one, so it is at
    most 1/80: :math:`\lambda \le (K/80)^2`, which is what counts below 12 steps.

    Args:
        steps: K.
    """
    return min(0.02, (steps / 80) ** 2)


def check_plan(
    iterations: int, warm_up: int, checkpoint: str | os.PathLike[str] | None
) -> None:
    """Refuse, before it starts, a training that could not learn or not be saved.

    Args:
        iterations: Planned.
        warm_up: Iterations in which only the critic learns.
        checkpoint: The file to write to.

    Raises:
        OSError: If the file cannot be written, see `check_output`.
        ValueError: If the actor would never learn.
    """
    if iterations <= warm_up:
        raise ValueError(
            f"iterations: {iterations} do not outlast the warm-up of {warm_up}, and "
            "the actor would never learn; pass more of them, or a smaller warm_up"
        )
    # Now, not after hundreds of iterations. (Of a folder, loading it says what it is.)
    if checkpoint is not None and not os.path.isdir(checkpoint):
        check_output(checkpoint)


def same_length(planned: int, iterations: int) -> int:
    """The length of a run, which cannot change on the way.

    Args:
        planned: What it was planned for, 0 if it has not begun.
        iterations: What is asked for now.

    Raises:
        ValueError: If they differ.
    """
    if planned not in (0, iterations):
        raise ValueError(
            f"iterations: this run was planned for {planned}, got {iterations}; "
            "step sizes decay over the whole run, so the number cannot change on "
            "the way. Start a new trainer for another length"
        )
    return iterations


def same_shape(x_T: Tensor, shape: torch.Size) -> Tensor:
    """States [n, *shape] whose samples have the shape of the training's.

    Args:
        x_T: Other states than those of the training.
        shape: Of one sample there.

    Raises:
        ValueError: If theirs is another.
    """
    if x_T.shape[1:] != shape:
        raise ValueError(
            f"x_T: samples of shape {tuple(x_T.shape[1:])}, expected {tuple(shape)} as "
            "in the training; pass states of the same flow"
        )
    return x_T


class DivergenceWarning(UserWarning):
    """Training is leaving the good region; the message says what to change."""


@dataclass(frozen=True)
class TrainingRecord:
    """Progress after one iteration.

    Attributes:
        iteration: 1 for the first.
        cost: Exact cost of the noisy episodes, in units of the open-loop bound.
        martingale_error: Root mean square of the martingale increments of an episode,
            in the same units; 0 for the true value function up to exploration.
        end_residual: Share of the length int sqrt|Q| that is not walked when the clock
            ends, mean over trajectories; 0 with the hard constraint.
        multiplier: gamma, in natural units; 0 with the hard constraint.
    """

    iteration: int
    cost: float
    martingale_error: float
    end_residual: float
    multiplier: float


@dataclass
class Watch:
    """An early warning where training diverges, with a remedy: what was seen so far.

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


@dataclass(frozen=True)
class Options:
    """Everything that shapes a training run besides its problem; see `ActorCritic`."""

    steps: int
    temperature: float
    seed: int
    constraint: Constraint
    environment: Literal["table", "model"]
    step_cost: Literal["exact", "left"]
    test_function: Literal["relative", "gradient"]
    floor: float
    batch: int
    hidden: int
    fourier_modes: int
    critic_rate: float
    actor_rate: float
    multiplier: float
    multiplier_rate: float
    critic_updates: int
    warm_up: int

    def __post_init__(self) -> None:
        """Refuse numbers that are none or out of range, and make the others plain."""
        plain: dict[str, int | float] = {}
        for name in ("batch", "hidden", "critic_updates"):
            plain[name] = positive_int(getattr(self, name), name)
        for name, least in (
            ("steps", 2),
            ("seed", 0),
            ("warm_up", 0),
            ("fourier_modes", 0),
        ):
            plain[name] = positive_int(getattr(self, name), name, minimum=least)
        rates = ("critic_rate", "actor_rate", "multiplier_rate")
        for name in ("temperature", "floor", *rates):
            plain[name] = finite_float(getattr(self, name), name, positive=True)
        plain["multiplier"] = finite_float(self.multiplier, "multiplier")
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def check(self, trajectories: int) -> None:
        """Refuse combinations that make no sense.

        Raises:
            ValueError: Naming the option and the remedy.
        """
        choices = {
            "constraint": ("hard", "multiplier"),
            "environment": ("table", "model"),
            "step_cost": ("exact", "left"),
            "test_function": ("relative", "gradient"),
        }
        for name, allowed in choices.items():
            if not isinstance(getattr(self, name), str) or (
                getattr(self, name) not in allowed
            ):
                raise ValueError(
                    f"{name}: expected one of {allowed}, got {getattr(self, name)!r}"
                )
        if self.batch > trajectories:
            raise ValueError(
                f"batch: {self.batch} exceeds the {trajectories} trajectories of x_T; "
                "pass more of them or a smaller batch"
            )
        if self.constraint == "hard" and self.multiplier != 0:
            raise ValueError(
                f"multiplier: {self.multiplier} has no meaning where the last step is "
                "forced to the end; leave it at 0, or use constraint='multiplier'"
            )
        if self.environment == "model" and self.step_cost == "exact":
            raise ValueError(
                "step_cost: 'exact' needs the table; with environment='model' only "
                "step_cost='left' can be charged"
            )
