"""Tables of results: what is marked, what is said of it, on a page and as text."""

import re
from typing import Any

import numpy as np
import pytest
from captioned_tables import CaptionedTables
from docutils import nodes
from docutils.utils import new_document

from artlib import book
from artlib.comparison import Comparison, Interval


def shown(
    capsys: pytest.CaptureFixture[str], *args: Any, **options: Any
) -> dict[str, list[str]]:
    """Label -> cells of the text form."""
    book.table(*args, caption="Error, in units.", **options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Error, in units."
    return {
        parts[0]: parts[1:]
        for line in lines
        for parts in [re.split(r" {2,}", line.strip())]
        if len(parts) > 1
    }


def measured(errors: dict[str, np.ndarray]) -> Comparison:
    """One cell per schedule, at two seeds, from errors [2, n]."""
    rms = {k: np.sqrt((e**2).mean(1)).tolist() for k, e in errors.items()}
    samples = {k: e.tolist() for k, e in errors.items()}
    cells = {"heun 5": {k: {"error": v} for k, v in rms.items()}}
    count = len(next(iter(samples.values()))[0])
    return Comparison(cells, {"heun 5": 9}, count, {"heun 5": samples})


def test_what_is_tied_is_told_by_paired_samples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Sample by sample "near" is above the best or below it; "worse" is always above it,
    # by less than the samples differ: only pairs can tell.
    rng = np.random.default_rng(0)
    best = np.exp(rng.standard_normal((2, 200)))
    near = best * np.exp(0.3 * rng.standard_normal(best.shape) - 0.04)
    errors = {"best": best, "near": near, "worse": 1.05 * best}
    table = measured(errors)
    first, second = ("best", "near") if best.var() < near.var() else ("near", "best")
    rows = shown(capsys, table, "heun")
    assert rows["NFE"] == ["9"]
    assert rows[first][0].endswith("]*")
    assert rows[second][0].endswith("]~") == (
        table.ratio("heun", 5, second, first, measure="error").low <= 1
    )
    assert table.ratio("heun", 5, "worse", "best", measure="error").low > 1
    value, low, high = table.interval("heun", 5, "best", measure="error")
    places = len(f"{value:.3g}".partition(".")[2])
    ends = [float(x) for x in re.findall(r"[\d.]+", rows["best"][0])]
    assert ends == pytest.approx([value, low, high], abs=0.5 * 10**-places)


def test_a_sure_loser_is_not_marked(capsys: pytest.CaptureFixture[str]) -> None:
    best = np.exp(np.random.default_rng(0).standard_normal((2, 200)))
    rows = shown(capsys, measured({"best": best, "worse": 1.05 * best}), "heun")
    assert rows["best"][0].endswith("*")
    assert rows["worse"][0].endswith("]")


def test_rounding_does_not_choose_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    ulp = 2.0**-52
    alike = {"one": [1.0 + ulp, 1.0], "other": [1.0, 1.0 + ulp]}
    for best, worse in (("least", 1.5), ("most", 0.5)):
        rows = {**alike, "worse": [worse, worse]}
        found = shown(capsys, rows, columns=[2, 3], best=best, corner="K")
        assert [cell[-1] for cell in found["one"]] == ["*", "*"]
        assert [cell[-1] for cell in found["other"]] == ["~", "~"]


def test_seeds_are_compared_seed_by_seed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        "first": [[1.0, 2.0, 3.0]],
        "once ahead": [[1.5, 1.9, 4.0]],
        "behind": [[1.1, 2.1, 3.1]],
        "bound": [0.5],
    }
    found = shown(capsys, rows, columns=["a"], best="least", outside=["bound"])
    assert found["first"] == ["2.00 ± 1.00*"]
    assert found["once ahead"][0].endswith("~")
    assert found["behind"] == ["2.10 ± 1.00"]
    assert found["bound"] == ["0.500"]


@pytest.mark.parametrize(
    ("best", "marked"), [("least", "b~ c*"), ("most", "a*"), (None, "")]
)
def test_best_is_the_least_or_the_most(
    capsys: pytest.CaptureFixture[str], best: Any, marked: str
) -> None:
    intervals = {
        "a": {"x": Interval(3.0, 2.5, 3.5)},
        "b": {"x": Interval(1.1, 1.0, 1.2)},
        "c": {"x": Interval(1.0, 0.9, 1.15)},
    }
    found = shown(capsys, intervals, best=best)
    marks = [k + v[0][-1] for k, v in found.items() if v[0][-1] in "*~"]
    assert " ".join(marks) == marked


def test_what_is_not_reached_is_a_gap(capsys: pytest.CaptureFixture[str]) -> None:
    ends = {
        "never": {"x": Interval(np.nan, 19.8, np.inf)},
        "perhaps": {"x": Interval(14.3, 9.6, np.inf)},
        "endless": {"x": Interval(np.inf, 9.6, np.inf)},
    }
    found = shown(capsys, ends)
    assert found["never"] == ["\N{EN DASH}"]
    assert found["perhaps"] == ["14.3 [9.6, \N{INFINITY}]"]
    assert found["endless"][0].startswith("\N{INFINITY}")


def test_groups_have_a_best_each(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {("one", "a"): [1, 5], ("one", "b"): [2, 4], ("two", "c"): [9, None]}
    book.table(rows, caption="x", columns=["K", "L"], best="least")
    text = capsys.readouterr().out
    gap = "\N{EN DASH}"
    pattern = rf"^one\na +1\* +5\nb +2 +4\*\ntwo\nc +9 +{gap}$"
    assert re.search(pattern, text, re.MULTILINE)


def test_comparisons_are_groups_with_a_best_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # "a" is ahead on the one and behind on the other, in every sample.
    errors = np.exp(np.random.default_rng(0).standard_normal((2, 50)))
    one = measured({"a": errors, "b": 2 * errors})
    two = measured({"a": 2 * errors, "b": errors})
    for table in (one, two):
        for row in table.cells["heun 5"].values():
            row["median"] = row["error"]
    measures = {"rms": "error", "median": "median"}
    both = {"one": one, "two": two}
    book.table(both, "heun", measures, caption="x", intervals=False)
    marked, group = {}, ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(("one", "two")):
            group = line
        elif line.endswith("*"):
            marked[group] = line[0]
    names = ["one, rms", "one, median", "two, rms", "two, median"]
    assert list(marked.items()) == list(zip(names, "aabb", strict=True))
    other = Comparison({"heun 7": one.cells["heun 5"]}, {"heun 7": 13}, 50)
    with pytest.raises(ValueError, match="'two' has the NFE"):
        book.table({"one": one, "two": other}, "heun", caption="x")


def test_of_scores_the_most_is_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"low": [1.0, 2.0], "once ahead": [2.5, 2.7], "high": [2.4, 3.0]}
    cells = {"heun 5": {k: {"score": v} for k, v in scores.items()}}
    found = Comparison(cells, {"heun 5": 9}, 4)
    rows = shown(capsys, found, "heun", "score", best="most", intervals=False)
    assert [rows[k][0] for k in scores] == ["1.50", "2.60~", "2.70*"]


def test_what_is_outside_is_no_rival_of_ties(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = np.random.default_rng(0)
    errors = np.exp(rng.standard_normal((2, 200)))
    near = errors * np.exp(0.01 * rng.standard_normal(errors.shape))
    found = measured({"a": errors, "b": near, "bound": errors / 9})
    rows = shown(capsys, found, "heun", outside=["bound"])
    assert sorted(rows[k][0][-1] for k in "ab") == ["*", "~"]
    assert rows["bound"][0][-1] == "]"


def test_a_mean_has_no_digits_beyond_those_of_its_spread(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {
        "noise": [[-0.652, 0.660]],
        "number": [[1.00, 1.02]],
        "same": [[0.01, 0.01]],
    }
    found = shown(capsys, rows, columns=["a"])
    assert found["noise"] == ["0.004 ± 0.928"]
    assert found["number"] == ["1.01 ± 0.01"]
    assert found["same"] == ["0.0100 ± 0.0000"]


@pytest.mark.parametrize(
    ("value", "digits", "written"),
    [
        (0.12345, 3, "0.123"),
        (0.9996, 3, "1.00"),
        (1234.5, 3, "1,230"),
        (12.0, 3, "12.0"),
        (2e-6, 2, "2.0e-06"),
        (0.0, 3, "0"),
        (17, 3, "17"),
        ("never", 3, "never"),
    ],
)
def test_numbers_are_written_with_their_digits(
    capsys: pytest.CaptureFixture[str], value: Any, digits: int, written: str
) -> None:
    assert shown(capsys, {"a": {"x": value}}, digits=digits)["a"] == [written]


def test_page_has_heads_caption_and_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr("artlib.book.display.in_kernel", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda data, raw: seen.append(data))
    rows = {"a <b>": [0.25, 1.0], "c": [0.5, 0.75]}
    options: dict[str, Any] = {"columns": ["x", "y"], "best": "least", "name": "tab-x"}
    book.table(rows, caption="Error & `code`.", **options)
    book.table(rows, caption="Error & `code`.", **options)
    assert seen[0] == seen[1], "the same again, byte for byte"
    page, text = seen[0]["text/html"], seen[0]["text/plain"]
    assert page.startswith(
        '<table class="art-table" id="tab-x">\n<caption>Error &amp; '
    )
    assert "<code>code</code>" in page
    assert "a &lt;b&gt;" in page
    assert page.count('scope="col"') == 3
    assert page.count('scope="row"') == 2
    assert page.count("<strong>") == 2 == len(re.findall(r"\d\*", text))
    for number in ("0.250", "1.00", "0.500", "0.750"):
        assert number in page
        assert number in text


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        (Comparison(), {}, "solver"),
        ({}, {"columns": ["x"]}, "at least one row"),
        ({"a": [1]}, {}, "columns"),
        ({"a": [1]}, {"columns": ["x", "y"]}, "'a' has 1 cells"),
    ],
)
def test_refused(rows: Any, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        book.table(rows, caption="x", **options)


def test_a_table_of_the_page_has_a_number_and_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page: list[str] = []
    monkeypatch.setattr("artlib.book.display.in_kernel", lambda: True)
    monkeypatch.setattr(
        "IPython.display.display", lambda data, raw: page.append(data["text/html"])
    )
    book.table({"a": [1.0]}, caption="Of `a` & b.", columns=["x"], name="tab-it")
    document = new_document("page")
    document += nodes.raw(page[0], page[0], format="html")
    CaptionedTables(document).apply()
    (found,) = document.findall(nodes.table)
    assert found["names"] == ["tab-it"]
    title, inside = found.children
    assert title.astext() == "Of a & b."
    assert inside.astext().count("<td>") == 1
    assert document.nameids["tab-it"] in document.ids
