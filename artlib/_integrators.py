r"""How the solvers take their steps: the loops behind `artlib.sample`.

Euler, Heun and RK4 go through torchdiffeq on the given grid, dopri5 is its adaptive
one, DPM-Solver++(2M) is written out here.

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
from torchdiffeq import odeint

from ._precision import full_precision
from ._solver_choice import Solver, Step, solver_of, take_step
from .flow import ProbabilityFlow

StepCallback: TypeAlias = Callable[[int, float, Tensor], object]
"""Called as ``callback(step, t, x)``; what it returns is ignored."""


# Trial steps after which dopri5 gives up: a smooth flow takes a few hundred.
_MAX_TRIALS = 100_000


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
        self.nodes = nodes
        self.on_device = nodes.to(x.device)
        self.times: list[float] = nodes.tolist()
        self.steps = len(self.times) - 1
        self.ends_at_zero = self.times[-1] == 0
        self.callback = callback
        self.node = 0
        self.sums = torch.zeros(self.steps + 1, dtype=torch.float64, device=x.device)

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
        raise _not_finite(f"at step {k} of {self.steps}, from t = {start:.6g}")


def _not_finite(where: str) -> ValueError:
    return ValueError(
        f"the state became NaN or infinite {where}; check that the denoiser is finite "
        "there (half precision overflows at large noise), or use a finer grid"
    )


class _GridVelocity:
    """The velocity as torchdiffeq calls it, at the grid's own float64 times.

    torchdiffeq rounds the time to the dtype of the state before each call. A method
    visits the same fractions of every step, so the exact times are known in advance
    and are handed out in their order instead.
    """

    def __init__(self, run: _Run, stages: tuple[float, ...], steps: int) -> None:
        self.run = run
        start, end = run.on_device[:steps], run.on_device[1 : steps + 1]
        columns = [end if c == 1 else start + (end - start) * c for c in stages]
        self.times = iter(torch.stack(columns, dim=1).flatten().unbind())

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.run.flow.velocity(x, next(self.times))

    def callback_step(self, t: Tensor, x: Tensor, dt: Tensor) -> None:
        self.run.visit(x)


def _one_step_methods(run: _Run, x: Tensor, kind: Solver) -> Tensor:
    """Euler, Heun and RK4 through torchdiffeq, then the Euler step to 0."""
    steps = run.steps - 1 if run.ends_at_zero else run.steps
    if steps:
        times = run.on_device[: steps + 1]
        # Two output times and the grid as an option: all K + 1 states would be stored
        # if the grid were the output times.
        x = odeint(
            _GridVelocity(run, kind.stages, steps),
            x,
            times[[0, -1]],
            method=kind.method,
            options={"grid_constructor": lambda *_: times},
        )[-1]
    return _to_zero(run, x)


def _own_steps(run: _Run, x: Tensor, step: Step) -> Tensor:
    """A callable from node to node, then the Euler step to 0."""
    times = run.on_device.unbind()
    for t, s in pairwise(times[:-1] if run.ends_at_zero else times):
        run.visit(x)
        x = take_step(step, run.flow, x, t, s)
    return _to_zero(run, x)


def _to_zero(run: _Run, x: Tensor) -> Tensor:
    """The Euler step to 0, if that is where the grid ends."""
    if run.ends_at_zero:
        run.visit(x)
        t = run.on_device[-2]
        x = x + (run.on_device[-1] - t) * run.flow.velocity(x, t)
    return x


def _multistep(run: _Run, x: Tensor) -> Tensor:
    """DPM-Solver++(2M); see the module's docstring."""
    # Coefficients are 0-d tensors on the CPU: scalars to every device, free of waiting.
    nodes = run.nodes.cpu()
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
    times = run.on_device.unbind()
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


class _AdaptiveVelocity:
    """The velocity as dopri5 calls it: every value checked, every node reported.

    The solver waits for the device at each step anyway, and a NaN would send it into
    ever smaller steps.
    """

    def __init__(self, flow: ProbabilityFlow, callback: StepCallback | None) -> None:
        self.flow = flow
        self.callback = callback
        self.accepted = 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        v = self.flow.velocity(x, t)
        if not bool(torch.isfinite(v).all()):
            raise _not_finite(
                f"in step {self.accepted} of dopri5, at t = {float(t):.6g}"
            )
        return v

    def callback_accept_step(self, t: Tensor, x: Tensor, dt: Tensor) -> None:
        self.visit(float(t), x)

    def visit(self, t: float, x: Tensor) -> None:
        if self.callback is not None:
            self.callback(self.accepted, t, x)
        self.accepted += 1


@full_precision()
def integrate_adaptive(
    flow: ProbabilityFlow,
    x: Tensor,
    rtol: float,
    atol: float,
    callback: StepCallback | None,
) -> Tensor:
    """dopri5 from t_max to t_min, then one Euler step to 0, in float64."""
    start, end = float(flow.process.t_max), float(flow.process.t_min)
    times = torch.tensor([start, end], dtype=torch.float64, device=x.device)
    velocity = _AdaptiveVelocity(flow, callback)
    try:
        x = odeint(
            velocity,
            x,
            times,
            rtol=rtol,
            atol=atol,
            method="dopri5",
            options={
                # The last step must not reach past t_min, where t could turn negative;
                # nor must the trial that chooses a first step, hence a given one.
                "step_t": times[-1:],
                "first_step": 1e-3 * (start - end),
                "max_num_steps": _MAX_TRIALS,
            },
        )[-1]
    except AssertionError as error:  # torchdiffeq's way to say that it is stuck
        if not str(error).startswith(("underflow in dt", "max_num_steps")):
            raise  # the network's own
        raise RuntimeError(
            f"dopri5 cannot reach rtol = {rtol:g}, atol = {atol:g} ({error}); raise "
            "the tolerances (a float32 network is rough below 1e-6), or integrate with "
            'solver="rk4" on a fine grid'
        ) from error
    velocity.visit(end, x)
    x = x - times[-1] * velocity(times[-1], x)
    velocity.visit(0.0, x)
    return x
