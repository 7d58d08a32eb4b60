"""The command ``artlib show``: where the steps fall, and how that was learned."""

from __future__ import annotations

import argparse
import io
import json
import math
import textwrap
from pathlib import Path
from typing import Any

from torch import Tensor

from .._common.console import printable, say
from .._common.files import write_bytes
from ..flow.processes import Process
from ..schedules.constructors import Schedule
from ..schedules.plan import Plan
from ..schedules.shared import notes, worth
from ..solvers.solver import solver_of
from .named import load_all
from .sources import STDOUT, InputError, check_free, deliver, parse_process


def show(args: argparse.Namespace) -> None:
    """Print grids as a table or as JSON, and draw them if asked."""
    process = parse_process(args.process) if args.process else None
    if args.plot:
        figure_format = _figure_format(args.plot)
        check_free(args.plot, args.force)
    found = load_all(args.schedules, process)
    drawn = {k: one for k, one in found.items() if isinstance(one, Schedule)}
    if args.plot and len(drawn) < len(found):
        raise InputError("--plot: it draws schedules; a plan has its steps, see --json")
    if args.json:
        content = [_described(label, s, args.steps) for label, s in found.items()]
        deliver(STDOUT, json.dumps(content, allow_nan=False, indent=1) + "\n")
    else:
        names = [one.name for one in found.values()]
        for label, one in found.items():
            alone = names.count(one.name) == 1
            _print(one, args.steps, "" if alone else f" ({printable(label)})")
    if args.plot:
        from ..plotting import plot_steps

        figure = plot_steps(drawn, args.steps[0])
        buffer = io.BytesIO()
        figure.savefig(buffer, format=figure_format, bbox_inches="tight")
        write_bytes(args.plot, buffer.getvalue())
        say(f"figure written to {args.plot}", error=args.json)


def _print(found: Schedule | Plan, steps: list[int], label: str) -> None:
    process, name = found.process, printable(found.name)
    if isinstance(found, Plan):
        levels = "told levels" if not found.is_honest else "honest"
        solver = solver_of(found.solver).name
        say(f"{name}{label}: {process}, {solver}, NFE {found.nfe}, {levels}")
        say(origin(found))
        _print_grid(found.process, found.nodes, found.told)
        return
    say(f"{name}{label}: {process}, last step {found.last_step}")
    say(origin(found))
    for K in steps:
        _print_grid(process, found.grid(K), None)


def _print_grid(process: Process, grid: Tensor, told: Tensor | None) -> None:
    K = len(grid) - 1
    level = process.noise_level(grid)
    asked = None if told is None else process.noise_level(told)
    title = "" if told is None else f" {'told':>12}"
    say(f"  {K} steps\n{'k':>6} {'t':>12} {'sigma/alpha':>12} {'step':>12}{title}")
    for k in range(K + 1):
        step = f"{float(grid[k] - grid[k + 1]):12.6g}" if k < K else ""
        if asked is not None and k < K:
            step += f" {float(asked[k]):12.6g}"
        say(f"{k:6d} {float(grid[k]):12.6g} {float(level[k]):12.6g} {step}")


def origin(schedule: Schedule | Plan) -> str:
    """How a schedule or plan was made and what it is worth, as its file tells it.

    Args:
        schedule: The schedule or plan.

    Returns:
        A few lines, two spaces in front, of printable characters.
    """
    known = schedule.provenance
    found = notes(known)
    text = ", ".join(f"{key} {value}" for key, value in found.items())
    by = [printable(str(known[key])) for key in ("library", "version") if key in known]
    if "made by" in found:  # a formula is what it is in every version
        by = []
    lines = ["; ".join([text, " ".join(by)]) if by else text]
    lines += [f"{where}: {what}" for where, what in worth(known).items()]
    return "\n".join(
        textwrap.fill(
            line,
            width=88,
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        for line in lines
    )


def _described(label: str, found: Schedule | Plan, steps: list[int]) -> dict[str, Any]:
    """A schedule or plan and its grids as JSON; an infinite noise level is null."""
    process = found.process
    same = {
        "label": label,
        "name": found.name,
        "process": process.to_dict(),
        "provenance": found.provenance,
    }
    if isinstance(found, Plan):
        return {
            **same,
            "solver": solver_of(found.solver).name,
            "nfe": found.nfe,
            "grids": [_grid(process, found.nodes)],
            "told": _levels(process, found.told),
        }
    grids = [_grid(process, found.grid(K)) for K in steps]
    return {**same, "last_step": found.last_step, "grids": grids}


def _grid(process: Process, times: Tensor) -> dict[str, Any]:
    return {
        "steps": len(times) - 1,
        "times": times.tolist(),
        "levels": _levels(process, times),
    }


def _levels(process: Process, times: Tensor) -> list[float | None]:
    levels = process.noise_level(times).tolist()
    return [v if math.isfinite(v) else None for v in levels]


def _figure_format(path: str) -> str:
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in ("png", "svg", "pdf"):
        raise InputError(f"--plot: expected a .png, .svg or .pdf file, got {path!r}")
    return suffix
