"""Run every check of the repository, also after one failed, and print a summary.

    python tools/run_tests.py                  all of them (make test)
    python tools/run_tests.py lint types       only these

The exit status is 0 only if every check passed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable, "-m"]
# Two processes; all tests of a file, and all cells of a notebook, in the same one.
WORKERS = ["-n", "2", "--dist", "loadfile"]
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
        "notebooks",
    ],
}
# The stored outputs come from one CPU thread; two workers on two cores want no more.
ENVIRONMENT = {
    "ARTLIB_DEVICE": "cpu",
    "OMP_NUM_THREADS": "1",
    "ARTLIB_TYPECHECK": "1",  # shapes and types of every call, see tests/conftest.py
}


def run(name: str) -> tuple[bool, float]:
    """Run one check, its output going to ours."""
    print(f"\n== {name}: {' '.join(CHECKS[name][-6:])}", flush=True)
    start = time.monotonic()
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(
        CHECKS[name], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL
    )
    return done.returncode == 0, time.monotonic() - start


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in CHECKS]:
        print(f"unknown checks {unknown}, there are {list(CHECKS)}", file=sys.stderr)
        return 2
    results = {name: run(name) for name in names or CHECKS}
    print("\n== summary")
    for name, (passed, seconds) in results.items():
        print(f"{name:10s} {'passed' if passed else 'FAILED':6s} {seconds:6.1f} s")
    passed = all(passed for passed, _ in results.values())
    print("all checks passed" if passed else "some checks FAILED", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
