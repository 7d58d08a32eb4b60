"""One iteration of ART-RL: episodes, martingale increments, moment conditions."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common.errors import TrainingError
from .environment import TableEnvironment
from .episodes import Episodes, play
from .options import Options, TrainingRecord
from .policy import CUT_VARIANCE, Head, cut_normal
from .updates import Learner, decay


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
        o, env, now = self._options, self._environment, self.iteration + 1
        done = self.iteration / self.iterations
        rows = self._draw_rows()
        noise = cut_normal((o.steps, len(rows)), self._rng)
        episodes = self.play(rows, noise=noise)
        drawn = len(episodes.score)  # a forced last step is no draw
        reward = -episodes.charged
        reward[:drawn] += o.temperature * CUT_VARIANCE / o.steps
        if o.constraint == "multiplier":
            walked = (episodes.time[:-1] - episodes.time[1:]) / env.span
            reward = reward - self.multiplier * walked
        if not bool(torch.isfinite(reward).all()):
            raise TrainingError(
                f"iteration {now}: a step's cost is NaN or infinite; check the "
                "denoiser, or lower temperature or actor_rate"
            )
        increment = self.learner.update_critic(episodes, reward, done, now)
        if self.iteration >= o.warm_up:
            self.learner.update_actor(episodes, increment[:drawn], done, now)
            # The mean of the iterates over the second half, as stochastic
            # approximation asks for; until then the iterate itself.
            self.learner.update_average(max(1, now - self.iterations // 2))
        multiplier = self.multiplier
        if o.constraint == "multiplier":
            # psi(T) - T, relative; short clocks make gamma more negative (30).
            end = (episodes.time[-1].mean() - env.process.t_min) / env.span
            multiplier -= o.multiplier_rate * decay(done) * float(end)
        record = TrainingRecord(
            iteration=now,
            cost=float(episodes.exact.sum(0).mean()),
            martingale_error=float((increment**2).sum(0).mean().sqrt()),
            end_residual=float(1 - episodes.last.walked.mean()),
            multiplier=multiplier,
        )
        self.iteration, self.multiplier = now, multiplier
        return record

    def _draw_rows(self) -> Tensor:
        n, batch = self._environment.size, self._options.batch
        if batch == n:
            return torch.arange(n, device=self._device)
        return torch.randperm(n, generator=self._rng, device=self._device)[:batch]
