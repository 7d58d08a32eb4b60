r"""The theorems of ART-RL, on a flow that can be solved.

Gaussian data of unit width in VE: with :math:`s^2 = \sigma^2 + 1` the path through x at
noise level sigma is :math:`x\,s'/s`, its stiffness :math:`|x|/s^4`, and its length to
go :math:`G = (|x|/s)^{1/2} \int s^{-3/2} d\sigma`. The policies are
:math:`N(\mu_p, \lambda/|Q|)` with the mean :math:`\mu_p = p\,G/((T-t)|Q|^{1/2})`, which
arrives for p > 1/2, is optimal for p = 1, and has the value

.. math:: V_p = -a_p \frac{G^2}{T-t}, \qquad a_p = \frac{p^2}{2p-1} .

What holds for every flow is checked by SymPy, on x' = a x, where G is elementary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sympy as sp
import torch
from numpy.typing import NDArray
from scipy import integrate
from torch import Tensor

from artlib.control.closed_form import StiffnessTable, stiffness_table
from artlib.flow.flow import ProbabilityFlow
from artlib.flow.processes import VE
from artlib.flow.targets import Gaussian
from artlib.rl.actor_critic import ActorCritic
from artlib.rl.episodes import Episodes
from artlib.rl.policy import critic_value
from artlib.rl.updates import Learner

F64 = torch.float64
Array = NDArray[np.float64]

PROCESS = VE(sigma_min=0.01, sigma_max=10.0)
T = PROCESS.t_max - PROCESS.t_min
NODE = np.linspace(np.arcsinh(-5.0), np.arcsinh(60.0), 40_001)
WALKED = integrate.cumulative_trapezoid(np.cosh(NODE) ** -0.5, NODE, initial=0)
WALKED -= np.interp(np.arcsinh(PROCESS.t_min), NODE, WALKED)


def width(level: Array) -> Array:
    return np.sqrt(level**2 + 1)


def stiffness(x: Array, level: Array) -> Array:
    """|Q| of states [n, 2] at noise levels [n]."""
    return np.linalg.norm(x, axis=-1) / width(level) ** 4


def to_go(x: Array, level: Array) -> Array:
    """G, negative for who has gone too far."""
    z = np.linalg.norm(x, axis=-1) / width(level)
    return np.sqrt(z) * np.interp(np.arcsinh(level), NODE, WALKED)


def move(x: Array, level: Array, to: Array) -> Array:
    return x * (width(to) / width(level))[:, None]


def price(p: float) -> float:
    """a_p."""
    return p**2 / (2 * p - 1)


def value(t: float | Array, x: Array, level: Array, p: float = 1.0) -> Array:
    return -price(p) * to_go(x, level) ** 2 / (T - t)


def mean(t: float, x: Array, level: Array, p: float = 1.0) -> Array:
    return p * to_go(x, level) / ((T - t) * np.sqrt(stiffness(x, level)))


def paths(n: int, seed: int = 0) -> tuple[Array, Array]:
    """States [n, 2] at t_max, with |z| between 0.5 and 2, and their noise levels."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, 2))
    z *= (rng.uniform(0.5, 2, n) / np.linalg.norm(z, axis=1))[:, None]
    level = np.full(n, PROCESS.t_max)
    return z * width(level)[:, None], level


def unit(x: Array, level: Array, t: float = 0.0) -> Array:
    """Temperature 1 in natural units, (G / (T - t))^2, of a start."""
    return (to_go(x, level) / (T - t)) ** 2


@dataclass
class Played:
    """Arrays over clock [K + 1] or [K] and episodes."""

    t: Array
    x: Array
    level: Array
    theta: Array
    noise: Array
    cost: Array
    temperature: Array

    def martingale(self, p: float, extra: Array | float = 0.0) -> Array:
        """Increments dV + r dt [K, n] of V_p, plus those of something else."""
        V = np.zeros_like(self.level)
        for k, t in enumerate(self.t[:-1]):
            V[k] = value(t, self.x[k], self.level[k], p)
        drawn = np.diff(self.t)[:, None] * self.temperature
        drawn[-1] = 0  # the last step is forced, draws nothing and is paid nothing
        return np.diff(V + extra, axis=0) - self.cost + drawn


def play(
    p: float,
    K: int,
    temperature: float,
    start: tuple[Array, Array],
    *,
    t: float = 0.0,
    seed: int = 0,
    noisy: bool = True,
) -> Played:
    """Episodes from clock t; the speed is held over a step, the last step arrives.

    The cost of a step is the exact one, theta times the integral of |Q| over it.
    """
    rng = np.random.default_rng(seed)
    x, level = start
    clock = np.linspace(t, T, K + 1)
    lam = temperature * unit(x, level, t)
    xs, levels, thetas, noises, costs = [x], [level], [], [], []
    for k in range(K):
        dt = clock[k + 1] - clock[k]
        noise = rng.standard_normal(len(level)) * (noisy and k < K - 1)
        theta = mean(clock[k], x, level, p)
        theta = theta + noise * np.sqrt(lam / stiffness(x, level))
        after = level - theta * dt
        if k == K - 1:
            after = np.full_like(level, PROCESS.t_min)
        theta = (level - after) / dt
        z = np.linalg.norm(x, axis=1) / width(level)
        costs.append(theta * z * (level / width(level) - after / width(after)))
        x, level = move(x, level, after), after
        xs.append(x)
        levels.append(level)
        thetas.append(theta)
        noises.append(noise)
    arrays = (np.stack(a) for a in (xs, levels, thetas, noises, costs))
    return Played(clock, *arrays, lam)


def z_score(moment: Array) -> float:
    return float(moment.mean() / (moment.std(ddof=1) / math.sqrt(moment.size)))


# The problem is the library's.


def test_stiffness_and_value_are_those_of_the_library() -> None:
    target = Gaussian(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    flow = ProbabilityFlow(PROCESS, target.denoiser(PROCESS))
    x, level = paths(8)
    there = np.full(8, 0.7)
    on_path = move(x, level, there)
    found = flow.stiffness(torch.from_numpy(on_path), torch.tensor(0.7, dtype=F64))
    np.testing.assert_allclose(found, stiffness(on_path, there), rtol=1e-6)
    for i in range(3):  # a table of one path is the problem from that path's start
        table = stiffness_table(flow, torch.from_numpy(x[i : i + 1]))
        for t in (0.0, 0.3 * T, 0.9 * T):
            ours = value(t, on_path, there)[i]
            assert float(table.value(t, 0.7)) == pytest.approx(ours, rel=2e-4)


# The closed form: what it needs, and what it does not.


def test_bound_holds_for_clocks_that_turn_back() -> None:
    """int |Q| theta^2 >= (int sqrt|Q|)^2 / T, whatever the sign of theta."""
    x, level = paths(1)
    t = np.linspace(0, T, 20_001)
    rng = np.random.default_rng(0)
    turned, bound = 0, -value(0.0, x, level)[0]
    for trial in range(20):
        modes = rng.standard_normal(6) * 0.3 / np.arange(1, 7) * bool(trial)
        ripple = sum(m * np.sin(np.pi * k * t / T) for k, m in enumerate(modes, 1))
        # In the length, where the optimum is the straight line from L to 0.
        length = to_go(x, level)[0] * (1 - t / T + ripple)
        speed = np.diff(length) / np.diff(t)
        turned += bool((speed > 0).any())
        cost = float((speed**2 * np.diff(t)).sum())
        assert cost > bound * (1 - 1e-9)
        assert trial or cost == pytest.approx(bound)  # the straight line attains it
    assert turned > 10


def test_cost_to_go_is_at_least_minus_v_from_anywhere() -> None:
    # Verification without derivatives: G^2 / (T - t) <= int_t^T |Q| theta^2.
    start = paths(16)
    for p in (0.7, 1.0, 1.6):
        played = play(p, 400, 0.0, start, noisy=False)
        left = played.cost[::-1].cumsum(0)[::-1]
        for k in (0, 100, 300, 399):
            V = value(played.t[k], played.x[k], played.level[k])
            assert (left[k] >= -V * (1 - 1e-6)).all(), (p, k)


def test_infimum_is_not_attained_where_q_vanishes() -> None:
    eps = sp.Symbol("epsilon", positive=True)
    # |Q| = 1 on half of [0, 1] and 0 on the rest; density max(sqrt|Q|, eps).
    total = sp.Rational(1, 2) + eps / 2
    cost = sp.Rational(1, 2) * total
    assert sp.limit(cost, eps, 0) == sp.Rational(1, 4)  # the bound
    assert sp.simplify(cost - sp.Rational(1, 4)).is_positive


# (12) to (15): the exploratory problem.


def test_draws_average_out_in_the_state() -> None:
    """(12): the state moves with the mean, up to a spread of order K^(-1/2)."""
    x, level = (np.repeat(a[:1], 800, axis=0) for a in paths(1))
    sizes, spreads = (25, 100, 400), []
    for K in sizes:
        played = play(1.5, K, 0.05, (x, level), seed=K)
        mean_path = play(1.5, K, 0.05, (x[:1], level[:1]), noisy=False)
        half = K // 2
        share = to_go(played.x[half], played.level[half]) / to_go(x, level)
        planned = to_go(mean_path.x[half], mean_path.level[half]) / to_go(x, level)[0]
        spreads.append(share.std())
        assert share.mean() == pytest.approx(float(planned[0]), abs=0.02)
        # x is where the flow takes it, however the clock went.
        exact = move(x, level, played.level[half])
        np.testing.assert_allclose(played.x[half], exact, rtol=1e-9)
    slope = np.polyfit(np.log(sizes), np.log(spreads), 1)[0]
    assert abs(slope + 0.5) < 0.1


@pytest.mark.parametrize("p", [0.8, 1.0, 1.5])
def test_noise_costs_lambda_per_unit_of_clock_at_any_mean(p: float) -> None:
    """(13): E int -|Q| theta^2 + lambda T is the reward of the mean alone."""
    start = paths(400)
    quiet = play(p, 2000, 0.0, start, noisy=False).cost.sum(0)
    played = play(p, 2000, 0.2, start, seed=1)
    paid = played.temperature * T
    excess = (played.cost.sum(0) - quiet - paid) / quiet
    error = excess.std() / 20
    assert abs(excess.mean()) < 4 * error + 0.01
    assert float((paid / quiet).mean()) > 0.1  # not for want of noise


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_exploratory_value_is_v_plus_lambda_t(share: float) -> None:
    """(14), (17): from any clock and place, on the optimal path or off it."""
    x, level = paths(300, seed=2)
    there = np.full(300, 1.7)
    start, t = (move(x, level, there), there), share * T
    played = play(1.0, 1500, 0.1, start, t=t, seed=3)
    reward = -played.cost.sum(0) + played.temperature * T  # lambda T in one sum
    claimed = value(t, *start) + played.temperature * t
    gap = (reward - claimed) / -value(t, *start)
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(300) + 0.004
    if share:
        wrong = reward - value(t, *start) - played.temperature * (T - t)
        assert abs(z_score(wrong)) > 8


def test_bellmans_principle_holds_to_second_order() -> None:
    """(15): sup over means of one step, by Gauss-Hermite quadrature over the draw."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights /= weights.sum()
    x, level = paths(6, seed=4)
    there = np.full(6, 2.0)
    x, t = move(x, level, there), 0.3 * T
    lam = 0.1 * unit(x, there, t)
    q, best = stiffness(x, there), mean(t, x, there)

    def lost(factor: float, step: float) -> Array:
        """V^lambda - E[V^lambda after a step] + its cost, per unit of clock."""
        after = np.zeros(6)
        for z, weight in zip(nodes, weights, strict=True):
            theta = factor * best + z * np.sqrt(lam / q)
            to = there - theta * step
            V = value(t + step, move(x, there, to), to) + lam * (t + step)
            after += weight * (V - q * theta**2 * step)
        return (value(t, x, there) + lam * t - after) / step

    small = [np.abs(lost(1.0, h)).max() for h in (1e-2 * T, 1e-3 * T)]
    assert small[1] < 0.15 * small[0]  # o(delta) / delta
    for factor in (0.5, 0.9, 1.1, 1.5):
        regret = q * best**2 * (factor - 1) ** 2
        np.testing.assert_allclose(lost(factor, 1e-4 * T), regret, rtol=0.05)


# (16) to (18) and Theorem 1, both directions.

t_, x_, psi_ = sp.symbols("t x psi", positive=True)
T_, a_, lam_ = sp.symbols("T a lambda", positive=True)
theta_, mu_ = sp.symbols("theta mu", real=True)
F_ = a_ * x_  # the linear flow x' = a x
Q_ = F_.diff(x_) * F_ + F_.diff(psi_)
G_ = 2 * sp.sqrt(x_) * (sp.exp(a_ * (T_ - psi_) / 2) - 1)
V_ = -(G_**2) / (T_ - t_)


def randomised(candidate: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """Residual of (16) on the linear flow, the integral and the supremum carried out.

    Returns:
        The residual, and the mean that attains the supremum.
    """
    density = sp.exp(-((theta_ - mu_) ** 2) * Q_ / (2 * lam_))
    density *= sp.sqrt(Q_ / (2 * sp.pi * lam_))
    slope = sp.Symbol("s", real=True)
    averaged = sp.integrate(
        sp.expand(theta_ * slope - Q_ * theta_**2) * density, (theta_, -sp.oo, sp.oo)
    )
    averaged = sp.simplify(averaged)
    (best,) = sp.solve(averaged.diff(mu_), mu_)
    along = {slope: candidate.diff(x_) * F_ + candidate.diff(psi_)}
    residual = candidate.diff(t_) + averaged.subs(mu_, best).subs(along)
    return sp.simplify(residual), best.subs(along)


def test_length_of_the_linear_flow() -> None:
    assert sp.simplify(Q_ - a_**2 * x_) == 0
    along = G_.diff(x_) * F_ + G_.diff(psi_)
    assert sp.simplify(along + sp.sqrt(Q_)) == 0
    assert G_.subs(psi_, T_) == 0


def test_v_plus_lambda_t_solves_the_randomised_equation() -> None:
    residual, best = randomised(V_ + lam_ * t_)
    assert residual == 0
    assert sp.simplify(best - G_ / ((T_ - t_) * sp.sqrt(Q_))) == 0  # (18)
    for wrong in (V_, V_ + lam_ * (T_ - t_), V_ + 2 * lam_ * t_):
        assert randomised(wrong)[0] != 0


def test_any_solution_of_the_randomised_equation_gives_the_deterministic_one() -> None:
    """The converse, for any flow, stiffness and solution in two coordinates."""
    x_1, x_2 = sp.symbols("x_1 x_2", real=True)
    F_1, F_2 = (sp.Function(name)(x_1, x_2, psi_) for name in ("F_1", "F_2"))
    q = sp.Function("q", positive=True)(x_1, x_2, psi_)
    solution = sp.Function("U")(t_, x_1, x_2, psi_)

    def slope(candidate: sp.Expr) -> sp.Expr:
        return (
            candidate.diff(x_1) * F_1 + candidate.diff(x_2) * F_2 + candidate.diff(psi_)
        )

    U_t = lam_ - slope(solution) ** 2 / (4 * q)  # (16)
    V = solution - lam_ * t_
    deterministic = V.diff(t_) + slope(V) ** 2 / (4 * q)
    assert sp.simplify(deterministic.subs(solution.diff(t_), U_t)) == 0
    # The maximiser is one: the bracket is strictly concave in the mean.
    bracket = mu_ * slope(solution) - q * mu_**2 - lam_
    assert bracket.diff(mu_, 2) == -2 * q
    (best,) = sp.solve(bracket.diff(mu_), mu_)
    assert sp.simplify(best - slope(V) / (2 * q)) == 0


# Theorem 2: policy evaluation.

Test = Callable[[Played], Array]
ADAPTED: dict[str, Test] = {
    "one": lambda e: np.ones_like(e.cost),
    "clock": lambda e: np.broadcast_to(e.t[:-1, None] / T, e.cost.shape),
    "place": lambda e: np.log(1 + e.level[:-1] ** 2),
    "state": lambda e: np.linalg.norm(e.x[:-1], axis=2),
    # Of the past, not of the present alone.
    "last draw": lambda e: np.concatenate([0 * e.noise[:1], e.noise[:-1]]),
}


def anywhere(n: int) -> tuple[tuple[Array, Array], float]:
    """Starts that the policy would not have come to, at a clock of 0.35 T."""
    x, level = paths(n, seed=5)
    there = np.random.default_rng(6).uniform(0.3, 6, n)
    return (move(x, level, there), there), 0.35 * T


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("p", [0.8, 1.0, 1.5])
def test_a_value_makes_a_martingale_from_every_start(p: float, name: str) -> None:
    """Theorems 2 and 3: the moments of V_p vanish, those of another value do not."""
    start, t = anywhere(400)
    played = play(p, 1200, 0.1, start, t=t, seed=7)
    scale = -value(t, *start)
    xi = ADAPTED[name](played)
    moment = (xi * played.martingale(p)).sum(0) / scale
    # The K-step value differs from the limit by the share lambda log K / K.
    bias = 0.003 * np.abs(xi).mean()
    assert abs(moment.mean()) < 4 * moment.std() / 20 + bias
    if name != "last draw":
        wrong = (xi * played.martingale(p + 0.4)).sum(0) / scale
        assert abs(wrong.mean()) > 4 * wrong.std() / 20 + 5 * bias


def test_a_test_function_must_not_see_the_draw() -> None:
    start, t = anywhere(400)
    played = play(1.5, 1200, 0.1, start, t=t, seed=7)
    assert abs(z_score((played.noise * played.martingale(1.5)).sum(0))) > 20


def ahead(played: Played, start: tuple[Array, Array], p: float) -> Array:
    """Length by which an episode from t = 0 is ahead of the mean clock."""
    planned = to_go(*start) * (1 - played.t[:, None] / T) ** p
    lengths = [to_go(*at) for at in zip(played.x, played.level, strict=True)]
    return planned - np.stack(lengths)


def test_one_curve_does_not_identify_a_value() -> None:
    """From t = 0, V + c (psi - psi_pi(t)) passes; its slope is wrong by c."""
    p, start = 1.5, paths(20)
    clock = np.linspace(0, T, 8001)
    # psi_pi from the closed form, G = L (1 - t/T)^p, not from an episode.
    left = np.interp(np.arcsinh(PROCESS.t_max), NODE, WALKED) * (1 - clock / T) ** p
    curve = PROCESS.t_max - np.sinh(np.interp(left, WALKED, NODE))
    c = 0.3 * to_go(*start) ** 2 / T**2

    def moments(played: Played) -> Array:
        """Of c (psi - psi_pi(t)), with four test functions, in units of c."""
        extra = c * (PROCESS.t_max - played.level - curve[:, None])
        change = played.martingale(p, extra) - played.martingale(p)
        tests = (1, clock[:-1] / T, np.sqrt(1 - clock[:-1] / T), np.cos(clock[:-1]))
        return np.stack([(np.ones(8000) * xi) @ change / c for xi in tests])

    on_curve = play(p, 8000, 0.0, start, noisy=False)
    assert np.abs(on_curve.martingale(p).sum(0) / value(0.0, *start)).max() < 2e-3
    assert np.abs(moments(on_curve)).max() < 5e-3
    # A start beside the curve: V itself still passes, the other does not.
    x, level = start
    beside = (move(x, level, level - 1), level - 1)
    other = play(p, 8000, 0.0, beside, noisy=False)
    assert np.abs(other.martingale(p).sum(0) / value(0.0, *beside)).max() < 2e-3
    assert np.abs(moments(other)[0]).min() > 0.9


def test_its_improved_mean_is_wrong_by_c_over_two_q() -> None:
    c, psi_of_t = sp.Symbol("c", real=True), sp.Function("psi_pi")(t_)
    p = sp.Rational(3, 2)
    V = sp.Rational(9, 8) * V_  # a_p at p = 3/2
    policy = p * G_ / ((T_ - t_) * sp.sqrt(Q_))

    def drift(candidate: sp.Expr) -> sp.Expr:
        along = candidate.diff(x_) * F_ + candidate.diff(psi_)
        return candidate.diff(t_) + policy * along - Q_ * policy**2

    def improved(candidate: sp.Expr) -> sp.Expr:
        return (candidate.diff(x_) * F_ + candidate.diff(psi_)) / (2 * Q_)

    assert sp.simplify(drift(V)) == 0
    other = V + c * (psi_ - psi_of_t)
    # Zero where psi = psi_pi(t), whose speed is the policy's there; not elsewhere.
    assert sp.simplify(drift(other) - c * (policy - psi_of_t.diff(t_))) == 0
    assert sp.simplify(improved(other) - improved(V) - c / (2 * Q_)) == 0


def test_noise_identifies_the_slope_at_order_lambda_over_k() -> None:
    """The moment that sees it, with the distance ahead as test: -kappa lambda / K."""
    x, level = paths(2000, seed=8)
    kappa, temperature = 0.5, 0.05
    L = to_go(x, level)
    for K in (200, 800):
        played = play(1.0, K, temperature, (x, level), seed=K)
        front = ahead(played, (x, level), 1.0)
        front[-1] = 0
        extra = kappa * 2 * L / T * front
        moment = (front[:-1] / L * played.martingale(1.0, extra)).sum(0) / (L**2 / T)
        base = (front[:-1] / L * played.martingale(1.0)).sum(0) / (L**2 / T)
        found = float((moment - base).mean()) * K / temperature
        assert found == pytest.approx(-kappa, abs=0.1), K


# Theorem 3: policy improvement.


@pytest.mark.parametrize("p", [0.7, 1.5, 3.0])
def test_improvement_gains_what_it_foretells(p: float) -> None:
    """mu' = V_psi / 2|Q| is the policy p' = a_p; the gain is int |Q| (mu' - mu)^2."""
    start, t = anywhere(12)
    x, level = start
    h = 1e-4
    slope = sum(
        sign * value(t, move(x, level, level - sign * h), level - sign * h, p)
        for sign in (1, -1)
    ) / (2 * h)
    improved = slope / (2 * stiffness(x, level))
    np.testing.assert_allclose(improved, mean(t, x, level, price(p)), rtol=1e-4)

    played = play(price(p), 6_000, 0.0, start, t=t, noisy=False)
    gain = np.zeros(12)
    for k, dt in enumerate(np.diff(played.t)[:-1]):
        at = (played.t[k], played.x[k], played.level[k])
        gap = mean(*at, price(p)) - mean(*at, p)
        gain += stiffness(*at[1:]) * gap**2 * dt
    exact = value(t, *start, price(p)) - value(t, *start, p)
    assert (exact > 0).all()
    np.testing.assert_allclose(gain, exact, rtol=3e-3)
    # And its own value is what its clock costs.
    cost = played.cost.sum(0)
    np.testing.assert_allclose(-cost, value(t, *start, price(p)), rtol=3e-3)


def test_standing_still_is_its_own_improvement() -> None:
    """Why the theorem asks for arrival: V = 0 solves everything and gets nowhere."""
    V, policy = sp.Integer(0), sp.Integer(0)
    drift = V.diff(t_) + policy * V.diff(psi_) - Q_ * policy**2
    assert drift == 0
    assert V.diff(psi_) / (2 * Q_) == policy
    assert V_.subs({t_: 0, psi_: 0}).subs({T_: 1, a_: 1, x_: 1}) < 0  # the optimum


def test_repeated_improvement_is_newtons_method() -> None:
    p, exact = sp.Symbol("p", positive=True), [sp.Rational(3)]
    assert sp.simplify((price(p) - 1) - (p - 1) ** 2 / (2 * p - 1)) == 0
    for _ in range(6):
        exact.append(price(exact[-1]))
    assert 0 < exact[-1] - 1 < sp.Rational(1, 10**8)


def test_every_policy_is_a_warp_and_arrives_if_its_integral_diverges() -> None:
    sigma, s = sp.symbols("sigma s", positive=True)
    A = sp.Function("A", positive=True)
    W = sp.exp(sp.Integral(1 / A(s), (s, 1, sigma)))
    assert sp.simplify(W / W.diff(sigma) - A(sigma)) == 0
    # A ~ k sigma at the end, sigma being what is left: W ~ sigma^(1/k), zero there.
    k = sp.Symbol("k", positive=True)
    W_linear = sp.exp(sp.integrate(1 / (k * s), (s, 1, sigma)))
    assert sp.limit(W_linear, sigma, 0) == 0
    # A that stays positive leaves W > 0: the clock of this policy does not arrive.
    assert sp.limit(sp.exp(sp.integrate(1 / (k + s), (s, 1, sigma))), sigma, 0) != 0


# (29a): the critic.


def test_critics_update_is_the_sum_of_gradients_times_increments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library's step, against forward-mode derivatives of V."""
    target = Gaussian(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    flow = ProbabilityFlow(PROCESS, target.denoiser(PROCESS))
    x_T = torch.from_numpy(paths(6)[0])
    trainer = ActorCritic(
        flow, x_T, steps=6, batch=6, warm_up=0, hidden=8, critic_updates=1,
        test_function="gradient", seed=0,
    )  # fmt: skip
    learner = trainer._loop.learner
    episodes: Episodes = trainer._loop.play(torch.arange(6))
    reward = torch.linspace(-1, 0.5, 36, dtype=F64).reshape(6, 6)
    objectives: list[Tensor] = []
    monkeypatch.setattr(
        Learner,
        "_ascend",
        lambda self, which, objective, *rest: objectives.append(objective),
    )
    learner.update_critic(episodes, reward, 0.0, 1)
    critic = learner.critic
    names = [name for name, _ in critic.named_parameters()]
    now = {name: p.detach().clone() for name, p in critic.named_parameters()}
    rng = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(p.shape, generator=rng) for name, p in now.items()}
    rho = episodes.rho[:-1]
    tau = (torch.arange(6, dtype=F64) / 6)[:, None].expand_as(rho)

    def V(parameters: dict[str, Tensor]) -> Tensor:
        output: Any = torch.func.functional_call(
            critic, parameters, (rho, tau, episodes.features)
        )
        return critic_value(output, rho, tau, "hard")

    values, slopes = torch.func.jvp(V, (now,), (direction,))
    delta = torch.cat([values[1:], torch.zeros_like(values[:1])]) - values + reward
    expected = float((slopes * delta).sum(0).mean())
    gradients = torch.autograd.grad(objectives[0], list(critic.parameters()))
    found = sum(
        float((g * direction[name]).sum())
        for name, g in zip(names, gradients, strict=True)
    )
    assert found == pytest.approx(expected, rel=1e-4)
    # What differentiating both ends of the squared increment would give instead.
    both = torch.cat([slopes[1:], torch.zeros_like(slopes[:1])]) - slopes
    assert abs(float((-both * delta).sum(0).mean()) / expected - 1) > 0.1


def test_its_root_is_right_where_least_squares_are_not() -> None:
    p, temperature = 2.0, 0.5
    start = paths(600, seed=9)
    played = play(p, 3000, temperature, start, seed=10)
    V = np.stack(
        [
            value(t, *at, p)
            for t, *at in zip(
                played.t[:-1], played.x[:-1], played.level[:-1], strict=True
            )
        ]
        + [np.zeros(600)]
    )
    gain = np.diff(V, axis=0)
    reward = played.martingale(p) - gain
    scale = value(0.0, *start, p) ** 2

    def fitted(xi: Array) -> float:
        above, below = ((xi * f / scale).sum() for f in (reward, gain))
        return float(-above / below)

    # In length: u = 2 G / (T - t) falls like 1 - t/T, and V's slope is (4/3) u.
    u2 = (2 * (1 - np.linspace(0, 1, 20_001))) ** 2
    lam = temperature
    predicted = np.mean(u2**2 + 2 * lam * (4 / 3) * u2)
    predicted /= np.mean(u2**2 + lam * (4 / 3) ** 2 * u2)
    assert fitted(V[:-1]) == pytest.approx(1, abs=0.01)
    assert fitted(gain) == pytest.approx(predicted, abs=0.015)
    assert predicted > 1.05


# (29b): the actor.


@pytest.mark.parametrize("p", [0.8, 1.0, 1.5])
def test_policy_gradient_is_the_derivative_of_the_value(p: float) -> None:
    start = paths(1500, seed=11)
    played = play(p, 600, 0.05, start, seed=12)
    delta = played.martingale(p)
    total = np.zeros(1500)
    for k, t in enumerate(played.t[:-2]):
        at = (played.x[k], played.level[k])
        score = played.noise[k] * np.sqrt(stiffness(*at) / played.temperature)
        total += score * mean(t, *at, p) / p * delta[k]  # d mu_p / dp = mu_p / p
    total /= -value(0.0, *start)
    exact = -2 * p * (p - 1) / (2 * p - 1) ** 2  # - d a_p / dp
    error = total.std() / math.sqrt(1500)
    assert abs(total.mean() - exact) < 4 * error + 0.02
    assert p == 1 or abs(total.mean()) > 8 * error


def test_a_critic_with_a_wrong_slope_misleads_the_actor_by_it() -> None:
    """(29b) reads V_psi off the critic, and turns where V + c ahead says."""
    x, level = paths(1500, seed=13)
    L, kappa = to_go(x, level), 0.5
    played = play(1.0, 600, 0.05, (x, level), seed=14)
    front = ahead(played, (x, level), 1.0)
    front[-1] = 0
    delta = played.martingale(1.0, kappa * 2 * L / T * front)
    total = np.zeros(1500)
    for k, t in enumerate(played.t[:-2]):
        at = (played.x[k], played.level[k])
        score = played.noise[k] * np.sqrt(stiffness(*at) / played.temperature)
        total += score * mean(t, *at) * delta[k]
    total /= L**2 / T
    # mu_p / p times the error of the bracket, 2 kappa L / T sqrt|Q|, over the clock.
    assert abs(total.mean() - 2 * kappa) < 4 * total.std() / math.sqrt(1500) + 0.03


def test_table_of_the_closed_form_is_the_first_of_these_policies() -> None:
    """The library's optimal schedule is p = 1 on a table of one path."""
    x, level = paths(1)
    times = np.geomspace(PROCESS.t_max, PROCESS.t_min, 400)
    times[0], times[-1] = PROCESS.t_max, PROCESS.t_min
    on_path = move(np.repeat(x, 400, 0), np.full(400, PROCESS.t_max), times)
    table = StiffnessTable(
        PROCESS,
        torch.from_numpy(times),
        torch.from_numpy(stiffness(on_path, times))[None],
    )
    played = play(1.0, 2000, 0.0, (x, level), noisy=False)
    readings = torch.from_numpy(played.t[100:1900:200])
    np.testing.assert_allclose(
        table.art().time(readings), played.level[100:1900:200, 0], rtol=5e-3
    )
