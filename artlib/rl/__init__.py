"""ART-RL: the continuous-time actor-critic, equations (11)-(18), (29) and (30)."""

from .._common.errors import TrainingError
from .actor_critic import ActorCritic
from .checkpoint import CheckpointError
from .clock import ActorClock
from .options import DivergenceWarning, TrainingRecord

__all__ = [
    "ActorClock",
    "ActorCritic",
    "CheckpointError",
    "DivergenceWarning",
    "TrainingError",
    "TrainingRecord",
]
