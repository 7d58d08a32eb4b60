"""Every page of the built book, opened in a browser, on a desk and on a phone.

No script error, no failed request, no request to another host, all mathematics set, and
nothing wider than the screen. Needs a Chromium, playwright and a built book (`make
book`), and is skipped, saying which, where one of them is missing.
"""

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")

HTML = Path(__file__).resolve().parent.parent / "_build" / "html"
PAGES = sorted(HTML.glob("book/*.html")) + sorted(HTML.glob("notebooks/*.html"))
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESK = {"width": 1400, "height": 900}
PHONE = {"width": 390, "height": 844}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
    pytest.mark.skipif(not PAGES, reason="no built book: make book"),
]
pages = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(HTML).with_suffix("").as_posix()
)

# What is written on the page, without program text and without set mathematics.
VISIBLE_TEXT = """() => {
    const copy = document.body.cloneNode(true);
    const skipped = "pre, code, script, style, template, mjx-container";
    copy.querySelectorAll(skipped).forEach(node => node.remove());
    return document.title + " " + copy.textContent;
}"""
UNSET_MATHEMATICS = """() => [
    ...document.querySelectorAll("[data-mjx-error], [data-mml-node=merror]"),
    ...document.querySelectorAll("mjx-container [fill=red]"),  // an unknown command
    ...[...document.querySelectorAll("span.math, div.math")].filter(
        node => !node.querySelector("mjx-container")),
].map(node => node.outerHTML.slice(0, 200))"""
# Also what the page hides by cutting it off: parts of the article that stick out of the
# screen and are not inside something that scrolls.
STICKING_OUT = """() => {
    const scrolls = node => node && node !== document.body && (
        ["auto", "scroll"].includes(getComputedStyle(node).overflowX) ||
        scrolls(node.parentElement));
    return [...document.querySelectorAll("article *")]
        .filter(node => node.getBoundingClientRect().width > 1 &&
            node.getBoundingClientRect().right > innerWidth + 1 &&
            !node.closest("mjx-assistive-mml, .headerlink, svg") &&
            !scrolls(node.parentElement))
        .map(node => node.outerHTML.slice(0, 120));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


class Visit:
    """One page, loaded to the end, and everything that went wrong on the way."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.faults: list[str] = []
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        home = (
            "file:///"
            if address.startswith("file:")
            else "/".join(address.split("/")[:3])
        )
        self.page.on("pageerror", lambda e: self.faults.append(f"script error: {e}"))
        self.page.on("console", self._console)
        self.page.on("requestfailed", lambda r: self.faults.append(f"failed: {r.url}"))
        self.page.on("response", self._response)
        self.page.on("request", lambda request: self._request(request.url, home))
        self.page.goto(address, wait_until="load")
        if address.endswith("/index.html"):  # it only leads on
            self.page.wait_for_url("**/notebooks/intro.html")
        self.page.evaluate("() => window.MathJax?.startup?.promise")

    def _console(self, message: Any) -> None:
        # Where a page names no icon, browsers ask the server for one unasked.
        unasked = message.location.get("url", "").endswith("/favicon.ico")
        if message.type == "error" and not unasked:
            self.faults.append(f"console: {message.text}")

    def _response(self, response: Any) -> None:
        if response.status >= 400 and not response.url.endswith("/favicon.ico"):
            self.faults.append(f"status {response.status}: {response.url}")

    def _request(self, url: str, home: str) -> None:
        if not url.startswith((home, "data:", "blob:")):
            self.faults.append(f"leaves the book: {url}")

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pages
def test_page_on_a_desk_and_on_a_phone(browser: Any, page: Path) -> None:
    with Visit(browser, page.as_uri(), viewport=DESK) as visit:
        assert visit.page.evaluate(UNSET_MATHEMATICS) == []
        text = visit.page.evaluate(VISIBLE_TEXT)
        for sign in ("$", "\\"):
            where = text.find(sign)
            context = text[max(where - 60, 0) : where + 60]
            assert where < 0, f"raw TeX on the page: ...{context}..."
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 1400
        visit.page.set_viewport_size(PHONE)  # its mathematics is set already
        visit.page.evaluate("() => new Promise(requestAnimationFrame)")
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert visit.page.evaluate(STICKING_OUT) == []
        assert visit.faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_follows_the_light(browser: Any, scheme: str) -> None:
    address = PAGES[-1].as_uri()
    with Visit(browser, address, viewport=DESK, color_scheme=scheme) as visit:
        colours = visit.page.evaluate(
            "(style => [style.backgroundColor, style.color])"
            "(getComputedStyle(document.body))"
        )
        ground, ink = (
            sum(map(float, colour.strip("rgba()").split(",")[:3])) / 765
            for colour in colours
        )
        assert (ground < ink) == (scheme == "dark")
        assert abs(ground - ink) > 0.5, "too little contrast"
        assert visit.faults == []


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = partial(Quiet, directory=str(HTML))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


@pytest.mark.parametrize(
    ("name", "figure"), [("intro", "start-cifar"), ("17-cifar10", "cifar-samples")]
)
def test_only_colour_photographs_are_not_turned_over_in_the_dark(
    browser: Any, name: str, figure: str
) -> None:
    address = (HTML / "notebooks" / f"{name}.html").as_uri()
    turned = """nodes => nodes.filter(
        node => getComputedStyle(node).filter != "none"
    ).length"""
    with Visit(browser, address, color_scheme="dark") as visit:
        photographs = visit.page.locator(f"#fig-{figure} img")
        assert photographs.count() == 1
        assert photographs.evaluate_all(turned) == 0
        drawn = visit.page.locator("article div.cell_output img:not(.only-dark)")
        others = drawn.count() - 1
        assert drawn.evaluate_all(turned) == others
        assert others or name != "intro"


@pytest.mark.parametrize("name", ["index", "book/notation", PAGES and PAGES[-1].stem])
def test_page_from_a_server(browser: Any, server: str, name: str) -> None:
    found = [page for page in PAGES if page.stem == name]
    path = found[0].relative_to(HTML).as_posix() if found else f"{name}.html"
    with Visit(browser, f"{server}/{path}", viewport=DESK) as visit:
        visit.page.wait_for_selector("article h1")
        assert visit.faults == []


def test_index_leads_to_the_first_page(browser: Any) -> None:
    with Visit(browser, (HTML / "index.html").as_uri(), viewport=DESK) as visit:
        assert visit.page.title().startswith("Where should")
        assert visit.faults == []


def test_search_works_from_a_file(browser: Any) -> None:
    address = (HTML / "search.html").as_uri() + "?q=denoiser"
    with Visit(browser, address, viewport=DESK) as visit:
        visit.page.wait_for_selector("ul.search li a")
        assert visit.faults == []
