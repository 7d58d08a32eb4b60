r"""What may be passed as a ``solver``: a name of `SOLVERS`, or a step of one's own.

A step of one's own is a callable ``step(flow, x, t, s) -> x`` that takes states from
the process time t down to s > 0. It sees one step, so no multistep method can be
written as one; for those there are names. As for every solver, the step to 0 is an
Euler step, and the callable is not asked for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor

from ..flow.flow import ProbabilityFlow

Step: TypeAlias = Callable[[ProbabilityFlow, Tensor, Tensor, Tensor], Tensor]
"""A one-step solver: ``step(flow, x, t, s)`` takes states [N, *shape] from the process
time t down to s > 0 (0-d float64 tensors) and returns them there, in the same shape.
An attribute ``evaluations`` may say how many network evaluations it makes."""


@dataclass(frozen=True)
class Solver:
    """What is known about a solver before it runs.

    Attributes:
        order: Order of convergence on grids that end above 0; 0 where it has to be
            measured, for a step of one's own.
        evaluations: Network evaluations (NFE) per step; for the adaptive one, per
            step tried; 0 where they have to be counted.
        method: Its step in `artlib._common.runge_kutta`, or torchdiffeq's name of
            the adaptive one; empty for others.
        stages: Where in the step it evaluates, as fractions of the step.
        adaptive: Whether it chooses its own steps, and so takes no grid.
        name: What it is called in tables and messages.
        step: The step, where it is one's own.
    """

    order: int
    evaluations: int
    method: str = ""
    stages: tuple[float, ...] = ()
    adaptive: bool = False
    name: str = ""
    step: Step | None = None


SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        "euler": Solver(1, 1, "euler", (0.0,), name="euler"),
        "heun": Solver(2, 2, "heun2", (0.0, 1.0), name="heun"),
        "rk4": Solver(4, 4, "rk4", (0.0, 1 / 3, 2 / 3, 1.0), name="rk4"),
        "dpmpp_2m": Solver(2, 1, name="dpmpp_2m"),
        "dopri5": Solver(5, 6, "dopri5", adaptive=True, name="dopri5"),
    }
)
"""The solvers by name; read only."""


def solver_of(solver: str | Step, *, adaptive: bool = False) -> Solver:
    """The one place where an argument ``solver`` is understood.

    Args:
        solver: A key of `SOLVERS`, or a step of one's own.
        adaptive: Whether solvers that choose their own steps are allowed.

    Raises:
        TypeError: If it is neither, or a callable that does not take four arguments.
        ValueError: If the name is unknown, or adaptive where that is not allowed.
    """
    if isinstance(solver, str):
        known = [k for k, kind in SOLVERS.items() if adaptive or not kind.adaptive]
        if solver in known:
            return SOLVERS[solver]
        what = "adaptive" if solver in SOLVERS else "unknown"
        raise ValueError(
            f"solver: {what} {solver!r}; the solvers are {', '.join(known)}, or a "
            "callable step(flow, x, t, s)"
        )
    if not callable(solver):
        raise TypeError(
            "solver: expected a name or a callable step(flow, x, t, s), got "
            f"{type(solver).__name__}"
        )
    try:
        inspect.signature(solver).bind(None, None, None, None)
    except ValueError:  # a builtin without a signature: its first call will tell
        pass
    except TypeError as error:
        raise TypeError(
            "solver: expected a callable step(flow, x, t, s) -> states at s, but it "
            f"does not take these four arguments ({error})"
        ) from error
    return Solver(0, _told(solver), name=_name(solver), step=solver)


def take_step(
    step: Step, flow: ProbabilityFlow, x: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """One step of a callable, its answer checked and in the dtype of ``x``.

    The callable gets copies: what it does to them in place stays its own.

    Args:
        step: The callable.
        flow: The flow.
        x: States at t [N, *shape].
        t: Process time.
        s: The time to go to, below t.

    Raises:
        TypeError: If it returns no tensor.
        ValueError: If it returns another shape.
    """
    y = step(flow, x.clone(), t.clone(), s.clone())
    if not isinstance(y, Tensor):
        raise TypeError(
            "solver: step(flow, x, t, s) has to return the states at s as a tensor, "
            f"got {type(y).__name__}"
        )
    if y.shape != x.shape:
        raise ValueError(
            f"solver: step(flow, x, t, s) has to return the shape {tuple(x.shape)} of "
            f"its states, got {tuple(y.shape)}"
        )
    return y.to(x)


def _name(step: Any) -> str:
    """A name without blanks for a callable: its own, or that of its class."""
    inner = getattr(step, "func", step)  # functools.partial
    return str(getattr(inner, "__name__", type(step).__name__)).replace(" ", "-")


def _told(step: Any) -> int:
    """What a callable says of its evaluations, 0 if nothing."""
    told = getattr(step, "evaluations", None)
    if told is None:
        return 0
    if isinstance(told, bool) or not isinstance(told, int) or told < 1:
        raise ValueError(
            "solver: its attribute evaluations has to be an integer of at least 1, the "
            f"network evaluations of a step, got {told!r}"
        )
    return told
