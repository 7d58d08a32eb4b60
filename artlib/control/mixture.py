r"""A mixture of densities, its exponents moved to where a solver's error is least.

Candidates for the density of steps each get something right: where the path bends,
where a solver errs, what of that arrives. Of a few of them :math:`\rho_i` the family

.. math:: \log \rho(\lambda) = \sum_i w_i \log \rho_i(\lambda) + a\,z + b\,(z^2 - 1)
          + \text{const} ,

with z the log noise level :math:`\lambda`, of mean 0 and standard deviation 1 over the
table, holds each of them, their geometric means, sharper and flatter ones, and such
with more steps at one end or in the middle. Six numbers are too few to learn noises by
heart, whatever the number of steps, and need no gradient: Nelder and Mead's method
moves them, and a run of K steps is K evaluations.

What is least is the worst of all measures, each in units of the least of any candidate.
The measures, at each number of steps, are the median of the norms and their root mean
square: a few paths that end elsewhere make the one and not the other, and a schedule
that is good by one of them alone is not good.

All of this is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ..flow.noise_coordinate import log_level
from ..flow.processes import Process
from .matched import Size

DENSITIES = 4
"""Densities that are mixed, at most."""

RUNS = 60
"""Runs of the solver, at all numbers of steps, that move the exponents."""

Candidate: TypeAlias = Callable[[Tensor], Tensor]
"""Which paths may be asked [N], bool -> density at the times of a table, of mean 1."""

_LEAST = 1e-6  # of the mean density, so that a clock moves everywhere
_EQUAL = 1e-6  # of the root mean square: a median below it is rounding
_HOPELESS = 100.0  # of a mixture whose run is not finite
_DIVERGED = 1e30  # an error, where that of every candidate is infinite


@dataclass(frozen=True)
class Mixture:
    """The family's member.

    Attributes:
        labels: Of the densities.
        exponents: :math:`w_i`, in that order, and then a and b.
        candidate: The density itself.
        score: Log of what is least, 0 where all measures are the candidates' least.
        runs: Runs that it took.
    """

    labels: tuple[str, ...]
    exponents: tuple[float, ...]
    candidate: Candidate
    score: float
    runs: int


class Judge:
    """The worst of all measures, in units of the least ones.

    Args:
        candidates: Sizes of errors of each candidate, one for each number of steps.
    """

    def __init__(self, candidates: Sequence[Sequence[Size]]) -> None:
        rows = np.array([self._measures(sizes) for sizes in candidates])
        self._least = rows.min(axis=0).clip(max=_DIVERGED)
        roots = self._least[: len(self._least) // 2]
        self._floor = np.tile(_EQUAL * roots + 1e-300, 2)

    @staticmethod
    def _measures(sizes: Sequence[Size]) -> list[float]:
        return [size.rms for size in sizes] + [size.median for size in sizes]

    def score(self, sizes: Sequence[Size]) -> float:
        """Log of a candidate's disadvantage, negative where it is ahead in all."""
        found = np.array(self._measures(sizes))
        if not np.isfinite(found).all():
            return _HOPELESS
        logs = np.log((found + self._floor) / (self._least + self._floor))
        return min(float(logs.max()), _HOPELESS)


def mixed(
    candidates: Mapping[str, Candidate],
    exponents: Sequence[float],
    coordinate: Tensor,
) -> Candidate:
    """A member of the family.

    Args:
        candidates: The densities, by label.
        exponents: :math:`w_i` in that order, a and b.
        coordinate: z at the times of the table.
    """
    *weights, tilt, bend = exponents

    def density(asked: Tensor) -> Tensor:
        logs = tilt * coordinate + bend * (coordinate**2 - 1)
        for weight, candidate in zip(weights, candidates.values(), strict=True):
            logs = logs + weight * candidate(asked).cpu().clamp_min(_LEAST).log()
        found = (logs - logs.max()).exp()
        found = (found / found.mean()).clamp_min(_LEAST)
        return found / found.mean()

    return density


def coordinate_of(process: Process, times: Tensor) -> Tensor:
    """The log noise level at times [n], of mean 0 and standard deviation 1."""
    level = log_level(process, times.cpu())
    return (level - level.mean()) / level.std()


def best_mixture(
    candidates: Mapping[str, Candidate],
    sizes: Mapping[str, Sequence[Size]],
    run: Callable[[Candidate], Sequence[Size]],
    coordinate: Tensor,
    *,
    runs: int = RUNS,
    progress: bool = False,
) -> Mixture:
    """The best member of the family that was found.

    Args:
        candidates: Densities, by label.
        sizes: Of the errors that each of them leaves, one for each number of steps.
        run: Gives those of another density.
        coordinate: z at the times of the densities.
        runs: Runs at most.
        progress: Whether to show a progress bar (on stderr).

    Returns:
        The mixture; no candidate has a lower score.
    """
    judge = Judge(list(sizes.values()))
    scores = {label: judge.score(found) for label, found in sizes.items()}
    labels = sorted(candidates, key=lambda label: scores[label])[:DENSITIES]
    several = {label: candidates[label] for label in labels}
    best = Mixture(
        tuple(labels),
        (1.0, *[0.0] * (len(labels) + 1)),
        candidates[labels[0]],
        scores[labels[0]],
        0,
    )
    spent = 0
    bar = tqdm(total=runs, desc="mixture", unit="run", disable=not progress)

    def value(z: np.ndarray) -> float:
        nonlocal best, spent
        for label, corner in zip(labels, np.eye(len(z)), strict=False):
            if np.array_equal(z, corner):  # has been run
                return scores[label]
        if spent >= runs:
            raise StopIteration
        spent += 1
        exponents = tuple(float(v) for v in z)
        candidate = mixed(several, exponents, coordinate)
        found = judge.score(run(candidate))
        bar.update()
        if found < best.score:
            best = Mixture(tuple(labels), exponents, candidate, found, 0)
        return found

    with bar:
        _descend(value, len(labels))
    return Mixture(best.labels, best.exponents, best.candidate, best.score, spent)


def _descend(value: Callable[[np.ndarray], float], several: int) -> None:
    """Nelder and Mead's method, until it has come to rest or may run no more."""
    from scipy.optimize import minimize

    size = several + 2
    middle = np.r_[np.full(several, 1 / several), 0.0, 0.0]
    pair = np.r_[np.full(min(several, 2), 1 / min(several, 2)), np.zeros(size)][:size]
    tilted = [pair + 0.3 * axis for axis in np.eye(size)[several:]]
    corners = np.array([*np.eye(size)[:several], middle, *tilted])
    options = {"initial_simplex": corners, "xatol": 0.01, "fatol": 1e-3}
    try:
        minimize(
            value,
            corners[0],
            method="Nelder-Mead",
            options={**options, "adaptive": True, "maxfev": 10_000},
        )
    except StopIteration:
        return


def in_words(mixture: Mixture) -> str:
    """The mixture in words, for a provenance."""
    terms = [
        f"{exponent:.2f} {label}"
        for label, exponent in zip(mixture.labels, mixture.exponents, strict=False)
        if not math.isclose(exponent, 0, abs_tol=0.005)
    ]
    return "mixture: " + ", ".join(terms)
