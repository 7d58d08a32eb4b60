r"""Episodes of the sampling clock: what the actor-critic learns from.

One episode is one trajectory walked from t_max to t_min in K steps of the clock, each
at constant speed :math:`\theta_k`. The path x(t) does not depend on how fast it is
walked, so it is integrated once, and all that an episode needs is looked up: the state,
|Q|, and :math:`H = \int |Q|\,d\psi`. A step from psi to psi' then has the *exact* cost

.. math:: \theta_k\,(H(\psi') - H(\psi)), \qquad \psi' = \psi + \theta_k T/K ,

and no network is called in training. `ModelEnvironment` walks the paths with the
network instead and charges the left-endpoint cost :math:`|Q_k|\theta_k^2 T/K`, as the
literal recipe has it.

**Natural units** (ours). Clock in units of T, cost in units of :math:`L^2/T` with
:math:`L = \int \sqrt{E|Q|}\,d\psi`, so that the optimum is 1; the position on the path
is :math:`\rho \in [1, 0]`, the share of the log noise level still to go.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..control.stiffness import FINE, StiffnessTable
from ..flow.denoisers import CountNFE
from ..flow.flow import ProbabilityFlow
from ..flow.noise_coordinate import log_level, log_level_dot

_LOOKUP = 513  # look-up points per path: |Q| is smooth at that spacing
_STRIDE = (FINE - 1) // (_LOOKUP - 1)
_COLUMNS = 4  # H, log |Q| floored, log |Q|, share of the length; then the features
_MAX_FEATURES = 32


@dataclass(frozen=True)
class Place:
    """Where every trajectory of a batch is: rows of the look-up table.

    Attributes:
        t: Process time [n].
        rho: Share of the log noise level still to go, 1 at t_max, 0 at t_min [n].
        integral: H, the integral of |Q| from t_max, in natural units [n].
        log_floored: log |Q| with its floor [n].
        stiffness: |Q| [n].
        walked: Share of the path's length, the integral of sqrt|Q|, behind it [n].
        features: What the networks see of the state [n, m], float32.
    """

    t: Tensor
    rho: Tensor
    integral: Tensor
    log_floored: Tensor
    stiffness: Tensor
    walked: Tensor
    features: Tensor


class TableEnvironment:
    """Look-ups along reference trajectories.

    Args:
        table: |Q| along the trajectories.
        states: Of the trajectories at the times of the table [n, N, *sample_shape].
        floor: Least |Q| of a path in its exploration noise, relative to the mean over
            the paths at the same time.
        seed: Of the fixed random projection that stands for states of more than 32
            dimensions.
        device: Where the look-ups live.

    Attributes:
        size: Number of trajectories.
        width: Number of features.
        length: L, the integral of sqrt(E|Q|).
        span: T = t_max - t_min.
        nfe: Network evaluations spent in episodes; 0 here.

    Raises:
        ValueError: If the paths are straight: every clock is then as good.
    """

    def __init__(
        self,
        table: StiffnessTable,
        states: Tensor,
        *,
        floor: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self.table, self.process, self.device = table, table.process, device
        self.span = table.span
        self.length = math.sqrt(table.lower_bound() * self.span)
        if not self.length > 0:
            raise ValueError(
                "stiffness: |Q| is 0 everywhere: the paths are straight, one step is "
                "exact, and there is nothing to learn"
            )
        self.nfe = 0
        self.size = table.values.shape[0]
        times = table.fine_times[::_STRIDE]
        level = log_level(self.process, times)
        self._top, self._bottom = float(level[0]), float(level[-1])
        self.levels = self._top - self._bottom
        self._log_times = times.log().to(device)
        # A vanishing |Q| on all paths still needs a logarithm.
        self._least = 1e-12 * float(table.fine_values[:, ::_STRIDE].max())
        floors = (floor * table.fine_mean[::_STRIDE]).clamp_min(self._least)
        self._log_floor = floors.log().to(device)
        floored = torch.maximum(table.fine_values[:, ::_STRIDE], floors).log()
        self._usual_log = floored.mean(0).to(device)
        self._project(states, seed)
        self._fill(table, states)

    def with_paths(
        self, table: StiffnessTable, states: Tensor, x_T: Tensor
    ) -> TableEnvironment:
        """The same environment on other trajectories of the same flow.

        Units, floor, whitening and projection stay those of the first ones: that is
        what the networks were trained with.

        Args:
            table: |Q| along the new trajectories, at the same times.
            states: Of the new trajectories at these times [n, N, *sample_shape].
            x_T: Their states at t_max [n, *sample_shape].
        """
        new = copy.copy(self)
        new.table, new.size = table, table.values.shape[0]
        new._fill(table, states)
        return new

    def _fill(self, table: StiffnessTable, states: Tensor) -> None:
        """Tabulate trajectories."""
        level = log_level(self.process, table.fine_times[::_STRIDE])
        values = table.fine_values[:, ::_STRIDE]
        integral = table.cumulative(table.fine_values)[:, ::_STRIDE]
        length = table.cumulative(table.fine_values.sqrt())[:, ::_STRIDE]
        columns = [
            integral * self.span / self.length**2,
            torch.maximum(values.clamp_min(self._least).log(), self._log_floor.cpu()),
            values.clamp_min(self._least).log(),
            # A path without acceleration is walked when the others would be: rho.
            torch.where(
                length[:, -1:] > 0,
                length / length[:, -1:].clamp_min(1e-300),
                (self._top - level) / self.levels,
            ),
        ]
        # Time by time: the states of all are many, and may lie elsewhere.
        white = [
            self._whiten(x.flatten(1).to(mean), mean, std)
            for x, mean, std in zip(states, self._mean, self._std, strict=True)
        ]
        place = (self._top - level) / self.levels * (len(table.times) - 1)
        features = _interpolate(torch.stack(white), place).permute(1, 0, 2)
        own = _relative_log(columns[1], self._usual_log.cpu())[..., None]
        rows = torch.cat([torch.stack(columns, dim=2), own, features.cpu()], dim=2)
        self.width = 1 + features.shape[2]
        self._rows = rows.reshape(-1, rows.shape[2]).to(self.device).contiguous()

    def _project(self, states: Tensor, seed: int) -> None:
        """Statistics of the states [n, N, d], per time: else noise drowns the data."""
        flat = [x.flatten(1) for x in states]
        mean = torch.stack([x.mean(0, keepdim=True) for x in flat])
        std = torch.stack([x.std(0, correction=0, keepdim=True) for x in flat])
        self._mean, self._std = mean.to(self.device), std.to(self.device) + 1e-12
        self._projection: Tensor | None = None
        if mean.shape[2] > _MAX_FEATURES:
            rng = torch.Generator().manual_seed(seed)
            size = (mean.shape[2], _MAX_FEATURES)
            random = torch.randn(size, generator=rng, dtype=torch.float64)
            self._projection = torch.linalg.qr(random)[0].to(self._mean)

    def _whiten(self, flat: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        white = (flat - mean) / std
        if self._projection is not None:
            white = white @ self._projection
        # Unit norm altogether: the position on the path must not drown in the state.
        return white / math.sqrt(white.shape[-1])

    def start(self, rows: Tensor) -> Place:
        """All of ``rows`` [n] at t_max."""
        return self.at(rows, torch.ones(len(rows), dtype=torch.float64).to(rows.device))

    def at(self, rows: Tensor, rho: Tensor) -> Place:
        """The place of trajectories ``rows`` [n] at positions ``rho`` [n]."""
        place = ((1 - rho) * (_LOOKUP - 1)).clamp(0, _LOOKUP - 1 - 1e-9)
        index = place.long()
        weight = (place - index)[:, None]
        flat = index + rows * _LOOKUP
        found = torch.lerp(self._rows[flat], self._rows[flat + 1], weight)
        return Place(
            t=self.time(rho),
            rho=rho,
            integral=found[:, 0],
            log_floored=found[:, 1],
            stiffness=found[:, 2].exp(),
            walked=found[:, 3],
            features=found[:, _COLUMNS:].float(),
        )

    def time(self, rho: Tensor) -> Tensor:
        """Process time at a position, any shape."""
        place = ((1 - rho) * (_LOOKUP - 1)).clamp(0, _LOOKUP - 1 - 1e-9)
        index = place.long()
        log_t = self._log_times
        return torch.lerp(log_t[index], log_t[index + 1], place - index).exp()

    def position(self, t: Tensor) -> Tensor:
        """The position rho at process times, any shape."""
        return (log_level(self.process, t) - self._bottom) / self.levels

    def time_per_position(self, t: Tensor) -> Tensor:
        """Dt / d rho at process times, any shape."""
        return self.levels / log_level_dot(self.process, t)

    def features_at(
        self, rho: Tensor, x: Tensor, stiffness: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the networks see of states that lie on no tabulated path.

        Args:
            rho: Positions [n], within [0, 1].
            x: States there [n, *sample_shape].
            stiffness: Their |Q| [n], float64, where the look-ups live.

        Returns:
            The features [n, m], float32, and log |Q| with its floor [n].
        """
        node = (1 - rho) * (self._mean.shape[0] - 1)
        mean, std = (_interpolate(s, node)[:, 0] for s in (self._mean, self._std))
        white = self._whiten(x.double().flatten(1).to(mean), mean, std)
        index = ((1 - rho) * (_LOOKUP - 1)).round().long().clamp(0, _LOOKUP - 1)
        log_q = stiffness.clamp_min(1e-300).log()
        log_floored = torch.maximum(log_q, self._log_floor[index])
        own = _relative_log(log_floored, self._usual_log[index])[:, None]
        return torch.cat([own, white], dim=1).float(), log_floored

    def log_floored_at(self, rows: Tensor, rho: Tensor) -> Tensor:
        """Log |Q| with its floor at a position; all that a plan needs."""
        place = ((1 - rho) * (_LOOKUP - 1)).clamp(0, _LOOKUP - 1 - 1e-9)
        index = place.long()
        flat = index + rows * _LOOKUP
        column = self._rows[:, 1]
        return torch.lerp(column[flat], column[flat + 1], place - index)

    def exact_cost(self, here: Place, there: Place, steps: int) -> Tensor:
        """Exact cost [n] of one of ``steps`` steps, in natural units."""
        speed = (here.t - there.t) * steps / self.span
        return speed * (there.integral - here.integral)

    def left_cost(self, here: Place, there: Place, steps: int) -> Tensor:
        """The same with |Q| of the step's start for the whole step."""
        speed = (here.t - there.t) * steps / self.span
        return speed**2 * here.stiffness * (self.span / self.length) ** 2 / steps

    def advance(self, here: Place, rows: Tensor, t: Tensor) -> Place:
        """Move to process times ``t`` [n]."""
        return self.at(rows, self.position(t))


class ModelEnvironment(TableEnvironment):
    """The same with the network in the loop: Euler steps, |Q| evaluated on the way.

    The table stays for the natural units, for whitening, and for the exact cost that
    is reported beside the cost that is learned from.

    Args:
        flow: The flow; its denoiser is called two or three times a step.
        x_T: States at t_max [N, *shape].
        table: As in `TableEnvironment`.
        states: As in `TableEnvironment`.
        floor: As in `TableEnvironment`.
        seed: As in `TableEnvironment`.
        device: As in `TableEnvironment`.
    """

    def __init__(
        self,
        flow: ProbabilityFlow,
        x_T: Tensor,
        table: StiffnessTable,
        states: Tensor,
        *,
        floor: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self._counter = CountNFE(flow.denoiser)
        super().__init__(table, states, floor=floor, seed=seed, device=device)
        self._flow = flow.with_denoiser(self._counter)
        self._x_T = x_T
        self._x = x_T
        self._here = self._flow

    @property
    def nfe(self) -> int:
        """Network evaluations spent in episodes."""
        return self._counter.nfe

    @nfe.setter
    def nfe(self, value: int) -> None:
        self._counter.nfe = value

    def with_paths(
        self, table: StiffnessTable, states: Tensor, x_T: Tensor
    ) -> ModelEnvironment:
        new = super().with_paths(table, states, x_T)
        assert isinstance(new, ModelEnvironment)
        # Evaluations on other paths are none of the training's.
        new._counter = CountNFE(self._counter.denoiser)
        new._flow = self._flow.with_denoiser(new._counter)
        new._x_T = x_T
        return new

    def start(self, rows: Tensor) -> Place:
        self._x = self._x_T[rows.to(self._x_T.device)]
        self._here = self._flow.rows(rows, len(self._x_T))
        return self._evaluate(super().start(rows))

    def advance(self, here: Place, rows: Tensor, t: Tensor) -> Place:
        now = self._column(here.t)
        step = self._column(t) - now
        velocity = self._here.velocity(self._x, now)
        self._x = self._x + step.to(self._x.dtype) * velocity
        return self._evaluate(super().advance(here, rows, t))

    def _column(self, t: Tensor) -> Tensor:
        """Times [n] as a column against the states, where those are."""
        return t.to(self._x.device).reshape(-1, *[1] * (self._x.ndim - 1))

    def _evaluate(self, place: Place) -> Place:
        stiffness = self._here.stiffness(self._x, self._column(place.t)).double()
        if not bool((torch.isfinite(stiffness)).all()):
            raise FloatingPointError(
                "the network in the loop returned NaN or infinity (environment="
                f"'model'), at t = {float(place.t.max()):.3g} or before; check the "
                "denoiser away from its own paths, or lower temperature"
            )
        stiffness = stiffness.to(self.device)
        features, log_floored = self.features_at(place.rho, self._x, stiffness)
        return Place(
            t=place.t,
            rho=place.rho,
            integral=place.integral,
            log_floored=log_floored,
            stiffness=stiffness,
            walked=place.walked,
            features=features,
        )


def _relative_log(log_floored: Tensor, usual: Tensor) -> Tensor:
    """Log |Q| of a path against that of the others, as a feature: within [-1, 1]."""
    return (log_floored - usual).clamp(-4, 4) / 4


def _interpolate(values: Tensor, place: Tensor) -> Tensor:
    """Linear interpolation along axis 0 of [n, ...] at fractional indices [m]."""
    place = place.to(values.device).clamp(0, values.shape[0] - 1 - 1e-9)
    index = place.long()
    weight = (place - index).reshape(-1, *[1] * (values.ndim - 1))
    return torch.lerp(values[index], values[index + 1], weight)
