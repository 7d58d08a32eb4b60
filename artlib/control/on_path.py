r"""A multistep solver's local error from reference paths alone, at long steps.

A multistep solver sees the flow through D at its nodes and nothing else. On a reference
path D is a function of time that is tabulated already, and so is the noise :math:`(x -
\alpha D)/\sigma`: what a step leaves that starts on the path, with its history on the
path, follows from their interpolation, at any length of the step and **without an
evaluation**. What the network makes of states that leave the path within a step is of
higher order and left out.

The length matters. `artlib.error_table` measures at steps of a few per cent, where the
error is a derivative of D of order p. A trained network is rough in its time, and its
high derivatives are mostly that roughness. At the distance of a table's times, a third
of the noise level or so, the error is that of steps as they are taken.

So does the ratio of neighbouring steps. Equal steps in the log noise level decide the
leading term of all solvers here but iPNDM, whose constants are those of equal steps in
:math:`\sigma/\alpha`: a step h after one of h' leaves :math:`\tfrac12 h (h' - h)
\dot\epsilon` (order 2; a twelfth in place of the half for orders 3 and 4), which is of
no higher order than the rest, and set by how the grid itself bends. All this is ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..flow.flow import ProbabilityFlow
from ..flow.noise_coordinate import log_level, log_level_dot
from ..flow.reference_path import Trajectory
from ..solvers.position import Evaluated, nodes_of
from ..solvers.solver import Solver
from .solver_error import SolverErrors, rounding_of, step_and_halves

STENCIL = 7
"""Times of the polynomials through D and through the noise."""


def path_errors(flow: ProbabilityFlow, path: Trajectory, kind: Solver) -> SolverErrors:
    r""":math:`Q_p` of a multistep solver at the times of reference paths but the last.

    Args:
        flow: The flow; its network is not asked.
        path: Reference paths at `STENCIL` times or more, evenly spaced in the tabulated
            log noise level. A step is as long as the distance of two of them.
        kind: A solver with a history, which takes one evaluation a step.

    Returns:
        The errors at the starts of the steps.
    """
    process, times = flow.process, path.times.cpu()
    n, history, power = len(times), kind.history, kind.order + 1
    level = log_level(process, times)
    spacing = float(level[0] - level[-1]) / (n - 1)
    column = times.reshape(-1, *[1] * (path.states.ndim - 1)).to(path.states.device)
    noise = path.states - process.alpha(column) * path.denoised
    noise = noise / process.sigma(column)
    # Where there is no signal the log-SNR is infinite: the history begins below.
    top = float(level[0]) if float(process.alpha(times[0])) > 0 else float(level[1])
    vectors, lengths = [], []
    for k in range(n - 1):
        high = min(float(level[k]) + history * spacing, top)
        low = max(high - (history + 1) * spacing, float(level[-1]))
        wanted = torch.linspace(
            high, low, 2 * history + 3, dtype=torch.float64, device="cpu"
        )
        stations = _times_at(flow, times, level, wanted)
        first = min(max(k - STENCIL // 2, 0), n - STENCIL)
        rows = slice(first, first + STENCIL)
        weights = _lagrange(level[rows], wanted).to(noise)
        data, eps = (
            torch.tensordot(weights, values[rows], 1)
            for values in (path.denoised, noise)
        )
        nodes = nodes_of(process, stations.unbind())
        seen = [
            Evaluated(node, node.alpha * data[i] + node.sigma * eps[i], data[i])
            for i, node in enumerate(nodes[:-2])
        ]
        one, two = step_and_halves(flow, kind, nodes, seen, (data[-2], data[-1]))
        lengths.append(stations[-3] - stations[-1])
        vectors.append((one - two) / ((1 - 2.0**-kind.order) * lengths[-1] ** power))
    length = torch.stack(lengths)[:, None].to(noise.device)
    eps_of = torch.finfo(flow.dtype or torch.float64).eps
    scale = (1 - 2.0**-kind.order) * length**power
    return SolverErrors(
        times=times[:-1],
        vectors=torch.stack(vectors),
        resolution=rounding_of(flow, path, length, eps_of) / scale,
        order=kind.order,
    )


def _times_at(
    flow: ProbabilityFlow, times: Tensor, level: Tensor, wanted: Tensor
) -> Tensor:
    """Process times at values of the tabulated log noise level."""
    process = flow.process
    guess = np.interp(-wanted.numpy(), -level.numpy(), times.log().numpy())
    found = torch.from_numpy(guess).exp()
    for _ in range(4):  # Newton
        excess = log_level(process, found) - wanted
        found = found - excess / log_level_dot(process, found)
    return found.clamp(process.t_min, process.t_max)


def _lagrange(nodes: Tensor, at: Tensor) -> Tensor:
    """Weights [m, n] of the polynomial through values at nodes [n], at places [m]."""
    weights = torch.ones(len(at), len(nodes), dtype=torch.float64, device="cpu")
    for i, node in enumerate(nodes):
        for j, other in enumerate(nodes):
            if i != j:
                weights[:, i] *= (at - other) / (node - other)
    return weights
