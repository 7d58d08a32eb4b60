"""The ODE of a trained model: processes, denoisers and the flow they make together.

Equations (1), (2), (5) and (8) of https://arxiv.org/abs/2607.02137: the noising
process, its probability-flow ODE, and the acceleration Q of its paths.
"""

from .denoisers import (
    CountNFE,
    Denoiser,
    from_edm,
    from_epsilon,
    from_score,
    from_velocity,
    from_x0,
)
from .flow import ProbabilityFlow
from .path_derivative import ForwardModeWarning
from .processes import VE, VP, Process, RectifiedFlow, register_process
from .reference_path import Trajectory
from .targets import Empirical, Gaussian, GaussianMixture

__all__ = [
    "VE",
    "VP",
    "CountNFE",
    "Denoiser",
    "Empirical",
    "ForwardModeWarning",
    "Gaussian",
    "GaussianMixture",
    "ProbabilityFlow",
    "Process",
    "RectifiedFlow",
    "Trajectory",
    "from_edm",
    "from_epsilon",
    "from_score",
    "from_velocity",
    "from_x0",
    "register_process",
]
