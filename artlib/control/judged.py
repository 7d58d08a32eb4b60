r"""A schedule for one solver, chosen among a few densities by the error that arrives.

A density :math:`|Q_p|^{1/(p+1)}` is optimal for the sum of local errors as K grows.
At 5 to 20 steps three things stand between that sum and what is left at the end: what
of an error arrives, whether errors at different times add up or cancel, and that steps
of such a length are not short. No one density is the best for all of it, and which is
can be told for little: a run of K steps is K evaluations. So

1. reference paths by one evaluation a time give |Q| and, for multistep solvers, the
   local error at long steps (`artlib.control.on_path`) without another evaluation;
2. the adjoint along the paths says what of it arrives, by a gradient a time;
3. candidates are :math:`|Q|^{1/2}` and :math:`|Q|^{2/3}` (on a Gaussian of one variance
   l the latter is the optimum of Euler's method: there :math:`|Q| \propto (l +
   t^2)^{-3/2}`, and the Jacobian to the end goes as :math:`(l + t^2)^{-1/2}`), the
   solver's own error where it is made, what of it and of Euler's lies along the error
   that arrives; and the formulas that need no model, of EDM, of log-SNR and the
   arctan's;
4. all are run at one number of steps, the best `FINALISTS` of them at all numbers, and
   the geometric mean of the two best densities too. Each half of the noise is run on
   grids that only the other half was asked for (cross-validation), so that all of it
   judges and none judges what it taught: a third held out, as before, does not see a
   tail of one path in fifty. The one is returned whose worst disadvantage to the best,
   over these numbers of steps, is least, in rms times mean norm, made from all paths;
5. with ``runs`` the best few are mixed, and further runs of both halves move the
   exponents of the mixture (`artlib.control.mixture`). These runs tell apart what is
   closer, so that all are judged by the ends of paths of `ENDS` times then.

All of this is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._common.precision import full_precision
from ..flow.denoisers import CountNFE
from ..flow.flow import ProbabilityFlow
from ..flow.noise_coordinate import table_times
from ..flow.processes import Process
from ..flow.reference_path import Trajectory
from ..flow.rows import in_batches
from ..schedules.constructors import edm, kl_optimal, log_snr
from ..schedules.schedule import Schedule, describe_origin
from ..solvers.solver import SOLVERS, Solver, SolverLike, solver_of
from .arriving_error import arriving, dual_gains_at_nodes
from .matched import Noise, Size
from .mixture import Candidate, Mixture, best_mixture, coordinate_of, in_words
from .on_path import path_errors
from .solver_error import SolverErrors, at_times, measure, step_of
from .stiffness import FINE, StiffnessTable

POINTS = 40
"""Times of the reference paths, evenly spaced in the log noise level."""

FINALISTS = 4
"""Candidates that are run at all numbers of steps."""

JUDGES = 128
"""Paths that judge at most."""

EVALUATIONS = (5, 10, 20)
"""Evaluations of the runs that judge, unless numbers of steps are given."""

ENDS = 96
"""Times of the paths whose ends judge mixtures, one evaluation each: the ends of
`POINTS` times are off by a quarter of what the best solvers leave at twenty steps."""

DUAL_STEPS = 20
"""Steps of the run whose error gives the direction of the dual weight."""

EXPONENTS = {"|Q|^(1/2)": 1 / 2, "|Q|^(2/3)": 2 / 3}
"""Powers of |Q| that are candidates for every solver."""


def steps_of(kind: Solver, evaluations: Sequence[int] = EVALUATIONS) -> tuple[int, ...]:
    """Numbers of steps with about so many evaluations."""
    each = kind.evaluations or 1
    return tuple(sorted({max(2, -(-n // each)) for n in evaluations}))


@full_precision()
def judged_art(
    flow: ProbabilityFlow,
    x_T: Tensor,
    *,
    solver: SolverLike,
    order: int | None = None,
    steps: Sequence[int] | None = None,
    runs: int = 0,
    points: int = POINTS,
    method: str = "multistep",
    batch: int | None = None,
    progress: bool = False,
) -> Schedule:
    """The schedule of the module.

    Args:
        flow: The flow.
        x_T: States at t_max [N, *shape]. All teach, and the first `JUDGES` judge, each
            half what the others taught; below 4 all judge what all taught.
        solver: The solver.
        order: p of a callable; None to measure it.
        steps: Numbers of steps that it is judged at; None for those of `EVALUATIONS`.
        runs: Runs at most that move the exponents of a mixture; 0 for no mixture.
        points: Times of the reference paths.
        method: Their integrator.
        batch: Paths computed together; None for all.
        progress: Whether to show a progress bar of these runs.

    Returns:
        The best candidate, with all their disadvantages in its provenance.
    """
    kind, n = solver_of(solver), len(x_T)
    step_of(solver, order)  # before anything is spent
    counter = CountNFE(flow.denoiser)
    counted = flow.with_denoiser(counter)
    times = table_times(flow.process, points)

    def paths() -> Iterator[tuple[ProbabilityFlow, Trajectory]]:
        for part, (start,) in in_batches(counted, [x_T], batch, counter=counter):
            yield part, part.trajectory(start, times, method=method)

    known = list(paths()) if batch is None or batch >= n else None
    candidates, ends = _candidates(
        flow, lambda: paths() if known is None else iter(known), kind, order
    )
    numbers = steps_of(kind) if steps is None else tuple(sorted(set(steps)))
    if runs:
        ends = _fine_ends(counted, x_T, batch, counter)
    folds = _folds(counted, x_T.double(), ends, batch, counter)
    field = _Field(folds, solver, numbers)
    candidates |= _formulas(flow.process)
    for label, candidate in candidates.items():
        field.add(label, candidate)
    field.choose()
    one, two = field.ranked()[:2]
    field.add(f"mean of {one} and {two}", _mean(candidates[one], candidates[two]))
    field.choose()
    best = field.ranked()[0]
    chosen, label, more = field.candidates[best], best, dict[str, Any]()
    if runs:
        mixture = field.mixed(candidates, runs, progress)
        chosen, label = mixture.candidate, in_words(mixture)
        more = {
            "mixed": list(mixture.labels),
            "exponents": list(mixture.exponents),
            "runs": mixture.runs,
        }
    notes = {
        "method": "closed form, judged",
        "solver": kind.name,
        "steps": list(numbers),
        "disadvantage": {k: round(v, 4) for k, v in field.disadvantages().items()},
        "density": label,
        **more,
        "trajectories": n,
        "judges": sum(len(fold.noise.x) for fold in folds),
        "folds": len(folds),
        "points": points,
        "nfe": counter.nfe,
    }
    everyone = torch.ones(n, dtype=torch.bool)
    schedule = _schedule(flow.process, chosen(everyone))
    origin = describe_origin("closed form, judged", notes)
    return replace(schedule, name=f"ART ({kind.name})", _provenance=origin)


@dataclass(frozen=True)
class _Fold:
    """Noise that judges, and which paths may be asked for what it judges."""

    noise: Noise
    asked: Tensor  # [N], bool


def _folds(
    flow: ProbabilityFlow,
    x: Tensor,
    ends: Tensor,
    batch: int | None,
    counter: CountNFE,
) -> list[_Fold]:
    """Two halves, each judged by what the others taught."""
    n, judges = len(x), min(JUDGES, len(x))
    if n < 4:
        whole = Noise(flow, x, ends, batch, counter)
        return [_Fold(whole, torch.ones(n, dtype=torch.bool))]
    folds = []
    for rows in (slice(0, judges // 2), slice(judges // 2, judges)):
        asked = torch.ones(n, dtype=torch.bool)
        asked[rows] = False
        noise = Noise(flow.rows(rows, n), x[rows], ends[rows], batch, counter)
        folds.append(_Fold(noise, asked))
    return folds


def _candidates(
    flow: ProbabilityFlow,
    paths: Callable[[], Iterator[tuple[ProbabilityFlow, Trajectory]]],
    kind: Solver,
    order: int | None,
) -> tuple[dict[str, Candidate], Tensor]:
    """Candidates that ask the paths, by label; and the ends of all paths."""
    stiffness, local, ends, found = [], [], [], order
    for part, path in paths():
        q = part.path_acceleration(path, forward=False)
        stiffness.append(_norms(q))
        errors = _errors(part, path, kind, found, q)
        found = errors.order
        local.append(at_times(part, errors.times, errors.norms(), path.times.cpu()))
        ends.append(_end(path))
        times = path.times.cpu()
    assert found is not None

    def table(rows: list[Tensor], p: int = 1) -> StiffnessTable:
        return StiffnessTable(flow.process, times, torch.cat(rows).cpu(), order=p)

    plain, own = table(stiffness), table(local, found)
    candidates = {label: _power(plain, power) for label, power in EXPONENTS.items()}
    if kind.name != "euler":
        candidates["own error"] = _power(own, 1 / (found + 1))
    nodes = own.art().grid(DUAL_STEPS)
    nodes[-1] = flow.process.t_min
    try:
        arrives: dict[str, list[Tensor]] = {"|Q|, dual": [], "own error, dual": []}
        for part, path in paths():
            q = part.path_acceleration(path, forward=False)
            both = [
                _errors(part, path, SOLVERS["euler"], None, q),
                _errors(part, path, kind, found, q),
            ]
            step = kind if kind.step is None else kind.step
            error = arriving(part, path, nodes, step)
            gains = dual_gains_at_nodes(part, path, [e.vectors for e in both], error)
            for rows, e, gain in zip(arrives.values(), both, gains, strict=True):
                norms = e.norms().to(gain) * gain
                rows.append(at_times(part, e.times, norms, times))
    except RuntimeError as failure:
        if not str(failure).startswith("weight:"):
            raise
    else:
        for (label, rows), p in zip(arrives.items(), (1, found), strict=True):
            if label == "|Q|, dual" or kind.name != "euler":
                candidates[label] = _power(table(rows, p), 1 / (p + 1))
    return candidates, torch.cat(ends)


def _power(table: StiffnessTable, power: float) -> Candidate:
    """A power of a table's mean over the paths that are asked."""

    def density(asked: Tensor) -> Tensor:
        found = table.fine_values[asked].mean(0) ** power
        return found / found.mean()

    return density


def _mean(one: Candidate, two: Candidate) -> Candidate:
    """The geometric mean of two densities."""
    return lambda asked: (one(asked) * two(asked)).sqrt()


def _errors(
    flow: ProbabilityFlow,
    path: Trajectory,
    kind: Solver,
    order: int | None,
    acceleration: Tensor,
) -> SolverErrors:
    """The solver's own error at all times of a path but the last."""
    if kind.name == "euler":
        vectors = acceleration[:-1] / 2
        nothing = vectors.new_zeros(vectors.shape[:2])
        return SolverErrors(path.times.cpu()[:-1], vectors, nothing, 1)
    if kind.history and kind.evaluations == 1:
        return path_errors(flow, path, kind)
    return measure(flow, path, kind if kind.step is None else kind.step, order)


def _norms(vectors: Tensor) -> Tensor:
    return vectors.flatten(2).norm(dim=2).T.contiguous()


def _end(path: Trajectory) -> Tensor:
    """x_0 of reference paths, by Euler's step from the last time."""
    return path.states[-1] - path.times[-1] * path.velocities[-1]


def _fine_ends(
    flow: ProbabilityFlow, x: Tensor, batch: int | None, counter: CountNFE
) -> Tensor:
    """Ends of the paths of all noises [N, *shape], over `ENDS` times."""
    times = table_times(flow.process, ENDS)
    ends = []
    for part, (start,) in in_batches(flow, [x], batch, counter=counter):
        ends.append(_end(part.trajectory(start, times, method="multistep")))
    return torch.cat(ends)


def _schedule(process: Process, density: Tensor) -> Schedule:
    times = table_times(process, FINE)
    return StiffnessTable(process, times, density[None]).art(exponent=1.0)


def _formulas(process: Process) -> dict[str, Candidate]:
    """Candidates that need no model."""
    times, found = table_times(process, FINE), {}
    for schedule in (
        edm(process, pinned=False),
        log_snr(process, pinned=False),
        kl_optimal(process),
    ):
        density = 1 / schedule.speed(schedule.clock(times))
        found[schedule.name] = _same(density / density.mean())
    return found


def _same(density: Tensor) -> Candidate:
    return lambda asked: density


class _Field:
    """Candidates and their errors at several numbers of steps."""

    def __init__(
        self, folds: Sequence[_Fold], solver: SolverLike, steps: Sequence[int]
    ) -> None:
        self.folds, self.solver, self.steps = folds, solver, steps
        self.candidates: dict[str, Candidate] = {}
        self._first = steps[len(steps) // 2]
        self._sizes: dict[str, dict[int, Size]] = {}

    def add(self, label: str, candidate: Candidate) -> None:
        """Run a candidate at the middle number of steps."""
        self.candidates[label], self._sizes[label] = candidate, {}
        self._run(label, self._first)

    def _run(self, label: str, K: int) -> None:
        if K not in self._sizes[label]:
            self._sizes[label][K] = self.run(self.candidates[label], K)

    def run(self, candidate: Candidate, K: int) -> Size:
        """Size of the errors of K steps of a density, each half's as it may ask."""
        counter = self.folds[0].noise.counter
        before, errors = counter.nfe, []
        for fold in self.folds:
            counter.nfe = before  # no sample is run twice
            grid = _schedule(fold.noise.flow.process, candidate(fold.asked)).grid(K)
            errors.append(fold.noise.errors(grid, self.solver))
        return Size.of(np.concatenate(errors))

    def _score(self, label: str, K: int) -> float:
        size = self._sizes[label][K]
        return math.sqrt(size.rms * size.mean)

    def choose(self) -> None:
        """Run the best few, and the newest, at all numbers of steps."""
        labels = list(self._sizes)
        best = sorted(labels, key=lambda label: self._score(label, self._first))
        for label in {*best[:FINALISTS], labels[-1]}:
            for K in self.steps:
                self._run(label, K)

    def _finalists(self) -> list[str]:
        """Labels of what has been run at all numbers of steps."""
        return [k for k, row in self._sizes.items() if len(row) == len(self.steps)]

    def mixed(
        self, candidates: Mapping[str, Candidate], runs: int, progress: bool
    ) -> Mixture:
        """The best mixture of those finalists that are among some candidates."""
        process = self.folds[0].noise.flow.process
        several = {k: candidates[k] for k in self._finalists() if k in candidates}
        return best_mixture(
            several,
            {k: [self._sizes[k][K] for K in self.steps] for k in several},
            lambda candidate: [self.run(candidate, K) for K in self.steps],
            coordinate_of(process, table_times(process, FINE)),
            runs=runs,
            progress=progress,
        )

    def disadvantages(self) -> dict[str, float]:
        """The largest ratio of its error to the least one there, by finalist."""
        done = {
            k: {K: self._score(k, K) for K in self.steps} for k in self._finalists()
        }
        least = {K: min(row[K] for row in done.values()) for K in self.steps}
        return {
            label: min(max(row[K] / max(least[K], 1e-300) for K in self.steps), 1e30)
            for label, row in done.items()
        }

    def ranked(self) -> list[str]:
        """Labels of the finalists, the best first."""
        worst = self.disadvantages()
        return sorted(worst, key=lambda label: worst[label])
