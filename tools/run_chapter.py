"""Run the code cells of a chapter as plain Python: no Jupyter is imported.

    ARTLIB_FULL=1 python tools/run_chapter.py 10
    ARTLIB_FULL=1 python tools/run_chapter.py 17 --seconds 480

The second stops by itself, with status 75, when that time is over and something is left
to do; the same command goes on. Finished results and the parts of unfinished ones are
kept, as long as neither the commit nor the chapter changes.

The cells share one namespace and run inside notebooks/, as in a kernel. What ends a
cell as a bare expression is printed, and so is what the cell hands to ``display``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
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


PAUSED = 75
"""Status of a run that stopped because its time was over (EX_TEMPFAIL)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("chapter", help="its number, or a path")
    parser.add_argument("--seconds", type=float, help="stop then, to go on later")
    arguments = parser.parse_args()
    if arguments.seconds is not None and not arguments.seconds > 0:
        parser.error(f"--seconds: expected more than 0, got {arguments.seconds}")
    path = find(arguments.chapter)
    sys.path.insert(0, str(ROOT))
    os.chdir(path.parent)
    sources = code_cells(path)
    run = ROOT / "_build" / f"{path.stem}.run.json"
    if arguments.seconds is not None:
        os.environ["ARTLIB_SECONDS"] = str(arguments.seconds)
        os.environ["ARTLIB_RUN"] = str(run)
        digest = hashlib.sha256("\n".join(sources).encode())
        os.environ["ARTLIB_RUN_OF"] = digest.hexdigest()
    # A module of its own, so that classes defined in a chapter can be pickled.
    module = types.ModuleType("__main__")
    module.__dict__["display"] = print
    sys.modules["__main__"] = module
    from artlib._common.errors import PausedError

    start = time.perf_counter()
    number = 0
    try:
        for number, source in enumerate(sources, start=1):
            run_cell(source, f"{path.name}[{number}]", module.__dict__)
    except PausedError as paused:
        print(
            f"{path.stem}, cell {number} of {len(sources)}: {paused}", file=sys.stderr
        )
        return PAUSED
    if arguments.seconds is not None:
        run.unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    print(f"{path.stem}: {len(sources)} cells in {seconds:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
