r"""Solvers: how one step of the probability-flow ODE is taken, and how many it takes.

Sampling integrates :math:`dx/dt = v(x, t)`, eq. (2) of the paper, from the first node
of a grid down to its last one; with :math:`h = t_{k+1} - t_k < 0`:

| solver | one step | order | NFE per step |
| --- | --- | --- | --- |
| ``euler`` | :math:`x + h v(x, t)`, eq. (3) | 1 | 1 |
| ``heun`` | mean of the slopes at both ends | 2 | 2 |
| ``rk4`` | Kutta's 3/8 rule, stages at 0, 1/3, 2/3, 1 | 4 | 4 |
| ``dpmpp_2m`` | DPM-Solver++(2M), `artlib.solvers.integrate` | 2 | 1 |
| ``dopri5`` | adaptive Dormand-Prince: the reference | 5 | 6 per trial |

**The step to 0.** A grid that ends at 0 ends with an Euler step whatever the solver
(for ``dpmpp_2m`` its own first-order step): in many processes v cannot be evaluated at
t = 0. In `VE` and `RectifiedFlow` that step returns the denoised sample D(x, t)
itself. So orders are measured on grids that end above 0.

Times reach the flow as 0-d float64 tensors whatever the dtype of the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .._common.checks import as_grid, check_samples, finite_float, got, positive_int
from .._common.precision import at_least_single
from ..flow.denoisers import CountNFE
from ..flow.flow import ProbabilityFlow, check_flow
from ..flow.processes import VE, Process
from ..flow.rows import in_batches
from ..solvers.clocked import Clock, integrate_with
from .integrate import StepCallback, integrate, integrate_adaptive
from .solver import SOLVERS, Solver, SolverLike, Step, solver_of

__all__ = ["SOLVERS", "GridLike", "Solver", "Step", "StepCallback", "nfe", "sample"]

GridLike: TypeAlias = Sequence[float] | np.ndarray | Tensor
"""A list of K + 1 descending timesteps."""


@runtime_checkable
class PlanLike(Protocol):
    """A grid with its solver and the levels that the network is told: `artlib.Plan`."""

    @property
    def process(self) -> Process:
        """The process that it was made for."""

    @property
    def nodes(self) -> Tensor:
        """Process times [K + 1]."""

    @property
    def told(self) -> Tensor:
        """Process times [K] whose noise levels are told."""

    @property
    def solver(self) -> SolverLike:
        """The solver that takes its steps."""


def sample(
    flow: ProbabilityFlow,
    x_T: Tensor,
    grid: GridLike | PlanLike | None = None,
    *,
    clock: Clock | None = None,
    solver: SolverLike | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    callback: StepCallback | None = None,
    batch: int | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE from noise to data.

    Runs without an autograd graph and in memory that does not grow with K.

    Args:
        flow: The ODE, for example ``ProbabilityFlow(process, denoiser)``.
        x_T: States at the first node of the grid, [n, *sample_shape]; for ``dopri5``
            at ``t_max``.
        grid: K + 1 strictly descending times, the first at most ``t_max``, the last
            0 or above; ``schedule.grid(K)`` gives one. Not for ``dopri5``, which
            runs from ``t_max`` to ``t_min`` and from there by one Euler step to 0. Or
            a `Plan`, which has a solver of its own.
        clock: Instead of a grid: each sample's own times, see `artlib.clocks`; with
            ``"euler"``, ``"heun"`` or a step. The callback then gets the mean time.
        solver: A key of `SOLVERS`, a `Solver`, or a step of your own: a callable
            ``step(flow, x, t, s)`` that takes states x from process time t down to s >
            0 (0-d float64 tensors; columns [n, 1, ..., 1] with a clock) and returns
            them. It is not asked for the step to 0, and sees nothing of the step
            before: a multistep method is a `Solver`. By default ``"euler"``, or that
            of the plan.
        rtol: Relative tolerance of ``dopri5``; no other solver uses it.
        atol: Absolute tolerance of ``dopri5``, in units of the state.
        callback: Called as ``callback(k, t_k, x_k)`` at every node k = 0 ... K (for
            ``dopri5`` at every accepted one) with the time as a float and the state
            there. The state must not be changed in place; whoever keeps it, pays for
            its memory.
        batch: Samples computed together, which bounds the memory; by default all.
            Only ``dopri5``, whose samples share their steps, feels it, within its
            tolerance. Conditions go with their samples (`ProbabilityFlow.rows`). Not
            with a callback, which is shown the states of all samples.

    Returns:
        States at the last node, [n, *sample_shape], in the dtype of ``x_T`` for
        float32 and float64. Half precision is raised to float32, in which the sum of
        many small steps still holds. ``dopri5`` returns float64 always.

    Raises:
        TypeError: If ``flow`` is no flow, or ``x_T``, ``grid``, ``clock`` or
            ``solver`` of the wrong type, or a step returns no tensor.
        ValueError: If ``solver`` is unknown, an argument is out of its range or not
            finite, the denoiser changes the shape of its input, or the state became
            NaN or infinite on the way (the message says at which step), or a clock
            stalls, runs past the end or does not arrive.
        RuntimeError: If ``dopri5`` cannot reach its tolerance.

    References:
        Lu et al., DPM-Solver++, https://arxiv.org/abs/2211.01095, algorithm 2;
        Karras et al., https://arxiv.org/abs/2206.00364, algorithm 1 (Heun).
    """
    told: Tensor | None = None
    if isinstance(grid, PlanLike):
        grid, solver, told = _of_plan(grid, flow, solver, clock)
    solver = "euler" if solver is None else solver
    kind = solver_of(solver, adaptive=True)
    check_flow(flow)
    x_T = check_samples(x_T, "x_T").detach()
    x_T = x_T.to(at_least_single(x_T.dtype))
    if callback is not None and not callable(callback):
        raise TypeError(
            f"callback: expected a function of (k, t, x), got {got(callback)}; leave "
            "it out for none"
        )
    if batch is not None:
        if callback is not None:
            raise ValueError(
                "callback: it is shown the states of all samples, which a batch of "
                "them is not; pass either a callback or a batch"
            )
        options: dict[str, Any] = {
            "clock": clock,
            "solver": solver,
            "rtol": rtol,
            "atol": atol,
        }
        parts = in_batches(flow, [x_T], positive_int(batch, "batch"))
        if told is not None:  # the plan was checked above
            assert isinstance(grid, Tensor)
            with torch.no_grad():
                return torch.cat(
                    [integrate(p, x, grid, solver, told=told) for p, (x,) in parts]
                )
        return torch.cat([sample(part, x, grid, **options) for part, (x,) in parts])
    if clock is not None:
        if grid is not None:
            raise ValueError("clock: pass either a grid or a clock, not both")
        with torch.no_grad(), flow.watched(x_T):
            return integrate_with(flow, x_T, clock, solver, callback)
    if kind.adaptive:
        if grid is not None:
            raise ValueError(
                f"grid: {kind.name} chooses its own steps, so pass no grid; a grid "
                f"goes with one of {', '.join(_fixed())}"
            )
        tolerances = (
            finite_float(rtol, "rtol", positive=True),
            finite_float(atol, "atol", positive=True),
        )
        with torch.no_grad(), flow.watched(x_T):
            return integrate_adaptive(flow, x_T, *tolerances, callback)
    if grid is None:
        raise ValueError(
            f"grid: {kind.name} needs K + 1 timesteps, got None; pass "
            'schedule.grid(K), or solver="dopri5" for a reference without a grid'
        )
    nodes = as_grid(grid, "grid")
    t_max = float(flow.process.t_max)
    if float(nodes[0]) > t_max * (1 + 1e-6):
        raise ValueError(
            f"grid: the first node is {float(nodes[0]):.6g}, expected at most t_max = "
            f"{t_max:.6g} of the flow's process; was the grid made for another process?"
        )
    with torch.no_grad(), flow.watched(x_T):
        return integrate(flow, x_T, nodes, solver, callback, told=told)


def _of_plan(
    plan: PlanLike, flow: ProbabilityFlow, solver: SolverLike | None, clock: object
) -> tuple[Tensor, SolverLike, Tensor | None]:
    """Nodes, solver and told levels of a plan that fits the flow."""
    if check_flow(flow).process != plan.process:
        raise ValueError(
            f"grid: the plan belongs to {plan.process}, the flow to {flow.process}; "
            "make it for the same process and range"
        )
    if clock is not None:
        raise ValueError("clock: pass either a plan or a clock, not both")
    if solver is not None and solver_of(solver, adaptive=True) != solver_of(
        plan.solver
    ):
        raise ValueError(
            f"solver: the plan was made for {solver_of(plan.solver).name}; leave the "
            "solver out, or pass plan.nodes as a grid"
        )
    honest = torch.equal(plan.told, plan.nodes[:-1])
    return plan.nodes, plan.solver, None if honest else plan.told


def nfe(grid: GridLike | PlanLike, *, solver: SolverLike | None = None) -> int:
    """Network evaluations that a solver makes on a grid.

    With K steps and s evaluations per step: K s, less s - 1 where the last node is 0,
    because the step to 0 is an Euler step. So Euler K, Heun 2K - 1, RK4 4K - 3,
    DPM-Solver++(2M) K. The solver's evaluations, counted by `CountNFE`, are as many.

    A step of one's own says by an attribute ``evaluations`` how many it makes; without
    it they are counted in one step on a small Gaussian.

    Args:
        grid: K + 1 strictly descending times, or a `Plan`.
        solver: As in `sample`, except ``dopri5``; by default ``"euler"``, or that of
            the plan.

    Returns:
        The number of evaluations; one call on a batch is one evaluation.

    Raises:
        TypeError: If ``solver`` is neither a name nor a step.
        ValueError: If the solver is unknown or adaptive, or the grid is not a grid, or
            a step without ``evaluations`` fails on the Gaussian or evaluates nothing.
    """
    if isinstance(grid, PlanLike):
        solver, grid = solver or grid.solver, grid.nodes
    kind = solver_of("euler" if solver is None else solver, adaptive=True)
    if kind.adaptive:
        raise ValueError(
            f"solver: {kind.name} is adaptive, its NFE is not known in advance; wrap "
            "the denoiser in CountNFE and read .nfe after the run"
        )
    nodes = as_grid(grid, "grid")
    each = kind.evaluations or _counted(kind)
    saved = each - 1 if float(nodes[-1]) == 0 else 0
    return (nodes.numel() - 1) * each - saved


def _counted(kind: Solver) -> int:
    """Evaluations of one step of a callable, on N(0, 1) in two dimensions."""
    counter = CountNFE(lambda x, t: x / (1 + t**2))
    one = torch.ones(1, 2, dtype=torch.float64)
    remedy = "set its attribute evaluations to the network evaluations of a step"
    assert kind.step is not None
    try:
        sample(ProbabilityFlow(VE(), counter), one, [2.0, 1.0], solver=kind.step)
    except Exception as error:
        raise ValueError(
            f"solver: its evaluations could not be counted, for its step failed on a "
            f"Gaussian ({error}); {remedy}"
        ) from error
    if not counter.nfe:
        raise ValueError(f"solver: its step evaluates no network; {remedy}")
    return counter.nfe


def _fixed() -> list[str]:
    """Names of the solvers that step through a grid."""
    return [name for name, kind in SOLVERS.items() if not kind.adaptive]
