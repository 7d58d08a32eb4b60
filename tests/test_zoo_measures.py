"""The bridge from images to `artlib.compare`."""

import pytest
import torch

import artlib
import artlib.zoo


@pytest.fixture(scope="module")
def net():
    return artlib.zoo.features("mnist")


@pytest.fixture(scope="module")
def images():
    return artlib.zoo.mnist("sample")


def test_numbers_are_those_of_the_three_metrics(net, images):
    measure = artlib.zoo.image_measure(net, images[200:])
    samples = images[:150]
    found = measure(samples)
    assert found["frechet"] == artlib.feature_distance(samples, net)
    pair = artlib.kernel_distance(net.features(samples), net.features(images[200:]))
    assert found["kernel"] == pair.value
    assert found["score"] == artlib.class_score(net.probabilities(samples))


def test_distances_rise_and_the_score_falls_with_damage(net, images):
    measure = artlib.zoo.image_measure(net, images[200:])
    noise = torch.randn(200, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    row = [measure(images[:200] + level * noise) for level in (0.0, 0.5, 1.5)]
    for worse, better in zip(row[1:], row, strict=False):
        assert worse["frechet"] > 1.2 * better["frechet"]
        assert worse["kernel"] > better["kernel"]
        assert worse["score"] < better["score"]


def test_a_decoder_comes_before_the_features(net, images):
    plain = artlib.zoo.image_measure(net, images[200:])
    decoded = artlib.zoo.image_measure(net, images[200:], decode=lambda z: 2 * z)
    assert decoded(images[:100] / 2) == plain(images[:100])


def test_real_images_of_another_size_are_refused(net):
    with pytest.raises(ValueError, match="for the feature network lenet-mnist"):
        artlib.zoo.image_measure(net, torch.zeros(10, 3, 32, 32))
