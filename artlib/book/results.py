"""Tables of full runs: ``notebooks/results/NAME.json``, with what made them."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .._common.files import write_bytes
from .._common.version import __version__
from .slices import is_made, remember, seconds_left
from .surroundings import commit, device, full

_NUMBERS = re.compile(r'\[(\n\s*-?\d[^]["{}]*)\]')


def save_results(name: str, results: dict[str, Any], *, seed: int) -> Path:
    """Write the tables of a full run to ``notebooks/results/NAME.json``, atomically.

    The file holds ``{"made": {...}, "results": results}``, where ``made`` says when,
    on what device, with which seed, versions and commit.
    """
    chosen = device()
    cuda = chosen.type == "cuda"
    made = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": seed,
        "full": full(),
        "device": torch.cuda.get_device_name(chosen) if cuda else platform.machine(),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "artlib": __version__,
            "torch": torch.__version__,
        },
    }
    path = _results_dir() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, _as_text({"made": made, "results": results}).encode())
    if full():
        remember(name)
    return path


def _as_text(content: dict[str, Any]) -> str:
    """JSON with a line for each entry, but one line for a list of numbers.

    A table of thousands of samples is half as large that way.
    """
    text = json.dumps(content, indent=1, allow_nan=False)
    # No text in JSON holds a line break, so what matches is a list.
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def made(name: str, make: Callable[[], dict[str, Any]], *, seed: int) -> dict[str, Any]:
    """The results of a long computation: made in a full run, read otherwise.

    Args:
        name: Of the results.
        make: Computes them, JSON-able.
        seed: To be told in the file.

    Raises:
        FileNotFoundError: If there are no results yet.
        PausedError: If the time of a full run, ``ARTLIB_SECONDS`` from its start, is
            over; what is made is kept, and the next run goes on.
    """
    if full() and not is_made(name):
        seconds_left()
        save_results(name, make(), seed=seed)
    return load_results(name)["results"]


def load_results(name: str) -> dict[str, Any]:
    """Read what :func:`save_results` wrote: ``{"made": ..., "results": ...}``.

    Raises:
        FileNotFoundError: If there are no such results.
        ValueError: If the file is damaged.
    """
    path = _results_dir() / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no results named {name!r} in {path.parent}: "
            "run the chapter at full size first (make full CHAPTER=NN), or name the "
            "folder that has them in the environment variable ARTLIB_RESULTS"
        )
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        return {"made": loaded["made"], "results": loaded["results"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected what save_results writes, JSON with made and results "
            f"({error!r}); restore the file, or make it again (make full CHAPTER=NN)"
        ) from error


def scratch(name: str) -> Path:
    """A file for what a long run keeps until it is done, in ``_build`` of the clone.

    Where ``ARTLIB_RESULTS`` names a folder of another form than
    ``.../notebooks/results``, ``_build`` is in it.
    """
    results = _results_dir()
    home = results.parent.parent if results.parent.name == "notebooks" else results
    folder = home / "_build"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def _results_dir() -> Path:
    """``notebooks/results`` of the clone that this module or the chapter is part of.

    ``ARTLIB_RESULTS`` names another folder. The clone of the package goes before the
    current folder: after a restart of a kernel, that may be any folder. A package
    that was installed has no clone, so the folders around the chapter are looked at.
    """
    if chosen := os.environ.get("ARTLIB_RESULTS"):
        return Path(chosen).expanduser().absolute()
    around = [Path(__file__).resolve().parent.parent.parent]
    with contextlib.suppress(FileNotFoundError):  # a current folder that is gone
        here = Path.cwd()
        around += [here, *here.parents]
    for folder in around:
        if (results := folder / "notebooks" / "results").is_dir():
            return results
    raise FileNotFoundError(
        f"no folder notebooks/results beside the package ({around[0]}) nor around the "
        "current folder: run the chapter inside a clone of the book's repository, or "
        "name the folder of the results in the environment variable ARTLIB_RESULTS"
    )
