"""Measure CIFAR-10 in EfficientNet-Lite0: ``python -m artlib.zoo.measure_imagenet``.

It writes the reference of `artlib.zoo.imagenet`: mean and covariance of the features of
the training images, not mirrored. About 40 ms an image on one CPU core, so 35 minutes
for all; ``--limit`` takes the first ones only. It can be stopped at any time and
continues, with a larger limit too, from its checkpoint, which holds the sums so far.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .._common.checks import check_samples, positive_int
from .._common.console import say
from .._common.files import check_output, write_bytes
from .._common.tensor_file import (
    StateFileError,
    check_header,
    is_count,
    read_state,
    write_state,
)
from .._common.version import __version__
from . import datasets
from .imagenet import FEATURES, FILE, MEASURE, NAME, LiteNet, build, write_reference
from .networks import trained_folder

_KIND = "artlib-zoo-reference-sums"
_EVERY = 1000
"""Images between two checkpoints."""


class Sums:
    """Sums over the features of a set, image by image, kept in a checkpoint.

    Attributes:
        count: Images so far, the first ones of the set.
        total: Sum of their features, float64 [1280].
        products: Sum of their outer products, float64 [1280, 1280].
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros(FEATURES, dtype=torch.float64)
        self.products = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in the features [n, 1280] of the next images."""
        found = features.detach().cpu().double()
        self.count += len(found)
        self.total += found.sum(0)
        self.products += found.T @ found

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean [1280] and covariance [1280, 1280] (division by n - 1)."""
        mean = self.total / self.count
        centred = self.products - self.count * torch.outer(mean, mean)
        return mean, centred / (self.count - 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, atomically."""
        tensors = {"total": self.total, "products": self.products}
        write_state(path, tensors, {"count": self.count}, kind=_KIND)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint.

        Raises:
            StateFileError: If it is damaged or something else.
        """
        tensors, header = read_state(path, kind=_KIND)
        check_header(header, path, {"count": is_count})
        own = {"total": self.total, "products": self.products}
        if {k: t.shape for k, t in tensors.items()} != {
            k: t.shape for k, t in own.items()
        }:
            raise StateFileError(f"{path}: no sums of {FEATURES} features; delete it")
        self.count = header["count"]
        self.total, self.products = tensors["total"], tensors["products"]


def accumulate(
    network: LiteNet,
    images: Tensor,
    sums: Sums,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Iterator[int]:
    """Add to the sums the images that they do not have yet.

    Args:
        network: From `build`, on any device.
        images: The whole set [N, 3, 32, 32], in [-1, 1].
        sums: Changed; its first ``sums.count`` images are skipped.
        checkpoint: A file that is rewritten after each `_EVERY` images.

    Yields:
        How many images are done.

    Raises:
        OSError: If a checkpoint cannot be written; the last one is intact.
    """
    images = check_samples(images, "images")
    device = network.head.weight.device
    with torch.no_grad():
        while sums.count < len(images):
            part = images[sums.count : sums.count + _EVERY]
            pieces = [
                network.body(piece.to(device, torch.float32).clamp(-1, 1))
                for piece in part.split(network.batch)
            ]
            sums.add(torch.cat(pieces))
            if checkpoint is not None:
                sums.save(checkpoint)
            yield sums.count


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m artlib.zoo.measure_imagenet",
        description="Measure CIFAR-10's training images in EfficientNet-Lite0. Stop it "
        "when you like: the same command continues from its checkpoint.",
    )
    parser.add_argument("--limit", type=int, help="only so many images, the first ones")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="folder; default: the user's cache")
    parser.add_argument("--checkpoint", type=Path, help="what is kept meanwhile")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        print(_measure(given))
    except (ImportError, OSError, ValueError) as error:
        say(f"error: {error}", error=True)
        return 1
    except KeyboardInterrupt:
        say("stopped; the same command continues", error=True)
        return 130
    return 0


def _measure(given: argparse.Namespace) -> Path:
    folder: Path = given.out or trained_folder()
    checkpoint = given.checkpoint or folder / f"{FILE}.checkpoint.safetensors"
    paths = [folder / f"{FILE}.{s}" for s in ("safetensors", "json")]
    for path in (*paths, checkpoint):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_output(path)
    images = datasets.cifar10("train")
    if given.limit is not None:
        images = images[: positive_int(given.limit, "limit")]
    sums = Sums()
    if checkpoint.exists():
        sums.load(checkpoint)
    if sums.count > len(images):
        raise ValueError(
            f"--limit {len(images)}: {checkpoint} holds {sums.count} images already; "
            "give a larger limit, or another --checkpoint"
        )
    network = build().to(given.device)
    bar = tqdm(
        total=len(images),
        initial=sums.count,
        desc=FILE,
        unit="image",
        disable=given.quiet,
    )
    with bar:
        for done in accumulate(network, images, sums, checkpoint=checkpoint):
            bar.update(done - bar.n)
    header = {
        "name": NAME,
        "measure": MEASURE,
        "data": "cifar10",
        "images": f"the first {sums.count} of the training set, not mirrored",
        "reference_n": sums.count,
        "made": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device": torch.cuda.get_device_name(given.device)
            if torch.device(given.device).type == "cuda"
            else f"CPU ({platform.machine()})",
            "versions": {"artlib": __version__, "torch": str(torch.__version__)},
        },
    }
    write_reference(paths[0], *sums.statistics(), header)
    write_bytes(paths[1], (json.dumps(header, indent=1) + "\n").encode())
    return paths[0]


if __name__ == "__main__":
    sys.exit(main())
