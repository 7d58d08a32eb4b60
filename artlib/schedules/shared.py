"""Schedules in folders, as models are shared: one file in it, and a card.

The layout is that of the Hub's repositories: ``artlib_schedule.json`` beside, or in,
what ``save_pretrained`` of a model or a pipeline writes, and a ``README.md`` where
there is none. Nothing here uses a network: what uploads a folder, or fetches one, is
``huggingface_hub``.
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

_CARD = "README.md"
_MARK = "<!-- This card was written by artlib, which renews it. -->"
_USUAL = ("library", "version", "made_by")


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


def write_folder(folder: Path, text: str, card: str) -> None:
    """Write a schedule, and its card unless somebody else's is there.

    Args:
        folder: Made if missing.
        text: Of the schedule's file.
        card: Of the card.

    Raises:
        OSError: If it cannot be written; an older schedule is then untouched.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(20, "is no folder; name another", os.fspath(folder))
    folder.mkdir(parents=True, exist_ok=True)
    check_output(folder / FILE)
    readme = folder / _CARD
    own = not readme.exists() or _MARK in readme.read_text("utf-8", errors="replace")
    write_text(folder / FILE, text)
    if own:
        write_text(readme, card)


def find(folder: Path) -> Path:
    """The schedule's file in a folder.

    Raises:
        FileNotFoundError: If there is none; the message says where one comes from.
    """
    file = folder / FILE
    if file.is_file():
        return file
    what = "holds no" if folder.is_dir() else "is no folder with an"
    raise FileNotFoundError(
        2,
        f"{what} {FILE}; artlib downloads nothing: huggingface_hub.snapshot_download "
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


def _word(value: Any) -> str:
    if isinstance(value, str):
        return printable(value.replace("_", " "))[:200]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        named = value.get("method", value.get("made_by"))
        return f"({_word(named)})" if isinstance(named, str) else "(...)"
    return printable(str(value))[:60]


def card(name: str, process: str, provenance: dict[str, Any], steps: str) -> str:
    """A model card in Markdown, with the metadata that the Hub reads.

    Args:
        name: Of the schedule.
        process: Described.
        provenance: Of the schedule.
        steps: Its ten steps, as a list.
    """
    rows = {"process": process, **notes(provenance), "ten steps": steps}
    table = "\n".join(
        f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()
    )
    version = _cell(str(provenance.get("version", "")))
    return f"""\
---
library_name: artlib
tags:
- diffusion
- timestep-schedule
---
{_MARK}

# {_cell(printable(name))}

Where a diffusion sampler spends its steps, for any number of them
(artlib {version}).

| | |
| --- | --- |
{table}

```python
import artlib

schedule = artlib.Schedule.from_pretrained("path/to/this/folder")
schedule.grid(10)                            # timesteps of ten steps
schedule.to_diffusers(pipe.scheduler, 10)    # or set in a pipeline of diffusers
```
"""


def _cell(text: str) -> str:
    """Text in a table of Markdown: no markup, no other cell."""
    for char in "\\|<>`*[]":
        text = text.replace(char, f"&#{ord(char)};")
    return text


def as_list(values: list[float]) -> str:
    """Numbers to four digits."""
    return json.dumps([float(f"{value:.4g}") for value in values])
