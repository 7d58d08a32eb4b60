r"""Multistep solvers: one evaluation a step, the earlier ones used again.

With :math:`\lambda = \log(\alpha/\sigma)`, half the log-SNR, the ODE is linear in x
and driven by D alone. A step from s to t, :math:`h = \lambda_t - \lambda_s`, is

.. math::
    x_t = \frac{\sigma_t}{\sigma_s} x_s - \alpha_t (e^{-h} - 1) \bar D
        = \frac{\sigma_t}{\sigma_s} x_s
        + \Bigl(\alpha_t - \alpha_s \frac{\sigma_t}{\sigma_s}\Bigr) \bar D ,

and the methods differ in :math:`\bar D`. With :math:`\bar D = D_s` it is DDIM's. The
second form holds where :math:`\alpha_s = 0` or :math:`\sigma_t = 0` too.

| name | :math:`\bar D` | order |
| --- | --- | --- |
| ``dpmpp_2m`` | a straight line in lambda through two, at the middle of the step | 2 |
| ``dpmpp_3m`` | a parabola through three, as published (see `dpmpp_3m`) | 2 |
| ``unipc``, ``unipc3`` | by order conditions; each value corrects its state | 3, 4 |
| ``ipndm`` and ``2``, ``3`` | Adams-Bashforth of order 4, 2, 3 on the noise | 2 |

Started where there is no signal at all (`RectifiedFlow` at t = 1) lambda is infinite
there: the first step is of first order, and the error of the second-order methods is
:math:`K^{-2} \log K`, because the first steps stay long in lambda.

All are differentiable in the states, in the network and in the nodes.

References:
    Lu et al., DPM-Solver++, https://arxiv.org/abs/2211.01095, algorithm 2 and its
    third-order form; Zhao et al., UniPC, https://arxiv.org/abs/2302.04867, with the
    second choice of B(h); Zhang and Chen, https://arxiv.org/abs/2204.13902 (iPNDM).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .position import Node, Position


def ddim(position: Position) -> Tensor:
    """The step with D frozen: first order, and the only one that can end at 0."""
    return _frozen(position, position.denoised)


def _frozen(position: Position, drive: Tensor) -> Tensor:
    """The step with a given D in place of that at its start."""
    shrink, gain = _factors(position.node, position.next)
    return shrink * position.x + gain * drive


def _factors(now: Node, after: Node) -> tuple[Tensor, Tensor]:
    shrink = after.sigma / now.sigma
    return shrink, after.alpha - now.alpha * shrink


def _usable(position: Position, order: int) -> int:
    """The order that the history and the start of the step allow."""
    if position.node.alpha.item() == 0:
        return 1
    return min(order, len(position.past) + 1)


def dpmpp_2m(position: Position) -> Tensor:
    """DPM-Solver++(2M)."""
    if _usable(position, 2) == 1:
        return ddim(position)
    past, now = position.past[0], position.node.log_ratio
    ratio = (position.next.log_ratio - now) / (2 * (now - past.node.log_ratio))
    denoised = position.denoised
    return _frozen(position, denoised + ratio * (denoised - past.denoised))


def dpmpp_3m(position: Position) -> Tensor:
    """DPM-Solver++(3M) as it is published and run: a parabola through three values.

    Its weight of the second difference, :math:`(e^{-h} - 1 + h)/h^2 - 1/2`, is half of
    what the integral of that parabola asks for, so that the order is 2 and not 3. With
    twice the weight the slope is 3 (measured in the tests); here it stays what the
    samplers in use compute.
    """
    order = _usable(position, 3)
    if position.ends_at_zero and position.left == 2 and position.steps < 15:
        order = min(order, 2)  # as published: few steps end with lower orders
    if order < 3:
        return dpmpp_2m(position)
    one, two = position.past[:2]
    now, denoised = position.node.log_ratio, position.denoised
    h = position.next.log_ratio - now
    r0 = (now - one.node.log_ratio) / h
    r1 = (one.node.log_ratio - two.node.log_ratio) / h
    first = (denoised - one.denoised) / r0
    second = (one.denoised - two.denoised) / r1
    slope = first + r0 / (r0 + r1) * (first - second)
    bend = (first - second) / (r0 + r1)
    alpha = position.next.alpha
    phi_1 = torch.expm1(-h)
    phi_2 = phi_1 / h + 1
    phi_3 = phi_2 / h - 0.5
    return ddim(position) + alpha * (phi_2 * slope - phi_3 * bend)


def unipc(order: int) -> Callable[[Position], Tensor]:
    """UniPC of an order: a predictor, and a corrector at the next evaluation."""

    def advance(position: Position) -> Tensor:
        past = position.past
        if past:
            # The order at which the step that led here was predicted.
            made = min(order, len(past), _left(position, order, position.left + 1))
            position.x = _corrected(position, made)
        now = min(_usable(position, order), _left(position, order, position.left))
        return _predicted(position, now)

    return advance


def _left(position: Position, order: int, left: int) -> int:
    """Few steps from 0 the order falls, so that the last one is of first order."""
    return min(order, left) if position.ends_at_zero else order


def _weights(rows: Tensor, h: Tensor, count: int) -> Tensor:
    """Solve the order conditions of UniPC: rows r_1 ... r_m, the first ``count``."""
    power, factorial = torch.expm1(-h) / -h - 1, 1
    sides = []
    for i in range(1, count + 1):
        sides.append(power * factorial / torch.expm1(-h))
        factorial *= i + 1
        power = power / -h - 1 / factorial
    matrix = torch.stack([rows[:count] ** i for i in range(count)])
    return torch.linalg.solve(matrix, torch.stack(sides))


def _predicted(position: Position, order: int) -> Tensor:
    """UniP: the step from t to s by the values behind it."""
    past, denoised = position.past[: order - 1], position.denoised
    if not past:
        return ddim(position)
    now = position.node.log_ratio
    h = position.next.log_ratio - now
    ratios = [(old.node.log_ratio - now) / h for old in past]
    slopes = [
        (old.denoised - denoised) / r for old, r in zip(past, ratios, strict=True)
    ]
    if order == 2:  # as published, in place of the solution of one condition
        weights = [h.new_tensor(0.5)]
    else:
        weights = list(_weights(torch.stack(ratios), h, order - 1))
    change = sum(w * slope for w, slope in zip(weights, slopes, strict=True))
    scale = position.next.alpha * torch.expm1(-h)
    return ddim(position) - scale * change


def _corrected(position: Position, order: int) -> Tensor:
    """UniC: the states at t, with the value that was found there."""
    start, *older = position.past[:order]
    now = start.node.log_ratio
    h = position.node.log_ratio - now
    ratios = [(old.node.log_ratio - now) / h for old in older] + [torch.ones_like(h)]
    found = [*(old.denoised for old in older), position.denoised]
    slopes = [
        (value - start.denoised) / r for value, r in zip(found, ratios, strict=True)
    ]
    if order == 1:
        weights = [h.new_tensor(0.5)]
    else:
        weights = list(_weights(torch.stack(ratios), h, order))
    change = sum(w * slope for w, slope in zip(weights, slopes, strict=True))
    shrink, gain = _factors(start.node, position.node)
    scale = position.node.alpha * torch.expm1(-h)
    return shrink * start.x + gain * start.denoised - scale * change


_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def ipndm(order: int) -> Callable[[Position], Tensor]:
    r"""iPNDM: the noise :math:`(x - \alpha D)/\sigma` by Adams and Bashforth.

    The constants are those of equal steps in :math:`\sigma/\alpha`, on any grid. So the
    order is that of the grid's smoothness: 2, and ``order`` where steps are equal.
    """

    def advance(position: Position) -> Tensor:
        usable = _usable(position, order)
        if usable == 1:
            return ddim(position)
        now, after = position.node, position.next
        noise = [
            (seen.x - seen.node.alpha * seen.denoised) / seen.node.sigma
            for seen in (position.remembered(), *position.past[: usable - 1])
        ]
        constants = _ADAMS_BASHFORTH[usable]
        mean = sum(c * eps for c, eps in zip(constants, noise, strict=True))
        share = after.alpha / now.alpha
        return share * position.x + (after.sigma - now.sigma * share) * mean

    return advance
