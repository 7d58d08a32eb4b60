"""The command ``artlib show``: where the steps fall, and how that was learned."""

from __future__ import annotations

import argparse
import io
import json
import math
import textwrap
from pathlib import Path
from typing import Any

from .._common.console import printable, say
from .._common.files import write_bytes
from ..schedules.constructors import Schedule
from ..schedules.shared import notes
from .named import load_schedules
from .sources import STDOUT, InputError, check_free, deliver, parse_process


def show(args: argparse.Namespace) -> None:
    """Print grids as a table or as JSON, and draw them if asked."""
    process = parse_process(args.process) if args.process else None
    if args.plot:
        figure_format = _figure_format(args.plot)
        check_free(args.plot, args.force)
    found = load_schedules(args.schedules, process)
    if args.json:
        content = [_described(label, s, args.steps) for label, s in found.items()]
        deliver(STDOUT, json.dumps(content, allow_nan=False, indent=1) + "\n")
    else:
        names = [schedule.name for schedule in found.values()]
        for label, schedule in found.items():
            alone = names.count(schedule.name) == 1
            _print(schedule, args.steps, "" if alone else f" ({printable(label)})")
    if args.plot:
        from ..plotting import plot_steps

        figure = plot_steps(found, args.steps[0])
        buffer = io.BytesIO()
        figure.savefig(buffer, format=figure_format, bbox_inches="tight")
        write_bytes(args.plot, buffer.getvalue())
        say(f"figure written to {args.plot}", error=args.json)


def _print(schedule: Schedule, steps: list[int], label: str) -> None:
    process = schedule.process
    say(f"{printable(schedule.name)}{label}: {process}, last step {schedule.last_step}")
    say(origin(schedule))
    for K in steps:
        grid = schedule.grid(K)
        level = process.noise_level(grid)
        say(f"  {K} steps\n{'k':>6} {'t':>12} {'sigma/alpha':>12} {'step':>12}")
        for k in range(K + 1):
            step = f"{float(grid[k] - grid[k + 1]):12.6g}" if k < K else ""
            say(f"{k:6d} {float(grid[k]):12.6g} {float(level[k]):12.6g} {step}")


def origin(schedule: Schedule) -> str:
    """How a schedule was made, as its file tells it, in lines of a table.

    Args:
        schedule: The schedule.

    Returns:
        A few lines, two spaces in front, of printable characters.
    """
    known = schedule.provenance
    found = notes(known)
    text = ", ".join(f"{key} {value}" for key, value in found.items())
    by = [printable(str(known[key])) for key in ("library", "version") if key in known]
    if "made by" in found:  # a formula is what it is in every version
        by = []
    return textwrap.fill(
        "; ".join([text, " ".join(by)]) if by else text,
        width=88,
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
    )


def _described(label: str, schedule: Schedule, steps: list[int]) -> dict[str, Any]:
    """A schedule and its grids as JSON; an infinite noise level is null."""
    grids = []
    for K in steps:
        grid = schedule.grid(K)
        levels = schedule.process.noise_level(grid).tolist()
        grids.append(
            {
                "steps": K,
                "times": grid.tolist(),
                "levels": [v if math.isfinite(v) else None for v in levels],
            }
        )
    return {
        "label": label,
        "name": schedule.name,
        "process": schedule.process.to_dict(),
        "last_step": schedule.last_step,
        "provenance": schedule.provenance,
        "grids": grids,
    }


def _figure_format(path: str) -> str:
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in ("png", "svg", "pdf"):
        raise InputError(f"--plot: expected a .png, .svg or .pdf file, got {path!r}")
    return suffix
