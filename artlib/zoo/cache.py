"""The user's folder of the zoo: what is trained, fetched or decoded here is kept there.

The wheel holds no weights and no samples. Those that the zoo ships are fetched one by
one, when first asked for, from the repository in the state that belongs to this
version, and kept only if their SHA-256 is the listed one. Another repository or state
is named by ARTLIB_REPOSITORY and ARTLIB_REVISION, as in the first cell of a chapter.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from .._common.files import write_bytes
from .._common.version import RELEASE, REPOSITORY
from .shipped import shipped

_ZOO = Path(__file__).parent
# The largest of the files has 9 MB, and of those of a data set 26 MB.
LARGEST = 64 * 2**20
"""Bytes of any file that is read."""
_TIMEOUT = 60.0  # seconds without a byte
_BLOCK = 2**18


def folders() -> list[Path]:
    """Where data sets are cached: ``$ARTLIB_DATA`` if set, then ~/.cache/artlib."""
    chosen = os.environ.get("ARTLIB_DATA")
    # Path.home() fails for a user without a home; such a user has the variable.
    with contextlib.suppress(RuntimeError):
        home = Path.home() / ".cache" / "artlib"
        return [Path(chosen), home] if chosen else [home]
    return [Path(chosen)] if chosen else []


def kept(path: str, folder: str) -> Path | None:
    """A file that the zoo ships, where it was fetched or put before, or None.

    Args:
        path: Below ``artlib/zoo``, with slashes.
        folder: Where in the cache it is kept.
    """
    name = path.rpartition("/")[2]
    found = (place / folder / name for place in folders())
    return next((file for file in found if file.is_file()), None)


def fetch(path: str, folder: str) -> Path:
    """Fetch a file that the zoo ships, and keep it; a progress bar on a terminal.

    Args:
        path: Below ``artlib/zoo``, with slashes; listed by `shipped`.
        folder: Where in the cache to keep it.

    Returns:
        The file.

    Raises:
        ConnectionError: If it cannot be read from the repository.
        ValueError: If what came is another file; nothing of it is kept.
        FileNotFoundError: If this user has no folder for it.
        OSError: If the folder cannot be written to.
    """
    repository = os.environ.get("ARTLIB_REPOSITORY") or REPOSITORY
    repository = repository.rstrip("/").removesuffix(".git")
    asked = os.environ.get("ARTLIB_REVISION")
    what = f"artlib.zoo: {path} is not in this installation"
    clone = f"clone {repository} and install it with: pip install --editable ."
    if not (places := folders()):
        raise FileNotFoundError(
            f"{what}, and this user has no home folder to fetch it to; set ARTLIB_DATA "
            f"to a folder, or {clone}"
        )
    target = places[0] / folder / path.rpartition("/")[2]
    wanted, tried, another = shipped()[path], [], False
    # Before the release the newest state is taken; the check sum says if it is right.
    for revision in [asked] if asked else [RELEASE, "HEAD"]:
        address = f"{repository}/raw/{revision}/artlib/zoo/{path}"
        try:
            content = download(address)
        except (ConnectionError, ValueError) as error:
            tried.append(f"{address} ({error})")
            continue
        if (found := _digest(content)) == wanted:
            _keep(target, content, what)
            return target
        another = True
        tried.append(f"{address} (SHA-256 {found[:12]}, expected {wanted[:12]})")
    raise (ValueError if another else ConnectionError)(
        f"{what}, and nothing was fetched: {'; '.join(tried)}. Check the network, or "
        f"{clone}; or put the file at {target}"
    )


def sample_file(name: str) -> Path:
    """The packaged sample of a data set: of the clone, kept before, or fetched now.

    Args:
        name: Of the data set.

    Raises:
        ConnectionError: As `fetch`.
        ValueError: As `fetch`.
        OSError: As `fetch`.
    """
    path = f"datasets/samples/{name}.safetensors"
    if (file := _ZOO / path).is_file():
        return file
    found = kept(path, "samples")
    if found is None or _digest(found.read_bytes()) != shipped()[path]:
        return fetch(path, "samples")
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _keep(target: Path, content: bytes, what: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, content)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{what}, and it was fetched but not kept ({error.strerror}); make room, "
            "or set ARTLIB_DATA to a folder that can be written to",
            str(target),
        ) from error


def download(address: str) -> bytes:
    """What an address holds; a progress bar on a terminal.

    Raises:
        ConnectionError: If it cannot be read, or ends in the middle.
        ValueError: If it holds more than any file of the zoo.
    """
    try:
        return _read(address)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(error) from error


def _read(address: str) -> bytes:
    from tqdm import tqdm

    pieces, size = [], 0
    with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer:
        total = int(answer.headers.get("Content-Length") or 0) or None
        bar = tqdm(
            total=total,
            desc=address.rpartition("/")[2],
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None,  # where there is no terminal to draw it on
        )
        with bar:
            while block := answer.read(_BLOCK):
                pieces.append(block)
                size += len(block)
                bar.update(len(block))
                if size > LARGEST:
                    raise ValueError(f"more than {LARGEST} bytes")
    if total is not None and size < total:
        raise http.client.IncompleteRead(b"", total - size)
    return b"".join(pieces)
