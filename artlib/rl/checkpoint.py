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
import re
from typing import Any

import torch
from torch import Tensor

from .._common.tensor_file import (
    Rule,
    StateFileError,
    check_header,
    is_count,
    is_number,
    is_text,
    read_state,
    write_state,
)
from ..control.stiffness import StiffnessTable

_KIND = "artlib-actor-critic"


_CRITIC_STEP = re.compile(r"critic\..*\.step")


def _is_running(value: Any) -> bool:
    """A running number of the watch, which begins as NaN or infinity."""
    return isinstance(value, float) or is_number(value)


_WATCH_RULES: dict[str, Rule] = {
    "recent": _is_running,
    "best": lambda value: _is_running(value) and not math.isnan(value),
    "warned": lambda value: isinstance(value, bool),
}
_RULES: dict[str, Rule] = {
    "iteration": is_count,
    "iterations": is_count,
    "multiplier": is_number,
    "watch": lambda value: isinstance(value, dict),
    "nfe": is_count,
    "problem": is_text,
}


class CheckpointError(StateFileError):
    """The file is no checkpoint that this trainer can continue from."""


def fingerprint(table: StiffnessTable, options: dict[str, Any]) -> str:
    """A digest of the process, the options and the size of the problem."""
    # An option that older files do not know counts only where it is not its default.
    known = {k: v for k, v in options.items() if (k, v) != ("fourier_modes", 5)}
    description = {
        "process": table.process.to_dict(),
        "options": known,
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
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    scalars: dict[str, Any],
    *,
    critic_updates: int,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint and check it against the trainer's own state.

    Args:
        path: The file.
        tensors: The trainer's tensors: names, types and shapes have to match, and
            "lengths" to a tolerance.
        scalars: The trainer's scalars: names and "problem" have to match.
        critic_updates: Steps of the critic's optimiser per iteration, by which the
            number of iterations is known a second time.

    Returns:
        Tensors and scalars of the file.

    Raises:
        CheckpointError: Naming the file and what does not fit.
        FileNotFoundError: If there is none.
    """
    name = os.fspath(path)
    try:
        found, state = read_state(path, kind=_KIND)
        check_header(state, path, _RULES)
        check_header(state["watch"], path, _WATCH_RULES)
    except StateFileError as error:
        raise CheckpointError(str(error)) from error
    done = state["iteration"]
    steps = {int(t) for key, t in found.items() if _CRITIC_STEP.fullmatch(key)}
    if done > state["iterations"] or not steps <= {done * critic_updates}:
        raise CheckpointError(
            f"{name}: damaged, its header says iteration {done} of "
            f"{state['iterations']}, its optimiser {sorted(steps)} steps of "
            f"{critic_updates} each; delete it"
        )
    same_problem = state["problem"] == scalars["problem"]
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
        if key not in found
        or (found[key].shape, found[key].dtype) != (tensor.shape, tensor.dtype)
    ]
    if wrong or set(state) != set(scalars) or set(state["watch"]) != set(_WATCH_RULES):
        raise CheckpointError(
            f"{name}: incomplete, {wrong[:3] or 'parts of its header'} missing; delete "
            "it"
        )
    return found, state


def _close(found: Tensor, own: Tensor) -> bool:
    return found.shape == own.shape and torch.allclose(found, own, rtol=1e-3)
