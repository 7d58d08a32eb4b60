"""A node for ComfyUI: choose a schedule and a number of steps, get SIGMAS.

This file is the node. `install` copies it into a folder of its own, as ``__init__.py``
beside the schedules it offers; that folder goes into ComfyUI's ``custom_nodes``, and
artlib is installed into ComfyUI's Python. In the graph, connect the node's SIGMAS to
*SamplerCustom*. Nothing of ComfyUI is imported, so it is tested without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, empty

from artlib import Schedule
from artlib._common.files import check_output, write_bytes
from artlib.adapters.k_diffusion import to_k_diffusion

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "ARTSigmas", "install"]

_STEPS = 10_000
_GRID = 1_000_000
"""Steps of the whole grid, of which ``denoise`` takes the last ones."""

_COORDINATES = {"of the schedule": None, "sigma / alpha": "level", "flow": "flow"}


class ARTSigmas:
    """The node: schedule file, steps and denoise in, SIGMAS out."""

    CATEGORY: ClassVar[str] = "sampling/custom_sampling/schedulers"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("SIGMAS",)
    FUNCTION: ClassVar[str] = "get_sigmas"
    FOLDER: ClassVar[Path] = Path(__file__).resolve().parent

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """What the node asks for; the schedules are the JSON files of its folder."""
        denoise = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "schedule": (cls._names(),),
                "steps": ("INT", {"default": 10, "min": 1, "max": _STEPS}),
                "denoise": ("FLOAT", denoise),
                "coordinate": (list(_COORDINATES),),
            }
        }

    @classmethod
    def IS_CHANGED(
        cls,
        schedule: str,
        steps: int | None = None,
        denoise: float | None = None,
        coordinate: str | None = None,
    ) -> str:
        """What ComfyUI keeps a result by, beside the inputs: the file's content.

        Args:
            schedule: As in `get_sigmas`.
            steps: Not looked at; ComfyUI compares the inputs itself.
            denoise: The same.
            coordinate: The same.

        Returns:
            The file's SHA-256, or that there is none.
        """
        if schedule not in cls._names():
            return "missing"
        return hashlib.sha256((cls.FOLDER / schedule).read_bytes()).hexdigest()

    @classmethod
    def _names(cls) -> list[str]:
        found = (p for p in cls.FOLDER.glob("*.json") if p.is_file())
        return sorted(path.name for path in found)

    def get_sigmas(
        self,
        schedule: str,
        steps: int,
        denoise: float = 1.0,
        coordinate: str = "of the schedule",
    ) -> tuple[Tensor]:
        """The sigmas of ``steps`` steps.

        Args:
            schedule: Name of a file in the node's folder.
            steps: Number of steps that are taken.
            denoise: Share of the way; 0 gives an empty list, as ComfyUI's own do.
            coordinate: What the model counts noise in; one of the node's choices.

        Returns:
            A tuple of float32 [steps + 1], on the CPU.

        Raises:
            ExportError: If the grid cannot be given in that coordinate.
            TypeError: If ``steps`` is no whole number.
            ValueError: If there is no such schedule, or a number is out of its range.
        """
        if schedule not in (names := self._names()):
            raise ValueError(
                f"schedule: expected the name of a file in {self.FOLDER}, one of "
                f"{names}, got {schedule!r}"
            )
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"steps: expected a whole number, got {steps!r}")
        if not 1 <= steps <= _STEPS:
            raise ValueError(f"steps: expected 1 to {_STEPS}, got {steps}")
        if not isinstance(denoise, int | float) or not 0 <= denoise <= 1:
            raise ValueError(f"denoise: expected a share in [0, 1], got {denoise!r}")
        if steps > _GRID * denoise > 0:
            raise ValueError(
                f"denoise: {denoise} of the way in {steps} steps would need a grid of "
                f"more than {_GRID}; take fewer steps or a larger share"
            )
        if coordinate not in _COORDINATES:
            raise ValueError(
                f"coordinate: expected one of {list(_COORDINATES)}, got {coordinate!r}"
            )
        if denoise == 0:
            return (empty(0),)
        return (
            to_k_diffusion(
                Schedule.load(self.FOLDER / schedule),
                steps,
                denoise=denoise,
                coordinate=_COORDINATES[coordinate],  # type: ignore[arg-type]
            ),
        )


NODE_CLASS_MAPPINGS = {"ARTSigmas": ARTSigmas}
NODE_DISPLAY_NAME_MAPPINGS = {"ARTSigmas": "ART schedule"}


def schedule_file(folder: str | os.PathLike[str], name: str) -> Path:
    """The file of a schedule in the node's folder.

    Args:
        folder: The node's folder.
        name: With or without ``.json``.

    Raises:
        ValueError: If ``name`` is empty, a path, or not printable.
    """
    stem = name[: -len(".json")] if name.lower().endswith(".json") else name
    if not stem.strip(" .") or Path(name).name != name or not name.isprintable():
        raise ValueError(f"name: expected a plain file name, got {name!r}")
    return Path(folder) / f"{stem}.json"


def install(
    schedule: Schedule,
    folder: str | os.PathLike[str],
    name: str,
    *,
    force: bool = False,
) -> Path:
    """Write the node and a schedule into a folder; others in it stay.

    A schedule of that name is replaced.

    Args:
        schedule: The schedule.
        folder: For example ``ComfyUI/custom_nodes/artlib_node``; made if missing.
        name: The file's name in the node's list, with or without ``.json``.
        force: Replace also an ``__init__.py`` that is not this node, and a file of
            that name that is no schedule.

    Returns:
        The path of the schedule's file.

    Raises:
        FileExistsError: If something else is in the way; nothing is written then.
        ValueError: If ``name`` is empty or a path.
        OSError: If the folder cannot be written to.
    """
    target = schedule_file(folder, name)
    node = target.with_name("__init__.py")
    if not force and node.exists() and not _is_node(node):
        raise FileExistsError(
            errno.EEXIST,
            "belongs to another package; choose another folder, or replace it with "
            "force=True (--force on the command line)",
            os.fspath(node),
        )
    if not force and target.is_file() and not _is_schedule(target):
        raise FileExistsError(
            errno.EEXIST,
            "is no schedule; choose another name, or replace it with force=True "
            "(--force on the command line)",
            os.fspath(target),
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    check_output(target)
    write_bytes(node, Path(__file__).read_bytes())
    schedule.save(target)
    return target


def _is_node(file: Path) -> bool:
    """Whether a file is this node, or that of another version of artlib."""
    own = Path(__file__).read_bytes().splitlines()[0]
    return file.is_file() and file.read_bytes().splitlines()[:1] == [own]


def _is_schedule(file: Path) -> bool:
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") == "artlib-schedule"
