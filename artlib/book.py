r"""What the chapters need from their surroundings, with and without Jupyter.

A chapter runs in three places: in a Jupyter kernel (the committed outputs), as
plain Python (``make full CHAPTER=10``, usually on a GPU) and on Colab. The
functions here behave alike in all three, so that a chapter never asks where it is.

* :func:`glue` names a number, so that prose can quote it instead of copying it.
* :func:`show` displays a figure exactly once.
* :func:`full` and :func:`device` say how much to compute, and where.
* :func:`save_results` and :func:`load_results` keep the tables of full runs in
  ``notebooks/results/NAME.json`` of the clone (``ARTLIB_RESULTS`` names another
  folder), each with the circumstances it was made in;
  :func:`comparison` does that for tables of schedules, and checks a part, and
  :func:`learned` for schedules.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from matplotlib.figure import Figure

from . import __version__
from ._book_comparison import Listed, comparison, learned
from ._files import write_bytes

__all__ = [
    "Listed",
    "comparison",
    "device",
    "full",
    "glue",
    "learned",
    "load_results",
    "save_results",
    "scratch",
    "show",
]

#: Resolution of the figures in the book; the page scales them down to its width.
FIGURE_DPI = 160

#: Every number glued so far in this process, by name.
GLUED: dict[str, float | int | str] = {}


def full() -> bool:
    """Whether this is a full-size run (``ARTLIB_FULL=1`` in the environment)."""
    return os.environ.get("ARTLIB_FULL", "") not in ("", "0")


def device() -> torch.device:
    """The GPU if there is one, otherwise the CPU.

    ``ARTLIB_DEVICE`` overrides the choice. ``make test`` and ``make notebooks`` set
    it to ``cpu``, because the committed outputs were computed on one. On a GPU,
    TensorFloat-32 is switched off for convolutions, where torch allows it by default:
    its rounding, 1 in 1000, is larger than some errors that the chapters measure.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(os.environ.get("ARTLIB_DEVICE") or default)
    if chosen.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    return chosen


def glue(name: str, value: SupportsFloat | str, *, digits: int = 4) -> None:
    """Store a number under a name that any page of the book can quote.

    Args:
        name: The name used in the prose, for example ``ch03-order``.
        value: A number, a one-element tensor or array, or a short text.
        digits: Significant digits kept. The stored record is compared byte for
            byte with a fresh run, so keep no digit that another CPU may change.

    Raises:
        ValueError: If the number is not finite; the prose would quote ``nan``.
    """
    stored: float | int | str
    if isinstance(value, (str, bool)):
        stored = str(value)
    elif isinstance(value, int):
        stored = value
    else:
        number = float(value)
        if number - number != 0.0:
            raise ValueError(f"glue({name!r}): expected a finite number, got {number}")
        stored = float(f"{number:.{digits}g}")
    GLUED[name] = stored
    if _in_kernel():
        try:
            from myst_nb import glue as record
        except ImportError:  # Colab: the chapter runs, nothing quotes its numbers
            return
        record(name, stored, display=False)


def show(figure: Figure) -> None:
    """Display a figure once, as a PNG, and close it; no effect outside Jupyter."""
    if _in_kernel():
        from IPython.display import Image, display

        buffer = io.BytesIO()
        # Without the version of matplotlib in the file, equal pictures are equal bytes.
        figure.savefig(
            buffer, dpi=FIGURE_DPI, bbox_inches="tight", metadata={"Software": None}
        )
        display(Image(data=buffer.getvalue(), format="png"))
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)


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
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "artlib": __version__,
            "torch": torch.__version__,
        },
    }
    text = json.dumps({"made": made, "results": results}, indent=1, allow_nan=False)
    path = _results_dir() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, f"{text}\n".encode())
    return path


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


def _in_kernel() -> bool:
    """Whether this process is a Jupyter kernel (IPython alone does not count)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _results_dir() -> Path:
    """``notebooks/results`` of the clone that this module or the chapter is part of.

    ``ARTLIB_RESULTS`` names another folder. The clone of the package goes before the
    current folder: after a restart of a kernel, that may be any folder. A package
    that was installed has no clone, so the folders around the chapter are looked at.
    """
    if chosen := os.environ.get("ARTLIB_RESULTS"):
        return Path(chosen).expanduser().absolute()
    around = [Path(__file__).resolve().parent.parent]
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


def _commit() -> str:
    """The commit the code stands at, with ``+`` if tracked files differ from it.

    Results are not counted: a run that writes two files would mark the second. A
    package that was installed may lie in another project's repository, whose commit
    says nothing of it.
    """
    home = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=home,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != home:
            return os.environ.get("ARTLIB_COMMIT", "unknown")
        commit = git("rev-parse", "--short=12", "HEAD")
        changes = git("status", "--porcelain", "-uno", "--", ":!notebooks/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ARTLIB_COMMIT", "unknown")
    return commit + ("+" if changes else "")
