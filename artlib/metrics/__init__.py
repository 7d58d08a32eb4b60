"""Distances between samples and laws, in state space and between features."""

from .distances import (
    frechet_distance,
    gaussian_statistics,
    sliced_wasserstein2,
    terminal_error,
    wasserstein2,
    wasserstein2_gaussian,
)
from .features import class_score, feature_distance, kernel_distance

__all__ = [
    "class_score",
    "feature_distance",
    "frechet_distance",
    "gaussian_statistics",
    "kernel_distance",
    "sliced_wasserstein2",
    "terminal_error",
    "wasserstein2",
    "wasserstein2_gaussian",
]
