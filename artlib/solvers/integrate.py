r"""How the solvers take their steps: the loops behind `artlib.sample`.

Euler, Heun and RK4 step through the given grid, dopri5 is torchdiffeq's, and
DPM-Solver++(2M) is written out here. Grids stay on the CPU, whatever the state's
device: a 0-d tensor there is a scalar to every device, and nothing waits for it.

**DPM-Solver++(2M).** With :math:`\lambda = \log(\alpha/\sigma)`, half the log-SNR, the
ODE is linear in x and driven by D alone. A step from s to t with D frozen,
:math:`h = \lambda_t - \lambda_s`, is

.. math::
    x_t = \frac{\sigma_t}{\sigma_s} x_s - \alpha_t (e^{-h} - 1) \bar D
        = \frac{\sigma_t}{\sigma_s} x_s
        + \Bigl(\alpha_t - \alpha_s \frac{\sigma_t}{\sigma_s}\Bigr) \bar D .

The second form holds where :math:`\alpha_s = 0` or :math:`\sigma_t = 0` too. The first
step uses :math:`\bar D = D_s`, the others extrapolate in :math:`\lambda` through the
step before, :math:`\bar D = D_s + \frac{h}{2 h_{prev}} (D_s - D_{prev})`. Started where
there is no signal at all (`RectifiedFlow` at t = 1) the error is
:math:`K^{-2} \log K`, because the first steps stay long in :math:`\lambda`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from .._common.adaptive import MAX_TRIALS, Guarded, dopri5, not_finite
from .._common.precision import as_double, full_precision, holds_double
from .._common.runge_kutta import STEPS
from ..flow.flow import ProbabilityFlow
from .solver import Solver, Step, solver_of, take_step

StepCallback: TypeAlias = Callable[[int, float, Tensor], object]
"""Called as ``callback(step, t, x)``; what it returns is ignored."""


_MAX_TRIALS = MAX_TRIALS


def integrate(
    flow: ProbabilityFlow,
    x: Tensor,
    nodes: Tensor,
    solver: str | Step,
    callback: StepCallback | None = None,
) -> Tensor:
    """`artlib.sample` on a grid without its checks and without its ``no_grad``.

    Differentiable in the state, in the network and in ``nodes``, for what optimises
    a grid through the solver. The graph then holds all K steps.

    Args:
        flow: The ODE.
        x: States at the first node, float32 or float64.
        nodes: float64 [K + 1], strictly descending, on any device.
        solver: A key of `SOLVERS` that is not adaptive, or a step of one's own.
        callback: As in `artlib.sample`.

    Returns:
        States at the last node.
    """
    kind = solver_of(solver)
    run = _Run(flow, nodes, x, callback)
    if kind.step is not None:
        x = _own_steps(run, x, kind.step)
    elif kind.method:
        x = _one_step_methods(run, x, kind)
    else:
        x = _multistep(run, x)
    run.visit(x)
    run.require_finite()
    return x


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


def _one_step_methods(run: _Run, x: Tensor, kind: Solver) -> Tensor:
    """Euler, Heun and RK4, then the Euler step to 0."""
    times = run.nodes.unbind()
    for t, s in pairwise(times[:-1] if run.ends_at_zero else times):
        run.visit(x)
        x = STEPS[kind.method](run.flow.velocity, x, t, s)
    return _to_zero(run, x)


def _own_steps(run: _Run, x: Tensor, step: Step) -> Tensor:
    """A callable from node to node, then the Euler step to 0."""
    times = run.nodes.unbind()
    for t, s in pairwise(times[:-1] if run.ends_at_zero else times):
        run.visit(x)
        x = take_step(step, run.flow, x, t, s)
    return _to_zero(run, x)


def _to_zero(run: _Run, x: Tensor) -> Tensor:
    """The Euler step to 0, if that is where the grid ends."""
    times = run.nodes.unbind()
    if run.ends_at_zero:
        run.visit(x)
        x = STEPS["euler"](run.flow.velocity, x, *times[-2:])
    return x


def _multistep(run: _Run, x: Tensor) -> Tensor:
    """DPM-Solver++(2M); see the module's docstring."""
    nodes = run.nodes
    process = run.flow.process
    alpha, sigma = process.alpha(nodes), process.sigma(nodes)
    shrink = sigma[1:] / sigma[:-1]
    gain = alpha[1:] - alpha[:-1] * shrink
    # h / (2 h_prev) is wanted between steps of finite length in lambda only: the step
    # to sigma = 0 and the one after alpha = 0 are first-order by nature.
    first = 1 if alpha[0].item() == 0 else 0
    last = run.steps - 1 if run.ends_at_zero else run.steps
    lengths = torch.diff(process.log_snr(nodes[first : last + 1]))
    ratio = (lengths[1:] / (2 * lengths[:-1])).unbind()
    times = nodes.unbind()
    previous: Tensor | None = None
    for k, (a, b) in enumerate(zip(shrink.unbind(), gain.unbind(), strict=True)):
        run.visit(x)
        denoised = run.flow.denoise(x, times[k])
        drive = denoised
        if previous is not None and first < k < last:
            drive = denoised + ratio[k - 1 - first] * (denoised - previous)
        x = a * x + b * drive
        previous = denoised
    return x


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
    x = dopri5(velocity, x, times, rtol=rtol, atol=atol, trials=_MAX_TRIALS)[-1]
    visit(float(nodes[1]), x)
    x = x - times[-1] * velocity(times[-1], x)
    visit(0.0, x)
    return x
