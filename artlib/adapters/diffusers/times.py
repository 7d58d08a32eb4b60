r"""What a scheduler of diffusers, and a network, call a noise level.

| scheduler | noise is counted as | the network is told |
| --- | --- | --- |
| with ``alphas_cumprod`` | :math:`\sigma/\alpha` | a training step, linear in its log |
| the EDM family | :math:`\sigma/\alpha` | :math:`\tfrac14\log\sigma` |
| flow matching | :math:`\sigma/(\alpha+\sigma) = t` | 1000 t |

Some transformers multiply by 1000 themselves: their pipelines divide before the call,
so they have to be told t. `network_scale` knows which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SMALLEST = 2.0**-24
"""Signal that diffusers leaves where a table has none, in what steps in sigma."""


def config_of(scheduler: Any) -> Any:
    """The configuration of a scheduler.

    Raises:
        TypeError: If it is no scheduler of diffusers.
    """
    config = getattr(scheduler, "config", None)
    if config is None or not callable(getattr(scheduler, "set_timesteps", None)):
        raise TypeError(
            "scheduler: expected a scheduler of diffusers such as pipe.scheduler, got "
            f"{type(scheduler).__name__}"
        )
    return config


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler counts noise as the time of flow matching."""
    return any(
        kind.__name__.startswith(("FlowMatch", "LTXEuler"))
        for kind in type(scheduler).__mro__
    ) or bool(getattr(scheduler.config, "use_flow_sigmas", False))


def is_edm(scheduler: Any) -> bool:
    """Whether a scheduler is of the EDM family."""
    return any(kind.__name__.startswith("EDM") for kind in type(scheduler).__mro__)


def no_signal_left(scheduler: Any) -> bool:
    """Whether the last training step of a table is pure noise (zero terminal SNR)."""
    return float(scheduler.alphas_cumprod[-1]) == 0


def table_levels(scheduler: Any) -> np.ndarray:
    """Noise levels sigma/alpha of a scheduler's training timesteps, ascending [T].

    Raises:
        ValueError: As `levels_of`.
    """
    # In the scheduler's own float32, so that what it interpolates is inverted.
    product = scheduler.alphas_cumprod.cpu().numpy()
    return levels_of(
        product,
        "scheduler",
        "so its betas are not those of a diffusion; check beta_start, beta_end, "
        "trained_betas",
    )


def levels_of(product: np.ndarray, name: str, remedy: str) -> np.ndarray:
    """Noise levels sigma/alpha of a table of alphas_cumprod, ascending [T].

    Where no signal is left at the last one (zero terminal SNR) its level would be
    infinite. Like the schedulers of diffusers that step in sigma it is given 2^-24, a
    level of 4096, or less where that is not less than the step before.

    Args:
        product: The table [T].
        name: What it belongs to, for the message.
        remedy: What to do about it, the same.

    Raises:
        ValueError: If the levels are not finite, positive and ascending.
    """
    if product[-1] <= _SMALLEST:
        product = product.copy()
        product[-1] = min(_SMALLEST, product[-2] / 4)
    with np.errstate(divide="ignore", invalid="ignore"):
        levels: np.ndarray = ((1 - product) / product) ** 0.5
    if not (
        np.isfinite(levels).all() and levels[0] > 0 and (np.diff(levels) > 0).all()
    ):
        raise ValueError(
            f"{name}: the noise levels of its training steps, {levels[0]:.6g} ... "
            f"{levels[-1]:.6g}, are not positive, finite and ascending, {remedy}"
        )
    return levels


def told(scheduler: Any) -> Callable[[Tensor], Tensor]:
    """Map from noise levels to what the scheduler has the network told, in float64."""
    if is_flow(scheduler):
        return _Multiple(float(scheduler.config.num_train_timesteps))
    if is_edm(scheduler) or tells_log(scheduler):
        return quarter_log
    return Steps(table_levels(scheduler))


def quarter_log(level: Tensor) -> Tensor:
    """What networks of the EDM family are told of a noise level."""
    return torch.log(level) / 4


@dataclass(frozen=True)
class _Multiple:
    """A multiple of the time, for flow matching."""

    factor: float

    def __call__(self, level: Tensor) -> Tensor:
        return self.factor * level


def tells_log(scheduler: Any) -> bool:
    """Whether a scheduler with a table has log(sigma) / 4 told instead of its steps."""
    config = scheduler.config
    return (
        getattr(config, "timestep_type", "discrete") == "continuous"
        and getattr(config, "prediction_type", None) == "v_prediction"
    )


class Steps:
    """Fractional training step of a noise level, linear in its logarithm."""

    def __init__(self, table: np.ndarray) -> None:
        self._logs = torch.from_numpy(np.log(table.astype(np.float64)))

    def __call__(self, level: Tensor) -> Tensor:
        logs = self._logs.to(level.device)
        x = torch.log(level.double())
        low = torch.searchsorted(logs, x.detach().contiguous(), right=True) - 1
        low = low.clamp(0, len(logs) - 2)
        step = low + (x - logs[low]) / (logs[low + 1] - logs[low])
        return step.clamp(0, len(logs) - 1)


# Read off the pipelines of diffusers 0.42; a test compares them with the installed one.
TOLD_T = frozenset(
    {
        "AuraFlowTransformer2DModel",
        "BriaFibo2Transformer2DModel",
        "ChromaTransformer2DModel",
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "Krea2Transformer2DModel",
        "LongCatAudioDiTTransformer",
        "LongCatImageTransformer2DModel",
        "NucleusMoEImageTransformer2DModel",
        "OvisImageTransformer2DModel",
        "PRXTransformer2DModel",
        "QwenImage21Transformer2DModel",
        "QwenImageTransformer2DModel",
    }
)
"""Transformers of flow matching that are told t in [0, 1]."""

TOLD_1000_T = frozenset(
    {
        "BriaFiboTransformer2DModel",
        "BriaTransformer2DModel",
        "ChronoEditTransformer3DModel",
        "CogView4Transformer2DModel",
        "HunyuanImageTransformer2DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "Kandinsky5Transformer3DModel",
        "Kandinsky6SRTransformer3DModel",
        "Kandinsky6Transformer3DModel",
        "LTXVideoTransformer3DModel",
        "OmniGenTransformer2DModel",
        "SD3Transformer2DModel",
        "SanaTransformer2DModel",
        "SanaVideoTransformer3DModel",
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        # No pipeline of diffusers runs these on a flow; who trains one feeds them the
        # scheduler's own timesteps.
        "DiTTransformer2DModel",
        "PixArtTransformer2DModel",
        "Transformer2DModel",
        "UNet2DConditionModel",
        "UNet2DModel",
    }
)
"""Networks of flow matching that are told the scheduler's timesteps, 1000 t."""


def network_scale(network: nn.Module, scheduler: Any) -> float:
    """Factor from what a scheduler says of the time to what a network is told.

    Args:
        network: The network, also wrapped by ``torch.compile`` or ``DataParallel``.
        scheduler: Its scheduler. Only flow matching has two conventions.

    Raises:
        ValueError: If it is a network of diffusers whose convention is not known.
    """
    network = innermost(network)
    if not is_flow(scheduler):
        return 1.0
    steps = float(scheduler.config.num_train_timesteps)
    for kind in type(network).__mro__:
        if kind.__name__ in TOLD_T:
            return 1 / steps
        if kind.__name__ in TOLD_1000_T:
            config = getattr(network, "config", None)
            return float(getattr(config, "timestep_scale", None) or 1.0)
        if kind.__module__.startswith("diffusers.models.") and hasattr(
            kind, "register_to_config"
        ):
            raise ValueError(
                f"timestep_scale: it is not known here what {kind.__name__} is told of "
                "the time; see its pipeline: give timestep_scale=1.0 if that passes "
                "the scheduler's timesteps to the network as they are, or "
                f"{1 / steps:g} if it divides them by {steps:g}. A network that is "
                "told 1 - t, or predicts the other sign, has to be wrapped by hand "
                "with artlib.from_velocity"
            )
    return 1.0


def innermost(network: nn.Module) -> nn.Module:
    """The network itself behind ``torch.compile`` and parallel wrappers."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if inner is None and isinstance(
            network, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = network.module
        if not isinstance(inner, nn.Module):
            return network
        network = inner
