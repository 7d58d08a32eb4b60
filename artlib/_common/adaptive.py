"""dopri5 with its guards: a NaN is named, and a hopeless run is given up.

The adaptive pair of Dormand and Prince, as torchdiffeq has it, takes a NaN for an error
that is too large and shrinks its steps until they underflow; on a velocity rougher than
its tolerance it creeps on for as long as it is let. Both are caught where the velocity
is evaluated, for reference solutions and reference paths alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

MAX_TRIALS = 600
"""Trial steps, of six evaluations, after which dopri5 gives up at a tolerance of 1e-6;
the trained networks of `artlib.zoo` take 66 to 74 of them (40 at 1e-5). A method of
fifth order takes as many more as the tolerance is smaller, to the power 1/5."""


def not_finite(where: str) -> ValueError:
    """The error that says where a state became NaN or infinite."""
    return ValueError(
        f"the state became NaN or infinite {where}; check that the denoiser is finite "
        "there (half precision overflows at large noise), or use a finer grid"
    )


class Guarded:
    """A velocity as dopri5 calls it: every value checked, every evaluation counted.

    The solver waits for the device at each step anyway.

    Args:
        velocity: ``v(t, x)`` in the solver's own time.
        process_time: The process's time of the solver's.
        accepted: Called as ``accepted(t, x)`` at the start of every step that counts.
    """

    def __init__(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        process_time: Callable[[float], float],
        accepted: Callable[[float, Tensor], object] | None = None,
    ) -> None:
        self._velocity = velocity
        self._process_time = process_time
        self._accepted = accepted
        self._steps = 0
        self._evaluations = 0
        self.limit = 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self._evaluations += 1
        if self.limit and self._evaluations > self.limit:
            raise _Stuck(f"{self.limit} evaluations, at t = {self._at(t)}")
        v = self._velocity(t, x)
        if not bool(torch.isfinite(v).all()):
            raise not_finite(f"in step {self._steps} of dopri5, at t = {self._at(t)}")
        return v

    def callback_accept_step(self, t: Tensor, x: Tensor, dt: Tensor) -> None:
        self._steps += 1
        if self._accepted is not None:
            self._accepted(self._process_time(float(t)), x)

    def _at(self, t: Tensor) -> str:
        return f"{self._process_time(float(t)):.6g}"


class _Stuck(Exception):
    """More evaluations than a smooth flow can need."""


def dopri5(
    velocity: Guarded,
    x: Tensor,
    times: Tensor,
    *,
    rtol: float,
    atol: float,
    trials: int = MAX_TRIALS,
) -> Tensor:
    """States at descending times, in float64; no time beyond the last is tried.

    Args:
        velocity: The guarded velocity.
        x: States at the first time, float64.
        times: The solver's times [n], on the device of ``x``.
        rtol: Relative tolerance.
        atol: Absolute tolerance, in units of the state.
        trials: Trial steps allowed at a tolerance of 1e-6, see `MAX_TRIALS`.

    Returns:
        [n, *x.shape].

    Raises:
        ValueError: If the velocity is NaN or infinite somewhere.
        RuntimeError: If the tolerance cannot be reached.
    """
    finer = max(1.0, (1e-6 / max(min(rtol, atol), 1e-16)) ** 0.2)
    velocity.limit = int(6 * trials * finer)
    # Left alone, the solver steps past the end and interpolates back, and tries out a
    # first step that may lie beyond it too: a network may never have seen that.
    options: dict[str, Any] = {
        "step_t": times[-1:],
        "first_step": 1e-3 * float(times[0] - times[-1]),
    }
    from torchdiffeq import odeint  # late: with it comes much of SciPy

    try:
        states = odeint(
            velocity, x, times, rtol=rtol, atol=atol, method="dopri5", options=options
        )
    except (AssertionError, _Stuck) as error:
        # torchdiffeq says by an assertion that its steps underflow.
        if not (isinstance(error, _Stuck) or str(error).startswith("underflow in dt")):
            raise  # the network's own
        raise RuntimeError(
            f"dopri5 cannot reach rtol = {rtol:g}, atol = {atol:g} ({error}); raise "
            "the tolerances (a float32 network is rough below 1e-6), or integrate with "
            '"rk4" on a fine grid'
        ) from error
    velocity.limit = 0
    return cast(Tensor, states)
