"""The command ``artlib export``: a schedule or plan in a framework's form."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .._common.console import say
from ..schedules.constructors import Schedule
from ..schedules.plan import Plan
from .named import STDIN, load_plan_or_schedule
from .sources import (
    STDOUT,
    InputError,
    check_free,
    deliver,
    load_component,
    read_json,
)


def export(args: argparse.Namespace) -> None:
    """Write a schedule in a framework's form, or print it.

    Args:
        args: Of the command line, see ``artlib export --help``.

    Raises:
        InputError: If something is missing or in the way.
        ExportError: If the schedule cannot be exported unharmed.
    """
    from ..adapters import comfyui, k_diffusion

    output = STDOUT if args.output is None else args.output
    if args.to != "comfyui":
        check_free(output, args.force)
    if args.to == "comfyui" and args.schedule == STDIN and args.name is None:
        raise InputError(
            "--name: a schedule from standard input has no file's name; say what "
            "the node's list is to call it"
        )
    schedule = load_plan_or_schedule(args.schedule)
    if args.to == "comfyui":
        if output == STDOUT:
            raise InputError(
                "--output: --to comfyui writes a folder, for example "
                "ComfyUI/custom_nodes/artlib_node"
            )
        name = Path(args.schedule).stem if args.name is None else args.name
        target = comfyui.schedule_file(output, name)
        if target.parent.is_dir():
            check_free(target, args.force)
        written = comfyui.install(schedule, output, name, force=args.force)
        say(f"node and schedule written: {written}")
        return
    if args.steps is None and isinstance(schedule, Plan):
        args.steps = schedule.steps
    if args.steps is None:
        raise InputError(f"--steps: --to {args.to} needs a number of steps")
    K, denoise = args.steps, args.denoise
    if args.to == "diffusers":
        text = json.dumps(_diffusers_arguments(schedule, args), allow_nan=False)
    elif args.to == "json":
        sigmas = k_diffusion.to_k_diffusion(schedule, K, denoise=denoise)
        times = schedule.grid(max(K, int(K / denoise + 1e-9)))[-(K + 1) :]
        content = {
            "name": schedule.name,
            "process": schedule.process.to_dict(),
            "steps": K,
            "times": times.tolist(),
            "sigmas": [float(f"{value:.9g}") for value in sigmas.tolist()],
        }
        text = json.dumps(content, allow_nan=False)
    else:
        text = k_diffusion.to_text(schedule, K, denoise=denoise)
        if args.to == "k-diffusion":
            text = f"import torch\n\nsigmas = torch.tensor({text})"
    deliver(output, f"{text}\n")


def _diffusers_arguments(
    schedule: Schedule | Plan, args: argparse.Namespace
) -> dict[str, Any]:
    from ..adapters.diffusers import pipeline_arguments

    if args.scheduler is None:
        raise InputError(
            "--scheduler: --to diffusers needs the folder of the pipeline (or of its "
            "scheduler), whose settings have to be undone; in Python, "
            "schedule.to_diffusers(pipe.scheduler, K) needs nothing"
        )
    folder = Path(args.scheduler)
    if (folder / "scheduler").is_dir():
        folder = folder / "scheduler"
    config = folder / "scheduler_config.json"
    if not config.is_file():
        raise InputError(f"--scheduler: {folder} holds no scheduler_config.json")
    if args.denoise != 1:
        raise InputError("--denoise: a diffusers pipeline cuts by its own strength")
    name = read_json(config).get("_class_name")
    scheduler = load_component(folder, "", ["diffusers", name])
    found = pipeline_arguments(schedule, scheduler, args.steps, mu=args.mu)
    return {key: torch.as_tensor(value).tolist() for key, value in found.items()}
