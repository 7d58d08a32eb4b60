r"""artlib: where should a diffusion sampler spend its steps?

Three nouns. A `ProbabilityFlow` is the ODE that a trained model defines, a `Schedule`
is where the clock puts its steps, a solver is how one step is taken. ART (Adaptive
Reparameterized Time, https://arxiv.org/abs/2607.02137) turns a flow into a schedule::

    process = artlib.VE(sigma_min=0.002, sigma_max=80.0)
    flow = artlib.ProbabilityFlow(process, denoiser)      # any callable D(x, t)
    schedule = artlib.art(flow, x_T)                      # closed form, seconds
    x_0 = artlib.sample(flow, x_T, schedule.grid(10), solver="heun")

Times are float64 and run from ``t_max`` (noise) down to 0 (data); a grid of K steps
has K + 1 nodes.
"""

from importlib import import_module
from types import ModuleType

from ._actor_clock import ActorClock
from ._convert import convert
from ._feature_metrics import class_score, feature_distance, kernel_distance
from ._path_derivative import ForwardModeWarning
from ._reference_path import Trajectory
from .actor_critic import ActorCritic, TrainingRecord
from .clocks import (
    Clock,
    ExactClock,
    PredictedClock,
    value_of_information,
)
from .comparison import (
    Comparison,
    Interval,
    baselines,
    compare,
    nfe_ratio,
    nfe_to_quality,
    references,
)
from .control import (
    StiffnessTable,
    art,
    cost,
    error_table,
    lower_bound,
    stiffness_table,
)
from .denoisers import (
    CountNFE,
    from_edm,
    from_epsilon,
    from_score,
    from_velocity,
    from_x0,
)
from .exact import gaussian_output_std, gaussian_w2, oracle_grid
from .flow import ProbabilityFlow
from .metrics import (
    frechet_distance,
    sliced_wasserstein2,
    terminal_error,
    wasserstein2,
    wasserstein2_gaussian,
)
from .processes import VE, VP, Process, RectifiedFlow, register_process
from .refine import refine
from .schedules import (
    ExportError,
    Schedule,
    ScheduleFormatError,
    beta,
    edm,
    from_density,
    from_grid,
    from_time_change,
    kl_optimal,
    log_snr,
    uniform,
)
from .solvers import nfe, sample
from .stochastic import gaussian_stochastic_std, sample_stochastic
from .targets import Empirical, Gaussian, GaussianMixture

__version__ = "0.1.0"

_LAZY = ("adapters", "book", "plotting", "rivals", "zoo")


def __getattr__(name: str) -> ModuleType:
    """Import heavier parts (matplotlib, data) only when they are asked for."""
    if name in _LAZY:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "VE",
    "VP",
    "ActorClock",
    "ActorCritic",
    "Clock",
    "Comparison",
    "CountNFE",
    "Empirical",
    "ExactClock",
    "ExportError",
    "ForwardModeWarning",
    "Gaussian",
    "GaussianMixture",
    "Interval",
    "PredictedClock",
    "ProbabilityFlow",
    "Process",
    "RectifiedFlow",
    "Schedule",
    "ScheduleFormatError",
    "StiffnessTable",
    "TrainingRecord",
    "Trajectory",
    "art",
    "baselines",
    "beta",
    "class_score",
    "compare",
    "convert",
    "cost",
    "edm",
    "error_table",
    "feature_distance",
    "frechet_distance",
    "from_density",
    "from_edm",
    "from_epsilon",
    "from_grid",
    "from_score",
    "from_time_change",
    "from_velocity",
    "from_x0",
    "gaussian_output_std",
    "gaussian_stochastic_std",
    "gaussian_w2",
    "kernel_distance",
    "kl_optimal",
    "log_snr",
    "lower_bound",
    "nfe",
    "nfe_ratio",
    "nfe_to_quality",
    "oracle_grid",
    "references",
    "refine",
    "register_process",
    "sample",
    "sample_stochastic",
    "sliced_wasserstein2",
    "stiffness_table",
    "terminal_error",
    "uniform",
    "value_of_information",
    "wasserstein2",
    "wasserstein2_gaussian",
]
