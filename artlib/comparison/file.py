"""The file of a comparison: what made its numbers, and more than one writer.

A number is found again by solver, K and label. Whether it is the number asked for
depends on more: the process, the denoiser, the noise, the references, the grid, the
measures. Each leaves a few numbers in the file. They are compared to a tolerance, since
another processor rounds otherwise.

Cells are added by reading the file, putting them in and replacing the file, under a
lock. So two runs that share a file lose nothing of each other's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._common.files import check_output, fcntl, write_bytes
from ..flow.flow import ProbabilityFlow
from ..flow.processes import Process
from .table import Comparison, HasGrid

_PATIENCE = 60.0
"""Seconds to wait for another writer, who needs milliseconds."""

PROBED = 8
"""Samples by which a flow is known again."""

_NOISE, _ENDS, _MEASURE, _PROCESS = 1e-6, 1e-3, 1e-3, 1e-9
"""How far two may differ, relative to their size, and be the same."""


def sketch(x: Tensor) -> list[float]:
    """Four numbers by which a tensor is known again: its size and three projections."""
    flat = x.detach().cpu().double().flatten()
    places = torch.arange(len(flat), dtype=torch.float64)
    size = float(flat.square().mean().sqrt())
    along = (float(flat @ torch.cos(k * places)) for k in (1, 2, 3))
    return [size, *(number / math.sqrt(len(flat)) for number in along)]


def _same(a: Sequence[float], b: Sequence[float], tolerance: float) -> bool:
    size = max(map(abs, (*a, *b)), default=0.0)
    gaps = [abs(x - y) for x, y in zip(a, b, strict=False)]
    return len(a) == len(b) and all(gap <= tolerance * size for gap in gaps)


@dataclass(frozen=True)
class Origin:
    """What all cells of a comparison share.

    Attributes:
        process: Its class, its range, and alpha and sigma on the way.
        dtypes: Of the noise, and of the network's calls.
        noises: Shape and `sketch` for each seed.
        flow: `sketch` of where a few steps lead the first samples.
        ends: `sketch` for each seed, or None without references.
    """

    process: list[Any]
    dtypes: list[str]
    noises: list[list[float]]
    flow: list[float]
    ends: list[list[float]] | None

    @staticmethod
    def of(
        flow: ProbabilityFlow,
        noises: Sequence[Tensor],
        ends: Sequence[Tensor] | None,
        probe: Tensor,
    ) -> Origin:
        """The origin of what is measured now.

        Args:
            flow: The flow.
            noises: Its starts.
            ends: The references.
            probe: Samples of the flow from the first noise on `probe_grid`; of all of
                it or of its first `PROBED` rows.
        """
        p = flow.process
        times = torch.linspace(p.t_min, p.t_max, 5, dtype=torch.float64)
        curve = torch.cat([times[[0, -1]], p.alpha(times), p.sigma(times)])
        return Origin(
            process=[type(p).__name__, *curve.tolist()],
            dtypes=[str(noises[0].dtype), str(flow.dtype)],
            noises=[[*map(float, x.shape), *sketch(x)] for x in noises],
            flow=sketch(probe[:PROBED]),
            ends=None if ends is None else [sketch(x) for x in ends],
        )

    def difference(self, other: Origin) -> str | None:
        """Which part differs, by the name of the argument; None if none does."""
        names = (self.process[0], other.process[0])
        if names[0] != names[1] or not _same(
            self.process[1:], other.process[1:], _PROCESS
        ):
            return "the flow's process"
        if self.dtypes != other.dtypes:
            return "the dtype of noises or flow"
        if len(self.noises) != len(other.noises) or not all(
            _same(a, b, _NOISE) for a, b in zip(self.noises, other.noises, strict=True)
        ):
            return "noises"
        coarsest = max(
            torch.finfo(getattr(torch, name.removeprefix("torch."))).eps
            for name in self.dtypes
            if name != "None"
        )
        if not _same(self.flow, other.flow, math.sqrt(coarsest)):
            return "the flow's denoiser"
        if self.ends is not None and other.ends is not None:
            pairs = zip(self.ends, other.ends, strict=True)
            if not all(_same(a, b, _ENDS) for a, b in pairs):
                return "ends"
        return None


def probe_grid(process: Process) -> Tensor:
    """Times at which the denoiser is asked, to know it again."""
    low, high = float(process.t_min), float(process.t_max)
    nodes = [high, (low + high) / 2, math.sqrt(low * high), 0.0]
    return torch.tensor(nodes, dtype=torch.float64)


def grid_key(schedule: HasGrid, K: int) -> str | None:
    """What a K-step grid is known by; None where the schedule has none."""
    try:
        grid = torch.as_tensor(schedule.grid(K), dtype=torch.float64)
    except Exception:  # whatever a foreign schedule raises: it made no such cell
        return None
    text = " ".join(f"{t:.10g}" for t in grid.tolist())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ComparisonFile:
    """A comparison that is kept in a file while it is made.

    Args:
        path: Of the file.
        origin: What is measured now.
        count: Samples per seed.
        schedules: Label -> schedule, of those measured now.
        measures: What the further measures say of a fixed input, NaN where nothing.

    Attributes:
        table: What has been measured, without what another schedule or measure made
            under the same name.

    Raises:
        ValueError: If the file is no comparison or belongs to another one.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        origin: Origin,
        count: int,
        schedules: Mapping[str, HasGrid],
        measures: Mapping[str, float],
    ) -> None:
        self._path, self._name = check_output(path), os.fspath(path)
        self._origin = origin
        self._schedules, self._measures = schedules, dict(measures)
        self._made: dict[str, dict[str, dict[str, Any]]] = {}
        self._own: set[tuple[str, str]] = set()
        self._grids: dict[tuple[str, str], str | None] = {}
        self.table = Comparison(count=count)
        if self._path.is_file():
            self._merge()
        else:
            self._save()  # before anything is computed: it may not be possible

    def holds(self, key: str, label: str, *, errors: bool) -> bool:
        """Whether all that is asked of a cell is there."""
        cell = self.table.cells.get(key, {}).get(label)
        if cell is None or (errors and label not in self.table.samples.get(key, {})):
            return False
        return all(name in cell for name in self._measures)

    def add(
        self,
        key: str,
        label: str,
        nfe: int,
        found: dict[str, list[float]],
        samples: list[list[float]],
    ) -> None:
        """Put in a cell that was measured now."""
        made = {"grid": self._grid(key, label), "measures": _numbers(self._measures)}
        self._own.add((key, label))
        self._put(key, label, nfe, found, samples, made)
        self._save()

    def _save(self) -> None:
        with _alone(self._path, self._name):
            if self._path.is_file():
                self._merge()
            origin = {**asdict(self._origin), "cells": self._made}
            content = {**self.table.to_dict(), "origin": origin}
            text = json.dumps(content, allow_nan=False)
            write_bytes(self._path, text.encode())

    def _merge(self) -> None:
        """Take in what the file holds beyond what this run measured itself."""
        read, origin, made = self._read()
        if not read.cells:
            return
        if self._origin.ends is None:
            self._origin = replace(self._origin, ends=origin.ends)
        for key, row in read.cells.items():
            for label, found in row.items():
                cell = made.get(key, {}).get(label, {})
                if not self._is_current(key, label, cell):
                    continue
                samples = read.samples.get(key, {}).get(label, [])
                if (key, label) in self._own:  # others may have measured more of it
                    mine = self._made[key][label]
                    found = found | self.table.cells[key][label]
                    samples = self.table.samples.get(key, {}).get(label, samples)
                    cell = mine | {"measures": cell["measures"] | mine["measures"]}
                self._put(key, label, read.nfe[key], found, samples, cell)

    def _is_current(self, key: str, label: str, made: Mapping[str, Any]) -> bool:
        before = made.get("measures", {})
        other = [
            name
            for name, number in self._measures.items()
            if name in before
            and (before[name] is None or not _same([number], [before[name]], _MEASURE))
        ]
        if label in self._schedules:
            return not other and made.get("grid") == self._grid(key, label)
        if other:
            raise ValueError(
                f"file: {self._name} holds {other[0]!r} of {label!r} by another "
                "measure of that name; give the measure another name or name another "
                "file"
            )
        return True

    def _grid(self, key: str, label: str) -> str | None:
        if (key, label) not in self._grids:
            K = int(key.split()[1])
            self._grids[key, label] = grid_key(self._schedules[label], K)
        return self._grids[key, label]

    def _put(
        self,
        key: str,
        label: str,
        nfe: int,
        found: dict[str, list[float]],
        samples: list[list[float]],
        made: dict[str, Any],
    ) -> None:
        self.table.nfe[key] = nfe
        self.table.cells.setdefault(key, {})[label] = found
        self._made.setdefault(key, {})[label] = made
        if samples:
            self.table.samples.setdefault(key, {})[label] = samples

    def _read(self) -> tuple[Comparison, Origin, dict[str, dict[str, dict[str, Any]]]]:
        remedy = "delete it or give another name"
        try:
            data = json.loads(self._path.read_text("utf-8"))
            read = Comparison.from_dict(data)
            fields = data.get("origin")
            if fields is not None:
                made = fields.pop("cells")
                origin = Origin(**fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"file: {self._name} is no comparison; {remedy}"
            ) from error
        if read.count != self.table.count:
            raise ValueError(
                f"file: {self._name} was made with {read.count} samples per seed, "
                f"now there are {self.table.count}; {remedy}"
            )
        if fields is None:
            raise ValueError(
                f"file: {self._name} does not say what made its numbers (it is of an "
                f"earlier artlib; Comparison.from_dict reads it); {remedy}"
            )
        if read.cells and (part := self._origin.difference(origin)):
            raise ValueError(
                f"file: {self._name} belongs to another comparison: {part} differed "
                f"when it was made; {remedy}"
            )
        return read, origin, made


def _numbers(measures: Mapping[str, float]) -> dict[str, float | None]:
    """For JSON, which has no NaN."""
    return {k: v if math.isfinite(v) else None for k, v in measures.items()}


@contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """While it lasts, no other run or thread writes the file.

    The lock is a file beside it that its owner holds by the system's own lock, which
    ends with the process: what a killed run leaves behind hinders nobody. Where there
    is no such lock (Windows, some network folders), that the file exists is the lock.
    """
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    lock = path.with_name(f".artlib-{digest}.lock")
    deadline = time.monotonic() + _PATIENCE
    take = _created if fcntl is None else _locked
    while True:
        try:
            held = take(lock)
        except OSError as error:
            if error.errno not in _NO_LOCKS or take is _created:
                raise
            take = _created
            continue
        if held is not None:
            break
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"file: {name} is being written by another run; if there is "
                f"none, delete {lock}"
            )
        time.sleep(0.02)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is still held
        os.close(held)


_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What a folder answers that has no locks."""


def _locked(lock: Path) -> int | None:
    """The descriptor of a lock file that is locked now, or None if it cannot be yet."""
    made = _created(lock)
    try:
        held = os.open(lock, os.O_RDWR | os.O_NOFOLLOW) if made is None else made
    except FileNotFoundError:  # gone with its last owner
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(held), os.stat(lock)):
            return held
    except (BlockingIOError, FileNotFoundError):  # another has it, or had it
        pass
    except OSError:
        os.close(held)
        if made is not None:
            lock.unlink(missing_ok=True)
        raise
    os.close(held)
    return None


def _created(lock: Path) -> int | None:
    """The descriptor of a lock file made now, or None if there is one."""
    try:
        return os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return None
