"""Tensors and a header in one safetensors file, with a check sum, written atomically.

Used for checkpoints and for the weights of the zoo. Nothing is pickled; a truncated,
altered or foreign file is refused by a message that names it.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ._files import write_bytes


class StateFileError(ValueError):
    """The file is not what it is expected to be; the message says what to do."""


def write_state(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    header: dict[str, Any],
    *,
    kind: str,
    version: int = 1,
) -> None:
    """Write tensors and a header: all of it, or nothing.

    Args:
        path: The file.
        tensors: By name, on any device.
        header: JSON-able.
        kind: What the file is, checked by `read_state`.
        version: Of the header's form.

    Raises:
        OSError: If writing fails (a full disk); an older file is then untouched.
    """
    data = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    metadata = {
        "format": kind,
        "version": str(version),
        "state": json.dumps(header),
        "sha256": _digest(data),
    }
    try:
        write_bytes(path, save(data, metadata=metadata))
    except OSError as error:
        error.strerror = (
            f"{error.strerror}; nothing was written and an older file is intact: make "
            "room or choose another place, then run the same command again"
        )
        raise


def read_state(
    path: str | os.PathLike[str], *, kind: str, version: int = 1
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_state` wrote.

    Args:
        path: The file.
        kind: What it has to be.
        version: That this code reads.

    Returns:
        Tensors (on the CPU) and header.

    Raises:
        StateFileError: If it is truncated, altered, of another kind or version, or
            holds a NaN.
        FileNotFoundError: If there is none.
    """
    name = os.fspath(path)
    try:
        with safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise StateFileError(
            f"{name}: truncated or no safetensors file ({error}); delete it and make "
            "or fetch it again"
        ) from error
    if metadata.get("format") != kind:
        raise StateFileError(f"{name}: not a file of the kind {kind!r}; give another")
    if metadata.get("version") != str(version):
        raise StateFileError(
            f"{name}: written by another version of the format "
            f"({metadata.get('version')}, this is {version}); update artlib"
        )
    if metadata.get("sha256") != _digest(tensors):
        raise StateFileError(f"{name}: damaged, its check sum is wrong; delete it")
    broken = [key for key, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise StateFileError(f"{name}: {broken[:3]} hold NaN; delete it")
    try:
        header: dict[str, Any] = json.loads(metadata["state"])
    except (KeyError, ValueError) as error:
        raise StateFileError(f"{name}: its header is damaged; delete it") from error
    return tensors, header


def _digest(tensors: dict[str, Tensor]) -> str:
    """Of the values, as safetensors itself has no check sum."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        digest.update(name.encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
