"""Samples as a picture: a sheet of them, pixel for pixel, as a PNG file."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from torch import Tensor

from .sources import InputError

_SIDE = 640
"""Pixels that a sheet of small images is enlarged to, at most (by whole factors)."""
_PAPER = 255
_FOREIGN = (".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".svg", ".pdf", ".tif", ".tiff")


def is_picture(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a file is to hold a picture of samples, by its name.

    Args:
        path: Of the file.
        shape: Of one sample.

    Raises:
        InputError: If it is the name of a picture that is not made here, or the
            samples are no images.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _FOREIGN:
        raise InputError(
            f"--output: pictures are written as .png, and samples as .safetensors, "
            f"got {path!r}"
        )
    if suffix != ".png":
        return False
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in (1, 3)):
        raise InputError(
            f"--output: a picture has 1 or 3 channels, and the samples have the shape "
            f"{list(shape)}; name a .safetensors file (latents have to be decoded "
            "first)"
        )
    return True


def sheet(samples: Tensor) -> bytes:
    """A sheet of images, in rows from the left, as the bytes of a PNG file.

    Args:
        samples: [n, C, H, W] with C = 1 or 3, or [n, H, W]; values in [-1, 1], others
            are cut off. Small images are enlarged by a whole factor.
    """
    from matplotlib.image import imsave

    images = samples.detach().double().cpu().numpy()
    if images.ndim == 3:
        images = images[:, None]
    n, height, width = len(images), *images.shape[2:]
    columns = math.ceil(math.sqrt(n * height / width))
    rows = math.ceil(n / columns)
    gap = max(1, min(height, width) // 16)
    values = np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)
    size = (rows * (height + gap) + gap, columns * (width + gap) + gap)
    page = np.full((*size, 3), _PAPER, np.uint8)
    for k, image in enumerate(values):
        top = gap + k // columns * (height + gap)
        left = gap + k % columns * (width + gap)
        page[top : top + height, left : left + width] = np.moveaxis(image, 0, -1)
    factor = max(1, _SIDE // max(size))
    page = page.repeat(factor, 0).repeat(factor, 1)
    buffer = io.BytesIO()
    imsave(buffer, page, format="png")
    return buffer.getvalue()
