"""Run every check of the repository, also after one failed, and print a summary.

    python tools/run_tests.py                  all of them (make test)
    python tools/run_tests.py lint types       only these

The exit status is 0 only if every check passed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable, "-m"]
# Two processes; all tests of a file, and all cells of a notebook, in the same one.
WORKERS = ["-n", "2", "--dist", "loadfile"]


def slowest_first() -> list[str]:
    """The notebooks, so that no worker is left alone with a long one at the end."""
    folder = ROOT / "notebooks"
    known = json.loads((folder / "results" / "runtimes.json").read_text("utf-8"))
    names = sorted(path.stem for path in folder.glob("*.ipynb"))
    names.sort(key=lambda name: -known.get(name, {"seconds": 60})["seconds"])
    return [f"notebooks/{name}.ipynb" for name in names]


CHECKS = {
    "lint": [*PYTHON, "ruff", "check", "--quiet"],
    "format": [*PYTHON, "ruff", "format", "--check", "--quiet"],
    "types": [*PYTHON, "mypy", "--no-error-summary"],
    "book": ["make", "--no-print-directory", "book"],
    "unit": [*PYTHON, "pytest", "--quiet", *WORKERS],
    "notebooks": [
        *PYTHON,
        "pytest",
        "--quiet",
        "--nbval",
        "--nbval-current-env",
        "--nbval-cell-timeout=300",
        *WORKERS,
        *slowest_first(),
    ],
}
# The stored outputs come from one CPU thread; two workers on two cores want no more.
ENVIRONMENT = {
    "ARTLIB_DEVICE": "cpu",
    "OMP_NUM_THREADS": "1",
    "ARTLIB_TYPECHECK": "1",  # shapes and types of every call, see tests/conftest.py
}


def environment() -> dict[str, str]:
    """Ours, and compiled modules are kept: a hundred processes import torch here.

    Where Python is told to write none beside the sources, they go to ``_build``.
    """
    found = {**os.environ, **ENVIRONMENT}
    if found.pop("PYTHONDONTWRITEBYTECODE", ""):
        found.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / "_build" / "bytecode"))
    return found


# Of one process each: they run side by side. Tests look at the built book.
ALONGSIDE = ("types", "book")
AWAITED = {"unit": ("book",), "notebooks": ALONGSIDE}


def run(name: str) -> tuple[bool, float]:
    """Run one check, its output going to ours."""
    start = time.monotonic()
    done = subprocess.run(
        CHECKS[name],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if name in ALONGSIDE else None,
        stderr=subprocess.STDOUT if name in ALONGSIDE else None,
        text=True,
    )
    if done.stdout:  # what ran beside it has an output of its own
        print(f"\n== output of {name}\n{done.stdout}", end="", flush=True)
    return done.returncode == 0, time.monotonic() - start


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in CHECKS]:
        print(f"unknown checks {unknown}, there are {list(CHECKS)}", file=sys.stderr)
        return 2
    results: dict[str, tuple[bool, float]] = {}
    with ThreadPoolExecutor() as beside:
        started: dict[str, Future[tuple[bool, float]]] = {}
        for name in names or CHECKS:
            print(f"\n== {name}: {' '.join(CHECKS[name][-6:])}", flush=True)
            if name in ALONGSIDE:
                started[name] = beside.submit(run, name)
                continue
            for other in AWAITED.get(name, ()):
                if other in started:
                    results[other] = started[other].result()
            results[name] = run(name)
        results |= {other: done.result() for other, done in started.items()}
    print("\n== summary")
    for name, (passed, seconds) in results.items():
        print(f"{name:10s} {'passed' if passed else 'FAILED':6s} {seconds:6.1f} s")
    passed = all(passed for passed, _ in results.values())
    print("all checks passed" if passed else "some checks FAILED", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
