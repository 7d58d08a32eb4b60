r"""How each kind of scheduler lays out the noise levels of K steps.

And where that leads, so that a dry run can tell: with a network whose denoised sample
is always 0, a step from noise s to s' of any solver of the ODE multiplies the state y
by s' / s, and one that keeps the law by adding noise does it by (s' / s)^2, whatever
noise comes on top. States below are those multiples of the first level.

| layout | ``sigmas`` | calls |
| --- | --- | --- |
| `once` | each level once | K |
| `heun` | the inner ones twice | 2 K - 1 |
| `kdpm2` | the inner ones twice, and geometric means between them | 2 K - 1 |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrays:
    """What a scheduler keeps, and what a run through it visits; float64.

    Attributes:
        sigmas: Its attribute of that name.
        calls: Noise level of every call of the network.
        states: Size of the state at every call of a network that denoises to 0.
        further: Other attributes of it.
    """

    sigmas: Tensor
    calls: Tensor
    states: Tensor
    further: dict[str, Tensor] = field(default_factory=dict)


def once(levels: Tensor, scheduler: Any) -> Arrays:
    """One call a step, on the ODE."""
    return Arrays(levels, levels[:-1], levels[:-1])


def reverse_sde(levels: Tensor, scheduler: Any) -> Arrays:
    """One call a step, with the noise of the reverse SDE."""
    return Arrays(levels, levels[:-1], levels[:-1] ** 2 / levels[0])


def fresh_noise(levels: Tensor, scheduler: Any) -> Arrays:
    """One call a step, from which only the denoised sample is kept."""
    states = torch.zeros_like(levels[:-1])
    states[0] = levels[0]
    return Arrays(levels, levels[:-1], states)


def ltx_ancestral(levels: Tensor, scheduler: Any) -> Arrays:
    """One call a step, with a share ``eta`` of noise on the path of flow matching."""
    s, n = levels[:-2], levels[1:-1]
    down = n * (1 + (n / s - 1) * float(scheduler.config.eta))
    factors = down / s * (1 - n) / (1 - down)
    states = levels[0] * torch.cat([levels.new_ones(1), factors.cumprod(0)])
    return Arrays(levels, levels[:-1], states)


def heun(levels: Tensor, scheduler: Any) -> Arrays:
    """Two calls a step, at both ends; the last step has one."""
    inner = levels[1:-1].repeat_interleave(2)
    calls = torch.cat([levels[:1], inner])
    return Arrays(torch.cat([calls, levels[-1:]]), calls, calls)


def kdpm2(levels: Tensor, scheduler: Any) -> Arrays:
    """Two calls a step, the second at the geometric mean; the last step has one."""
    means = (levels[:-2] * levels[1:-1]).sqrt()
    calls = torch.cat([levels[:1], torch.stack([means, levels[1:-1]], 1).flatten()])
    zero = torch.zeros_like(levels[:1])
    further = {"sigmas_interpol": _doubled(torch.cat([zero, means, zero]))}
    return Arrays(_doubled(levels), calls, calls, further)


def kdpm2_ancestral(levels: Tensor, scheduler: Any) -> Arrays:
    """The same down to s'^2 / s, and noise up to s'. The mean of s and that is s'."""
    s, n = levels[:-1], levels[1:]
    zero = torch.zeros_like(levels[:1])
    up = (n**2 * (s**2 - n**2)).sqrt() / s
    calls = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2)])
    sizes = s**2 / levels[0]
    half = sizes[:-1] * n[:-1] / s[:-1]
    states = torch.cat([sizes[:1], torch.stack([half, sizes[1:]], 1).flatten()])
    further = {
        "sigmas_interpol": _doubled(torch.cat([n, zero])),
        "sigmas_up": _doubled(torch.cat([up, zero])),
        "sigmas_down": _doubled(torch.cat([n**2 / s, zero])),
    }
    return Arrays(_doubled(levels), calls, states, further)


def _doubled(values: Tensor) -> Tensor:
    """All but the first twice, and the last once more."""
    return torch.cat([values[:1], values[1:].repeat_interleave(2), values[-1:]])
