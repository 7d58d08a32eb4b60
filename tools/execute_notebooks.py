"""Execute chapters in place, two at a time, so that doing it twice changes nothing.

    python tools/execute_notebooks.py                  every chapter
    python tools/execute_notebooks.py 04 notebooks/01-sampling-is-an-ode.ipynb
    python tools/execute_notebooks.py --record-runtimes

Only what the code computed is stored: no timings, no widget state, no versions of the
machine at hand. With ``--record-runtimes`` the seconds a chapter took go to
notebooks/results/runtimes.json, from which tools/build_status.py writes a page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from md2nb import METADATA
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
RUNTIMES = NOTEBOOKS / "results" / "runtimes.json"
KEPT = ("tags", "mystnb")  # cell metadata that the authors write
# No advice on encryption, no history: two kernels would share its file.
QUIET = ["--log-level=ERROR", "--HistoryManager.enabled=False"]
CELLS = NOTEBOOKS / "results" / "cell-seconds.json"  # artlib/book/progress.py reads it
SLOW = 5.0  # seconds, from which on a cell is noted there
CELL_TIMEOUT = 300  # seconds; the same limit as nbval's in the Makefile


def select(names: list[str]) -> list[Path]:
    """The notebooks meant by paths or chapter numbers; all of them for no name."""
    if not names:
        return sorted(NOTEBOOKS.glob("*.ipynb"))
    paths = []
    for name in names:
        path = Path(name)
        found = [path] if path.is_file() else sorted(NOTEBOOKS.glob(f"{name}*.ipynb"))
        if len(found) != 1:
            sys.exit(
                f"{name!r} names {len(found)} chapters in {NOTEBOOKS.name}/, not 1"
            )
        paths += found
    return paths


def execute(path: Path) -> tuple[float, dict[str, float]]:
    """Run one notebook in a fresh kernel and write it back.

    Returns:
        The seconds it took, and those of the cells that took longer than five, by id.
    """
    begun: dict[str, float] = {}
    slow: dict[str, float] = {}

    def on_start(cell: Any, cell_index: int) -> None:
        begun[cell.id] = time.perf_counter()

    def on_end(cell: Any, cell_index: int, execute_reply: Any) -> None:
        took = time.perf_counter() - begun[cell.id]
        if took > SLOW:
            slow[cell.id] = round(took, 1)

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=QUIET,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_execute=on_start,
        on_cell_executed=on_end,
    )
    start = time.perf_counter()
    client.execute()
    seconds = time.perf_counter() - start
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in KEPT if key in cell.metadata}
        cell.metadata.clear()
        cell.metadata.update(kept)
    text = nbformat.writes(notebook)
    if not text.endswith("\n"):
        text += "\n"
    if text != path.read_text(encoding="utf-8"):
        temporary = path.with_suffix(".ipynb.new")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return seconds, slow


def record(seconds: dict[str, float], slow: dict[str, float]) -> None:
    """Add runtimes to the files, keeping those of chapters not run now."""
    stored = {}
    if RUNTIMES.is_file():
        stored = json.loads(RUNTIMES.read_text(encoding="utf-8"))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    where = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}"
    for name, value in seconds.items():
        stored[name] = {"seconds": round(value, 1), "date": today, "machine": where}
    RUNTIMES.parent.mkdir(parents=True, exist_ok=True)
    RUNTIMES.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    known: dict[str, float] = {}
    if CELLS.is_file():
        known = json.loads(CELLS.read_text(encoding="utf-8"))["results"]
    there = {
        cell.id
        for path in NOTEBOOKS.glob("*.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
    }
    cells = {key: took for key, took in (known | slow).items() if key in there}
    made = {"date": today, "machine": where}
    written = json.dumps({"made": made, "results": cells}, indent=1, sort_keys=True)
    CELLS.write_text(written + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("chapters", nargs="*", help="paths or numbers; default all")
    parser.add_argument("--record-runtimes", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    arguments = parser.parse_args()
    # As in the Makefile's test: stored outputs come from one CPU thread.
    os.environ.setdefault("ARTLIB_DEVICE", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    paths = select(arguments.chapters)
    seconds: dict[str, float] = {}
    slow: dict[str, float] = {}
    failed: list[str] = []
    with ThreadPoolExecutor(max_workers=arguments.jobs) as pool:
        runs = {path.stem: pool.submit(execute, path) for path in paths}
        for name, run in runs.items():
            try:
                seconds[name], cells = run.result()
                slow |= cells
                print(f"{name}: {seconds[name]:.1f} s", flush=True)
            except CellExecutionError as error:
                failed.append(name)
                text = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # colours
                print(f"{name}: FAILED\n{text}", file=sys.stderr, flush=True)
    if arguments.record_runtimes:
        record(seconds, slow)
    if failed:
        sys.exit(f"not executed, left as they were: {', '.join(failed)}")


if __name__ == "__main__":
    main()
