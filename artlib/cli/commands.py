"""The commands ``artlib compare`` and ``artlib sample``."""

from __future__ import annotations

import argparse
import json
import sys

from torch import Tensor

from .. import comparison
from .._common.console import say
from ..schedules.plan import Plan
from ..solvers.sample import nfe, sample
from ..solvers.solver import solver_of
from .named import load_plan_or_schedule, load_schedules
from .pictures import is_picture, sheet
from .sources import STDOUT, InputError, Source, check_free, deliver
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
    team = team_of(args.device)
    check_free(args.output, args.force)
    if args.output == STDOUT and sys.stdout is not None and sys.stdout.isatty():
        raise InputError(
            "--output: the samples are no text for a terminal; name a file, or send "
            "them to a program: artlib sample ... -o - | program"
        )
    source = source_of(args, team)
    picture = is_picture(args.output, source.shape)
    schedule = load_plan_or_schedule(args.schedule, source.flow.process)
    if isinstance(schedule, Plan):
        return _draw_plan(args, source, schedule, picture)
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
    _deliver_samples(args, x_0, notes, picture)


def _draw_plan(
    args: argparse.Namespace, source: Source, plan: Plan, picture: bool
) -> None:
    """Sample a plan: its own steps, solver and told levels."""
    x_0 = sample(source.flow, source.noise(args.samples, args.seed), plan)
    name = solver_of(plan.solver).name
    notes = {"source": source.label, "schedule": plan.name, "solver": name}
    notes |= {"nfe": str(plan.nfe), "seed": str(args.seed)}
    _deliver_samples(args, x_0, notes, picture)


def _deliver_samples(
    args: argparse.Namespace, x_0: Tensor, notes: dict[str, str], picture: bool
) -> None:
    """Write samples as a file or a picture, and say so."""
    from safetensors.torch import save

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
