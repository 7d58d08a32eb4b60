r"""The total derivative :math:`\dot D` of a denoiser along the path of the flow.

:math:`\dot D = (\partial_x D)\, v + \partial_t D`. Forward mode gives it in one
Jacobian-vector product. It fails in three ways, and all are caught here. Kernels
without a forward derivative raise. A forward pass under ``torch.inference_mode`` drops
the tangent without a word, so the first products are compared with differences. And a
network that rounds its time to training steps is a staircase, of which forward mode,
and a short difference no less, sees the treads only: at several levels the product is
compared with a difference that spans a few steps, S(w) along the tangent of the path at
a width w of 4 % of the time and more. :math:`(4 S(w) - S(2w))/3` is exact to fourth
order, and :math:`|S(w) - S(2w)|` tells how far it can be trusted.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
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
        if method not in ("auto", "jvp", "difference"):
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
        forward = rate is not None
        if rate is None and not self._staircase:
            rate = self.difference(denoise, x, t, velocity)
        # A factor of four in time at once.
        level = math.floor(math.log(float(t.max())) / math.log(4.0))
        if rate is not None and level not in self._levels:
            self._levels.add(level)
            wide, doubt = self._spanning(denoise, x, t, velocity)
            if _apart(rate, wide, doubt):
                if forward:
                    self._give_up(
                        "its derivative does not agree with a difference that spans "
                        f"several per cent of the time {_sizes(rate, wide)}; {_STAIRS}",
                        None,
                    )
                    rate = self.difference(denoise, x, t, velocity)
                if _apart(rate, wide, doubt):
                    self._staircase = True
                    rate = wide
        return self._spanning(denoise, x, t, velocity)[0] if rate is None else rate

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

    def contradicted(self, rate: Tensor, difference: Callable[[int], Tensor]) -> bool:
        """Whether forward mode along a whole path disagrees with the path's difference.

        Costs no evaluation. At every node the two are compared as far as stencils of
        five and of three nodes agree on the difference; forward mode is given up if at
        a fifth of the nodes where that tells anything it is off by a tenth.

        Args:
            rate: By forward mode, [n, N, *shape].
            difference: Gives the derivative by a stencil of that many nodes, of the
                first few samples.

        Raises:
            RuntimeError: With method ``"jvp"``, if so.
        """
        if len(rate) < 5:
            return False
        fine, coarse = (difference(points) for points in (5, 3))
        rate = rate[:, : fine.shape[1]]
        off, doubt, ours, theirs = (
            v.flatten(1).norm(dim=1) for v in (rate - fine, fine - coarse, rate, fine)
        )
        size = torch.maximum(ours, theirs)
        tells = 3 * doubt < 0.3 * size
        wrong = tells & (off > 0.1 * size + 3 * doubt)
        count = int(wrong.sum())
        if count <= max(2, 0.2 * int(tells.sum())):
            return False
        self._give_up(
            "its derivative does not agree with a difference along the path at "
            f"{count} of {len(rate)} levels; {_STAIRS}",
            None,
        )
        return True

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

    def _spanning(
        self, denoise: Denoise, x: Tensor, t: Tensor, velocity: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A difference over several training steps, and how far it may be off."""
        # Four steps of a thousand that are even in time, or in its logarithm.
        step = torch.clamp(torch.full_like(t, 4e-3 * self._t_max), 0.04 * t, 0.2 * t)
        step = torch.maximum(step, self._short(x) * t)
        one, two = (
            self._stencil(denoise, x, t, velocity, n * step) for n in (1.0, 2.0)
        )
        return (4 * one - two) / 3, (one - two).norm()

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
    "a part of the network rounds its time to training steps, is detached, or runs "
    "outside of torch"
)


def _sizes(rate: Tensor, difference: Tensor) -> str:
    return f"({float(rate.norm()):.3g} against {float(difference.norm()):.3g})"


def _apart(rate: Tensor, wide: Tensor, doubt: Tensor) -> bool:
    """Whether a derivative is off by more than a tenth and what is in doubt."""
    off, size = (rate - wide).norm(), torch.maximum(rate.norm(), wide.norm())
    return bool(off > 0.1 * size + 2 * doubt)


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
