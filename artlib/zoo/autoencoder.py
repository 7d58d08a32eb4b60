r"""A small autoencoder, so that diffusion can be tried in a latent space.

An image of 28 x 28 pixels becomes 4 x 7 x 7 numbers, a quarter as many. Encoder and
decoder are trained together on the squared error, with noise added to the code, so
that codes that are near each other decode to similar images. Codes are shifted and
scaled, channel by channel, to mean 0 and standard deviation 1/2, the spread for which
EDM's preconditioning was made. (Ours; the latent models in use are trained with
perceptual and adversarial losses too, and on far more data.)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._common.checks import check_samples

LATENT_STD = 0.5
_NOISE = 0.1
"""Of the code in training, in units of its standard deviation in the batch."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Size of an `Autoencoder`.

    Attributes:
        shape: Channels, height and width of an image; the sides are multiples of 4.
        channels: Channels of a code, whose sides are a quarter of the image's.
        width: Channels inside.
    """

    shape: tuple[int, int, int] = (1, 28, 28)
    channels: int = 4
    width: int = 48

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `from_dict`."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> AutoencoderConfig:
        """Inverse of `to_dict`.

        Args:
            data: What `to_dict` returned, possibly through JSON.
        """
        return AutoencoderConfig(**{**data, "shape": tuple(data["shape"])})

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of a code."""
        return self.channels, self.shape[1] // 4, self.shape[2] // 4


class Autoencoder(nn.Module):
    """Encoder, decoder and the scale of the codes.

    Args:
        config: Its size.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        pixels, width, code = config.shape[0], config.width, config.channels
        self.encoder = nn.Sequential(
            nn.Conv2d(pixels, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            _Residual(2 * width),
            nn.Conv2d(2 * width, code, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code, 2 * width, 3, padding=1),
            _Residual(2 * width),
            _Residual(2 * width),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.PixelShuffle(2),
            _Residual(width),
            nn.Conv2d(width, 4 * pixels, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("shift", torch.zeros(code, 1, 1))
        self.register_buffer("scale", torch.ones(code, 1, 1))

    def encode(self, images: Tensor, *, batch: int = 512) -> Tensor:
        """Codes of images, without a graph.

        Args:
            images: [N, *shape] in [-1, 1].
            batch: Images at a time.

        Returns:
            [N, channels, height / 4, width / 4], float32.

        Raises:
            ValueError: If the images have another shape or are not finite.
        """
        images = self._checked(images, self.config.shape, "images")
        with torch.no_grad():
            parts = [self.encoder(part.float()) for part in images.split(batch)]
            return (torch.cat(parts) - self.shift) / self.scale

    def decode(self, codes: Tensor, *, batch: int = 512) -> Tensor:
        """Images of codes, without a graph, cut to [-1, 1].

        Args:
            codes: [N, channels, height / 4, width / 4].
            batch: Codes at a time.

        Returns:
            [N, *shape], float32.

        Raises:
            ValueError: If the codes have another shape or are not finite.
        """
        codes = self._checked(codes, self.config.latent_shape, "codes")
        with torch.no_grad():
            parts = [
                self.decoder(part.float() * self.scale + self.shift)
                for part in codes.split(batch)
            ]
            return torch.cat(parts).clamp(-1, 1)

    def loss(self, images: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the reconstruction from a noisy code.

        Args:
            images: [n, *shape].
            noise: Standard normal draws of the shape of the codes.
        """
        code = self.encoder(images)
        spread = code.detach().std((0, 2, 3), keepdim=True)
        return (self.decoder(code + _NOISE * spread * noise) - images).square().mean()

    def normalise(self, images: Tensor) -> None:
        """Set the scale of the codes from the training images [N, *shape]."""
        self.shift.zero_()
        self.scale.fill_(1)
        codes = self.encode(images)
        self.shift.copy_(codes.mean((0, 2, 3)).reshape(-1, 1, 1))
        self.scale.copy_(codes.std((0, 2, 3)).reshape(-1, 1, 1) / LATENT_STD)

    def _checked(self, x: Tensor, shape: tuple[int, int, int], name: str) -> Tensor:
        x = check_samples(x, name)
        if tuple(x.shape[1:]) != shape:
            raise ValueError(
                f"{name}: expected [N, {shape[0]}, {shape[1]}, {shape[2]}], got "
                f"{tuple(x.shape)}; check channels and size"
            )
        return x.to(self.shift.device)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(functional.silu(x))
        return x + self.second(functional.silu(h))
