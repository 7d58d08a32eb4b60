r"""Distances and scores of images in the features of a network of ours.

FID, KID and the Inception Score are formulas applied to one network trained on
ImageNet. Here the same formulas are applied to small networks trained on the data
itself (`artlib.zoo.features`), and carry the name of the network: their values may be
compared with each other, never with published FID, KID or IS.

| function | formula | of what |
| --- | --- | --- |
| `feature_distance` | Frechet distance, as in FID | samples against a training set |
| `kernel_distance` | unbiased squared MMD, as in KID | two sets of features |
| `class_score` | exp of the mean KL, as in IS | probabilities of a classifier |
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from .._common.checks import generator, positive_int
from .._common.types import SeedLike
from .distances import frechet_distance, gaussian_statistics
from .inputs import ArrayLike, as_double, rows

# How far a row of probabilities may be from summing to 1: rounding of float16.
_SUM_ROUNDING = 1e-2


class Estimate(NamedTuple):
    """A number and its uncertainty.

    Attributes:
        value: The estimate.
        standard_error: Standard deviation of the estimate, from independent blocks.
    """

    value: float
    standard_error: float


@runtime_checkable
class _FeatureNetwork(Protocol):
    """What `feature_distance` needs of a network, such as `artlib.zoo.FeatureNet`."""

    @property
    def reference(self) -> tuple[Tensor, Tensor, int]: ...

    def features(self, images: Tensor, /) -> Tensor: ...


def feature_distance(samples: Tensor, net: _FeatureNetwork) -> float:
    r"""Frechet distance between samples and a network's training set, in its features.

    .. math:: \lVert m - \mu\rVert^2 + \mathrm{tr}\bigl(C + \Sigma
              - 2 (C^{1/2} \Sigma C^{1/2})^{1/2}\bigr)

    with mean m and covariance C of the samples' features, and the stored
    :math:`(\mu, \Sigma)` of the training set. It is FID's formula, but not FID: it
    carries the name of its network (``net.measure``, such as LeNet-FD).

    The estimate is biased upwards by a term of order 1/N, so compare equal numbers of
    samples; N is at least several times the number of features for it to mean much.

    Args:
        samples: Images [N, *shape], N >= 2, in [-1, 1], on any device.
        net: A network from `artlib.zoo.features`.

    Returns:
        The squared distance, in squared units of the features.

    Raises:
        TypeError: If the samples are no floating-point tensor.
        ValueError: If they have another shape than the network's images, hold a NaN,
            or are fewer than two.

    References:
        Heusel et al., https://arxiv.org/abs/1706.08500, eq. (6).
    """
    mean, cov = gaussian_statistics(net.features(samples))
    expected_mean, expected_cov, _ = net.reference
    return frechet_distance(mean, cov, expected_mean, expected_cov)


def kernel_distance(
    a: ArrayLike, b: ArrayLike, *, block: int = 1000, seed: SeedLike = 0
) -> Estimate:
    r"""Squared maximum mean discrepancy of two sets, with the kernel of KID.

    With :math:`k(x, y) = (x^\top y / d + 1)^3` and n points of each set, the unbiased
    estimate of :math:`E\,k(a, a') + E\,k(b, b') - 2 E\,k(a, b)` is

    .. math:: \frac{\sum_{i \ne j} k(a_i, a_j) + \sum_{i \ne j} k(b_i, b_j)}{n(n-1)}
              - \frac{2}{n^2} \sum_{i, j} k(a_i, b_j) .

    Both sets are shuffled and cut into disjoint blocks of n points; the answer is the
    mean over the blocks, and their spread gives its standard error. The kernel sees
    the first three moments; on equal laws the mean is 0, so single values are often
    negative. Unlike the Frechet distance it has no bias that depends on the size.

    Args:
        a: Features [N, d] (or samples [N, *shape], flattened).
        b: Features [M, d].
        block: Points of each set per block; at most half of the smaller set.
        seed: A seed or a generator for the order.

    Returns:
        The estimate and its standard error, in the kernel's units.

    Raises:
        TypeError: If ``block`` is no integer.
        ValueError: If a set is not finite or has fewer than 4 points, their
            dimensions differ, or ``block`` is less than 2.

    References:
        Binkowski et al., https://arxiv.org/abs/1801.01401, eq. (4); Gretton et al.,
        JMLR 13 (2012) 723, eq. (3).
    """
    x, y = rows(a, "a"), rows(b, "b")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"b: expected as many features as a has, {x.shape[1]}, got {y.shape[1]}; "
            "both sets must come from the same network"
        )
    fewest = min(len(x), len(y))
    if fewest < 4:
        raise ValueError(
            f"{'a' if len(x) < 4 else 'b'}: expected at least 4 points, two for each "
            f"of two blocks, got {fewest}"
        )
    size = min(positive_int(block, "block", 2), fewest // 2)
    count = fewest // size
    rng = generator(seed)
    x, y = (
        z[torch.randperm(len(z), generator=rng, device=rng.device).to(z.device)]
        for z in (x, y)
    )
    y = y.to(x.device)
    values = torch.stack(
        [
            _unbiased_mmd2(x[k : k + size], y[k : k + size])
            for k in range(0, count * size, size)
        ]
    )
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(count))


def class_score(probabilities: ArrayLike) -> float:
    r"""How sure and how varied a classifier's answers on samples are.

    .. math:: \exp\Bigl(\frac1N \sum_i \mathrm{KL}(p_i \,\Vert\, \bar p)\Bigr),
              \qquad \bar p = \frac1N \sum_i p_i

    It is 1 if all images get the same answer, and the number of classes if each image
    is surely of one class and all classes are equally frequent. It is the formula of
    the Inception Score, applied to a classifier of our own: it is never IS, and knows
    nothing of how true to the data an image is within its class.

    Args:
        probabilities: One row per sample, [N, classes], each >= 0 and summing to 1.

    Returns:
        A number from 1 to the number of classes.

    Raises:
        ValueError: If a row is not finite, negative, or does not sum to 1.

    References:
        Salimans et al., https://arxiv.org/abs/1606.03498, section 4.
    """
    p = as_double(probabilities, "probabilities", "check the samples for NaN")
    if p.ndim != 2:
        raise ValueError(
            f"probabilities: expected [N, classes], got shape {tuple(p.shape)}"
        )
    total = p.sum(1)
    if bool((p < 0).any()) or bool(((total - 1).abs() > _SUM_ROUNDING).any()):
        raise ValueError(
            "probabilities: expected rows >= 0 that sum to 1, got a smallest entry of "
            f"{float(p.min()):.3g} and sums from {float(total.min()):.3g} to "
            f"{float(total.max()):.3g}; pass net.probabilities(images), not logits"
        )
    p = p / total[:, None]
    # xlogy is 0 where p is 0; the mean over samples is 0 only where all of them are.
    entropy_of_mean = -torch.special.xlogy(p.mean(0), p.mean(0)).sum()
    mean_entropy = -torch.special.xlogy(p, p).sum(1).mean()
    # The difference is a mean of KL divergences: below 0 only by rounding.
    return math.exp(max(0.0, float(entropy_of_mean - mean_entropy)))


def _unbiased_mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared MMD of two sets of n points, [n, d] each, 0-d."""
    n, d = x.shape
    within = sum(
        (gram.sum() - gram.diagonal().sum()) / (n * (n - 1))
        for gram in ((z @ z.mT / d + 1) ** 3 for z in (x, y))
    )
    return within - 2 * ((x @ y.mT / d + 1) ** 3).mean()
