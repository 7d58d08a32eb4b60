"""A chapter in three places: a Jupyter kernel, plain Python, Colab."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import SupportsFloat

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure

from .progress import watch

#: Resolution of the figures in the book; the page scales them down to its width.
FIGURE_DPI = 160

# Mean change of a figure's levels (0 to 255). Compared by eye, enlarged: the densities
# of chapter 01, at 0.8, have bands, its coloured paths, at 0.6, look the same.
_UNSEEN = 0.7

#: Every number glued so far in this process, by name.
GLUED: dict[str, float | int | str] = {}


def full() -> bool:
    """Whether this is a full-size run (``ARTLIB_FULL=1`` in the environment)."""
    return os.environ.get("ARTLIB_FULL", "") not in ("", "0")


def commit() -> str:
    """The commit the code stands at, with ``+`` if tracked files differ from it.

    Results are not counted: a run that writes two files would mark the second. A
    package that was installed may lie in another project's repository, whose commit
    says nothing of it.
    """
    home = Path(__file__).resolve().parent.parent.parent

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


def device() -> torch.device:
    """The GPU if there is one, otherwise the CPU.

    ``ARTLIB_DEVICE`` overrides the choice. ``make test`` and ``make notebooks`` set
    it to ``cpu``, because the committed outputs were computed on one. On a GPU,
    TensorFloat-32 is switched off for convolutions, where torch allows it by default:
    its rounding, 1 in 1000, is larger than some errors that the chapters measure.

    Every chapter begins with it; in a notebook that a person has open, cells that take
    long have a bar from then on (`artlib.book.progress`).
    """
    watch()
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
    if in_kernel():
        try:
            from myst_nb import glue as record
        except ImportError:  # Colab: the chapter runs, nothing quotes its numbers
            return
        record(name, stored, display=False)


def show(figure: Figure) -> None:
    """Display a figure once, as a PNG, and close it; no effect outside Jupyter."""
    if in_kernel():
        from IPython.display import Image, display

        display(Image(data=picture(figure), format="png"))
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)


def picture(figure: Figure) -> bytes:
    """A figure as a small PNG: 256 colours, where no eye can tell.

    Lines and grey images have few colours, and a palette holds almost all of them to 1
    of 256 levels. Smooth shades would come out in bands: they, photographs in colour,
    and pictures that one can see through keep all colours. Equal figures give equal
    bytes.

    Args:
        figure: Of any size; drawn with `FIGURE_DPI`.

    Returns:
        The content of the file, with a palette a third of what matplotlib writes.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=FIGURE_DPI, bbox_inches="tight")
    drawn = PIL.Image.open(buffer).convert("RGBA")
    if drawn.getchannel("A").getextrema() == (255, 255):
        drawn = drawn.convert("RGB")
        drawn = _in_few_colours(drawn) or drawn
    buffer = io.BytesIO()
    drawn.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _in_few_colours(drawn: PIL.Image.Image) -> PIL.Image.Image | None:
    """With a palette; None if that could be seen."""
    # This method leaves no colour far from all of the palette. k-means then adapts it,
    # which halves the change, and takes long where that cannot be enough. Pillow's
    # dithering, which would hide the bands, shifts plain colours by up to 6 levels.
    for kmeans, most in ((0, 3 * _UNSEEN), (1, _UNSEEN)):
        reduced = drawn.quantize(
            256,
            method=PIL.Image.Quantize.MAXCOVERAGE,
            kmeans=kmeans,
            dither=PIL.Image.Dither.NONE,
        )
        levels = [np.asarray(im.convert("RGB"), np.int16) for im in (drawn, reduced)]
        if np.abs(levels[0] - levels[1]).max(-1).mean() > most:
            return None
    return reduced


def in_kernel() -> bool:
    """Whether this process is a Jupyter kernel (IPython alone does not count)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")
