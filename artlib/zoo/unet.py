r"""A small U-Net for EDM-preconditioned diffusion models of small images.

The raw network F of Karras et al., :math:`D = c_{skip} x + c_{out} F(c_{in} x,
c_{noise})`: residual blocks on two resolutions, modulated by the noise level. Pixels
are first folded into channels (space to depth), which quarters the cost at no loss of
information; there is no attention, so that forward mode works everywhere and two CPU
cores train it.

References:
    Ronneberger et al., https://arxiv.org/abs/1505.04597 (the shape); Karras et al.,
    https://arxiv.org/abs/2206.00364, Table 1 (the preconditioning, applied by
    `artlib.from_edm`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_GROUPS = 8
_WAVES = 32
"""Pairs of sine and cosine in the embedding of the noise level."""


@dataclass(frozen=True)
class UNetConfig:
    """Size of a `UNet`.

    Attributes:
        shape: Channels, height and width of a sample; after folding by ``patch``
            height and width are at least 2.
        widths: Channels at the full and at the halved (folded) resolution, multiples
            of 8.
        blocks: Residual blocks per resolution, each way.
        patch: Side of the squares of pixels that are folded into channels.
        embedding: Width of the embedding of the noise level.
        dropout: Probability inside the residual blocks.
    """

    shape: tuple[int, int, int]
    widths: tuple[int, int] = (32, 112)
    blocks: int = 1
    patch: int = 2
    embedding: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        _, height, width = self.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"patch: {self.patch} does not divide the image of {height} x {width} "
                "pixels; pad the images, or choose a divisor"
            )
        if min(height, width) // self.patch < 2:
            raise ValueError(
                f"patch: {self.patch} leaves fewer than 2 x 2 places of {height} x "
                f"{width} pixels; choose a smaller one"
            )
        if any(width % _GROUPS for width in self.widths):
            raise ValueError(
                f"widths: expected multiples of {_GROUPS}, got {self.widths}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `from_dict`."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> UNetConfig:
        """Inverse of `to_dict`.

        Args:
            data: What `to_dict` returned, possibly through JSON.
        """
        shape, widths = tuple(data["shape"]), tuple(data["widths"])
        return UNetConfig(**{**data, "shape": shape, "widths": widths})


class _Block(nn.Module):
    """Two convolutions; the noise level scales and shifts between them."""

    def __init__(self, inputs: int, outputs: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(_GROUPS, inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(config.embedding, 2 * outputs)
        self.norm_out = nn.GroupNorm(_GROUPS, outputs)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_out = _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = (
            nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.conv_in(functional.silu(self.norm_in(x)))
        scale, shift = self.modulation(level)[:, :, None, None].chunk(2, dim=1)
        h = functional.silu(self.norm_out(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv_out(self.dropout(h))


class UNet(nn.Module):
    r"""The raw network ``F(c_in x, c_noise)``.

    At the start of training its output is 0, so that D is the best linear denoiser of
    white data.

    Args:
        config: Its size.
    """

    rates: Tensor

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        fine, coarse = config.widths
        pixels = config.shape[0] * config.patch**2
        # Made on the CPU: on the device "meta" this would load a compiler.
        rates = torch.linspace(0, math.log(64), _WAVES, device="cpu").exp()
        rates = rates.to(torch.get_default_device())
        self.register_buffer("rates", rates, persistent=False)
        self.embed = nn.Sequential(
            nn.Linear(2 * _WAVES, config.embedding),
            nn.SiLU(),
            nn.Linear(config.embedding, config.embedding),
            nn.SiLU(),
        )
        self.stem = nn.Conv2d(pixels, fine, 3, padding=1)
        self.down_fine = self._blocks(fine, fine)
        self.down = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.down_coarse = self._blocks(coarse, coarse)
        self.middle = _Block(coarse, coarse, config)
        self.up_coarse = self._blocks(2 * coarse, coarse)
        self.up = nn.Conv2d(coarse, fine, 3, padding=1)
        self.up_fine = self._blocks(2 * fine, fine)
        self.norm = nn.GroupNorm(_GROUPS, fine)
        self.out = _zero(nn.Conv2d(fine, pixels, 3, padding=1))

    def _blocks(self, inputs: int, outputs: int) -> nn.ModuleList:
        sizes = [inputs] + [outputs] * (self.config.blocks - 1)
        return nn.ModuleList(_Block(size, outputs, self.config) for size in sizes)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        r"""The raw prediction.

        Args:
            x: :math:`c_{in} x` [n, *shape].
            noise: :math:`c_{noise} = \tfrac14 \log\sigma`, one number, or one per
                sample as [n] or [n, 1, 1, 1].

        Returns:
            [n, *shape].

        Raises:
            ValueError: If ``x`` has another shape than the network was made for.
        """
        shape = self.config.shape
        if x.ndim != 4 or tuple(x.shape[1:]) != shape:
            raise ValueError(
                f"x: this network takes [n, {shape[0]}, {shape[1]}, {shape[2]}], got "
                f"{tuple(x.shape)}; check channels and size of the samples"
            )
        level = self._embedding(noise.reshape(-1), len(x))
        h = self.stem(functional.pixel_unshuffle(x, self.config.patch))
        for block in self.down_fine:
            h = block(h, level)
        fine, size = h, h.shape[-2:]
        h = self.down(h)
        for block in self.down_coarse:
            h = block(h, level)
        h = torch.cat([self.middle(h, level), h], dim=1)
        for block in self.up_coarse:
            h = block(h, level)
        h = torch.cat([self.up(functional.interpolate(h, size=size)), fine], dim=1)
        for block in self.up_fine:
            h = block(h, level)
        h = self.out(functional.silu(self.norm(h)))
        return functional.pixel_shuffle(h, self.config.patch)

    def _embedding(self, noise: Tensor, count: int) -> Tensor:
        phase = noise[:, None] * self.rates
        return self.embed(torch.cat([phase.cos(), phase.sin()], dim=1)).expand(
            count, -1
        )


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that starts as 0, so that each block starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
