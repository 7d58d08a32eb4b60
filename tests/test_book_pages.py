"""What the pages of the book are made of besides chapters: links of names, the PDF."""

from pathlib import Path

import build_pdf
import pytest
from linked_names import target_of

import artlib


@pytest.mark.parametrize(
    ("text", "page", "target"),
    [
        ("artlib.art", "notebooks/04", "artlib.art"),
        ("artlib.art(flow, x_T)", "notebooks/04", "artlib.art"),
        ("artlib.Plan.load", "notebooks/04", "artlib.Plan.load"),
        ("StiffnessTable.held_out()", "notebooks/04", "artlib.StiffnessTable.held_out"),
        ("cost", "book/paper-map", "artlib.cost"),
        ("cost", "notebooks/04", None),
        ("x_T / 2", "notebooks/04", None),
        ("pip install artlib", "notebooks/00", None),
    ],
)
def test_code_names_stand_for_names_of_artlib(
    text: str, page: str, target: str | None
) -> None:
    assert target_of(text, page) == target
    if target is not None and target.count(".") == 1:
        assert target.removeprefix("artlib.") in artlib.__all__


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("#here", "#here"),
        ("https://elsewhere.org/x.html", "https://elsewhere.org/x.html"),
        ("../book/glossary.html#term-NFE", "#term-NFE"),
        ("../book/glossary.html", "#page-book-glossary"),
        ("../_images/a.png", "_images/a.png"),
    ],
)
def test_links_stay_inside_of_the_pdf(address: str, inside: str) -> None:
    pages = ["notebooks/04.html", "book/glossary.html"]
    assert build_pdf._inside("notebooks/04.html", address, pages) == inside


def test_pdf_has_all_pages_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_pdf, "HTML", tmp_path)
    for name, link in (("a", "b.html"), ("b", "a.html#x")):
        (tmp_path / f"{name}.html").write_text(
            "<html><head><title>t</title></head><body><nav>no</nav><article>"
            f'<h1>Page {name}<a href="#h">#</a></h1><a href="{link}">to</a></article>'
            "<script>late()</script></body></html>"
        )
    page = build_pdf.one_page(["a.html", "b.html"])
    assert page.index("<h1>Page a") < page.index("<h1>Page b")
    assert 'href="#page-b"' in page
    assert 'href="#x"' in page
    assert "no</nav>" not in page
    assert page.count("late()") == 1


def test_pdf_without_chromium_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_pdf.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="apt install chromium"):
        build_pdf.main()


def test_contents_of_the_pdf_are_those_of_the_book() -> None:
    pages = build_pdf.contents()
    assert pages[0] == "notebooks/intro.html"
    for page in pages:
        path = build_pdf.ROOT / page
        assert path.with_suffix(".ipynb").is_file() or path.with_suffix(".md").is_file()
