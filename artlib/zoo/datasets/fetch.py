"""Finding a data set: cached, installed, or (only if asked) downloaded.

A set is known by the SHA-256 of its decoded content, not of the file that brought it:
mirrors pack the same pictures differently. Whatever is found is checked against it
before anything is returned or put in the cache. What comes from the network is not even
decoded before each file has proved to be the one that was published.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..._common.files import write_bytes
from ..cache import LARGEST, download, folders
from .decode import FormatError, Images, content_hash


@dataclass(frozen=True)
class Source:
    """One place where a data set may come from.

    Attributes:
        where: The files, in the order ``decode`` takes them: paths or addresses.
        decode: From the content of these files to images and labels.
        files: SHA-256 of each file, or SHA-1 where that is what its publisher names it
            by; empty where copies may be packed differently.
    """

    where: tuple[str, ...]
    decode: Callable[[Sequence[bytes]], Images]
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """What is needed to find a data set and to recognise it.

    Attributes:
        name: Name of the loader and of the file in the cache.
        sha256: `content_hash` of the whole set.
        installed: Sources on this machine, tried in order.
        online: The public source, used only with ``download=True``.
        install: What to do to have it without a download by this library.
    """

    name: str
    sha256: str
    installed: Sequence[Source]
    online: Source
    install: str


def find(data: DataSet, *, download: bool) -> Images:
    """The whole set from the first place that has it, cached for the next call.

    Raises:
        FileNotFoundError: If no copy is installed and ``download`` is false.
        ConnectionError: If the download fails.
        ValueError: If what was downloaded is another set; nothing of it is kept.
    """
    for folder in folders():
        cached = _read_cached(folder / f"{data.name}.safetensors")
        if cached is not None and content_hash(*cached) == data.sha256:
            return cached
    rejected = []
    for source in data.installed:
        paths = [Path(place) for place in source.where]
        if not all(path.is_file() for path in paths):
            continue
        try:
            images = _checked(data, source, [_read(path) for path in paths])
        except (FormatError, OSError) as error:
            rejected.append(f"{paths[0]} is {error}")
            continue
        # A full disk or a read-only home costs the next call time, no more.
        with contextlib.suppress(OSError):
            _cache(data, images)
        return images
    if not download:
        found = "".join(f"; {line}" for line in rejected) or " on this machine"
        raise FileNotFoundError(
            f"artlib.zoo.{data.name}: the full set was not found{found}; "
            f'{data.install}, or pass download=True, or split="sample" for the 400 '
            "images that come with artlib"
        )
    files = [_download(data.name, address) for address in data.online.where]
    try:
        images = _checked(data, data.online, files)
    except FormatError as error:
        raise ValueError(
            f"artlib.zoo.{data.name}: {data.online.where[0]} is {error}; nothing of it "
            f"was kept; {data.install}"
        ) from error
    with contextlib.suppress(OSError):
        _cache(data, images)
    return images


def _read(path: Path) -> bytes:
    if (size := path.stat().st_size) > LARGEST:
        raise FormatError(f"too large ({size} bytes)")
    return path.read_bytes()


def _checked(data: DataSet, source: Source, files: Sequence[bytes]) -> Images:
    """What the files hold; they are not decoded unless they are the published ones."""
    for name, content, published in zip(
        source.where, files, source.files, strict=False
    ):
        algorithm = "sha1" if len(published) == 40 else "sha256"
        found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
        if found != published:
            raise FormatError(
                f"another file than was published ({Path(name).name}: "
                f"{algorithm.upper()} {found[:12]}, expected {published[:12]})"
            )
    images = source.decode(files)
    found = content_hash(*images)
    if found != data.sha256:
        raise FormatError(
            f"another set or version (SHA-256 {found[:12]}, expected "
            f"{data.sha256[:12]})"
        )
    return images


def _read_cached(path: Path) -> Images | None:
    """A file of this cache; None if it is absent or damaged, to be made again."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("images"), file.get_tensor("labels")
    except (OSError, SafetensorError):
        return None


def _cache(data: DataSet, images: Images) -> None:
    content = save({"images": images[0].contiguous(), "labels": images[1]})
    for folder in folders()[:1]:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / f"{data.name}.safetensors", content)


def _download(name: str, address: str) -> bytes:
    try:
        return download(address)
    except ConnectionError as error:
        raise ConnectionError(
            f"artlib.zoo.{name}: {address} could not be read ({error}); check the "
            "network, or install the set and call again without download=True"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"artlib.zoo.{name}: {address} has {error}, which the data set has not; "
            "nothing of it was kept"
        ) from error
