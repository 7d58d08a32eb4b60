r"""Tables as a reader sees them: HTML where there is a page, text where there is none.

A cell is a number, a number with an interval, or numbers of several seeds. In a column
in which less (or more) is better, the best is marked, and so is what cannot be told
apart from it. What "cannot be told apart" means depends on what is known:

* errors of single samples, as a `Comparison` holds them: the 95 % interval of the
  paired ratio to the best contains 1;
* an interval: it overlaps that of the best;
* several seeds, matched: the best is not ahead in every one;
* one number: it looks the same with the digits that are shown.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, cast

import numpy as np

from ..comparison.bootstrap import Interval
from ..comparison.table import Comparison
from .surroundings import in_kernel

Value: TypeAlias = Any
"""Of a cell: a number, an `Interval`, one number per seed, text, or None for a gap."""

Row: TypeAlias = Sequence[Value] | Mapping[Any, Value]
"""Of a table: the values in the order of the columns, or by the name of the column."""

Best: TypeAlias = Literal["least", "most"] | None

SOLVER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "euler": "Euler",
        "heun": "Heun",
        "rk4": "RK4",
        "dpmpp_2m": "DPM-Solver++(2M)",
        "unipc": "UniPC",
        "unipc3": "UniPC-3",
        "ipndm2": "iPNDM-2",
        "ipndm3": "iPNDM-3",
        "dopri5": "dopri5",
    }
)
"""The solvers as the pages spell them, by the name that `artlib.sample` takes."""

BEST, TIED = "*", "~"
"""Marks in text; on a page the numbers are bold, and what is tied has a sign."""

_ROUNDING = 1e-9  # relative

_SAME = "\N{ALMOST EQUAL TO}"
_GAP = "\N{EN DASH}"


def table(
    rows: Comparison | Mapping[str, Comparison] | Mapping[Any, Row],
    solver: str | None = None,
    measure: str | Mapping[str, str] = "error",
    *,
    caption: str,
    name: str = "",
    columns: Sequence[Any] | None = None,
    labels: Sequence[str] | Mapping[str, str] | None = None,
    corner: str | None = None,
    best: Best | Literal["as measured"] = "as measured",
    outside: Sequence[str] = (),
    digits: int = 3,
    scale: float = 1.0,
    intervals: bool = True,
) -> None:
    """Show a table of results: numbered and captioned on a page, as text elsewhere.

    Args:
        rows: A `Comparison`, or label -> row. A label that is a pair puts the row into
            a group: ``("digits", "EDM")``; the best is then the best of the group. Or
            name -> `Comparison`, all with the same NFE: each is a group.
        solver: Of a comparison: whose cells.
        measure: Of a comparison: which number; or name -> which number, of one unit,
            each a group: ``{"rms": "error", "median": "median"}``.
        caption: What the numbers are, **with their unit**. Backticks are code. How the
            best is marked is added.
        name: To refer to the table by number, ``{numref}`tab-name```.
        columns: Heads of the columns; of a comparison, the numbers of steps (all).
        labels: Of a comparison: which rows, and, if it is a mapping, how they are
            called on the page (all, as they are).
        corner: Head of the first column (of a comparison, ``"NFE"``).
        best: Which number of a column is marked; of a comparison the least unless it
            is said that there is none.
        outside: Labels that take no part in that: a bound, a reference, an oracle.
        digits: Significant digits.
        scale: A factor for all numbers, 100 for per cent, say.
        intervals: Whether the interval of a number that has one is shown.

    Raises:
        ValueError: If a row has another number of cells than there are columns, or
            nothing is there to show.
    """
    measured = _measured(rows)
    tied: list[set[Any]] | None = None
    if measured:
        best = "least" if best == "as measured" else best
        corner = "NFE" if corner is None else corner
        heads, cells, tied = _of_comparisons(
            measured, solver, measure, columns, labels, outside, most=best == "most"
        )
    else:
        best = None if best == "as measured" else best
        heads, cells = _of_rows(cast("Mapping[Any, Row]", rows), columns)
    if not cells:
        raise ValueError("rows: expected at least one row, got none")
    marks = _marks(cells, best, outside, tied, digits)
    shown = {
        label: [_written(value, digits, scale, intervals) for value in row]
        for label, row in cells.items()
    }
    note = _note(best, marks, cells, measured=tied is not None)
    page = _page(caption, note, name, corner or "", heads, shown, marks)
    text = _text(caption, note, corner or "", heads, shown, marks)
    if in_kernel():
        from IPython.display import display

        display({"text/html": page, "text/plain": text}, raw=True)
    else:
        print(text)


def _of_rows(
    rows: Mapping[Any, Row], columns: Sequence[Any] | None
) -> tuple[list[str], dict[Any, list[Value]]]:
    """Heads of the columns, and the values of every row in their order."""
    first = next(iter(rows.values()), ())
    if columns is None:
        if not isinstance(first, Mapping):
            raise ValueError("columns: rows that are lists need the heads of columns")
        columns = list(first)
    cells = {}
    for label, row in rows.items():
        values = [row.get(c) for c in columns] if isinstance(row, Mapping) else [*row]
        if len(values) != len(columns):
            raise ValueError(
                f"rows: {label!r} has {len(values)} cells, there are {len(columns)} "
                "columns; put None where there is nothing"
            )
        cells[label] = values
    return [str(column) for column in columns], cells


def _measured(rows: Any) -> dict[str, Comparison]:
    """Group -> comparison, without a name if it is alone; empty for other rows."""
    if isinstance(rows, Comparison):
        return {"": rows}
    if rows and all(isinstance(found, Comparison) for found in rows.values()):
        return dict(rows)
    return {}


def _of_comparisons(
    found: Mapping[str, Comparison],
    solver: str | None,
    measure: str | Mapping[str, str],
    columns: Sequence[Any] | None,
    labels: Sequence[str] | Mapping[str, str] | None,
    outside: Sequence[str],
    *,
    most: bool,
) -> tuple[list[str], dict[Any, list[Value]], list[set[Any]]]:
    """Heads, values and ties of all groups; a label alone if there is one group."""
    if solver is None:
        every = {key.split()[0] for one in found.values() for key in one.cells}
        raise ValueError(
            "solver: a comparison has a table for each solver, name one of "
            f"{sorted(every)}"
        )
    measures = {"": measure} if isinstance(measure, str) else measure
    heads: list[str] = []
    cells: dict[Any, list[Value]] = {}
    tied: list[set[Any]] = []
    for name, one in found.items():
        for called, number in measures.items():
            group = ", ".join(filter(None, [name, called]))
            its_heads, its_cells, its_ties = _of_comparison(
                one, solver, number, columns, labels, outside, most=most
            )
            if heads and its_heads != heads:
                raise ValueError(
                    f"rows: {name!r} has the NFE {its_heads}, the one before it "
                    f"{heads}; name common numbers of steps in columns"
                )
            heads, tied = its_heads, tied or [set() for _ in its_heads]
            for label, row in its_cells.items():
                cells[(group, label) if group else label] = row
            for column, alike in zip(tied, its_ties, strict=True):
                column |= {(group, x) if group else x for x in alike}
    return heads, cells, tied


def _of_comparison(
    found: Comparison,
    solver: str,
    measure: str,
    columns: Sequence[Any] | None,
    labels: Sequence[str] | Mapping[str, str] | None,
    outside: Sequence[str],
    *,
    most: bool,
) -> tuple[list[str], dict[Any, list[Value]], list[set[Any]]]:
    """Heads, values, and for every column the labels that are tied with its best."""
    steps = found.steps(solver) if columns is None else [int(K) for K in columns]
    chosen = found.labels(solver) if labels is None else list(labels)
    names = labels if isinstance(labels, Mapping) else {}
    cells: dict[Any, list[Value]] = {names.get(x, x): [] for x in chosen}
    tied: list[set[Any]] = []
    for K in steps:
        key = f"{solver} {K}"
        here = [x for x in chosen if x in found.cells[key]]
        paired = all(x in found.samples.get(key, {}) for x in here) and measure in (
            "error",
            "median",
        )
        for label in chosen:
            value: Value = None
            if label in here and paired:
                value = found.interval(solver, K, label, measure=measure)
            elif label in here:
                value = found.values(solver, K, label, measure)
            cells[names.get(label, label)].append(value)
        alike: set[Any] = set()
        here = [x for x in here if names.get(x, x) not in outside]
        if paired and here:
            least = min(here, key=lambda x: cells[names.get(x, x)][-1].value)
            for label in here:
                if label == least or not cells[names.get(least, least)][-1].value:
                    continue
                ratio = found.ratio(solver, K, label, least, measure=measure)
                if ratio.low <= 1:
                    alike.add(names.get(label, label))
        elif here:
            values = {x: found.values(solver, K, x, measure) for x in here}
            sign = -1 if most else 1
            first = min(here, key=lambda x: float(sign * values[x].mean()))
            alike = {
                names.get(x, x)
                for x in here
                if x != first and not (sign * values[first] < sign * values[x]).all()
            }
        tied.append(alike)
    return [str(found.nfe[f"{solver} {K}"]) for K in steps], cells, tied


def _middle(value: Value) -> float | None:
    """The number that a cell is judged by; None if it takes no part."""
    if value is None or isinstance(value, str | bool):
        return None
    if isinstance(value, Interval):
        return value.value
    return float(np.mean(np.asarray(value, dtype=np.float64)))


def _group(label: Any) -> Any:
    return label[0] if isinstance(label, tuple) else None


def _marks(
    cells: Mapping[Any, list[Value]],
    best: Best,
    outside: Sequence[str],
    tied: list[set[Any]] | None,
    digits: int,
) -> dict[tuple[Any, int], str]:
    """Label and column -> the mark of the best, or of what is tied with it."""
    marks: dict[tuple[Any, int], str] = {}
    if best is None:
        return marks
    sign = 1 if best == "least" else -1
    groups = dict.fromkeys(_group(label) for label in cells)
    for column in range(len(next(iter(cells.values())))):
        for group in groups:
            rivals = {
                label: (value, sign * middle)
                for label, row in cells.items()
                for value in [row[column]]
                for middle in [_middle(value)]
                if _group(label) == group and middle is not None
                if (label[-1] if isinstance(label, tuple) else label) not in outside
            }
            if len(rivals) < 2:
                continue
            least = min(middle for _, middle in rivals.values())
            # Of what differs by rounding alone, each processor has another least one.
            first = next(
                label
                for label, (_, middle) in rivals.items()
                if math.isclose(middle, least, rel_tol=_ROUNDING)
            )
            marks[first, column] = BEST
            for label, (value, _) in rivals.items():
                if label == first:
                    continue
                if tied is not None:
                    same = label in tied[column]
                else:
                    same = _alike(value, rivals[first][0], sign, digits)
                if same:
                    marks[label, column] = TIED
    return marks


def _alike(value: Value, least: Value, sign: int, digits: int) -> bool:
    """Whether a cell cannot be told apart from the best one of its column."""
    if isinstance(value, Interval) and isinstance(least, Interval):
        return value.low <= least.high and least.low <= value.high
    here, there = np.asarray(value, float), np.asarray(least, float)
    if here.ndim == there.ndim == 1 and here.shape == there.shape and here.size > 1:
        return not bool((sign * there < sign * here).all())
    return _number(float(here.mean()), digits) == _number(float(there.mean()), digits)


def _number(value: float, digits: int) -> str:
    """A number with so many significant digits, without an exponent where it can be."""
    if value == 0:
        return "0"
    if np.isinf(value):
        return f"{value}".replace("inf", "∞")
    if abs(value) < 10.0**-4 or abs(value) >= 10.0**7:
        return f"{value:.{max(digits - 1, 0)}e}"
    rounded = float(f"{value:.{digits - 1}e}")
    places = digits - 1 - int(np.floor(np.log10(abs(rounded))))
    return f"{rounded:,.{max(places, 0)}f}"


def _places(text: str) -> int:
    return len(text.rpartition(".")[2]) if "." in text else 0


def _written(
    value: Value, digits: int, scale: float, intervals: bool
) -> tuple[str, str]:
    """The number of a cell and what stands behind it, both as text."""
    if value is None:
        return _GAP, ""
    if isinstance(value, str | bool):
        return str(value), ""
    if isinstance(value, int | np.integer):
        return f"{value * scale if scale != 1 else value:,}", ""
    if isinstance(value, Interval):
        if np.isnan(value.value):  # there is none, as of a goal that is not reached
            return _GAP, ""
        number = _number(scale * value.value, digits)
        if not intervals or "e" in number:
            return number, ""
        low, high = (
            f"{scale * end:,.{_places(number)}f}".replace("inf", "∞")
            for end in (value.low, value.high)
        )
        return number, f"[{low}, {high}]"
    values = scale * np.asarray(value, dtype=np.float64)
    number = _number(float(values.mean()), digits)
    if values.ndim == 0 or values.size < 2 or not intervals or "e" in number:
        return number, ""
    spread = float(values.std(ddof=1))
    places = _places(number)
    if spread > 0 and (known := _places(_number(spread, 3))) < places:
        # What is smaller than its spread has no digits beyond those of the spread.
        number, places = f"{values.mean():,.{known}f}", known
    return number, f"\N{PLUS-MINUS SIGN} {spread:,.{places}f}"


def _note(
    best: Best,
    marks: Mapping[tuple[Any, int], str],
    cells: Mapping[Any, list[Value]],
    *,
    measured: bool,
) -> tuple[str, str]:
    """What the marks and what stands behind a number mean; for a page, for text."""
    kinds = {
        "interval" if isinstance(value, Interval) else "seeds"
        for row in cells.values()
        for value in row
        if isinstance(value, Interval)
        or (not isinstance(value, str) and value is not None and np.ndim(value) == 1)
    }
    parts = []
    if "interval" in kinds:
        parts.append("In brackets, 95 % intervals.")
    if "seeds" in kinds:
        parts.append("Behind \N{PLUS-MINUS SIGN}, the standard deviation over seeds.")
    if not marks:
        return " ".join(parts), " ".join(parts)
    where = "a column" if all(_group(x) is None for x in cells) else "a group"
    bold, star = f"Bold: the {best} of {where}", f"{BEST} the {best} of {where}"
    if TIED in marks.values():
        if measured and kinds == {"interval"}:
            why = "not told apart from it by paired samples"
        elif kinds == {"interval"}:
            why = "its interval overlaps"
        elif "seeds" in kinds:
            why = "not behind it in every seed"
        else:
            why = "equal with these digits"
        bold, star = f"{bold}; {_SAME}: {why}", f"{star}; {TIED} {why}"
    return " ".join([*parts, f"{bold}."]), " ".join([*parts, f"{star}."])


def _coded(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _page(
    caption: str,
    note: tuple[str, str],
    name: str,
    corner: str,
    heads: Sequence[str],
    shown: Mapping[Any, list[tuple[str, str]]],
    marks: Mapping[tuple[Any, int], str],
) -> str:
    named = f' id="{html.escape(name)}"' if name else ""
    lines = [f'<table class="art-table"{named}>']
    lines.append(f"<caption>{_coded(' '.join(filter(None, [caption, note[0]])))}")
    lines.append("</caption>")
    row = "".join(f'<th scope="col">{_coded(head)}</th>' for head in [corner, *heads])
    lines.append(f"<thead><tr>{row}</tr></thead>")
    lines.append("<tbody>")
    group = None
    for label, values in shown.items():
        if _group(label) != group:
            group = _group(label)
            lines.append(
                f'<tr class="art-group"><th scope="rowgroup">{_coded(str(group))}</th>'
                f'<td colspan="{len(heads)}"></td></tr>'
            )
        text = label[-1] if isinstance(label, tuple) else label
        cells = [f'<th scope="row">{_coded(str(text))}</th>']
        for column, (number, behind) in enumerate(values):
            mark = marks.get((label, column))
            written = html.escape(number)
            if mark:
                sign = f"<sup>{_SAME}</sup>" if mark == TIED else ""
                written = f"<strong>{written}</strong>{sign}"
            if behind:
                written += f' <span class="art-behind">{html.escape(behind)}</span>'
            cells.append(f"<td>{written}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</tbody>")
    lines.append("</table>")
    return "\n".join(lines)


def _text(
    caption: str,
    note: tuple[str, str],
    corner: str,
    heads: Sequence[str],
    shown: Mapping[Any, list[tuple[str, str]]],
    marks: Mapping[tuple[Any, int], str],
) -> str:
    rows: list[tuple[Any, list[str]]] = [(None, [corner, *heads])]
    for label, values in shown.items():
        text = str(label[-1] if isinstance(label, tuple) else label)
        cells = [
            " ".join(filter(None, [number, behind]))
            + marks.get((label, column), " " if marks else "")
            for column, (number, behind) in enumerate(values)
        ]
        rows.append((_group(label), [text, *cells]))
    widths = [max(len(row[i]) for _, row in rows) for i in range(len(heads) + 1)]
    lines = [caption.replace("`", "")]
    lines += [note[1]] if note[1] else []
    group = None
    for key, row in rows:
        if key != group:
            group = key
            lines.append(str(group))
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(w + 2) for cell, w in zip(row[1:], widths[1:], strict=True))
        lines.append((first + "".join(rest)).rstrip())
    return "\n".join(lines)
