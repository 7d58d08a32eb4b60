"""A denoiser is a function: asked twice alike, it has to answer alike.

A network left in training mode drops units at random, or normalises by the batch at
hand. Its samples are then no solution of any ODE, and the |Q| of its paths is mostly
noise; nothing fails. Layers that do so are looked for. What cannot be seen, dropout
written as a function or a network behind a closure, shows in torch's random state: if
a run has moved that, the denoiser is asked twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .._common.types import DenoiserFn, TimeLike
from .ask import unwrap
from .denoisers import uncounted


@runtime_checkable
class _Flow(Protocol):
    """What of a `ProbabilityFlow` is needed here."""

    denoiser: DenoiserFn
    dtype: torch.dtype | None

    def with_denoiser(self, denoiser: DenoiserFn) -> _Flow: ...

    def denoise(self, x: Tensor, t: TimeLike) -> Tensor: ...


class Doubts:
    """Whether a flow's user has been told already; shared by its copies."""

    def __init__(self) -> None:
        self.told = False
        self.asked = False

    def tell(self, why: str) -> None:
        """Warn, the first time."""
        if self.told:
            return
        self.told = True
        warnings.warn(
            f"denoiser: {why}; call network.eval() before (samples and schedules of a "
            "network that answers at random, or by the rest of the batch, mean little)",
            UserWarning,
            stacklevel=5,
        )


@contextmanager
def repeatable(
    flow: _Flow, doubts: Doubts, x: Tensor, t: TimeLike, *, ask: bool = False
) -> Iterator[None]:
    """Warns if the denoiser was no function during a run.

    Args:
        flow: The flow of the run.
        doubts: Of that flow.
        x: States [N, *shape] at which it can be asked twice.
        t: Their time.
        ask: Ask twice whatever the random state says, once for a flow: for what is
            learned from the answers. These evaluations are not counted.
    """
    if doubts.told:
        yield
        return
    if found := _training_layer(flow.denoiser):
        doubts.tell(f"its {found} is in training mode")
        yield
        return
    before = _random_states(x.device)
    yield
    moved = any(
        not torch.equal(a, b)
        for a, b in zip(before, _random_states(x.device), strict=True)
    )
    ask, doubts.asked = ask and not doubts.asked, doubts.asked or ask
    if (moved or ask) and _answers_differ(flow, x, t):
        doubts.tell(
            "it gives two answers to the same input, as with dropout in training mode"
        )


def _training_layer(denoiser: DenoiserFn) -> str:
    """The first layer that answers at random or by the batch, or nothing."""
    for layer in unwrap(denoiser):
        if isinstance(layer, nn.Module):
            for name, part in layer.named_modules():
                drops = isinstance(part, _DropoutNd) and part.p > 0
                if part.training and (drops or isinstance(part, _BatchNorm)):
                    return f"layer {name!r} ({type(part).__name__})"
    return ""


def _random_states(device: torch.device) -> list[Tensor]:
    """The states of the generators that a network draws from by default."""
    states = [torch.get_rng_state()]
    backend: Any = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
    if backend is not None:
        where = (device,) if device.type == "cuda" else ()
        states.append(backend.get_rng_state(*where))
    return states


def _answers_differ(flow: _Flow, x: Tensor, t: TimeLike) -> bool:
    plain = flow.with_denoiser(uncounted(flow.denoiser))
    devices = [x.device] if x.device.type == "cuda" else []
    # The random state of before returns: what is drawn later does not depend on this.
    with torch.no_grad(), torch.random.fork_rng(devices):
        first, second = (plain.denoise(x, t) for _ in range(2))
    # A rounding apart is the same: atomic additions come in any order.
    rounding = max(1e-3, 4 * torch.finfo(flow.dtype or x.dtype).eps)
    return bool((first - second).norm() > rounding * first.norm())
