"""Run the code cells of a chapter as plain Python: no Jupyter is imported.

    ARTLIB_FULL=1 python tools/run_chapter.py 10

The cells share one namespace and run inside notebooks/, as in a kernel. What ends a
cell as a bare expression is printed, and so is what the cell hands to ``display``.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def find(name: str) -> Path:
    """The notebook meant by a path or a chapter number."""
    path = Path(name)
    if path.is_file():
        return path.resolve()
    found = sorted((ROOT / "notebooks").glob(f"{name}*.ipynb"))
    if len(found) != 1:
        sys.exit(f"{name!r} names {len(found)} chapters in notebooks/, not 1")
    return found[0]


def code_cells(path: Path) -> list[str]:
    """The sources of the code cells, read without nbformat."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    return [text if isinstance(text, str) else "".join(text) for text in sources]


def run_cell(source: str, label: str, namespace: dict[str, Any]) -> None:
    """Execute one cell; a last bare expression is printed, unless ``;`` ends it."""
    tree = ast.parse(source, filename=label)
    last: list[ast.stmt] = []
    if tree.body and isinstance(tree.body[-1], ast.Expr) and source.rstrip()[-1] != ";":
        last = [tree.body.pop()]
    exec(compile(tree, label, "exec"), namespace)
    if last:
        # "single" is how an interactive prompt compiles: it prints what is not None.
        exec(compile(ast.Interactive(last), label, "single"), namespace)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/run_chapter.py CHAPTER")
    path = find(sys.argv[1])
    sys.path.insert(0, str(ROOT))
    os.chdir(path.parent)
    # A module of its own, so that classes defined in a chapter can be pickled.
    module = types.ModuleType("__main__")
    module.__dict__["display"] = print
    sys.modules["__main__"] = module
    start = time.perf_counter()
    sources = code_cells(path)
    for number, source in enumerate(sources, start=1):
        run_cell(source, f"{path.name}[{number}]", module.__dict__)
    seconds = time.perf_counter() - start
    print(f"{path.stem}: {len(sources)} cells in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
