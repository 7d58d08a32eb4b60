r"""A bound on the error of a third-order multistep solver, and the list that is least.

After Xue et al. ("Accelerating Diffusion Sampling with Optimized Time Steps", DMN). In
:math:`\lambda = \log(\alpha/\sigma)` a solver of data prediction adds up
:math:`\int e^\lambda D\, d\lambda` with D replaced by the polynomial through the last
values, so that what each value j weighs is known before any network is asked:

.. math::
    J_{sj} = \int_{\lambda_s}^{\lambda_{s+1}} e^\lambda \ell_{sj}(\lambda)\, d\lambda

with :math:`\ell_{sj}` Lagrange's polynomials of step s, of degree 0 at the first and
the last step, 1 at the second and the last but one, 2 elsewhere. With an error
:math:`\varepsilon_j = \tilde\sigma_j^p / \tilde\alpha_j` of each value
(:math:`\tilde\alpha, \tilde\sigma` are the :math:`\alpha, \sigma` of the
variance-preserving process at that :math:`\lambda`) the bound is

.. math::
    F = \sum_{s \in S} \Bigl( \sum_j (J_{sj} \varepsilon_j)^2 \Bigr)^{1/2}
      + \sum_j \Bigl| \sum_{s \notin S} J_{sj} \Bigr| \varepsilon_j ,

S the first step, the last one, and of the rest those among the first three where there
are at most seven steps. It asks nothing of the model: one list a process.

A **reconstruction** of ours, run beside the code that LD3's authors run (VE, p = 1):
F is the same number to 12 digits, and so is the least one at 3 and 5 steps. From eight
steps on, where nothing but the ends is counted apart, the sum within the absolute
values may cancel: F has deeper minima at lists of no use (4.5 at eight steps, with a
first step of 80 to 61 and a second one to .14, where the published search ends at 27.5
and the one here, which differs from it in round-off alone, at 17.1). What makes a good
list is then the start and the search, so that they are the published ones: even steps
in log-SNR, a trust region with its default limits.

References:
    Xue et al., https://arxiv.org/abs/2402.17376.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._common.checks import as_grid, got, positive_int
from ..flow.processes import Process, check_process
from ..schedules.constructors import Schedule, from_grid, log_snr

__all__ = ["multistep_bound", "multistep_optimal"]

_FEW = 7
"""Steps up to which the first `_APART` of them are counted apart."""
_APART = 3


def multistep_bound(
    process: Process, grid: Tensor | Sequence[float], *, power: int = 1
) -> float:
    r"""The bound F of the module for a list of timesteps.

    Args:
        process: The noising process.
        grid: Timesteps [K + 1] descending to 0. The bound has no end there, so that the
            last step is counted down to t_min. Where there is no signal at its start,
            that is t_max - t_min.
        power: p, 1 for models of pixels, 2 for latent ones, as published.

    Returns:
        F > 0.

    Raises:
        ValueError: If the list is no grid, comes below t_min before its end, or the
            power is neither 1 nor 2.
    """
    check_process(process)
    nodes = as_grid(grid)
    if float(nodes[-2]) <= process.t_min:
        raise ValueError(
            f"grid: its last but one node is {float(nodes[-2]):.6g}, expected one "
            f"above t_min = {process.t_min:.6g}, where the bound ends; unpinned "
            "grids are so"
        )
    places = torch.cat([nodes[:-1], nodes.new_tensor([process.t_min])])
    if float(process.alpha(places[0])) == 0:
        places[0] -= process.t_min
    return _bound((process.log_snr(places) / 2).numpy(), _power(power))


def multistep_optimal(process: Process, K: int, *, power: int = 1) -> Schedule:
    """The K steps of a small bound; the last node is replaced by 0.

    A minimum near even steps in log-SNR, found in seconds; see the module.

    Args:
        process: The noising process.
        K: Number of steps.
        power: See `multistep_bound`.

    Returns:
        A `Schedule` whose ``grid(K)`` is the list.

    Raises:
        ValueError: If an argument is out of its range.
    """
    check_process(process)
    K, power = positive_int(K, "K"), _power(power)
    schedule = log_snr(process, pinned=False)
    clock = torch.linspace(
        0, schedule.horizon, K + 1, dtype=torch.float64, device="cpu"
    )
    start = schedule.time(clock)
    if float(process.alpha(start[0])) == 0:
        start[0] = process.t_max - process.t_min
    levels = (process.log_snr(start) / 2).numpy()
    if K > 1:
        levels = _minimised(levels, power)
    inner = process.inverse_log_snr(2 * torch.from_numpy(levels[1:-1]))
    nodes = torch.cat([inner.new_tensor([process.t_max]), inner, inner.new_zeros(1)])
    notes = {"method": "multistep bound", "bound": _bound(levels, power)}
    notes["power"] = power
    return from_grid(process, nodes, name="DMN", provenance=notes)


def _power(power: int) -> int:
    if isinstance(power, bool) or power not in (1, 2):
        raise ValueError(f"power: expected 1 or 2, got {got(power)}")
    return power


def _bound(levels: np.ndarray, power: int) -> float:
    """F for lambda at K + 1 nodes."""
    K = len(levels) - 1
    # sigma^p / alpha of a process with alpha^2 + sigma^2 = 1
    error = (1 + np.exp(2 * levels)) ** (-power / 2) * np.sqrt(1 + np.exp(-2 * levels))
    apart, together = 0.0, np.zeros(K)
    for s in range(K):
        degree = 0 if s in (0, K - 1) else 1 if s in (1, K - 2) else 2
        used = slice(s - degree, s + 1)
        terms = _weights(levels[used] - levels[s], levels[s + 1] - levels[s])
        terms = np.exp(levels[s]) * terms * error[used]
        if degree == 0 or (K <= _FEW and s < _APART):
            apart += math.sqrt(terms @ terms)
        else:
            together[used] += terms
    return float(apart + np.abs(together).sum())


def _weights(places: np.ndarray, h: float) -> np.ndarray:
    """Integrals over [0, h] of e^u times Lagrange's polynomials through places."""
    moments = [math.expm1(h)]  # of u^m
    for m in range(1, len(places)):
        moments.append(h**m * math.exp(h) - m * moments[-1])
    if len(places) == 1:
        return np.array(moments)
    if len(places) == 2:
        p, q = places
        first = (moments[1] - q * moments[0]) / (p - q)
        return np.array([first, moments[0] - first])
    found = []
    for j in range(3):
        p, q = np.delete(places, j)
        whole = moments[2] - (p + q) * moments[1] + p * q * moments[0]
        found.append(whole / ((places[j] - p) * (places[j] - q)))
    return np.array(found)


def _minimised(start: np.ndarray, power: int) -> np.ndarray:
    """A minimum near a start, the inner nodes in order between the ends."""
    from scipy.optimize import LinearConstraint, minimize

    K = len(start) - 1
    differences = np.eye(K, K - 1) - np.eye(K, K - 1, -1)
    low = np.zeros(K)
    low[0], low[-1] = start[0], -start[-1]
    # Rows: inner nodes less those before them, up to the sign; all lengths >= 0.
    in_order = LinearConstraint(differences, low, np.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a quasi-Newton update of nothing
        done = minimize(
            lambda inner: _bound(np.concatenate([start[:1], inner, start[-1:]]), power),
            start[1:-1],
            method="trust-constr",
            constraints=[in_order],
        )
    return np.concatenate([start[:1], done.x, start[-1:]])
