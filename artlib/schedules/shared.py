"""Schedules and plans in folders, as models are shared: a file each, and a card.

The layout is that of the Hub's repositories: ``artlib_schedule.json`` and
``artlib_plan.json`` beside, or in, what ``save_pretrained`` of a model or a pipeline
writes, and a ``README.md`` where there is none. Nothing here uses a network: what
uploads a folder, or fetches one, is ``huggingface_hub``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .._common.checks import got
from .._common.console import printable
from .._common.files import check_output
from .file import write_text

FILE = "artlib_schedule.json"
"""The schedule in its folder."""

PLAN_FILE = "artlib_plan.json"
"""The plan in its folder."""

_CARD = "README.md"
_MARK = "<!-- This card was written by artlib, which renews it. -->"
_END = "<!-- end -->"
_HEAD = """\
---
library_name: artlib
tags:
- diffusion
- timestep-schedule
---
"""
_USUAL = ("library", "version", "made_by", "worth")


def folder_of(path: Any, name: str, *parts: str) -> Path:
    """A folder, and one within it.

    Raises:
        TypeError: If the path is none.
        ValueError: If a part leads out of the folder.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name}: expected a folder, a str or a Path, got {got(path)}")
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"subfolder: expected a str, got {got(part)}")
        if os.path.isabs(part) or ".." in Path(part).parts:
            raise ValueError(
                f"subfolder: expected a folder within the first one, got {part!r}"
            )
    return Path(path).joinpath(*parts)


def write_folder(folder: Path, name: str, text: str, section: str) -> None:
    """Write a schedule or plan, and its part of the card unless it is somebody else's.

    Args:
        folder: Made if missing.
        name: `FILE` or `PLAN_FILE`.
        text: Of the file.
        section: What the card says of it. What it says of the other file stays.

    Raises:
        OSError: If it cannot be written; an older file is then untouched.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(20, "is no folder; name another", os.fspath(folder))
    folder.mkdir(parents=True, exist_ok=True)
    check_output(folder / name)
    readme = folder / _CARD
    there = readme.read_text("utf-8", errors="replace") if readme.exists() else _MARK
    write_text(folder / name, text)
    if _MARK not in there:
        return
    parts = {name: section}
    for other in (FILE, PLAN_FILE):
        _, found, part = there.partition(_begin(other))
        if found and other != name and (folder / other).is_file():
            parts[other] = part.partition(_END)[0]
    body = "\n".join(f"{_begin(k)}{parts[k]}{_END}" for k in sorted(parts))
    write_text(readme, f"{_HEAD}{_MARK}\n\n{body}\n")


def _begin(name: str) -> str:
    return f"<!-- {name} -->"


def find(folder: Path, name: str) -> Path:
    """The file of a schedule or plan in a folder.

    Args:
        folder: The folder.
        name: `FILE` or `PLAN_FILE`.

    Raises:
        FileNotFoundError: If there is none; the message says where one comes from.
    """
    file = folder / name
    if file.is_file():
        return file
    what = "holds no" if folder.is_dir() else "is no folder with an"
    raise FileNotFoundError(
        2,
        f"{what} {name}; artlib downloads nothing: huggingface_hub.snapshot_download "
        "fetches a repository and returns its folder",
        os.fspath(folder),
    )


def notes(provenance: dict[str, Any]) -> dict[str, str]:
    """How a schedule was made, in words: short, printable, on one line each.

    Args:
        provenance: Of the schedule.

    Returns:
        What it says beside library, version and constructor; the constructor alone
        where that is all.
    """
    found = {
        _word(key): _word(value)
        for key, value in provenance.items()
        if key not in _USUAL
    }
    return found or {"made by": _word(provenance.get("made_by", "hand"))}


def worth(provenance: dict[str, Any]) -> dict[str, str]:
    """What a schedule or plan is worth, if it says so: where, and how much.

    Args:
        provenance: Of the schedule; its ``"worth"``, a dictionary of texts.
    """
    found = provenance.get("worth")
    if not isinstance(found, dict):
        return {}
    return {printable(str(k))[:60]: printable(str(v))[:200] for k, v in found.items()}


def _word(value: Any) -> str:
    if isinstance(value, str):
        return printable(value.replace("_", " "))[:200]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        named = value.get("method", value.get("made_by"))
        return f"({_word(named)})" if isinstance(named, str) else "(...)"
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return f"({len(value)} of them)"
    return printable(str(value))[:60]


def schedule_card(
    name: str, process: str, provenance: dict[str, Any], steps: str
) -> str:
    """What a card says of a schedule, in Markdown.

    Args:
        name: Of the schedule.
        process: Described.
        provenance: Of the schedule.
        steps: Its ten steps, as a list.
    """
    rows = {"process": process, **notes(provenance), "ten steps": steps}
    rows |= worth(provenance)
    return f"""

# {_cell(printable(name))}

Where a diffusion sampler spends its steps, for any number of
them{_version(provenance)}.

{_table(rows)}

```python
import artlib

schedule = artlib.Schedule.from_pretrained("path/to/this/folder")
schedule.grid(10)                            # timesteps of ten steps
schedule.to_diffusers(pipe.scheduler, 10)    # or set in a pipeline of diffusers
```

"""


def plan_card(name: str, facts: dict[str, str], provenance: dict[str, Any]) -> str:
    """What a card says of a plan, in Markdown.

    Args:
        name: Of the plan.
        facts: Process, solver, evaluations, nodes and so on.
        provenance: Of the plan.
    """
    return f"""

# {_cell(printable(name))}

The steps of one solver, and the noise level that the network is told at
each{_version(provenance)}.

{_table({**facts, **notes(provenance), **worth(provenance)})}

```python
import artlib

plan = artlib.Plan.from_pretrained("path/to/this/folder")
samples = artlib.sample(flow, x_T, plan)
plan.to_diffusers(pipe.scheduler, pipe.unet)    # or set in a pipeline of diffusers
```

"""


def _table(rows: dict[str, str]) -> str:
    lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _version(provenance: dict[str, Any]) -> str:
    version = provenance.get("version")
    return f" (artlib {_cell(printable(str(version)))})" if version else ""


def _cell(text: str) -> str:
    """Text in a table of Markdown: no markup, no other cell."""
    for char in "\\|<>`*[]":
        text = text.replace(char, f"&#{ord(char)};")
    return text


def as_list(values: list[float]) -> str:
    """Numbers to four digits."""
    return json.dumps([float(f"{value:.4g}") for value in values])
