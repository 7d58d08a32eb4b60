r"""The local error of any solver, measured on reference paths by step doubling.

A step of order p from t to t - h leaves :math:`h^{p+1} Q_p` behind, and two half steps
leave :math:`2 (h/2)^{p+1} Q_p`, so their difference gives

.. math::
    Q_p = \frac{x_{one} - x_{two}}{(1 - 2^{-p})\, h^{p+1}} + O(h) .

For Euler that is half the acceleration, :math:`Q_1 = Q/2`; for other solvers it is the
next derivative of the path only up to their own elementary differentials, which is why
it is measured. The value belongs to the middle of the step: then the O(h) term is small
for steps of a few per cent of the noise level, which networks in float32 resolve. What
is below the rounding of the network is not taken for an error: such values are replaced
by the nearest that is resolved.

A multistep solver also uses the steps before. Its history is taken from the reference
path itself, at equal steps in log-SNR: there the ratio of steps goes on any smooth
schedule as K grows. What a solver corrects at its next evaluation is measured after
that. All of this is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .._common.checks import got, positive_int, require_finite
from .._common.interpolation import pchip
from .._common.precision import full_precision
from ..flow.flow import ProbabilityFlow
from ..flow.noise_coordinate import log_level, log_level_dot
from ..flow.reference_path import Trajectory
from ..solvers.integrate import integrate
from ..solvers.position import Evaluated, Node, Position, nodes_of
from ..solvers.solver import Solver, SolverLike, Step, solver_of, take_step

LEAST_STEP = 0.02
LARGEST_STEP = 0.05
"""Bounds on the length of the measured step in log noise level; the upper one counts
per order, for errors of high order vanish in the rounding of short steps."""


@dataclass(frozen=True)
class SolverErrors:
    """What a solver leaves per step along reference paths.

    Attributes:
        times: Middles of the measured steps [n], descending process times, float64.
        vectors: :math:`Q_p` there [n, N, *shape], float64.
        resolution: The :math:`|Q_p|` that rounding alone would show [n, N].
        order: p.
    """

    times: Tensor
    vectors: Tensor
    resolution: Tensor
    order: int

    def norms(self) -> Tensor:
        """:math:`|Q_p|` [N, n], what is not resolved replaced by its neighbour."""
        norms = self.vectors.flatten(2).norm(dim=2).T
        resolved = (norms > self.resolution.T).cpu().numpy()
        index = np.arange(norms.shape[1])
        rows = []
        for row, seen in zip(norms.cpu(), resolved, strict=True):
            if not seen.any():
                rows.append(torch.zeros_like(row))
                continue
            places = np.flatnonzero(seen)
            near = np.clip(np.searchsorted(places, index), 0, len(places) - 1)
            left = np.maximum(near - 1, 0)
            closer = np.where(
                np.abs(index - places[left]) <= np.abs(places[near] - index), left, near
            )
            rows.append(row[torch.from_numpy(places[closer])])
        return torch.stack(rows)


def step_of(solver: SolverLike, order: int | None) -> tuple[Step, int | None]:
    """A solver as a step, and its order, None where it has to be measured.

    Args:
        solver: A key of `SOLVERS` that takes a grid, or a `Step`.
        order: Of a `Step`; None to measure it.

    Raises:
        TypeError: If it is neither, or its signature does not take four arguments.
        ValueError: If the name is unknown, or ``order`` is not that of the name.
    """
    if order is not None:
        order = positive_int(order, "order")
    kind = solver_of(solver)
    if kind.step is not None:
        return kind.step, order
    if order not in (None, kind.order):
        raise ValueError(
            f"order: {kind.name} is of order {kind.order}, got {order}; leave it out "
            "for a solver with a name"
        )

    def step(flow: ProbabilityFlow, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return integrate(flow, x, torch.stack([t, s]), kind)

    return step, kind.order


@full_precision()
def measure(
    flow: ProbabilityFlow, path: Trajectory, solver: SolverLike, order: int | None
) -> SolverErrors:
    r""":math:`Q_p` of a solver along reference paths, from its local error.

    A step over a process time h leaves :math:`h^{p+1} Q_p` behind. For Euler that is
    eq. (7): :math:`Q_1 = Q/2`, and a step of the clock takes :math:`\theta` times as
    much process time.

    Args:
        flow: The flow.
        path: Reference paths at descending times; steps start at all times but the
            last, and end above it.
        solver: As in `step_of`.
        order: As in `step_of`.

    Returns:
        The errors, one time fewer than the path has.

    Raises:
        TypeError: As in `step_of`, or if a step returns no tensor.
        ValueError: As in `step_of`, or if a step returns another shape or a value that
            is not finite, or the order cannot be measured.
    """
    step, known = step_of(solver, order)
    kind = solver_of(solver)
    eps = torch.finfo(flow.dtype or torch.float64).eps
    with torch.no_grad():
        if known is None:
            known = _measured_order(flow, path, step)
        power = known + 1
        wanted = max(20 * eps ** (1 / (power + 1)), LEAST_STEP)
        wanted = min(wanted, LARGEST_STEP * known)
        middles, ones, twos, lengths = [], [], [], []
        for k in range(len(path.times) - 1):
            start = path.times[k]
            span = wanted * max(1, (kind.history + 1) / 2)
            size = min(span, _gap(flow, path.times[k : k + 2]))
            x = path.states[k]
            if kind.history:
                # Extrapolation errs as if D'' were taken about the start of the step.
                t, end, pair = _multistep_pair(flow, kind, x, start, size)
                mid = t
            else:
                t, mid, end = start, *below(flow, start, (size / 2, size))
                pair = _one_step_pair(flow, step, x, t, mid, end)
            middles.append(mid)
            lengths.append(t - end)
            ones.append(pair[0])
            twos.append(pair[1])
        one, two = torch.stack(ones), torch.stack(twos)
        column = torch.stack(lengths).reshape(-1, *[1] * (one.ndim - 1))
        scale = (1 - 2.0**-known) * column**power
        rounding = rounding_of(flow, path, column[:, 0].flatten(1), eps)
        return SolverErrors(
            times=torch.stack(middles),
            vectors=(one - two) / scale,
            resolution=rounding / scale.flatten(1)[:, :1],
            order=known,
        )


def rounding_of(
    flow: ProbabilityFlow, path: Trajectory, length: Tensor, eps: float
) -> Tensor:
    """Rounding of a step's result [n, N]: the state's own and the network's."""
    p, times = flow.process, path.times[:-1, None]
    on_d = p.alpha_dot(times) - p.alpha(times) * p.sigma_dot(times) / p.sigma(times)
    state, denoised = (
        y[:-1].flatten(2).norm(dim=2) for y in (path.states, path.denoised)
    )
    own = torch.finfo(torch.float64).eps
    return 8 * (own * state + eps * (length * on_d).abs() * denoised)


def at_times(
    flow: ProbabilityFlow, found: Tensor, values: Tensor, times: Tensor
) -> Tensor:
    """Positive values [N, n] at some times, carried to others [m] in log-log.

    Monotone cubics in the log noise level inside, straight lines beyond the ends.
    Values below 1e-24 of a row's peak are raised to that; a row of zeros stays.
    """
    table = values.cpu().numpy()
    peak = table.max(axis=1, keepdims=True)
    logs = np.log(np.maximum(table / np.where(peak > 0, peak, 1.0), 1e-24))[:, ::-1]
    level = log_level(flow.process, found.cpu()).numpy()[::-1]
    wanted = log_level(flow.process, times.cpu()).numpy()
    cubic = pchip(level, logs, axis=1)(np.clip(wanted, level[0], level[-1]))
    low, high = wanted < level[0], wanted > level[-1]
    slope_low, slope_high = (
        (logs[:, j] - logs[:, i]) / (level[j] - level[i]) for i, j in ((0, 1), (-2, -1))
    )
    cubic[:, low] += slope_low[:, None] * (wanted[low] - level[0])
    cubic[:, high] += slope_high[:, None] * (wanted[high] - level[-1])
    return torch.from_numpy(peak * np.exp(cubic))


def _gap(flow: ProbabilityFlow, pair: Tensor) -> float:
    level = log_level(flow.process, pair)
    return float(level[0] - level[1])


def below(
    flow: ProbabilityFlow, t: Tensor, distances: tuple[float, ...]
) -> tuple[Tensor, ...]:
    """Times that lie given distances in log noise level below t."""
    level = log_level(flow.process, t)
    found = []
    for distance in distances:
        s = t - distance / log_level_dot(flow.process, t)
        for _ in range(4):  # Newton; the level is smooth and the distance short
            excess = log_level(flow.process, s) - level + distance
            s = s - excess / log_level_dot(flow.process, s)
        found.append(s)
    return tuple(found)


def _one_step_pair(
    flow: ProbabilityFlow, step: Step, x: Tensor, t: Tensor, mid: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """The step from t to the end at once, and by way of its middle."""
    one, half = (_step(step, flow, x, t, s) for s in (end, mid))
    return one, _step(step, flow, half, mid, end)


def _multistep_pair(
    flow: ProbabilityFlow, kind: Solver, x: Tensor, start: Tensor, size: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The same for a multistep solver, its history being on the reference path.

    Stations at even distances in log-SNR, two to a step. With a history of H the step
    goes from station 2H to 2H + 2, with H earlier evaluations two stations apart; its
    halves have them one station apart.

    Returns:
        Start and end of the step, and its states there at once and by halves.
    """
    process, history = flow.process, kind.history
    low = below(flow, start, (size,))[0]
    ends = process.log_snr(torch.stack([start, low]))
    signal = bool(torch.isfinite(ends).all())
    if not signal:  # RectifiedFlow at t = 1: no signal yet
        start_snr = process.log_snr(below(flow, start, (size / 2,))[0])
        ends = torch.stack([2 * start_snr - ends[1], ends[1]])
    count = 2 * history + 3
    stations = [
        process.inverse_log_snr(torch.lerp(ends[0], ends[1], w)).to(start)
        for w in torch.linspace(0, 1, count, dtype=torch.float64, device="cpu")
    ]
    stations[-1] = low
    if signal:
        stations[0] = start
    else:
        x = integrate(flow, x, torch.stack([start, stations[0]]), "rk4")
    nodes, seen = nodes_of(process, stations), []
    for k, t in enumerate(stations[: count - 2]):
        if k:
            x = integrate(flow, x, torch.stack([stations[k - 1], t]), "rk4")
        seen.append(Evaluated(nodes[k], x, flow.denoise(x, t)))
    return stations[-3], stations[-1], step_and_halves(flow, kind, nodes, seen)


def step_and_halves(
    flow: ProbabilityFlow,
    kind: Solver,
    nodes: list[Node],
    seen: list[Evaluated],
    known: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """A multistep solver's step over the last two of some stations, and its halves.

    Args:
        flow: The flow.
        kind: The solver; H is its history.
        nodes: 2 H + 3 stations, the step's start being the last but two.
        seen: What is known on the path at all but the last two, in that order.
        known: D at the last two, for halves and corrections; by default the network is
            asked where the steps lead.

    Returns:
        The states at the last station, by one step and by two.
    """
    history = kind.history
    past_of = seen[::-1]  # the newest first: the start of the step
    asked = dict(zip(map(id, nodes[-2:]), known, strict=False))

    def at(state: Tensor, now: Node, then: Node, made: list[Evaluated]) -> Position:
        position = Position(flow, state, now, then, past=tuple(made[:history]))
        if id(now) in asked:
            position.denoised = asked[id(now)]
        return position

    def run(walk: list[Node], past: list[Evaluated]) -> Tensor:
        here, made = past[0], past[1:]
        state, drift = here.x, torch.zeros_like(here.x)
        for k, (now, then) in enumerate(pairwise(walk)):
            position = at(state, now, then, made)
            if not k:  # known already
                position.denoised = here.denoised
            after = _advance(kind, position)
            if not k:  # a correction at the start is the error of the step before
                drift = position.x - here.x
            made = [position.remembered(), *made]
            state = after
        if kind.corrects:
            (beyond,) = nodes_of(flow.process, [walk[-1].t * 0.9])
            last = at(state, walk[-1], beyond, made)
            _advance(kind, last)
            state = last.x
        return state - drift

    one = run([nodes[-3], nodes[-1]], [past_of[0], *past_of[2::2]])
    two = run(nodes[-3:], past_of[: history + 1])
    return one, two


def _advance(kind: Solver, position: Position) -> Tensor:
    assert kind.advance is not None
    y = kind.advance(position)
    if not isinstance(y, Tensor) or y.shape != position.x.shape:
        raise ValueError(
            f"solver: a step of {kind.name} has to return states of the shape "
            f"{tuple(position.x.shape)} of its own, got {got(y)}"
        )
    require_finite(y, "solver", "its step has to be finite between t_max and t_min")
    return y


def _step(step: Step, flow: ProbabilityFlow, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    y = take_step(step, flow, x, t, s)
    require_finite(y, "solver", "its step has to be finite between t_max and t_min")
    return y


def _measured_order(flow: ProbabilityFlow, path: Trajectory, step: Step) -> int:
    """Order of a step, from what two lengths of it leave."""
    found = []
    for wanted in (2 * LARGEST_STEP, LARGEST_STEP):
        differences = []
        for k in range(len(path.times) - 1):
            size = min(wanted, _gap(flow, path.times[k : k + 2]))
            t = path.times[k]
            mid, end = below(flow, t, (size / 2, size))
            one, two = _one_step_pair(flow, step, path.states[k], t, mid, end)
            differences.append(float((one - two).norm()))
        found.append(max(differences))
    slope = math.log2(found[0] / found[1]) - 1 if min(found) > 0 else math.nan
    if not (math.isfinite(slope) and slope > 0.5 and abs(slope - round(slope)) < 0.3):
        raise ValueError(
            f"order: the steps of this solver fall off with order {slope:.2f}, which "
            "is no whole number >= 1 (is it exact here, or does it round?); pass order"
        )
    return round(slope)
