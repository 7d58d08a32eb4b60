"""The trained ART-RL actor as a clock per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common.checks import positive_int
from ..flow.flow import ProbabilityFlow
from ..solvers.clocked import Clock
from .actor_critic import ActorCritic
from .policy import mean_share


class ActorClock(Clock):
    r"""The mean policy of a trained `ActorCritic`, on samples that it has not seen.

    What the actor sees of a sample, its state and its |Q|, is evaluated on the way:
    one forward-mode product (or two to three evaluations) a step beyond the solver's.

    Args:
        trainer: A trained `ActorCritic` with the hard end constraint.
        steps: K; by default what it was trained for. Its networks do not see the clock,
            so any number will do.

    Raises:
        TypeError: If ``trainer`` is no `ActorCritic`.
        ValueError: If it was trained with the multiplier: its clock need not arrive.
    """

    def __init__(self, trainer: ActorCritic, steps: int | None = None) -> None:
        if not isinstance(trainer, ActorCritic):
            raise TypeError(
                f"trainer: expected an ActorCritic, got {type(trainer).__name__}"
            )
        if trainer.options.constraint != "hard":
            raise ValueError(
                "trainer: a clock of constraint='multiplier' need not arrive at the "
                "end; train with constraint='hard'"
            )
        self.steps = positive_int(steps or trainer.options.steps, "steps")
        self._environment = trainer.environment
        self._actor = trainer.averaged_actor()

    def start(self, flow: ProbabilityFlow, x_T: Tensor) -> None:
        env = self._environment
        if flow.process != env.process:
            raise ValueError(
                f"clock: the actor was trained on {env.process}, the flow has "
                f"{flow.process}"
            )
        self._flow = flow

    def advance(self, k: int, t: Tensor, x: Tensor, denoised: Tensor) -> Tensor:
        if k == self.steps - 1:
            return torch.zeros_like(t)
        env = self._environment
        size = self._flow.stiffness(x, t.reshape(-1, *[1] * (x.ndim - 1)))
        rho = env.position(t.to(env.device)).clamp(0, 1)
        features, _ = env.features_at(rho, x, size.double().to(env.device))
        output = self._actor(rho, torch.full_like(rho, k / self.steps), features)
        h = torch.as_tensor(1 / (self.steps - k), dtype=torch.float64)
        target = rho - mean_share(output, rho, h, "hard")
        return env.time(target).to(t)
