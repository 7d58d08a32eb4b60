r"""What a sampler leaves at the end, from the same noise as an accurate solution.

For few steps the local error says little: what counts is
:math:`e_i = \lVert x_0^{(i)} - x_0^{ref,(i)} \rVert / \sqrt d` of each noise i. All
that moves nodes and levels one by one (`artlib.refine`, `artlib.tell`, `artlib.tune`)
asks for these numbers, on noise that it may learn from and on noise that is held out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .._common.checks import check_samples, finite_float
from ..flow.denoisers import CountNFE
from ..flow.flow import ProbabilityFlow
from ..flow.noise_coordinate import table_times
from ..flow.rows import in_batches
from ..solvers.integrate import integrate
from ..solvers.solver import SolverLike

REFERENCE_POINTS = 96
"""Times of the RK4 reference, even in the log noise level."""

_CHECKED = 4  # samples on which the reference is compared with a coarser one


@dataclass(frozen=True)
class Size:
    """Errors of samples in three numbers, per coordinate.

    Attributes:
        rms: Root of the mean square.
        mean: Mean of the norms; a few noises with large errors weigh less.
        median: Median of the norms.
    """

    rms: float
    mean: float
    median: float

    @classmethod
    def of(cls, errors: np.ndarray) -> Size:
        """Of the errors of samples [N]; infinite if one is not finite."""
        if not np.isfinite(errors).all():
            return cls(math.inf, math.inf, math.inf)
        root = float(np.sqrt(np.mean(errors**2)))
        return cls(root, float(errors.mean()), float(np.median(errors)))

    def no_worse_than(self, other: Size) -> bool:
        """Whether rms and median are both at most those of another."""
        return self.rms <= other.rms and self.median <= other.median


@dataclass(frozen=True)
class Noise:
    """Samples, with their accurate ends and the flow that has their conditions.

    Attributes:
        flow: The flow.
        x: States at t_max [N, *shape], float64.
        ends: Accurate x_0 of the same noise [N, *shape], float64.
        batch: Samples computed together; None for all.
        counter: Counts the network's evaluations, those of one batch.
        given: Whether the ends came from outside.
    """

    flow: ProbabilityFlow
    x: Tensor
    ends: Tensor
    batch: int | None
    counter: CountNFE
    given: bool = False

    def parts(self) -> Iterator[Noise]:
        """Batches."""
        split = in_batches(
            self.flow, (self.x, self.ends), self.batch, counter=self.counter
        )
        for flow, (x, ends) in split:
            yield Noise(flow, x, ends, None, self.counter)

    def rows(self, rows: slice) -> Noise:
        """Some of the samples, with their conditions."""
        flow = self.flow.rows(rows, len(self.x))
        return replace(self, flow=flow, x=self.x[rows], ends=self.ends[rows])

    def squares(
        self, nodes: Tensor, solver: SolverLike, told: Tensor | None = None
    ) -> Tensor:
        """Mean squared error per coordinate of each sample [N]; keeps a graph."""
        try:
            y = integrate(self.flow, self.x, nodes, solver, told=told)
        except ValueError as error:
            if "NaN or infinite" not in str(error):
                raise
            return torch.full((len(self.x),), math.inf, dtype=torch.float64)
        return (y - self.ends).flatten(1).square().mean(1)

    def errors(
        self, nodes: Tensor, solver: SolverLike, told: Tensor | None = None
    ) -> np.ndarray:
        """Root mean squared error per coordinate of each sample [N]."""
        with torch.no_grad():
            found = [p.squares(nodes, solver, told).sqrt().cpu() for p in self.parts()]
        return np.asarray(torch.cat(found).numpy())

    def size(
        self, nodes: Tensor, solver: SolverLike, told: Tensor | None = None
    ) -> Size:
        """Size of the errors."""
        return Size.of(self.errors(nodes, solver, told))


def matched_noise(
    flow: ProbabilityFlow,
    x_T: Tensor,
    reference: Tensor | None,
    batch: int | None,
) -> Noise:
    """Noise with its accurate ends, integrated here unless they are given.

    Args:
        flow: The flow.
        x_T: States at t_max [N, *shape].
        reference: Accurate x_0 of the same noise, or None: RK4 on `REFERENCE_POINTS`
            times.
        batch: Samples computed together; None for all.

    Raises:
        TypeError: If a tensor is none.
        ValueError: If it holds NaN, or the shapes differ.
    """
    x = check_samples(x_T).detach().double()
    given, counter = reference is not None, CountNFE(flow.denoiser)
    counted = flow.with_denoiser(counter)
    if reference is None:
        ends = []
        for part, (start,) in in_batches(counted, [x], batch, counter=counter):
            ends.append(_end(part, start, REFERENCE_POINTS))
        reference = torch.cat(ends)
    reference = check_samples(reference, "reference").detach().double().to(x.device)
    if reference.shape != x.shape:
        raise ValueError(
            f"reference: expected the shape of x_T, {tuple(x.shape)}, got "
            f"{tuple(reference.shape)}; it is x_0 of the same noise, row by row"
        )
    return Noise(counted, x, reference, batch, counter, given)


def _end(flow: ProbabilityFlow, x: Tensor, points: int) -> Tensor:
    """x_0 of RK4 on the times of a table, and from the last one by Euler's step."""
    times = table_times(flow.process, points)
    path = flow.trajectory(x, times)
    return path.states[-1] - path.times[-1] * path.velocities[-1]


def check_reference(noise: Noise, found: float) -> float:
    """Warn if the ends are not accurate enough to judge errors of a size.

    RK4 on half of the times errs sixteen times as much, so that a fifteenth of the
    difference estimates the error of the ends. Ends that were given are compared with
    it as they are.

    Args:
        noise: The noise; its ends may be given ones.
        found: Mean error of what is judged, per coordinate.

    Returns:
        The estimate, root mean square per coordinate; NaN where it cannot be made.
    """
    few = noise.rows(slice(min(_CHECKED, noise.batch or _CHECKED)))
    try:
        with torch.no_grad():
            coarse = _end(few.flow, few.x, REFERENCE_POINTS // 2)
    except ValueError:  # a denoiser that is not defined everywhere; the ends were given
        return math.nan
    own = float((coarse - few.ends).square().mean().sqrt()) / (1 if few.given else 15)
    if own > 0.2 * found:
        warnings.warn(
            f"reference: it is accurate to about {own:.2g} per coordinate, and errors "
            f"of {found:.2g} are judged by it; pass reference=artlib.references(flow, "
            "[x_T])[0]",
            stacklevel=3,
        )
    return own


def halves(noise: Noise, held_out_share: float) -> tuple[Noise, Noise]:
    """The noise to learn from, and the part that is held out.

    Raises:
        ValueError: If one of the two would be empty.
    """
    share, n = check_share(held_out_share, len(noise.x)), len(noise.x)
    cut = min(max(round((1 - share) * n), 1), n - 1)
    return noise.rows(slice(cut)), noise.rows(slice(cut, None))


def check_share(held_out_share: float, n: int) -> float:
    """The share that is held out of n samples, before anything is spent on them.

    Raises:
        ValueError: If one of the two parts would be empty.
    """
    share = finite_float(held_out_share, "held_out_share", positive=True)
    if share >= 1 or n < 2:
        raise ValueError(
            f"held_out_share: a share of {share} of {n} samples leaves none on one of "
            "the two sides; pass a share within (0, 1) and at least two samples"
        )
    return share
