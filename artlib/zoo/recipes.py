"""What the networks of the zoo are made of, and how each one is trained.

Sizes, data and training lengths are ours. ``fashion-base`` has the size of the network
that the paper trained on MNIST (about 4.5 MB in single precision).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .autoencoder import Autoencoder, AutoencoderConfig
from .unet import UNet, UNetConfig

DataName = Literal["fashion", "mnist", "emoji", "fashion-latent", "cifar10"]


@dataclass(frozen=True)
class Recipe(ABC):
    """A network and its training; `ScoreRecipe` and `AutoencoderRecipe` say of what.

    Attributes:
        name: Of the network, and of its weight file.
        data: What it learns.
        config: Size of the network.
        steps: Training steps.
        batch: Images per step.
        rate: Peak learning rate of Adam; warms up, then falls to 0 as a cosine.
        warm_up: Steps of the warm-up.
        ema: Decay of the exponential moving average of the weights, per step.
        seed: Of weights, batches and noise.
    """

    name: str
    data: DataName
    config: UNetConfig | AutoencoderConfig
    steps: int
    batch: int = 64
    rate: float = 1e-3
    warm_up: int = 300
    ema: float = 0.999
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def build(self) -> UNet | Autoencoder:
        """A new network, with weights from torch's global random numbers."""
        if isinstance(self.config, UNetConfig):
            return UNet(self.config)
        return Autoencoder(self.config)

    @property
    def endless(self) -> bool:
        """Whether the first steps are the same however many follow."""
        return False

    def rate_share(self, step: int, steps: int) -> float:
        """Share of the peak learning rate: a warm-up, then half a cosine down to 0.

        Args:
            step: Steps done.
            steps: Steps in all.
        """
        rise = min(1.0, (step + 1) / self.warm_up)
        return rise * 0.5 * (1 + math.cos(math.pi * step / steps))

    @abstractmethod
    def loss(
        self,
        network: UNet | Autoencoder,
        images: Tensor,
        sigma_data: float,
        rng: torch.Generator,
    ) -> Tensor:
        """Mean loss of a batch.

        Args:
            network: From `build`.
            images: [n, *shape].
            sigma_data: Standard deviation of the training data.
            rng: Generator of the noise, where it is drawn: on the CPU, so that all
                devices see the same, or on the device itself, which saves the way.

        Returns:
            0-d tensor.
        """


@dataclass(frozen=True)
class ScoreRecipe(Recipe):
    r"""A score network and its training by the EDM objective.

    The loss is :math:`E\, w(\sigma) \lVert D(x_0 + \sigma\epsilon, \sigma) - x_0
    \rVert^2` with :math:`\log\sigma \sim N(P_{mean}, P_{std}^2)` and
    :math:`w = (\sigma^2 + \sigma_d^2) / (\sigma\sigma_d)^2`; :math:`\sigma_d` is
    measured on the training data.

    Attributes:
        p_mean: :math:`P_{mean}`.
        p_std: :math:`P_{std}`.

    References:
        Karras et al., https://arxiv.org/abs/2206.00364, Table 1 and eq. (8).
    """

    p_mean: float = -1.2
    p_std: float = 1.2

    def loss(
        self,
        network: UNet | Autoencoder,
        images: Tensor,
        sigma_data: float,
        rng: torch.Generator,
    ) -> Tensor:
        noise = _normal(images.shape, images.device, rng)
        draws = _normal((len(images),), images.device, rng)
        levels = self.p_mean + self.p_std * draws
        return edm_loss(network, images, noise, levels, sigma_data)


@dataclass(frozen=True)
class PhotographRecipe(ScoreRecipe):
    r"""A score network of photographs, right at large noise too, and open-ended.

    The normal law of :math:`\log\sigma` hardly ever draws the noise that sampling
    starts from: :math:`\sigma = 80` is 4.7 standard deviations out, and a network
    that never saw it errs by a third of a pixel's range there. So a share of the levels
    is uniform in :math:`\log\sigma` over a wide range instead. Half of the images are
    mirrored. After the warm-up the learning rate stays: the moving average settles the
    weights, and a run may be stopped, or continued to more steps, at any time.

    Attributes:
        far: Share of the levels that are uniform.
        far_range: Least and largest of them.
    """

    far: float = 0.15
    far_range: tuple[float, float] = (1.0, 100.0)

    def __post_init__(self) -> None:
        """Refuse shares and ranges that are none."""
        if not 0 <= self.far <= 1:
            raise ValueError(f"far: expected a share in [0, 1], got {self.far!r}")
        least, most = self.far_range
        if not 0 < least <= most < math.inf:
            raise ValueError(
                "far_range: expected two noise levels, 0 < least <= largest, got "
                f"{self.far_range!r}"
            )

    @property
    def endless(self) -> bool:
        return True

    def rate_share(self, step: int, steps: int) -> float:
        return min(1.0, (step + 1) / self.warm_up)

    def levels(self, count: int, device: torch.device, rng: torch.Generator) -> Tensor:
        """Log noise levels of a batch.

        Args:
            count: How many.
            device: Where.
            rng: Generator, there or on the CPU.

        Returns:
            float32 [count].
        """
        near = self.p_mean + self.p_std * _normal((count,), device, rng)
        least, most = (math.log(sigma) for sigma in self.far_range)
        far = least + (most - least) * _uniform(count, device, rng)
        return torch.where(_uniform(count, device, rng) < self.far, far, near)

    def loss(
        self,
        network: UNet | Autoencoder,
        images: Tensor,
        sigma_data: float,
        rng: torch.Generator,
    ) -> Tensor:
        noise = _normal(images.shape, images.device, rng)
        levels = self.levels(len(images), images.device, rng)
        mirrored = _uniform(len(images), images.device, rng) < 0.5
        shown = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return edm_loss(network, shown, noise, levels, sigma_data)


def _normal(
    shape: tuple[int, ...], device: torch.device, rng: torch.Generator
) -> Tensor:
    """Standard normal numbers, drawn where the generator is."""
    return torch.randn(shape, generator=rng, device=rng.device).to(device)


def _uniform(count: int, device: torch.device, rng: torch.Generator) -> Tensor:
    """Numbers in [0, 1), drawn where the generator is."""
    return torch.rand(count, generator=rng, device=rng.device).to(device)


@dataclass(frozen=True)
class AutoencoderRecipe(Recipe):
    """An autoencoder and its training on the squared error."""

    def loss(
        self,
        network: UNet | Autoencoder,
        images: Tensor,
        sigma_data: float,
        rng: torch.Generator,
    ) -> Tensor:
        assert isinstance(network, Autoencoder)
        shape = (len(images), *network.config.latent_shape)
        noise = _normal(shape, images.device, rng)
        return network.loss(images, noise)


_FASHION = UNetConfig(shape=(1, 28, 28))

_ALL: tuple[Recipe, ...] = (
    ScoreRecipe(
        "fashion-small", "fashion", replace(_FASHION, widths=(16, 64)), steps=3_000
    ),
    ScoreRecipe("fashion-base", "fashion", _FASHION, steps=7_000),
    ScoreRecipe(
        "fashion-large",
        "fashion",
        replace(_FASHION, widths=(64, 192), blocks=2),
        steps=60_000,
        batch=256,
        ema=0.9995,
    ),
    ScoreRecipe("mnist-base", "mnist", _FASHION, steps=1_500),
    ScoreRecipe("emoji-base", "emoji", UNetConfig(shape=(3, 32, 32)), steps=1_500),
    AutoencoderRecipe(
        "fashion-autoencoder", "fashion", AutoencoderConfig(), steps=1_200
    ),
    ScoreRecipe(
        "fashion-latent-base",
        "fashion-latent",
        UNetConfig(shape=(4, 7, 7), widths=(64, 112), patch=1),
        steps=2_500,
    ),
    PhotographRecipe(
        "cifar10-base",
        "cifar10",
        UNetConfig(shape=(3, 32, 32), widths=(64, 176), blocks=2),
        steps=30_000,
        batch=1024,  # for a GPU; on a CPU give --batch 64 --rate 5e-4
        ema=0.9995,
    ),
)

RECIPES = {recipe.name: recipe for recipe in _ALL}
"""Every network of the zoo by name, in the order in which to train them."""


def recipe(name: str) -> Recipe:
    """The recipe of a network.

    Args:
        name: A key of `RECIPES`.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"name: expected one of {list(RECIPES)}, got {name!r}")
    return RECIPES[name]


def edm_loss(
    network: torch.nn.Module,
    images: Tensor,
    noise: Tensor,
    log_sigma: Tensor,
    sigma_data: float,
) -> Tensor:
    r"""Mean EDM loss of a batch, per pixel.

    With :math:`x = x_0 + \sigma\epsilon` it is :math:`\lVert F(c_{in} x, c_{noise}) -
    (x_0 - c_{skip} x) / c_{out} \rVert^2`, the weighted loss of `ScoreRecipe` written
    for the raw network.

    Args:
        network: The raw network F.
        images: Clean samples [n, *shape].
        noise: Standard normal draws of the same shape.
        log_sigma: Log noise levels [n].
        sigma_data: Standard deviation of the data.

    Returns:
        0-d tensor.
    """
    sigma = log_sigma.exp().reshape(-1, *[1] * (images.ndim - 1))
    total = sigma**2 + sigma_data**2
    x = images + sigma * noise
    skip, out = sigma_data**2 / total, sigma * sigma_data / total.sqrt()
    target = (images - skip * x) / out
    scaled = (x / total.sqrt()).contiguous(memory_format=torch.channels_last)
    return (network(scaled, sigma.log() / 4) - target).square().mean()
