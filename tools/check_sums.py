"""Write the check sums of what the zoo ships.

Usage: python tools/check_sums.py

Weights and samples are not in the wheel; what is fetched instead is compared with
artlib/zoo/shipped.sha256, which `sha256sum -c` reads too.
"""

import hashlib
import sys
from pathlib import Path

ZOO = Path(__file__).resolve().parent.parent / "artlib" / "zoo"


def check_sums(zoo: Path = ZOO) -> str:
    """The lines of the list: SHA-256 and path below the zoo, sorted by path."""
    folders = (zoo / "datasets" / "samples", zoo / "weights")
    files = sorted(path for folder in folders for path in folder.glob("*.safetensors"))
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  "
        f"{path.relative_to(zoo).as_posix()}\n"
        for path in files
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(__doc__)
    (ZOO / "shipped.sha256").write_text(check_sums(), "ascii")
