"""What the metrics take: samples and Gaussian laws, checked and in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .._common.checks import real_tensor, require_finite

ArrayLike: TypeAlias = Tensor | np.ndarray | Sequence[Any]
"""What a metric accepts: tensors on any device, arrays, nested lists of numbers."""

# Asymmetry and negative eigenvalues up to this fraction of the largest entry are the
# rounding of a covariance computed in float32; anything above it is a mistake.
_ROUNDING = 1e-5


def as_double(
    value: ArrayLike,
    name: str,
    remedy: str = "drop these samples or find out where they come from",
) -> Tensor:
    """``value`` as a finite, non-empty float64 tensor that carries no graph.

    Raises:
        TypeError: If it is or holds something else than real numbers.
        ValueError: If it is empty or not finite.
    """
    tensor = real_tensor(value, name)
    if tensor.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, which is empty")
    require_finite(tensor, name, remedy)
    return tensor


def rows(value: ArrayLike, name: str) -> Tensor:
    """Samples [N, *shape] as float64 [N, d]."""
    tensor = as_double(value, name)
    if tensor.ndim < 2:
        raise ValueError(
            f"{name}: expected samples [N, *shape], got shape {tuple(tensor.shape)}; "
            "for scalar samples use shape [N, 1]"
        )
    return tensor.flatten(1)


def numbers(value: ArrayLike, name: str) -> Tensor:
    """Samples [N] or [N, 1] as float64 [N]."""
    tensor = as_double(value, name)
    if tensor.ndim == 0 or tensor.numel() != tensor.shape[0]:
        raise ValueError(
            f"{name}: expected one-dimensional samples [N] or [N, 1], got shape "
            f"{tuple(tensor.shape)}; in more dimensions use sliced_wasserstein2, or "
            "ot.emd2 of the package POT for the exact distance of small sets"
        )
    return tensor.reshape(-1)


def mean_and_root(
    mu: ArrayLike, cov: ArrayLike, mu_name: str, cov_name: str
) -> tuple[Tensor, Tensor]:
    """Mean [d] and symmetric root of a covariance: [d, d], or [d] for a diagonal."""
    mean = as_double(mu, mu_name, "the mean must be known")
    matrix = as_double(cov, cov_name, "the covariance must be known").to(mean.device)
    d = mean.numel()
    if mean.ndim != 1 or matrix.shape not in ((d,), (d, d)):
        raise ValueError(
            f"{cov_name}: expected {mu_name} [d] and {cov_name} [d, d], or its "
            f"diagonal [d], got shapes {tuple(mean.shape)} and {tuple(matrix.shape)}"
        )
    scale = float(matrix.abs().max())
    if matrix.ndim == 2:
        skew = float((matrix - matrix.mT).abs().max())
        if skew > _ROUNDING * scale:
            raise ValueError(
                f"{cov_name}: expected a symmetric matrix, got entries that differ "
                f"from their mirror image by {skew:.3g}; pass (cov + cov.T) / 2 if "
                "that is what is meant"
            )
        values, axes = torch.linalg.eigh((matrix + matrix.mT) / 2)
    else:
        values, axes = matrix, None
    if float(values.min()) < -_ROUNDING * scale:
        raise ValueError(
            f"{cov_name}: expected a positive semi-definite covariance, got a variance "
            f"of {float(values.min()):.3g} in some direction; estimate it with "
            "gaussian_statistics"
        )
    if axes is None:
        return mean, values.clamp_min(0.0).sqrt()
    # Eigenvalues below the rounding of eigh are those of a singular matrix: their
    # roots would be of the order 1e-8 where the true ones are 0.
    resolution = d * torch.finfo(torch.float64).eps * float(values.abs().max())
    root = torch.where(values > resolution, values, 0.0).sqrt()
    return mean, (axes * root) @ axes.mT
