"""A folder for ComfyUI: two nodes, and the schedules and plans that they offer.

The nodes are `artlib.adapters.comfyui_node`; `install` copies that file. Nothing
of ComfyUI is imported, so they are tested without it.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from .._common.files import check_output, write_bytes
from ..schedules.plan import Plan
from ..schedules.schedule import Schedule
from . import comfyui_node
from .comfyui_node import (
    NODE_CLASS_MAPPINGS,
    NODE_DISPLAY_NAME_MAPPINGS,
    ARTPlan,
    ARTSigmas,
)

__all__ = [
    "NODE_CLASS_MAPPINGS",
    "NODE_DISPLAY_NAME_MAPPINGS",
    "ARTPlan",
    "ARTSigmas",
    "install",
    "schedule_file",
]

_NODE = Path(comfyui_node.__file__)
_FORMATS = ("artlib-schedule", "artlib-plan")


def schedule_file(folder: str | os.PathLike[str], name: str) -> Path:
    """The file of a schedule or a plan in the nodes' folder.

    Args:
        folder: The nodes' folder.
        name: With or without ``.json``.

    Raises:
        ValueError: If ``name`` is empty, a path, or not printable.
    """
    stem = name[: -len(".json")] if name.lower().endswith(".json") else name
    if not stem.strip(" .") or Path(name).name != name or not name.isprintable():
        raise ValueError(f"name: expected a plain file name, got {name!r}")
    return Path(folder) / f"{stem}.json"


def install(
    schedule: Schedule | Plan,
    folder: str | os.PathLike[str],
    name: str,
    *,
    force: bool = False,
) -> Path:
    """Write the nodes and a schedule or a plan into a folder; others in it stay.

    One of that name is replaced.

    Args:
        schedule: The schedule, for any number of steps, or the plan.
        folder: For example ``ComfyUI/custom_nodes/artlib_node``; made if missing.
        name: The file's name in the node's list, with or without ``.json``.
        force: Replace also an ``__init__.py`` that is not this node, and a file of
            that name that is neither schedule nor plan.

    Returns:
        The path of the file.

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
            "is neither schedule nor plan; choose another name, or replace it with "
            "force=True (--force on the command line)",
            os.fspath(target),
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    check_output(target)
    write_bytes(node, _NODE.read_bytes())
    schedule.save(target)
    return target


def _is_node(file: Path) -> bool:
    """Whether a file is this node, or that of another version of artlib."""
    own = _NODE.read_bytes().splitlines()[0]
    return file.is_file() and file.read_bytes().splitlines()[:1] == [own]


def _is_schedule(file: Path) -> bool:
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") in _FORMATS
