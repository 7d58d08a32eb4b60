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

What is ours, because one literal reading fails (chapter 07 takes it apart): exact step
costs on tabulated paths, a hard end constraint, the floor under |Q| in the noise,
natural units, and the **relative test function**. V falls to 0 along the path while
every step costs the same, so :math:`\partial V` hardly weighs the last steps; any
adapted test process is allowed, and :math:`\xi = \partial V / (|V| (1 - \tau))` weighs
all alike.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from .._common.checks import check_samples, positive_int
from .._common.errors import TrainingError
from ..control.closed_form import stiffness_path
from ..flow.flow import ProbabilityFlow
from ..flow.processes import Process
from ..schedules.constructors import Schedule, from_time_change
from .checkpoint import (
    CheckpointError,
    fingerprint,
    load_state,
    path_lengths,
    save_state,
)
from .environment import ModelEnvironment, TableEnvironment
from .options import (
    DivergenceWarning,
    Options,
    TrainingRecord,
    Watch,
    check_plan,
    default_temperature,
    same_length,
    same_shape,
)
from .policy import Constraint, Head
from .updates import Loop

__all__ = [
    "ActorCritic",
    "CheckpointError",
    "DivergenceWarning",
    "TrainingError",
    "TrainingRecord",
]

Close = Literal["normalise", "jump"]
"""What is done about a mean clock that does not end at t_min."""


class ActorCritic:
    r"""Trains a clock by ART-RL.

    Args:
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape]; each gives one trajectory.
        steps: K, steps of an episode.
        temperature: :math:`\lambda` in natural units: relative noise of the speed is
            about its square root. By default min(0.02, (K/80)^2): exploring adds to the
            cost, and |Q| changes by decades within one long step (K = 5 at 0.05
            diverges). A higher one learns more of what sets single paths apart.
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
        fourier_modes: Modes of the position that the networks see, 0 for none.
        critic_rate: Step size of the critic (Adam), decaying to 0.
        actor_rate: Step size of the actor, decaying to 0.
        multiplier: gamma at the start, in natural units; negative values reward
            progress. For constraint="multiplier" only. At 0 a clock first learns to
            stand still. At the end of an optimal clock :math:`\gamma^* = -2|Q|\theta`,
            by eq. (18) with V = 0.
        multiplier_rate: Step size of gamma.
        critic_updates: Critic steps per iteration.
        warm_up: Iterations in which the critic alone learns.
        points: Times of the stiffness table.
        method: Integrator of the reference paths, see `stiffness_table`.
        path_batch: Reference paths integrated together, and walked together by
            `clocks` and `distill`; by default all. It bounds the memory there; what is
            kept is the states of all paths, ``points`` of each in float64 on the CPU,
            while the look-up table is made.
        device: Where to train; by default where ``x_T`` is.

    Attributes:
        options: All of the above that shapes the run.
        table: The `StiffnessTable` of the reference paths.
        environment: What the episodes are played in.

    Raises:
        TypeError: If ``flow`` is no flow or ``x_T`` no floating-point tensor.
        ValueError: If an argument is out of its range, the flow returns NaN, or the
            paths are straight and there is nothing to learn.

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
        temperature: float | None = None,
        seed: int = 0,
        constraint: Constraint = "hard",
        environment: Literal["table", "model"] = "table",
        step_cost: Literal["exact", "left"] | None = None,
        test_function: Literal["relative", "gradient"] = "relative",
        floor: float = 1.0,
        batch: int | None = None,
        hidden: int = 64,
        fourier_modes: int = 5,
        critic_rate: float = 1e-2,
        actor_rate: float = 5e-3,
        multiplier: float = 0.0,
        multiplier_rate: float = 0.05,
        critic_updates: int = 4,
        warm_up: int = 50,
        points: int = 64,
        method: str = "rk4",
        path_batch: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        x_T = check_samples(x_T)
        if step_cost is None:
            step_cost = "left" if environment == "model" else "exact"
        steps = positive_int(steps, "steps", minimum=2)
        if temperature is None:
            temperature = default_temperature(steps)
        self.options = Options(
            steps=steps,
            temperature=temperature,
            seed=seed,
            constraint=constraint,
            environment=environment,
            step_cost=step_cost,
            test_function=test_function,
            floor=floor,
            batch=min(256, len(x_T)) if batch is None else batch,
            hidden=hidden,
            fourier_modes=fourier_modes,
            critic_rate=critic_rate,
            actor_rate=actor_rate,
            multiplier=multiplier,
            multiplier_rate=multiplier_rate,
            critic_updates=critic_updates,
            warm_up=warm_up,
        )
        self.options.check(len(x_T))
        self.device = torch.device(device) if device is not None else x_T.device
        self._flow = flow
        self._sampling: dict[str, Any] = {
            "points": points,
            "method": method,
            "batch": path_batch,
        }
        self._shape = x_T.shape[1:]
        self.table, states = stiffness_path(flow, x_T, **self._sampling)
        shared: dict[str, Any] = {
            "floor": self.options.floor,
            "seed": self.options.seed,
            "device": self.device,
        }
        self.environment = (
            TableEnvironment(self.table, states, **shared)
            if environment == "table"
            else ModelEnvironment(flow, x_T, self.table, states, **shared)
        )
        self._loop = Loop(self.options, self.environment)
        self._watch = Watch()
        self._lengths = path_lengths(self.table)

    @property
    def actor(self) -> Head:
        """The actor's last iterate; what is distilled is the mean of the iterates."""
        return self._loop.learner.actor

    def averaged_actor(self) -> Head:
        """The mean of the actor's iterates over the second half, a copy.

        It is what `clocks`, `distill` and `ActorClock` follow.
        """
        return self._loop.learner.averaged_actor()

    @property
    def critic(self) -> Head:
        """The critic."""
        return self._loop.learner.critic

    @property
    def multiplier(self) -> float:
        """The multiplier gamma, in natural units; 0 with the hard constraint."""
        return self._loop.multiplier

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self._loop.iteration

    @property
    def nfe(self) -> int:
        """Network evaluations (batched calls) spent so far, the table's included."""
        return self.table.nfe + self.environment.nfe

    def train(
        self,
        iterations: int = 2000,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 200,
        progress: bool = False,
    ) -> Iterator[TrainingRecord]:
        """Train, yielding a record after every iteration.

        The training is done by the loop that takes the records; without a loop use
        `fit`. Records that are dropped before the first one warn.

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
            FileNotFoundError: If there is no folder to write the file to.
            TrainingError: If a value becomes NaN; the last checkpoint is kept.
            ValueError: If ``iterations`` is not above ``warm_up``, or not what this
                run was planned for.
        """
        iterations = positive_int(iterations, "iterations")
        every = positive_int(every, "every")
        check_plan(iterations, self.options.warm_up, checkpoint)
        if checkpoint is not None and os.path.exists(checkpoint):
            self.load(checkpoint)
        self._loop.iterations = same_length(self._loop.iterations, iterations)
        return _Records(self._train(checkpoint, every, progress))

    def fit(
        self,
        iterations: int = 2000,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 200,
        progress: bool = False,
    ) -> TrainingRecord | None:
        """Train at once; the arguments are those of `train`.

        Args:
            iterations: How many in all; step sizes decay to 0 at the last.
            checkpoint: A file to continue from, and to write to.
            every: Iterations between checkpoints.
            progress: Whether to show a progress bar (on stderr).

        Returns:
            The last record; None if a checkpoint had them all.

        Raises:
            CheckpointError: If the file is damaged or belongs to another problem.
            TrainingError: If a value becomes NaN; the last checkpoint is kept.
            ValueError: As `train`.
        """
        last = None
        options: dict[str, Any] = {"checkpoint": checkpoint, "every": every}
        for record in self.train(iterations, progress=progress, **options):
            last = record
        return last

    def _train(
        self, checkpoint: str | os.PathLike[str] | None, every: int, progress: bool
    ) -> Iterator[TrainingRecord]:
        first, last = self.iteration, self._loop.iterations
        with tqdm(
            total=last, initial=first, desc="ART-RL", unit="it", disable=not progress
        ) as bar:
            while self.iteration < last:
                record = self._loop.iterate()
                if checkpoint is not None and (
                    self.iteration % every == 0 or self.iteration == last
                ):
                    self.save(checkpoint)
                bar.update()
                message = self._watch.message(record, self.options.batch, last)
                if message:
                    # Past the iterator that this generator is handed out in.
                    warnings.warn(message, DivergenceWarning, stacklevel=3)
                yield record

    def clocks(self, x_T: Tensor | None = None) -> Tensor:
        """Process times of the learned mean policy, per trajectory.

        Args:
            x_T: States at ``t_max`` [n, *shape] of other trajectories than those of
                the training, which are the default. Their reference paths are
                integrated anew; the evaluations for that are not in `nfe`.

        Returns:
            float64 [n, K + 1] on the CPU: each path's clock at even readings.

        Raises:
            TypeError: If ``x_T`` is no floating-point tensor.
            ValueError: If its samples have another shape than those of the training,
                or hold NaN.
        """
        environment = self.environment if x_T is None else self._on(x_T)
        rows = torch.arange(environment.size, device=self.device)
        actor = self.averaged_actor()
        parts = rows.split(self._sampling["batch"] or len(rows))
        episodes = (
            self._loop.play(part, actor=actor, environment=environment)
            for part in parts
        )
        return torch.cat([e.time.T.cpu() for e in episodes])

    def _on(self, x_T: Tensor) -> TableEnvironment:
        """The environment on other trajectories."""
        x_T = same_shape(check_samples(x_T), self._shape)
        table, states = stiffness_path(self._flow, x_T, **self._sampling)
        return self.environment.with_paths(table, states, x_T)

    def distill(self, *, close: Close = "normalise") -> Schedule:
        r"""The mean clock over the trajectories, as a plain schedule.

        Knots are the K + 1 mean times; between them the schedule is a monotone cubic.

        Args:
            close: What is done about a mean clock that does not end where it should,
                as happens with ``constraint="multiplier"``. ``"normalise"``: the
                increments :math:`\theta_k T/K` are scaled to sum to T, as the paper
                distils. ``"jump"``: its last step goes to the end, whatever is left.
                With the hard constraint the two are the same.

        Raises:
            TrainingError: If the mean clock is not strictly monotone, or nothing was
                trained.
            ValueError: If ``close`` is neither.
        """
        _check_close(close)
        if not self.iteration:
            raise TrainingError(
                "distill: nothing was trained yet; run `for record in "
                "trainer.train(...)`, or trainer.fit(...), or load a checkpoint"
            )
        clocks = self.clocks()  # costs evaluations, with the model in the loop
        notes = {
            "iterations": self.iteration,
            "nfe": self.nfe,
            "trajectories": self.environment.size,
            **asdict(self.options),
        }
        return mean_schedule(self.environment.process, clocks, close, notes)

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
        tensors, scalars = load_state(
            path,
            self._tensors(),
            self._scalars(),
            critic_updates=self.options.critic_updates,
        )
        self._loop.restore(tensors)
        for name in ("iteration", "iterations", "multiplier"):
            setattr(self._loop, name, scalars[name])
        self._watch = Watch(**scalars["watch"])
        self.environment.nfe = scalars["nfe"]

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state and, to know the problem by, the path lengths."""
        return {"lengths": self._lengths, **self._loop.tensors()}

    def _scalars(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "iterations": self._loop.iterations,
            "multiplier": self.multiplier,
            "watch": asdict(self._watch),
            "nfe": self.environment.nfe,
            "problem": fingerprint(self.table, asdict(self.options)),
        }


class _Records(Iterator[TrainingRecord]):
    """The records of a training, which warn if nobody asks for the first one."""

    def __init__(self, records: Iterator[TrainingRecord]) -> None:
        self._records = records
        self._asked = False

    def __next__(self) -> TrainingRecord:
        self._asked = True
        return next(self._records)

    def close(self) -> None:
        """Stop before the end; what was trained stays."""
        self._asked = True
        close = getattr(self._records, "close", None)
        if close is not None:
            close()

    def __del__(self) -> None:
        if not self._asked:
            warnings.warn(
                "train: nothing was trained, for no record was taken; write `for "
                "record in trainer.train(...)`, or call trainer.fit(...)",
                UserWarning,
                stacklevel=2,
            )


def _check_close(close: Any) -> None:
    """Refuse another way to close a clock than there are."""
    if not isinstance(close, str) or close not in get_args(Close):
        raise ValueError(f"close: expected one of {get_args(Close)}, got {close!r}")


def mean_schedule(
    process: Process, clocks: Tensor, close: Close, notes: dict[str, Any]
) -> Schedule:
    """The mean clock over the trajectories.

    Knots are the K + 1 mean times; between them the schedule is a monotone cubic.

    Args:
        process: Whose times these are.
        clocks: float64 [n, K + 1]: process times of each trajectory at even readings.
        close: What is done about an end that is open, see `ActorCritic.distill`.
        notes: For the provenance.

    Raises:
        TrainingError: If the mean clock is not strictly monotone.
        ValueError: If there is no such way to close a clock.
    """
    _check_close(close)
    times = clocks.mean(0)
    left_open = float(times[-1]) > process.t_min * (1 + 1e-9)
    if close == "normalise" and left_open:
        walked = times[0] - times
        if not bool(walked[-1] > 0):
            raise TrainingError(
                "distill: the mean clock stands still; train longer, or use "
                "constraint='hard'"
            )
        times = process.t_max - (process.t_max - process.t_min) * walked / walked[-1]
    # The ends are known, and interpolation left round-off there; to "jump" is to close
    # here, within the last step, what the clock left open.
    times[0], times[-1] = process.t_max, process.t_min
    if not bool((times[1:] < times[:-1]).all()):
        raise TrainingError(
            "distill: the mean clock stands still or runs backwards; train longer, or "
            "use constraint='hard'"
        )
    clock = torch.linspace(0, 1, len(times), dtype=torch.float64)
    return from_time_change(
        process,
        clock * (process.t_max - process.t_min),
        times,
        name="ART-RL",
        provenance={"method": "ART-RL", **notes},
    )
