"""The programs behind the Makefile, and what chapters take from artlib.book."""

import datetime
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import md2nb
import nbformat
import numpy as np
import PIL.Image
import pytest
import torch
from build_status import NONE, page
from execute_notebooks import record, select
from matplotlib.figure import Figure
from md2nb import ChapterError, to_notebook, to_text
from run_chapter import code_cells, find, run_cell
from run_tests import environment

import artlib
from artlib import book
from artlib.book import results
from artlib.book.surroundings import picture
from artlib.plotting import plot_samples

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = """\
# Title

Text with $x$.

```python
not = executed
```

```{code-cell}
:tags: [hide-input]
:figure: fig-one
:caption: A caption with $\\psi$: over
  two lines.
:alt: One line.
book.show(figure)
```

+++

First.

+++

Second.

```{code-cell}
1 + 1
```

```{code-cell}
1 + 1
```
"""


def test_text_becomes_a_notebook_and_text_again() -> None:
    notebook = to_notebook(CHAPTER)
    kinds = [cell.cell_type for cell in notebook.cells]
    prose, code = "markdown", "code"
    assert kinds == [code, prose, code, prose, prose, code, code]
    figure = notebook.cells[2].metadata
    assert figure.tags == ["hide-input"]
    caption = "A caption with $\\psi$: over two lines."
    assert figure.mystnb.figure == {"name": "fig-one", "caption": caption}
    assert figure.mystnb.image == {"alt": "One line."}
    assert len({cell.id for cell in notebook.cells}) == len(kinds)
    assert to_notebook(to_text(notebook)) == notebook


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```{code-cell}\n1\n", "never closed"),
        ("```{code-cell}\n```\n", "empty"),
        (" ```{code-cell}\n1\n```\n", "left margin"),
        ("````{note}\n```{code-cell}\n1\n```\n````\n", "outside any other block"),
        ("```{code-cell}\n:tags: [skip]\n1\n```\n", "tags must be a list out of"),
        ("```{code-cell}\n:wide: 1\n1\n```\n", "unknown option"),
        ("```{code-cell}\n:figure: a\n1\n```\n", r"also needs \['caption', 'alt'\]"),
        ("```python\n1\n", "never closed"),
    ],
)
def test_what_is_no_chapter_is_refused(text: str, message: str) -> None:
    with pytest.raises(ChapterError, match=message):
        to_notebook(text)


def test_first_cell_is_renewed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "a.ipynb", tmp_path / "b.ipynb"]
    for path in paths:
        notebook = to_notebook(CHAPTER)
        for count, cell in enumerate(c for c in notebook.cells if "outputs" in c):
            cell.execution_count = count + 1
        notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="2\n")]
        path.write_text(nbformat.writes(notebook) + "\n")
    before = paths[0].read_text()
    command = ["md2nb.py", "--first-cell", *map(str, paths)]
    monkeypatch.setattr(sys, "argv", command)
    md2nb.main()
    assert [path.read_text() for path in paths] == [before] * 2
    other = tmp_path / "other.py"
    other.write_text("# Set-up, another one.\nfrom artlib import book\n")
    monkeypatch.setattr(md2nb, "FIRST_CELL", other)
    md2nb.main()
    cells, old = json.loads(paths[1].read_text())["cells"], json.loads(before)["cells"]
    assert "".join(cells[0].pop("source")) == other.read_text().rstrip()
    assert cells[0].pop("id") == to_notebook("").cells[0].id != old[0].pop("id")
    del old[0]["source"]
    assert cells == old
    paths[0].write_text(json.dumps({**json.loads(before), "cells": old[1:]}))
    with pytest.raises(SystemExit, match=r"a\.ipynb: its first cell is no code cell"):
        md2nb.main()
    monkeypatch.setattr(sys, "argv", ["md2nb.py", "--reverse", "a.ipynb"])
    with pytest.raises(SystemExit):
        md2nb.main()


def test_texts_are_written_beside_the_notebooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat.write(to_notebook(CHAPTER), tmp_path / "01-a.ipynb")
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "00-gone.md").write_text("of no notebook")
    md2nb.write_texts(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["01-a.md"]
    text = (folder / "01-a.md").read_text()
    assert to_notebook(text) == to_notebook(CHAPTER)
    monkeypatch.setattr(sys, "argv", ["md2nb.py", "--texts", "a.ipynb"])
    with pytest.raises(SystemExit):
        md2nb.main()


def test_chapter_runs_without_jupyter(tmp_path: Path) -> None:
    path = tmp_path / "small.ipynb"
    text = """
```{code-cell}
import sys

class Record: ...
display("shown")
book.glue("one", 1.0)
assert "IPython" not in sys.modules and "nbformat" not in sys.modules
Record.__module__, __import__("os").path.basename(__import__("os").getcwd())
```
"""
    nbformat.write(to_notebook(text), path)
    command = [sys.executable, ROOT / "tools" / "run_chapter.py", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"shown\n('__main__', {tmp_path.name!r})\n"
    assert done.stderr.startswith("small: 2 cells in ")


SLICES = """
# Two results

```{code-cell}
from artlib import book

def make(value):
    print("made", value)
    return {"value": value}

found = [book.made(f"number-{k}", lambda k=k: make(k), seed=0)["value"] for k in (1, 2)]
```
"""


def test_a_chapter_in_slices_makes_each_result_once(tmp_path: Path) -> None:
    """A slice without time stops; a result of this run is not made again."""
    path = tmp_path / "sliced.ipynb"
    nbformat.write(to_notebook(SLICES), path)
    tool = tmp_path / "tools" / "run_chapter.py"
    tool.parent.mkdir()
    tool.write_text((ROOT / "tools" / "run_chapter.py").read_text())
    environment = {
        **os.environ,
        "ARTLIB_FULL": "1",
        "ARTLIB_RESULTS": str(tmp_path / "results"),
        "PYTHONPATH": str(ROOT),
        "ARTLIB_COMMIT": "0123456789ab",
    }

    def run(seconds: float) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, tool, path, "--seconds", str(seconds)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    first = run(0.01)
    assert (first.returncode, first.stdout) == (75, "")
    assert "sliced, cell 2 of 2: ARTLIB_SECONDS: 0.01 are over" in first.stderr
    # As after a slice that had time for one of the two.
    commit = subprocess.run(
        [
            sys.executable,
            "-c",
            "from artlib.book.surroundings import commit as c;print(c())",
        ],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    ).stdout.strip()
    digest = hashlib.sha256("\n".join(code_cells(path)).encode()).hexdigest()
    stored = tmp_path / "results" / "number-1.json"
    stored.parent.mkdir()
    stored.write_text('{"made": {}, "results": {"value": 1}}')
    known = tmp_path / "_build" / "sliced.run.json"
    known.parent.mkdir()
    known.write_text(json.dumps({"of": [commit, digest], "made": ["number-1"]}))
    second = run(1000)
    assert (second.returncode, second.stdout) == (0, "made 2\n")
    assert not known.exists()
    # What another run made is made again.
    known.write_text(json.dumps({"of": ["another", digest], "made": ["number-1"]}))
    assert run(1000).stdout == "made 1\nmade 2\n"


def test_last_expression_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    run_cell("x = 2\nx + 1", "cell", scope)
    run_cell("x;", "cell", scope)
    run_cell("None", "cell", scope)
    run_cell("# nothing", "cell", scope)
    assert capsys.readouterr().out == "3\n"


def test_chapters_are_found_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notebooks").mkdir()
    for name in ("00-a", "01-b"):
        nbformat.write(to_notebook(""), tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr("run_chapter.ROOT", tmp_path)
    monkeypatch.setattr("execute_notebooks.NOTEBOOKS", tmp_path / "notebooks")
    assert find("01").name == "01-b.ipynb"
    assert code_cells(find("01"))[0].startswith("# Set-up")
    assert [path.stem for path in select([])] == ["00-a", "01-b"]
    assert [path.stem for path in select(["00"])] == ["00-a"]
    for search in (find, lambda name: select([name])):
        with pytest.raises(SystemExit, match="names 0 chapters"):
            search("07")


def test_status_page_lists_recorded_runtimes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtimes = tmp_path / "results" / "runtimes.json"
    monkeypatch.setattr("execute_notebooks.RUNTIMES", runtimes)
    monkeypatch.setattr("build_status.RUNTIMES", runtimes)
    assert page().endswith(NONE)
    monkeypatch.setattr("execute_notebooks.CELLS", tmp_path / "cells.json")
    record({"01-b": 12.34}, {})
    record({"00-a": 5.0}, {"no such cell": 9.0})
    assert json.loads((tmp_path / "cells.json").read_text())["results"] == {}
    rows = page().splitlines()[-2:]
    assert rows[0].startswith("| {doc}`../notebooks/00-a` | 5 |")
    assert rows[1].startswith("| {doc}`../notebooks/01-b` | 12 |")


def test_glue_rounds_to_significant_digits() -> None:
    book.glue("a", 1234.5678)
    book.glue("b", torch.tensor(0.000123456), digits=2)
    book.glue("c", 7)
    book.glue("d", "fast")
    stored = {name: book.GLUED[name] for name in "abcd"}
    assert stored == {"a": 1235.0, "b": 0.00012, "c": 7, "d": "fast"}
    assert isinstance(stored["c"], int)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_glue_of_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"glue\('a'\): expected a finite number"):
        book.glue("a", value)


def test_show_closes_the_figure() -> None:
    figure = plt.figure()
    book.show(figure)
    assert not plt.fignum_exists(figure.number)


def curves() -> Figure:
    figure, axes = plt.subplots(figsize=(6, 4))
    x = np.linspace(0, 1, 50)
    for k in range(5):
        axes.plot(x, x**k, label=f"power {k}")
        axes.fill_between(x, x**k - 0.1, x**k + 0.1, alpha=0.3)
    axes.legend()
    return figure


def shade() -> Figure:
    figure = plt.figure(figsize=(3, 3))
    axes = figure.add_axes((0, 0, 1, 1))
    light = np.linspace(0, 1, 300) * np.linspace(0.3, 1, 300)[:, None]
    axes.imshow(0.6 + light[..., None] * (0.15, 0.25, 0.35), aspect="auto")
    for k in range(60):  # lines of many colours leave the shade few of the palette
        axes.axhline(5 * k, color=plt.get_cmap("hsv")(k / 60), lw=0.5)
    return figure


def grey_images() -> Figure:
    images = torch.rand(2, 10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return plot_samples({"a": images[0] * 2 - 1, "b": images[1].sqrt() * 2 - 1})


def photographs() -> Figure:
    images = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return plot_samples([images * 2 - 1])


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(png)).convert("RGB"), float)


@pytest.mark.parametrize(
    ("draw", "mode", "farthest", "size"),
    [
        (curves, "P", 20, 0.35),  # as at the edge of a line
        (grey_images, "P", 2, 0.6),
        (shade, "RGB", 0, 1),
        (photographs, "RGB", 0, 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_stored_figure_is_small_and_looks_the_same(
    draw: Callable[[], Figure], mode: str, farthest: int, size: float
) -> None:
    figure = draw()
    full = io.BytesIO()
    figure.savefig(full, dpi=book.FIGURE_DPI, bbox_inches="tight")
    small = picture(figure)
    assert PIL.Image.open(io.BytesIO(small)).mode == mode
    change = np.abs(pixels(small) - pixels(full.getvalue())).max(-1)
    assert change.max() <= farthest
    assert change.mean() <= 0.7
    assert len(small) <= size * len(full.getvalue())
    assert picture(draw()) == small
    plt.close("all")


def test_a_stored_figure_keeps_what_one_can_see_through() -> None:
    figure = plt.figure(figsize=(1, 1), facecolor="none")
    alpha = PIL.Image.open(io.BytesIO(picture(figure))).convert("RGBA").getchannel("A")
    assert alpha.getextrema() == (0, 0)
    plt.close(figure)


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARTLIB_FULL", raising=False)
    assert not book.full()
    monkeypatch.setenv("ARTLIB_FULL", "0")
    assert not book.full()
    monkeypatch.setenv("ARTLIB_FULL", "1")
    assert book.full()
    monkeypatch.setenv("ARTLIB_DEVICE", "cpu")
    assert book.device() == torch.device("cpu")
    monkeypatch.delenv("ARTLIB_DEVICE")
    assert (book.device().type == "cuda") == torch.cuda.is_available()


def test_chapters_run_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, allowed in (("cpu", True), ("cuda", False)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        monkeypatch.setenv("ARTLIB_DEVICE", device)
        assert book.device() == torch.device(device)
        assert torch.backends.cudnn.allow_tf32 == allowed


def test_results_come_back_with_their_circumstances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "notebooks" / "results"
    monkeypatch.setenv("ARTLIB_RESULTS", str(folder))
    monkeypatch.setenv("ARTLIB_DEVICE", "cpu")
    with pytest.raises(FileNotFoundError, match=r"make full.*ARTLIB_RESULTS"):
        book.load_results("table")
    path = book.save_results("table", {"w2": [0.5, 0.25]}, seed=3)
    assert path == folder / "table.json"
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]
    loaded = book.load_results("table")
    assert loaded["results"] == {"w2": [0.5, 0.25]}
    made = loaded["made"]
    assert made["seed"] == 3
    assert made["versions"]["artlib"] == artlib.__version__
    assert made["versions"]["torch"] == torch.__version__
    datetime.date.fromisoformat(made["date"])
    assert made["device"]
    assert made["commit"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        book.save_results("table", {"w2": float("nan")}, seed=3)
    assert json.loads(path.read_text()) == loaded


def test_a_list_of_numbers_in_results_takes_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ARTLIB_RESULTS", str(tmp_path))
    table = {
        "errors": [[0.5, -2.5e-7, 3], [1]],
        "mixed": [1.0, "a [1,\n 2]", None],
        "empty": [],
    }
    path = book.save_results("table", table, seed=0)
    assert book.load_results("table")["results"] == table
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    assert "[0.5, -2.5e-07, 3]," in lines
    assert json.dumps(table["mixed"][1]) + "," in lines


def test_results_belong_to_the_clone_and_not_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ARTLIB_RESULTS", raising=False)
    monkeypatch.setenv("ARTLIB_DEVICE", "cpu")
    clone, other = tmp_path / "clone", tmp_path / "other"
    for folder in (clone, other):
        (folder / "notebooks" / "results").mkdir(parents=True)
    (other / "notebooks" / "results" / "b.json").write_text(
        '{"made": {}, "results": 2}'
    )
    # The package of a clone: its results are found and written from everywhere.
    inside = ("artlib", "book", "results.py")
    monkeypatch.setattr(results, "__file__", str(clone.joinpath(*inside)))
    gone = tmp_path / "gone"
    gone.mkdir()
    for place in (clone / "notebooks", other, gone):
        monkeypatch.chdir(place)
        path = book.save_results("a", {"x": 1}, seed=0)
        assert path == clone / "notebooks" / "results" / "a.json"
        assert book.load_results("a")["results"] == {"x": 1}
        assert book.scratch("s") == clone / "_build" / "s"
    with pytest.raises(FileNotFoundError, match="no results named 'b'"):
        book.load_results("b")
    gone.rmdir()  # the current folder of a kernel may vanish
    assert book.load_results("a")["results"] == {"x": 1}
    # A package that was installed: the clone around the chapter.
    installed = tmp_path.joinpath("site", *inside)
    monkeypatch.setattr(results, "__file__", str(installed))
    with pytest.raises(FileNotFoundError, match=r"inside a clone .* ARTLIB_RESULTS"):
        book.load_results("a")
    for place in ("", "notebooks", "notebooks/results"):
        monkeypatch.chdir(other / place)
        assert book.load_results("b")["results"] == 2
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"inside a clone .* ARTLIB_RESULTS"):
        book.scratch("s")
    # A folder that was named goes before all others, and need not exist.
    monkeypatch.setenv("ARTLIB_RESULTS", "mine")
    assert book.save_results("a", {}, seed=0) == tmp_path / "mine" / "a.json"
    assert book.scratch("s") == tmp_path / "mine" / "_build" / "s"


def test_checks_keep_compiled_modules_beside_the_sources_or_in_build(monkeypatch):
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    assert "PYTHONPYCACHEPREFIX" not in environment()
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    found = environment()
    assert "PYTHONDONTWRITEBYTECODE" not in found
    assert found["PYTHONPYCACHEPREFIX"] == str(ROOT / "_build" / "bytecode")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", "elsewhere")
    assert environment()["PYTHONPYCACHEPREFIX"] == "elsewhere"
