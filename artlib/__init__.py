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
from typing import TYPE_CHECKING, Any

from ._common.version import __version__ as __version__

if TYPE_CHECKING:  # found by `__getattr__` when they are first asked for
    from ._common.errors import ExportError, PausedError, ScheduleFormatError
    from .clocks import ExactClock, PredictedClock
    from .comparison import (
        Comparison,
        Interval,
        baselines,
        compare,
        nfe_needed,
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
        refine,
        stiffness_table,
        tell,
        value_of_information,
    )
    from .exact import gaussian_output_std, gaussian_w2, oracle_grid, oracle_plan
    from .flow import (
        VE,
        VP,
        CountNFE,
        Empirical,
        ForwardModeWarning,
        Gaussian,
        GaussianMixture,
        ProbabilityFlow,
        Process,
        RectifiedFlow,
        Trajectory,
        from_edm,
        from_epsilon,
        from_score,
        from_velocity,
        from_x0,
        register_process,
    )
    from .metrics import (
        class_score,
        feature_distance,
        frechet_distance,
        kernel_distance,
        sliced_wasserstein2,
        terminal_error,
        wasserstein2,
        wasserstein2_gaussian,
    )
    from .rl import ActorClock, ActorCritic, TrainingRecord
    from .schedules import (
        Plan,
        Schedule,
        beta,
        convert,
        edm,
        from_density,
        from_grid,
        from_time_change,
        kl_optimal,
        log_snr,
        uniform,
    )
    from .solvers import (
        Clock,
        Solver,
        gaussian_stochastic_std,
        nfe,
        sample,
        sample_stochastic,
    )
    from .tuning import tune, tuning_report

_ROOMS = (
    *("flow", "metrics", "solvers", "schedules", "control", "rl", "clocks"),
    *("comparison", "exact", "tuning"),
    *("parallel", "rivals", "plotting", "adapters", "zoo", "book"),
)
"""Every room with a name in ``artlib``; those of the second half lend it no names."""


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: torch, SciPy and matplotlib take seconds."""
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name in __all__:
        for room in _ROOMS:
            found = vars(import_module(f".{room}", __name__))
            if name in found:
                return globals().setdefault(name, found[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names that `__getattr__` finds, with those that are here."""
    return sorted({*globals(), *__all__, *_ROOMS})


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
    "PausedError",
    "Plan",
    "PredictedClock",
    "ProbabilityFlow",
    "Process",
    "RectifiedFlow",
    "Schedule",
    "ScheduleFormatError",
    "Solver",
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
    "nfe_needed",
    "nfe_ratio",
    "nfe_to_quality",
    "oracle_grid",
    "oracle_plan",
    "references",
    "refine",
    "register_process",
    "sample",
    "sample_stochastic",
    "sliced_wasserstein2",
    "stiffness_table",
    "tell",
    "terminal_error",
    "tune",
    "tuning_report",
    "uniform",
    "value_of_information",
    "wasserstein2",
    "wasserstein2_gaussian",
]
