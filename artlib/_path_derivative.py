r"""The total derivative :math:`\dot D` of a denoiser along the path of the flow.

:math:`\dot D = (\partial_x D)\, v + \partial_t D`. Forward mode gives it in one
Jacobian-vector product. It fails in two ways, and both are caught here: kernels without
a forward derivative raise, and a forward pass under ``torch.inference_mode`` drops the
tangent without a word, so the first products are compared with differences.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor

Acceleration = Literal["auto", "jvp", "difference"]
Denoise = Callable[[Tensor, Tensor], Tensor]


class ForwardModeWarning(UserWarning):
    """Forward mode was not usable for this network; the difference is used."""


class PathDerivative:
    """Takes the derivative by the method asked for, and remembers what works.

    Args:
        method: ``"auto"``, ``"jvp"`` or ``"difference"``.
        t_max: No evaluation is made above it.
        dtype: dtype of the network, which sets the step of a difference.

    Attributes:
        method: The method in force; ``"auto"`` becomes one of the others on first use.
    """

    def __init__(
        self, method: Acceleration, t_max: float, dtype: torch.dtype | None
    ) -> None:
        if method not in ("auto", "jvp", "difference"):
            raise ValueError(
                f"acceleration: expected 'auto', 'jvp' or 'difference', got {method!r}"
            )
        self.method: Acceleration = method
        self._t_max = t_max
        self._dtype = dtype
        self._checked = False

    def rate(self, denoise: Denoise, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """The derivative at (x, t), by the method in force.

        Args:
            denoise: The denoiser D(x, t).
            x: States [N, *shape].
            t: Process time, float64.
            velocity: dx/dt there [N, *shape].

        Returns:
            The derivative of D in time along the path, [N, *shape].
        """
        rate = self.forward(denoise, x, t, velocity)
        return self.difference(denoise, x, t, velocity) if rate is None else rate

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
            with warnings.catch_warnings():
                # torch's own, the first time that forward mode is used at all.
                warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
                _, rate = cast(
                    tuple[Tensor, Tensor],
                    torch.func.jvp(denoise, (x, t), (velocity, torch.ones_like(t))),
                )
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
                f"({float(rate.norm()):.3g} against {float(near.norm()):.3g}); a part "
                "of the network runs under torch.inference_mode or outside of torch"
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
        # The cube root balances the truncation of a central difference and rounding.
        h = widen * torch.finfo(self._dtype or x.dtype).eps ** (1 / 3) * t

        def along(steps: float) -> Tensor:
            return denoise(x + (steps * h).to(x.dtype) * velocity, t + steps * h)

        if bool((t + h).max() <= self._t_max):
            return (along(1.0) - along(-1.0)) / (2 * h).to(x.dtype)
        here = denoise(x, t)
        # Summed so that a constant D gives 0 exactly.
        backward = 4 * (here - along(-1.0)) - (here - along(-2.0))
        return backward / (2 * h).to(x.dtype)

    def _give_up(self, why: str, cause: Exception | None) -> None:
        first_line = why.splitlines()[0].rstrip(".")
        reason = f"forward mode does not work on this network: {first_line}"
        if self.method == "jvp":
            raise RuntimeError(
                f'{reason}. Pass acceleration="difference" or "auto"'
            ) from cause
        warnings.warn(
            f"{reason}; using differences along the path instead",
            ForwardModeWarning,
            stacklevel=5,
        )
        self.method = "difference"


def derivative_matrix(nodes: Tensor) -> Tensor:
    """Weights [n, n] of the first derivative on the five nearest of given nodes.

    Each row solves the moment equations of its stencil, exact for quartics.

    Args:
        nodes: Distinct abscissae [n] in order, n >= 5.

    Raises:
        ValueError: If there are fewer than five.
    """
    n = len(nodes)
    if n < 5:
        raise ValueError(f"points: the difference needs at least 5 times, got {n}")
    start = (torch.arange(n) - 2).clamp(0, n - 5)
    index = start[:, None] + torch.arange(5)
    offsets = nodes.cpu()[index] - nodes.cpu()[:, None]
    scale = offsets.abs().amax(1, keepdim=True)
    powers = torch.arange(5, dtype=torch.float64)
    moments = (offsets / scale)[:, None, :] ** powers[None, :, None]
    target = torch.zeros(n, 5, 1, dtype=torch.float64)
    target[:, 1] = 1.0
    weights = torch.linalg.solve(moments, target)[..., 0] / scale
    return torch.zeros(n, n, dtype=torch.float64).scatter(1, index, weights)
