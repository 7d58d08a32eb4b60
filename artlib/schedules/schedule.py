"""The class `Schedule`: checks, evaluation, grids, files; see `artlib.schedules`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .._common.checks import got, positive_int, printable
from .._common.errors import ScheduleFormatError
from .._common.types import TimeLike, Times
from .._common.version import __version__
from ..flow.processes import Process, as_time, check_process
from ..flow.registry import (
    UnknownProcessError,
    process_from_dict,
    same_process,
    saved_process,
)
from . import file, shared
from .table import Interpolation, Table, uniform_clock
from .time_change import ROUND_OFF, Formula, Linear, TimeChange

LastStep: TypeAlias = Literal["free", "pinned", "zero"]


@dataclass(frozen=True, repr=False)
class Schedule:
    """An immutable schedule; make one with `uniform`, `edm`, ..., `from_density`.

    Two schedules are equal when process, time change and last step are, that is, when
    all of their grids are; name and provenance are labels.

    Attributes:
        process: The noising process whose time it runs in.
        time_change: The map from clock to time, an immutable value.
        last_step: ``"free"``, ``"pinned"`` or ``"zero"``, see `artlib.schedules`.
        name: A label for tables and legends, in one line.

    Raises:
        TypeError: If a field is of another type.
        ValueError: If the time change does not run over the range of the process, or
            the name holds control characters.
    """

    process: Process
    time_change: TimeChange
    last_step: LastStep
    name: str = field(compare=False)
    _provenance: str = field(compare=False)

    def __post_init__(self) -> None:
        expected = (self.process.t_max, end_of_range(self.process, self.last_step))
        if not isinstance(self.time_change, TimeChange):
            raise TypeError(
                f"time_change: expected a TimeChange, got {got(self.time_change)}; "
                "from_time_change(process, clock, times) makes a schedule of knots"
            )
        found = (self.time_change.t_max, self.time_change.t_end)
        if found != expected:
            raise ValueError(
                f"times: the time change runs from {found[0]!r} to {found[1]!r}, but a "
                f"schedule with last step {self.last_step!r} for {self.process} runs "
                f"from {expected[0]!r} to {expected[1]!r}"
            )
        change = self.time_change
        if isinstance(change, Formula) and change.process != self.process:
            raise ValueError(
                f"time_change: made for {change.process}, got the process "
                f"{self.process}; convert carries a schedule to another process"
            )
        check_labels(self.name, self._provenance)

    @property
    def horizon(self) -> float:
        """T, the length of the clock: t_max - t_min, or t_max if it ends at 0.

        The speed integrates to it over the clock, eq. (6).
        """
        return self.time_change.horizon

    @property
    def provenance(self) -> dict[str, Any]:
        """How the schedule was made, and by which version; a copy."""
        result: dict[str, Any] = json.loads(self._provenance)
        return result

    def time(self, clock: TimeLike) -> Tensor:
        """Process time at a reading of the clock; its time change is that of eq. (4).

        Args:
            clock: Readings in [0, T], any shape.

        Returns:
            t in the process's unit, float64, same shape, differentiable in ``clock``.

        Raises:
            ValueError: If a reading is outside of [0, T] by more than round-off.
        """
        clock = within(clock, "clock", 0.0, self.horizon, "the clock's")
        raw = self.time_change.time(clock)
        exact = raw.detach().clamp(self.time_change.t_end, self.time_change.t_max)
        exact = torch.where(clock <= 0, self.time_change.t_max, exact)
        exact = torch.where(clock >= self.horizon, self.time_change.t_end, exact)
        # The ends are exact and the derivative is the formula's.
        return raw + (exact - raw.detach())

    def clock(self, t: TimeLike) -> Tensor:
        """Reading of the clock at a process time, the inverse of `time`.

        Args:
            t: Times in [t_end, t_max], any shape.

        Returns:
            Readings in [0, T], float64, same shape, differentiable in ``t``.

        Raises:
            ValueError: If a time is outside of the range by more than round-off.
        """
        change = self.time_change
        t = within(t, "t", change.t_end, change.t_max, "the time change's")
        raw = change.clock(t)
        return raw + (raw.detach().clamp(0.0, self.horizon) - raw.detach())

    def speed(self, clock: TimeLike) -> Tensor:
        r"""The control :math:`\theta = d\psi/dc = -dt/dc` of eq. (4), dimensionless.

        Args:
            clock: Readings in [0, T], any shape.

        Returns:
            Speeds, float64, same shape; 1 where time passes as in `uniform`.

        Raises:
            ValueError: If a reading is outside of [0, T] by more than round-off.
        """
        return self.time_change.speed(
            within(clock, "clock", 0.0, self.horizon, "the clock's")
        )

    def density(self, t: TimeLike) -> Tensor:
        r"""Share of the steps per unit of time, :math:`1 / (T \theta)`.

        Args:
            t: Times in [t_end, t_max], any shape.

        Returns:
            The density in 1 / unit of time, float64; its integral is 1.

        Raises:
            ValueError: If a time is outside of the range by more than round-off.
        """
        return 1 / (self.horizon * self.speed(self.clock(t)))

    def grid(self, K: int) -> Times:
        """The K + 1 timesteps of K steps.

        Args:
            K: Number of steps, at least 1.

        Returns:
            float64 [K + 1], strictly descending, t_max ... 0.0, the ends exact.

        Raises:
            TypeError: If ``K`` is no integer.
            ValueError: If ``K`` < 1, or so large that two nodes coincide in float64.
        """
        K = positive_int(K, "K")
        if isinstance(self.time_change, Linear):
            nodes = torch.linspace(
                self.process.t_max, 0.0, K + 1, dtype=torch.float64, device="cpu"
            )
        elif self.last_step == "pinned" and K == 1:
            nodes = torch.tensor(
                [self.process.t_max, 0.0], dtype=torch.float64, device="cpu"
            )
        else:
            pinned = self.last_step == "pinned"
            clock = uniform_clock(self.horizon, K if pinned else K + 1)
            nodes = self.time(torch.tensor(clock, dtype=torch.float64, device="cpu"))
            if pinned:
                nodes = torch.cat([nodes, nodes.new_zeros(1)])
        nodes[-1] = 0.0
        stalled = (~(nodes[1:] < nodes[:-1])).nonzero()  # a NaN stalls too
        if len(stalled):
            k = int(stalled[0])
            raise ValueError(
                f"K: with {K} steps nodes {k} and {k + 1} are {float(nodes[k])!r} and "
                f"{float(nodes[k + 1])!r}, not descending in float64; take fewer steps"
            )
        return nodes

    def resample(self, K: int, *, interpolation: Interpolation = "pchip") -> Schedule:
        """The schedule that interpolates this one's K-step grid.

        ``resample(K).grid(K)`` equals ``grid(K)`` to the last bit; other step counts
        show what the interpolation loses. The paper resamples log-linearly.

        Args:
            K: Steps of the grid that is kept.
            interpolation: As in `from_grid`.

        Raises:
            ValueError: If ``K`` < 1, or ``"log-linear"`` would have to reach t = 0.
        """
        made_by = f"resample({K}, interpolation={interpolation!r})"
        return through_nodes(
            self.process,
            self.grid(K),
            self.last_step,
            interpolation,
            self.name,
            describe_origin(made_by, {"source": self.provenance}),
        )

    def to_text(self, K: int) -> str:
        """The K-step grid as a plain list, ``[80.0, ..., 0.0]``: Python and JSON."""
        return json.dumps(self.grid(K).tolist())

    def to_diffusers(
        self,
        scheduler: Any,
        K: int,
        *,
        mu: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Set a scheduler of diffusers to K steps, and let it hold this schedule.

        Afterwards a pipeline with that scheduler takes this schedule's steps, however
        many it asks for; see `artlib.adapters.diffusers.to_diffusers`.

        Args:
            scheduler: For example ``pipe.scheduler``.
            K: Number of steps.
            mu: Of a scheduler with dynamic shifting; it is undone.
            device: Where the scheduler's timesteps go.

        Raises:
            ExportError: If the scheduler cannot visit these noise levels to 1e-5; it
                is then as it was.
            TypeError: If ``scheduler`` is none or ``K`` no integer.
            ValueError: If ``K`` < 1.
        """
        from ..adapters.diffusers import to_diffusers

        to_diffusers(self, scheduler, K, mu=mu, device=device)

    def to_k_diffusion(self, K: int, *, denoise: float = 1.0) -> Tensor:
        """Sigmas for k-diffusion: float32 [K + 1] on the CPU, descending to 0.

        Args:
            K: Number of steps that are taken.
            denoise: Share of the way from noise to data; below 1 the tail of a longer
                grid, see `artlib.adapters.k_diffusion.to_k_diffusion`.

        Raises:
            ExportError: If the first noise level is infinite or two nodes are one
                number in float32.
            ValueError: If an argument is out of its range.
        """
        from ..adapters.k_diffusion import to_k_diffusion

        return to_k_diffusion(self, K, denoise=denoise)

    def to_json(self) -> str:
        """The schedule as JSON text; `from_json` gives back the same to the bit.

        Raises:
            TypeError: If the process is one of your own whose parameters have no JSON
                form, or that is no dataclass.
            ValueError: If the process would come back as another one.
        """
        return file.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Its content, JSON-able: what `to_json` writes, without format and version.

        Raises:
            TypeError: If the process is one of your own whose parameters have no JSON
                form, or that is no dataclass.
            ValueError: If the process would come back as another one.
        """
        return {
            "name": self.name,
            "process": saved_process(self.process),
            "last_step": self.last_step,
            "provenance": self.provenance,
            "time_change": self.time_change.to_dict(),
        }

    @classmethod
    def from_json(
        cls, text: str, *, source: str = "JSON text", process: Process | None = None
    ) -> Schedule:
        """Rebuild a schedule from `to_json`.

        Args:
            text: The JSON text.
            source: What to call it in messages.
            process: The process that it was made for; needed where that is one of your
                own which is not registered, see `artlib.register_process`.

        Raises:
            ScheduleFormatError: If the text is damaged, foreign, newer, incomplete,
                not finite or not monotone, or of a process that is not known here.
            TypeError: If ``text`` is no str or ``process`` no process.
        """
        data = file.loads(text, source)
        if process is not None:
            check_process(process)
        try:
            if process is None:
                process = process_from_dict(data["process"])
                missing = process.to_dict().keys() - data["process"].keys()
                if missing:
                    raise ValueError(f"process: lacks {', '.join(sorted(missing))}")
            else:
                same_process(process, data["process"])
            if not isinstance(data["provenance"], dict):
                raise ValueError("provenance: expected an object")
            return cls(
                process=process,
                time_change=file.time_change_from_dict(process, data["time_change"]),
                last_step=data["last_step"],
                name=data["name"],
                _provenance=json.dumps(data["provenance"]),
            )
        except UnknownProcessError as error:
            raise ScheduleFormatError(f"{source}: {error}") from error
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            lacks = "lacks " if isinstance(error, KeyError) else ""
            raise ScheduleFormatError(
                f"{source}: {lacks}{error}; the file was damaged or edited: write it "
                "again with Schedule.save"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schedule to a JSON file, atomically.

        Raises:
            OSError: If that fails; the old file, if any, is then untouched.
            TypeError: If the process is one of your own whose parameters have no JSON
                form, or that is no dataclass.
            ValueError: If the process would come back as another one.
        """
        file.write_text(path, self.to_json())

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, process: Process | None = None
    ) -> Schedule:
        """Read a schedule written by `save`; executes and unpickles nothing.

        Args:
            path: The file.
            process: As in `from_json`.

        Raises:
            FileNotFoundError: If there is no such file.
            ScheduleFormatError: If it is no schedule that this version can use.
            TypeError: If ``path`` is no path or ``process`` no process.
        """
        text = file.read_text(path)
        return cls.from_json(text, source=os.fspath(path), process=process)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the schedule into a folder, in the layout that the Hub shares.

        ``artlib_schedule.json``, and a card ``README.md`` that says how it was learned,
        unless the folder has one of its own. It may be the folder of a pipeline.

        Args:
            folder: Made if missing.

        Raises:
            OSError: If it cannot be written to; an older schedule is then untouched.
            TypeError: If it is no path, or the process cannot be saved, see `to_json`.
        """
        target = shared.folder_of(folder, "folder")
        steps = shared.as_list(self.grid(10).tolist())
        card = shared.schedule_card(
            self.name, str(self.process), self.provenance, steps
        )
        shared.write_folder(target, shared.FILE, self.to_json(), card)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        subfolder: str = "",
        process: Process | None = None,
    ) -> Schedule:
        """Read a schedule from a folder that `save_pretrained` wrote.

        Nothing is downloaded: the folder is on this machine, such as one that
        ``huggingface_hub.snapshot_download`` returns.

        Args:
            folder: The folder.
            subfolder: Within it, for a schedule that is part of a pipeline.
            process: As in `from_json`.

        Raises:
            FileNotFoundError: If there is no schedule in it.
            ScheduleFormatError: If it is none that this version can use.
            TypeError: If ``folder`` is no path.
            ValueError: If ``subfolder`` leads out of it.
        """
        place = shared.folder_of(folder, "folder", subfolder)
        found = shared.find(place, shared.FILE)
        return cls.load(found, process=process)

    def __repr__(self) -> str:
        return (
            f"Schedule({self.name!r}, {self.process}, "
            f"{self.time_change.describe()}, last step {self.last_step})"
        )


def through_nodes(
    process: Process,
    nodes: Tensor,
    last_step: LastStep,
    interpolation: Interpolation,
    name: str,
    provenance: str,
) -> Schedule:
    """The schedule whose K-step grid is ``nodes`` [K + 1], from t_max to 0.

    Raises:
        ValueError: If the interpolation does not exist, or cannot reach 0, or if the
            second last node is not above t_min where the last step is free.
    """
    times = nodes.tolist()
    if last_step == "pinned" and len(times) > 2:
        del times[-1]
    times[-1] = end_of_range(process, last_step)
    if not times[-2] > times[-1]:
        raise ValueError(
            f"grid: node {len(times) - 2} is {times[-2]!r}, expected above the end of "
            f"the learned range, {times[-1]!r}; make the process with a smaller t_min"
        )
    clock = uniform_clock(times[0] - times[-1], len(times))
    table = Table(clock, tuple(times), interpolation)
    return Schedule(process, table, last_step, name, provenance)


def end_of_range(process: Process, last_step: str) -> float:
    """Where the time change ends: t_min, or 0 for the last step "zero".

    Raises:
        TypeError: If ``process`` is none.
        ValueError: If the last step is unknown.
    """
    check_process(process)
    if not isinstance(last_step, str) or last_step not in get_args(LastStep):
        raise ValueError(
            f"last_step: expected one of {get_args(LastStep)}, got {last_step!r}"
        )
    return 0.0 if last_step == "zero" else process.t_min


def describe_origin(made_by: str, more: dict[str, Any] | None = None) -> str:
    """Provenance as JSON text: library, version, how made, and what the caller adds.

    Raises:
        TypeError: If what the caller adds has no JSON form.
        ValueError: If it holds a NaN or an infinity.
    """
    if not isinstance(more, dict | None):
        raise TypeError(
            f"provenance: expected a dict of strings, finite numbers and lists, got "
            f"{got(more)}"
        )
    version = __version__
    origin = {"library": "artlib", "version": version, "made_by": made_by}
    try:
        return json.dumps(origin | (more or {}), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"provenance: {error}; give a dict of strings, finite numbers and lists"
        ) from error


def check_labels(name: Any, provenance: Any) -> None:
    """Check the labels of a schedule: its name, and its provenance as JSON text.

    Raises:
        TypeError: If they are no text.
        ValueError: If the name or a key of the provenance holds control characters.
    """
    printable(name, "name")
    if not isinstance(provenance, str) or not provenance.startswith("{"):
        raise TypeError(
            f"provenance: expected the JSON text of an object, got {got(provenance)}"
        )

    def check_keys(pairs: list[tuple[str, Any]]) -> None:
        for key, _ in pairs:
            printable(key, "provenance")

    json.loads(provenance, object_pairs_hook=check_keys)


def within(value: TimeLike, name: str, low: float, high: float, whose: str) -> Tensor:
    """A float64 tensor clamped to a range that it may leave by round-off only.

    Raises:
        TypeError: If it is no number and no tensor of them.
        ValueError: If a value is outside, or NaN.
    """
    x = as_time(value, name=name)
    slack = ROUND_OFF * low if low > 0 else 1e-9 * high
    inside = (x >= low - slack) & (x <= high * (1 + ROUND_OFF))
    if not bool(inside.all()):
        bad = float(x.detach()[~inside].flatten()[0])
        hint = "; the step from t_min to 0 is taken by the grid" if bad < low else ""
        raise ValueError(
            f"{name}: {bad!r} is outside {whose} range [{low!r}, {high!r}]{hint}"
        )
    return x.clamp(low, high)
