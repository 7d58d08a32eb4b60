r"""Feature networks: what a Frechet or kernel distance of images is measured in.

FID measures in a network trained on ImageNet. For small images small networks trained
on them serve instead, and for CIFAR-10 another network trained on ImageNet, see
`artlib.zoo.imagenet`. A distance carries the name of its network: it is comparable
within this book, and with no published FID.

| name | network | trained to tell | features |
| --- | --- | --- | --- |
| `mnist` | LeNet-5 | the ten digits | 84 |
| `fashion` | two convolutions | the ten classes | 64 |
| `emoji` | the same, three colours | by which quarter turn an image is rotated | 64 |
| `imagenet` | EfficientNet-Lite0 | the thousand classes of ImageNet | 1,280 |

Emoji have no labels, so theirs learn from a task that makes its own (Gidaris et al.,
https://arxiv.org/abs/1803.07728): rotation cannot be told without knowing what a thing
looks like upright. Features are the last hidden layer, after its ReLU, scaled so that
their mean variance over the training set is 1: that is the unit of the distances. Only
those of EfficientNet-Lite0, whose weights are not ours, are as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._common.checks import check_samples
from .._common.tensor_file import (
    Rule,
    StateFileError,
    check_header,
    is_count,
    is_number,
    is_text,
    read_state,
)
from . import imagenet
from .networks import weight_file
from .shipped import CHECK_SUMS

KIND = "artlib-zoo-features"

NAMES = {"mnist": "lenet-mnist", "fashion": "cnn-fashion", "emoji": "rotation-emoji"}
"""Feature network of each data set that has one of its own."""

# Images at once: about 100 MB of activations.
_BATCH = 500


class Reference(NamedTuple):
    """What a data set looks like in a network's features.

    Attributes:
        mean: Mean of the training set's features, float64 [d].
        cov: Their covariance (division by n - 1), float64 [d, d].
        n: Number of images.
    """

    mean: Tensor
    cov: Tensor
    n: int


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling; 84 features, 10 classes.

    References:
        LeCun, Bottou, Bengio and Haffner, Proceedings of the IEEE 86 (1998) 2278.
    """

    shape = (1, 28, 28)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
        )
        self.head = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, 1, 28, 28] -> logits [n, 10]."""
        return self.head(self.body(x))


class SmallCNN(nn.Module):
    """Two 3 x 3 convolutions, each followed by a max pooling, and a hidden layer.

    Args:
        shape: Channels, height and width of an image; the last two divisible by 4.
        classes: Number of logits.
        features: Width of the hidden layer.
    """

    def __init__(
        self, shape: tuple[int, int, int], *, classes: int, features: int = 64
    ) -> None:
        super().__init__()
        self.shape = shape
        channels, height, width = shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), features),
            nn.ReLU(),
        )
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, *shape] -> logits [n, classes]."""
        return self.head(self.body(x))


BUILD: dict[str, Callable[[], LeNet | SmallCNN]] = {
    "lenet-mnist": LeNet,
    "cnn-fashion": lambda: SmallCNN((1, 28, 28), classes=10),
    "rotation-emoji": lambda: SmallCNN((3, 32, 32), classes=4),
}
"""The untrained networks by name."""


class FeatureNet:
    """A trained feature network and the statistics of its training set.

    Args:
        network: A network with ``shape``, ``body`` (to features) and ``head``.
        reference: Statistics of the training set's features.
        header: Of the weight file: ``name``, ``measure``, ``test_accuracy`` if it is
            known, and how it was trained.

    Attributes:
        name: Of the network.
        measure: Name of the Frechet distance in these features, such as LeNet-FD.
        shape: Channels, height and width of an image.
        reference: A `Reference`: (mean, cov, n).
        test_accuracy: Share of the test set that the network tells right, measured
            with the half-precision weights that are stored; None for a network that
            was trained for other classes.
        header: All that is known of it.
    """

    def __init__(
        self,
        network: LeNet | SmallCNN | imagenet.LiteNet,
        reference: Reference,
        header: dict[str, Any],
    ) -> None:
        self.network = network.requires_grad_(False).eval()
        self.reference = reference
        self.header = header
        self.name: str = header["name"]
        self.measure: str = header["measure"]
        self.shape = network.shape
        self.test_accuracy: float | None = header.get("test_accuracy")

    def to(self, device: torch.device | str) -> FeatureNet:
        """Move the network (not the reference, which the metrics move); self."""
        self.network.to(device)
        return self

    def features(self, images: Tensor) -> Tensor:
        """The last hidden layer.

        Args:
            images: [N, *shape], floating point, in [-1, 1]; values beyond are clamped,
                as when an image is stored.

        Returns:
            float32 [N, d], all >= 0, on the network's device.

        Raises:
            TypeError: If ``images`` is no floating-point tensor.
            ValueError: If it has another shape, no image, or a NaN.
        """
        return self._in_batches(self.network.body, images)

    def logits(self, images: Tensor) -> Tensor:
        """What the classifier says, before the softmax: float32 [N, classes].

        Args:
            images: As for `features`.

        Raises:
            TypeError: As `features`.
            ValueError: As `features`.
        """
        return self._in_batches(self.network, images)

    def probabilities(self, images: Tensor) -> Tensor:
        """Softmax of the logits in float64, [N, classes]: input of `class_score`.

        Args:
            images: As for `features`.

        Raises:
            TypeError: As `features`.
            ValueError: As `features`.
        """
        return torch.softmax(self.logits(images).double(), dim=1)

    @torch.no_grad()
    def _in_batches(self, part: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        images = check_samples(images, "images")
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"images: expected [N, {', '.join(map(str, self.shape))}] for the "
                f"feature network {self.name}, got {tuple(images.shape)}; another data "
                f"set has another network, one of {sorted(NAMES)}"
            )
        network = self.network
        device = network.head.weight.device
        size = network.batch if isinstance(network, imagenet.LiteNet) else _BATCH
        return torch.cat(
            [
                part(piece.to(device, torch.float32).clamp(-1.0, 1.0))
                for piece in images.split(size)
            ]
        )


def features(
    name: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> FeatureNet:
    """The trained feature network of a data set.

    Args:
        name: ``"mnist"``, ``"fashion"`` or ``"emoji"``, or the path of a weight file
            written by ``python -m artlib.zoo.train_features``; or ``"imagenet"``, for
            CIFAR-10: EfficientNet-Lite0, from the packages of the extra ``imagenet``.
        device: Where to put it.

    Raises:
        ValueError: If there is no network of that name, or what was fetched is
            another file.
        FileNotFoundError: If the weight file is missing.
        ConnectionError: If it is not on this machine and cannot be fetched.
        StateFileError: If it is damaged, of another kind or not what it should be.
        ImportError: If ``"imagenet"`` is asked for and is not installed.

    Example:
        >>> import artlib
        >>> net = artlib.zoo.features("fashion")
        >>> net.features(artlib.zoo.fashion_mnist("sample")).shape
        torch.Size([400, 64])
    """
    path = _path(name)
    if path.is_file() and imagenet.is_reference(path):
        mean, cov, header = imagenet.read_reference(path)
        reference = Reference(mean, cov, header["reference_n"])
        return FeatureNet(imagenet.build(), reference, header).to(device)
    tensors, header = read_state(path, kind=KIND, known=CHECK_SUMS)
    rules: dict[str, Rule] = {
        "name": lambda name: is_text(name) and name in BUILD,
        "reference_n": lambda n: is_count(n, least=2),
    }
    check_header(header, path, rules)
    try:
        reference = Reference(
            tensors.pop("reference.mean").double(),
            tensors.pop("reference.cov").double(),
            header["reference_n"],
        )
        network = BUILD[header["name"]]()
        network.load_state_dict({key: t.float() for key, t in tensors.items()})
        size = network.head.in_features
        if (reference.mean.shape, reference.cov.shape) != ((size,), (size, size)):
            raise ValueError(
                f"reference.mean and .cov are not those of {size} features"
            )
    except (KeyError, RuntimeError, ValueError) as error:
        raise StateFileError(
            f"{path}: its tensors do not fit the network of its header; train or fetch "
            f"it again ({str(error).splitlines()[0]})"
        ) from error
    rules = {
        "measure": is_text,
        "test_accuracy": lambda a: is_number(a) and 0 <= a <= 1,
    }
    check_header(header, path, rules)
    return FeatureNet(network, reference, header).to(device)


def _path(name: str | os.PathLike[str]) -> Path:
    if Path(name).suffix == ".safetensors":
        return Path(name)
    if str(name) == "imagenet":
        if (path := weight_file(imagenet.FILE)) is None:
            raise FileNotFoundError(
                "imagenet: its reference is not packaged; measure it with: "
                "python -m artlib.zoo.measure_imagenet"
            )
        return path
    if str(name) not in NAMES:
        raise ValueError(
            f"name: expected one of {[*NAMES, 'imagenet']} or the path of a "
            f".safetensors file, got {str(name)!r}"
        )
    path = weight_file(NAMES[str(name)])
    if path is None:
        raise FileNotFoundError(
            f"{name}: its weights are not packaged; train it with: "
            f"python -m artlib.zoo.train_features {NAMES[str(name)]}"
        )
    return path
