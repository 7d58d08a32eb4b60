r"""Actor, critic, and the Gaussian policy between them.

Both are small networks of position and state, and do not see the clock: the control
problem is invariant under a scaling of the clock that is left (speeds go as its
inverse, and so does the cost), so that dependence is written down instead of learned.
With the multiplier the symmetry is gone, and the clock is an input. The position comes
with its first Fourier modes, without which small networks smooth over the bends of |Q|.
With :math:`\tau` the share of the
clock that is spent, K steps in all and k taken, the **mean** step covers the share

.. math:: f = \mathrm{sigmoid}\Bigl(a_\phi + \log\tfrac{h}{1-h}\Bigr), \qquad
          h = \tfrac{1}{K-k}

of the log noise level still to go. An untrained actor, a = 0, is therefore the DPM
schedule, and whatever it has learned, the last step (h = 1) arrives: the hard end
constraint. With the multiplier, :math:`f\rho = e^a / K` instead, and nothing arrives by
construction. **Noise** on the speed has the variance :math:`\lambda/|Q|` of eq. (11),
cut off at two standard deviations, |Q| being the larger of its values at both ends of
the mean step (at its start alone it is too small by decades where sigma is large, and
one draw in ten would jump to the end).

The **critic** is :math:`V = -e^{2c_\vartheta}\rho^2/(1-\tau)` in natural units, zero at
the end of the path; with the multiplier :math:`V = (1 - \tau)\,c_\vartheta`, zero at
the end of the clock. These choices are ours.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Constraint = Literal["hard", "multiplier"]

CUT = 2.0
"""Standard deviations at which exploration noise is cut off."""

CUT_VARIANCE = 1 - 2 * CUT * math.exp(-(CUT**2) / 2) / math.sqrt(
    2 * math.pi
) / math.erf(CUT / math.sqrt(2))
"""Variance of a standard normal cut off there."""


def cut_normal(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Standard normal draws cut off at `CUT`, float64, by inversion."""
    uniform = torch.rand(shape, generator=rng, dtype=torch.float64, device=rng.device)
    edge = math.erf(CUT / math.sqrt(2))
    return torch.erfinv((2 * uniform - 1) * edge) * math.sqrt(2)


class Head(nn.Module):
    """A small network of position, state and, if asked for, clock; with one output.

    Args:
        width: Number of state features.
        hidden: Width of the two hidden layers.
        rng: Source of the initial weights.
        modes: Fourier modes of the position that are inputs.
        clock: Whether the clock is an input.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        rng: torch.Generator,
        *,
        modes: int,
        clock: bool = False,
    ) -> None:
        super().__init__()
        self.clock, self.modes = clock, modes
        width += 1 + 2 * modes + 2 * clock
        # Left uninitialised, and float32 whatever the default: the constructor would
        # draw from the global generator.
        layers = [
            nn.utils.skip_init(nn.Linear, n_in, n_out, dtype=torch.float32)
            for n_in, n_out in ((width, hidden), (hidden, hidden), (hidden, 1))
        ]
        with torch.no_grad():
            for layer in layers:
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.uniform_(-bound, bound, generator=rng)
                layer.bias.uniform_(-bound, bound, generator=rng)
            # The output starts small: an actor near DPM, a critic near its skeleton.
            layers[-1].weight.mul_(0.1)
            layers[-1].bias.zero_()
        act = nn.SiLU()
        self.layers = nn.Sequential(layers[0], act, layers[1], act, layers[2])

    def forward(self, rho: Tensor, tau: Tensor, features: Tensor) -> Tensor:
        """Output [...] for positions [...], clock shares [...], features [..., m]."""
        modes = torch.arange(1, self.modes + 1, device=rho.device)
        angle = math.pi * rho[..., None] * modes
        inputs = [2 * rho[..., None] - 1, angle.sin(), angle.cos()]
        if self.clock:
            inputs += [torch.log1p(-tau)[..., None], 2 * tau[..., None] - 1]
        x = torch.cat([torch.cat(inputs, dim=-1).float(), features], dim=-1)
        output: Tensor = self.layers(x)
        return output[..., 0]


def mean_share(
    output: Tensor, rho: Tensor, h: Tensor, constraint: Constraint
) -> Tensor:
    """Share of the log noise level (of the whole range) that the mean step covers.

    Args:
        output: The actor's output a [...].
        rho: Share still to go [...].
        h: 1 / (steps still to take), broadcastable.
        constraint: ``"hard"`` or ``"multiplier"``.

    Returns:
        The step in rho [...], float64, at most rho.
    """
    output = output.double()
    if constraint == "hard":
        return rho * torch.sigmoid(output + torch.log(h) - torch.log1p(-h))
    # Steps are bounded by what is left, smoothly, so that a gradient always remains.
    return rho * (1 - torch.exp(-torch.exp(output) * h / rho.clamp_min(1e-6)))


def share_slope(
    output: Tensor, rho: Tensor, h: Tensor, constraint: Constraint
) -> Tensor:
    """Derivative of `mean_share` in the output."""
    output = output.double()
    if constraint == "hard":
        f = torch.sigmoid(output + torch.log(h) - torch.log1p(-h))
        return rho * f * (1 - f)
    rate = torch.exp(output) * h / rho.clamp_min(1e-6)
    return rho * torch.exp(-rate) * rate


def critic_value(
    output: Tensor, rho: Tensor, tau: Tensor, constraint: Constraint
) -> Tensor:
    """The exploratory value V, eq. (14), in natural units; see the module.

    Args:
        output: The critic's output c [...].
        rho: Share of the log noise level still to go [...].
        tau: Share of the clock that is spent [...].
        constraint: ``"hard"`` or ``"multiplier"``.

    Returns:
        V [...], float64.
    """
    if constraint == "hard":
        return -torch.exp(2 * output.double()) * rho**2 / (1 - tau)
    return (1 - tau) * output.double()
