"""The page to play with: its numbers, computed in a browser, are artlib's."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_browser import CHROMIUM, HTML, PHONE, Visit, browser

import artlib

PAGE = HTML / "book" / "play.html"
SCRIPT = Path(__file__).resolve().parent.parent / "book" / "_static" / "play.js"
SOLVERS = ("euler", "heun", "rk4", "dpmpp_2m")
__all__ = ["browser"]  # the fixture, shared
built = pytest.mark.skipif(not PAGE.exists(), reason="no built book: make book")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


@pytest.fixture(scope="module")
def script(browser: Any) -> Any:
    """An empty page with the script alone: no built book is needed."""
    page = browser.new_page()
    page.set_content("<p>empty</p>")
    page.add_script_tag(path=str(SCRIPT))
    return page


def schedules(std: float, process: artlib.VE) -> dict[str, Any]:
    target = artlib.Gaussian([0.0], [[std**2]])
    flow = artlib.ProbabilityFlow(process, target.denoiser(process))
    x_T = target.sample_prior(process, 1, seed=0).double()
    art = artlib.art(flow, x_T, points=200)
    return {
        "art": art,
        "edm-unpinned": artlib.edm(process, pinned=False),
        "edm": artlib.edm(process),
        "log-snr-unpinned": artlib.log_snr(process, pinned=False),
        "kl-optimal": artlib.kl_optimal(process),
        "uniform": artlib.uniform(process),
        "oracle": Arctan(std, process.t_max),
        "told": art,
    }


class Arctan:
    """Equal steps of arctan(t / c), the best grid for Euler's method."""

    def __init__(self, std: float, t_max: float) -> None:
        self.std, self.t_max = std, t_max

    def grid(self, K: int) -> torch.Tensor:
        share = 1 - torch.arange(K + 1, dtype=torch.float64) / K
        nodes = self.std * torch.tan(share * math.atan(self.t_max / self.std))
        nodes[0], nodes[-1] = self.t_max, 0.0
        return nodes


@pytest.mark.parametrize(
    ("std", "low", "high"), [(0.5, 0.002, 80.0), (0.05, 0.001, 10.0), (4.0, 0.1, 150.0)]
)
def test_grids_and_errors_are_artlibs(
    script: Any, std: float, low: float, high: float
) -> None:
    process = artlib.VE(low, high)
    expected = schedules(std, process)
    for K in (1, 2, 3, 8, 25):
        found = script.evaluate(
            """([c, low, high, K, solvers]) => artPlay.SCHEDULES.map(s => {
                const grid = s.grid({ c, low, high, K });
                return [s.key, grid, solvers.map(v => artPlay.error(grid, c, v))];
            })""",
            [std, low, high, K, SOLVERS],
        )
        assert [key for key, *_ in found] == list(expected)
        for key, grid, errors in found:
            nodes = torch.tensor(grid, dtype=torch.float64)
            # artlib tabulates |Q| on 200 times, the page has its formula.
            tolerance = 1e-3 if key in ("art", "told") else 1e-9
            torch.testing.assert_close(
                nodes, expected[key].grid(K), rtol=tolerance, atol=0, msg=f"{key} {K}"
            )
            for solver, error in zip(SOLVERS, errors, strict=True):
                exact = artlib.gaussian_w2(process, [std**2], nodes, solver=solver)
                assert error == pytest.approx(float(exact), rel=1e-6, abs=1e-11)


def test_told_levels_are_artlibs(script: Any) -> None:
    process, std = artlib.VE(0.002, 80.0), 0.5
    for K in (1, 2, 5, 16):
        grid = artlib.edm(process, pinned=False).grid(K)
        told, error = script.evaluate(
            "([grid, c]) => [artPlay.levels(grid), artPlay.toldError(grid, c)]",
            [grid.tolist(), std],
        )
        rho = grid[1:] / grid[:-1]
        levels = grid[:-1] * torch.sqrt(1 - (1 - rho) / 2)
        levels[-1] = grid[-2]
        expected = levels.tolist()
        assert told == pytest.approx(expected, rel=1e-12)
        plan = artlib.Plan(process, grid, levels, "euler")
        exact = float(artlib.gaussian_w2(process, [std**2], plan))
        assert error == pytest.approx(exact, rel=1e-6, abs=1e-11)


def test_oracle_is_the_best_grid_for_euler(script: Any) -> None:
    process, std, K = artlib.VE(0.002, 80.0), 0.5, 5
    best = artlib.gaussian_w2(
        process, [std**2], artlib.oracle_grid(process, [std**2], K)
    )
    found = script.evaluate(
        """([c, high, K]) => {
            const oracle = artPlay.SCHEDULES.find(s => s.key === "oracle");
            return artPlay.error(oracle.grid({ c, high, K }), c, "euler");
        }""",
        [std, process.t_max, K],
    )
    assert found == pytest.approx(float(best), rel=1e-5)


def test_ties_are_called_ties(script: Any) -> None:
    # With two steps EDM and DPM, unpinned, differ; with one all grids are the same.
    marks = script.evaluate(
        """() => artPlay.verdicts(
            { c: 0.5, low: 0.002, high: 80, K: 1, solver: "euler" })
            .map(r => [r.s.key, r.mark])"""
    )
    marked = dict(marks)
    assert marked.pop("oracle") == ""
    assert set(marked.values()) == {"tied"}


def test_nfe_is_artlibs(script: Any) -> None:
    for solver in SOLVERS:
        for K in (1, 2, 9):
            found = script.evaluate("([K, s]) => artPlay.nfe(K, s)", [K, solver])
            grid = artlib.uniform(artlib.VE()).grid(K)
            assert found == artlib.nfe(grid, solver=solver)


@built
def test_controls_change_what_is_shown(browser: Any) -> None:
    with Visit(browser, PAGE.as_uri(), viewport=PHONE) as visit:
        page = visit.page

        def table() -> dict[str, str]:
            rows = page.query_selector_all("#art-play tbody tr")
            return {
                row.get_attribute("data-schedule"): row.inner_text() for row in rows
            }

        def ticks() -> int:
            return len(page.query_selector_all(".art-steps line[stroke]"))

        assert len(table()) == 8
        assert sum("(least)" in text for text in table().values()) == 1
        before, lines = table(), ticks()
        page.fill("#art-play [name=steps]", "16")
        assert page.inner_text("[data-of=steps]") == "16"
        assert ticks() == lines + 8 * 8  # eight more nodes for each of eight rows
        assert table() != before
        page.select_option("#art-play [name=solver]", "heun")
        assert page.inner_text("[data-of=nfe]") == "31"
        std = page.evaluate("artPlay.state(document.getElementById('art-play')).c")
        state = page.evaluate("artPlay.state(document.getElementById('art-play'))")
        process = artlib.VE(state["low"], state["high"])
        grid = artlib.edm(process).grid(16)
        exact = float(artlib.gaussian_w2(process, [std**2], grid, solver="heun"))
        shown = float(table()["edm"].split("\t")[1])
        assert shown == pytest.approx(exact, rel=6e-2 if exact < 1e-3 else 6e-3)
        # Nothing in the pictures leaves them, on a phone too.
        outside = page.evaluate(
            """() => [...document.querySelectorAll("#art-play svg")].flatMap(svg => {
                const box = svg.getBoundingClientRect();
                return [...svg.querySelectorAll("text, line, circle")].filter(node => {
                    const b = node.getBoundingClientRect();
                    return b.left < box.left - 1 || b.right > box.right + 1 ||
                        b.top < box.top - 1 || b.bottom > box.bottom + 1;
                }).map(node => node.outerHTML);
            })"""
        )
        assert outside == []
        # The link carries the state; the values of the book come back.
        link = page.get_attribute(".art-link", "href")
        page.click(".art-reset")
        state = page.evaluate("artPlay.state(document.getElementById('art-play'))")
        expected = {"c": 0.5, "low": 0.002, "high": 80, "K": 8, "solver": "euler"}
        for key, value in expected.items():
            assert state[key] == (
                value if isinstance(value, str) else pytest.approx(value, rel=1e-9)
            )
        page.evaluate(f"location.hash = {link!r}")
        page.wait_for_function(
            "artPlay.state(document.getElementById('art-play')).K === 16"
        )
        assert page.input_value("#art-play [name=solver]") == "heun"
        assert visit.faults == []


@built
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_in_the_pictures_can_be_read(browser: Any, scheme: str) -> None:
    with Visit(browser, PAGE.as_uri(), color_scheme=scheme) as visit:
        ink, panel = visit.page.evaluate(
            """() => [
                getComputedStyle(document.querySelector(".art-steps text")).fill,
                getComputedStyle(document.querySelector(".art-steps")).backgroundColor,
            ]"""
        )
        dark, light = (
            sum(map(float, colour.strip("rgb()").split(","))) / 765
            for colour in (ink, panel)
        )
        assert light - dark > 0.5
        size = visit.page.evaluate(
            """() => parseFloat(getComputedStyle(
                document.querySelector(".art-steps text")).fontSize)"""
        )
        assert size >= 12
