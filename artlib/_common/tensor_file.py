"""Tensors and a header in one safetensors file, with a check sum, written atomically.

Used for checkpoints and for the weights of the zoo. Nothing is pickled; a truncated,
altered or foreign file is refused by a message that names it.

Two check sums are in a file: one of the tensors, and one of everything, that is kind,
version, header, names, types and shapes, and the first. Files of artlib 0.1.0 have only
the first, so readers also check the fields of a header, with `check_header`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .files import write_bytes


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
    metadata["sha256_of_all"] = _digest_of_all(metadata, data)
    try:
        write_bytes(path, save(data, metadata=metadata))
    except OSError as error:
        error.strerror = (
            f"{error.strerror}; nothing was written and an older file is intact: make "
            "room or choose another place, then run the same command again"
        )
        raise


def read_state(
    path: str | os.PathLike[str],
    *,
    kind: str,
    version: int = 1,
    known: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_state` wrote.

    Args:
        path: The file.
        kind: What it has to be.
        version: That this code reads.
        known: For files without a check sum of everything: what it has to be, by the
            check sum of the tensors.

    Returns:
        Tensors (on the CPU) and header.

    Raises:
        StateFileError: If it is truncated, altered, of another kind or version, or
            holds a NaN.
        FileNotFoundError: If there is none.
        PermissionError: If it may not be read.
    """
    name = os.fspath(path)
    if os.path.exists(name) and not os.path.isfile(name):
        what = "a folder" if os.path.isdir(name) else "a pipe or a device"
        raise StateFileError(f"{name}: no safetensors file but {what}; name another")
    try:
        with safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, PermissionError):
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
            f"({metadata.get('version')!r}, this is {version}); update artlib"
        )
    digest = _digest(tensors)
    if metadata.get("sha256") != digest:
        raise StateFileError(f"{name}: damaged, its check sum is wrong; delete it")
    broken = [key for key, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise StateFileError(f"{name}: {broken[:3]} hold NaN; delete it")
    try:
        header = json.loads(metadata["state"])
        whole = _digest_of_all(metadata, tensors)
    except (KeyError, ValueError, RecursionError) as error:
        raise StateFileError(f"{name}: its header is damaged; delete it") from error
    if metadata.get("sha256_of_all", (known or {}).get(digest, whole)) != whole:
        raise StateFileError(
            f"{name}: damaged, its header is not the one that it was written with; "
            "delete it and make or fetch it again"
        )
    if not isinstance(header, dict):
        raise StateFileError(f"{name}: its header is no JSON object; delete it")
    return tensors, header


Rule = Callable[[Any], bool]
"""Whether a value of a header may be what it is."""


def check_header(
    header: Mapping[str, Any], path: str | os.PathLike[str], rules: Mapping[str, Rule]
) -> None:
    """Refuse a header with a field that is missing or cannot be.

    Args:
        header: Of the file.
        path: Of the file, for the message.
        rules: By the name of the field.

    Raises:
        StateFileError: Naming file, field and value.
    """
    for name, good in rules.items():
        if name not in header:
            what = f"lacks {name}"
        elif not good(header[name]):
            what = f"has {header[name]!r:.80} for {name}"
        else:
            continue
        raise StateFileError(
            f"{os.fspath(path)}: damaged, its header {what}, which cannot be; delete "
            "it and make or fetch it again"
        )


def is_count(value: Any, *, least: int = 0) -> bool:
    """Whether a value is a whole number, and not less than the least."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any, *, positive: bool = False) -> bool:
    """Whether a value is a finite number (and > 0)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= 1e300 and (value > 0 or not positive)


def is_text(value: Any) -> bool:
    """Whether a value is text, and not empty."""
    return isinstance(value, str) and value != ""


def _digest(tensors: dict[str, Tensor]) -> str:
    """Of the values, as safetensors itself has no check sum."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        digest.update(name.encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest_of_all(metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> str:
    """Of kind, version, header, and names, types, shapes and values of the tensors.

    The header counts by its content, so that its JSON may be written in another order.

    Raises:
        KeyError: If there is no header.
        ValueError: If it is no JSON.
    """
    content = {
        "format": metadata["format"],
        "version": metadata["version"],
        "header": json.loads(metadata["state"]),
        "tensors": [[k, str(t.dtype), list(t.shape)] for k, t in tensors.items()],
        "sha256": metadata["sha256"],
    }
    content["tensors"].sort()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
