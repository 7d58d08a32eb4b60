"""Print the built book into one PDF, with the Chromium that is installed.

    python tools/build_pdf.py        _build/html -> _build/art-book.pdf

The pages are put into one, in the order of the contents, with links that stay inside of
it; what they need is read from the built book, so the network is not asked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urldefrag

import yaml
from bs4 import BeautifulSoup, Tag

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
TARGET = ROOT / "_build" / "art-book.pdf"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_CHROMIUM = (
    "make pdf prints with Chromium, and there is none: install it (Debian, Ubuntu: "
    "apt install chromium), or open a page of the book in any browser and print it; "
    "what is folded opens"
)
SECONDS = 900  # mathematics of all chapters is set before the page is printed


def contents() -> list[str]:
    """The pages in the order of the contents, as addresses inside of the book."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    names = [toc["root"]]
    for part in toc["parts"]:
        for chapter in part["chapters"]:
            names += [
                chapter["file"],
                *(s["file"] for s in chapter.get("sections", [])),
            ]
    return [f"{name}.html" for name in names]


def one_page(pages: list[str]) -> str:
    """All pages of the book as one."""
    first = BeautifulSoup((HTML / pages[0]).read_text(encoding="utf-8"), "html.parser")
    whole, titles = first.new_tag("article", attrs={"class": "bd-article"}), []
    for page in pages:
        soup = BeautifulSoup((HTML / page).read_text(encoding="utf-8"), "html.parser")
        article = soup.find("article")
        if not isinstance(article, Tag):
            raise ValueError(f"{page}: expected an article on the page, found none")
        for node in article.find_all(True):
            for key in ("src", "href"):
                if isinstance(address := node.get(key), str):
                    node[key] = _inside(page, address, pages)
        title = article.find("h1")
        titles.append((page, title.get_text().rstrip("#\n") if title else page))
        part = first.new_tag(
            "section", attrs={"class": "art-page", "id": _anchor(page)}
        )
        part.extend(list(article.children))
        whole.append(part)
    front = first.new_tag("nav")
    for page, heading in titles:
        line = first.new_tag("p")
        link = first.new_tag("a", href=f"#{_anchor(page)}")
        link.string = heading
        line.append(link)
        front.append(line)
    whole.insert(1, front)
    for node in first.head.find_all(["link", "script"]) if first.head else []:
        for key in ("src", "href"):
            if isinstance(address := node.get(key), str):
                node[key] = _inside(pages[0], address, pages)
    head = str(first.head)
    # Mathematics is set by the script that the pages load at their end.
    scripts = [
        _moved(node, pages)
        for node in (first.body.find_all("script") if first.body else [])
    ]
    body = f'<body><main class="bd-content">{whole}</main>{"".join(scripts)}</body>'
    return f'<!DOCTYPE html><html lang="en" data-theme="light">{head}{body}</html>'


def _moved(script: Tag, pages: list[str]) -> str:
    if isinstance(address := script.get("src"), str):
        script["src"] = _inside(pages[0], address, pages)
    return str(script)


def _anchor(page: str) -> str:
    return "page-" + page.removesuffix(".html").replace("/", "-")


def _inside(page: str, address: str, pages: list[str]) -> str:
    """An address as it is seen from the top of the built book."""
    if address.startswith("#") or ":" in address.split("/")[0]:
        return address
    path, fragment = urldefrag(address)
    found = os.path.normpath(os.path.join(os.path.dirname(page), path))
    if found in pages:
        return f"#{fragment or _anchor(found)}"
    return found


def main() -> None:
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        sys.exit(NO_CHROMIUM)
    if not (HTML / "index.html").is_file():
        sys.exit("there is no built book to print: make book first")
    page = HTML / "art-book.html"
    page.write_text(one_page(contents()), encoding="utf-8")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                f"--user-data-dir={profile}",
                "--no-pdf-header-footer",
                "--virtual-time-budget=600000",
                "--generate-pdf-document-outline",
                f"--print-to-pdf={TARGET}",
                page.as_uri(),
            ],
            check=True,
            timeout=SECONDS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    page.unlink()
    print(f"PDF: {TARGET}, {TARGET.stat().st_size / 2**20:.0f} MB")


if __name__ == "__main__":
    main()
