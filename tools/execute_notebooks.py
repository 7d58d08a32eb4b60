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


def execute(path: Path) -> float:
    """Run one notebook in a fresh kernel, write it back, return the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=QUIET,
        resources={"metadata": {"path": str(path.parent)}},
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
    return seconds


def record(seconds: dict[str, float]) -> None:
    """Add runtimes to the file, keeping those of chapters not run now."""
    stored = {}
    if RUNTIMES.is_file():
        stored = json.loads(RUNTIMES.read_text(encoding="utf-8"))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    where = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}"
    for name, value in seconds.items():
        stored[name] = {"seconds": round(value, 1), "date": today, "machine": where}
    RUNTIMES.parent.mkdir(parents=True, exist_ok=True)
    RUNTIMES.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


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
    failed: list[str] = []
    with ThreadPoolExecutor(max_workers=arguments.jobs) as pool:
        runs = {path.stem: pool.submit(execute, path) for path in paths}
        for name, run in runs.items():
            try:
                seconds[name] = run.result()
                print(f"{name}: {seconds[name]:.1f} s", flush=True)
            except CellExecutionError as error:
                failed.append(name)
                text = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # colours
                print(f"{name}: FAILED\n{text}", file=sys.stderr, flush=True)
    if arguments.record_runtimes:
        record(seconds)
    if failed:
        sys.exit(f"not executed, left as they were: {', '.join(failed)}")


if __name__ == "__main__":
    main()
