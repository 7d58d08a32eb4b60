r"""ART in closed form: the control problem of equations (9)-(10) and its solution.

A schedule is a clock psi(s), s in [0, T], with speed :math:`\theta = \psi'`; the Euler
error it leaves is the cost

.. math:: C = E \int_0^T |Q|\, \theta^2\, ds = E \int |Q|\, \theta\, d\psi .

The path x(psi) does not depend on how fast it is walked, so |Q| is a table: each
trajectory's acceleration at each time, computed once. With it (ours; the paper
goes to reinforcement learning instead):

* per trajectory, :math:`V = -G^2 / (T - s)` with :math:`G = \int_\psi^T \sqrt{|Q|}`
  solves the HJB equation exactly, and :math:`|Q|\,\theta^2` is constant;
* **open loop**, one clock for all: density of steps
  :math:`\propto (E|Q|)^{1/2}`, and :math:`C \ge (\int \sqrt{E|Q|})^2 / T`;
* **feedback**, a clock per trajectory: :math:`C \ge E (\int \sqrt{|Q|})^2 / T`;
* **paper**, what the paper distils: the mean over trajectories of the feedback clocks.

The clock runs over T = t_max - t_min, the range on which a schedule is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from .._common.checks import check_samples, positive_int
from .._common.types import SeedLike
from ..flow.denoisers import CountNFE
from ..flow.flow import ProbabilityFlow, check_flow
from ..flow.noise_coordinate import table_times
from ..flow.rows import in_batches
from ..schedules.constructors import Schedule
from ..solvers.solver import SolverLike
from .arriving_error import Weight, check_weight, measure_errors
from .judged import POINTS, judged_art
from .mixture import RUNS
from .on_path import STENCIL
from .stiffness import Average, ClockKind, StiffnessTable, check_process

__all__ = [
    "StiffnessTable",
    "art",
    "cost",
    "error_table",
    "lower_bound",
    "stiffness_table",
]


THRIFTY_POINTS = 32
"""Times of the reference paths of `art`, one evaluation each."""


def stiffness_table(
    flow: ProbabilityFlow,
    x_T: Tensor,
    *,
    points: int = 64,
    method: str = "rk4",
    rtol: float = 1e-6,
    batch: int | None = None,
) -> StiffnessTable:
    r"""|Q| along reference trajectories from ``x_T``: all that ART has to know.

    Args:
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape]; each gives one trajectory.
        points: Times of the table, evenly spaced in the log noise level.
        method: Integrator of the reference paths: ``"multistep"`` costs 1 evaluation a
            point, ``"heun"`` 2, ``"rk4"`` 4, ``"dopri5"`` as many as its tolerance asks
            for; forward mode adds one JVP a point.
        rtol: Tolerance of dopri5.
        batch: Trajectories integrated together; by default all. The memory that is
            needed goes with it: some 8 states a point and trajectory. The table is the
            same to round-off (for dopri5, whose trajectories share their steps, within
            its tolerance), and its ``nfe`` are those of one batch. Conditions go with
            their samples (`ProbabilityFlow.rows`).

    Returns:
        A `StiffnessTable`.

    Raises:
        TypeError: If ``flow`` is no flow or ``points`` no integer.
        ValueError: If ``x_T`` or the denoiser holds NaN or the wrong shape.
    """
    options: dict[str, Any] = {"method": method, "rtol": rtol, "batch": batch}
    return stiffness_path(flow, x_T, points=points, keep=False, **options)[0]


def stiffness_path(
    flow: ProbabilityFlow,
    x_T: Tensor,
    *,
    points: int = 64,
    method: str = "rk4",
    rtol: float = 1e-6,
    batch: int | None = None,
    keep: bool = True,
    forward: bool = True,
) -> tuple[StiffnessTable, Tensor]:
    """`stiffness_table` together with the states of the paths it was read from.

    Args:
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape]; each gives one trajectory.
        points: Times of the table, evenly spaced in the log noise level.
        method: Integrator of the reference paths: ``"multistep"``, ``"heun"``,
            ``"rk4"`` or ``"dopri5"``.
        rtol: Relative (and absolute) tolerance of dopri5.
        batch: Trajectories integrated together, which bounds the memory; by default
            all.
        keep: Whether to keep the states.
        forward: Whether forward mode may be used, see
            `ProbabilityFlow.path_stiffness`.

    Returns:
        The table and the states [points, N, *shape], float64, empty if they are not
        kept. Those of more than one batch are on the CPU.

    Raises:
        TypeError: If ``flow`` is no flow or ``points`` no integer.
        ValueError: If ``x_T`` or the denoiser holds NaN or the wrong shape.
    """
    x_T, points = _checked(flow, x_T, points)
    batch = None if batch is None else positive_int(batch, "batch")
    counter = CountNFE(flow.denoiser)
    counted = flow.with_denoiser(counter)
    times = table_times(flow.process, points)
    methods: list[str] = []
    # Forward mode may fail in a later batch: then all batches use the difference.
    while not methods or (len(set(methods)) > 1 and methods[-1] == "difference"):
        values, states, methods = [], [], []
        for part, (x,) in in_batches(counted, [x_T], batch, counter=counter):
            path = part.trajectory(x, times, method=method, rtol=rtol)
            values.append(part.path_stiffness(path, forward=forward).cpu())
            if keep:
                states.append(path.states if batch is None else path.states.cpu())
            methods.append(part.acceleration_method if forward else "difference")
            del path
    table = StiffnessTable(
        flow.process,
        times,
        torch.cat(values),
        nfe=counter.nfe,
        acceleration=methods[-1],
    )
    return table, _joined(states)


def art(
    flow: ProbabilityFlow,
    x_T: Tensor,
    *,
    average: Average = "open_loop",
    solver: SolverLike | None = None,
    order: int | None = None,
    weight: Weight | Literal["auto"] = "auto",
    steps: int | Sequence[int] | None = None,
    runs: int | None = None,
    points: int | None = None,
    method: str | None = None,
    probes: int = 8,
    seed: SeedLike = 0,
    batch: int | None = None,
    progress: bool = False,
) -> Schedule:
    r"""The closed-form ART schedule of a flow.

    By default the paper's problem, in which a step leaves :math:`|Q| h^2`. With a
    ``solver`` alone the schedule for that solver: a few densities, among them those of
    :math:`|Q|` and of the solver's own error, are run for 5, 10 and 20 evaluations, or
    for the number of ``steps`` that is given, each half of the noise on what the other
    half taught, and the one is returned that is the least behind the best of them
    (`artlib.control.judged` has the details; ``provenance["density"]`` says which it
    was). With ``steps``, the best few are mixed, by exponents that further runs move.
    With a ``weight`` too, nothing is run: it is the solver's own error
    :math:`|Q_p| h^{p+1}`, each counted by what of it arrives at the end, and the
    density is :math:`|Q_p|^{1/(p+1)}`, optimal as K grows (both ours, see
    `error_table`). At a few steps no list is good for every number of them: pass
    ``steps``, or see `artlib.tune` and `artlib.refine`.

    Args:
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape]. With a ``solver`` alone the first 128
            judge too, and fewer than a hundred do not show a tail of one path in a
            hundred.
        average: See `StiffnessTable.art`; ``"paper"`` with a ``solver`` implies
            ``weight="local"``.
        solver: The solver to match; None for |Q| itself.
        order: See `error_table`.
        weight: ``"auto"``, or see `error_table`; ``"terminal"`` and ``"dual"`` imply
            ``solver="euler"`` where no solver is given.
        steps: Number of steps, or several, that the densities are judged at; only with
            a ``solver`` alone.
        runs: With ``steps``, runs of the solver at most that look for a mixture of the
            best densities, see `artlib.control.mixture`; each costs the evaluations of
            all ``steps``. By default `artlib.control.mixture.RUNS`, 60; 0 takes the
            best of the densities as it is.
        points: Times of the table; by default 64, as in `stiffness_table`; 40 with a
            ``solver`` alone.
        method: Integrator of the reference paths, see `stiffness_table`; by default
            ``"rk4"``, and ``"multistep"`` with a ``solver`` alone. If nothing is said
            of solver, weight, points and method, |Q| is that of `THRIFTY_POINTS` times
            by ``"multistep"``, with the difference along the path in place of forward
            mode: a tenth of the evaluations of `stiffness_table`, and a schedule whose
            cost was within 1 % of that of its own on problems with exact denoisers.
        probes: See `error_table`.
        seed: See `error_table`.
        batch: Trajectories computed together, which bounds the memory; by default all.
            See `stiffness_table` and `error_table`.
        progress: Whether to show a progress bar of the ``runs`` (on stderr).

    Returns:
        A `Schedule`; ``.grid(K)`` gives its timesteps for any K.

    Raises:
        TypeError: If ``solver`` is neither a name nor a step.
        ValueError: If an argument is out of range or the denoiser returns NaN.
        RuntimeError: With a weight, if the denoiser passes no gradient on.

    Example:
        >>> import artlib
        >>> target = artlib.Gaussian([0.0], [[1.0]])
        >>> process = artlib.VE()
        >>> flow = artlib.ProbabilityFlow(process, target.denoiser(process))
        >>> x_T = target.sample_prior(process, 64, seed=0)
        >>> len(artlib.art(flow, x_T).grid(10))
        11
    """
    if not isinstance(average, str) or average not in ("open_loop", "paper"):
        raise ValueError(f"average: expected 'open_loop' or 'paper', got {average!r}")
    automatic = isinstance(weight, str) and weight == "auto"
    judged = automatic and solver is not None and average == "open_loop"
    if steps is not None and not judged:
        raise ValueError(
            f"steps: got {steps!r}, but nothing is run to judge; pass a solver, and no "
            "weight"
        )
    if runs is not None and steps is None:
        raise ValueError(
            f"runs: got {runs!r} without numbers of steps; pass steps, which the runs "
            "are made with"
        )
    if judged:
        assert solver is not None
        numbers = None if steps is None else _numbers(steps)
        usual = 0 if steps is None else RUNS
        spent = usual if runs is None else positive_int(runs, "runs", minimum=0)
        x_T, count = _checked(flow, x_T, POINTS if points is None else points)
        return judged_art(
            flow,
            x_T,
            solver=solver,
            order=order,
            steps=numbers,
            runs=spent,
            points=positive_int(count, "points", minimum=STENCIL),
            method="multistep" if method is None else method,
            batch=None if batch is None else positive_int(batch, "batch"),
            progress=progress,
        )
    own: Any = "local" if automatic else weight
    check_weight(own)
    if solver is None and own == "local":
        if order is not None:
            raise ValueError(f"order: got {order} without a solver; pass solver=...")
        thrifty = automatic and points is None and method is None
        table, _ = stiffness_path(
            flow,
            x_T,
            points=(THRIFTY_POINTS if thrifty else 64) if points is None else points,
            method=("multistep" if thrifty else "rk4") if method is None else method,
            batch=batch,
            keep=False,
            forward=not thrifty,
        )
        return table.art(average)
    table = error_table(
        flow,
        x_T,
        solver="euler" if solver is None else solver,
        order=order,
        weight=own,
        points=64 if points is None else points,
        method="rk4" if method is None else method,
        probes=probes,
        seed=seed,
        batch=batch,
    )
    label = solver if isinstance(solver, str) else solver and "own step"
    kind = ", ".join(str(w) for w in (label, own != "local" and own) if w)
    notes = {"solver": label or "euler", "weight": own}
    schedule = table.art(average, provenance=notes)
    return replace(schedule, name=f"{schedule.name} ({kind})")


def _numbers(steps: Any) -> tuple[int, ...]:
    """Numbers of steps, checked."""
    several = steps if isinstance(steps, Sequence) else [steps]
    numbers = tuple(sorted({positive_int(K, "steps", minimum=2) for K in several}))
    if not numbers or isinstance(steps, str):
        raise ValueError(f"steps: expected at least one number, got {steps!r}")
    return numbers


def error_table(
    flow: ProbabilityFlow,
    x_T: Tensor,
    *,
    solver: SolverLike = "euler",
    order: int | None = None,
    weight: Weight = "local",
    points: int = 64,
    method: str = "rk4",
    probes: int = 8,
    seed: SeedLike = 0,
    batch: int | None = None,
) -> StiffnessTable:
    r"""A solver's own error per step, :math:`|Q_p| h^{p+1}`, along reference paths.

    Measured by step doubling; for Euler :math:`|Q_1| = |Q|/2`. Ours, not the paper's.

    Args:
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape].
        solver: ``"euler"``, ``"heun"``, ``"rk4"``, ``"dpmpp_2m"`` (at equal steps in
            log-SNR), or any one-step solver as a callable ``step(flow, x, t, s)`` that
            takes states x [N, *shape] from process time t to s < t (0-d float64
            tensors) and returns them. It sees one step, so no multistep method can be
            passed so.
        order: p of a callable; by default it is measured.
        weight: ``"local"``: the error where it is made. ``"terminal"``: its size at
            t_min, :math:`|J Q_p|` with J the Jacobian of the flow from there to t_min.
            ``"dual"``: its part along the error that actually arrives,
            :math:`|\langle J^T \hat e, Q_p\rangle|`, with :math:`\hat e` each sample's
            direction of the error of a run of 20 steps on the local schedule.
        points: Times of the table, evenly spaced in the log noise level.
        method: Integrator of the reference paths, see `stiffness_table`.
        probes: Random directions per sample for ``"terminal"``; exact from the number
            of dimensions on. Unused otherwise.
        seed: Of the probes.
        batch: Trajectories computed together; by default all. The memory that is
            needed goes with it, but for the probes, which are drawn at once and are
            the same whatever the batch. ``"dual"`` measures each batch twice, for its
            run follows the schedule of all; the order of a callable is measured on the
            first batch. ``nfe`` are those of one batch.

    Returns:
        A `StiffnessTable` of order p.

    Raises:
        TypeError: If ``flow`` is no flow, or ``solver`` neither a name nor a callable
            of four arguments that returns a tensor.
        ValueError: If an argument is out of its range, a value is not finite, or the
            order cannot be measured.
        RuntimeError: With a weight, if the denoiser passes no gradient on (it runs
            under ``torch.no_grad`` or ``torch.inference_mode``).
    """
    x_T, points = _checked(flow, x_T, points)
    values, p, evaluations = measure_errors(
        flow,
        x_T,
        table_times(flow.process, points),
        solver=solver,
        order=order,
        weight=weight,
        method=method,
        probes=positive_int(probes, "probes"),
        seed=seed,
        batch=None if batch is None else positive_int(batch, "batch"),
    )
    return StiffnessTable(
        flow.process,
        table_times(flow.process, points),
        values.cpu(),
        nfe=evaluations,
        acceleration="step doubling",
        order=p,
    )


def cost(
    flow: ProbabilityFlow,
    schedule: Schedule,
    x_T: Tensor,
    *,
    points: int = 64,
    batch: int | None = None,
) -> float:
    r"""Cost :math:`C = E\int|Q|\,\theta^2\,ds` of a schedule on a flow, eq. (9).

    For several schedules make one `stiffness_table` and use its method.

    Args:
        flow: The flow.
        schedule: The schedule.
        x_T: States at ``t_max`` [N, *shape].
        points: Times of the stiffness table.
        batch: See `stiffness_table`.
    """
    check_process(schedule, check_flow(flow).process)  # before anything is spent
    return stiffness_table(flow, x_T, points=points, batch=batch).cost(schedule)


def lower_bound(
    flow: ProbabilityFlow,
    x_T: Tensor,
    *,
    clock: ClockKind = "open_loop",
    points: int = 64,
    batch: int | None = None,
) -> float:
    """Cauchy-Schwarz bound on the cost; see `StiffnessTable.lower_bound`.

    Args:
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape].
        clock: ``"open_loop"`` or ``"feedback"``.
        points: Times of the stiffness table.
        batch: See `stiffness_table`.
    """
    if not isinstance(clock, str) or clock not in ("open_loop", "feedback"):
        raise ValueError(f"clock: expected 'open_loop' or 'feedback', got {clock!r}")
    table = stiffness_table(flow, x_T, points=points, batch=batch)
    return table.lower_bound(clock)


def _joined(states: list[Tensor]) -> Tensor:
    """States [points, n, *shape] of all batches, those of several on the CPU."""
    if not states:
        return torch.empty(0)
    return states[0] if len(states) == 1 else torch.cat([s.cpu() for s in states], 1)


def _checked(flow: ProbabilityFlow, x_T: Tensor, points: int) -> tuple[Tensor, int]:
    check_flow(flow)
    return check_samples(x_T), positive_int(points, "points", minimum=5)
