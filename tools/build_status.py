"""Write book/status.md, the runtime of each chapter, from the recorded runtimes.

python tools/build_status.py            write the page
python tools/build_status.py --check    fail if the page is not what it should be
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book" / "status.md"
RUNTIMES = ROOT / "notebooks" / "results" / "runtimes.json"

HEAD = """\
# Build status

The chapters of this book are notebooks, committed with their outputs. `make test`
executes every one of them again and compares each stored output with what the code
gives today; this page says how long a chapter took when its outputs were last timed
(`make status`). It is written by `tools/build_status.py`.

"""
NONE = "No runtimes have been recorded in this copy of the repository.\n"


def page() -> str:
    """The text of the page."""
    if not RUNTIMES.is_file():
        return HEAD + NONE
    runtimes = json.loads(RUNTIMES.read_text(encoding="utf-8"))
    rows = ["| chapter | seconds | date | machine |", "| --- | ---: | --- | --- |"]
    for name, run in sorted(runtimes.items()):
        link = f"{{doc}}`../notebooks/{name}`"
        cells = [link, f"{run['seconds']:.0f}", run["date"], run["machine"]]
        rows.append(f"| {' | '.join(cells)} |")
    return HEAD + "\n".join(rows) + "\n"


def main() -> None:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("book/status.md is out of date: run python tools/build_status.py")


if __name__ == "__main__":
    main()
