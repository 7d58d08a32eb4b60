"""A node for ComfyUI: choose a schedule and a number of steps, get SIGMAS.

This file is the node. `install` copies it into a folder of its own, as ``__init__.py``
beside the schedules it offers; that folder goes into ComfyUI's ``custom_nodes``, and
artlib is installed into ComfyUI's Python. In the graph, connect the node's SIGMAS to
*SamplerCustom*. Nothing of ComfyUI is imported, so it is tested without it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, empty

from artlib import Schedule
from artlib._files import write_bytes
from artlib.adapters.k_diffusion import to_k_diffusion

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "ARTSigmas", "install"]

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
        names = sorted(path.name for path in cls.FOLDER.glob("*.json"))
        denoise = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "schedule": (names,),
                "steps": ("INT", {"default": 10, "min": 1, "max": 10_000}),
                "denoise": ("FLOAT", denoise),
                "coordinate": (list(_COORDINATES),),
            }
        }

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
            ValueError: If the name is a path, or a number out of its range.
        """
        if Path(schedule).name != schedule:
            raise ValueError(
                f"schedule: expected the name of a file in {self.FOLDER}, got "
                f"{schedule!r}"
            )
        if coordinate not in _COORDINATES:
            raise ValueError(
                f"coordinate: expected one of {list(_COORDINATES)}, got {coordinate!r}"
            )
        if denoise <= 0:
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


def install(schedule: Schedule, folder: str | os.PathLike[str], name: str) -> Path:
    """Write the node and a schedule into a folder; others in it stay.

    Args:
        schedule: The schedule.
        folder: For example ``ComfyUI/custom_nodes/artlib_node``; made if missing.
        name: The file's name in the node's list, with or without ``.json``.

    Returns:
        The path of the schedule's file.

    Raises:
        ValueError: If ``name`` is empty or a path.
        OSError: If the folder cannot be written to.
    """
    if not name.strip() or Path(name).name != name:
        raise ValueError(f"name: expected a plain file name, got {name!r}")
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    write_bytes(home / "__init__.py", Path(__file__).read_bytes())
    target = home / (name if name.endswith(".json") else f"{name}.json")
    schedule.save(target)
    return target
