"""A stored result that the code no longer gives must not pass `make test`.

One small notebook with the three kinds of result that the book quotes (printed text, an
equation, a glued number) is executed by the book's own tool. nbval accepts it; with the
three altered, nbval refuses each of them, and them alone.
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from execute_notebooks import execute
from md2nb import to_notebook

CHAPTER = """
# A small chapter

```{code-cell}
print(f"error {1 / 8:.3f}")
```

```{code-cell}
import sympy as sp

sp.sqrt(sp.Symbol("Q", positive=True))
```

```{code-cell}
book.glue("small-order", 1.98765, digits=3)
```

```{code-cell}
print("as before")
```
"""
# Position among the code cells (the set-up cell is the first), what is stored there,
# and what it is altered to.
ALTERATIONS = {
    "stdout": (1, "0.125", "0.126"),
    "latex": (2, r"\\sqrt{Q}", r"\\sqrt{R}"),
    "glue": (3, '"1.99"', '"1.98"'),
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small notebook with its results."""
    path = tmp_path_factory.mktemp("executed") / "original.ipynb"
    nbformat.write(to_notebook(CHAPTER), path)
    execute(path)
    return path


@pytest.fixture(scope="module")
def verdicts(
    executed: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """For each variant of the notebook, nbval's verdict on each code cell."""
    folder = tmp_path_factory.mktemp("nbval")
    text = executed.read_text()
    (folder / "original.ipynb").write_text(text)
    for _, stored, altered in ALTERATIONS.values():
        assert text.count(stored) == 1, f"{stored} should be stored exactly once"
        text = text.replace(stored, altered)
    (folder / "altered.ipynb").write_text(text)
    command = "-m pytest --nbval --nbval-current-env -q -rA -p no:cacheprovider"
    report = subprocess.run(
        [sys.executable, *command.split()], cwd=folder, capture_output=True, text=True
    ).stdout
    found: dict[str, list[str]] = {}
    for verdict, name, cell in re.findall(
        r"^(PASSED|FAILED) (\w+)\.ipynb::Cell (\d+)", report, flags=re.MULTILINE
    ):
        cells = found.setdefault(name, [""] * 5)
        cells[int(cell)] = verdict
    return found


def test_nbval_accepts_what_was_just_executed(verdicts: dict[str, list[str]]) -> None:
    assert verdicts["original"] == ["PASSED"] * 5


@pytest.mark.parametrize("name", ALTERATIONS)
def test_nbval_sees_an_altered(name: str, verdicts: dict[str, list[str]]) -> None:
    assert verdicts["altered"][ALTERATIONS[name][0]] == "FAILED"


def test_nbval_accepts_what_nobody_altered(verdicts: dict[str, list[str]]) -> None:
    altered = {position for position, _, _ in ALTERATIONS.values()}
    for position, verdict in enumerate(verdicts["altered"]):
        assert (verdict == "PASSED") == (position not in altered)


def test_executing_twice_changes_no_byte(executed: Path, tmp_path: Path) -> None:
    path = tmp_path / "twice.ipynb"
    path.write_bytes(executed.read_bytes())
    execute(path)
    assert path.read_bytes() == executed.read_bytes()
