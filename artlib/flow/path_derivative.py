r"""The total derivative :math:`\dot D` of a denoiser along the path of the flow.

:math:`\dot D = (\partial_x D)\, v + \partial_t D`. Forward mode gives it in one
Jacobian-vector product. It fails in three ways, and all are caught here. Kernels
without a forward derivative raise. A forward pass under ``torch.inference_mode`` drops
the tangent without a word, so the first products are compared with differences. And a
network that rounds its time to training steps is a staircase, of which forward mode,
and a short difference no less, sees the treads only. A derivative has to **add up**: at
several levels its mean along the tangent of the path, over a span w of 4 % of the time
and more, is compared with what D really changes by,

.. math:: \frac{1}{2w} \int_{-w}^{w} \dot D\, ds = \frac{D(w) - D(-w)}{2w} ,

by Simpson's rule on five points; that on three tells how far the mean can be trusted.
A network that is merely rough in its time, as trained ones are, passes: there both
sides know of the roughness. On a staircase the left side lacks the steps.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Literal, cast

import torch
from torch import Tensor

Acceleration = Literal["auto", "jvp", "difference"]
Denoise = Callable[[Tensor, Tensor], Tensor]


class ForwardModeWarning(UserWarning):
    """Forward mode was not usable for this network; the difference is used."""


# torch's levels of forward mode are the whole process's: two threads that enter one at
# the same time fail, or take each other's.
_FORWARD_MODE = threading.RLock()
_warmed_up = False


def _product(denoise: Denoise, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """The derivative of D in direction (velocity, 1), by forward mode."""
    global _warmed_up
    with _FORWARD_MODE:
        if not _warmed_up:
            # torch's own warning, the first time that forward mode is used at all.
            one = torch.ones((), dtype=torch.float64, device="cpu")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
                torch.func.jvp(torch.sin, (one,), (one,))
            _warmed_up = True
        _, rate = cast(
            tuple[Tensor, Tensor],
            torch.func.jvp(denoise, (x, t), (velocity, torch.ones_like(t))),
        )
    return rate


class PathDerivative:
    """Takes the derivative by the method asked for, and remembers what works.

    Args:
        method: ``"auto"``, ``"jvp"`` or ``"difference"``.
        t_max: No evaluation is made above it.
        dtype: dtype of the network, which sets the step of a difference.

    Attributes:
        asked: The method asked for.
        method: The method in force; ``"auto"`` becomes one of the others on first use,
            and ``"difference"`` whenever forward mode fails later.
    """

    def __init__(
        self, method: Acceleration, t_max: float, dtype: torch.dtype | None
    ) -> None:
        if not isinstance(method, str) or method not in ("auto", "jvp", "difference"):
            raise ValueError(
                f"acceleration: expected 'auto', 'jvp' or 'difference', got {method!r}"
            )
        self.asked: Acceleration = method
        self.method: Acceleration = method
        self._t_max = t_max
        self._dtype = dtype
        self._checked = False
        self._levels: set[int] = set()
        self._staircase = False

    def for_range(self, t_max: float, dtype: torch.dtype | None) -> PathDerivative:
        """The same choice for the same network in other coordinates."""
        known = self.method == "difference"
        return PathDerivative("difference" if known else self.asked, t_max, dtype)

    def rate(self, denoise: Denoise, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """The derivative at (x, t), by the method in force.

        Args:
            denoise: The denoiser D(x, t).
            x: States [N, *shape].
            t: Process time, float64.
            velocity: dx/dt there [N, *shape].

        Returns:
            The derivative of D in time along the path, [N, *shape].

        Raises:
            RuntimeError: As `forward`.
        """
        rate = self.forward(denoise, x, t, velocity)
        if self._staircase:
            return self._spanning(denoise, x, t, velocity)
        if rate is None:
            rate = self.difference(denoise, x, t, velocity)
        # A factor of four in time at once.
        level = math.floor(math.log(float(t.max())) / math.log(4.0))
        if level in self._levels:
            return rate
        self._levels.add(level)
        if self.method != "difference" and not self._adds_up(denoise, x, t, velocity):
            self._give_up(_STAIRS, None)
            rate = self.difference(denoise, x, t, velocity)
        if self.method == "difference" and not self._adds_up(denoise, x, t, velocity):
            self._staircase = True
            return self._spanning(denoise, x, t, velocity)
        return rate

    def forward(
        self, denoise: Denoise, x: Tensor, t: Tensor, velocity: Tensor
    ) -> Tensor | None:
        """The same by forward mode, or None where the difference has to be used.

        Raises:
            RuntimeError: With method ``"jvp"``, if the network rejects forward mode or
                drops its tangents.
        """
        if self.method == "difference":
            return None
        try:
            rate = _product(denoise, x, t, velocity)
        except Exception as error:  # whatever a network may raise on dual numbers
            # Not a broken network: the velocity came from the same call.
            self._give_up(f"it raised: {error}", error)
            return None
        if not self._checked:
            disagreement = self._disagreement(denoise, x, t, velocity, rate)
            if disagreement:
                self._give_up(disagreement, None)
                return None
        return rate

    def contradicted(
        self, denoise: Denoise, points: Iterable[tuple[Tensor, Tensor, Tensor]]
    ) -> bool:
        """Whether forward mode does not add up at two or more points of a path.

        Args:
            denoise: The denoiser D(x, t).
            points: States [N, *shape], times and velocities.

        Raises:
            RuntimeError: With method ``"jvp"``, if so.
        """
        wrong = sum(not self._adds_up(denoise, *point) for point in points)
        if wrong < 2:
            return False
        self._give_up(f"at {wrong} levels {_STAIRS}", None)
        return True

    def _adds_up(
        self, denoise: Denoise, x: Tensor, t: Tensor, velocity: Tensor
    ) -> bool:
        """Whether the derivative, added up over several training steps, is D's change.

        The derivative is that of the method in force, forward mode's or the short
        difference; see the module.
        """
        w = self._span(x, t)
        # Where t + w would exceed t_max, the span ends at t.
        end = torch.where(t + w > self._t_max, torch.zeros_like(w), w)

        def at(share: float) -> tuple[Tensor, Tensor]:
            s = end - (1 - share) * w
            shift = s.to(x.dtype)
            shift = shift.to(x.device) if shift.ndim else shift
            return x + shift * velocity, t + s

        def slope(share: float) -> Tensor:
            y, s = at(share)
            if self.method == "difference":
                return self.difference(denoise, y, s, velocity)
            return _product(denoise, y, s, velocity)

        first, left, middle, right, last = (
            slope(share) for share in (-1.0, -0.5, 0.0, 0.5, 1.0)
        )
        coarse = (first + 4 * middle + last) / 6
        mean = (first + last + 4 * (left + right) + 2 * middle) / 12
        top, bottom = denoise(*at(1.0)), denoise(*at(-1.0))
        length = (2 * w).to(x.dtype)
        length = length.to(x.device) if length.ndim else length
        change = (top - bottom) / length
        off, doubt = (mean - change).norm(), (mean - coarse).norm()
        eps = torch.finfo(self._dtype or x.dtype).eps
        rounding = 8 * eps * float((top.abs() / length.abs()).norm())
        size = torch.maximum(mean.norm(), change.norm())
        return bool(off <= 0.1 * size + doubt + rounding)

    def _disagreement(
        self, denoise: Denoise, x: Tensor, t: Tensor, velocity: Tensor, rate: Tensor
    ) -> str:
        """Compare a forward derivative with differences; empty if they agree.

        Two steps of the difference tell how far it can be trusted: at large noise its
        rounding may exceed the derivative, and where D is locally constant there is
        nothing to compare. Then the next point is checked too.
        """
        near, far = (self.difference(denoise, x, t, velocity, n) for n in (1.0, 2.0))
        size = torch.maximum(rate.norm(), near.norm())
        doubt = 4 * (near - far).norm()
        dropped = bool(near.any()) and not bool(rate.any())
        agree = bool((rate - near).norm() <= 0.1 * size + doubt)
        if bool(torch.isfinite(near).all()) and (dropped or not agree):
            return (
                "its derivative does not agree with a difference along the path "
                f"{_sizes(rate, near)}; a part of the network runs under "
                "torch.inference_mode or outside of torch"
            )
        if bool(doubt < 0.3 * size):
            self._checked = True
            self.method = "jvp"
        return ""

    def difference(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Tensor,
        velocity: Tensor,
        widen: float = 1.0,
    ) -> Tensor:
        """The same by a second-order difference of D along the tangent of the path.

        The path's curvature cancels in both stencils, so the straight line will do.
        ``widen`` multiplies the step.
        """
        return self._stencil(denoise, x, t, velocity, widen * self._short(x) * t)

    def _short(self, x: Tensor) -> float:
        """The step of a difference, relative to the time."""
        # The cube root balances the truncation of a central difference and rounding.
        return float(torch.finfo(self._dtype or x.dtype).eps ** (1 / 3))

    def _span(self, x: Tensor, t: Tensor) -> Tensor:
        """A step that is long beside those of training, as far as the time allows."""
        # Four steps of a thousand that are even in time, or in its logarithm.
        step = torch.clamp(torch.full_like(t, 4e-3 * self._t_max), 0.04 * t, 0.2 * t)
        return torch.maximum(step, self._short(x) * t)

    def _spanning(
        self, denoise: Denoise, x: Tensor, t: Tensor, velocity: Tensor
    ) -> Tensor:
        """A difference over several training steps, exact to fourth order."""
        step = self._span(x, t)
        one, two = (
            self._stencil(denoise, x, t, velocity, n * step) for n in (1.0, 2.0)
        )
        return (4 * one - two) / 3

    def _stencil(
        self, denoise: Denoise, x: Tensor, t: Tensor, velocity: Tensor, h: Tensor
    ) -> Tensor:
        """The difference with steps h, backward where t + h would exceed t_max."""

        def along(steps: float) -> Tensor:
            shift = (steps * h).to(x.dtype)
            if shift.ndim:  # a scalar on the CPU goes with every device
                shift = shift.to(x.device)
            return denoise(x + shift * velocity, t + steps * h)

        length = (2 * h).to(x.dtype)
        length = length.to(x.device) if length.ndim else length
        if bool((t + h).max() <= self._t_max):
            return (along(1.0) - along(-1.0)) / length
        here = denoise(x, t)
        # Summed so that a constant D gives 0 exactly.
        backward = 4 * (here - along(-1.0)) - (here - along(-2.0))
        return backward / length

    def _give_up(self, why: str, cause: Exception | None) -> None:
        first_line = why.splitlines()[0].rstrip(".")
        reason = f"forward mode does not work on this network: {first_line}"
        if self.asked == "jvp":
            raise RuntimeError(
                f'{reason}. Pass acceleration="difference" or "auto"'
            ) from cause
        told, self.method = self.method == "difference", "difference"
        if told:  # by another thread
            return
        warnings.warn(
            f"{reason}; using differences along the path instead",
            ForwardModeWarning,
            stacklevel=5,
        )


_STAIRS = (
    "its derivative does not add up to what the denoiser changes by over several per "
    "cent of the time; a part of the network rounds its time to training steps, is "
    "detached, or runs outside of torch"
)


def _sizes(rate: Tensor, difference: Tensor) -> str:
    return f"({float(rate.norm()):.3g} against {float(difference.norm()):.3g})"


def derivative_matrix(nodes: Tensor, points: int = 5) -> Tensor:
    """Weights [n, n] of the first derivative on the nearest of given nodes.

    Each row solves the moment equations of its stencil, exact for polynomials of degree
    ``points - 1``.

    Args:
        nodes: Distinct abscissae [n] in order, n >= points.
        points: Nodes in a stencil, odd.

    Raises:
        ValueError: If there are fewer.
    """
    n = len(nodes)
    if n < points:
        raise ValueError(
            f"points: the difference needs at least {points} times, got {n}"
        )
    nodes = nodes.cpu()
    start = (torch.arange(n, device="cpu") - points // 2).clamp(0, n - points)
    index = start[:, None] + torch.arange(points, device="cpu")
    offsets = nodes[index] - nodes[:, None]
    scale = offsets.abs().amax(1, keepdim=True)
    powers = torch.arange(points, dtype=torch.float64, device="cpu")
    moments = (offsets / scale)[:, None, :] ** powers[None, :, None]
    target = torch.zeros(n, points, 1, dtype=torch.float64, device="cpu")
    target[:, 1] = 1.0
    weights = torch.linalg.solve(moments, target)[..., 0] / scale
    return torch.zeros_like(weights[:, :1]).repeat(1, n).scatter(1, index, weights)
