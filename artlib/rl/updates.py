r"""Iterations of ART-RL: episodes, and what a batch of them teaches.

With martingale increments
:math:`\delta_k = V_{k+1} - V_k + r_k\,T/K` and a test process :math:`\xi`, the
condition :math:`E\sum_k \xi_k\delta_k = 0` is solved by stochastic approximation: a
step along :math:`\sum_k \xi_k\delta_k`, with :math:`\delta` held fixed. It is written
as a gradient, that of :math:`\sum_k w_k V_k\,\delta_k` for the critic (29a) and of
:math:`\sum_k w_k \log\pi_k\,\delta_k` for the actor (29b), w being 1, or what makes the
test function relative. Adam, decaying step sizes, clipped gradients and the mean of
the actor's iterates over the second half are ours.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from .._common.errors import TrainingError
from .environment import TableEnvironment
from .episodes import Episodes, play
from .options import Options, TrainingRecord
from .policy import CUT_VARIANCE, Head, critic_value, cut_normal


def increments(value: Tensor, reward: Tensor) -> Tensor:
    r"""Martingale increments :math:`\delta_k = V_{k+1} - V_k + r_k\,T/K`.

    By Bellman's principle, eq. (15), their mean is 0 for the true value. After the last
    step V is 0.

    Args:
        value: V before each step [K, n].
        reward: r dt of each step [K, n].

    Returns:
        [K, n].
    """
    following = torch.cat([value[1:], torch.zeros_like(value[:1])])
    return following - value + reward


def decay(done: float) -> float:
    """Factor of all step sizes: a half cosine from 1 to almost 0.

    Args:
        done: Share of the run that is over, in [0, 1].
    """
    return 0.5 * (1 + math.cos(math.pi * done)) + 1e-3


class Learner:
    """Actor and critic with their optimisers.

    Args:
        options: Of the run.
        width: Number of state features.
        device: Where the networks live.

    Attributes:
        actor: The last iterate.
        critic: The last iterate.
        average: The actor's parameters, mean of the iterates over the second half.
    """

    def __init__(self, options: Options, width: int, device: torch.device) -> None:
        self._options = options
        rng = torch.Generator().manual_seed(options.seed)
        clock = options.constraint == "multiplier"
        self.actor, self.critic = (
            Head(
                width, options.hidden, rng, modes=options.fourier_modes, clock=clock
            ).to(device)
            for _ in range(2)
        )
        self.average = [p.detach().clone() for p in self.actor.parameters()]
        self._optimizers = [
            torch.optim.Adam(network.parameters(), lr=rate, betas=(0.9, 0.99))
            for network, rate in zip(self._networks(), self._rates(), strict=True)
        ]
        k = torch.arange(options.steps, dtype=torch.float64, device=device)
        self._tau = (k / options.steps)[:, None]

    def update_critic(
        self, episodes: Episodes, reward: Tensor, done: float, iteration: int
    ) -> Tensor:
        """CTD(0), eq. (29a).

        Args:
            episodes: What was played.
            reward: r dt of each step [K, n].
            done: Share of the run that is over.
            iteration: For messages.

        Returns:
            The increments [K, n] that the actor learns from.

        Raises:
            TrainingError: If a gradient is not finite.
        """
        o = self._options
        rho = episodes.rho[:-1]
        tau = self._tau.expand_as(rho)
        for _ in range(o.critic_updates):
            output = self.critic(rho, tau, episodes.features)
            value = critic_value(output, rho, tau, o.constraint)
            frozen = value.detach()
            increment = increments(frozen, reward)
            if o.test_function == "gradient":
                weight = torch.ones_like(frozen)
            elif o.constraint == "hard":
                weight = 1 / ((1 - tau) * (frozen.abs() + 1e-9))
            else:
                weight = 1 / (1 - tau) ** 2
            objective = (weight * value * increment).sum(0).mean()
            self._ascend(1, objective, done, iteration)
        return increment

    def update_actor(
        self, episodes: Episodes, increment: Tensor, done: float, iteration: int
    ) -> None:
        """Policy gradient, eq. (29b).

        Args:
            episodes: What was played.
            increment: Martingale increments of the steps that were drawn [drawn, n].
            done: Share of the run that is over.
            iteration: For messages.

        Raises:
            TrainingError: If a gradient is not finite.
        """
        objective = self.actor_objective(episodes, increment)
        self._ascend(0, objective, done, iteration)

    def actor_objective(self, episodes: Episodes, increment: Tensor) -> Tensor:
        """What has the moments of eq. (29b), the actor's update, as its gradient.

        Args:
            episodes: What was played.
            increment: Martingale increments of the steps that were drawn [drawn, n].
        """
        drawn = len(increment)
        rho = episodes.rho[:drawn]
        tau = self._tau[:drawn].expand_as(rho)
        output = self.actor(rho, tau, episodes.features[:drawn])
        relative = self._options.test_function == "relative"
        weight = 1 / (1 - tau) if relative else torch.ones_like(tau)
        moments = weight * episodes.score * increment
        return (output * moments).sum(0).mean()

    def update_average(self, n: int) -> None:
        """Take the actor into the mean as its n-th iterate; n = 1 starts it anew."""
        with torch.no_grad():
            for mean, now in zip(self.average, self.actor.parameters(), strict=True):
                mean += (now - mean) / n

    def averaged_actor(self) -> Head:
        """A copy of the actor with the averaged parameters."""
        actor = copy.deepcopy(self.actor)
        for parameter, mean in zip(actor.parameters(), self.average, strict=True):
            parameter.data.copy_(mean)
        return actor

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by name; Adam's moments are made if missing."""
        state: dict[str, Tensor] = {}
        for name, network, optimizer in zip(
            ("actor", "critic"), self._networks(), self._optimizers, strict=True
        ):
            for key, parameter in network.named_parameters():
                moments = optimizer.state[parameter]
                if not moments:
                    moments["step"] = torch.tensor(0.0, dtype=torch.float32)
                    moments["exp_avg"] = torch.zeros_like(parameter)
                    moments["exp_avg_sq"] = torch.zeros_like(parameter)
                state[f"{name}.{key}"] = parameter.data
                for moment, value in moments.items():
                    state[f"{name}.{key}.{moment}"] = value
        for index, mean in enumerate(self.average):
            state[f"average.{index}"] = mean
        return state

    def _networks(self) -> tuple[Head, Head]:
        return self.actor, self.critic

    def _rates(self) -> tuple[float, float]:
        return self._options.actor_rate, self._options.critic_rate

    def _ascend(
        self, which: int, objective: Tensor, done: float, iteration: int
    ) -> None:
        optimizer = self._optimizers[which]
        optimizer.param_groups[0]["lr"] = self._rates()[which] * decay(done)
        optimizer.zero_grad()
        (-objective).backward()
        norm = nn.utils.clip_grad_norm_(self._networks()[which].parameters(), 1.0)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(
                f"iteration {iteration}: a gradient is NaN or infinite; lower "
                "critic_rate and actor_rate, or raise batch"
            )
        optimizer.step()


class Loop:
    """Iterations one after another, and the state that they change.

    Args:
        options: Of the run.
        environment: What the episodes are played in.

    Attributes:
        learner: The networks.
        iteration: Iterations done.
        iterations: Iterations planned, 0 before that is known.
        multiplier: gamma, in natural units.
    """

    def __init__(self, options: Options, environment: TableEnvironment) -> None:
        device = environment.device
        self._options, self._environment, self._device = options, environment, device
        self.learner = Learner(options, environment.width, device)
        self._rng = torch.Generator(device).manual_seed(options.seed)
        self.iteration, self.iterations = 0, 0
        self.multiplier = options.multiplier

    def iterate(self) -> TrainingRecord:
        """Do one iteration, or leave everything as it was.

        Raises:
            TrainingError: If a value becomes NaN.
        """
        before = {name: t.clone() for name, t in self.tensors().items()}
        try:
            return self._learn()
        except BaseException:  # Ctrl-C too: an iteration is done, or it is not
            self.restore(before)
            raise

    def play(
        self,
        rows: Tensor,
        *,
        noise: Tensor | None = None,
        actor: Head | None = None,
        environment: TableEnvironment | None = None,
    ) -> Episodes:
        """Episodes of the trajectories ``rows``; of the mean policy without noise.

        Args:
            rows: Which trajectories [n].
            noise: Draws [K, n].
            actor: Another actor than the last iterate.
            environment: Other trajectories than those of the training.

        Raises:
            TrainingError: If the network in the loop returns NaN.
        """
        o = self._options
        try:
            return play(
                environment or self._environment,
                actor or self.learner.actor,
                rows,
                steps=o.steps,
                temperature=o.temperature,
                constraint=o.constraint,
                step_cost=o.step_cost,
                noise=noise,
            )
        except FloatingPointError as error:
            raise TrainingError(f"iteration {self.iteration + 1}: {error}") from error

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by name."""
        return {"rng": self._rng.get_state(), **self.learner.tensors()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Set the state from `tensors`."""
        with torch.no_grad():
            for name, tensor in self.learner.tensors().items():
                tensor.copy_(tensors[name])
        self._rng.set_state(tensors["rng"].cpu())

    def _learn(self) -> TrainingRecord:
        o, now = self._options, self.iteration + 1
        done = self.iteration / self.iterations
        rows = self._draw_rows()
        noise = cut_normal((o.steps, len(rows)), self._rng)
        episodes = self.play(rows, noise=noise)
        reward = self.reward(episodes)
        if not bool(torch.isfinite(reward).all()):
            raise TrainingError(
                f"iteration {now}: a step's cost is NaN or infinite; check the "
                "denoiser, or lower temperature or actor_rate"
            )
        increment = self.learner.update_critic(episodes, reward, done, now)
        if self.iteration >= o.warm_up:
            drawn = increment[: len(episodes.score)]  # a forced last step is no draw
            self.learner.update_actor(episodes, drawn, done, now)
            # The mean of the iterates over the second half, as stochastic
            # approximation asks for; until then the iterate itself.
            self.learner.update_average(max(1, now - self.iterations // 2))
        multiplier = self.updated_multiplier(episodes, done)
        record = TrainingRecord(
            iteration=now,
            cost=float(episodes.exact.sum(0).mean()),
            martingale_error=float((increment**2).sum(0).mean().sqrt()),
            end_residual=float(1 - episodes.last.walked.mean()),
            multiplier=multiplier,
        )
        self.iteration, self.multiplier = now, multiplier
        return record

    def reward(self, episodes: Episodes) -> Tensor:
        r"""The exploratory reward of each step, eq. (13), in natural units.

        It is :math:`-|Q|\theta^2 - \gamma\theta` over the step, and what its noise
        costs on average, :math:`\lambda` per unit of clock, is paid back.

        Args:
            episodes: What was played.

        Returns:
            r dt [K, n].
        """
        o, drawn = self._options, len(episodes.score)
        reward = -episodes.charged
        reward[:drawn] += o.temperature * CUT_VARIANCE / o.steps
        if o.constraint == "multiplier":
            walked = (episodes.time[:-1] - episodes.time[1:]) / self._environment.span
            reward = reward - self.multiplier * walked
        return reward

    def updated_multiplier(self, episodes: Episodes, done: float) -> float:
        r"""The multiplier after these episodes, eq. (30).

        It moves by :math:`\psi(T) - T`, relative to T: clocks that end early make it
        more negative. Under the hard constraint it stays.

        Args:
            episodes: What was played.
            done: Share of the run that is over.
        """
        o, env = self._options, self._environment
        if o.constraint != "multiplier":
            return self.multiplier
        end = (episodes.time[-1].mean() - env.process.t_min) / env.span
        return self.multiplier - o.multiplier_rate * decay(done) * float(end)

    def _draw_rows(self) -> Tensor:
        n, batch = self._environment.size, self._options.batch
        if batch == n:
            return torch.arange(n, device=self._device)
        return torch.randperm(n, generator=self._rng, device=self._device)[:batch]
