"""What every command that asks a network needs: processes, device, progress bars."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch

from .sources import InputError, Source, load_source


def team_of(device: str) -> Any | None:
    """The accelerator where several processes were launched, otherwise None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator

    cpu = device == "cpu" or not torch.cuda.is_available()
    return Accelerator(cpu=cpu)


def source_of(args: argparse.Namespace, team: Any | None) -> Source:
    """The flow that the command line names, on its device.

    Args:
        args: Of the command line.
        team: As from `team_of`.

    Raises:
        InputError: If there is no such thing, or no such device.
    """
    if team is not None:
        device = torch.device(team.device)
    elif args.device == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        device = _device(args.device)
    return load_source(
        args.source,
        process=args.process,
        shape=args.shape,
        class_label=args.class_label,
        condition=args.condition,
        guidance=args.guidance,
        device=device,
        guidance_rescale=args.guidance_rescale,
        timestep_scale=args.timestep_scale,
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"--device: {name!r} cannot be used here: {first}") from error
    return device


def hidden(args: argparse.Namespace, main: bool = True) -> bool:
    """Whether progress bars are: asked for, or where nobody would see them."""
    return bool(args.quiet) or not main or not sys.stderr.isatty()
