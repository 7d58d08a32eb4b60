"""What images from a sampler are measured by: a bridge to `artlib.compare`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..metrics.features import class_score, feature_distance, kernel_distance
from .features import FeatureNet


def image_measure(
    net: FeatureNet,
    real: Tensor,
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[Tensor], dict[str, float]]:
    """A measure for `artlib.compare`: two distances to real images, and a class score.

    Args:
        net: Feature network of the data set.
        real: Held-out images [M, *shape] for the kernel distance.
        decode: From samples to images, for a latent space.

    Returns:
        A function from samples [N, *shape] to ``"frechet"`` (`feature_distance`, to the
        network's training set), ``"kernel"`` (`kernel_distance`, to ``real``) and
        ``"score"`` (`class_score`).

    Raises:
        ValueError: If ``real`` does not fit the network.
    """
    real_features = net.features(real)

    def measure(samples: Tensor) -> dict[str, float]:
        images = samples if decode is None else decode(samples)
        found = net.features(images)
        return {
            "frechet": feature_distance(images, net),
            "kernel": kernel_distance(found, real_features).value,
            "score": class_score(net.probabilities(images)),
        }

    return measure
