"""Checkpoints of ART-RL: safetensors with a JSON header, written atomically.

A run that continues from one gives the same bits as a run that was never stopped: the
weights, their running mean, Adam's moments and the state of the random generator are
all in it, and a fingerprint of the problem refuses any other.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ._stiffness import StiffnessTable

_FORMAT = "artlib-actor-critic"
_VERSION = 1


class CheckpointError(ValueError):
    """The file is no checkpoint that this trainer can continue from."""


def fingerprint(table: StiffnessTable, options: dict[str, Any]) -> str:
    """A digest of the problem and the options, equal where a run may continue.

    Values of |Q| are rounded to six digits first, so that another thread count or
    another CPU can take a run over.
    """
    digest = hashlib.sha256()
    description = {"process": table.process.to_dict(), "options": options}
    digest.update(json.dumps(description, sort_keys=True).encode())
    digest.update(str(tuple(table.values.shape)).encode())
    size = float(table.values.norm())
    digest.update(f"{size:.6e}".encode())
    return digest.hexdigest()


def save_state(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], scalars: dict[str, Any]
) -> None:
    """Write tensors and scalars to ``path``: all of it, or nothing.

    Args:
        path: The file.
        tensors: By name, on any device.
        scalars: JSON-able values; infinities are allowed.

    Raises:
        OSError: If writing fails; an older file is then untouched.
    """
    path = Path(path)
    header = {"format": _FORMAT, "version": str(_VERSION), "state": json.dumps(scalars)}
    data = save(
        {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()},
        metadata=header,
    )
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_state(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], scalars: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint and check it against the trainer's own state.

    Args:
        path: The file.
        tensors: The trainer's tensors: names and shapes have to match.
        scalars: The trainer's scalars: names and the fingerprint have to match.

    Returns:
        Tensors and scalars of the file.

    Raises:
        CheckpointError: Naming the file and what does not fit.
        FileNotFoundError: If there is none.
    """
    name = os.fspath(path)
    try:
        with safe_open(name, framework="pt") as file:
            header = file.metadata() or {}
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{name}: truncated or no safetensors file ({error}); delete it to start "
            "again, or restore a copy"
        ) from error
    if header.get("format") != _FORMAT:
        raise CheckpointError(f"{name}: not a checkpoint of ART-RL; give another file")
    if header.get("version") != str(_VERSION):
        raise CheckpointError(
            f"{name}: written by another version of the format "
            f"({header.get('version')}, this is {_VERSION}); update artlib"
        )
    try:
        state: dict[str, Any] = json.loads(header["state"])
        same_problem = state["problem"] == scalars["problem"]
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{name}: its header is damaged; delete it") from error
    if not same_problem:
        raise CheckpointError(
            f"{name}: it belongs to another problem (other flow, x_T or options); give "
            "this run a file of its own"
        )
    wrong = [
        key
        for key, tensor in tensors.items()
        if key not in found or found[key].shape != tensor.shape
    ]
    if wrong or set(state) != set(scalars):
        raise CheckpointError(f"{name}: incomplete, {wrong[:3]} missing; delete it")
    broken = [key for key, t in found.items() if not bool(torch.isfinite(t).all())]
    if broken or math.isnan(float(state["iteration"])):
        raise CheckpointError(f"{name}: {broken[:3]} hold NaN; delete it")
    return found, state
