"""Train a feature network: ``python -m artlib.zoo.train_features cnn-fashion``.

A few minutes on one CPU core. It ends by writing, in one file, the half-precision
weights and the training set's feature statistics, and beside it, as JSON, the recipe,
the loss of each epoch, the accuracy, the time it took and the device. They go to the
user's cache, or to the folder of ``--out``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .._common.console import say
from .._common.errors import TrainingError
from .._common.files import check_output, write_bytes
from .._common.tensor_file import write_state
from .._common.version import __version__
from ..metrics.distances import frechet_distance, gaussian_statistics
from .datasets import DATASETS
from .features import BUILD, KIND, FeatureNet, LeNet, Reference, SmallCNN
from .networks import trained_folder


@dataclass(frozen=True)
class FeatureRecipe:
    """How a feature network is trained: Adam on the cross entropy.

    Attributes:
        name: Of the network, a key of `BUILD`.
        data: What it is trained on, a key of `DATASETS`.
        measure: Name of the Frechet distance in its features.
        epochs: Passes over the training set.
        batch: Images per step.
        rate: Peak learning rate; falls to 0 as a cosine.
        seed: Of weights and order.
    """

    name: str
    data: str
    measure: str
    epochs: int
    batch: int = 128
    rate: float = 1e-3
    seed: int = 0


RECIPES = {
    recipe.name: recipe
    for recipe in (
        FeatureRecipe("lenet-mnist", "mnist", "LeNet-FD", epochs=20),
        FeatureRecipe("cnn-fashion", "fashion", "FashionCNN-FD", epochs=5),
        FeatureRecipe("rotation-emoji", "emoji", "RotationCNN-FD", epochs=12),
    )
}
"""The feature networks by name; sizes and lengths are ours."""


def labelled(data: str, split: str) -> tuple[Tensor, Tensor]:
    """Images and what to tell: their class, or for emoji their quarter turns.

    Args:
        data: A key of `DATASETS`.
        split: ``"train"``, ``"test"`` or ``"sample"``.

    Returns:
        Images [N, C, H, W] and labels, int64 [N]; each emoji comes four times.

    Raises:
        FileNotFoundError: If the data set is not here; says how to get it.
    """
    if data != "emoji":
        pair = DATASETS[data](split, return_labels=True)
        return cast(tuple[Tensor, Tensor], pair)
    images = DATASETS[data](split)
    turned = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
    return turned, torch.arange(4).repeat_interleave(len(images))


def fit(
    recipe: FeatureRecipe,
    images: Tensor,
    labels: Tensor,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[LeNet | SmallCNN, list[float]]:
    """Train a network from its seed.

    Args:
        recipe: What to train.
        images: [N, C, H, W] in [-1, 1].
        labels: int64 [N].
        device: Where.
        progress: Whether to show a progress bar (on stderr).

    Returns:
        The network and the mean loss of each epoch.

    Raises:
        TrainingError: If the loss is NaN.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = BUILD[recipe.name]().to(device)
    rng = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.rate)
    steps = recipe.epochs * (len(images) // recipe.batch)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for epoch in tqdm(range(recipe.epochs), desc=recipe.name, disable=not progress):
        total = torch.zeros((), device=device)
        count = 0
        for rows in _batches(len(images), recipe.batch, rng):
            logits = network(images[rows].to(device))
            loss = nn.functional.cross_entropy(logits, labels[rows].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            fall.step()
            total += loss.detach()
            count += 1
        losses.append(float(total) / count)
        if not math.isfinite(losses[-1]):
            raise TrainingError(
                f"{recipe.name}, epoch {epoch + 1}: the loss is {losses[-1]}; check "
                "the images or lower the learning rate; nothing was written"
            )
    return network, losses


@torch.no_grad()
def normalise(network: LeNet | SmallCNN, images: Tensor) -> None:
    """Scale the features, in place, to a mean variance of 1 over the training set.

    A ReLU lets a positive factor through, so the factor that the last hidden layer
    gains is taken from the head, and the logits stay as they are. It gives distances
    a unit: 1 is the variance of a typical feature.

    Args:
        network: The network.
        images: Its training set [N, C, H, W], emoji upright.
    """
    device = network.head.weight.device
    parts = [network.body(piece.to(device)).double() for piece in images.split(500)]
    factor = float(torch.cat(parts).var(0).mean()) ** -0.5
    last = cast(nn.Linear, network.body[-2])
    last.weight.mul_(factor)
    last.bias.mul_(factor)
    network.head.weight.div_(factor)


def train(
    recipe: FeatureRecipe,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Path:
    """Train, round to half precision, measure, and write.

    Args:
        recipe: What to train.
        folder: Where weights and record are written.
        device: Where to train.
        progress: Whether to show a progress bar.

    Returns:
        The weight file.

    Raises:
        FileNotFoundError: If the data set is not here.
        OSError: If the folder cannot be written to; what was there is intact.
        TrainingError: If the loss is NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, written = (folder / f"{recipe.name}.{s}" for s in ("safetensors", "json"))
    check_output(weights)
    check_output(written)
    started = time.monotonic()
    images, labels = labelled(recipe.data, "train")
    network, losses = fit(recipe, images, labels, device=device, progress=progress)
    normalise(network, DATASETS[recipe.data]("train"))
    seconds = time.monotonic() - started
    header: dict[str, Any] = {
        "name": recipe.name,
        "measure": recipe.measure,
        "recipe": asdict(recipe),
        "made": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device": torch.cuda.get_device_name(device)
            if torch.device(device).type == "cuda"
            else f"CPU ({platform.machine()}), {torch.get_num_threads()} thread(s)",
            "seconds": round(seconds),
            "versions": {"artlib": __version__, "torch": str(torch.__version__)},
        },
    }
    tensors, measured = _measure(recipe, network)
    header |= measured
    write_state(weights, tensors, header, kind=KIND)
    parameters = sum(p.numel() for p in network.parameters())
    record = {
        **header,
        "parameters": parameters,
        "loss_per_epoch": [round(loss, 5) for loss in losses],
    }
    write_bytes(written, (json.dumps(record, indent=1) + "\n").encode())
    return weights


def _measure(
    recipe: FeatureRecipe, network: LeNet | SmallCNN
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is stored: rounded weights and statistics; and what they achieve."""
    tensors = {key: t.detach().half() for key, t in network.state_dict().items()}
    network.load_state_dict({key: t.float() for key, t in tensors.items()})
    nothing = Reference(torch.empty(0), torch.empty(0, 0), 0)
    blank = {"name": recipe.name, "measure": recipe.measure, "test_accuracy": 0.0}
    net = FeatureNet(network, nothing, blank)
    images, labels = labelled(recipe.data, "test")
    right = net.logits(images).argmax(1).cpu() == labels
    # Statistics are of the images as they are: upright, for emoji too.
    data = DATASETS[recipe.data]
    upright = data("train")
    mean, cov = gaussian_statistics(net.features(upright))
    test = gaussian_statistics(net.features(data("test")))
    tensors |= {"reference.mean": mean.float(), "reference.cov": cov.float()}
    return tensors, {
        "test_accuracy": round(float(right.double().mean()), 4),
        "test_count": len(right),
        "reference_n": len(upright),
        "distance_of_the_test_set": round(frechet_distance(mean, cov, *test), 5),
    }


def _batches(count: int, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """A random order in full batches; the remainder waits for another epoch."""
    order = torch.randperm(count, generator=rng)
    yield from order[: count // size * size].split(size)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m artlib.zoo.train_features",
        description="Train a feature network, a few minutes on one CPU core.",
    )
    parser.add_argument("name", choices=sorted(RECIPES), help="which network")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="folder; default: the user's cache")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        path = train(
            RECIPES[given.name],
            given.out or trained_folder(),
            device=given.device,
            progress=not given.quiet,
        )
    except (OSError, TrainingError) as error:
        say(f"error: {error}", error=True)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
