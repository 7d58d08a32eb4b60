"""A chapter in three places: a Jupyter kernel, plain Python, Colab."""

from __future__ import annotations

import io
import os
import sys
from typing import SupportsFloat

import torch
from matplotlib.figure import Figure

from .progress import watch

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

        buffer = io.BytesIO()
        # Without the version of matplotlib in the file, equal pictures are equal bytes.
        figure.savefig(
            buffer, dpi=FIGURE_DPI, bbox_inches="tight", metadata={"Software": None}
        )
        display(Image(data=buffer.getvalue(), format="png"))
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)


def in_kernel() -> bool:
    """Whether this process is a Jupyter kernel (IPython alone does not count)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")
