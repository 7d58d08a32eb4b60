r"""The probability-flow ODE of a denoiser, its acceleration and reference paths.

Equation (2) of the paper. With the denoiser D and
:math:`\hat\epsilon = (x - \alpha D) / \sigma` the velocity in process time is

.. math:: v(x, t) = \dot\alpha\, D + \dot\sigma\, \hat\epsilon .

What an Euler step leaves behind is set by the **acceleration along the path**, eq. (8),
:math:`Q = (\partial_x v)\, v + \partial_t v`, the total derivative of v. Writing
:math:`\dot D = (\partial_x D)\, v + \partial_t D` for the total derivative of the
denoiser, the terms in :math:`\dot\sigma^2/\sigma^2` cancel and

.. math::
    Q = \ddot\alpha\, D + \ddot\sigma\, \hat\epsilon
        + \bigl(\dot\alpha - \alpha\dot\sigma/\sigma\bigr)\, \dot D ,

so for `VE` simply :math:`Q = -\dot D / t` (ours; it avoids the cancellation that costs
float32 its digits at small t). Only :math:`\dot D` needs work: one forward-mode
Jacobian-vector product of the network in direction (v, 1), or a difference of D along
the path. The sign of the time axis does not matter to Q.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .._common.checks import check_samples, got
from .._common.precision import at_least_single, full_precision
from .._common.types import DenoiserFn, TimeLike
from .ask import Ask, check_rows, exact_time, network_dtypes
from .denoisers import casts_itself, uncounted
from .noise_coordinate import log_level, log_level_dot
from .path_derivative import Acceleration, PathDerivative, derivative_matrix
from .processes import VE, Process
from .reference_path import Trajectory, integrate
from .repeatable import Doubts, repeatable
from .rows import Part, Rows, rows_of

_FEW, _LEVELS = 8, 8
"""Samples, and about how many times of a path, at which forward mode is checked."""


class ProbabilityFlow:
    r"""The ODE that a process and a denoiser define.

    Args:
        process: The noising process.
        denoiser: Any callable ``D(x, t) -> x0_hat``. It gets copies: ``x`` [N, *shape]
            in its own dtype and ``t`` in float32 at least, as a 0-d tensor, or
            [N, 1, ..., 1] for per-sample times: both broadcast against ``x``. A network
            left in training mode, or any other that answers twice alike with two
            answers, is reported by a ``UserWarning``.
        acceleration: How :math:`\dot D` is taken. ``"jvp"``: forward mode, checked
            against differences at several levels; ``"difference"``: no derivative of
            the network; ``"auto"``: forward mode where it works, else the difference,
            with a `ForwardModeWarning`. A network that rejects forward mode (attention
            kernels), one that silently drops it (a forward under
            ``torch.inference_mode``) and one that rounds its time to training steps,
            of which forward mode sees the treads only, are detected.
        dtype: dtype in which the network is called; by default the one that its
            parameters show it to compute in, and that of ``x`` where it has none.

    Attributes:
        process: The noising process.
        denoiser: The denoiser as given.
        dtype: dtype of the network's calls, or None for that of ``x``.
    """

    def __init__(
        self,
        process: Process,
        denoiser: DenoiserFn,
        *,
        acceleration: Acceleration = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(process, Process):
            raise TypeError(
                "process: expected an artlib process such as artlib.VE(), got "
                f"{type(process).__name__}"
            )
        if not callable(denoiser):
            raise TypeError(
                "denoiser: expected a callable D(x, t) -> x0_hat, got "
                f"{type(denoiser).__name__}"
            )
        self.process = process
        self.denoiser = denoiser
        self._dtypes = [dtype] if dtype is not None else network_dtypes(denoiser)
        self.dtype = next(iter(self._dtypes), None)
        # A `Denoiser` casts for its network and keeps its own sums in x's dtype.
        self._casts = dtype is not None or not casts_itself(denoiser)
        self._ask, self._doubts = Ask(), Doubts()
        self._derivative = PathDerivative(acceleration, process.t_max, self.dtype)

    @property
    def acceleration_method(self) -> Acceleration:
        """The method in force: ``"auto"`` until the first use has settled it."""
        return self._derivative.method

    def with_denoiser(self, denoiser: DenoiserFn) -> ProbabilityFlow:
        """The same flow around another callable, such as a `CountNFE` of its own.

        What has been learned about forward mode is shared with the copy.

        Args:
            denoiser: A callable that computes the same function.
        """
        flow = copy.copy(self)
        flow.denoiser = denoiser
        return flow

    def rows(self, index: Rows, count: int) -> ProbabilityFlow:
        """The same flow for some of its samples, with their conditions.

        A denoiser that holds a condition for each sample says how they are taken
        apart by a method ``rows(index)``, which returns the denoiser of these
        rows; those of `artlib.adapters` have it. One without it is kept as it is.

        Args:
            index: Which samples: a slice, or row numbers [n] (int64).
            count: How many samples there are in all.

        Returns:
            A flow to call with states [n, *shape] of these samples.

        Raises:
            ValueError: If a denoiser of `artlib.adapters` holds conditions for another
                number of samples than there are.
        """
        check_rows(self.denoiser, count)
        flow = copy.copy(self)
        flow.denoiser = Part(rows_of(self.denoiser, index), self.denoiser, count)
        return flow

    def watched(
        self, x: Tensor, t: TimeLike | None = None, *, ask: bool = False
    ) -> AbstractContextManager[None]:
        """For a run of the flow: a warning if the denoiser is no function meanwhile.

        That is one left in training mode, or one that draws random numbers. Samplers
        and reference paths are watched already; this is for a loop of one's own.

        Args:
            x: States [N, *shape] at which it may be asked once more.
            t: Their time, by default t_max.
            ask: Ask it twice in any case, the first time.
        """
        time = self.process.t_max if t is None else t
        return repeatable(self, self._doubts, x, time, ask=ask)

    def denoise(self, x: Tensor, t: TimeLike) -> Tensor:
        r"""The denoiser's answer in the dtype of ``x``.

        Args:
            x: States [N, *shape].
            t: Process time; a number, 0-d, or broadcastable against ``x``.

        Returns:
            Denoised states [N, *shape].

        Raises:
            TypeError: If the denoiser does not return a tensor, or computes in another
                dtype than the one that it is called in.
            ValueError: If it returns another shape, or takes one time per sample only.
        """
        _check_states(x)
        denoised = self._ask(
            self.denoiser,
            x,
            exact_time(t, x),
            (self._casts and self._dtypes) or [x.dtype],
            trial=uncounted(self.denoiser),
        )
        if not isinstance(denoised, Tensor):
            raise TypeError(
                "denoiser: expected it to return a tensor, got "
                f"{type(denoised).__name__}; unwrap the network's output (.sample)"
            )
        if denoised.shape != x.shape:
            raise ValueError(
                f"denoiser: expected the shape {tuple(x.shape)} of its input, got "
                f"{tuple(denoised.shape)}; a network that also predicts a variance "
                "needs its output cut"
            )
        # A copy: a network may write its next answer over this one.
        return denoised.to(x.dtype, copy=True)

    def velocity(self, x: Tensor, t: TimeLike) -> Tensor:
        r"""Velocity dx/dt of the flow in process time, eq. (2).

        The paper's F of eq. (5) is its negative: the paper counts the diffusion time
        already undone.

        Args:
            x: States [N, *shape].
            t: Process time > 0.

        Returns:
            dx/dt [N, *shape], in the dtype of ``x``.
        """
        return self.velocity_from(self.denoise(x, t), x, t)

    def velocity_from(self, denoised: Tensor, x: Tensor, t: TimeLike) -> Tensor:
        """The velocity at (x, t) where D(x, t) [N, *shape] is known already."""
        s = exact_time(t, x)
        p = self.process
        ratio = p.sigma_dot(s) / p.sigma(s)
        wide = at_least_single(x.dtype)
        on_x = _scale(ratio, x)
        on_d = _scale(p.alpha_dot(s) - p.alpha(s) * ratio, x)
        return (on_x * x.to(wide) + on_d * denoised.to(wide)).to(x.dtype)

    @full_precision()
    def acceleration(self, x: Tensor, t: TimeLike) -> Tensor:
        r"""Acceleration :math:`Q = d^2x/dt^2` along the path through (x, t), eq. (8).

        Args:
            x: States [N, *shape].
            t: Process time > 0.

        Returns:
            Q [N, *shape], in the dtype of ``x``; no graph is kept.

        Raises:
            RuntimeError: With ``acceleration="jvp"``, if the network rejects forward
                mode or silently drops it.
        """
        _check_states(x)
        # A JVP under inference mode is silently zero; clones made outside it are
        # ordinary tensors again.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            self.watched(x, t),
        ):
            x = x.clone() if x.is_inference() else x.detach()
            s = exact_time(t, x)
            s = s.clone() if s.is_inference() else s.detach()
            denoised = self.denoise(x, s)
            velocity = self.velocity_from(denoised, x, s)
            rate = self._derivative.rate(self.denoise, x, s, velocity)
            return self.acceleration_from(x, s, denoised, rate)

    def acceleration_from(
        self, x: Tensor, t: TimeLike, denoised: Tensor, rate: Tensor
    ) -> Tensor:
        r"""Q from D and its total derivative (the formula of the module's head).

        Args:
            x: States [N, *shape].
            t: Process time > 0.
            denoised: D(x, t) [N, *shape].
            rate: :math:`\dot D` [N, *shape].
        """
        s = exact_time(t, x)
        p = self.process
        alpha, sigma = p.alpha(s), p.sigma(s)
        on_noise = _scale(p.sigma_ddot(s) / sigma, x)
        on_d = _scale(p.alpha_ddot(s), x)
        on_rate = _scale(p.alpha_dot(s) - alpha * p.sigma_dot(s) / sigma, x)
        wide = at_least_single(x.dtype)
        y, clean = x.to(wide), denoised.to(wide)
        noise = y - _scale(alpha, x) * clean
        q = on_d * clean + on_noise * noise + on_rate * rate.to(wide)
        return q.to(x.dtype)

    def stiffness(self, x: Tensor, t: TimeLike) -> Tensor:
        """Norm |Q| per sample, [N], in float32 at least; see `acceleration`."""
        wide = _check_states(x).to(at_least_single(x.dtype))
        return self.acceleration(wide, t).flatten(1).norm(dim=1)

    @full_precision()
    def trajectory(
        self,
        x_T: Tensor,
        times: Tensor | Sequence[float],
        *,
        method: str = "rk4",
        rtol: float = 1e-6,
    ) -> Trajectory:
        """Reference paths through ``x_T``, in float64, at descending times.

        Args:
            x_T: States at ``times[0]``, [N, *shape].
            times: Descending process times [n] in (0, t_max].
            method: ``"heun"`` or ``"rk4"`` (Kutta's 3/8 rule), one step between
                neighbouring times, ``"multistep"``, of order 3 and one evaluation a
                time (see `artlib.flow.reference_path`), or ``"dopri5"``.
            rtol: Relative (and absolute) tolerance of dopri5.

        Returns:
            A `Trajectory`; no graph is kept.

        Raises:
            TypeError: If ``x_T`` is on a device without float64.
            ValueError: If the method is unknown, the times are out of their range, or
                a state becomes non-finite.
            RuntimeError: If dopri5 cannot reach its tolerance.
        """
        x_T = check_samples(x_T)
        with self.watched(x_T, ask=True):
            return integrate(self, x_T, times, method, rtol)

    @full_precision()
    def path_stiffness(self, path: Trajectory, *, forward: bool = True) -> Tensor:
        r"""|Q| at every node of reference paths, by the method in force.

        With the difference, :math:`\dot D` is a five-point derivative of the denoised
        states in `log_level`: no evaluation beyond those of the path. Forward mode is
        checked at a few levels, on a few samples, past the counters of evaluations.

        Args:
            path: From `trajectory`, with at least five times.
            forward: Whether forward mode may be used, or the difference is enough
                unless ``acceleration="jvp"`` asks for it.

        Returns:
            |Q| [N, n], float64.
        """
        q = self.path_acceleration(path, forward=forward)
        return q.flatten(2).norm(dim=2).T.contiguous()

    @full_precision()
    def path_acceleration(self, path: Trajectory, *, forward: bool = True) -> Tensor:
        """Q itself at every node of reference paths, [n, N, *shape]; as above.

        Args:
            path: From `trajectory`, with at least five times.
            forward: As in `path_stiffness`.
        """
        forward = forward or self._derivative.asked == "jvp"
        with torch.inference_mode(False), torch.no_grad():
            column = path.times.reshape(-1, *[1] * (path.states.ndim - 1))
            rate = self._forward_rates(path) if forward else None
            if rate is None or self._derivative.contradicted(*self._some(path)):
                rate = self._difference_rates(path)
            return self.acceleration_from(path.states, column, path.denoised, rate)

    def _some(
        self, path: Trajectory
    ) -> tuple[DenoiserFn, Iterator[tuple[Tensor, Tensor, Tensor]]]:
        """The denoiser of a few samples of a path, and these at a few of its times."""
        count = path.states.shape[1]
        flow = self if count <= _FEW else self.rows(slice(0, _FEW), count)
        flow = flow.with_denoiser(uncounted(flow.denoiser))
        times = path.times.cpu()
        nodes = range(0, len(times), max(1, len(times) // _LEVELS))
        points = (
            (path.states[k, :_FEW].clone(), times[k].clone(), path.velocities[k, :_FEW])
            for k in nodes
        )
        return flow.denoise, points

    def _difference_rates(self, path: Trajectory) -> Tensor:
        """Derivatives of D at all nodes from a stencil of five nodes."""
        times = path.times.cpu()
        weights = derivative_matrix(log_level(self.process, times))
        flat = path.denoised.reshape(len(times), -1)
        rate = (weights.to(flat) @ flat).reshape(path.denoised.shape)
        column = path.times.reshape(-1, *[1] * (path.denoised.ndim - 1))
        return rate * log_level_dot(self.process, column)

    def _forward_rates(self, path: Trajectory) -> Tensor | None:
        """JVPs at all nodes, or None where the difference is to be used."""
        rows = []
        times = path.times.cpu()
        for t, x, v in zip(times, path.states, path.velocities, strict=True):
            row = self._derivative.forward(
                self.denoise, x.clone(), t.clone(), v.clone()
            )
            if row is None:
                return None
            rows.append(row)
        return torch.stack(rows)

    def to_ve(self) -> ProbabilityFlow:
        r"""The same model in coordinates :math:`x/\alpha` and :math:`\sigma/\alpha`.

        There the process is `VE`, an Euler step is a DDIM step, and a grid is a list
        of the sigmas that diffusers, k-diffusion and EDM use for variance-preserving
        models too. States convert as ``x / process.alpha(t)``.

        Raises:
            ValueError: If the noise level at ``t_max`` is infinite (`RectifiedFlow`
                with t_max = 1).
        """
        low, high = (
            float(self.process.noise_level(t))
            for t in (self.process.t_min, self.process.t_max)
        )
        if not high < float("inf"):
            raise ValueError(
                f"to_ve: the noise level is infinite at t_max = {self.process.t_max}; "
                "use RectifiedFlow(t_max=0.999)"
            )
        flow = ProbabilityFlow(VE(sigma_min=low, sigma_max=high), _InVE(self))
        flow._doubts = self._doubts
        # The conversion is done in the dtype of the state, but a difference has to
        # step as far as the rounding of the network asks for.
        flow._derivative = self._derivative.for_range(high, self.dtype)
        return flow


def _check_states(x: Any) -> Tensor:
    """States to evaluate; they may be NaN, or carry a graph."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"x: expected a floating-point tensor [N, *shape], got {got(x)}"
        )
    return x


def check_flow(flow: Any) -> ProbabilityFlow:
    """Refuse what is no flow.

    Raises:
        TypeError: Saying how to make one.
    """
    if not isinstance(flow, ProbabilityFlow):
        raise TypeError(
            f"flow: expected a ProbabilityFlow, got {got(flow)}; wrap a denoiser as "
            "ProbabilityFlow(process, denoiser)"
        )
    return flow


class _InVE:
    """The denoiser of a flow in coordinates x / alpha, at the noise level."""

    def __init__(self, flow: ProbabilityFlow) -> None:
        self._flow = flow

    def __call__(self, y: Tensor, level: Tensor) -> Tensor:
        process = self._flow.process
        t = process.inverse_noise_level(exact_time(level, y))
        return self._flow.denoise(_scale(process.alpha(t), y) * y, t)

    def check_rows(self, count: int) -> None:
        check_rows(self._flow.denoiser, count)

    def rows(self, index: Rows) -> _InVE:
        part = rows_of(self._flow.denoiser, index)
        return _InVE(self._flow.with_denoiser(part))


def _scale(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient, computed in float64, to multiply ``x`` by, in float32 at least."""
    narrow = coefficient.to(at_least_single(x.dtype))
    return narrow if narrow.ndim == 0 else narrow.to(x.device)
