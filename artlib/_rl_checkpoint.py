"""Checkpoints of ART-RL: safetensors with a JSON header, written atomically.

A run that continues from one gives the same bits as a run that was never stopped: the
weights, their running mean, Adam's moments and the state of the random generator are
all in it. Options and process have to be the same to the letter; the flow and its
states are known by the lengths of their paths, to a tolerance, so that another CPU or
thread count can take a run over.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from typing import Any

import torch
from torch import Tensor

from ._state_file import StateFileError, read_state, write_state
from ._stiffness import StiffnessTable

_KIND = "artlib-actor-critic"


class CheckpointError(StateFileError):
    """The file is no checkpoint that this trainer can continue from."""


def fingerprint(table: StiffnessTable, options: dict[str, Any]) -> str:
    """A digest of the process, the options and the size of the problem."""
    description = {
        "process": table.process.to_dict(),
        "options": options,
        "shape": tuple(table.values.shape),
    }
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def path_lengths(table: StiffnessTable) -> Tensor:
    """The integral of sqrt|Q| along each path [N]: what a problem is known by."""
    return table.cumulative(table.fine_values.sqrt())[:, -1].clone()


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
    write_state(path, tensors, scalars, kind=_KIND)


def load_state(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], scalars: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint and check it against the trainer's own state.

    Args:
        path: The file.
        tensors: The trainer's tensors: names and shapes have to match, and "lengths"
            to a tolerance.
        scalars: The trainer's scalars: names and "problem" have to match.

    Returns:
        Tensors and scalars of the file.

    Raises:
        CheckpointError: Naming the file and what does not fit.
        FileNotFoundError: If there is none.
    """
    name = os.fspath(path)
    try:
        found, state = read_state(path, kind=_KIND)
    except StateFileError as error:
        raise CheckpointError(str(error)) from error
    try:
        same_problem = state["problem"] == scalars["problem"]
        intact = 0 <= state["iteration"] <= state["iterations"]
        intact = intact and math.isfinite(state["multiplier"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{name}: its header is damaged; delete it") from error
    if not intact:
        raise CheckpointError(f"{name}: damaged, its header is wrong; delete it")
    lengths = found.get("lengths", torch.zeros(0))
    if not same_problem or not _close(lengths, tensors["lengths"]):
        raise CheckpointError(
            f"{name}: it belongs to another problem (other flow, x_T or options); give "
            "this run a file of its own"
        )
    if "rng" in found and found["rng"].shape != tensors["rng"].shape:
        raise CheckpointError(
            f"{name}: it was written on another kind of device, whose random numbers "
            "are others; continue there, or start a new run"
        )
    wrong = [
        key
        for key, tensor in tensors.items()
        if key not in found or found[key].shape != tensor.shape
    ]
    if wrong or set(state) != set(scalars):
        raise CheckpointError(f"{name}: incomplete, {wrong[:3]} missing; delete it")
    return found, state


def _close(found: Tensor, own: Tensor) -> bool:
    return found.shape == own.shape and torch.allclose(found, own, rtol=1e-3)
