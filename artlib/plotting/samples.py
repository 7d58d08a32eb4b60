"""The figure of images: rows that start from the same noise; see `plotting`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .axes import Array, finite_array
from .style import INK, SOFT, WIDTH, Panel, look_of, style

# Ink on paper, a little lighter than the panel.
_PAPER = LinearSegmentedColormap.from_list("paper", ["#faf8f3", INK])
# Around an image, in the gap between images: it covers no pixel of its neighbour.
_FRAME: dict[str, Any] = {
    "fill": False,
    "edgecolor": "#b3123a",
    "linewidth": 2.2,
    "joinstyle": "miter",
    "zorder": 3,
}


def plot_samples(
    rows: Mapping[str, Array] | Sequence[Array],
    labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    *,
    groups: Sequence[str | None] | None = None,
    marked: Sequence[Array | None] | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    columns: int | None = None,
) -> Figure:
    """Images from the same noise, a row per schedule: the last row is the reference.

    A column is one noise, so that a row differs from the last one only by what its
    solver got wrong.

    Args:
        rows: Label -> images [n, C, H, W] (C is 1 or 3) or [n, H, W]; or a list of them
            with ``labels``. The reference goes last and is set off by a rule.
        labels: A label per row, where ``rows`` is a list.
        captions: A caption per row, say ``"error 0.031, NFE 9"``.
        groups: A heading per row, drawn where it changes (say the solver); None for
            rows that belong to none.
        marked: Images to frame, a row of truth values [n] per row, or None for a row
            without; say those that ended elsewhere than the reference.
        value_range: Values that are drawn as no ink (black in colour) and full ink.
        columns: At most so many images a row; by default up to 10.

    Returns:
        The figure.

    Raises:
        ValueError: If the numbers of rows, labels, captions, groups and marks differ,
            or the images do not have one shape.
    """
    if isinstance(rows, Mapping):
        if labels is not None:
            raise ValueError("labels: the dict of rows has them already; leave it out")
        labels, rows = list(rows), list(rows.values())
    images = [_images(row, f"rows[{i}]") for i, row in enumerate(rows)]
    if not images:
        raise ValueError("rows: got none; pass at least one row of images")
    count = len(images)
    frames = _marks(marked, images)
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"rows: expected images of one shape, got {sorted(shapes)}; a column is "
            "one noise"
        )
    n = min(columns or 10, images[0].shape[0])
    return _draw_rows(
        [image[:n] for image in images],
        _one_per_row(labels, count, "labels"),
        _one_per_row(captions, count, "captions"),
        _one_per_row(groups, count, "groups"),
        frames,
        value_range,
    )


def _draw_rows(
    images: Sequence[np.ndarray],
    labels: Sequence[str | None],
    captions: Sequence[str | None],
    groups: Sequence[str | None],
    frames: Sequence[np.ndarray],
    value_range: tuple[float, float],
) -> Figure:
    """Lay out rows of images on one axes whose unit is the inch."""
    n, height, width = images[0].shape[:3]
    margin, gap = 0.12, 0.05
    tile = (WIDTH - 2 * margin - (n - 1) * gap) / n
    tall = tile * height / width
    head = 0.27 if any(labels) or any(captions) else 0.0
    with style():
        y, places, headings, rules = margin, [], [], []
        for i, group in enumerate(groups):
            starts_group = i > 0 and group != groups[i - 1]
            if starts_group or (i == len(images) - 1 and i > 0):
                rules.append(y)
                y += 0.12
            if group is not None and (i == 0 or starts_group):
                headings.append((y, group))
                y += 0.3
            places.append(y)
            y += head + tall + 0.14
        figure = Panel(y - 0.14 + margin, layout=None)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        for row, top in enumerate(places):
            base = top + head - 0.09
            look = look_of(labels[row] or "")
            x = margin
            if look.marker:
                axes.plot([x + 0.07], [base - 0.055], **look.dot(), ms=7)
                x += 0.21
            axes.text(x, base, look.label, va="baseline", ha="left")
            axes.text(
                WIDTH - margin, base, captions[row] or "", va="baseline", ha="right"
            )
            for column, image in enumerate(images[row]):
                x = margin + column * (tile + gap)
                axes.imshow(
                    _to_unit(image, value_range),
                    cmap=_PAPER,
                    vmin=0.0,
                    vmax=1.0,
                    extent=(x, x + tile, top + head + tall, top + head),
                    interpolation="auto",
                )
                if frames[row][column]:
                    frame = Rectangle((x, top + head), tile, tall, **_FRAME)
                    axes.add_patch(frame)
        for rule in rules:
            axes.plot([margin, WIDTH - margin], [rule] * 2, color=SOFT, linewidth=0.8)
        for top, group in headings:
            axes.text(margin, top, group, va="top", ha="left", weight="bold", size=12)
        axes.set_xlim(0.0, WIDTH)
        axes.set_ylim(figure.get_figheight(), 0.0)
    return figure


def _to_unit(image: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    low, high = value_range
    unit = np.clip((image - low) / (high - low), 0.0, 1.0)
    return unit[..., 0] if unit.shape[-1] == 1 else unit


def _images(row: Array, name: str) -> np.ndarray:
    """A row of images as float [n, H, W, C]."""
    array = finite_array(row, name)
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or array.shape[1] not in (1, 3) or array.size == 0:
        raise ValueError(
            f"{name}: expected images [n, C, H, W] with C = 1 or 3, or [n, H, W], got "
            f"shape {np.shape(row)}"
        )
    return np.moveaxis(array, 1, -1)


def _marks(
    marked: Sequence[Array | None] | None, images: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Whether to frame each image, [n] per row."""
    rows = [None] * len(images) if marked is None else list(marked)
    if len(rows) != len(images):
        raise ValueError(
            f"marked: expected one per row, {len(images)}, got {len(rows)}"
        )
    marks = []
    for i, (row, image) in enumerate(zip(rows, images, strict=True)):
        count = image.shape[0]
        mark = np.zeros(count) if row is None else finite_array(row, f"marked[{i}]")
        if mark.shape != (count,):
            raise ValueError(
                f"marked[{i}]: expected one truth value per image, {count}, got shape "
                f"{mark.shape}"
            )
        marks.append(mark > 0)
    return marks


def _one_per_row(
    values: Sequence[str | None] | None, count: int, name: str
) -> list[str | None]:
    found: list[str | None] = [None] * count if values is None else list(values)
    if len(found) != count:
        raise ValueError(f"{name}: expected one per row, {count}, got {len(found)}")
    return found
