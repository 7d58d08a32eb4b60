r"""ART-RL: the sampling clock learned by a continuous-time actor-critic.

The paper's own method (its Theorem 1 to 3 and eqs. (11)-(30)), on the control problem
whose closed form is in `artlib.control`. A Gaussian policy
:math:`\theta_k \sim N(\mu_\phi, \lambda/|Q|)` walks each trajectory in K steps; with
the martingale increment

.. math:: \delta_k = V_{k+1} - V_k + r_k\,T/K, \qquad
          r = -|Q|\theta^2 - \gamma\theta + \lambda

the moment conditions :math:`E\sum_k \xi_k \delta_k = 0` are solved by stochastic
approximation: the critic with :math:`\xi = \partial V/\partial\vartheta` (29a), CTD(0),
the actor with :math:`\xi = \partial\log\pi/\partial\phi` (29b), and, with
``constraint="multiplier"``, :math:`\gamma` by the end error (30).

What is ours, because the literal recipe fails (chapter 07 takes it apart): exact step
costs on tabulated paths, a hard end constraint, the floor under |Q| in the noise,
natural units, and the **relative test function**. V falls to 0 along the path while
every step costs the same, so :math:`\partial V` hardly weighs the last steps; any
adapted test process is allowed, and :math:`\xi = \partial V / (|V| (1 - \tau))` weighs
all alike.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ._checks import check_samples, finite_float, positive_int
from ._rl_checkpoint import fingerprint, load_state, save_state
from ._rl_environment import ModelEnvironment, TableEnvironment
from ._rl_episodes import Episodes, play
from ._rl_networks import CUT_VARIANCE, Constraint, Head, critic_value, cut_normal
from ._rl_options import DivergenceWarning, Options, TrainingError, TrainingRecord
from .control import stiffness_path
from .flow import ProbabilityFlow
from .schedules import Schedule, from_time_change

__all__ = ["ActorCritic", "DivergenceWarning", "TrainingError", "TrainingRecord"]


class ActorCritic:
    r"""Trains a clock by ART-RL.

    Args:
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape]; each gives one trajectory.
        steps: K, steps of an episode.
        temperature: :math:`\lambda` in natural units: relative noise of the speed is
            about its square root.
        seed: Of weights, noise and batches.
        constraint: ``"hard"``: the last step goes to the end; ``"multiplier"``: the
            paper's, the mean of psi(T) is driven to T by gamma.
        environment: ``"table"``: on precomputed paths; ``"model"``: the network in the
            loop, as the paper has it.
        step_cost: ``"exact"`` on a table (default there), ``"left"``: |Q| at the start
            of a step for the whole step (the only one with the model in the loop).
        test_function: ``"relative"`` or ``"gradient"``, see the module.
        floor: Least |Q| of a path in its noise, relative to the mean over the paths.
        batch: Trajectories per iteration; by default all, at most 256.
        hidden: Width of the networks.
        critic_rate: Step size of the critic (Adam), decaying to 0.
        actor_rate: Step size of the actor, decaying to 0.
        multiplier_rate: Step size of gamma.
        critic_updates: Critic steps per iteration.
        warm_up: Iterations in which the critic alone learns.
        points: Times of the stiffness table.
        method: Integrator of the reference paths, see `stiffness_table`.
        device: Where to train; by default where ``x_T`` is.

    Raises:
        ValueError: If an argument is out of its range, or the flow returns NaN.

    References:
        Huang, Tang, Zhou, https://arxiv.org/abs/2607.02137, eqs. (11)-(18), (29)-(30);
        Jia and Zhou, Journal of Machine Learning Research 23 (2022), policy evaluation
        and policy gradient in continuous time.
    """

    def __init__(
        self,
        flow: ProbabilityFlow,
        x_T: Tensor,
        *,
        steps: int = 18,
        temperature: float = 0.05,
        seed: int = 0,
        constraint: Constraint = "hard",
        environment: Literal["table", "model"] = "table",
        step_cost: Literal["exact", "left"] | None = None,
        test_function: Literal["relative", "gradient"] = "relative",
        floor: float = 1.0,
        batch: int | None = None,
        hidden: int = 64,
        critic_rate: float = 1e-2,
        actor_rate: float = 5e-3,
        multiplier_rate: float = 0.05,
        critic_updates: int = 4,
        warm_up: int = 50,
        points: int = 64,
        method: str = "rk4",
        device: torch.device | str | None = None,
    ) -> None:
        x_T = check_samples(x_T)
        default_cost = "exact" if environment == "table" else "left"
        self.options = Options(
            steps=positive_int(steps, "steps", minimum=2),
            temperature=finite_float(temperature, "temperature", positive=True),
            seed=positive_int(seed, "seed", minimum=0),
            constraint=constraint,
            environment=environment,
            step_cost=step_cost or default_cost,  # type: ignore[arg-type]
            test_function=test_function,
            floor=finite_float(floor, "floor", positive=True),
            batch=min(256, len(x_T)) if batch is None else positive_int(batch, "batch"),
            hidden=positive_int(hidden, "hidden"),
            critic_rate=finite_float(critic_rate, "critic_rate", positive=True),
            actor_rate=finite_float(actor_rate, "actor_rate", positive=True),
            multiplier_rate=finite_float(
                multiplier_rate, "multiplier_rate", positive=True
            ),
            critic_updates=positive_int(critic_updates, "critic_updates"),
            warm_up=positive_int(warm_up, "warm_up", minimum=0),
        )
        self.options.check(len(x_T))
        self.device = torch.device(device) if device is not None else x_T.device
        self.table, path = stiffness_path(flow, x_T, points=points, method=method)
        shared: dict[str, Any] = {
            "floor": self.options.floor,
            "seed": self.options.seed,
            "device": self.device,
        }
        self.environment = (
            TableEnvironment(self.table, path, **shared)
            if environment == "table"
            else ModelEnvironment(flow, x_T, self.table, path, **shared)
        )
        weights = torch.Generator().manual_seed(self.options.seed)
        width = self.environment.width
        clock = constraint == "multiplier"
        self.actor, self.critic = (
            Head(width, self.options.hidden, weights, clock=clock).to(self.device)
            for _ in range(2)
        )
        self._average = [p.detach().clone() for p in self.actor.parameters()]
        rates = self.options.actor_rate, self.options.critic_rate
        self._optimizers = [
            torch.optim.Adam(network.parameters(), lr=rate, betas=(0.9, 0.99))
            for network, rate in zip((self.actor, self.critic), rates, strict=True)
        ]
        self._rng = torch.Generator(self.device).manual_seed(self.options.seed)
        self.multiplier = 0.0
        self.iteration = 0
        self.iterations = 0
        self._recent, self._best = math.nan, math.inf
        self._warned = False
        k = torch.arange(self.options.steps, dtype=torch.float64, device=self.device)
        self._tau = (k / self.options.steps)[:, None]

    def train(
        self,
        iterations: int = 2000,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 200,
        progress: bool = False,
    ) -> Iterator[TrainingRecord]:
        """Train, yielding a record after every iteration.

        Args:
            iterations: How many in all; step sizes decay to 0 at the last.
            checkpoint: A file. If it exists, training continues from it, bit for bit;
                it is rewritten every ``every`` iterations and at the end.
            every: Iterations between checkpoints.
            progress: Whether to show a progress bar (on stderr).

        Yields:
            A `TrainingRecord` per iteration.

        Raises:
            CheckpointError: If the file is damaged or belongs to another problem.
            TrainingError: If a value becomes NaN; the last checkpoint is kept.
        """
        iterations = positive_int(iterations, "iterations")
        every = positive_int(every, "every")
        if checkpoint is not None and os.path.exists(checkpoint):
            self.load(checkpoint)
        if self.iterations not in (0, iterations):
            raise ValueError(
                f"iterations: this run was planned for {self.iterations}, got "
                f"{iterations}; step sizes decay over the whole run, so the number "
                "cannot change on the way. Start a new trainer for another length"
            )
        self.iterations = iterations
        return self._train(checkpoint, every, progress)

    def _train(
        self, checkpoint: str | os.PathLike[str] | None, every: int, progress: bool
    ) -> Iterator[TrainingRecord]:
        first, last = self.iteration, self.iterations
        bar = tqdm(
            total=last, initial=first, desc="ART-RL", unit="it", disable=not progress
        )
        with bar:
            while self.iteration < last:
                record = self._iterate()
                self._watch(record)
                if checkpoint is not None and (
                    self.iteration % every == 0 or self.iteration == last
                ):
                    self.save(checkpoint)
                bar.update()
                yield record

    # One iteration: episodes, martingale increments, moment conditions.

    def _iterate(self) -> TrainingRecord:
        o, env = self.options, self.environment
        rows = self._draw_rows()
        noise = cut_normal((o.steps, len(rows)), self._rng)
        episodes = self._play(rows, noise=noise)
        drawn = len(episodes.score)  # a forced last step is no draw
        reward = -episodes.charged
        reward[:drawn] += o.temperature * CUT_VARIANCE / o.steps
        if o.constraint == "multiplier":
            walked = (episodes.time[:-1] - episodes.time[1:]) / env.span
            reward = reward - self.multiplier * walked
        if not bool(torch.isfinite(reward).all()):
            raise TrainingError(
                f"iteration {self.iteration + 1}: a step's cost is NaN or infinite; "
                "the network returned it (environment='model'), or the clock jumped: "
                "check the denoiser, or lower temperature or actor_rate"
            )
        increment = self._update_critic(episodes, reward)
        if self.iteration >= o.warm_up:
            self._update_actor(episodes, increment[:drawn])
        if o.constraint == "multiplier":
            # psi(T) - T, relative; short clocks make gamma more negative (30).
            end = (episodes.time[-1].mean() - env.process.t_min) / env.span
            self.multiplier -= o.multiplier_rate * self._decay() * float(end)
        self.iteration += 1
        return TrainingRecord(
            iteration=self.iteration,
            cost=float(episodes.exact.sum(0).mean()),
            martingale_error=float((increment**2).sum(0).mean().sqrt()),
            end_residual=float(1 - episodes.last.walked.mean()),
            multiplier=self.multiplier,
        )

    def _update_critic(self, episodes: Episodes, reward: Tensor) -> Tensor:
        """CTD(0), eq. (29a); returns the increments the actor learns from."""
        o = self.options
        rho = episodes.rho[:-1]
        tau = self._tau.expand_as(rho)
        for _ in range(o.critic_updates):
            output = self.critic(rho, tau, episodes.features)
            value = critic_value(output, rho, tau, o.constraint)
            frozen = value.detach()
            following = torch.cat([frozen[1:], torch.zeros_like(frozen[:1])])
            increment = following - frozen + reward
            if o.test_function == "gradient":
                weight = torch.ones_like(frozen)
            elif o.constraint == "hard":
                weight = 1 / ((1 - tau) * (frozen.abs() + 1e-9))
            else:
                weight = 1 / (1 - tau) ** 2
            self._ascend(1, (weight * value * increment).sum(0).mean())
        return increment

    def _update_actor(self, episodes: Episodes, increment: Tensor) -> None:
        """Policy gradient, eq. (29b), and the running mean of the iterates."""
        o, drawn = self.options, len(increment)
        rho = episodes.rho[:drawn]
        tau = self._tau[:drawn].expand_as(rho)
        output = self.actor(rho, tau, episodes.features[:drawn])
        relative = o.test_function == "relative"
        weight = 1 / (1 - tau) if relative else torch.ones_like(tau)
        gradient = weight * episodes.score * increment
        self._ascend(0, (output * gradient).sum(0).mean())
        # The mean of the iterates over the second half, as stochastic approximation
        # asks for; until then the iterate itself.
        n = max(1, self.iteration - self.iterations // 2 + 1)
        with torch.no_grad():
            for mean, now in zip(self._average, self.actor.parameters(), strict=True):
                mean += (now - mean) / n

    def _ascend(self, which: int, objective: Tensor) -> None:
        optimizer = self._optimizers[which]
        rate = (self.options.actor_rate, self.options.critic_rate)[which]
        optimizer.param_groups[0]["lr"] = rate * self._decay()
        optimizer.zero_grad()
        (-objective).backward()
        network = (self.actor, self.critic)[which]
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(
                f"iteration {self.iteration + 1}: a gradient is NaN or infinite; lower "
                "critic_rate and actor_rate, or raise batch"
            )
        optimizer.step()

    def _decay(self) -> float:
        """Factor of all step sizes: a half cosine from 1 to almost 0."""
        done = self.iteration / self.iterations
        return 0.5 * (1 + math.cos(math.pi * done)) + 1e-3

    def _draw_rows(self) -> Tensor:
        n, batch = self.environment.size, self.options.batch
        if batch == n:
            return torch.arange(n, device=self.device)
        return torch.randperm(n, generator=self._rng, device=self.device)[:batch]

    def _play(
        self, rows: Tensor, *, noise: Tensor | None = None, actor: Head | None = None
    ) -> Episodes:
        o = self.options
        return play(
            self.environment,
            actor or self.actor,
            rows,
            steps=o.steps,
            temperature=o.temperature,
            constraint=o.constraint,
            step_cost=o.step_cost,
            noise=noise,
        )

    def _watch(self, record: TrainingRecord) -> None:
        """Warn once when the cost or the end residual leaves the good region."""
        cost = record.cost
        keep = 0.95
        self._recent = (
            cost
            if math.isnan(self._recent)
            else keep * self._recent + (1 - keep) * cost
        )
        if self.iteration >= 20:
            self._best = min(self._recent, self._best)
        cost_up = self._recent > 2 * self._best
        late = self.iteration > max(100, self.iterations // 2)
        open_end = late and record.end_residual > 0.2
        if self._warned or not (cost_up or open_end):
            return
        self._warned = True
        what = (
            f"the cost rose to {self._recent:.3g} from {self._best:.3g}"
            if cost_up
            else f"the clock ends {record.end_residual:.0%} of its length early"
        )
        remedy = (
            "lower actor_rate and critic_rate, or raise batch and critic_updates"
            if cost_up
            else "use constraint='hard', or raise multiplier_rate and iterations"
        )
        warnings.warn(
            f"ART-RL, iteration {self.iteration}: {what}; {remedy}",
            DivergenceWarning,
            stacklevel=4,
        )

    # What comes out.

    def clocks(self) -> Tensor:
        """Process times of the learned mean policy, per trajectory.

        Returns:
            float64 [N, K + 1] on the CPU: each path's clock at even readings.
        """
        actor = copy.deepcopy(self.actor)
        for parameter, mean in zip(actor.parameters(), self._average, strict=True):
            parameter.data.copy_(mean)
        rows = torch.arange(self.environment.size, device=self.device)
        return self._play(rows, actor=actor).time.T.cpu()

    def distill(self) -> Schedule:
        """The mean clock over the trajectories, as a plain schedule.

        Knots are the K + 1 mean times; between them the schedule is a monotone cubic.

        Raises:
            TrainingError: If the mean clock is not strictly monotone.
        """
        times = self.clocks().mean(0)
        process = self.environment.process
        o = self.options
        if o.constraint == "multiplier":
            times[-1] = process.t_min
        if not bool((times[1:] < times[:-1]).all()):
            raise TrainingError(
                "distill: the mean clock stands still or runs backwards; train longer, "
                "or use constraint='hard'"
            )
        notes = {
            "method": "ART-RL",
            "iterations": self.iteration,
            "nfe": self.table.nfe,
            "trajectories": self.environment.size,
            **asdict(o),
        }
        clock = torch.linspace(0, 1, o.steps + 1, dtype=torch.float64)
        return from_time_change(
            process, clock * self.table.span, times, name="ART-RL", provenance=notes
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, atomically (safetensors, nothing is pickled).

        Raises:
            OSError: If that fails; an older checkpoint is then untouched.
        """
        save_state(path, self._tensors(), self._scalars())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint of the same problem and options.

        Raises:
            CheckpointError: If it is damaged, foreign, or of another problem; this
                trainer is then unchanged.
        """
        tensors, scalars = load_state(path, self._tensors(), self._scalars())
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                if name != "rng":
                    tensor.copy_(tensors[name])
        self._rng.set_state(tensors["rng"].cpu())
        for name in ("iteration", "iterations", "multiplier", "_recent", "_best"):
            setattr(self, name, scalars[name])

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by name; Adam's moments are made if missing."""
        state = {"rng": self._rng.get_state()}
        networks = (("actor", self.actor), ("critic", self.critic))
        for (name, network), optimizer in zip(networks, self._optimizers, strict=True):
            for key, parameter in network.named_parameters():
                moments = optimizer.state[parameter]
                if not moments:
                    moments["step"] = torch.tensor(0.0)
                    moments["exp_avg"] = torch.zeros_like(parameter)
                    moments["exp_avg_sq"] = torch.zeros_like(parameter)
                state[f"{name}.{key}"] = parameter.data
                for moment, value in moments.items():
                    state[f"{name}.{key}.{moment}"] = value
        for index, mean in enumerate(self._average):
            state[f"average.{index}"] = mean
        return state

    def _scalars(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "iterations": self.iterations,
            "multiplier": self.multiplier,
            "_recent": self._recent,
            "_best": self._best,
            "problem": fingerprint(self.table, asdict(self.options)),
        }
