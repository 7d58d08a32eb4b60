r"""How the solvers take their steps: the loop behind `artlib.sample`.

Every solver that takes a grid steps through it here, a `Solver` by its own step and a
callable by its own; dopri5 is torchdiffeq's. Grids stay on the CPU, whatever the
state's device: a 0-d tensor there is a scalar to every device, and nothing waits for
it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from .._common.adaptive import MAX_TRIALS, Guarded, dopri5, not_finite
from .._common.precision import as_double, full_precision, holds_double
from ..flow.flow import ProbabilityFlow
from . import multistep
from .position import Evaluated, Position, nodes_of
from .solver import Solver, SolverLike, check_states, solver_of, take_step

StepCallback: TypeAlias = Callable[[int, float, Tensor], object]
"""Called as ``callback(step, t, x)``; what it returns is ignored."""


def integrate(
    flow: ProbabilityFlow,
    x: Tensor,
    nodes: Tensor,
    solver: SolverLike,
    callback: StepCallback | None = None,
    *,
    told: Tensor | None = None,
) -> Tensor:
    """`artlib.sample` on a grid without its checks and without its ``no_grad``.

    Differentiable in the state, in the network, in ``nodes`` and in ``told``, for what
    optimises a grid through the solver. The graph then holds all K steps.

    Args:
        flow: The ODE.
        x: States at the first node, float32 or float64.
        nodes: float64 [K + 1], strictly descending, on any device.
        solver: One that is not adaptive, as in `artlib.sample`.
        callback: Called as ``callback(k, t_k, x_k)`` at every node k = 0 ... K, with
            the time as a float and the state there.
        told: Process times [K] whose noise levels the network is told at the nodes;
            by default the nodes themselves.

    Returns:
        States at the last node.

    Raises:
        ValueError: If a solver is told levels that makes several evaluations a step,
            and as in `artlib.sample`.
    """
    kind = solver_of(solver)
    if told is not None and not kind.tellable:
        raise ValueError(
            f"told: {kind.name} cannot be told levels, for it makes several "
            "evaluations a step or one's own; use euler or a multistep solver"
        )
    run = _Run(flow, nodes, x, callback)
    nodes_here = nodes_of(flow.process, run.nodes)
    levels = [None] * run.steps if told is None else told.cpu().unbind()
    past: tuple[Evaluated, ...] = ()
    for k, (now, after) in enumerate(pairwise(nodes_here)):
        run.visit(x)
        left = run.steps - k
        rest = (levels[k], left, run.ends_at_zero, run.steps, past)
        position = Position(flow, x, now, after, *rest)
        x = _advanced(kind, position, to_zero=run.ends_at_zero and left == 1)
        if kind.history and now.alpha.item() != 0:
            past = (position.remembered(), *past)[: kind.history]
    run.visit(x)
    run.require_finite()
    return x


def _advanced(kind: Solver, position: Position, *, to_zero: bool) -> Tensor:
    """One step: the solver's own, but to 0 of first order."""
    if to_zero:
        if kind.data_form:
            return multistep.ddim(position)
        velocity = position.flow.velocity_from(
            position.denoised, position.x, position.t
        )
        return position.x + (position.s - position.t) * velocity
    if kind.step is not None:
        flow, x, t, s = position.flow, position.x, position.t, position.s
        return take_step(kind.step, flow, x, t, s)
    assert kind.advance is not None
    return check_states(kind.advance(position), position.x, "advance(position)")


class _Run:
    """What a run keeps beside the state: where it is, and whether it is still finite.

    One number per node is kept on the state's device, the sum of the state there: a
    NaN or an infinity in the state makes it one too, at a tenth of the price of
    ``isfinite``. It is read once, after the last step, so that no step waits for the
    device.
    """

    def __init__(
        self,
        flow: ProbabilityFlow,
        nodes: Tensor,
        x: Tensor,
        callback: StepCallback | None,
    ) -> None:
        self.flow = flow
        self.nodes = nodes.cpu()
        self.times: list[float] = self.nodes.tolist()
        self.steps = len(self.times) - 1
        self.ends_at_zero = self.times[-1] == 0
        self.callback = callback
        self.node = 0
        wide = torch.float64 if holds_double(x.device) else torch.float32
        self.sums = torch.zeros(self.steps + 1, dtype=wide, device=x.device)

    def visit(self, x: Tensor) -> None:
        """Record the state at the next node and hand it to the callback."""
        self.sums[self.node] = x.detach().sum()
        if self.callback is not None:
            self.callback(self.node, self.times[self.node], x)
        self.node += 1

    def require_finite(self) -> None:
        finite = torch.isfinite(self.sums)
        if bool(finite.all()):
            return
        k = int((~finite).nonzero()[0])
        start = self.times[max(k - 1, 0)]
        raise not_finite(f"at step {k} of {self.steps}, from t = {start:.6g}")


@full_precision()
def integrate_adaptive(
    flow: ProbabilityFlow,
    x: Tensor,
    rtol: float,
    atol: float,
    callback: StepCallback | None,
) -> Tensor:
    """dopri5 from t_max to t_min, then one Euler step to 0, in float64."""
    nodes = flow.process.t_max, flow.process.t_min
    x = as_double(x, "x_T")
    times = torch.tensor(nodes, dtype=torch.float64, device=x.device)
    accepted = 0

    def visit(t: float, x: Tensor) -> None:
        nonlocal accepted
        if callback is not None:
            callback(accepted, t, x)
        accepted += 1

    velocity = Guarded(lambda t, x: flow.velocity(x, t), float, visit)
    x = dopri5(velocity, x, times, rtol=rtol, atol=atol, trials=MAX_TRIALS)[-1]
    visit(float(nodes[1]), x)
    x = x - times[-1] * velocity(times[-1], x)
    visit(0.0, x)
    return x
