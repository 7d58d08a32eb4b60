r"""Sampling problems, each with its exact answer.

Every problem is a probability flow whose solution is known in closed form (or through
the inverse of a monotone function), in all the processes that it fits, and that no
solver here solves exactly. Tests measure orders, metrics and schedules on them.

- Gaussian: along each eigenvector with variance v the centred state scales as
  :math:`\sqrt{\alpha^2 v + \sigma^2}`.
- One-dimensional mixture: the flow of a law on the line is its monotone
  rearrangement, :math:`x_b = F_b^{-1}(F_a(x_a))` with :math:`F_t` the distribution
  function of :math:`x_t`.
- Mixture in 16 dimensions with all means on one line and one common standard
  deviation: along the line it is the one-dimensional mixture, across it a Gaussian,
  and the two do not interact.
- Riccati: :math:`x' = -t x^2`, whose solution is
  :math:`1/x_b = 1/x_a + (t_b^2 - t_a^2)/2`; in VE its "denoiser" is
  :math:`D = x + t^2 x^2`. Nothing probabilistic about it: a plain nonlinear ODE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from artlib.flow.denoisers import CountNFE
from artlib.flow.flow import ProbabilityFlow
from artlib.flow.processes import VE, VP, Process, RectifiedFlow
from artlib.flow.targets import Gaussian, GaussianMixture

FlowMap = Callable[[Tensor, float, float], Tensor]


@dataclass(frozen=True)
class Problem:
    """A flow with its exact solution.

    Attributes:
        name: For the test's id.
        process: The noising process.
        denoiser: Exact D(x, t).
        x_T: States at ``t_max``, float64 [n, d].
        exact: ``exact(x, t_from, t_to)``, the flow map; t_to = 0 is allowed.
    """

    name: str
    process: Process
    denoiser: Callable[[Tensor, Tensor], Tensor]
    x_T: Tensor
    exact: FlowMap

    def __repr__(self) -> str:  # the test's id
        return self.name

    def flow(self) -> ProbabilityFlow:
        return ProbabilityFlow(self.process, self.denoiser)

    def counted(self) -> tuple[ProbabilityFlow, CountNFE]:
        """The flow and the counter of its evaluations."""
        counter = CountNFE(self.denoiser)
        return ProbabilityFlow(self.process, counter), counter

    def grid(self, steps: int, end: float) -> Tensor:
        """A smooth family of grids, even in the cube root of time, float64 [K + 1]."""
        ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        start = self.process.t_max ** (1 / 3)
        nodes = (start + ramp * (end ** (1 / 3) - start)) ** 3
        nodes[0], nodes[-1] = self.process.t_max, end
        return nodes


PROCESSES = (
    VE(sigma_min=0.002, sigma_max=20.0),
    VP(),
    RectifiedFlow(),
)


def gaussian(process: Process, n: int = 8) -> Problem:
    """A correlated Gaussian in three dimensions, off-centre."""
    factor = torch.tensor(
        [[0.9, 0.0, 0.0], [0.4, 0.3, 0.0], [-0.2, 0.5, 0.6]], dtype=torch.float64
    )
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    target = Gaussian(mean, factor @ factor.T)
    return Problem(
        f"gaussian-{process.name}",
        process,
        target.denoiser(process),
        target.sample_prior(process, n, seed=1),
        lambda x, a, b: target.flow_map(process, x, a, b),
    )


def mixture_1d(process: Process, n: int = 8) -> Problem:
    """Three bumps on the line, unequal in place, width and weight."""
    means = torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64)
    stds = torch.tensor([0.3, 0.15, 0.4], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64)
    target = GaussianMixture(means[:, None], stds, weights)

    def exact(x: Tensor, a: float, b: float) -> Tensor:
        return _rearrange(process, means, stds, weights, x, a, b)

    return Problem(
        f"mixture-1d-{process.name}",
        process,
        target.denoiser(process),
        target.sample_prior(process, n, seed=2),
        exact,
    )


def mixture_16d(process: Process, n: int = 8) -> Problem:
    """Three balls of equal width on a slanted line in 16 dimensions."""
    d, std = 16, 0.25
    along = torch.cos(torch.arange(d, dtype=torch.float64))
    along = along / along.norm()
    places = torch.tensor([-1.0, 0.0, 1.6], dtype=torch.float64)
    weights = torch.tensor([0.4, 0.25, 0.35], dtype=torch.float64)
    stds = torch.full((3,), std, dtype=torch.float64)
    target = GaussianMixture(places[:, None] * along, stds, weights)

    def exact(x: Tensor, a: float, b: float) -> Tensor:
        on_line = (x @ along)[:, None]
        moved = _rearrange(process, places, stds, weights, on_line, a, b)
        shrink = _std(process, std, b) / _std(process, std, a)
        return moved * along + shrink * (x - on_line * along)

    return Problem(
        f"mixture-16d-{process.name}",
        process,
        target.denoiser(process),
        target.sample_prior(process, n, seed=3),
        exact,
    )


def riccati(n: int = 8) -> Problem:
    """x' = -t x^2 on [0, 2], from states between 0.05 and 0.4."""
    return Problem(
        "riccati",
        VE(sigma_min=0.01, sigma_max=2.0),
        lambda x, t: x + t**2 * x**2,
        torch.linspace(0.05, 0.4, n, dtype=torch.float64)[:, None],
        lambda x, a, b: 1 / (1 / x + (b**2 - a**2) / 2),
    )


def all_problems() -> list[Problem]:
    """Every problem in every process."""
    builders = (gaussian, mixture_1d, mixture_16d)
    return [build(p) for build in builders for p in PROCESSES] + [riccati()]


def _std(process: Process, std: Tensor | float, t: float) -> Tensor:
    """Standard deviation of x_t for a component of standard deviation ``std``."""
    time = torch.tensor(t, dtype=torch.float64)
    return torch.sqrt((process.alpha(time) * std) ** 2 + process.sigma(time) ** 2)


def _rearrange(
    process: Process,
    means: Tensor,
    stds: Tensor,
    weights: Tensor,
    x: Tensor,
    a: float,
    b: float,
) -> Tensor:
    """Exact flow map of a mixture on the line: x [n, 1] at time a -> [n, 1] at b.

    Solves F_b(y) = F_a(x) by bisection, on the tail that keeps its digits.
    """

    def law(t: float) -> tuple[Tensor, Tensor]:
        alpha = process.alpha(torch.tensor(t, dtype=torch.float64))
        return alpha * means, _std(process, stds, t)

    def tails(y: Tensor, t: float) -> tuple[Tensor, Tensor]:
        places, widths = law(t)
        z = (y - places) / widths
        below = (weights * torch.special.ndtr(z)).sum(-1, keepdim=True)
        above = (weights * torch.special.ndtr(-z)).sum(-1, keepdim=True)
        return below, above

    below, above = tails(x, a)
    lower_half = below < above
    places, widths = law(b)
    reach = 40 * float(widths.max()) + float(places.abs().max())
    low, high = torch.full_like(x, -reach), torch.full_like(x, reach)
    for _ in range(120):
        middle = (low + high) / 2
        now_below, now_above = tails(middle, b)
        too_low = torch.where(lower_half, now_below < below, now_above > above)
        low, high = (
            torch.where(too_low, middle, low),
            torch.where(too_low, high, middle),
        )
    return (low + high) / 2
