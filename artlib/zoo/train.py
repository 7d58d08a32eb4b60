"""Train a network of the zoo: ``python -m artlib.zoo.train fashion-base``.

One command per network, or ``missing`` for all that are not fully trained yet. It can
be stopped at any time (Ctrl-C, a power cut) and continues from its last checkpoint when
it is given again. It ends by writing the half-precision weights, and beside them, as
JSON, the recipe, the loss curve, the time it took and the device. They go to the
user's cache, where `artlib.zoo.load` looks too, or to the folder of ``--out``.

``--minutes`` or ``--seconds`` end a run early: its checkpoint is kept, so that it can
go on, and the weights as far as they are trained are written too. With ``--seconds 0``
that is all that is done with a checkpoint. ``--fast`` is for a GPU: noise is drawn
there and the network computes in bfloat16; ``--compile`` makes it faster still, after a
minute.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .._common.checks import positive_int
from .._common.console import say
from .._common.errors import TrainingError
from .._common.files import check_output, write_bytes
from .._common.tensor_file import StateFileError
from .._common.version import __version__
from . import datasets as data
from .autoencoder import Autoencoder
from .networks import (
    WEIGHTS,
    fully_trained,
    load_autoencoder,
    save_network,
    trained_folder,
)
from .recipes import RECIPES, Recipe, recipe
from .training import Trainer

_OVERRIDES = {"steps": int, "batch": int, "rate": float, "ema": float}


def training_images(chosen: Recipe) -> Tensor:
    """What a network is trained on.

    Args:
        chosen: Its recipe.

    Raises:
        FileNotFoundError: If the data set is not here; says how to get it.
    """
    if chosen.data == "fashion-latent":
        return load_autoencoder().encode(data.fashion_mnist("train"))
    return data.DATASETS[chosen.data]("train")


def train(
    chosen: Recipe,
    images: Tensor,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    every: int = 500,
    progress: bool = True,
    checkpoints: Path | None = None,
    seconds: float = math.inf,
    fast: bool = False,
    compiled: bool = False,
) -> Path:
    """Train, or continue to train, and write the weights.

    Args:
        chosen: What to train.
        images: Its training set.
        folder: Where weights and record are written.
        device: Where to train.
        every: Steps between checkpoints.
        progress: Whether to show a progress bar.
        checkpoints: Where, meanwhile, the checkpoint is written; by default ``folder``.
        seconds: Stop after that time, with a checkpoint, and write the weights as far
            as they are trained.
        fast: Whether noise is drawn on the device, and the network is in bfloat16.
        compiled: Whether the network is compiled first.

    Returns:
        The weight file.

    Raises:
        OSError: If the folder cannot be written to; what was there is intact.
        StateFileError: If the checkpoint there is damaged or of another run.
        TrainingError: If the loss is NaN; the last checkpoint is intact.
        ValueError: If the time is over before the first step.
    """
    weights, written = (folder / f"{chosen.name}.{s}" for s in ("safetensors", "json"))
    checkpoint = (checkpoints or folder) / f"{chosen.name}.checkpoint.safetensors"
    for path in (weights, written, checkpoint):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_output(path)
    until = time.monotonic() + seconds
    trainer = Trainer(
        chosen,
        images,
        device=device,
        draws="device" if fast else "cpu",
        bf16=fast,
        compiled=compiled,
    )
    if seconds <= 0 and checkpoint.exists():
        trainer.load(checkpoint)
    if seconds > 0:
        for _ in trainer.train(every=every, checkpoint=checkpoint, progress=progress):
            if time.monotonic() >= until:
                trainer.pause(checkpoint)
                break
    if not trainer.step:
        raise ValueError("seconds: too few for one step; nothing was written")
    if isinstance(trainer.average, Autoencoder):
        trainer.average.normalise(trainer.images)
    on = torch.device(device)
    made = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(on)
        if on.type == "cuda"
        else f"CPU ({platform.machine()}), {torch.get_num_threads()} thread(s)",
        "seconds": round(trainer.seconds),
        "steps": trainer.step,
        "versions": {"artlib": __version__, "torch": torch.__version__},
    }
    header = {
        "name": chosen.name,
        "sigma_data": trainer.sigma_data,
        "recipe": chosen.to_dict(),
        "made": made,
    }
    save_network(weights, trainer.average, header)
    losses = [round(loss, 5) for loss in trainer.losses]
    parameters = sum(p.numel() for p in trainer.network.parameters())
    record = {**header, "parameters": parameters, "loss_per_50_steps": losses}
    write_bytes(written, (json.dumps(record, indent=1) + "\n").encode())
    if trainer.step >= trainer.steps:
        checkpoint.unlink()
    return weights


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m artlib.zoo.train",
        description="Train a network of the zoo. Stop it when you like: the same "
        "command continues from its last checkpoint.",
    )
    parser.add_argument(
        "names",
        nargs="+",
        choices=["missing", *RECIPES],
        metavar="NAME",
        help=f"which networks: {', '.join(RECIPES)}; or 'missing', all that have "
        "not been trained on as many images as their recipe asks for",
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads")
    for field, kind in _OVERRIDES.items():
        parser.add_argument(f"--{field}", type=kind, help="other than the recipe's")
    parser.add_argument("--out", type=Path, help="folder; default: the user's cache")
    parser.add_argument(
        "--checkpoints", type=Path, help="another folder for what is kept meanwhile"
    )
    box = parser.add_mutually_exclusive_group()
    box.add_argument("--minutes", type=float, help="stop after that, to go on later")
    box.add_argument("--seconds", type=float, help="the same, in seconds")
    parser.add_argument("--every", type=int, default=500, help="steps per checkpoint")
    parser.add_argument(
        "--fast", action="store_true", help="noise on the device, bfloat16 (for a GPU)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the network first"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    changed = {f: v for f in _OVERRIDES if (v := getattr(given, f)) is not None}
    names = dict.fromkeys(given.names)
    seconds = math.inf if given.seconds is None else given.seconds
    if given.minutes is not None:
        seconds = 60 * given.minutes
    until = time.monotonic() + seconds
    try:
        folder = given.out or trained_folder()
        if "missing" in names:
            places = [given.out] if given.out else [WEIGHTS, folder]
            names = dict.fromkeys(
                n for n in RECIPES if not any(fully_trained(n, p) for p in places)
            )
        for place, name in enumerate(names):
            if place and time.monotonic() >= until:
                say(f"time is over; not begun: {', '.join(list(names)[place:])}")
                break
            chosen = replace(recipe(name), **changed)
            path = train(
                chosen,
                training_images(chosen),
                folder,
                device=given.device,
                progress=not given.quiet,
                every=positive_int(given.every, "--every"),
                checkpoints=given.checkpoints,
                seconds=until - time.monotonic(),
                fast=given.fast,
                compiled=given.compile,
            )
            print(path, flush=True)
    except (OSError, StateFileError, TrainingError, ValueError) as error:
        say(f"error: {error}", error=True)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
