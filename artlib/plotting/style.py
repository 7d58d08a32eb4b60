r"""The one style and the one palette of all figures.

The colours are those of Okabe and Ito, darkened until each has a contrast of at least
3 : 1 against the panel (WCAG 2.1, success criterion 1.4.11):

.. math:: \frac{L_{panel} + 0.05}{L_{colour} + 0.05} \ge 3

with L the relative luminance. Colour is never the only cue: each schedule also has a
marker and a line style of its own, and a family (EDM and EDM unpinned, say) shares a
hue. Panels are opaque and off-white, so that a figure reads the same on a light and on
a dark page; at a width of 5.6 inches and letters of 11 points it still does on a
screen of 390 pixels.

References:
    Okabe and Ito, Color Universal Design (2008), https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import matplotlib.style
from matplotlib.figure import Figure

from .._common.files import check_output, write_bytes

PANEL = "#f1eee7"
"""Background of every figure."""
INK = "#2a2926"
"""Letters, axes, and what belongs to no schedule."""
FAINT = "#d3cfc4"
"""Grid lines."""
SOFT = "#6b675e"
"""Secondary letters, reference lines."""

WIDTH = 5.6
"""Width of every figure in inches: a point is then nearly a pixel on a phone."""

Dash: TypeAlias = str | tuple[float, tuple[float, ...]]

DASHED: Dash = (0.0, (4.5, 1.8))
DOTTED: Dash = (0.0, (1.2, 1.4))
DASH_DOT: Dash = (0.0, (6.0, 1.6, 1.2, 1.6))


@dataclass(frozen=True)
class Look:
    """How one schedule is drawn, in every figure.

    Attributes:
        label: Its name as the figures spell it.
        color: Colour, ``#rrggbb``.
        marker: Marker of matplotlib.
        dash: Line style of matplotlib.
        hollow: Whether the marker is filled with the panel's colour.
        width: Line width in points.
    """

    label: str
    color: str
    marker: str
    dash: Dash = "solid"
    hollow: bool = False
    width: float = 1.8

    def line(self) -> dict[str, Any]:
        """Keyword arguments for ``Axes.plot``."""
        return {
            **self.dot(),
            "linestyle": self.dash,
            "linewidth": self.width,
        }

    def dot(self) -> dict[str, Any]:
        """The same for a marker alone."""
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": "none",
            "markerfacecolor": PANEL if self.hollow else self.color,
        }


_KNOWN = (
    Look("Uniform", "#6b675e", "x", DOTTED),
    Look("DPM (log-SNR)", "#0b62a0", "v"),
    Look("DPM unpinned", "#2f81bd", "^", DASHED, hollow=True),
    Look("EDM", "#b34700", "s"),
    Look("EDM unpinned", "#cc5d12", "D", DASHED, hollow=True),
    Look("KL-optimal", "#826300", "P", DASH_DOT),
    Look("Beta", "#6557a6", "X", DOTTED),
    Look("ART", "#00735a", "o", width=2.6),
    Look("ART paper average", "#228a6e", "h", DASHED, hollow=True),
    Look("ART-RL", "#a6397c", "p", DASH_DOT, width=2.2),
    Look("oracle", "#2a2926", "*", (0.0, (8.0, 1.5))),
    Look("reference", "#2a2926", ".", DOTTED),
)

LOOKS: Mapping[str, Look] = MappingProxyType({look.label: look for look in _KNOWN})
"""The look of every known schedule, by its label."""

# Other spellings, already reduced to lower-case words. `Schedule.name` is one of them.
_ALIASES = {
    "dpm": "DPM (log-SNR)",
    "log snr": "DPM (log-SNR)",
    "log snr unpinned": "DPM unpinned",
    "dpm log snr unpinned": "DPM unpinned",
    "kl": "KL-optimal",
    "arctan": "KL-optimal",
    "art paper": "ART paper average",
    "rl": "ART-RL",
    "actor critic": "ART-RL",
}

# For schedules of other names: colours that no known schedule has, in the order of use.
_OTHERS = tuple(
    Look("", color, marker, dash)
    for color, marker, dash in (
        ("#00758f", "<", "solid"),
        ("#8f5a3c", ">", DASHED),
        ("#5c7a1f", "d", DASH_DOT),
        ("#b5406a", "H", "solid"),
        ("#4b5fa8", "8", DASHED),
        ("#7a4f8c", "1", DASH_DOT),
    )
)


def _words(name: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


_BY_WORDS = {_words(label): look for label, look in LOOKS.items()} | {
    words: LOOKS[label] for words, label in _ALIASES.items()
}


def look_of(name: str) -> Look:
    """The look of a known schedule in any spelling, else a plain one in ink."""
    return _BY_WORDS.get(_words(name), Look(name, INK, ""))


def looks(names: Iterable[str]) -> list[Look]:
    """The looks of the curves of one figure, no two the same.

    Args:
        names: Names of schedules. Known ones are recognised in any spelling
            (``"edm"``, ``"log_snr (unpinned)"``) and get the label and the look of
            `LOOKS`; others keep their name and get a free look in order.

    Returns:
        One `Look` per name.
    """
    chosen: list[Look] = []
    others = 0
    for name in names:
        known = _BY_WORDS.get(_words(name))
        if known is None or known in chosen:
            other = _OTHERS[others % len(_OTHERS)]
            others += 1
            known = Look(name, other.color, other.marker, other.dash)
        chosen.append(known)
    return chosen


_RC = {
    "figure.facecolor": PANEL,
    "axes.facecolor": PANEL,
    "savefig.facecolor": PANEL,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 11.0,
    "axes.labelsize": 11.0,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "legend.handlelength": 2.9,
    "legend.columnspacing": 1.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.9,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "lines.markersize": 6.0,
    "lines.markeredgewidth": 1.3,
    "lines.dash_capstyle": "butt",
    "lines.scale_dashes": True,
    "hatch.linewidth": 0.8,
    "figure.dpi": 160.0,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of the library, and leave matplotlib's settings as they were.

    Example:
        >>> import matplotlib
        >>> with style():
        ...     size = matplotlib.rcParams["font.size"]
        >>> size
        11.0
    """
    with matplotlib.style.context(["default", _RC]):
        yield


class Panel(Figure):
    """A figure outside of pyplot that shows itself, once, in a notebook.

    pyplot keeps every figure that it makes until it is closed; this one belongs to
    nobody but the caller. It is drawn in the library's style whenever it is drawn.
    """

    def __init__(
        self, height: float, *, layout: Literal["constrained"] | None = "constrained"
    ) -> None:
        with style():
            super().__init__(figsize=(WIDTH, height), layout=layout)

    def draw(self, renderer: Any) -> None:
        # Fonts are looked up when they are drawn, and some versions of
        # matplotlib make the ticks then, with the settings of that moment.
        with style():
            super().draw(renderer)

    def savefig(self, fname: Any, *, format: str | None = None, **kwargs: Any) -> None:
        """As matplotlib's; a file is written whole or not at all."""
        if not isinstance(fname, str | os.PathLike):
            with style():
                super().savefig(fname, format=format, **kwargs)
            return
        path = os.fspath(fname)
        suffix = os.path.splitext(path)[1][1:]
        if not (format or suffix):
            suffix = matplotlib.rcParams["savefig.format"]
            path = f"{path.rstrip('.')}.{suffix}"
        check_output(path)
        buffer = io.BytesIO()
        with style():
            super().savefig(buffer, format=format or suffix, **kwargs)
        write_bytes(path, buffer.getvalue())

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()
