"""Where paths really lead: what the samples of a comparison are measured against.

They cost more than all else in a comparison, so they can be kept in a file, batch by
batch, with a few numbers by which flow and noise are known again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .._common.checks import check_samples, finite_float, got, positive_int
from .._common.files import check_output
from .._common.tensor_file import StateFileError, read_state, write_state
from ..flow.flow import ProbabilityFlow, check_flow
from ..flow.rows import in_batches
from ..solvers.sample import sample
from .file import PROBED, Origin, probe_grid
from .slices import Slice

_KIND = "artlib-references"


def references(
    flow: ProbabilityFlow,
    noises: Sequence[Tensor],
    *,
    rtol: float = 1e-5,
    batch: int = 256,
    file: str | os.PathLike[str] | None = None,
    seconds: float | None = None,
    progress: bool = False,
) -> list[Tensor]:
    """Where the paths from each noise really lead, by dopri5.

    Args:
        flow: The flow.
        noises: States at ``t_max``, one tensor [N, *shape] per seed.
        rtol: Relative and absolute tolerance.
        batch: Samples solved together (they share their steps).
        file: A safetensors file that keeps every batch when it is done; what is in it
            is not computed again.
        seconds: Stop after the batch in which so much time is over, if more are to be
            done; with ``file``, from which the same call goes on.
        progress: Whether to show a progress bar (on stderr).

    Returns:
        float64 tensors of the same shapes.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of its range, or the file holds references of
            another process, denoiser, noise, tolerance or batch.
        StateFileError: If the file is damaged or something else.
        PausedError: If the seconds are over; what is done is in the file.
    """
    check_flow(flow)
    tolerance = finite_float(rtol, "rtol", positive=True)
    batch = positive_int(batch, "batch")
    noises = checked_noises(noises)
    slice_ = Slice(seconds, file)
    if not noises:
        return []
    kept: dict[str, Tensor] = {}
    header: dict[str, Any] = {"rtol": tolerance, "batch": batch}
    if file is not None:
        check_output(file)
        header["origin"] = asdict(origin_of(flow, noises))
        kept = _kept(file, header)
    parts = {
        f"{seed} {first}": part
        for seed, noise in enumerate(noises)
        for first, part in zip(
            range(0, len(noise), batch), in_batches(flow, [noise], batch), strict=True
        )
    }
    todo = [name for name in parts if name not in kept]
    bar = tqdm(todo, desc="references", disable=not progress)
    for number, name in enumerate(bar, start=1):
        own, (x_T,) = parts[name]
        kept[name] = sample(own, x_T, solver="dopri5", rtol=tolerance, atol=tolerance)
        if file is not None:
            write_state(file, kept, header, kind=_KIND)
            slice_.check(number, len(todo), "batches")
    return [
        torch.cat(
            # What was read from the file is on the CPU.
            [kept[f"{seed} {i}"].to(noise.device) for i in range(0, len(noise), batch)]
        )
        for seed, noise in enumerate(noises)
    ]


def checked_noises(noises: Any, name: str = "noises") -> list[Tensor]:
    """Every seed's tensor checked, before anything is spent on the first.

    Raises:
        TypeError: If it is no list of tensors.
        ValueError: If one of them is no batch of finite samples.
    """
    single = isinstance(noises, Tensor) and noises.ndim < 3
    if single or not isinstance(noises, Iterable):
        raise TypeError(
            f"{name}: expected a list with a tensor [N, *shape] for each seed, got "
            f"{got(noises)}; put a single one into brackets"
        )
    return [check_samples(x, f"{name}[{k}]") for k, x in enumerate(noises)]


def origin_of(flow: ProbabilityFlow, noises: Sequence[Tensor]) -> Origin:
    """What flow and noises are known by."""
    probe = sample(flow, noises[0][:PROBED], probe_grid(flow.process))
    return Origin.of(flow, noises, None, probe)


def _kept(file: str | os.PathLike[str], header: dict[str, Any]) -> dict[str, Tensor]:
    """What a file holds, if it is of the same call."""
    path = Path(file)
    if not path.exists():
        return {}
    tensors, found = read_state(path, kind=_KIND)
    try:
        theirs, own = (Origin(**h["origin"]) for h in (found, header))
        differs = own.difference(theirs)
    except (KeyError, TypeError) as error:
        raise StateFileError(
            f"{path}: damaged, its header says nothing of what made it ({error!r}); "
            "delete it, and it is made again"
        ) from error
    differs = differs or next(
        (name for name in ("rtol", "batch") if found.get(name) != header[name]), None
    )
    if differs:
        raise ValueError(
            f"file: {path} belongs to another comparison: {differs} differs; "
            "name another file, or delete this one"
        )
    return tensors
