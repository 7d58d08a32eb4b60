"""Feature metrics against exact values, brute force, and their own uncertainty."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel

import artlib
from artlib import class_score, feature_distance, kernel_distance
from artlib.metrics.distances import gaussian_statistics


def normal(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


# Kernel distance.


def test_over_all_orders_it_is_the_u_statistic_of_the_whole_sets():
    # Each pair of 4 points is as often in one block of 2 as any other.
    x, y = normal(4, 3, seed=1), 0.5 + normal(4, 3, seed=2)
    k = lambda a, b: float((a @ b / 3 + 1) ** 3)  # noqa: E731
    expected = 0.0
    for i in range(4):
        for j in range(4):
            if i != j:
                expected += (k(x[i], x[j]) + k(y[i], y[j])) / 12
            expected -= 2 * k(x[i], y[j]) / 16
    draws = [kernel_distance(x, y, block=2, seed=s).value for s in range(4000)]
    found = torch.tensor(draws)
    error = float(found.std()) / math.sqrt(len(draws))
    assert error < 0.02 * abs(expected)
    assert float(found.mean()) == pytest.approx(expected, abs=4 * error)


def test_it_is_the_u_statistic_of_scikit_learns_polynomial_kernel():
    # With n equal copies of a point in each set nothing depends on the order.
    x, y = normal(1, 6, seed=3).repeat(8, 1), normal(1, 6, seed=4).repeat(8, 1)
    kernel = lambda a, b: polynomial_kernel(a, b, degree=3, coef0=1)[0, 0]  # noqa: E731
    expected = kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)
    found = kernel_distance(x, y, block=4)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.standard_error == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("block", [2, 50])
def test_it_is_unbiased_at_every_block_size(scale, block):
    # x ~ N(0, I), y ~ N(0, s^2 I): E (x.y)^2 = s^2 d and odd moments vanish, so the
    # squared discrepancy is 3 (1 - s^2)^2 / d. With the diagonal kept (the biased
    # estimate) it would be larger by about 2 E k(x, x) / block.
    d, count = 5, 6000
    x, y = normal(count, d, seed=5), scale * normal(count, d, seed=6)
    found = kernel_distance(x, y, block=block)
    exact = 3 * (1 - scale**2) ** 2 / d
    assert abs(found.value - exact) < 4 * found.standard_error
    assert found.standard_error < 0.25


def test_its_standard_error_is_the_spread_over_independent_samples():
    estimates = [
        kernel_distance(
            normal(400, 4, seed=2 * s), 1.2 * normal(400, 4, seed=2 * s + 1), block=40
        )
        for s in range(200)
    ]
    values = torch.tensor([e.value for e in estimates])
    claimed = torch.tensor([e.standard_error for e in estimates]).square().mean().sqrt()
    # 200 values give their standard deviation to 5 %.
    assert float(claimed / values.std()) == pytest.approx(1.0, abs=0.2)


def test_it_knows_no_axes_and_repeats_with_its_seed():
    x, y = normal(60, 4, seed=7), normal(90, 4, seed=8) + 0.3
    turned = rotation(4)
    one = kernel_distance(x, y, block=10, seed=3)
    other = kernel_distance(x @ turned, y @ turned, block=10, seed=3)
    assert one.value == pytest.approx(other.value, rel=1e-10)
    assert one == kernel_distance(x, y, block=10, seed=3)
    assert one != kernel_distance(x, y, block=10, seed=4)


def test_it_grows_with_the_distance_of_the_laws():
    x, y = normal(500, 4, seed=9), normal(500, 4, seed=10)
    found = [kernel_distance(x, y + shift, block=100) for shift in (0, 0.5, 1, 2)]
    for near, far in itertools.pairwise(found):
        assert far.value - near.value > 3 * far.standard_error


@pytest.mark.parametrize(
    ("a", "b", "options", "match"),
    [
        (torch.zeros(9, 3), torch.zeros(9, 4), {}, "b: expected as many features"),
        (torch.zeros(3, 3), torch.zeros(9, 3), {}, "a: expected at least 4"),
        (torch.zeros(9, 3), torch.zeros(3, 3), {}, "b: expected at least 4"),
        (torch.zeros(9, 3), torch.full((9, 3), math.nan), {}, "b: 27 of 27 values"),
        (torch.zeros(9), torch.zeros(9, 3), {}, "a: expected samples"),
        (torch.zeros(9, 3), torch.zeros(9, 3), {"block": 1}, "block: expected at"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, options, match):
    with pytest.raises(ValueError, match=match):
        kernel_distance(a, b, **options)


# Class score.


def test_the_score_runs_from_one_to_the_number_of_classes():
    assert class_score(torch.eye(7).repeat(3, 1)) == pytest.approx(7.0, rel=1e-12)
    same = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).repeat(9, 1)
    assert class_score(same) == pytest.approx(1.0, rel=1e-12)


def test_the_score_of_two_answers_by_hand():
    p = [[0.9, 0.1], [0.1, 0.9]]
    divergence = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert class_score(p) == pytest.approx(math.exp(divergence), rel=1e-12)


def test_the_score_is_the_mean_divergence_and_knows_no_order():
    p = torch.softmax(3 * normal(200, 6, seed=11), dim=1)
    mean = p.mean(0, keepdim=True)
    expected = float((p * (p / mean).log()).sum(1).mean().exp())
    assert class_score(p) == pytest.approx(expected, rel=1e-12)
    assert class_score(p.flip(0).flip(1)) == pytest.approx(expected, rel=1e-12)
    assert class_score(p.repeat(2, 1)) == pytest.approx(expected, rel=1e-12)
    # Less sure answers score less: KL is convex.
    assert class_score(0.5 * p + 0.5 / 6) < expected


@pytest.mark.parametrize(
    ("p", "match"),
    [
        ([[2.0, -1.0]], "smallest entry of -1"),
        ([[0.7, 0.7]], "sums from 1.4 to 1.4"),
        ([[math.nan, 1.0]], "1 of 2 values are NaN"),
        ([0.5, 0.5], r"expected \[N, classes\]"),
    ],
)
def test_what_are_no_probabilities_is_refused(p, match):
    with pytest.raises(ValueError, match=match):
        class_score(p)


# Frechet distance in features, with features that are known exactly.


def linear(matrix, images):
    """A network whose features are linear, with the statistics of these images."""
    features = lambda x: x.flatten(1).double() @ matrix  # noqa: E731
    mean, cov = gaussian_statistics(features(images))
    return SimpleNamespace(features=features, reference=(mean, cov, len(images)))


def test_a_shift_costs_its_square_in_the_features():
    images, matrix = normal(300, 1, 2, 3, seed=12), normal(6, 4, seed=13)
    net = linear(matrix, images)
    assert feature_distance(images, net) == pytest.approx(0.0, abs=1e-12)
    shift = normal(6, seed=14)
    found = feature_distance(images + shift.reshape(1, 1, 2, 3), net)
    assert found == pytest.approx(float((shift @ matrix).square().sum()), rel=1e-9)


def test_a_scale_costs_the_change_of_the_standard_deviations():
    images = normal(300, 1, 2, 3, seed=15)
    images = images - images.mean(0)
    net = linear(rotation(6), images)
    expected = 0.3**2 * float(net.reference[1].trace())
    assert feature_distance(1.3 * images, net) == pytest.approx(expected, rel=1e-9)


def test_one_sample_has_no_covariance_and_is_refused():
    images = normal(9, 1, 2, 3)
    with pytest.raises(ValueError, match="at least 2 samples"):
        feature_distance(images[:1], linear(rotation(6), images))


def test_the_measures_are_public():
    assert {"class_score", "feature_distance", "kernel_distance"} <= set(artlib.__all__)
