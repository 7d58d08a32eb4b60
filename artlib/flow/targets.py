r"""Data laws whose exact denoiser is known in closed form.

For :math:`x_t = \alpha x_0 + \sigma \epsilon` the denoiser is the posterior mean
:math:`D(x, t) = E[x_0 \mid x_t = x]`; the score is
:math:`(\alpha D - x) / \sigma^2` (Tweedie). With these laws every number of the book
has an exact answer beside it.

| law | :math:`D(x, t)` |
| --- | --- |
| `Gaussian` | :math:`m + \alpha C (\alpha^2 C + \sigma^2)^{-1} (x - \alpha m)` |
| `GaussianMixture` | the same per component, weighted by its posterior probability |
| `Empirical` | the data points' mean, weighted by their posterior probability |

The posterior probability of a component with weight w, mean m and variance v is a
softmax of :math:`\log w + \log N(x; \alpha m, \alpha^2 v + \sigma^2)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._common.checks import (
    check_samples,
    generator,
    got,
    positive_int,
    real_tensor,
    require_finite,
)
from .._common.types import SeedLike, TimeLike
from .processes import Process, as_time, check_process


def _parameter(
    value: Any,
    name: str,
) -> tuple[Tensor, torch.dtype]:
    """A parameter in float64, and the dtype of the draws that it asks for.

    Tensors and arrays of floating point keep their dtype. Numbers without one, and
    integers, are drawn in torch's default dtype, as torch makes tensors of them.
    """
    tensor = real_tensor(value, name)
    require_finite(tensor, name, "give finite parameters")
    if isinstance(value, np.ndarray):
        native = value.dtype.newbyteorder("=")
        value = torch.from_numpy(np.empty(0, native if native.itemsize <= 8 else "f8"))
    dtype = torch.as_tensor(value, device="cpu").dtype
    return tensor, dtype if dtype.is_floating_point else torch.get_default_dtype()


def _states(x: Any, shape: tuple[int, ...]) -> Tensor:
    """Check states [n, *shape]; they may carry a graph or be NaN."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"x: expected a floating-point tensor of shape [n, *{shape}], got {got(x)}"
        )
    if tuple(x.shape[1:]) != shape or x.ndim == 0:
        raise ValueError(
            f"x: expected samples of shape {shape} behind the batch "
            f"axis, got {tuple(x.shape)}"
        )
    return x


def _times(t: TimeLike, x: Tensor, name: str = "t") -> Tensor:
    """Check a time for states [n, *shape]: one number, or one for each sample."""
    time = as_time(t, x.device, name=name)
    if time.ndim == 1 and time.numel() > 1:
        raise ValueError(
            f"{name}: expected a number or one time per sample of shape "
            f"[n{', 1' * (x.ndim - 1)}], got {tuple(time.shape)}, which would be "
            f"taken for the last axis; pass {name}.reshape(-1{', 1' * (x.ndim - 1)})"
        )
    return time


class Target(ABC):
    """A data law with exact draws and an exact denoiser.

    Attributes:
        sample_shape: Shape of one sample.
        dtype: dtype of the draws; inside, denoisers work in float64.
    """

    sample_shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The denoiser as a function of the two process values.

        Args:
            x: Noisy samples [n, *sample_shape], float64.
            alpha: Signal factor, broadcastable against ``x``, float64.
            sigma: Noise standard deviation, likewise.

        Returns:
            Posterior mean of the clean sample, [n, *sample_shape].
        """

    @abstractmethod
    def _draw(self, n: int, rng: torch.Generator) -> Tensor:
        """``n`` exact float64 draws on the generator's device."""

    def sample(self, n: int, *, seed: SeedLike = 0) -> Tensor:
        """Exact draws of the data.

        Args:
            n: How many.
            seed: A seed or a generator; the draws live on the generator's device.

        Returns:
            Samples [n, *sample_shape].
        """
        draws = self._draw(positive_int(n, "n"), generator(seed))
        return draws.to(self.dtype)

    def sample_prior(self, process: Process, n: int, *, seed: SeedLike = 0) -> Tensor:
        r"""Exact draws of :math:`x_T = \alpha x_0 + \sigma \epsilon` at ``t_max``.

        This is the law from which the exact flow leads back to the data; the usual
        :math:`N(0, \sigma_{max}^2)` is only close to it.

        Args:
            process: The noising process.
            n: How many.
            seed: A seed or a generator; the draws live on the generator's device.

        Returns:
            Noisy samples [n, *sample_shape].
        """
        check_process(process)
        rng = generator(seed)
        x_0 = self._draw(positive_int(n, "n"), rng)
        noise = torch.randn(
            x_0.shape, generator=rng, dtype=torch.float64, device=x_0.device
        )
        alpha, sigma = process.alpha(process.t_max), process.sigma(process.t_max)
        x_t = float(alpha) * x_0 + float(sigma) * noise
        return x_t.to(self.dtype)

    def denoiser(self, process: Process) -> TargetDenoiser:
        """The exact denoiser D(x, t) of this law under a process.

        Raises:
            TypeError: If ``process`` is none.
        """
        return TargetDenoiser(self, process)


class TargetDenoiser:
    """The exact denoiser of a `Target`: a callable ``D(x, t)``.

    It computes in float64 and returns the dtype of ``x``, so that in float32 the only
    error is the rounding of its answer.

    Attributes:
        target: The data law.
        process: The noising process.
        sample_shape: Shape of one sample.
    """

    def __init__(self, target: Target, process: Process) -> None:
        self.target = target
        self.process = check_process(process)
        self.sample_shape = target.sample_shape

    def __call__(self, x: Tensor, t: TimeLike) -> Tensor:
        """Posterior mean of x_0.

        Args:
            x: Noisy samples [n, *sample_shape].
            t: Process time, a number, 0-d, or broadcastable against ``x``.

        Returns:
            Denoised samples, in the shape and dtype of ``x``.

        Raises:
            TypeError: If ``x`` is no floating-point tensor or ``t`` no number.
            ValueError: If ``x`` does not hold samples of this law's shape, or ``t`` is
                a row of several times.
        """
        x = _states(x, self.sample_shape)
        t = _times(t, x)
        mean = self.target.posterior_mean(
            x.to(torch.float64), self.process.alpha(t), self.process.sigma(t)
        )
        return mean.to(x.dtype)


class Gaussian(Target):
    r"""The normal law :math:`N(m, C)`, any covariance, also a singular one.

    Args:
        mean: Mean [d].
        cov: Covariance [d, d], symmetric and positive semi-definite.

    Raises:
        ValueError: If the shapes do not fit, or ``cov`` is not symmetric, not positive
            semi-definite or not finite.
    """

    def __init__(
        self, mean: Tensor | Sequence[float], cov: Tensor | Sequence[Sequence[float]]
    ) -> None:
        (mean, dtype), (cov, other) = _parameter(mean, "mean"), _parameter(cov, "cov")
        if mean.ndim != 1 or cov.shape != (mean.numel(), mean.numel()):
            raise ValueError(
                "Gaussian: expected mean [d] and cov [d, d], got shapes "
                f"{tuple(mean.shape)} and {tuple(cov.shape)}; for independent "
                "coordinates pass torch.diag(variances)"
            )
        self.dtype = torch.promote_types(dtype, other)
        self.mean, self.cov = mean, cov
        scale = float(self.cov.abs().max())
        if not torch.allclose(self.cov, self.cov.T, rtol=0, atol=1e-6 * scale):
            raise ValueError("cov: expected a symmetric matrix; pass (cov + cov.T) / 2")
        self.variances, self.axes = torch.linalg.eigh((self.cov + self.cov.T) / 2)
        if float(self.variances.min()) < -1e-6 * scale:
            raise ValueError(
                "cov: expected a positive semi-definite matrix, got an eigenvalue of "
                f"{float(self.variances.min()):.3g}"
            )
        # Round-off of a singular matrix; its root would be a spread of 1e-8.
        round_off = mean.numel() * torch.finfo(torch.float64).eps * scale
        self.variances[self.variances < round_off] = 0.0
        self.sample_shape = (mean.numel(),)

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        mean, axes = self.mean.to(x.device), self.axes.to(x.device)
        variances = self.variances.to(x.device)
        gain = alpha * variances / (alpha**2 * variances + sigma**2)
        return mean + (gain * ((x - alpha * mean) @ axes)) @ axes.T

    def flow_map(
        self, process: Process, x: Tensor, t_from: TimeLike, t_to: TimeLike
    ) -> Tensor:
        r"""Exact solution of the probability-flow ODE from one time to another.

        Along each eigenvector of C with variance v the centred coordinate scales as
        :math:`\sqrt{\alpha^2 v + \sigma^2}`.

        Args:
            process: The noising process.
            x: States at ``t_from``, [n, d].
            t_from: Time of ``x``, > 0 where C is singular.
            t_to: Time wanted; 0 is allowed.

        Returns:
            States at ``t_to`` [n, d], in the dtype of ``x``.

        Raises:
            TypeError: If an argument is of another type.
            ValueError: If ``x`` does not hold samples of this law's shape, or a time is
                a row of several.
        """
        check_process(process)
        x = _states(x, self.sample_shape)
        mean, axes = self.mean.to(x.device), self.axes.to(x.device)
        variances = self.variances.to(x.device)

        def alpha_and_std(t: TimeLike, name: str) -> tuple[Tensor, Tensor]:
            t = _times(t, x, name)
            alpha = process.alpha(t)
            return alpha, torch.sqrt(alpha**2 * variances + process.sigma(t) ** 2)

        alpha_a, std_a = alpha_and_std(t_from, "t_from")
        alpha_b, std_b = alpha_and_std(t_to, "t_to")
        centred = (x.double() - alpha_a * mean) @ axes
        return (alpha_b * mean + (centred * (std_b / std_a)) @ axes.T).to(x.dtype)

    def _draw(self, n: int, rng: torch.Generator) -> Tensor:
        d = self.mean.numel()
        z = torch.randn(n, d, generator=rng, dtype=torch.float64, device=rng.device)
        mean, axes = self.mean.to(rng.device), self.axes.to(rng.device)
        return mean + (z * self.variances.to(rng.device).sqrt()) @ axes.T


class GaussianMixture(Target):
    r"""A mixture :math:`\sum_i w_i N(\mu_i, s_i^2 I)` of round normal laws.

    Args:
        means: Component means [M, d].
        stds: Component standard deviations [M], >= 0.
        weights: Component weights [M], >= 0; they are normalised to sum to 1.

    Raises:
        ValueError: If the shapes do not fit or a parameter is out of its range.
    """

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        stds: Tensor | Sequence[float],
        weights: Tensor | Sequence[float],
    ) -> None:
        means, self.dtype = _parameter(means, "means")
        stds, weights = _parameter(stds, "stds")[0], _parameter(weights, "weights")[0]
        components = means.shape[0] if means.ndim == 2 else 0
        if not components or stds.shape != (components,) or weights.shape != stds.shape:
            raise ValueError(
                "GaussianMixture: expected means [M, d], stds [M], weights [M], got "
                f"shapes {tuple(means.shape)}, {tuple(stds.shape)}, "
                f"{tuple(weights.shape)}"
            )
        if bool((stds < 0).any()):
            raise ValueError(
                f"stds: expected standard deviations >= 0, got {float(stds.min())}; a "
                "point has 0"
            )
        if bool((weights < 0).any()) or float(weights.sum()) <= 0:
            raise ValueError(
                f"weights: expected >= 0 and not all 0, got {got(weights.tolist())}; "
                "they need not sum to 1"
            )
        self.means, self.stds, self.weights = means, stds, weights / weights.sum()
        self.sample_shape = (means.shape[1],)

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        means, stds = self.means.to(x.device), self.stds.to(x.device)
        log_weights = torch.log(self.weights.to(x.device))
        variance = alpha**2 * stds**2 + sigma**2  # [M] or [n, M]
        distance = _squared_distances(x, means, alpha)
        logits = (
            log_weights
            - 0.5 * x.shape[1] * torch.log(variance)
            - distance / (2 * variance)
        )
        posterior = torch.softmax(logits, dim=1)
        # D = sum_i p_i [mu_i + k_i (x - alpha mu_i)] with the gain k_i of component i.
        gain = alpha * stds**2 / variance
        kept = (posterior * (1 - alpha * gain)) @ means
        return kept + (posterior * gain).sum(1, keepdim=True) * x

    def _draw(self, n: int, rng: torch.Generator) -> Tensor:
        device = rng.device
        chosen = torch.multinomial(
            self.weights.to(device), n, replacement=True, generator=rng
        )
        shape = (n, *self.sample_shape)
        z = torch.randn(shape, generator=rng, dtype=torch.float64, device=device)
        return self.means.to(device)[chosen] + self.stds.to(device)[chosen, None] * z


class Empirical(Target):
    """The empirical law of a data set: each of its points with equal probability.

    The exact flow of this law leads every noise to one of the points (up to the last
    t_min), so it shows what a perfectly trained, perfectly memorising network does.

    Args:
        data: The points [M, *sample_shape].

    Raises:
        ValueError: If there is no point, or one is not finite.
    """

    def __init__(self, data: Tensor) -> None:
        data = check_samples(data, "data").detach()
        self.dtype = data.dtype
        self.sample_shape = tuple(data.shape[1:])
        self.points = data.double().flatten(1)

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        points = self.points.to(x.device)
        alpha, sigma = (_flat_coefficient(c) for c in (alpha, sigma))
        distance = _squared_distances(x.flatten(1), points, alpha)
        posterior = torch.softmax(-distance / (2 * sigma**2), dim=1)
        return (posterior @ points).reshape(x.shape)

    def _draw(self, n: int, rng: torch.Generator) -> Tensor:
        chosen = torch.randint(
            self.points.shape[0], (n,), generator=rng, device=rng.device
        )
        points = self.points.to(rng.device)[chosen]
        return points.reshape(n, *self.sample_shape)


def _flat_coefficient(c: Tensor) -> Tensor:
    """A per-sample coefficient [n, 1, ..., 1] as [n, 1]; a 0-d one as it is."""
    return c.flatten(1) if c.ndim > 2 else c


def _squared_distances(x: Tensor, points: Tensor, alpha: Tensor) -> Tensor:
    """Squared distances [n, M] of x [n, d] to alpha * points [M, d].

    Expanded into a matrix product: one pass, forward-mode differentiable, and exact
    enough in float64. The term |x|^2 cancels in the softmax of equally wide components
    but not of unequal ones, so it stays.
    """
    cross = x @ points.T
    return (
        (x**2).sum(1, keepdim=True) - 2 * alpha * cross + alpha**2 * (points**2).sum(1)
    )
