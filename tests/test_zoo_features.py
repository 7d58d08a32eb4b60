"""The packaged feature networks, what is claimed of them, and how they are trained."""

import json
import math

import pytest
import torch

from artlib import class_score, feature_distance, kernel_distance, zoo
from artlib._common.errors import TrainingError
from artlib._common.tensor_file import StateFileError, write_state
from artlib.metrics.distances import frechet_distance, gaussian_statistics
from artlib.zoo import features
from artlib.zoo.features import KIND, NAMES, SmallCNN
from artlib.zoo.networks import WEIGHTS
from artlib.zoo.train_features import (
    RECIPES,
    FeatureRecipe,
    fit,
    labelled,
    main,
    normalise,
    train,
)

EACH = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def nets():
    return {name: features(name) for name in NAMES}


def sample(name):
    return zoo.DATASETS[name]("sample")


def noisy(images, level):
    rng = torch.Generator().manual_seed(0)
    return images + level * torch.randn(images.shape, generator=rng)


def blurred(images, times):
    """Averaged over neighbours (1 2 1) in both directions, so many times."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (kernel[:, None] * kernel).expand(images.shape[1], 1, 3, 3)
    for _ in range(times):
        padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
        images = torch.nn.functional.conv2d(padded, kernel, groups=images.shape[1])
    return images


# What is claimed.


@EACH
def test_the_accuracy_on_the_sample_is_the_one_stated(nets, name):
    images, labels = labelled(name, "sample")
    right = nets[name].logits(images).argmax(1) == labels
    stated = nets[name].test_accuracy
    error = math.sqrt(stated * (1 - stated) / 400)
    assert abs(float(right.double().mean()) - stated) < 4 * error


@pytest.mark.parametrize(
    ("name", "least"), [("mnist", 0.97), ("fashion", 0.90), ("emoji", 0.75)]
)
def test_the_networks_have_learnt(nets, name, least):
    assert nets[name].test_accuracy > least


@EACH
def test_the_record_beside_the_weights_is_that_of_the_weights(nets, name):
    record = json.loads((WEIGHTS / f"{NAMES[name]}.json").read_text())
    assert nets[name].header.items() <= record.items()
    recipe = RECIPES[NAMES[name]]
    assert record["recipe"] == json.loads(json.dumps(vars(recipe)))
    assert len(record["loss_per_epoch"]) == recipe.epochs


@EACH
def test_the_reference_has_mean_variance_one(nets, name):
    mean, cov, count = nets[name].reference
    assert count == {"mnist": 9000, "fashion": 60_000, "emoji": 3481}[name]
    assert torch.equal(cov, cov.mT)
    assert float(torch.linalg.eigvalsh(cov).min()) > -1e-6
    # The factor is applied before the weights are rounded to half precision.
    assert float(cov.diagonal().mean()) == pytest.approx(1.0, abs=2e-3)
    assert float(mean.min()) >= 0.0


@EACH
def test_the_reference_is_that_of_the_training_set(nets, name):
    try:
        images = zoo.DATASETS[name]("train")
        test = zoo.DATASETS[name]("test")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    net = nets[name]
    if name == "fashion":  # all 60,000 take too long for a test
        mean, cov = gaussian_statistics(net.features(images[::20]))
        error = (net.reference.cov.diagonal() / len(images[::20])).sqrt()
        assert float(((mean - net.reference.mean) / (error + 1e-4)).abs().max()) < 5
        return
    mean, cov = gaussian_statistics(net.features(images))
    assert torch.allclose(mean, net.reference.mean, atol=1e-4)
    assert torch.allclose(cov, net.reference.cov, atol=1e-3)
    stated = net.header["distance_of_the_test_set"]
    assert feature_distance(test, net) == pytest.approx(stated, rel=1e-2, abs=1e-4)


# What it measures.


@EACH
def test_halves_of_the_sample_are_near_and_damage_is_far(nets, name):
    net, images = nets[name], sample(name)
    one, other = (gaussian_statistics(net.features(images[k::2])) for k in (0, 1))
    halves = frechet_distance(*one, *other)
    for damage in (noisy(images, 0.5), blurred(images, 4)):
        damaged = gaussian_statistics(net.features(damage))
        whole = gaussian_statistics(net.features(images))
        assert frechet_distance(*damaged, *whole) > halves


@EACH
@pytest.mark.parametrize(
    "damage", [lambda x, k: noisy(x, 0.2 * k), lambda x, k: blurred(x, 2 * k)]
)
def test_both_distances_grow_with_damage(nets, name, damage):
    net, images = nets[name], sample(name)
    versions = [damage(images, k) for k in range(4)]
    frechet = [feature_distance(version, net) for version in versions]
    assert frechet == sorted(frechet)
    # The sample was no part of the training set, yet is nearer than damaged images.
    assert frechet[0] < 0.5 * frechet[-1]
    clean = net.features(images[::2])
    kernel = [
        kernel_distance(net.features(version[1::2]), clean, block=100)
        for version in versions
    ]
    assert abs(kernel[0].value) < 5 * kernel[0].standard_error + 0.05
    assert kernel[-1].value > kernel[0].value


@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_the_class_score_of_images_and_of_noise(nets, name):
    net, images = nets[name], sample(name)
    grain = torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    score = class_score(net.probabilities(images))
    assert 7 < score <= 10
    assert class_score(net.probabilities(2 * grain - 1)) < 0.5 * score
    one_class = images[labelled(name, "sample")[1] == 1]
    assert class_score(net.probabilities(one_class)) < 0.3 * score


# How it is used.


@EACH
def test_an_image_has_its_features_whatever_is_beside_it(nets, name):
    net, images = nets[name], sample(name)
    whole = net.features(images.repeat(2, 1, 1, 1))  # more than one batch
    assert whole.dtype == torch.float32
    # Other batches, other order of the sums: equal but for rounding in float32.
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert torch.allclose(whole[395:400], net.features(images[395:]), **close)
    assert torch.allclose(whole[500:505], net.features(images[100:105]), **close)
    assert torch.allclose(whole[:3], net.features(images[:3].double()), **close)


def test_values_beyond_the_range_are_clamped_and_no_graph_is_kept(nets):
    images = sample("mnist").requires_grad_()
    found = nets["mnist"].features(3 * images)
    assert torch.equal(found, nets["mnist"].features((3 * images).clamp(-1, 1)))
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (torch.zeros(2, 3, 28, 28), ValueError, r"expected \[N, 1, 28, 28\]"),
        (torch.zeros(2, 1, 32, 32), ValueError, "feature network lenet-mnist"),
        (torch.zeros(0, 1, 28, 28), ValueError, "holds no sample"),
        (torch.full((1, 1, 28, 28), math.nan), ValueError, "784 of 784 values"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), TypeError, "uint8"),
        ([[0.0]], TypeError, "of type list"),
    ],
)
def test_what_are_no_such_images_is_refused(nets, images, error, match):
    with pytest.raises(error, match=match):
        nets["mnist"].features(images)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"expected one of .*'fashion'.*got 'cifar'"):
        features("cifar")


@pytest.mark.parametrize("damage", ["truncated", "altered", "foreign"])
def test_a_damaged_weight_file_is_refused(tmp_path, damage):
    good = (WEIGHTS / "lenet-mnist.safetensors").read_bytes()
    path = tmp_path / "net.safetensors"
    path.write_bytes(
        {
            "truncated": good[:-100],
            "altered": good[:-5] + bytes([good[-5] ^ 1]) + good[-4:],
            "foreign": b"not a weight file",
        }[damage]
    )
    with pytest.raises(StateFileError, match=r"net\.safetensors"):
        features(path)


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    tensors = SmallCNN((1, 28, 28), classes=10).state_dict()
    write_state(path, tensors, {"name": "lenet-mnist", "reference_n": 2}, kind=KIND)
    with pytest.raises(StateFileError, match=r"do not fit.*reference\.mean"):
        features(path)
    statistics = {"reference.mean": torch.ones(4), "reference.cov": torch.eye(4)}
    header = {"name": "lenet-mnist", "reference_n": 2}
    write_state(path, {**tensors, **statistics}, header, kind=KIND)
    with pytest.raises(StateFileError, match="do not fit the network"):
        features(path)


# How it is trained.

QUICK = FeatureRecipe("lenet-mnist", "mnist", "LeNet-FD", epochs=8, batch=20, rate=2e-3)


def only_samples(monkeypatch):
    """Train and test on halves of the samples, so that no data set is needed."""

    def half(split, *, return_labels=False):
        pair = zoo.mnist("sample", return_labels=True)
        images, labels = (part[split == "test" :: 2] for part in pair)
        return (images, labels) if return_labels else images

    monkeypatch.setitem(zoo.DATASETS, "mnist", half)


def test_training_learns_repeats_and_leaves_the_global_generator_alone(monkeypatch):
    only_samples(monkeypatch)
    images, labels = labelled("mnist", "train")
    state = torch.get_rng_state()
    network, losses = fit(QUICK, images, labels)
    again, _ = fit(QUICK, images, labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[-1] < 0.3 * losses[0]
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_normalised_features_have_mean_variance_one_and_the_same_logits():
    torch.manual_seed(0)
    network = SmallCNN((1, 28, 28), classes=10)
    images = sample("fashion")
    with torch.no_grad():
        before = network(images)
        normalise(network, images)
        assert torch.allclose(network(images), before, atol=1e-5)
        variance = network.body(images).double().var(0).mean()
    assert float(variance) == pytest.approx(1.0, rel=1e-5)


def test_what_is_written_is_what_is_read(monkeypatch, tmp_path):
    only_samples(monkeypatch)
    net = features(train(QUICK, tmp_path, progress=False))
    images, labels = labelled("mnist", "test")
    right = (net.logits(images).argmax(1) == labels).double().mean()
    assert net.test_accuracy == pytest.approx(float(right), abs=1e-4)
    assert net.test_accuracy > 0.6
    # Against its own training set, with the rounded weights: nothing but the rounding
    # of the stored statistics to single precision.
    assert feature_distance(labelled("mnist", "train")[0], net) < 1e-5
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [
        ".json",
        ".safetensors",
    ]


def test_a_loss_that_is_nan_writes_nothing(monkeypatch, tmp_path):
    only_samples(monkeypatch)
    wild = FeatureRecipe("lenet-mnist", "mnist", "x", epochs=2, batch=20, rate=1e30)
    with pytest.raises(TrainingError, match="epoch 1: the loss is nan"):
        train(wild, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_the_command_without_data_says_what_to_do(monkeypatch, tmp_path, capsys):
    def absent(*_, **__):
        raise FileNotFoundError("install it")

    monkeypatch.setitem(zoo.DATASETS, "mnist", absent)
    assert main(["lenet-mnist", "--quiet", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: install it\n"


def test_turned_emoji_are_labelled_by_their_quarter_turns():
    images, turns = labelled("emoji", "sample")
    upright = sample("emoji")
    assert torch.equal(images[turns == 0], upright)
    for k in range(4):
        assert torch.equal(images[turns == k].rot90(-k, (2, 3)), upright)
