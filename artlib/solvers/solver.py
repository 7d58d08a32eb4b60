r"""What may be passed as a ``solver``: a name, a `Solver`, or a step of one's own.

A `Solver` says all that the library has to know of a method: how it takes one step from
where a run stands, of what order it is, how many evaluations a step makes and how many
earlier ones it looks back on. `SOLVERS` has those with a name; one that is made by a
user goes wherever a name does, into `artlib.sample`, `artlib.art` and `artlib.refine`.

A step of one's own is less: a callable ``step(flow, x, t, s) -> x`` that takes states
from the process time t down to s > 0. It sees one step, so a multistep method has to be
a `Solver`. As for every solver, the step to 0 is of first order, and neither is asked
for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor

from .._common.runge_kutta import STEPS
from ..flow.flow import ProbabilityFlow
from . import multistep
from .position import Position

Step: TypeAlias = Callable[[ProbabilityFlow, Tensor, Tensor, Tensor], Tensor]
"""A one-step solver: ``step(flow, x, t, s)`` takes states [N, *shape] from the process
time t down to s > 0 (0-d float64 tensors) and returns them there, in the same shape.
An attribute ``evaluations`` may say how many network evaluations it makes."""

Advance: TypeAlias = Callable[[Position], Tensor]
"""``advance(position)`` returns the states at ``position.s`` > 0."""


def _check_takes(function: Callable[..., Any], count: int, message: str) -> None:
    """Refuse a function that cannot be called with so many arguments.

    Raises:
        TypeError: With the message and what Python says of it.
    """
    try:
        inspect.signature(function).bind(*[None] * count)
    except ValueError:  # a builtin without a signature: its first call will tell
        pass
    except TypeError as error:
        raise TypeError(f"{message} ({error})") from error


@dataclass(frozen=True)
class Solver:
    """A method of integrating the flow on a grid.

    Attributes:
        name: What it is called in tables and messages, without blanks.
        order: Order of convergence on smooth grids that end above 0; 0 where it has to
            be measured, for a step of one's own.
        evaluations: Network evaluations (NFE) per step; for the adaptive one, per
            step tried; 0 where they have to be counted.
        advance: Takes one step. None for the adaptive one and for a step of one's own.
        history: How many earlier evaluations a step looks back on; 0 for a one-step
            method. Until there are as many, ``advance`` finds fewer in its position.
        data_form: Whether the step to 0 is DDIM's, which keeps the noise and exchanges
            the data; otherwise it is Euler's in the process's time. In `VE` and
            `RectifiedFlow` the two are one.
        tellable: Whether it makes one evaluation a step and takes it from
            ``position.denoised``, so that the network may be told another noise level
            than the node's (`artlib.tell`).
        corrects: Whether a step also corrects the states that it starts from, in
            ``position.x``, by the evaluation made of them.
        adaptive: Whether it chooses its own steps, and so takes no grid.
        step: The step, where it is one's own.
    """

    name: str
    order: int
    evaluations: int
    advance: Advance | None = None
    history: int = 0
    data_form: bool = False
    tellable: bool = False
    corrects: bool = False
    adaptive: bool = False
    step: Step | None = None

    def __post_init__(self) -> None:
        """Refuse what could not run."""
        if not isinstance(self.name, str) or not self.name or " " in self.name:
            raise ValueError(
                f"name: expected a text without blanks, got {self.name!r}; tables and "
                "files call the solver by it"
            )
        for field, least in (("order", 0), ("evaluations", 0), ("history", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field}: expected an integer >= 0, got {value!r}")
        if self.adaptive or self.step is not None:
            return
        if not callable(self.advance):
            raise TypeError(
                "advance: expected a function of a position that returns the states "
                f"at position.s, got {type(self.advance).__name__}"
            )
        _check_takes(
            self.advance,
            1,
            "advance: expected a function of one argument, the position, but it does "
            "not take that alone",
        )
        for field in ("order", "evaluations"):
            if not getattr(self, field):
                raise ValueError(f"{field}: expected at least 1 of a solver, got 0")
        if self.tellable and self.evaluations != 1:
            raise ValueError(
                f"tellable: {self.evaluations} evaluations a step are told one level "
                "each; only a solver of one evaluation can be told"
            )


def _runge_kutta(method: str) -> Advance:
    def advance(position: Position) -> Tensor:
        flow = position.flow
        return STEPS[method](flow.velocity, position.x, position.t, position.s)

    return advance


def euler(position: Position) -> Tensor:
    """A step of Euler's method, eq. (3): the velocity of its start all along."""
    velocity = position.flow.velocity_from(position.denoised, position.x, position.t)
    return position.x + (position.s - position.t) * velocity


def _one_step(name: str, order: int, method: str) -> Solver:
    return Solver(name, order, order, _runge_kutta(method))


def _multistep(name: str, order: int, advance: Advance, history: int) -> Solver:
    corrects = name.startswith("unipc")
    return Solver(name, order, 1, advance, history, True, True, corrects)


SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        solver.name: solver
        for solver in (
            Solver("euler", 1, 1, euler, tellable=True),
            _one_step("heun", 2, "heun2"),
            _one_step("rk4", 4, "rk4"),
            _multistep("dpmpp_2m", 2, multistep.dpmpp_2m, 1),
            _multistep("dpmpp_3m", 2, multistep.dpmpp_3m, 2),
            _multistep("unipc", 3, multistep.unipc(2), 2),
            _multistep("unipc3", 4, multistep.unipc(3), 3),
            _multistep("ipndm", 2, multistep.ipndm(4), 3),
            _multistep("ipndm2", 2, multistep.ipndm(2), 1),
            _multistep("ipndm3", 2, multistep.ipndm(3), 2),
            Solver("dopri5", 5, 6, adaptive=True),
        )
    }
)
"""The solvers by name; read only."""


SolverLike: TypeAlias = str | Solver | Step
"""A key of `SOLVERS`, a `Solver`, or a step of one's own."""


def solver_of(solver: SolverLike, *, adaptive: bool = False) -> Solver:
    """The one place where an argument ``solver`` is understood.

    Args:
        solver: A key of `SOLVERS`, a `Solver`, or a step of one's own.
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
    if isinstance(solver, Solver):
        if solver.adaptive and not adaptive:
            raise ValueError(
                f"solver: {solver.name} is adaptive, and here it has to take a grid"
            )
        return solver
    if not callable(solver):
        raise TypeError(
            "solver: expected a name, a Solver or a callable step(flow, x, t, s), got "
            f"{type(solver).__name__}"
        )
    _check_takes(
        solver,
        4,
        "solver: expected a callable step(flow, x, t, s) -> states at s, but it does "
        "not take these four arguments",
    )
    return Solver(_name(solver), 0, _evaluations(solver), step=solver)


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
    return check_states(y, x, "step(flow, x, t, s)").to(x)


def check_states(y: Any, x: Tensor, taker: str) -> Tensor:
    """What a step returned, if it may be the states at the next node.

    Args:
        y: What came back.
        x: The states that the step started from.
        taker: How the step is called, for the message.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it has another shape.
    """
    if not isinstance(y, Tensor):
        raise TypeError(
            f"solver: {taker} has to return the states at s as a tensor, got "
            f"{type(y).__name__}"
        )
    if y.shape != x.shape:
        raise ValueError(
            f"solver: {taker} has to return the shape {tuple(x.shape)} of its states, "
            f"got {tuple(y.shape)}"
        )
    return y


def _name(step: Any) -> str:
    """A name without blanks for a callable: its own, or that of its class."""
    inner = getattr(step, "func", step)  # functools.partial
    return str(getattr(inner, "__name__", type(step).__name__)).replace(" ", "-")


def _evaluations(step: Any) -> int:
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
