"""The paths that a closed form is made of, kept in a file while they are computed.

A run that is interrupted, or killed, is continued by the same command: whole batches of
trajectories are read back, and only the others cost evaluations.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._common.console import say
from .._common.tensor_file import (
    StateFileError,
    check_header,
    is_count,
    is_text,
    read_state,
    write_state,
)
from ..control.closed_form import StiffnessTable
from ..flow.flow import ProbabilityFlow
from .sources import InputError

_KIND = "artlib-paths"


def digest(path: str | None) -> str | None:
    """The SHA-256 of a file, None where none is named."""
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


class KeptTable:
    """A table in the making: the trajectories that are done, in a file.

    Args:
        path: The file; if it exists, it is continued.
        problem: What the table is of, JSON-able.
        x_T: The states that the trajectories start from.

    Raises:
        InputError: If the file belongs to another problem.
        StateFileError: If it is damaged.
    """

    def __init__(self, path: str, problem: dict[str, Any], x_T: Tensor) -> None:
        known = hashlib.sha256(json.dumps(problem, sort_keys=True).encode())
        known.update(x_T.detach().cpu().contiguous().numpy().tobytes())
        self._path, self._problem = path, known.hexdigest()
        self._found: dict[str, Any] | None = None
        if not os.path.exists(path):
            return
        tensors, header = read_state(path, kind=_KIND)
        rules = {"problem": is_text, "nfe": is_count, "order": is_count}
        check_header(header, path, {**rules, "acceleration": is_text})
        if header["problem"] != self._problem:
            raise InputError(
                f"--checkpoint: {path} belongs to another problem (other source, "
                "noise or options); name another file, or delete this one"
            )
        if set(tensors) != {"times", "values"}:
            raise StateFileError(f"{path}: lacks the trajectories; delete it")
        self._found = {**tensors, **header}

    def all(
        self,
        flow: ProbabilityFlow,
        x_T: Tensor,
        batch: int,
        measure: Callable[[ProbabilityFlow, Tensor], StiffnessTable],
        *,
        say_so: bool,
    ) -> StiffnessTable:
        """The table of all trajectories; those in the file are not measured again.

        Args:
            flow: The flow.
            x_T: States at t_max [N, *shape].
            batch: Trajectories measured together.
            measure: Makes the table of some trajectories.
            say_so: Whether to say how many were found.
        """
        whole = self._read(flow)
        done = 0 if whole is None else len(whole.values)
        if done and say_so:
            say(f"{done} of {len(x_T)} trajectories found in {self._path}", error=True)
        while done < len(x_T):
            index = slice(done, min(done + batch, len(x_T)))
            part = measure(flow.rows(index, len(x_T)), x_T[index])
            if whole is not None and part.acceleration != whole.acceleration:
                # Forward mode failed only now: all trajectories by the difference.
                flow = ProbabilityFlow(
                    flow.process, flow.denoiser, acceleration="difference"
                )
                whole, done = None, 0
                continue
            whole = part if whole is None else _joined(whole, part)
            done = len(whole.values)
            self._write(whole)
        assert whole is not None
        return whole

    def _read(self, flow: ProbabilityFlow) -> StiffnessTable | None:
        found = self._found
        if found is None:
            return None
        return StiffnessTable(
            flow.process,
            found["times"],
            found["values"],
            nfe=found["nfe"],
            acceleration=found["acceleration"],
            order=found["order"],
        )

    def _write(self, table: StiffnessTable) -> None:
        header = {
            "problem": self._problem,
            "nfe": table.nfe,
            "acceleration": table.acceleration,
            "order": table.order,
        }
        tensors = {"times": table.times, "values": table.values}
        write_state(self._path, tensors, header, kind=_KIND)


def _joined(one: StiffnessTable, other: StiffnessTable) -> StiffnessTable:
    """Two tables of one flow; batches that follow each other count as one."""
    values = torch.cat([one.values, other.values])
    return replace(one, values=values, nfe=max(one.nfe, other.nfe))
