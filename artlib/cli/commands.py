"""The commands ``artlib compare`` and ``artlib sample``."""

from __future__ import annotations

import argparse
import json
import sys

from .. import comparison
from .._common.console import say
from ..solvers.sample import nfe, sample
from .named import load_schedule, load_schedules
from .pictures import is_picture, sheet
from .sources import STDOUT, InputError, check_free, deliver
from .surroundings import hidden, source_of, team_of


def compare(args: argparse.Namespace) -> None:
    """Print the error of several schedules against NFE, on one flow."""
    source = source_of(args, None)
    process = source.flow.process
    found = load_schedules(args.schedules, process)
    for name, schedule in found.items():
        if schedule.process != process:
            raise InputError(
                f"{name}: made for {schedule.process}, but {source.label} runs under "
                f"{process}; learn it for this source"
            )
    noises = [source.noise(args.samples, args.seed + k) for k in range(args.seeds)]
    table = comparison.compare(
        source.flow,
        found,
        noises,
        {args.solver: args.steps},
        ends=comparison.references(source.flow, noises),
        progress=not hidden(args),
    )
    if args.json:
        deliver(STDOUT, _as_json(args, table, list(found)))
        return
    width = max(10, *(len(name) for name in found))
    print(
        f"root-mean-square error against the exact flow of {source.label}, "
        f"{args.solver}, {args.samples} samples, {args.seeds} seeds from {args.seed}, "
        "the same noise for all"
    )
    counts = [table.nfe[f"{args.solver} {K}"] for K in args.steps]
    print(f"{'NFE':{width}}" + "".join(f"{count:>20d}" for count in counts))
    for name in found:
        cells = [(args.solver, K, name, "error") for K in args.steps]
        texts = [f"{table.mean(*c):.4f} +- {table.spread(*c):.4f}" for c in cells]
        print(f"{name:{width}}" + "".join(f"{text:>20}" for text in texts))


def draw(args: argparse.Namespace) -> None:
    """Sample and write the samples."""
    from safetensors.torch import save

    team = team_of(args.device)
    check_free(args.output, args.force)
    if args.output == STDOUT and sys.stdout is not None and sys.stdout.isatty():
        raise InputError(
            "--output: the samples are no text for a terminal; name a file, or send "
            "them to a program: artlib sample ... -o - | program"
        )
    source = source_of(args, team)
    picture = is_picture(args.output, source.shape)
    schedule = load_schedule(args.schedule, source.flow.process)
    grid = schedule.grid(args.steps)
    x_T = source.noise(args.samples, args.seed)
    if team is None:
        x_0 = sample(source.flow, x_T, grid, solver=args.solver)
    else:
        from .. import parallel

        flow = parallel.split(source.flow, team)
        x_0 = parallel.sample(flow, x_T, grid, solver=args.solver)
        team.end_training()
        if not team.is_main_process:
            return
    notes = {"source": source.label, "schedule": schedule.name, "solver": args.solver}
    notes |= {"nfe": str(nfe(grid, solver=args.solver)), "seed": str(args.seed)}
    if picture:
        content = sheet(x_0)
    else:
        content = save({"x_0": x_0.float().cpu().contiguous()}, metadata=notes)
    deliver(args.output, content)
    where = "standard output" if args.output == STDOUT else args.output
    say(
        f"{len(x_0)} samples of shape {list(x_0.shape[1:])}, NFE {notes['nfe']}, "
        f"written to {where} as {'a picture' if picture else 'x_0'}",
        error=args.output == STDOUT,
    )


# Parts of the above.


def _as_json(
    args: argparse.Namespace, table: comparison.Comparison, labels: list[str]
) -> str:
    """The table as JSON, an error per seed in every cell."""
    cells = {
        label: [
            table.values(args.solver, K, label, "error").tolist() for K in args.steps
        ]
        for label in labels
    }
    content = {
        "source": args.source,
        "solver": args.solver,
        "samples": args.samples,
        "seeds": [args.seed + k for k in range(args.seeds)],
        "steps": args.steps,
        "nfe": [table.nfe[f"{args.solver} {K}"] for K in args.steps],
        "errors": cells,
    }
    return json.dumps(content, allow_nan=False, indent=1) + "\n"
